"""What several examples share: composing a run's settings with Hydra, and options that mean the same in all of them."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import hydra
from benchmarl.experiment import ExperimentConfig
from benchmarl.hydra_config import (
    load_algorithm_config_from_hydra,
    load_experiment_config_from_hydra,
    load_model_config_from_hydra,
    load_task_config_from_hydra,
)


def compose(*overrides: str) -> dict:
    """The arguments of BenchMARL's ``Experiment`` that ``python -m benchmarl.run`` would make of these overrides.

    ``algorithm=...`` and ``task=...`` must be among them. Where one is there twice, the last counts.
    """
    with hydra.initialize_config_module("benchmarl.conf", version_base=None):
        cfg = hydra.compose("config", overrides=list(overrides), return_hydra_config=True)
    return {
        "task": load_task_config_from_hydra(cfg.task, cfg.hydra.runtime.choices.task),
        "algorithm_config": load_algorithm_config_from_hydra(cfg.algorithm),
        "model_config": load_model_config_from_hydra(cfg.model),
        "critic_model_config": load_model_config_from_hydra(cfg.critic_model),
        "seed": cfg.seed,
        "config": load_experiment_config_from_hydra(cfg.experiment),
    }


def set_frames(config: ExperimentConfig, frames: int) -> None:
    """Set the frames of a run, which must end in an evaluation."""
    if frames % config.evaluation_interval:
        raise SystemExit(
            f"--frames {frames} is no multiple of the evaluation interval, {config.evaluation_interval}: the last "
            "policy would not be evaluated."
        )
    config.max_n_frames = frames


def make_parser(doc: str, out: Path, files: str) -> argparse.ArgumentParser:
    """A parser with ``--out``, described by the first line of a script's docstring.

    Args:
        doc: the script's docstring
        out: the default of ``--out``
        files: what the script writes into that folder, for the help
    """
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0],
        epilog=f"Files in the folder of --out: {files}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=out,
        metavar="FOLDER",
        help="folder for pictures and tables, created if missing",
    )
    return parser


def add_run_options(parser: argparse.ArgumentParser, seeds: Iterable[int] = range(3)) -> None:
    """Add ``--seeds``, with a default, and ``--override``."""
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=list(seeds), metavar="SEED", help="seeds to train with, such as 0 1 2"
    )
    parser.add_argument(
        "--override",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="Hydra overrides for all runs, such as experiment.lr=0.001 or model.num_cells=[64,64]",
    )
