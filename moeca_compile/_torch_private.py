"""Every private torch API that the package uses, one small function each, and nothing else.

Checked by the tests on torch 2.13 only; look here first when another version misbehaves.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from ctypes import CDLL
from dataclasses import replace
from threading import RLock, get_ident
from types import CodeType, FrameType
from typing import Any

import torch
from torch import fx
from torch._dynamo.callback import CallbackArgs, callback_handler
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, DictGetItemSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.builder import VariableBuilder
from torch._dynamo.variables.functions import UserFunctionVariable
from torch._dynamo.variables.lists import ListVariable
from torch._dynamo.variables.torch import TorchInGraphFunctionVariable
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import ChainedSource, Source, TracingContext, tracing
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppCodeCache
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.output_code import CompiledFxGraph
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

_LIBRARIES = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
CompileStart = Callable[[CallbackArgs], None]

_lasting: list[CompileStart] = []
_one_at_a_time = RLock()
"""Two threads that put something in the place of AsyncCompile.wait would put back each other's."""


def tracing_backend() -> Iterator[Any]:
    """The backend that Dynamo is tracing for now, then what each of torch's wrappers around it holds."""
    backend: Any = InstructionTranslator.current_tx().output.compiler_fn
    while backend is not None:
        yield backend
        backend = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)


class _StartCallbacks(list[CompileStart]):
    """Dynamo's list, in which ours outlast `torch._dynamo.reset()`: they are no compiled state to be cleared."""

    def clear(self) -> None:
        self[:] = [callback for callback in self if callback in _lasting]


def on_every_compile_start(callback: CompileStart) -> None:
    """Call `callback` before each compilation in this process, until `not_on_compile_start(callback)`."""
    if not isinstance(callback_handler.start_callbacks, _StartCallbacks):
        callback_handler.start_callbacks = _StartCallbacks(callback_handler.start_callbacks)
    if callback not in callback_handler.start_callbacks:
        _lasting.append(callback)
        callback_handler.start_callbacks.append(callback)


def not_on_compile_start(callback: CompileStart) -> None:
    """Undo `on_every_compile_start`."""
    for callbacks in (_lasting, callback_handler.start_callbacks):
        if callback in callbacks:
            callbacks.remove(callback)


def traced_wrapper() -> Any:
    """The object that `torch.compile` made for this compilation; it lives as long as the compiled model."""
    return list(tracing_backend())[1]


def wrapper_of(compiled: Any) -> Any:
    """The same object, from what `torch.compile(model)` returned; None for anything else."""
    context = getattr(compiled, "dynamo_ctx", None)
    backend = getattr(context, "callback", None)
    while backend is not None and type(backend).__name__ != "_TorchCompileWrapper":
        backend = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)
    return backend


def graph_break() -> tuple[str, str] | None:
    """(file:line, reason) where Dynamo ends the graph that it is handing over before the function's end."""
    reason = InstructionTranslator.current_tx().output.compile_subgraph_reason
    if reason is None or not reason.graph_break:
        return None
    frame = reason.user_stack[-1] if reason.user_stack else None
    where = f"{frame.filename}:{frame.lineno}" if frame else "unknown"
    return where, reason.reason.split("\n")[0]


def root_module() -> torch.nn.Module | None:
    """The module whose forward Dynamo is tracing for now: the first argument of the outermost frame."""
    translator = InstructionTranslator.current_tx().output.root_tx
    arguments = translator.f_code.co_varnames[: translator.f_code.co_argcount]
    value = translator.f_locals.get(arguments[0]) if arguments else None
    value = getattr(value, "value", value)
    return value if isinstance(value, torch.nn.Module) else None


def _calling_frames() -> list[FrameType]:
    """The frames between the one that Dynamo is compiling for now and torch.compile's wrapper around it."""
    found: list[FrameType] = []
    frame = sys._getframe().f_back
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        found.append(frame)
        frame = frame.f_back
    return found if frame is not None else []


def _users(frames: list[FrameType]) -> list[FrameType]:
    return [frame for frame in frames if not frame.f_code.co_filename.startswith(_LIBRARIES)]


def in_decorated_function() -> bool:
    """Whether one of the callers is decorated with a context of torch's, such as no_grad."""
    return any(frame.f_code.co_name == "decorate_context" for frame in _calling_frames())


def calling_code() -> list[CodeType]:
    """Code of the functions that run as plain Python around the frame that Dynamo is compiling for now."""
    return [frame.f_code for frame in _users(_calling_frames())]


