"""Whether a checkpoint fits an experiment, found out before BenchMARL writes into the old run's folder."""

import contextlib
import copy
import json
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from benchmarl.environments import Task, TaskClass
from benchmarl.experiment import Experiment
from benchmarl.experiment.callback import CallbackNotifier

from benchmarl_trust.runtime.record import IDENTITY, differences, identity_of, record_of
from benchmarl_trust.runtime.resume import KEY, ResumeState

if TYPE_CHECKING:
    from benchmarl_trust.runtime.before import Plan


def check_restore(plan: "Plan") -> None:
    """Refuse a checkpoint that cannot be read, or is of another run than this experiment goes on with.

    The experiment is set up once as far as its algorithm, writing nothing, so that whatever would be refused later is
    refused here, before BenchMARL overwrites the old run's ``config.pkl``. Of other algorithms' experiments only that
    is looked at whether they restore a checkpoint of ours.

    Args:
        plan (Plan): what the experiment is asked to be.

    Raises:
        ValueError: in one sentence, naming what differs, and the cure.
    """
    file = Path(cast(str, plan.config.restore_file))  # it is asked for
    try:
        state_dict, devices = _read(file)
    except ValueError:
        if plan.ours:
            raise
        return  # the host's to say
    if not plan.ours and KEY not in state_dict:
        return
    saved = state_dict.get(KEY, {}).get("record") or _record_by_report(file)
    task = plan.task.get_task() if isinstance(plan.task, Task) else plan.task
    _check_same_run(plan, file, saved, identity_of(plan.algorithm_config, task, plan.seed))
    if not plan.ours:
        return
    _check_devices(plan, devices)
    if "collector" not in state_dict and not plan.config.collect_with_grad:
        raise ValueError(
            f"experiment.restore_file={file}: the checkpoint is of a run with experiment.collect_with_grad=True, and "
            "has no collector's state. Restore it with that."
        )
    with contextlib.closing(_Rehearsal(plan, task)) as rehearsal:
        rehearsal.set_up()
        _check_networks(file, saved, record_of(rehearsal))
        _check_parameters(file, rehearsal, state_dict)
        for callback in rehearsal.callbacks:
            if isinstance(callback, ResumeState):
                callback.check(state_dict)


def _read(file: Path) -> tuple[dict[str, Any], set[str]]:
    """The state in the file, without its tensors' contents, and where the tensors were."""
    if not file.parent.is_dir():
        raise ValueError(f"experiment.restore_file={file}: there is no folder {file.parent}.")
    if not file.is_file():
        raise ValueError(f"experiment.restore_file={file}: there is no such file.{_whole_one(file)}")
    devices = set()

    def on_cpu(storage, location):
        devices.add(location)
        return storage

    try:
        _check_whole(file)
        state_dict = torch.load(file, map_location=on_cpu, mmap=True, weights_only=True)
        if not isinstance(state_dict, dict) or "state" not in state_dict:
            raise ValueError("it is not what an experiment saves")
    except Exception as error:  # what a damaged pickle raises may be anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"experiment.restore_file={file} cannot be read: it is corrupt (half written, say), or no checkpoint "
            f"({reason}).{_whole_one(file)}"
        ) from error
    return state_dict, devices


def _check_whole(file: Path) -> None:
    """Raise if the archive is cut off, or what is in it is not what was written (by its checksums)."""
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} in it is damaged")


def _whole_one(file: Path) -> str:
    """A sentence that names a file beside this one that is whole: the latest, or the newest."""
    others = sorted(file.parent.glob("*.pt"), key=lambda other: (other.name == "latest.pt", other.stat().st_mtime))
    for other in reversed(others):
        with contextlib.suppress(ValueError, OSError, zipfile.BadZipFile):
            if other != file:
                _check_whole(other)
                return f" Use {other}."
    return " There is no whole checkpoint beside it: start the run anew."


