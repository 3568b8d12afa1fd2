"""Custom ops. Importing the package defines them all, with their kernels where there can be a device for them.

markers                          what a MoE layer means, from capture until it is lowered
fixed_k, variable_k, attention   what runs in a step, each a plain function of ATen ops
linear                           linear layers, one and by group
bodies, body_plan, body_run      what an expert computes: registered, planned, run for all experts at once
cpu/, triton/                    kernels of these for CPU and CUDA
aten                             groups of ATen ops, by name
"""

import torch

from moeca_compile.ops import attention, fixed_k, linear, markers, variable_k
from moeca_compile.ops import triton as kernels

__all__ = ["attention", "fixed_k", "linear", "markers", "variable_k"]

_library = torch.library.Library(markers.NAMESPACE, "FRAGMENT")
if kernels.available():
    kernels.register(_library)
