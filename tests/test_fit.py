"""Caches within max_cache_bytes: what is picked where they are too large, and what the warning says."""

from __future__ import annotations

import pytest
import torch

from moeca_compile import fit, free_memory
from tests.models import make_inputs

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("eager_steps")  # a graph is exported once


def planned(graph, **options) -> int:
    return graph.loop(validate=False, max_cache_bytes=None, **options).compiled.plan.nbytes


def warned(loop) -> str:
    (text,) = loop.notes.warnings
    return text


def test_caches_that_fit_are_left_alone(graph):
    need = planned(graph, recipe="moeca-forecast")
    loop = graph.loop(validate=False, recipe="moeca-forecast", max_cache_bytes=need)
    assert loop.compiled.config.recipe == "moeca-forecast"
    assert loop.compiled.plan.nbytes == need
    assert loop.notes.warnings == []


def test_a_byte_less_takes_a_narrower_dtype(graph):
    need, narrow = planned(graph, recipe="fora"), planned(graph, recipe="fora", cache_dtype="bfloat16")
    loop = graph.loop(validate=False, recipe="fora", max_cache_bytes=need - 1)
    assert (loop.compiled.config.recipe, loop.compiled.config.cache_dtype) == ("fora", torch.bfloat16)
    assert loop.compiled.plan.nbytes == narrow < need
    for part in ("are kept in bfloat16", "max_cache_bytes", "KiB", "coarser_caches=False", "'fora'"):
        assert part in warned(loop)


def test_then_levels_get_coarser_one_by_one(graph):
    picked, options = [], {"validate": False, "recipe": "moeca-forecast"}
    limit = planned(graph, recipe="moeca-forecast")
    for _ in range(12):
        compiled = graph.loop(**options, max_cache_bytes=limit).compiled
        picked.append((compiled.config.recipe, compiled.config.cache_dtype))
        assert compiled.plan.nbytes <= limit
        if not compiled.caching:
            break
        limit = compiled.plan.nbytes - 1
    levels = list(dict.fromkeys(recipe for recipe, _ in picked))
    assert levels == ["moeca-forecast", "fora-forecast", "block-forecast", "stack-forecast", "none"]
    assert (None, torch.bfloat16) == tuple(dtype for recipe, dtype in picked if recipe == "stack-forecast")


def test_options_of_the_user_go_along(graph):
    options = {"recipe": "moeca", "budget": 0.5, "full_every": 7, "max_generations": 3}
    limit = planned(graph, recipe="stack")
    config = graph.loop(validate=False, **options, max_cache_bytes=limit).compiled.config
    assert (config.recipe, config.full_every, config.max_generations) == ("stack", 7, 3)
    assert config.max_cache_bytes == limit


def test_a_dtype_that_the_user_chose_stays(graph):
    need = planned(graph, recipe="fora")
    config = graph.loop(
        validate=False, recipe="fora", cache_dtype="float32", max_cache_bytes=need - 1
    ).compiled.config
    assert (config.recipe, config.cache_dtype) == ("block", torch.float32)


def test_where_nothing_fits_the_model_runs_uncached_and_the_warning_has_the_figures(graph, model, eager_steps):
    engine = graph.engine(recipe="fora", max_cache_bytes=1)
    x, y = make_inputs(model)
    found = engine(*graph.arguments(x=x, t=torch.ones(len(x)), y=y))
    (loop,) = engine.loops.values()
    torch.testing.assert_close(found[0], model(x, torch.ones(len(x)), y), atol=1e-5, rtol=0)
    assert not loop.compiled.caching and loop.streams.nbytes == 0
    for part in ("(1 B)", "runs uncached", "'stack'", "Raise max_cache_bytes"):
        assert part in warned(loop)


def test_nothing_changes_where_the_user_forbids_it(graph):
    loop = graph.loop(validate=False, recipe="fora", max_cache_bytes=1, coarser_caches=False)
    assert not loop.compiled.caching
    assert "allow coarser_caches" in warned(loop)


def test_what_is_picked_is_validated_and_runs(graph, model, eager_steps):
    limit = planned(graph, recipe="stack")
    engine = graph.engine(recipe="moeca", max_cache_bytes=limit, full_every=2)
    x, y = make_inputs(model)
    for number in range(4):
        engine(*graph.arguments(x=x * (1 - number / 8), t=torch.full((len(x),), 1 - number / 8), y=y))
    (loop,) = engine.loops.values()
    assert set(loop.notes.errors) >= {"rewritten", "reused"}
    assert {kind.name: tally.steps for kind, tally in loop.tallies.items()} == {"full": 2, "cache": 2}
    assert loop.streams.nbytes <= limit


@pytest.mark.parametrize("free, caching", [(1 << 30, True), (100, False)])
def test_auto_takes_a_share_of_what_is_free(graph, monkeypatch, free, caching):
    monkeypatch.setattr(fit, "free_bytes", lambda device: free)
    compiled = graph.loop(validate=False, recipe="fora").compiled
    assert compiled.caching == caching
    assert compiled.config.max_cache_bytes == "auto", "it chooses what is cached, and evicts nothing"


def test_where_free_memory_is_not_known_there_is_no_limit(graph, monkeypatch):
    monkeypatch.setattr(fit, "free_bytes", lambda device: None)
    loop = graph.loop(validate=False, recipe="fora", coarser_caches=False)
    assert loop.compiled.caching
    assert loop.streams.bounds.most_streams == loop.compiled.config.max_generations


def test_free_memory_is_what_linux_and_the_container_leave(monkeypatch, tmp_path):
    monkeypatch.setattr(free_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "_CGROUP", tmp_path)
    assert free_memory.free_bytes(CPU) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4 kB\n")
    assert free_memory.free_bytes(CPU) == 4096
    (tmp_path / "memory.current").write_text("7000\n")
    (tmp_path / "memory.stat").write_text("anon 900\ninactive_file 5000\nslab_reclaimable 1000\n")
    for limit, free in (("max", 4096), ("3000", 2000), ("500", 0)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        assert free_memory.free_bytes(CPU) == free
