"""ToCa and DuCa against a simulation in loops over layers and tokens."""

from __future__ import annotations

import functools
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor

import moeca_compile
from examples.dit import Block, modulate, rotate
from moeca_compile.config import MoecaConfig
from moeca_compile.passes.rewrite.kinds import STEP_SCALARS, StepKind
from moeca_compile.policies import toca, token_wise
from moeca_compile.policies.policy import CacheStepAt
from moeca_compile.policies.token_scores import by_chance, with_bonus
from tests.harness import caches_of, captured
from tests.models import Sizes, TinyDiTMoE, make_inputs, make_model
from tests.policies.reference_token_wise import TokenWise, chance
from tests.policies.variable_k_models import ExpertChoice, PairsMoE, Threshold, make_pairs_model, mark
from tests.runtime.joint_models import SIZES, TEXT, Streams, TextFirst, split_heads

pytestmark = pytest.mark.usefixtures("traced_once")
STEPS = 14


@torch.no_grad()
def simulated(
    model: TinyDiTMoE, reference: TokenWise, time: float, x: Tensor, y: Tensor, side: int | None = None
) -> Tensor:
    """The next step of a model of attention and feed-forwards in turn, whose tokens fill a square of this side."""
    reference.next_step()
    h, c = model.embed_inputs(x, torch.full((len(x),), time), y)
    depth, grid = len(model.blocks), model.sizes.grid if side is None else side

    def blocks() -> Tensor:
        stream = h
        for i, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)
            z = modulate(block.norm1(stream), shift1, scale1)
            attended = reference.attention(
                f"attention {i}", lambda b=block, z=z: b.attn(z), lambda b=block, z=z: b.attn.split_heads(z)
            )
            stream = stream + gate1.unsqueeze(1) * attended
            z = modulate(block.norm2(stream), shift2, scale2)
            fed = reference.feedforward(
                f"layer {i}", i, depth, z, block.mlp, [(f"attention {i}", 0)], grid, isinstance(block.mlp, PairsMoE)
            )
            stream = stream + gate2.unsqueeze(1) * fed
        return stream

    return model.finish(reference.stack(blocks), c)


def same_generation(
    model, graph, reference: TokenWise, simulation=simulated, steps=STEPS, picture=None, **options
) -> None:
    engine = graph.engine(recipe="duca" if reference.dual else "toca", **options)
    x, y = make_inputs(model)
    x = x.reshape(picture or x.shape)
    with moeca_compile.generation(steps=steps):
        for number in range(steps):
            time = 1 - number / steps
            (found,) = engine(*graph.arguments(x=x, t=torch.full((len(x),), time), y=y))
            expected = simulation(model, reference, time, x, y)
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), (number, reference.kind)
            x = x - found / steps


CASES = [
    ("attention", 4, 0.07),
    ("attention", 3, 0.3),
    ("attention", 5, 1.0),  # at most all tokens: late layers take a part of them
    ("attention", 4, 0.0),  # attention and feed-forwards all from the cache
    ("value_norm", 4, 0.2),
    ("random", 4, 0.2),
]
BOTH = [
    pytest.param(recipe, *case, marks=[pytest.mark.slow] * ((i + j) % 2))  # each case runs for one of them
    for i, recipe in enumerate(("toca", "duca"))
    for j, case in enumerate(CASES)
]


@pytest.mark.parametrize(("recipe", "score", "every", "ratio"), BOTH)
def test_a_generation_is_that_of_the_loops(model, graph, eager_steps, recipe, score, every, ratio):
    reference = TokenWise(STEPS, every, ratio, score, dual=recipe == "duca")
    same_generation(model, graph, reference, token_score=score, full_every=every, fresh_ratio=ratio)
    cached = {"aggressive", "toca"} if reference.dual else {"toca"}
    assert set(reference.kinds) == {"full", *cached}
    assert (max(reference.fresh) > 0) == (ratio > 0)
    assert ratio in (0.0, 1.0) or len(set(reference.fresh)) > 2, "steps and layers differ"


