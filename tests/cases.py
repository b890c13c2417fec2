"""One entry per algorithm: it drives every generic test."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest

from benchmarl_trust import ALGORITHMS

SIMULTANEOUS = ("kl_approx", "clip_fraction", "outside_fraction", "ratio_min", "ratio_max", "ESS", "entropy")
SIMULTANEOUS += ("loss_objective",)
GPAE = (*SIMULTANEOUS, "advantage_std_agent_0", "value_explained_variance")
SEQUENTIAL = tuple(
    f"policy_{key}"
    for key in ("kl", "clip_fraction", "entropy", "loss", "grad_norm", "kl_agent_0", "entropy_agent_0", "loss_agent_0")
)
NATURAL_KEYS = ("kl", "entropy", "loss", "grad_norm", "kl_bound", "kl_spent", "score", "step_size")
NATURAL_KEYS += ("accepted_fraction", "backtracks", "rejected", "gain_predicted", "gain_realised", "cg_residual")
NATURAL = tuple(f"policy_{key}{agent}" for key in NATURAL_KEYS for agent in ("", "_agent_0"))
#: What a sequential update logs for a team, by position in its order.
POSITIONS = ("factor_mean", "factor_max", "factor_ess", "advantage_variance", "order")


class Case(NamedTuple):
    """An algorithm and the settings that its generic tests run it with."""

    name: str
    overrides: Mapping = MappingProxyType({})
    logged: tuple[str, ...] = SIMULTANEOUS

    @property
    def id(self) -> str:
        return "-".join([self.name, *map(str, self.overrides.values())])

    @property
    def sequential(self) -> bool:
        return self.logged in (SEQUENTIAL, NATURAL)

    @property
    def natural(self) -> bool:
        return self.logged is NATURAL

    @property
    def entropy(self) -> dict:
        """An entropy bonus, where the algorithm has one."""
        return {} if self.natural else {"entropy_coef": 0.01}

    def config(self, **overrides):
        config = ALGORITHMS[self.name].get_from_yaml()
        for key, value in {**self.overrides, **overrides}.items():
            assert hasattr(config, key), key
            setattr(config, key, value)
        return config


CASES = [
    Case("mars"),
    Case("mars", {"penalty": "log"}),
    Case("maspo"),
    Case("happo", logged=SEQUENTIAL),
    Case("cliphappo", logged=SEQUENTIAL),
    Case("hatrpo", logged=NATURAL),
    Case("cliphatrpo", logged=NATURAL),
    Case("hatrpow", logged=NATURAL),
    Case("hatrpow", {"s_estimator": "split", "order": "score"}, logged=NATURAL),
    Case("hatrpog", logged=NATURAL),
    Case("gpae", logged=GPAE),
    Case("gpae", {"n_rollouts": 3, "objective": "reciprocal"}, logged=GPAE),
]
#: Where a setting of an algorithm makes no difference: one case each, and off-policy GPAE, whose batches differ.
MAIN = [case for case in CASES if not case.overrides or case.name == "gpae"]
#: One case of each family: simultaneous, sequential, natural, and GPAE with past batches.
FAMILIES = ("mars", "cliphappo", "hatrpog", "gpae-3-reciprocal")


def by_family(cases):
    """What a costly test is run with: the case of each family, and as slow tests the others."""
    return [pytest.param(case, id=case.id, marks=() if case.id in FAMILIES else pytest.mark.slow) for case in cases]
