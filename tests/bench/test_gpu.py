"""The benchmark for GPUs, as far as it runs without one: arguments, processes, faults, targets, every section."""

from __future__ import annotations

import csv
import math
import time

import pytest
import torch
from rich.console import Console
from torch import nn

from bench import gpu
from bench.gpu_sections import common, generation, kernels, ops, processes, speed
from bench.gpu_sections.common import TINY, Bench, Budget, OutOfTimeError, Row, Settings
from bench.gpu_sections.processes import Job
from bench.gpu_sections.targets import BATCH, MODEL, targets
from moeca_compile.ops.unsupported import UnsupportedError
from tests.bench import faults

pytestmark = pytest.mark.bench

CPU = torch.device("cpu")
SETTINGS = Settings(CPU, torch.float32, small=True)


def bench(rows: list[Row], seconds: float = 600.0) -> Bench:
    return Bench(SETTINGS, Budget(seconds), rows.append)


def done(section) -> None:
    """Run a section, or a way, from start to end in this process."""
    for _ in section:
        pass


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


def test_the_models_that_it_measures_are_published_ones_and_the_targets_come_first():
    assert set(gpu.MODELS) <= set(common.families.PUBLISHED)
    defaults = gpu.parse_arguments([])
    assert defaults.minutes < 10 and defaults.section is None
    what, jobs = next(gpu.tables(Settings(CPU, torch.bfloat16, gpu.MODELS, gpu.BATCHES), gpu.SECTIONS))
    assert what == f"{MODEL}, batch {BATCH}"
    assert [job.what for job in jobs if job.section == "speed"] == [f"{MODEL}, {way}" for way in speed.ORDER]
    assert sum(job.section == "generation" for job in jobs) == len(generation.RECIPES)


@pytest.mark.slow  # a minute: its rows, its processes and its table are tested apart
def test_one_call_prints_a_table_and_keeps_its_rows(tmp_path, capsys):
    """In processes of its own, by kernels in the interpreter."""
    out = tmp_path / "gpu.csv"
    arguments = ["--device", "cpu", "--tiny", "--dtype", "float32", "--out", str(out), "--section", "ops"]
    assert gpu.main(arguments) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    others = ["router of 64 rows with ties", "top-k of 64 rows"]
    assert [row["what"] for row in rows] == [*(f"{name}, float32" for name in ops.OPS), *others]
    assert all(row["torch"] == torch.__version__ and row["device"] and row["when"] for row in rows)
    assert capsys.readouterr().out.splitlines()[-1] == f"{len(rows)} rows, 0 wrong or failed"


@pytest.mark.parametrize("note, status", [("", 0), ("FAILED no kernel", 1), ("WRONG", 1)])
def test_the_status_tells_of_a_row_that_failed_or_is_wrong(monkeypatch, tmp_path, note, status):
    monkeypatch.setattr(gpu, "run", lambda settings, sections, budget, emit: emit(Row("ops", "x", 1, "", note=note)))
    arguments = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "gpu.csv")]
    assert gpu.main(arguments) == status
    assert gpu.main(arguments) == status  # and rows are appended
    assert len((tmp_path / "gpu.csv").read_text().splitlines()) == 3


def test_nothing_measured_is_no_success(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "run", lambda *_: None)
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path / "gpu.csv")]) == 1


def test_numbers_and_ratios_in_the_table():
    rows = [Row("speed", "m, moeca", 12.345, "ms", 8, "cache", 2.5, "torch.compile"), Row("ops", "x", math.nan, "")]
    console = Console(width=150)
    with console.capture() as held:
        console.print(gpu.table(rows, "title"))
    assert "12.3 ms" in held.get() and "2.50x torch.compile" in held.get() and "nan" in held.get()
    assert [gpu.number(v) for v in (3.0, 1.2e-7, 0.5, 123.4)] == ["3", "1.2e-07", "0.5", "123"]


# --- processes and their faults -----------------------------------------------------------------------------------


def job(function) -> Job:
    return Job("speed", function.__name__, 2, function, SETTINGS)


def notes(rows: list[Row]) -> dict[str, str]:
    return {row.what: row.note for row in rows if row.note}