def test_more_steps_than_any_bucket_of_them(model, graph, eager_steps):
    """Compiled buckets only bound what is recomputed: the number of tokens is exact at each step."""
    reference = TokenWise(40, ratio=0.4)
    same_generation(model, graph, reference, steps=40, fresh_ratio=0.4, capacities=(0.3, 1.0))
    assert len(set(reference.fresh)) > 8


@pytest.mark.sampled(3)
@pytest.mark.parametrize("router", [ExpertChoice, Threshold])
@pytest.mark.parametrize("recipe", ["toca", "duca"])
def test_experts_that_choose_among_all_tokens_still_do(eager_steps, router, recipe):
    """9 tokens: the patches at two edges of the picture are cut."""
    model = make_pairs_model(router)
    noise, labels = make_inputs(model)
    graph = captured(mark(model, True), noise, torch.ones(len(noise)), labels)
    mark(model, False)
    reference = TokenWise(STEPS, ratio=0.4, score="value_norm", dual=recipe == "duca")
    same_generation(model, graph, reference, fresh_ratio=0.4, token_score="value_norm")
    assert max(reference.fresh) > 1


class Wide(TinyDiTMoE):
    """A picture of 2 by 8 patches, which are as many as 4 by 4."""

    def finish(self, h: Tensor, c: Tensor) -> Tensor:
        return self.final_layer(h, c).reshape(-1, 2, 8, 2, 2, 1).permute(0, 5, 1, 3, 2, 4).reshape(-1, 1, 4, 16)


def test_a_picture_that_is_not_square_has_no_patches(eager_steps):
    torch.manual_seed(0)
    model = Wide(Sizes(width=16, depth=2, heads=2, experts=3, expert_width=16)).eval().requires_grad_(False)
    noise, labels = make_inputs(model)
    graph = captured(model, noise.reshape(2, 1, 4, 16), torch.ones(2), labels)
    simulation = partial(simulated, side=0)
    same_generation(model, graph, TokenWise(STEPS, ratio=0.3), simulation, picture=(2, 1, 4, 16), fresh_ratio=0.3)


@torch.no_grad()
def simulated_streams(model: Streams, reference: TokenWise, time: float, x: Tensor, y: Tensor) -> Tensor:
    """The next step of two joint blocks."""
    reference.next_step()
    h, c = model.embed_inputs(x, torch.full((len(x),), time), y)
    act, words_first = torch.nn.functional.silu(c), isinstance(model, TextFirst)
    text = words_of(x)
    for i, (picture, words) in enumerate(zip(model.picture, model.words, strict=True)):
        m, n = picture.adaln(act).chunk(6, 1), words.adaln(act).chunk(6, 1)
        start, total = (TEXT, TEXT) if words_first else (0, SIZES.tokens)

        def heads(picture=picture, words=words, h=h, text=text, m=m, n=n):
            streams = [picture.heads(h, m), words.heads(text, n)]
            q, k, v = (torch.cat(pair, 2) for pair in zip(*streams[:: -1 if words_first else 1], strict=True))
            if words_first:
                return q, k, v
            angles = model.positions
            return *(rotate(z, angles.cos(), angles.sin()) for z in (q, k)), v

        def attended(heads=heads):
            return torch.nn.functional.scaled_dot_product_attention(*heads()).transpose(1, 2).flatten(2)

        def of_picture(attended=attended, picture=picture, start=start):
            return picture.proj(attended()[:, start : start + SIZES.tokens])

        def of_words(attended=attended, words=words, start=start, total=total):
            return words.proj(attended()[:, :TEXT] if words_first else attended()[:, total:])

        h = h + m[2].unsqueeze(1) * reference.attention(f"picture {i}", of_picture, heads)
        text = text + n[2].unsqueeze(1) * reference.attention(f"words {i}", of_words, heads)
        z = modulate(picture.norm(h), m[3], m[4])
        ranked = [(f"picture {i}", start)]
        fed = reference.feedforward(f"for picture {i}", i, 2, z, picture.mlp, ranked, SIZES.grid)
        h = h + m[5].unsqueeze(1) * fed
        z, ranked = modulate(words.norm(text), n[3], n[4]), [(f"words {i}", 0 if words_first else SIZES.tokens)]
        text = text + n[5].unsqueeze(1) * reference.feedforward(f"for words {i}", i, 2, z, words.mlp, ranked)
    return model.finish(h + text.mean(1, keepdim=True), c)


