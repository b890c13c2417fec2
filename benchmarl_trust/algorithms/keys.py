"""What each key may be: a rule beside the key, which is checked before anything is made::

    kl_threshold: float = setting(Number(above=0, usual=0.01))

Values live in the yaml files alone: such a field has no default. The tests refuse a field without a rule.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
from benchmarl.algorithms.common import AlgorithmConfig
from benchmarl.experiment import ExperimentConfig
from tensordict.nn.utils import mappings

from benchmarl_trust import functional as F

if TYPE_CHECKING:
    from benchmarl_trust.algorithms.sequential import Sequential

#: What is larger is a slip of the keyboard, or infinity by another name.
LARGEST = 1e12


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What one key may be.

    Args:
        usual (object): the value that most use, for the message.
        null (bool): whether None is a value.
    """

    usual: object
    null: bool = False

    def check(self, name: str, value: object, config: AlgorithmConfig | ExperimentConfig) -> None:
        """Refuse a value.

        Args:
            name (str): the key's, as on the command line.
            value (object): its value.
            config (dataclass): with all its keys; those that were declared before are as they must be.

        Raises:
            ValueError: naming the key, what it may be and the usual value.
        """
        raise NotImplementedError

    def _refuse(self, name: str, value: object, wanted: str) -> NoReturn:
        shown = repr(value) if isinstance(value, str) else value
        raise ValueError(f"{name}={shown} must be {'null, ' * self.null}{wanted}. The usual value is {self._usual}.")

    @property
    def _usual(self) -> object:
        return "null" if self.usual is None else self.usual


@dataclass(frozen=True, kw_only=True)
class Number(Rule):
    """A finite number in an interval; if ``whole``, an int. (True is none.)"""

    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = LARGEST
    whole: bool = False

    def check(self, name: str, value: object, config: AlgorithmConfig | ExperimentConfig) -> None:
        """See :func:`benchmarl_trust.functional.check_number`."""
        most = self.most if self.below is None else None
        bounds = {"above": self.above, "least": self.least, "below": self.below, "most": most}
        F.check_number(name, value, self._usual, **bounds, whole=self.whole, null=self.null)


@dataclass(frozen=True, kw_only=True)
class Radius(Number):
    """The ε of the configuration's surrogate."""

    above: float | None = 0

    def check(self, name: str, value: object, config: AlgorithmConfig | ExperimentConfig) -> None:
        """See :func:`benchmarl_trust.functional.check_surrogate`."""
        if value is not None or not self.null:
            F.check_surrogate(vars(config)["surrogate"], value, key=name)
        super().check(name, value, config)


@dataclass(frozen=True, kw_only=True)
class Flag(Rule):
    """True or False: the text "False" would count as True."""

    def check(self, name: str, value: object, config: AlgorithmConfig | ExperimentConfig) -> None:
        """Only these two."""
        if not isinstance(value, bool):
            self._refuse(name, value, "True or False")


@dataclass(frozen=True, kw_only=True)
class Choice(Rule):
    """One of a few names.

    Args:
        among (iterable of str): these; a dictionary is read when it is asked.
        elsewhere (mapping): names that have a meaning in other algorithms -> why not here, and what to do.
    """

    among: Iterable[str]
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def check(self, name: str, value: object, config: AlgorithmConfig | ExperimentConfig) -> None:
        """See :func:`benchmarl_trust.functional.check_choice`."""
        if isinstance(value, str) and value in self.elsewhere:
            raise ValueError(f"{name}={value}: {self.elsewhere[value]}")
        choices = [choice for choice in self.among if choice not in self.elsewhere]
        F.check_choice(name, value, choices, self._usual, self.null)


@dataclass(frozen=True, kw_only=True)
class Only(Rule):
    """The usual value alone, for the reason ``why``."""

    why: str

    def check(self, name: str, value: object, config: AlgorithmConfig | ExperimentConfig) -> None:
        """Nothing else."""
        if isinstance(value, bool) or value != self.usual:
            raise ValueError(f"{name}={value}: {self.why}")


