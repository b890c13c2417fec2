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
    python examples/barrier.py --task navigation --lr 1e-3 --seeds 0 1 --frames 60000 --out outputs/navigation

A run of the default 120 000 frames takes about 80 seconds on one CPU core, the first command (four arms, three seeds)
a quarter of an hour. It prints a table and writes it as ``barrier.csv``, with the curves in ``barrier.png``, into the
folder of ``--out``, beside BenchMARL's logs. Matplotlib is needed.
"""

import argparse
import csv
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch
from _common import add_run_options, compose, make_parser, set_frames
from benchmarl.experiment import Callback, Experiment
from matplotlib.axes import Axes
from tensordict import TensorDictBase

from benchmarl_trust.functional import log_ratio

#: A ratio below this is counted as collapsed.
COLLAPSED = 0.1

COLUMNS = ("log10_smallest_ratio", "collapsed_share", "kl", "final_return", "area_under_curve")


def parse_args() -> argparse.Namespace:
    """The command line."""
    files = "barrier.csv, the table; barrier.png, the curves; a folder of BenchMARL's logs for each arm"
    parser = make_parser(__doc__, Path("outputs/barrier"), files)
    add_run_options(parser)
    parser.add_argument("--task", default="balance", help="a VMAS task with one group of agents")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--epsilon", type=float, default=0.2, help="radius of the trust region of mars and maspo")
    parser.add_argument("--frames", type=int, default=120_000, help="frames of each run")
    return parser.parse_args()


def make_arms(epsilon: float) -> dict[str, tuple[str, dict]]:
    """What to compare, by name: an algorithm, and what is changed in its configuration."""
    optimum_high, optimum_low = 1 / math.sqrt(1 - 2 * epsilon), 1 / math.sqrt(1 + 2 * epsilon)
    return {
        "mars": ("mars", {"epsilon": epsilon, "surrogate": "reciprocal"}),
        "mars-log": ("mars", {"epsilon": epsilon, "surrogate": "log"}),
        "maspo": ("maspo", {"epsilon": epsilon, "epsilon_negative": None}),
        "maspo-at-mars": ("maspo", {"epsilon": optimum_high - 1, "epsilon_negative": 1 - optimum_low}),
    }


def make_settings(algorithm: str, changes: dict, folder: Path, args: argparse.Namespace) -> dict:
    """The arguments of an arm's runs, all but the seed."""
    choices = [f"algorithm={algorithm}", f"task=vmas/{args.task}"]
    settings = compose("experiment=vmas_laptop", *args.override, *choices)
    settings["algorithm_config"] = replace(settings["algorithm_config"], **changes)
    set_frames(settings["config"], args.frames)
    settings["config"].lr, settings["config"].save_folder = args.lr, str(folder)
    return settings


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


def run(settings: dict) -> dict[str, list[float]]:
    """Train once; the curves of the run."""
    recorder = RatioRecorder()
    experiment = Experiment(callbacks=[recorder], **settings)
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
    arms = {}
    for name, (algorithm, changes) in make_arms(args.epsilon).items():
        settings = make_settings(algorithm, changes, args.out / name, args)
        (args.out / name).mkdir(parents=True, exist_ok=True)
        arms[name] = [run(settings | {"seed": seed}) for seed in args.seeds]
    rows = {name: summarize(runs) for name, runs in arms.items()}
    print_table(rows)
    table, picture = args.out / "barrier.csv", args.out / "barrier.png"
    write_csv(rows, table)
    save_picture(arms, f"vmas/{args.task}, learning rate {args.lr:g}, {len(args.seeds)} seeds", picture)
    print(f"\nWrote {table}\nWrote {picture}")


if __name__ == "__main__":
    main()
