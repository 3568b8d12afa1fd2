"""The example of docs/adding-an-idiom.md works as it stands there."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path

import torch
from torch import nn

from moeca_compile import capture
from tests.capture.layers import WIDTH, stack, tokens
from tests.harness import RecordingBackend, nodes_of
from tests.references import run_with_markers

DOCUMENT = Path(__file__).parents[2] / "docs" / "adding-an-idiom.md"


def module(path: Path, source: str):
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = made
    spec.loader.exec_module(made)
    return made


def test_the_documented_idiom_captures_the_documented_model(tmp_path, monkeypatch):
    method, idiom = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    header = "import torch\nfrom tests.capture.layers import MoE\n\n\nclass Documented(MoE):\n"
    indented = "".join(f"    {line}" for line in method.splitlines(keepends=True))
    added = module(tmp_path / "membership_idiom.py", idiom).IDIOM
    install = importlib.import_module("moeca_compile.capture.install")
    monkeypatch.setattr(install, "IDIOMS", (*install.IDIOMS, added))
    layer = module(tmp_path / "membership_model.py", header + indented).Documented()
    layer.shared = nn.Linear(WIDTH, WIDTH)
    model = stack(layer)
    backend = RecordingBackend(run=lambda gm: lambda *args: run_with_markers(gm, args))
    with torch.no_grad():
        got = torch.compile(model, backend=backend)(tokens())
        torch.testing.assert_close(got, model(tokens()))
    assert len(backend.graphs) == len(nodes_of(backend.graphs[0], torch.ops.moeca.experts_fixed_k)) == 1
    assert capture.refusals() == ()
