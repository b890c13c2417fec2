"""The study's plan and its runner: what it would run, and that a runner that is killed goes on to the same results."""

import csv
import importlib.util
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from benchmarl.hydra_config import load_algorithm_config_from_hydra, load_experiment_config_from_hydra
from hydra import compose, initialize_config_module
from scipy.stats import ttest_1samp, ttest_ind

from benchmarl_trust.environments import TrustGamesTask, differential_reward
from benchmarl_trust.report import __main__ as report
from benchmarl_trust.report import aggregates, compact, statistics
from benchmarl_trust.report.runs import Run as SavedRun

ROOT = Path(__file__).parents[1]
FILE = ROOT / "benchmarks" / "study" / "run.py"
spec = importlib.util.spec_from_file_location("study_run", FILE)
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)

PLAN = yaml.safe_load(study.PLAN.read_text())
TINY = """
settings:
  - experiment=vmas_laptop
  - experiment.max_n_frames=60000
  - experiment.evaluation_interval=6000
  - model.num_cells=[8]
  - critic_model.num_cells=[8]
arms:
  mars: [algorithm=mars]
  happo: [algorithm=happo]
parts:
  tiny: {arms: all, tasks: [trust_games/differential], seeds: [0], metrics: [train_agents_policy_entropy]}
"""


def test_the_plan_has_every_run_once():
    runs = study.planned(PLAN)
    assert len({run.folder(Path()) for run in runs}) == len(runs)
    of_defaults = [run for run in runs if run.part == "defaults"]
    assert len(of_defaults) == len(PLAN["arms"]) * 2 * 3
    assert set(Counter((run.task, run.seed) for run in of_defaults).values()) == {len(PLAN["arms"])}


def test_each_arm_tries_three_radii_and_its_default_is_one():
    tuning = PLAN["parts"]["tuning"]
    assert tuning["radius"].keys() == PLAN["arms"].keys()
    with initialize_config_module("benchmarl.conf", version_base=None):
        for arm, radius in tuning["radius"].items():
            ((key, values),) = radius.items()
            assert len(values) == 3
            algorithm = compose("config", overrides=[*PLAN["arms"][arm], "task=vmas/balance"]).algorithm
            assert algorithm[key.removeprefix("algorithm.")] in values


def test_seeds_on_which_something_is_chosen_are_not_used_again():
    seeds = {name: part["seeds"] for name, part in PLAN["parts"].items()}
    chosen_on = [seed for name in ("screen", "tuning", "matching") for seed in seeds.pop(name)]
    assert len(chosen_on) == len(set(chosen_on)) == 3
    assert not set(chosen_on) & {seed for own in seeds.values() for seed in own}


def test_an_arm_that_is_not_there_is_named():
    plan = {"settings": [], "arms": {"a": []}, "parts": {"p": {"arms": ["b"], "tasks": ["t"], "seeds": [0]}}}
    with pytest.raises(ValueError, match="no arm b in the plan: a"):
        study.planned(plan)


def test_later_settings_win():
    plan = {"settings": ["s=1"], "arms": {"a": ["a=1"]}}
    plan["parts"] = {"p": {"radius": {"a": {"r": [0.5]}}, "settings": ["s=2"], "tasks": ["t"], "seeds": [3]}}
    (run,) = study.planned(plan)
    assert run.arm == "a 0.5"
    assert run.settings == ("s=1", "s=2", "a=1", "r=0.5", "task=t", "seed=3")
    assert run.folder(Path("out")) == Path("out/p/t/a_0.5/seed3")


def test_a_run_is_whole_with_the_settings_of_the_plan_alone(tmp_path):
    run = study.Run("p", "t", "a", 0, ("x=1", "y=2"))
    assert not study.is_whole(run, tmp_path)
    run.folder(tmp_path).mkdir(parents=True)
    (run.folder(tmp_path) / "finished").write_text("x=1\ny=2")
    assert study.is_whole(run, tmp_path)
    assert not study.is_whole(run._replace(settings=("x=1", "y=3")), tmp_path)


def test_the_study_in_the_repository_is_what_its_plan_says():
    """The runs that are saved are the plan's, finished, with its settings."""
    planned = {(run.part, run.task, run.arm, run.seed): run for run in study.planned(PLAN)}
    for part in PLAN["parts"]:
        folder = ROOT / "docs" / "results" / part
        for run in compact.load(folder) if folder.exists() else []:
            assert run.finished
            assert run.overrides == list(planned[part, run.task, run.label, run.seed].settings)


