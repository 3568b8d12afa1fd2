"""Custom ops. Importing the package defines them all, with their kernels where there can be a device for them."""

import torch

from moeca_compile.ops import attention, fixed_k, linear, markers, variable_k
from moeca_compile.ops import triton as kernels

__all__ = ["attention", "fixed_k", "linear", "markers", "variable_k"]

_library = torch.library.Library(markers.NAMESPACE, "FRAGMENT")
if kernels.available():
    kernels.register(_library)
