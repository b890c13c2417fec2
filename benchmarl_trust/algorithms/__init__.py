"""BenchMARL adapters: one file per algorithm, with its Algorithm and its AlgorithmConfig."""

from benchmarl_trust.algorithms.cliphappo import ClipHappo, ClipHappoConfig
from benchmarl_trust.algorithms.common import conf_folder
from benchmarl_trust.algorithms.gpae import Gpae, GpaeConfig
from benchmarl_trust.algorithms.happo import Happo, HappoConfig
from benchmarl_trust.algorithms.mars import Mars, MarsConfig
from benchmarl_trust.algorithms.maspo import Maspo, MaspoConfig

#: Every algorithm of this package, by the name that Hydra and BenchMARL's registry know.
ALGORITHMS = {
    "mars": MarsConfig,
    "maspo": MaspoConfig,
    "happo": HappoConfig,
    "cliphappo": ClipHappoConfig,
    "gpae": GpaeConfig,
}

__all__ = [
    "ALGORITHMS",
    "ClipHappo",
    "ClipHappoConfig",
    "Gpae",
    "GpaeConfig",
    "Happo",
    "HappoConfig",
    "Mars",
    "MarsConfig",
    "Maspo",
    "MaspoConfig",
    "conf_folder",
]
