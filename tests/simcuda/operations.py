"""Runs every operation: checks devices, counts, and computes with the CPU tensors that simulated ones hold."""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simcuda.record import RECORDER
from simcuda.rules import TRANSFERS, aten, check_devices, check_generators, launches, record_transfer
from simcuda.tensor import CudaTensor, is_cuda


class SimulatedCuda(TorchDispatchMode):
    """Sees every operation of the thread, also those that only make a tensor on ``device="cuda"``."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """Like ``func(*args, **kwargs)`` on a machine with a GPU."""
    tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
    device = kwargs.get("device")
    simulated = is_cuda(device) or any(isinstance(x, CudaTensor) for x in tensors)
    check_generators(func, (*args, *kwargs.values()), "cuda" if simulated else "cpu")
    if not simulated:
        return func(*args, **kwargs)
    if func is aten._local_scalar_dense.default:
        RECORDER.wait("item, bool, int or float")
        return func(args[0].held)
    if func is aten._foreach_copy_.default:
        return _copy_each(*args, **kwargs)
    check_devices(func, args, tensors)
    if launches(func):
        RECORDER.launch(func._schema.name)
    if func in TRANSFERS:
        return _transfer(func, args, kwargs)
    return _compute(func, args, kwargs, to_cuda=device is None or is_cuda(device))


def _tensors(values):
    """Those among arguments: they are plain, or in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _each(change, value):
    """``value`` with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_each(change, part) for part in value])
    return value


def _compute(func, args, kwargs, to_cuda: bool):
    """On what the tensors hold. An argument that comes back, as from an operation in place, is the same object."""
    wrapped = {}

    def unwrap(tensor):
        if not isinstance(tensor, CudaTensor):
            return tensor
        wrapped[id(tensor.held)] = tensor
        return tensor.held

    args = _each(unwrap, args)
    kwargs = {name: _each(unwrap, value) for name, value in kwargs.items()}
    if "device" in kwargs:
        kwargs |= {"device": torch.device("cpu")} | ({"pin_memory": False} if "pin_memory" in kwargs else {})
    out = func(*args, **kwargs)
    if func._schema.is_mutable:
        for tensor in wrapped.values():
            tensor.follow_shape()

    def wrap(tensor):
        return wrapped[id(tensor)] if id(tensor) in wrapped else CudaTensor(tensor)

    return _each(wrap, out) if to_cuda else out


def _transfer(func, args, kwargs):
    """A copy, perhaps to another device or type."""
    if func is aten._to_copy.default:
        source, device = args[0], kwargs.get("device")
        to_cuda = isinstance(source, CudaTensor) if device is None else is_cuda(device)
        blocking = not kwargs.get("non_blocking", False)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking")}
    else:
        into, source = args[:2]
        to_cuda = isinstance(into, CudaTensor)
        blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        kwargs = {}
    record_transfer(source, to_cuda, blocking)
    held = [x.held if isinstance(x, CudaTensor) else x for x in args[: 1 if func is aten._to_copy.default else 2]]
    out = func(*held, **kwargs)
    if func is aten.copy_.default:
        return into
    return CudaTensor(out) if to_cuda else out


def _copy_each(into, source, non_blocking=False):
    """``_foreach_copy_`` may copy between devices: then it is a loop."""
    for one, other in zip(into, source, strict=True):
        run(aten.copy_.default, (one, other, non_blocking), {})
