"""`moeca bench`: what it measures of ways to sample, what it prints and writes, and what it says of what is wrong."""

from __future__ import annotations

import copy
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from moeca_compile.command import bench, comparison, ways
from moeca_compile.command.given import recipes_of
from moeca_compile.command.main import main
from moeca_compile.command.own_code import with_own_code
from moeca_compile.command.table import framed
from moeca_compile.command.ways import Way
from tests.command import factories
from tests.models import SMALL, make_model

pytestmark = pytest.mark.usefixtures("traced_once")
AT = "tests.command.factories:"
EAGER_STEPS = ("--option", "lowering=eager", "--option", "validate=false")


@pytest.fixture(autouse=True)
def no_inductor(monkeypatch):
    """Plain torch.compile breaks and gives up the same functions without it, and is quick."""
    plain = lambda model: Way(ways.COMPILED, torch.compile(with_own_code(model), backend="eager"))  # noqa: E731
    monkeypatch.setattr(ways, "compiled_plainly", plain)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(factories, "model", lambda: make_model(SMALL))


def compared(factory, *recipes, options=("lowering=eager", "validate=false"), seeds=(0, 1), sample="sample"):
    cpu = torch.device("cpu")
    subject = bench.subject_named(AT + factory, AT + sample, seeds, recipes_of(recipes, options), cpu, None)
    return bench.compare(subject, lambda line: None)


def test_the_figures_are_those_of_the_same_samples_drawn_by_hand(small, tmp_path, capsys):
    values, picture = tmp_path / "b.json", tmp_path / "b.png"
    command = ["bench", f"{AT}model", f"{AT}sample", "--recipe", "fora full_every=4", *EAGER_STEPS, "--seeds", "0,5"]
    assert main([*command, "--json", str(values), "--picture", str(picture)]) == 0
    shown, found = capsys.readouterr(), json.loads(values.read_text())
    eager, compiled, fora = found["rows"]

    plain = make_model(SMALL)
    options = {"recipe": "fora", "full_every": 4, "lowering": "eager", "validate": False}
    cached = torch.compile(make_model(SMALL), backend="moeca", options=options)
    with torch.no_grad():
        wanted = torch.cat([factories.sample(plain, seed) for seed in (0, 5)]).numpy()
        got = torch.cat([factories.sample(cached, seed) for seed in (0, 5)]).numpy()
    peak = wanted.max() - wanted.min()
    ssim = np.mean([structural_similarity(a[0], b[0], data_range=peak) for a, b in zip(wanted, got, strict=True)])
    assert fora["psnr"] == pytest.approx(peak_signal_noise_ratio(wanted, got, data_range=peak), abs=1e-3)
    assert fora["ssim"] == pytest.approx(ssim, abs=1e-6) and fora["ssim"] < 1
    assert fora["calls"] == {"full": 2, "cache": 6} and eager["calls"] == compiled["calls"] == {"": 8}
    assert fora["options"]["full_every"] == 4 and fora["cache_bytes"] > 0 and eager["cache_bytes"] == 0
    assert compiled["equal"] and compiled["over_compile"] == 1 and eager["psnr"] is eager["equal"] is None
    assert all(row["seconds"] > 0 and row["first_seconds"] > 0 and row["remarks"] == [] for row in found["rows"])
    assert found["shape"] == [2, 1, 8, 8] and found["seeds"] == [0, 5]

    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {values}\nwrote {picture}" in shown.out
    assert "fora full_every=4: first generation in" in shown.err
    (line,) = [line for line in shown.out.splitlines() if "fora full_every=4" in line]
    assert f"{fora['psnr']:.1f}" in line and "2 full, 6 cache" in line
    assert "peak" not in shown.out and "LPIPS" not in shown.out


def test_warnings_of_a_recipe_are_remarks():
    eager, plain, fora = compared("wrapped", "fora", seeds=(0,)).rows
    assert eager.remarks == plain.remarks == () and eager.over_eager == 1
    assert any("the graph breaks here, because Python needs the value" in remark for remark in fora.remarks)


def test_a_sampler_that_fills_one_buffer_again_is_compared_by_what_it_held(small):
    found = compared("model", "stack full_every=4", sample="sample_into_a_buffer")
    stack = found.rows[-1].likeness
    assert not stack.equal and stack.psnr == compared("model", "stack full_every=4").rows[-1].likeness.psnr
    assert not torch.equal(*found.results["eager"])


def test_a_forward_of_the_instance_is_there_again_after_calls_were_counted():
    model = make_model(SMALL)
    with ways.counted_calls(model):
        pass
    assert "forward" not in vars(model)
    own = model.forward = lambda *given: given
    with ways.counted_calls(model) as calls:
        model(1)
    assert calls() == 1 and vars(model)["forward"] is own


