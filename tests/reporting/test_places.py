"""Where the code of regions is written."""

from __future__ import annotations

import functools

from torch import Tensor, nn

from moeca_compile.reporting.places import places_of


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Without(nn.Module):
    """Its forward is no function of Python."""

    forward = functools.partial(Own.forward, None)

    def __init__(self) -> None:
        super().__init__()
        self.inner = Own()


def line(kind: type) -> str:
    return f"test_places.py:{kind.forward.__code__.co_firstlineno}"


def test_a_module_of_torch_has_the_place_of_the_one_around_it():
    assert places_of(Own(), ["inner", ""]) == dict.fromkeys(("inner", ""), line(Own))


def test_a_forward_without_code_has_no_place_and_is_no_error():
    assert places_of(Without(), ["inner", ""]) == {"inner": line(Own)}
    assert places_of(None, ["inner"]) == {}