def words_of(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(x), TEXT, SIZES.width, generator=generator)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("score", ["attention", "value_norm"])
@pytest.mark.parametrize("build", [Streams, TextFirst])
def test_streams_that_attend_together_have_tokens_of_their_own(eager_steps, build, score):
    model = build().eval().requires_grad_(False)
    noise, labels = make_inputs(model)
    graph = captured(model, noise, torch.ones(len(noise)), labels, words_of(noise))
    reference = TokenWise(STEPS, ratio=0.3, score=score)
    same_generation(model, graph, reference, simulated_streams, fresh_ratio=0.3, token_score=score)


class Captioned(TinyDiTMoE):
    """Each block also attends to words."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(Sizes(width=16, depth=2, heads=2, experts=3, expert_width=16))
        self.queries = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in self.blocks)
        self.keys_values = torch.nn.Linear(16, 32)
        self.words = torch.nn.Parameter(torch.randn(1, 5, 16))

    def heads(self, i: int, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self.keys_values(self.words).expand(len(h), -1, -1).chunk(2, -1)
        return split_heads(self.queries[i](h)), split_heads(keys), split_heads(values)

    def across(self, i: int, h: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*self.heads(i, h)).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.embed_inputs(x, t, y)
        for i, block in enumerate(self.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)
            h = h + gate1.unsqueeze(1) * block.attn(modulate(block.norm1(h), shift1, scale1))
            h = h + self.across(i, h)
            h = h + gate2.unsqueeze(1) * block.mlp(modulate(block.norm2(h), shift2, scale2))
        return self.finish(h, c)


class Pooled(Captioned):
    """Each block also attends to means of its own tokens."""

    def heads(self, i: int, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, values = self.keys_values(h.unflatten(1, (4, -1)).mean(2)).chunk(2, -1)
        return split_heads(self.queries[i](h)), split_heads(keys), split_heads(values)


@pytest.mark.parametrize(("build", "statistics"), [(Captioned, 4), (Pooled, 2)])
def test_attention_to_means_of_the_tokens_is_no_cross_attention(eager_steps, build, statistics):
    model = build().eval().requires_grad_(False)
    noise, labels = make_inputs(model)
    plan = captured(model, noise, torch.ones(len(noise)), labels).loop(recipe="toca").compiled.plan
    assert len(plan.regions.attentions) == 4
    assert sum(spec.name.startswith("statistic") for spec in plan.caches) == statistics


@torch.no_grad()
def simulated_captioned(model: Captioned, reference: TokenWise, time: float, x: Tensor, y: Tensor) -> Tensor:
    reference.next_step()
    h, c = model.embed_inputs(x, torch.full((len(x),), time), y)
    for i, block in enumerate(model.blocks):
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)
        z = modulate(block.norm1(h), shift1, scale1)
        h = h + gate1.unsqueeze(1) * reference.attention(
            f"self {i}", lambda b=block, z=z: b.attn(z), lambda b=block, z=z: b.attn.split_heads(z)
        )
        h = h + reference.cross_attention(
            f"cross {i}", lambda i=i, h=h: model.across(i, h), lambda i=i, h=h: model.heads(i, h)
        )
        ranked = [(f"self {i}", 0)] + [(f"cross {i}", 0)] * (reference.score == "attention")
        z = modulate(block.norm2(h), shift2, scale2)
        fed = reference.feedforward(f"layer {i}", i, 2, z, block.mlp, ranked, model.sizes.grid)
        h = h + gate2.unsqueeze(1) * fed
    return model.finish(h, c)


@pytest.mark.parametrize("score", ["attention", "value_norm"])
def test_attention_to_words_ranks_tokens_by_its_entropy(eager_steps, score):
    model = Captioned().eval().requires_grad_(False)
    noise, labels = make_inputs(model)
    graph = captured(model, noise, torch.ones(len(noise)), labels)
    reference = TokenWise(STEPS, ratio=0.3, score=score)
    same_generation(model, graph, reference, simulated_captioned, fresh_ratio=0.3, token_score=score)


class Windowed(TinyDiTMoE):
    """Its attention is within windows of four tokens, which is no attention of the stream's tokens."""

    def attend(self, block: Block, z: Tensor) -> Tensor:
        q, k, v = (split_heads(x.reshape(-1, 4, x.shape[-1])) for x in block.attn.qkv(z).chunk(3, -1))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return block.attn.proj(out.transpose(1, 2).reshape(z.shape))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.embed_inputs(x, t, y)
        for block in self.blocks:
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)
            h = h + gate1.unsqueeze(1) * self.attend(block, modulate(block.norm1(h), shift1, scale1))
            h = h + gate2.unsqueeze(1) * block.mlp(modulate(block.norm2(h), shift2, scale2))
        return self.finish(h, c)


