"""The entry point by which torch.compile finds the backend, where no installation provides it.

torch.compile asks `importlib.metadata` for the entry points of the group torch_dynamo_backends. An installed package
has one; one that merely lies on PYTHONPATH does not, so importing it adds a finder that answers with the same one.
Where the package is installed, that comes first and ours is passed over, since both have one name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from typing import Any

NAME, VALUE, GROUP = "moeca", "moeca_compile.backend:moeca_backend", "torch_dynamo_backends"
DISTRIBUTION = "moeca-compile"


class _Uninstalled(Distribution):
    """The package as it lies on the path, with no files but its metadata."""

    def __init__(self, version: str) -> None:
        self.files_by_name = {
            "METADATA": f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {version}\n",
            "entry_points.txt": f"[{GROUP}]\n{NAME} = {VALUE}\n",
        }

    def read_text(self, filename: Any) -> str | None:
        return self.files_by_name.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent.parent / path


class _Finder(DistributionFinder):
    """Finds one distribution and no module."""

    def __init__(self, version: str) -> None:
        self.found = _Uninstalled(version)

    def find_spec(self, *_: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterator[Distribution]:
        wanted = getattr(context, "name", None)
        if wanted is None or wanted.lower().replace("_", "-") == DISTRIBUTION:
            yield self.found


def provide(version: str) -> None:
    """Make `backend="moeca"` known to torch.compile, whether or not it has looked for backends already."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder(version))
    # It looks for entry points once. This module does, and where it is loaded that may have been.
    if "torch._dynamo.backends.registry" in sys.modules:
        from moeca_compile._torch_private import add_backend

        add_backend(NAME, VALUE, GROUP)
