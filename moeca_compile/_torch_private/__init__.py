"""Every private torch API that the package uses, and nothing else: a file a subject.

Private is what torch's documentation does not have: a name of torch with a leading underscore anywhere in its
path, and torch.fx.experimental, which it calls subject to change. Documented for all the underscore, and so public
here: torch._check, torch._dynamo.reset, list_backends, lookup_backend and register_backend. Names of ATen's ops in a
graph, such as aten._to_copy, are matched on, not called, and count as public too.

Each use is a `Private` (lookup.py) with what is lost without it. Those without which nothing can be cached are
`required`: the backend asks `missing()` and then runs models as torch.compile would. All others have a fallback
that gives the same numbers. docs/private-apis.md has them all, with the gain of each and the versions it was seen on.
"""

from moeca_compile._torch_private.any_size import compile_for_sizes
from moeca_compile._torch_private.backends import add_backend
from moeca_compile._torch_private.collectives import (
    exchanges_played,
    group_by_name,
    groups_held,
    ranks_are_joined,
    with_exchanges_played,
)
from moeca_compile._torch_private.compile_start import not_on_compile_start, on_every_compile_start
from moeca_compile._torch_private.cpp_compiler import (
    compile_cpp,
    cpp_compiler_is_busy,
    make_cpp_compiler_ready,
    wait_for_cpp_compiler,
)
from moeca_compile._torch_private.cpp_kernels import joined_kernels
from moeca_compile._torch_private.expert_tensors import tensors_of_others
from moeca_compile._torch_private.frames import (
    calling_code,
    compilation_at_start,
    dynamo_is_running,
    forget_code,
    in_decorated_function,
    outermost_module,
)
from moeca_compile._torch_private.graphs import (
    compile_graph,
    export_functional,
    fake_mode_of,
    has_static_value,
    inductor,
    is_fake,
    is_module_state,
    is_size,
    load_inductor,
    tensor_of_number,
    trace_to_graph,
)
from moeca_compile._torch_private.host_constants import read_constants
from moeca_compile._torch_private.idle_logging import pass_idle_logging
from moeca_compile._torch_private.kernels import (
    copy_all,
    float32_matmul_precision,
    has_kernel_for,
    onednn_linear,
    schema_of,
    zero_all,
)
from moeca_compile._torch_private.lookup import missing
from moeca_compile._torch_private.module_guard import hold_while
from moeca_compile._torch_private.modules import (
    compiled_call,
    compiled_module,
    has_forward_hooks,
    restore_compiled_call,
    version_of,
)
from moeca_compile._torch_private.on_disk import (
    cache_folder,
    graphs_from_disk,
    inductor_identity,
    record_artifact,
    register_artifacts,
    same_keys_everywhere,
)
from moeca_compile._torch_private.one_at_a_time import compiling
from moeca_compile._torch_private.own_modules import own_modules
from moeca_compile._torch_private.running import before_each_op, trace_by_running
from moeca_compile._torch_private.sdp_kernel import trace_sdp_kernel
from moeca_compile._torch_private.settings import apply_settings, current_settings
from moeca_compile._torch_private.subclasses import is_sharded, subclass_among, subclass_weight
from moeca_compile._torch_private.tracing import (
    compilation,
    graph_break,
    hand_over_whole,
    numeric_modes,
    options_for_ours,
    root_module,
    traced_anew,
    traced_code,
    traced_self,
    traced_wrapper,
    traces_for_us,
    tracing_backend,
    wrapper_of,
)
from moeca_compile._torch_private.wrapped_backend import calls_ours, trace_anew_for_ours

__all__ = [
    "add_backend",
    "apply_settings",
    "before_each_op",
    "cache_folder",
    "calling_code",
    "calls_ours",
    "compilation",
    "compilation_at_start",
    "compile_cpp",
    "compile_for_sizes",
    "compile_graph",
    "compiled_call",
    "compiled_module",
    "compiling",
    "copy_all",
    "cpp_compiler_is_busy",
    "current_settings",
    "dynamo_is_running",
    "exchanges_played",
    "export_functional",
    "fake_mode_of",
    "float32_matmul_precision",
    "forget_code",
    "graph_break",
    "graphs_from_disk",
    "group_by_name",
    "groups_held",
    "hand_over_whole",
    "has_forward_hooks",
    "has_kernel_for",
    "has_static_value",
    "hold_while",
    "in_decorated_function",
    "inductor",
    "inductor_identity",
    "is_fake",
    "is_module_state",
    "is_sharded",
    "is_size",
    "joined_kernels",
    "load_inductor",
    "make_cpp_compiler_ready",
    "missing",
    "not_on_compile_start",
    "numeric_modes",
    "on_every_compile_start",
    "onednn_linear",
    "options_for_ours",
    "outermost_module",
    "own_modules",
    "pass_idle_logging",
    "ranks_are_joined",
    "read_constants",
    "record_artifact",
    "register_artifacts",
    "restore_compiled_call",
    "root_module",
    "same_keys_everywhere",
    "schema_of",
    "subclass_among",
    "subclass_weight",
    "tensor_of_number",
    "tensors_of_others",
    "trace_anew_for_ours",
    "trace_by_running",
    "trace_sdp_kernel",
    "trace_to_graph",
    "traced_anew",
    "traced_code",
    "traced_self",
    "traced_wrapper",
    "traces_for_us",
    "tracing_backend",
    "version_of",
    "wait_for_cpp_compiler",
    "with_exchanges_played",
    "wrapper_of",
    "zero_all",
]