@torch.no_grad()
def simulated_windowed(model: Windowed, reference: TokenWise, time: float, x: Tensor, y: Tensor) -> Tensor:
    reference.next_step()
    start, c = model.embed_inputs(x, torch.full((len(x),), time), y)
    depth = len(model.blocks)

    def blocks() -> Tensor:
        h = start
        for i, block in enumerate(model.blocks):
            shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(c)
            h = h + gate1.unsqueeze(1) * model.attend(block, modulate(block.norm1(h), shift1, scale1))
            z = modulate(block.norm2(h), shift2, scale2)
            fed = reference.feedforward(f"layer {i}", i, depth, z, block.mlp, side=model.sizes.grid)
            h = h + gate2.unsqueeze(1) * fed
        return h

    return model.finish(reference.stack(blocks), c)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", ["toca", "duca"])
def test_attention_that_is_not_understood_runs_at_every_step(eager_steps, recipe):
    torch.manual_seed(0)
    model = Windowed(Sizes(width=16, depth=2, heads=2, experts=3, expert_width=16)).eval().requires_grad_(False)
    noise, labels = make_inputs(model)
    graph = captured(model, noise, torch.ones(len(noise)), labels)
    reference = TokenWise(STEPS, ratio=0.3, dual=recipe == "duca")
    same_generation(model, graph, reference, simulated_windowed, fresh_ratio=0.3)
    assert max(reference.fresh) > 1


# --- schedule and shares ------------------------------------------------------------------------------------


@functools.cache
def run_compiled(steps: int | None, count: int = STEPS, model: TinyDiTMoE | None = None, **options):
    torch._dynamo.reset()
    model = model or make_model()
    compiled = torch.compile(model, backend="moeca", options={"lowering": "eager", **options})
    x, y = make_inputs(model)
    with torch.no_grad(), moeca_compile.generation(steps=steps):
        for number in range(count):
            compiled(x * (1 - number / 50), torch.full((len(x),), 1 - number / STEPS), y)
    return moeca_compile.report(compiled)


def test_the_report_has_its_steps_costs_and_all_layers():
    report = run_compiled(STEPS, recipe="toca")
    assert report.steps == {"full": 6, "cache[3]": 5, "cache[4]": 3}
    assert {region.status for region in report.regions} == {"cached"} and not report.warnings
    assert (report.config["fresh_ratio"], report.config["token_score"]) == (0.07, "attention")
    dense = run_compiled(STEPS, recipe="fora", full_steps=(0, 1, 7, 9, 11, 13), validate=False)
    assert report.flops is not None and dense.flops is not None
    assert report.flops.full_step == dense.flops.full_step, "attention maps are no work of the model"
    assert 1.4 < report.flops.speedup < dense.flops.speedup
    loose = run_compiled(STEPS, recipe="toca", capacities=(1.0,), validate=False)
    assert loose.flops is not None and loose.flops.speedup < report.flops.speedup, "padding is counted"


