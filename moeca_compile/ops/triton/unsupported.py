"""What the kernels cannot do, said where it is found."""

from __future__ import annotations


class UnsupportedError(Exception):
    """The ATen function has to run instead; the text says why, in words that a report can show."""
