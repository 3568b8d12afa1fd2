"""Custom ops. Importing the package defines them all."""

from moeca_compile.ops import attention, branches, markers, pairs

__all__ = ["attention", "branches", "markers", "pairs"]