@pytest.fixture
def pages(monkeypatch):
    monkeypatch.syspath_prepend(FILE.parent)
    for name in ("run", "pages"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("pages")
    for name in ("run", "pages"):
        sys.modules.pop(name, None)


def test_the_pages_are_what_the_saved_runs_make_of_them(pages):
    """Tables, numbers and text alternatives: ``make report`` would change nothing."""
    alts = yaml.safe_load((ROOT / "docs" / "figures" / "alt.yaml").read_text())
    found, numbers = Counter(), 0
    for page in pages.PAGES:
        text = page.read_text()
        assert pages.filled(text, alts) == text, f"{page.name}: run make report"
        found[page.stem] = len(pages.TABLE.findall(text))
        numbers += len(pages.NUMBER.findall(text))
    assert sum(found.values()) >= 20
    assert numbers >= 15
    assert all(found[name] == number for name, number in Counter(name for name, _ in ON_PAGES).items())


def test_a_page_is_filled(pages, monkeypatch):
    monkeypatch.setitem(pages.TABLES, "words", lambda *words: "\n".join(words))
    monkeypatch.setitem(pages.NUMBERS, "words", lambda *words: "+".join(words))
    monkeypatch.setattr(pages, "plan", lambda: {"parts": dict.fromkeys("ac13")})
    monkeypatch.setattr(pages, "whole_tasks", lambda part: ["any"])
    text = """# A
<!-- table: words a b -->
<!-- end of table -->
between ![old [0, 1]](figures/a.svg)![other](figures/b.svg) and ![no](c.png) ![old](../figures/a.svg)
<!-- table: words c -->
| old |

said below it
<!-- end of table -->
| <!-- numbers: words 1 2 -->old<!-- end --> | <!-- numbers: words 3 --><!-- end --> |
"""
    expected = """# A
<!-- table: words a b -->
a
b
<!-- end of table -->
between ![new](figures/a.svg)![other](figures/b.svg) and ![no](c.png) ![new](../figures/a.svg)
<!-- table: words c -->
c
<!-- end of table -->
| <!-- numbers: words 1 2 -->1+2<!-- end --> | <!-- numbers: words 3 -->3<!-- end --> |
"""
    assert pages.filled(text, {"a.svg": "new"}) == expected
    assert pages.filled(expected, {"a.svg": "new"}) == expected


@pytest.mark.parametrize("left_out", ["<!-- end of table -->\n\n", "<!-- end -->", "<!-- table: words a -->\n"])
def test_a_comment_without_its_other_half_is_refused(left_out, pages):
    """Else what stands between two tables would be lost."""
    one = "<!-- table: words a -->\n| a |\n<!-- end of table -->\n\n"
    text = one + "text <!-- numbers: words 1 -->1<!-- end -->\n\n" + one
    with pytest.raises(ValueError, match="begin"):
        pages.filled(text.replace(left_out, "", 1), {})


@pytest.fixture
def made(pages, tmp_path, monkeypatch):
    """Saves runs of a plan with one part, of which the tables are made then."""

    def make(name, tasks, values, **part):  # of each label the last returns of seeds 0, 1, ..., and other curves
        arms = {label: [] for label in values}
        part = {"arms": list(arms), "tasks": tasks, "seeds": list(range(len(next(iter(values.values()))[0])))} | part
        plan = {
            "settings": [],
            "arms": {label: [] for label in {*arms, *part.get("radius", {})}},
            "parts": {name: part},
        }
        monkeypatch.setattr(pages, "plan", lambda: plan)
        monkeypatch.setattr(pages, "RESULTS", tmp_path)
        settings = {(run.task, run.arm, run.seed): list(run.settings) for run in study.planned(plan)}
        for label, (finals, curves) in values.items():
            for (seed, final), (scale, task) in itertools.product(enumerate(finals), enumerate(tasks, 1)):
                own = {"return": {10: 0.0, 20: scale * final}} | {key: x[seed] for key, x in curves.items()}
                run = SavedRun(task, "any", seed, [], own, frames=20, planned=20, label=label)
                run.overrides = settings.get((task, label, seed), [])
                compact.save([run], tmp_path / name)

    return make


def rows_of(table):
    lines = [line for line in f"|{table}".splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def welch(x, y, form=".2f"):
    low, high = ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
    return f"{np.mean(x) - np.mean(y):{form}} ({low:{form}} to {high:{form}})"


def constant(*values):
    return [{10: value, 20: value} for value in values]


def test_tables_of_differences_and_kl(pages, made):
    """Each pair is the first less the second, each column its task's."""
    x, y, z = (np.array(values) for values in ([1.0, 3.0, 8.0], [0.5, 0.2, 0.1], [4.0, 4.5, 4.2]))
    runs = {
        "happo 0.4": (x, {"kl": [{10: 0.01, 20: 0.03}, *constant(0.02, 0.05)]}),
        "mappo": (y, {}),
        "hatrpo": (z, {"kl": constant(0.001, 0.002, 0.003)}),
    }
    made("tuned", ["vmas/balance", "vmas/sampling"], runs)
    table = pages.made(pages.TABLES, "pairs tuned hatrpo - happo; mappo - hatrpo")
    p = 8 * ttest_ind(y, z, equal_var=False).pvalue  # four times, the least of eight: equal but for rounding
    before, named = table.splitlines()[-1].split(" p is below 0.05 for ")
    assert before == "With Holm's correction for these 8 differences"
    assert sorted(re.findall(r"(\S.*?) \(p = (.*?)\)(?:, |\.$)", named)) == [
        (f"mappo − hatrpo, {of}, on vmas/{task}", f"{p:.2g}")
        for of in ("area", "last")
        for task in ("balance", "sampling")
    ]
    assert rows_of(table) == [
        ["`hatrpo` − `happo 0.4`", "last", welch(z, x), welch(2 * z, 2 * x)],
        ["`hatrpo` − `happo 0.4`", "area", welch(z / 2, x / 2), welch(z, x)],
        ["`mappo` − `hatrpo`", "last", welch(y, z), welch(2 * y, 2 * z)],
        ["`mappo` − `hatrpo`", "area", welch(y / 2, z / 2), welch(y, z)],
    ]
    assert rows_of(pages.kl("tuned")) == [["`happo 0.4`", "0.03", "0.03"], ["`hatrpo`", "0.002", "0.002"]]
    words = pages.made(pages.NUMBERS, "difference tuned area mappo - happo 0.4")
    assert words == f"balance {welch(y / 2, x / 2)}, sampling {welch(y, x)}".replace("-", "−")
    assert pages.NUMBERS["mean"]("tuned", "final", "happo") == (
        f"balance {x.mean():.2f} ± {x.std():.2f}, sampling {2 * x.mean():.2f} ± {2 * x.std():.2f}"
    )


def test_differences_of_win_rates_are_from_mappo_whatever_its_key(pages, made):
    """On SMAX MAPPO's label has its λ, and what is compared is no return."""
    x, y = [0.5, 0.75, 0.75], [0.25, 0.25, 0.5]
    wins = {name: {"win_rate": [{10: 0.0, 20: value} for value in own]} for name, own in (("gpae", x), ("mappo", y))}
    made("smax", ["smax/3m"], {"gpae plain": ([7.0] * 3, wins["gpae"]), "mappo 0.95": ([9.0] * 3, wins["mappo"])})
    assert rows_of(pages.made(pages.TABLES, "differences smax final"))[0] == ["`gpae plain`", welch(x, y, ".3f")]


def test_differences_are_from_the_first_of_the_rows(pages, made):
    x, y = [0.5, 0.75, 1.75], [2.0, 3.0, 3.5]
    made("equal_budgets", ["vmas/balance"], {"hatrpow": (x, {}), "hatrpo": (y, {})})
    table = pages.differences("equal_budgets", "final")
    assert table.startswith("| last, less HATRPO |")
    assert rows_of(table)[0] == ["`hatrpow`", welch(x, y)]
    bounds = '{"vmas/balance": {"low": 0, "high": 10, "source": "here"}}'
    (pages.RESULTS / "tuned").mkdir()
    (pages.RESULTS / "tuned" / "bounds.json").write_text(bounds)
    table = pages.over_tasks("equal_budgets", "final")
    assert table.startswith("| 1 tasks | last: interquartile mean | last: P(improvement over HATRPO) |")
    first, second = rows_of(table)
    assert first[0::2] == ["`hatrpo`", ""]
    assert second[0] == "`hatrpow`"
    assert second[2].startswith("0.00 [")  # each of its runs ends below each of HATRPO's
    assert pages.made(pages.NUMBERS, "improvement equal_budgets final hatrpow") == second[2]


def test_a_difference_across_parts(pages, made):
    """An arm with another radius in another part: the first part's less the second's."""
    x, y = [0.5, 0.75, 1.75], [2.0, 3.0, 3.5]
    tasks = ["vmas/balance", "vmas/sampling"]
    plans = []
    for name, own, arms in (
        ("equal_budgets", tasks, {"hatrpow": (y, {})}),
        ("other", ["vmas/wheel"], {"hatrpow": (y, {})}),
        ("tuned", [*tasks, "vmas/transport"], {"hatrpow 0.03": (x, {}), "hatrpo": (x[::-1], {})}),
    ):
        made(name, own, arms)
        plans.append(pages.plan())
    for plan, key in itertools.product(plans, ("parts", "arms")):
        pages.plan()[key] |= plan[key]
    words = pages.made(pages.NUMBERS, "across tuned equal_budgets area hatrpow - hatrpow")
    x, y = np.array(x), np.array(y)
    assert words == f"balance {welch(x / 2, y / 2)}, sampling {welch(x, y)}".replace("-", "−")
    table = pages.made(pages.TABLES, "less tuned final equal_budgets hatrpow")
    assert table.startswith("| last, less `hatrpow` | balance | sampling |")
    assert rows_of(table) == [
        ["`hatrpo`", welch(x[::-1], y), welch(2 * x, 2 * y)],
        ["`hatrpow 0.03`", welch(x, y), welch(2 * x, 2 * y)],
    ]
    assert table.splitlines()[-1].startswith("With Holm's correction for these 4 differences")
    with pytest.raises(ValueError, match="tuned and other have no whole task in common"):
        pages.made(pages.TABLES, "less tuned final other hatrpow")
    (pages.RESULTS / "equal_budgets" / "runs.json").unlink()
    for cached in (pages.saved, pages.whole_tasks, pages.cells_of):
        cached.cache_clear()
    with pytest.raises(ValueError, match="equal_budgets: hatrpow is not there"):
        pages.made(pages.TABLES, "less tuned final equal_budgets hatrpow")


def test_the_mean_over_the_last_evaluations(pages, made):
    """Of the part's metric, whatever the order in which it was logged."""
    wins = [{30: 0.75, 10: 0.0, 20: 0.25}, {30: 0.5, 10: 1.0, 20: 0.0}]
    made("smax", ["smax/3m"], {"mappo 0.95": ([7.0, 7.0], {"win_rate": wins})})
    assert pages.made(pages.NUMBERS, "late smax 2 mappo") == "3m 0.375 ± 0.125"  # 0.5 and 0.25


def test_an_arm_is_named_without_its_radius_where_it_has_one_alone(pages, made):
    made(
        "tuned",
        ["vmas/balance"],
        {"mars 0.2": ([1.0, 2.0], {}), "mars 0.45": ([1.0, 3.0], {}), "log": ([2.0, 9.0], {})},
    )
    with pytest.raises(ValueError, match=r"mars is mars 0\.2 or mars 0\.45"):
        pages.made(pages.TABLES, "pairs tuned mars - log")
    with pytest.raises(ValueError, match="happo is not there"):
        pages.made(pages.TABLES, "pairs tuned happo - log")
    assert rows_of(pages.made(pages.TABLES, "pairs tuned mars 0.45 - log"))[0][2] == welch([1.0, 3.0], [2.0, 9.0])


def test_a_table_of_equal_kl(pages, made):
    """Each arm is below the MARS for whose KL its radius was chosen, and how far it is from that is said."""
    runs = {
        "mars 0.2": ([1.0, 3.0], {"kl": constant(0.001, 0.003)}),
        "mars 0.45": ([5.0, 7.0], {"kl": constant(0.01, 0.01)}),
        "clip 0.05": ([2.0, 6.0], {"kl": constant(0.0022, 0.0022)}),
        "clip 0.1": ([8.0, 9.0], {"kl": constant(0.0079, 0.0079)}),
        "maspo 0.3": ([1.0, 2.0], {"kl": constant(0.008, 0.008)}),  # nearer to the other MARS
        "maspo 0.5": ([1.0, 2.0], {"kl": constant(0.012, 0.012)}),
    }
    radius = {
        arm: {"epsilon": own} for arm, own in (("clip", [0.05, 0.1]), ("mars", [0.2, 0.45]), ("maspo", [0.3, 0.5]))
    }
    made("matched_balance", ["vmas/balance"], runs, radius=radius)
    rows = rows_of(pages.matched("matched_balance"))
    assert [row[:4] for row in rows] == [
        ["0.2", "`mars 0.2`", "0.002", "1.00"],
        ["0.2", "`clip 0.05`", "0.0022", "1.10"],
        ["0.2", "`maspo 0.3`", "0.008", "4.00, beyond 20 %"],
        ["0.45", "`mars 0.45`", "0.01", "1.00"],
        ["0.45", "`clip 0.1`", "0.0079", "0.79, beyond 20 %"],
        ["0.45", "`maspo 0.5`", "0.012", "1.20"],
    ]
    assert rows[1][4:6] == ["4.00 ± 2.00", "2.00 ± 1.00"]
    assert rows[1][6:] == [welch([2.0, 6.0], [1.0, 3.0]), welch([1.0, 3.0], [0.5, 1.5])]
    assert rows[0][6:] == ["", ""]


def test_a_table_of_numbers_of_agents(pages, made):
    """The logged mean has the first position, whose M is 1; the table has the others."""
    name = "train_agents_policy_advantage_variance"
    # With four agents, variances 2 and e**a * 2 at the first and at the others: the mean over all.
    logs = [(0.5, 1.5), (2.0, 4.0)]  # of each seed, in two iterations
    mean = [{10 * k: (2 + 3 * 2 * math.exp(a)) / 4 for k, a in enumerate(own, 1)} for own in logs]
    curves = {name: mean, f"{name}_position_0": constant(2.0, 2.0)}
    runs = {"mappo": ([1.0, 2.0], {}), "happo": ([3.0, 5.0], curves), "a2po": ([3.0, 6.0], curves)}
    made("many_agents", ["vmas/balance, n_agents=4"], runs)
    rows = rows_of(pages.agents("many_agents"))
    assert [row[:4] for row in rows] == [
        ["4", "`mappo`", "1.50 ± 0.50", "0.75 ± 0.25"],
        ["4", "`happo`", "4.00 ± 1.00", "2.00 ± 0.50"],
        ["4", "`a2po`", "4.50 ± 1.50", "2.25 ± 0.75"],
    ]
    assert rows[0][4:] == ["", "", ""]
    assert rows[1][4:6] == [welch([3.0, 5.0], [1.0, 2.0]), welch([1.5, 2.5], [0.5, 1.0])]
    assert rows[2][6] == ""
    # The means over iterations are 1 and 3: mean 2, standard error 1, and Student's quantile of one degree of freedom.
    number = r"([\d.e+-]+)"
    found = re.fullmatch(rf"{number} \({number} to {number}\)", rows[1][6]).groups()
    assert [math.log(float(x)) for x in found] == pytest.approx([2, 2 - 12.7062, 2 + 12.7062], abs=0.01)
    assert pages.made(pages.NUMBERS, "variance many_agents happo") == f"4 agents {rows[1][6]}".replace("-", "−")


def test_the_picture_over_the_number_of_agents_says_what_the_runs_say():
    """Against the committed runs, without the code that writes table and picture."""
    alt = yaml.safe_load((ROOT / "docs" / "figures" / "alt.yaml").read_text())["many_agents.svg"]
    returns, variances = alt.split(" Right ")
    runs, agents = committed("many_agents"), (2, 4, 8, 16)
    name = "train_agents_policy_advantage_variance"
    for label in ("mappo", "happo", "cliphappo", "a2po"):
        (text,) = re.findall(rf"(?:deviation: |; ){label} ([^;]*?)(?:;|\.$)", returns)
        found = [float(number) for number in re.findall(r"-?\d+\.\d+", text)]
        own = {n: [run for run in runs if run.label == label and run.task.endswith(f"={n}")] for n in agents}
        last = [[list(run.curves["return"].values())[-1] for run in own[n]] for n in agents]
        assert found == pytest.approx([x for of in last for x in (np.mean(of), np.std(of))], abs=0.00501)
        if label not in ("happo", "cliphappo"):
            assert label not in variances
            continue
        (text,) = re.findall(rf"(?:first: |; ){label} ([^;]*?)(?:;|\.$)", variances)
        found = np.array([float(number) for number in re.findall(r"\d+\.\d+", text)]).reshape(len(agents), 3)
        for n, (center, low, high) in zip(agents, found, strict=True):
            logs = []
            for run in own[n]:
                everywhere, first = (np.array(list(run.curves[key].values())) for key in (name, f"{name}_position_0"))
                others = (n * everywhere - first) / (n - 1)
                logs.append(np.mean(np.log(others / first)))
            interval = ttest_1samp(logs, 0).confidence_interval(0.95)
            expected = np.exp([np.mean(logs), interval.low, interval.high])
            assert [center, low, high] == pytest.approx(expected.tolist(), rel=0.0051)


@pytest.mark.parametrize("variance", [0.0, math.nan, math.inf])
def test_a_variance_that_is_not_finite_is_named(variance, pages, made):
    name = "train_agents_policy_advantage_variance"
    curves = {name: constant(1.0, variance), f"{name}_position_0": constant(1.0, 1.0)}
    made("many_agents", ["vmas/balance, n_agents=2"], {"mappo": ([1.0, 2.0], {}), "happo": ([3.0, 5.0], curves)})
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=r"seed 1.*not finite"):
        pages.agents("many_agents")


def test_a_variance_that_is_not_saved_is_named(pages, made):
    made("many_agents", ["vmas/balance, n_agents=2"], {"happo": ([3.0, 5.0], {})})
    with pytest.raises(ValueError, match=r"seed 0.*variance_position_0 not saved.*metrics"):
        pages.agents("many_agents")


def test_an_interval_needs_two_seeds(pages):
    with pytest.raises(ValueError, match="two seeds"):
        pages.student(np.array([1.0]))


def test_numbers_in_tasks_are_in_order(pages, made):
    tasks = [f"vmas/balance, n_agents={n}" for n in (16, 2, 8)]
    made("many_agents", tasks, {"mappo": ([1.0, 2.0], {})})
    assert [row[0] for row in rows_of(pages.agents("many_agents"))] == ["2", "8", "16"]


def test_what_is_not_there_is_not_in_the_tables(pages, made):
    made("tuned", ["vmas/balance"], {"mappo": ([1.0, 2.0], {}), "happo": ([3.0, 5.0], {})})
    index = pages.RESULTS / "tuned" / "runs.json"
    lines = index.read_text().splitlines()
    index.write_text("\n".join(line for line in lines if "happo-seed1" not in line).replace("},\n]}", "}\n]}"))
    assert pages.whole_tasks("tuned") == []
    asked = ["scores tuned final", "differences tuned final", "over_tasks tuned final", "kl tuned", "agents tuned"]
    asked += [f"{kind} tuned happo - mappo" for kind in ("pairs", "page")]
    assert {pages.made(pages.TABLES, words) for words in asked} == {"Not run yet."}
    asked = ["mean tuned final mappo", "difference tuned final happo - mappo", "iqm tuned final mappo"]
    asked += ["improvement tuned final happo", "variance tuned happo"]
    assert {pages.made(pages.NUMBERS, words) for words in asked} == {"Not run yet."}
    assert rows_of(pages.state())[0] == ["`tuned`", "2", "1", "2", "4", "3", "none"]
    shutil.rmtree(pages.RESULTS / "tuned")
    pages.saved.cache_clear()
    assert rows_of(pages.state())[0] == ["`tuned`", "2", "1", "2", "4", "0", "none"]


def test_runs_with_other_settings_than_the_plans_are_not_done(pages, made, monkeypatch):
    made("tuned", ["vmas/balance"], {"mappo": ([1.0, 2.0], {}), "happo": ([3.0, 5.0], {})})
    assert rows_of(pages.state())[0][5] == "4"
    changed = pages.plan() | {"settings": ["experiment.lr=1"]}
    monkeypatch.setattr(pages, "plan", lambda: changed)
    pages.whole_tasks.cache_clear()
    assert rows_of(pages.state())[0][5:] == ["0", "none"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("mean tunde final mappo", "tunde is no part"),
        ("maen tuned final mappo", "maen is none of .*mean"),
        ("mean tuned fnal mappo", "fnal is no score; there are final, best, area"),
        ("difference tuned fnal happo - mappo", "fnal is no score"),
        ("late tuned 0 mappo", "0 of mappo's evaluations on vmas/balance: it has 2"),
        ("late tuned 3 mappo", "it has 2"),
        ("mean tuned", "missing"),
        ("mean tuned final hatrpo", "Name one of mappo, happo"),
        ("difference tuned final happo - mappo", "two seeds or more"),
        ("across tuned tunde final happo - mappo", "tunde is no part of the plan, which has tuned"),
    ],
)
def test_a_comment_that_asks_for_what_is_not_there_is_named(words, named, pages, made):
    made("tuned", ["vmas/balance"], {"mappo": ([1.0], {}), "happo": ([3.0], {})})
    with pytest.raises(ValueError, match=f"<!-- {words} -->: .*{named}"):
        pages.made(pages.NUMBERS, words)


