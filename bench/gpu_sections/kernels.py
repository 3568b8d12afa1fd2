"""How near the kernels are to what the device can do: products to a dense product, row work to a plain copy.

A router is held against the ops that it stands for: those of ATen, and what Inductor makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_sections import ops
from bench.gpu_sections.common import Bench, Row, milliseconds
from moeca_compile.ops.triton import fallback_refused

ROWS = (8192, 32768, 131072)
"""Rows of a grouped product: what a full step of 32, 64 and 512 pictures of 256 tokens has at top-1."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


grouped_mm: Any = getattr(F, "grouped_mm", getattr(torch, "_grouped_mm", None))
"""torch's grouped product: public from 2.10 on."""

TORCH_SORTED = "torch grouped_mm, rows sorted before"
TORCH_WHOLE = "torch grouped_mm, with sort, gather and scatter"
"""The second does what the op of ours does, on weights that are packed already."""


def run(bench: Bench) -> Iterator[None]:
    yield
    for rows in (64,) if bench.small else ROWS:
        for width, hidden, experts in ((8, 16, 4),) if bench.small else ((384, 768, 16), (1024, 2048, 16)):
            what = f"{rows} rows, {width}x{hidden}, {experts} experts"
            bench.attempt("kernels", what, 8, partial(products, bench, what, rows, width, hidden, experts))
    for tokens in (64,) if bench.small else (8192, 32768):
        bench.attempt("kernels", f"router of {tokens} tokens", 8, partial(routers, bench, tokens))
    for batch in (2,) if bench.small else (32, 128):
        bench.attempt("kernels", f"row work, batch {batch}", 8, partial(row_work, bench, batch))


def products(bench: Bench, what: str, rows: int, width: int, hidden: int, experts: int) -> None:
    """The op of one linear layer an expert, sorting and gathering included, against a dense product of its FLOPs."""
    make = ops.Make(ops.TINY, bench.device, bench.dtype)
    x, index = make.normal(rows, width), make.distinct(1, experts, rows)
    weights = [make.normal(hidden, width, scale=width**-0.5) for _ in range(experts)]
    key = ops.registered(linear, 1)
    dense = milliseconds(lambda: x @ weights[0].t(), bench.device)
    flops = 2 * rows * width * hidden
    op = ops.kernel("fixed_k_outputs", bench.device)
    found: dict[str, Callable[[], Any]] = {"moeca": lambda: op([x], index, weights, experts, key, hidden)}
    if bench.dtype is torch.bfloat16 and grouped_mm is not None:
        found |= of_torch(bench, x, index, torch.stack(weights))
    bench.emit(_product("dense product", what, dense, flops, dense))
    for name, function in found.items():
        with fallback_refused():
            bench.emit(_product(name, what, milliseconds(function, bench.device), flops, dense))
    for name, function in by_blocks(bench, x, index, weights):
        products = 2 if name.startswith("gated") else 1
        time = milliseconds(function, bench.device)
        bench.emit(_product(name, what, time, products * flops, products * dense))


def of_torch(bench: Bench, x: Tensor, index: Tensor, packed: Tensor) -> dict[str, Callable[[], Any]]:
    """torch's grouped product of packed weights (E, hidden, width): alone, and with the sort and the gather."""
    weight = packed.transpose(1, 2)
    order = index.flatten().sort(stable=True)
    ends = torch.searchsorted(order.values, torch.arange(len(packed), device=x.device), right=True).to(torch.int32)
    x_sorted = x[order.indices]
    found: dict[str, Callable[[], Any]] = {TORCH_SORTED: lambda: grouped_mm(x_sorted, weight, offs=ends)}
    if bench.device.type == "cuda":  # on a CPU the sort is a kernel in the interpreter, which says nothing
        from moeca_compile.ops.triton.compaction import sort_by_expert
        from moeca_compile.ops.triton.rows import by_place

        def whole() -> Tensor:
            branches = sort_by_expert(index, None, len(packed), 1)
            return by_place(grouped_mm(x.index_select(0, branches.rows()), weight, offs=branches.ends), branches)

        found[TORCH_WHOLE] = whole
    return found


def _product(name: str, what: str, time: float, flops: int, dense: float) -> Row:
    note = f"{flops / time / 1e9:.0f} TFLOP/s" if time else ""
    return Row("kernels", f"{name}: {what}", time, "ms", ratio=dense / time, against="dense product", note=note)


