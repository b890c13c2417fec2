"""Settings that have no meaning beside others are refused: key, value, reason, cure. Those of one key: ``keys.py``."""

import importlib.util
import math
import os
import sysconfig
from pathlib import Path
from typing import NoReturn

import torch
from torchrl.data.utils import DEVICE_TYPING

#: Bytes that any agent takes per frame at least: its reward, log-prob, value, its target and the advantage, the ratio
#: of older data, an observation and an action of one number each, 4 bytes each.
LEAST_BYTES = 32


def refuse(key: str, value: object, reason_and_cure: str) -> NoReturn:
    """Refuse a setting that has no meaning beside the others.

    Raises:
        ValueError: always, naming the key.
    """
    raise ValueError(f"algorithm.{key}={value}: {reason_and_cure}")


def check_memory(n_rollouts: int, frames: int, device: DEVICE_TYPING, frame_bytes: int = LEAST_BYTES) -> None:
    """Refuse to keep more batches than the device's whole memory holds.

    Args:
        n_rollouts (int): how many.
        frames (int): of a batch.
        device (torch.device or str): where they are kept.
        frame_bytes (int): of a frame, as far as known.

    Raises:
        ValueError: with the memory they would take.

    Examples:
        >>> check_memory(4, frames=6000, device="cpu")
    """
    needed, there = n_rollouts * frames * frame_bytes, _memory(torch.device(device))
    if needed > there:
        refuse(
            "n_rollouts",
            n_rollouts,
            f"as many batches of {frames} frames take at least {needed / 1e9:,.0f} GB, and {device} has "
            f"{there / 1e9:,.0f} GB. It must be a whole number that leaves room for the rest. The usual value is 1.",
        )


def check_compiler(device: torch.device | str) -> None:
    """Refuse to compile where ``torch.compile`` has nothing to do it with.

    Args:
        device (torch.device or str): where the compiled function is to run.

    Raises:
        ValueError: with what is missing and where it comes from.
    """
    from torch._inductor import cpp_builder  # it takes a second to import
    from torch._inductor.exc import InvalidCxxCompiler

    without = "Or take algorithm.compile=False."
    try:
        cpp_builder.get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError):
        cure = f"Install one (apt install g++, say) or name yours by the environment variable CXX. {without}"
        refuse("compile", True, f"torch.compile needs a C++ compiler, and there is none that works. {cure}")
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        cure = f"Install them (apt install python3-dev, say). {without}"
        refuse("compile", True, f"torch.compile needs Python's headers, and there is no Python.h in {headers}. {cure}")
    if torch.device(device).type == "cuda" and importlib.util.find_spec("triton") is None:
        cure = f"Install PyTorch's build for CUDA, which brings it. {without}"
        refuse("compile", True, f"on a GPU torch.compile needs the package triton, which is not installed. {cure}")


def _memory(device: torch.device) -> float:
    """Bytes of the device; infinity where nobody says."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
