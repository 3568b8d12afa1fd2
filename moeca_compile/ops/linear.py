"""Linear layers, single and grouped. On CPU each product runs by whatever is fastest for its number of rows.

    moeca::linear(x, weight, bias) -> out         out = x @ weight.T + bias, as torch.nn.functional.linear

PyTorch computes float32 products by MKL, which packs the weights again at each call. With few rows, packing takes
most of the time: there oneDNN is faster, and our own C++ kernel is faster still up to some dozens of rows. With many
rows, on other devices, and for dtypes that neither supports, PyTorch's product runs (docs/performance.md).
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
"""Up to this many rows our own kernel is faster than oneDNN: for a single product, and for each group of several."""

_MANY = 256
"""Above this many rows PyTorch's product is as fast as oneDNN, which in long runs causes page faults at each call."""

_NARROW = 32
"""With fewer outputs (as in a router) PyTorch's product is the fastest."""

_library = torch.library.Library("moeca", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear: x (..., K), weight (N, K), bias (N,) or None -> (..., N), contiguous on CPU.

    The op `moeca::linear` has the same arguments.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    biases = None if bias is None else [bias]
    rows = x.flatten(0, -2).contiguous()
    if len(rows) <= _FEW and library.takes(rows, [weight], biases):
        out = library.grouped_linear(rows, torch.tensor([0, len(rows)]), [weight], biases)
        return out.view(*x.shape[:-1], len(weight))
    if len(rows) <= _MANY and x.dtype is torch.float32 and onednn_linear is not None:
        return onednn_linear(x, weight, bias)
    return F.linear(x, weight, bias)


def grouped_linear(
    rows: Tensor, offsets: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None
) -> Tensor:
    """Apply a separate linear layer to each group of rows.

    Args:
        rows: (R, K), sorted by group.
        offsets: (G + 1,) int64, where the groups begin; the last is R.
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
    """Replace the graph's linear layers on CPU by `moeca::linear`, except for narrow ones."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        if node.meta["val"].device.type == "cpu" and node.meta["val"].shape[-1] >= _NARROW:
            node.target, node.args = torch.ops.moeca.linear.default, (*node.args, None)[:3]
