"""Private torch APIs: where they are named, on which versions they are there, what happens without one."""

from __future__ import annotations

import ast
import copyreg
import pickle
import pickletools
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn
from torch._inductor.utils import fresh_cache

import moeca_compile
from moeca_compile import _torch_private as private
from moeca_compile._torch_private import (
    backends,
    cpp_compiler,
    frames,
    graphs,
    kernels,
    lookup,
    on_disk,
    one_at_a_time,
    strides,
    tracing,
    wrapped_backend,
)
from moeca_compile._torch_private.lookup import Private
from moeca_compile.config import MoecaConfig
from moeca_compile.runtime.record import record_for
from tests.harness import Captured, RecordingBackend

pytestmark = pytest.mark.smoke

PACKAGE = Path(moeca_compile.__file__).parent
TABLE = (PACKAGE.parent / "docs" / "private-apis.md").read_text()
SEEN = ("2.11", "2.13", "2.15")
"""Versions of torch that have every name, all with the parameters and attributes that are used here."""

DOCUMENTED = (
    "torch._check",
    *(f"torch._dynamo.{name}" for name in ("reset", "list_backends", "lookup_backend", "register_backend")),
)
OF_PYTHON = ("_asdict", "_exit", "_fields", "_replace")


# Where they are named


def private_names(source: str, ours: frozenset[str] = frozenset()) -> list[str]:
    """The private names of others in some Python: imported, as attributes, or as strings."""
    found: list[str] = []

    class Names(ast.NodeVisitor):
        def visit_Import(self, node: ast.Import) -> None:
            found.extend(alias.name for alias in node.names if is_private(alias.name))

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
            found.extend(path for path in paths if not path.startswith("moeca_compile.") and is_private(path))

        def visit_Attribute(self, node: ast.Attribute) -> None:
            path = ast.unparse(node)
            if path in DOCUMENTED or path.startswith(("aten.", "torch.ops.aten.")):
                return
            if (node.attr not in ours and is_private(node.attr)) or path == "torch.fx.experimental":
                found.append(path)
            self.generic_visit(node)

        def visit_Call(self, node: ast.Call) -> None:
            """`getattr(x, "_name")` and its kin, and `name.startswith("_torchdynamo")`."""
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            reads = isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr", "setattr", "delattr")
            reads = reads or any(name.startswith(("_torchdynamo", "_dynamo")) for name in names)
            found.extend(name for name in names if reads and is_private(name) and name not in ours)
            self.generic_visit(node)

    Names().visit(ast.parse(source))
    return found


def is_private(path: str) -> bool:
    underscored = [name for name in path.split(".") if re.match(r"_(?!_|moeca)", name) and name not in OF_PYTHON]
    return bool(underscored) or path.startswith("torch.fx.experimental")


def defined_names() -> frozenset[str]:
    """Every name with an underscore that the package itself gives to something."""
    names: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return frozenset(names)


@pytest.mark.parametrize(
    "source",
    [
        "from torch._inductor import config",
        "import torch._dynamo.guards",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "from torch.utils._pytree import tree_leaves",
        "from torch import _refs",
        "torch._dynamo.config.suppress_errors = True",
        "torch._foreach_copy_(a, b)",
        "torch.ops.mkldnn._linear_pointwise(x)",
        "held = tensor.untyped_storage()._cdata",
        "getattr(node, '_dynamo_source')",
        "[name for name in vars(wrapper) if name.startswith('_torchdynamo')]",
        "torch.fx.experimental.symbolic_shapes.guard_or_false(x)",
    ],
)
def test_a_private_name_is_found_in_whatever_way_it_is_written(source):
    assert private_names(source)


@pytest.mark.parametrize(
    "source",
    [
        "torch._check(x > 0)",
        'torch._dynamo.lookup_backend("inductor")',
        "node.target == aten._to_copy.default",
        "from __future__ import annotations",
        "self._ours()",
        "from moeca_compile._torch_private import missing",
        "type(x).__name__",
    ],
)
def test_a_public_name_is_none(source):
    assert private_names(source, frozenset({"_ours"})) == []


