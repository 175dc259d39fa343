"""Other autoencoders in a model's place: TAESD is diffusers' AutoencoderTiny, others decode as in diffusers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stable_diffusion import DiffusionModel, InputError
from stable_diffusion.checkpoints.checkpoint import packaged
from stable_diffusion.checkpoints.taesd import read_vae
from stable_diffusion.config import TAESD
from stable_diffusion.nn import tokenizer
from stable_diffusion.nn.vae import AutoencoderTiny
from tests.checkpoints import sd
from tests.lively import lively
from tests.nn.reference import normal, quietly
from tests.tiny import KL, TINY, tiny_model

CLIP = tokenizer._clip(packaged("clip-tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd.write(tmp_path_factory.mktemp("stable-diffusion") / "sd", "1.5")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TAESD in full size, as diffusers' folder, and as its author's two files in two formats."""
    folder = tmp_path_factory.mktemp("taesd")
    vae = lively(diffusers.AutoencoderTiny(), seed=3)
    quietly(vae.save_pretrained, folder / "taesd")
    for part, first in (("encoder", 0), ("decoder", 1)):
        state = {}
        for name, tensor in getattr(vae, part).layers.state_dict().items():
            number, _, rest = name.partition(".")
            state[f"{int(number) + first}.{rest}"] = tensor
        assert len(state) == 67
        (folder / "pth").mkdir(exist_ok=True)
        save_file(state, folder / f"taesd_{part}.safetensors")
        torch.save(state, folder / "pth" / f"taesd_{part}.pth")
    return folder


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_clip", lambda folder: CLIP)  # building it takes longer than the rest


@pytest.fixture
def model(folder: Path) -> DiffusionModel:
    return DiffusionModel.from_pretrained(folder)


FORMS = [
    "taesd",
    "taesd/diffusion_pytorch_model.safetensors",
    "taesd_decoder.safetensors",
    "taesd_encoder.safetensors",
    "pth",
    "pth/taesd_encoder.pth",
]


def latents_of(model: DiffusionModel, **settings: Any) -> Tensor:
    last: list[Any] = []
    model.generate("a", num_inference_steps=2, callback=last.append, **settings)
    return last[-1].x


@pytest.mark.parametrize("form", FORMS)
def test_taesd_gives_the_pictures_and_latents_of_autoencoder_tiny(
    form: str, model: DiffusionModel, tiny: Path
) -> None:
    wanted = quietly(diffusers.AutoencoderTiny.from_pretrained, tiny / "taesd")
    model.load_vae(tiny / form)
    latents, images = normal(2, 4, 6, 4, dtype=torch.float32), normal(1, 3, 32, 48, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(
            model.vae.decode(latents), wanted.decode(latents).sample, rtol=0, atol=1e-5
        )
        torch.testing.assert_close(model.vae.encode(images), wanted.encode(images).latents, rtol=0, atol=1e-5)
        assert wanted.decode(latents).sample.std() > 0.1


def test_the_u_net_keeps_its_latents(model: DiffusionModel, tiny: Path) -> None:
    """TAESD's latents are the U-Net's: only the decoder is another, at eight pixels a latent instead of four."""
    noise = normal(1, 4, 8, 8, dtype=torch.float32)
    before = latents_of(model, latents=noise)
    model.load_vae(tiny / "taesd")
    assert model.config.vae == TAESD
    assert model.config.sample_size == 64
    (picture,) = model.generate("a", num_inference_steps=2, seed=1)
    assert picture.size == (64, 64)
    assert torch.equal(latents_of(model, latents=noise), before)


def test_a_model_with_taesd_is_saved_and_read(model: DiffusionModel, tiny: Path, tmp_path: Path) -> None:
    model.load_vae(tiny / "taesd")
    model.save_pretrained(tmp_path / "saved")
    again = DiffusionModel.from_pretrained(tmp_path / "saved")
    same = {"num_inference_steps": 2, "seed": 1}
    assert again.generate("a", **same)[0].tobytes() == model.generate("a", **same)[0].tobytes()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_takes_the_models_format(dtype: torch.dtype, model: DiffusionModel, tiny: Path) -> None:
    model.to(dtype).load_vae(tiny / "taesd")
    assert {parameter.dtype for parameter in model.vae.parameters()} == {dtype}


@pytest.mark.parametrize("place", ["vae", "", "vae/diffusion_pytorch_model.safetensors"])
def test_another_autoencoder_of_stable_diffusion(place: str, model: DiffusionModel, tmp_path: Path) -> None:
    """With the names of before 2023, and its own scaling factor, which its configuration says."""
    shutil.copytree(sd.write(tmp_path / "made", "1.5"), tmp_path / "other")
    path = tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(path).items()}, path)
    settings = path.with_name("config.json")
    text = json.loads(settings.read_text(encoding="utf-8")) | {"scaling_factor": 0.5}
    settings.write_text(json.dumps(text), encoding="utf-8")
    wanted = quietly(diffusers.AutoencoderKL.from_pretrained, path.parent)
    model.load_vae(tmp_path / "other" / place)
    latents = normal(1, 4, 8, 8, dtype=torch.float32)
    with torch.no_grad():
        picture = wanted.decode(latents / 0.5).sample
        torch.testing.assert_close(model.vae.decode(latents), picture, rtol=1e-5, atol=1e-5)
    assert model.config.sample_size == 32


