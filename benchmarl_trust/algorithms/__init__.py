"""BenchMARL adapters. The presets, one file per family, and what they are made of."""

from benchmarl_trust.algorithms.gpae import Gpae, GpaeConfig
from benchmarl_trust.algorithms.happo import A2po, A2poConfig, ClipHappo, ClipHappoConfig, Happo, HappoConfig
from benchmarl_trust.algorithms.hatrpo import (
    ClipHatrpo,
    ClipHatrpoConfig,
    Hatrpo,
    HatrpoConfig,
    HatrpoG,
    HatrpoGConfig,
    HatrpoW,
    HatrpoWConfig,
)
from benchmarl_trust.algorithms.mars import Mars, MarsConfig, Maspo, MaspoConfig

#: Every algorithm of this package, by the name that Hydra and BenchMARL's registry know.
ALGORITHMS = {
    "mars": MarsConfig,
    "maspo": MaspoConfig,
    "happo": HappoConfig,
    "cliphappo": ClipHappoConfig,
    "a2po": A2poConfig,
    "hatrpo": HatrpoConfig,
    "cliphatrpo": ClipHatrpoConfig,
    "hatrpow": HatrpoWConfig,
    "hatrpog": HatrpoGConfig,
    "gpae": GpaeConfig,
}

__all__ = [
    "ALGORITHMS",
    "A2po",
    "A2poConfig",
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