def test_a_page_that_is_not_in_order_is_named(pages, made, tmp_path, monkeypatch):
    made("tuned", ["vmas/balance"], {"mappo": ([1.0], {})})
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "docs" / "figures" / "alt.yaml").write_text("{}")
    (tmp_path / "docs" / "a.md").write_text("<!-- numbers: mean tunde final mappo --><!-- end -->")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PAGES", [tmp_path / "docs" / "a.md"])
    monkeypatch.setattr(sys, "argv", ["pages.py"])
    with pytest.raises(ValueError, match=r"docs/a.md: <!-- mean tunde final mappo -->: tunde is no part"):
        pages.main()


def test_radii_of_equal_kl_that_are_not_one_for_each_are_refused(pages, made):
    radii = {"mars": {"algorithm.epsilon": [0.2, 0.45]}, "maspo": {"algorithm.epsilon": [0.5]}}
    made("matched", ["vmas/balance"], {"mars 0.2": ([1.0, 2.0], {})}, arms=[], radius=radii)
    with pytest.raises(ValueError, match=r"maspo in plan\.yaml: give one radius for each of MARS's"):
        pages.matched("matched")


def test_an_arm_logs_its_kl_on_all_tasks_or_has_no_row(pages, made, monkeypatch):
    """A nan on one task is not hidden by a number on another."""
    made("tuned", ["vmas/balance", "vmas/sampling"], {"happo": ([1.0, 2.0], {}), "mars": ([1.0, 2.0], {})})
    known = {("vmas/balance", "happo"), ("vmas/balance", "mars"), ("vmas/sampling", "mars")}
    monkeypatch.setattr(pages, "kl_of", lambda cell: 0.1 if (cell.task, cell.label) in known else math.nan)
    assert rows_of(pages.kl("tuned")) == [["`mars`", "0.1", "0.1"]]


