"""Groups of ATen ops that several passes know by name; a pass that means more or fewer says so where it does."""

from __future__ import annotations

import torch

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default

VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
"""Other dims over the same values in the same order, written (x, shape)."""

RESHAPES = VIEWS | {aten.flatten.using_ints, aten.unflatten.int}
"""The same, however the dims are written: not every one of these becomes a reshape when its name is changed."""

COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default})
"""Ops that give the values of their argument in its dtype, perhaps elsewhere in memory."""

CASTS = COPIES | {
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.type_as.default,
}
"""Ops that give the values of their first argument, perhaps elsewhere in memory or in another dtype."""

PERMUTES = frozenset({aten.permute.default, aten.transpose.int, aten.t.default})
SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default})
NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})
"""Norms over the last dims, with weights."""

MATMULS = frozenset({aten.matmul.default, aten.mm.default, aten.bmm.default})
"""Products of two operands and nothing else, written (rows, matrix)."""
