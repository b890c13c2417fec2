"""The advantage variance of sequential updates against the number of agents: HAPPO and clip-HAPPO on a VMAS task.

The agent at position k of the order weighs its advantages by w(M), M the compound ratio of the k agents before it:
w(M) = M in HAPPO, min(M, 1) in clip-HAPPO (Le & Ta, arXiv 2606.25526). At position 0, M = 1; so the ratio
Var(w(M) A) / Var(A) is the variance of the position over that of position 0. Theory has it grow exponentially with the
position in HAPPO and stay at most E[A²] / Var(A) in clip-HAPPO, which is 1 here, where A is normalised to mean 0. Run

    OMP_NUM_THREADS=1 python examples/advantage_variance.py
    OMP_NUM_THREADS=1 python examples/advantage_variance.py --agents 2 4 --seeds 0 --iterations 3 --output outputs/quick

TIMES
"""

import argparse
import gc
from dataclasses import replace
from pathlib import Path

import torch
from benchmarl.environments import TaskClass, task_config_registry
from benchmarl.experiment import Experiment
from benchmarl.hydra_config import load_experiment_config_from_hydra, load_model_config_from_hydra
from hydra import compose, initialize_config_module
from torch import Tensor

from benchmarl_trust import ClipHappoConfig, HappoConfig

ALGORITHMS = {"HAPPO": HappoConfig, "clip-HAPPO": ClipHappoConfig}
METRICS = ("advantage_variance", "factor_max", "factor_ess")
COLUMNS = ("variance_last", "variance_mean", "variance_largest", "factor_max", "factor_ess")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--task", default="balance", help="a VMAS task whose configuration has n_agents")
    parser.add_argument("--agents", nargs="+", type=int, default=[2, 4, 8, 16], metavar="N", help="numbers of agents")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="seeds of each run")
    parser.add_argument("--iterations", type=int, default=6, help="iterations of each run")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--epochs", type=int, default=5, help="passes of each agent, and of the critic, over a batch")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/advantage_variance"), help="folder of logs, table and picture"
    )
    parser.add_argument(
        "--override", nargs="+", default=[], metavar="KEY=VALUE", help="Hydra overrides of the preset vmas_laptop"
    )
    return parser.parse_args()


def make_settings(args: argparse.Namespace) -> dict:
    """What all runs share: models and experiment configuration, composed from the preset by Hydra."""
    with initialize_config_module("benchmarl.conf", version_base=None):
        # Hydra wants an algorithm and a task; those of the runs take their place.
        choices = ["experiment=vmas_laptop", "algorithm=happo", "task=vmas/balance"]
        cfg = compose("config", overrides=choices + args.override)
    config = load_experiment_config_from_hydra(cfg.experiment)
    config.lr = args.lr
    config.on_policy_n_minibatch_iters = args.epochs
    config.max_n_frames = args.iterations * config.on_policy_collected_frames_per_batch
    config.evaluation, config.create_json, config.loggers = False, False, ["csv"]
    config.save_folder = str(args.output)
    return {
        "model_config": load_model_config_from_hydra(cfg.model),
        "critic_model_config": load_model_config_from_hydra(cfg.critic_model),
        "config": config,
    }


def make_task(name: str, n_agents: int) -> TaskClass:
    """The task with that many agents."""
    task = task_config_registry[f"vmas/{name}"].get_from_yaml()
    if "n_agents" not in task.config:
        raise SystemExit(f"--task {name}: its configuration has no n_agents. Tasks that have it: balance, dispersion.")
    task.config["n_agents"] = n_agents
    return task


def run(algorithm: str, task: str, n_agents: int, seed: int, settings: dict) -> dict[str, Tensor]:
    """Train for some iterations; what was logged of each position, by metric: [iterations, agents]."""
    # One advantage for all, as in the theory, of mean 0 and variance 1, so that batches are comparable.
    config = replace(ALGORITHMS[algorithm].get_from_yaml(), advantage="team", normalize_advantage="batch")
    experiment = Experiment(
        algorithm_config=config, task=make_task(task, n_agents), seed=seed, callbacks=[], **settings
    )
    experiment.run()
    (group,) = experiment.group_map
    scalars = experiment.logger.loggers[0].experiment.scalars  # BenchMARL writes "_" for "/"
    series = {
        metric: [scalars[f"train_{group}_policy_{metric}_position_{k}"] for k in range(n_agents)] for metric in METRICS
    }
    del experiment, scalars
    gc.collect()  # the csv logger keeps a file open for each quantity as long as it lives
    return {metric: torch.tensor(values, dtype=torch.float64)[..., 1].T for metric, values in series.items()}
