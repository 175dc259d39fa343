"""Single files of Stable Diffusion: published names and counts, parity with diffusers' converter, refusals."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stable_diffusion.checkpoints import check_export, single_file
from stable_diffusion.checkpoints.checkpoint import Checkpoint
from stable_diffusion.checkpoints.files import State
from stable_diffusion.checkpoints.single_file import infer, names
from stable_diffusion.checkpoints.single_file.write import CONFIG, to_single
from stable_diffusion.config import (
    BERT_BASE,
    CLIP_H,
    CLIP_L,
    MINI,
    SD15,
    SD21,
    AutoencoderKLConfig,
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
    UNetConfig,
)
from stable_diffusion.errors import InputError
from stable_diffusion.nn.text import TextEncoder
from stable_diffusion.nn.unet import UNet
from stable_diffusion.nn.vae import AutoencoderKL
from tests.lively import lively

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from diffusers.loaders import single_file_utils as reference
logging.getLogger("diffusers").setLevel(logging.ERROR)

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1}
TINY15 = replace(
    SD15,
    name="tiny15",
    vae=AutoencoderKLConfig(block_out_channels=(8, 16, 32, 32), norm_num_groups=8),
    unet=UNetConfig(block_out_channels=(16, 32, 64, 64), cross_attention_dim=64, norm_num_groups=16),
    text_encoders=(replace(CLIP_L, num_hidden_layers=2, **TEXT),),
)
TINY21 = replace(
    SD21,
    name="tiny21",
    vae=TINY15.vae,
    unet=replace(
        SD21.unet,
        block_out_channels=(16, 32, 64, 64),
        num_attention_heads=(1, 1, 1, 1),
        norm_num_groups=16,
        cross_attention_dim=64,
    ),
    text_encoders=(replace(CLIP_H, num_hidden_layers=2, skip_last_layers=0, **TEXT),),
)
INPAINT = replace(
    TINY15, name="inpaint", unet=replace(TINY15.unet, in_channels=9), sampler=SamplerConfig(name="ddim")
)
KINDS = {"1.5": TINY15, "2.1": TINY21, "inpaint": INPAINT}
ZEROS = torch.zeros(1000)
BUFFERS = {
    name: ZEROS.clone()
    for name in (
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"),
        *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod"),
        *("sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped"),
        *("posterior_mean_coef1", "posterior_mean_coef2"),
    )
}
COUNTERS = {
    "model_ema.decay": torch.tensor(0.9999),
    "model_ema.num_updates": torch.tensor(0, dtype=torch.int32),
}


def random(module: nn.Module, seed: int) -> State:
    return {name: tensor.detach() for name, tensor in lively(module, seed).state_dict().items()}


@cache
def checkpoint(kind: str) -> Checkpoint:
    config = KINDS[kind]
    assert isinstance(config.vae, AutoencoderKLConfig)
    return Checkpoint(
        config,
        vae=random(AutoencoderKL(config.vae), 1),
        unet=random(UNet(config.unet), 2),
        text_encoders=[random(TextEncoder(config.text_encoders[0]), 3)],
        tokenizers=[],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each kind as a single file of ours, and without the metadata that others' files have not."""
    folder = tmp_path_factory.mktemp("compvis")
    for kind in KINDS:
        single_file.write(folder / f"{kind}.safetensors", checkpoint(kind))
        foreign = load_file(folder / f"{kind}.safetensors")
        save_file(foreign | BUFFERS | COUNTERS, folder / f"{kind}-foreign.safetensors")
    return folder


def tensors(folder: Path, kind: str = "1.5") -> State:
    return load_file(folder / f"{kind}-foreign.safetensors")


