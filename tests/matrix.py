"""The matrix: every algorithm, and BenchMARL's MAPPO, on every task that BenchMARL bundles and on every model.

    make matrix                                   # all of it, two rows at a time; writes docs/matrix.md
    python tests/matrix.py --rows vmas/balance    # the rows whose names contain one of these words
    python tests/matrix.py --rows grid            # the combinations of keys alone

Beside them all combinations of keys (tests/combinations.py) are run in six settings. A setting is a row here and a
column of the page's second table.

A cell is one algorithm on one row: an iteration of 40 frames and one evaluation, episodes cut to 5 steps where the task
has a setting for it. It passes if the evaluation is reported and all parameters are finite afterwards. Each row runs in
a process of its own. What a cell gave is appended to outputs/matrix/cells.jsonl; the next call runs what has not passed
yet with the present code (--again runs all).
"""

import argparse
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from benchmarl.algorithms import MappoConfig
from benchmarl.algorithms.common import AlgorithmConfig
from benchmarl.environments import TaskClass, task_config_registry
from benchmarl.experiment import Experiment, ExperimentConfig
from benchmarl.models import CnnConfig, DeepsetsConfig, GruConfig, LstmConfig
from benchmarl.models.common import ModelConfig
from combinations import grid
from environments import StandInTask
from problems import CNN, RNN, SETS, gnn, mlp, sequence

from benchmarl_trust import ALGORITHMS

