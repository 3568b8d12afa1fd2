"""Entries on disk, in `moeca_compile/` of Inductor's cache directory: two lines of JSON each, by kind and key.

A file that is damaged, or not one of ours, counts as none. Files are complete when they appear: two processes may
fill one directory at once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeca_compile._torch_private import cache_folder, record_artifact, register_artifacts

_log = logging.getLogger(__name__)

FOLDER = "moeca_compile"
_FORMAT = 1


_NAME = re.compile(r"(?P<kind>[a-z]+)-\w+\.json")
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.\d+\.\d+")
"""What a process that was killed leaves behind."""


@dataclass(frozen=True)
class Entry:
    """A file of ours on disk.

    Attributes:
        kind: what it holds.
        nbytes: its size.
        written: seconds since 1970.
        format: of which version it is; None where it is damaged or unfinished, and so counts as none.
    """

    path: Path
    kind: str
    nbytes: int
    written: float
    format: int | None


def folder() -> Path | None:
    """Where entries are; None where torch keeps nothing on disk."""
    torchs = cache_folder()
    return None if torchs is None else torchs / FOLDER


def read(kind: str, key: str) -> Any:
    """The value of an entry; None where there is none."""
    where, name = folder(), f"{kind}-{key}.json"
    if where is None:
        return None
    try:
        content = (where / name).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.debug("%s cannot be read: %s", where / name, error)
        return None
    value = _value_in(content, name)
    if value is None:
        _log.debug("%s is damaged, or not of this package, and is ignored", where / name)
    else:
        record_artifact(FOLDER, name, content)
    return value


def write(kind: str, key: str, value: Any) -> None:
    """Keep a value (plain, not None). What cannot be written is not kept."""
    name = f"{kind}-{key}.json"
    body = json.dumps(value, separators=(",", ":")).encode()
    content = json.dumps(_head(body, name)).encode() + b"\n" + body
    if folder() is not None:
        _put(name, content)
        record_artifact(FOLDER, name, content)


def entries() -> list[Entry]:
    """All files of ours in the folder, by name; others are left out."""
    where = folder()
    paths = sorted(where.iterdir()) if where is not None and where.is_dir() else []
    found = (_entry(path) for path in paths)
    return [entry for entry in found if entry is not None]


def remove(entry: Entry) -> bool:
    """Remove a file. Returns whether it is gone now; another process may have removed it."""
    try:
        entry.path.unlink(missing_ok=True)
    except OSError as error:
        _log.debug("%s cannot be removed: %s", entry.path, error)
        return False
    return True


def _entry(path: Path) -> Entry | None:
    name = _NAME.fullmatch(path.name) or _UNFINISHED.fullmatch(path.name)
    try:
        if name is None or not path.is_file():
            return None
        facts, content = path.stat(), path.read_bytes()
    except OSError:  # gone meanwhile, or not to be read
        return None
    known = _value_in(content, path.name) is not None
    return Entry(path, name["kind"], facts.st_size, facts.st_mtime, _format_in(content) if known else None)


def _format_in(content: bytes) -> int:
    found: int = json.loads(content.partition(b"\n")[0])["format"]
    return found


def _put(name: str, content: bytes) -> None:
    """Write a file in one move."""
    where = folder()
    if where is None or Path(name).name != name:
        return
    try:
        where.mkdir(parents=True, exist_ok=True)
        temporary = where / f".{name}.{os.getpid()}.{threading.get_ident()}"
        try:
            temporary.write_bytes(content)
            os.replace(temporary, where / name)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        _log.debug("%s cannot be written: %s", where / name, error)


def _value_in(content: bytes, name: str) -> Any:
    """The value in a file's content; None where it is not what `write` wrote under this name."""
    try:
        head, _, body = content.partition(b"\n")
        return json.loads(body) if json.loads(head) == _head(body, name) else None
    except (ValueError, RecursionError):
        return None


def _head(body: bytes, name: str) -> dict[str, Any]:
    """What the first line of a file says of the second."""
    return {"format": _FORMAT, "name": name, "sum": hashlib.sha256(body).hexdigest()}


register_artifacts(FOLDER, _put)
