"""`torch.compile(model, backend="moeca")` as a user sees it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeca_compile
from examples.dit import Mlp, modulate, sinusoidal
from moeca_compile import ConfigError, MoecaConfig, moeca_backend, report, reset
from moeca_compile.capture.refusals import forget_refusals
from moeca_compile.passes.analysis.flops import StepFlops
from tests.harness import how
from tests.models import MoE, Sizes, TinyDiTMoE, make_inputs, make_model

pytestmark = pytest.mark.usefixtures("traced_once")
SIZES = Sizes(depth=2, width=16, heads=2, experts=4, expert_width=8)
STEPS = 6


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    forget_refusals()
    yield
    torch._dynamo.reset()
    forget_refusals()


@pytest.fixture
def model() -> TinyDiTMoE:
    return make_model(SIZES)


def compiled(model: nn.Module, backend: Any = "moeca", **options: Any) -> Any:
    return torch.compile(model, backend=backend, options={"recipe": "moeca", **how.options, **options})


@torch.no_grad()
def generate(model: Callable[..., Tensor], batch: int = 2, steps: int = STEPS, seed: int = 1) -> Tensor:
    """Euler steps of rectified flow from the noise of a seed."""
    x, y = make_inputs(make_model(SIZES), batch, seed)
    for number in range(steps):
        x = x - model(x, torch.full((batch,), 1 - number / steps), y) / steps
    return x


def steps(fast: Any) -> tuple[int, int]:
    """Full steps and cache steps so far."""
    counts = report(fast).steps
    return counts.pop("full", 0), sum(counts.values())


@contextmanager
def told() -> Iterator[list[str]]:
    """The package's warnings inside; torch's own of what it imports, such as torch.jit, are none."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
        ours = [str(w.message) for w in caught if not issubclass(w.category, DeprecationWarning)]
        texts += [text for text in ours if "moeca" in text or "torch.compile" in text]


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# Found by name, with options.


@pytest.mark.smoke
def test_it_is_among_torchs_backends():
    assert "moeca" in torch._dynamo.list_backends(exclude_tags=())


@pytest.mark.smoke
@pytest.mark.parametrize("backend", ["moeca", moeca_backend], ids=["by name", "as a function"])
def test_full_steps_alone_are_the_model(model, without_inductor, backend):
    fast = compiled(model, backend, full_every=1)
    with told() as texts:
        assert_near(generate(fast), generate(model))
    assert texts == []
    assert report(fast).steps == {"full": STEPS}


@pytest.mark.smoke
@pytest.mark.sampled(2)  # every option, by name
@pytest.mark.parametrize("backend", ["moeca", moeca_backend], ids=["by name", "as a function"])
@pytest.mark.parametrize(
    ("options", "field", "allowed"),
    [
        ({"full_evry": 4}, "full_evry", "did you mean 'full_every'"),
        ({"full_every": 0}, "full_every", "a whole number >= 1"),
        ({"recipe": "moca"}, "recipe", "'moeca-forecast'"),
        ({"keys_values": "some"}, "keys_values", "'all' | 'chosen' | 'none'"),
        ({"recipe": "stack", "forecast": ("experts",)}, "forecast", "a subset of"),
    ],
    ids=str,
)
def test_a_wrong_option_names_itself_its_value_and_what_is_allowed(model, backend, options, field, allowed):
    with pytest.raises(Exception) as raised:
        generate(compiled(model, backend, **options))
    text = str(raised.value)
    assert isinstance(raised.value, ConfigError) or "ConfigError" in text
    assert repr(field) in text
    assert repr(options[field]) in text
    assert allowed in text


# The report.


def test_a_report_before_any_call(model):
    empty = report(compiled(model))
    assert empty.graphs == 0
    assert "has not been called" in str(empty)
    json.dumps(empty.to_dict())


