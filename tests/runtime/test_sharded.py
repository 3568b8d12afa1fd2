"""Models whose weights are sharded over processes: right numbers, and one warning that says why nothing is cached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from moeca_compile.fallback import SHARDED
from tests.runtime.sharded_worker import WAYS

ROOT = Path(__file__).parents[2]
LIMIT = 600
"""Seconds that both processes may take, also where the machine is busy."""

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch without gloo")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sharded")
    out, path = folder / "found.json", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "tests/runtime/sharded_worker.py", str(out)],
        cwd=ROOT,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(out.read_text()))


@pytest.mark.parametrize("way", [way.__name__ for way in WAYS])
def test_it_runs_as_under_plain_torch_compile_with_one_warning(found, way):
    assert found[way]["error"] < 1e-5
    assert found[way]["warnings"] == [f"moeca: {SHARDED}"]
    assert found[way]["report"] == found[way]["another"] == [SHARDED]
