"""Graphs: what the inputs of Dynamo's are, export to ATen, tracing, and compiling with Inductor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from moeca_compile._torch_private.lookup import Private
from moeca_compile._torch_private.strides import quick_strides

_NOTHING_CACHED = "nothing is cached: models run as under plain torch.compile"

_EXPORT = Private(
    "torch._functorch.aot_autograd.aot_export_module",
    _NOTHING_CACHED,
    parameters=("trace_joint", "pre_dispatch"),
    required=True,
)
_MAKE_FX = Private(
    "torch.fx.experimental.proxy_tensor.make_fx",
    _NOTHING_CACHED,
    parameters=("tracing_mode", "pre_dispatch"),
    required=True,
)
_FAKE_MODE = Private(
    "torch._subclasses.fake_tensor.FakeTensorMode",
    _NOTHING_CACHED,
    parameters=("allow_non_fake_inputs", "shape_env", "static_shapes"),
    required=True,
)
_COLD = "Inductor's cache of compiled graphs is not used, and each process compiles anew"
_SHAPES = Private("torch.fx.experimental.symbolic_shapes.ShapeEnv", _COLD)
_CONTEXT = Private("torch._guards.TracingContext", _COLD)
_TRACING = Private("torch._guards.tracing", _COLD)
_NO_CODE = "dumps do not have Inductor's code"
_INNER = Private("torch._inductor.compile_fx.compile_fx_inner", _NO_CODE)
_COMPILE = Private(
    "torch._inductor.compile_fx.compile_fx", "processes that compile for GPUs are started for models on a CPU, too"
)
_CODE = Private("torch._inductor.output_code.CompiledFxGraph", _NO_CODE)
_FUNCTORCH = Private("torch._functorch.config", _NO_CODE)
_CONFIG = Private("torch._inductor.config", "a model that draws random numbers draws others where it is compiled")
_STATIC = Private(
    "torch.fx.experimental.symbolic_shapes.has_static_value",
    "a model whose MoE layer takes sizes apart is compiled for each batch size",
)
_NUMBERS = Private("torch._refs.tensor", "a timestep that is a Python number may get a graph for each value")

has_static_value: Callable[[Any], bool] = _STATIC.value or (lambda size: True)
"""Traceable: whether a size is the same for all calls. Where nobody can tell, it is made so."""

tensor_of_number: Any = _NUMBERS.value or torch.tensor
"""What Dynamo's graph has for `torch.tensor(number)`."""


def is_module_state(placeholder: fx.Node) -> bool:
    """Whether an input of Dynamo's graph is a parameter or buffer (or attribute) of a module, not an argument."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return placeholder.name.startswith(("l_self_", "l__self__")) or "_modules_" in placeholder.name
    while source is not None:
        if "NNModule" in type(source).__name__ or "ParamBuffer" in type(source).__name__:
            return True
        source = getattr(source, "base", None)
    return False


def is_size(placeholder: fx.Node) -> bool:
    """Whether a number among the inputs of Dynamo's graph is the size of a tensor input.

    Where the graph does not say, it is: what counts as a size stays a number, at worst with a graph for each value.
    """
    source = getattr(placeholder, "_dynamo_source", None)
    return source is None or type(source).__name__ == "TensorPropertySource"


def export_functional(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Functional pre-dispatch ATen of Dynamo's graph; one placeholder per input, in order.

    Where the model changes inputs in place, their new values come first among the outputs, and
    `meta["mutated_inputs"]` of the result has their positions.
    """
    exported, signature = _EXPORT.value(gm, list(inputs), trace_joint=False, pre_dispatch=True)
    assert isinstance(exported, fx.GraphModule)
    names = [node.name for node in exported.graph.nodes if node.op == "placeholder"]
    changed = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    exported.meta["mutated_inputs"] = tuple(names.index(name) for name in changed.values())
    return exported


def trace_to_graph(function: Callable[..., Any], *arguments: Any) -> fx.GraphModule:
    """Trace a function of tensors and constants to ATen on fake tensors; a placeholder for each argument."""
    with fake_mode_of(arguments) as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in arguments]
        traced: fx.GraphModule = _MAKE_FX.value(function, tracing_mode="real", pre_dispatch=True)(*fakes)
    return traced