def saved(tmp_path: Path, state: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({name: t.contiguous() for name, t in state.items()}, path, metadata)
    return path


def equal(a: State, b: State) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def same(a: Checkpoint, b: Checkpoint) -> None:
    equal(a.unet, b.unet)
    equal(a.vae, b.vae)
    for x, y in zip(a.text_encoders, b.text_encoders, strict=True):
        equal(x, y)


# Published names, at full size on the meta device.


def published(config: ModelConfig, layers: int) -> dict[str, Tensor]:
    """What ``write`` names, without the buffers."""
    assert isinstance(config.vae, AutoencoderKLConfig)
    text = replace(config.text_encoders[0], num_hidden_layers=layers, skip_last_layers=0)
    with torch.device("meta"):
        parts = (UNet(config.unet), AutoencoderKL(config.vae), TextEncoder(text))
        unet, vae, encoder = (part.state_dict() for part in parts)
    return to_single(replace(config, text_encoders=(text,)), unet, vae, [encoder])


@pytest.mark.parametrize(
    ("config", "layers", "text", "whole"), [(SD15, 12, 197, 1131), (SD21, 23, 294, 1228)]
)
def test_full_size_has_the_published_counts(config: ModelConfig, layers: int, text: int, whole: int) -> None:
    state = published(config, layers)
    counts = {
        prefix: sum(name.startswith(prefix) for name in state) for prefix in ("model.", "first_", "cond_")
    }
    assert counts == {"model.": 686, "first_": 248, "cond_": text}
    assert len(state) == whole  # 1145 and 1242 in the published files: with 12 buffers and 2 counters
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    linear = config is SD21
    facts: dict[str, list[int]] = {
        "model.diffusion_model.input_blocks.0.0.weight": [320, 4, 3, 3],
        "model.diffusion_model.time_embed.2.bias": [1280],
        "model.diffusion_model.input_blocks.3.0.op.weight": [320, 320, 3, 3],
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight": [640, 320, 1, 1],
        "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": [
            320,
            1024 if linear else 768,
        ],
        "model.diffusion_model.input_blocks.1.1.proj_in.weight": [320, 320] if linear else [320, 320, 1, 1],
        "model.diffusion_model.middle_block.2.in_layers.2.weight": [1280, 1280, 3, 3],
        "model.diffusion_model.output_blocks.2.1.conv.weight": [1280, 1280, 3, 3],
        "model.diffusion_model.output_blocks.5.2.conv.weight": [1280, 1280, 3, 3],
        "model.diffusion_model.output_blocks.8.2.conv.bias": [640],
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": [320],
        "model.diffusion_model.out.2.weight": [4, 320, 3, 3],
        "first_stage_model.encoder.mid.attn_1.q.weight": [512, 512, 1, 1],
        "first_stage_model.encoder.down.0.downsample.conv.weight": [128, 128, 3, 3],
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": [128, 256, 1, 1],
        "first_stage_model.decoder.up.3.upsample.conv.weight": [512, 512, 3, 3],
        "first_stage_model.post_quant_conv.bias": [4],
    }
    if linear:
        facts |= {
            "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": [3072, 1024],
            "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight": [4096, 1024],
            "cond_stage_model.model.positional_embedding": [77, 1024],
            "cond_stage_model.model.text_projection": [1024, 1024],
            "cond_stage_model.model.logit_scale": [],
            "cond_stage_model.model.ln_final.bias": [1024],
        }
    else:
        facts |= {
            "cond_stage_model.transformer.text_model.embeddings.position_ids": [1, 77],
            "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": [3072, 768],
        }
    assert {name: shapes.get(name) for name in facts} == facts


@pytest.mark.parametrize("preset", [SD15, SD21, replace(SD15, unet=replace(SD15.unet, in_channels=9))])
def test_full_size_configuration_is_read_from_shapes(preset: ModelConfig) -> None:
    second = preset is SD21
    state = published(preset, 23 if second else 12)
    file = infer.File(Path("a.ckpt"), state, {})
    config, _ = infer.model_config(file, None, "v" if second else None)
    text = replace(CLIP_H, num_hidden_layers=23, skip_last_layers=0) if second else CLIP_L
    assert (config.unet, config.vae, config.text_encoders) == (preset.unet, preset.vae, (text,))
    assert (config.sample_size, config.schedule) == (preset.sample_size, preset.schedule)
    flat = [
        names.rename(name, names.unet_blocks(config.unet)).replace(".", "") for name in config_names(config)
    ]
    assert len(set(flat)) == 686, "the dotless names of averaged weights are as many"


def config_names(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        return list(UNet(config.unet).state_dict())


# Round trips and parity.


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bit_identical(folder: Path, kind: str) -> None:
    original, found = checkpoint(kind), single_file.read(folder / f"{kind}.safetensors")
    same(original, found)
    assert found.config == original.config
    assert found.tokenizers[0].name == ("clip-tokenizer-2" if kind == "2.1" else "clip-tokenizer")
    with safe_open(folder / f"{kind}.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.prediction_type"] == ("v" if kind == "2.1" else "epsilon")
    assert metadata["modelspec.architecture"] == f"stable-diffusion-v{'2-768-v' if kind == '2.1' else 1}"
    assert "its metadata says so" in found.notes[0]


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_files_read_the_same(folder: Path, tmp_path: Path, kind: str) -> None:
    """Without our metadata, from pickles of both forms, in half precision, and through a second round trip."""
    original, state = checkpoint(kind), tensors(folder, kind)
    prediction = "v_prediction" if kind == "2.1" else None
    found = single_file.read(folder / f"{kind}-foreign.safetensors", prediction_type=prediction)
    same(original, found)
    config = original.config
    assert found.config == replace(config, name=f"{kind}-foreign")
    for zipped in (True, False):
        path = tmp_path / f"{zipped}.ckpt"
        nested = {"state_dict": {"state_dict": state}, "epoch": 3, "global_step": 1}
        torch.save(nested, path, _use_new_zipfile_serialization=zipped)
        same(original, single_file.read(path))
        single_file.write(tmp_path / f"{zipped}.safetensors", single_file.read(path))
        same(original, single_file.read(tmp_path / f"{zipped}.safetensors"))
    single_file.write(tmp_path / "half.safetensors", original, torch.float16)
    assert {t.dtype for t in single_file.read(tmp_path / "half.safetensors").unet.values()} == {torch.float16}
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("kind", KINDS)
def test_names_and_values_are_those_of_diffusers_converter(folder: Path, kind: str) -> None:
    state, ours = tensors(folder, kind), single_file.read(folder / f"{kind}-foreign.safetensors")
    config: dict[str, Any] = {"layers_per_block": 2, "class_embed_type": None, "addition_embed_type": None}
    equal(reference.convert_ldm_unet_checkpoint(dict(state), config), ours.unet)
    blocks = {"down_block_types": [0] * 4, "up_block_types": [0] * 4}
    equal(reference.convert_ldm_vae_checkpoint(dict(state), blocks), ours.vae)
    text = ours.text_encoders[0]
    if kind != "2.1":
        theirs = reference.convert_ldm_clip_checkpoint(dict(state))
        theirs = {
            k.removeprefix("text_model."): t for k, t in theirs.items() if not k.endswith("position_ids")
        }
    else:
        theirs = reference.convert_open_clip_checkpoint(None, dict(state))
        theirs = {k.removeprefix("text_model."): t for k, t in theirs.items() if ".layers.2." not in k}
    equal(theirs, text)


def test_the_second_gets_an_unused_layer_and_head_anew(folder: Path) -> None:
    state = tensors(folder, "2.1")
    prefix = "cond_stage_model.model."
    assert torch.equal(state[prefix + "text_projection"], torch.ones(64, 64))
    assert state[prefix + "logit_scale"].shape == () and state[prefix + "logit_scale"] == 1
    copies = [name for name in state if "resblocks.2." in name]
    assert len(copies) == 12
    for name in copies:
        assert torch.equal(state[name], state[name.replace("resblocks.2.", "resblocks.1.")])
    text = checkpoint("2.1").text_encoders[0]
    fused = state[prefix + "transformer.resblocks.1.attn.in_proj_bias"]
    for letter, third in zip("qkv", fused.chunk(3), strict=True):
        assert torch.equal(third, text[f"encoder.layers.1.self_attn.{letter}_proj.bias"])


def test_a_model_that_skips_its_last_layer_keeps_it(tmp_path: Path) -> None:
    """Our preset has all 24 layers and skips one; files have it in its place."""
    config = replace(
        TINY21, text_encoders=(replace(TINY21.text_encoders[0], num_hidden_layers=3, skip_last_layers=1),)
    )
    original = replace(
        checkpoint("2.1"), config=config, text_encoders=[random(TextEncoder(config.text_encoders[0]), 3)]
    )
    single_file.write(tmp_path / "a.safetensors", original)
    same(original, single_file.read(tmp_path / "a.safetensors"))
    foreign = single_file.read(saved(tmp_path, load_file(tmp_path / "a.safetensors"))).text_encoders[0]
    equal(foreign, {k: t for k, t in original.text_encoders[0].items() if ".layers.2." not in k})


def test_other_spellings(folder: Path, tmp_path: Path) -> None:
    first, second = tensors(folder), tensors(folder, "2.1")
    bare = {
        name.replace(".text_model.", "."): t for name, t in first.items() if not name.endswith("position_ids")
    }
    same(checkpoint("1.5"), single_file.read(saved(tmp_path, bare)))
    newer = {name.replace("cond_stage_model.", "conditioner.embedders.0."): t for name, t in second.items()}
    same(checkpoint("2.1"), single_file.read(saved(tmp_path, newer)))
    stray = first | {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77.0)[None]
    }
    stray |= {
        "scale_factor": torch.tensor(0.18215),
        "cond_stage_model.logit_scale": torch.tensor(1.0),
        "other": ZEROS,
    }
    found = single_file.read(saved(tmp_path, stray))
    same(checkpoint("1.5"), found)
    assert "2 of" in found.notes[-1] or "1 of" in found.notes[-1]


def test_a_file_whose_data_is_not_aligned(folder: Path, tmp_path: Path) -> None:
    """Headers of the first safetensors files are not padded, so that numbers begin at odd addresses."""
    content = (folder / "1.5-foreign.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip(b" ")
    header += b" " * ((2 - len(header)) % 4)
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    same(checkpoint("1.5"), single_file.read(tmp_path / "a.safetensors"))


# Parts.


def test_parts(folder: Path, tmp_path: Path) -> None:
    state, original = tensors(folder), checkpoint("1.5")
    bare = {
        k.removeprefix("first_stage_model."): t
        for k, t in state.items()
        if k.startswith("first_stage_model.")
    }
    prefixed = {f"first_stage_model.{name}": t for name, t in bare.items()}
    loss = {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": ZEROS}
    for content in (bare, bare | loss, prefixed, state):
        config, vae = single_file.read_vae(saved(tmp_path, content))
        assert config == original.config.vae
        equal(vae, original.vae)
    torch.save({"state_dict": bare | loss}, tmp_path / "vae.pt")
    equal(single_file.read_vae(tmp_path / "vae.pt")[1], original.vae)
    unet = {
        k.removeprefix("model.diffusion_model."): t for k, t in state.items() if k.startswith("model.diff")
    }
    for content in (unet, {f"model.diffusion_model.{name}": t for name, t in unet.items()}, state):
        found = single_file.read(saved(tmp_path, content))
        assert found.config.unet == original.config.unet
        equal(found.unet, original.unet)
    assert single_file.read(saved(tmp_path, unet)).missing == ["autoencoder", "text encoder"]
    with pytest.raises(InputError, match="holds no U-Net"):
        single_file.read(saved(tmp_path, bare))
    with pytest.raises(InputError, match=r"of the autoencoder, .* are missing"):
        single_file.read_vae(saved(tmp_path, unet))


def test_averaged_weights_are_a_choice(folder: Path, tmp_path: Path) -> None:
    state, original = tensors(folder), checkpoint("1.5")
    unet = {k: t for k, t in state.items() if k.startswith("model.diffusion_model.")}
    ema = {"model_ema." + k.removeprefix("model.").replace(".", ""): t + 1 for k, t in unet.items()}
    assert "model_ema.diffusion_modelinput_blocks00weight" in ema and len(ema) == len(original.unet)
    path = saved(tmp_path, state | ema)
    plain, averaged = single_file.read(path), single_file.read(path, ema=True)
    same(original, plain)
    equal(averaged.unet, {name: tensor + 1 for name, tensor in original.unet.items()})
    equal(averaged.vae, original.vae)
    assert "plain, not its averaged" in plain.notes[1] and "averaged (EMA) weights" in averaged.notes[1]
    equal(single_file.read(path, ema=True).unet, averaged.unet)
    with pytest.raises(InputError, match=r"holds no averaged \(EMA\) weights"):
        single_file.read(folder / "1.5-foreign.safetensors", ema=True)  # its two counters are no weights
    ema.popitem()
    with pytest.raises(InputError, match=r"1 of 686 tensors .* are missing"):
        single_file.read(saved(tmp_path, state | ema), ema=True)


# What the U-Net predicts.


def test_the_order_of_evidence(folder: Path, tmp_path: Path) -> None:
    """From the weakest to the strongest; each is contradicted by the next."""
    state = tensors(folder, "2.1")
    telltale = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    root: dict[str, Any] = {"state_dict": state}
    path = tmp_path / "model.ckpt"

    def found(expected: str, how: str, **options: Any) -> None:
        torch.save(root, path)
        read = single_file.read(path, **options)
        assert read.config.schedule.prediction_type == expected
        assert read.config.unet.upcast_attention == (expected == "v_prediction")
        assert read.config.sample_size == (768 if expected == "v_prediction" else 512)
        assert expected in read.notes[0] and how in read.notes[0]

    state[telltale] = torch.linspace(-0.1, 0.1, 16)
    found("epsilon", "a guess from one bias, whose standard deviation 0.063 is <= 0.09")
    state[telltale] = torch.linspace(-1, 1, 16)
    found("v_prediction", "a guess from one bias")
    root["global_step"] = 12
    found("v_prediction", "a guess")
    root["global_step"] = 875000
    found("epsilon", "global_step 875000")
    sibling = tmp_path / "model.yaml"
    sibling.write_text('model:\n  params:\n    parameterization: "v"\n')
    found("v_prediction", "model.yaml beside it says so")
    root["global_step"] = 110000
    sibling.write_text("model:\n  params:\n    linear_start: 0.00085\n")
    found("epsilon", "model.yaml")
    sibling.unlink()
    found("v_prediction", "global_step 110000")
    found("epsilon", "it was asked for", prediction_type="epsilon")
    found("v_prediction", "it was asked for", prediction_type="v")
    with pytest.raises(InputError, match="unknown prediction type 'w'"):
        single_file.read(path, prediction_type="w")


def test_metadata_is_stronger_than_a_yaml(folder: Path, tmp_path: Path) -> None:
    state = tensors(folder)
    (tmp_path / "model.yaml").write_text('parameterization: "eps"')
    metadata = {"modelspec.prediction_type": "v", "modelspec.resolution": "640x640"}
    read = single_file.read(saved(tmp_path, state, metadata))
    assert read.config.schedule == ScheduleConfig(prediction_type="v_prediction")
    assert read.config.sample_size == 640 and "its metadata says so" in read.notes[0]
    read = single_file.read(tmp_path / "model.safetensors", prediction_type="eps")
    assert read.config.schedule.prediction_type == "epsilon"
    (tmp_path / "model.yaml").unlink()
    read = single_file.read(saved(tmp_path, state))
    assert read.config.schedule.prediction_type == "epsilon" and "nothing says otherwise" in read.notes[0]
    read = single_file.read(saved(tmp_path, state | {"v_pred": torch.zeros(())}))
    assert read.config.schedule.prediction_type == "v_prediction"


# Refusals.

ONE = torch.zeros(1)
OTHERS = {
    "Stable Diffusion XL": {"conditioner.embedders.1.model.ln_final.bias": ONE},
    "Stable Diffusion 3": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": ONE},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": ONE},
    "the depth-guided": {"depth_model.model.pretrained.cls_token": ONE},
    "unCLIP": {"embedder.model.visual.proj": ONE},
    "the x4 upscaler": {"low_scale_model.betas": ONE},
    "ControlNet": {"control_model.input_blocks.0.0.weight": ONE},
    "a LoRA: use load_lora, or --lora": {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": ONE},
    "a LoRA": {"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": ONE},
    "a textual inversion: use load_textual_inversion, or --embedding": {"<cat>": torch.zeros(2, 768)},
    "a textual inversion": {"emb_params": torch.zeros(2, 768)},
    "diffusers' layout": {"down_blocks.0.resnets.0.norm1.weight": ONE},
    "none of Stable Diffusion": {"bert.encoder.weight": torch.zeros(1, 1, 1)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_kinds_are_named(tmp_path: Path, what: str) -> None:
    path = saved(tmp_path, OTHERS[what])
    for read in (single_file.read, single_file.read_vae):
        with pytest.raises(InputError) as caught:
            read(path)
        assert what in str(caught.value) and "\n" not in str(caught.value)


def test_a_textual_inversion_of_the_first_kind_is_named(tmp_path: Path) -> None:
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(1, 768)}}, tmp_path / "a.pt"
    )
    with pytest.raises(InputError, match="a textual inversion: use load_textual_inversion, or --embedding"):
        single_file.read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        ("input_blocks.0.0.weight", (32, 8, 3, 3), "InstructPix2Pix"),
        ("input_blocks.0.0.weight", (32, 5, 3, 3), "depth"),
        ("input_blocks.0.0.weight", (32, 7, 3, 3), "upscaler"),
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (32, 1280), "refiner"),
        ("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", (32, 2048), "Stable Diffusion XL"),
        ("label_emb.0.0.weight", (32, 2048), "class embedding"),
    ],
)
def test_other_widths_are_named(
    folder: Path, tmp_path: Path, name: str, shape: tuple[int, ...], what: str
) -> None:
    path = saved(tmp_path, tensors(folder) | {f"model.diffusion_model.{name}": torch.zeros(shape)})
    with pytest.raises(InputError, match=what):
        single_file.read(path)


