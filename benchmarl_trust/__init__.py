"""Trust-region policy optimisation for cooperative multi-agent RL, as a plugin of BenchMARL.

Importing the package registers its algorithms with BenchMARL. With ``python -m benchmarl.run`` nothing need be
imported: Hydra finds the package by itself.
"""

__version__ = "0.2.0"

from benchmarl_trust import algorithms
from benchmarl_trust.algorithms import *  # noqa: F403
from benchmarl_trust.environments import TrustGamesTask
from benchmarl_trust.host_warnings import ignore_harmless
from benchmarl_trust.presets import experiment_config
from benchmarl_trust.registration import register

register()
ignore_harmless()

__all__ = ["TrustGamesTask", "experiment_config", "register"]
__all__ += algorithms.__all__
