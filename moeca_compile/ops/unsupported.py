"""What a plan or a kernel cannot do, raised where it is found."""

from __future__ import annotations


class UnsupportedError(Exception):
    """A slower way has to run instead; the message is the reason, in words that a report can show."""
