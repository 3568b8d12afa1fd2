"""Numbers in human units."""

import pytest

from moeca_compile import text


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0 B"),
        (1000, "1000 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (2**40, "1 TiB"),
        (2**55, "32768 TiB"),
    ],
)
def test_binary_bytes(number, expected):
    assert text.binary_bytes(number) == expected


@pytest.mark.parametrize(("number", "expected"), [(12, "12 FLOP"), (2.5e9, "2.5 GFLOP"), (53.62e12, "53.6 TFLOP")])
def test_flop_count(number, expected):
    assert text.flop_count(number) == expected


@pytest.mark.parametrize(("time", "expected"), [(0.0004, "0 ms"), (0.25, "250 ms"), (61.26, "61.3 s")])
def test_seconds(time, expected):
    assert text.seconds(time) == expected


@pytest.mark.parametrize(("number", "expected"), [(0, "0"), (12345, "12,345"), (0.25, "0.2"), (10.75, "10.8")])
def test_count(number, expected):
    assert text.count(number) == expected


@pytest.mark.parametrize(("number", "expected"), [(0, "0 graphs"), (1, "1 graph"), (2, "2 graphs")])
def test_plural(number, expected):
    assert text.plural(number, "graph") == expected


def test_percent():
    assert text.percent(0.1234) == "12.3%"