def fake_mode_of(values: Iterable[Any]) -> Any:
    """The FakeTensorMode that values are fake in; a new one where none is."""
    found = (value.fake_mode for value in values if is_fake(value))
    return next(found, None) or _FAKE_MODE.value(allow_non_fake_inputs=True)


def is_fake(value: Any) -> bool:
    """Whether a value is a tensor without memory of its own, as in a trace."""
    return hasattr(value, "fake_mode")


def compile_graph(
    gm: fx.GraphModule,
    examples: Sequence[Tensor],
    on_code: Callable[[str], None] | None = None,
    eager_random: bool = False,
) -> Callable[..., Any]:
    """Inductor's code for a graph of flat tensor inputs, called with the inputs one by one.

    Of the `examples`, real or fake, only shapes, strides, dtypes and devices are read: Inductor gets fake tensors
    like them, which take no memory.

    `on_code` is given the path of the file that this code is in. Inductor is then asked although AOTAutograd may have
    the compiled graph in its cache, which does not say where its code is.

    With `eager_random`, ops draw the random numbers that they draw in eager mode, by its kernels, not Inductor's own.
    """
    with _static_shapes() as mode:
        with mode:
            inputs = [torch.empty_strided(e.size(), e.stride(), dtype=e.dtype, device=e.device) for e in examples]
        return compiled_by_inductor(gm, inputs, on_code, eager_random)


def compiled_by_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Tensor],
    on_code: Callable[[str], None] | None = None,
    eager_random: bool = False,
) -> Callable[..., Any]:
    """The same for fake inputs, within `tracing_in` their mode."""
    random = _CONFIG.value.patch(fallback_random=True) if eager_random and _CONFIG.value else nullcontext()
    with torch.no_grad(), random, quick_strides():
        if on_code is None or any(each.value is None for each in (_INNER, _CODE, _FUNCTORCH)):
            return inductor(gm, list(inputs))
        with _FUNCTORCH.value.patch(enable_autograd_cache=False):
            return inductor(gm, list(inputs), inner_compile=_reporting_its_code(on_code))


def inductor(gm: fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
    """Inductor as torch.compile calls it.

    The backend of this name starts processes that compile Triton's kernels first. Each imports torch, which takes 3 s
    of the processor, and for a graph on a CPU there is nothing for them to do.
    """
    on_cpu = all(value.device.type == "cpu" for value in inputs if isinstance(value, Tensor))
    found: Callable[..., Callable[..., Any]] | None = _COMPILE.value if on_cpu else None
    compiled: Callable[..., Any] = (found or torch._dynamo.lookup_backend("inductor"))(gm, inputs, **options)
    return compiled


def load_inductor() -> bool:
    """Import what compiling takes: a second of the processor, once. Returns whether it is there."""
    return _INNER.value is not None


def _reporting_its_code(on_code: Callable[[str], None]) -> Callable[..., Any]:
    """`compile_fx_inner`, which also gives `on_code` the path of the code that it wrote."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        compiled = _INNER.value(*args, **kwargs)
        if isinstance(compiled, _CODE.value):
            on_code(compiled.write_to_disk())
        return compiled

    return inner


@contextmanager
def _static_shapes() -> Iterator[Any]:
    """The FakeTensorMode to compile in. Inductor's cache of compiled graphs wants a shape environment in it, though
    all sizes are static.

    AOTAutograd makes the sizes of real tensors variables in such an environment, whatever the mode says; fake tensors
    of the mode it takes as they are.
    """
    if any(each.value is None for each in (_SHAPES, _CONTEXT, _TRACING)):
        yield _FAKE_MODE.value(allow_non_fake_inputs=True)
        return
    mode = _FAKE_MODE.value(allow_non_fake_inputs=True, shape_env=_SHAPES.value(), static_shapes=True)
    with tracing_in(mode):
        yield mode


@contextmanager
def tracing_in(mode: Any) -> Iterator[None]:
    """Have torch's compiler take this FakeTensorMode for the one that inputs are fake in."""
    if any(each.value is None for each in (_CONTEXT, _TRACING)):
        yield
        return
    with _TRACING.value(_CONTEXT.value(mode)):
        yield