def test_private_names_of_others_stand_in_one_place_only():
    ours = defined_names()
    files = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}
    found = {
        name: names
        for name, path in sorted(files.items())
        if not name.startswith("_torch_private/") and (names := private_names(path.read_text(), ours))
    }
    assert found == {}


# Which versions have them


def test_every_private_name_is_there_on_the_versions_that_the_table_names():
    version = ".".join(torch.__version__.split(".")[:2])
    if version not in SEEN:
        pytest.skip(f"not said to be complete on torch {version}")
    assert [api.path for api in Private.known if api.value is None] == []
    assert kernels.find_onednn_linear() is not None


def test_the_table_has_every_private_name_and_no_other():
    rows = [line for line in TABLE.splitlines() if line.startswith("| `torch.")]
    named = {match for row in rows for match in re.findall(r"`(torch\.[\w.]+)`", row.split("|")[1])}
    assert named == {api.path for api in Private.known}
    assert all(any(version in row.split("|")[4] for version in SEEN) for row in rows)


# What happens without one


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def hidden(*apis: Private) -> None:
        for api in apis:
            monkeypatch.setitem(vars(api), "value", None)

    return hidden


def test_a_name_that_is_missing_or_takes_other_parameters_is_said_once(caplog):
    known = list(Private.known)
    try:
        gone = Private("torch._dynamo.no_such_name", "this is lost")
        changed = Private("torch._functorch.aot_autograd.aot_export_module", "that is lost", ("no_such_parameter",))
        assert [api.value for api in (gone, gone, changed, changed)] == [None] * 4
    finally:
        Private.known[:] = known
    assert [record.message.endswith(("this is lost", "that is lost")) for record in caplog.records] == [True, True]


def test_only_required_names_count_as_missing(hide):
    assert lookup.missing() == ()
    hide(graphs._EXPORT, kernels._COPY)
    assert lookup.missing() == ("torch._functorch.aot_autograd.aot_export_module",)


def test_without_dynamos_lock_one_of_ours_is_held_and_without_its_flag_none_is_set(hide):
    for names in ((), (one_at_a_time._LOCK,), (one_at_a_time._FLAG,)):
        hide(*names)
        with private.compiling(), private.compiling():
            assert torch.compiler.is_compiling() is (one_at_a_time._FLAG not in names)
        assert not torch.compiler.is_compiling()


def test_a_backend_that_calls_ours_is_not_traced_anew_where_dynamo_has_no_word_for_it(hide):
    hide(wrapped_backend._PASSED_ON)
    seen: list[bool] = []

    def backend(gm, inputs):
        private.trace_anew_for_ours()
        seen.append(private.calls_ours())
        return gm.forward

    with torch.no_grad():
        torch.compile(lambda x: x.sin(), backend=backend)(torch.ones(2))
    assert seen == [False]


def test_copies_and_zeros_without_foreach(hide):
    hide(kernels._COPY, kernels._ZERO)
    sources = [torch.randn(3, 4), torch.randn(4, 3).t(), torch.arange(3.0)]
    copies = [torch.empty(3, 4), torch.empty(3, 4), torch.empty(3, dtype=torch.float64)]
    private.copy_all(copies, sources)
    for copied, source in zip(copies, sources, strict=True):
        torch.testing.assert_close(copied, source, check_dtype=False)
    private.zero_all(copies)
    assert not any(copied.any() for copied in copies)


def test_without_the_list_of_entry_points_a_backend_is_registered_at_once(hide):
    hide(backends._ENTRY_POINTS)
    for _ in range(2):
        private.add_backend("moeca_for_this_test", "moeca_compile.backend:moeca_backend", "any")
    assert torch._dynamo.lookup_backend("moeca_for_this_test") is moeca_compile.moeca_backend


def test_a_backend_is_added_as_an_entry_point_that_is_loaded_when_asked_for():
    private.add_backend("absent_for_this_test", "no_such_module:nothing", "any")
    assert "absent_for_this_test" in torch._dynamo.list_backends(exclude_tags=())
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        torch._dynamo.lookup_backend("absent_for_this_test")
    del backends._ENTRY_POINTS.value["absent_for_this_test"]


