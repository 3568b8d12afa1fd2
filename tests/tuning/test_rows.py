"""Rows kept in a file while a tune goes on."""

from __future__ import annotations

import json

import pytest

from moeca_compile.tuning.rows import Store
from tests.tuning.test_search import row_of

SUBJECT = {"model": [3, 12, "ab"], "steps": 8}


def test_rows_are_there_again(tmp_path):
    path, row = tmp_path / "rows.json", row_of("one", 4, 2.0, 40.0, 39.0, {"recipe": "stack"})
    store = Store(path, SUBJECT)
    assert store.known("one", {"recipe": "stack"}) is None and not path.exists()
    store.add(row)
    again = Store(path, SUBJECT)
    assert again.known("one", {"recipe": "stack"}) == row
    assert again.known("one", {"recipe": "fora"}) is None, "by another code of the tuner"
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"moeca_tuning": 2}', '{"moeca_tuning": 1, "subject": {}}'])
def test_a_damaged_file_is_an_error_that_says_what_to_do(text, tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="Give another path, or remove the file"):
        Store(path, SUBJECT)


def test_outputs_may_differ_by_what_rounding_does_and_no_more(tmp_path):
    path, values = tmp_path / "rows.json", [0.005 * i for i in range(200)]
    Store(path, SUBJECT, values).add(row_of("one", 4, 2.0, 40.0, 39.0))
    assert "one" in Store(path, SUBJECT, [value + 1e-3 for value in values]).rows
    with pytest.raises(ValueError, match=r"the uncached outputs were others there \(20 dB apart\)"):
        Store(path, SUBJECT, [value + 0.1 for value in values])


def test_rows_of_another_tune_are_refused_with_what_differs(tmp_path):
    path = tmp_path / "rows.json"
    Store(path, SUBJECT).add(row_of("one", 4, 2.0, 40.0, 39.0))
    with pytest.raises(ValueError, match="steps was 8 there and is 9 now"):
        Store(path, {**SUBJECT, "steps": 9})
    with pytest.raises(ValueError, match=r"the uncached outputs were others there \(0 values and 2\)"):
        Store(path, SUBJECT, [0.0, 1.0])
    values = json.loads(path.read_text())
    values["rows"][0]["seconds_"] = values["rows"][0].pop("seconds")
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="is damaged"):
        Store(path, SUBJECT)