def test_the_report_of_duca():
    report = run_compiled(STEPS, recipe="duca")
    assert report.steps == {"full": 6, "cache aggressive": 6, "cache[3] conservative": 2}
    assert {region.status for region in report.regions} == {"cached"} and not report.warnings
    ours, other = report.flops, run_compiled(STEPS, recipe="toca").flops
    assert ours is not None and other is not None and ours.speedup > other.speedup


def test_without_the_number_of_steps_full_steps_are_even_and_the_mean_share_is_taken():
    assert run_compiled(None, 9, recipe="toca", validate=False).steps == {"full": 3, "cache[3]": 6}
    options = MoecaConfig(recipe="toca")
    first, last, unknown = (toca.share_at(options, CacheStepAt(*at, 1)) for at in ((1, 100), (99, 100), (7, None)))
    assert (first, last, unknown) == pytest.approx((0.175 * 0.616, 0.175 * 1.4, 0.175))


def test_a_trace_shows_which_tokens_were_recomputed():
    model = make_model()
    compiled = torch.compile(model, backend="moeca", options={"recipe": "toca", "lowering": "eager", "trace": True})
    x, y = make_inputs(model)
    reference, counts = TokenWise(STEPS), []
    with torch.no_grad(), moeca_compile.generation(steps=STEPS):
        for number in range(STEPS):
            reference.next_step()
            compiled(x * (1 - number / 50), torch.full((len(x),), 1 - number / STEPS), y)
            if reference.kind == "toca":
                counts.append([reference.count(depth, 4, 16) for depth in (1, 3)])
    (trace,) = moeca_compile.report(compiled).traces
    found = [sum(step.tokens) for step in trace.steps if step.tokens]
    assert found == pytest.approx([sum(both) / 2 for both in counts]) and sum(found) > 0, "of the two MoE layers"


def test_a_step_reads_what_the_host_says_and_draws_no_random_numbers(model, graph):
    loop = graph.loop(recipe="toca", token_score="random", lowering="eager")
    assert STEP_SCALARS in loop.compiled.plan.caches
    state = torch.get_rng_state()
    x, y = make_inputs(model)
    with torch.no_grad(), moeca_compile.generation(steps=STEPS):
        for number in range(4):
            loop(graph.arguments(x=x, t=torch.full((len(x),), 1 - number / STEPS), y=y))
    assert torch.equal(torch.get_rng_state(), state)
    assert {kind.full for kind in loop.tallies.by_kind} == {True, False}


def test_the_best_token_of_each_patch_has_a_bonus_of_its_size():
    scores = torch.tensor([[1.0, 5, 2, 3, 0, -9, 3, -6, -4]])  # 3 by 3, so the last patches hold two tokens and one
    found = with_bonus(scores, 3)
    torch.testing.assert_close(found, torch.tensor([[1.0, 8, 2, 3, 0, -9, 4.8, -6, -1.6]]) + bonus_at(2, 1.2))
    tied = with_bonus(torch.ones(1, 4), 2)
    assert tied.tolist() == [[pytest.approx(1.6), 1, 1, 1]], "the first of equal ones"


def bonus_at(token: int, bonus: float) -> Tensor:
    return torch.zeros(1, 9).index_fill(1, torch.tensor([token]), bonus)


def test_chance_is_even_and_other_at_each_step_and_layer():
    steps, layers = 50, 6
    found = torch.stack(
        [by_chance(torch.tensor(n), torch.tensor(p), 1, 64)[0] for n in range(steps) for p in range(layers)]
    )
    assert float(found.min()) >= 0 and float(found.max()) < 1
    assert found.mean(0).sub(0.5).abs().max() < 0.07 and found.var() == pytest.approx(1 / 12, rel=0.05)
    best = Counter(found.argmax(1).tolist())
    assert len(best) > 55 and max(best.values()) < 18, "300 draws of 64 tokens"
    assert found.corrcoef().fill_diagonal_(0).abs().mean() < 0.12


