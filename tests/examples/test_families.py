"""The reference families: their sizes against the papers' tables, and what makes each of them what it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from examples import families
from examples.dit import DiffusionTransformer

MILLION = 1e6


def total(model: DiffusionTransformer) -> int:
    """All parameters, and the table of added positions: DiT and its descendants keep it as a frozen parameter."""
    positions = getattr(model, "positions", None)
    return sum(p.numel() for p in model.parameters()) + (positions.numel() if positions is not None else 0)


def activated(model: DiffusionTransformer) -> int:
    """Parameters that one token meets: of each layer's routed experts only k."""
    idle = 0
    for layer in expert_layers(model):
        each = sum(p.numel() for p in layer.experts[0].parameters())
        idle += (len(layer.experts) - getattr(layer, "top_k", 1)) * each
    return total(model) - idle


def expert_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(getattr(module, "experts", None), nn.ModuleList)]


def test_every_published_size_has_a_family_and_a_name_of_its_own():
    assert sum(len(family.published) for family in families.FAMILIES.values()) == len(families.PUBLISHED) == 26


# --- counts against the tables ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "table", "digit"),
    [
        ("DiT-S", 32.96, 0.01),  # Diff-MoE, table 5, first row
        ("DiT-B", 131, 1),  # Diff-MoE, table 2; DiffMoE's text has 130M
        ("DiT-L", 458, 1),  # DiffMoE, table 3
        # DiffMoE, table 9 (table 1 has 1.176B and 1.982B); it counts without the table of positions.
        ("DiffMoE-L-E8", 1175.7 + 0.26, 0.1),
        ("DiffMoE-L-E16", 1981.7 + 0.26, 0.1),
        # Diff-MoE, tables 1 and 7.
        ("Diff-MoE-S", 107, 1),
        ("Diff-MoE-S+", 211.6, 0.1),  # the table has 211M, and 212M is the nearest reading: 0.14M too many
        ("Diff-MoE-B", 402, 1),
        ("Diff-MoE-B+", 821, 1),
        ("Diff-MoE-L", 1400, 100),
        ("Diff-MoE-XL", 4300, 100),
        # No table in the papers at hand has DiT-MoE's totals; these are the published code's own.
        ("DiT-MoE-S", 199.3, 0.1),
    ],
)
def test_total_parameters_round_to_the_tables_number(name: str, table: float, digit: float):
    assert abs(total(families.build(name, device="meta")) / MILLION - table) <= digit / 2


@pytest.mark.parametrize(("name", "table"), [("DiffMoE-S-E16", 139), ("DiffMoE-B-E16", 555)])
def test_the_smaller_diffmoe_are_counted_without_their_capacity_predictors(name: str, table: int):
    """Table 1 and table 9 disagree: the rows of L contain the predictors, those of S and B do not."""
    model = families.build(name, device="meta")
    predictors = sum(p.numel() for layer in expert_layers(model) for p in layer.capacity_predictor.parameters())
    plain = families.build(name.replace("DiffMoE", "TC-DiT"), device="meta")
    assert abs((total(model) - predictors) / MILLION - table) <= 0.6
    assert total(model) - predictors == total(plain)
    assert total(model) / MILLION - table > 1


@pytest.mark.parametrize(
    ("name", "table", "digit"),
    [
        # Diff-MoE, table 1.
        ("Diff-MoE-S", 36, 1),
        ("Diff-MoE-S+", 77, 1),
        ("Diff-MoE-B", 137, 1),
        ("Diff-MoE-B+", 297, 1),
        ("Diff-MoE-L", 476, 1),
        ("Diff-MoE-XL", 1500, 100),
        # Diff-MoE, table 4.
        ("DiT-MoE-S", 71.5, 1),
        ("DiT-MoE-B", 286, 1),
        ("DiT-MoE-XL", 1500, 100),
        # DiffMoE, table 3: as a dense DiT-L.
        ("TC-DiT-L-E16", 458, 1.5),
        ("EC-DiT-L-E16", 458, 1.5),
    ],
)
def test_activated_parameters_round_to_the_tables_number(name: str, table: float, digit: float):
    assert abs(activated(families.build(name, device="meta")) / MILLION - table) <= digit / 2


