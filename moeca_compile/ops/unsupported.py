"""The error for what a plan or a kernel does not support."""

from __future__ import annotations


class UnsupportedError(Exception):
    """A slower implementation has to run instead. The message is the reason, as warnings and the report show it."""
