"""Importing the package: light, silent, and beside whatever else is imported. Each case is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

READS_NOTHING = """
import sys, time, torch
loaded, start = set(sys.modules), time.perf_counter()
import moeca_compile
seconds = time.perf_counter() - start
compilers = ("torch._dynamo", "torch._inductor", "triton")
heavy = {name for name in set(sys.modules) - loaded if name.startswith(compilers)}
assert not heavy, heavy
assert seconds < 0.3, seconds
assert set(moeca_compile.__all__) <= set(dir(moeca_compile)) and moeca_compile.__version__
try:
    moeca_compile.reprot
except AttributeError as error:
    assert "reprot" in str(error)
else:
    raise AssertionError("a name that does not exist")
"""

BESIDE_OTHERS = """
import importlib, pkgutil, sys

import torch

def others():
    import transformers
    from transformers import T5EncoderModel, CLIPTextModel, LlamaForCausalLM, MixtralForCausalLM
    from diffusers import DiffusionPipeline, HiDreamImagePipeline, HiDreamImageTransformer2DModel
    import examples
    for module in pkgutil.walk_packages(examples.__path__, "examples."):
        importlib.import_module(module.name)

first, last = (others, lambda: None) if sys.argv[1] == "before" else (lambda: None, others)
first()
import moeca_compile
last()
wrapped = [c for c in torch.nn.Module.__subclasses__() for f in vars(c).values() if hasattr(f, "_moeca_original")]
assert not wrapped, wrapped

from tests.models import make_inputs, make_model
model = make_model()
compiled = torch.compile(model, backend="moeca", options={"recipe": "none", "validate": False})
noise, labels = make_inputs(model)
with torch.no_grad():
    inputs = noise, torch.ones(len(noise)), labels
    torch.testing.assert_close(compiled(*inputs), model(*inputs), rtol=1e-4, atol=1e-4)
report = moeca_compile.report(compiled)
assert report.graphs == 1 and not report.graph_breaks, report
"""


def run(code: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_reads_no_class_and_loads_no_compiler():
    run(READS_NOTHING)


@pytest.mark.parametrize("order", ["before", "after"])
def test_it_compiles_with_transformers_diffusers_and_all_examples_imported(order: str):
    run(BESIDE_OTHERS, order)
