"""The variance of sequential updates against the number of agents N: HAPPO and clip-HAPPO on a VMAS task.

An agent weighs its advantages A by w(M), M the compound ratio of the agents before it: M in HAPPO, min(M, 1) in
clip-HAPPO. Var(w(M) A) / Var(A) is at most 1 in clip-HAPPO, as A has mean 0 here; in HAPPO it can grow exponentially.
It does on dispersion, where the large advantages are positive and updates raise their ratios; where they are negative,
as on balance with 8 agents, it falls. Learning rate and epochs are those of the authors' tuned runs (Le & Ta, arXiv
2606.25526), all else is the preset's: batches of 6 000 frames in minibatches of 1 000. Run it with

    OMP_NUM_THREADS=1 python examples/advantage_variance.py
    OMP_NUM_THREADS=1 python examples/advantage_variance.py --task balance --agents 2 8 --out outputs/balance

The first command takes about seven minutes on one CPU core. It prints a table and writes it as
``advantage_variance.csv``, with a picture, ``advantage_variance.png``, and the ratios of each seed, ``seeds.csv``, into
the folder of ``--out``, beside BenchMARL's logs. Matplotlib is needed.
"""

import argparse
import csv
import gc
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from _common import add_run_options, compose, make_parser
from benchmarl.experiment import Experiment
from matplotlib.axes import Axes
from torch import Tensor

ALGORITHMS = {"HAPPO": "happo", "clip-HAPPO": "cliphappo"}
METRICS = ("advantage_variance", "factor_max", "factor_ess")
COLUMNS = ("ratio_last", "ratio_mean", "ratio_largest", "factor_max", "factor_ess")

#: What a run logged, by metric: [iterations, positions]; stacked over seeds, [seeds, iterations, positions].
Series = dict[str, Tensor]


