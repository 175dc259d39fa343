"""Random networks of the reference libraries, and how far two results are apart."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from stable_diffusion.config import AutoencoderKLConfig, TextEncoderConfig, UNetConfig

torch.set_num_threads(1)  # these networks are tiny: waiting for a second thread takes longer than the work

TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module in float64 and evaluation mode, with every parameter random: a fresh one hardly moves its output."""
    generator = torch.Generator().manual_seed(seed)
    norms = {id(m.weight) for m in module.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))}
    module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim == 1:
                parameter.copy_(0.2 * noise + (id(parameter) in norms))
            else:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
    return module


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same ones in every type."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(ours: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest value of the reference."""
    assert ours.shape == reference.shape
    assert ours.dtype == reference.dtype
    assert reference.std() > 1e-3, "a reference that does not move shows nothing"
    return float((ours - reference).abs().max() / reference.abs().max())


def reference_unet(config: UNetConfig) -> nn.Module:
    """diffusers' U-Net of the same configuration, randomised."""
    down = ["CrossAttnDownBlock2D" if level else "DownBlock2D" for level in config.attention_levels]
    up = ["CrossAttnUpBlock2D" if level else "UpBlock2D" for level in config.attention_levels[::-1]]
    extra: dict[str, Any] = {}
    if config.pooled_projection_dim is not None:
        extra = {
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": config.pooled_projection_dim,
        }
    return randomise(
        diffusers.UNet2DConditionModel(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            attention_head_dim=config.num_attention_heads,  # their name for the number of heads
            cross_attention_dim=(config.cross_attention_dim,) * len(down),
            norm_num_groups=config.norm_num_groups,
            use_linear_projection=config.use_linear_projection,
            upcast_attention=config.upcast_attention,
            num_class_embeds=config.num_class_embeds,
            mid_block_type=config.mid_block_type,
            time_cond_proj_dim=config.time_cond_proj_dim,
            **extra,
        )
    )


def reference_vae(config: AutoencoderKLConfig) -> nn.Module:
    """diffusers' AutoencoderKL, or VQModel where there is a codebook, of the same configuration, randomised."""
    levels = len(config.block_out_channels)
    shared = {
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_num_groups,
        "scaling_factor": config.scaling_factor,
    }
    if config.codebook_size is None:
        return randomise(diffusers.AutoencoderKL(**shared))
    return randomise(diffusers.VQModel(**shared, num_vq_embeddings=config.codebook_size))


def reference_text(config: TextEncoderConfig) -> nn.Module:
    """transformers' CLIPTextModel or BertModel of the same configuration, randomised.

    Attention is PyTorch's: the eager one has its softmax in float32.
    """
    shared = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "attn_implementation": "sdpa",
    }
    if config.architecture == "clip":
        ends = {"bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1}
        return randomise(transformers.CLIPTextModel(transformers.CLIPTextConfig(**shared, **ends)))
    return randomise(transformers.BertModel(transformers.BertConfig(**shared), add_pooling_layer=False))


def quietly(load: Any, *args: Any, **kwargs: Any) -> Any:
    """The result of a loader of the reference libraries, without its bars and reports."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return load(*args, **kwargs)