def test_a_run_that_cannot_be_compared_is_named(pages, made):
    made("tuned", ["vmas/balance"], {"mappo": ([1.0, 2.0], {}), "happo": ([3.0, math.nan], {})})
    with pytest.raises(ValueError, match=r"happo, seed 1.*not finite"):
        pages.scores("tuned", "final")


#: Of the parts whose tables are on the page: what they are of, and its decimals.
BY_RUNS = {"mamujoco": ("return", 0), "smax": ("win_rate", 3)}


@pytest.mark.parametrize("part", BY_RUNS)
def test_the_tables_on_the_page_are_the_reports(part, tmp_path):
    metric, digits = BY_RUNS[part]
    report.main([str(ROOT / "docs" / "results" / part), "--metric", metric, "--out", str(tmp_path)])
    page = (ROOT / "docs" / "results.md").read_text().splitlines()
    rows = read(tmp_path / "report.csv")
    assert sum(len(row["seeds"].split()) for row in rows) == len(committed(part))
    for row in rows:
        values = [f"{float(row[f'{name}_mean']):.{digits}f}" for name in statistics.SCORES]
        seeds = len(row["seeds"].split())
        if seeds > 1:
            spreads = [f"{float(row[f'{name}_std']):.{digits}f}" for name in statistics.SCORES]
            values = [f"{value} ± {spread}" for value, spread in zip(values, spreads, strict=True)]
        start = f"| `{row['task']}` | `{row['label']}` | {seeds} | {' | '.join(values)} |"
        assert any(line.startswith(start) for line in page), row