@pytest.mark.slow
def test_a_job_that_fails_in_any_way_costs_its_row_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "MEASURING", 5.0)
    monkeypatch.setenv("MEMORY_FLAG", str(tmp_path / "flag"))
    planted = (
        faults.hangs_while_measured,
        faults.fine,
        faults.raises,
        faults.dies,
        faults.warns,
        faults.finds_no_memory_beside_others,
        faults.fine,
    )
    rows: list[Row] = []
    processes.run_side_by_side([job(each) for each in planted], Budget(500), rows.append, 240)
    found = notes(rows)
    assert set(found) == {"hangs_while_measured", "raises", "dies", "warns"}
    assert all(note.startswith("FAILED") for note in found.values())
    assert "not measured in time" in found["hangs_while_measured"]
    assert "RuntimeError: no luck [today]" in found["raises"]
    assert "exit code -9" in found["dies"]
    assert "runs without kernels" in found["warns"] and [row.what for row in rows].count("warns") == 1
    by = {what: [row.value for row in rows if row.what == what] for what in ("ready", "measured", "ended", "alone")}
    assert len(by["ended"]) == 2 and len(by["alone"]) == 1
    # All were ready before the first was measured, and one was measured after the other.
    assert max(by["ready"]) < min(by["measured"]) and by["ended"][0] <= by["measured"][1]
    assert any(row.what == "before its death" for row in rows)


def test_one_that_is_never_ready_is_killed_and_so_is_one_without_memory_even_alone(monkeypatch):
    rows: list[Row] = []
    start = time.monotonic()
    processes.run_alone(job(faults.hangs_while_compiling), Budget(500), rows.append, 3)
    assert time.monotonic() - start < 60
    processes.run_alone(job(faults.finds_no_memory), Budget(500), rows.append, 240)
    assert notes(rows) == {
        "hangs_while_compiling": "FAILED not ready in time, killed",
        "finds_no_memory": "FAILED OutOfMemoryError: CUDA out of memory",
    }


# --- time ---------------------------------------------------------------------------------------------------------


def test_what_there_is_no_time_for_is_left_out_by_name():
    rows: list[Row] = []
    short = bench(rows, seconds=1.0)
    short.attempt("kernels", "quick", 0.1, lambda: short.emit(Row("kernels", "quick", 1, "ms")))
    short.attempt("kernels", "slow", 30.0, lambda: pytest.fail("there was no time for it"))
    assert [row.what for row in rows] == ["quick"]
    assert short.budget.left_out == ["kernels: slow"]


def test_without_time_no_process_is_started(monkeypatch):
    budget = Budget(1.0)
    monkeypatch.setattr(processes, "Process", lambda *_: pytest.fail("there was no time for it"))
    gpu.run(SETTINGS, gpu.SECTIONS, budget, lambda row: pytest.fail(str(row)))
    assert budget.left_out == ["ops", "kernels", f"{TINY}, batch 2"]


def test_an_item_that_fails_is_a_row_of_its_own():
    rows: list[Row] = []
    bench(rows).attempt("ops", "broken", 0.0, lambda: 1 / 0)
    assert rows[0].note.startswith("FAILED ZeroDivisionError") and math.isnan(rows[0].value)


# --- ops and kernels ----------------------------------------------------------------------------------------------


@pytest.fixture
def one_op(monkeypatch):
    """The section with `fixed_k_outputs` alone: the interpreter is slow."""
    monkeypatch.setattr(ops, "OPS", {"fixed_k_outputs": ops.OPS["fixed_k_outputs"]})


def rows_of_ops() -> list[Row]:
    rows: list[Row] = []
    done(ops.run(bench(rows)))
    return rows


def test_a_kernel_that_equals_its_reference_and_one_that_does_not(one_op, monkeypatch):
    assert [row.note for row in rows_of_ops()] == ["same bits twice", "", ""]
    right = ops.kernel("fixed_k_outputs", CPU)
    for factor in (1.01, math.nan):
        monkeypatch.setattr(ops, "kernel", lambda *_, f=factor: lambda *arguments: f * right(*arguments))
        assert rows_of_ops()[0].note.startswith("WRONG")


def test_a_kernel_that_is_not_the_same_twice_is_wrong(one_op, monkeypatch):
    right, calls = ops.kernel("fixed_k_outputs", CPU), iter(range(9))
    monkeypatch.setattr(ops, "kernel", lambda *_: lambda *a: right(*a) * (1 + 1e-6 * next(calls)))
    assert "WRONG: other bits" in rows_of_ops()[0].note