def test_without_dispatch_keys_no_op_has_a_kernel(hide):
    op, cpu = torch.ops.aten.relu.default, torch.device("cpu")
    assert private.has_kernel_for(op, cpu)
    hide(kernels._KEYS)
    assert not private.has_kernel_for(op, cpu)


def test_onednn_is_passed_by_where_its_op_is_missing_or_takes_other_arguments(hide, monkeypatch):
    assert kernels.find_onednn_linear() is not None
    monkeypatch.setattr(kernels, "_ONEDNN_ARGUMENTS", ["X", "W"])
    assert kernels.find_onednn_linear() is None
    hide(kernels._ONEDNN)
    assert kernels.find_onednn_linear() is None


def test_without_a_tracing_context_inductor_compiles_all_the_same(hide):
    hide(graphs._CONTEXT)
    x = torch.randn(8)
    compiled = private.compile_graph(private.trace_to_graph(lambda x: [x.sin()], x), [x])
    torch.testing.assert_close(compiled(x)[0], x.sin())


def test_without_inductors_own_functions_a_graph_is_compiled_and_its_code_is_not_reported(hide):
    x, paths = torch.randn(8), []
    for expected in (1, 0):
        paths.clear()
        compiled = private.compile_graph(private.trace_to_graph(lambda x: [x.sin()], x), [x], paths.append)
        torch.testing.assert_close(compiled(x)[0], x.sin())
        assert len(paths) == expected
        hide(graphs._INNER)


def test_sizes_are_constants_in_inductors_code():
    table, index, paths = torch.randn(11, 48), torch.tensor([3, 10]), []
    traced = private.trace_to_graph(lambda table, index: [table[index].sin().sum(0)], table, index)
    compiled = private.compile_graph(traced, [table, index], paths.append)
    torch.testing.assert_close(compiled(table, index)[0], table[index].sin().sum(0))
    code = Path(paths[0]).read_text()
    assert "(11, 48)" in code
    assert not re.search(r"\bks\d|_size\[\d\]", code)


def strides_of(index: sympy.Expr, var: sympy.Symbol) -> Any:
    """The stride that Inductor finds for 16 steps of a variable, not one that it has found before."""
    stride = vars(module_of_strides())["stride_at_vec_range"]
    return getattr(stride, "__wrapped__", stride)(index, var, 16)


def module_of_strides() -> Any:
    return sys.modules[strides._SIMPLIFY.value.__module__]


def test_strides_are_the_same_whether_sympy_simplifies_an_index_or_not():
    x, y, z = sympy.symbols("x y z", integer=True, nonnegative=True)
    divided = pkgutil.resolve_name("torch.utils._sympy.functions.FloorDiv")
    modular = pkgutil.resolve_name("torch.utils._sympy.functions.ModularIndexing")
    indices = [
        sympy.Integer(3),
        x,
        384 * x + y,
        64 * x + 64 * y,
        x + 98304 * z - 384 * (y + 2 * x),
        5 * y * x + x,
        2 * (x + y) * (z + 1),
        divided(x, 32) + y,
        y * modular(x, 1, 64),
    ]
    for index in indices:
        for var in (x, y, z):
            wanted = strides_of(index, var)
            with strides.quick_strides():
                assert sympy.simplify(strides_of(index, var) - wanted) == 0


@pytest.mark.slow
def test_inductors_code_is_the_same_with_and_without_quick_strides(hide):
    def function(x: torch.Tensor, s: torch.Tensor) -> list[torch.Tensor]:
        y = nn.functional.layer_norm(x, (64,)) * (1 + s[:, None])
        return [torch.cat([-y[..., 32:], y[..., :32]], -1).view(2, 4, 8, 64).transpose(1, 2).mean(-1), y.softmax(1)]

    x, s, codes, module = torch.randn(2, 32, 64), torch.randn(2, 64), [], module_of_strides()
    traced = private.trace_to_graph(function, x, s)
    for _ in range(2):
        with fresh_cache():
            private.compile_graph(traced, [x, s], lambda path: codes.append(Path(path).read_text()))
        for name in ("stride_at_vec_range", "simplify_index_in_vec_range"):
            getattr(vars(module)[name], "cache_clear", lambda: None)()
        hide(strides._SIMPLIFY)
    one, other = (code.partition("\n")[2] for code in codes)  # the first line counts graphs
    assert one == other and "cpp_fused" in one


