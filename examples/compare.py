"""Compares algorithms on VMAS tasks: MARS and MASPO against BenchMARL's MAPPO, IPPO and MASAC.

All runs have the experiment settings of ``conf/experiment/vmas_laptop.yaml``, the model of BenchMARL's defaults, one
policy per agent and the same number of frames; algorithm settings are those of the yaml files. Run it with

    python examples/compare.py
    python examples/compare.py --out outputs/quick --algorithms mars mappo --tasks balance --seeds 0 1 --frames 60000
    python examples/compare.py --plot-only

On one CPU core a run of the preset's 360 000 frames takes about four minutes, one of MASAC seven; the first command
(five algorithms, two tasks, three seeds) takes two and a half hours. To spread it over processes, give each a
subfolder of its own as ``--out``, then plot the parent folder.

It prints a table of returns and writes into the folder of ``--out``, beside BenchMARL's logs, the plots of
``benchmarl.eval_results`` (``performance_profile.png``, ``aggregate_scores.png``, ``sample_efficiency_vmas.png``, one
more ``sample_efficiency_<task>.png`` for each task, ``probability_of_improvement.png``) and the aggregate scores,
``aggregated_score_return.csv``. These need marl_eval; without it the table is printed all the same.
"""

import argparse
import importlib.util
from pathlib import Path
from statistics import mean

from _common import add_run_options, compose, make_parser, set_frames
from benchmarl.algorithms import algorithm_config_registry
from benchmarl.benchmark import Benchmark
from benchmarl.environments import task_config_registry
from benchmarl.eval_results import Plotting, load_and_merge_json_dicts

from benchmarl_trust import ALGORITHMS

INSTALL_MARL_EVAL = """\
No plots: marl_eval is not installed. Two commands install it (its own pins are out of date, hence --no-deps):
  pip install 'rliable==1.2.0' 'arch>=7.2,<8' 'pandas>=2.2.2,<3' matplotlib seaborn colorcet colorama jinja2
  pip install --no-deps id-marl-eval==0.0.4"""


def parse_args() -> argparse.Namespace:
    """The command line."""
    vmas_tasks = sorted(name.removeprefix("vmas/") for name in task_config_registry if name.startswith("vmas/"))
    files = "performance_profile, aggregate_scores, sample_efficiency_vmas, sample_efficiency_<task> and "
    files += "probability_of_improvement.png; aggregated_score_return.csv; BenchMARL's logs"
    parser = make_parser(__doc__, Path("outputs/compare"), files)
    add_run_options(parser)
    parser.add_argument(
        "--algorithms",
        nargs="+",
        default=["mars", "maspo", "mappo", "ippo", "masac"],
        choices=sorted(algorithm_config_registry),
        metavar="NAME",
        help="names in BenchMARL's registry of algorithms",
    )
    parser.add_argument(
        "--tasks", nargs="+", default=["balance", "navigation"], choices=vmas_tasks, metavar="TASK", help="VMAS tasks"
    )
    parser.add_argument("--frames", type=int, help="frames of each run; None takes the preset's")
    parser.add_argument("--plot-only", action="store_true", help="train nothing, show the runs in the folder of --out")
    return parser.parse_args()


def make_benchmark(args: argparse.Namespace) -> Benchmark:
    """BenchMARL's Benchmark, its settings composed from the preset by Hydra."""
    preset = ["experiment=vmas_laptop", *args.override]
    algorithms = [compose(*preset, f"algorithm={name}", f"task=vmas/{args.tasks[0]}") for name in args.algorithms]
    tasks = [compose(*preset, f"algorithm={args.algorithms[0]}", f"task=vmas/{name}") for name in args.tasks]
    shared = tasks[0]
    set_frames(shared["config"], args.frames or shared["config"].max_n_frames)
    shared["config"].save_folder = str(args.out)
    return Benchmark(
        algorithm_configs=[settings["algorithm_config"] for settings in algorithms],
        model_config=shared["model_config"],
        critic_model_config=shared["critic_model_config"],
        tasks=[settings["task"] for settings in tasks],
        seeds=args.seeds,
        experiment_config=shared["config"],
    )


def result_files(folder: Path) -> list[str]:
    """BenchMARL's json file of every run in the folder, in a fixed order."""
    return sorted(str(path) for path in folder.rglob("*.json"))


def load_results(folder: Path) -> dict:
    """The runs in the folder as nested dictionaries: environment, task, algorithm, seed, step, metric."""
    files = result_files(folder)
    raw = load_and_merge_json_dicts(files)
    n_runs = sum(len(runs) for algorithms in raw.get("vmas", {}).values() for runs in algorithms.values())
    if not files or n_runs != len(files):
        raise SystemExit(
            f"{folder} has {len(files)} json files and {n_runs} different VMAS runs (task, algorithm, seed): there "
            "must be at least one, and every run only once."
        )
    return raw