@dataclass(frozen=True, kw_only=True)
class Order(Rule):
    """Null, a name, or a list of ints that is a permutation; whether it has as many as the team is known later.

    A tuple is refused, as in :class:`TeamLists`: no command line and no yaml file has one.

    Args:
        elsewhere (mapping): as in :class:`Choice`; the names that have a meaning are the algorithm's ``orders``.
    """

    usual: object = None
    null: bool = True
    elsewhere: Mapping[str, str] = field(default_factory=dict)

    def check(self, name: str, value: object, config: AlgorithmConfig | ExperimentConfig) -> None:
        """By its kind."""
        names = cast("type[Sequential]", cast(AlgorithmConfig, config).associated_class()).orders
        if value is None or (isinstance(value, str) and value in names):
            return
        if isinstance(value, str) and value in self.elsewhere:
            raise ValueError(f"{name}={value}: {self.elsewhere[value]}")
        permutation = (
            isinstance(value, list)
            and len(value) > 0
            and all(type(i) is int for i in value)
            and sorted(value) == list(range(len(value)))
        )
        if not permutation:
            last = len(value) - 1 if isinstance(value, list) and value else "n-1"
            wanted = f"one of {', '.join(names)}, or a permutation of 0 ... {last} as a list, such as [2,0,1]"
            self._refuse(name, value, wanted)


@dataclass(frozen=True, kw_only=True)
class TeamLists(Rule):
    """Null, or a list of lists of names; whether there are such groups is known later. A tuple is refused."""

    usual: object = None
    null: bool = True

    def check(self, name: str, value: object, config: AlgorithmConfig | ExperimentConfig) -> None:
        """By its kind."""
        if value is None:
            return
        lists = isinstance(value, list) and all(
            isinstance(team, list) and team and all(isinstance(group, str) for group in team) for team in value
        )
        if not lists:
            self._refuse(name, value, "or a list of lists of names of groups, such as [[speaker,listener]]")


@dataclass(frozen=True, kw_only=True)
class ScaleMapping(Rule):
    """What makes standard deviations of a network's outputs, as TensorDict knows it by name."""

    def check(self, name: str, value: object, config: AlgorithmConfig | ExperimentConfig) -> None:
        """Ask TensorDict for it, and it for a number: "biased_softplus_nan" is known too."""
        try:
            good = isinstance(value, str) and bool(mappings(value)(torch.zeros(1)).isfinite().all())
        except (ValueError, NotImplementedError):
            good = False
        if not good:
            self._refuse(
                name,
                value,
                "one of softplus, exp, expln, relu, none, biased_softplus, or biased_softplus_ with the scale that an "
                "output of 0 stands for",
            )


def setting(rule: Rule) -> Any:
    """The field of a key with its rule; of any type to a type checker, as that of ``dataclasses.field``."""
    return field(metadata={"rule": rule})


def check_fields(config: AlgorithmConfig) -> None:
    """Refuse what a key's own rule refuses. (A subclass of somebody else may have keys without one.)

    Raises:
        ValueError: see :meth:`Rule.check`.
    """
    for key in fields(config):
        if "rule" in key.metadata:
            key.metadata["rule"].check(f"algorithm.{key.name}", getattr(config, key.name), config)


#: The host's keys that our updates divide by, or that make a run learn nothing without saying so.
HOST = {
    "on_policy_collected_frames_per_batch": Number(least=1, most=None, whole=True, usual=6000),
    "on_policy_n_envs_per_worker": Number(least=1, most=None, whole=True, usual=10),
    "on_policy_n_minibatch_iters": Number(least=1, most=None, whole=True, usual=45),
    "on_policy_minibatch_size": Number(least=1, most=None, whole=True, usual=400),
    "share_policy_params": Flag(usual=True),
    "gamma": Number(least=0, most=1, usual=0.99),
    "lr": Number(above=0, usual=5e-5),
    "adam_eps": Number(above=0, usual=1e-6),  # with 0 a gradient of 0 makes its parameter NaN
    "clip_grad_norm": Flag(usual=True),
    "clip_grad_val": Number(above=0, most=None, null=True, usual=5),
    "max_n_frames": Number(least=1, most=None, whole=True, null=True, usual=3_000_000),
    "max_n_iters": Number(least=1, most=None, whole=True, null=True, usual=None),
    "checkpoint_interval": Number(least=0, most=None, whole=True, usual=0),
    "exclude_buffer_from_checkpoint": Flag(usual=False),
    "evaluation": Flag(usual=True),
    "evaluation_interval": Number(least=1, most=None, whole=True, usual=120_000),
    "evaluation_episodes": Number(least=1, most=None, whole=True, usual=10),
}


def check_host(experiment: ExperimentConfig) -> None:
    """Refuse what experiments of our algorithms cannot have.

    Raises:
        ValueError: see :meth:`Rule.check`.
    """
    for key, rule in HOST.items():
        if key.startswith("evaluation_") and not experiment.evaluation:
            continue  # which nothing reads then
        rule.check(f"experiment.{key}", getattr(experiment, key), experiment)
