"""Importing the package: light, silent, and beside whatever else is imported. Each case is a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import moeca_compile
from moeca_compile import entry_point

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


UNINSTALLED = """
import sys, torch
from importlib import metadata

def others(context=metadata.DistributionFinder.Context(), find=metadata.MetadataPathFinder.find_distributions):
    return (found for found in find(context) if found.metadata["Name"] != "moeca-compile")

metadata.MetadataPathFinder.find_distributions = others
model, x = torch.nn.Linear(2, 2).eval(), torch.ones(1, 2)
order = sys.argv[1]
if order == "after the compiler":
    import torch._dynamo
if order == "after a look for backends":
    assert "moeca" not in torch._dynamo.list_backends(exclude_tags=())
if order == "after a compilation":
    torch.compile(model, backend="eager")(x)
if order != "never":
    import moeca_compile
    assert "moeca_compile.backend" not in sys.modules
if order == "before a reset":
    torch._dynamo.reset()
assert ("moeca" in torch._dynamo.list_backends(exclude_tags=())) == (order != "never")
if order != "never":
    compiled = torch.compile(model, backend="moeca", options={"recipe": "none", "lowering": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    assert moeca_compile.report(compiled).graphs == 1
    assert metadata.version("moeca_compile") == moeca_compile.__version__
try:
    metadata.version("no-such-package")
except metadata.PackageNotFoundError:
    pass
else:
    raise AssertionError("the metadata of any other package")
"""


def run(code: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.smoke
def test_importing_reads_no_class_and_loads_no_compiler():
    run(READS_NOTHING)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("order", [pytest.param("before", marks=pytest.mark.slow), "after"])
def test_it_compiles_with_transformers_diffusers_and_all_examples_imported(order: str):
    run(BESIDE_OTHERS, order)


# The backend's name


@pytest.mark.sampled(5)
@pytest.mark.smoke
@pytest.mark.parametrize(
    "order",
    [
        "never",
        "first",
        "after the compiler",
        "after a look for backends",
        "after a compilation",
        "before a reset",
    ],
)
def test_a_package_that_is_not_installed_is_a_backend_once_it_is_imported(order: str):
    run(UNINSTALLED, order)


@pytest.mark.smoke
def test_there_is_one_backend_of_that_name_whether_installed_or_not():
    points = entry_points(group=entry_point.GROUP, name=entry_point.NAME)
    assert [point.value for point in points] == [entry_point.VALUE]
    assert version(entry_point.DISTRIBUTION) == moeca_compile.__version__


# What is declared


PROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()
TORCH = next(
    Requirement(line.strip().strip('",')) for line in PROJECT.splitlines() if line.strip().startswith('"torch>')
)


def test_the_entry_point_is_the_declared_one():
    assert f'[project.entry-points.{entry_point.GROUP}]\n{entry_point.NAME} = "{entry_point.VALUE}"' in PROJECT
    assert f'name = "{entry_point.DISTRIBUTION}"' in PROJECT


@pytest.mark.parametrize("torch", ["2.11.0", "2.12.1", "2.13.0+cpu", "2.14.1", "2.15.0+cu132", "2.15.9"])
def test_installing_it_leaves_the_torch_that_is_there(torch: str):
    assert TORCH.specifier.contains(torch)


@pytest.mark.parametrize("torch", ["2.10.1", "2.16.0"])
def test_a_torch_that_no_test_has_seen_is_not_taken(torch: str):
    assert not TORCH.specifier.contains(torch)
