"""Inductor's C++ codegen asks for the stride of every access, and has sympy simplify each index for that first.

For sums and products of variables that changes nothing: the stride is the difference of the index at two places, and
sympy finds that by itself. Simplifying them took 2.1 of 6.3 s for one graph (layer norm, rotary embedding, softmax).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy

from moeca_compile._torch_private.lookup import Private

_SIMPLIFY = Private(
    "torch._inductor.sizevars.simplify_index_in_vec_range",
    "Inductor takes half as long again to write code for a CPU",
    before="torch._inductor.codegen.cpp.simplify_index_in_vec_range",
)
_PLAIN = (sympy.Add, sympy.Mul, sympy.Symbol, sympy.Integer)


@contextmanager
def quick_strides() -> Iterator[None]:
    """Leave plain indices as they are. Hold Dynamo's lock: Inductor's module is changed meanwhile."""
    original = _SIMPLIFY.value
    if original is None:
        yield
        return

    def simplify(index: Any, var: Any, vec_length: int) -> Any:
        return index if _is_plain(index) else original(index, var, vec_length)

    module: Any = sys.modules[original.__module__]
    module.simplify_index_in_vec_range = simplify
    try:
        yield
    finally:
        module.simplify_index_in_vec_range = original


def _is_plain(index: Any) -> bool:
    return all(isinstance(node, _PLAIN) for node in sympy.preorder_traversal(index))
