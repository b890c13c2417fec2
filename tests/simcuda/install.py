"""Make torch believe that there is one CUDA device. For the whole process, once."""

import contextlib
import ctypes
import functools
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._pytree import tree_map

from simcuda.operations import SimulatedCuda
from simcuda.record import RECORDER
from simcuda.rules import CUDA_GENERATORS, DeviceMismatchError
from simcuda.tensor import CUDA, CudaTensor

#: The versions of torch whose internals are known to be as this package takes them.
KNOWN = ("2.13",)


class UnknownTorchError(RuntimeError):
    """This torch has other internals: nothing can be simulated."""


def is_known() -> bool:
    """Whether a failure to install is an error, rather than a reason to skip."""
    return torch.__version__.startswith(tuple(f"{version}." for version in KNOWN)) and sys.platform == "linux"


def install() -> None:
    """Install the device and try it.

    Raises:
        UnknownTorchError: where that fails.
    """
    try:
        _install_device_guard()
        _patch_torch()
        SimulatedCuda().__enter__()
        _try()
    except Exception as error:
        raise UnknownTorchError(
            f"no CUDA device can be simulated on torch {torch.__version__} ({sys.platform}), known are "
            f"{', '.join(KNOWN)} on linux: {type(error).__name__}: {error}"
        ) from error


def _install_device_guard() -> None:
    """A CPU build of torch has no guard of CUDA devices in its table: give it the one that does nothing.

    ``_ensureCUDADeviceGuardSet``, which is there for ``FakeTensorMode``, puts that one in the place of a guard that
    counts no devices. So the table needs such a guard first: an object whose every method returns 0.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    cpu_and_cuda = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if cpu_and_cuda[1]:
        torch._C._ensureCUDADeviceGuardSet()  # a CUDA build without a device
        return
    returns_zero = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
    methods = (ctypes.c_void_p * 64)(*[ctypes.cast(returns_zero, ctypes.c_void_p).value] * 64)
    guard = ctypes.c_void_p(ctypes.addressof(methods))
    cpu_and_cuda[1] = ctypes.addressof(guard)
    torch._C._ensureCUDADeviceGuardSet()
    if cpu_and_cuda[1] == ctypes.addressof(guard):
        cpu_and_cuda[1] = None  # nothing must stay that dies with this function
        raise RuntimeError("the device guard was not replaced")


def _patch_torch() -> None:
    torch._C._set_only_lift_cpu_tensors(True)
    torch.autograd.set_multithreading_enabled(False).__enter__()
    torch.__future__.set_swap_module_params_on_conversion(True)  # module.to keeps parameter objects, as with CUDA
    torch.Generator = Generator
    torch.load = functools.partial(_load, torch.load)
    torch._C._cuda_getDevice = lambda: 0
    for name, value in _torch_cuda().items():
        setattr(torch.cuda, name, value)
    _use_foreach()


def _torch_cuda() -> dict:
    """What stands in for the functions of ``torch.cuda``."""
    generator = Generator("cuda")

    def all_give(names: str, value=None) -> dict:  # a function for each: torch._dynamo minds two names of one
        return {name: lambda *args, **kwargs: value for name in names.split()}

    def all_call(names: str, function) -> dict:
        return {name: lambda *args, **kwargs: function(*args, **kwargs) for name in names.split()}

    return {
        **all_give("_lazy_init set_device empty_cache"),
        **all_give("current_device _exchange_device _maybe_exchange_device", 0),
        **all_give("device_count", 1),
        **all_give("is_available is_initialized", True),
        **all_give("is_current_stream_capturing", False),
        **all_call("current_stream default_stream", Stream),
        "get_device_properties": lambda *args: SimpleNamespace(total_memory=80 * 10**9),
        **all_call("manual_seed manual_seed_all", generator.manual_seed),
        "_lazy_call": lambda function, **kwargs: function(),
        "synchronize": lambda *args, **kwargs: RECORDER.wait("torch.cuda.synchronize"),
        "set_sync_debug_mode": _set_sync_debug_mode,
        "default_generators": (generator,),
        "Stream": Stream,
        "Event": Event,
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
    }


def _set_sync_debug_mode(mode: int | str) -> None:
    """As torch's, down to its warning, which comes when the mode is already set."""
    RECORDER.forbids_waits = mode in ("error", 2)
    warnings.warn(
        "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations",
        stacklevel=2,
    )


def _load(load, *args, map_location=None, **kwargs):
    """``torch.load``: all is read to the CPU, where each simulated tensor wraps itself again, and then mapped."""
    loaded = load(*args, map_location="cpu", **kwargs)
    if map_location is None:
        return loaded

    def move(value):
        if not isinstance(value, torch.Tensor):
            return value
        if callable(map_location):  # of a storage on the CPU and where it was; what it gives back is taken
            storage = object()
            assert map_location(storage, str(value.device)) is storage, "only that storage is simulated"
            return value.cpu()
        to = map_location.get(str(value.device)) if isinstance(map_location, dict) else map_location
        return value if to is None else value.to(to)

    return tree_map(move, loaded)


def _use_foreach() -> None:
    """Let optimizers take foreach's and the fused kernels, as they do on CUDA."""
    import torch.utils._foreach_utils as foreach
    from torch.optim.optimizer import _foreach_supported_types as by_optimizers

    for types in (foreach._foreach_supported_types, by_optimizers):
        if CudaTensor not in types:  # they may be one list
            types.append(CudaTensor)
    supported = foreach._get_foreach_kernels_supported_devices
    foreach._get_foreach_kernels_supported_devices = lambda: [*supported(), "lazy"]


class Generator(torch._C.Generator):
    """A generator that says where it is; its numbers are those of the CPU."""

    def __new__(cls, device="cpu"):
        new = super().__new__(cls, "cpu")
        new._device = torch.device(device)
        if new._device.type == "cuda":
            new._device = CUDA
            CUDA_GENERATORS[new._cdata] = new
        return new

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self):
        return self._device

    def manual_seed(self, seed):
        super().manual_seed(seed)
        return self


class Stream:
    """There is only one, and nothing is ever under way in it."""

    device = CUDA

    def __init__(self, *args, **kwargs):
        pass

    def record_event(self, event=None):
        return Event()

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        RECORDER.wait("stream.synchronize")


class Event:
    """Has happened."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, *args):
        pass

    def wait(self, *args):
        pass

    def synchronize(self):
        RECORDER.wait("event.synchronize")

    def query(self):
        return True


def _try() -> None:
    """A training step, a meeting of two devices and a wait."""
    RECORDER.reset()
    weight = torch.nn.Linear(2, 2).to("cuda").weight
    assert weight.device == CUDA
    assert isinstance(weight, CudaTensor)
    with RECORDER.recording():
        (weight @ torch.ones(2, device="cuda")).sum().backward()
        torch.optim.Adam([weight], fused=True).step()
        assert RECORDER.launches
        assert not RECORDER.waits
        weight.sum().item()
        assert len(RECORDER.waits) == 1
    RECORDER.reset()
    try:
        weight @ torch.ones(2)
    except DeviceMismatchError:
        return
    raise AssertionError("two devices met")
