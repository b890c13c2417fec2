"""HATRPO, HATRPO-W and HATRPO-G on the differential game: in which of two maxima does each end?

Two agents choose a real number each and share one reward, which has a better maximum, 1.0400 at (5.192, 5.000), and a
worse one, 0.9496 at (1.120, 1.000). HATRPO bounds the KL of every agent by δ. W and G divide D = 2 δ between the two:
W by KKT before anybody moves, G by greed before each turn. So all may spend the same KL in an iteration.

The claim (Shek, Shi & Tokekar, arXiv 2508.10340), of the paper's benchmarks together: final reward +22.5 % for W and
+25.2 % for G over HATRPO, G's variance 39 % above W's. (The abstract has "each exceeding 22.5 %" and the lower variance
of W.) The game and its maxima are the paper's; its start, bounds and number of samples are not known, and the formulas
of W and G are reconstructed. Here the better maximum is only 9.5 % above the worse: no gain of 22.5 % can come from it.

The setting was chosen by the reward alone, before any comparison of the algorithms. Policies are Gaussians of scale 1,
since BenchMARL's usual TanhNormal covers the whole range and sees the better maximum at once, whatever the algorithm.
The start is the saddle of E[R] under that scale, (3.0, 1.1): the watersheds of all methods that climb E[R] in the means
meet there, so none is favoured; the random network of a seed shifts it a little. From other starts, such as the task's
own 1.5 1.5, all seeds of all algorithms may end in the same maximum. Normalised advantages take out the critic: in a
game of one step with one state its value is a constant. Run it with

    OMP_NUM_THREADS=1 python examples/joint_constraint.py
    OMP_NUM_THREADS=1 python examples/joint_constraint.py --start 2.25 2.25 --seeds {0..9} --out outputs/diagonal

Found: from the saddle 4 of 20 seeds of each algorithm end in the worse maximum; the others reach the better one, with W
and G sooner, which is all of their gain (+0.7 %; at the end two seeds of HATRPO are still on their way). G also spends
a sixth more KL, as it hands on what a turn has left over. From (2.25, 2.25) the claim fails: 9 of 10 seeds of HATRPO
end in the better maximum, 5 of W's and of G's. That start is not neutral: it was picked because HATRPO and W part there
when their steps are computed from E[R] without noise. The variances of W and G are the same from both.

The first command (three algorithms, twenty seeds) takes eleven minutes on one CPU core. It prints a table, draws the
paths of the joint action and the learning curves, as ``joint_constraint.png`` in the folder of ``--out``, and writes
the paths as ``paths.csv``. HAPPO and MAPPO, which have no KL budget, can be named too. Matplotlib is needed.
"""

import argparse
import csv
import math
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from _common import add_run_options, compose, make_parser
from benchmarl.experiment import Callback, Experiment
from matplotlib.axes import Axes
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from benchmarl_trust.environments.trust_games import differential_reward

NAMES = {"hatrpo": "HATRPO", "hatrpow": "HATRPO-W", "hatrpog": "HATRPO-G", "happo": "HAPPO", "mappo": "MAPPO"}
MAXIMA = {"better": (5.192, 5.000), "worse": (1.120, 1.000)}

#: A run has ended in a maximum if its joint action is at most this far from it.
RADIUS = 1.0

#: Small networks, one policy per agent, and no logs.
SETTINGS = ["model.num_cells=[32,32]", "critic_model.num_cells=[32,32]", "experiment.share_policy_params=False"]
SETTINGS += ["experiment.lr=0.001", "experiment.max_n_frames=null", "experiment.evaluation=False"]
SETTINGS += ["experiment.render=False", "experiment.create_json=False", "experiment.loggers=[]"]

#: What a run leaves, by quantity: "action" [iterations + 1, 2], "return" and "kl" [iterations].
#: Stacked over seeds, there is one dimension more in front.
Series = dict[str, Tensor]


def parse_args() -> argparse.Namespace:
    """The command line."""
    files = "joint_constraint.png, the paths and the learning curves; paths.csv, the paths"
    parser = make_parser(__doc__, Path("outputs/joint_constraint"), files)
    add_run_options(parser, seeds=range(20))
    parser.add_argument(
        "--algorithms", nargs="+", default=["hatrpo", "hatrpow", "hatrpog"], choices=NAMES, metavar="NAME", help="names"
    )
    parser.add_argument("--iterations", type=int, default=100, help="iterations of each run")
    parser.add_argument("--frames", type=int, default=256, help="games played in an iteration")
    parser.add_argument("--start", nargs=2, type=float, default=[3.0, 1.1], metavar="A", help="where the agents stand")
    parser.add_argument("--policy-scale", type=float, default=1.0, help="standard deviation of the first policies")
    parser.add_argument("--kl", type=float, default=0.01, help="δ of an agent; the team has twice as much")
    args = parser.parse_args()
    if len(args.seeds) < 2:
        parser.error("--seeds must be two or more: of one seed there is no variance.")
    return args


