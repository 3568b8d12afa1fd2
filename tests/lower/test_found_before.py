"""What an earlier process validated and traced is used by a later one, and nothing that it may not rely on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from moeca_compile import backend
from moeca_compile.disk import store
from moeca_compile.lower import found_before
from moeca_compile.notes import Notes
from tests.harness import Captured, captured
from tests.models import SMALL, make_inputs, make_model

ROOT = Path(__file__).resolve().parents[2]
TIMES = (0.9, 0.8, 0.7)
"""Two full steps, until the direction of time is known, and a cache step."""
OPTIONS: dict[str, Any] = {"recipe": "fora", "full_every": 4}


pytestmark = pytest.mark.usefixtures("without_inductor")


def outputs(graph: Captured, **options: Any) -> tuple[list[torch.Tensor], dict[str, int], dict[str, float]]:
    """Those of a full and a cache step, what was on disk for them, and the errors that validation noted."""
    engine = graph.engine(**{**OPTIONS, **options})
    noise, labels = make_inputs(make_model(SMALL))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [engine(*graph.arguments(x=noise, t=torch.full((2,), t), y=labels))[0] for t in TIMES]
    return found, {kind: number for kind, number in engine.notes.from_disk.items() if number}, engine.notes.errors


def test_a_later_process_traces_and_validates_nothing(small_graph: Captured, folder: Path, monkeypatch):
    first, before, errors = outputs(small_graph, recipe="moeca")
    assert before == {} and len(list(folder.glob("*.json"))) == 1 + 3 + 2
    for name in ("sound_regions", "same_step", "trace_step"):
        monkeypatch.setattr(backend, name, lambda *_: pytest.fail("this was found out before"))
    second, known, noted = outputs(small_graph, recipe="moeca")
    assert known == {"exported graphs": 1, "validations": 3, "traced steps": 2}
    assert noted == errors
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_other_options_find_nothing_but_the_exported_graph(small_graph: Captured, folder: Path):
    outputs(small_graph)
    assert outputs(small_graph, recipe="stack")[1] == {"exported graphs": 1}
    assert outputs(small_graph, disk_cache=False)[1] == {}


def test_nothing_is_kept_without_the_option_nor_beside_a_dump(small_graph: Captured, folder: Path, tmp_path):
    outputs(small_graph, disk_cache=False)
    outputs(small_graph, dump=str(tmp_path / "dump"))
    assert not folder.exists()


def test_what_fails_in_keeping_stops_no_compilation(small_graph: Captured, folder: Path, monkeypatch):
    def fail(*_: Any) -> Any:
        raise RuntimeError("nobody expected this")

    for name in ("captured_key", "graph_form", "described"):
        monkeypatch.setattr(found_before, name, fail)
    assert len(outputs(small_graph)[0]) == len(TIMES)
    assert not list(folder.glob("step*")) + list(folder.glob("export*"))


def spoiled(value: Any) -> Any:
    """A value of another form under a right checksum, as another version might have written it."""
    return [["nonsense", value], 5, None]


def test_damaged_files_are_ignored_and_written_anew(small_graph: Captured, folder: Path):
    first, _, _ = outputs(small_graph)
    for number, path in enumerate(sorted(folder.glob("*.json"))):
        if number % 2:
            path.write_bytes(path.read_bytes()[:-9])
        else:
            kind, _, key = path.stem.partition("-")
            store.write(kind, key, spoiled(store.read(kind, key)))
    second, known, _ = outputs(small_graph)
    assert known == {}
    assert outputs(small_graph)[1] == {"exported graphs": 1, "validations": 3, "traced steps": 2}
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_gates_of_zero_prove_nothing_that_could_be_kept(folder: Path):
    model = make_model(SMALL)
    for name, parameter in model.named_parameters():
        if "modulation" in name or "adaln" in name.lower():
            parameter.zero_()
    noise, labels = make_inputs(model)
    graph = captured(model, noise, torch.ones(2), labels)
    for _ in range(2):
        engine = graph.engine(**OPTIONS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loop = engine.loop_for(graph.inputs)
        assert not loop.compiled.proven
        assert engine.notes.from_disk["validations"] == 0


def validated(notes: Notes, outcome: Any, warn: bool = False) -> Any:
    def validate() -> Any:
        notes.worst("full", 0.5)
        if warn:
            notes.warn("this is not certain")
        return outcome

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return found_before.validated("key", notes, validate, passed=True)


def test_only_a_validation_that_passed_without_a_doubt_is_kept(folder: Path):
    doubtful = Notes()
    assert validated(doubtful, False) is False
    assert validated(doubtful, True, warn=True) is True
    assert validated(doubtful, True, warn=True) is True  # the same warning again, which is not shown again
    assert not folder.exists()
    assert validated(Notes(), True) is True
    notes = Notes()
    assert validated(notes, False) is True and notes.errors == {"full": 0.5}
    assert notes.from_disk == {"validations": 1}


SCRIPT = """
import json, sys, warnings
import torch
warnings.simplefilter("ignore")
torch.set_num_threads(1)
import moeca_compile
from tests.models import SMALL, make_inputs, make_model
model = make_model(SMALL)
noise, labels = make_inputs(model)
options = {"recipe": "fora", "full_every": 4, **json.loads(sys.argv[1])}
compiled = torch.compile(model, backend="moeca", options=options)
with torch.no_grad():
    values = [compiled(noise, torch.full((2,), t), labels).sum().item() for t in (0.9, 0.8, 0.7)]
report = moeca_compile.report(compiled)
from torch._dynamo.utils import counters
misses = counters["aot_autograd"]["autograd_cache_miss"] + counters["inductor"]["fxgraph_cache_miss"]
print(json.dumps([values, dict(report.from_disk), report.compiled_parts, misses]))
"""


def started(folder: Path, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def result(process: subprocess.Popen[str]) -> list[Any]:
    shown, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    found: list[Any] = json.loads(shown.splitlines()[-1])
    return found


def test_two_processes_fill_one_cache_at_once_for_a_third(small_graph: Captured, tmp_path: Path, monkeypatch):
    """The third is this one."""
    first, second = [result(each) for each in [started(tmp_path, lowering="eager") for _ in range(2)]]
    assert first[0] == second[0]
    monkeypatch.setattr(store, "folder", lambda: tmp_path / store.FOLDER)
    found, known, _ = outputs(small_graph)
    assert known == {"exported graphs": 1, "validations": 3, "traced steps": 2}
    assert [value.sum().item() for value in found] == first[0]


@pytest.mark.slow
def test_a_second_process_compiles_nothing(tmp_path):
    first, second = (result(started(tmp_path)) for _ in range(2))
    assert first[2] == second[2] > 2 and first[3] > 0
    assert second[1] == {"exported graphs": 1, "validations": 3, "traced steps": 2, "compiled parts": second[2]}
    assert second[3] == 0 and second[0] == first[0]
