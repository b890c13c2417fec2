"""The tensor on the simulated device."""

import copy

import torch
from torch import Tensor

from simcuda.record import RECORDER

CUDA = torch.device("cuda:0")
#: What C++ takes the device for. Autograd runs "lazy" in the calling thread; for "cuda" it asks for an accelerator.
IN_CPP = torch.device("lazy:0")


def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "lazy")


class CudaTensor(Tensor):
    """Says that it is on ``cuda:0``; its numbers are in ``held``, a CPU tensor of the same shape and strides."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor):
        assert not isinstance(held, CudaTensor)
        new = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=IN_CPP,
            requires_grad=False,
        )
        new.held = held
        return new

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        from simcuda.operations import run  # which needs this class

        return run(func, args, kwargs or {})

    # Where it is.

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self):
        return 0

    def data_ptr(self):
        return self.held.data_ptr()

    # `x.data = y` in C++ takes over the shape alone.

    @property
    def data(self):
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        assert isinstance(other, CudaTensor), "x.data = y: y is on another device"
        if self.shape != other.shape or self.stride() != other.stride():
            Tensor.data.__set__(self, other)
        self.held = other.held

    def follow_shape(self):
        """After an operation such as ``unsqueeze_`` on what is held."""
        if self.shape != self.held.shape or self.stride() != self.held.stride():
            Tensor.data.__set__(self, CudaTensor(self.held))

    # To other devices and types. C++ would compare with the device that it knows.

    def to(self, *args, **kwargs):
        other = kwargs.get("other", args[0] if args else None)
        if isinstance(other, Tensor):
            device, dtype, asked = other.device, other.dtype, kwargs.get("copy", False)
        else:
            asked = kwargs.pop("copy", False)
            device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        device, dtype = device or CUDA, dtype or self.dtype
        if is_cuda(device) and dtype == self.dtype and not asked:
            return self
        return super().to(device, dtype, kwargs.get("non_blocking", False), True)

    def cpu(self, *args, **kwargs):
        return super().to(torch.device("cpu"), self.dtype, False, True)

    def cuda(self, *args, **kwargs):
        return self

    def new_tensor(self, data, dtype=None, device=None, requires_grad=False):
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA, requires_grad=requires_grad)

    # To Python.

    def tolist(self):
        RECORDER.wait("tolist")
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __repr__(self, **kwargs):
        return f"Cuda({self.held!r})"

    def __format__(self, spec):
        return self.item().__format__(spec) if self.dim() == 0 else object.__format__(self, spec)

    # Copies and files.

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            assert self.is_leaf, "Only leaves support the deepcopy protocol"
            new = _rebuild(self.held.detach().clone(), self.requires_grad, getattr(self, "_is_param", False))
            new.grad = copy.deepcopy(self.grad, memo)
            memo[id(self)] = new
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return _rebuild, (self.held.detach(), self.requires_grad, getattr(self, "_is_param", False))


def _rebuild(held: Tensor, requires_grad: bool, is_parameter: bool) -> Tensor:
    new = CudaTensor(held)
    return torch.nn.Parameter(new, requires_grad) if is_parameter else new.requires_grad_(requires_grad)


torch.serialization.add_safe_globals([_rebuild, CudaTensor])
