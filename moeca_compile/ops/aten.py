"""Groups of ATen ops that several passes use. A pass that needs other ops defines its own group."""

from __future__ import annotations

import torch

aten = torch.ops.aten

SDPA = aten.scaled_dot_product_attention.default

VIEWS = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default})
"""Ops that change the shape and keep the order of the values, with arguments (x, shape)."""

RESHAPES = VIEWS | {aten.flatten.using_ints, aten.unflatten.int}
"""The same with other arguments too, so that not each of them can be replaced by a reshape as it stands."""

COPIES = frozenset({aten.clone.default, aten.contiguous.default, aten.detach.default, aten.alias.default})
"""Ops that return the values of their argument in the same dtype, perhaps in other memory."""

CASTS = COPIES | {
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.type_as.default,
}
"""Ops that return the values of their first argument, perhaps in other memory or another dtype."""

PERMUTES = frozenset({aten.permute.default, aten.transpose.int, aten.t.default})
SPLITS = frozenset({aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default})
SOFTMAXES = frozenset({aten.softmax.int, aten._softmax.default})
NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})
"""Norms over the last dims, with optional weights."""

MATMULS = frozenset({aten.matmul.default, aten.mm.default, aten.bmm.default})
"""Products without bias, with arguments (rows, matrix)."""
PRODUCTS = MATMULS | {aten.linear.default, aten.addmm.default}
