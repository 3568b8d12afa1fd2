"""What the sorted-segments idiom takes for dispatch, and near misses that it must not."""

from __future__ import annotations

import pytest
import torch

from moeca_compile.capture.idioms import sorted_segments
from moeca_compile.capture.source import innermost, read_method
from tests.capture import layers
from tests.capture.layers import NumpyEnds, RunningStart, SortedFirst, SplitSegments


def recognize(function):
    """The idiom's answer for a method as its class was written, wrapped by capture or not."""
    return sorted_segments.recognize(read_method(innermost(function)))


@pytest.mark.parametrize(
    ("function", "x", "index", "weight"),
    [
        (NumpyEnds.moe_infer, "x", "flat_expert_indices", "flat_expert_weights"),
        (RunningStart.dispatch, "tokens", "choice", "weights"),
        (SortedFirst.combine, "h", "e", "w"),
        (SplitSegments.run_experts, "x", "expert_of_branch", "gates"),
    ],
)
def test_roles_come_from_the_code(function, x, index, weight):
    recognized = recognize(function)
    assert (recognized.experts, recognized.x, recognized.index, recognized.weight) == (
        "experts",
        x,
        index,
        weight,
    )


def histogram(self, x, ids, weights):
    """A count of ids, no experts."""
    order = ids.argsort()
    ends = ids.bincount().cpu().numpy().cumsum(0)
    out = torch.zeros_like(x)
    for i, end in enumerate(ends):
        start = 0 if i == 0 else ends[i - 1]
        rows = order[start:end] // self.k
        out.index_add_(0, rows, x[rows] * weights[order[start:end]])
    return out


def unweighted(self, x, ids, weights):
    order = ids.argsort()
    ends = ids.bincount().cpu().numpy().cumsum(0)
    out = torch.zeros_like(x)
    for i, end in enumerate(ends):
        start = 0 if i == 0 else ends[i - 1]
        rows = order[start:end] // self.k
        out.index_add_(0, rows, self.experts[i](x[rows]))
    return out


def weighted_by_something_else(self, x, ids, weights):
    order = ids.argsort()
    ends = ids.bincount().cpu().numpy().cumsum(0)
    out = torch.zeros_like(x)
    for i, end in enumerate(ends):
        start = 0 if i == 0 else ends[i - 1]
        rows = order[start:end] // self.k
        out.index_add_(0, rows, self.experts[i](x[rows]) * self.scale[i] * weights.mean())
    return out


def every_row(self, x, ids, weights):
    """Experts run on all rows: no segments."""
    order = ids.argsort()
    ends = ids.bincount().cpu().numpy().cumsum(0)
    out = torch.zeros_like(x)
    for i, end in enumerate(ends):
        out.index_add_(0, order // self.k, self.experts[i](x) * weights[order][:end])
    return out


def on_top_of_the_input(self, x, ids, weights):
    order = ids.argsort()
    ends = ids.bincount().cpu().numpy().cumsum(0)
    out = x.clone()
    for i, end in enumerate(ends):
        start = 0 if i == 0 else ends[i - 1]
        rows = order[start:end] // self.k
        out.index_add_(0, rows, self.experts[i](x[rows]) * weights[order[start:end]])
    return out


def counts_its_load(self, x, ids, weights):
    """Right but for the state it keeps, which an equivalent would not."""
    order = ids.argsort()
    counts = ids.bincount()
    self.load = self.load + counts
    ends = counts.cpu().numpy().cumsum(0)
    out = torch.zeros_like(x)
    for i, end in enumerate(ends):
        start = 0 if i == 0 else ends[i - 1]
        rows = order[start:end] // self.k
        out.index_add_(0, rows, self.experts[i](x[rows]) * weights[order[start:end]])
    return out


def weights_changed_in_place(self, x, ids, weights):
    weights.mul_(2)
    order = ids.argsort()
    ends = ids.bincount().cpu().numpy().cumsum(0)
    out = torch.zeros_like(x)
    for i, end in enumerate(ends):
        start = 0 if i == 0 else ends[i - 1]
        rows = order[start:end] // self.k
        out.index_add_(0, rows, self.experts[i](x[rows]) * weights[order[start:end]])
    return out


def pruned_tokens(self, x, scores, keep):
    """A top-k of tokens that is no dispatch."""
    order = scores.argsort(descending=True)
    kept = order[: keep.bincount().argmax().item()]
    out = torch.zeros_like(x)
    for block in self.blocks:
        out.index_add_(0, kept, block(x[kept]))
    return out


def traceable_as_it_is(self, x, ids, weights):
    """Counts stay on the device: nothing here breaks a graph at the counts."""
    order = ids.argsort()
    ends = ids.bincount(minlength=4).cumsum(0)
    out = torch.zeros_like(x)
    for i, end in enumerate(ends):
        rows = order[:end] // self.k
        out.index_add_(0, rows, self.experts[i](x[rows]) * weights[order[:end]])
    return out


@pytest.mark.parametrize(
    "near_miss",
    [
        histogram,
        unweighted,
        weighted_by_something_else,
        every_row,
        on_top_of_the_input,
        counts_its_load,
        weights_changed_in_place,
        pruned_tokens,
        traceable_as_it_is,
    ],
)
def test_near_misses_are_not_recognized(near_miss):
    assert recognize(near_miss) is None


def test_a_function_without_source_is_no_method():
    scope: dict = {}
    exec("def moe_infer(self, x, i, w): return x", scope)
    assert read_method(scope["moe_infer"]) is None


def test_only_dispatch_methods_are_wrapped():
    classes = [each for each in vars(layers).values() if isinstance(each, type)]
    methods = {function for owner in classes for function in vars(owner).values() if callable(function)}
    wrapped = {method.__name__ for method in methods if hasattr(method, "_moeca_original")}
    assert wrapped - {"forward"} == {"moe_infer", "dispatch", "combine", "run_experts"}  # a forward may be run
