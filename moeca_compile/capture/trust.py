"""Before a layer's equivalent is used, it is checked against the original method, on random inputs, in eager.

The meaning that is checked is the marker op's (ops/markers.py), as a plain loop: the body of expert 0 with
each expert's own parameters, run on single choices, weighted and summed. Runs once for each class, method,
structure of the experts and kind of call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moeca_compile.capture.idioms.base import Facts, Idiom, Recognised, Trial, Trusted
from moeca_compile.capture.structure import named_tensors, structure, tensor_paths, unlike

Original = Callable[..., Tensor]
Verdict = torch.dtype | str
"""The dtype of what a trusted method returns, or why it is not trusted."""

# Relative error (L2) between two ways of computing the same: sums in another order, products of other shapes.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
_TOLERANCE_TF32 = 5e-3  # float32 on a GPU, where products may be taken in TF32

_verdicts: WeakKeyDictionary[type, dict[Any, Verdict]] = WeakKeyDictionary()


class UntrustedError(Exception):
    """The equivalent may not stand for the original; the message says why."""


def vouch(
    idiom: Idiom, recognised: Recognised, original: Original, module: nn.Module, facts: Facts
) -> Trusted:
    """What the equivalent of `original` on `module` needs, for such calls. Raises UntrustedError."""
    experts = getattr(module, recognised.experts, None)
    if not isinstance(experts, nn.ModuleList) or len(experts) == 0:
        raise UntrustedError(f"self.{recognised.experts} is no ModuleList of experts")
    reason = unlike(experts)
    if reason:
        raise UntrustedError(reason)
    verdicts = _verdicts.setdefault(type(module), {})
    key = (original, recognised, len(experts), structure(experts[0]), facts, _autocast())
    if key not in verdicts:
        verdicts[key] = _check(idiom, recognised, original, module, facts)
    verdict = verdicts[key]
    if isinstance(verdict, str):
        raise UntrustedError(verdict)
    return tensor_paths(experts[0]), verdict


def forget_verdicts() -> None:
    """Forget what was checked, so that it is checked again. For tests."""
    _verdicts.clear()


def _check(
    idiom: Idiom, recognised: Recognised, original: Original, module: nn.Module, facts: Facts
) -> Verdict:
    """Compare original and meaning; any error of the model's own code on the random rows is a verdict too."""
    devices = {tensor.device for tensor in module.parameters() if tensor.device.type == "cuda"}
    # Experts may be compiled themselves; a compilation inside this one is not wanted.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices):
        try:
            return _compare(idiom, recognised, original, module, facts)
        except UntrustedError as refusal:
            return str(refusal)
        except Exception as error:
            return f"trying it on random rows raised {type(error).__name__}: {error}"


def _compare(
    idiom: Idiom, recognised: Recognised, original: Original, module: nn.Module, facts: Facts
) -> torch.dtype:
    experts = getattr(module, recognised.experts)
    trials = list(idiom.trial(recognised, facts, len(experts)))
    if not _tells_something(experts, trials[0].x):
        module = _with_random_parameters(module)
        experts = getattr(module, recognised.experts)
    body = copy.deepcopy(experts[0])  # parameters are exchanged in it, which other threads must not see
    tolerance = _tolerance([trials[0].x, *module.parameters()])
    for trial in trials:
        _require_row_wise(body, trial.x, tolerance)
        got = _without_side_effects(original, module, trial)
        want = meaning(body, experts, trial)
        if got.shape != want.shape:
            raise UntrustedError(f"it returns shape {tuple(got.shape)} where {tuple(want.shape)} is expected")
        if not _close(got, want, tolerance):
            raise UntrustedError("its result is not the sum of its experts' weighted outputs")
    return got.dtype


def meaning(body: nn.Module, experts: nn.ModuleList, trial: Trial) -> Tensor:
    """The marker ops' meaning as a plain loop: (T, Do) in at least float32. body: a copy of expert 0."""
    out = torch.zeros(0)
    for number, expert in enumerate(experts):
        token, slot = torch.where(trial.index == number)
        branch = functional_call(body, dict(named_tensors(expert)), (trial.x[token],))
        if number == 0:
            dtype = torch.promote_types(branch.dtype, torch.float32)
            out = branch.new_zeros(len(trial.x), branch.shape[1], dtype=dtype)
        out.index_add_(0, token, branch.to(out.dtype) * trial.weight[token, slot, None].to(out.dtype))
    return out


def _require_row_wise(body: nn.Module, x: Tensor, tolerance: float) -> None:
    """An expert's output for a row may depend on that row and its parameters alone."""
    before = [tensor.clone() for _, tensor in named_tensors(body)]
    whole = body(x)
    if not isinstance(whole, Tensor) or whole.dim() != 2 or len(whole) != len(x):
        raise UntrustedError("an expert does not turn rows (tokens, width) into rows")
    if not _close(body(x), whole, tolerance):
        raise UntrustedError("an expert is random or changes from call to call")
    if any(not torch.equal(old, new) for old, (_, new) in zip(before, named_tensors(body), strict=True)):
        raise UntrustedError("an expert changes its own parameters or buffers")
    order = torch.randperm(len(x), device=x.device)
    parts = torch.cat([body(x[:5]), body(x[5:])])
    if not _close(body(x[order]), whole[order], tolerance) or not _close(parts, whole, tolerance):
        raise UntrustedError("an expert's output for a token depends on the other tokens")


def _without_side_effects(original: Original, module: nn.Module, trial: Trial) -> Tensor:
    arguments = [argument.clone() for argument in trial.arguments]
    result = original(module, *arguments)
    if any(not torch.equal(old, new) for old, new in zip(trial.arguments, arguments, strict=True)):
        raise UntrustedError("it changes its arguments")
    if not isinstance(result, Tensor):
        raise UntrustedError(f"it returns a {type(result).__name__}, not a tensor")
    return result


def _tells_something(experts: nn.ModuleList, x: Tensor) -> bool:
    """Whether the parameters are fit for a comparison: not zero (as before training), not infinite."""
    outputs = [expert(x[:1]) for expert in experts]
    return all(isinstance(out, Tensor) and bool(out.any()) and bool(out.isfinite().all()) for out in outputs)


def _with_random_parameters(module: nn.Module) -> nn.Module:
    copied = copy.deepcopy(module)
    for parameter in copied.parameters():
        if parameter.is_floating_point():
            parameter.normal_(std=max(parameter.shape[-1:], default=1) ** -0.5)
    return copied


def _close(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Whether two results are the same but for rounding; infinities and NaN are not."""
    got, want = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (got, want))
    return bool((got - want).norm() <= tolerance * want.norm())


def _tolerance(tensors: list[Tensor]) -> float:
    """The rounding of the coarsest floating point type that these tensors are computed in."""
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    dtypes |= {dtype for _, dtype in _autocast()}
    allowed = max(_TOLERANCE.get(dtype, _TOLERANCE[torch.bfloat16]) for dtype in dtypes)
    return max(allowed, _TOLERANCE_TF32) if any(tensor.is_cuda for tensor in tensors) else allowed


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    """The devices on which autocast is on now, with its dtype."""
    on = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
    return tuple((device, torch.get_autocast_dtype(device)) for device in on)
