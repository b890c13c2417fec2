"""README and the documentation's pages: their commands as they stand there, their links, the site.

Every block of bash and Python is run, those of a page one after another in one folder. A block that is not says so in a
comment on the line before it: ``<!-- long: two hours -->``, or ``<!-- elsewhere: tests/test_x.py -->``, which does it.
"""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = ["README.md", *sorted(str(file.relative_to(ROOT)) for file in DOCS.rglob("*.md") if "_build" not in file.parts)]
OWN_TEST = ("docs/checkpoints.md", "docs/export.md")  # below; they count the page's blocks
FENCE = re.compile(r"^( *)(```+)(\S*)[^\n]*\n(.*?)^ *\2 *$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (long|elsewhere): (.+) -->\n+\Z")
RUN, SHOWN = ("bash", "python"), ("bibtex", "json", "text", "yaml")
#: What makes a run short, whatever its preset and the command's own overrides, of which the last one counts.
SHORT = {
    "max_n_frames": 120,
    "on_policy_collected_frames_per_batch": 60,
    "on_policy_n_envs_per_worker": 2,
    "on_policy_minibatch_size": 60,
    "on_policy_n_minibatch_iters": 1,
    "evaluation_interval": 120,
    "evaluation_episodes": 2,
}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str
    mark: str | None
    """Why it is not run here: long or elsewhere."""
    why: str | None


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text()
    found = []
    for fence in FENCE.finditer(text):
        mark = MARK.search(text, 0, fence.start())
        found.append(Block(fence[3], fence[4], *(mark.groups() if mark else (None, None))))
    return found


def commands(page: str) -> list[str]:
    """The page's blocks of shell commands."""
    return [block.code for block in blocks(f"docs/{page}") if block.language == "bash"]


def shell(command: str, cwd: Path, first: Path = Path(sys.executable).parent) -> str:
    path = f"{first}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-e", "-c", command], cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{command}\n{output[-3000:]}"
    return output


def test_contributing_names_what_is_there():
    root = DOCS.parent
    text = (root / "CONTRIBUTING.md").read_text()
    assert len(text.splitlines()) < 120
    named = set(re.findall(r"^make (\S+)$|`make ([a-z-]+)`", text, re.MULTILINE))
    targets = re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), re.MULTILINE)
    assert len(named) >= 5
    assert {first or second for first, second in named} <= set(targets)
    paths = set(re.findall(r"(?:`|\()((?:tests|docs|conf|algorithms)/[\w/.]*)(?:`|\))", text))
    assert len(paths) >= 8
    for path in paths:
        assert (root / path).exists() or (root / "benchmarl_trust" / path).exists(), path


@pytest.mark.slow
def test_contributing_selects_tests_that_are_there():
    root = DOCS.parent
    text = (root / "CONTRIBUTING.md").read_text()
    for selected in re.findall(r"-m pytest (.+)$", text, re.MULTILINE):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", *selected.split()]
        assert subprocess.run(command, cwd=root, capture_output=True, check=False).returncode == 0, selected


