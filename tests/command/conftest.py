from __future__ import annotations

from collections.abc import Iterator

import pytest

from moeca_compile.capture.refusals import forget_refusals


@pytest.fixture(autouse=True)
def nothing_stays_refused() -> Iterator[None]:
    """A command is a process of its own: reports of later tests do not list what it left as it was."""
    yield
    forget_refusals()
