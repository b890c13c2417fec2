"""What is known of CUDA: which tensors may meet, where the host waits, what launches no kernel."""

import functools

import torch
from torch import Tensor

from simcuda.record import RECORDER
from simcuda.tensor import CudaTensor

aten = torch.ops.aten


class DeviceMismatchError(RuntimeError):
    """What CUDA would refuse."""


#: Operations that look at their result or their input on the host: how often they wait.
WAITS = {
    aten.nonzero.default: 1,
    aten.masked_select.default: 1,
    aten.equal.default: 1,
    aten._unique2.default: 1,
    aten.unique_dim.default: 1,
    aten.unique_consecutive.default: 1,
    aten.multinomial.default: 2,  # it checks its input
    aten.bincount.default: 1,
    aten.repeat_interleave.Tensor: 1,
}

#: Operations that launch nothing, beside views.
NO_LAUNCH = (
    "_local_scalar_dense _reshape_alias _reshape_copy _unsafe_view alias detach empty empty_like empty_strided expand "
    "is_pinned is_same_size lift_fresh new_empty new_empty_strided resize_ set_ split sym_size unbind view"
)
NO_LAUNCH = {f"aten::{name}" for name in NO_LAUNCH.split()}

READS_INDEX = {aten.index.Tensor, aten._unsafe_index.Tensor}
WRITES_INDEX = {aten.index_put.default, aten.index_put_.default}
WRITES_INDEX |= {aten._unsafe_index_put.default, aten._index_put_impl_.default}
#: Operations that copy a CPU scalar to the GPU where others pass it to the kernel by value.
COPIES_SCALARS = {aten.where.self}
TRANSFERS = {aten._to_copy.default, aten.copy_.default, aten.copy.default}


@functools.lru_cache(None)
def launches(func) -> bool:
    """Whether a kernel runs: not for views, nor for what only makes room."""
    schema = func._schema
    if schema.name in NO_LAUNCH:
        return False
    return schema.is_mutable or not any(result.alias_info is not None for result in schema.returns)


@functools.lru_cache(None)
def _is_pointwise(func) -> bool:
    return torch.Tag.pointwise in func.tags or "foreach" in func._schema.name


def check_generators(func, values, device: str) -> None:
    """A generator must be on the device of the operation."""
    for value in values:
        if isinstance(value, torch._C.Generator) and device_of_generator(value) != device:
            raise DeviceMismatchError(
                f"{func}: Expected a '{device}' device type for generator but found '{device_of_generator(value)}'"
            )


#: The simulated device's generators by the address of the C++ object, for which torch makes a new Python one at times;
#: held, so that no other gets the address.
CUDA_GENERATORS: dict = {}


def device_of_generator(generator) -> str:
    return "cuda" if generator._cdata in CUDA_GENERATORS else "cpu"


def check_devices(func, args, tensors: list[Tensor]) -> None:
    """Tensors must be on one device, save scalars on the CPU in pointwise operations; and record where it waits."""
    on_cuda = [x for x in tensors if isinstance(x, CudaTensor)]
    on_cpu = [x for x in tensors if not isinstance(x, CudaTensor)]
    if on_cuda and func in WAITS:
        RECORDER.wait(func._schema.name, WAITS[func])
    if func in READS_INDEX or func in WRITES_INDEX:
        _check_index(func, *args[:3])
    elif on_cuda and on_cpu and func not in TRANSFERS:
        _check_mixed(func, args, on_cpu)


def _check_mixed(func, args, on_cpu: list[Tensor]) -> None:
    takes_scalars = (_is_pointwise(func) or func in COPIES_SCALARS) and "fused_adam" not in func._schema.name
    if not takes_scalars or any(x.dim() for x in on_cpu):
        shapes = [(tuple(x.shape), x.dtype) for x in on_cpu]
        raise DeviceMismatchError(
            f"{func}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"On the CPU: {shapes}"
        )
    changed = args[0] if isinstance(args[0], list | tuple) else args[:1]
    if func._schema.is_mutable and not all(isinstance(x, CudaTensor) for x in changed):
        raise DeviceMismatchError(f"{func}: in place on a CPU tensor, with an operand on cuda:0")
    if func in COPIES_SCALARS:
        RECORDER.wait(f"{func._schema.name} copies a CPU scalar")


def _check_index(func, of: Tensor, indices, value=None) -> None:
    for index in indices:
        if index is None:
            continue
        if not isinstance(of, CudaTensor):
            if isinstance(index, CudaTensor):
                raise DeviceMismatchError(f"{func}: indices should be on the device of the indexed tensor, the CPU")
            continue
        if not isinstance(index, CudaTensor):
            RECORDER.wait("index with a CPU tensor or a list")
        if index.dtype in (torch.bool, torch.uint8):
            RECORDER.wait("boolean index")
    if func in WRITES_INDEX and isinstance(of, CudaTensor) and not isinstance(value, CudaTensor):
        if value.dim():
            raise DeviceMismatchError(f"{func}: expected the value on cuda:0, it is on the CPU")
        RECORDER.wait("write a CPU scalar at an index")


def record_transfer(source: Tensor, to_cuda: bool, blocking: bool) -> None:
    """A copy to the host always waits here, since what it gives is read at once; to the GPU only a blocking one."""
    if isinstance(source, CudaTensor) and not to_cuda:
        RECORDER.wait("copy GPU to CPU")
    elif to_cuda and not isinstance(source, CudaTensor) and blocking:
        RECORDER.wait("copy CPU to GPU")
