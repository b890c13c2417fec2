"""What BenchMARL's checkpoints lack: an exact continuation, and a file that is whole at any moment."""

import copy
import os
import random
from typing import Any

import numpy as np
import torch
from benchmarl.experiment import Callback, Experiment
from tensordict import TensorDictBase

from benchmarl_trust.runtime.guard import own_callback

KEY = "benchmarl_trust"


class ResumeState(Callback):
    """Saves and restores optimizer states, random generators and the JSON report with BenchMARL's checkpoints.

    After a restore the same next batch gives, bit for bit, the parameters that it would have given without the
    interruption. (Environments start anew, as in BenchMARL, so the next batch itself differs.)

    Learning rates that a schedule has changed come back too. A run that is resumed with another ``experiment.lr`` keeps
    that one; all other settings of the optimizers are always those of the running experiment.

    BenchMARL writes the report of a resumed run anew; with what is restored here it has the evaluations before too.

    ``Experiment.run`` seeds the global generators afresh before it collects, so their states are set once on loading
    and again when the first batch has been collected.

    Attributes:
        generators (list of torch.Generator): further generators to save, those of the algorithms.
        batch_shapes (dict of list of int): [environments, steps] of the batches that a group's buffer keeps from one
            iteration to the next; empty where none does.
    """

    def __init__(self):
        super().__init__()
        self.generators: list[torch.Generator] = []
        self.batch_shapes: dict[str, list[int]] = {}
        self._random_state: dict[str, Any] | None = None

    @classmethod
    def of(cls, experiment: Experiment) -> "ResumeState":
        """The experiment's own. The first call adds it; the algorithms of an ensemble share it."""
        return own_callback(experiment, cls)

    def on_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add our entry; tensors and plain containers only, since ``torch.load`` reads nothing else."""
        state_dict[KEY] = {
            "optimizers": {
                group: {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
                for group, optimizers in self.experiment.optimizers.items()
            },
            "lr": self.experiment.config.lr,
            "batch_shapes": dict(self.batch_shapes),
            "generators": [[generator.device.type, generator.get_state()] for generator in self.generators],
            "random": _random_state(),
            "report": copy.deepcopy(self._report()),
        }

    def on_load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore. A checkpoint without our entry leaves everything as it is; between devices of different kinds the
        algorithms' generators start anew.

        Raises:
            ValueError: if the checkpoint is of an algorithm with other optimizers, or has batches of another shape.
        """
        state = state_dict.get(KEY)
        if state is None:
            return
        self._check_batch_shapes(state_dict, state.get("batch_shapes", {}))
        same_lr = state.get("lr") == self.experiment.config.lr
        for group, optimizers in state["optimizers"].items():
            current = self.experiment.optimizers[group]
            if optimizers.keys() != current.keys():
                raise ValueError(
                    f"The checkpoint is of another algorithm, or of policies shared otherwise: for group {group} it "
                    f"has the optimizers {list(optimizers)}, this experiment has {list(current)}."
                )
            for name, optimizer_state in optimizers.items():
                _load(current[name], optimizer_state, same_lr)
        for generator, (device, generator_state) in zip(self.generators, state["generators"], strict=True):
            if generator.device.type == device:
                generator.set_state(generator_state.cpu())
        self._report().update(copy.deepcopy(state.get("report", {})))
        self._random_state = state["random"]
        _set_random_state(self._random_state)

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        """After the first batch since loading, put the global generators back once more."""
        if self._random_state is not None:
            _set_random_state(self._random_state)
            self._random_state = None

    def _check_batch_shapes(self, state_dict: dict[str, Any], saved: dict[str, list[int]]) -> None:
        """Kept batches lie flat in a buffer: cut to another length they would be trajectories that never were."""
        for group, new in self.batch_shapes.items():
            old = saved.get(group, new)
            if old != new and state_dict.get(f"buffer_{group}") is not None:  # an empty one is saved as None
                raise ValueError(
                    f"The checkpoint keeps batches of {old[0]} environments and {old[1]} steps for group {group}; this "
                    f"experiment collects {new[0]} environments and {new[1]} steps "
                    "(experiment.on_policy_n_envs_per_worker, experiment.on_policy_collected_frames_per_batch). Resume "
                    f"with {old[0]} environments and {old[0] * old[1]} frames, or save checkpoints without their "
                    "buffers (experiment.exclude_buffer_from_checkpoint=True)."
                )

    def _report(self) -> dict[str, Any]:
        """The evaluations in BenchMARL's JSON report, by step."""
        writer = self.experiment.logger.json_writer
        return {} if writer is None else writer.run_data


class LatestCheckpoint(Callback):
    """Keeps the newest checkpoint in ``checkpoints/latest.pt`` too, which is whole at any moment.

    BenchMARL writes a checkpoint in place, and with ``experiment.keep_checkpoints_num`` it deletes the oldest one
    first: a run that is killed meanwhile may leave nothing but half a file. This file is written under another name and
    then takes its place in one step. It must come behind all callbacks that save something, so that their entries are
    in it.
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
            torch.save(state_dict, part)
            os.replace(part, folder / "latest.pt")


def _load(optimizer: torch.optim.Optimizer, saved: dict[str, Any], with_lr: bool) -> None:
    """Restore the moments, and the learning rates if asked for. The other settings stay those of this experiment.

    Adam's ``step`` is left by torch wherever the file was mapped to, unless it belongs with the parameters (``fused``,
    ``capturable``). A new Adam has it on the CPU; on a GPU every optimizer step would wait for it twice per tensor.
    """
    restored = ("fused", "lr") if with_lr else ("fused",)
    current = optimizer.state_dict()["param_groups"]
    groups = [
        {**new, **{key: old[key] for key in restored if old.get(key) is not None}}
        for new, old in zip(current, saved["param_groups"], strict=True)
    ]
    state = {
        i: {
            key: value.cpu() if key == "step" and isinstance(value, torch.Tensor) else value
            for key, value in of.items()
        }
        for i, of in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, cached = np.random.get_state()
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
