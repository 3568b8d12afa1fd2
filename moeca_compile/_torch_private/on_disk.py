"""What Inductor keeps on disk: where, what its code depends on, and how caches travel from machine to machine."""

from __future__ import annotations

import copyreg
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from moeca_compile._torch_private.lookup import Private

_FOUND_ANEW = "each process traces and validates anew"
_FOLDER = Private("torch._inductor.runtime.cache_dir_utils.cache_dir", _FOUND_ANEW)
_SOURCES = Private("torch._inductor.codecache.torch_key", _FOUND_ANEW)
_INDUCTOR = Private("torch._inductor.config", _FOUND_ANEW)
_FUNCTORCH = Private("torch._functorch.config", _FOUND_ANEW)
_COMPILER = Private("torch._inductor.cpp_builder.get_cpp_compiler", _FOUND_ANEW)
_COMPILER_VERSION = Private("torch._inductor.cpp_builder.get_compiler_version_info", _FOUND_ANEW)
_NOT_SHIPPED = "torch.compiler.save_cache_artifacts() has nothing of moeca_compile's"
_ARTIFACT = Private("torch.compiler._cache.CacheArtifact", _NOT_SHIPPED)
_FACTORY = Private("torch.compiler._cache.CacheArtifactFactory", _NOT_SHIPPED)
_MANAGER = Private("torch.compiler._cache.CacheArtifactManager", _NOT_SHIPPED)
_COUNTERS = Private("torch._dynamo.utils.counters", "the report does not say what Inductor had compiled before")

_CUSTOM_PASSES = (
    "pre_grad_custom_pass",
    "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass",
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "_pre_fusion_custom_pass",
    "_post_fusion_custom_pass",
)
"""Functions of the user's that change what Inductor compiles. Its own caches leave them out of the configuration."""


def cache_folder() -> Path | None:
    """Inductor's cache directory, whatever set it last; None where nothing is to be kept there."""
    if any(each.value is None for each in (_FOLDER, _SOURCES, _INDUCTOR, _FUNCTORCH, _COMPILER, _COMPILER_VERSION)):
        return None
    config = _INDUCTOR.value
    if config.force_disable_caches or not config.fx_graph_cache:
        return None
    return Path(_FOLDER.value())


def inductor_identity() -> list[Any] | None:
    """All that decides what code Inductor writes for a graph on this machine, as plain values.

    None where functions of the user's take part, which have no name that says what they do.
    """
    config = _INDUCTOR.value
    if any(getattr(config, name, None) for name in _CUSTOM_PASSES):
        return None
    portable = [sorted(map(repr, each.save_config_portable().items())) for each in (config, _FUNCTORCH.value)]
    return [_SOURCES.value().hex(), *portable, _cpp_compiler(), torch.get_num_threads()]


@contextmanager
def same_keys_everywhere() -> Iterator[None]:
    """Inside, the keys of Inductor's caches do not depend on which modules were imported first.

    They are hashes of pickles, and pickle looks for a memory format in all modules that have a `torch`.
    """
    known = copyreg.dispatch_table
    if torch.memory_format in known:
        yield
        return
    copyreg.pickle(torch.memory_format, _pickled)
    try:
        yield
    finally:
        del known[torch.memory_format]


def _pickled(value: torch.memory_format) -> tuple[Callable[[str], torch.memory_format], tuple[str]]:
    return _memory_format, (str(value).removeprefix("torch."),)


def _memory_format(name: str) -> torch.memory_format:
    value = getattr(torch, name)
    assert isinstance(value, torch.memory_format)
    return value


def _cpp_compiler() -> str:
    try:
        compiler = _COMPILER.value()
        return f"{compiler} {_COMPILER_VERSION.value(compiler)}"
    except Exception:  # there may be none, where all code has been compiled before
        return "none"


def register_artifacts(kind: str, populate: Callable[[str, bytes], None]) -> None:
    """Let `torch.compiler.load_cache_artifacts` give `populate` the name and content of each artifact of a kind."""
    if any(each.value is None for each in (_ARTIFACT, _FACTORY, _MANAGER)):
        return

    class Artifact(_ARTIFACT.value):  # type: ignore[name-defined]
        def populate_cache(self) -> None:
            populate(self.key, self.content)

        @staticmethod
        def type() -> str:
            return kind

    with suppress(AssertionError):  # registered by an earlier import of this package
        _FACTORY.value.register(Artifact)


def record_artifact(kind: str, name: str, content: bytes) -> None:
    """Have `torch.compiler.save_cache_artifacts` take this along."""
    if not any(each.value is None for each in (_ARTIFACT, _FACTORY, _MANAGER)):
        _MANAGER.value.record_artifact(kind, name, content)


def graphs_from_disk() -> int:
    """How many graphs Inductor has had on disk already, in this process; 0 where it does not say."""
    if _COUNTERS.value is None:
        return 0
    # AOTAutograd's cache takes the graph from Inductor's, and counts beside it.
    found = _COUNTERS.value["aot_autograd"]["autograd_cache_hit"], _COUNTERS.value["inductor"]["fxgraph_cache_hit"]
    return int(max(found))
