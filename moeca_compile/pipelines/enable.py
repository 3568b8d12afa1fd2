"""The public `enable` and `disable` of a pipeline."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn

from moeca_compile._torch_private import compiled_call, restore_compiled_call
from moeca_compile.config import MoecaConfig
from moeca_compile.pipelines.denoisers import components_of, denoisers
from moeca_compile.pipelines.idle import look_for_idle, steps_taken
from moeca_compile.pipelines.image import Image
from moeca_compile.reporting.collect import reset
from moeca_compile.runtime.scope import stream

REPLACED = (
    "moeca: component {0!r} of {1} was replaced after moeca_compile.enable(pipe), so the new one runs uncached. Call "
    "moeca_compile.enable(pipe, ...) again"
)
_CONTEXT = "cache_context"


@dataclass
class _Denoiser:
    """What a module had before it was compiled, and the pipelines that want it compiled."""

    compiled_before: Any
    context_before: Any
    """The instance's own `cache_context`, if it had one."""
    config: MoecaConfig | None = None
    """What it is compiled with now."""
    pipes: WeakSet[Any] = field(default_factory=WeakSet)


@dataclass(frozen=True)
class _Pipeline:
    """What a pipeline was before."""

    kind: type
    denoisers: dict[str, nn.Module]


_denoisers: WeakKeyDictionary[nn.Module, _Denoiser] = WeakKeyDictionary()
_pipelines: WeakKeyDictionary[Any, _Pipeline] = WeakKeyDictionary()


def enable(pipe: Any, **options: Any) -> dict[str, nn.Module]:
    """Cache in the denoisers of a diffusers pipeline, and take each `pipe(...)` for one generation.

        moeca_compile.enable(pipe)
        image = pipe("a photo of a cat", num_inference_steps=50).images[0]

    The denoisers are those components whose forward takes a timestep. They are compiled in place, and so are cached
    in every pipeline that shares them. The scheduler tells the number of steps and, where it counts them, the time;
    what the pipeline calls its cache contexts are streams. Noise that is drawn between calls of the denoiser tells
    the default recipe, `auto`, that the sampler is stochastic. Enabled again, a pipeline has the later options.

    Args:
        pipe: the pipeline. Its weights, device and scheduler may change later; after a denoiser was replaced, enable
            it again.
        options: fields of MoecaConfig by name.

    Returns the denoisers by name, for `moeca_compile.report`. Raises TypeError for what is no pipeline, ValueError if
    no denoiser is found or one is compiled or cached by other means, and ConfigError for a wrong option.
    """
    config, found = MoecaConfig.from_options(options), denoisers(pipe)
    before = _pipelines.get(pipe)
    for module in found.values():
        _compile(module, options, config)
        _denoisers[module].pipes.add(pipe)
    if before is None:
        _pipelines[pipe] = _Pipeline(type(pipe), found)
        pipe.__class__ = _one_generation_a_call(type(pipe))
    else:
        _pipelines[pipe] = _Pipeline(before.kind, found)
        _release(pipe, [module for module in before.denoisers.values() if module not in found.values()])
    return found


def disable(pipe: Any) -> None:
    """Undo `enable`: the pipeline and its denoisers are what they were, and their caches are dropped.

    A denoiser that another enabled pipeline shares stays compiled for that one. No error if nothing was enabled.

    Raises TypeError for what is no pipeline.
    """
    components_of(pipe)
    before = _pipelines.pop(pipe, None)
    if before is None:
        return
    pipe.__class__ = before.kind
    _release(pipe, before.denoisers.values())


def _compile(module: nn.Module, options: dict[str, Any], config: MoecaConfig) -> None:
    known = _denoisers.get(module)
    if known is None:
        known = _denoisers[module] = _Denoiser(compiled_call(module), vars(module).get(_CONTEXT))
        if hasattr(module, _CONTEXT):
            vars(module)[_CONTEXT] = MethodType(cache_context, module)
    elif known.config == config:
        return
    else:
        reset(module)
    module.compile(backend="moeca", options=options)
    known.config = config


def _release(pipe: Any, modules: Iterable[nn.Module]) -> None:
    """The pipeline wants these modules compiled no longer."""
    for module in modules:
        known = _denoisers[module]
        known.pipes.discard(pipe)
        if not known.pipes:
            _restore(module)


def _restore(module: nn.Module) -> None:
    reset(module)
    known = _denoisers.pop(module)
    restore_compiled_call(module, known.compiled_before)
    vars(module).pop(_CONTEXT, None)
    if known.context_before is not None:
        vars(module)[_CONTEXT] = known.context_before


@contextmanager
def cache_context(module: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
    """diffusers' mark of a denoising call ("cond", "uncond"), which is ours too."""
    known = _denoisers.get(module)  # a copy of a module is not known
    own = known.context_before if known is not None else None
    context = own or functools.partial(type(module).cache_context, module)
    with context(name, *args, **kwargs), stream(name):
        yield


def _one_generation_a_call(kind: type) -> type:
    """A class that differs from `kind` in its call alone, by which Python looks for it in the class."""

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _warn_if_replaced(self)
        own = _own_denoisers(self)
        before = steps_taken(own)
        with Image(self, (*args, *kwargs.values())):
            drawn = kind.__call__(self, *args, **kwargs)
        look_for_idle(self, own, before)
        return drawn

    same = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {**same, "__call__": call})


def _own_denoisers(pipe: Any) -> dict[str, nn.Module]:
    """Those that were enabled and that are still the pipeline's."""
    known, components = _pipelines.get(pipe), components_of(pipe)
    found = known.denoisers if known is not None else {}
    return {name: module for name, module in found.items() if components.get(name) is module}


def _warn_if_replaced(pipe: Any) -> None:
    known = _pipelines.get(pipe)
    components = components_of(pipe)
    for name, module in known.denoisers.items() if known is not None else ():
        if components.get(name) is not module:
            warnings.warn(REPLACED.format(name, type(pipe).__name__), stacklevel=3)