def test_what_is_said_of_single_runs():
    """On MaMuJoCo's Ant, and of the win rates on SMAX's harder map."""
    page = squeezed((ROOT / "docs" / "results.md").read_text())
    ant = {(run.label, run.seed): run.curves["return"] for run in committed("mamujoco") if "ant" in run.task}
    curves = {key: [curve[at] for at in sorted(curve)] for key, curve in ant.items()}
    (still, number, last, below) = re.findall(
        r"upright, \d+ to (\d+) in .*? of the (\d+) runs MAPPO's seed 0 alone ends above that, at (\d+), and (\d+) end",
        page,
    )[0]
    assert len(curves) == int(number)
    assert {key: round(own[-1]) for key, own in curves.items() if own[-1] > int(still)} == {("mappo", 0): int(last)}
    assert sum(own[-1] < own[0] for own in curves.values()) == int(below)
    best = max(max(run.curves["win_rate"].values()) for run in committed("smax") if "5m_vs_6m" in run.task)
    files = [f"{name}.md" for name in ("results", "claims", "choosing", "algorithms/gpae", "algorithms/mars")]
    said = [re.findall(r"wins more than ([\d.]+) %", squeezed((ROOT / "docs" / file).read_text())) for file in files]
    assert all(said)
    assert [float(number) for own in said for number in own] == pytest.approx([100 * best] * sum(map(len, said)))
    cells = [cell for cell in statistics.cells(committed("smax"), "return", None, []) if "5m_vs_6m" in cell.task]
    found = {d.label: d for d in statistics.differences(cells, "mappo 0.95", "final") if d.low > 0}
    assert set(found) == {"mars 0.95", "gpae plain"}
    expected = [f"{d.value:.3f} ({d.low:.3f} to {d.high:.3f})" for d in (found["mars 0.95"], found["gpae plain"])]
    assert f"MARS and, just so, GPAE end above MAPPO (0.638): {' and '.join(expected)}" in page
    assert squeezed((ROOT / "docs" / "claims.md").read_text()).count(f"MARS {expected[0]}, GPAE {expected[1]}") == 1


def test_what_is_said_of_normalisation_and_advantage():
    """On reverse_transport, in the words of equal λ."""
    page = squeezed((ROOT / "docs" / "results.md").read_text())
    number = r"(−?[\d.]+)"
    (said,) = re.findall(
        rf"adds {number} to GPAE and {number} to MAPPO, the advantage {number} with normalisation and {number} without",
        page,
    )
    cells = statistics.cells(committed("equal_lambda"), "return", None, [])
    mean = {cell.label: cell.scores["final"].mean() for cell in cells if cell.task == "vmas/reverse_transport"}
    both, mappo = "clip normalised 0.95", "mappo 0.95"
    pairs = [("gpae", "gpae plain"), (both, mappo), ("gpae", both), ("gpae plain", mappo)]
    expected = [mean[one] - mean[other] for one, other in pairs]
    assert [float(text.rstrip(".").replace("−", "-")) for text in said] == pytest.approx(expected, abs=0.00501)


@pytest.mark.slow  # 120 bootstraps
@pytest.mark.parametrize(
    ("part", "heading", "baseline"),
    [
        ("defaults", "### Defaults", "mappo"),
        ("tuned", "### Tuned radii", "mappo"),
        ("equal_budgets", "### Equal budgets", "hatrpo"),
    ],
)
def test_the_tables_by_task_are_the_reports(part, heading, baseline, tmp_path):
    """Arms by tasks, on the tasks on which all arms have all seeds; but for defaults the aggregates over these too."""
    folder, page = ROOT / "docs" / "results" / part, section("results.md", heading)
    tasks = whole_tasks(part)
    command = [str(folder), *(["--tasks", *tasks] if len(tasks) < len(PLAN["parts"][part]["tasks"]) else [])]
    command += ["--baseline", baseline, "--out", str(tmp_path)]
    command += ["--bounds", str(folder.parent / "tuned" / "bounds.json")] if part == "equal_budgets" else []
    over = {}
    for score in ("final",) if part == "defaults" else ("area", "final"):
        report.main([*command, "--score", score])
        over[score] = {row["label"]: row for row in read(tmp_path / "aggregate.csv")}
    rows = {(row["task"], row["label"]): row for row in read(tmp_path / "report.csv")}
    digits = {task: 2 if max(largest(row) for row in rows.values() if row["task"] == task) > 1 else 3 for task in tasks}
    printed = (tmp_path / "report.md").read_text().split(f"the difference from {baseline}")[1].split("Over tasks")[0]
    differences = {line.split(" | ")[0].strip("| "): line for line in map(squeezed, printed.splitlines())}
    (holm,) = [line for line in differences if line.startswith("With Holm")]
    assert holm in page
    arms = {label for _, label in rows}
    assert len(arms) == (3 if part == "equal_budgets" else 14)
    tables = [("final",), ("area",)] if part == "tuned" else [("final", "area")]
    for arm in arms:
        for scores in tables:
            cells = [spread(rows[task, arm], score, digits[task]) for task in tasks for score in scores]
            assert f"| `{arm}` | {' | '.join(cells)} |" in page
        if arm != baseline:
            assert differences[arm].count("(") == len(tasks)
            assert differences[arm].replace(arm, f"`{arm}`", 1) in page
        if part != "defaults":
            cells = [interval(over[score][arm], name) for score in ("final", "area") for name in ("iqm", "improvement")]
            assert squeezed(f"| `{arm}` | {' | '.join(cells)} |") in page


#: The arms whose differences are on an algorithm's page, and from which; of each part the table's first word.
TITLES = {"tuned": "with tuned radii", "equal_budgets": "equal budgets", "equal_lambda": "equal λ"}
ON_PAGES = {
    ("a2po", "tuned"): [("a2po 0.4", "mappo"), ("a2po 0.4", "happo 0.4")],
    ("cliphappo", "tuned"): [("cliphappo 0.4", "mappo"), ("cliphappo 0.4", "happo 0.4")],
    ("cliphatrpo", "tuned"): [("cliphatrpo", "mappo"), ("cliphatrpo", "hatrpo")],
    ("gpae", "tuned"): [("gpae", "mappo")],
    ("gpae", "equal_lambda"): [
        ("gpae plain 0.9", "mappo"),
        ("gpae plain", "mappo 0.95"),
        ("mappo 0.95", "mappo"),
        ("gpae", "gpae plain"),
        ("clip normalised 0.95", "mappo 0.95"),
        ("gpae", "clip normalised 0.95"),
    ],
    ("happo", "tuned"): [("happo 0.4", "mappo"), ("happo with gpae", "mappo"), ("sequential mars 0.45", "mappo")],
    ("happo", "equal_lambda"): [("happo normalised 0.95", "clip normalised 0.95")],
    ("hatrpo", "equal_lambda"): [("hatrpo normalised 0.95", "clip normalised 0.95")],
    ("hatrpo", "tuned"): [("hatrpo", "mappo"), ("hatrpo", "happo 0.4")],
    ("hatrpog", "tuned"): [("hatrpog 0.03", "mappo"), ("hatrpog 0.03", "hatrpo")],
    ("hatrpog", "equal_budgets"): [("hatrpog", "hatrpo")],
    ("hatrpow", "tuned"): [("hatrpow 0.03", "mappo"), ("hatrpow 0.03", "hatrpo")],
    ("hatrpow", "equal_budgets"): [("hatrpow", "hatrpo")],
    ("mars", "tuned"): [("mars 0.45", "mappo"), ("mars 0.45", "maspo 0.9")],
    ("maspo", "tuned"): [("maspo 0.9", "mappo")],
}