def make_settings(name: str, args: argparse.Namespace, folder: str) -> dict:
    """The arguments of an algorithm's runs: Gaussian policies and, with natural steps, the KL budget that all share."""
    settings = compose(*SETTINGS, *args.override, f"algorithm={name}", "task=trust_games/differential")
    settings["task"].config["start"] = args.start
    algorithm, config = settings["algorithm_config"], settings["config"]
    algorithm.use_tanh_normal, algorithm.scale_mapping = False, f"biased_softplus_{args.policy_scale}"
    natural = name.startswith("hatrpo")
    if natural:
        algorithm.kl_threshold = args.kl  # W, G: kl_total is null, so D = 2 δ
    if name != "mappo":
        algorithm.normalize_advantage = "batch"
    config.max_n_iters, config.save_folder = args.iterations, folder
    config.on_policy_collected_frames_per_batch = config.on_policy_n_envs_per_worker = args.frames
    config.on_policy_minibatch_size = args.frames
    config.on_policy_n_minibatch_iters = 1 if natural else 10  # natural steps: of a critic that does not matter
    return settings


class PathRecorder(Callback):
    """Records the joint action that the policies have as their mean, the mean return, and the KL of every update."""

    def __init__(self, start: list[float], low: float, high: float):
        super().__init__()
        self.start, self.low, self.high = torch.tensor(start), low, high
        self.actions: list[Tensor] = []
        self.returns: list[float] = []
        self.kl: list[float] = []
        self.before: Normal | None = None

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        """The policy that collected the games, and what it earned."""
        self.before = self.policy()
        if not self.actions:
            self.actions.append(self.executed(self.before))
        self.returns.append(batch["next", "agents", "reward"].mean().item())

    def on_train_end(self, training_td: TensorDictBase, group: str) -> None:
        """The policy after the update."""
        after = self.policy()
        self.actions.append(self.executed(after))
        self.kl.append(kl_divergence(self.before, after).sum().item())

    @torch.no_grad()
    def policy(self) -> Normal:
        """The agents' Gaussians, [2, 1]; the observation is always the same."""
        actor = self.experiment.algorithm.get_policy_for_loss("agents")
        observation = TensorDict({"agents": TensorDict({"observation": torch.eye(2)}, batch_size=2)})
        return actor.get_dist(observation).base_dist

    def executed(self, policy: Normal) -> Tensor:
        """The joint action in the game's coordinates, [2]."""
        return (self.start + policy.mean.squeeze(-1)).clamp(self.low, self.high)

    def series(self) -> Series:
        """All that was recorded."""
        return {
            "action": torch.stack(self.actions),
            "return": torch.tensor(self.returns),
            "kl": torch.tensor(self.kl),
        }


def run(name: str, seed: int, args: argparse.Namespace) -> Series:
    """Train once."""
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(name, args, folder) | {"seed": seed}
        task = settings["task"].config
        recorder = PathRecorder(args.start, task["low"], task["high"])
        Experiment(callbacks=[recorder], **settings).run()
    return recorder.series()


def final_reward(runs: Series) -> Tensor:
    """The reward of the joint action after the last iteration, [seeds]."""
    return differential_reward(runs["action"][:, -1])


def endings(runs: Series) -> dict[str, int]:
    """How many seeds have ended in each maximum."""
    last = runs["action"][:, -1]
    counts = {name: int(((last - torch.tensor(place)).norm(dim=-1) <= RADIUS).sum()) for name, place in MAXIMA.items()}
    return counts | {"elsewhere": len(last) - sum(counts.values())}


def half_width(values: Tensor) -> Tensor:
    """Half of the 95 % confidence interval of the mean over the first dimension, by the normal distribution."""
    return 1.96 * values.std(0) / math.sqrt(len(values))


def print_table(results: dict[str, Series]) -> None:
    """The table, with what its columns mean."""
    print("\nfinal reward: of the policies' mean joint action after the last iteration, mean ± standard deviation over")
    print(f"seeds, and variance. better, worse, elsewhere: how many seeds have ended within {RADIUS:g} of a maximum.")
    print("area: mean collected return over all iterations. KL: spent in an iteration by both agents, nats, mean.\n")
    print(f"{'algorithm':<11}{'final reward':>18}{'variance':>10}", end="")
    print("".join(f"{column:>11}" for column in (*MAXIMA, "elsewhere", "area", "KL")))
    for name, runs in results.items():
        reward = final_reward(runs)
        print(f"{NAMES[name]:<11}{reward.mean():>9.4f} ± {reward.std():.4f}{reward.var():>10.5f}", end="")
        print("".join(f"{count:>11}" for count in endings(runs).values()), end="")
        print(f"{runs['return'].mean():>11.4f}{runs['kl'].mean():>11.5f}")