def _check_devices(plan: "Plan", devices: set[str]) -> None:
    """A tensor of a GPU needs that one, or to be told where to go."""
    there = {"cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *(["cuda"] * torch.cuda.is_available())}
    asked = plan.config.restore_map_location
    if isinstance(asked, str) and asked.startswith(("cpu", "cuda")) and asked not in there:
        raise ValueError(f"experiment.restore_map_location={asked}: it is not there. Take one of {sorted(there)}.")
    if isinstance(asked, str) and not asked.startswith(("cpu", "cuda")):
        raise ValueError(f"experiment.restore_map_location={asked} is unknown. Take one of {sorted(there)}, or null.")
    elsewhere = sorted(device for device in devices if device.startswith("cuda") and device not in there)
    if elsewhere and asked is None:
        raise ValueError(
            f"experiment.restore_file={plan.config.restore_file}: its tensors are on {', '.join(elsewhere)}, which is "
            "not there. Set experiment.restore_map_location=cpu."
        )


class _Rehearsal(Experiment):
    """What an experiment is before it has a name, a folder, a collector and loggers."""

    def __init__(self, plan: "Plan", task: TaskClass):
        CallbackNotifier.__init__(self, experiment=self, callbacks=[])
        self.config, self.task, self.seed = plan.config, task, plan.seed
        self.model_config = copy.deepcopy(plan.model_config)
        self.critic_model_config = copy.deepcopy(plan.critic_model_config or plan.model_config)
        self.critic_model_config.is_critic = True
        self.algorithm_config = plan.algorithm_config

    def set_up(self) -> None:
        """As far as the algorithm; of what is warned of, the experiment itself will warn."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._set_action_type()
            self._setup_task()
            self._setup_algorithm()

    def close(self) -> None:
        """Close the environment, if there is one yet."""
        if hasattr(self, "test_env"):
            self.test_env.close()


def _record_by_report(file: Path) -> dict[str, Any]:
    """What BenchMARL's report beside a checkpoint says of its run, for one that does not say it itself."""
    folder = file.parent.parent
    try:
        data = json.loads((folder / f"{folder.resolve().name}.json").read_text())
        ((environment, tasks),) = data.items()
        ((task, algorithms),) = tasks.items()
        ((algorithm, seeds),) = algorithms.items()
        (seed,) = seeds
    except (OSError, ValueError, AttributeError):
        return {}
    return {"algorithm": algorithm, "task": f"{environment}/{task}", "seed": int(seed.removeprefix("seed_"))}


def _check_same_run(plan: "Plan", file: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """A run goes on in its own folder. Any other may start from its checkpoint, in a folder that has no run yet."""
    different = differences(saved, now, IDENTITY)
    old = file.parent.parent.resolve()
    new = old if plan.config.save_folder is None else (Path(plan.config.save_folder) / old.name).resolve()
    own = "a folder of its own by experiment.save_folder=<a folder that is there>"
    if new == old and different:
        raise ValueError(
            f"experiment.restore_file={file}: the checkpoint is of another run: {different}. Going on in its folder "
            f"would overwrite its report. Restore it with what it was saved with; or, to start from its parameters, "
            f"give this run {own}."
        )
    if new != old and (new / "config.pkl").is_file():
        raise ValueError(
            f"experiment.save_folder={plan.config.save_folder}: there is a run already, {new} (BenchMARL keeps the "
            f"name of the old run). To go on with it, restore its own checkpoint; or give this run {own}."
        )


def _check_networks(file: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """What is said of the agents, their networks and what they share must be the same."""
    different = differences(saved, now, [name for name in saved if name not in IDENTITY])
    if different:
        raise ValueError(
            f"experiment.restore_file={file}: the checkpoint does not fit this experiment: {different}. Restore it "
            "with what it was saved with."
        )


def _check_parameters(file: Path, rehearsal: Experiment, state_dict: dict[str, Any]) -> None:
    """The networks must take the parameters, whatever the cause that they would not."""
    for group in rehearsal.group_map:
        saved, now = (_shapes(of) for of in (state_dict.get(f"loss_{group}", {}), rehearsal.losses[group].state_dict()))
        different = [name for name in sorted(saved.keys() | now.keys()) if saved.get(name) != now.get(name)]
        if different:
            some = "; ".join(f"{name} was {saved.get(name)} and is {now.get(name)}" for name in different[:3])
            raise ValueError(
                f"experiment.restore_file={file}: its parameters do not fit group {group} of this experiment. Restore "
                f"it with the algorithm, task, networks and sharing that it was saved with. {len(different)} of "
                f"{len(now)} differ in shape: {some}."
            )


def _shapes(state_dict: dict[str, Any]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