def test_the_autoencoder_of_a_single_file(folder: Path, tmp_path: Path) -> None:
    other = DiffusionModel.from_pretrained(folder)
    other.export(tmp_path / "whole.safetensors", format="single-file")
    model = lively(tiny_model(replace(TINY, vae=KL)))
    model.load_vae(tmp_path / "whole.safetensors")
    assert all(
        torch.equal(tensor, other.vae.state_dict()[name]) for name, tensor in model.vae.state_dict().items()
    )
    assert model.config.vae.scaling_factor == 0.18215


def test_the_default_configuration_is_the_published_one(tiny: Path, tmp_path: Path) -> None:
    shutil.copy(tiny / "taesd" / "diffusion_pytorch_model.safetensors", tmp_path / "taesd.safetensors")
    config, state = read_vae(tmp_path / "taesd.safetensors")
    assert config == TAESD
    assert state.keys() == AutoencoderTiny(TAESD).state_dict().keys()


def test_what_does_not_fit_is_refused_and_changes_nothing(
    model: DiffusionModel, tiny: Path, tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config
    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(tiny / "taesd_decoder.safetensors", half)
    shutil.copy(tiny / "taesd_decoder.safetensors", half / "x.safetensors")
    wide = quietly(diffusers.AutoencoderTiny(latent_channels=16).save_pretrained, tmp_path / "wide")
    assert wide is None
    odd = shutil.copytree(tiny / "taesd", tmp_path / "odd")
    settings = json.loads((odd / "config.json").read_text(encoding="utf-8"))
    (odd / "config.json").write_text(json.dumps(settings | {"act_fn": "silu"}), encoding="utf-8")
    short = shutil.copytree(tiny / "taesd", tmp_path / "short")
    (short / "config.json").write_text(
        json.dumps(settings | {"num_decoder_blocks": [1, 1, 1, 1]}), encoding="utf-8"
    )
    broken = shutil.copytree(tiny / "taesd", tmp_path / "broken")
    (broken / "config.json").write_text("{", encoding="utf-8")
    (tmp_path / "text.safetensors").write_text("x")
    save_file({"x": torch.ones(2, 2, 2)}, tmp_path / "x.safetensors")
    (tmp_path / "empty").mkdir()
    for path, message in {
        half: "taesd_encoder.safetensors must lie beside it",
        half / "x.safetensors": "name them taesd_encoder",
        tmp_path / "wide": "has 16 latent channels, the model 'sd' 4",
        odd: "act_fn must be 'relu'.* got 'silu'",
        short: "do not fit",
        broken: "is not JSON",
        tmp_path / "text.safetensors": "not a whole safetensors file",
        tmp_path / "x.safetensors": "none of Stable Diffusion",
        tmp_path / "empty": "has no autoencoder",
        tmp_path / "nowhere": "does not exist",
    }.items():
        with pytest.raises(InputError, match=message) as caught:
            model.load_vae(path)
        assert "\n" not in str(caught.value)
    assert model.config == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_preview_beside_the_models_own(model: DiffusionModel, tiny: Path) -> None:
    """A callback shows each step by TAESD; the picture and the model's state are as without it."""
    settings: dict[str, Any] = {"num_inference_steps": 3, "seed": 1}
    before, (without,) = list(model.state_dict()), model.generate("a cat", **settings)
    with pytest.raises(InputError, match="load one with load_vae"):
        model.decode(torch.zeros(1, 4, 8, 8), preview=True)
    model.load_vae(tiny, preview=True)
    shown: list[Any] = []
    (picture,) = model.generate(
        "a cat", **settings, callback=lambda step: shown.extend(model.decode(step.x0, preview=True)) or None
    )
    assert list(model.state_dict()) == before and picture.tobytes() == without.tobytes()
    assert len(shown) == 3 and all(one.size == (64, 64) for one in shown)
    model.load_vae(tiny)
    assert model.decode(torch.ones(1, 4, 8, 8))[0].tobytes() == (
        model.decode(torch.ones(1, 4, 8, 8), preview=True)[0].tobytes()
    )
