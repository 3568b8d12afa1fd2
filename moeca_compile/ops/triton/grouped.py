"""The grouped product: each expert's rows times its own weight, in one launch.

    out[to(p)] = activation(x[from(p)] @ W[e].T + b[e])                        or, gated,
    out[to(p)] = activation(x[from(p)] @ G[e].T + g[e]) * (x[from(p)] @ U[e].T + u[e])

for every position p of the sorted branches, where e is its expert. Rows are read from their source `from(p)` and
written to their target `to(p)`, so no separate gather or scatter is needed. Sums are in float32 and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moeca_compile._torch_private import float32_matmul_precision
from moeca_compile.ops.body_plan import NONE
from moeca_compile.ops.triton.activations import activate
from moeca_compile.ops.triton.blocks import Blocks, blocks_for
from moeca_compile.ops.triton.compaction import SortedBranches
from moeca_compile.ops.triton.operands import Operand

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Supported dtypes."""


@dataclass(frozen=True)
class Weight:
    """A weight of all experts with its bias; `transposed` if it is (inputs, outputs), as in `x @ w`."""

    weight: Operand
    bias: Operand | None
    transposed: bool

    @property
    def outputs(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def strides(self) -> tuple[int, int]:
        """Strides between outputs and between inputs."""
        first, second = self.weight.strides
        return (second, first) if self.transposed else (first, second)

    @property
    def aligned(self) -> bool:
        """Whether every row of every expert's weight begins at a multiple of 16 bytes."""
        steps = (stride * self.weight.itemsize for stride in self.strides if stride != 1)
        return self.weight.aligned and all(step % 16 == 0 for step in steps)


@triton.jit
def product_kernel(
    x: tl.tensor,
    x_row: tl.tensor,
    x_column: tl.tensor,
    order: tl.tensor,  # (M,) places by position
    ends: tl.tensor,  # (E,) where each expert's positions end
    weight: tl.tensor,  # (E,) addresses
    bias: tl.tensor,
    gated_weight: tl.tensor,
    gated_bias: tl.tensor,
    weight_out: tl.tensor,
    weight_in: tl.tensor,
    out: tl.tensor,
    experts: tl.tensor,
    columns: tl.tensor,
    depth: tl.tensor,
    k: tl.tensor,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    KIND: tl.constexpr,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    ALIGNED: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDENED: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """One program computes ROWS positions of one expert by COLUMNS outputs. Programs past the last tile end at once.

    With GATHER it reads the row of a position's place, else row p. With SCATTER it writes to the place, else to row
    p.
    """
    expert, first, end = _tile(ends, tl.program_id(1), experts, EXPERTS, ROWS)
    if first < 0:
        return
    position = first + tl.arange(0, ROWS)
    live = position < end
    position = tl.where(live, position, first)  # past the expert's rows: the first row again, not written
    place = tl.load(order + position) if GATHER or SCATTER else position
    row = (place // k if GATHER else position).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    near = tl.where(inside, column, 0)  # so that loads need no mask
    inner = tl.arange(0, DEPTH)
    xs = x + row[:, None] * x_row + inner[None, :] * x_column
    span = near[None, :] * weight_out + inner[:, None] * weight_in
    ws = _address(weight, expert, x.dtype.element_ty, ALIGNED) + span
    value = tl.zeros([ROWS, COLUMNS], tl.float32)
    if GATED:
        us = _address(gated_weight, expert, x.dtype.element_ty, ALIGNED) + span
        factor = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            a = tl.load(xs)
            w = tl.load(ws)
        else:
            there = inner < depth - start
            a = tl.load(xs, mask=there[None, :], other=0.0)
            w = tl.load(ws, mask=there[:, None], other=0.0)
        if WIDENED:
            a = a.to(tl.float32)
            w = w.to(tl.float32)
        value = tl.dot(a, w, value, input_precision=PRECISION)
        if GATED:
            u = tl.load(us) if EVEN else tl.load(us, mask=(inner < depth - start)[:, None], other=0.0)
            factor = tl.dot(a, u.to(a.dtype), factor, input_precision=PRECISION)
            us += DEPTH * weight_in
        xs += DEPTH * x_column
        ws += DEPTH * weight_in
    if BIAS:
        value += tl.load(_address(bias, expert, x.dtype.element_ty, False) + near).to(tl.float32)[None, :]
    value = activate(value, KIND)
    if GATED:
        if BIAS:
            factor += tl.load(_address(gated_bias, expert, x.dtype.element_ty, False) + near).to(tl.float32)[None, :]
        value *= factor
    to = (place if SCATTER else position).to(tl.int64)
    target = out + to[:, None] * columns + column[None, :]
    tl.store(target, value.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def _tile(
    ends: tl.tensor, tile: tl.tensor, experts: tl.tensor, EXPERTS: tl.constexpr, ROWS: tl.constexpr
) -> tl.tensor:
    """(expert, first position, end of the expert's positions) of a tile; first is -1 past the last tile."""
    e = tl.arange(0, EXPERTS)
    known = e < experts
    end = tl.load(ends + e, mask=known, other=0)
    start = tl.load(ends + e - 1, mask=known & (e > 0), other=0)
    tiles = tl.where(known, (end - start + ROWS - 1) // ROWS, 0)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((known & (last <= tile)).to(tl.int32), 0)
    mine = e == expert
    within = tile - tl.sum(tl.where(mine, last - tiles, 0), 0)
    first = tl.sum(tl.where(mine, start, 0), 0) + within * ROWS
    return expert, tl.where(expert < experts, first, -1), tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _address(table: tl.tensor, expert: tl.tensor, DTYPE: tl.constexpr, ALIGNED: tl.constexpr) -> tl.tensor:
    """The pointer to an expert's tensor.

    The alignment is stated for the pointer. Triton forgets it at the cast if it is stated for the number, and loads
    are then narrow and not asynchronous.
    """
    pointer = tl.load(table + expert).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def grouped_product(
    x: Tensor,
    branches: SortedBranches,
    weights: tuple[Weight, ...],
    activation: str = NONE,
    gather: bool = False,
    into: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Tensor:
    """The product of every position's row with its expert's weight.

    Args:
        x: (T, K) rows of the layer if `gather`, else (M, K) rows by position; any strides.
        branches: which rows go to which expert.
        weights: one; or two of equal shapes and strides for a gated product, the one with the activation first.
        activation: its name in `ops.triton.activations`.
        gather: whether `x` has the rows of the layer.
        into: (M, N) contiguous, where outputs are written by place; None for a new tensor by position.
        blocks: block sizes; None for those of the table.

    Returns:
        `into`, or (M, N) in the dtype of x. Rows of places and positions that do not run are not written.
    """
    first, gate = weights[0], weights[-1]
    depth, columns = x.shape[1], first.outputs
    aligned = all(each.aligned for each in weights)
    blocks = blocks or blocks_for(x.dtype, branches.capacity, branches.experts, len(weights) == 2, columns)
    if not aligned:
        blocks = blocks.narrowed()
    out = x.new_empty(branches.capacity, columns) if into is None else into
    product_kernel[_grid(branches, columns, blocks)](
        x,
        *x.stride(),
        branches.order,
        branches.ends,
        first.weight.table,
        first.bias.table if first.bias else None,
        gate.weight.table,
        gate.bias.table if gate.bias else None,
        *first.strides,
        out,
        branches.experts,
        columns,
        depth,
        branches.k,
        GATED=len(weights) == 2,
        BIAS=first.bias is not None,
        KIND=activation,
        GATHER=gather,
        SCATTER=into is not None,
        ALIGNED=aligned,
        EVEN=depth % blocks.depth == 0,
        PRECISION=precision(x.dtype),
        # On a CPU, Triton's interpreter runs this, and it multiplies bfloat16 as integers.
        WIDENED=not x.is_cuda,
        EXPERTS=triton.next_power_of_2(branches.experts),
        ROWS=blocks.rows,
        COLUMNS=blocks.columns,
        DEPTH=blocks.depth,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    return out


def _grid(branches: SortedBranches, columns: int, blocks: Blocks) -> tuple[int, int]:
    """Programs for the most tiles that there can be: each expert but one may add a partial tile."""
    tiles = min(branches.capacity, triton.cdiv(branches.capacity, blocks.rows) + branches.experts - 1)
    return triton.cdiv(columns, blocks.columns), tiles


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as torch's own products, by torch.set_float32_matmul_precision or `allow_tf32`."""
    exact = dtype != torch.float32 or float32_matmul_precision() == "highest"
    return "ieee" if exact else "tf32"
