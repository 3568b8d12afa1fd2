"""Real diffusers pipelines at tiny sizes, from configs and random weights: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import moeca_compile
from tests.public_models import random, tiny_hidream, tiny_nucleus

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "dog", "on", "the", "moon"]
TEXT = 6
ENDINGS = ("", "_2", "_3", "_4")
"""Of the names of HiDream's text encoders and tokenizers."""


def seeded(model: Any) -> Any:
    """The model in eval mode, with weights that are the same whatever was made before, none of them zero."""
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        size = 0.5 * weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.3
        weight.data.normal_(std=size, generator=generator)
    return model.eval().requires_grad_(False)


def tokenizer() -> Any:
    """One number a word."""
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def text_encoder() -> Any:
    sizes = {"d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return seeded(transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(WORDS), **sizes)))


def vae(**options: Any) -> Any:
    sizes = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    return seeded(diffusers.AutoencoderKL(**sizes, **options))


def pixart(scheduler: Any = None) -> Any:
    """Text, joined guidance, picture: all of a pipeline, with a dense denoiser."""
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=16,
        sample_size=4,
        patch_size=2,
        caption_channels=12,
        use_additional_conditions=False,
    )
    pipe = diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=vae(),
        transformer=seeded(transformer),
        scheduler=scheduler or diffusers.DPMSolverMultistepScheduler(),
    )
    return silent(pipe)


def flux(kind: Any = diffusers.FluxPipeline, guidance_embeds: bool = True) -> Any:
    """Cache contexts for guidance, and two inputs that are embedded like timesteps."""
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 2, 2),
    )
    decoder = vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)
    encoders = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return silent(kind(scheduler=scheduler, vae=decoder, transformer=seeded(transformer), **encoders))


def flux_inputs(guided: bool = False) -> dict[str, Any]:
    texts = {"prompt_embeds": random(1, TEXT, 12, seed=1), "pooled_prompt_embeds": random(1, 10, seed=2)}
    if guided:
        texts |= {f"negative_{name}": 0.5 * text for name, text in texts.items()} | {"true_cfg_scale": 2.0}
    return texts


def nucleus() -> Any:
    """A mixture of experts, and two calls a step without cache contexts."""
    transformer = tiny_nucleus(in_channels=16, out_channels=4, num_layers=2)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = dict.fromkeys(("vae", "text_encoder", "processor"))
    pipe = diffusers.NucleusMoEImagePipeline(transformer=seeded(transformer), scheduler=scheduler, **parts)
    return silent(pipe)


def nucleus_inputs() -> dict[str, Any]:
    mask = torch.ones(1, TEXT, dtype=torch.long)
    return {
        "prompt_embeds": random(1, TEXT, 12, seed=1),
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds": random(1, TEXT, 12, seed=2),
        "negative_prompt_embeds_mask": mask,
        "guidance_scale": 2.0,
    }


def clip() -> Any:
    """A text encoder with a pooled output."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {name: WORDS.index(word) for name, word in (("bos_token_id", "<pad>"), ("eos_token_id", "</s>"))}
    config = transformers.CLIPTextConfig(vocab_size=len(WORDS), projection_dim=5, **sizes, **special)
    return seeded(transformers.CLIPTextModelWithProjection(config))


def llama() -> Any:
    """A language model, of which all hidden states are used. It also gives its attention, so that is eager."""
    sizes = {"hidden_size": 10, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 6}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=len(WORDS), **sizes, **heads, attn_implementation="eager")
    return seeded(transformers.LlamaForCausalLM(config))


def hidream(scheduler: Any = None) -> Any:
    """A mixture of experts in two streams, four text encoders with their tokenizers, and joined guidance."""
    transformer = tiny_hidream(num_layers=1, num_single_layers=1, text_emb_dim=10, llama_layers=[0, 1])
    encoders = (clip(), clip(), text_encoder(), llama())
    pipe = diffusers.HiDreamImagePipeline(
        vae=vae(shift_factor=0.1),
        transformer=seeded(transformer),
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(),
        **{f"text_encoder{ending}": each for ending, each in zip(ENDINGS, encoders, strict=True)},
        **{f"tokenizer{ending}": tokenizer() for ending in ENDINGS},
    )
    pipe.default_sample_size = 8
    return silent(pipe)


def silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, steps: int, seed: int = 0, side: int = 32, **arguments: Any) -> Tensor:
    """The latents of a picture of `side` pixels."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"height": side, "width": side} if side else {}
    given = {**sizes, "generator": generator, "num_inference_steps": steps, "output_type": "latent", **arguments}
    return pipe(**given, return_dict=False)[0]


def steps_of(model: Any) -> tuple[int, int]:
    """(full steps, cache steps) so far, of whatever capacity."""
    steps = moeca_compile.report(model).steps
    return steps.get("full", 0), sum(number for kind, number in steps.items() if kind.startswith("cache"))
