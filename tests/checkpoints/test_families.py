"""The table of what a file can be: every row is recognised, and by nothing that a whole model holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from stable_diffusion.checkpoints import families
from stable_diffusion.checkpoints.checkpoint import packaged
from stable_diffusion.checkpoints.files import sniff

ONE = torch.zeros(1, 1, 1)
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
EXAMPLES: dict[str, list[str]] = {
    "lora": [
        *(f"lora_unet_mid_block_attentions_0_proj_in{ending}" for ending in families.ENDINGS),
        *("lora_unet_x.hada_w1_a", "lora_unet_x.lokr_w1", "lora_unet_x.oft_blocks", "lora_unet_x.diff"),
        f"unet.{BLOCK}.lora.down.weight",
    ],
    "embedding": ["emb_params", "string_to_param", "clip_g"],
    "sdxl": ["conditioner.embedders.1.model.ln_final.bias"],
    "sd3": ["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"],
    "flux": ["double_blocks.0.img_attn.qkv.weight"],
    "depth": ["depth_model.model.pretrained.cls_token"],
    "unclip": ["embedder.model.visual.proj"],
    "upscaler": ["low_scale_model.betas"],
    "controlnet": ["control_model.input_blocks.0.0.weight"],
    "diffusers vae": [
        "encoder.down_blocks.0.resnets.0.norm1.weight",
        "decoder.up_blocks.0.resnets.0.norm1.bias",
    ],
    "diffusers part": [f"{BLOCK}.weight"],
    "taesd": ["1.weight", "3.conv.0.weight", "encoder.layers.0.weight", "decoder.layers.7.skip.weight"],
    "unet": ["model.diffusion_model.out.2.bias", "input_blocks.0.0.weight"],
    "vae": ["first_stage_model.quant_conv.weight", "decoder.mid.attn_1.q.weight"],
    "model": ["cond_stage_model.model.ln_final.weight", "conditioner.embedders.0.model.ln_final.bias"],
}


def test_every_row_is_recognised() -> None:
    assert EXAMPLES.keys() == {*families.KINDS, "unet", "vae", "model"}
    for kind, names in EXAMPLES.items():
        for name in names:
            assert families.kind({name: ONE, "global_step": 3}) == kind, name
    whole = {name: ONE for kind in ("unet", "vae", "model") for name in EXAMPLES[kind]}
    assert families.kind(whole) == "model"


def test_vectors_alone_are_a_textual_inversion_and_the_rest_is_unknown() -> None:
    words: dict[str, Tensor] = {f"<{i}>": torch.zeros(2, 768) for i in range(9)}
    assert families.kind(words) == "embedding"
    assert families.kind(words | {"<9>": torch.zeros(768)}) is None
    assert families.kind({"x": ONE}) is None
    assert families.kind({}) is None


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_the_packaged_models_parts_are_no_adapters(part: str) -> None:
    state = load_file(packaged("model") / part / "diffusion_pytorch_model.safetensors")
    assert families.kind(state) in ("diffusers part", "diffusers vae", "taesd", None)


def test_a_files_first_bytes_say_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for content, kind in (
        (b"\x10\0\0\0\0\0\0\0{}", "safetensors"),
        (b"\x80\0\0\0\0\0\0\0{}", "safetensors"),  # whose header's length begins as pickles do
        (b"\x80\x02}.", "pickle"),
        (b"PK\x03\x04", "pickle"),
        (b"", None),
        (b"\x89PNG\r\n\x1a\n", None),
        (b"<!doctype html>", None),
    ):
        path.write_bytes(content)
        assert sniff(path) == kind, content
