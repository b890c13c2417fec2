"""What is wrong is said before BenchMARL has written or collected anything."""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from benchmarl.algorithms import EnsembleAlgorithmConfig
from benchmarl.algorithms.common import AlgorithmConfig
from benchmarl.environments import Task, TaskClass
from benchmarl.experiment import Callback, Experiment, ExperimentConfig
from benchmarl.models.common import ModelConfig

from benchmarl_trust.runtime.evaluation import EvaluationInfo
from benchmarl_trust.runtime.restore import check_restore

#: BenchMARL's loggers: the package that each needs, and where it comes from.
LOGGERS = {
    "csv": (None, None),
    "wandb": ("wandb", "benchmarl_trust[wandb]"),
    "tensorboard": ("tensorboard", "benchmarl_trust[tensorboard]"),
    "mlflow": ("mlflow", "mlflow"),
    "trackio": ("trackio", "trackio"),
}


@runtime_checkable
class Checked(Protocol):
    """A configuration or a task of ours."""

    def check_keys(self, experiment: ExperimentConfig) -> None:
        """Refuse what is wrong in itself or for this experiment."""


class Plan(NamedTuple):
    """What an experiment is asked to be: the arguments of :class:`benchmarl.experiment.Experiment`."""

    task: Task | TaskClass
    algorithm_config: AlgorithmConfig
    model_config: ModelConfig
    seed: int
    config: ExperimentConfig
    critic_model_config: ModelConfig | None
    callbacks: list[Callback] | None

    @property
    def algorithms(self) -> list[AlgorithmConfig]:
        """The configuration, or those of an ensemble."""
        if isinstance(self.algorithm_config, EnsembleAlgorithmConfig):
            return list(self.algorithm_config.algorithm_configs_map.values())
        return [self.algorithm_config]

    @property
    def ours(self) -> list["Checked"]:
        """Those of them that are this package's."""
        return [config for config in self.algorithms if isinstance(config, Checked)]


def check_plan(plan: Plan) -> None:
    """Look at everything that can be known before anything is made.

    Raises:
        ValueError: naming the key and the cure.
    """
    check_devices(plan)
    check_loggers(plan.config.loggers)
    check_folder(plan.config.save_folder)
    task = plan.task.get_task() if isinstance(plan.task, Task) else plan.task  # as BenchMARL does
    for config in (*plan.ours, *([task] if isinstance(task, Checked) else [])):
        config.check_keys(plan.config)
    if plan.config.restore_file is not None:
        if not isinstance(plan.config.restore_file, str | Path):
            raise ValueError(f"experiment.restore_file={plan.config.restore_file} must be null or the path of a file.")
        check_restore(plan)


def check_devices(plan: Plan) -> None:
    """Refuse devices that are not there. (Other on-policy algorithms do not ask for the buffer's.)

    Raises:
        ValueError: naming the key and the cure.
    """
    keys = ("sampling_device", "train_device", *(("buffer_device",) if plan.ours else ()))
    for key in keys:
        value = getattr(plan.config, key)
        if value is None or (key == "buffer_device" and value == "disk"):
            continue
        try:
            device = torch.device(value)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"experiment.{key}={value} is no device. Take cpu or cuda.") from error
        if device.type == "meta":
            raise ValueError(f"experiment.{key}=meta has no data. Take cpu or cuda.")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            cure = " ".join(f"experiment.{name}=cpu" for name in ("sampling_device", "train_device", "buffer_device"))
            raise ValueError(
                f"experiment.{key}={value}: PyTorch finds {torch.cuda.device_count()} CUDA devices here. Run with "
                f"{cure}, or on a machine with such a GPU and a PyTorch for it."
            )


