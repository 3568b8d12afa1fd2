"""Whatever a verdict or a traced step depends on, gives another key where it changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moeca_compile.disk import keys
from moeca_compile.disk.form import NoFormError
from moeca_compile.disk.keys import captured_key, environment, graph_key, weight_facts
from tests.harness import Captured, captured
from tests.models import SMALL, Sizes, make_inputs, make_model

CPU = torch.device("cpu")


def captured_of(sizes: Sizes, batch: int, seed: int = 0) -> Captured:
    model = make_model(sizes, seed)
    noise, labels = make_inputs(model, batch)
    return captured(model, noise, torch.ones(batch), labels)


def key_of(graph: Captured, **options) -> str:
    compiled = graph.loop(**{"recipe": "fora", "validate": False, **options}).compiled
    return graph_key(compiled.module, compiled.regions, compiled.config, CPU)


def test_equal_models_have_equal_keys(small_graph: Captured, eager_steps):
    other = captured_of(SMALL, 2, seed=1)
    assert captured_key(small_graph.gm, small_graph.inputs, CPU) == captured_key(other.gm, other.inputs, CPU)
    assert key_of(small_graph) == key_of(other)


@pytest.mark.parametrize(
    "options", [{"recipe": "stack"}, {"full_every": 3}, {"cache_dtype": "bfloat16"}, {"lowering": "inductor"}]
)
def test_other_options_have_other_keys(small_graph: Captured, options, eager_steps):
    assert key_of(small_graph) != key_of(small_graph, **options)


@pytest.mark.parametrize(
    "options",
    [{"progress": False}, {"background": True}, {"disk_cache": False}, {"full_steps": (0, 2)}, {"schedule": "power"}],
)
def test_what_changes_nothing_that_runs_changes_no_key(small_graph: Captured, options, eager_steps):
    assert key_of(small_graph) == key_of(small_graph, **options)


@pytest.mark.parametrize(("sizes", "batch"), [(SMALL, 3), (replace(SMALL, top_k=1), 2)])
def test_other_shapes_and_models_have_other_keys(small_graph: Captured, sizes, batch, eager_steps):
    other = captured_of(sizes, batch)
    assert captured_key(small_graph.gm, small_graph.inputs, CPU) != captured_key(other.gm, other.inputs, CPU)
    assert key_of(small_graph) != key_of(other)


def other_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.13.1")


def other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "source_digest", lambda: "changed")


def other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_machine", lambda device: ["another"])


def other_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "numeric_modes", lambda: ["float64"])


@pytest.mark.parametrize("change", [other_version, other_sources, other_machine, other_default_dtype])
def test_another_environment_has_another_key(change: Callable[..., None], monkeypatch):
    before = environment(CPU)
    change(monkeypatch)
    assert environment(CPU) != before


def test_another_configuration_of_inductor_has_another_key():
    before = environment(CPU)
    with torch._inductor.config.patch({"cpp.enable_unsafe_math_opt_flag": True}):
        assert environment(CPU) != before
    assert environment(CPU) == before


def test_a_function_of_the_users_in_inductor_has_no_key():
    with torch._inductor.config.patch(post_grad_custom_pre_pass=lambda graph: None), pytest.raises(NoFormError):
        environment(CPU)


def test_a_changed_source_is_another_source(tmp_path, monkeypatch):
    (tmp_path / "ops").mkdir()
    source = tmp_path / "ops" / "kernel.cpp"
    monkeypatch.setattr(keys.moeca_compile, "__file__", str(tmp_path / "__init__.py"))
    found = set()
    for text in ("one", "two"):
        source.write_text(text)
        keys.source_digest.cache_clear()
        found |= {keys.source_digest(), keys.source_digest("ops")}
    keys.source_digest.cache_clear()
    assert len(found) in (2, 4)
    monkeypatch.undo()
    assert keys.source_digest() not in found


def facts(*weights: torch.Tensor) -> list[object]:
    return weight_facts([torch.ones(1), *weights], [True, *[False] * len(weights)])


def test_weights_count_only_as_far_as_they_could_hide_a_fault():
    assert facts(torch.randn(200, 3)) == facts(torch.randn(200, 3))
    assert facts(torch.randn(200, 3)) != facts(torch.zeros(200, 3)) != facts(torch.ones(200, 3))
    almost = torch.zeros(200, 3)
    almost[199, 2] = 1
    assert facts(almost) == facts(torch.randn(200, 3))
    assert facts(torch.zeros(0)) == facts(torch.zeros(0))
    assert facts(torch.randn(3, 5).t()) == facts(torch.randn(5, 3))


def test_integers_count_by_their_values():
    assert facts(torch.arange(5)) != facts(torch.arange(5).flip(0))
    assert facts(torch.tensor([True, False])) != facts(torch.tensor([False, True]))
    assert facts(torch.arange(5)) == facts(torch.arange(5))


def test_arguments_do_not_count():
    assert weight_facts([torch.zeros(3)], [True]) == weight_facts([torch.randn(3)], [True])
