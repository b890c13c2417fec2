r"""GPAE with past rollouts: the four truncations of the traces, and the cap η of the doubly truncated one.

With n_rollouts = 4 three quarters of the data are of older policies, and traces are shortened by importance ratios: by
the agent's own and its teammates' joint one (dt, capped at η), by their product (st), by the agent's own (it), or not
at all (none). Kim et al. (arXiv 2603.02654) report that dt wins, and tried η from 1.0 to 1.15. All other settings are
the same. Run it with

    OMP_NUM_THREADS=1 python examples/truncation.py
    OMP_NUM_THREADS=1 python examples/truncation.py --seeds 0 1 --frames 90000 \
        --override 'model.num_cells=[64,64]' 'critic_model.num_cells=[64,64]'

The second command (eight variants, two seeds) takes half an hour on one CPU core. Both print a table (the return of the
last evaluation, the mean return over frames, and the mean of the traces, λ where nothing is truncated; mean ± standard
deviation over seeds) and draw the learning curves, as ``truncation.png`` in the folder of ``--out``. Matplotlib is
needed.

Found by the second: no difference that exceeds the spread of the seeds, neither between the truncations nor in η.
"""

import argparse
import gc
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from _common import add_run_options, compose, make_parser, set_frames
from benchmarl.experiment import Experiment
from torch import Tensor

from benchmarl_trust import GpaeConfig
from benchmarl_trust.functional.gpae import TRACES


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__, Path("outputs/truncation"), "truncation.png, the learning curves")
    add_run_options(parser)
    parser.add_argument("--task", default="balance", help="a VMAS task")
    parser.add_argument("--frames", type=int, default=120_000, help="frames of each run")
    parser.add_argument("--rollouts", type=int, default=4, help="n_rollouts, the batches trained on")
    parser.add_argument(
        "--truncations", nargs="+", default=list(TRACES), choices=TRACES, metavar="NAME", help="of the traces"
    )
    parser.add_argument(
        "--etas", nargs="+", type=float, default=[1.0, 1.02, 1.05, 1.1, 1.15], metavar="ETA", help="caps of dt"
    )
    return parser.parse_args()


def make_variants(args: argparse.Namespace, config: GpaeConfig) -> dict[str, GpaeConfig]:
    """The configurations by name; dt comes with each η."""
    base = replace(config, n_rollouts=args.rollouts)
    others = {name: replace(base, truncation=name) for name in args.truncations if name != "dt"}
    if "dt" not in args.truncations:
        return others
    return {f"dt, η = {eta:g}": replace(base, truncation="dt", eta=eta) for eta in args.etas} | others


def make_settings(args: argparse.Namespace, folder: str) -> dict:
    """The arguments of all runs, before an algorithm's variants and seeds."""
    settings = compose("experiment=vmas_laptop", *args.override, "algorithm=gpae", f"task=vmas/{args.task}")
    config = settings["config"]
    set_frames(config, args.frames)
    config.create_json, config.loggers, config.save_folder = False, ["csv"], folder
    return settings


def run(settings: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Train; the frames and returns of all evaluations, and the mean of what the traces let through."""
    experiment = Experiment(**settings)
    experiment.run()
    scalars = experiment.logger.loggers[0].experiment.scalars  # BenchMARL writes "_" for "/"
    iteration, value = torch.tensor(scalars["eval_reward_episode_reward_mean"]).double().T
    traces = [scalars[f"train_{group}_trace_mean"] for group in experiment.group_map]
    trace = torch.tensor(traces).double()[..., 1].mean()
    frames = torch.tensor([dict(scalars["counters_total_frames"])[step] for step in iteration.tolist()]).double()
    del experiment, scalars
    gc.collect()  # the csv logger keeps a file open for each quantity as long as it lives
    return frames, value, trace


def area(frames: Tensor, value: Tensor) -> Tensor:
    """The mean return over frames."""
    return torch.trapezoid(value, frames) / (frames[-1] - frames[0])


def spread(value: Tensor) -> str:
    """Mean and standard deviation over seeds."""
    return f"{value.mean():.2f} ± {value.std(correction=0):.2f}"


def report(name: str, runs: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """One row of the table."""
    last = torch.stack([value[-1] for _, value, _ in runs])
    areas = torch.stack([area(frames, value) for frames, value, _ in runs])
    trace = torch.stack([trace for _, _, trace in runs])
    print(f"{name:<14}{spread(last):>18}{spread(areas):>18}{trace.mean():>12.3f}", flush=True)


def save_picture(results: dict[str, list[tuple[Tensor, Tensor, Tensor]]], title: str, path: Path) -> None:
    """The truncations on the left (dt with its default η, if it is there), dt with every η on the right."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    default = f"dt, η = {GpaeConfig.get_from_yaml().eta:g}"
    for name, runs in results.items():
        is_dt = name.startswith("dt")
        for axis, shown in zip(axes, (not is_dt or name == default, is_dt), strict=True):
            if not shown:
                continue
            value = torch.stack([value for _, value, _ in runs])
            (line,) = axis.plot(runs[0][0], value.mean(0), label=name)
            axis.fill_between(runs[0][0], value.amin(0), value.amax(0), alpha=0.2, color=line.get_color())
    axes[0].set_ylabel("return in evaluation")
    for axis, what in zip(axes, ("truncations", "the cap η of dt"), strict=True):
        axis.set(title=what, xlabel="frames")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Train every variant on every seed, then draw."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    plt.switch_backend("Agg")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = make_settings(args, folder)
        print(f"{'variant':<14}{'last return':>18}{'mean return':>18}{'mean trace':>12}", flush=True)
        for name, algorithm in make_variants(args, settings["algorithm_config"]).items():
            variant = settings | {"algorithm_config": algorithm}
            results[name] = [run(variant | {"seed": seed}) for seed in args.seeds]
            report(name, results[name])
    picture = args.out / "truncation.png"
    save_picture(results, f"vmas/{args.task}, n_rollouts = {args.rollouts}, {len(args.seeds)} seeds", picture)
    print(f"Wrote {picture}")


if __name__ == "__main__":
    main()
