"""What torch's functions do to a value, by their last names: in source there is nothing else to know them by."""

from __future__ import annotations

SHAPES = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unsqueeze",
        "squeeze",
        "contiguous",
        "expand",
        "expand_as",
        "view_as",
        "reshape_as",
        "unflatten",
    ]
)
VIEWS = SHAPES | frozenset(
    ["to", "type", "type_as", "float", "half", "bfloat16", "double", "long", "int", "clone", "detach"]
)
REPEATS = frozenset({"repeat_interleave", "repeat", "expand"})
PICKS = frozenset({"index_select", "gather", "take_along_dim"})
SPLITS = frozenset({"split", "tensor_split", "split_with_sizes", "chunk", "unbind"})
TURNS = frozenset({"transpose", "t", "permute", "swapaxes"})
CONTRACTIONS = frozenset({"MatMult", "einsum", "bmm", "matmul"})
PRODUCTS = CONTRACTIONS | {"Mult", "mul", "mul_", "multiply"}
COMPARISONS = frozenset({"Eq", "eq", "NotEq", "ne", "Gt", "gt", "Lt", "lt", "GtE", "LtE"})

SCATTERS = frozenset({"scatter", "scatter_"})
SCATTER_ADDS = frozenset(
    ["scatter_reduce_", "scatter_reduce", "scatter_add_", "scatter_add", "index_add_", "index_add"]
)
ADDS_UP = SCATTER_ADDS | {"Add", "sum"}
PUTS_BACK = SCATTER_ADDS | {"index_put_"}
"""How outputs are put back to their tokens; `out[ids] += y` is `index_put_`."""

IN_PLACE = SCATTERS | {
    "index_put_",
    "index_put",
    "index_copy_",
    "index_copy",
    "masked_scatter",
    "masked_scatter_",
    "append",
}
JOINS = frozenset({"cat", "concat", "stack", "vstack", "IfExp"})
SERIES = frozenset({"List", "Tuple", "ListComp", "GeneratorExp"})
SIZES = frozenset({"shape", "dtype", "device", "ndim", "size", "dim", "numel", "len", "stride"})
HOST_READS = frozenset({"item", "tolist", "cpu", "numpy", "int"})
PLACES = frozenset({"where", "nonzero"})
SORTS = frozenset({"sort", "argsort"})
SELECTS = SORTS | {"topk"}
ZEROS = frozenset({"zeros_like", "new_zeros", "zeros"})

# In a subscript they tell that it holds numbers of tokens, not of branches.
TOKENS = frozenset({"FloorDiv", "div", "floor_divide", "where", "nonzero", "any"})