def test_missing_unexpected_and_misshapen_tensors_are_counted(folder: Path, tmp_path: Path) -> None:
    state = tensors(folder)
    unet, vae = "model.diffusion_model.", "first_stage_model."
    without = {k: t for k, t in state.items() if not k.startswith(unet + "output_blocks.4.0.")}
    with pytest.raises(InputError) as caught:
        single_file.read(saved(tmp_path, without))
    assert str(caught.value).endswith(
        "does not fit: of the U-Net, 12 of 686 tensors (output_blocks.4.0.emb_layers.1.bias, "
        "output_blocks.4.0.emb_layers.1.weight, output_blocks.4.0.in_layers.0.bias, …) are missing"
    )
    for name in (
        unet + "input_blocks.0.0.weight",
        unet + "input_blocks.4.0.in_layers.2.weight",
        unet + "out.2.weight",
    ):
        with pytest.raises(InputError, match=r"1 of 686 tensors \(.*\) are missing"):
            single_file.read(saved(tmp_path, {k: t for k, t in state.items() if k != name}))
    with pytest.raises(InputError, match=r"1 of 248 tensors \(decoder.extra\) are unexpected"):
        single_file.read(saved(tmp_path, state | {vae + "decoder.extra": ZEROS}))
    with pytest.raises(
        InputError, match=r"1 of 248 tensors \(decoder.conv_out.weight\) are of another shape"
    ):
        single_file.read(saved(tmp_path, state | {vae + "decoder.conv_out.weight": torch.zeros(3, 8, 1, 1)}))
    second = tensors(folder, "2.1")
    fused = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
    with pytest.raises(InputError, match=r"text encoder, 3 of 36 tensors .* are missing"):
        single_file.read(saved(tmp_path, {k: t for k, t in second.items() if k != fused}))
    with pytest.raises(InputError, match=r"text encoder, 3 of 36 tensors .* are missing"):
        single_file.read(saved(tmp_path, second | {fused: torch.zeros(100, 64)}))