def test_the_reference_in_place_of_a_kernel_is_a_failure(one_op, monkeypatch):
    from moeca_compile.ops.triton import fixed_k

    def refuse(*_):
        raise UnsupportedError("no product in float9")

    with monkeypatch.context() as patch:
        patch.setattr(fixed_k, "kernel_plan", refuse)
        assert rows_of_ops()[0].note == "FAILED UnsupportedError: no product in float9"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert rows_of_ops()[0].note.startswith("FAILED NoKernelError")
    monkeypatch.setattr(ops, "has_kernel_for", lambda *_: False)
    with pytest.raises(ops.NoKernelError, match="no kernel for CUDA"):
        ops.kernel("fixed_k_outputs", torch.device("cuda"))


def test_a_wrong_selection_is_wrong(one_op, monkeypatch):
    right = ops.selection.topk
    flips = iter((True, False) * 9)
    monkeypatch.setattr(ops.selection, "topk", lambda x, k: right(-x if next(flips) else x, k))
    assert rows_of_ops()[-1].note == "WRONG"


def swapped(op):
    """A router that gives each token's first two experts in the other order."""
    return lambda *arguments: tuple(value[:, [1, 0, *range(2, value.shape[1])]] for value in op(*arguments))


@pytest.mark.parametrize(
    "fault", [swapped, lambda op: lambda *a: (op(*a)[0], 1.1 * op(*a)[1])], ids=["ids", "weights"]
)
def test_a_wrong_router_is_wrong(monkeypatch, fault):
    monkeypatch.setattr(ops, "OPS", {"choose_experts": ops.OPS["choose_experts"]})
    assert [row.note for row in rows_of_ops()] == ["same bits twice", "", ""]
    right = ops.kernel("choose_experts", CPU)
    monkeypatch.setattr(ops, "kernel", lambda *_: fault(right))
    assert [row.note.startswith("WRONG") for row in rows_of_ops()] == [True, True, False]


