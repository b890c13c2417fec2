"""The report on small runs in BenchMARL's format, against numbers made by hand."""

import csv
import json
import math
import shutil
import struct
import subprocess
import sys
import warnings
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from benchmarl.algorithms import MappoConfig

from benchmarl_trust import MarsConfig

pytest.importorskip("rliable")
pytest.importorskip("matplotlib")
from rliable import metrics
from scipy.stats import ttest_ind

from benchmarl_trust.report import __main__ as command
from benchmarl_trust.report import aggregates, compact, pictures, statistics, tables
from benchmarl_trust.report.folders import read_folders
from benchmarl_trust.report.runs import ReportError, read_rows

EXPERIMENT = {"max_n_iters": None, "on_policy_collected_frames_per_batch": 10, "evaluation_interval": 20, "lr": 0.001}
EXPERIMENT |= {"off_policy_collected_frames_per_batch": 7, "save_folder": None, "restore_file": None}


def write_run(
    folder,
    algorithm="mars",
    task="balance",
    seed=0,
    returns=(0.0, 2.0, 4.0),
    frames=40,
    planned=40,
    logged=None,
    name=None,
    **settings,
):
    """A run as BenchMARL writes it: 10 frames an iteration, evaluated after the first and at each 20.

    ``logged`` has further CSV files, ``algorithms``, ``experiments``, ``tasks`` and ``models``
    the settings of these parts that are others; ``name`` is the folder's.
    """
    name = name or f"{algorithm}_{task}_mlp__{Path(folder).name}_{seed}"
    run = Path(folder) / name
    scalars = run / name / "scalars"
    scalars.mkdir(parents=True)
    steps = range(frames // 10)
    evaluated = dict(zip([step for step in steps if step == 0 or (step + 1) % 2 == 0], returns, strict=True))
    report = {"absolute_metrics": {"return": [9.0]}}
    for step, value in evaluated.items():
        episodes = [value - 1, value + 1]
        report[f"step_{(step + 1) // 2}"] = {
            "step_count": 10 * (step + 1),
            "agents_return": episodes,
            "return": episodes,
        }
    (run / f"{name}.json").write_text(json.dumps({"vmas": {task: {algorithm: {f"seed_{seed}": report}}}}, indent=4))
    files = {
        "counters_total_frames": {step: 10.0 * (step + 1) for step in steps},
        "timers_total_time": {step: 1.5 * (step + 1) for step in steps},
        "eval_reward_episode_reward_mean": evaluated,
        "collection_reward_episode_reward_mean": {step: 100.0 + step for step in steps},
    }
    for file, values in (files | (logged or {})).items():
        (scalars / f"{file}.csv").write_text("".join(f"{step},{value}\n" for step, value in values.items()))
    parts = {
        "algorithm": {"epsilon": 0.2},
        "experiment": EXPERIMENT | {"max_n_frames": planned},
        "task": {"max_steps": 100},
        "model": {"num_cells": [8], "activation_class": np.ndarray},
    }
    about = {f"{part}_config": own | settings.get(f"{part}s", {}) for part, own in parts.items()}
    about |= {
        "environment_name": "vmas",
        "task_name": task,
        "algorithm_name": algorithm,
        "seed": seed,
        "on_policy": True,
    }
    (scalars.parent / "texts").mkdir()
    text = "\n".join(f"{key}: {value}" for key, value in sorted(about.items()))
    (scalars.parent / "texts" / "hparams0.txt").write_text(text)
    return run


def kl(*agents):
    return {f"train_agents_policy_kl_agent_{i}": dict(enumerate(values)) for i, values in enumerate(agents)}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(aggregates, "REPETITIONS", 100)
    monkeypatch.setattr(pictures, "DPI", 50)


@pytest.fixture
def report(capsys, monkeypatch):
    """A function that runs the command in this process, and returns what it prints. It draws only if it is to."""

    def run_command(*arguments, draw=False):
        with monkeypatch.context() as patch:
            if not draw:
                patch.setattr(pictures, "draw", lambda *_: [])
            command.main([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run_command


@pytest.fixture
def refused(capsys):
    """A function that runs the command and returns its error."""

    def run_command(*arguments):
        with pytest.raises(SystemExit) as end:
            command.main([str(argument) for argument in arguments])
        assert end.value.code == 2
        return capsys.readouterr().err

    return run_command


def table(file):
    with Path(file).open() as lines:
        return list(csv.DictReader(lines))


def rows(text):
    """The first columns of the rows of the table by task."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:6] == "| vmas"
    ]
    return {tuple(row[:2]): row[2:] for row in cells}


@pytest.fixture
def two_tasks(tmp_path):
    """Two algorithms, two tasks, four seeds, with bounds. The last evaluations are ``FINAL``."""
    for algorithm, tasks in FINAL.items():
        for task, values in tasks.items():
            for seed, value in enumerate(values):
                write_run(tmp_path / "runs", algorithm, task, seed, (0.0, 1.0, value))
    bounds = {f"vmas/{task}": {"low": low, "high": high, "source": "by hand"} for task, (low, high) in BOUNDS.items()}
    (tmp_path / "runs" / "bounds.json").write_text(json.dumps(bounds))
    return tmp_path / "runs"


FINAL = {
    "mappo": {"balance": [4.0, 5.0, 6.0, 7.0], "spread": [-30.0, -20.0, -10.0, -5.0]},
    "mars": {"balance": [3.0, 6.5, 7.0, 9.0], "spread": [-20.0, -10.0, -9.0, -2.0]},
}
BOUNDS = {"balance": (0, 10), "spread": (-40, 0)}


def normalised(algorithm):
    return np.array([(np.array(FINAL[algorithm][t]) - low) / (high - low) for t, (low, high) in BOUNDS.items()]).T


def test_the_numbers_of_a_task(tmp_path, report):
    write_run(tmp_path, seed=0, returns=(0.0, 6.0, 4.0), logged=kl([1, 2, 3, 2], [3, 4, 5, 4]))
    write_run(tmp_path, seed=1, returns=(2.0, 4.0, 8.0), logged=kl([1, 1, 1, 1], [1, 1, 1, 1]))
    printed = rows(report(tmp_path))["vmas/balance", "mars"]
    (row,) = table(tmp_path / "report.csv")
    # Evaluated at 10, 20 and 40 frames: the area is (10 (a + b) / 2 + 20 (b + c) / 2) / 30.
    areas = np.array([(10 * 3 + 20 * 5) / 30, (10 * 3 + 20 * 6) / 30])
    expected = {"final": [4, 8], "best": [6, 8], "area": areas, "time_s": [6, 6], "kl": [3, 1]}
    for name, values in expected.items():
        assert float(row[f"{name}_mean"]) == pytest.approx(np.mean(values), rel=1e-5), name
        assert float(row[f"{name}_std"]) == pytest.approx(np.std(values), rel=1e-5), name
    assert (row["seeds"], row["frames"], row["algorithm"]) == ("0 1", "40", "mars")
    assert printed == ["2", "40", "6.00 ± 2.00", "7.00 ± 1.00", "4.67 ± 0.33", "6", "2"]


@pytest.mark.parametrize(
    ("scale", "last", "difference"),
    [(0.001, "0.006 ± 0.002", "-0.001 (-0.013 to 0.011)"), (200, "1200 ± 400", "-200 (-2634 to 2234)")],
)
def test_numbers_have_decimals_by_their_size(scale, last, difference, tmp_path, report):
    """Three where all are at most 1, as rates are; none where one is above 1000. t of 2 degrees is 4.303."""
    for algorithm, ends in (("mars", (4.0, 8.0)), ("mappo", (5.0, 9.0))):
        for seed, end in enumerate(ends):
            write_run(tmp_path, algorithm=algorithm, seed=seed, returns=(0.0, 6.0 * scale, end * scale))
    printed = report(tmp_path, "--baseline", "mappo")
    assert rows(printed)["vmas/balance", "mars"][2] == last
    assert difference in printed


def test_the_kl_of_groups_is_a_mean_over_agents(tmp_path, report):
    logged = {f"train_adversary_policy_kl_agent_{i}": {0: value} for i, value in enumerate([1, 2, 3])}
    write_run(tmp_path, logged=logged | {"train_agent_policy_kl_agent_0": {0: 6}, "train_agent_policy_kl": {0: 99}})
    report(tmp_path)
    assert float(table(tmp_path / "report.csv")[0]["kl_mean"]) == 3


def test_interquartile_mean_and_its_interval(two_tasks, report):
    printed = report(two_tasks, "--baseline", "mappo")
    found = {row["label"]: row for row in table(two_tasks / "aggregate.csv")}
    # Of eight scores the middle four: mars has .3 .65 .7 .9 and .5 .75 .775 .95.
    assert float(found["mars"]["iqm_estimate"]) == pytest.approx((0.65 + 0.7 + 0.75 + 0.775) / 4, rel=1e-5)
    assert float(found["mappo"]["iqm_estimate"]) == pytest.approx((0.5 + 0.5 + 0.6 + 0.7) / 4, rel=1e-5)
    for label in FINAL:
        scores, draw = normalised(label), np.random.RandomState(0)
        draws = (draw.choice(4, (4, 2)) for _ in range(aggregates.REPETITIONS))
        means = [np.sort(scores[draw, [0, 1]].ravel())[2:6].mean() for draw in draws]
        ends = [float(found[label][f"iqm_{end}"]) for end in ("low", "high")]
        assert ends == pytest.approx(np.percentile(means, [2.5, 97.5]), rel=1e-5)
    assert "vmas/balance: 0 to 10 (by hand)" in printed
    low, high = (float(found["mars"][f"iqm_{end}"]) for end in ("low", "high"))
    assert f"0.72 [{low:.2f}, {high:.2f}]" in printed


def test_probability_of_improvement(two_tasks, report):
    report(two_tasks, "--baseline", "mappo")
    found = {row["label"]: row for row in table(two_tasks / "aggregate.csv")}
    # Of 16 pairs: balance 3 > none; 6.5 > 4 5 6; 7 > 4 5 6 and a tie; 9 > all. Spread -20 > one and a tie, -10 > two
    # and a tie, -9 > three, -2 > all.
    expected = ((0 + 3 + 3.5 + 4) / 16 + (1.5 + 2.5 + 3 + 4) / 16) / 2
    estimate, low, high = (float(found["mars"][f"improvement_{end}"]) for end in ("estimate", "low", "high"))
    assert estimate == pytest.approx(expected, rel=1e-5)
    assert 0 <= low < expected < high <= 1
    assert found["mappo"]["improvement_estimate"] == ""
    x, y = (np.array(list(FINAL[label].values())).T for label in ("mars", "mappo"))
    assert aggregates.probability_of_improvement(x, y) == pytest.approx(metrics.probability_of_improvement(x, y))


def test_differences_have_welchs_interval(two_tasks, report):
    printed = report(two_tasks, "--baseline", "mappo")
    found = table(two_tasks / "differences.csv")
    assert [(row["task"], row["label"]) for row in found] == [(f"vmas/{task}", "mars") for task in BOUNDS]
    for row, task in zip(found, BOUNDS, strict=True):
        x, y = (np.array(FINAL[label][task]) for label in ("mars", "mappo"))
        test = ttest_ind(x, y, equal_var=False)
        expected = [x.mean() - y.mean(), *test.confidence_interval(0.95), test.pvalue]
        assert [float(row[key]) for key in ("difference", "low", "high", "p")] == pytest.approx(expected, rel=1e-5)
    first, second = sorted(found, key=lambda row: float(row["p"]))
    assert float(first["p_holm"]) == pytest.approx(min(2 * float(first["p"]), 1), rel=1e-5)
    assert float(second["p_holm"]) == pytest.approx(max(float(second["p"]), float(first["p_holm"])), rel=1e-5)
    cells = [f"{float(row['difference']):.2f} ({float(row['low']):.2f} to {float(row['high']):.2f})" for row in found]
    assert "| algorithm | vmas/balance | vmas/spread |" in " ".join(printed.split())
    assert f"| mars | {' | '.join(cells)} |" in " ".join(printed.split())
    report(two_tasks)
    assert not (two_tasks / "differences.csv").exists()


def test_differences_of_the_score_that_is_chosen(two_tasks, report):
    report(two_tasks, "--baseline", "mappo", "--score", "best")
    best = {label: np.maximum(1, FINAL[label]["balance"]).mean() for label in FINAL}
    found = [float(row["difference"]) for row in table(two_tasks / "differences.csv")]
    # Of spread all evaluations before the last, 0 and 1, are above it.
    assert found == pytest.approx([best["mars"] - best["mappo"], 0])


@pytest.mark.parametrize("sizes", [(2, 5), (5, 2), (4, 3)])
@pytest.mark.parametrize("spread", [0.0, 0.2, 3.0])
def test_welch_with_unequal_seeds(sizes, spread):
    draw = np.random.default_rng(sum(sizes))
    x, y = 1.5 + spread * draw.normal(size=sizes[0]), draw.normal(size=sizes[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # SciPy's, where one has no spread
        interval = ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
        p = ttest_ind(x, y, equal_var=False).pvalue
    assert statistics.welch(x, y) == pytest.approx((x.mean() - y.mean(), interval.low, interval.high, p), rel=1e-9)
    swapped = statistics.welch(y, x)
    assert swapped == pytest.approx((y.mean() - x.mean(), -interval.high, -interval.low, p), rel=1e-9)


@pytest.mark.parametrize("seeds", [2, 3, 7])
def test_welch_without_any_spread(seeds):
    value, *others = statistics.welch(np.full(seeds, 0.7), np.full(seeds, 0.1))
    assert value == pytest.approx(0.6)
    assert len(others) == 3
    assert np.isnan(others).all()


def test_holms_correction():
    """Against the procedure's definition: go up from the smallest, reject while p is at most level / (what is left)."""
    p = np.array([0.011, math.nan, 0.2, 0.004, 0.012, 0.9, 0.011])
    corrected = statistics.holm(p)
    assert np.isnan(corrected).tolist() == [False, True, *[False] * 5]
    for level in np.linspace(0.001, 0.999, 400):
        rejected, left = set(), 7  # what is not known counts
        for i in [i for i in np.argsort(p) if not math.isnan(p[i])]:
            if p[i] > level / left:
                break
            rejected.add(i)
            left -= 1
        assert {i for i in range(7) if corrected[i] <= level} == rejected
    assert statistics.holm(np.array([math.nan])).shape == (1,)


@pytest.mark.parametrize(("p", "text"), [(0.02492, "0.0498"), (0.0251, "none; the least is a on t (p = 0.05)")])
def test_a_p_near_the_level_is_on_its_side(p, text):
    """Rounded to two digits both would be 0.05."""
    found = [statistics.Difference("t", label, 1.0, 0.0, 2.0, value) for label, value in (("a", p), ("b", 0.9))]
    assert text in tables.significant(found)


def test_what_is_left_after_the_correction_is_said(tmp_path, report):
    for seed in range(3):
        write_run(tmp_path, "mappo", "balance", seed, (0.0, 0.0, 0.1 * seed))
        write_run(tmp_path, "mars", "balance", seed, (0.0, 0.0, 5 + 0.1 * seed))
        write_run(tmp_path, "happo", "balance", seed, (0.0, 0.0, 0.1 * seed + 0.05))
    printed = report(tmp_path, "--baseline", "mappo")
    (line,) = [line for line in printed.splitlines() if "Holm" in line]
    assert line.startswith(
        "With Holm's correction for these 2 differences p is below 0.05 for mars on vmas/balance (p = "
    )
    assert "happo" not in line
    (line,) = [x for x in report(tmp_path, "--baseline", "mappo", "--score", "area").splitlines() if "Holm" in x]
    assert "below 0.05 for mars" in line
    level = report(tmp_path, "--baseline", "mappo", "--labels", "mappo", "happo")
    assert "Holm" not in level  # of one there is nothing to correct


def test_the_least_of_what_the_correction_makes_equal(tmp_path, report):
    """Corrected, all p are 1; the least is the least as it was, not the first by name."""
    for seed in range(3):
        write_run(tmp_path, "mappo", "balance", seed, (0.0, 0.0, seed))
        write_run(tmp_path, "happo", "balance", seed, (0.0, 0.0, seed + 0.1))
        write_run(tmp_path, "mars", "balance", seed, (0.0, 0.0, seed + 0.5))
    assert "none; the least is mars on vmas/balance (p = 1)" in report(tmp_path, "--baseline", "mappo")


def test_differences_where_little_is_known(tmp_path, report):
    for seed, value in enumerate((1.0, 3.0, 5.0)):
        write_run(tmp_path, "mappo", "balance", seed, (0.0, 0.0, value))
        write_run(tmp_path, "mappo", "level", seed, (0.0, 0.0, 0.1))
        write_run(tmp_path, "mars", "level", seed, (0.0, 0.0, 0.0996))
        write_run(tmp_path, "happo", "balance", seed, (0.0, value), frames=20, planned=20)
        write_run(tmp_path, "hatrpo", "balance", seed, (0.0, 0.0, value + 1))
        write_run(tmp_path, "hatrpo", "spread", seed, (0.0, 0.0, value))
    write_run(tmp_path, "mappo", "spread", 0, (0.0, 0.0, 2.0))
    write_run(tmp_path, "mars", "balance", 0, (0.0, 0.0, 2.0))
    printed = report(tmp_path, "--baseline", "mappo")
    # Left out: mars on balance and mappo on spread, of which there is one seed, and happo, which has fewer frames.
    found = {(row["task"], row["label"]): row for row in table(tmp_path / "differences.csv")}
    assert found.keys() == {("vmas/level", "mars"), ("vmas/balance", "hatrpo")}
    assert found["vmas/level", "mars"] == {
        "task": "vmas/level",
        "label": "mars",
        "difference": "-0.0004",
        "low": "",
        "high": "",
        "p": "",
        "p_holm": "",
    }
    lines = [" ".join(line.split()) for line in printed.split("the difference from mappo")[1].splitlines()]
    header = next(line for line in lines if line.startswith("| algorithm"))
    tasks = header.strip("| ").split(" | ")[1:]
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines if "| " in line}
    assert dict(zip(tasks, cells["mars"], strict=True)) == {"vmas/balance": "-", "vmas/level": "0.000"}
    assert cells["hatrpo"][tasks.index("vmas/level")] == "-"
    assert cells["hatrpo"][tasks.index("vmas/balance")].startswith("1.00 (-3.")


def test_tasks_and_labels_are_in_the_order_asked_for(two_tasks, report):
    wanted = [(f"vmas/{task}", label) for task in ("spread", "balance") for label in ("mappo", "mars")]
    for asked in (wanted, [(task, label) for task, label in wanted if label == "mars"]):
        tasks, labels = (list(dict.fromkeys(names)) for names in zip(*asked, strict=True))
        report(two_tasks, "--tasks", *tasks, "--labels", *labels)
        assert [(row["task"], row["label"]) for row in table(two_tasks / "report.csv")] == asked
    report(two_tasks, "--labels", "mars", "mappo")
    found = [(row["task"], row["label"]) for row in table(two_tasks / "report.csv")]
    assert found == [(f"vmas/{task}", label) for task in ("balance", "spread") for label in ("mars", "mappo")]


def test_interval_of_the_probability_of_improvement(two_tasks, report):
    report(two_tasks, "--baseline", "mappo")
    (row,) = [row for row in table(two_tasks / "aggregate.csv") if row["label"] == "mars"]
    x, y = (np.array(list(FINAL[label].values())).T for label in ("mars", "mappo"))
    draw, means = np.random.RandomState(0), []
    for _ in range(aggregates.REPETITIONS):
        drawn_x, drawn_y = (own[draw.choice(4, (4, 2)), [0, 1]] for own in (x, y))
        means.append(np.mean([(a > b) + (a == b) / 2 for t in (0, 1) for a in drawn_x[:, t] for b in drawn_y[:, t]]))
    ends = [float(row[f"improvement_{end}"]) for end in ("low", "high")]
    assert ends == pytest.approx(np.percentile(means, [2.5, 97.5]), rel=1e-5)


@pytest.mark.parametrize(("scores", "expected"), [([[0, 0], [0, 0], [10, 10]], 2.5), ([[0], [0], [10]], 10 / 3)])
def test_interquartile_mean_of_a_number_that_four_does_not_divide(scores, expected):
    assert aggregates.interquartile_mean(np.array(scores, dtype=float)) == pytest.approx([expected])


def test_bands():
    values = np.random.default_rng(3).normal(size=(5, 7))
    draw = np.random.default_rng(0)
    means = [
        np.mean([values[i] for i in drawn], axis=0) for drawn in draw.integers(5, size=(aggregates.REPETITIONS, 5))
    ]
    low, high = aggregates.interval_of_mean(values)
    assert low == pytest.approx(np.percentile(means, 2.5, axis=0))
    assert high == pytest.approx(np.percentile(means, 97.5, axis=0))
    # The mean of two drawn of 0 and 1 is 0 or 1, each with probability 1/4.
    assert np.ravel(aggregates.interval_of_mean(np.array([[0.0], [1.0]]))) == pytest.approx([0, 1])


def test_performance_profile(two_tasks):
    runs, notes = read_folders([str(two_tasks)])
    cells = statistics.cells(runs, "return", None, notes)
    bounds = aggregates.read_bounds([two_tasks / "bounds.json"], "return")
    found = aggregates.aggregate(cells, bounds, None, "final", "return", notes)
    at = found.thresholds.tolist().index(0.6)
    assert found.profile["mars"].value[at] == 6 / 8
    assert found.profile["mappo"].value[at] == 2 / 8 + 1 / 8  # .7, .75 and .875, not .6
    assert (found.profile["mars"].low <= found.profile["mars"].value).all()
    assert notes == []


def test_what_is_aggregated_can_be_chosen(two_tasks, report):
    report(two_tasks, "--score", "best", "--frames", 20)
    found = {row["label"]: row for row in table(two_tasks / "aggregate.csv")}
    assert float(found["mars"]["iqm_estimate"]) == pytest.approx((1 / 10 + 41 / 40) / 2, rel=1e-5)


def test_numbers_do_not_depend_on_what_else_is_reported(two_tasks, report):
    report(two_tasks)
    both = {row["label"]: row for row in table(two_tasks / "aggregate.csv")}
    report(two_tasks, "--labels", "mars")
    assert table(two_tasks / "aggregate.csv") == [both["mars"]]


def png_size(file):
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def svg_text(file):
    tree = xml.etree.ElementTree.parse(file)
    return " ".join("".join(node.itertext()) for node in tree.iter("{http://www.w3.org/2000/svg}text"))


def test_pictures(two_tasks, tmp_path, report):
    out = tmp_path / "out"
    report(two_tasks, "--baseline", "mappo", "--out", out, draw=True)
    words = {
        "learning_curves": [
            "vmas/balance",
            "vmas/spread",
            "mappo",
            "mars",
            "frames",
            "return",
            "95 % bootstrap interval",
        ],
        "aggregate": ["mappo", "mars", "interquartile mean", "probability of improvement", "over mappo", "stratified"],
        "performance_profile": ["mappo", "mars", "fraction of runs above τ", "normalised", "stratified"],
    }
    for name, expected in words.items():
        width, height = png_size(out / f"{name}.png")
        assert width == pictures.WIDTH * pictures.DPI
        assert height > (3 if name == "learning_curves" else 1.5) * pictures.DPI  # inches
        text = svg_text(out / f"{name}.svg")
        assert [word for word in expected if word not in text] == []
        assert f"({name}.png)" in (out / "report.md").read_text()
    curves = (out / "learning_curves.svg").read_text()
    assert curves.count("fill-opacity: 0.13") == 4  # a band for each arm and task
    assert "<dc:date>" not in curves


def test_labels_that_matplotlib_takes_for_its_own(two_tasks, tmp_path, report):
    labels = {"mappo": r"$\foo$", "mars": "_mars"}
    for algorithm in labels:
        for run in [*two_tasks.glob(f"{algorithm}_*")]:
            shutil.copytree(run, tmp_path / algorithm / run.name)
    folders = [f"{tmp_path / algorithm}={label}" for algorithm, label in labels.items()]
    report(*folders, "--bounds", two_tasks / "bounds.json", "--out", tmp_path, draw=True)
    for name in pictures.NAMES:
        assert [label for label in labels.values() if label not in svg_text(tmp_path / f"{name}.svg")] == []


def test_the_same_bytes_twice(two_tasks, tmp_path, report):
    np.random.seed(5)
    state = np.random.get_state()[1].copy()
    for out in ("a", "b"):
        report(
            two_tasks, "--baseline", "mappo", "--out", tmp_path / out, "--save", tmp_path / f"saved_{out}", draw=True
        )
    for a, b in (("a", "b"), ("saved_a", "saved_b")):
        files = sorted(file.name for file in (tmp_path / a).iterdir())
        assert len(files) == (10 if a == "a" else 17)
        assert files == sorted(file.name for file in (tmp_path / b).iterdir())
        for name in files:
            assert (tmp_path / a / name).read_bytes() == (tmp_path / b / name).read_bytes(), name
    assert (np.random.get_state()[1] == state).all()  # a caller's random numbers are left alone


def test_arms_differ_without_colour():
    looks = list(pictures.styles(map(str, range(20))).values())
    assert len({(look["linestyle"], look["marker"]) for look in looks}) == 20
    assert len({(look["color"], look["linestyle"]) for look in looks}) == 20


def same_numbers(a, b):
    for one, other in zip(table(a), table(b), strict=True):
        for key, value in one.items():
            try:
                assert float(other[key]) == pytest.approx(float(value), rel=1e-4, abs=1e-9), key
            except ValueError:
                assert other[key] == value


def test_saved_results_give_the_same_numbers(two_tasks, tmp_path, report):
    write_run(two_tasks, "happo", seed=0, returns=(0.0, 1 / 3), frames=20, planned=40, logged=kl([1e-3 / 3, 2e-5 / 7]))
    saved = tmp_path / "saved"
    first = report(two_tasks, "--baseline", "mappo", "--save", saved)
    shutil.copy(two_tasks / "bounds.json", saved)
    second = report(saved, "--baseline", "mappo")
    assert rows(second) == rows(first)
    assert len(rows(second)) == 4
    for name in ("report.csv", "differences.csv", "aggregate.csv"):
        same_numbers(two_tasks / name, saved / name)
    assert "unfinished, 20 of 40 frames" in second
    assert rows(report(saved, "--frames", 20))["vmas/balance", "happo"][2] == "0.333"
    text = (saved / "vmas_balance-happo-seed0.csv").read_text()
    assert text == ("frames,time_s,return,collection_return,kl\n10,1.5,0,100,0.00033333\n20,3,0.33333,101,2.8571e-06\n")
    again = tmp_path / "again"
    report(saved, "--save", again)
    for file in again.iterdir():
        assert file.read_bytes() == (saved / file.name).read_bytes()


def test_what_is_saved_beside_the_numbers(tmp_path, report):
    for i, epsilon in enumerate((0.1, 0.2)):
        run = write_run(
            tmp_path / "runs" / str(i), algorithms={"epsilon": epsilon}, experiments={"save_folder": "/tmp/x"}
        )
        (run.parent / ".hydra").mkdir()
        (run.parent / ".hydra" / "overrides.yaml").write_text(f"- algorithm=mars\n- algorithm.epsilon={epsilon}\n")
    report(tmp_path / "runs", "--save", tmp_path / "saved")
    data = json.loads((tmp_path / "saved" / "runs.json").read_text())
    assert data["shared_settings"]["experiment.lr"] == 0.001
    assert data["shared_settings"]["model.activation_class"] == "numpy.ndarray"
    assert "/tmp/x" not in (tmp_path / "saved" / "runs.json").read_text()
    first = data["runs"][0]
    assert first["file"] == "vmas_balance-mars_epsilon_0.1-seed0.csv"
    assert first["settings"] == {"algorithm.epsilon": 0.1}
    assert first["overrides"] == ["algorithm=mars", "algorithm.epsilon=0.1"]
    assert (first["task"], first["label"], first["algorithm"], first["seed"]) == (
        "vmas/balance",
        "mars, epsilon=0.1",
        "mars",
        0,
    )
    assert (first["finished"], first["frames"], first["planned_frames"]) == (True, 40, 40)
    assert first["versions"].keys() == {"benchmarl_trust", "benchmarl", "torchrl", "torch"}


def test_results_are_saved_one_after_the_other(tmp_path, report, refused):
    saved = tmp_path / "saved"
    for label, value in (("A", 1.0), ("B", 2.0), ("A", 3.0)):
        folder = tmp_path / f"{label}{value}"
        write_run(folder, returns=(0.0, 0.0, value))
        report(f"{folder}={label}", "--save", saved)
    assert len(list(saved.glob("*.csv"))) == 2
    found = rows(report(saved, "--out", tmp_path))
    assert {key: row[2] for key, row in found.items()} == {("vmas/balance", "A"): "3.00", ("vmas/balance", "B"): "2.00"}
    assert "give one another label" in refused(f"{tmp_path / 'B2.0'}=A?", f"{tmp_path / 'A1.0'}=A!", "--save", tmp_path)
    next(saved.glob("*.csv")).unlink()
    assert "is missing, which" in refused(saved)


def test_metric(tmp_path, report, refused):
    for seed, end in enumerate((0.5, 1.0)):
        logged = {
            "collection_agents_info_win_rate": {0: 0.0, 1: 0.25, 2: 0.5, 3: end},
            "collection_adversary_info_win_rate": {0: 0.0, 1: 0.25, 2: 0.5, 3: 0.0},
        }
        write_run(tmp_path / "runs", seed=seed, logged=logged)
    for name in ("win_rate", "collection_return"):
        printed = rows(report(tmp_path / "runs", "--metric", name, draw=True))
        assert printed["vmas/balance", "mars"][2] == {"win_rate": "0.375 ± 0.125"}.get(name, "103.00 ± 0.00")
        words = {"win_rate": "win_rate"}.get(name, "return in collection")
        assert words in svg_text(tmp_path / "runs" / "learning_curves.svg")
    report(tmp_path / "runs", "--metric", "win_rate", "--save", tmp_path / "saved")
    assert rows(report(tmp_path / "saved", "--metric", "win_rate"))["vmas/balance", "mars"][2] == "0.375 ± 0.125"
    printed = rows(report(tmp_path / "runs", "--metric", "collection/agents/info/win_rate"))
    assert printed["vmas/balance", "mars"][2] == "0.750 ± 0.250"
    assert rows(report(tmp_path / "runs", "--metric", "agents_return"))["vmas/balance", "mars"][2] == "4.00 ± 0.00"
    assert "no step_count, left out. It has return" in refused(tmp_path / "runs", "--metric", "step_count")
    message = refused(tmp_path / "runs", "--metric", "wins")
    assert "no wins, left out. It has return, collection_return, time_s" in message


def test_bounds_are_of_one_metric(two_tasks, report):
    assert "No bounds of collection_return for vmas/balance" in report(two_tasks, "--metric", "collection_return")


def resume(run, frames, returns, name):
    """What BenchMARL's own resumption from frame 20 leaves: a report that begins anew, rows that are there twice."""
    scalars = run / run.name / "scalars"
    with (scalars / "counters_total_frames.csv").open("a") as file:
        file.write("".join(f"{step},{10 * (step + 1)}.0\n" for step in range(2, frames // 10)))
    with (scalars / "timers_total_time.csv").open("a") as file:
        file.write("".join(f"{step},{100.0 + step}\n" for step in range(2, frames // 10)))
    with (scalars / "eval_reward_episode_reward_mean.csv").open("a") as file:
        file.write("".join(f"{step},{value}\n" for step, value in returns.items()))
    steps = {
        f"step_{(step + 1) // 2}": {"step_count": 10 * (step + 1), "return": [value]} for step, value in returns.items()
    }
    (run / f"{run.name}.json").write_text(json.dumps({"vmas": {"balance": {"mars": {name: steps}}}}))


def test_a_resumed_run(tmp_path, report):
    run = write_run(tmp_path, planned=60, experiments={"lr": 0.1})
    resume(run, 60, {3: 5.0, 5: 7.0}, "seed_0")
    report(tmp_path)
    (row,) = table(tmp_path / "report.csv")
    assert (float(row["final_mean"]), row["frames"], float(row["time_s_mean"])) == (7, "60", 105)
    assert float(row["area_mean"]) == pytest.approx((10 * 1 + 20 * 3.5 + 20 * 6) / 50)  # of 0, 2, 5, 7


def test_a_run_that_was_resumed_elsewhere_is_one(tmp_path, report):
    write_run(tmp_path / "a", returns=(0.0, 2.0), frames=20, name="one")
    write_run(tmp_path / "b", returns=(1.0, 3.0, 5.0), name="one")
    printed = report(tmp_path)
    assert "were read as one run" in printed
    assert f"{tmp_path / 'a' / 'one'}, {tmp_path / 'b' / 'one'}" in printed
    assert rows(printed)["vmas/balance", "mars"][:3] == ["1", "40", "5.00"]


def test_a_copy_of_a_run_is_one_with_it_if_it_is_equal(tmp_path, report, refused):
    run = write_run(tmp_path / "a")
    copy = Path(shutil.copytree(run, tmp_path / "b" / run.name))
    assert rows(report(tmp_path))["vmas/balance", "mars"][:3] == ["1", "40", "4.00"]
    file = copy / f"{copy.name}.json"
    file.write_text(file.read_text().replace("5.0", "7.0"))
    assert f"seed 0 is there twice: {run} and {copy}" in refused(tmp_path)


def test_rows_of_a_killed_run(tmp_path):
    (tmp_path / "rows.csv").write_text("0,1.0\n1,2.0\n1,3.0\n2,4")
    assert read_rows(tmp_path / "rows.csv") == {0: 1.0, 1: 3.0}


def test_seeds_that_were_evaluated_at_different_frames(tmp_path, report):
    write_run(tmp_path, seed=0)
    run = write_run(tmp_path, seed=1)
    file = run / f"{run.name}.json"
    file.write_text(file.read_text().replace('"step_count": 20', '"step_count": 30'))
    assert "seeds were evaluated at different frames" in report(tmp_path)
    (cell,) = statistics.cells(read_folders([str(tmp_path)])[0], "return", None, [])
    frames, values = cell.common
    assert (frames.tolist(), values.tolist()) == ([10, 40], [[0, 4], [0, 4]])
    assert cell.scores["area"] == pytest.approx([(10 * 1 + 20 * 3) / 30, (20 * 1 + 10 * 3) / 30])


def test_labels(tmp_path, report, refused):
    for seed in (0, 1):
        write_run(tmp_path / "a", seed=seed)
        write_run(tmp_path / "b" / "x", seed=seed, algorithms={"epsilon": 0.1})
        write_run(tmp_path / "b" / "y", seed=seed, models={"num_cells": [16]}, experiments={"save_folder": str(seed)})
        write_run(tmp_path / "c", "happo", seed=seed, experiments={"max_n_frames": 30 + seed})
    names = lambda *folders: [label for _, label in rows(report(*folders, "--out", tmp_path))]  # noqa: E731
    assert names(tmp_path / "a") == ["mars"]
    assert names(tmp_path / "a", tmp_path / "c") == ["happo", "mars"]
    b = ["mars, epsilon=0.1, model.num_cells=[8]", "mars, epsilon=0.2, model.num_cells=[16]"]
    assert names(tmp_path / "b") == b
    assert names(f"{tmp_path / 'a'}=MARS, twice", tmp_path / "c") == ["MARS, twice", "happo"]
    assert "a label is for one arm, there are mars, epsilon=0.1" in refused(f"{tmp_path / 'b'}=B")
    other = shutil.copytree(tmp_path / "a", tmp_path / "d" / "a")
    message = refused(tmp_path / "a", other)
    assert "mars, a, seed 0 is there twice" in message
    assert "give each a label: FOLDER=LABEL" in message
    assert names(tmp_path / "a", tmp_path / "d", tmp_path / "c") == ["happo", "mars, a", "mars, d"]
    message = refused(tmp_path / "a", "--baseline", "mappo")
    assert "--baseline: there is no mappo. Choose of: mars." in message
    assert "--tasks: there is no balance. Choose of: vmas/balance." in refused(tmp_path / "a", "--tasks", "balance")


def test_a_folder_per_task_makes_one_arm(two_tasks, tmp_path, report):
    report(two_tasks, "--baseline", "mappo", "--out", tmp_path / "one")
    for task in BOUNDS:
        for run in [*two_tasks.glob(f"*_{task}_*")]:
            shutil.copytree(run, tmp_path / task / run.name)
    bounds = ("--bounds", two_tasks / "bounds.json")
    report(tmp_path / "balance", tmp_path / "spread", "--baseline", "mappo", *bounds, "--out", tmp_path / "two")
    for name in ("report.csv", "differences.csv", "aggregate.csv"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()


def test_seeds_in_two_folders_are_one_arm_if_their_settings_are_equal(tmp_path, report):
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1)
    write_run(tmp_path / "c", seed=2, algorithms={"epsilon": 0.1})
    arms = lambda *folders: {  # noqa: E731
        label: row[0] for (_, label), row in rows(report(*(tmp_path / folder for folder in folders))).items()
    }
    assert arms("a", "b") == {"mars": "2"}
    assert arms("a", "c") == {"mars, a": "1", "mars, c": "1"}


def test_a_label_may_have_an_equals_sign(tmp_path, report):
    write_run(tmp_path / "seed=0")
    found = rows(report(f"{tmp_path / 'seed=0'}=MARS, d=0.1"))
    assert list(found) == [("vmas/balance", "MARS, d=0.1")]


def test_saved_and_raw_runs_of_a_task_are_of_one_task(tmp_path, report):
    for n in (8, 16):
        write_run(tmp_path / "first" / str(n), tasks={"n_agents": n})
        write_run(tmp_path / "second" / str(n), seed=1, tasks={"n_agents": n})
    report(tmp_path / "first", "--save", tmp_path / "saved")
    both = rows(report(tmp_path / "saved", tmp_path / "second"))
    assert {key: row[0] for key, row in both.items()} == {
        ("vmas/balance, n_agents=8", "mars"): "2",
        ("vmas/balance, n_agents=16", "mars"): "2",
    }


def test_tasks_of_one_name_are_told_apart_by_their_settings(tmp_path, report):
    for n in (16, 8):
        write_run(tmp_path / str(n), tasks={"n_agents": n})
    assert list(rows(report(tmp_path))) == [("vmas/balance, n_agents=8", "mars"), ("vmas/balance, n_agents=16", "mars")]


def test_one_run_twice_is_refused(tmp_path, refused):
    a, b = (write_run(tmp_path / name, name=f"mars_{name}") for name in "ab")
    message = refused(tmp_path)
    assert f"vmas/balance, mars, seed 0 is there twice: {a} and {b}" in message
    assert "FOLDER=LABEL" in message


def test_odd_runs_are_said_and_left_out(tmp_path, report):
    for seed in (0, 1):
        write_run(tmp_path, seed=seed)
        write_run(tmp_path, "mappo", seed=seed)
    unfinished = write_run(tmp_path, seed=2, returns=(0.0, 100.0), frames=20)
    empty = write_run(tmp_path, seed=3)
    empty.joinpath(f"{empty.name}.json").unlink()
    (empty / empty.name / "scalars" / "eval_reward_episode_reward_mean.csv").unlink()
    short = write_run(tmp_path, "mappo", seed=2, returns=(0.0, 100.0), frames=20, planned=20)
    write_run(tmp_path, "happo", returns=(0.0, 2.0), frames=20, planned=20)
    broken = write_run(tmp_path, "ippo", returns=(0.0, float("nan"), 2.0))
    broken_at_once = write_run(tmp_path, "ippo", seed=1, returns=(float("nan"), 1.0, 2.0))
    half = write_run(tmp_path, "maspo")
    report_file = half / f"{half.name}.json"
    report_file.write_text(report_file.read_text()[:200])
    (tmp_path / "nothing" / "scalars").mkdir(parents=True)
    printed = report(tmp_path, draw=True)
    found = rows(printed)
    assert found["vmas/balance", "mars"][:3] == ["2", "40", "4.00 ± 0.00"]
    assert found["vmas/balance", "mappo"][:3] == ["2", "40", "4.00 ± 0.00"]
    assert found["vmas/balance", "happo"][:3] == ["1", "20", "2.00"]
    assert found["vmas/balance", "maspo"][:3] == ["1", "40", "4.00"]  # from its CSV files
    assert [label for _, label in found] == ["happo", "mappo", "mars", "maspo"]
    (line,) = [line for line in printed.splitlines() if str(unfinished) in line]
    assert "unfinished, 20 of 40 frames, left out" in line
    assert "benchmarl.resume" in line
    assert "--frames 20" in line
    (line,) = [line for line in printed.splitlines() if str(empty) in line]
    assert "empty, no evaluation in its 40 frames, left out" in line
    assert "experiment.evaluation=True" in line
    (line,) = [line for line in printed.splitlines() if str(short) in line]
    assert "last evaluated at 20 frames, other seeds at 40, left out" in line
    (line,) = [line for line in printed.splitlines() if str(broken) in line]
    assert "not finite at 20 frames, left out. --frames 19 looks before it." in line
    (line,) = [line for line in printed.splitlines() if str(broken_at_once) in line]
    assert line.endswith("not finite at 10 frames, left out.")
    assert f"{report_file} is not whole" in printed
    assert "vmas/balance, happo: one seed, so nothing is known of the spread" in printed
    assert "unequal frames (happo 20, mappo 40, mars 40, maspo 40), not comparable" in printed
    assert "vmas/balance: unequal seeds (happo 1, mappo 2, mars 2, maspo 1)." in printed
    assert "Left out over tasks: happo (fewer frames than others on vmas/balance)" in printed
    assert "Left out over tasks: maspo (fewer than two seeds on a task)" in printed
    equal = rows(report(tmp_path, "--frames", 20))
    assert equal["vmas/balance", "mars"][:3] == ["3", "20", "34.67 ± 46.20"]
    assert equal["vmas/balance", "happo"][:3] == ["1", "20", "2.00"]


def break_csv(run, name, content):
    (run / run.name / "scalars" / f"{name}.csv").write_bytes(content)


def break_steps(run, change):
    file = run / f"{run.name}.json"
    data = json.loads(file.read_text())
    change(data["vmas"]["balance"]["mars"]["seed_1"])
    file.write_text(json.dumps(data))


def break_hydra(run, name, content):
    (run.parent / ".hydra").mkdir()
    (run.parent / ".hydra" / name).write_text(content)
    if name == "config.yaml":
        shutil.rmtree(run / run.name / "texts")


UNREADABLE = {
    "csv with a header": (lambda run: break_csv(run, "timers_total_time", b"step,value\n0,1.0\n"), "total_time.csv"),
    "csv with garbage": (lambda run: break_csv(run, "timers_total_time", b"0;1;2\n"), "timers_total_time.csv"),
    "csv in no UTF-8": (lambda run: break_csv(run, "timers_total_time", b"0,\xff\n"), "timers_total_time.csv"),
    "frames that are no number": (lambda run: break_csv(run, "counters_total_frames", b"0,nan\n"), "ValueError"),
    "no step_count": (lambda run: break_steps(run, lambda steps: steps["step_1"].pop("step_count")), "step_count"),
    "a step that is a list": (lambda run: break_steps(run, lambda steps: steps.update(step_1=[1])), "AttributeError"),
    "null in the returns": (
        lambda run: break_steps(run, lambda steps: steps["step_1"].update({"return": [None, 1.0]})),
        "TypeError",
    ),
    "overrides that are no yaml": (lambda run: break_hydra(run, "overrides.yaml", "- [a"), "ParserError"),
    "a config that is a list": (lambda run: break_hydra(run, "config.yaml", "- a\n"), "AttributeError"),
    "frames in words": (lambda run: break_hydra(run, "config.yaml", "experiment: {max_n_frames: all}"), "ValueError"),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_run_that_cannot_be_read_is_left_out_by_a_note(tmp_path, report, refused, what):
    destroy, message = UNREADABLE[what]
    write_run(tmp_path / "whole")
    run = write_run(tmp_path / "broken", seed=1)
    destroy(run)
    printed = report(tmp_path)
    assert rows(printed)["vmas/balance", "mars"][:3] == ["1", "40", "4.00"]
    (line,) = [line for line in printed.splitlines() if line.startswith(f"- {run} cannot be read")]
    assert message in line
    assert f"{run} cannot be read" in refused(tmp_path / "broken")  # where nothing else is there, why


SAVED = {
    "a missing key": ("runs.json", lambda text: text.replace('"seed"', '"sed"')),
    "runs that are a number": ("runs.json", lambda text: '{"shared_settings": {}, "runs": 3}'),
    "a cut-off index": ("runs.json", lambda text: text[:-20]),
    "an empty csv": ("vmas_balance-mars-seed0.csv", lambda text: ""),
    "garbage": ("vmas_balance-mars-seed0.csv", lambda text: text.replace("4", "four")),
    "another header": ("vmas_balance-mars-seed0.csv", lambda text: text.replace("frames", "steps")),
}


@pytest.mark.parametrize("what", SAVED)
def test_saved_results_that_are_not_as_they_were_saved(tmp_path, report, refused, what):
    write_run(tmp_path / "runs")
    saved = tmp_path / "saved"
    report(tmp_path / "runs", "--save", saved)
    name, change = SAVED[what]
    (saved / name).write_text(change((saved / name).read_text()))
    message = refused(saved)
    assert f"{saved / name} is not as --save writes it" in message or name == "runs.json"
    assert "is not as --save writes it" in message
    assert "is not as --save writes it" in refused(tmp_path / "runs", "--save", saved)


def test_saved_results_without_times(tmp_path, report):
    write_run(tmp_path / "runs")
    report(tmp_path / "runs", "--save", tmp_path / "saved")
    (tmp_path / "saved" / "vmas_balance-mars-seed0.csv").write_text("frames,return\n10,1\n40,5\n")
    assert rows(report(tmp_path / "saved"))["vmas/balance", "mars"][2:] == ["5.00", "5.00", "3.00", "-", "-"]


def test_folders_that_cannot_be_written(tmp_path, refused):
    run = write_run(tmp_path / "runs").parent
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "taken" / "report.csv").mkdir(parents=True)
    for option in ("--out", "--save"):
        for folder in (file, file / "below", "/proc/none"):
            assert f"{option}: cannot write into {folder}" in refused(run, option, folder)
    assert f"--out: cannot write into {tmp_path / 'taken'}" in refused(run, "--out", tmp_path / "taken")


def test_runs_are_not_saved_beside_themselves(tmp_path, report, refused):
    write_run(tmp_path / "runs")
    for folder in (tmp_path / "runs", tmp_path / "runs" / "saved"):
        assert f"--save: {folder} is in {tmp_path / 'runs'}, where the runs are" in refused(
            tmp_path / "runs", "--save", folder
        )
    report(tmp_path / "runs", "--save", tmp_path / "saved")
    write_run(tmp_path / "more", "happo")
    report(tmp_path / "saved", tmp_path / "more", "--save", tmp_path / "saved")  # adds to what is saved
    assert [label for _, label in rows(report(tmp_path / "saved"))] == ["happo", "mars"]


@pytest.mark.parametrize("frames", [0, -5, "many"])
def test_frames_are_a_positive_number(tmp_path, refused, frames):
    assert "argument --frames" in refused(tmp_path, f"--frames={frames}")


def test_what_is_left_out_over_tasks_is_said(two_tasks, report):
    write_run(two_tasks, "mars", "spread", 4)
    for seed in range(4):
        write_run(two_tasks, "happo", "balance", seed)
    printed = report(two_tasks, "--baseline", "mars")
    assert "happo (no runs on vmas/spread)" in printed
    assert "mars (unequal seeds, 4 on vmas/balance, 5 on vmas/spread)" in printed
    assert "The baseline mars is left out over tasks: no probability of improvement." in printed
    assert [row["label"] for row in table(two_tasks / "aggregate.csv")] == ["mappo"]


def test_without_bounds_nothing_is_normalised(two_tasks, report, refused):
    report(two_tasks, "--baseline", "mappo", draw=True)
    assert (two_tasks / "performance_profile.png").exists()
    (two_tasks / "bounds.json").rename(two_tasks / "mine.txt")
    printed = report(two_tasks, "--baseline", "mappo", draw=True)
    assert "No bounds of return for vmas/balance, vmas/spread" in printed
    assert "bounds.json beside the runs or name a file by --bounds" in printed
    (row,) = table(two_tasks / "aggregate.csv")
    assert (row["label"], row["iqm_estimate"]) == ("mars", "")
    assert float(row["improvement_estimate"]) > 0.5
    # Nothing of the report before is left, which would be taken for this one's.
    assert not list(two_tasks.glob("performance_profile.*"))
    assert (two_tasks / "aggregate.png").exists()
    report(two_tasks)
    assert {file.name for file in two_tasks.iterdir() if file.is_file()} == {"mine.txt", "report.md", "report.csv"}
    assert "interquartile mean, 95" in report(two_tasks, "--bounds", two_tasks / "mine.txt")
    for text, message in (
        ('{"vmas/balance": {"low": 3, "high": 3, "source": ""}}', "vmas/balance has low 3 and high 3"),
        ('{"vmas/balance": {"low": 0, "high": Infinity, "source": ""}}', "both must be finite numbers"),
        ('{"vmas/balance": {"low": NaN, "high": 1, "source": ""}}', "both must be finite numbers"),
        ('{"vmas/balance": {"low": false, "high": true, "source": ""}}', "both must be finite numbers"),
        ('{"vmas/balance": {"low": 3}}', "vmas/balance needs low, high, source"),
        ("[]", "cannot be read as bounds by task"),
    ):
        (two_tasks / "mine.txt").write_text(text)
        assert message in refused(two_tasks, "--bounds", two_tasks / "mine.txt")


def test_bounds_of_other_names_are_listed(two_tasks, report):
    (two_tasks / "bounds.json").write_text('{"balance": {"low": 3, "high": 4, "source": ""}}')
    assert "There are bounds for balance." in report(two_tasks)


def test_folders_without_runs(tmp_path, refused):
    assert "there is no such folder" in refused(tmp_path / "none")
    message = refused(tmp_path)
    assert f"{tmp_path} holds no runs" in message
    assert "experiment.create_json=True" in message
    write_run(tmp_path, returns=(0.0,), frames=10)
    assert "No run can be reported." in refused(tmp_path)


def test_without_its_extra_it_names_the_cure(monkeypatch, refused, tmp_path):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None if name == "rliable" else name)
    assert "rliable is not installed: pip install 'benchmarl_trust[report]'" in refused(tmp_path)


def test_importing_the_package_leaves_it_alone():
    code = "import sys, benchmarl_trust; print([m for m in sys.modules if 'report' in m and 'benchmarl_trust' in m])"
    code += "; import benchmarl_trust.report.__main__; print({'rliable', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "set()"]


def test_real_runs_have_the_fixtures_form(run, tmp_path, report):
    folder = tmp_path / "runs"
    folder.mkdir()
    of = {"save_folder": str(folder), "evaluation": True}
    experiments = [
        run(config.get_from_yaml(), seed=seed, **of) for config in (MarsConfig, MappoConfig) for seed in (0, 1)
    ]
    printed = report(folder, "--baseline", "mappo", "--save", tmp_path / "saved")
    found = rows(printed)
    assert found.keys() == {("vmas/simple_spread", "mappo"), ("vmas/simple_spread", "mars")}
    evaluations = [experiment.logger.json_writer.run_data for experiment in experiments[:2]]
    last = [np.mean(max(data.values(), key=lambda step: step.get("step_count", 0))["return"]) for data in evaluations]
    (row,) = [row for row in table(folder / "report.csv") if row["label"] == "mars"]
    assert float(row["final_mean"]) == pytest.approx(np.mean(last), rel=1e-5)
    assert float(row["kl_mean"]) > 0
    assert found["vmas/simple_spread", "mappo"][-1] == "-"  # BenchMARL logs no exact KL
    saved = json.loads((tmp_path / "saved" / "runs.json").read_text())
    assert saved["shared_settings"]["experiment.max_n_iters"] == 2
    assert all(entry["finished"] and entry["planned_frames"] == 80 for entry in saved["runs"])
    by_algorithm = {entry["algorithm"]: entry["settings"] for entry in saved["runs"]}
    assert by_algorithm["mars"]["algorithm.surrogate"] == "reciprocal"
    assert [own.frames for own in compact.load(tmp_path / "saved")] == [80] * 4
    run(MarsConfig.get_from_yaml(), seed=1, **of)
    with pytest.raises(ReportError, match="is there twice"):
        read_folders([str(folder)])


@pytest.mark.slow
def test_two_algorithms_end_in_a_report(tmp_path):
    """As in README: a multirun, then the report of its folder."""
    runs = [sys.executable, "-m", "benchmarl.run", "-m", "algorithm=mars,mappo", "seed=0,1", "task=vmas/balance"]
    runs += ["experiment=vmas_laptop", "experiment.max_n_frames=400", "experiment.evaluation_interval=200"]
    runs += ["experiment.on_policy_collected_frames_per_batch=200", "experiment.on_policy_n_envs_per_worker=20"]
    runs += ["experiment.on_policy_n_minibatch_iters=1", "experiment.on_policy_minibatch_size=100"]
    subprocess.run([*runs, f"hydra.sweep.dir={tmp_path / 'runs'}"], check=True, capture_output=True)
    command = [sys.executable, "-m", "benchmarl_trust.report", tmp_path / "runs", "--baseline", "mappo"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert list(rows(done.stdout)) == [("vmas/balance", "mappo"), ("vmas/balance", "mars")]
    assert all(row[:2] == ["2", "400"] for row in rows(done.stdout).values())
    assert png_size(tmp_path / "runs" / "learning_curves.png")[0] == 1680
    (row,) = table(tmp_path / "runs" / "aggregate.csv")
    assert row["label"] == "mars"