ROOT = Path(__file__).parents[1]
CELLS, TABLE = ROOT / "outputs" / "matrix" / "cells.jsonl", ROOT / "docs" / "matrix.md"
VERSIONS = {name: version(name) for name in ("benchmarl", "torchrl", "torch", "vmas")}
#: What a cell depends on: a change of it makes all cells old.
SOURCES = [*(ROOT / "benchmarl_trust").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml"), *ROOT.glob("tests/[!t]*.py")]
CODE = hashlib.sha256(str(VERSIONS).encode() + b"".join(file.read_bytes() for file in sorted(SOURCES))).hexdigest()[:12]
#: Seconds that one cell may take.
LIMIT = 300
COLUMNS = ["mappo", *ALGORITHMS]
COMBINATIONS = {combination.name: combination for combination in grid()}


def numbers() -> ModelConfig:
    """A model of observations that are vectors."""
    return mlp(8)


def images() -> ModelConfig:
    """A model of observations that are images."""
    return CnnConfig(**CNN)


class Model(NamedTuple):
    """A model for policy and critic, and the task that it fits."""

    policy: Callable[[], ModelConfig]
    critic: Callable[[], ModelConfig] | None = None
    task: Callable[[], TaskClass] = lambda: cut(task_config_registry["vmas/balance"].get_from_yaml())


MODELS = {
    "mlp": Model(numbers),
    "gru": Model(lambda: GruConfig(**RNN)),
    "lstm": Model(lambda: LstmConfig(**RNN)),
    "cnn": Model(images, task=lambda: StandInTask(rgb=True)),
    "deepsets": Model(lambda: DeepsetsConfig(**SETS)),
    "deepsets critic": Model(numbers, lambda: DeepsetsConfig(**SETS)),
    "gnn→mlp": Model(lambda: sequence(gnn(), mlp(4))),
    "mlp→gru": Model(lambda: sequence(mlp(4), GruConfig(**RNN))),
}
#: Tasks whose engines cannot be installed from a package index: environments with their specs stand in.
STAND_INS = {
    "smacv2, 15 tasks (specs only)": lambda: StandInTask(mask=True, state=True, absent="unmarked"),
    "meltingpot, 49 tasks (specs only)": lambda: StandInTask(rgb=True, nested=True, state=True),
}
#: Groups of unlike agents that are paid alike, by task; the others of a task are outside the team.
TEAMS = {
    "simple_speaker_listener": [["speaker", "listener"]],
    "simple_crypto": [["alice", "bob"]],
    "vmas/simple_world_comm": [["lead_adversary", "adversary"]],
}
NOT_ON_AN_INDEX = {
    "smacv2": "StarCraft II, a binary of its own",
    "meltingpot": "dmlab2d, which dm-meltingpot builds on and which has no wheels for current Pythons",
}


#: Of SMAX's maps, which differ in numbers alone: one of marines, and one of unlike units.
SMAX = ("smax/3m", "smax/2s3z")


class Row(NamedTuple):
    """What all algorithms are run on."""

    name: str
    task: Callable[[], TaskClass]
    model: Callable[[], ModelConfig]
    critic: Callable[[], ModelConfig] | None = None
    settings: dict = {}  # noqa: RUF012
    teams: list[list[str]] | None = None
    combinations: bool = False

    @property
    def algorithms(self) -> list[str]:
        """The row's columns: MAPPO, to compare with, and ours; in a row with teams, those of ours that have teams. Or
        the combinations.
        """
        if self.combinations:
            return list(COMBINATIONS)
        return [name for name in COLUMNS if name == "mappo" or not self.teams or takes_teams(name)]


def takes_teams(algorithm: str) -> bool:
    """Whether agents of several groups can form one of its teams."""
    config = ALGORITHMS[algorithm].get_from_yaml()
    return hasattr(config, "teams") and config.estimator != "preopc"


def cut(task: TaskClass) -> TaskClass:
    """The task with short episodes."""
    for key in ("max_steps", "max_cycles"):
        if key in task.config:
            task.config[key] = 5
    return task


def rows() -> list[Row]:
    """All of the matrix."""
    out = []
    for name, task in task_config_registry.items():
        suite = name.split("/")[0]
        if suite in NOT_ON_AN_INDEX or suite == "trust_games" or (suite == "smax" and name not in SMAX):
            continue
        make = lambda task=task: cut(task.get_from_yaml())  # noqa: E731
        model = images if suite == "magent" else numbers
        supported = make()
        kinds = {
            "continuous": supported.supports_continuous_actions(),
            "discrete": supported.supports_discrete_actions(),
        }
        for kind in (kind for kind, can in kinds.items() if can):
            settings = {"prefer_continuous_actions": kind == "continuous"}
            out.append(Row(f"{name} {kind}", make, model, settings=settings))
            for team in (team for word, team in TEAMS.items() if name.endswith(word)):
                out.append(Row(f"{name} {kind} teams", make, model, settings=settings, teams=team))
    for name, make in STAND_INS.items():
        out.append(Row(name, make, images if "meltingpot" in name else numbers))
    for name, model in MODELS.items():
        for share in (True, False):
            settings = {"share_policy_params": share}
            out.append(
                Row(f"{name} {'shared' if share else 'separate'}", model.task, model.policy, model.critic, settings)
            )
    return out


def grid_rows() -> list[Row]:
    """What the combinations of keys are run on."""
    spread = lambda: cut(task_config_registry["vmas/simple_spread"].get_from_yaml())  # noqa: E731
    kinds = {
        "continuous": (spread, numbers),
        "discrete masked": (lambda: StandInTask(mask=True), numbers),
        "recurrent": (spread, lambda: GruConfig(**RNN)),
    }
    return [
        Row(
            f"grid {kind} {'shared' if share else 'separate'}",
            task,
            model,
            settings={"share_policy_params": share},
            combinations=True,
        )
        for kind, (task, model) in kinds.items()
        for share in (True, False)
    ]


########
# Cells
########


def make_config(folder: str, **settings) -> ExperimentConfig:
    """One iteration of 40 frames, one evaluation."""
    config = ExperimentConfig.get_from_yaml()
    config.save_folder = folder
    config.max_n_iters, config.max_n_frames = 1, None
    config.on_policy_collected_frames_per_batch, config.on_policy_n_envs_per_worker = 40, 4
    config.on_policy_n_minibatch_iters, config.on_policy_minibatch_size = 1, 20
    config.evaluation, config.evaluation_interval, config.evaluation_episodes = True, 40, 2
    config.share_policy_params, config.render, config.loggers = False, False, []
    config.create_json = True  # without a logger BenchMARL evaluates for its report alone
    for key, value in settings.items():
        setattr(config, key, value)
    return config


def make_algorithm(name: str, row: Row) -> AlgorithmConfig:
    """The algorithm with the row's teams, where it has teams."""
    if name == "mappo":
        return MappoConfig.get_from_yaml()
    if row.combinations:
        return COMBINATIONS[name].config()
    config = ALGORITHMS[name].get_from_yaml()
    if row.teams:
        config.teams = row.teams
    return config


def run_cell(row: Row, algorithm: str, folder: str) -> None:
    """Run it; raises what went wrong."""
    experiment = Experiment(
        row.task(),
        make_algorithm(algorithm, row),
        row.model(),
        seed=0,
        config=make_config(folder, **row.settings),
        critic_model_config=row.critic() if row.critic else None,
    )
    experiment.run()
    if not any(key.startswith("step_") for key in experiment.logger.json_writer.run_data):
        raise RuntimeError("no evaluation is in the report")
    for loss in experiment.losses.values():
        for name, parameter in loss.named_parameters():
            if not parameter.isfinite().all():
                raise FloatingPointError(f"{name} is not finite")


def last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip().splitlines()[0][:300]


def work(row: Row, algorithms: list[str]) -> None:
    """The process of one row: a line of JSON for each cell."""

    def out_of_time(*_) -> None:
        raise TimeoutError(f"not done in {LIMIT} s")

    signal.signal(signal.SIGALRM, out_of_time)
    torch.set_num_threads(1)
    for algorithm in algorithms:
        start, why = time.perf_counter(), None
        with tempfile.TemporaryDirectory() as folder:
            try:
                signal.alarm(LIMIT)
                run_cell(row, algorithm, folder)
            except Exception as error:
                why = last_line(error)
            finally:
                signal.alarm(0)
        seconds = round(time.perf_counter() - start, 1)
        cell = {"row": row.name, "algorithm": algorithm, "why": why, "seconds": seconds, "code": CODE}
        print(f"\n{json.dumps(cell)}", flush=True)  # behind whatever an environment has printed


def run_row(row: Row, algorithms: list[str], save: Callable[[dict], None]) -> None:
    """Start the row's process; if a cell ends it, or hangs where no signal reaches, note that and go on behind it."""
    while algorithms:
        command = [sys.executable, "-W", "ignore", __file__, "--worker", row.name, "--algorithms", *algorithms]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=4 * LIMIT)
            output, last = done.stdout, (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
            why = f"its process ended with {done.returncode}: {last}"
        except subprocess.TimeoutExpired as late:
            output, why = (late.stdout or b"").decode(), f"its process hung, or the row took over {4 * LIMIT} s"
        for cell in (json.loads(line) for line in output.splitlines() if line.startswith('{"row"')):
            save(cell)
            algorithms = [name for name in algorithms if name != cell["algorithm"]]
        if algorithms:
            first, *algorithms = algorithms
            save({"row": row.name, "algorithm": first, "why": why, "seconds": None, "code": CODE})


########
# Table
########


def read_cells() -> dict[tuple[str, str], dict]:
    """The newest result of each cell that was run with the present code."""
    if not CELLS.exists():
        return {}
    cells = [json.loads(line) for line in CELLS.read_text().splitlines()]
    return {(cell["row"], cell["algorithm"]): cell for cell in cells if cell.get("code") == CODE}


def symbol(row: Row, algorithm: str, cells: dict) -> str:
    """What stands in the table."""
    if algorithm not in row.algorithms:
        return "–"
    cell = cells.get((row.name, algorithm))
    if cell is None:
        return "?"
    if cell["why"] is None:
        return "✓"
    mappo = cells.get((row.name, "mappo"), {}).get("why")
    return "upstream" if cell["why"] == mappo else "**fails**"


def table(all_rows: list[Row], cells: dict) -> str:
    """The whole page."""
    engines = "\n".join(f"- {suite}: its tasks need {what}." for suite, what in NOT_ON_AN_INDEX.items())
    head = (
        "# Where the algorithms run\n\nWritten by `make matrix`, see `tests/matrix.py` for what a cell is. *upstream*: "
        "BenchMARL's MAPPO fails there with the same error. *specs only*: an environment with the suite's specs stands "
        "in for it. *teams*: groups that are paid alike form one team, for the algorithms that have teams."
    )
    tasks, settings = ([row for row in all_rows if row.combinations == is_grid] for is_grid in (False, True))
    lines = ["| task or model | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in tasks:
        lines.append(f"| {row.name} | " + " | ".join(symbol(row, algorithm, cells) for algorithm in COLUMNS) + " |")
    parts = [head, counts(tasks, COLUMNS, cells) + f" Versions: {versions()}.", engines, "\n".join(lines)]
    if settings:
        lines = ["| preset and keys | " + " | ".join(row.name.removeprefix("grid ") for row in settings) + " |"]
        lines.append("|---" * (len(settings) + 1) + "|")
        for name in COMBINATIONS:
            lines.append(f"| {name} | " + " | ".join(symbol(row, name, cells) for row in settings) + " |")
        keys = "`algorithm.surrogate` (hatrpo: `algorithm.allocation`), `algorithm.factor` where there is one, and "
        keys += "`algorithm.estimator`, in this order, beside `algorithm=` the preset."
        parts += ["## Combinations", keys, counts(settings, list(COMBINATIONS), cells), "\n".join(lines)]
    why = {
        f"- {row.name}, {algorithm}: `{cells[row.name, algorithm]['why']}`"
        for row in all_rows
        for algorithm in row.algorithms
        if cells.get((row.name, algorithm), {}).get("why")
    }
    if why:
        parts += ["## What went wrong", "\n".join(sorted(why))]
    return "\n\n".join(parts) + "\n"


def counts(some_rows: list[Row], columns: list[str], cells: dict) -> str:
    """How many of these cells pass."""
    shown = [symbol(row, algorithm, cells) for row in some_rows for algorithm in columns]
    names = {row.name for row in some_rows}
    seconds = sum(cell["seconds"] or 0 for (name, _), cell in cells.items() if name in names)
    return (
        f"{len(shown) - shown.count('–')} cells: {shown.count('✓')} pass, {shown.count('upstream')} fail as MAPPO "
        f"does, {shown.count('**fails**')} fail otherwise, {shown.count('?')} have not been run. They took "
        f"{seconds / 60:.0f} minutes of one core."
    )


def versions() -> str:
    return ", ".join(f"{name} {number}" for name, number in VERSIONS.items())


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=[""], metavar="WORD", help="rows whose names contain one of these")
    names = [*COLUMNS, *COMBINATIONS]
    parser.add_argument("--algorithms", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--again", action="store_true", help="run also what has passed")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--worker", metavar="ROW", help=argparse.SUPPRESS)
    args = parser.parse_args()
    all_rows = rows() + grid_rows()
    if args.worker:
        work(next(row for row in all_rows if row.name == args.worker), args.algorithms)
        return
    CELLS.parent.mkdir(parents=True, exist_ok=True)
    passed = set() if args.again else {key for key, cell in read_cells().items() if cell["why"] is None}
    chosen = [row for row in all_rows if any(word in row.name for word in args.rows)]
    missing = {
        row.name: [name for name in row.algorithms if name in args.algorithms and (row.name, name) not in passed]
        for row in chosen
    }

    def save(cell: dict) -> None:
        with CELLS.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        print(f"{cell['row']:<45} {cell['algorithm']:<25} {cell['why'] or 'pass'}", flush=True)

    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(lambda row: run_row(row, missing[row.name], save), chosen))
    page = table(all_rows, read_cells())
    if "| ? |" in page:
        print(f"\n{TABLE} stays as it is: some cells have not been run with the present code.")
        return
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(page)
    print(f"\nWrote {TABLE}")


if __name__ == "__main__":
    main()