def outermost_module() -> torch.nn.Module | None:
    """The module that was called as a whole: the first argument of the outermost of those, else `root_module`."""
    for frame in reversed(_users(_calling_frames())):
        arguments = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        value = frame.f_locals.get(arguments[0]) if arguments else None
        if isinstance(value, torch.nn.Module):
            return value
    return root_module()


def forget_code(code: CodeType) -> None:
    """Let Dynamo forget what it compiled for `code`, and that it had given it up."""
    torch._C._dynamo.eval_frame.reset_code(code)


def numeric_modes() -> tuple[Any, ...]:
    """Global modes that the meaning of a traced graph depends on, and that Dynamo guards."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return *autocast, torch.get_default_dtype(), torch.get_float32_matmul_precision()


def is_module_state(placeholder: fx.Node) -> bool:
    """Whether an input of Dynamo's graph is a parameter or buffer (or attribute) of a module, not an argument."""
    source = getattr(placeholder, "_dynamo_source", None)
    while source is not None:
        if "NNModule" in type(source).__name__ or "ParamBuffer" in type(source).__name__:
            return True
        source = getattr(source, "base", None)
    return False


def export_functional(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Functional pre-dispatch ATen of Dynamo's graph; one placeholder per input, in order.

    Where the model changes inputs in place, their new values come first among the outputs, and
    `meta["mutated_inputs"]` of the result has their positions.
    """
    exported, signature = aot_export_module(gm, list(inputs), trace_joint=False, pre_dispatch=True)
    assert isinstance(exported, fx.GraphModule)
    names = [node.name for node in exported.graph.nodes if node.op == "placeholder"]
    changed = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    exported.meta["mutated_inputs"] = tuple(names.index(name) for name in changed.values())
    return exported


def trace_to_graph(function: Callable[..., Any], *arguments: Any) -> fx.GraphModule:
    """Trace a function of pytrees of tensors to ATen on fake tensors; its placeholders are the flat arguments."""
    with fake_mode_of(torch.utils._pytree.tree_leaves(arguments)) as mode:
        fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        return make_fx(function, tracing_mode="real", pre_dispatch=True)(*fakes)


def fake_mode_of(values: Iterable[Any]) -> FakeTensorMode:
    """The mode that values are fake in; a new one where none is."""
    found = (value.fake_mode for value in values if isinstance(value, FakeTensor))
    return next(found, None) or FakeTensorMode(allow_non_fake_inputs=True)


def has_kernel_for(op: Any, device: torch.device) -> bool:
    """Whether an implementation of a custom op was registered for this type of device itself."""
    key = {"cpu": torch._C.DispatchKey.CPU, "cuda": torch._C.DispatchKey.CUDA}.get(device.type)
    return key is not None and bool(op.has_kernel_for_dispatch_key(key))


def copy_all(destinations: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into its destination, on an accelerator those that are alike with few kernels."""
    groups: dict[Any, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for into, source in zip(destinations, sources, strict=True):
        alike = into.dtype, source.dtype, into.stride() == source.stride()
        group = groups.setdefault(alike, ([], []))
        group[0].append(into)
        group[1].append(source)
    for intos, froms in groups.values():
        torch._foreach_copy_(intos, froms, non_blocking=True)


def zero_all(tensors: Sequence[torch.Tensor]) -> None:
    """Fill all tensors with 0, on an accelerator with few kernels."""
    torch._foreach_zero_(list(tensors))


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], on_code: Callable[[str], None] | None = None
) -> Callable[..., Any]:
    """Inductor's code for a graph of flat tensor inputs, called with the inputs one by one.

    `on_code` is given the path of the file that this code is in. Inductor is then asked although AOTAutograd may have
    the compiled graph in its cache, which does not say where its code is.
    """
    # Inductor's cache of compiled graphs wants a shape environment, though all sizes are static.
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
    with torch.no_grad(), tracing(TracingContext(mode)), ExitStack() as patches:
        inner: Any = compile_fx_inner
        if on_code is not None:
            patches.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
            inner = _reporting_its_code(on_code)
        compiled: Any = compile_fx(gm, list(inputs), inner_compile=inner)
    return compiled


def _reporting_its_code(on_code: Callable[[str], None]) -> Callable[..., Any]:
    """`compile_fx_inner`, which also gives `on_code` the path of the code that it wrote."""

    def inner(*args: Any, **kwargs: Any) -> Any:
        compiled = compile_fx_inner(*args, **kwargs)
        if isinstance(compiled, CompiledFxGraph):
            on_code(compiled.write_to_disk())
        return compiled

    return inner


