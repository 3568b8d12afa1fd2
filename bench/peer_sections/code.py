"""The code that each tool asks of its user. It is run as it stands here, and its lines are counted.

A function of `prepare` gets the model and gives it back, `call` calls it at a sampling step, and `begin` runs before
each generation. Imports of the tools are the user's lines, too, so they are inside the functions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Step:
    """Where the sampling loop is: its user's own variables."""

    index: int
    sigma: float
    total: int


# --- torch and moeca_compile --------------------------------------------------------------------------------


def compiled(model: Any) -> Any:
    model = torch.compile(model)
    return model


def moeca(model: Any, **options: Any) -> Any:
    model = torch.compile(model, backend="moeca", options=options)
    return model


# --- cache-dit ----------------------------------------------------------------------------------------------


def cache_dit_testbed(model: Any, steps: int, calibrator: Any = None, **settings: Any) -> Any:
    """A model that it does not know: its blocks take and return the hidden states alone, by another name."""
    import cache_dit

    cache_dit.enable_cache(
        cache_dit.BlockAdapter(
            transformer=model,
            blocks=model.blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
            check_forward_pattern=False,
        ),
        cache_config=cache_dit.DBCacheConfig(num_inference_steps=steps, **settings),
        calibrator_config=calibrator,
    )
    return model


def cache_dit_nucleus(model: Any, steps: int, calibrator: Any = None, **settings: Any) -> Any:
    """It has no adapter for this model either."""
    import cache_dit

    cache_dit.enable_cache(
        cache_dit.BlockAdapter(
            transformer=model,
            blocks=model.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
        ),
        cache_config=cache_dit.DBCacheConfig(num_inference_steps=steps, **settings),
        calibrator_config=calibrator,
    )
    return model


def cache_dit_hidream(model: Any, steps: int, calibrator: Any = None, **settings: Any) -> Any:
    """It knows this model, and rewrites its forward."""
    import cache_dit

    cache_dit.enable_cache(
        model,
        cache_config=cache_dit.DBCacheConfig(num_inference_steps=steps, **settings),
        calibrator_config=calibrator,
    )
    return model


def cache_dit_begin(model: Any) -> None:
    """Without this, the first step of each further generation counts as the last of the one before."""
    import cache_dit

    cache_dit.refresh_context(model)


def cache_dit_compiled(model: Any) -> Any:
    """As its documentation compiles a model."""
    import cache_dit

    cache_dit.set_compile_configs()
    model = torch.compile(model)
    return model


# --- hooks of diffusers -------------------------------------------------------------------------------------


def known_testbed(model: Any) -> Any:
    """FirstBlockCache looks for an argument hidden_states, whatever name is given, so its place is given, too."""
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    metadata = TransformerBlockMetadata(
        return_hidden_states_index=0,
        hidden_states_argument_name="x",
        _cached_parameter_indices={"hidden_states": 0, "x": 0},
    )
    TransformerBlockRegistry.register(type(model.blocks[0]), metadata)
    return model


def known_nucleus(model: Any) -> Any:
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    metadata = TransformerBlockMetadata(return_hidden_states_index=0)
    TransformerBlockRegistry.register(type(model.transformer_blocks[0]), metadata)
    return model


def known_hidream(model: Any) -> Any:
    """Both kinds of blocks are in wrappers of one class, so the blocks inside are registered."""
    from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

    double = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
    single = TransformerBlockMetadata(return_hidden_states_index=0)
    TransformerBlockRegistry.register(type(model.double_stream_blocks[0].block), double)
    TransformerBlockRegistry.register(type(model.single_stream_blocks[0].block), single)
    return model


def single_stream_as_layers(model: Any) -> Any:
    """The hooks look for lists of some names. Those that need one list for all get the longer one of the two."""
    model.layers = torch.nn.ModuleList(each.block for each in model.single_stream_blocks)
    return model


def first_block_cache(model: Any, **settings: Any) -> Any:
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    apply_first_block_cache(model, FirstBlockCacheConfig(**settings))
    return model


def first_block_cache_hidream(model: Any, **settings: Any) -> Any:
    """One cache for each of its two lists of blocks, in a holder with the name that the hooks look for."""
    from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache

    for blocks in (model.double_stream_blocks, model.single_stream_blocks):
        holder = torch.nn.Module()
        holder.blocks = torch.nn.ModuleList(each.block for each in blocks)
        apply_first_block_cache(holder, FirstBlockCacheConfig(**settings))
    return model


def taylorseer(model: Any, **settings: Any) -> Any:
    from diffusers.hooks import TaylorSeerCacheConfig, apply_taylorseer_cache

    apply_taylorseer_cache(model, TaylorSeerCacheConfig(**settings))
    return model


def magcache(model: Any, steps: int, **settings: Any) -> Any:
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    apply_mag_cache(model, MagCacheConfig(num_inference_steps=steps, **settings))
    return model


def magcache_calibration(model: Any, steps: int) -> Any:
    """A generation with this prints the ratios, which the user copies into the other call."""
    from diffusers.hooks import MagCacheConfig, apply_mag_cache

    apply_mag_cache(model, MagCacheConfig(num_inference_steps=steps, calibrate=True))
    return model


def seacache_pictures(model: Any, **settings: Any) -> Any:
    """It compares the pictures, each (channels, frames, height, width), which it must be told how to find."""
    from diffusers.hooks import SeaCacheConfig, apply_sea_cache

    def pictures(module: Any, args: Any, kwargs: Any) -> Any:
        return list(args[0].unsqueeze(2))

    apply_sea_cache(model, SeaCacheConfig(raw_vision_callback=pictures, **settings))
    return model


def seacache_tokens(model: Any, **settings: Any) -> Any:
    """The same for a model whose picture comes as tokens, (images, tokens, channels)."""
    from diffusers.hooks import SeaCacheConfig, apply_sea_cache

    def pictures(module: Any, args: Any, kwargs: Any) -> Any:
        side = int(args[0].shape[1] ** 0.5)
        return list(args[0].transpose(1, 2).unflatten(2, (1, side, side)))

    apply_sea_cache(model, SeaCacheConfig(raw_vision_callback=pictures, **settings))
    return model


def in_context(model: Any, step: Step, *arguments: Any, **named: Any) -> Any:
    from diffusers.models.cache_utils import CacheMixin

    with CacheMixin.cache_context(model, "all"):
        return model(*arguments, **named)


def in_context_with_step(model: Any, step: Step, *arguments: Any, **named: Any) -> Any:
    from diffusers.models.cache_utils import CacheMixin

    place = {"step_index": step.index, "sigma": step.sigma, "num_inference_steps": step.total}
    with CacheMixin.cache_context(model, "all", **place):
        return model(*arguments, **named)


def hooks_begin(model: Any) -> None:
    from diffusers.hooks import HookRegistry

    HookRegistry.check_if_exists_or_initialize(model).reset_stateful_hooks()