class Breaking(torch.nn.Module):
    """It breaks the graph in a loop, so that Dynamo compiles each layer by itself."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) * x.sum().item()
        return x


class Layer(torch.nn.Module):
    def forward(self, x):
        return x.sin()


def test_so_many_copies_as_one_likes_are_compiled_alike():
    """Beyond a number of compilations of one function, Dynamo would run it as it is."""
    model, graphs = Breaking(), []

    def counting(gm, inputs):
        graphs[-1] += 1
        return gm.forward

    for _ in range(2 * torch._dynamo.config.recompile_limit):
        graphs.append(0)
        own = torch.compile(with_own_code(model), backend=lambda gm, inputs: counting(gm, inputs))
        own(torch.ones(3))
    assert set(graphs) == {1}


def test_a_copy_with_its_own_code_shares_weights_and_computes_the_same():
    model = factories.wrapped().eval()
    own = with_own_code(model)
    pairs = list(zip(model.modules(), own.modules(), strict=True))
    assert all(a is b for a, b in zip(model.parameters(), own.parameters(), strict=True))
    ours = [(a, b) for a, b in pairs if not type(a).__module__.startswith("torch.")]
    assert len(ours) > 5 and all(type(b).forward.__code__ is not type(a).forward.__code__ for a, b in ours)
    assert all(type(b) is type(a) for a, b in pairs if type(a).__module__.startswith("torch."))
    assert all(isinstance(b, type(a)) and type(b).__qualname__ == type(a).__qualname__ for a, b in pairs)
    with torch.no_grad():
        assert torch.equal(factories.sample(own, 3), factories.sample(model, 3))


def test_a_way_that_fails_has_a_row_that_says_so_and_the_others_go_on(small, monkeypatch):
    def refuse(gm, inputs):
        raise ValueError("no such op")

    broken = lambda model: Way(ways.COMPILED, torch.compile(copy.deepcopy(model), backend=refuse))  # noqa: E731
    monkeypatch.setattr(ways, "compiled_plainly", broken)
    found = compared("model", "stack")
    _, compiled, stack = found.rows
    assert "no such op" in compiled.remarks[0] and compiled.seconds is None and compiled.likeness is None
    assert stack.over_compile is None and stack.over_eager > 0 and stack.likeness.psnr > 0 and not stack.remarks
    assert list(found.results) == ["eager", "stack"]


def test_a_generation_in_which_dynamo_compiled_is_run_again():
    compiled = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    runs = []

    def sample(model, seed):
        runs.append(seed)
        return model(torch.ones(2 + seed))

    way = Way("torch.compile", compiled)
    for seed in (4, 4, 5):
        ways.timed(way, sample, seed, torch.device("cpu"))
    assert runs == [4, 4, 4, 5, 5] and len(way.seconds) == len(way.results) == 3
    assert way.later_compile_seconds > 0 and not way.failure


def test_a_generation_in_which_something_is_compiled_each_time_has_a_remark():
    compiled, sizes = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False), iter(range(20, 40))
    way = Way("torch.compile", compiled)
    ways.timed(way, lambda model, seed: model(torch.ones(next(sizes))), 0, torch.device("cpu"))
    assert next(sizes) == 20 + ways.AGAIN + 1 and way.still_compiling
    eager = Way("eager", None, seconds=[1.0], results=way.results)
    (remark,) = bench._row(way, eager, way, 8).remarks
    assert "compiled in each of 5 runs" in remark


def test_a_generation_in_which_a_kind_of_step_was_compiled_is_run_again(monkeypatch):
    spent = iter([1.0, 3.5])
    latest = {"lower": 0.0}

    def sample(model, seed):
        latest["lower"] = next(spent, 3.5)
        return torch.zeros(1)

    def report(model):
        return SimpleNamespace(compile_seconds=dict(latest), steps={"full": 0}, cache_bytes=0)

    monkeypatch.setattr(ways.moeca_compile, "report", report)
    way = Way("moeca", None, {"recipe": "moeca"})
    ways.timed(way, sample, 4, torch.device("cpu"))
    assert next(spent, None) is None and len(way.results) == 1 and not way.failure


def test_peak_memory_is_what_stays_and_what_a_generation_takes_beside_it(small, monkeypatch):
    allocated = iter([100, 130, 200, 210])  # around the first generation, then before two timed ones
    peaks = iter([250, 290])
    monkeypatch.setattr(ways, "_allocated", lambda device: next(allocated))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    way = Way("torch.compile", make_model(SMALL))
    cpu = torch.device("cpu")
    ways.warm_up(way, factories.sample, 0, cpu)
    for seed in (0, 1):
        ways.timed(way, factories.sample, seed, cpu)
    assert (way.held_bytes, way.peak_bytes) == (30, 80)
    eager = Way("eager", None, seconds=[1.0, 1.0], results=way.results)
    assert bench._row(way, eager, eager, 8).peak_bytes == 110


def test_options_have_values_of_any_kind_and_a_recipe_may_have_its_own():
    given = ["full_every=5", "corrector=true", "forecast=['stack']", "cache_dtype=None"]
    found = recipes_of(["stack", "stack full_every=2 schedule=power"], given)
    assert list(found) == ["stack", "stack full_every=2 schedule=power"]
    assert found["stack"] == {
        "recipe": "stack",
        "full_every": 5,
        "corrector": True,
        "forecast": ["stack"],
        "cache_dtype": None,
    }
    second = found["stack full_every=2 schedule=power"]
    assert (second["full_every"], second["schedule"], second["corrector"]) == (2, "power", True)
    assert list(recipes_of([], [])) == ["moeca", "stack-forecast"]


def test_without_rich_the_table_is_in_columns(monkeypatch):
    assert "┃" in framed(["", "seconds"], [["eager", "1.0"]])
    monkeypatch.setitem(sys.modules, "rich.table", None)
    assert framed(["", "seconds"], [["eager", "1.0"]]) == "       seconds\neager  1.0"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_model_gets_the_dtype_that_is_asked_for(dtype):
    cpu = torch.device("cpu")
    subject = bench.subject_named(f"{AT}model", f"{AT}sample", (0,), recipes_of([], []), cpu, dtype)
    assert next(subject.model.parameters()).dtype is getattr(torch, dtype)


FILES = (f"{AT}model", f"{AT}sample")
WRONG = {
    "no sample": ([f"{AT}model", f"{AT}smaple"], "factories has no smaple. It has "),
    "sample's arguments": ([f"{AT}model", f"{AT}two_seeds"], "cannot be called as sample(model, seed)"),
    "no model": ([f"{AT}by_name", f"{AT}sample"], "by_name raised TypeError"),
    "tensor": ([f"{AT}tensor", f"{AT}sample"], "tensor returned a Tensor. Let it return the model, an nn.Module"),
    "no recipe": ([*FILES, "--recipe", "stakc"], "moeca option 'recipe' = 'stakc': allowed is"),
    "quotes": ([*FILES, "--recipe", "stack 'full_every=2"], "No closing quotation"),
    "no option": ([*FILES, "--option", "fullevery=3"], "did you mean 'full_every'?"),
    "no value": ([*FILES, "--option", "full_every"], "'full_every' is no option=value, such as full_every=5"),
    "ignored": ([*FILES, "--recipe", "stack", "--option", "tau0=0.5"], "recipe 'stack' ignores it; it is for moeca"),
    "seeds": ([*FILES, "--seeds", "0,one"], "--seeds 0,one: give different whole numbers from 0 on"),
    "same seeds": ([*FILES, "--seeds", "1,1"], "give different whole numbers"),
    "device": ([*FILES, "--device", "gpu"], "--device gpu cannot be used here: "),
    "meta": ([*FILES, "--device", "meta"], "--device meta: give cpu or cuda"),
    "json": ([*FILES, "--json", "figures.txt"], "--json figures.txt: the name must end in .json"),
    "folder": ([*FILES, "--json", "nowhere/b.json"], "--json nowhere/b.json: there is no folder nowhere"),
    "picture": ([*FILES, "--picture", "b.gif"], "--picture b.gif: the name must end in .png or"),
    "not called": ([f"{AT}model", f"{AT}sample_another"], "never called the model that it was given"),
    "a list": ([f"{AT}model", f"{AT}sample_list"], "sample_list returned a list. Let it return the result"),
    "no pictures": (
        [f"{AT}model", f"{AT}sample_tokens", "--picture", "b.png"],
        "sample_tokens returned values of the shape (2, 1, 64). Let it return pictures",
    ),
    "another result": (
        [f"{AT}model", f"{AT}sample_anew"],
        "two calls of tests.command.factories:sample_anew with seed 0",
    ),
    "not finite": ([f"{AT}model", f"{AT}sample_nan"], "sample_nan returned values that are not finite for seed 0"),
    "raises": ([f"{AT}model", f"{AT}sample_raising"], "sample_raising raised KeyError in factories.py:"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_explained_before_anything_is_compiled(case, small, capsys, monkeypatch):
    def too_late(*arguments):
        raise AssertionError("something was compiled")

    monkeypatch.setattr(ways, "compiled_plainly", too_late)
    arguments, message = WRONG[case]
    assert main(["bench", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "moeca bench: " in shown.err and message in shown.err
    assert len(shown.err.splitlines()) == 1, "nothing was done before"


def test_a_file_that_cannot_be_written_leaves_the_table(small, capsys, monkeypatch, tmp_path):
    def full(found, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(comparison, "save_values", full)
    command = ["bench", *FILES, "--recipe", "none", "--seeds", "0", "--json", str(tmp_path / "b.json")]
    assert main([*command, *EAGER_STEPS]) == 0
    shown = capsys.readouterr().out
    assert "torch.compile" in shown and "b.json cannot be written: No space left on device" in shown


def test_a_picture_needs_matplotlib(small, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["bench", *FILES, "--picture", "b.png"]) == 2
    assert "--picture needs matplotlib, which is not installed" in capsys.readouterr().err
