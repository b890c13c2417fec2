"""The pages of the algorithms have one form, and what they say of keys, logs, uses and files is so."""

import ast
import functools
import itertools
import math
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from benchmarl.algorithms import EnsembleAlgorithmConfig, MappoConfig
from benchmarl.environments import VmasTask
from benchmarl.hydra_config import load_algorithm_config_from_hydra
from cases import configured
from conftest import scalars
from environments import StandInTask
from hydra import compose, initialize_config_module
from matrix import TABLE, takes_teams

from benchmarl_trust import ALGORITHMS
from benchmarl_trust.algorithms.sequential import Sequential
from benchmarl_trust.algorithms.sequential_natural import SequentialNatural
from benchmarl_trust.paths import conf_folder

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SECTIONS = ["Formula", "Can I use it?", "Keys", "What it logs", "What goes wrong", "Results"]
SECTIONS += ["Differences from the reference code", "Where in the code"]
#: What the page's table of uses asks, in its order -> the rows of the matrix that say yes.
USES = {
    "continuous actions": ["vmas/balance continuous", "vmas/navigation continuous"],
    "discrete actions": ["vmas/balance discrete", "pettingzoo/simple_spread discrete"],
    "masked actions": ["smacv2, 15 tasks (specs only)"],
    "recurrent policies (GRU, LSTM)": ["gru shared", "gru separate", "lstm shared", "lstm separate"],
    "CNN": ["cnn shared", "cnn separate"],
    "GNN": ["gnn→mlp shared", "gnn→mlp separate"],
    "DeepSets": ["deepsets critic shared", "deepsets critic separate"],
    "one policy for the group": ["mlp shared"],
    "several groups": ["vmas/simple_tag continuous", "pettingzoo/simple_adversary discrete"],
    "a team over groups (`teams`)": [],
    "in an ensemble": [],
    "older rollouts (`n_rollouts` > 1)": [],
    "agents that are absent (`mask`)": ["smacv2, 15 tasks (specs only)"],
}
names = pytest.mark.parametrize("name", list(ALGORITHMS))


def page(name: str) -> str:
    return (DOCS / "algorithms" / f"{name}.md").read_text()


def section(name: str, title: str) -> str:
    return page(name).split(f"\n## {title}\n")[1].split("\n## ")[0]


def tables(text: str) -> list[list[list[str]]]:
    """The rows of each table, without its head."""
    found = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split(" |")] for row in part.splitlines()[2:]] for part in found]


def code(cell: str) -> list[str]:
    """What is marked as code."""
    return re.findall(r"`([^`]+)`", cell)


def matrix() -> dict[str, dict[str, str]]:
    """row -> column -> cell."""
    lines = [line.strip("|").split("|") for line in TABLE.read_text().splitlines() if line.startswith("|")]
    columns = [cell.strip() for cell in lines[0]]
    return {line[0].strip(): dict(zip(columns, map(str.strip, line), strict=False)) for line in lines[2:]}


def kind(name: str) -> str:
    associated = ALGORITHMS[name].associated_class()
    if not issubclass(associated, Sequential):
        return "simultaneous"
    return "natural" if issubclass(associated, SequentialNatural) else "gradient"


def test_every_algorithm_has_a_page_and_is_in_the_table():
    pages = {file.stem for file in (DOCS / "algorithms").glob("*.md")} - {"index"}
    assert pages == set(ALGORITHMS)
    (rows,) = tables((DOCS / "algorithms" / "index.md").read_text())
    assert sorted(row[0] for row in rows) == sorted(f"[`{name}`]({name}.md)" for name in ALGORITHMS)
    assert all(len(row) == 3 and all(row) for row in rows)


@names
def test_all_pages_have_one_form(name):
    text = page(name)
    assert text.startswith("# ")
    assert re.findall(r"^#{1,6} (.*)", re.sub(r"(?ms)^```.*?^```", "", text), re.MULTILINE)[1:] == SECTIONS
    assert f"python -m benchmarl.run algorithm={name} task=vmas/balance experiment=vmas_laptop\n" in text.split("##")[0]
    assert all(section(name, title).strip() for title in SECTIONS)
    formula = section(name, "Formula")
    assert re.search(r"arXiv\s\d{4}\.\d{5}", formula)
    assert re.search(r"\*\*(Reconstructed|The authors' formula)", formula)


