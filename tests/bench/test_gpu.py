"""The benchmark for GPUs, as far as it runs without one: arguments, budget, table, every section when tiny."""

from __future__ import annotations

import csv
import math
import time

import pytest
import torch
from rich.console import Console

import moeca_compile
from bench import gpu
from bench.gpu_sections import common, generation, kernels, ops, speed
from bench.gpu_sections.common import TINY, Bench, Budget, OutOfTimeError, Row

pytestmark = pytest.mark.bench

CPU = torch.device("cpu")


def bench(rows: list[Row], seconds: float = 600.0) -> Bench:
    return Bench(CPU, torch.float32, Budget(seconds), rows.append, (TINY,), (2,), small=True)


# --- the command ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_what_to_do_and_leaves_no_rows(tmp_path, capsys):
    out = tmp_path / "gpu.csv"
    assert gpu.main(["--out", str(out)]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert "no CUDA device" in said and "python -m bench.gpu" in said
    assert not out.exists()


@pytest.mark.parametrize("wrong", [["--minutes", "0"], ["--section", "tables"], ["--model", "DiT-9"], ["--min", "3"]])
def test_wrong_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        gpu.parse_arguments(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_the_models_that_it_measures_are_published_ones():
    assert set(gpu.MODELS) <= set(common.families.PUBLISHED)
    defaults = gpu.parse_arguments([])
    assert defaults.minutes < 10 and defaults.section is None


def test_one_call_prints_a_table_and_keeps_its_rows(tmp_path, capsys):
    out = tmp_path / "gpu.csv"
    arguments = ["--device", "cpu", "--model", TINY, "--batch", "2", "--dtype", "float32", "--out", str(out)]
    for _ in range(2):
        assert gpu.main([*arguments, "--section", "ops"]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["what"] for row in rows] == [f"{name}, float32" for name in ops.OPS] * 2
    assert all(row["torch"] == torch.__version__ and row["device"] and row["when"] for row in rows)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{len(ops.OPS)} rows, 0 wrong or failed; sections that failed: none"


def test_a_section_that_fails_costs_no_other_and_shows_in_the_status(tmp_path, capsys, monkeypatch):
    def fails(_):
        raise RuntimeError("no luck [today]")

    monkeypatch.setitem(gpu.SECTIONS, "ops", fails)
    arguments = ["--device", "cpu", "--section", "ops", "--section", "kernels", "--out", str(tmp_path / "gpu.csv")]
    assert gpu.main(arguments) == 1
    said = capsys.readouterr().out
    assert "no luck [today]" in said and "sections that failed: ops" in said and "dense product" in said


def test_numbers_and_ratios_in_the_table():
    rows = [Row("speed", "m, moeca", 12.345, "ms", 8, "cache", 2.5, "torch.compile"), Row("ops", "x", math.nan, "")]
    console = Console(width=150)
    with console.capture() as held:
        console.print(gpu.table(rows, "title"))
    assert "12.3 ms" in held.get() and "2.50x torch.compile" in held.get() and "nan" in held.get()
    assert [gpu.number(v) for v in (3.0, 1.2e-7, 0.5, 123.4)] == ["3", "1.2e-07", "0.5", "123"]


# --- time ---------------------------------------------------------------------------------------------------------


def test_what_there_is_no_time_for_is_left_out_by_name():
    rows: list[Row] = []
    short = bench(rows, seconds=1.0)
    short.attempt("kernels", "quick", 0.1, lambda: short.emit(Row("kernels", "quick", 1, "ms")))
    short.attempt("kernels", "slow", 30.0, lambda: pytest.fail("there was no time for it"))
    assert [row.what for row in rows] == ["quick"]
    assert short.budget.left_out == ["kernels: slow"]


def test_the_end_of_the_time_stops_what_takes_longer_than_was_thought(monkeypatch):
    rows: list[Row] = []
    short = bench(rows, seconds=0.05)
    monkeypatch.setitem(gpu.SECTIONS, "ops", lambda b: b.attempt("ops", "endless", 0.0, lambda: time.sleep(60)))
    start = time.monotonic()
    assert gpu.run_sections(short, ["ops"], Console()) == []
    assert time.monotonic() - start < 10
    assert short.budget.left_out == ["the rest of ops"]
    with pytest.raises(OutOfTimeError), Budget(0.01).enforced():
        time.sleep(60)


def test_an_item_that_fails_is_a_row_of_its_own():
    rows: list[Row] = []
    bench(rows).attempt("ops", "broken", 0.0, lambda: 1 / 0)
    assert rows[0].note.startswith("FAILED ZeroDivisionError") and math.isnan(rows[0].value)


# --- sections -----------------------------------------------------------------------------------------------------


def test_ops_that_equal_their_references_and_one_that_does_not(monkeypatch):
    rows: list[Row] = []
    ops.run(bench(rows))
    assert [(row.value, row.note) for row in rows] == [(0.0, "same bits twice")] * len(ops.OPS)
    rows.clear()
    reference = ops.OPS["fixed_k_outputs"]
    monkeypatch.setitem(ops.OPS, "fixed_k_outputs", lambda *arguments: 1.01 * reference(*arguments))
    ops.run(bench(rows))
    assert [row.note.startswith("WRONG") for row in rows] == [True] + [False] * (len(ops.OPS) - 1)


def test_an_op_that_gives_no_number_is_wrong(monkeypatch):
    rows: list[Row] = []
    reference = ops.OPS["attend_rows"]
    monkeypatch.setitem(ops.OPS, "attend_rows", lambda *arguments: math.nan * reference(*arguments))
    ops.run(bench(rows))
    assert rows[-1].note.startswith("WRONG") and math.isnan(rows[-1].value)


def test_the_arguments_of_refresh_pairs_keep_its_contract():
    """Places are distinct, and what is computed anew is routed."""
    _, _, place, routed, mask, *_ = ops.Make(ops.TINY, CPU, torch.float32).refresh_variable_k()
    held = place[place > 0]
    assert len(held.unique()) == len(held) > 0
    assert bool((routed | ~mask).all()) and bool(mask.any())


def test_kernels_are_held_against_what_the_device_can_do():
    rows: list[Row] = []
    kernels.run(bench(rows))
    assert not any(row.note.startswith("FAILED") for row in rows)
    assert {row.against for row in rows} == {"dense product", "copy of as many bytes"}
    assert all(row.value > 0 for row in rows)


def test_a_generation_with_and_without_recorded_steps(inductor_replaced, monkeypatch):
    rows: list[Row] = []
    monkeypatch.setattr(generation, "RECIPES", generation.RECIPES[1:])
    generation.run(bench(rows))
    assert [row.note for row in rows if row.unit == "relative error"] == ["same bits"]
    asked = {(row.what, row.unit): row.value for row in rows if row.step == "cache"}
    assert len(asked) == 6 and set(asked.values()) == {0}  # nothing is launched on a CPU


def test_speed_of_a_tiny_model(inductor_replaced, monkeypatch):
    """Plain torch.compile is left to its own tests; the model itself stands for it here."""
    compiled = speed.compiled
    monkeypatch.setattr(speed, "compiled", lambda way, model: compiled(way if way in speed.OURS else "eager", model))
    monkeypatch.setattr(speed, "ORDER", (speed.BASE, "moeca-forecast"))
    rows, names = [], []
    compile_ours = torch.compile

    def noted(model, **kwargs):
        names.append(compile_ours(model, **kwargs))
        return names[-1]

    monkeypatch.setattr(torch, "compile", noted)
    speed.run(bench(rows))
    assert [(row.what, row.step, row.ratio != "") for row in rows] == [
        (f"{TINY}, {speed.BASE}", "mean", True),
        (f"{TINY}, moeca-forecast", "mean", True),
        (f"{TINY}, moeca-forecast", "full", True),
        (f"{TINY}, moeca-forecast", "cache", True),
    ]
    steps = moeca_compile.report(names[0]).steps
    assert steps["cache"] == 3 * steps["full"]  # the timesteps that the host is told make one generation