def test_the_cpp_compiler_is_an_error_that_says_so_where_it_is_missing(hide):
    hide(cpp_compiler._CPP)
    with pytest.raises(RuntimeError, match="C\\+\\+ compiler"):
        private.compile_cpp("")


@pytest.mark.parametrize("name", ["_FOLDER", "_SOURCES", "_FUNCTORCH", "_COMPILER", "_COMPILER_VERSION"])
def test_nothing_is_kept_on_disk_where_it_could_not_be_told_when_it_is_stale(hide, name):
    assert private.cache_folder() is not None
    hide(getattr(on_disk, name))
    assert private.cache_folder() is None


def test_without_torchs_artifacts_none_is_recorded_and_without_its_counters_nothing_is_counted(hide):
    hide(on_disk._MANAGER, on_disk._COUNTERS)
    private.register_artifacts("for_this_test", lambda name, content: None)
    private.record_artifact("for_this_test", "name", b"content")
    assert private.graphs_from_disk() == 0


def test_where_there_is_no_cpp_compiler_that_is_what_code_depends_on(monkeypatch):
    before = private.inductor_identity()

    def none() -> str:
        raise RuntimeError("no compiler")

    monkeypatch.setitem(vars(on_disk._COMPILER), "value", none)
    assert private.inductor_identity() != before is not None


def test_inputs_are_told_apart_by_their_names_where_they_have_no_source(graph: Captured):
    nodes = [node for node in graph.gm.graph.nodes if node.op == "placeholder"]
    told = [private.is_module_state(SimpleNamespace(name=node.name)) for node in nodes]
    assert told == [private.is_module_state(node) for node in nodes]
    assert set(told) == {True, False}


def test_a_number_without_a_source_counts_as_a_size():
    assert private.is_size(SimpleNamespace(name="l_t_"))


def test_nothing_is_known_outside_of_a_compilation():
    assert list(private.tracing_backend()) == []
    found = (private.traced_wrapper(), private.graph_break(), private.root_module(), private.outermost_module())
    assert found == (None,) * 4
    assert private.wrapper_of(nn.Linear(1, 1)) is None and private.calling_code() == []


def test_without_dynamos_context_no_caller_is_known_and_code_is_not_forgotten(hide):
    hide(frames._CONTEXT, frames._RESET_CODE)
    seen: list[Any] = []

    def backend(gm, inputs):
        seen.append((private.calling_code(), private.in_decorated_function(), private.outermost_module()))
        return gm.forward

    class Model(nn.Module):
        def forward(self, x):
            return x.sin()

    model = Model()
    torch.compile(model, backend=backend)(torch.ones(1, 2))
    assert seen == [([], False, model)]
    private.forget_code(backend.__code__)


@pytest.mark.filterwarnings("ignore:.*sdp_kernel")
def test_the_older_choice_of_an_attention_kernel_is_told_what_to_write_instead():
    seen: list[tuple[str, str] | None] = []

    def backend(gm, inputs):
        seen.append(private.graph_break())
        return gm.forward

    def attend(x):
        x = x + 1
        with torch.backends.cuda.sdp_kernel(enable_flash=False):
            return x * 2

    torch.compile(attend, backend=backend)(torch.ones(2))
    assert seen[0] is not None and "use torch.nn.attention.sdpa_kernel" in seen[0][1]


@pytest.mark.filterwarnings("ignore:.*sdp_kernel")
def test_the_older_choice_of_an_attention_kernel_breaks_no_graph_of_ours():
    def attend(x, enable_math):
        with torch.backends.cuda.sdp_kernel(False, enable_math, enable_mem_efficient=False):
            y = F.scaled_dot_product_attention(x, x, x)
        return F.scaled_dot_product_attention(y, x, x)

    backend, x = RecordingBackend(), torch.randn(1, 2, 3, 4)
    torch.testing.assert_close(torch.compile(attend, backend=backend)(x, True), attend(x, True))
    assert len(backend.graphs) == 1


