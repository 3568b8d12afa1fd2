"""`moeca tune`: a file from two names, and mistakes that are explained."""

from __future__ import annotations

import pytest

from moeca_compile import Tuned
from moeca_compile.command import tune as command
from moeca_compile.command.main import main
from tests.command import factories
from tests.tuning.test_search import row_of

AT = "tests.command.factories:"


@pytest.fixture
def asked(monkeypatch):
    """What the tuner was asked for; it measures nothing."""
    found = {}
    row = row_of("stack-forecast, power 2", 2, 1.0, 40.0, 39.0, {"recipe": "stack-forecast"})
    outcome = Tuned({"speedup": 4.0}, True, row.name, row.name, (row,), 4, 4, (0,), (1,), {}, (1, 2, "a"), {})

    def tune(model, sample, **arguments):
        found.update(model=model, outputs=sample(model, 0), **arguments)
        return outcome

    monkeypatch.setattr(command, "tune", tune)
    monkeypatch.setattr(Tuned, "save", lambda self, path: path.write_text("saved"))
    return found


def test_names_and_wishes_reach_the_tuner(asked, tmp_path, capsys):
    out = tmp_path / "x.json"
    given = [
        "--psnr",
        "40",
        "--seeds",
        "3",
        "--steps",
        "4",
        "--recipe",
        "stack",
        "--recipe",
        "fora",
        "--resume",
        "r.json",
    ]
    assert main(["tune", f"{AT}model", f"{AT}sample", *given, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "stack-forecast, power 2" in text and f"wrote {out}" in text and out.read_text() == "saved"
    assert not asked["model"].training and asked["outputs"].shape == (2, 1, 8, 8)
    expected = {"psnr": 40.0, "seeds": 3, "steps": 4, "recipes": ["stack", "fora"], "resume": "r.json"}
    assert {name: asked.get(name) for name in expected} == expected and "speedup" not in asked


def test_four_times_as_fast_is_the_wish_where_none_is_given(asked, tmp_path):
    assert main(["tune", f"{AT}with_inputs", f"{AT}sample", "--out", str(tmp_path / "x.json")]) == 0
    assert asked["speedup"] == 4.0 and "recipes" not in asked
    assert isinstance(asked["model"], type(factories.model()))


WRONG = {
    "there is no module 'nowhere'": (["nowhere:make", f"{AT}sample"], "x.json"),
    "has no smaple": ([f"{AT}model", f"{AT}smaple"], "x.json"),
    "returned a int": (["builtins:int", f"{AT}sample"], "x.json"),
    "sample_raising raised KeyError in factories.py:": ([f"{AT}model", f"{AT}sample_raising"], "x.json"),
    "name a .json file in a folder that exists": ([f"{AT}model", f"{AT}sample"], "nowhere/x.json"),
    "a number above 1": ([f"{AT}model", f"{AT}sample", "--speedup", "1"], "x.json"),
    "a number of seeds >= 2": ([f"{AT}model", f"{AT}sample", "--seeds", "1"], "x.json"),
    "'recipe' = 'stakc'": ([f"{AT}model", f"{AT}sample", "--recipe", "stakc"], "x.json"),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_mistake_is_explained(message, tmp_path, capsys):
    arguments, out = WRONG[message]
    assert main(["tune", *arguments, "--out", str(tmp_path / out)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("moeca tune: ") and message in shown.err


def test_two_wishes_are_a_mistake(capsys):
    with pytest.raises(SystemExit):
        main(["tune", f"{AT}model", f"{AT}sample", "--psnr", "40", "--speedup", "2"])
    assert "not allowed with" in capsys.readouterr().err
