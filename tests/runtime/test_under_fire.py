"""Whatever our side raises, the model runs as under plain torch.compile, with one warning.

Also with threads, copies, and wrappers around the model or the backend.
"""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

import moeca_compile
from moeca_compile import backend, fallback
from moeca_compile.capture.idioms.inline import Inline
from moeca_compile.capture.idioms.pairs import Pairs
from moeca_compile.capture.idioms.routed import Routed
from moeca_compile.capture.refusals import forget_refusals
from moeca_compile.capture.trust import forget_verdicts
from moeca_compile.lower import program, validate
from moeca_compile.options import ConfigError
from moeca_compile.passes.rewrite.caches import Caches
from moeca_compile.passes.rewrite.without_markers import without_markers
from moeca_compile.runtime import loop
from moeca_compile.runtime.capacities import Capacities
from moeca_compile.runtime.requests import Requests
from moeca_compile.runtime.streams import Stream, Streams
from moeca_compile.runtime.timesteps import TimestepReader
from tests.harness import captured, own_warnings
from tests.models import Sizes, TinyDiTMoE, make_inputs, make_model
from tests.policies.variable_k_models import Threshold, make_pairs_model, mark
from tests.references import run_with_markers
from tests.test_backend import assert_near, told

install = importlib.import_module("moeca_compile.capture.install")
wrapping = importlib.import_module("moeca_compile.capture.wrapping")
gate = importlib.import_module("moeca_compile.capture.gate")
SIZES = Sizes(depth=2, width=16, heads=2, experts=4, expert_width=8)
STEPS = 4


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    forget_refusals()
    forget_verdicts()
    yield
    torch._dynamo.reset()
    forget_refusals()
    forget_verdicts()


@pytest.fixture
def model() -> TinyDiTMoE:
    return make_model(SIZES)


def compiled(model: Any, backend: Any = "moeca", dynamic: bool | None = None, **options: Any) -> Any:
    options = {"recipe": "moeca", "lowering": "eager", **options} if backend == "moeca" else None
    return torch.compile(model, backend=backend, dynamic=dynamic, options=options)


@torch.no_grad()
def generate(model: Callable[..., Tensor], batch: int = 2, steps: int = STEPS) -> Tensor:
    x, y = make_inputs(make_model(SIZES), batch)
    for number in range(steps):
        x = x - model(x, torch.full((batch,), 1 - number / steps), y) / steps
    return x


traced_once = pytest.mark.usefixtures("traced_once")
"""Where no fault is planted in what exports or traces."""

# A fault in every stage


def fails(*_: Any, **__: Any) -> Any:
    raise RuntimeError("planted")


