"""A router's choice by the reference, against plain Python that sorts each token's experts."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops.routing_cases import CASES, Choice, make_inputs


def values_by_hand(row: list[float], bias: list[float], choice: Choice) -> tuple[list[float], list[float]]:
    """Each expert's score, and what the choice goes by."""
    scores = {
        "softmax": lambda: [math.exp(x) / sum(map(math.exp, row)) for x in row],
        "sigmoid": lambda: [1 / (1 + math.exp(-x)) for x in row],
        "none": lambda: row,
    }[choice.scores]()
    values, size = [s + b for s, b in zip(scores, bias, strict=True)], len(row) // choice.groups
    if choice.groups == 1:
        return scores, values
    members = [values[g * size : (g + 1) * size] for g in range(choice.groups)]
    goodness = [sum(sorted(m)[::-1][: choice.best_of]) for m in members]
    best = sorted(range(choice.groups), key=lambda g: -goodness[g])[: choice.kept_groups]
    return scores, [v if e // size in best else choice.fill for e, v in enumerate(values)]


def weights_by_hand(weights: list[float], choice: Choice) -> list[float]:
    if choice.norm == "sum":
        weights = [w / (sum(weights) + choice.eps) for w in weights]
    if choice.norm == "softmax":
        weights = [math.exp(w) / sum(map(math.exp, weights)) for w in weights]
    return [w * choice.scale for w in weights]


@pytest.mark.parametrize("name", CASES)
def test_each_token_by_hand(name):
    choice = CASES[name]
    logits, bias = make_inputs(7, choice, torch.float32)
    ids, weights = torch.ops.moeca.choose_experts(logits, bias, *choice.arguments())
    assert ids.dtype == torch.int64 and weights.dtype == choice.weight_dtype
    for t, row in enumerate(logits.tolist()):
        scores, values = values_by_hand(row, [0.0] * len(row) if bias is None else bias.tolist(), choice)
        found = ids[t].tolist()
        assert len(set(found)) == choice.k
        # By value and not by id: torch.topk leaves the order of equal ones open.
        assert [values[e] for e in found] == sorted(values)[::-1][: choice.k]
        expected = weights_by_hand([(scores if choice.gathered else values)[e] for e in found], choice)
        torch.testing.assert_close(weights[t].double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


def test_shapes_without_data():
    choice = CASES["softmax"]
    logits, _ = make_inputs(7, choice, torch.float32)
    ids, weights = torch.ops.moeca.choose_experts(logits.to("meta"), None, *choice.arguments())
    assert (ids.shape, ids.dtype) == ((7, choice.k), torch.int64)
    assert (weights.shape, weights.dtype) == ((7, choice.k), torch.float32)
