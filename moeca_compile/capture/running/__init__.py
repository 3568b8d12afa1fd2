"""Capture by running: for MoE layers whose code no idiom can read.

    layers.py   which modules of a model may be such layers
    trace.py    runs a layer: a graph of what it computed, the values in it, what its Python read and changed
    watch.py    what a call asks the host for, and at which lines
    numbers.py  numbers that the host read, which say how they compare
    conversions.py  int() and float() that do not lose them
    graph.py    what is known of each node of such a graph
    experts.py  the experts in it: equal subgraphs that read parameters of one expert each
    find.py     what the experts are for, told by values:
    rows.py         who got which rows
    total.py        the sum over experts, and its weights
    routing.py      the tensors that hold the routing and the weights
    dense.py    experts that run on some rows only, run on all of them
    build.py    the same computation with a marker op in the place of the experts
    drawn.py    the random calls by which all of this is found and checked
    own_code.py what the layer's own code reads and leaves
    layer.py    all of this as a `Dispatch`, checked with numbers as the idioms' equivalents are

Any spelling will do, since Python runs: what counts is what was computed,

    out = suffix(prefix, base + sum over experts of weight * expert(rows))
"""

from moeca_compile.capture.running.layer import Running
from moeca_compile.capture.running.layers import holds_experts, layers_within, may_run, modules_among
from moeca_compile.capture.running.trace import isolated
from moeca_compile.capture.running.watch import Asked, Asking, Watch

__all__ = [
    "Asked",
    "Asking",
    "Running",
    "Watch",
    "holds_experts",
    "isolated",
    "layers_within",
    "may_run",
    "modules_among",
]
