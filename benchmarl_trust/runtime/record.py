"""What a run is, in words that a checkpoint can hold and another run be compared with."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from benchmarl.algorithms import EnsembleAlgorithmConfig
from benchmarl.algorithms.common import AlgorithmConfig
from benchmarl.environments import TaskClass
from benchmarl.experiment import Experiment

#: To which run a report belongs.
IDENTITY = ("algorithm", "task", "seed")


def identity_of(config: AlgorithmConfig, task: TaskClass, seed: int) -> dict[str, Any]:
    """The names by which BenchMARL's reports know a run."""
    return {
        "algorithm": config.associated_class().__name__.lower(),
        "task": f"{task.env_name().lower()}/{task.name.lower()}",
        "seed": seed,
    }


def record_of(experiment: Experiment) -> dict[str, Any]:
    """The run's identity (``IDENTITY``), and what its networks depend on: strings, numbers and dicts of them.

    Args:
        experiment (Experiment): set up as far as its algorithm.
    """
    config = experiment.algorithm_config
    ensemble = isinstance(config, EnsembleAlgorithmConfig)
    algorithms = config.algorithm_configs_map if ensemble else {"all groups": config}
    record = {
        **identity_of(config, experiment.task, experiment.seed),
        "agents": {group: len(agents) for group, agents in experiment.group_map.items()},
        "continuous_actions": experiment.continuous_actions,
        "model": plain(experiment.model_config),
        "critic_model": plain(experiment.critic_model_config),
        "share_policy_params": experiment.config.share_policy_params,
        "share_param_critic": {name: getattr(each, "share_param_critic", None) for name, each in algorithms.items()},
        # Its critic is told whose value is wanted; all others have MAPPO's.
        "estimator=gpae": {name: getattr(each, "estimator", None) == "gpae" for name, each in algorithms.items()},
        "normalize_value": {name: getattr(each, "normalize_value", "none") for name, each in algorithms.items()},
    }
    if ensemble:
        record["algorithms"] = {name: each.associated_class().__name__.lower() for name, each in algorithms.items()}
    return record


def differences(saved: dict[str, Any], now: dict[str, Any], names: Iterable[str]) -> str:
    """Which of these differ between two records, in words; of what was not saved nothing is known."""
    return "; ".join(
        f"{name} was {saved[name]} and is {now.get(name)}"
        for name in names
        if name in saved and saved[name] != now.get(name)
    )


def plain(value: object) -> str:
    """A model's configuration in words, equal for equal networks.

    Examples:
        >>> from benchmarl.models import MlpConfig
        >>> plain(MlpConfig(num_cells=[8], layer_class=int, activation_class=float))
        'MlpConfig(num_cells=[8], layer_class=int, activation_class=float, num_feature_dims=1)'
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        settings = (f"{name}={plain(item)}" for name, item in fields.items() if item is not None)
        return f"{type(value).__name__}({', '.join(settings)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {plain(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(plain, value))}]"
    if type(value).__repr__ is object.__repr__:  # which has an address
        return type(value).__qualname__
    return getattr(value, "__qualname__", str(value))
