"""Diffusers folders in every form in which they are published, against diffusers; hostile ones are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from stable_diffusion import DiffusionModel, InputError
from stable_diffusion.checkpoints import read
from stable_diffusion.checkpoints.diffusers.weights import choose_weights
from tests.checkpoints import sd
from tests.nn.reference import quietly

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd.write(tmp_path_factory.mktemp("published") / "sd", "1.5")


@pytest.fixture(scope="module")
def pipe(published: Path) -> Any:
    return quietly(diffusers.StableDiffusionPipeline.from_pretrained, published, safety_checker=None)


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def change(path: Path, **settings: object) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | settings
    path.write_text(json.dumps(content), encoding="utf-8")


FORMS: dict[str, dict[str, Any]] = {
    "bin": {"safe_serialization": False},
    "shards": {"max_shard_size": "200KB"},
    "bin shards": {"safe_serialization": False, "max_shard_size": "200KB"},
    "fp16": {"variant": "fp16"},
    "fp16 bin": {"variant": "fp16", "safe_serialization": False},
    "fp16 shards": {"variant": "fp16", "max_shard_size": "200KB"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_weights_of_diffusers(
    form: str, pipe: Any, published: Path, tmp_path: Path
) -> None:
    for part in ("unet", "vae", "text_encoder"):
        quietly(getattr(pipe, part).save_pretrained, tmp_path / part, **FORMS[form])
        shutil.copy(published / part / "config.json", tmp_path / part)
    for part in ("scheduler", "tokenizer"):
        shutil.copytree(published / part, tmp_path / part)
    shutil.copy(published / "model_index.json", tmp_path)
    files = [path.name for path in (tmp_path / "unet").iterdir()]
    assert not any("safetensors" in name for name in files) or "bin" not in form
    assert ("shards" in form) == any("index" in name for name in files)
    model = DiffusionModel.from_pretrained(tmp_path)
    asked = {"variant": "fp16" if "fp16" in form else None, "use_safetensors": "bin" not in form}
    unet = quietly(diffusers.UNet2DConditionModel.from_pretrained, tmp_path, subfolder="unet", **asked)
    vae = quietly(diffusers.AutoencoderKL.from_pretrained, tmp_path, subfolder="vae", **asked)
    assert same(model.unet.state_dict(), unet.state_dict())
    assert same(model.vae.state_dict(), vae.state_dict())
    assert same(model.state_dict(), DiffusionModel.from_pretrained(published).state_dict())
    if form == "fp16 shards":  # the other place of the variant in the index's name
        for index in tmp_path.rglob("*.index.fp16.json"):
            index.rename(
                index.with_name(index.name.replace(".safetensors.index.fp16", ".fp16.safetensors.index"))
            )
        assert same(model.state_dict(), DiffusionModel.from_pretrained(tmp_path).state_dict())


def test_a_text_encoder_with_bare_names(copy: Path, published: Path) -> None:
    path = copy / "text_encoder" / "model.safetensors"
    save_file({name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}, path)
    text = transformers.CLIPTextModel.from_pretrained(copy / "text_encoder")
    model = DiffusionModel.from_pretrained(copy)
    assert same(model.state_dict(), DiffusionModel.from_pretrained(published).state_dict())
    ids = model.text_encoder.tokenizers[0](["a fox"]).input_ids
    wanted = text(ids).last_hidden_state
    assert (model.encode_prompt("a fox").tokens - wanted).abs().max() < 1e-5


def test_the_variant_is_a_choice_and_the_plain_file_goes_first(copy: Path, published: Path) -> None:
    plain = load_file(copy / UNET)
    averaged = {name: tensor + 1 for name, tensor in plain.items()}
    save_file(averaged, copy / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
    save_file(averaged, copy / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert same(DiffusionModel.from_pretrained(copy).unet.state_dict(), plain)
    other = DiffusionModel.from_pretrained(copy, variant="non_ema")
    assert same(other.unet.state_dict(), averaged)
    assert same(other.vae.state_dict(), DiffusionModel.from_pretrained(published).vae.state_dict())
    with pytest.raises(
        InputError, match=r"no files of the variant 'fp8': the variants there are fp16, non_ema"
    ):
        DiffusionModel.from_pretrained(copy, variant="fp8")
    (copy / UNET).unlink()
    assert same(DiffusionModel.from_pretrained(copy).unet.state_dict(), averaged)


def test_the_order_of_the_files() -> None:
    names = ["model.fp16.safetensors", "pytorch_model.bin", "model.non_ema.safetensors"]
    assert choose_weights(names, "model") == ["pytorch_model.bin"]
    assert choose_weights([*names, "model.safetensors"], "model") == ["model.safetensors"]
    assert choose_weights(names, "model", "non_ema") == ["model.non_ema.safetensors"]
    assert choose_weights(names[:1], "model") == names[:1]
    assert choose_weights(["model.safetensors.txt"], "model") == []


# What the configurations say


def test_notes_and_the_users_word(copy: Path) -> None:
    index = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
             "feature_extractor": ["transformers", "CLIPImageProcessor"]}  # fmt: skip
    change(copy / "model_index.json", **index)
    notes = read(copy).notes
    assert notes[0].startswith("The U-Net predicts epsilon: scheduler/scheduler_config.json is silent")
    assert "Left aside: safety_checker and feature_extractor." in notes
    model = DiffusionModel.from_pretrained(copy, prediction_type="v_prediction")
    assert model.config.schedule.prediction_type == "v_prediction"
    assert model.notes[0] == "The U-Net predicts v_prediction: it was asked for."
    with pytest.raises(InputError, match="prediction_type 'velocity'"):
        DiffusionModel.from_pretrained(copy, prediction_type="velocity")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("StableDiffusionXLPipeline", "is a SDXL model"),
        ("StableDiffusion3Pipeline", "is a Stable Diffusion 3 model"),
        ("FluxPipeline", "is a Flux model"),
        ("StableDiffusionUpscalePipeline", "unknown pipeline class 'StableDiffusionUpscalePipeline'"),
    ],
)
def test_other_families_are_refused_by_name(name: str, message: str, copy: Path) -> None:
    change(copy / "model_index.json", _class_name=name)
    with pytest.raises(InputError, match=message):
        DiffusionModel.from_pretrained(copy)


def test_a_second_text_encoder_is_refused(copy: Path) -> None:
    change(copy / "model_index.json", text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    with pytest.raises(InputError, match="has a text_encoder_2, as SDXL"):
        DiffusionModel.from_pretrained(copy)


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("unet/config.json", "norm_eps", 1e-6, "norm_eps must be 1e-05"),
        ("unet/config.json", "class_embed_type", "projection", "class_embed_type must be None"),
        ("unet/config.json", "block_out_channels", 3, "must be lists of one length"),
        ("unet/config.json", "attention_head_dim", "eight", "num_attention_heads must be"),
        ("unet/config.json", "up_block_types", ["UpBlock2D"] * 3, "up_block_types must mirror"),
        ("unet/config.json", "sample_size", [64, 64], "sample_size must be of type int"),
        ("unet/config.json", "norm_num_groups", 7, "norm_num_groups must divide block_out_channels"),
        ("unet/config.json", "norm_num_groups", 0, "norm_num_groups must be from 1"),
        ("vae/config.json", "block_out_channels", 8, "block_out_channels must be"),
        ("vae/config.json", "use_quant_conv", False, "use_quant_conv must be True"),
        ("scheduler/scheduler_config.json", "trained_betas", [0.1], "trained_betas"),
        ("scheduler/scheduler_config.json", "beta_schedule", ["linear"], "unknown beta_schedule"),
        ("scheduler/scheduler_config.json", "_class_name", 3, "unknown scheduler class"),
        ("text_encoder/config.json", "max_position_embeddings", None, "must be of type int"),
        ("text_encoder/config.json", "packaged", "../../secrets", None),
    ],
)
def test_settings_that_do_not_fit_are_named(
    file: str, key: str, value: object, message: str | None, copy: Path
) -> None:
    change(copy / file, **{key: value})
    if message is None:
        assert DiffusionModel.from_pretrained(copy).config.text_encoders[0].packaged is None
        return
    with pytest.raises(InputError, match=message) as caught:
        DiffusionModel.from_pretrained(copy)
    assert "\n" not in str(caught.value)


# Hostile and broken folders


def test_a_folder_without_weights(copy: Path) -> None:
    for path in copy.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(InputError, match=r"has no weights, neither .* copy or download the folder whole"):
        DiffusionModel.from_pretrained(copy)


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "a\\b", "", 3, None])
def test_an_index_cannot_lead_elsewhere(place: object, copy: Path) -> None:
    (copy / UNET).rename(copy / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"conv_in.weight": place}}
    (copy / f"{UNET}.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(InputError, match="weight_map must give the file of each tensor beside it"):
        DiffusionModel.from_pretrained(copy)


def test_missing_shards_and_tensors_are_named(copy: Path) -> None:
    state = load_file(copy / UNET)
    (copy / UNET).unlink()
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    index = {"weight_map": dict.fromkeys(state, shard)}
    (copy / f"{UNET}.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(InputError, match=f"{shard} does not exist"):
        DiffusionModel.from_pretrained(copy)
    del state["conv_in.weight"]
    save_file(state, copy / "unet" / shard)
    with pytest.raises(InputError, match=r"1 of \d+ tensors are in no shard \(conv_in.weight\)"):
        DiffusionModel.from_pretrained(copy)


def test_a_pickle_that_runs_code_does_not_run(copy: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "run",)

    (copy / UNET).unlink()
    torch.save({"conv_in.weight": Attack()}, copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError):
        DiffusionModel.from_pretrained(copy)
    torch.save({"epoch": 3}, copy / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match=r"holds other things than tensors \(epoch\)"):
        DiffusionModel.from_pretrained(copy)
    assert not (tmp_path / "run").exists()