def print_comparison(results: dict[str, Series]) -> None:
    """Each against HATRPO seed by seed, with the paper's claim at the end."""
    rewards = {name: final_reward(runs) for name, runs in results.items()}
    print()
    if "hatrpo" in rewards:
        base = rewards["hatrpo"]
        for name in (name for name in rewards if name != "hatrpo"):
            percent = 100 * (rewards[name] - base) / base.mean()
            print(f"{NAMES[name]} over HATRPO: {percent.mean():+.1f} % final reward ", end="")
            print(f"(95 %: {percent.mean() - half_width(percent):+.1f} to {percent.mean() + half_width(percent):+.1f})")
    if {"hatrpow", "hatrpog"} <= rewards.keys():
        ratio = rewards["hatrpog"].var() / rewards["hatrpow"].var()
        print(f"G's variance over W's: {100 * (ratio - 1):+.0f} %")
    better, worse = (differential_reward(torch.tensor(place)).item() for place in MAXIMA.values())
    print(f"The better maximum is {100 * (better / worse - 1):.1f} % above the worse.")
    print("The paper's claim, of its benchmarks together: W +22.5 %, G +25.2 % over HATRPO; G's variance +39 %.")


def save_picture(results: dict[str, Series], title: str, path: Path) -> None:
    """Left the reward and every seed's path over it, right the returns with their confidence bands."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    plot_surface(left)
    for k, (name, runs) in enumerate(results.items()):
        plot_paths(left, runs["action"], f"C{k}")
        plot_band(right, NAMES[name], runs["return"], f"C{k}")
    left.set(xlabel="a₁", ylabel="a₂", title="mean joint action: every seed's path, its end as a dot")
    right.set(xlabel="iteration", ylabel="collected return", title="mean over seeds, 95 % confidence")
    right.grid(alpha=0.3)
    right.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def plot_surface(ax: Axes) -> None:
    """The reward, its maxima as stars."""
    axis = torch.linspace(0, 7, 141)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    shades = ax.contourf(axis, axis, differential_reward(grid), levels=20, cmap="Greys", alpha=0.6)
    ax.figure.colorbar(shades, ax=ax, label="reward")
    ax.scatter(*zip(*MAXIMA.values(), strict=True), marker="*", s=220, color="gold", edgecolor="black", zorder=4)


def plot_paths(ax: Axes, actions: Tensor, color: str) -> None:
    """One thin line per seed."""
    for path in actions:
        ax.plot(*path.T, color=color, linewidth=0.8, alpha=0.5)
    ax.scatter(*actions[:, -1].T, color=color, s=14, zorder=3)


def plot_band(ax: Axes, label: str, curves: Tensor, color: str) -> None:
    """The mean curve in its confidence band."""
    center, half = curves.mean(0), half_width(curves)
    ax.plot(center, color=color, label=label)
    ax.fill_between(range(len(center)), center - half, center + half, color=color, alpha=0.2)


def write_paths(results: dict[str, Series], seeds: list[int], path: Path) -> None:
    """The paths as csv: the mean joint action (a1, a2) after each iteration; 0 is the start."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["algorithm", "seed", "iteration", "a1", "a2"])
        for name, runs in results.items():
            for seed, actions in zip(seeds, runs["action"], strict=True):
                writer.writerows([name, seed, k, f"{x:.3f}", f"{y:.3f}"] for k, (x, y) in enumerate(actions.tolist()))


def main() -> None:
    """Train with every algorithm and seed, then report."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    plt.switch_backend("Agg")
    results: dict[str, Series] = {}
    for name in args.algorithms:
        runs = [run(name, seed, args) for seed in args.seeds]
        results[name] = {key: torch.stack([series[key] for series in runs]) for key in runs[0]}
    print_table(results)
    print_comparison(results)
    title = f"differential game from ({args.start[0]:g}, {args.start[1]:g}), scale {args.policy_scale:g}, "
    picture = args.out / "joint_constraint.png"
    save_picture(results, title + f"{args.frames} games per iteration, {len(args.seeds)} seeds", picture)
    table = args.out / "paths.csv"
    write_paths(results, args.seeds, table)
    print(f"\nWrote {picture}\nWrote {table}")


if __name__ == "__main__":
    main()