@names
def test_blocks_of_commands_that_take_long_say_so(name):
    """All but the first, which is a plain training command."""
    blocks = re.findall(r"(.*)\n```bash\n", page(name))
    assert blocks[0] == ""
    assert len(blocks) > 1
    for line in blocks[1:]:
        assert re.fullmatch(r"<!-- long: about [\d.]+ hours? on two cores -->", line)


@names
def test_the_keys_are_those_of_the_configuration(name):
    """A key that is added without the pages, or a default that changes, fails here."""
    (rows,) = tables(section(name, "Keys"))
    values = yaml.safe_load((conf_folder() / "algorithm" / f"{name}.yaml").read_text())
    del values["defaults"]
    assert set(values) == {field.name for field in fields(ALGORITHMS[name])}
    wanted = [(f"`{key}`", f"`{'null' if value is None else value}`") for key, value in values.items()]
    assert [(key, default) for key, default, _ in rows] == wanted
    assert all(words for _, _, words in rows)


def test_a_key_has_the_same_words_on_all_pages():
    words = {}
    for name in ALGORITHMS:
        for key, _, said in tables(section(name, "Keys"))[0]:
            words.setdefault((key, kind(name)), set()).add(said)
    assert {key: said for key, said in words.items() if len(said) > 1} == {}


@names
def test_uses_are_those_of_the_matrix(name):
    (rows,) = tables(section(name, "Can I use it?"))
    answers = {use: answer for use, answer, _ in rows}
    assert list(answers) == list(USES)
    cells = matrix()
    for use, proofs in USES.items():
        assert {cells[row][name] for row in proofs} <= {"✓"}, use
        assert answers[use] == "yes" or not proofs or use == "DeepSets"
    assert answers["DeepSets"] == "as the critic"
    assert cells["deepsets separate"][name] == cells["deepsets separate"]["mappo"] == "upstream"
    assert answers["a team over groups (`teams`)"] == ("yes" if takes_teams(name) else "no")


def refused(make_experiment, config, task) -> str:
    try:
        make_experiment(config, task=task, loggers=[])
    except ValueError as error:
        return str(error)
    return ""


@names
def test_teams_ensembles_and_older_rollouts_are_taken_or_refused_as_the_page_says(name, make_experiment):
    answers = {use: answer for use, answer, _ in tables(section(name, "Can I use it?"))[0]}
    config = ALGORITHMS[name]

    task = VmasTask.SIMPLE_SPEAKER_LISTENER.get_from_yaml()
    if hasattr(config.get_from_yaml(), "teams"):
        team = {"teams": [["speaker", "listener"]]}
        said = refused(make_experiment, configured(config, **team), task)
        assert answers["a team over groups (`teams`)"] == ("no" if said else "yes"), said
        if said:
            assert not refused(make_experiment, configured(config, **team, estimator="gae"), task)
    else:
        assert answers["a team over groups (`teams`)"] == "no"

    ensemble = EnsembleAlgorithmConfig({"adversary": config.get_from_yaml(), "agent": MappoConfig.get_from_yaml()})
    assert answers["in an ensemble"] == "yes"
    assert not refused(make_experiment, ensemble, VmasTask.SIMPLE_TAG.get_from_yaml())

    older = {"estimator": "gpae", "n_rollouts": 2, "share_param_critic": True}
    said = refused(make_experiment, configured(config, **older), StandInTask())
    wanted = "yes" if config.get_from_yaml().estimator == "gpae" else "with `estimator=gpae`"
    assert answers["older rollouts (`n_rollouts` > 1)"] == ("no" if said else wanted), said


def expanded(key: str, of_each: str, n_agents: int) -> set[str]:
    """The names of the csv logger's files."""
    name = key.replace("/", "_")
    agents = {f"{name}_agent_{i}" for i in range(n_agents)}
    positions = {f"{name}_position_{k}" for k in range(n_agents)}
    kinds = {"": {name}, "agent": {name} | agents, "position": positions, "position, and mean": {name} | positions}
    return kinds[of_each]


