"""Small Stable Diffusion folders with random weights, in the form in which the real ones are published.

Today's libraries write other names than the published files have (no
``text_model.`` prefix and no ``position_ids``, ``to_q`` for ``query``), and more keys in the configurations.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file

import stable_diffusion
from tests.lively import lively
from tests.nn.reference import quietly

TOKENIZER = Path(stable_diffusion.__file__).parent / "weights" / "clip-tokenizer"

# The keys of the published configurations; everything else there is left to the class's defaults.
UNET_KEYS = {
    *("_class_name", "_diffusers_version", "act_fn", "attention_head_dim", "block_out_channels"),
    *(
        "center_input_sample",
        "cross_attention_dim",
        "down_block_types",
        "downsample_padding",
        "flip_sin_to_cos",
    ),
    *(
        "freq_shift",
        "in_channels",
        "layers_per_block",
        "mid_block_scale_factor",
        "norm_eps",
        "norm_num_groups",
    ),
    *("out_channels", "sample_size", "up_block_types"),
}
UNET_KEYS_2 = UNET_KEYS | {
    "dual_cross_attention",
    "use_linear_projection",
    "upcast_attention",
    "only_cross_attention",
}
VAE_KEYS = {
    *("_class_name", "_diffusers_version", "act_fn", "block_out_channels", "down_block_types", "in_channels"),
    *(
        "latent_channels",
        "layers_per_block",
        "norm_num_groups",
        "out_channels",
        "sample_size",
        "up_block_types",
    ),
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (32, 48, 64),
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
TINY_VAE = {"sample_size": 32, "block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4}
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
KINDS = ("1.5", "2.1", "inpaint")


def write(folder: Path, kind: str) -> Path:
    """A tiny folder: "1.5" (eps, PNDM), "2.1" (v, DDIM, linear projections) or "inpaint" (1.5 with nine channels)."""
    second = kind == "2.1"
    unet = {
        **TINY_UNET,
        "attention_head_dim": [2, 4, 8] if second else 8,
        "in_channels": 9 if kind == "inpaint" else 4,
    }
    if second:
        unet |= {"use_linear_projection": True, "upcast_attention": True}
    text = {**TINY_TEXT, "hidden_act": "gelu" if second else "quick_gelu"}
    if second:
        text["num_hidden_layers"] = 3
    scheduler: dict[str, Any] = {}
    if second:
        scheduler = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    elif kind == "inpaint":
        scheduler = {"_class_name": "DDIMScheduler"}
    return build(folder, unet, TINY_VAE, text, SCHEDULER | scheduler, second=second)


def build(
    folder: Path,
    unet: dict[str, Any],
    vae: dict[str, Any],
    text: dict[str, Any],
    scheduler: dict[str, Any],
    *,
    second: bool = False,
    pipeline: str = "StableDiffusionPipeline",
) -> Path:
    """A folder of these settings; `vae` without ``layers_per_block`` is an ``AutoencoderTiny``."""
    levels, codec_levels = len(unet["block_out_channels"]), len(vae.get("block_out_channels", ()))
    down = unet.get("down_block_types", ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",))
    kl = "layers_per_block" in vae
    if kl:
        codec = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * codec_levels,
            up_block_types=("UpDecoderBlock2D",) * codec_levels,
            **vae,
        )
    else:
        codec = diffusers.AutoencoderTiny(**vae)
    parts = {
        "unet": diffusers.UNet2DConditionModel(
            up_block_types=tuple(kind.replace("Down", "Up") for kind in down[::-1]),
            **{"down_block_types": down} | unet,
        ),
        "vae": codec,
        "text_encoder": transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                **{"vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 32} | text,
                **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},  # as published: no token numbers
            )
        ),
    }
    for i, part in enumerate(parts.values()):
        lively(part, seed=i)
    with (
        torch.no_grad()
    ):  # eps of about unit size, as from a trained network: a walk of it neither dies nor explodes
        parts["unet"].conv_out.weight.mul_(0.5)
    names = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    names["text_encoder"] = ["transformers", "CLIPTextModel"]
    for name, part in parts.items():
        quietly(part.save_pretrained, folder / name)
    parts.clear()
    _keep(folder / "unet" / "config.json", (UNET_KEYS_2 if second else UNET_KEYS) | unet.keys())
    if kl:
        _keep(folder / "vae" / "config.json", VAE_KEYS)
    _old_names(folder, kl=kl)
    _json(folder / "scheduler" / "scheduler_config.json", scheduler)
    _tokenizer(folder / "tokenizer", "!" if second else "<|endoftext|>")
    names |= {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index = {"_class_name": pipeline, "_diffusers_version": "0.6.0", **names}
    _json(folder / "model_index.json", index)
    return folder


def _old_names(folder: Path, *, kl: bool) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    text = {
        f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()
    }
    positions = text["text_model.embeddings.position_embedding.weight"].shape[0]
    text["text_model.embeddings.position_ids"] = torch.arange(positions)[None]
    save_file(text, path, metadata={"format": "pt"})
    if not kl:
        return
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    vae = {}
    for name, tensor in load_file(path).items():
        if ".attentions." in name:
            for new, old in (
                ("to_q", "query"),
                ("to_k", "key"),
                ("to_v", "value"),
                ("to_out.0", "proj_attn"),
            ):
                name = name.replace(f".{new}.", f".{old}.")
        vae[name] = tensor
    assert sum(".proj_attn." in name for name in vae) == 4
    save_file(vae, path, metadata={"format": "pt"})


def _tokenizer(folder: Path, pad: str) -> None:
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(TOKENIZER / name, folder)
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    end, begin = {"content": "<|endoftext|>", **flags}, {"content": "<|startoftext|>", **flags}
    special = {"bos_token": begin, "eos_token": end, "pad_token": pad, "unk_token": end}
    _json(folder / "special_tokens_map.json", special)
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77}
    named = {"bos_token": begin, "eos_token": end, "pad_token": "<|endoftext|>", "unk_token": end}
    _json(folder / "tokenizer_config.json", {**settings, **named, "tokenizer_class": "CLIPTokenizer"})


def _keep(path: Path, keys: set[str]) -> None:
    settings = json.loads(path.read_text(encoding="utf-8"))
    assert keys <= settings.keys() | {"_diffusers_version"}
    _json(path, {key: value for key, value in settings.items() if key in keys})


def _json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
