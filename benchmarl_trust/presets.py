"""The presets of ``conf/experiment`` for scripts: what ``experiment=<preset>`` is on the command line."""

import difflib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import cast

import benchmarl
from benchmarl.experiment import ExperimentConfig
from omegaconf import DictConfig, OmegaConf

from benchmarl_trust.paths import conf_folder

BASE = "base_experiment"  # BenchMARL's own, on which every preset builds


def experiment_config(preset: str | None = None, **overrides: object) -> ExperimentConfig:
    """BenchMARL's base experiment, then the preset's values, then the overrides.

    The result equals what BenchMARL's command line makes of ``experiment=<preset> experiment.<key>=<value> ...``.

    Args:
        preset (str, optional): a file of ``conf/experiment`` without its ending; None or ``"base_experiment"`` is
            BenchMARL's own.
        **overrides: fields of :class:`benchmarl.experiment.ExperimentConfig`.

    Raises:
        ValueError: where there is no such preset or key, or a value is of the wrong type.

    Examples:
        >>> config = experiment_config("vmas_laptop", max_n_frames=12_000)
        >>> config.max_n_frames, config.loggers, config.share_policy_params
        (12000, ['csv'], False)
        >>> experiment_config("vmas_desktop")
        Traceback (most recent call last):
        ValueError: There is no experiment preset vmas_desktop. Did you mean vmas_laptop? There are base_experiment, ...
    """
    ours = {file.stem: file for file in sorted((conf_folder() / "experiment").glob("*.yaml"))}
    files = {BASE: Path(benchmarl.__file__).parent / "conf" / "experiment" / f"{BASE}.yaml"} | ours
    _check_known("experiment preset", preset or BASE, files)
    keys = [field.name for field in fields(ExperimentConfig)]
    for key in overrides:
        _check_known("experiment key", key, keys)
    values = [cast(DictConfig, OmegaConf.load(files[name])) for name in dict.fromkeys((BASE, preset or BASE))]
    for value in values:
        value.pop("defaults")  # Hydra's list, which says the order that is written out here
    merged = OmegaConf.merge(OmegaConf.structured(ExperimentConfig), *values, overrides)
    return cast(ExperimentConfig, OmegaConf.to_object(merged))


def _check_known(kind: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ValueError(f"There is no {kind} {name}.{hint} There are {', '.join(known)}.")
