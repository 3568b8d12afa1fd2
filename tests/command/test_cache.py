"""`moeca cache`: what is on disk is told, and removed only where somebody agrees."""

from __future__ import annotations

import os
import sys

import pytest

from moeca_compile.command.main import main
from moeca_compile.disk import store


@pytest.fixture
def filled(folder):
    """Three entries of ours, one damaged, one unfinished, and two files of others."""
    store.write("step", "aa", [1])
    store.write("step", "bb", [2])
    store.write("export", "cc", "text")
    (folder / "step-bb.json").write_bytes(b"damaged")
    (folder / ".export-dd.json.12.34").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    (folder / "step-ee.json.bak").write_text("mine too")
    for path in folder.iterdir():
        os.utime(path, (86400 * 365, 86400 * 365))
    return folder


def said(capsys, *arguments: str) -> str:
    assert main(["cache", *arguments]) == 0
    return capsys.readouterr().out


def test_what_is_there_is_counted(filled, capsys):
    size = sum(len((filled / name).read_bytes()) for name in ("step-aa.json", "export-cc.json")) + 7 + 4
    assert said(capsys, "info").splitlines() == [
        str(filled),
        f"4 entries, {size} B, written 1971-01-01",
        "  2 exported graphs",
        "  2 traced steps",
        "  2 of damaged or unfinished",
        "  2 of format 1",
    ]


def test_an_empty_folder_is_said(folder, capsys):
    assert said(capsys, "info") == said(capsys, "clear") == f"{folder}\nnothing is there\n"


def test_ours_alone_is_removed(filled, capsys):
    assert said(capsys, "clear", "--yes").startswith("removed 4 entries, ")
    assert sorted(path.name for path in filled.iterdir()) == ["notes.txt", "step-ee.json.bak"]
    assert store.read("step", "aa") is None


@pytest.mark.parametrize(("answer", "gone"), [("y", True), ("YES", True), ("", False), ("no", False)])
def test_somebody_is_asked(filled, monkeypatch, capsys, answer, gone):
    asked = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or answer)
    told = said(capsys, "clear")
    assert asked == [f"Remove {told.removeprefix('removed ').strip()} in {filled}? [y/N] "] or not gone
    assert (store.entries() == []) == gone and ("nothing was removed" in told) != gone


def test_nothing_is_removed_where_nobody_can_be_asked(filled, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert main(["cache", "clear"]) == 2
    assert "Give --yes" in capsys.readouterr().err and len(store.entries()) == 4


def test_what_cannot_be_removed_is_told(filled, monkeypatch, capsys):
    monkeypatch.setattr(store, "remove", lambda entry: entry.kind != "step")
    assert said(capsys, "clear", "--yes").endswith("; 2 could not be removed\n")


def test_a_torch_that_keeps_nothing_is_said(capsys):
    for action in ("info", "clear"):
        assert main(["cache", action]) == 2  # the fixture of all tests: nothing on disk
        assert "torch keeps nothing on disk here" in capsys.readouterr().err
