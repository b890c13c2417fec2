"""Whether a checkpoint fits an experiment, found out before BenchMARL writes into the old run's folder."""

import contextlib
import copy
import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarl.environments import Task
from benchmarl.experiment import Experiment
from benchmarl.experiment.callback import CallbackNotifier

from benchmarl_trust.runtime.record import IDENTITY, differences, record_of
from benchmarl_trust.runtime.resume import KEY, ResumeState


def check_restore(plan) -> None:
    """Refuse a checkpoint that cannot be read, or is of another run than this experiment goes on with.

    The experiment is set up once as far as its algorithm, writing nothing, so that whatever would be refused later is
    refused here, before BenchMARL overwrites the old run's ``config.pkl``. Of other algorithms' experiments only that
    is looked at whether they restore a checkpoint of ours.

    Args:
        plan (benchmarl_trust.runtime.before.Plan): what the experiment is asked to be.

    Raises:
        ValueError: in one sentence, naming what differs, and the cure.
    """
    file = Path(plan.config.restore_file)
    try:
        state_dict, devices = _read(file)
    except ValueError:
        if plan.ours:
            raise
        return  # the host's to say
    if not plan.ours and KEY not in state_dict:
        return
    _check_devices(plan, devices)
    with _rehearsal(plan) as rehearsal:
        saved, now = state_dict.get(KEY, {}).get("record") or _record_by_report(file), record_of(rehearsal)
        _check_same_run(plan, file, saved, now)
        _check_networks(file, saved, now)
        _check_parameters(file, rehearsal, state_dict)
        for callback in rehearsal.callbacks:
            if isinstance(callback, ResumeState):
                callback.check(state_dict)


def _read(file: Path) -> tuple[dict[str, Any], set[str]]:
    """The state in the file, without its tensors' contents, and where the tensors were."""
    if not file.is_file():
        raise ValueError(f"experiment.restore_file={file}: there is no such file.{_whole_ones(file)}")
    devices = set()

    def on_cpu(storage, location):
        devices.add(location)
        return storage

    try:
        state_dict = torch.load(file, map_location=on_cpu, mmap=True, weights_only=True)
        if not isinstance(state_dict, dict) or "state" not in state_dict:
            raise ValueError("it is not what an experiment saves")
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"experiment.restore_file={file} cannot be read: it is corrupt (half written, say), or no checkpoint "
            f"({reason}).{_whole_ones(file)}"
        ) from error
    return state_dict, devices


def _whole_ones(file: Path) -> str:
    """A sentence that names the files beside this one that are whole, the newest first."""
    others = [other for other in file.parent.glob("*.pt") if other != file and zipfile.is_zipfile(other)]
    if not others:
        return " There is no whole checkpoint beside it: start the run anew."
    latest = file.parent / "latest.pt"
    best = latest if latest in others else max(others, key=lambda other: other.stat().st_mtime)
    return f" Use {best}."


def _check_devices(plan, devices: set[str]) -> None:
    """A tensor of a GPU needs one, or to be told where to go."""
    elsewhere = sorted(device for device in devices if device.startswith("cuda"))
    if elsewhere and plan.config.restore_map_location is None and not torch.cuda.is_available():
        raise ValueError(
            f"experiment.restore_file={plan.config.restore_file}: its tensors are on {', '.join(elsewhere)} and there "
            "is no GPU here. Set experiment.restore_map_location=cpu."
        )


@contextlib.contextmanager
def _rehearsal(plan) -> Iterator[Experiment]:
    """The experiment, set up as far as its algorithm."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all of them will be given again
        rehearsal = _Rehearsal(plan)
    try:
        yield rehearsal
    finally:
        rehearsal.test_env.close()


class _Rehearsal(Experiment):
    """What an experiment is before it has a name, a folder, a collector and loggers."""

    def __init__(self, plan):
        CallbackNotifier.__init__(self, experiment=self, callbacks=[])
        self.config = plan.config
        self.task = plan.task.get_task() if isinstance(plan.task, Task) else plan.task
        self.model_config = copy.deepcopy(plan.model_config)
        self.critic_model_config = copy.deepcopy(plan.critic_model_config or plan.model_config)
        self.critic_model_config.is_critic = True
        self.algorithm_config, self.seed = plan.algorithm_config, plan.seed
        self._set_action_type()
        self._setup_task()
        self._setup_algorithm()


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


def _check_same_run(plan, file: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """A run of another algorithm, task or seed may start from a checkpoint, in a folder of its own."""
    different = differences(saved, now, IDENTITY)
    run_folder = file.parent.parent.resolve()
    folder = plan.config.save_folder
    if different and (folder is None or (Path(folder) / run_folder.name).resolve() == run_folder):
        raise ValueError(
            f"experiment.restore_file={file}: the checkpoint is of another run: {different}. Going on in its folder "
            "would overwrite its report. Restore it with what it was saved with; or, to start from its parameters, "
            "give this run a folder of its own by experiment.save_folder=<a folder that is there>."
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
