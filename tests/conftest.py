from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

if not torch.cuda.is_available():
    # Kernels are then run by Triton's interpreter, on CPU tensors. It asks when it is imported, which torch itself
    # puts off, but not torch's compiler. Inductor writes no Triton code for a CPU.
    os.environ["TRITON_INTERPRET"] = "1"

# Dynamo would look for garbage after each compilation.
os.environ["TORCH_DYNAMO_RUN_GC_AFTER_COMPILE"] = "0"

# ruff: isort: split
from moeca_compile.backend import compile_graph  # registers the ops and installs capture
from moeca_compile.disk import store
from moeca_compile.lower.found_before import VALIDATION
from moeca_compile.passes.export import to_functional_aten
from moeca_compile.runtime.engine import Stages
from tests import harness
from tests.harness import Captured, captured
from tests.models import SMALL, TinyDiTMoE, make_inputs, make_model

# The models are tiny: threads would only wait for each other, for long where the machine is busy.
torch.set_num_threads(1)
# Graphs are made of many small objects that live on: to look for garbage 30 times less often saves a sixth.
gc.set_threshold(20_000, 20, 50)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m smoke` reads only files that have such tests: the others take long to import, and want more packages."""
    only_smoke = config.option.markexpr == "smoke" and collection_path.suffix == ".py"
    return True if only_smoke and "mark.smoke" not in collection_path.read_text() else None


@pytest.hookimpl(tryfirst=True)  # before the cases to run are chosen by their marks
def pytest_collection_modifyitems(items: Sequence[pytest.Function]) -> None:
    """Make the cases slow that the mark `sampled` leaves out."""
    cases: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is not None:
            test = item.nodeid.partition("[")[0]
            if cases[test] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            cases[test] += 1


def pytest_collection_finish() -> None:
    """What imports made stays: to look through it for garbage again and again took a twentieth of the time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Models and inputs are the same in whatever order, and on however many processes, the tests run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that an earlier test, or run of the tests, has validated or traced is taken over."""
    monkeypatch.setattr(store, "folder", lambda: None)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where a test keeps what was found out."""
    found = tmp_path / "kept"
    monkeypatch.setattr(store, "folder", lambda: found)
    return found


@pytest.fixture(scope="session")
def traced_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All processes of a run share it."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "traced"


@pytest.fixture
def traced_once(nothing_on_disk: None, monkeypatch: pytest.MonkeyPatch, traced_folder: Path) -> None:
    """Graphs that are equal are exported, and their steps traced, once for all tests that ask for this.

    What is found is validated in each test. For tests of what happens around compiled steps. One that changes how
    graphs are exported or steps are traced must not ask: the others would get what it made.
    """
    read = store.read
    monkeypatch.setattr(store, "folder", lambda: traced_folder)
    monkeypatch.setattr(store, "read", lambda kind, key: None if kind == VALIDATION else read(kind, key))
    monkeypatch.setattr(store, "record_artifact", lambda *_: None)


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced steps run op by op: Inductor takes 10 seconds each. For tests that compile by the harness."""
    monkeypatch.setattr(harness.how, "options", {"lowering": "eager"})


@pytest.fixture
def inductor_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for code that compiles by itself and has no option for it: benchmarks and examples."""
    harness.replace_inductor(monkeypatch)


@pytest.fixture
def eager_steps(monkeypatch: pytest.MonkeyPatch, export_once: Callable[..., Any]) -> None:
    """Steps run as eager functions, neither traced nor compiled; a captured graph is exported only once.

    Nor is the original compiled by Inductor, where that runs in place of the steps.
    """
    stages = Stages(partial(compile_graph, export=export_once), harness.eager_step)
    monkeypatch.setattr(harness.how, "stages", stages)
    monkeypatch.setattr(harness.how, "options", {"lowering": "eager"})


@pytest.fixture(scope="session")
def export_once() -> Callable[..., Any]:
    known: dict[Any, fx.GraphModule] = {}

    def export(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        key = (gm, *((tuple(tensor.shape), tensor.dtype) for tensor in tensors))
        if key not in known:
            known[key] = to_functional_aten(gm, inputs)
        return known[key]

    return export


@pytest.fixture(scope="session")
def model() -> TinyDiTMoE:
    """A DiT-MoE of 4 blocks, the second and fourth with experts. Treat it as constant."""
    return make_model()


@pytest.fixture(scope="session")
def small_model() -> TinyDiTMoE:
    """A smaller one of two blocks, the second with experts. Treat it as constant."""
    return make_model(SMALL)


@pytest.fixture(scope="session")
def small_graph(small_model: TinyDiTMoE) -> Captured:
    """The smaller model as the backend gets it, at a batch of 2."""
    noise, labels = make_inputs(small_model)
    return captured(small_model, noise, torch.ones(len(noise)), labels)


@pytest.fixture(scope="session")
def graph(model: TinyDiTMoE) -> Captured:
    """The model as the backend gets it, at a batch of 2."""
    noise, labels = make_inputs(model)
    return captured(model, noise, torch.ones(len(noise)), labels)
