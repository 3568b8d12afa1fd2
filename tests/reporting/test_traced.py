"""Traces against what plain models and the simulation of MoECa do, and that nothing else notices them."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import moeca_compile
from moeca_compile.config import MoecaConfig
from moeca_compile.passes.rewrite.kinds import StepKind
from moeca_compile.reporting import traced
from moeca_compile.reporting.found import record_of
from moeca_compile.reporting.traced import trace_of
from moeca_compile.runtime import tracing
from tests.harness import captured
from tests.models import SMALL, TinyDiTMoE, make_inputs, make_model
from tests.policies.reference_moeca import Simulation
from tests.policies.reference_variable_k import PairSimulation
from tests.policies.variable_k_models import ExpertChoice, Threshold, make_pairs_model, mark

pytestmark = pytest.mark.usefixtures("traced_once")
STEPS = 7
LAYERS = ("blocks.1.mlp",)


@pytest.fixture(scope="module")
def model() -> TinyDiTMoE:
    """Two blocks, the second with three experts."""
    return make_model(SMALL)


@pytest.fixture(scope="module")
def deep() -> TinyDiTMoE:
    """Four blocks, the second and fourth with six experts."""
    return make_model()


def compiled(model: nn.Module, **options):
    torch._dynamo.reset()
    return torch.compile(
        model, backend="moeca", options={"recipe": "moeca", "lowering": "eager", "validate": False, **options}
    )


@torch.no_grad()
def generate(run, model: TinyDiTMoE, seed: int = 1, steps: int = STEPS, labels: Tensor | None = None) -> list[Tensor]:
    """The outputs of an Euler generation."""
    (x, y), outputs = make_inputs(model, seed=seed), []
    for number in range(steps):
        outputs.append(run(x, torch.full((len(x),), 1 - number / steps), y if labels is None else labels))
        x = x - outputs[-1] / steps
    return outputs


def steps_of(run) -> tuple:
    (trace,) = moeca_compile.report(run).traces
    return trace.steps


@pytest.mark.sampled(4)
@pytest.mark.parametrize("recipe", ["moeca", "moeca-forecast", "fora-forecast", "stack"])
def test_pictures_and_compiled_steps_are_the_same_with_a_trace(model, recipe):
    plain, traced = (compiled(model, recipe=recipe, full_every=3, trace=trace) for trace in (False, True))
    expected, rng = generate(plain, model), torch.get_rng_state()
    found = generate(traced, model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), rng)
    codes = []
    for each in (plain, traced):
        (loop,) = record_of(each).engines[0].loops.values()
        codes.append({kind: step.traced.graph.code for kind, step in loop.steps.items()})
    assert codes[0] == codes[1]
    assert moeca_compile.report(plain).traces == () and len(steps_of(traced)) == STEPS
    assert moeca_compile.report(plain).steps == moeca_compile.report(traced).steps


def test_routing_and_drift_of_full_steps_are_the_models_own(model):
    run = compiled(model, recipe="moeca", full_every=1, trace=True)
    routed, outputs = {}, {}

    def gate(name):
        return lambda module, args, out: routed.setdefault(name, []).append(out[0])

    def output(name):
        return lambda module, args, out: outputs.setdefault(name, []).append(out)

    generate(run, model)
    hooks = [model.get_submodule(f"{name}.gate").register_forward_hook(gate(name)) for name in LAYERS]
    attentions = [f"blocks.{i}.attn" for i in range(2)]
    hooks += [model.get_submodule(name).register_forward_hook(output(name)) for name in attentions]
    try:
        generate(model, model)
    finally:
        for hook in hooks:
            hook.remove()
    (trace,) = moeca_compile.report(run).traces
    assert trace.layers == LAYERS and trace.grid == (4, 4)
    assert (trace.samples, trace.tokens) == (2, 16)
    for step in trace.steps:
        for layer, name in enumerate(LAYERS):
            expected = torch.bincount(routed[name][step.number].flatten(), minlength=3)
            assert step.routing[layer] == tuple(expected.tolist())
        for name in attentions:
            drift = step.drift[trace.regions.index(f"attention {name}")] if step.drift else None
            if step.number == 0:
                assert drift is None
            else:
                last, now = outputs[name][step.number - 1 : step.number + 1]
                assert drift == pytest.approx(((now - last).norm() / now.norm()).item(), rel=1e-4)
        assert step.kinds == {"full": 1} and step.full and step.seconds > 0
        assert step.match == step.tokens == ()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("options", [{}, {"budget": 0.25}, {"tau0": 100.0}, {"mask_source": "previous"}], ids=str)
def test_match_reuse_and_tokens_of_cache_steps_are_those_of_the_simulation(deep, options):
    model = deep
    run = compiled(model, recipe="moeca", full_every=4, trace=True, **options, **capacities(options))
    generate(run, model)
    simulation = Simulation(model, MoecaConfig(recipe="moeca", full_every=4, **options), reroute=True)
    decisions = []
    generate(lambda *inputs: decisions.append(simulation.step(*inputs)) or decisions[-1].output, model)
    assert any(step.tokens and any(step.tokens) for step in steps_of(run))
    for step, expected in zip(steps_of(run), decisions, strict=True):
        assert step.full == (expected.kind == "full")
        layers = list(expected.decisions.values())
        for place, layer in enumerate(layers):
            assert step.match[place] == pytest.approx(layer.matched.float().mean().item(), abs=1e-6)
            assert step.reuse[place] == pytest.approx(1 - layer.recomputed.float().mean().item(), abs=1e-6)
            tokens = layer.recomputed.any(-1)
            assert step.recomputed[place] == pytest.approx(tokens.sum(1).float().mean().item())
        if layers:
            tokens = torch.stack([layer.recomputed.any(-1) for layer in layers]).float()
            assert step.tokens == pytest.approx(tokens.mean((0, 1)).tolist(), abs=1e-6)


def capacities(options) -> dict:
    return {} if "budget" in options else {"capacities": (1.0,)}


def test_routing_of_cache_steps_is_that_of_the_probe(model):
    run = compiled(model, recipe="moeca", budget=0.0, full_every=4, trace=True)
    generate(run, model)
    simulation = Simulation(model, MoecaConfig(recipe="moeca", budget=0.0, full_every=4))
    decisions = []
    generate(lambda *inputs: decisions.append(simulation.step(*inputs)) or decisions[-1].output, model)
    for step, expected in zip(steps_of(run), decisions, strict=True):
        for place, layer in enumerate(expected.decisions.values()):
            assert step.routing[place] == tuple(torch.bincount(layer.ids.flatten(), minlength=3).tolist())
            assert set(step.tokens) == {0.0}


def by_place(choices: list[Tensor], experts: int) -> tuple[tuple[int, ...], ...]:
    """How often each expert was taken at each place, from ids (B, N, k) or masks (B, N, E), token by token."""
    counts = [[0] * choices[0].shape[1] for _ in range(experts)]
    for choice in choices:
        for sample in choice:
            for place, token in enumerate(sample):
                taken = token.nonzero().flatten() if token.dtype == torch.bool else token
                for expert in taken.tolist():
                    counts[expert][place] += 1
    return tuple(map(tuple, counts))


def first_outputs(router: nn.Module, step, *inputs: Tensor) -> Tensor:
    """What a router chooses when it runs for the first time in a step: later ones are for some tokens again."""
    seen = []
    hook = router.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    try:
        step(*inputs)
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("options", [{}, {"budget": 0.25}], ids=str)
def test_experts_by_place_are_those_of_the_simulation_in_the_middle_layer(deep, options):
    options = {"recipe": "moeca", "full_every": 4, **options, **capacities(options)}
    run = compiled(deep, trace=True, **options)
    generate(run, deep)
    simulation, choices = Simulation(deep, MoecaConfig(**options), reroute=True), []

    def step(*inputs):
        outputs = []
        router = deep.get_submodule("blocks.3.mlp.gate")
        choices.append(first_outputs(router, lambda *given: outputs.append(simulation.step(*given).output), *inputs))
        return outputs[0]

    generate(step, deep)
    (trace,) = moeca_compile.report(run).traces
    assert trace.layers == ("blocks.1.mlp", "blocks.3.mlp") and trace.mapped_layer == "blocks.3.mlp"
    assert trace.activation == by_place(choices, experts=6)
    assert len({places for places in trace.activation}) > 1 and sum(map(sum, trace.activation)) == STEPS * 2 * 16 * 2


@pytest.mark.sampled(3)
@pytest.mark.parametrize("recipe", ["toca", "delta", "stack"])
def test_experts_by_place_add_up_to_the_routing_of_their_layer(deep, recipe):
    run = compiled(deep, recipe=recipe, trace=True)
    with moeca_compile.generation(steps=STEPS):
        generate(run, deep)
    (trace,) = moeca_compile.report(run).traces
    known = [step.routing[1] for step in trace.steps if step.routing and step.routing[1]]
    assert known and tuple(map(sum, trace.activation)) == tuple(map(sum, zip(*known, strict=True)))


def test_where_tokens_form_no_grid_experts_are_not_counted_by_place(model, monkeypatch):
    for module in (tracing, traced):
        monkeypatch.setattr(module, "grid_of", lambda compiled: None)
    run = compiled(model, trace=True)
    generate(run, model)
    (trace,) = moeca_compile.report(run).traces
    assert trace.grid is None and trace.mapped_layer == "" and trace.activation == () and trace.steps[0].routing


@pytest.mark.parametrize(("axes", "middle"), [("p", 0), ("pp", 1), ("ppp", 1), ("pjpjp", 2), ("pjjj", 0), ("", None)])
def test_the_mapped_layer_is_the_middle_one_of_those_on_the_main_stream(axes, middle, monkeypatch):
    monkeypatch.setattr(tracing, "grid_of", lambda compiled: (4, 4))
    layers = [SimpleNamespace(marker=i) for i in range(len(axes))]
    main = SimpleNamespace(axis="p")  # of the picture; j is joint with text
    regions = SimpleNamespace(experts=layers, main=main, axis=axes.__getitem__)
    assert tracing.mapped_layer(SimpleNamespace(regions=regions)) is (None if middle is None else layers[middle])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("router", [ExpertChoice, Threshold])
def test_layers_without_a_fixed_number_of_experts_are_traced_too(router):
    options = {"recipe": "moeca", "capacities": (1.0,), "full_every": 3}
    model = make_pairs_model(router)
    noise, labels = make_inputs(model)
    graph = captured(mark(model, True), noise, torch.ones(len(noise)), labels)
    engine = graph.engine(trace=True, validate=False, lowering="eager", **options)
    generate(lambda x, t, y: engine(*graph.arguments(x=x, t=t, y=y))[0], model)
    simulation, decisions = PairSimulation(mark(model, False), MoecaConfig(**{"recipe": "moeca", **options})), []
    simulation.capacity = model.sizes.tokens
    last = simulation.model.blocks[-1].mlp.router
    full_choices = []

    def step(*inputs):
        full_choices.append(first_outputs(last, lambda *given: decisions.append(simulation.step(*given)), *inputs))
        return decisions[-1].output

    generate(step, model)
    (loop,) = engine.loops.values()
    trace = trace_of(loop)
    choices = [
        list(each.decisions.values())[-1].ids if each.decisions else full
        for each, full in zip(decisions, full_choices, strict=True)
    ]
    assert trace.mapped_layer == trace.layers[-1] and trace.activation == by_place(choices, experts=4)
    assert any(set(step.tokens) - {0.0, 1.0} for step in trace.steps)
    for step, expected in zip(trace.steps, decisions, strict=True):
        layers = list(expected.decisions.values())
        recomputed = [torch.zeros_like(each.ids).masked_scatter(each.ids, each.recomputed) for each in layers]
        for place, layer in enumerate(layers):
            assert step.routing[place] == tuple(layer.ids.sum((0, 1)).tolist())
        if layers:
            tokens = torch.stack([pairs.any(-1) for pairs in recomputed]).float()
            assert step.tokens == pytest.approx(tokens.mean((0, 1)).tolist(), abs=1e-6)


def test_a_recipe_without_branches_has_no_cache_counts_but_drift_and_routing(model):
    run = compiled(model, recipe="stack", full_every=3, trace=True)
    generate(run, model)
    full, *cached, later = steps_of(run)[:4]
    assert full.routing and later.full and None not in later.drift
    assert all(not step.full and step.routing == step.match == step.drift == () for step in cached)


def test_what_another_group_of_a_recipe_caches_runs_and_is_traced(deep):
    """Early the last blocks are cached, late the first ones; each time the experts of the others run."""
    run = compiled(deep, recipe="delta", cached_blocks=0.5, full_every=7, trace=True)
    with moeca_compile.generation(steps=STEPS):
        generate(run, deep)
    first, second = (1, 3)  # of four blocks
    for step in steps_of(run):
        ran = [block for block, routing in zip((first, second), step.routing, strict=True) if routing]
        assert ran == [first, second] if step.full else [first] if step.number < STEPS / 2 else [second]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", ["teacache", "block-cache"])
def test_steps_that_the_data_decide_are_traced(deep, recipe):
    plain, traced = (compiled(deep, recipe=recipe, reuse_threshold=0.3, trace=trace) for trace in (False, True))
    expected, found = generate(plain, deep), generate(traced, deep)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    full = moeca_compile.report(traced).steps["full"]
    assert 1 < full < STEPS and sum(step.full for step in steps_of(traced)) == full


def test_only_steps_inside_are_traced_before_the_first_call_too(model):
    run = compiled(model, recipe="stack")
    with moeca_compile.trace(run):
        generate(run, model)
    kinds = [next(iter(step.kinds.items())) for step in steps_of(run)]
    assert kinds == [(kind, 1) for kind in ("full", "cache", "cache", "cache", "full", "cache", "cache")]
    generate(run, model, seed=2)
    assert all(sum(step.kinds.values()) == 1 for step in steps_of(run))
    with moeca_compile.trace(run):
        generate(run, model, seed=3, steps=3)
    assert len(steps_of(run)) == 3, "what an earlier trace collected is dropped"


def test_drift_is_never_since_a_step_of_an_earlier_trace(model):
    run, (x, y) = compiled(model, recipe="stack", full_every=1), make_inputs(model)

    @torch.no_grad()
    def step(number):
        run(x * (1 - number / 100), torch.full((len(x),), 1 - number / 10), y)

    for numbers in ((0, 1), (2, 3)):
        with moeca_compile.trace(run):
            for number in numbers:
                step(number)
        first, second = steps_of(run)
        assert (first.number, second.number) == numbers
        assert first.drift == () and None not in second.drift


def test_another_model_is_not_traced(model):
    one, other = compiled(model, recipe="stack"), None
    other = torch.compile(
        make_model(SMALL, seed=1),
        backend="moeca",
        options={"recipe": "stack", "lowering": "eager", "validate": False},
    )
    with moeca_compile.trace(one):
        generate(other, model)
    assert moeca_compile.report(other).traces == moeca_compile.report(one).traces == ()


def test_what_is_not_compiled_cannot_be_traced(model):
    with pytest.raises(TypeError, match="is not compiled"), moeca_compile.trace(model):
        pass


def test_streams_and_generations_are_added_up_and_drift_stays_with_its_stream(model):
    run = compiled(model, recipe="fora", full_every=2, trace=True)
    x, y = make_inputs(model)

    @torch.no_grad()
    def guided(seed):
        z = make_inputs(model, seed=seed)[0]
        for number in range(4):
            t = torch.full((len(x),), 1 - number / 4)
            for name, labels in (("cond", y), ("uncond", torch.full_like(y, model.sizes.classes))):
                with moeca_compile.stream(name):
                    out = run(z, t, labels)
            z = z - out / 4

    guided(1)
    once = steps_of(run)
    guided(2)
    twice = steps_of(run)
    assert [step.kinds for step in once] == [{"full": 2}, {"cache": 2}] * 2
    assert [step.kinds for step in twice] == [{"full": 4}, {"cache": 4}] * 2
    for a, b in zip(once[0].routing, twice[0].routing, strict=True):
        assert sum(b) == 2 * sum(a) == 4 * 2 * 16 * 2
    assert once[0].drift == twice[0].drift == (), "the first step of a generation has nothing to compare with"
    assert all(0 < drift < 1 for drift in twice[2].drift)


def test_a_step_that_cannot_be_traced_is_told_once_and_changes_nothing(model, monkeypatch):
    plain, run = compiled(model, recipe="moeca"), compiled(model, recipe="moeca", trace=True)
    expected = generate(plain, model)

    def fails(value):
        raise RuntimeError("no memory")

    monkeypatch.setattr(tracing, "sketch", fails)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = generate(run, model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    ours = [str(each.message) for each in told if "tracing a step failed" in str(each.message)]
    assert len(ours) == 1 and "RuntimeError: no memory" in ours[0]
    assert moeca_compile.report(run).traces == ()


def test_plain_values_are_the_trace(model):
    run = compiled(model, recipe="moeca", trace=True)
    generate(run, model)
    report = moeca_compile.report(run)
    values = json.loads(json.dumps(report.to_dict()))
    assert report.traces[0].activation and moeca_compile.Report.from_dict(values).traces == report.traces
    assert str(report).splitlines()[-1] == f"trace: {STEPS} calls of {STEPS} steps"
    line = type(model.blocks[0].attn).forward.__code__.co_firstlineno
    assert report.places["blocks.0.attn"] == f"dit.py:{line}"
    assert report.places.keys() == {region.name for region in report.regions}


class Event:
    """A CUDA event whose work ends when the test says so."""

    done = False
    clock = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.clock += 1
        self.at = Event.clock

    def query(self) -> bool:
        return Event.done

    def synchronize(self) -> None:
        Event.done = True

    def elapsed_time(self, other: Event) -> float:
        assert Event.done, "it would be read before the device is there"
        return 1000.0 * (other.at - self.at)


def test_on_cuda_times_are_read_when_the_trace_is(model, monkeypatch):
    run = compiled(model, recipe="stack", trace=True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
    clock = tracing._clock(torch.device("cuda"))
    monkeypatch.setattr(tracing, "_clock", lambda device: clock)
    generate(run, model)
    (loop,) = record_of(run).engines[0].loops.values()
    assert not Event.done and not any(log.seconds for log in loop.tracer.steps.values())
    assert {step.seconds for step in steps_of(run)} == {1.0}


def test_elements_for_drift_are_taken_over_all_features(monkeypatch):
    monkeypatch.setattr(tracing, "_ELEMENTS", 100)
    value = torch.arange(8, dtype=torch.float32).expand(2, 50, 8)
    found = tracing.sketch(value)
    assert 50 < len(found) <= 100
    assert torch.bincount(found.long(), minlength=8).min() >= len(found) // 8 - 1


def test_branches_of_experts_are_counted_by_place_in_both_forms():
    ids = torch.tensor([[0, 2], [2, 3], [1, 0], [2, 0]])  # two samples of two tokens
    mask = torch.zeros(4, 5, dtype=torch.bool).scatter(1, ids, True)
    for choice in (ids, ids.int(), mask):
        found = tracing.branches_by_place(choice, experts=5, tokens=2)
        assert found.tolist() == [[2, 1], [1, 0], [1, 2], [0, 1], [0, 0]]


def test_branches_of_experts_are_counted_in_both_forms():
    ids = torch.tensor([[0, 2], [2, 3]])
    assert tracing.branches_by_expert(ids, 5).tolist() == [1, 0, 2, 1, 0]
    mask = torch.zeros(2, 5, dtype=torch.bool).scatter(1, ids, True)
    assert tracing.branches_by_expert(mask, 5).tolist() == [1, 0, 2, 1, 0]


@pytest.mark.parametrize(
    ("shape", "tokens", "grid"),
    [
        ((2, 4, 8, 8), 16, (4, 4)),
        ((2, 4, 16, 8), 32, (8, 4)),
        ((2, 4, 12, 6), 72, (12, 6)),
        ((2, 4, 8, 8), 25, (5, 5)),  # tokens of something else: a square is as good a guess as any
        ((2, 4, 8, 8), 24, None),
        ((2, 16, 64), 16, (4, 4)),
        ((2, 15, 64), 15, None),
    ],
)
def test_tokens_lie_over_the_picture_as_its_shape_says(shape, tokens, grid):
    node = torch.fx.Graph().placeholder("x")
    node.meta["val"] = torch.empty(shape)
    main = SimpleNamespace(tokens=tokens)
    compiled = SimpleNamespace(regions=SimpleNamespace(main=main), placeholders=[node], picture=0)
    assert tracing.grid_of(compiled) == grid


def test_kinds_have_their_steps_flops_and_times(model):
    run = compiled(model, recipe="moeca-forecast", full_every=2, trace=True)
    generate(run, model, steps=6)
    report = moeca_compile.report(run)
    by_name = {kind.name: kind for kind in report.traces[0].kinds}
    assert set(by_name) == {StepKind().name, "cache"}
    assert by_name["full"].steps == by_name["cache"].steps == 3
    assert by_name["full"].flops == report.flops.full_step
    assert 0 < by_name["cache"].flops < by_name["full"].flops
    fewest = {name: min(s.seconds for s in report.traces[0].steps if s.kind == name) for name in by_name}
    assert {name: kind.seconds for name, kind in by_name.items()} == fewest