@pytest.mark.parametrize(("name", "part"), ON_PAGES)
def test_the_table_on_an_algorithms_page(name, part):
    """Against the committed runs, without the code that writes the table."""
    pairs = ON_PAGES[name, part]
    table = section(f"algorithms/{name}.md", f"| {TITLES[part]} |").split("<!-- end")[0]
    head, _, *lines = [line.strip("| ").split(" | ") for line in f"|{table}".splitlines() if line.startswith("|")]
    cells = {(cell.task, cell.label): cell for cell in statistics.cells(committed(part), "return", None, [])}
    arms = [text.strip("`") for text in head if " − " not in text]
    assert set(arms) == {arm for pair in pairs for arm in pair}
    assert head[len(arms) :] == [f"`{arm}` − `{other}`, 95 %" for arm, other in pairs]
    columns = [(task, score) for task in whole_tasks(part) for score in ("final", "area")]
    for (task, score), (title, *texts) in zip(columns, lines, strict=True):
        assert title == f"{task.split('/')[1]}: {'last' if score == 'final' else score}"
        scores = [cells[task, arm].scores[score] for arm in arms]
        expected = [x for of in scores for x in (of.mean(), of.std())]
        for arm, other in pairs:
            x, y = (cells[task, label].scores[score] for label in (arm, other))
            low, high = ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
            expected += [x.mean() - y.mean(), low, high]
            (said,) = [
                line for line in table.splitlines() if line.startswith(f"- `{arm}` is ") and f" `{other}` " in line
            ]
            above, _, below = said.partition("; below it on ")
            there = [re.search(rf"\b{task.split('/')[1]} \((.*?)\)", side) for side in (above, below)]
            word = "last" if score == "final" else score
            assert [side is not None and word in side[1] for side in there] == [low > 0, high < 0], (said, task, word)
        found = [number for text in texts for number in re.findall(r"-?\d+\.\d+", text)]
        (decimals,) = {len(number.partition(".")[2]) for number in found}
        assert decimals in (2, 3)
        assert [float(number) for number in found] == pytest.approx(expected, abs=0.501 / 10**decimals)


def committed(part):
    return compact.load(ROOT / "docs" / "results" / part)


def whole_tasks(part):
    """The tasks on which all arms have all seeds, in the report's order."""
    planned = Counter(run.task for run in study.planned(PLAN) if run.part == part)
    there = Counter(run.task for run in committed(part))
    return sorted(task for task in planned if there[task] == planned[task])


def section(file, heading):
    """What a page has from a heading on, to the next."""
    return (ROOT / "docs" / file).read_text().split(heading)[1].split("\n## ")[0].split("\n### ")[0]


def read(file):
    with file.open() as lines:
        return list(csv.DictReader(lines))


def squeezed(line):
    return " ".join(line.split())


def spread(row, score, digits):
    return f"{float(row[f'{score}_mean']):.{digits}f} ± {float(row[f'{score}_std']):.{digits}f}"


def largest(row):
    """Of the means: the report takes the largest score, which is on the same side of 1 for the tasks here."""
    return max(abs(float(row[f"{score}_mean"])) for score in statistics.SCORES)


def interval(row, name):
    ends = [row[f"{name}_{end}"] for end in ("estimate", "low", "high")]
    return "{:.2f} [{:.2f}, {:.2f}]".format(*map(float, ends)) if ends[0] else ""


def test_a_tasks_settings_are_in_its_name():
    part = {"arms": ["a"], "tasks": ["vmas/balance, n_agents=8"], "seeds": [3]}
    (run,) = study.planned({"settings": [], "arms": {"a": ["a=1"]}, "parts": {"p": part}})
    assert run.settings == ("a=1", "task=vmas/balance", "task.n_agents=8", "seed=3")
    assert run.folder(Path("out")) == Path("out/p/vmas_balance_n_agents_8/a/seed3")


def test_arms_of_single_parts_and_metrics_to_save():
    plan = {"settings": [], "arms": {"a": ["a=1"]}, "further_arms": {"b": ["b=1"]}}
    plan["parts"] = {"p": {"arms": "all", "tasks": ["t"], "seeds": [0]}}
    plan["parts"]["q"] = {"radius": {"b": {"r": [2]}}, "tasks": ["t"], "seeds": [0], "metrics": ["kl"]}
    first, second = study.planned(plan)
    assert (first.arm, first.settings, first.metrics) == ("a", ("a=1", "task=t", "seed=0"), ())
    assert (second.arm, second.settings, second.metrics) == ("b 2", ("b=1", "r=2", "task=t", "seed=0"), ("kl",))


def test_what_is_saved_is_not_run_again(tmp_path, monkeypatch):
    """On a machine that has the repository alone; a run whose settings the plan has changed is run."""
    plan = {"settings": ["s=1"], "arms": {"a": ["a=1"], "b": ["b=1"]}}
    plan["parts"] = {"p": {"arms": "all", "tasks": ["vmas/t, n_agents=2"], "seeds": [0, 1]}}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    for run in study.planned(plan):
        overrides = [setting.replace("b=1", "b=2") for setting in run.settings]
        saved = SavedRun(run.task, "algorithm", run.seed, [], {"return": {6000: 1.0}}, overrides=overrides)
        saved.label = run.arm
        compact.save([saved], tmp_path / "results" / "p")
    started = []
    monkeypatch.setattr(study, "train", lambda run, out: started.append(run))
    argv = ["run.py", "--plan", "plan.yaml", "--out", "runs", "--results", "results"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="These runs failed"):
        study.main()
    assert [(run.arm, run.seed) for run in started] == [("b", 0), ("b", 1)]


def test_what_another_part_has_run_is_copied(tmp_path, monkeypatch):
    """Of equal runs one is run; what lacks a metric that the other part saves is not equal."""
    plan = {"settings": ["s=1"], "arms": {"a": ["a=1"], "b": ["a=1"]}}
    of_all = {"tasks": ["t"], "seeds": [0]}
    plan["parts"] = {
        "p": {"arms": ["a"], **of_all},
        "q": {"radius": {"a": {"r": [None, 2]}}, **of_all},
        "m": {"arms": ["a"], "metrics": ["entropy"], **of_all},
        "z": {"arms": ["b"], **of_all},  # another name for the same
    }
    names = [(run.part, run.arm) for run in study.planned(plan)]
    assert names == [("p", "a"), ("q", "a"), ("q", "a 2"), ("m", "a"), ("z", "b")]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    started = []

    def train(run, out):
        started.append((run.part, run.arm))
        return True

    def save_result(run, out, results):
        curves = {name: {6000: float(len(started))} for name in ("return", *run.metrics)}
        found = SavedRun(run.task, "x", run.seed, [], curves, overrides=list(run.settings), label=run.arm)
        compact.save([found], results / run.part)

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(study, "save_result", save_result)
    monkeypatch.setattr(sys, "argv", ["run.py", "--plan", "plan.yaml", "--out", "runs", "--results", "results"])
    monkeypatch.chdir(tmp_path)
    study.main()
    assert sorted(started) == [("m", "a"), ("p", "a"), ("q", "a 2")]
    (of_p,) = compact.load(tmp_path / "results" / "p")
    of_q = {run.label: run for run in compact.load(tmp_path / "results" / "q")}
    assert of_q.keys() == {"a", "a 2"}
    (of_z,) = compact.load(tmp_path / "results" / "z")
    assert (of_z.label, of_z.curves.keys() & {"entropy"}) == ("b", set())
    for run in (of_q["a"], of_z):
        assert (run.curves["return"].keys(), run.overrides) == ({6000}, of_p.overrides)
    study.main()
    assert len(started) == 3


