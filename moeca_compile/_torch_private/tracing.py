"""What Dynamo is tracing at the moment, and for whom."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch import nn

from moeca_compile._torch_private.kernels import float32_matmul_precision
from moeca_compile._torch_private.lookup import Private

_TRANSLATOR = Private(
    "torch._dynamo.symbolic_convert.InstructionTranslator",
    "nothing is captured or cached: models run as under plain torch.compile",
    required=True,
)


def compilation() -> Any:
    """Dynamo's OutputGraph of the compilation under way; None outside of one."""
    try:
        return _TRANSLATOR.value.current_tx().output
    except AttributeError:
        return None


def tracing_backend() -> Iterator[Any]:
    """The backend that Dynamo is tracing for, then what each of torch's wrappers around it holds."""
    return _unwrapped(getattr(compilation(), "compiler_fn", None))


def traces_for_us() -> bool:
    """Whether Dynamo is tracing for a backend of ours (`_moeca_backend = True`), within whatever wrappers."""
    return any(map(_is_ours, tracing_backend()))


def options_for_ours(backend: Any) -> Mapping[str, Any] | None:
    """The options that a backend of ours is given, within whatever wrappers; None where it is not one of ours."""
    within = list(_unwrapped(backend))
    if not any(map(_is_ours, within)):
        return None
    found: Mapping[str, Any] = getattr(_made_by_torch_compile(within), "kwargs", {}).get("options", {})
    return found


def _is_ours(backend: Any) -> bool:
    return getattr(backend, "_moeca_backend", False) is True


def hand_over_whole() -> None:
    """Have Dynamo hand over the graph as one, which DDP's backend would split to send gradients early.

    For graphs without gradients. A split may fall between a marker op and the expert's body before it.
    """
    splitting = getattr(getattr(compilation(), "compiler_fn", None), "__self__", None)
    whole = getattr(splitting, "backend_compile_fn", None)
    if whole is not None:
        compilation().compiler_fn = whole


def traced_wrapper() -> Any:
    """The object that `torch.compile` made for this compilation, which lives as long as the compiled model.

    None where there is none: the graph was compiled by `torch._dynamo.optimize(backend)`.
    """
    return _made_by_torch_compile(tracing_backend())


def wrapper_of(compiled: Any) -> Any:
    """The same object, from what `torch.compile` of a module or function returned; None for anything else."""
    context = getattr(compiled, "dynamo_ctx", None)
    callback = getattr(context, "callback", None) if context is not None else _callback_within(compiled)
    return _made_by_torch_compile(_unwrapped(callback))


def _callback_within(compiled: Any) -> Any:
    """The callback of a compiled function, which is a variable of the function around it; else None."""
    cells = getattr(compiled, "__closure__", None)
    if not hasattr(compiled, "_torchdynamo_orig_callable") or not cells:
        return None
    names = compiled.__code__.co_freevars
    return next((cell.cell_contents for name, cell in zip(names, cells, strict=True) if name == "callback"), None)


def _unwrapped(backend: Any) -> Iterator[Any]:
    while backend is not None:
        yield backend
        backend = _held_by(backend)


def _held_by(backend: Any) -> Any:
    """DDP's backend is a method of an object that splits graphs; the others keep theirs as attributes."""
    for holder in (backend, getattr(backend, "__self__", None)):
        for name in ("_torchdynamo_orig_backend", "compiler_fn", "backend_compile_fn"):
            held = getattr(holder, name, None)
            if held is not None:
                return held
    return None


def _made_by_torch_compile(backends: Iterable[Any]) -> Any:
    return next((each for each in backends if type(each).__name__ == "_TorchCompileWrapper"), None)


_INSTEAD = {
    "<function sdp_kernel ": "; use torch.nn.attention.sdpa_kernel in place of torch.backends.cuda.sdp_kernel",
}
"""What to write in place of a function that Dynamo does not trace, by how it names that function."""


def graph_break() -> tuple[str, str] | None:
    """(file:line, reason) where Dynamo ends the graph that it is handing over before the function's end."""
    try:
        reason = compilation().compile_subgraph_reason
        if reason is None or not reason.graph_break:
            return None
        frame = reason.user_stack[-1] if reason.user_stack else None
        where = f"{frame.filename}:{frame.lineno}" if frame else "unknown"
        advice = next((text for name, text in _INSTEAD.items() if name in reason.reason), "")
        return where, reason.reason.split("\n")[0] + advice
    except AttributeError:
        return None


def root_module() -> nn.Module | None:
    """The module whose forward Dynamo is tracing: the first argument of the outermost frame."""
    try:
        translator = compilation().root_tx
        value = first_argument(translator.f_code, translator.f_locals)
    except AttributeError:
        return None
    value = getattr(value, "value", value)
    return value if isinstance(value, nn.Module) else None


def traced_code() -> CodeType | None:
    """The code of the function that Dynamo is compiling."""
    code = getattr(getattr(compilation(), "root_tx", None), "f_code", None)
    return code if isinstance(code, CodeType) else None


def traced_self(identity: int) -> Any:
    """The object of this id() that is `self` in the function that Dynamo is tracing.

    The id may be passed to a function under `torch.compiler.assume_constant_result` in every version of torch, with
    a guard on it; the object itself may not in torch 2.11.
    """
    try:
        found = compilation().current_tx.symbolic_locals["self"].realize().value
        if id(found) == identity:
            return found
    except (AttributeError, KeyError):
        pass
    return next(each for each in gc.get_objects() if id(each) == identity)


def traced_scope() -> dict[str, Any]:
    """The variables of the function that Dynamo is tracing, by the names that its sources have for them."""
    output = compilation()
    return {"L": output.local_scope, "G": output.global_scope}


def first_argument(code: Any, values: Any) -> Any:
    """The value of a function's first parameter among its local variables; None where it has none."""
    names = code.co_varnames[: code.co_argcount]
    return values.get(names[0]) if names else None


def traced_anew(wrapper: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper without the marks by which Dynamo skips what it wraps, such as a function under no_grad."""
    for mark in [name for name in vars(wrapper) if name.startswith("_torchdynamo")]:
        delattr(wrapper, mark)
    return wrapper


def numeric_modes() -> tuple[Any, ...]:
    """Global modes that the meaning of a traced graph depends on, and that Dynamo guards."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return *autocast, torch.get_default_dtype(), float32_matmul_precision()
