"""Custom ops. Importing this package registers them, with their CUDA kernels if Triton is installed
and torch is built for CUDA.

markers                          stand for a MoE layer, from capture until it is lowered
fixed_k, variable_k, attention   the ops of a step, each a plain function of ATen ops
linear                           linear layers, single and grouped
routing                          a router's choice, put in place of its ops on CUDA
selection                        top-k over few columns in ops that Inductor fuses; no op of its own
bodies, body_plan, body_run      what an expert computes: registered, planned, run for all experts at once
cpu/, triton/                    kernels for CPU and CUDA
aten                             named groups of ATen ops
"""

import torch

from moeca_compile.ops import attention, fixed_k, linear, markers, routing, variable_k
from moeca_compile.ops import triton as kernels

__all__ = ["attention", "fixed_k", "linear", "markers", "routing", "variable_k"]

_library = torch.library.Library(markers.NAMESPACE, "FRAGMENT")
if kernels.available():
    kernels.register(_library)