FAULTS: dict[str, tuple[Any, str]] = {
    "looking through the classes": (install, "_subclasses"),
    "checking the dispatch": (wrapping, "vouch"),
    "asking for whom Dynamo traces": (gate, "_is_for_moeca"),
    "asking whether to run the original": (fallback, "why_original"),
    "noting graph breaks": (fallback, "note_breaks"),
    "looking at the graph": (fallback, "worth_rewriting"),
    "telling arguments from weights": (backend, "is_module_state"),
    "numbers to tensors": (backend, "scalar_inputs_to_tensors"),
    "the engine": (backend, "Engine"),
    "one device": (backend, "to_one_device"),
    "normalizing": (backend, "normalize"),
    "matching": (backend, "match_regions"),
    "fitting": (backend, "config_that_fits"),
    "what pays": (backend, "regions_that_pay"),
    "validating": (backend, "sound_regions"),
    "planning": (backend, "plan_steps"),
    "without a timestep": (fallback, "uncached_without_timestep"),
    "why experts wait": (backend, "why_experts_wait"),
    "the step function": (backend.CompiledGraph, "function"),
    "tracing": (backend, "trace_step"),
    "lowering": (backend, "lower_parts"),
    "checking a step": (backend, "same_step"),
    "the loop": (loop, "Capacities"),
    "the position of a call": (Requests, "enter"),
    "the stream of a call": (Streams, "of"),
    "the timestep": (TimestepReader, "read"),
    "the capacity": (Capacities, "kind"),
    "the trial step": (loop, "run_eagerly"),
    "forecast weights": (Stream, "weights"),
    "dropping old values": (Caches, "release"),
    "running a step": (program.CompiledStep, "__call__"),
    "storing new values": (Caches, "store"),
    "noting a full step": (Stream, "note_refreshed"),
    "a larger capacity": (Capacities, "promote"),
    "writing inputs back": (backend.CompiledGraph, "write_back"),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("stage", FAULTS)
def test_whatever_stage_fails_the_model_runs_with_one_warning(model, monkeypatch, request, stage):
    if stage != "tracing":
        request.getfixturevalue("traced_once")
    expected = generate(model)
    monkeypatch.setattr(*FAULTS[stage], fails)
    # Classes that were looked through before this fault are captured all the same: then all steps must be full.
    fast = compiled(model, full_every=1 if FAULTS[stage][0] in (install, wrapping) else 4)
    with told() as texts:
        for _ in range(2):
            assert_near(generate(fast), expected)
    planted = [text for text in texts if "planted" in text]
    assert len(planted) == 1, texts


@pytest.mark.sampled(2)
@pytest.mark.parametrize("part", ["facts", "equivalent"])
def test_dispatch_whose_equivalent_fails_runs_as_it_is(model, monkeypatch, part):
    """While Dynamo traces it: the graph breaks there."""
    for idiom in (Routed, Inline, Pairs):
        monkeypatch.setattr(idiom, part, fails, raising=False)
    with told() as texts:
        assert_near(generate(compiled(model)), generate(model))
    assert ["the graph breaks here" in text for text in texts] == [True]


def test_the_export_may_fail(model, monkeypatch):
    monkeypatch.setattr(backend.compile_graph, "__defaults__", (fails,))
    with told() as texts:
        assert_near(generate(compiled(model)), generate(model))
    assert [text.count("planted") for text in texts] == [1]


def test_a_rewrite_that_fails_validation_is_left_out(model, monkeypatch):
    monkeypatch.setattr(validate, "step_function", fails)
    with told() as texts:
        assert_near(generate(compiled(model)), generate(model))
    assert len(texts) == 1


@traced_once
@pytest.mark.sampled(2)
@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
def test_a_step_that_fails_leaves_no_half_written_cache_in_use(model, monkeypatch, at):
    """The step has changed its caches when it raises."""
    run, calls = program.CompiledStep.__call__, iter(range(100))

    def sometimes(step: Any, *args: Any) -> Any:
        result = run(step, *args)
        return fails() if next(calls) == at else result

    fast, x, y, t = compiled(model, tau0=0.5, full_every=3), *make_inputs(model), torch.ones(2)
    with torch.no_grad():
        fast(x, t, y)  # a full step, before any fault
        monkeypatch.setattr(program.CompiledStep, "__call__", sometimes)
        found = [fast(x, t * (1 - number / 8), y) for number in range(1, 8)]
        for number, output in enumerate(found):
            if number >= at:
                assert_near(output, model(x, t * (1 - (number + 1) / 8), y))


def test_the_original_is_compiled_by_inductor(monkeypatch):
    model = make_model(replace(SIZES, experts=2))
    model.blocks = model.blocks[1:]  # the one with experts: Inductor takes its time
    monkeypatch.setattr(backend, "plan_steps", fails)
    with told() as texts:
        assert_near(generate(compiled(model, lowering="inductor")), generate(model))
    assert [text.count("planted") for text in texts] == [1]


def test_without_inductor_the_original_runs_op_by_op(model, monkeypatch):
    monkeypatch.setattr(backend, "plan_steps", fails)
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", fails)
    with told() as texts:
        assert_near(generate(compiled(model, lowering="inductor")), generate(model))
    assert len(texts) == 1


@pytest.mark.sampled(3)
@traced_once
@pytest.mark.parametrize("error", [KeyboardInterrupt, ConfigError("recipe", 1, "planted")], ids=str)
@pytest.mark.parametrize("stage", ["planning", "running a step"])
def test_interrupts_and_wrong_options_pass_through(model, monkeypatch, error, stage):
    def raises(*_: Any) -> Any:
        raise error

    fast = compiled(model)
    with monkeypatch.context() as patch:
        patch.setattr(*FAULTS[stage], raises)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            generate(fast)
    assert_near(generate(fast, steps=1), generate(model, steps=1))
    assert own_warnings(moeca_compile.report(fast)) == []


@traced_once
def test_an_error_of_the_model_itself_is_raised_and_caching_goes_on(model):
    fast, (x, y) = compiled(model), make_inputs(model)
    with torch.no_grad():
        fast(x, torch.ones(2), y)
        with pytest.raises(IndexError):
            fast(x, torch.ones(2), y + 1000)
    assert_near(generate(fast, steps=1), generate(model, steps=1))
    assert own_warnings(moeca_compile.report(fast)) == []


@pytest.mark.parametrize("kind", ["fixed k", "variable k"])
def test_markers_become_loops_over_experts(model, kind):
    model = model if kind == "fixed k" else mark(make_pairs_model(Threshold), True)
    x, y = make_inputs(model)
    graph = captured(model, x, torch.ones(2), y)
    plain = without_markers(graph.gm)
    torch.testing.assert_close(plain(*graph.inputs), run_with_markers(graph.gm, graph.inputs))
    assert not [node for node in plain.graph.nodes if "moeca" in str(node.target)]
    assert any("moeca" in str(node.target) for node in graph.gm.graph.nodes)


# Threads


def together(*works: Callable[[], Any]) -> tuple[list[Any], list[BaseException]]:
    """What functions return, and raise, that start in threads at the same time."""
    barrier, results, errors = threading.Barrier(len(works)), [], []

    def run(work: Callable[[], Any]) -> None:
        barrier.wait()
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, errors


@traced_once
@pytest.mark.sampled(2)
@pytest.mark.parametrize("threads", [2, 4])
def test_threads_may_make_the_first_calls_together(model, threads):
    expected = generate(compiled(make_model(SIZES)))
    found, errors = together(*[partial(generate, compiled(model))] * threads)
    assert errors == []
    assert all(torch.equal(each, expected) for each in found)
    assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2


@traced_once
def test_a_thread_samples_while_another_brings_a_new_shape(model):
    fast = compiled(model, recipe="fora")
    expected = generate(fast)
    found, errors = together(lambda: [generate(fast, 3)], *[lambda: [generate(fast) for _ in range(4)]] * 2)
    assert errors == []
    same = [each for several in found if len(several) > 1 for each in several]
    assert len(same) == 8
    assert all(torch.equal(each, expected) for each in same)
    assert own_warnings(moeca_compile.report(fast)) == []


@traced_once
def test_ready_steps_do_not_wait_for_what_is_compiled(model, monkeypatch):
    fast = compiled(model, recipe="fora")
    generate(fast), generate(fast, 3)  # from here on, Dynamo's graph is for every batch size
    expected, entered, done = generate(fast), threading.Event(), threading.Event()

    def waits(*args: Any) -> Any:
        entered.set()
        assert done.wait(60)
        return plan(*args)

    def samples() -> Tensor:
        assert entered.wait(60)
        found = generate(fast)
        done.set()
        return found

    plan = backend.plan_steps
    monkeypatch.setattr(backend, "plan_steps", waits)
    found, errors = together(samples, lambda: generate(fast, 4)[:2])
    assert errors == []
    assert any(torch.equal(each, expected) for each in found)
    assert own_warnings(moeca_compile.report(fast)) == []


# Wrappers


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@traced_once
@pytest.mark.sampled(3)
@pytest.mark.parametrize("outside", [True, False], ids=["compile(DDP)", "DDP(compile)"])
@pytest.mark.parametrize("width", [16, 128], ids=["one bucket", "several buckets"])
def test_ddp(one_process, outside, width):
    model = make_model(Sizes(depth=4, width=width, heads=2, experts=4, expert_width=2 * width)).requires_grad_(True)
    wrap = partial(DistributedDataParallel, bucket_cap_mb=1)
    fast = compiled(wrap(model), full_every=1) if outside else wrap(compiled(model, full_every=1))
    assert_near(generate(fast), generate(model))
    report = moeca_compile.report(fast if outside else fast.module)
    assert report.graphs == 1
    assert report.steps == {"full": STEPS}


@traced_once
def test_a_users_backend_that_calls_ours_is_ours(model):
    def users(gm: Any, inputs: Any) -> Any:
        return moeca_compile.moeca_backend(
            gm, inputs, options={"recipe": "moeca", "lowering": "eager", "full_every": 1}
        )

    fast = torch.compile(model, backend=users)
    with told() as texts:
        for _ in range(2):
            assert_near(generate(fast), generate(model))
    report = moeca_compile.report(fast)
    assert (report.graphs, report.graph_breaks) == (1, ())
    assert any(region.kind == "experts" and region.status == "cached" for region in report.regions)
    assert texts == []


class Breaks(nn.Module):
    """A feed-forward in which the graph breaks, in a function defined in forward or called by a comprehension."""

    def __init__(self, inner: nn.Module, nested: bool) -> None:
        super().__init__()
        self.inner, self.nested = inner, nested

    def run(self, rows: Tensor) -> Tensor:
        if rows.mean() > 1e9:
            rows = rows + 1
        return self.inner(rows)

    def forward(self, x: Tensor) -> Tensor:
        def run(rows: Tensor) -> Tensor:
            if rows.mean() > 1e9:
                rows = rows + 1
            return self.inner(rows)

        return run(x) if self.nested else torch.cat([self.run(part) for part in x.chunk(2)])


class ReadsPicture(nn.Module):
    """Python reads numbers with a fraction of an argument before the first block."""

    def __init__(self, model: nn.Module, read: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.model, self.read = model, read

    def forward(self, x, t, y):
        return self.model(x * 2 if self.read(x) else x, t, y)


READS = {
    "a branch": lambda x: (x > 1e9).any(),
    "a number": lambda x: x.sum().item() > 1e9,
    "a list": lambda x: (2 * x).flatten().tolist()[0] > 1e9,
}


@pytest.mark.sampled(2)
@traced_once
@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_break_where_python_reads_an_argument_says_what_to_write(model, read):
    reading = ReadsPicture(model, read).eval()
    arguments = (torch.randn(2, 1, 8, 8), torch.ones(2), torch.tensor([1, 2]))
    with told() as texts, torch.no_grad():
        assert_near(compiled(reading)(*arguments), reading(*arguments))
    assert any("test_under_fire.py:" in text and "Python needs the value of a tensor" in text for text in texts), (
        texts
    )


@traced_once
@pytest.mark.parametrize("nested", [True, False], ids=["nested function", "comprehension"])
def test_a_graph_break_in_code_without_a_hash(model, nested):
    """Dynamo keeps the module's globals, a dict, among the constants of such code."""
    model.blocks[0].mlp = Breaks(model.blocks[0].mlp, nested)
    with told() as texts:
        for _ in range(2):
            assert_near(generate(compiled(model)), generate(model))
    assert texts
    assert all("the graph breaks here" in text for text in texts)


class Int8(Tensor):
    """A weight in 8 bits with a scale for each row, as quantization libraries have it."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Int8:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values_, self.scale = values, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values_", "scale"], None

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], *_: Any) -> Int8:
        return Int8(tensors["values_"], tensors["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].scale)
        plain = partial(tree_map, lambda v: v.values_ * v.scale if isinstance(v, Int8) else v)
        return func(*plain(args), **plain(kwargs or {}))


@traced_once
@pytest.mark.sampled(3)
@pytest.mark.parametrize("where", ["", "blocks.0.attn", "experts"])
def test_weights_that_hold_other_tensors_are_left_to_torch_compile_with_one_warning(model, where, monkeypatch):
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and where in n]
    for _, linear in linears:
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        quantized = Int8((linear.weight / scale).round().to(torch.int8), scale)
        linear.weight = nn.Parameter(quantized, requires_grad=False)
    with told() as texts:
        for _ in range(2):
            assert_near(generate(compiled(model)), generate(model))
    assert len(texts) == 1
    assert f"{linears[0][0]}.weight is a Int8" in texts[0]


@traced_once
@pytest.mark.sampled(2)
@pytest.mark.parametrize("recipe", ["moeca", "fora"])
def test_dynamic_shapes_are_cached(model, recipe):
    expected = generate(compiled(model, recipe=recipe))
    torch._dynamo.reset()
    fast = compiled(model, dynamic=True, recipe=recipe)
    for batch in (2, 3):
        found = generate(fast, batch)
        if batch == 2:
            assert_near(found, expected)
    report = moeca_compile.report(fast)
    assert own_warnings(report) == []
    assert len(report.steps) > 1


@traced_once
def test_a_changed_number_of_the_model_counts_under_dynamic_shapes(model):
    fast = compiled(model, dynamic=True, full_every=1)
    assert_near(generate(fast), generate(model))
    for block in model.blocks:
        block.norm1.eps = 0.5
    assert_near(generate(fast), generate(model))


# Copies


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@traced_once
@pytest.mark.sampled(3)
@pytest.mark.parametrize("copied", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("called", [False, True], ids=["before the first call", "after it"])
def test_a_copy_of_a_compiled_model_has_a_record_of_its_own(model, copied, called):
    fast = compiled(model)
    if called:
        generate(fast)
    other = copied(fast)
    torch._dynamo.reset()
    assert moeca_compile.report(other).graphs == 0
    assert_near(generate(other), generate(compiled(make_model(SIZES))))
    assert moeca_compile.report(other).graphs == 1
    assert sum(moeca_compile.report(other).steps.values()) == STEPS