def test_the_router_that_is_timed_against_ours_chooses_the_same():
    arguments = ops.Make(ops.Sizes(samples=1, tokens=64), CPU, torch.float32).choose_experts()
    for found, expected in zip(kernels.spelled(*arguments[:2]), ops.routing.choose_experts(*arguments), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_arguments_of_refresh_pairs_keep_its_contract():
    """Places are distinct, and what is computed anew is routed."""
    _, _, place, routed, mask, *_ = ops.Make(ops.TINY, CPU, torch.float32).refresh_variable_k()
    held = place[place > 0]
    assert len(held.unique()) == len(held) > 0
    assert bool((routed | ~mask).all()) and bool(mask.any())


def test_kernels_are_held_against_what_the_device_can_do(monkeypatch):
    monkeypatch.setattr(kernels, "milliseconds", lambda function, device: (function(), 2.0)[1])
    rows: list[Row] = []
    done(kernels.run(bench(rows)))
    assert not any(row.note.startswith("FAILED") for row in rows)
    assert {row.against for row in rows} == {"dense product", "copy of as many bytes", "ATen's ops"}
    assert all(row.ratio == (2.0 if row.what.startswith("gated") else 1.0) for row in rows)  # of twice the FLOPs
    assert {row.what.rpartition(", ")[2] for row in rows if row.what.startswith("router")} == {
        "ATen",
        "Inductor",
        "moeca",
    }


def test_torchs_grouped_product_of_packed_weights_is_that_of_each_expert():
    if kernels.grouped_mm is None:
        pytest.skip("this torch has no grouped product")
    make = ops.Make(ops.TINY, CPU, torch.bfloat16)
    x, index, packed = make.normal(32, 16), make.distinct(1, 4, 32), make.normal(4, 24, 16)
    settings = Settings(CPU, torch.bfloat16, small=True)
    found = kernels.of_torch(Bench(settings, Budget(9), print), x, index, packed)[kernels.TORCH_SORTED]()
    order = index.flatten().argsort(stable=True)
    expected = torch.stack([packed[e] @ x[i] for i, e in zip(order, index.flatten()[order], strict=True)])
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_generation_with_and_without_recorded_steps():
    rows: list[Row] = []
    done(generation.run(bench(rows), TINY, generation.RECIPES[1]))
    assert [row.note for row in rows if row.unit == "relative error"] == ["same bits"]
    asked = {(row.what, row.unit): row.value for row in rows if row.step == "cache"}
    assert len(asked) == 6 and set(asked.values()) == {0}  # nothing is launched on a CPU


def rows_of_way(way: str) -> list[Row]:
    rows: list[Row] = []
    with torch.no_grad():
        done(speed.measured(bench(rows), TINY, 2, way))
    return rows


def test_a_way_is_measured_from_its_first_call_to_its_memory():
    rows = rows_of_way(speed.FORECAST)
    assert {row.note for row in rows} <= {"", "beside weights"}
    assert [(row.step, row.unit) for row in rows] == [
        ("first call", "ms"),
        ("peak of the first call", "MiB"),
        ("ready", "s"),
        ("mean", "ms"),
        ("full", "ms"),
        ("cache", "ms"),
        ("host", "ms"),
        ("peak of later calls", "MiB"),
        ("allocated", "MiB"),
        ("full", "relative error"),
        ("caches", "MiB"),
    ]
    by = {(row.step, row.unit): row.value for row in rows}
    assert by["full", "relative error"] < 1e-5 and by["caches", "MiB"] > 0


class Off(nn.Module):
    """A wrong step: what the model gives, with the other sign."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments):
        return -self.inner(*arguments)


def test_a_wrong_step_is_wrong(monkeypatch):
    compiled = speed.compiled
    assert not any(row.note.startswith("WRONG") for row in rows_of_way(speed.EAGER))
    monkeypatch.setattr(speed, "compiled", lambda *arguments: Off(compiled(*arguments)))
    assert [row.step for row in rows_of_way(speed.EAGER) if row.note.startswith("WRONG")] == ["full"]


# --- targets ------------------------------------------------------------------------------------------------------


def measured_rows(full: float = 10.0) -> list[Row]:
    def of(way, step, value, unit="ms"):
        return Row("speed", f"{MODEL}, {way}", value, unit, BATCH, step)

    sizes = "8192 rows, 1024x2048, 16 experts"
    return [
        of("none", "mean", 10.0),
        of("moeca-forecast", "mean", 3.0),
        of("moeca-forecast", "full", full),
        of("moeca-forecast", "cache", 0.7),
        of("moeca-forecast", "host", 0.1),
        of("moeca 1/16", "mean", 4.0),
        of("moeca 1/16", "cache", 1.6),
        *(of(way, "ready", 50.0, "s") for way in ("none", "moeca-forecast", "moeca 1/16")),
        of("torch.compile", "ready", 60.0, "s"),
        Row("kernels", f"moeca: {sizes}", 1.0, "ms", ratio=0.85),
        Row("kernels", f"{kernels.TORCH_WHOLE}: {sizes}", 1.0, "ms", ratio=0.9),
        Row("kernels", "combine, batch 32", 1.0, "ms", ratio=0.9),
        Row("kernels", "combine with forecast, batch 32", 1.0, "ms", ratio=0.7),
    ]


def test_each_target_stands_beside_its_figure():
    found = {each.what: (each.verdict, round(each.figure, 3)) for each in targets(measured_rows())}
    assert found == {
        "none, ms a step": ("met", 10.0),
        "full step of moeca-forecast / none": ("met", 1.0),
        "cache step with nothing recomputed / none": ("met", 0.07),
        "cache step of moeca 1/16 / none": ("MISSED", 0.16),
        "generation of moeca-forecast, times as fast as none": ("met", 3.333),
        "generation of moeca 1/16, times as fast as none": ("MISSED", 2.5),
        "host time of a cache step, ms": ("met", 0.1),
        "ready, s over plain torch.compile": ("met", -10.0),
        "grouped product, share of a dense one's rate": ("met", 0.85),
        "grouped product / torch's, sorted and gathered": ("MISSED", 0.944),
        "combine, share of a copy's bandwidth": ("MISSED", 0.7),
        "attend, share of a copy's bandwidth": ("not measured", pytest.approx(math.nan, nan_ok=True)),
    }
    assert targets(measured_rows(full=10.6))[1].verdict == "MISSED"
    assert {each.verdict for each in targets([])} == {"not measured"}


def test_no_time_left_inside_a_section():
    with pytest.raises(OutOfTimeError), Budget(0.01).enforced():
        time.sleep(60)