def test_the_report_of_another_model_of_the_class_says_why_it_is_left_alone(without_inductor):
    """Torch calls what it compiled for the first one's parts for the second, too, and nobody hears of it."""
    fast, other = (compiled(make_model().train()) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generate(fast)
        generate(other)
    for each in (fast, other):
        assert [text for text in report(each).warnings if "training mode" in text], report(each)
    assert "of another model" not in str(report(fast)) and "another model of the class" in str(report(other))


@pytest.mark.smoke
def test_a_report_after_a_generation(model, without_inductor):
    fast = compiled(model, tau0=0.5, full_every=3)
    generate(fast)
    found = report(fast)
    assert found.graphs == 1
    assert found.graph_breaks == ()
    kinds = [(region.kind, region.name) for region in found.regions]
    assert kinds == [
        ("attention", "blocks.0.attn"),
        ("attention", "blocks.1.attn"),
        ("router", "blocks.1.mlp"),
        ("experts", "blocks.1.mlp"),
        ("feedforward", "blocks.1.mlp.shared_expert.down_proj"),
        ("feedforward", "blocks.0.mlp.fc2"),
    ]
    assert {region.status for region in found.regions} == {"cached"}
    assert steps(fast) == (2, 4)
    assert 0 < found.reuse_ratio <= found.match_ratio <= 1
    branches = 2 * SIZES.tokens * SIZES.top_k
    assert found.recomputed_branches_per_step == pytest.approx((1 - found.reuse_ratio) * branches)
    assert found.cache_bytes == found.planned_cache_bytes > 0
    assert found.flops.speedup > 1
    assert all(error < 1e-4 for error in found.validation_errors.values())
    assert (found.device, found.dtype) == ("cpu", "torch.float32")
    assert MoecaConfig(**found.config) == MoecaConfig(recipe="moeca", tau0=0.5, full_every=3, lowering="eager")
    assert found.warnings == ()
    json.dumps(found.to_dict())


def test_a_report_runs_nothing(model, without_inductor, monkeypatch):
    fast = compiled(model)
    generate(fast)
    with torch.no_grad():
        monkeypatch.setattr(TinyDiTMoE, "forward", None)
        assert report(fast).to_dict() == report(fast).to_dict()


@pytest.mark.parametrize("function", [report, reset])
def test_a_model_that_is_not_compiled(model, function):
    with pytest.raises(TypeError, match="TinyDiTMoE is not compiled"):
        function(model)


@pytest.mark.smoke
def test_reset_frees_the_caches_and_keeps_the_counts(model, without_inductor):
    fast = compiled(model)
    first = generate(fast)
    reset(fast)
    assert report(fast).cache_bytes == 0
    assert steps(fast) == (2, 4)
    assert torch.equal(generate(fast), first)


@pytest.mark.smoke
def test_two_compiled_models_do_not_share(model, without_inductor):
    """The same module compiled twice with other options, called in turn."""
    ours, theirs = compiled(model, tau0=0.4), compiled(model, recipe="stack")
    expected = [generate(ours), generate(theirs)]
    reset(ours)
    reset(theirs)
    x, y = make_inputs(model)
    pictures = [x, x]
    with torch.no_grad():
        for number in range(STEPS):
            t = torch.full((2,), 1 - number / STEPS)
            pictures = [p - fast(p, t, y) / STEPS for p, fast in zip(pictures, (ours, theirs), strict=True)]
    assert torch.equal(pictures[0], expected[0])
    assert torch.equal(pictures[1], expected[1])
    assert steps(ours) == steps(theirs) == (4, 8)
    assert report(ours).config["recipe"] == "moeca"
    assert report(theirs).config["recipe"] == "stack"


# What stays as torch.compile would run it.


class Dense(nn.Module):
    """An attention and a feed-forward, no experts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(16, 48), nn.Linear(16, 16), Mlp(16, 64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x + sinusoidal(t, 16).unsqueeze(1)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.mlp(x)


@torch.no_grad()
def call_dense(fast: Any, steps: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [fast(torch.randn(2, 4, 16, generator=generator), torch.full((2,), 1 - n / 5)) for n in range(steps)]


def test_a_model_without_experts_or_attention(without_inductor):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval().requires_grad_(False)
    fast = compiled(model)
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    found = report(fast)
    assert (found.graphs, found.regions) == (1, ())
    assert "nothing was found to cache" in str(found)


def test_a_model_without_experts_runs_and_the_report_says_what_was_found(without_inductor):
    torch.manual_seed(0)
    model = Dense().eval().requires_grad_(False)
    fast = compiled(model, full_every=1)
    for found, expected in zip(call_dense(fast), call_dense(model), strict=True):
        assert_near(found, expected)
    assert [region.kind for region in report(fast).regions] == ["attention", "feedforward"]


@pytest.mark.smoke
def test_training_mode_runs_the_original_with_one_warning(model, without_inductor):
    fast = compiled(model)
    with told() as texts:
        model.train()
        for _ in range(2):
            assert_near(generate(fast), generate(model))
    assert len(texts) == 1
    assert "training mode" in texts[0] and "model.eval()" in texts[0]
    model.eval()
    with told() as texts:
        assert_switches_to_caching(fast)
    assert texts == []


@pytest.mark.smoke
def test_gradients_run_the_original_with_one_warning_and_flow(model, without_inductor):
    model.requires_grad_(True)
    fast = compiled(model)
    x, y = make_inputs(model)
    with told() as texts:
        for t in (1.0, 0.9):
            assert_near(fast(x, torch.full((2,), t), y), model(x, torch.full((2,), t), y))
    assert len(texts) == 1
    assert "torch.no_grad()" in texts[0]
    fast(x, torch.ones(2), y).square().mean().backward()
    assert model.embed.weight.grad is not None
    with told() as texts:
        assert_switches_to_caching(fast)
    assert texts == []


def assert_switches_to_caching(fast: Any) -> None:
    """After at most one call, which finds that Dynamo had given the model's forward up."""
    generate(fast, steps=1)
    generate(fast)
    assert steps(fast) == (2, 4)


@pytest.mark.smoke
def test_inference_mode_caches(model, without_inductor):
    fast = compiled(model)
    expected = generate(fast)
    reset(fast)
    x, y = make_inputs(model)
    with torch.inference_mode():
        for number in range(STEPS):
            x = x - fast(x, torch.full((2,), 1 - number / STEPS), y) / STEPS
    torch.testing.assert_close(x, expected)


class Untraceable(MoE):
    """Dispatch that no idiom knows, by a dictionary of token lists. Nor does running it show what it does, as the
    outputs of an expert are divided by how many they are."""

    def moe_infer(self, x: Tensor, flat_expert_indices: Tensor, flat_expert_weights: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        tokens: dict[int, list[int]] = {}
        for place, expert in enumerate(flat_expert_indices.tolist()):
            tokens.setdefault(expert, []).append(place)
        for expert, places in sorted(tokens.items()):
            rows = torch.tensor(places) // self.top_k
            weights = flat_expert_weights[places] / len(places)
            result.index_add_(0, rows, self.experts[expert](x[rows]) * weights)
        return result


@pytest.mark.smoke
def test_dispatch_that_no_idiom_knows_runs_right_with_one_warning(model, without_inductor):
    torch.manual_seed(0)
    model.blocks[1].mlp = Untraceable(SIZES)
    model.eval().requires_grad_(False)
    fast = compiled(model, full_every=1)
    with told() as texts:
        assert_near(generate(fast), generate(model))
    assert len(texts) == 1, texts
    assert "test_backend.py:" in texts[0]
    assert "docs/extending/idiom.md" in texts[0]
    found = report(fast)
    assert any("test_backend.py:" in broken.where for broken in found.graph_breaks)
    assert any("test_backend.py:" in warning for warning in found.warnings)
    assert {region.kind for region in found.regions} >= {"attention"}


class Unrolled(TinyDiTMoE):
    """Calls its blocks without a loop: what comes before the break is one graph, what follows another."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h, c = self.embed_inputs(x, t, y)
        h = self.blocks[0](h, c)
        h = self.blocks[1](h, c)
        return self.finish(h, c)


def test_dispatch_that_no_idiom_knows_outside_of_a_loop(without_inductor):
    torch.manual_seed(0)
    model = Unrolled(SIZES)
    model.blocks[1].mlp = Untraceable(SIZES)
    model.eval().requires_grad_(False)
    fast = compiled(model, full_every=1)
    with told() as texts:
        for _ in range(2):
            assert_near(generate(fast), generate(model))
    assert len(texts) == 1, texts
    assert report(fast).graph_breaks


@pytest.mark.smoke
def test_what_another_backend_gave_up_is_captured_all_the_same(model, without_inductor):
    """Plain torch.compile breaks its graphs in the loop over blocks, for which Dynamo gives up the forward."""
    expected = generate(compiled(make_model(SIZES)))
    torch._dynamo.reset()
    generate(torch.compile(model, backend="eager"))
    fast = compiled(model)
    with told() as texts:
        generate(fast, steps=1)
        assert torch.equal(generate(fast), expected)
    assert texts == []
    assert report(fast).graphs == 1
    assert steps(fast) == (2, 4)


class NoTimestep(TinyDiTMoE):
    """Takes the time as a factor of the picture's mean: no input could be a timestep by its form."""

    def embed_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(x).flatten(2).transpose(1, 2), self.label.weight.mean(0) * (t * x.mean((1, 2, 3)))[:, None]


def test_without_a_timestep_input_the_model_runs_uncached_with_a_warning(without_inductor):
    torch.manual_seed(0)
    model = NoTimestep(SIZES).eval().requires_grad_(False)
    fast = compiled(model)
    with told() as texts:
        assert_near(generate(fast), generate(model))
    assert len(texts) == 1
    assert "timestep" in texts[0]
    found = report(fast)
    assert found.steps == {"full": STEPS}
    assert {region.status for region in found.regions} == {"skipped"}
    assert found.cache_bytes == 0


def test_the_recipe_none_caches_nothing_and_does_not_complain(model, without_inductor):
    fast = compiled(model, recipe="none")
    with told() as texts:
        assert_near(generate(fast), generate(model))
    assert texts == []
    found = report(fast)
    assert found.steps == {"full": STEPS}
    assert {region.reason for region in found.regions} == {"the recipe caches nothing"}
    assert found.flops.speedup == 1


def test_eager_and_other_backends_are_unaffected(model, without_inductor):
    expected, fast = generate(model), compiled(model)
    generate(fast)
    assert torch.equal(generate(model), expected)
    assert torch.equal(generate(torch.compile(model, backend="eager")), expected)


# Calls that change their shape or form.


@pytest.mark.smoke
def test_batches_of_other_sizes_have_caches_of_their_own(model, without_inductor):
    fast = compiled(model)
    first = {batch: generate(fast, batch) for batch in (2, 3)}
    for batch in (3, 2):
        assert torch.equal(generate(fast, batch), first[batch])


def test_a_batch_that_shrinks_within_a_generation_starts_anew(model, without_inductor):
    fast = compiled(model)
    x, y = make_inputs(model, 3)
    with torch.no_grad():
        fast(x, torch.full((3,), 1.0), y)
        fast(x, torch.full((3,), 0.9), y)
        found = fast(x[:2], torch.full((2,), 0.8), y[:2])
        assert_near(found, model(x[:2], torch.full((2,), 0.8), y[:2]))


class NumberTimestep(TinyDiTMoE):
    """forward(x, t: float, y)."""

    def forward(self, x: Tensor, t: float, y: Tensor) -> Tensor:
        return super().forward(x, torch.full((x.shape[0],), t), y)


@pytest.mark.smoke
def test_a_timestep_given_as_a_number(without_inductor):
    torch.manual_seed(0)
    model = NumberTimestep(SIZES).eval().requires_grad_(False)
    fast = compiled(model)
    x, y = make_inputs(model)
    with torch.no_grad():
        for number in range(12):
            x = x - fast(x, 1 - number / 12, y) / 12
    found = report(fast)
    assert found.graphs <= 2  # the first one has its timestep for a constant
    assert steps(fast)[1] >= 12 // 2


class Cropped(TinyDiTMoE):
    """Takes a size as an argument."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, rows: int) -> Tensor:
        return super().forward(x, t, y)[:, :, :rows]


@pytest.mark.smoke
def test_a_size_given_as_a_number(without_inductor):
    torch.manual_seed(0)
    model = Cropped(SIZES).eval().requires_grad_(False)
    fast = compiled(model, full_every=1)
    x, y = make_inputs(model)
    with torch.no_grad():
        for rows in (4, 3, 2, 3):
            found = fast(x, torch.ones(2), y, rows)
            assert found.shape == (2, 1, rows, 8)
            assert_near(found, model(x, torch.ones(2), y, rows))


class Pair(nn.Module):
    """Guidance inside the model: one call on both halves of a doubled batch."""

    def __init__(self, model: TinyDiTMoE) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        both = torch.cat([y, torch.full_like(y, self.model.sizes.classes)])
        conditional, unconditional = self.model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return 2 * conditional - unconditional


def test_guidance_inside_the_model(model, without_inductor):
    pair = Pair(model).eval()
    fast = compiled(pair, full_every=1)
    assert_near(generate(fast), generate(pair))
    assert report(fast).regions


class Constants(TinyDiTMoE):
    """Makes a constant tensor in its forward, as models do for scales."""

    def embed_inputs(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        h, c = super().embed_inputs(x, t, y)
        return modulate(h, torch.tensor([0.1]).expand(c.shape), torch.tensor([0.5]).expand(c.shape)), c


@pytest.mark.smoke
def test_constants_in_the_models_code(without_inductor):
    torch.manual_seed(0)
    model = Constants(SIZES).eval().requires_grad_(False)
    assert_near(generate(compiled(model, full_every=1)), generate(model))


# Through Inductor, with a single block: it takes its time.


@pytest.mark.smoke
@pytest.mark.xfail(torch.__version__.startswith("2.11."), reason="Inductor's code is wrong: docs/limits.md")
def test_a_generation_through_inductor_is_that_of_the_traced_graphs(monkeypatch):
    def generated() -> tuple[Any, Tensor]:
        model = make_model(SIZES)
        model.blocks = model.blocks[1:]
        fast = compiled(model, tau0=0.5, full_every=3, capacities=(1.0,))
        return fast, generate(fast)

    with told() as texts:
        fast, found = generated()
    assert texts == []
    assert steps(fast) == (2, 4)
    assert 0 < report(fast).reuse_ratio < 1
    assert set(report(fast).validation_errors) == {"reused", "rewritten", "recomputed", "full", "cache"}
    assert all(error < 1e-4 for error in report(fast).validation_errors.values())
    torch._dynamo.reset()
    monkeypatch.setattr(how, "options", {"lowering": "eager"})
    _, traced = generated()
    assert (found - traced).abs().max() <= 1e-4 * traced.abs().max()


def test_the_package_exports_what_it_documents():
    for name in moeca_compile.__all__:
        assert getattr(moeca_compile, name) is not None


# Looking for a fault.


@pytest.mark.smoke
def test_a_dump_shows_every_stage(model, tmp_path):
    fast = compiled(model, lowering="eager", dump=tmp_path, full_every=2)
    generate(fast, steps=2)
    names = {path.name.partition("-")[2] for path in (tmp_path / "graph-1").glob("*.txt")}
    assert {"dynamo.txt", "exported.txt", "matched.txt", "planned.txt", "step-full.txt"} <= names
    assert any(name.startswith("pass-") for name in names) and any(name.startswith("step-cache") for name in names)
    page = (tmp_path / "graph-1" / "index.html").read_text()
    assert all(f'-{name}"' in page for name in names)
    step = next((tmp_path / "graph-1").glob("*step-cache*.txt")).read_text()
    assert "attention.0" in step and "forecast_weights" in step


def test_a_dump_that_cannot_be_written_is_an_error_before_anything_is_compiled(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match=r"'dump'.*a folder that can be made and written to"):
        generate(compiled(model, lowering="eager", dump=tmp_path / "file"))


def test_inductors_code_is_in_the_dump(tmp_path):
    model = make_model(Sizes(depth=1, width=16, heads=2, experts=2, expert_width=8))
    generate(compiled(model, recipe="none", validate=False, dump=tmp_path), steps=1)
    (code,) = (tmp_path / "graph-1").glob("*code-full.txt")
    assert "def call(" in code.read_text() and "# copied from" in code.read_text()


def test_the_report_has_what_passes_rewrote(model, without_inductor):
    fast = compiled(model)
    generate(fast, steps=1)
    matches = report(fast).to_dict()["pass_matches"]
    assert matches["split_to_slices"] > 0 and matches["drop_idle_dropouts"] == 0


def test_steps_and_stages_are_logged(model, caplog):
    with caplog.at_level("DEBUG", logger="moeca_compile"):
        generate(compiled(model, lowering="eager"), steps=2)
    texts = [record.getMessage() for record in caplog.records if record.name.startswith("moeca_compile")]
    assert any(text.startswith("full step at time 1") for text in texts)
    assert any(text.startswith("match: ") for text in texts)
    assert any(text.startswith("split_to_slices: ") for text in texts)


def test_a_report_does_without_a_count_that_fails(model, without_inductor, monkeypatch):
    fast = compiled(model)
    generate(fast, steps=2)
    counted = report(fast).flops

    def fails(*_):
        raise RuntimeError("an op that nobody can count")

    monkeypatch.setattr(StepFlops, "total", fails)
    planned = report(fast).flops
    assert planned.full_step == counted.full_step and planned.speedup > 1
