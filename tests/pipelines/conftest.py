"""What tests of pipelines share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import moeca_compile


@pytest.fixture
def enabled() -> Iterator[Callable[..., Any]]:
    """Enables pipelines, and disables them after the test. Returns the one denoiser."""
    pipes = []

    def enable(pipe: Any, recipe: str = "stack", full_every: int = 3, validate: bool = False) -> Any:
        pipes.append(pipe)
        options = {"recipe": recipe, "full_every": full_every, "validate": validate, "lowering": "eager"}
        found = moeca_compile.enable(pipe, **options)
        assert list(found) == ["transformer"]
        return found["transformer"]

    yield enable
    for pipe in pipes:
        moeca_compile.disable(pipe)


@pytest.fixture(autouse=True)
def fresh_dynamo(traced_once: None) -> None:
    """Flux and HiDream decorate their forward alike, so Dynamo counts their compilations together. And a model of a
    class that hooks have broken into parts begins in parts."""
    torch._dynamo.reset()
