"""Draws a checkpoint of a run as an animated GIF: one episode of its deterministic policy.

    python -m benchmarl.run algorithm=mars task=vmas/balance experiment=vmas_laptop experiment.checkpoint_at_end=True
    python examples/show.py outputs/<day>/<time>/<run>/checkpoints/latest.pt

It takes any checkpoint of BenchMARL whose task and callbacks can be imported, whatever the algorithm, and needs neither
a display nor torchvision. The run's folder is left as it is. Its ``config.pkl``, which lies above the checkpoint, is a
pickle: loading it executes what it says, so show only runs that you trust.
"""

import contextlib
import io
import tempfile
from pathlib import Path

import torch
from _common import make_parser
from benchmarl.experiment import Experiment
from PIL import Image
from torch import Tensor

import benchmarl_trust  # noqa: F401  (its word on harmless warnings counts for checkpoints of BenchMARL's algorithms too)

NO_OPENGL = (
    "VMAS draws with OpenGL, which is not there ({error}). On Debian and Ubuntu: apt-get install libegl1 libgl1 "
    "libglu1-mesa. No display is needed."
)


class Recorder:
    """A logger that keeps what BenchMARL's evaluation hands to loggers: returns by name, and a video."""

    def __init__(self):
        self.scalars: dict[str, float] = {}
        self.video: Tensor | None = None

    def log_scalar(self, name: str, value: float, step: int | None = None) -> None:
        """Keep the newest value."""
        self.scalars[name] = float(value)

    def log_video(self, name: str, video: Tensor, step: int | None = None) -> None:
        """Keep the frames: [1, T, 3, height, width] of bytes."""
        self.video = video[0]


def record(file: Path, folder: str, device: str, steps: int | None, seed: int | None) -> Recorder:
    """Evaluate a checkpoint for one episode; what BenchMARL writes goes to the folder."""
    patch = {"save_folder": folder, "loggers": [], "create_json": False, "render": True, "evaluation_episodes": 1}
    patch |= {"evaluation_deterministic_actions": True, "evaluation_static": seed is not None}
    patch |= dict.fromkeys(("sampling_device", "train_device", "buffer_device", "restore_map_location"), device)
    patch["parallel_collection"] = False  # nothing is collected, so no processes
    experiment = Experiment.reload_from_file(str(file), experiment_patch=patch)
    recorder = Recorder()
    experiment.logger.loggers.append(recorder)
    experiment.seed = experiment.seed if seed is None else seed
    experiment.max_steps = min(experiment.max_steps, steps or experiment.max_steps)
    try:
        experiment.evaluate()
    finally:
        experiment.close()
    return recorder


def draw(file: Path, device: str = "cpu", steps: int | None = None, seed: int | None = None) -> Recorder:
    """What :func:`record` has recorded, or the end of the script where there is nothing to see."""
    if not file.is_file():
        raise SystemExit(f"There is no checkpoint {file}.")
    if not (file.parent.parent / "config.pkl").is_file():
        raise SystemExit(f"There is no {file.parent.parent / 'config.pkl'}: the checkpoint is in no run's folder.")
    try:
        # The hosts print the name of the run and where results would be.
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            recorder = record(file.resolve(), folder, device, steps, seed)
    except ValueError as error:
        if "OpenGL" in str(error):  # a task that says itself what to install
            raise SystemExit(str(error)) from error
        raise
    except Exception as error:
        if type(error).__module__.startswith("pyglet") or "OpenGL" in str(error):
            raise SystemExit(NO_OPENGL.format(error=type(error).__name__)) from error
        raise
    if recorder.video is None:
        raise SystemExit("There is nothing to see: the task cannot be drawn, or its episode has a single step.")
    return recorder


def save_gif(frames: Tensor, file: Path, size: int = 400, fps: int = 20) -> None:
    """Write frames as a GIF that plays for ever.

    Args:
        frames (Tensor): bytes, [T, 3, height, width].
        file: its path; the folder is made.
        size: the longer side, in pixels, if the frames are larger.
        fps: frames per second.
    """
    pictures = [Image.fromarray(frame.numpy()) for frame in frames.to(torch.uint8).permute(0, 2, 3, 1).contiguous()]
    for picture in pictures:
        picture.thumbnail((size, size))
    file.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)


def main() -> None:
    """Draw the checkpoint, and say where the picture is and what the episode paid."""
    parser = make_parser(__doc__, Path("outputs/show"), "<run>-<checkpoint>.gif")
    parser.add_argument("checkpoint", type=Path, help="a .pt file in the folder checkpoints of a run")
    parser.add_argument("--steps", type=int, help="the most steps to show; None is the task's own limit")
    parser.add_argument("--seed", type=int, help="of the episode; None is the run's")
    parser.add_argument("--device", default="cpu", help="where policy and environment run, such as cuda")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 2:
        parser.error("--steps must be 2 or more")
    recorder = draw(arguments.checkpoint, arguments.device, arguments.steps, arguments.seed)
    run, checkpoint = arguments.checkpoint.resolve().parts[-3], arguments.checkpoint.stem
    file = arguments.out / f"{run}-{checkpoint}.gif"
    save_gif(recorder.video, file)
    episode = recorder.scalars["eval_reward_episode_reward_mean"]
    print(f"{file}: {len(recorder.video)} steps, return {episode:.2f}")


if __name__ == "__main__":
    main()