# What is chosen by rule


@pytest.fixture
def choose(monkeypatch):
    """The module, and its command line."""
    monkeypatch.syspath_prepend(str(FILE.parent))
    module = importlib.import_module("choose")

    def command(rule, results):
        monkeypatch.setattr(sys, "argv", ["choose.py", rule, "--results", str(results)])
        module.main()

    module.command = command
    return module


def saved(results, part, task, arm, curve, kl=()):
    curves = {"return": {at: float(value) for at, value in curve.items()}, "kl": dict(kl)}
    run = SavedRun(
        task, "any", *PLAN["parts"][part]["seeds"], [], curves, frames=max(curve), planned=max(curve), label=arm
    )
    compact.save([run], results / part)


def test_the_return_of_random_actions(choose):
    game = TrustGamesTask.DIFFERENTIAL.get_from_yaml().config
    steps = torch.linspace(-game["action_range"], game["action_range"], 401, dtype=torch.float64)
    actions = torch.cartesian_prod(steps, steps) + torch.tensor(game["start"], dtype=torch.float64)
    mean = differential_reward(actions.clamp(game["low"], game["high"])).mean()
    assert choose.random_return("trust_games/differential", 20_000) == pytest.approx(float(mean), abs=0.01)


def test_a_task_is_taken_where_mappo_has_come_half_of_the_way(choose, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(choose, "random_return", lambda name: -2.0)
    curve = {80_000: -9, 160_000: 2, 200_000: 3, 240_000: 4, 640_000: 7, 680_000: 8, 720_000: 9}
    late, falls = curve | {240_000: 3.9}, dict.fromkeys(curve, -2.5)
    tasks = PLAN["parts"]["screen"]["tasks"]
    own = {"vmas/balance": late, "vmas/dispersion": falls}
    for task in tasks:
        saved(tmp_path, "screen", task, "mappo", own.get(task, curve))
    choose.command("tasks", tmp_path)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert tasks[:3] == ["vmas/balance", "vmas/navigation", "vmas/dispersion"]
    expected = dict.fromkeys(tasks, "3.00 | 8.00 | 0.50 | yes") | dict.fromkeys(
        tasks[7:], "3.00 | 8.00 | 0.50 | no: 5 before it"
    )
    expected |= {"vmas/balance": "2.97 | 8.00 | 0.50 | no", "vmas/dispersion": "-2.50 | -2.50 | 1.00 | no"}
    assert rows == [f"| `{task}` | -2.00 | {rest} |" for task, rest in expected.items()]
    bounds = aggregates.read_bounds([tmp_path / "tuned" / "bounds.json"], "return")
    assert list(bounds) == ["vmas/navigation", *tasks[3:7]]
    assert {(entry["low"], entry["high"]) for entry in bounds.values()} == {(-2.0, 8.0)}


def part_of(out, name):
    """The part of the plan that was printed, as the runner takes it."""
    printed = yaml.safe_load(out[out.index(f"{name}:") :].partition("\n\n")[0])
    return study.planned({"settings": [], "arms": PLAN["arms"], "further_arms": PLAN["further_arms"], "parts": printed})


def test_the_radius_of_the_largest_area_is_taken(choose, tmp_path, capsys):
    def values(radius):
        ((_, found),) = radius.items()
        return found

    with pytest.raises(ValueError, match=r"bounds\.json, which names the tasks: run `choose\.py tasks` first"):
        choose.command("radii", tmp_path)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "bounds.json").write_text('{"vmas/balance": {}, "vmas/wheel": {}}')
    radii = {arm: values(radius) for arm, radius in PLAN["parts"]["tuning"]["radius"].items()}
    for arm, (small, usual, large) in radii.items():
        saved(tmp_path, "tuning", "vmas/balance", f"{arm} {small:g}", {0: 1, 10: 3, 20: 9})  # ends best, area 4
        saved(tmp_path, "tuning", "vmas/balance", f"{arm} {usual:g}", {0: 1, 10: 7, 20: 3})  # area 4.5
        if (arm, large) != ("hatrpog", 0.03):
            saved(tmp_path, "tuning", "vmas/balance", f"{arm} {large:g}", {0: 3, 10: 6, 20: 3})  # area 4.5 too
    with pytest.raises(ValueError, match=r"tuning is not whole: vmas/balance hatrpog 0\.03 seed 101\."):
        choose.command("radii", tmp_path)
    saved(tmp_path, "tuning", "vmas/balance", "hatrpog 0.03", {0: 9, 10: 9, 20: 9})
    choose.command("radii", tmp_path)
    out = capsys.readouterr().out
    assert "\n| `mars` | 0.1: 4.00 | **0.2: 4.50** | 0.45: 4.50 | 0.2 |\n" in out
    runs = part_of(out, "tuned")
    usual_is_default = {arm: arm for arm in radii} | {"hatrpog": "hatrpog 0.03"}  # whose runs are those of `defaults`
    assert {run.arm for run in runs} == set((usual_is_default | {"maspo": "maspo 0.5"}).values())
    assert {(run.task, run.seed) for run in runs} == set(itertools.product(["vmas/balance", "vmas/wheel"], range(5)))


def test_a_radius_of_equal_kl(choose):
    grid = {0.2: 0.004, 0.1: 0.001, 0.8: 0.001}  # up as a square, then down
    assert choose.radius_of(0.002, grid) == pytest.approx(0.1 * 2**0.5, abs=5e-4)
    assert [choose.radius_of(kl, grid) for kl in (0.001, 0.004)] == [0.1, 0.2]
    assert [choose.radius_of(kl, grid) for kl in (0.0009, 0.0041)] == [None, None]
    assert choose.radius_of(0.001, {0.1: 0.002, 0.2: 0.0}) is None  # falls
    assert choose.radius_of(0.001, {0.1: 0.001, 0.2: 0.001}) is None  # does not rise


def save_matching(results, missing=()):
    """KLs that are squares of the radii; MARS's four times as large on navigation."""
    for task, scale in (("vmas/balance", 1.0), ("vmas/navigation", 4.0)):
        for arm, radius in PLAN["parts"]["matching"]["radius"].items():
            for value in set(radius["algorithm.epsilon"]) - set(missing):
                kl = 0.1 * value**2 * (scale if arm == "mars" else 1)
                saved(results, "matching", task, f"{arm} {value:g}", {10: 1, 20: 2}, kl={10: kl, 20: kl})


def test_radii_of_equal_kl_for_each_task(choose, tmp_path, capsys):
    save_matching(tmp_path)
    choose.command("matched", tmp_path)
    out = capsys.readouterr().out
    assert "| `vmas/navigation` | `mars` | 0.2 | 0.016 |" in out
    balance = part_of(out, "matched_balance")
    expected = {"maspo": [0.2, 0.45], "log": [0.2, 0.45], "clip": [0.2], "mars": [0.2, 0.45]}
    assert {run.arm for run in balance} == {f"{arm} {value:g}" for arm, values in expected.items() for value in values}
    assert {(run.task, run.seed) for run in balance} == {("vmas/balance", seed) for seed in range(5)}
    navigation = part_of(out, "matched_navigation")
    expected |= {"maspo": [0.4, 0.9], "log": [0.4, 0.9], "clip": []}
    arms = {run.arm for run in navigation}
    assert arms == {f"{arm} {value:g}" for arm, values in expected.items() for value in values}
    assert "# vmas/navigation: the KL of clip does not rise through that of MARS at 0.2." in out


