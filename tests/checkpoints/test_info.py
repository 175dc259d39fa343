"""``minisd info``: what a folder or a file of weights is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stable_diffusion import DiffusionModel, InputError
from stable_diffusion.checkpoints.files import is_weights
from stable_diffusion.checkpoints.info import describe
from stable_diffusion.cli import main
from stable_diffusion.config import SD15, SD21, Styles
from tests.checkpoints import sd
from tests.tiny import TINY, tiny_model


def text(path: Path) -> str:
    return "\n".join(describe(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd.write(tmp_path_factory.mktemp("info") / "sd", "2.1")


@pytest.fixture(scope="module")
def single(folder: Path) -> Path:
    path = folder.parent / "one.safetensors"
    DiffusionModel.from_pretrained(folder).export(path, format="single-file", dtype=torch.float16)
    return path


def test_folders(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("---\ntags:\n- art\nlicense: creativeml-openrail-m\n---\n# Model\n")
    lines = text(folder).splitlines()
    assert lines[0] == "sd: 32 pixels, scaled_linear schedule, predicts v_prediction"
    assert lines[1] == "  diffusers folder, of Stable Diffusion's kind, text width 32"
    assert re.fullmatch(r"  unet: \d\.\d million parameters in float32", lines[2])
    assert "  The U-Net predicts v_prediction: scheduler/scheduler_config.json says so." in lines
    assert lines[-1] == "  licence: creativeml-openrail-m"
    DiffusionModel.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    assert "model folder of this project" in text(tmp_path / "ours")


def test_prompts_and_styles(tmp_path: Path) -> None:
    styles = Styles(words=("noto style", "3d render"), default="noto style")
    tiny_model(replace(TINY, prompts=("a fox",), styles=styles)).save_pretrained(tmp_path / "styled")
    assert text(tmp_path / "styled").splitlines()[-2:] == [
        '  minisd generate "a fox"',
        "  styles: noto style, 3d render; a prompt that names none is rendered in noto style",
    ]
    assert DiffusionModel.from_pretrained(tmp_path / "styled").config.styles == styles
    tiny_model(replace(TINY, styles=Styles(words=("b",)))).save_pretrained(tmp_path / "free")
    assert text(tmp_path / "free").splitlines()[-1] == "  styles: b"


def test_versions() -> None:
    from stable_diffusion.checkpoints.info import _version

    assert _version(SD15) == "Stable Diffusion 1.x"
    assert _version(SD21) == "Stable Diffusion 2.x"
    assert (
        _version(replace(SD15, unet=replace(SD15.unet, in_channels=9))) == "Stable Diffusion 1.x, inpainting"
    )


def test_single_files_and_files_of_one_part(single: Path, tmp_path: Path) -> None:
    found = text(single)
    assert "single file in CompVis' layout" in found
    assert "predicts v_prediction: " in found
    assert "million parameters in float16" in found
    assert "modelspec.prediction_type: " in found
    assert "mini_stable_diffusion.config" not in found
    state = load_file(single)
    for name, prefix, kind in (
        ("vae", "first_stage_model.", "autoencoder of Stable Diffusion"),
        ("unet", "model.diffusion_model.", "512 pixels, scaled_linear schedule, predicts epsilon"),
    ):
        part = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        metadata = {"modelspec.license": "CC0-1.0", "training": "x" * 500}
        save_file(part, tmp_path / f"{name}.safetensors", metadata=metadata)
        found = text(tmp_path / f"{name}.safetensors")
        assert f"{name}: {kind}" in found
        assert ("  no text encoder: add --text-encoder FOLDER" in found) == (name == "unet")
        assert f"  {name}: " in found
        assert "  licence: CC0-1.0" in found
        assert f"  training: {'x' * 100}…" in found


def test_loras_and_embeddings(tmp_path: Path) -> None:
    attention = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    kohya = {
        f"{attention}.lora_down.weight": torch.zeros(4, 768),
        f"{attention}.lora_up.weight": torch.zeros(320, 4),
        f"{attention}.alpha": torch.tensor(4.0),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight": torch.zeros(8, 768),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight": torch.zeros(768, 8),
    }
    path = tmp_path / "style.safetensors"
    save_file(kohya, path)
    assert text(path).startswith("style: LoRA for Stable Diffusion 1.x, rank 4 to 8\n")
    assert "1 modules of the U-Net, 1 of the text encoder" in text(path)
    save_file(kohya, path, metadata={"ss_base_model_version": "sd_v1", "ss_network_dim": "4"})
    assert text(path).startswith("style: LoRA for sd_v1, rank 4 to 8\n")
    assert "  ss_network_dim: 4" in text(path)
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    peft = {f"{key}.lora_A.weight": torch.zeros(2, 1024), f"{key}.lora_B.weight": torch.zeros(320, 2)}
    save_file(peft, path)
    assert text(path).startswith("style: LoRA for Stable Diffusion 2.x, rank 2\n")
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(3, 768)}}, tmp_path / "cat.pt"
    )
    assert text(tmp_path / "cat.pt") == (
        "cat: textual inversion for Stable Diffusion 1.x\n  3 vectors of width 768"
    )


def test_hostile_files(single: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = single.read_bytes()
    for size in (100, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:size])
        with pytest.raises(InputError, match="not a whole safetensors file"):
            text(tmp_path / "cut.safetensors")
    for content in (b"", b"12", b"\x89PNG\r\n\x1a\n"):
        (tmp_path / "other").write_bytes(content)
        assert not is_weights(tmp_path / "other")
    save_file({"some.tensor": torch.zeros(3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(SystemExit) as caught:
        main(["info", str(tmp_path / "other.safetensors")])
    assert caught.value.code == 2
    assert "none of Stable Diffusion 1.x or 2.x" in capsys.readouterr().err
