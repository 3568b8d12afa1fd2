"""How near the kernels are to what the device can do: products to a dense product, row work to a plain copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_sections import ops
from bench.gpu_sections.common import Bench, Row, milliseconds

ROWS = (8192, 32768, 131072)
"""Rows of a grouped product: what a full step of 32, 64 and 512 pictures of 256 tokens has at top-1."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def run(bench: Bench) -> None:
    for rows in (64,) if bench.small else ROWS:
        for width, hidden, experts in ((8, 16, 4),) if bench.small else ((384, 768, 16), (1024, 2048, 16)):
            what = f"{rows} rows, {width}x{hidden}, {experts} experts"
            bench.attempt("kernels", what, 8, partial(products, bench, what, rows, width, hidden, experts))
    for batch in (2,) if bench.small else (8, 128):
        bench.attempt("kernels", f"row work, batch {batch}", 8, partial(row_work, bench, batch))


def products(bench: Bench, what: str, rows: int, width: int, hidden: int, experts: int) -> None:
    """The op of one linear layer an expert, sorting and gathering included, against a dense product of its FLOPs."""
    make = ops.Make(ops.TINY, bench.device, bench.dtype)
    x, index = make.normal(rows, width), make.distinct(1, experts, rows)
    weights = [make.normal(hidden, width, scale=width**-0.5) for _ in range(experts)]
    key = ops.registered(linear, 1)
    dense = milliseconds(lambda: x @ weights[0].t(), bench.device)
    flops = 2 * rows * width * hidden
    ways: dict[str, Callable[[], Any]] = {
        "moeca": lambda: torch.ops.moeca.fixed_k_outputs([x], index, weights, experts, key, hidden)
    }
    if bench.dtype is torch.bfloat16 and hasattr(torch, "_grouped_mm"):
        order = index.flatten().sort()
        ends = torch.searchsorted(order.values, torch.arange(experts, device=x.device), right=True).to(torch.int32)
        x_sorted, packed = x[order.indices], torch.stack(weights).transpose(1, 2)
        ways["torch._grouped_mm, rows sorted before"] = lambda: torch._grouped_mm(x_sorted, packed, offs=ends)
    bench.emit(_product("dense product", what, dense, flops, dense))
    for name, function in ways.items():
        bench.emit(_product(name, what, milliseconds(function, bench.device), flops, dense))


def _product(name: str, what: str, time: float, flops: int, dense: float) -> Row:
    note = f"{flops / time / 1e9:.0f} TFLOP/s" if time else ""
    return Row("kernels", f"{name}: {what}", time, "ms", ratio=dense / time, against="dense product", note=note)


def row_work(bench: Bench, batch: int) -> None:
    """What a cache step does besides products, in bytes that must be moved, against a copy of as many."""
    base = ops.TINY if bench.small else ops.Sizes(width=1024, hidden=64)
    make = ops.Make(replace(base, samples=batch), bench.device, bench.dtype)
    for name, forecast in (("combine", False), ("combine with forecast", True)):
        arguments = make.refresh_fixed_k(share=0.0, forecast=forecast)
        ring = arguments[0]
        moved = sum(slot.nbytes for slot in ring) + ring[0].nbytes // ring[0].shape[2]
        _against_copy(bench, f"{name}, batch {batch}", lambda a=arguments: torch.ops.moeca.refresh_fixed_k(*a), moved)
    arguments = make.attend_rows()
    moved = sum(value.nbytes for value in arguments[:5]) + arguments[2].nbytes  # reads all, writes the output
    _against_copy(bench, f"attend, batch {batch}", lambda: torch.ops.moeca.attend_rows(*arguments), moved)


def _against_copy(bench: Bench, what: str, function: Callable[[], Any], moved: int) -> None:
    source = torch.empty(moved // 2, dtype=torch.uint8, device=bench.device)  # read once and written once
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source), bench.device)
    time = milliseconds(function, bench.device)
    note = f"{moved / time / 1e6:.0f} GB/s"
    bench.emit(Row("kernels", what, time, "ms", ratio=copy / time, against="copy of as many bytes", note=note))