def test_no_radii_from_what_is_not_whole(choose, tmp_path):
    save_matching(tmp_path, missing=[0.45])
    with pytest.raises(ValueError, match=r"matching is not whole: vmas/balance mars 0\.45 seed 102"):
        choose.command("matched", tmp_path)
    save_matching(tmp_path)
    saved(tmp_path, "matching", "vmas/balance", "clip 0.05", {10: 1, 20: 2})
    with pytest.raises(ValueError, match=r"clip 0\.05, seed 102.*: its kl is not finite"):
        choose.command("matched", tmp_path)


def close(some: list[str], others: list[str]) -> bool:
    """Whether a table's cells are equal, numbers within 0.02."""

    def equal(a: str, b: str) -> bool:
        try:
            return abs(float(a) - float(b)) <= 0.02
        except ValueError:
            return a == b

    return len(some) == len(others) and all(map(equal, some, others))


@pytest.mark.slow  # for the returns of random actions
@pytest.mark.parametrize("rule", ["tasks", "radii"])
def test_the_choices_on_the_page_and_in_the_plan_are_those_of_the_rules(choose, rule, tmp_path, capsys):
    for part in ("screen", "tuning", "tuned"):
        shutil.copytree(ROOT / "docs" / "results" / part, tmp_path / part)
    file = tmp_path / "tuned" / "bounds.json"
    committed = aggregates.read_bounds([file], "return")
    choose.command(rule, tmp_path)
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| `")]
    page = [line for line in (ROOT / "docs" / "results.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(PLAN["parts"]["screen"]["tasks"] if rule == "tasks" else PLAN["arms"])
    for row in rows:
        name, *cells = row.split(" | ")
        # To another machine's rounding, in the physics of random actions.
        assert any(other.startswith(name) and close(other.split(" | ")[1:], cells) for other in page), row
    bounds = aggregates.read_bounds([file], "return")
    assert list(bounds) == list(committed)
    for name, entry in bounds.items():
        assert [entry[key] for key in ("low", "high")] == pytest.approx(
            [committed[name][key] for key in ("low", "high")], abs=0.02
        )
    if rule == "radii":
        assert part_of(out, "tuned") == [run for run in study.planned(PLAN | {"settings": []}) if run.part == "tuned"]


def test_the_radii_of_equal_kl_in_the_plan_are_those_of_the_rule(choose, tmp_path, capsys):
    shutil.copytree(ROOT / "docs" / "results" / "matching", tmp_path / "matching")
    choose.command("matched", tmp_path)
    out = capsys.readouterr().out
    for part in ("matched_balance", "matched_navigation"):
        planned = [run for run in study.planned(PLAN | {"settings": []}) if run.part == part]
        assert len(planned) == 8 * 5
        assert part_of(out, part) == planned
    kls = {row["label"]: row["kl_mean"] for row in runs_of("matching", tmp_path) if row["task"] == "vmas/balance"}
    page = section("results.md", "### Equal KL").split("<!-- table: kl matching -->")[1].split("<!-- end")[0]
    for label, value in kls.items():
        assert f"| `{label}` | {float(value):.2g} |" in page


def runs_of(part, out):
    report.main([str(ROOT / "docs" / "results" / part), "--out", str(out / "report")])
    return read(out / "report" / "report.csv")


@pytest.mark.slow
def test_benchmarl_takes_the_settings_of_all_runs():
    with initialize_config_module("benchmarl.conf", version_base=None):
        for run in study.planned(PLAN):
            config = compose("config", overrides=list(run.settings), return_hydra_config=True)
            experiment = load_experiment_config_from_hydra(config.experiment)
            assert experiment.max_n_frames % experiment.evaluation_interval == 0
            check = getattr(load_algorithm_config_from_hydra(config.algorithm), "check_keys", None)
            if check is not None:
                check(experiment)


def start(folder: Path) -> subprocess.Popen:
    (folder / "plan.yaml").write_text(TINY)
    command = [sys.executable, str(FILE), "--plan", "plan.yaml", "--out", "runs", "--results", "results"]
    return subprocess.Popen(
        command,
        cwd=folder,
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what is to run in the background, these tests for instance, with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def results(folder: Path) -> dict[str, str]:
    """The evaluations and the parameters' trace of each run, as the logger wrote them."""
    names = ("eval_reward_episode_reward_mean", "train_agents_policy_kl", "train_agents_skipped_steps")
    files = [file for name in names for file in folder.rglob(f"{name}.csv")]
    return {f"{file.relative_to(folder).parts[2]} {file.stem}": file.read_text() for file in files}


def timeless(file: Path) -> list[list[str]]:
    """The report's rows without the columns of times."""
    header, *rows = [line.split(",") for line in file.read_text().splitlines()]
    kept = [i for i, name in enumerate(header) if not name.startswith("time")]
    return [[row[i] for i in kept] for row in (header, *rows)]


@pytest.mark.slow
def test_a_runner_that_is_killed_goes_on_to_the_same_results(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    assert start(whole).wait() == 0
    for how in (signal.SIGINT, signal.SIGKILL):
        shutil.rmtree(cut / "runs", ignore_errors=True)
        first = start(cut)
        end = time.monotonic() + 120
        while not results(cut / "runs"):
            assert first.poll() is None, first.stderr.read()
            assert time.monotonic() < end, "no iteration in two minutes"
            time.sleep(0.05)
        os.killpg(first.pid, how)
        first.wait(120)
        assert not list(cut.rglob("finished"))
        assert not list(cut.rglob("happo"))  # what waits is not started any more
    second = start(cut)
    said = second.communicate()[1]
    assert second.returncode == 0, said
    assert "2/2" in said
    assert len(list(cut.rglob("finished"))) == 2
    assert len(results(whole / "runs")) == 6
    assert results(cut / "runs") == results(whole / "runs")
    saved = {file: file.read_bytes() for file in (cut / "results").rglob("*.*")}
    shutil.rmtree(cut / "runs")
    third = start(cut)
    assert third.wait() == 0  # nothing is left, nothing changes
    assert not (cut / "runs").exists()
    assert {file: file.read_bytes() for file in (cut / "results").rglob("*.*")} == saved
    reports = []
    for folder in (whole, cut):
        report.main([str(folder / "results" / "tiny"), "--out", str(folder / "report")])
        reports.append(timeless(folder / "report" / "report.csv"))
    assert reports[0] == reports[1]
    entropy = {run.label: run.curves["train_agents_policy_entropy"] for run in compact.load(whole / "results" / "tiny")}
    assert len(entropy["happo"]) == 10
    assert [row[:4] for row in reports[0][1:]] == [
        ["trust_games/differential", arm, arm, "0"] for arm in ("happo", "mars")
    ]


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_tried_again(tmp_path):
    (tmp_path / "plan.yaml").write_text(TINY.replace("algorithm=happo]", "algorithm=happo, algorithm.epsilon=2]"))
    command = [sys.executable, str(FILE), "--plan", "plan.yaml", "--out", "runs", "--results", "results"]
    command += ["--arms", "happo"]
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1
        assert "runs/tiny/trust_games_differential/happo/seed0" in done.stderr
        assert not list(tmp_path.rglob("finished"))
    (log,) = tmp_path.rglob("log.txt")
    assert "algorithm.epsilon" in log.read_text()