@pytest.mark.parametrize(
    ("part", "table"),
    [("mlp", 1725.3), ("attn", 100.7), ("adaLN_modulation", 151)],  # the last without a decimal
)
def test_the_parts_of_diffmoe_l_e16_have_the_sizes_of_table_9(part: str, table: float):
    model = families.build("DiffMoE-L-E16", device="meta")
    found = sum(p.numel() for name, p in model.blocks.named_parameters() if f".{part}." in name)
    assert abs(found / MILLION - table) <= (0.5 if part == "adaLN_modulation" else 0.1)


@pytest.mark.parametrize(
    ("name", "flops"), [("DSMoE-S-E48", 43.25), ("DSMoE-L-E16", 729.38), ("DSMoE-L-E48", 617.83)]
)
def test_dsmoe_costs_relative_to_the_smallest_are_those_of_the_table(name: str, flops: float):
    """No table at hand has DSMoE's parameters; MoECa's table 1 has its FLOPs, from which the layers follow."""
    found = block_flops(families.build(name, device="meta"))
    smallest = block_flops(families.build("DSMoE-S-E16", device="meta"))
    assert found / smallest == pytest.approx(flops / 53.62, rel=0.01)


def block_flops(model: DiffusionTransformer) -> float:
    """Multiplications of the blocks for one picture: a weight meets each token once, adaLN each picture."""
    sizes, cost = model.sizes, 0.0
    for block in model.blocks:
        meets_all = sum(p.numel() for p in block.parameters() if p.dim() == 2)
        per_picture = block.adaLN_modulation[1].weight.numel()
        idle = sum((sizes.experts - sizes.top_k) * 3 * sizes.width * sizes.expert_width for _ in expert_layers(block))
        scores_and_values = 2 * sizes.tokens * sizes.width
        cost += (meets_all - per_picture - idle + scores_and_values) * sizes.tokens + per_picture
    return cost


# --- the reduced forms --------------------------------------------------------------------------------------


