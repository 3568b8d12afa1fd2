"""Models whose weights are sharded over processes: right numbers, and one warning that says why nothing is cached."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch.distributed as dist

from moeca_compile.fallback import SHARDED
from tests.processes import torchrun
from tests.runtime.sharded_worker import WAYS

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    out = folder / "found.json"
    torchrun(2, "tests/runtime/sharded_worker.py", str(out), folder=folder)
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize("way", [way.__name__ for way in WAYS])
def test_it_runs_as_under_plain_torch_compile_with_one_warning(found, way):
    assert found[way]["error"] < 1e-5
    assert found[way]["warnings"] == [f"moeca: {SHARDED}"]
    assert found[way]["report"] == found[way]["another"] == [SHARDED]
