"""The grid: every sensible combination of the keys that make an algorithm, and how their tests run one."""

import itertools
from typing import NamedTuple

from benchmarl.algorithms.common import AlgorithmConfig
from cases import configured

from benchmarl_trust import ALGORITHMS

SURROGATES = ("clip", "quadratic", "reciprocal", "log")
ESTIMATORS = ("gae", "gpae")
FACTORS = ("full", "capped")
ALLOCATIONS = ("uniform", "kkt", "greedy")


class Combination(NamedTuple):
    """A preset and what is set beside it. Its name lists the preset and the keys' values."""

    name: str
    preset: str
    overrides: dict

    def config(self, **more) -> AlgorithmConfig:
        """Its configuration, with further keys."""
        return configured(ALGORITHMS[self.preset], **{**self.overrides, **more})


def combination(preset: str, **overrides) -> Combination:
    """The preset with these keys."""
    return Combination(" ".join([preset, *overrides.values()]), preset, overrides)


def grid() -> list[Combination]:
    """4 gains x 2 estimators, simultaneous, in sequence and in sequence with the cap; 3 allocations x 2 factors x 2
    estimators with natural steps.
    """
    gains = list(itertools.product(SURROGATES, ESTIMATORS))
    out = [combination("mars", surrogate=gain, estimator=estimator) for gain, estimator in gains]
    out += [
        combination("happo", surrogate=gain, factor=factor, estimator=estimator)
        for factor in FACTORS
        for gain, estimator in gains
    ]
    out += [
        combination("hatrpo", allocation=allocation, factor=factor, estimator=estimator)
        for allocation, factor, estimator in itertools.product(ALLOCATIONS, FACTORS, ESTIMATORS)
    ]
    return out
