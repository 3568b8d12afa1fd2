"""The input whose sine and cosine are taken."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moeca_compile.passes.match.timestep import find_timesteps, guess_timesteps
from tests.harness import exported, placeholders

X, T, OTHER, LABEL = torch.randn(2, 8), torch.rand(2), torch.rand(2), torch.tensor([1, 2])
W, TABLE, INV_FREQ = torch.randn(8, 8), torch.randn(5, 8), torch.rand(4)
INPUTS = (X, T, OTHER, LABEL, W, TABLE, INV_FREQ)


def embedding(t: Tensor) -> Tensor:
    angles = 1000 * t.float().reshape(-1, 1) * torch.arange(4) / 4
    return torch.cat([angles.cos(), angles.sin()], -1)


def rotary(x: Tensor, inv_freq: Tensor) -> Tensor:
    angles = torch.arange(2)[:, None] * inv_freq
    return x * torch.cat([angles.cos(), angles.sin()], -1)


def found(function, inputs=INPUTS, arguments=slice(0, 4)) -> list[int]:
    """The positions of the inputs that may be the timestep."""
    gm = exported(function, *inputs)
    nodes = placeholders(gm)
    return [nodes.index(node) for node in find_timesteps(set(nodes[arguments]))]


TIMESTEPS = {
    "an embedding": lambda x, t, o, y, w, e, f: x + embedding(t),
    "a scaled one": lambda x, t, o, y, w, e, f: x + embedding(1000 - t * 999),
    "in half precision": lambda x, t, o, y, w, e, f: x + embedding(t.half()),
    "expanded": lambda x, t, o, y, w, e, f: x + embedding(t[:1].expand(2)),
    "beside a label": lambda x, t, o, y, w, e, f: x + embedding(t) + F.embedding(y, e),
    "beside rotary tables": lambda x, t, o, y, w, e, f: rotary(x, f) + embedding(t),
    "beside another scalar": lambda x, t, o, y, w, e, f: x * o[:, None] + embedding(t),
    "then a network": lambda x, t, o, y, w, e, f: F.linear(F.silu(F.linear(embedding(t), w)), w) + x,
}


@pytest.mark.parametrize("name", TIMESTEPS)
def test_found(name):
    assert found(TIMESTEPS[name]) == [1]


def test_a_scalar_timestep():
    inputs = (X, torch.tensor(0.5), *INPUTS[2:])
    assert found(lambda x, t, *rest: x + embedding(t), inputs) == [1]


def test_a_guidance_scale_is_a_candidate_too():
    """It is embedded as the timestep is."""
    assert found(lambda x, t, o, y, w, e, f: x + F.silu(embedding(o) @ w) + embedding(t)) == [1, 2]


NEAR_MISSES = {
    "a sine alone": lambda x, t, o, y, w, e, f: x + t[:, None].sin(),
    "frequencies of rotary positions alone": lambda x, t, o, y, w, e, f: rotary(x, f) + t[:, None],
    "a learned embedding": lambda x, t, o, y, w, e, f: x + F.embedding(y, e).sin() + F.embedding(y, e).cos(),
    "sines behind a linear layer": lambda x, t, o, y, w, e, f: (h := F.linear(t.repeat(4), w)).sin() + h.cos() + x,
    "sines of the picture": lambda x, t, o, y, w, e, f: x.sin() + x.cos() + t[:, None],
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name):
    assert found(NEAR_MISSES[name]) == []


def test_a_buffer_is_no_timestep():
    """Frequencies reach a sine and a cosine as well, but are none of the model's arguments."""
    assert found(lambda x, t, o, y, w, e, f: rotary(x, f), arguments=slice(0, 7)) == [6]
    assert found(lambda x, t, o, y, w, e, f: rotary(x, f)) == []


# --- guesses by form, where no sines are taken -------------------------------------------------------------------


def guessed(function, inputs=INPUTS, samples=2) -> list[int]:
    gm = exported(function, *inputs)
    nodes = placeholders(gm)
    return [nodes.index(node) for node in guess_timesteps(set(nodes[:4]), samples)]


def linear(t: Tensor, w: Tensor) -> Tensor:
    return F.linear(t.reshape(-1, 1), w[:, :1])


GUESSES = {
    "log(sigma) through a linear layer": (lambda x, t, o, y, w, e, f: x + linear(t.log() / 4, w), [1]),
    "a product of matrices": (lambda x, t, o, y, w, e, f: x + t[:, None] @ w[:1], [1]),
    "a row of a table": (lambda x, t, o, y, w, e, f: x + F.silu(F.linear(w, w))[t.long()], [1]),
    "a learned embedding": (lambda x, t, o, y, w, e, f: x + F.embedding(t.long(), e), [1]),
    "one that also scales the picture": (lambda x, t, o, y, w, e, f: x / t[:, None] + linear(t, w), [1]),
    "beside a label": (lambda x, t, o, y, w, e, f: x + linear(t, w) + F.embedding(y, e), [1, 3]),
    "beside another number": (lambda x, t, o, y, w, e, f: x + linear(t, w) + linear(o, w), [1, 2]),
    "a label alone": (lambda x, t, o, y, w, e, f: x + F.embedding(y, e), [3]),
}


@pytest.mark.parametrize("name", GUESSES)
def test_guess(name):
    function, expected = GUESSES[name]
    assert guessed(function) == expected


NO_GUESSES = {
    "a scale of the picture": lambda x, t, o, y, w, e, f: F.linear(x * t[:, None], w),
    "a scale of what a linear layer gives": lambda x, t, o, y, w, e, f: F.linear(x, w) * t[:, None],
    "samples in another order": lambda x, t, o, y, w, e, f: F.linear(x[y], w),
    "the picture": lambda x, t, o, y, w, e, f: F.linear(x, w),
    "a label that is compared": lambda x, t, o, y, w, e, f: torch.where((y == 1)[:, None], x, F.linear(x, w)),
}


@pytest.mark.parametrize("name", NO_GUESSES)
def test_no_guess(name):
    assert guessed(NO_GUESSES[name]) == []


def test_a_number_for_each_token_is_no_guess():
    assert guessed(GUESSES["log(sigma) through a linear layer"][0], samples=3) == []


def test_a_label_is_no_guess_beside_times_of_tokens():
    inputs = (X, torch.rand(2, 8), *INPUTS[2:])
    assert guessed(lambda x, t, o, y, w, e, f: x + t.sin() + t.cos() + F.embedding(y, e), inputs) == []
