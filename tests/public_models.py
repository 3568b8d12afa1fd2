"""What the tests of diffusers' models share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn


def tiny_nucleus(**sizes: Any) -> nn.Module:
    """Nucleus-Image: a dense block, then blocks with experts that choose their tokens; these are not initialized.

    `sizes` are in_channels, out_channels and num_layers, and whatever else is to differ.
    """
    module = pytest.importorskip("diffusers.models.transformers.transformer_nucleusmoe_image")
    own = {
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "joint_attention_dim": 12,
        "axes_dims_rope": (4, 2, 2),
        "dense_moe_strategy": "leave_first_block_dense",
        "num_experts": 4,
        "moe_intermediate_dim": 16,
        "capacity_factors": 2.0,
        "mlp_ratio": 12.0,
    }
    model: nn.Module = module.NucleusMoEImageTransformer2DModel(**own | sizes)
    return model


def tiny_hidream(**sizes: Any) -> nn.Module:
    """HiDream-I1: double-stream, then single-stream blocks, all with experts; these are not initialized.

    `sizes` are num_layers, num_single_layers, llama_layers and text_emb_dim, and whatever else is to differ.
    """
    module = pytest.importorskip("diffusers.models.transformers.transformer_hidream_image")
    own = {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_channels": [12, 10],
        "num_routed_experts": 4,
        "num_activated_experts": 2,
        "axes_dims_rope": (4, 2, 2),
        "max_resolution": (8, 8),
    }
    model: nn.Module = module.HiDreamImageTransformer2DModel(**own | sizes)
    return model


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