@contextmanager
def compiled_side_by_side() -> Iterator[None]:
    """Inside, graphs compiled one after the other do not wait for their kernels; at the end all are waited for.

    Inductor waits for a graph's kernels as soon as it has written that graph's code, which leaves the interpreter
    idle while the C++ compiler works, and most cores idle while Inductor writes. Until the end nothing may be run.
    """
    with _one_at_a_time, ExitStack() as at_the_end:
        here, wait = get_ident(), AsyncCompile.wait

        def later(self: AsyncCompile, scope: dict[str, Any]) -> None:
            if get_ident() == here:
                at_the_end.callback(wait, self, scope)
            else:
                wait(self, scope)

        AsyncCompile.wait = later  # type: ignore[method-assign]
        try:
            yield
        finally:
            AsyncCompile.wait = wait  # type: ignore[method-assign]


def compile_cpp(source: str) -> CDLL:
    """The functions of a C++ source, compiled with the compiler and flags that Inductor uses, for this machine."""
    library = CppCodeCache.load(source)
    assert isinstance(library, CDLL)
    return library


def _onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """torch.nn.functional.linear of float32 on CPU by oneDNN."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


onednn_linear = _onednn_linear if torch.backends.mkldnn.is_available() else None


def is_size(placeholder: fx.Node) -> bool:
    """Whether a number among the inputs of Dynamo's graph is the size of a tensor input."""
    return type(getattr(placeholder, "_dynamo_source", None)).__name__ == "TensorPropertySource"


def tensors_of_others(
    modules: torch.nn.ModuleList, paths: Sequence[Sequence[str]], firsts: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The tensors at `paths` in every module of a list but the first, module by module.

    Where Dynamo traces this, it does not go through the modules, which takes it 3 ms a parameter. `firsts` are the
    tensors at `paths` in the first module: those of the others are read from the same places beside it.
    """
    found = []
    for module in list(modules)[1:]:
        for path in paths:
            value: Any = module
            for name in path:
                value = getattr(value, name)
            found.append(value)
    return found


def _traced_tensors_of_others(_: Any, tx: Any, modules: Any, paths: Any, firsts: Any) -> Any:
    """What Dynamo does in place of `tensors_of_others`. Inputs and guards are those that tracing it gives."""
    sources = [first.realize().source for first in firsts.realize().items]
    place = _place_of_first(modules.realize().source, sources)
    if place is None:
        function: Any = tensors_of_others
        return UserFunctionVariable(function).call_function(tx, [modules, paths, firsts], {})
    values = iter(tensors_of_others(modules.value, paths.as_python_constant(), ()))
    found, guarded = [], set()
    for number in range(1, len(modules.value)):
        beside = replace(place, index=str(number))
        for source in sources:
            moved = _moved(source, place, beside)
            for module in _modules_on_the_way(moved, beside):
                if module not in guarded:
                    guarded.add(module)
                    install_guard(module.make_guard(GuardBuilder.TYPE_MATCH))
            found.append(VariableBuilder(tx, moved)(next(values)))
    return ListVariable(found)


def _place_of_first(modules: Source | None, sources: Sequence[Source | None]) -> DictGetItemSource | None:
    """Where all of `sources` pass the first module of a list; None where one does not."""
    if modules is None or not sources:
        return None
    place = DictGetItemSource(AttrSource(modules, "_modules"), "0")
    return place if all(place in _chain(source) for source in sources) else None


def _chain(source: Source | None) -> Iterator[Source]:
    """A source, what it is read from, and so on."""
    while source is not None:
        yield source
        source = source.base if isinstance(source, ChainedSource) else None


def _moved(source: Source, old: Source, new: Source) -> Source:
    """The source with `new` in the place of `old` in its chain."""
    if source == old:
        return new
    assert isinstance(source, ChainedSource)
    return replace(source, base=_moved(source.base, old, new))


def _modules_on_the_way(source: Source, start: Source) -> Iterator[Source]:
    """The modules that `source` is read through, back to `start`."""
    for each in _chain(source):
        if "NNModule" in type(each).__name__:
            yield each
        if each == start:
            return


torch.compiler.allow_in_graph(tensors_of_others)
TorchInGraphFunctionVariable._get_handlers()[tensors_of_others] = _traced_tensors_of_others
