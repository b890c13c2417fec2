r"""Tables and pictures of BenchMARL runs, from the JSON and CSV files that BenchMARL writes.

    python -m benchmarl.run -m algorithm=mars,mappo task=vmas/balance experiment=vmas_laptop seed=0,1,2 \
        hydra.sweep.dir=outputs/first
    python -m benchmarl_trust.report outputs/first --baseline mappo

prints, and writes into the folder of --out, report.md, report.csv and the learning curves; with a baseline
differences.csv; over tasks, where there is enough for it, aggregate.csv and pictures of the aggregates and of the
performance profile. docs/report.md says what each number is.
"""

import argparse
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarl_trust.report import aggregates, compact, pictures, statistics, tables
from benchmarl_trust.report.folders import read_folders, split_label
from benchmarl_trust.report.runs import ReportError, Run

WORDS = {"return": "return", "collection_return": "return in collection", "kl": "KL (nats)", "time_s": "time (s)"}
WRITTEN = ["report.md", "report.csv", "differences.csv", "aggregate.csv"]
WRITTEN += [f"{name}.{kind}" for name in pictures.NAMES for kind in ("png", "svg")]


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of frames: 1 or more")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarl_trust.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER[=LABEL]",
        help="a folder with runs below it, such as a Hydra multirun's, or with saved ones; LABEL is for all of them",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="for what is written; default: the first")
    parser.add_argument(
        "--baseline",
        metavar="LABEL",
        help="from which differences and over which the probability of improvement are computed",
    )
    parser.add_argument(
        "--metric",
        default="return",
        metavar="NAME",
        help="an environment's info such as win_rate, collection_return, a CSV file's name; default: %(default)s",
    )
    parser.add_argument(
        "--score",
        choices=statistics.SCORES,
        default="final",
        help="of a run, for differences and over tasks: final or best evaluation, or the area; default: %(default)s",
    )
    parser.add_argument("--frames", type=_positive, metavar="N", help="look no further than these frames")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="only these, in this order; default: all")
    parser.add_argument("--labels", nargs="+", metavar="LABEL", help="only these, in this order; default: all")
    parser.add_argument("--bounds", type=Path, metavar="FILE", help="default: bounds.json in the folders")
    parser.add_argument("--save", type=Path, metavar="DIR", help="save the runs there as small files too")
    return parser


def report(options: argparse.Namespace) -> str:
    """Read, save, compute, draw and write.

    Returns: what is printed, which ``report.md`` holds too.

    Raises:
        ReportError: saying what to do.
    """
    runs, notes = read_folders(options.folders, options.metric)
    out = options.out or split_label(options.folders[0])[0]
    what = WORDS.get(options.metric) or options.metric
    score = f"area under the {what}" if options.score == "area" else f"{options.score} {what}"
    if options.save is not None:
        _check_save(options, runs)
    runs = _chosen(runs, options)
    with _writing("--out", out):
        out.mkdir(parents=True, exist_ok=True)
    if options.save is not None:
        with _writing("--save", options.save):
            compact.save(runs, options.save)
    cells = statistics.cells(runs, options.metric, options.frames, notes)
    bounds = aggregates.read_bounds(_bounds_files(options), options.metric)
    over_tasks = aggregates.aggregate(cells, bounds, options.baseline, options.score, options.metric, notes)
    differences = statistics.differences(cells, options.baseline, options.score)
    text = _text(options, what, score, cells, differences, over_tasks, bounds, notes)
    with _writing("--out", out):
        for name in WRITTEN:  # an earlier report may have written what this one does not
            (out / name).unlink(missing_ok=True)
        drawn = pictures.draw(cells, over_tasks, options.baseline, what, score, out)
        tables.write_csv(cells, over_tasks, out)
        tables.write_differences(differences, out)
        shown = "\n".join(f"![{file.stem.replace('_', ' ')}]({file.name})" for file in drawn)
        (out / "report.md").write_text(f"{text}\n\n{shown}\n")
    names = ", ".join(file.stem for file in drawn)
    return f"{text}\n\nWritten into {out}: report.md, the tables as .csv, {names} as .png and .svg"


@contextmanager
def _writing(option: str, folder: Path) -> Iterator[None]:
    """Says which option's folder cannot be written into."""
    try:
        yield
    except OSError as error:
        raise ReportError(f"{option}: cannot write into {folder} ({error}). Name another folder.") from error


def _check_save(options: argparse.Namespace, runs: list[Run]) -> None:
    """Refuse to save beside the runs that are saved: the next report would find them twice."""
    raw = [place.resolve() for run in runs for place in run.places if place.is_dir()]
    for folder in (split_label(text)[0].resolve() for text in options.folders):
        if options.save.resolve().is_relative_to(folder) and any(place.is_relative_to(folder) for place in raw):
            raise ReportError(f"--save: {options.save} is in {folder}, where the runs are. Name a folder outside it.")


def _chosen(runs: list[Run], options: argparse.Namespace) -> list[Run]:
    """The runs of the tasks and labels that are asked for, in the order of these."""
    for option, wanted, there in (
        ("--tasks", options.tasks, {run.task for run in runs}),
        ("--labels", options.labels, {run.label for run in runs}),
        ("--baseline", [options.baseline] if options.baseline else None, {run.label for run in runs}),
    ):
        if missing := [name for name in wanted or () if name not in there]:
            raise ReportError(f"{option}: there is no {', '.join(missing)}. Choose of: {'; '.join(sorted(there))}.")
    labels, tasks = (
        wanted or list(dict.fromkeys(there))
        for wanted, there in (
            (options.labels, (run.label for run in runs)),
            (options.tasks, (run.task for run in runs)),
        )
    )
    chosen = [run for run in runs if run.label in labels and run.task in tasks]
    return sorted(chosen, key=lambda run: (tasks.index(run.task), labels.index(run.label)))


def _bounds_files(options: argparse.Namespace) -> list[Path]:
    if options.bounds is not None:
        return [options.bounds]
    files = [split_label(folder)[0] / "bounds.json" for folder in options.folders]
    return [file for file in files if file.is_file()]


def _text(
    options: argparse.Namespace,
    what: str,
    score: str,
    cells: list[statistics.Cell],
    differences: list[statistics.Difference],
    over_tasks: aggregates.Aggregates,
    bounds: dict[str, aggregates.Bounds],
    notes: list[str],
) -> str:
    limit = "" if options.frames is None else f" up to {options.frames} frames"
    parts = [
        "# Report",
        f"Of the {what}{limit}: the final and the best evaluation and the area under the curve (its mean "
        "over frames), mean ± standard deviation over seeds; wall time and KL per iteration, means over seeds.",
        tables.by_task(cells),
    ]
    if table := tables.differences(differences):
        parts += [f"Of the {score}, the difference from {options.baseline}, 95 % interval by Welch's t-test:", table]
        parts += [line] if (line := tables.significant(differences)) else []
    if table := tables.over_tasks(over_tasks, options.baseline):
        parts += [f"Over tasks, of the {score} ({'; '.join(over_tasks.tasks)}):", table]
    if over_tasks.iqm:
        lines = tables.describe_bounds(bounds, over_tasks.tasks)
        parts.append("\n".join(["Normalised so that these are 0 and 1:", "", *(f"- {line}" for line in lines)]))
    if notes:
        parts.append("\n".join(["To note:", "", *(f"- {note}" for note in notes)]))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> None:
    """Report what the command line names."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    missing = [name for name in ("matplotlib", "rliable") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} is not installed: pip install 'benchmarl_trust[report]'")
    try:
        print(report(options))
    except ReportError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
