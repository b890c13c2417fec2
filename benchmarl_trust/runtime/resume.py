"""What BenchMARL's checkpoints lack: an exact continuation, and a file that is whole at any moment."""

import copy
import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from benchmarl.experiment import Experiment
from tensordict import TensorDictBase
from torchrl.record import CSVLogger

from benchmarl_trust.runtime.adam import is_chosen
from benchmarl_trust.runtime.guard import OwnCallback, own_callback
from benchmarl_trust.runtime.record import IDENTITY, differences, identity_of, record_of

KEY = "benchmarl_trust"


class ResumeState(OwnCallback):
    """Saves and restores optimizer states, random generators and the JSON report with BenchMARL's checkpoints.

    After a restore the same next batch gives, bit for bit, the parameters that it would have given without the
    interruption. (Environments start anew, as in BenchMARL, so the next batch itself differs.)

    Learning rates that a schedule has changed come back too, unless an algorithm's own keys set them in every iteration
    (``scheduled``): those of the running experiment then say what they are. A run that is resumed with another
    ``experiment.lr`` keeps that one; all other settings of the optimizers are always those of the running experiment.

    BenchMARL writes the report of a resumed run anew; with what is restored here it has the evaluations before too. A
    run of another algorithm, task or seed that starts from the checkpoint has a report of its own. Once training goes
    on, the report and the CSV files lose what came after the checkpoint and is now done again; evaluating an older
    checkpoint takes nothing from them.

    ``Experiment.run`` seeds the global generators afresh before it collects, so their states are set once on loading
    and again when the first batch has been collected.

    Attributes:
        generators (list of torch.Generator): further generators to save, those of the algorithms.
        batch_shapes (dict of list of int): [environments, steps] of the batches that a group's buffer keeps from one
            iteration to the next; empty where none does.
        n_rollouts (dict of int): how many of them, by group; 1 where it is not said.
        scheduled (set of str): groups whose algorithm sets their learning rates in every iteration.
    """

    def __init__(self):
        super().__init__()
        self.generators: list[torch.Generator] = []
        self.batch_shapes: dict[str, list[int]] = {}
        self.n_rollouts: dict[str, int] = {}
        self.scheduled: set[str] = set()
        self._restored: dict[str, Any] | None = None

    @classmethod
    def of(cls, experiment: Experiment) -> "ResumeState":
        """The experiment's own. The first call adds it; the algorithms of an ensemble share it."""
        return own_callback(experiment, cls)

    def on_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add our entry; tensors and plain containers only, since ``torch.load`` reads nothing else."""
        state_dict[KEY] = {
            "optimizers": {
                group: {name: _saved(optimizer) for name, optimizer in optimizers.items()}
                for group, optimizers in self.experiment.optimizers.items()
            },
            "lr": float(self.experiment.config.lr),
            "frames_per_batch": self._frames_per_batch,
            "csv_bytes": _sizes(self.experiment),
            "scheduled": sorted(self.scheduled),
            "record": record_of(self.experiment),
            "batch_shapes": dict(self.batch_shapes),
            "n_rollouts": dict(self.n_rollouts),
            "generators": [[generator.device.type, generator.get_state()] for generator in self.generators],
            "random": _random_state(),
            "report": copy.deepcopy(self._report()),
        }

    def on_load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore. A checkpoint without our entry leaves everything as it is; between devices of different kinds the
        algorithms' generators start anew.

        Raises:
            ValueError: as :meth:`check`.
        """
        state = state_dict.get(KEY)
        if state is None:
            return
        self.check(state_dict)
        same_lr = state.get("lr") == self.experiment.config.lr
        for group, optimizers in state["optimizers"].items():
            with_lr = same_lr and group not in state.get("scheduled", [])
            for name, optimizer_state in optimizers.items():
                _load(self.experiment.optimizers[group][name], optimizer_state, with_lr)
        for generator, (device, generator_state) in zip(self.generators, state["generators"], strict=True):
            if generator.device.type == device:
                generator.set_state(generator_state.cpu())
        different = differences(state.get("record", {}), self._identity, IDENTITY)
        self._warn(different)
        report = {} if different else copy.deepcopy(state.get("report", {}))
        self._set_report(self._report_on_disk(at_least=report) or report)
        csv_bytes = None if different else state.get("csv_bytes")
        self._restored = {"random": state["random"], "report": report, "csv_bytes": csv_bytes}
        _set_random_state(state["random"])

    def _warn(self, different: str) -> None:
        """Say what a user may not expect of the restored run."""
        frames = self.experiment.total_frames
        wanted = self.experiment.config.get_max_n_frames(self.experiment.on_policy)
        if different:
            warnings.warn(
                f"This run starts from the checkpoint of another one ({different}). It takes over parameters, states "
                f"of optimizers and generators, and the count of frames, {frames} so far; its report is its own and "
                "starts here.",
                stacklevel=3,
            )
        if frames > wanted:
            warnings.warn(
                f"The checkpoint has {frames} frames and this run is to have {wanted} (experiment.max_n_frames): there "
                "is nothing left to train. A run that was made longer goes on by the command that made it longer.",
                stacklevel=3,
            )

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        """After the first batch since loading, put the global generators back once more, and forget what came after
        the checkpoint.
        """
        if self._restored is None:
            return
        restored, self._restored = self._restored, None
        _set_random_state(restored["random"])
        self._set_report(restored["report"])
        if restored["csv_bytes"] is not None:
            for logger in _csv_loggers(self.experiment):
                _forget_rows(logger, restored["csv_bytes"])

    def check(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint whose optimizers or kept batches are not this experiment's.

        Raises:
            ValueError: naming what differs.
        """
        state = state_dict.get(KEY, {})
        for group, optimizers in state.get("optimizers", {}).items():
            current = self.experiment.optimizers.get(group, {})
            if optimizers.keys() != current.keys():
                raise ValueError(
                    f"The checkpoint is of another algorithm, or of policies shared otherwise: for group {group} it "
                    f"has the optimizers {list(optimizers)}, this experiment has {list(current)}."
                )
        kept = [group for group in self.batch_shapes if state_dict.get(f"buffer_{group}") is not None]
        for group in kept:
            n_rollouts = state["n_rollouts"].get(group, 1) if "n_rollouts" in state else None
            self._check_kept(group, state.get("batch_shapes", {}).get(group), n_rollouts)
        self._check_frames(state_dict, state.get("frames_per_batch"))

    def _check_frames(self, state_dict: dict[str, Any], old: int | None) -> None:
        """BenchMARL's buffer has the size of a batch, and it counts iterations where its collector counts frames."""
        new = self._frames_per_batch
        buffers = any(state_dict.get(f"buffer_{group}") is not None for group in self.experiment.group_map)
        begun = state_dict["state"]["n_iters_performed"] > 0
        if begun and old is not None and (new < old or (new != old and buffers)):
            raise ValueError(
                f"experiment.on_policy_collected_frames_per_batch={new}: the checkpoint was saved with {old}, and a "
                "run cannot go on with fewer, nor with more unless it saves no buffers "
                f"(experiment.exclude_buffer_from_checkpoint=True). Resume with {old}."
            )

    @property
    def _identity(self) -> dict[str, Any]:
        return identity_of(self.experiment.algorithm_config, self.experiment.task, self.experiment.seed)

    @property
    def _frames_per_batch(self) -> int:
        return self.experiment.config.collected_frames_per_batch(self.experiment.on_policy)

    def _check_kept(self, group: str, old: list[int] | None, n_rollouts: int | None) -> None:
        """Kept batches lie flat in a buffer: cut to another length they would be trajectories that never were."""
        without = "or save checkpoints without their buffers (experiment.exclude_buffer_from_checkpoint=True)."
        new = self.batch_shapes[group]
        if old not in (None, new):
            raise ValueError(
                f"The checkpoint keeps batches of {old[0]} environments and {old[1]} steps for group {group}; this "
                f"experiment collects {new[0]} environments and {new[1]} steps "
                "(experiment.on_policy_n_envs_per_worker, experiment.on_policy_collected_frames_per_batch). Resume "
                f"with {old[0]} environments and {old[0] * old[1]} frames, {without}"
            )
        if n_rollouts is not None and n_rollouts < self.n_rollouts.get(group, 1):
            raise ValueError(
                f"algorithm.n_rollouts={self.n_rollouts[group]}: the checkpoint was saved with {n_rollouts}, and its "
                f"buffer has no room for as many. Restore with the n_rollouts it was saved with, {without}"
            )

    def _report(self) -> dict[str, Any]:
        """The evaluations in BenchMARL's JSON report, by step."""
        writer = self.experiment.logger.json_writer
        return {} if writer is None else writer.run_data

    def _set_report(self, report: dict[str, Any]) -> None:
        """In place: BenchMARL's writer holds the same dict twice."""
        current = self._report()
        if self.experiment.logger.json_writer is not None:
            current.clear()
            current.update({"absolute_metrics": {}, **copy.deepcopy(report)})

    def _report_on_disk(self, at_least: dict[str, Any]) -> dict[str, Any] | None:
        """The report in the run's folder if it has all that the checkpoint's has, and so may have more."""
        writer, run = self.experiment.logger.json_writer, self._identity
        if writer is None:
            return None  # none is asked for
        try:
            data = json.loads(Path(writer.path).read_text())
            environment, task = run["task"].split("/")
            report = data[environment][task][run["algorithm"]][f"seed_{run['seed']}"]
        except (OSError, ValueError, KeyError):
            return None  # there is none of this run
        return report if report.keys() >= at_least.keys() else None


class LatestCheckpoint(OwnCallback):
    """Keeps the newest checkpoint in ``checkpoints/latest.pt`` too, which is whole at any moment.

    BenchMARL writes a checkpoint in place, and with ``experiment.keep_checkpoints_num`` it deletes the oldest one
    first: a run that is killed meanwhile may leave nothing but half a file. This file is written under another name and
    then takes its place in one step. It must come behind all callbacks that save something, so that their entries are
    in it.

    Raises:
        OSError: if it cannot be written, a full disk say, naming the file that is still whole.
    """

    @classmethod
    def of(cls, experiment: Experiment) -> "LatestCheckpoint":
        """The experiment's own. The first call adds it."""
        return own_callback(experiment, cls)

    def on_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Write the file, if the state is asked for by a run that has checkpoints: it has made their folder."""
        folder = self.experiment.folder_name / "checkpoints"
        if folder.is_dir():
            part = folder / "latest.pt.part"
            try:
                torch.save(state_dict, part)
            except (OSError, RuntimeError) as error:  # torch's own writer raises the latter
                part.unlink(missing_ok=True)
                raise OSError(_not_saved(folder, error)) from error
            os.replace(part, folder / "latest.pt")


def _not_saved(folder: Path, error: Exception) -> str:
    """Why a checkpoint could not be written, and what there is to go on from."""
    latest = folder / "latest.pt"
    whole = "There is no checkpoint before it."
    if latest.is_file():
        whole = f"The one before is whole: free some space and go on with `python -m benchmarl.resume {latest}`."
    free = shutil.disk_usage(folder).free
    return f"The checkpoint cannot be saved in {folder} ({error}; {free / 1e6:.0f} MB are free there). {whole}"


def _csv_loggers(experiment: Experiment) -> list[CSVLogger]:
    return [logger for logger in experiment.logger.loggers if isinstance(logger, CSVLogger)]


def _csv_files(logger: CSVLogger) -> dict[str, Path]:
    """The files of scalars by their names."""
    folder = Path(logger.experiment.log_dir, "scalars")
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.csv")}


def _sizes(experiment: Experiment) -> dict[str, int]:
    """The bytes of the files of scalars, which are written line by line."""
    files = {name: file for logger in _csv_loggers(experiment) for name, file in _csv_files(logger).items()}
    return {name: file.stat().st_size for name, file in files.items()}


def _forget_rows(logger: CSVLogger, sizes: dict[str, int]) -> None:
    """Take out of a resumed run's CSV files what came after the checkpoint, save for what this process has written."""
    csv = logger.experiment
    for name, file in _csv_files(logger).items():
        content = file.read_bytes()
        mine = "".join(f"{step},{value}\n" for step, value in csv.scalars.get(name, [])).encode()
        if not content.endswith(mine):
            continue  # somebody else writes here too
        before = content[: len(content) - len(mine)][: sizes.get(name, 0)]
        if before + mine != content:
            part = file.with_suffix(".part")
            part.write_bytes(before + mine)
            if str(file) in csv.files:
                csv.files.pop(str(file)).close()  # it will be opened anew, at its end
            os.replace(part, file)


def _saved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state with Python's numbers: those of NumPy, which a sweep may have made, are not read back."""
    state = optimizer.state_dict()
    groups = [
        {key: value.item() if isinstance(value, np.generic) else value for key, value in group.items()}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


def _load(optimizer: torch.optim.Optimizer, saved: dict[str, Any], with_lr: bool) -> None:
    """Restore the moments, and the learning rates if asked for. The other settings stay those of this experiment.

    Adam's ``step`` is left by torch wherever the file was mapped to, unless it belongs with the parameters (``fused``,
    ``capturable``). A new Adam has it on the CPU; on a GPU every optimizer step would wait for it twice per tensor.
    """
    current = optimizer.state_dict()["param_groups"]
    groups = []
    for new, old in zip(current, saved["param_groups"], strict=True):
        restored = [*(["lr"] if with_lr else []), *([] if is_chosen(new) else ["fused"])]
        groups.append({**new, **{key: old[key] for key in restored if old.get(key) is not None}})
    state = {
        i: {
            key: value.cpu() if key == "step" and isinstance(value, torch.Tensor) else value
            for key, value in of.items()
        }
        for i, of in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = cast(tuple[str, np.ndarray, int, int, float], np.random.get_state())
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([cuda_state.cpu() for cuda_state in state["cuda"]])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
