"""The backends that torch.compile knows by name."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import torch

from moeca_compile._torch_private.lookup import Private

_ENTRY_POINTS = Private(
    "torch._dynamo.backends.registry._BACKENDS",
    "importing moeca_compile after torch's compiler loads the whole backend, which takes longer",
)


def add_backend(name: str, value: str, group: str) -> None:
    """Add a backend as torch.compile adds the entry points that it finds: loaded when it is first asked for.

    One that is known stays: torch may be loading it, which is then why this is called.
    """
    point = EntryPoint(name, value, group)
    if isinstance(_ENTRY_POINTS.value, dict):
        _ENTRY_POINTS.value.setdefault(name, point)
    elif name not in torch._dynamo.list_backends(exclude_tags=()):
        torch._dynamo.register_backend(point.load(), name)
