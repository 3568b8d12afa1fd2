"""For idioms whose method is handed the rows x (T, D), the expert ids and the weights of their branches.

Ids and weights may be flat, (T * k,) or (T * k, 1) with a token's branches beside each other, or (T, k).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moeca_compile.capture.dataflow import Value
from moeca_compile.capture.idioms.base import Facts, Path, Recognised, Trial, Trusted
from moeca_compile.ops import markers  # noqa: F401  (defines the ops)

TRIAL_ROWS = 16
TRIAL_SEED = 0

# What recognisers ask about the experts


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


# What is traced


def facts(recognised: Recognised, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Facts | str:
    """Traceable: k, D, dtypes, device and layouts of a call as constants, or why it is not supported."""
    x, index, weight = _roles(recognised, args, kwargs)
    if x.dim() != 2:
        return f"`{recognised.x}` has {x.dim()} dimensions where rows (tokens, width) are expected"
    if x.shape[0] == 0:
        return f"`{recognised.x}` has no rows"
    # len(range()) makes a plain number of a symbolic size; the number of branches and the width never vary.
    top_k, width = len(range(index.numel() // x.shape[0])), len(range(x.shape[1]))
    if top_k * x.shape[0] != index.numel() or index.numel() != weight.numel():
        return f"`{recognised.index}` and `{recognised.weight}` do not hold one entry for each branch"
    layouts = tuple((tensor.dtype, tensor.dim(), _is_flat(tensor, x)) for tensor in (index, weight))
    return top_k, width, x.dtype, x.device, *layouts


def equivalent(
    recognised: Recognised, trusted: Trusted, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Traceable: what the method returns, (T, D), through the marker ops."""
    x, index, weight = _roles(recognised, args, kwargs)
    branches = (x.shape[0], len(range(index.numel() // x.shape[0])))
    experts = getattr(module, recognised.experts)
    return emit_experts(experts, trusted, (x,), index.reshape(branches), weight.reshape(branches))


def emit_experts(
    experts: nn.ModuleList, trusted: Trusted, rows: tuple[Tensor, ...], index: Tensor, weight: Tensor
) -> Tensor:
    """Traceable: one MoE layer as markers. rows: x and any further per-token inputs of an expert."""
    paths, dtype = trusted
    body_out = experts[0](*[torch.ops.moeca.expert_rows(each) for each in rows])
    params = [_get(expert, path) for expert in experts for path in paths]
    index = index.to(torch.int64) if index.dtype != torch.int64 else index
    out = torch.ops.moeca.experts(rows[0], index, weight, body_out, params, len(experts))
    return out.to(dtype) if out.dtype != dtype else out


def _roles(recognised: Recognised, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    given = dict(zip(recognised.parameters, args, strict=False))
    given.update(kwargs)
    return [given[role] for role in (recognised.x, recognised.index, recognised.weight)]


def _is_flat(tensor: Tensor, x: Tensor) -> bool:
    return True if tensor.shape[0] != x.shape[0] else False  # noqa: SIM210  (decides symbolic sizes)


def _get(module: nn.Module, path: Path) -> Tensor:
    found: Any = module
    for name in path:
        found = getattr(found, name)
    return found


# What is tried before a layer is trusted


def trial(recognised: Recognised, facts: Facts, num_experts: int) -> Iterator[Trial]:
    """Random calls, first without a token for the last expert, then without one for the first."""
    top_k, width, dtype, device, index_layout, weight_layout = facts
    generator = torch.Generator().manual_seed(TRIAL_SEED)
    usable = max(top_k, num_experts - 1)
    for first in sorted({0, num_experts - usable}):
        index = first + _choices(usable, top_k, generator)
        x = torch.randn(len(index), width, generator=generator).to(device, dtype)
        weight = 0.25 + torch.rand(index.shape, generator=generator)
        given = {
            recognised.x: x,
            recognised.index: _laid_out(index.to(device), *index_layout),
            recognised.weight: _laid_out(weight.to(device), *weight_layout),
        }
        arguments = tuple(given[name] for name in recognised.parameters)
        yield Trial(arguments, x, index.to(device), given[recognised.weight].reshape(index.shape))


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
