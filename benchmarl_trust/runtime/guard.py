"""Nothing that is not finite reaches a parameter."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from benchmarl.experiment import Callback, Experiment
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from benchmarl_trust.runtime.adam import fused


class OwnCallback(Callback):
    """A callback that a run has without its user having named it, see :func:`own_callback`."""

    experiment: Experiment
    owner: Experiment


CallbackType = TypeVar("CallbackType", bound=OwnCallback)

#: So many iterations in a row with a dropped step end the run.
PATIENCE = 3
#: The guard's entry of a checkpoint.
KEY = "benchmarl_trust_guard"


class FiniteGuard(OwnCallback):
    """Refuses data that is not finite, and drops optimizer steps whose gradient is not.

    Data, before it is acted on: an observation that is NaN or infinite, and an action mask that allows nothing, raise a
    ``ValueError`` in place of whatever the distribution or the environment would say. This is looked at where policies
    run on the CPU; on a GPU it would cost a synchronisation in every step.

    Data, before it is learned from: an observation, reward, action, log-prob or state that is NaN or infinite in the
    collected batch raises a ``ValueError`` before any group is trained on it. Actions, log-probs and rewards of agents
    that ``(group, "mask")`` marks as absent are not looked at, nor are sums of rewards, which keep a NaN after its
    agent has come back.

    Numerics: BenchMARL's loop steps on any gradient. A pre-step hook on every optimizer that it steps removes a
    gradient whose norm is not finite, so that the step changes neither parameters nor optimizer state. That includes
    finite entries so large that their norm overflows: clipped by it they would be zeros, on which Adam goes on by its
    momentum. Therefore the norm is that before clipping, taken by a hook on every parameter.

    On a GPU the host does not look at the norm, which would make it wait in every step: the fused Adam is told by its
    ``found_inf``, as ``torch.amp.GradScaler`` tells it, and changes nothing by itself. So an Adam on a GPU whose user
    chose no implementation is made fused; others are looked at.

    Dropped steps are logged as ``train/{group}/skipped_steps`` once the iteration's last group is trained, since a
    policy phase may be of several groups; ``PATIENCE`` iterations in a row with one end the run with a
    ``RuntimeError``. Checkpoints hold how many there are so far, so that a resumed run counts on.

    Attributes:
        skipped (Counter): dropped steps of the current iteration by group; a policy phase adds its own. Those that a
            GPU has dropped are added at the iteration's end.
        policy_phase (dict of set of str): by group the names of the optimizers that a policy phase steps by itself, and
            whose steps it sees to; named before ``on_setup``. All others are the guard's.
        checks (list of callable): further checks of the collected batch.
    """

    def __init__(self):
        super().__init__()
        self.skipped: Counter = Counter()
        self.policy_phase: defaultdict[str, set[str]] = defaultdict(set)
        self.checks: list[Callable[[TensorDictBase], None]] = []
        self._skipped_on_device: dict[str, Tensor] = {}
        self._streak: Counter = Counter()
        self._norms: dict[torch.optim.Optimizer, list[Tensor]] = {}

    @classmethod
    def of(cls, experiment: Experiment) -> "FiniteGuard":
        """The experiment's guard. The first call adds it; the algorithms of an ensemble share it."""
        return own_callback(experiment, cls)

    def on_setup(self) -> None:
        """Hook every optimizer that BenchMARL's loop steps (a policy phase sees to its own), and the policies that act:
        the collector has a copy where it samples on another device.
        """
        collector = getattr(self.experiment, "collector", None)  # there is none with collect_with_grad
        for policy in {self.experiment.policy, getattr(collector, "policy", self.experiment.policy)}:
            policy.register_forward_pre_hook(_check_policy_input)
        for group, optimizers in self.experiment.optimizers.items():
            for name, optimizer in optimizers.items():
                if name in self.policy_phase[group]:
                    continue
                parameters = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
                fused(optimizer, on_gpu_alone=True)
                limit = min((_norm_limit(p.dtype) for p in parameters), default=math.inf)
                optimizer.register_step_pre_hook(partial(self._drop_nonfinite_gradient, group, limit))
                # Clipping comes before the step: by value it would make an infinity finite, by norm all of it zero.
                # These hooks hold the list alone: Python's garbage collector cannot see through them, and with the
                # guard or the optimizer in them no experiment would ever be freed, nor its files and memory.
                norms = self._norms[optimizer] = []
                for parameter in parameters:
                    parameter.register_post_accumulate_grad_hook(partial(_take_norm, norms))

    def on_batch_collected(self, batch: TensorDictBase) -> None:
        """Raise if the batch is not finite, or if a check that an algorithm has added fails."""
        self._check_finite(batch)
        for check in self.checks:
            check(batch)

    def _check_finite(self, batch: TensorDictBase) -> None:
        checked = {
            key: value
            for key, value in batch.items(include_nested=True, leaves_only=True)
            if value.is_floating_point() and "info" not in _path(key) and _path(key)[-1] != "episode_reward"
        }
        bad = {key: _nonfinite(batch, key, value) for key, value in checked.items()}
        if not torch.stack([entries.any() for entries in bad.values()]).any():
            return
        report = "; ".join(
            f"{key}: {int(entries.sum())} of {entries.numel()}, the first at index {entries.nonzero()[0].tolist()}"
            for key, entries in sorted(bad.items(), key=lambda item: _cause_first(item[0]))
            if entries.any()
        )
        raise ValueError(
            f"The collected batch has NaN or infinite entries: {report}. No group was trained on it. Look at the "
            "tensor named first: an environment that returns such values must clamp them or end the episode; if only "
            "what the policy wrote is bad, lower experiment.lr. " + last_checkpoint(self.experiment)
        )

    def on_train_end(self, training_td: TensorDictBase, group: str) -> None:
        """With the iteration's last group, log the dropped steps of all; stop after too many such iterations."""
        groups = list(self.experiment.train_group_map)
        if group != groups[-1]:
            return
        self._fetch_skipped()
        skipped = {name: self.skipped.pop(name, 0) for name in groups}
        self.experiment.logger.log(
            {f"train/{name}/skipped_steps": count for name, count in skipped.items()},
            step=self.experiment.n_iters_performed,
        )
        for name, count in skipped.items():
            self._streak[name] = self._streak[name] + 1 if count else 0
        for name, count in skipped.items():
            if self._streak[name] >= PATIENCE:
                raise RuntimeError(
                    f"Group {name}: non-finite losses or gradients in {PATIENCE} iterations in a row ({count} steps "
                    "dropped in the last). The parameters are finite; lower experiment.lr or look at the scale of the "
                    "rewards. " + last_checkpoint(self.experiment)
                )

    def on_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add how many iterations in a row had dropped steps, by group."""
        state_dict[KEY] = {"streak": dict(self._streak)}

    def on_load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from there; a checkpoint without our entry counts from zero."""
        self._streak = Counter(state_dict.get(KEY, {}).get("streak", {}))

    def _drop_nonfinite_gradient(self, group: str, limit: float, optimizer, args, kwargs) -> None:
        parameters = [p for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        norms = list(self._norms[optimizer])
        self._norms[optimizer].clear()
        if not parameters:
            return
        if not norms:  # a gradient that was set by hand, or of parameters that were frozen when hooks were set
            norms = [torch.nn.utils.get_total_norm([p.grad for p in parameters])]
        norm = torch.linalg.vector_norm(torch.stack(norms).double())
        if norm.is_cuda and all(g.get("fused") for g in optimizer.param_groups):
            optimizer.found_inf = (norm <= limit).logical_not().float()
            self._skipped_on_device[group] = self._skipped_on_device.get(group, 0) + optimizer.found_inf
        elif not norm <= limit:
            self.skipped[group] += 1
            for parameter in parameters:
                parameter.grad = None  # Adam passes over it

    def _fetch_skipped(self) -> None:
        """Add what was dropped on the device, by one transfer."""
        if self._skipped_on_device:
            counts = torch.stack(list(self._skipped_on_device.values())).tolist()
            self.skipped.update(dict(zip(self._skipped_on_device, map(int, counts), strict=True)))
            self._skipped_on_device.clear()


def _take_norm(norms: list[Tensor], parameter: torch.nn.Parameter) -> None:
    """Keep the norm of a gradient as autograd has left it, half types' in float32."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    norms.append(torch.linalg.vector_norm(parameter.grad, dtype=dtype))


def own_callback(experiment: Experiment, kind: type[CallbackType]) -> CallbackType:
    """The experiment's callback of this class, put at the end of a new list: the user's own list stays as it is."""
    others = []
    for callback in experiment.callbacks:
        if not isinstance(callback, kind):
            others.append(callback)
        elif getattr(callback, "owner", None) is experiment:
            return callback  # one of another experiment, whose list was passed on, is left to that experiment
    callback = kind()
    callback.experiment = callback.owner = experiment
    experiment.callbacks = [*others, callback]
    return callback


def last_checkpoint(experiment: Experiment) -> str:
    """A sentence that names the newest checkpoint to resume from."""
    files = experiment._checkpointed_files or [experiment.config.restore_file]
    if files[-1] is None:
        return "There is no checkpoint: set experiment.checkpoint_interval to have some."
    return f"The last checkpoint is {files[-1]}: resume with `python -m benchmarl.resume {files[-1]}`."


def _check_policy_input(policy: TensorDictModuleBase, args: tuple) -> None:
    """Raise if there is nothing to act on. Of this module and not of the guard, since policies are copied."""
    if not args or not isinstance(args[0], TensorDictBase) or torch.compiler.is_compiling():
        return  # called on tensors by somebody who uses the policy for itself, or compiled
    for key in policy.in_keys:
        value, name = args[0].get(key, None), _path(key)[-1]
        if value is None or value.device.type != "cpu" or name.startswith("_hidden"):
            continue  # a recurrent policy's state is its own, not the environment's
        if value.is_floating_point():
            bad, what, cure = ~value.isfinite(), "is NaN or infinite", "clamp it, or end the episode"
        elif name == "action_mask":
            bad, what, cure = ~value.any(-1), "allows no action", "allow one that does nothing"
        else:
            continue
        if bad.any():
            raise ValueError(
                f"{key} {what} at index {bad.nonzero()[0].tolist()} ({int(bad.sum())} of {bad.numel()} entries), so no "
                f"action can be chosen. This is what the environment returned: {cure} there."
            )


def _nonfinite(batch: TensorDictBase, key: str | tuple, value: Tensor) -> Tensor:
    """Which entries are not finite. What an absent agent did and was paid is not looked at; what it saw is, since
    shared and centralised networks read it.
    """
    bad = ~value.isfinite()
    *group, name = (part for part in _path(key) if part != "next")
    mask = batch.get((*group, "mask"), None) if group else None
    if mask is None or name not in ("action", "log_prob", "reward"):
        return bad
    return bad & mask.reshape(*mask.shape, *[1] * (bad.ndim - mask.ndim))


def _norm_limit(dtype: torch.dtype) -> float:
    """The largest norm over all of an optimizer's tensors with which no norm of them can overflow.

    A norm is the root of a sum of squares, which must stay below the largest number of the type that it is summed in
    (float32 for the half ones), as the norm itself must in its own type. Half of what reaches it leaves room for
    rounding. For float32 it is 9e18.
    """
    summed = torch.finfo(torch.promote_types(dtype, torch.float32)).max
    return 0.5 * min(math.sqrt(summed), torch.finfo(dtype).max)


def _path(key: str | tuple) -> tuple:
    return key if isinstance(key, tuple) else (key,)


def _cause_first(key: str | tuple) -> int:
    """Environment data before what the policy made of it."""
    causes = ["observation", "state", "reward", "action"]
    name = _path(key)[-1]
    return causes.index(name) if name in causes else len(causes)
