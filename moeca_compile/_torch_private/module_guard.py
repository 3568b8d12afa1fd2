"""A guard on the module whose method Dynamo is tracing, by a function of Python's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from moeca_compile._torch_private.lookup import Private
from moeca_compile._torch_private.tracing import compilation

_log = logging.getLogger(__name__)
_UNSEEN = "layers whose experts hold numbers that their code reads stay as they are"
_INSTALL_GUARD = Private("torch._dynamo.guards.install_guard", _UNSEEN)


def hold_while(holds: Callable[[], bool], text: str) -> bool:
    """Let Dynamo call the graph that it is tracing only while `holds()`, and else trace anew.

    Called while Dynamo traces a method; the guard is one on its `self`. Returns False where that is not possible.

    text: what holds, for torch's logs of recompilations.
    """

    def of_module(builder: Any, guard: Any) -> None:
        builder.get_guard_manager(guard).add_lambda_guard(lambda _: holds(), [text], None)

    try:
        source = compilation().current_tx.symbolic_locals["self"].realize().source
        _INSTALL_GUARD.value(source.make_guard(of_module))
    except (AttributeError, KeyError, TypeError):
        _log.debug("torch takes no guard by a function", exc_info=True)
        return False
    return True
