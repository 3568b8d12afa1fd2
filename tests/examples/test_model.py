from dataclasses import replace

import pytest
import torch

from examples.digits.testbed import DigitsConfig
from examples.dit import rotary_table, rotate
from examples.testbed.model import MoEDiT, SparseMoE

SMALL = DigitsConfig(width=32, depth=2, heads=2, expert_width=16)
SOFTMAX = replace(SMALL, router="softmax", shared_experts=2)


def routed_by_loop(layer: SparseMoE, x: torch.Tensor) -> torch.Tensor:
    """Every branch (token, expert) by itself. x [B, T, D]."""
    indices, weights = layer.gate(x)
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            for slot in range(layer.top_k):
                expert = layer.experts[int(indices[b, t, slot])]
                out[b, t] += weights[b, t, slot] * expert(x[b, t][None])[0]
    return out


@pytest.fixture(params=[SMALL, SOFTMAX], ids=["sigmoid", "softmax"])
def layer(request: pytest.FixtureRequest) -> SparseMoE:
    torch.manual_seed(0)
    return SparseMoE(request.param).eval().requires_grad_(False)


def test_inference_dispatch_equals_a_loop_over_branches(layer):
    x = torch.randn(3, 7, SMALL.width)
    torch.testing.assert_close(layer(x), routed_by_loop(layer, x) + layer.shared_expert(x))


def test_inference_dispatch_with_experts_that_nobody_chose(layer):
    x = torch.randn(1, 2, SMALL.width)
    indices, _ = layer.gate(x)
    assert len(indices.unique()) < SMALL.experts
    torch.testing.assert_close(layer(x), routed_by_loop(layer, x) + layer.shared_expert(x))


def test_training_dispatch_gives_the_same_output_and_gradients(layer):
    x = torch.randn(2, 9, SMALL.width)
    expected = layer(x)
    layer.train().requires_grad_(True)
    out = layer(x)
    torch.testing.assert_close(out, expected)
    (out.square().mean() + layer.gate.balance_loss).backward()
    assert layer.gate.weight.grad.abs().sum() > 0
    used = layer.gate(x)[0].unique().tolist()
    assert all(layer.experts[e].down_proj.weight.grad.abs().sum() > 0 for e in used)


def test_sigmoid_weights_are_normalized_and_scaled():
    indices, weights = SparseMoE(SMALL).eval().gate(torch.randn(2, 5, SMALL.width))
    assert indices.shape == weights.shape == (2, 5, SMALL.experts_per_token)
    torch.testing.assert_close(weights.sum(dim=-1), torch.full((2, 5), SMALL.route_scale))


def test_softmax_weights_are_the_scaled_probabilities_of_the_best_experts():
    gate, x = SparseMoE(SOFTMAX).eval().gate, torch.randn(2, 5, SMALL.width)
    indices, weights = gate(x)
    probabilities = (x @ gate.weight.T).exp()
    probabilities /= probabilities.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, SOFTMAX.route_scale * probabilities.gather(-1, indices))
    best = probabilities.sort(descending=True).indices[..., : SOFTMAX.experts_per_token]
    assert torch.equal(indices.sort().values, best.sort().values)


def test_shared_experts_are_one_of_their_common_width():
    assert SparseMoE(SMALL).shared_expert.up_proj.out_features == 16
    assert SparseMoE(SOFTMAX).shared_expert.up_proj.out_features == 32


def test_balance_loss_is_one_when_balanced_and_more_when_not(layer):
    gate = layer.train().gate
    scores = torch.full((1, 8, 8), 0.5)
    even = torch.stack([torch.arange(8), torch.arange(1, 9) % 8], dim=-1)[None]
    assert gate.balance(scores, even).item() == pytest.approx(1.0)
    scores[..., :2] = 0.9
    assert gate.balance(scores, torch.tensor([0, 1]).expand(1, 8, 2)).item() > 1.2


def test_forward_shape_and_adaln_zero_start():
    torch.manual_seed(0)
    model = MoEDiT(SMALL).eval()
    x, t, y = torch.randn(4, 1, 8, 8), torch.rand(4), torch.tensor([0, 3, 9, model.y_embedder.null_class])
    assert torch.equal(model(x, t, y), torch.zeros_like(x))


@pytest.mark.parametrize(("every", "blocks"), [(2, [1, 3, 5]), (1, [0, 1, 2, 3, 4, 5])])
def test_every_second_block_has_experts_or_every_one(every: int, blocks: list[int]):
    model = MoEDiT(DigitsConfig(moe_every=every))
    found = [name for name, module in model.named_modules() if isinstance(module, SparseMoE)]
    assert found == [f"blocks.{block}.mlp" for block in blocks]


def test_rotary_scores_depend_on_the_offset_in_both_directions_alone():
    cos, sin = rotary_table(8, 32)
    q, k = torch.randn(32), torch.randn(32)
    turned_q, turned_k = (rotate(v.expand(64, 32), cos, sin) for v in (q, k))
    scores = (turned_q @ turned_k.T).reshape(8, 8, 8, 8)  # [row, column, row, column]
    torch.testing.assert_close(scores[0, 1, 2, 5], scores[3, 2, 5, 6])
    assert (scores[0, 0, 0, 1] - scores[0, 0, 1, 0]).abs() > 1e-3