def check_loggers(loggers: list[str]) -> None:
    """Refuse loggers that are unknown, or whose package is not installed.

    Raises:
        ValueError: naming the key and the cure.

    Examples:
        >>> check_loggers(["paper"])
        Traceback (most recent call last):
        ValueError: experiment.loggers=['paper']: paper is unknown. Choose of csv, wandb, tensorboard, mlflow, trackio.
    """
    if loggers is None or isinstance(loggers, str):
        raise ValueError(f"experiment.loggers={loggers} must be a list, such as [csv]; for none: [].")
    for logger in loggers:
        if loggers.count(logger) > 1:
            raise ValueError(f"experiment.loggers={loggers}: {logger} is there twice. Name each once.")
        if logger not in LOGGERS:
            raise ValueError(f"experiment.loggers={loggers}: {logger} is unknown. Choose of {', '.join(LOGGERS)}.")
        package, source = LOGGERS[logger]
        if package is not None and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"experiment.loggers={loggers}: {logger} needs a package that is not installed. Run with "
                f'experiment.loggers=[csv], or pip install "{source}".'
            )


def check_folder(folder: str | None) -> None:
    """Refuse a folder for runs that is not there: BenchMARL makes that of the run alone.

    Raises:
        ValueError: naming the key and the cure.

    Examples:
        >>> check_folder("/runs")
        Traceback (most recent call last):
        ValueError: experiment.save_folder=/runs: there is no such folder. Make it first: mkdir -p /runs
    """
    if folder is not None and not (isinstance(folder, str | Path) and Path(folder).is_dir()):
        where = "" if Path(str(folder)).is_absolute() else f" (from {Path.cwd()}; a resumed run needs the first one's)"
        raise ValueError(
            f"experiment.save_folder={folder}: there is no such folder{where}. Make it first: mkdir -p {folder}"
        )


def check_video(experiment: Experiment) -> None:
    """Refuse to draw evaluations where the task cannot draw or a logger cannot write, which ends the run at the first.

    A task may have a method ``check_render(env)``, which raises a ``ValueError`` where nothing can be drawn.

    Args:
        experiment (Experiment): set up as far as its task, which knows whether it can be drawn.

    Raises:
        ValueError: naming the key and the cure.
    """
    config = experiment.config
    if not (config.render and config.evaluation and experiment.task.has_render(experiment.test_env)):
        return
    check_render = getattr(experiment.task, "check_render", None)
    if check_render is not None:
        check_render(experiment.test_env)
    cure = (
        "Run with experiment.render=False (examples/show.py draws checkpoints), or log to tensorboard or wandb with "
        'pip install "benchmarl_trust[video]".'
    )
    if {"csv", "mlflow"} & set(config.loggers) and not _torchvision_writes_videos():
        raise ValueError(
            "experiment.render=True: the loggers csv and mlflow write videos by torchvision.io.write_video, which this "
            f"torchvision does not have. {cure}"
        )
    if {"tensorboard", "wandb"} & set(config.loggers) and importlib.util.find_spec("moviepy") is None:
        raise ValueError(
            f"experiment.render=True: {config.loggers} write videos by moviepy, which is not there. {cure}"
        )


def _torchvision_writes_videos() -> bool:
    try:
        return hasattr(importlib.import_module("torchvision.io"), "write_video")
    except (ImportError, RuntimeError):  # the latter beside a torch of another build
        return False


def look_before_setup() -> None:
    """Let every experiment be looked at before BenchMARL sets it up; twice is safe.

    BenchMARL has no place for a plugin before it makes the experiment's folder and, for a restored one, overwrites its
    ``config.pkl``: callbacks and algorithms come later. Therefore ``Experiment.__init__`` is wrapped. Experiments of
    other algorithms are constructed as they are, save for what certainly fails (a device, a folder or a logger's
    package that is not there), and for checkpoints of ours, which other runs do not go on with. Behind it,
    :class:`EvaluationInfo` is added, whatever the algorithm.
    """
    if not hasattr(Experiment.__init__, "looks_before"):
        Experiment.__init__ = _looking_before(Experiment.__init__)


def _looking_before(init: Callable) -> Callable:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        check_plan(Plan(*(bound.arguments[name] for name in Plan._fields)))
        init(self, *args, **kwargs)
        EvaluationInfo.add_to(self)

    checked.__dict__["looks_before"] = True
    return checked