@names
def test_what_is_logged_is_what_the_page_lists(name, run):
    """No name less and none more, also with the keys that ask for further ones; with an agent that is absent."""
    always, with_keys = tables(section(name, "What it logs"))
    listed = set().union(*(expanded(key, each, 3) for keys, each, _ in always for key in code(keys)))
    further = set().union(*(expanded(key, each, 3) for keys, each, _, _ in with_keys for key in code(keys)))
    assert not listed & further
    ask = {"lr_schedule": "linear", "normalize_value": "running"}
    if kind(name) != "natural":
        ask |= {"epsilon_schedule": "linear", "target_kl": 1.0}
    if name == "gpae":
        ask["n_rollouts"] = 2
    assert set(ask) <= {key for _, _, asks, _ in with_keys for key in re.findall(r"\w+", asks)}
    for settings, wanted in (({}, listed), (ask, listed | further)):
        experiment = run(configured(ALGORITHMS[name], **settings), task=StandInTask(absent=True))
        logged = scalars(experiment)
        prefix = "train_agents_"
        assert {key.removeprefix(prefix) for key in logged if key.startswith(prefix)} == wanted
        for key in wanted:
            assert all(math.isfinite(value) for value in logged[prefix + key]), key


@names
def test_what_goes_wrong_names_keys_that_there_are(name):
    """Keys that are logged, keys of the configuration, or messages."""
    (rows,) = tables(section(name, "What goes wrong"))
    assert len(rows) >= 4
    assert all(len(row) == 3 and all(row) for row in rows)
    logged = {key for rows in tables(section(name, "What it logs")) for row in rows for key in code(row[0])}
    keys = {field.name for field in fields(ALGORITHMS[name])}
    for mark in (mark for row in rows for cell in row for mark in code(cell)):
        if mark.startswith("policy/"):
            assert re.sub(r"_(agent|position)_(<\w>|\d)$", "", mark) in logged, mark
        elif mark.startswith("algorithm."):
            assert re.split(r"[=: ]", mark.removeprefix("algorithm."))[0] in keys, mark
        elif re.fullmatch(r"\w+(=.*)?", mark):
            assert mark.split("=")[0] in keys | logged | {"algorithm", "batch", "none"}, mark


def defined(file: Path) -> set[str]:
    """Classes, functions, methods of classes and variables of a module."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@names
def test_files_and_names_of_the_code_are_there(name):
    (rows,) = tables(section(name, "Where in the code"))
    for _, file, marked in rows:
        (path,) = code(file)
        assert (ROOT / path).is_file(), path
        assert set(code(marked)) <= (defined(ROOT / path) if path.endswith(".py") else set()), path
    own = {name for row in rows for name in code(row[2])}
    associated = ALGORITHMS[name].associated_class()
    assert {associated.__name__, ALGORITHMS[name].__name__} <= own
    assert {base.__name__ for base in associated.__mro__[1:2]} <= own


FILES = ["choosing.md", "algorithms/index.md", *(f"algorithms/{name}.md" for name in ALGORITHMS)]
files = pytest.mark.parametrize("file", FILES)


@files
def test_scripts_that_are_named_are_there(file):
    text = (DOCS / file).read_text()
    for path in re.findall(r"\b(?:examples|benchmarks|tests)/[\w/]+\.(?:py|sh)\b", text):
        assert (ROOT / path).is_file(), path


def runs(text: str) -> list[list[str]]:
    """The overrides of each ``benchmarl.run`` in the blocks of commands; of a sweep the first value of each key, and
    one for each algorithm.
    """
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        block = block.replace("\\\n", " ")
        arms = shlex.split(" ".join(re.findall(r"for arm in (.*?); do", block))) or [""]
        for line, arm in itertools.product(re.findall(r"python -m benchmarl\.run (.*)", block), arms):
            words = [word for word in shlex.split(line.replace("$arm", arm)) if not word.startswith(("-m", "hydra."))]
            algorithms = next(word for word in words if word.startswith("algorithm=")).removeprefix("algorithm=")
            others = [word if "[" in word else word.split(",")[0] for word in words if word[:10] != "algorithm="]
            found += [[f"algorithm={algorithm}", *others] for algorithm in algorithms.split(",")]
    return found


@files
def test_commands_name_keys_that_there_are(file):
    """Also those that take long. Hydra refuses others."""
    commands = runs((DOCS / file).read_text())
    assert commands or file.endswith("index.md")
    for overrides in commands:
        composes(tuple(overrides))


@functools.cache  # MAPPO's are on all pages
def composes(overrides: tuple[str, ...]) -> None:
    with initialize_config_module("benchmarl.conf", version_base=None):
        load_algorithm_config_from_hydra(compose("config", overrides=list(overrides)).algorithm)