@pytest.fixture(params=families.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_reduced_form_runs_and_is_the_same_again(family: str):
    model, again = families.reduced(family), families.reduced(family)
    x, t, y = families.inputs_for(model)
    out = model(x, t, y)
    assert out.shape == x.shape and out.isfinite().all() and 0.3 < out.std() < 3
    assert torch.equal(out, again(x, t, y))
    assert not torch.equal(out, families.reduced(family, seed=1)(x, t, y))


def test_a_reduced_form_has_the_block_plan_of_the_published_ones(family: str):
    small = families.reduced(family)
    for name in families.FAMILIES[family].published:
        large = families.build(name, device="meta")
        assert plan(small) == plan(large)[: len(small.blocks)]


def plan(model: DiffusionTransformer) -> list[type]:
    return [type(block.mlp) for block in model.blocks]


def test_every_block_and_every_input_counts(family: str):
    model = families.reduced(family)
    x, t, y = families.inputs_for(model)
    out = model(x, t, y)
    changed = [model(x, t / 2, y), model(x, t, (y + 1) % 10)]
    for block in model.blocks:
        weights = [p for p in block.mlp.parameters() if p.dim() > 1]
        kept = [p.clone() for p in weights]
        for p in weights:
            p.zero_()
        changed.append(model(x, t, y))
        for p, value in zip(weights, kept, strict=True):
            p.copy_(value)
    assert all((other - out).abs().max() > 1e-3 for other in changed)


@pytest.mark.parametrize("family", [name for name in families.FAMILIES if name != "DiT"])
def test_routing_uses_several_experts_and_differs_between_tokens(family: str):
    model = families.reduced(family)
    rows = rows_by_expert(model, *families.inputs_for(model))
    for counts in rows:
        assert sum(count > 0 for count in counts) >= 3
        if family != "EC-DiT":
            assert len(set(counts)) > 1


def rows_by_expert(model: DiffusionTransformer, *inputs: Tensor) -> list[list[int]]:
    """How many rows each expert of each layer was called with."""
    layers = expert_layers(model)
    found = [[0] * len(layer.experts) for layer in layers]
    for counts, layer in zip(found, layers, strict=True):
        for e, expert in enumerate(layer.experts):

            def count(_: nn.Module, args: tuple[Tensor, ...], counts: list[int] = counts, e: int = e) -> None:
                counts[e] += args[0].reshape(-1, args[0].shape[-1]).shape[0]

            expert.register_forward_pre_hook(count)
    model(*inputs)
    return found


# --- each layer against a loop over tokens ------------------------------------------------------------------


def layer_of(family: str) -> tuple[nn.Module, Tensor]:
    """A layer of experts of the reduced form, and tokens (2, N, D)."""
    model = families.reduced(family)
    sizes = model.sizes
    return expert_layers(model)[0], torch.randn(2, sizes.tokens, sizes.width, generator=torch.manual_seed(3))


def test_dsmoe_takes_the_best_of_the_better_group_and_weighs_without_the_bias():
    layer, x = layer_of("DSMoE")
    router, wanted = layer.router, torch.empty_like(x)
    for place in torch.cartesian_prod(torch.arange(2), torch.arange(x.shape[1])).tolist():
        row = x[tuple(place)]
        scores = (router.weight @ row).sigmoid()
        biased = (scores + router.bias).view(2, 4)
        group = int(biased.sort(descending=True).values[:, :2].sum(-1).argmax())
        ids = biased[group].argsort(descending=True)[:2] + 4 * group
        weights = 2.0 * scores[ids] / scores[ids].sum()
        branches = [w * layer.experts[e](row) for w, e in zip(weights, ids.tolist(), strict=True)]
        wanted[tuple(place)] = sum(branches) + layer.shared(row)
    torch.testing.assert_close(layer(x), wanted)


def test_dit_moe_weighs_by_raw_softmax():
    layer, x = layer_of("DiT-MoE")
    weights, ids = layer.router(x).softmax(-1).topk(2)
    wanted = layer.shared(x)
    for b, n in torch.cartesian_prod(torch.arange(2), torch.arange(x.shape[1])).tolist():
        for weight, e in zip(weights[b, n], ids[b, n].tolist(), strict=True):
            wanted[b, n] += weight * layer.experts[e](x[b, n])
    torch.testing.assert_close(layer(x), wanted)


def test_diff_moes_experts_see_the_condition_and_context_of_their_sample():
    layer, x = layer_of("Diff-MoE")
    c = torch.randn(2, x.shape[-1], generator=torch.manual_seed(4))
    wanted = torch.empty_like(x)
    for b, n in torch.cartesian_prod(torch.arange(2), torch.arange(x.shape[1])).tolist():
        scores = layer.router(x[b, n]).softmax(-1)
        e = int(scores.argmax())
        context = nn.functional.silu(layer.context(x[b].mean(0)))
        wanted[b, n] = scores[e] * layer.experts[e](x[b, n], c[b], context) + layer.shared(x[b, n], c[b])
    torch.testing.assert_close(layer(x, c), wanted)
    assert (layer(x, c.flip(0)) - wanted).abs().max() > 1e-3


def test_token_choice_is_the_best_expert_by_its_softmax():
    layer, x = layer_of("TC-DiT")
    best = (x @ layer.router).softmax(-1).max(-1)
    wanted = torch.stack([
        best.values[b, n] * layer.experts[int(best.indices[b, n])](x[b, n])
        for b in range(2) for n in range(x.shape[1])
    ])  # fmt: skip
    torch.testing.assert_close(layer(x), wanted.view_as(x))


def test_expert_choice_is_made_within_a_sample():
    layer, x = layer_of("EC-DiT")
    scores, wanted = (x @ layer.router).softmax(-1), torch.zeros_like(x)
    for b in range(2):
        for e, expert in enumerate(layer.experts):
            for n in scores[b, :, e].argsort(descending=True)[: layer.capacity].tolist():
                wanted[b, n] += scores[b, n, e] * expert(x[b, n])
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x[:1]), wanted[:1])


def test_diffmoe_takes_tokens_from_the_whole_batch():
    layer, x = layer_of("DiffMoE")
    rows, wanted = x.flatten(0, 1), torch.zeros(2 * x.shape[1], x.shape[-1])
    scores, foreseen = (rows @ layer.router).softmax(-1), layer.capacity_predictor(rows).sigmoid()
    for e, expert in enumerate(layer.experts):
        k = int((foreseen[:, e] > layer.threshold[e]).sum())
        for row in scores[:, e].argsort(descending=True)[:k].tolist():
            wanted[row] += scores[row, e] * expert(rows[row])
    torch.testing.assert_close(layer(x), wanted.view_as(x))
    assert not torch.allclose(layer(x[:1]), layer(x)[:1], atol=1e-4)
