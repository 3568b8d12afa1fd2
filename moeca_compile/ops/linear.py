"""Linear layers, one and by group; on CPU each product is taken by what is fastest for its number of rows.

    moeca::linear(x, weight, bias) -> out         out = x @ weight.T + bias, as torch.nn.functional.linear

PyTorch takes float32 products to MKL, which packs the weights anew at each call; with few rows that is most of the
time. oneDNN is faster at every size, our own kernel up to some dozens of rows (docs/performance.md). On any other
device, and for the dtypes that neither takes, PyTorch's product runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeca_compile._torch_private import onednn_linear
from moeca_compile.ops.cpu import library

_FEW, _FEW_EACH = 64, 320
"""Up to so many rows our own kernel is faster than oneDNN's: of one product, and of each in a group of them."""

_NARROW = 32
"""With fewer outputs, as of a router, PyTorch's product is the fastest."""

_library = torch.library.Library("moeca", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear: x (..., K), weight (N, K), bias (N,) or None -> (..., N), contiguous on CPU.

    The op's schema has the same arguments; the fake beside it gives the shape.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    biases = None if bias is None else [bias]
    rows = x.flatten(0, -2).contiguous()
    if len(rows) <= _FEW and library.takes(rows, [weight], biases):
        out = library.grouped_linear(rows, torch.tensor([0, len(rows)]), [weight], biases)
        return out.view(*x.shape[:-1], len(weight))
    if x.dtype is torch.float32 and onednn_linear is not None:
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def grouped_linear(
    rows: Tensor, offsets: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None
) -> Tensor:
    """A linear layer of its own for each group of rows.

    Args:
        rows: (R, K), sorted by group; offsets: (G + 1,) int64, where the groups begin, and R.
        weights: G tensors (N, K); biases: G tensors (N,), or None.

    Returns:
        (R, N).
    """
    rows = rows.contiguous()
    if len(rows) <= _FEW_EACH * len(weights) and library.takes(rows, weights, biases):
        return library.grouped_linear(rows, offsets, weights, biases)
    out = rows.new_empty(len(rows), len(weights[0]))
    for group, (start, end) in enumerate(pairwise(offsets.tolist())):
        if end > start:
            bias = biases[group] if biases is not None else None
            out[start:end] = linear(rows[start:end], weights[group], bias)
    return out


_library.impl("linear", linear, "CompositeExplicitAutograd")


@torch.library.register_fake("moeca::linear", lib=_library)
def _(x, weight, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def use_fast_linears(graph: fx.Graph) -> None:
    """Let the graph's linear layers on CPU be taken by `linear`, but for narrow ones."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        if node.meta["val"].device.type == "cpu" and node.meta["val"].shape[-1] >= _NARROW:
            node.target, node.args = torch.ops.moeca.linear.default, (*node.args, None)[:3]
