"""What Dynamo makes of a method's call on one of its variables: ours is asked first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Answer = Callable[[Callable[..., Any], Any, Any, str, Any, Any], Any]
"""Of (what Dynamo does, variable, translator, name of the method, args, kwargs); returns the result as a variable."""


def ask_first(kind: Any, answer: Answer) -> bool:
    """Have a class of Dynamo's variables ask `answer` in place of its `call_method`. False where it does already."""
    original = kind.call_method
    if hasattr(original, "_moeca_original"):
        return False

    @functools.wraps(original)
    def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        return answer(original, self, tx, name, args, kwargs)

    call_method._moeca_original = original  # type: ignore[attr-defined]
    kind.call_method = call_method
    return True
