"""The barrier ablation of MARS (arXiv 2605.09212): is it the penalty's geometry, or where its boundary lies?

Four arms train on one VMAS task under an aggressive learning rate, which drives ratios towards 0:

- ``mars``: the reciprocal penalty r + 1/r - 2, unbounded at r = 0;
- ``mars-log``: the quadratic in log r, unbounded as well;
- ``maspo``: the quadratic penalty (r - 1)^2, finite at r = 0 and without force on the policy there;
- ``maspo-at-mars``, the control: the same quadratic, its optimal ratios moved to those of ``mars``.

If the boundary matters, the control should behave as ``mars``; if the geometry does, as ``maspo``. At r = 1, where an
iteration begins, all arms have the same gradient and may overshoot alike; ratios are therefore recorded at its end: do
they come back? The formula of MARS is reconstructed from the paper's abstract; the ablation says nothing of the
authors' own code. Run it with

    python examples/barrier.py
    python examples/barrier.py --task navigation --lr 1e-3 --seeds 0 1 --frames 60000 --output outputs/navigation

A run of the default 120 000 frames takes about 80 seconds on one CPU core, the first command (four arms, three seeds)
a quarter of an hour. It prints a table and writes it as ``barrier.csv``, with the curves in ``barrier.png``, into the
output folder, beside BenchMARL's logs. Matplotlib is needed.
"""

import argparse
import csv
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch
from benchmarl.algorithms.common import AlgorithmConfig
from benchmarl.environments import task_config_registry
from benchmarl.experiment import Callback, Experiment
from benchmarl.hydra_config import load_experiment_config_from_hydra, load_model_config_from_hydra
from hydra import compose, initialize_config_module
from matplotlib.axes import Axes
from tensordict import TensorDictBase

from benchmarl_trust import MarsConfig, MaspoConfig
from benchmarl_trust.functional import log_ratio

#: A ratio below this is counted as collapsed.
COLLAPSED = 0.1

COLUMNS = ("log10_smallest_ratio", "collapsed_share", "kl", "final_return", "area_under_curve")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--task", default="balance", help="a VMAS task with one group of agents")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--epsilon", type=float, default=0.2, help="radius of the trust region of mars and maspo")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="seeds of each arm")
    parser.add_argument("--frames", type=int, default=120_000, help="frames of each run")
    parser.add_argument("--output", type=Path, default=Path("outputs/barrier"), help="folder of logs, table, picture")
    parser.add_argument(
        "--override", nargs="+", default=[], metavar="KEY=VALUE", help="Hydra overrides of the preset vmas_laptop"
    )
    return parser.parse_args()


def make_arms(epsilon: float) -> dict[str, AlgorithmConfig]:
    """The algorithms to compare, by name."""
    mars, maspo = MarsConfig.get_from_yaml(), MaspoConfig.get_from_yaml()
    optimum_high, optimum_low = 1 / math.sqrt(1 - 2 * epsilon), 1 / math.sqrt(1 + 2 * epsilon)
    return {
        "mars": replace(mars, epsilon=epsilon, penalty="reciprocal"),
        "mars-log": replace(mars, epsilon=epsilon, penalty="log"),
        "maspo": replace(maspo, epsilon=epsilon, epsilon_negative=None),
        "maspo-at-mars": replace(maspo, epsilon=optimum_high - 1, epsilon_negative=1 - optimum_low),
    }


def make_settings(args: argparse.Namespace) -> dict:
    """What all runs share: task, models and experiment configuration, composed from the preset by Hydra."""
    with initialize_config_module("benchmarl.conf", version_base=None):
        # Hydra wants an algorithm; each arm brings its own.
        choices = ["experiment=vmas_laptop", "algorithm=mars", f"task=vmas/{args.task}"]
        cfg = compose("config", overrides=choices + args.override)
    config = replace(load_experiment_config_from_hydra(cfg.experiment), lr=args.lr, max_n_frames=args.frames)
    if args.frames % config.evaluation_interval:
        raise SystemExit(
            f"--frames {args.frames} is no multiple of the evaluation interval, {config.evaluation_interval}: the "
            "last policy would not be evaluated."
        )
    return {
        "task": task_config_registry[f"vmas/{args.task}"].get_from_yaml(),
        "model_config": load_model_config_from_hydra(cfg.model),
        "critic_model_config": load_model_config_from_hydra(cfg.critic_model),
        "config": config,
    }


class RatioRecorder(Callback):
    """Records how far each iteration moved the policy: its ratios to the policy that collected the frames.

    ``kl`` is the estimate that the losses log as ``kl_approx``, here of the updated policy on all frames.
    """

    def __init__(self):
        super().__init__()
        self.curves: dict[str, list[float]] = {"frames": [], "log10_ratio_min": [], "collapsed": [], "kl": []}

    def on_setup(self) -> None:
        """Refuse several groups, whose ratios would be mixed up."""
        if len(self.experiment.group_map) > 1:
            raise ValueError(f"The task has several groups of agents: {', '.join(self.experiment.group_map)}.")

    def on_train_end(self, training_td: TensorDictBase, group: str) -> None:
        """Add one iteration. The smallest ratio is kept as a logarithm, as it may be smaller than any float."""
        x = self.log_ratio(group)
        point = {
            "frames": self.experiment.total_frames,
            "log10_ratio_min": x.min().item() / math.log(10),
            "collapsed": (x < math.log(COLLAPSED)).float().mean().item(),
            "kl": -x.mean().item(),
        }
        for key, value in point.items():
            self.curves[key].append(value)

    @torch.no_grad()
    def log_ratio(self, group: str) -> torch.Tensor:
        """The log-ratios of the updated policy on the frames it was updated with, [frames, agents]."""
        batch = self.experiment.replay_buffers[group][:]  # on-policy: the iteration's frames and no others
        policy = self.experiment.algorithm.get_policy_for_loss(group)
        return log_ratio(policy.log_prob(batch), batch[group, "log_prob"])