def parse_args() -> argparse.Namespace:
    """The command line."""
    files = "advantage_variance.csv, the table; seeds.csv, the ratios of each seed; advantage_variance.png, the picture"
    files += "; BenchMARL's logs"
    parser = make_parser(__doc__, Path("outputs/advantage_variance"), files)
    add_run_options(parser)
    parser.add_argument("--task", default="dispersion", help="a VMAS task whose configuration has n_agents")
    parser.add_argument("--agents", nargs="+", type=int, default=[2, 4, 8, 16], metavar="N", help="numbers of agents")
    parser.add_argument("--iterations", type=int, default=5, help="iterations of each run")
    parser.add_argument("--lr", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--epochs", type=int, default=5, help="passes of each agent, and of the critic, over a batch")
    return parser.parse_args()


def make_settings(algorithm: str, n_agents: int, args: argparse.Namespace) -> dict:
    """The arguments of the runs with an algorithm and a number of agents, all but the seed."""
    choices = [f"algorithm={ALGORITHMS[algorithm]}", f"task=vmas/{args.task}"]
    settings = compose("experiment=vmas_laptop", *args.override, *choices)
    task = settings["task"].config
    if "n_agents" not in task:
        raise SystemExit(
            f"--task {args.task}: its configuration has no n_agents. Tasks that have it: balance, dispersion."
        )
    task["n_agents"] = n_agents
    # One advantage for all, as in the theory, of mean 0 and variance 1, so that batches are comparable.
    settings["algorithm_config"].advantage, settings["algorithm_config"].normalize_advantage = "team", "batch"
    config = settings["config"]
    config.lr = args.lr
    config.on_policy_n_minibatch_iters = args.epochs
    config.max_n_frames = args.iterations * config.on_policy_collected_frames_per_batch
    config.evaluation, config.create_json, config.loggers = False, False, ["csv"]
    config.save_folder = str(args.out)
    return settings


def run(settings: dict) -> Series:
    """Train for some iterations; what was logged of each position."""
    experiment = Experiment(**settings)
    experiment.run()
    ((group, agents),) = experiment.group_map.items()  # a second group would be a second team
    scalars = experiment.logger.loggers[0].experiment.scalars  # BenchMARL writes "_" for "/"
    series = {
        metric: [scalars[f"train_{group}_policy_{metric}_position_{k}"] for k in range(len(agents))]
        for metric in METRICS
    }
    del experiment, scalars
    gc.collect()  # the csv logger keeps a file open for each quantity as long as it lives
    return {metric: torch.tensor(values, dtype=torch.float64)[..., 1].T for metric, values in series.items()}


def variance_ratio(runs: Series) -> Tensor:
    """Var(w(M) A) / Var(A), [seeds, iterations, positions]."""
    variance = runs["advantage_variance"]
    return variance / variance[..., :1]


def geometric_mean(ratio: Tensor, dim: int | tuple[int, ...] = (0, 1)) -> Tensor:
    """The mean for what differs by orders of magnitude; over seeds and iterations unless told otherwise."""
    return ratio.log().mean(dim).exp()


def summarize(runs: Series) -> dict[str, float]:
    """One row of the table."""
    ratio = variance_ratio(runs)
    row = {
        "ratio_last": geometric_mean(ratio[..., -1]),
        "ratio_mean": geometric_mean(ratio.mean(-1)),
        "ratio_largest": ratio[..., 1:].max(),
        "factor_max": runs["factor_max"].max(),
        "factor_ess": runs["factor_ess"][..., -1].mean(),
    }
    return {column: row[column].item() for column in COLUMNS}


def growth(runs: Series) -> float:
    """The factor per position of the exponential through 1 at position 0 that fits the ratios best, by their logs."""
    logs = geometric_mean(variance_ratio(runs)).log()
    position = torch.arange(len(logs), dtype=logs.dtype)
    return (position @ logs / position.square().sum()).exp().item()


def print_table(results: dict[int, dict[str, Series]]) -> None:
    """The table, with what its columns mean."""
    print("\nratio: Var(w(M) A) / Var(A), geometric mean over seeds and iterations: at the last position, and of the")
    print("mean over positions; then the largest after position 0. factor_max: the largest M of all. factor_ess: the")
    print(
        "effective sample size of M at the last position, as a share of the samples, mean over seeds and iterations.\n"
    )
    print(f"{'N':>3}  {'algorithm':<10}" + "".join(f"{column:>15}" for column in COLUMNS))
    for n_agents, algorithms in results.items():
        for name, runs in algorithms.items():
            row = summarize(runs)
            print(f"{n_agents:>3}  {name:<10}" + "".join(f"{row[column]:>15.4g}" for column in COLUMNS))
    largest = max(results)
    print(f"\nGrowth of the ratio per position at N = {largest}, the exponential that fits best:")
    print(", ".join(f"{name} {growth(runs):.3f}" for name, runs in results[largest].items()))


def write_csv(results: dict[int, dict[str, Series]], path: Path) -> None:
    """The table as csv."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["n_agents", "algorithm", *COLUMNS])
        writer.writeheader()
        for n_agents, algorithms in results.items():
            for name, runs in algorithms.items():
                writer.writerow({"n_agents": n_agents, "algorithm": name, **summarize(runs)})


def write_seeds(results: dict[int, dict[str, Series]], seeds: list[int], path: Path) -> None:
    """The ratio at the last position of each seed as csv, geometric mean over iterations."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["n_agents", "algorithm", "seed", "ratio_last"])
        for n_agents, algorithms in results.items():
            for name, runs in algorithms.items():
                ratios = geometric_mean(variance_ratio(runs)[..., -1], 1)
                writer.writerows([n_agents, name, k, f"{x:.4g}"] for k, x in zip(seeds, ratios.tolist(), strict=True))


def save_picture(results: dict[int, dict[str, Series]], title: str, path: Path) -> None:
    """Two panels: the ratio at the last position against N, and against the position at the largest N."""
    figure, (by_agents, by_position) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    largest = max(results)
    for name in ALGORITHMS:
        last = torch.stack([variance_ratio(algorithms[name])[..., -1] for algorithms in results.values()], -1)
        plot_band(by_agents, name, list(results), last)
        runs = results[largest][name]
        label = f"{name}: × {growth(runs):.3f} per position"
        plot_band(by_position, label, list(range(largest)), variance_ratio(runs))
    by_agents.set_xticks(list(results))
    by_agents.set(xlabel="number of agents N", ylabel="Var(w(M) A) / Var(A)", title="at the last position")
    by_position.xaxis.get_major_locator().set_params(integer=True)
    by_position.set(xlabel="position in the order", title=f"at N = {largest}")
    for ax in (by_agents, by_position):
        ax.axhline(1, color="black", linewidth=0.8, linestyle="--", label="bound of clip-HAPPO: E[A²] / Var(A)")
        ax.set_yscale("log")
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def plot_band(ax: Axes, label: str, x: list[int], ratio: Tensor) -> None:
    """A line, the geometric mean over seeds and iterations, in a band from the smallest to the largest seed."""
    seeds = geometric_mean(ratio, 1)
    (line,) = ax.plot(x, geometric_mean(ratio), marker="o", markersize=4, label=label)
    ax.fill_between(x, seeds.amin(0), seeds.amax(0), alpha=0.2, color=line.get_color())


def main() -> None:
    """Train with both algorithms for every number of agents and every seed, then report."""
    args = parse_args()
    plt.switch_backend("Agg")
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[int, dict[str, Series]] = {}
    for n_agents in sorted(args.agents):
        results[n_agents] = {}
        for name in ALGORITHMS:
            settings = make_settings(name, n_agents, args)
            runs = [run(settings | {"seed": seed}) for seed in args.seeds]
            results[n_agents][name] = {metric: torch.stack([series[metric] for series in runs]) for metric in METRICS}
    print_table(results)
    table, picture = args.out / "advantage_variance.csv", args.out / "advantage_variance.png"
    write_csv(results, table)
    write_seeds(results, args.seeds, args.out / "seeds.csv")
    title = f"vmas/{args.task}, learning rate {args.lr:g}, {args.iterations} iterations, seeds {args.seeds}"
    save_picture(results, title, picture)
    print(f"\nWrote {table}\nWrote {args.out / 'seeds.csv'}\nWrote {picture}")


if __name__ == "__main__":
    main()
