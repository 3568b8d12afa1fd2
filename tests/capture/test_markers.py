"""The marker ops by themselves."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moeca_compile.ops import markers  # noqa: F401  (defines the ops)

moeca = torch.ops.moeca


def test_expert_rows_is_a_copy():
    x = torch.randn(3, 4)
    rows = moeca.expert_rows(x)
    assert torch.equal(rows, x) and rows.data_ptr() != x.data_ptr()
    torch.library.opcheck(moeca.expert_rows.default, (x,))


def test_experts_that_were_not_lowered_say_so():
    x = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match="only stands for the layer until a pass replaces it"):
        moeca.experts_fixed_k(x, torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1), x, [x], 1)


def test_experts_have_the_shape_and_dtype_of_the_body():
    with FakeTensorMode():
        x, body_out = torch.randn(3, 4), torch.randn(3, 6, dtype=torch.bfloat16)
        index, weight = torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2)
        out = moeca.experts_fixed_k(x, index, weight, body_out, [x], 1)
    assert out.shape == (3, 6) and out.dtype == torch.bfloat16
