"""What is wrong is said before BenchMARL has written or collected anything."""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

from benchmarl.algorithms import EnsembleAlgorithmConfig
from benchmarl.algorithms.common import AlgorithmConfig
from benchmarl.environments import Task, TaskClass
from benchmarl.experiment import Callback, Experiment, ExperimentConfig
from benchmarl.models.common import ModelConfig

from benchmarl_trust.runtime.restore import check_restore


class Plan(NamedTuple):
    """What an experiment is asked to be: the arguments of :class:`benchmarl.experiment.Experiment`."""

    task: Task | TaskClass
    algorithm_config: AlgorithmConfig
    model_config: ModelConfig
    seed: int
    config: ExperimentConfig
    critic_model_config: ModelConfig | None
    callbacks: list[Callback] | None

    @property
    def algorithms(self) -> list[AlgorithmConfig]:
        """The configuration, or those of an ensemble."""
        if isinstance(self.algorithm_config, EnsembleAlgorithmConfig):
            return list(self.algorithm_config.algorithm_configs_map.values())
        return [self.algorithm_config]

    @property
    def ours(self) -> list[AlgorithmConfig]:
        """Those of them that are this package's."""
        return [config for config in self.algorithms if hasattr(config, "check_keys")]


def check_plan(plan: Plan) -> None:
    """Look at everything that can be known before anything is made.

    Raises:
        ValueError: naming the key and the cure.
    """
    for config in plan.ours:
        config.check_keys()
    if plan.config.restore_file is not None:
        check_restore(plan)


def look_before_setup() -> None:
    """Let every experiment be looked at before BenchMARL sets it up; twice is safe.

    BenchMARL has no place for a plugin before it makes the experiment's folder and, for a restored one, overwrites its
    ``config.pkl``: callbacks and algorithms come later. Therefore ``Experiment.__init__`` is wrapped. Experiments of
    other algorithms are constructed as they are.
    """
    if not hasattr(Experiment.__init__, "looks_before"):
        Experiment.__init__ = _looking_before(Experiment.__init__)


def _looking_before(init: Callable) -> Callable:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        check_plan(Plan(*(bound.arguments[name] for name in Plan._fields)))
        init(self, *args, **kwargs)

    checked.looks_before = True
    return checked
