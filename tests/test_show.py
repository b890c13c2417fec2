"""``examples/show.py``: a checkpoint becomes a GIF, and its run's folder stays as it is."""

import ctypes
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarl.environments import VmasTask
from PIL import Image
from torchrl.envs import VmasEnv

from benchmarl_trust import GpaeConfig, HappoConfig, MarsConfig, TrustGamesTask

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def show(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("show")


@pytest.fixture
def main(show, monkeypatch, tmp_path, capsys):
    """A function that runs the script on a checkpoint, and returns the GIF and what was printed."""

    def run_main(checkpoint, *options):
        out = tmp_path / "new" / "folder"
        arguments = [checkpoint, "--out", out, *options]
        monkeypatch.setattr("sys.argv", ["show.py", *map(str, arguments)])
        capsys.readouterr()
        show.main()
        run = checkpoint.parents[1].name
        return out / f"{run}-{checkpoint.stem}.gif", capsys.readouterr().out

    return run_main


@pytest.fixture
def checkpoint(run):
    """A function that trains and returns a checkpoint's path."""

    def train(config=None, **settings):
        experiment = run(config or MarsConfig.get_from_yaml(), checkpoint_at_end=True, **settings)
        return experiment.folder_name / "checkpoints" / f"checkpoint_{experiment.total_frames}.pt"

    return train


@pytest.fixture
def plain_frames(monkeypatch):
    """VMAS without OpenGL: a shade that the first agent's place gives, in a frame of odd size."""

    def render(env, mode):
        assert mode == "rgb_array"
        frame = np.full((41, 60, 3), 255, dtype=np.uint8)
        frame[10:30] = int(float(env.agents[0].state.pos[0, 0]) * 1e5) % 256
        return frame

    monkeypatch.setattr(VmasEnv, "render", render, raising=False)


def files(folder):
    return {file: file.read_bytes() if file.is_file() else None for file in folder.rglob("*")}


@pytest.mark.parametrize("config", [MarsConfig, HappoConfig, GpaeConfig])
def test_a_checkpoint_becomes_a_gif_and_the_run_stays(config, checkpoint, main, plain_frames, tmp_path):
    file = checkpoint(config.get_from_yaml(), evaluation=True)
    (folder,) = tmp_path.iterdir()
    before = files(folder)
    gif, output = main(file)
    assert files(folder) == before
    assert sorted(tmp_path.iterdir()) == sorted([folder, tmp_path / "new"])
    (line,) = output.splitlines()
    assert line.startswith(f"{gif}: 4 steps, return -")  # BenchMARL drops the last of five
    with Image.open(gif) as picture:
        assert (picture.size, picture.format, picture.n_frames) == ((60, 40), "GIF", 4)

    again, output = main(file, "--seed", 5, "--steps", 3)
    assert "2 steps" in output
    assert again == gif


def test_the_episode_is_the_deterministic_policys(checkpoint, show, plain_frames):
    """Twice the same, whatever exploration the run had asked for; its return is BenchMARL's."""
    file = checkpoint(evaluation_deterministic_actions=False)
    first, second = show.draw(file), show.draw(file)
    assert torch.equal(first.video, second.video)
    assert first.scalars == second.scalars | {"timers_evaluation_time": first.scalars["timers_evaluation_time"]}
    other = show.draw(file, seed=3)
    assert first.scalars["eval_reward_episode_reward_mean"] != other.scalars["eval_reward_episode_reward_mean"]


def test_frames_become_a_gif_of_their_size(show, tmp_path):
    frames = torch.zeros(3, 3, 500, 1000, dtype=torch.uint8)
    frames[1, 0], frames[2, 2] = 255, 255  # black, red, blue
    show.save_gif(frames, tmp_path / "folder" / "a.gif", size=100, fps=25)
    with Image.open(tmp_path / "folder" / "a.gif") as gif:
        assert (gif.size, gif.n_frames, gif.info["duration"], gif.info["loop"]) == ((100, 50), 3, 40, 0)
        colours = []
        for k in range(3):
            gif.seek(k)
            colours.append(gif.convert("RGB").getpixel((50, 25)))
    assert colours == [(0, 0, 0), (255, 0, 0), (0, 0, 255)]


def test_what_is_wrong_is_said_in_a_line(checkpoint, show, main, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="There is no checkpoint"):
        show.draw(tmp_path / "checkpoint_80.pt")
    (tmp_path / "alone.pt").touch()
    with pytest.raises(SystemExit, match=r"There is no .*config\.pkl"):
        show.draw(tmp_path / "alone.pt")
    game = checkpoint(task=TrustGamesTask.CLIMBING.get_from_yaml())
    with pytest.raises(SystemExit, match="nothing to see"):
        show.draw(game)
    with pytest.raises(SystemExit):
        main(game, "--steps", 1)
    file = checkpoint()

    def no_opengl(env, mode):
        raise ImportError("HINT: make sure you have OpenGL installed.")

    monkeypatch.setattr(VmasEnv, "render", no_opengl, raising=False)
    with pytest.raises(SystemExit, match="apt-get install libegl1 libgl1 libglu1-mesa"):
        show.draw(file)

    def other_fault(env, mode):
        raise RuntimeError("other")

    monkeypatch.setattr(VmasEnv, "render", other_fault, raising=False)
    with pytest.raises(RuntimeError, match="other"):
        show.draw(file)


def opengl() -> bool:
    """Whether the libraries are there with which VMAS draws where no display is."""
    try:
        return all(ctypes.CDLL(f"{library}.so.1") for library in ("libEGL", "libGL", "libGLU"))
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not opengl(), reason="libEGL, libGL and libGLU are not all here")
def test_vmas_is_drawn_without_a_display(checkpoint, main, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    task = VmasTask.BALANCE.get_from_yaml()
    task.config.update(max_steps=10)
    gif, output = main(checkpoint(task=task))
    assert "9 steps" in output
    with Image.open(gif) as picture:
        assert (picture.size, picture.n_frames) == ((400, 400), 9)
        colours = picture.convert("RGB").getcolors(400 * 400)
    assert len(colours) > 3  # ground, package, agents


def test_a_task_that_says_itself_what_to_install_is_heard(show, monkeypatch, tmp_path):
    (tmp_path / "config.pkl").touch()
    checkpoint = tmp_path / "checkpoints" / "checkpoint_6000.pt"
    checkpoint.parent.mkdir()
    checkpoint.touch()

    def no_opengl(*args):
        raise ValueError("MuJoCo found no OpenGL. Install OSMesa.")

    monkeypatch.setattr(show, "record", no_opengl)
    with pytest.raises(SystemExit, match=r"^MuJoCo found no OpenGL\. Install OSMesa\.$"):
        show.draw(checkpoint)