def evaluation_returns(run: dict) -> list[float]:
    """The mean return over episodes of each evaluation of a run."""
    return [mean(step["return"]) for name, step in run.items() if name.startswith("step_")]


def print_table(tasks: dict) -> None:
    """Returns of every task and algorithm, averaged over seeds."""
    print("\nReturns, averaged over episodes and seeds: of the last evaluation, and averaged over all evaluations,")
    print("which is the area under the learning curve.\n")
    print(f"{'task':<22}{'algorithm':<12}{'seeds':>6}{'evaluations':>13}{'last':>10}{'area':>10}")
    for task, algorithms in sorted(tasks.items()):
        for algorithm, runs in algorithms.items():
            returns = [evaluation_returns(run) for run in runs.values()]
            last, area = mean(r[-1] for r in returns), mean(map(mean, returns))
            n_evaluations = min(map(len, returns))
            print(f"{task:<22}{algorithm:<12}{len(runs):>6}{n_evaluations:>13}{last:>10.3f}{area:>10.3f}")


def is_complete(tasks: dict) -> bool:
    """Whether every algorithm was run on every task with the same seeds to the same length, as marl_eval wants."""
    cells = [runs for algorithms in tasks.values() for runs in algorithms.values()]
    layouts = (
        {frozenset(algorithms) for algorithms in tasks.values()},
        {frozenset(runs) for runs in cells},
        {frozenset(run) for runs in cells for run in runs.values()},
    )
    return all(len(layout) == 1 for layout in layouts)


def save_plots(raw: dict, folder: Path) -> None:
    """All plots and scores of BenchMARL's ``eval_results``."""
    import matplotlib
    import numpy as np
    import pandas as pd

    matplotlib.use("Agg")
    pd.set_option("display.max_columns", None, "display.width", 200)
    np.random.seed(0)  # the bootstrap's
    processed = Plotting.process_data(raw)
    if "extra" not in processed:
        raise RuntimeError("marl_eval could not process the data; its message is above.")
    scores, curves = Plotting.create_matrices(processed, env_name="vmas")

    print("\nAggregate scores are of the absolute metric, the best return of one episode over a run's evaluations,")
    print("scaled to [0, 1] on each task. marl_eval's bands on the curves of a task assume ten seeds.\n")
    figures = {"performance_profile": Plotting.performance_profile_figure(environment_comparison_matrix=scores)}
    figures["aggregate_scores"], *_ = Plotting.aggregate_scores(
        environment_comparison_matrix=scores,
        tabular_results_file_path=str(folder / "aggregated_score"),
        save_tabular_as_latex=False,
    )
    axes, *_ = Plotting.environemnt_sample_efficiency_curves(sample_effeciency_matrix=curves)
    figures["sample_efficiency_vmas"] = axes.figure
    for task in raw["vmas"]:
        axes = Plotting.task_sample_efficiency_curves(processed_data=processed, task=task, env="vmas")
        figures[f"sample_efficiency_{task}"] = axes.figure
    pairs = algorithm_pairs(processed["extra"]["algorithm_list"])
    if pairs:
        axes = Plotting.probability_of_improvement(environment_comparison_matrix=scores, algorithms_to_compare=pairs)
        figures["probability_of_improvement"] = axes.figure
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=120, bbox_inches="tight")
        print(f"Wrote {path}")


def algorithm_pairs(names: list[str]) -> list[list[str]]:
    """Each algorithm of this package with each of BenchMARL's."""
    return [[ours, other] for ours in names if ours in ALGORITHMS for other in names if other not in ALGORITHMS]


def train(args: argparse.Namespace) -> None:
    """Run the whole benchmark into a folder without results."""
    if result_files(args.out):
        raise SystemExit(f"{args.out} has results already: name a new folder, or add --plot-only.")
    benchmark = make_benchmark(args)
    args.out.mkdir(parents=True, exist_ok=True)
    benchmark.run_sequential()


def main() -> None:
    """Train, unless told otherwise; then print the table and save the plots."""
    args = parse_args()
    if not args.plot_only:
        train(args)
    raw = load_results(args.out)
    print_table(raw["vmas"])
    if importlib.util.find_spec("marl_eval") is None:
        print(f"\n{INSTALL_MARL_EVAL}")
    elif is_complete(raw["vmas"]):
        save_plots(raw, args.out)
    else:
        print("\nNo plots: they need every algorithm on every task, with the same seeds and frames.")


if __name__ == "__main__":
    main()
