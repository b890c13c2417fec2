"""The documentation's pictures: drawings are made again byte by byte, all have a text alternative and are small."""

import importlib.util
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

pytest.importorskip("matplotlib")

DOCS = Path(__file__).parents[1] / "docs"
PICTURES = [file for file in sorted((DOCS / "figures").iterdir()) if file.suffix in (".svg", ".png", ".gif")]
LIMITS = {".svg": 150_000, ".png": 150_000, ".gif": 700_000}  # bytes


@pytest.fixture(scope="module")
def figures():
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawn(figures, tmp_path_factory):
    """The folder of the drawings as they are made now, and their text alternatives."""
    out = tmp_path_factory.mktemp("figures")
    return out, figures.draw(out)


@pytest.mark.parametrize(
    "name",
    [
        "gains.svg",
        "advantage_variance.svg",
        "many_agents.svg",
        "differential_game.svg",
        "smax.svg",
        "learning_curves.svg",
        "tuned_at_once.svg",
        "tuned_in_turns.svg",
        "tuned_natural.svg",
        "tuned_aggregate.svg",
        "mamujoco_curves.svg",
        "smax_curves.svg",
    ],
)
def test_a_drawing_is_made_again_in_the_same_bytes(name, figures, drawn):
    committed = (DOCS / "figures" / name).read_text()
    (versions,) = re.findall(r"docs/figures\.py, (.*?)(?:</dc:title>| -->)", committed)
    if versions != figures.VERSIONS:
        pytest.skip(f"{name} was made with {versions}; here are {figures.VERSIONS}: make figures draws it anew")
    assert (drawn[0] / name).read_text() == committed
    assert "<dc:date>" not in committed


def test_nothing_else_is_drawn(figures, drawn):
    assert {file.name for file in drawn[0].iterdir()} == {*figures.DRAWINGS, *figures.CURVES}


def test_every_picture_has_a_text_alternative(figures, drawn):
    committed = yaml.safe_load((DOCS / "figures" / "alt.yaml").read_text())
    assert committed.keys() == {file.name for file in PICTURES}
    assert all(len(text) > 60 and text.endswith(".") for text in committed.values())
    made = drawn[1] | figures.describe_animations()
    assert {name: committed[name] for name in made} == made


@pytest.mark.parametrize("file", PICTURES, ids=lambda file: file.name)
def test_pictures_are_small(file):
    assert 2_000 < file.stat().st_size < LIMITS[file.suffix]


@pytest.mark.parametrize("task", ["balance", "navigation"])
def test_animations_move_and_go_on(task):
    with Image.open(DOCS / "figures" / f"{task}_trained.gif") as picture:
        assert picture.n_frames >= 30
        assert picture.info["loop"] == 0
        first = np.asarray(picture.convert("RGB"))
        picture.seek(picture.n_frames - 1)
        assert (np.asarray(picture.convert("RGB")) != first).any()


def test_colours_are_apart_as_greys(figures):
    def lightness(color: str) -> float:  # CIE L*, of 100
        rgb = torch.tensor([int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)])
        linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        y = (linear @ torch.tensor([0.2126, 0.7152, 0.0722])).item()
        return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y

    shades = [lightness(color) for color in (figures.BLACK, figures.BLUE, figures.RED, figures.YELLOW, "#FFFFFF")]
    assert shades == sorted(shades)
    assert all(abs(a - b) > 18 for a, b in combinations(shades, 2))


def test_alternatives_of_other_pictures_stay(figures, tmp_path, monkeypatch):
    (tmp_path / "alt.yaml").write_text("other.svg: made elsewhere\ngains.svg: old\n")
    monkeypatch.setattr("sys.argv", ["figures.py", "--out", str(tmp_path)])
    figures.main()
    alts = yaml.safe_load((tmp_path / "alt.yaml").read_text())
    assert alts["other.svg"] == "made elsewhere"
    assert alts["gains.svg"].startswith("Four panels")


def test_a_video_becomes_a_small_gif(figures, tmp_path):
    video = torch.full((1 + 8, 3, 300, 480), 255, dtype=torch.uint8)
    for step in range(len(video)):
        video[step, 0, 100:150, 40 * step : 40 * step + 50] = 0
    figures.save_gif(video, tmp_path / "moving.gif")
    with Image.open(tmp_path / "moving.gif") as picture:
        assert (picture.size, picture.n_frames, picture.info["duration"]) == ((320, 200), 9, 50)
    assert (tmp_path / "moving.gif").stat().st_size < 10_000
