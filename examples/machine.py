"""What every measurement needs: a description of the machine, and a model that no other measurement affects."""

from __future__ import annotations

import copy
import platform
from importlib.metadata import PackageNotFoundError, version
from types import FunctionType

import torch
from torch import nn


def private_copy(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose forward has its own code object.

    Plain torch.compile breaks the graph inside the loop over the blocks. Dynamo then skips the code object of
    that forward, for every backend and every other model of the class in the process.
    """
    own = copy.deepcopy(model)
    kind = type(model)
    forward = FunctionType(kind.forward.__code__.replace(), kind.forward.__globals__, kind.forward.__name__)
    own.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return own


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, str | int]:
    """What a timing depends on: device, threads, dtype and versions."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: installed(name) for name in ("diffusers", "moeca-compile")},
    }


def installed(package: str) -> str:
    """The version of a package; "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