def test_callers_that_run_as_plain_python_are_known_by_the_wrapper_around_them():
    seen: list[list[str]] = []

    def backend(gm, inputs):
        seen.append([code.co_name for code in private.calling_code()])
        return gm.forward

    def part(x):
        return x.sin()

    def compile_wrapper(x):  # the name that torch's own wrapper has
        for _ in range(1):
            torch._dynamo.graph_break()
            x = part(x)
        return x

    torch.compile(compile_wrapper, backend=backend)(torch.ones(2))
    assert seen == [["compile_wrapper"]]


def test_the_object_under_trace_is_found_by_its_id_whatever_torch_calls_it(hide):
    hide(tracing._TRANSLATOR)
    model = nn.Linear(1, 1)
    assert private.traced_self(id(model)) is model


@pytest.mark.parametrize(
    "context", [None, torch.no_grad(), torch.inference_mode()], ids=["none", "no_grad", "inference_mode"]
)
def test_a_caller_that_a_context_decorates_is_known_under_whatever_name(context):
    seen: list[bool] = []

    def backend(gm, inputs):
        seen.append(private.in_decorated_function())
        return gm.forward

    def part(x):
        return x.sin()

    if context is not None:
        part = context(part)
        part.__code__ = part.__code__.replace(co_name="another")

    def model(x):
        for _ in range(1):
            torch._dynamo.graph_break()
            x = part(x)
        return x

    torch.compile(model, backend=backend)(torch.ones(2))
    assert seen == [context is not None]


@pytest.mark.parametrize("compiled", ["returned", "in place", "not"])
def test_the_module_behind_a_compiled_one(compiled):
    model = nn.Linear(1, 1)
    given = torch.compile(model, backend="eager") if compiled == "returned" else model
    if compiled == "in place":
        model.compile(backend="eager")
    assert private.compiled_module(given) is (None if compiled == "not" else model)


def test_hooks_are_seen_and_taken_to_be_there_where_nobody_can_tell():
    model = nn.Linear(1, 1)
    assert not private.has_forward_hooks(model)
    assert private.has_forward_hooks(SimpleNamespace())
    model.register_forward_hook(lambda *_: None)
    assert private.has_forward_hooks(model)


# Whose backend it is


def traced_for(compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "compilation", lambda: SimpleNamespace(compiler_fn=compiler))


def test_the_wrapper_is_found_behind_the_method_that_ddp_puts_before_it(monkeypatch):
    class DDPOptimizer:
        def __init__(self, backend_compile_fn: Any) -> None:
            self.backend_compile_fn = backend_compile_fn

        def compile_fn(self, gm: Any, inputs: Any) -> Any:
            return self.backend_compile_fn(gm, inputs)

    recording = RecordingBackend()
    wrapper = private.wrapper_of(torch.compile(nn.Linear(1, 1), backend=recording))
    traced_for(DDPOptimizer(wrapper).compile_fn, monkeypatch)
    assert wrapper is not None and private.traced_wrapper() is wrapper
    assert list(private.tracing_backend())[-1] is recording


@pytest.mark.parametrize("compiler", [None, lambda gm, inputs: gm, RecordingBackend()])
def test_a_backend_that_torch_compile_did_not_wrap_has_no_wrapper(compiler, monkeypatch):
    traced_for(compiler, monkeypatch)
    assert private.traced_wrapper() is None


def test_without_a_wrapper_a_record_is_kept_by_module_and_options():
    model, config = nn.Linear(1, 1), MoecaConfig.from_options(None)
    record = record_for(None, model, config)
    assert record_for(None, model, config) is record
    assert record_for(None, model, MoecaConfig.from_options({"full_every": 5})) is not record
    assert record_for(None, nn.Linear(1, 1), config) is not record


def test_memory_formats_are_pickled_the_same_whatever_was_imported_first():
    """By itself pickle takes the first module that has imported torch, which a key then depends on."""
    with private.same_keys_everywhere():
        with private.same_keys_everywhere():
            inner = pickle.dumps(torch.channels_last)
        assert pickle.dumps(torch.channels_last) == inner
    assert pickle.loads(inner) is torch.channels_last
    assert {name for _, name, _ in pickletools.genops(inner) if isinstance(name, str)} == {
        "moeca_compile._torch_private.on_disk",
        "_memory_format",
        "channels_last",
    }
    assert torch.memory_format not in copyreg.dispatch_table


