"""Which implementation of Adam steps: PyTorch's fused one, unless the user has chosen."""

from typing import Any

import torch


def fused(optimizer: torch.optim.Optimizer, on_gpu_alone: bool = False) -> torch.optim.Optimizer:
    """The same Adam with PyTorch's fused step, unless its user chose an implementation or it has stepped before.

    BenchMARL leaves the choice to PyTorch, which on a CPU loops over the parameters one operation at a time. On a GPU
    the fused step keeps its counter there; another choice keeps it on the host, at one synchronisation per step.

    Args:
        optimizer (Optimizer): one that is no Adam stays as it is.
        on_gpu_alone (bool): leave one on a CPU as it is.
    """
    if not isinstance(optimizer, torch.optim.Adam) or optimizer.state:
        return optimizer
    for group in optimizer.param_groups:
        able = all(p.is_floating_point() and (p.is_cuda or not on_gpu_alone) for p in group["params"])
        if able and not is_chosen(group):
            group["fused"] = True
    return optimizer


def is_chosen(group: dict[str, Any]) -> bool:
    """Whether the user has said (``experiment.adam_extra_kwargs``) how this group of parameters is stepped."""
    chosen = group.get("foreach") is not None or group.get("fused") is not None
    return chosen or bool(group.get("capturable") or group.get("differentiable"))