@pytest.fixture
def half_by_default():
    torch.set_default_dtype(torch.float16)
    yield
    torch.set_default_dtype(torch.float32)


def test_chance_and_caches_do_not_depend_on_the_default_dtype(model, graph, half_by_default):
    found = by_chance(torch.tensor(3), torch.tensor(1), 1, 64)
    assert found.dtype == torch.float32 and found[0].tolist() == [chance(i, 3, 1) for i in range(64)]
    loop = graph.loop(recipe="toca", lowering="eager", validate=False)
    state, weights = caches_of(loop)
    found = loop.eager(StepKind(), graph.arguments(), state, weights).updates
    dtypes = {spec.name: spec.dtype for spec in loop.compiled.plan.caches}
    assert {name: value.dtype for name, value in found.items()} == {name: dtypes[name] for name in found}


@pytest.mark.parametrize("score", ["attention", "value_norm"])
def test_statistics_of_attention_are_float32_under_autocast(graph, score):
    loop = graph.loop(recipe="toca", token_score=score, lowering="eager", validate=False)
    state, weights = caches_of(loop)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loop.eager(StepKind(), graph.arguments(), state, weights).updates
    statistics = [value for name, value in found.items() if name.startswith("statistic")]
    assert {value.dtype for value in statistics} == {torch.float32} and len(statistics) == 4
    if score == "attention":
        for value in statistics:  # each query gives 1
            torch.testing.assert_close(value.sum(1), torch.full((2,), 16.0), rtol=1e-6, atol=0)


def test_planned_flops_are_those_of_the_shares(graph):
    plan = graph.loop(recipe="toca", validate=False).compiled.plan
    tokens = plan.sizes[1]
    least, some, most = (plan.flops(StepKind(False, False), share) for share in (0.0, 0.25, 1.0))
    fora = graph.loop(recipe="fora", validate=False).compiled.plan
    assert least == fora.flops(StepKind(False, False))
    assert plan.filling_flops == 4 * 2 * 2 * 4 * tokens**2 * 8, "4 blocks, 2 samples, 4 heads of width 8"
    assert plan.flops(StepKind()) - plan.filling_flops == fora.flops(StepKind())
    assert least < some < most < plan.flops(StepKind())


@pytest.mark.parametrize(
    ("capacity", "rows"), [(0, [0, 0, 0, 0]), (3, [6, 4, 3, 1]), (4, [8, 6, 3, 1]), (16, [16, 16, 16, 3])], ids=str
)
def test_the_rows_that_run_and_the_planned_flops_have_the_padding_of_each_layer(graph, monkeypatch, capacity, rows):
    """Shares of 3, 4 and up to 11.2 (0.2 * 2.5 * 1.4) of 16 tokens, by 1.8, 1.267, 0.733 and 0.2: rounded up to whole
    tokens, and beyond 8 to all."""
    found, run = [], token_wise.rows_through_layers

    def observed(step, chosen, *nodes):
        found.append(chosen.shape[1])
        return run(step, chosen, *nodes)

    monkeypatch.setattr(token_wise, "rows_through_layers", observed)
    loop = graph.loop(recipe="toca", fresh_ratio=0.2, lowering="eager", validate=False)
    state, weights = caches_of(loop)
    state.store(loop.eager(StepKind(), graph.arguments(), state, weights).updates)
    loop.eager(StepKind(False, False, capacity), graph.arguments(), state, weights)
    assert found == [each for each in rows if each]
    plan = loop.compiled.plan
    shares = [each.share_at(capacity / 16) for each in plan.replacements if each.recomputes_rows]
    assert shares == [each / 16 for each in rows]
    # Of two samples: two products of 32 x 128; a router of 6, and two experts and the shared one of three products.
    dense, routed = 2 * 2 * 2 * 32 * 128, 2 * 2 * (32 * 6 + 2 * 3 * 32 * 48 + 3 * 32 * 96)
    recomputed = plan.flops(StepKind(False, False), capacity / 16) - plan.flops(StepKind(False, False))
    assert recomputed == dense * (rows[0] + rows[2]) + routed * (rows[1] + rows[3])