def by_blocks(
    bench: Bench, x: Tensor, index: Tensor, weights: list[Tensor]
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Our product of sorted rows by other blocks than the table's; and gated, by those of the table and by others."""
    from moeca_compile.ops.triton.activations import SILU
    from moeca_compile.ops.triton.blocks import Blocks
    from moeca_compile.ops.triton.compaction import sort_by_expert
    from moeca_compile.ops.triton.grouped import Weight, grouped_product
    from moeca_compile.ops.triton.operands import operand

    weight, branches = Weight(operand(weights), None, False), sort_by_expert(index, None, len(weights), 1)
    columns = (32,) if bench.small else (64, 128, 256)
    for each in columns:
        block = Blocks(128, each, 64, 8, 3)
        run = partial(grouped_product, x, branches, (weight,), gather=True, blocks=block)
        yield f"one weight by 128x{each}x64", run
    for each in columns[:2]:
        block = Blocks(128, each, 64, 8, 3)
        run = partial(grouped_product, x, branches, (weight, weight), SILU, gather=True, blocks=block)
        yield f"gated by 128x{each}x64", run


def routers(bench: Bench, tokens: int) -> None:
    """DSMoE's router of 16 experts in two groups: its kernel, and the ops that it replaces."""
    base = ops.Sizes(samples=1, tokens=tokens)
    arguments = ops.Make(base, bench.device, torch.float32).choose_experts()
    logits, bias = arguments[:2]
    compiled = spelled if bench.small else torch.compile(spelled, dynamic=False)
    ours = ops.kernel("choose_experts", bench.device)
    ways: dict[str, Callable[[], Any]] = {
        "ATen": lambda: ops.routing.choose_experts(*arguments),
        "Inductor": lambda: compiled(logits, bias),
        "moeca": lambda: ours(*arguments),
    }
    times = {name: milliseconds(way, bench.device) for name, way in ways.items()}
    for name, time in times.items():
        what = f"router of {tokens} tokens, {name}"
        bench.emit(Row("kernels", what, time, "ms", ratio=times["ATen"] / time, against="ATen's ops"))


def spelled(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The same router in the ops that Inductor gets where there is no kernel for it."""
    scores = logits.sigmoid()
    by_group = (scores + bias).unflatten(-1, (2, -1))
    goodness = ops.selection.topk(by_group, 2)[0].sum(-1)
    kept = ops.selection.mark(torch.zeros_like(goodness), ops.selection.topk(goodness, 1)[1], 1.0)
    ids = ops.selection.topk(by_group.masked_fill(kept[..., None] == 0, 0.0).flatten(-2), 2)[1]
    weights = scores.gather(-1, ids)
    return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.0


def row_work(bench: Bench, batch: int) -> None:
    """What a cache step does besides products, in bytes that must be moved, against a copy of as many.

    Of DSMoE-L, whose heads have 64 columns. `refresh of nothing` is the whole op that combines, with its sort, its
    products without rows and its norms.
    """
    base = ops.TINY if bench.small else ops.Sizes(width=1024, hidden=64, heads=16)
    make = ops.Make(replace(base, samples=batch), bench.device, bench.dtype)
    refresh, attend = (ops.kernel(name, bench.device) for name in ("refresh_fixed_k", "attend_rows"))
    from moeca_compile.ops.triton.combine import combine_fixed_k

    for name, forecast in (("", False), (" with forecast", True)):
        arguments = make.refresh_fixed_k(share=0.0, forecast=forecast)
        ring, weight, history = arguments[0], *arguments[5:7]
        moved = sum(slot.nbytes for slot in ring) + ring[0].nbytes // ring[0].shape[2]
        alone = partial(combine_fixed_k, ring, weight, history, arguments[7])
        _against_copy(bench, f"combine{name}, batch {batch}", alone, moved)
        _against_copy(bench, f"refresh of nothing{name}, batch {batch}", partial(refresh, *arguments), moved)
    arguments = make.attend_rows()
    moved = sum(value.nbytes for value in arguments[:5]) + arguments[2].nbytes  # reads all, writes the output
    _against_copy(bench, f"attend, batch {batch}", lambda: attend(*arguments), moved)
    keys, values = (cache.transpose(1, 2) for cache in arguments[:2])
    alone = partial(F.scaled_dot_product_attention, arguments[2], keys, values)
    _against_copy(bench, f"of that, torch's attention, batch {batch}", alone, moved)


def _against_copy(bench: Bench, what: str, function: Callable[[], Any], moved: int) -> None:
    source = torch.empty(moved // 2, dtype=torch.uint8, device=bench.device)  # read once and written once
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), bench.device)
    with fallback_refused():
        time = milliseconds(function, bench.device)
    note = f"{moved / time / 1e6:.0f} GB/s"
    bench.emit(Row("kernels", what, time, "ms", ratio=copy / time, against="copy of as many bytes", note=note))
