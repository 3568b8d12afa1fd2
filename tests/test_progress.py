"""What people see while a model is compiled: stage, kind of step, parts and seconds; nothing where they asked so."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest
from rich.console import Console

from moeca_compile import progress
from moeca_compile.config import MoecaConfig
from moeca_compile.notes import Notes
from moeca_compile.progress import Progress
from moeca_compile.runtime.record import Record
from tests.harness import Captured


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def compile_something(notes: Notes) -> None:
    with notes.progress.of("full step"):
        with notes.timed("rewrite"):
            pass
        with notes.timed("lower"):
            notes.progress.part(1, 2)
            notes.progress.part(2, 2)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.message for record in caplog.records if record.name == progress.__name__]
    return [re.sub(r"[\d.]+ m?s$", "S", line) for line in found]


def test_the_log_has_every_stage_and_part(caplog):
    with caplog.at_level(logging.INFO, "moeca_compile"):
        compile_something(Notes(progress=Progress(quiet=False)))
    assert lines(caplog) == [
        "full step, rewrite, S",
        "full step, lower, S",
        "full step, lower, part 1 of 2, S",
        "full step, lower, part 2 of 2, S",
        "full step compiled in S",
    ]


def test_a_terminal_has_one_line_that_is_taken_away(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(Console, "is_terminal", property(lambda self: True))
    compile_something(Notes(progress=Progress(quiet=False)))
    assert "moeca: full step" in shown.getvalue()
    assert "\x1b[2K" in shown.getvalue()


def test_nothing_is_shown_where_that_was_asked_for(monkeypatch, caplog):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with caplog.at_level(logging.INFO, "moeca_compile"):
        compile_something(Record(MoecaConfig(recipe="moeca", progress=False)).notes)
    assert lines(caplog) == [] and shown.getvalue() == ""


def test_without_rich_a_terminal_has_the_log_alone(monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    compile_something(Notes(progress=Progress(quiet=False)))
    assert shown.getvalue() == ""


def test_a_line_that_fails_stops_nothing(monkeypatch):
    def fail(self: object) -> None:
        raise RuntimeError("another line is shown")

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("rich.status.Status.start", fail)
    compile_something(Notes(progress=Progress(quiet=False)))
    monkeypatch.undo()
    monkeypatch.setattr(progress, "_line_on_terminal", lambda self: type("Line", (), {"stop": fail})())
    compile_something(Notes(progress=Progress(quiet=False)))


def test_models_and_steps_are_named(small_graph: Captured, without_inductor, caplog):
    engine = small_graph.engine(recipe="fora")
    engine.notes.progress.quiet = False
    with caplog.at_level(logging.INFO, "moeca_compile"):
        engine(*small_graph.inputs)
    found = lines(caplog)
    assert {"model, capture, S", "model, validate, S", "full step, rewrite, S", "full step, lower, S"} <= set(found)
    assert [line for line in found if "compiled in" in line] == ["model compiled in S", "full step compiled in S"]
