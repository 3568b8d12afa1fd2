"""`moeca report`: a saved report as text or page, and what it says of other files."""

from __future__ import annotations

import pytest

from moeca_compile.command.main import main
from tests.reporting.reports import make_report


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "report.json"
    make_report().save(path)
    return path


def test_the_text_is_that_of_the_report(saved, capsys):
    assert main(["report", str(saved)]) == 0
    assert capsys.readouterr().out == f"{make_report()}\n"


def test_the_page_is_that_of_the_report(saved, tmp_path, capsys):
    out, expected = tmp_path / "report.html", tmp_path / "expected.html"
    assert main(["report", str(saved), "--html", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    make_report().save(expected)
    assert out.read_text() == expected.read_text()


def test_a_mistake_is_explained(saved, tmp_path, capsys):
    (tmp_path / "text.json").write_text("text")
    (tmp_path / "other.json").write_text('{"graphs": 1}')
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    missing = tmp_path / "missing.json"
    for arguments, message in (
        ([str(missing)], f"there is no file {str(missing)!r}"),
        ([str(tmp_path)], "cannot be read: Is a directory"),
        ([str(tmp_path / "text.json")], "is no JSON: write it by report(model).save('report.json')"),
        ([str(tmp_path / "bytes.json")], "is no JSON"),
        ([str(tmp_path / "other.json")], "these are not the values of a report of this version"),
        ([str(saved), "--html", str(tmp_path / "a.json")], "the name must end in .html"),
        ([str(saved), "--html", str(tmp_path / "a.txt")], "the name must end in .html or .json"),
        ([str(saved), "--html", str(tmp_path / "no" / "a.html")], "there is no folder"),
    ):
        assert main(["report", *arguments]) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.startswith("moeca report: ") and message in told.err
    assert not (tmp_path / "a.json").exists()