def run_arm(algorithm: AlgorithmConfig, seed: int, folder: Path, settings: dict) -> dict[str, list[float]]:
    """Train one policy; the curves of its run."""
    folder.mkdir(parents=True, exist_ok=True)
    recorder = RatioRecorder()
    settings = settings | {"config": replace(settings["config"], save_folder=str(folder))}
    experiment = Experiment(algorithm_config=algorithm, seed=seed, callbacks=[recorder], **settings)
    experiment.run()
    results = experiment.logger.json_writer.run_data  # what BenchMARL writes to its json file
    evaluations = [step for name, step in results.items() if name.startswith("step_")]
    return recorder.curves | {
        "evaluation_frames": [step["step_count"] for step in evaluations],
        "return": [mean(step["return"]) for step in evaluations],
    }


def summarize(runs: list[dict]) -> dict[str, float]:
    """One row of the table: averages over seeds."""
    return {
        "log10_smallest_ratio": mean(min(run["log10_ratio_min"]) for run in runs),
        "collapsed_share": mean(mean(run["collapsed"]) for run in runs),
        "kl": mean(mean(run["kl"]) for run in runs),
        "final_return": mean(run["return"][-1] for run in runs),
        "area_under_curve": mean(mean(run["return"]) for run in runs),
    }


def print_table(rows: dict[str, dict[str, float]]) -> None:
    """The table, with what its columns mean."""
    print("\nAverages over seeds. Ratios are those of the updated policy on the frames of an iteration.")
    print(f"log10_smallest_ratio: of all iterations. collapsed_share: ratios below {COLLAPSED}, mean over iterations.")
    print("kl: nats, mean over iterations. final_return: of the last evaluation. area_under_curve: mean return over")
    print("evaluations.\n")
    print(f"{'arm':<15}" + "".join(f"{column:>22}" for column in COLUMNS))
    for arm, row in rows.items():
        print(f"{arm:<15}" + "".join(f"{row[column]:>22.4g}" for column in COLUMNS))


def write_csv(rows: dict[str, dict[str, float]], path: Path) -> None:
    """The table as csv."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["arm", *COLUMNS])
        writer.writeheader()
        writer.writerows({"arm": arm, **row} for arm, row in rows.items())


def save_picture(arms: dict[str, list[dict]], title: str, path: Path) -> None:
    """Four panels over frames; a line is the mean over seeds, a band reaches from the smallest to the largest."""
    panels = {
        "log10_ratio_min": ("log10 of the smallest ratio", "frames", {"value": "symlog", "linthresh": 1}),
        "collapsed": (f"share of ratios below {COLLAPSED}", "frames", {"value": "linear"}),
        "kl": ("KL (kl_approx), nats", "frames", {"value": "symlog", "linthresh": 0.01}),
        "return": ("return", "evaluation_frames", {"value": "linear"}),
    }
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, layout="constrained")
    for ax, (key, (label, x_key, scale)) in zip(axes.flat, panels.items(), strict=True):
        for arm, runs in arms.items():
            plot_band(ax, arm, runs[0][x_key], [run[key] for run in runs])
        ax.set_title(label)
        ax.set_yscale(**scale)
        ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("frames")
    figure.suptitle(title)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(arms))
    figure.savefig(path, dpi=150)


def plot_band(ax: Axes, label: str, x: list[float], curves: list[list[float]]) -> None:
    """One arm in one panel."""
    seeds = list(zip(*curves, strict=True))
    (line,) = ax.plot(x, [mean(values) for values in seeds], label=label)
    ax.fill_between(x, list(map(min, seeds)), list(map(max, seeds)), alpha=0.2, color=line.get_color())


def main() -> None:
    """Run every arm with every seed, then report."""
    args = parse_args()
    plt.switch_backend("Agg")
    settings = make_settings(args)
    arms = {}
    for name, algorithm in make_arms(args.epsilon).items():
        train = partial(run_arm, algorithm, folder=args.output / name, settings=settings)
        arms[name] = [train(seed) for seed in args.seeds]
    rows = {name: summarize(runs) for name, runs in arms.items()}
    print_table(rows)
    table, picture = args.output / "barrier.csv", args.output / "barrier.png"
    write_csv(rows, table)
    save_picture(arms, f"vmas/{args.task}, learning rate {args.lr:g}, {len(args.seeds)} seeds", picture)
    print(f"\nWrote {table}\nWrote {picture}")


if __name__ == "__main__":
    main()
