"""For idioms whose method is handed the rows x (T, D), the expert ids and the weights of their branches.

Ids and weights may be flat, (T * k,) or (T * k, 1) with a token's branches beside each other, or (T, k).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moeca_compile._torch_private import tensors_of_others
from moeca_compile.capture.dataflow import Value
from moeca_compile.capture.idioms.base import Facts, Layout, Trusted
from moeca_compile.capture.numerics import (
    UntrustedError,
    close,
    require_row_wise,
    tolerance_for,
    with_random_parameters,
)
from moeca_compile.capture.structure import Path, named_tensors, structure, tensor_paths, unlike
from moeca_compile.ops import markers  # noqa: F401  (defines the ops)

TRIAL_ROWS = 16
TRIAL_SEED = 0

# What recognizers ask about the experts


def expert_call(result: Value) -> Value | None:
    """The one call of an expert, `self.<experts>[i](rows)`, that `result` is made from, or None."""
    calls = [value for value in result.ancestors() if value.kind == "call" and _is_expert(value)]
    return calls[0] if len(calls) == 1 and len(calls[0].operands) == 2 else None


def list_of(call: Value) -> str:
    """The attribute of self that holds the experts of an expert call."""
    return call.operands[0].operands[0].name


def rows_of(call: Value) -> Value:
    """The rows that an expert call is given."""
    return call.operands[1]


def _is_expert(call: Value) -> bool:
    if call.name not in ("", "forward") or not call.operands:
        return False
    callee = call.operands[0]
    source = callee.operands[0] if callee.kind in ("index", "element") else None
    return source is not None and source.kind == "attribute" and source.operands[0].kind == "self"


@dataclass(frozen=True)
class Routed:
    """The roles in a recognized method.

    experts: the attribute of self that holds the list of experts
    parameters: all parameters in order, without self
    x, index, weight: which of them are the rows (T, D), the expert ids, the weights
    """

    experts: str
    parameters: tuple[str, ...]
    x: str
    index: str
    weight: str

    def facts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Facts | str:
        """Traceable: k, D, dtypes, device and layouts of a call as constants, or why it is not supported."""
        x, index, weight = self._roles(args, kwargs)
        if x.dim() != 2:
            return f"`{self.x}` has {x.dim()} dimensions where rows (tokens, width) are expected"
        if x.shape[0] == 0:
            return f"`{self.x}` has no rows"
        # len(range()) makes a plain number of a symbolic size; the number of branches and the width never vary.
        top_k, width = len(range(index.numel() // x.shape[0])), len(range(x.shape[1]))
        if top_k * x.shape[0] != index.numel() or index.numel() != weight.numel():
            return f"`{self.index}` and `{self.weight}` do not hold one entry for each branch"
        layouts = tuple((tensor.dtype, tensor.dim(), _is_flat(tensor, x)) for tensor in (index, weight))
        return top_k, width, x.dtype, x.device, *layouts

    def layout(self, module: nn.Module) -> Layout:
        experts = getattr(module, self.experts, None)
        if not isinstance(experts, nn.ModuleList) or len(experts) == 0:
            raise UntrustedError(f"self.{self.experts} is no ModuleList of experts")
        reason = unlike(experts)
        if reason:
            raise UntrustedError(reason)
        return Layout((tensor_paths(experts[0]),), (len(experts), structure(experts[0])))

    def compared(self, original: Callable[..., Tensor], module: nn.Module, facts: Facts) -> torch.dtype:
        experts = getattr(module, self.experts)
        trials = list(self._trials(facts, len(experts)))
        if not _tells_something(experts, trials[0].x):
            module = with_random_parameters(module)
            experts = getattr(module, self.experts)
        body = copy.deepcopy(experts[0])  # parameters are exchanged in it, which other threads must not see
        tolerance = tolerance_for([trials[0].x, *module.parameters()])
        for trial in trials:
            require_row_wise(body, [trial.x], lambda: (tensor for _, tensor in named_tensors(body)), tolerance)
            got = _without_side_effects(original, module, trial)
            want = _meaning(body, experts, trial)
            if got.shape != want.shape:
                raise UntrustedError(f"it returns shape {tuple(got.shape)} where {tuple(want.shape)} is expected")
            if not close(got, want, tolerance):
                raise UntrustedError("its result is not the sum of its experts' weighted outputs")
        return got.dtype

    def equivalent(
        self, trusted: Trusted, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Traceable: what the method returns, (T, D), through the marker ops."""
        x, index, weight = self._roles(args, kwargs)
        branches = (x.shape[0], len(range(index.numel() // x.shape[0])))
        index, weight = index.reshape(branches), weight.reshape(branches)
        (paths,), dtype = trusted
        experts = getattr(module, self.experts)
        body_out = experts[0](torch.ops.moeca.expert_rows(x))
        firsts = [tensor_at(experts[0], path) for path in paths]
        params = firsts + tensors_of_others(experts, paths, firsts)
        index = index.to(torch.int64) if index.dtype != torch.int64 else index
        index, weight = in_range(index, weight, len(experts))
        out = torch.ops.moeca.experts_fixed_k(x, index, weight, body_out, params, len(experts))
        return out.to(dtype) if out.dtype != dtype else out

    def _roles(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        given = dict(zip(self.parameters, args, strict=False))
        given.update(kwargs)
        return [given[role] for role in (self.x, self.index, self.weight)]

    def _trials(self, facts: Facts, num_experts: int) -> Iterator[_Trial]:
        """Random calls, first without a token for the last expert, then without one for the first."""
        top_k, width, dtype, device, index_layout, weight_layout = facts
        generator = torch.Generator().manual_seed(TRIAL_SEED)
        usable = max(top_k, num_experts - 1)
        for first in sorted({0, num_experts - usable}):
            index = first + _choices(usable, top_k, generator)
            x = torch.randn(len(index), width, generator=generator).to(device, dtype)
            weight = 0.25 + torch.rand(index.shape, generator=generator)
            given = {
                self.x: x,
                self.index: _laid_out(index.to(device), *index_layout),
                self.weight: _laid_out(weight.to(device), *weight_layout),
            }
            arguments = tuple(given[name] for name in self.parameters)
            yield _Trial(arguments, x, index.to(device), given[self.weight].reshape(index.shape))


def tensor_at(module: Any, path: Path) -> Tensor:
    """Traceable: the parameter or buffer at `path`; `module` itself where that is empty."""
    found: Any = module
    for name in path:
        found = getattr(found, name)
    return found


def in_range(index: Tensor, weight: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Traceable: ids and weights in which a branch that no expert takes is one of expert 0 with weight 0."""
    missed = (index < 0).logical_or(index >= num_experts)  # ops that later passes follow token by token
    return index.masked_fill(missed, 0), weight.masked_fill(missed, 0)


def _is_flat(tensor: Tensor, x: Tensor) -> bool:
    return True if tensor.shape[0] != x.shape[0] else False  # noqa: SIM210  (decides symbolic sizes)


# What is tried before a layer is trusted


@dataclass(frozen=True)
class _Trial:
    """Random arguments of the original method, in its order; the same as x (T, D), index, weight (T, k)."""

    arguments: tuple[Tensor, ...]
    x: Tensor
    index: Tensor
    weight: Tensor


def _meaning(body: nn.Module, experts: nn.ModuleList, trial: _Trial) -> Tensor:
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


def _without_side_effects(original: Callable[..., Tensor], module: nn.Module, trial: _Trial) -> Tensor:
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


def _choices(num_experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """Expert ids (T, k), distinct in a row: some rows at random, the rest so that every expert has one."""
    at_random = torch.rand(TRIAL_ROWS, num_experts, generator=generator).topk(top_k).indices
    rows = -(-num_experts // top_k)
    every = torch.arange(rows * top_k).reshape(rows, top_k) % num_experts
    return torch.cat([at_random, every])


def _laid_out(branches: Tensor, dtype: torch.dtype, dims: int, flat: bool) -> Tensor:
    """(T, k) as the real call has it: (T * k, 1, ...) or (T, k, 1, ...), with `dims` dimensions."""
    leading = (branches.numel(),) if flat else tuple(branches.shape)
    return branches.reshape((*leading, 1, 1, 1)[:dims]).to(dtype)
