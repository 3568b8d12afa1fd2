"""The normalizing passes in order, and the code that runs them.

A pass is a function that rewrites a graph in place, preserves the values it computes, and returns the number of its
rewrites. The runner eliminates dead code, lints, times, counts, logs and dumps.

Two rewrites in normalize/ do not run here. `scalar_inputs_to_tensors` edits Dynamo's graph, which is not functional
yet, so dead code must not be eliminated there; its caller also needs to know which inputs it changed. `to_one_device`
moves a whole graph or nothing: it works on a copy, and returns that or the graph itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from torch import fx

from moeca_compile.passes.normalize.collapse_views import collapse_views
from moeca_compile.passes.normalize.drop_idle_dropouts import drop_idle_dropouts
from moeca_compile.passes.normalize.drop_unread_operands import drop_unread_operands
from moeca_compile.passes.normalize.flatten_streams import flatten_streams
from moeca_compile.passes.normalize.fuse_attention import fuse_attention
from moeca_compile.passes.normalize.name_attention_arguments import name_attention_arguments
from moeca_compile.passes.normalize.reshape_views import reshape_views
from moeca_compile.passes.normalize.split_products_from_sums import split_products_from_sums
from moeca_compile.passes.normalize.split_to_slices import split_to_slices
from moeca_compile.passes.normalize.unflatten_linears import unflatten_linears

log = logging.getLogger(__name__)

Pass = Callable[[fx.Graph], int]

PASSES: tuple[Pass, ...] = (
    drop_idle_dropouts,
    split_products_from_sums,
    drop_unread_operands,
    collapse_views,
    split_to_slices,
    unflatten_linears,
    fuse_attention,
    flatten_streams,
    name_attention_arguments,
    reshape_views,
)
"""In this order: a pass may rely on the forms that the passes before it produce."""


class PassError(RuntimeError):
    """A pass left a malformed graph. This is a bug in the pass, whatever the model."""


@dataclass(frozen=True)
class PassResult:
    """One run of a pass: how many rewrites it made, and its seconds with lint and dead-code elimination."""

    name: str
    matches: int
    seconds: float


Observer = Callable[[PassResult, fx.Graph], None]


def normalize(graph: fx.Graph, after: Observer | None = None) -> tuple[PassResult, ...]:
    """Rewrite an exported graph in place into the forms that matching knows, with the same values.

    Args:
        after: called after each pass with its result and the graph, which it must not edit.
    """
    return run_passes(graph, PASSES, after)


def run_passes(graph: fx.Graph, passes: Sequence[Pass], after: Observer | None = None) -> tuple[PassResult, ...]:
    """Run these passes in order on a functional graph. Raises PassError where one leaves it malformed."""
    results = []
    for each in passes:
        results.append(_run(each, graph))
        if after is not None:
            after(results[-1], graph)
    return tuple(results)


def _run(each: Pass, graph: fx.Graph) -> PassResult:
    name, start = each.__name__, perf_counter()
    matches = each(graph)
    try:  # before dead-code elimination, which needs a well-formed graph
        graph.lint()
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]  # the other lines are the whole graph
        raise PassError(f"the pass {name} left a broken graph: {reason}") from error
    if matches:
        graph.eliminate_dead_code()
    result = PassResult(name, matches, perf_counter() - start)
    log.debug("%s: %d matches, %.1f ms, %d nodes", name, matches, 1000 * result.seconds, len(graph.nodes))
    return result
