"""BenchMARL adapters: one file per algorithm, with its Algorithm and its AlgorithmConfig."""

from benchmarl_trust.algorithms.cliphappo import ClipHappo, ClipHappoConfig
from benchmarl_trust.algorithms.cliphatrpo import ClipHatrpo, ClipHatrpoConfig
from benchmarl_trust.algorithms.gpae import Gpae, GpaeConfig
from benchmarl_trust.algorithms.happo import Happo, HappoConfig
from benchmarl_trust.algorithms.hatrpo import Hatrpo, HatrpoConfig
from benchmarl_trust.algorithms.hatrpog import HatrpoG, HatrpoGConfig
from benchmarl_trust.algorithms.hatrpow import HatrpoW, HatrpoWConfig
from benchmarl_trust.algorithms.mars import Mars, MarsConfig
from benchmarl_trust.algorithms.maspo import Maspo, MaspoConfig

#: Every algorithm of this package, by the name that Hydra and BenchMARL's registry know.
ALGORITHMS = {
    "mars": MarsConfig,
    "maspo": MaspoConfig,
    "happo": HappoConfig,
    "cliphappo": ClipHappoConfig,
    "hatrpo": HatrpoConfig,
    "cliphatrpo": ClipHatrpoConfig,
    "hatrpow": HatrpoWConfig,
    "hatrpog": HatrpoGConfig,
    "gpae": GpaeConfig,
}

__all__ = [
    "ALGORITHMS",
    "ClipHappo",
    "ClipHappoConfig",
    "ClipHatrpo",
    "ClipHatrpoConfig",
    "Gpae",
    "GpaeConfig",
    "Happo",
    "HappoConfig",
    "Hatrpo",
    "HatrpoConfig",
    "HatrpoG",
    "HatrpoGConfig",
    "HatrpoW",
    "HatrpoWConfig",
    "Mars",
    "MarsConfig",
    "Maspo",
    "MaspoConfig",
]