@pytest.fixture
def short_python(tmp_path_factory) -> Path:
    """A folder with a ``python`` that makes runs of BenchMARL's command line short."""
    folder = tmp_path_factory.mktemp("bin")
    overrides = " ".join(f"experiment.{key}={value}" for key, value in SHORT.items())
    (folder / "python").write_text(
        f"""#!/bin/bash
case " $* " in
    *" -m benchmarl.run "* | *" examples/parallel_collection.py "*) exec {sys.executable} "$@" {overrides} ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
    )
    (folder / "python").chmod(0o755)
    return folder


@pytest.mark.parametrize("page", PAGES[1:])
def test_lines_of_code_are_not_cut_off(page):
    """A block of the site is 105 characters wide on a desktop."""
    code = "\n".join(block.code for block in blocks(page) if block.language in RUN)
    assert [line for line in code.splitlines() if len(line) > 105] == []


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_run_or_say_why_not(page):
    for block in blocks(page):
        assert block.language in (*RUN, *SHOWN) or block.language.startswith("{"), block
        if block.mark == "elsewhere":
            assert (ROOT / block.why).is_file(), block
        if page in OWN_TEST:
            assert block.mark is None, block


def test_a_block_is_found_with_its_mark(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = "```bash\na\n```\n<!-- long: x -->\n```bash\nb\n```\n\n- c\n\n  ```python\n  d\n  ```\n"
    page += "<!-- other: y -->\n```text\ne\n```\n"
    (tmp_path / "page.md").write_text(page)
    found = [(block.language, block.code.strip(), block.mark, block.why) for block in blocks("page.md")]
    assert found == [
        ("bash", "a", None, None),
        ("bash", "b", "long", "x"),
        ("python", "d", None, None),
        ("text", "e", None, None),
    ]


def to_run(page: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in RUN and block.mark is None]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page not in OWN_TEST and to_run(page)])
def test_commands(page, short_python, tmp_path):
    for folder in ("benchmarks", "docs", "examples"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    runs = 0
    for language, code, *_ in to_run(page):
        if language == "python":
            (tmp_path / "block.py").write_text(code)
            code = "python block.py"
        runs += code.count("-m benchmarl.run")
        shell(code, tmp_path, short_python)
    reports = [file for file in tmp_path.glob("**/*.json") if file.stem == file.parent.name]
    assert len(reports) >= runs  # a sweep has several


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as hosts of Markdown make them."""
    text = FENCE.sub("", page.read_text())
    headings = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", line) for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", sorted({*PAGES, *(file.name for file in ROOT.glob("*.md"))}))
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", (ROOT / page).read_text()))
    targets = re.findall(r"\]\(([^)\s]+)[^)]*\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue  # of the web, which tests do not ask
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize("folder", ["functional", "losses", "policy", "updates", "value"])
def test_every_module_is_in_the_reference(folder):
    modules = {file.stem for file in (ROOT / "benchmarl_trust" / folder).glob("[!_]*.py")}
    text = (DOCS / "api" / f"{folder}.md").read_text()
    assert set(re.findall(rf"^\.\. automodule:: benchmarl_trust\.{folder}\.(\w+)$", text, re.MULTILINE)) == modules


def test_a_formula_is_understood_or_refused():
    nodes = pytest.importorskip("docutils.nodes")
    pytest.importorskip("sphinx")
    pytest.importorskip("latex2mathml")
    mathml = runpy.run_path(str(DOCS / "conf.py"))["mathml"]
    made = mathml(nodes.math("", r"j = \arg\max_i s_i"))
    assert "argmax" in made
    assert "\\" not in made
    with pytest.raises(ValueError, match=r"MathML of \\nosuch x has a command that was not understood"):
        mathml(nodes.math("", r"\nosuch x"))


@pytest.mark.slow
def test_the_site_is_offline(tmp_path):
    """It builds without a warning, and what it shows is all its own."""
    shell(f"python -m sphinx -q -E -W --keep-going -d {tmp_path}/doctrees {DOCS} {tmp_path}/html", tmp_path)
    pages = list((tmp_path / "html").rglob("*.html"))
    assert {"index.html", "start.html", "results.html", "functional.html"} <= {page.name for page in pages}
    loads = re.compile(r'<(?:script|img|source|iframe)[^>]*src="(?:https?:)?//|<link[^>]*href="(?:https?:)?//')
    assert [page.name for page in pages if loads.search(page.read_text())] == []
    sheets = (tmp_path / "html").rglob("*.css")
    assert [sheet.name for sheet in sheets if re.search(r"url\(['\"]?(?:https?:)?//|@import", sheet.read_text())] == []


@pytest.mark.slow
def test_checkpoints(tmp_path):
    first, after_a_crash, longer, warm, evaluate = commands("checkpoints.md")

    def iterations(folder="first"):
        (file,) = (tmp_path / "outputs" / folder).rglob("counters_iter.csv")
        return [int(row.split(",")[0]) for row in file.read_text().splitlines()]

    shell(first, tmp_path)
    assert iterations() == [0, 1]
    assert "Reloaded experiment" in shell(after_a_crash, tmp_path)
    assert iterations() == [0, 1]  # it was finished
    shell(longer, tmp_path)
    assert iterations() == [0, 1, 2, 3]
    assert "algorithm was mars and is maspo" in shell(warm, tmp_path)
    assert iterations("warm") == [4, 5]
    assert iterations() == [0, 1, 2, 3]
    assert "Evaluation results logged" in shell(evaluate, tmp_path)


@pytest.mark.slow
def test_export(tmp_path):
    train, export, loop = commands("export.md")
    (tmp_path / "examples").symlink_to(DOCS.parent / "examples")
    shell(train, tmp_path)
    assert len(shell(export, tmp_path).splitlines()) == 4
    (use,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "export.md").read_text(), re.MULTILINE | re.DOTALL)
    shell(f"python -c '{use}assert action.shape == (5, 2)'", tmp_path)
    assert re.search(r"mean return -?\d+\.\d{4} of 4 agents in 60 environments", shell(loop, tmp_path))


@pytest.mark.slow
def test_report(tmp_path):
    """The page's commands, with shorter training."""
    pytest.importorskip("rliable")
    preset = "experiment=vmas_laptop"
    short = f"{preset} experiment.on_policy_n_minibatch_iters=1"
    first, labelled, metric, bounds, saved = (
        page.replace(preset, short).replace("max_n_frames=36000", "max_n_frames=6000") for page in commands("report.md")
    )

    def arms(output):
        rows = [row.split("|") for row in output.splitlines() if row.startswith("| vmas/balance")]
        return {row[2].strip(): [cell.strip() for cell in row[3:-1]] for row in rows}

    found = {arm: row[:2] for arm, row in arms(shell(first, tmp_path)).items()}
    assert found == {"mappo": ["2", "12000"], "mars": ["2", "12000"]}
    assert arms(shell(labelled, tmp_path)).keys() == {"MARS at 0.45", "mappo", "mars"}
    assert "no ground_rew" not in shell(metric, tmp_path)
    output = shell(bounds, tmp_path)
    assert "vmas/balance: -6.39 to 5.81 (200 random episodes, seed 100; MAPPO at 36000 frames, seed 100)" in output
    again = shell(saved, tmp_path)
    (*_, first_table), (*_, second_table) = (text.split("# Report") for text in (output, again))
    assert first_table.split("Written")[0] == second_table.split("Written")[0]
    files = {file.name for file in (tmp_path / "outputs" / "first").iterdir()}
    pictures = {
        f"{name}{end}" for name in ("learning_curves", "aggregate", "performance_profile") for end in (".png", ".svg")
    }
    assert pictures | {"report.md", "report.csv", "aggregate.csv"} <= files
    (random,) = re.findall(r"^```python\n(.*?)^```", (DOCS / "report.md").read_text(), re.MULTILINE | re.DOTALL)
    (value,) = re.findall(
        r"tensor\((.*)\)", shell(f"python -W ignore -c '{random.replace(chr(39), chr(34))}'", tmp_path)
    )
    assert float(value) == pytest.approx(-6.39, abs=1)
