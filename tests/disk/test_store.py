"""Entries on disk: whole or not at all, ours or none, and on their way to other machines."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch

from moeca_compile.disk import store

VALUE = {"checks": [1.5, None, "text"]}


def test_what_was_written_is_read(folder: Path):
    assert store.read("kind", "key") is None
    store.write("kind", "key", VALUE)
    assert store.read("kind", "key") == VALUE
    assert store.read("kind", "other") is store.read("other", "key") is None
    assert [path.name for path in folder.iterdir()] == ["kind-key.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"1.5", b"2.5"),
        lambda content: b"\x80\x04" + content,
        lambda content: content.partition(b"\n")[2],
        lambda content: content.replace(b"kind-key", b"kind-yek"),
        lambda content: b"[" * 100_000,
    ],
)
def test_a_damaged_or_foreign_file_counts_as_none(folder: Path, damage, caplog):
    store.write("kind", "key", VALUE)
    path = folder / "kind-key.json"
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.DEBUG, "moeca_compile"):
        assert store.read("kind", "key") is None
    assert "is ignored" in caplog.text
    store.write("kind", "key", VALUE)
    assert store.read("kind", "key") == VALUE


def test_a_folder_that_cannot_be_written_or_read_is_as_if_there_were_none(folder: Path):
    folder.write_text("a file where the folder should be")
    store.write("kind", "key", VALUE)
    assert store.read("kind", "key") is None


def test_writers_and_readers_at_once_see_whole_entries_alone(folder: Path):
    long, seen = ["value"] * 20_000, []

    def fill() -> None:
        for _ in range(5):
            store.write("kind", "key", long)
            seen.append(store.read("kind", "key") == long)

    threads = [threading.Thread(target=fill) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 20
    assert [path.name for path in folder.iterdir()] == ["kind-key.json"]


def test_torchs_artifacts_bring_entries_to_another_folder(folder: Path):
    store.write("kind", "shipped", VALUE)
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None
    (folder / "kind-shipped.json").unlink()
    info = torch.compiler.load_cache_artifacts(saved[0])
    assert info is not None and "kind-shipped.json" in info.artifacts[store.FOLDER]
    assert store.read("kind", "shipped") == VALUE


def test_an_artifact_is_written_nowhere_else(folder: Path):
    store._put("../outside.json", b"")
    assert not (folder.parent / "outside.json").exists()


def test_torch_says_where_entries_are_and_whether_there_are_any(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert store.folder() == tmp_path / "moeca_compile"
    for off in ({"force_disable_caches": True}, {"fx_graph_cache": False}):
        with torch._inductor.config.patch(off):
            assert store.folder() is None
