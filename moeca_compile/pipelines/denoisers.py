"""The modules of a pipeline that its sampling loop calls, told by what they take."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from moeca_compile._torch_private import compiled_module

NO_PIPELINE = (
    "{0} is no diffusers pipeline: it has no components. Give the pipeline itself; for a model by itself write "
    "model = torch.compile(model, backend='moeca', options={{...}})"
)
NO_DENOISER = (
    "no denoiser was found in {0}: none of its components is a module whose forward takes a timestep. They are {1}. "
    "Compile the model that your sampling loop calls: model.compile(backend='moeca', options={{...}})"
)
WRAPPED = (
    "component {0!r} of {1} is what torch.compile returned. Put the module itself back, which is then compiled in "
    "place: pipe.{0} = pipe.{0}._orig_mod"
)
OTHER_CACHE = (
    "component {0!r} of {1} has a cache of diffusers enabled, and caching twice is wrong. Turn that one off first: "
    "pipe.{0}.disable_cache()"
)


def components_of(pipe: Any) -> Mapping[str, Any]:
    """The pipeline's components by name. Raises TypeError for what is no pipeline."""
    components = getattr(pipe, "components", None)
    if not isinstance(components, Mapping):
        raise TypeError(NO_PIPELINE.format(type(pipe).__name__))
    return components


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The modules among the components that take a timestep, but for those that only condition others.

    Raises ValueError if there are none, and for one that is compiled or cached by other means.
    """
    components, kind = components_of(pipe), type(pipe).__name__
    found: dict[str, nn.Module] = {}
    for name, module in components.items():
        if not isinstance(module, nn.Module):
            continue
        inner = compiled_module(module)
        if inner is not None and inner is not module and _denoises(inner):
            raise ValueError(WRAPPED.format(name, kind))
        if _denoises(module) and not any(module is other for other in found.values()):
            if getattr(module, "is_cache_enabled", False):
                raise ValueError(OTHER_CACHE.format(name, kind))
            found[name] = module
    if not found:
        known = ", ".join(f"{name} ({type(value).__name__})" for name, value in components.items())
        raise ValueError(NO_DENOISER.format(kind, known or "none"))
    return found


def _denoises(module: nn.Module) -> bool:
    """Whether it is called at each step, and its output is not an input of another such module (a control net)."""
    # Of the class: hooks, such as those that move weights to a device, replace the instance's.
    names = inspect.signature(type(module).forward).parameters
    timed = any(name == "t" or "timestep" in name for name in names)
    return timed and "controlnet_cond" not in names
