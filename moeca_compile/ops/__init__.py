"""Custom ops. Importing the package defines them all."""

from moeca_compile.ops import attention, branches, linear, markers, pairs

__all__ = ["attention", "branches", "linear", "markers", "pairs"]