@pytest.mark.parametrize("step", [1, 2, 3])
def test_any_tensor_may_be_lacking(folder: Path, tmp_path: Path, step: int) -> None:
    """Without every step-th tensor or with scalars in their place: a sentence, never a traceback."""
    for content in (
        {k: t for i, (k, t) in enumerate(sorted(tensors(folder, "2.1").items())) if i % (step + 1)},
        {
            k: t if i % (step + 1) else torch.zeros(())
            for i, (k, t) in enumerate(sorted(tensors(folder).items()))
        },
    ):
        with pytest.raises(InputError):
            single_file.read(saved(tmp_path, content))


def test_names_cannot_ask_for_endless_blocks(folder: Path, tmp_path: Path) -> None:
    for name in (
        "first_stage_model.encoder.down.999999999.block.999999999.conv1.bias",
        "cond_stage_model.transformer.text_model.encoder.layers.999999999.mlp.fc1.bias",
    ):
        with pytest.raises(InputError, match="does not fit"):
            single_file.read(saved(tmp_path, tensors(folder) | {name: ZEROS}))


def test_damaged_files(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    content = saved(
        tmp_path, {k: t for k, t in tensors(folder).items() if k.startswith("first_stage_")}
    ).read_bytes()
    for end in (0, 1, 7, 8, 100, 5000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:end])
        with pytest.raises(InputError, match="copy or download it again"):
            single_file.read_vae(path)
    header = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for position in [*range(8), *range(8, header, header // 60)]:
        flipped = bytearray(content[: header + 64])
        flipped[position] ^= 0x20
        flipped += content[header + 64 :]
        path.write_bytes(flipped)
        try:
            single_file.read_vae(path)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50
    path.write_bytes(b"<!doctype html><html>not found</html>")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        single_file.read_vae(path)
    with pytest.raises(InputError, match="is not a file"):
        single_file.read(tmp_path)


def test_the_content_tells_the_format_not_the_ending(folder: Path, tmp_path: Path) -> None:
    content = (folder / "1.5-foreign.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    padded = size + (0x80 - size) % 256  # a header whose length begins with the byte that pickles begin with
    header = content[8 : 8 + size].ljust(padded)
    path = tmp_path / "a.ckpt"
    path.write_bytes(padded.to_bytes(8, "little") + header + content[8 + size :])
    assert path.read_bytes()[:1] == b"\x80"
    same(checkpoint("1.5"), single_file.read(path))


def test_damaged_metadata(folder: Path, tmp_path: Path) -> None:
    for text in (
        *("", "{", "[]", "3", '{"unet": 3}', '{"vae": {"kind": "tiny"}}', '{"name": 1}'),
        *(
            '{"unet": {"norm_num_groups": 7}}',
            '{"unet": {"norm_num_groups": 0}}',
            '{"unet": {"layers_per_block": 1}}',
        ),
        *('{"unet": {"block_out_channels": []}}', '{"unet": {"attention_levels": [true]}}'),
        *('{"vae": {"layers_per_block": 1000000000}}', '{"vae": {"norm_num_groups": -1}}', "{}"),
    ):
        with pytest.raises(InputError):
            single_file.read(saved(tmp_path, tensors(folder), {CONFIG: text}))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vae": replace(MINI.vae, latent_channels=4)}, "its light autoencoder is not"),
        ({"vae": replace(TINY15.vae, scaling_factor=0.13025)}, "its autoencoder's scaling factor"),
        ({"text_encoders": (BERT_BASE,)}, "its text encoder is BERT"),
        (
            {"text_encoders": (), "unet": replace(TINY15.unet, cross_attention_dim=None)},
            "it has no text encoders",
        ),
        ({"text_encoders": TINY15.text_encoders * 2}, "it has 2 text encoders"),
        ({"text_encoders": (replace(TINY15.text_encoders[0], skip_last_layers=1),)}, "usual layer"),
        ({"unet": replace(TINY15.unet, pooled_projection_dim=64)}, "its U-Net reads more than"),
        ({"schedule": MINI.schedule}, "another process"),
    ],
)
def test_what_does_not_fit_is_not_written(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    original = checkpoint("1.5")
    with pytest.raises(InputError, match=reason):
        single_file.write(tmp_path / "a.safetensors", replace(original, config=replace(TINY15, **change)))
    assert list(tmp_path.iterdir()) == []


def test_writing_leaves_a_whole_new_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.safetensors"
    single_file.write(path, checkpoint("2.1"))
    with pytest.raises(InputError, match="File exists"):
        single_file.write(path, checkpoint("1.5"))
    same(checkpoint("2.1"), single_file.read(path))
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert list(path.parent.iterdir()) == [path]
    for name in ("a.ckpt", "a"):
        with pytest.raises(InputError, match=r"ends in \.safetensors"):
            check_export(tmp_path / name, "single-file")
