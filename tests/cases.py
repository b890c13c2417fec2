"""One entry per algorithm: it drives every generic test."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest

from benchmarl_trust import ALGORITHMS
from benchmarl_trust.algorithms.sequential import Sequential
from benchmarl_trust.algorithms.sequential_natural import SequentialNatural

SIMULTANEOUS = ("kl_approx", "clip_fraction", "outside_fraction", "ratio_min", "ratio_max", "ESS", "entropy")
SIMULTANEOUS += ("loss_objective", "policy_ratio_min", "policy_ratio_max", "policy_kl", "policy_kl_agent_0")
GPAE = ("advantage_std_agent_0", "value_explained_variance")
VALUES = ("value_norm_mean", "value_norm_std")
SEQUENTIAL_KEYS = ("kl", "clip_fraction", "outside_fraction", "entropy", "loss", "grad_norm")
SEQUENTIAL_KEYS += ("kl_agent_0", "entropy_agent_0", "loss_agent_0")
SEQUENTIAL = tuple(f"policy_{key}" for key in SEQUENTIAL_KEYS)
NATURAL_KEYS = ("kl", "entropy", "loss", "grad_norm", "kl_bound", "kl_spent", "score", "step_size")
NATURAL_KEYS += ("accepted_fraction", "backtracks", "rejected", "gain_predicted", "gain_realised", "cg_residual")
NATURAL = tuple(f"policy_{key}{agent}" for key in NATURAL_KEYS for agent in ("", "_agent_0"))
#: What a sequential update logs for a team, by position in its order.
POSITIONS = ("factor_mean", "factor_max", "factor_ess", "advantage_variance", "order")


def configured(config, **settings):
    """The values of a configuration's yaml with these keys, all of which it must have."""
    config = config.get_from_yaml()
    for key, value in settings.items():
        assert hasattr(config, key), key
        setattr(config, key, value)
    return config


class Case(NamedTuple):
    """An algorithm and the settings that its generic tests run it with."""

    name: str
    overrides: Mapping = MappingProxyType({})

    @property
    def id(self) -> str:
        return "-".join([self.name, *map(str, self.overrides.values())])

    @property
    def sequential(self) -> bool:
        return issubclass(ALGORITHMS[self.name].associated_class(), Sequential)

    @property
    def natural(self) -> bool:
        return issubclass(ALGORITHMS[self.name].associated_class(), SequentialNatural)

    @property
    def teams(self) -> bool:
        """Whether agents of several groups can form a team."""
        return self.sequential and self.config().estimator != "preopc"

    @property
    def logged(self) -> tuple[str, ...]:
        """What is logged for each group."""
        keys = NATURAL if self.natural else SEQUENTIAL if self.sequential else SIMULTANEOUS
        keys += VALUES if self.config().normalize_value == "running" else ()
        return keys + (GPAE if self.config().estimator == "gpae" else ())

    @property
    def entropy(self) -> dict:
        """An entropy bonus, where the algorithm has one."""
        return {} if self.natural else {"entropy_coef": 0.01}

    def config(self, **overrides):
        return configured(ALGORITHMS[self.name], **{**self.overrides, **overrides})


CASES = [
    Case("mars"),
    Case("mars", {"surrogate": "log"}),
    Case("maspo"),
    Case("happo"),
    Case("cliphappo"),
    Case("a2po"),
    Case("a2po", {"normalize_value": "running"}),
    Case("hatrpo"),
    Case("cliphatrpo"),
    Case("hatrpow"),
    Case("hatrpow", {"s_estimator": "split", "order": "score"}),
    Case("hatrpog"),
    Case("gpae"),
    Case("gpae", {"n_rollouts": 3, "surrogate": "reciprocal"}),
]
#: Where a setting of an algorithm makes no difference: one case each, and off-policy GPAE, whose batches differ.
MAIN = [case for case in CASES if not case.overrides or case.name == "gpae"]
#: One case of each family: simultaneous, sequential, natural, and GPAE with past batches.
FAMILIES = ("mars", "cliphappo", "hatrpog", "gpae-3-reciprocal")


def by_family(cases):
    """What a costly test is run with: the case of each family, and as slow tests the others."""
    return [pytest.param(case, id=case.id, marks=() if case.id in FAMILIES else pytest.mark.slow) for case in cases]
