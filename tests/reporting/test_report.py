"""Report: its values, their JSON form, and its text."""

import dataclasses
import json

import pytest
import torch

from moeca_compile.config import MoecaConfig
from moeca_compile.reporting import Flops, GraphBreak, Region, Report

FULL = Report(
    graphs=1,
    regions=(
        Region("attention", "blocks.0.attn", "cached"),
        Region("experts", "blocks.1.mlp", "cached"),
        Region("experts", "blocks.3.mlp", "skipped", "its dispatch depends on the batch"),
        Region("router", "blocks.1.mlp.gate", "cached"),
    ),
    cache_bytes=3 * 2**20 + 2**19,
    planned_cache_bytes=7 * 2**18,
    peak_bytes=2**25,
    compile_seconds={"capture": 0.25, "lower": 12.0},
    from_disk={"validations": 3, "compiled parts": 5, "traced steps": 0},
    compiled_parts=6,
    parts_beside=1,
    early_runs={"full": 2, "cache": 9},
    steps={"full": 5, "cache": 15},
    match_ratio=0.875,
    reuse_ratio=0.5,
    recomputed_branches_per_step=1234.5,
    flops=Flops(full_step=4e9, mean_step=1.6e9),
    validation_errors={"full": 1e-7, "cache": 2.5e-6},
    warnings=("gradients were wanted: the original graph ran",),
    device="cpu",
    dtype="float32",
    config=dataclasses.asdict(MoecaConfig(recipe="moeca", cache_dtype=torch.bfloat16)),
)


def test_the_empty_report_says_that_nothing_was_compiled():
    assert str(Report()).startswith("moeca_compile report\nnothing compiled: the model has not been called, or ")
    values = json.loads(json.dumps(Report().to_dict()))
    assert values["graphs"] == 0
    assert values["regions"] == values["graph_breaks"] == values["warnings"] == []
    assert values["flops"] is values["match_ratio"] is None


def test_a_model_without_regions_is_told_plainly():
    assert "nothing was found to cache" in str(Report(graphs=1))
    assert "nothing was found" not in str(FULL)


def test_text_of_a_full_report():
    assert str(FULL).splitlines() == [
        "moeca_compile report, moeca, cpu, float32",
        "1 graph, no graph breaks",
        "regions:",
        "  router: 1 found, 1 cached",
        "  experts: 2 found, 1 cached",
        "    skipped blocks.3.mlp: its dispatch depends on the batch",
        "  attention: 1 found, 1 cached",
        "cache: 3.5 MiB allocated, 1.75 MiB a stream planned",
        "memory: 32 MiB at the peak beside the weights",
        "compile time: 12.2 s (capture 250 ms, lower 12.0 s)",
        "from disk: 3 validations, 5 of 6 compiled parts",
        "compiled beside: 1 of 6 compiled parts; run before: 2 full, 9 cache",
        "steps: 20 (5 full, 15 cache)",
        "branches on cache steps: 87.5% matched, 50.0% reused",
        "recomputed branches per cache step: 1,234.5",
        "FLOPs: 4 GFLOP a full step, 1.6 GFLOP a step on average, 2.50x fewer",
        "validation, greatest relative error: full 1.0e-07, cache 2.5e-06",
        "warning: gradients were wanted: the original graph ran",
    ]


def test_graph_breaks_are_listed_with_their_place():
    breaks = (GraphBreak("model.py:12", "tolist"), GraphBreak("model.py:30", "nonzero"))
    lines = str(Report(graphs=3, graph_breaks=breaks)).splitlines()
    assert lines[1:4] == ["3 graphs, 2 graph breaks", "  model.py:12: tolist", "  model.py:30: nonzero"]


def test_a_skipped_region_without_a_reason_is_told_apart():
    text = str(Report(graphs=1, regions=(Region("attention", "attn", "skipped"),)))
    assert "attention: 1 found, 0 cached" in text
    assert "skipped attn: no reason given" in text


def test_to_dict_has_every_field_and_survives_json():
    values = json.loads(json.dumps(FULL.to_dict()))
    assert set(values) == {field.name for field in dataclasses.fields(Report)}
    assert values["flops"] == {"full_step": 4e9, "mean_step": 1.6e9, "speedup": 2.5}
    assert values["regions"][2] == {
        "kind": "experts",
        "name": "blocks.3.mlp",
        "status": "skipped",
        "reason": "its dispatch depends on the batch",
    }
    assert values["steps"] == {"full": 5, "cache": 15}
    assert values["config"]["cache_dtype"] == "torch.bfloat16"
    assert values["config"]["capacities"][-1] == 1.0


def test_reports_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.graphs = 2  # type: ignore[misc]


@pytest.mark.parametrize(("full", "mean"), [(0, 1), (1, 0), (1, -1), (float("nan"), 1)])
def test_flops_must_be_positive(full, mean):
    with pytest.raises(ValueError, match="above 0"):
        Flops(full, mean)