# A whole model, in a fresh process: some names are looked up when the package is imported

SCRIPT = """
import pkgutil, sys, warnings
import torch
from tests.models import Sizes, make_inputs, make_model

hidden, wanted, resolve = sys.argv[1], sys.argv[2], pkgutil.resolve_name
REQUIRED = ("InstructionTranslator", "aot_export_module", "make_fx", "FakeTensorMode")

def without(path):
    from moeca_compile._torch_private.lookup import Private
    ours = any(api.path == path for api in Private.known)  # unittest.mock resolves names, too
    if hidden == path or (ours and (hidden == "all" or (hidden == "optional" and not path.endswith(REQUIRED)))):
        raise AttributeError(path)
    return resolve(path)

pkgutil.resolve_name = without
import moeca_compile, moeca_compile.fallback
moeca_compile.fallback.inductor = lambda gm, inputs: gm.forward
model = make_model(Sizes(depth=2, experts=3, width=16, heads=2, expert_width=16))
noise, labels = make_inputs(model)
compiled = torch.compile(model, backend="moeca", options={"recipe": "none"})
with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for t in (1.0, 0.5):
        time = torch.full((2,), t)
        torch.testing.assert_close(compiled(noise, time, labels), model(noise, time, labels), rtol=1e-4, atol=1e-4)
report = moeca_compile.report(compiled)
regions = {region.kind for region in report.regions}
missing = [text for text in report.warnings if "nothing is cached" in text]
if wanted == "captured":
    assert "experts" in regions and report.graphs == 1 and not missing, report
else:
    assert not regions, report
"""


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("hidden", "wanted"),
    [("optional", "captured"), ("all", "original"), ("torch.fx.experimental.proxy_tensor.make_fx", "original")],
)
def test_a_model_gives_the_same_numbers_without_private_names(hidden, wanted):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, hidden, wanted], capture_output=True, text=True, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "torch has no" in done.stderr


def test_the_object_under_trace_is_found_without_a_search(monkeypatch):
    def searched() -> list[Any]:
        raise AssertionError("all objects of the process were looked through")

    monkeypatch.setattr(tracing, "gc", SimpleNamespace(get_objects=searched))
    found: list[Any] = []

    @torch.compiler.assume_constant_result
    def look(identity: int) -> int:
        found.append(private.traced_self(identity))
        return 1

    class Inner(nn.Module):
        def forward(self, x):
            return x * look(id(self))

    model = nn.Sequential(Inner(), Inner())
    torch.compile(model, backend="eager", fullgraph=True)(torch.ones(1))
    assert found == list(model)


def test_what_dynamo_reads_of_other_experts_is_the_same_with_and_without_its_handler(handler_or_none):
    experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(3)).requires_grad_(False)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, x):
            firsts = [self.experts[0].weight, self.experts[0].bias]
            return [x.sum() + each for each in private.tensors_of_others(self.experts, PATHS, firsts)]

    layer, x = Layer(), torch.ones(2)
    backend = RecordingBackend()
    torch._dynamo.reset()
    got = torch.compile(layer, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(got, layer(x))
    inputs = [node.name for node in backend.graphs[0].graph.nodes if node.op == "placeholder"]
    assert sum("experts_modules" in name for name in inputs) >= 4
    experts[2].weight = nn.Parameter(torch.full((2, 2), 7.0), requires_grad=False)
    torch.testing.assert_close(torch.compile(layer, backend=backend, fullgraph=True)(x), layer(x))


PATHS = (("weight",), ("bias",))


@pytest.fixture(params=["handler", "a changed name", "no list"])
def handler_or_none(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from moeca_compile._torch_private import expert_tensors

    if request.param == "a changed name":
        monkeypatch.setitem(vars(expert_tensors._ITEM), "value", lambda *_: object())
    if request.param == "no list":
        monkeypatch.setitem(vars(expert_tensors._BUILDER), "value", SimpleNamespace())
    yield request.param
