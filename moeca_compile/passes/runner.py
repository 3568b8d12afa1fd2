"""Run the normalizing passes in their order: what they write alike, matching has to know in one form only."""

from __future__ import annotations

from torch import fx

from moeca_compile.passes.normalize.collapse_views import collapse_views
from moeca_compile.passes.normalize.drop_idle_dropouts import drop_idle_dropouts
from moeca_compile.passes.normalize.fuse_attention import normalize_attention
from moeca_compile.passes.normalize.reshape_views import reshape_views
from moeca_compile.passes.normalize.split_products_from_sums import split_products_from_sums
from moeca_compile.passes.normalize.split_to_slices import split_to_slices
from moeca_compile.passes.normalize.unflatten_linears import unflatten_linears


def normalize(graph: fx.Graph) -> None:
    """Rewrite the exported graph in place; the values that it computes stay the same."""
    drop_idle_dropouts(graph)
    split_products_from_sums(graph)
    collapse_views(graph)
    split_to_slices(graph)
    unflatten_linears(graph)
    normalize_attention(graph)
    reshape_views(graph)
