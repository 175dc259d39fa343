"""The doors of a model: wrong arguments are one sentence, a subclass keeps its `__init__`, defaults change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from stable_diffusion import DiffusionModel, Guidance, InputError
from stable_diffusion.training.stages import DecoderSettings, DenoiserSettings
from tests.tiny import DECODER, STAGES, TINY, shapes, tiny_model


def trained(model: Any, folder: Path, stages: Any = STAGES, **settings: Any) -> None:
    model.train(shapes(folder / "set"), stages, **{"output_dir": folder / "new", **settings})


WRONG: list[tuple[str, Callable[[Any, Path], Any]]] = [
    ("a model is made of a ModelConfig or of a preset's name, got 5", lambda model, folder: DiffusionModel(5)),  # type: ignore[arg-type]
    ("got None", lambda model, folder: DiffusionModel(None)),  # type: ignore[arg-type]
    ("interval must be of type", lambda model, folder: Guidance(interval=None)),  # type: ignore[arg-type]
    ("scale must be of type float, got 'x'", lambda model, folder: Guidance(scale="x")),  # type: ignore[arg-type]
    ("a path must be a text or a Path, got 5", lambda model, folder: DiffusionModel.from_pretrained(5)),  # type: ignore[arg-type]
    ("a path must be", lambda model, folder: DiffusionModel.from_pretrained("a\0b")),
    ("dtype must be one of", lambda model, folder: DiffusionModel.from_pretrained(folder / "m", dtype="float16")),  # type: ignore[arg-type]
    ("dtype must be one of", lambda model, folder: DiffusionModel.from_pretrained(folder / "m", dtype=torch.int8)),
    ("variant must be", lambda model, folder: DiffusionModel.from_pretrained(folder / "m", variant=5)),  # type: ignore[arg-type]
    ("ema must be of type bool", lambda model, folder: DiffusionModel.from_pretrained(folder / "m", ema="no")),  # type: ignore[arg-type]
    ("pictures must be PIL images, got 5", lambda model, folder: model.encode(5)),
    ("pictures must be PIL images, got None", lambda model, folder: model.encode(None)),
    ("pictures must be PIL images", lambda model, folder: model.encode(["a.png"])),
    ("images of one size, got none", lambda model, folder: model.encode([])),
    ("pictures must be floats of the shape", lambda model, folder: model.encode(torch.zeros(3, 32, 32))),
    ("pictures must be floats of the shape", lambda model, folder: model.encode(torch.zeros(1, 1, 32, 32))),
    ("of torch.uint8", lambda model, folder: model.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))),
    ("multiple of 4", lambda model, folder: model.encode(torch.zeros(1, 3, 30, 32))),
    ("latents must be floats of the shape", lambda model, folder: model.decode(5)),
    ("latents must be floats of the shape", lambda model, folder: model.decode(None)),
    ("latents must be floats of the shape", lambda model, folder: model.decode(torch.zeros(4, 8, 8))),
    ("latents must be floats of the shape", lambda model, folder: model.decode(torch.zeros(1, 3, 8, 8))),
    ("latents must be floats of the shape", lambda model, folder: model.decode(torch.zeros(1, 4, 0, 8))),
    ("latents must be floats of the shape", lambda model, folder: model.decode(np.zeros((1, 4, 8, 8)))),
    ("encode_prompt takes a text or a list of texts, got none", lambda model, folder: model.encode_prompt([])),
    ("texts must be of type", lambda model, folder: model.encode_prompt(5)),
    ("texts must be of type str, got 5", lambda model, folder: model.encode_prompt(["a", 5])),
    ("prompt must be a text", lambda model, folder: model.generate(5)),
    ("prompt must be a text", lambda model, folder: model.generate(None)),
    ("stream takes a Request", lambda model, folder: model.stream(5)),
    ("train takes captioned pictures", lambda model, folder: model.train([1, 2])),
    ("train takes captioned pictures", lambda model, folder: model.train("folder")),
    ("train takes captioned pictures", lambda model, folder: model.train(None)),
    ("stages must be a list of settings", lambda model, folder: trained(model, folder, [5])),
    ("stages must be a list of settings", lambda model, folder: trained(model, folder, 5)),
    (
        "a stage of the kind 'denoiser' is set by DenoiserSettings",
        lambda model, folder: trained(model, folder, [DecoderSettings(kind="denoiser")]),
    ),
    (
        "loss weight 'bound' needs a discrete schedule",
        lambda model, folder: trained(model, folder, [DenoiserSettings(loss_weight="bound")]),
    ),
    ("steps must be of type int", lambda model, folder: trained(model, folder, steps="5")),
    ("minutes must be of type float", lambda model, folder: trained(model, folder, minutes="5")),
    ("seed must be from 0", lambda model, folder: trained(model, folder, seed=-1)),
    ("a path must be", lambda model, folder: trained(model, folder, output_dir=5)),
    ("a path must be", lambda model, folder: model.save_pretrained(None)),
    ("dtype must be one of", lambda model, folder: model.save_pretrained(folder / "new", dtype="half")),
    ("dtype must be one of", lambda model, folder: model.save_pretrained(folder / "new", dtype=torch.int32)),
    ("a path must be", lambda model, folder: model.export(5)),
    ("unknown format 5", lambda model, folder: model.export(folder / "new", format=5)),
    ("a path must be", lambda model, folder: model.load_lora(5)),
    ("name must be of type str", lambda model, folder: model.load_lora(folder / "none.safetensors", name=5)),
    ("a path must be", lambda model, folder: model.load_vae(5)),
    ("a path must be", lambda model, folder: model.load_textual_inversion(5)),
    ("token must be", lambda model, folder: model.load_textual_inversion(folder / "none.pt", token=5)),
    ("name must be of type str", lambda model, folder: model.unload_lora(5)),
]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return tiny_model()


@pytest.mark.parametrize(("message", "call"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments_are_one_sentence(
    model: DiffusionModel, tmp_path: Path, message: str, call: Callable[[Any, Path], Any]
) -> None:
    with pytest.raises(InputError) as caught:
        call(model, tmp_path)
    assert message in str(caught.value) and len(str(caught.value)) < 400
    assert not (tmp_path / "new").exists()


def test_the_meta_device_is_said(tmp_path: Path) -> None:
    model: Any = tiny_model().to("meta")
    for call in (
        lambda: model.generate("a fox"),
        lambda: model.encode(Image.new("RGB", (32, 32))),
        lambda: model.decode(torch.zeros(1, 4, 8, 8)),
        lambda: model.encode_prompt("a fox"),
        lambda: model.train(shapes(tmp_path / "set"), STAGES, output_dir=tmp_path / "run"),
        lambda: model.save_pretrained(tmp_path / "model"),
        lambda: model.export(tmp_path / "model"),
    ):
        with pytest.raises(InputError, match="on the meta device, which holds shapes and no weights"):
            call()
    assert not (tmp_path / "run").exists() and not (tmp_path / "model").exists()


class WithHead(DiffusionModel):
    """As Python's users write one: something of its own, before and after what the parent makes."""

    def __init__(self, config: Any = TINY, width: int = 3) -> None:
        super().__init__(config)
        self.head = nn.Linear(self.config.vae.latent_channels, width)


class Straying(DiffusionModel):
    def __init__(self, config: Any = TINY) -> None:
        super().__init__(TINY)


def test_a_subclass_is_made_by_its_own_init(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    plain = DiffusionModel.from_pretrained(tmp_path / "model")
    ours = WithHead.from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert type(ours) is WithHead and ours.head.weight.shape == (3, 4) and not ours.training
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    for name, tensor in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor.double())
    assert ours.origin["model"] == str(tmp_path / "model")
    assert WithHead().head.weight.device.type == "cpu"
    again = WithHead(plain.config)  # random weights, as always: nothing was left behind
    assert not torch.equal(again.unet.conv_in.weight, plain.unet.conv_in.weight)


def test_a_subclass_that_takes_another_configuration_is_told(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    with pytest.raises(
        InputError, match=r"Straying.__init__ must hand its config to super\(\).__init__\(config\)"
    ):
        Straying.from_pretrained(tmp_path / "model")
    assert DiffusionModel(TINY).unet.conv_in.weight.device.type == "cpu"


@contextmanager
def defaults(dtype: torch.dtype, device: str | None) -> Iterator[None]:
    """Torch's defaults changed, as a user's program may have them."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


@pytest.mark.parametrize(("dtype", "device"), [(torch.float64, None), (torch.float32, "meta")])
def test_torchs_defaults_change_no_picture(tmp_path: Path, dtype: torch.dtype, device: str | None) -> None:
    """Neither what a seed gives, nor what training learns."""
    tiny_model().save_pretrained(tmp_path / "model")
    data = shapes(tmp_path / "set")

    def work(name: str) -> tuple[list[bytes], dict[str, torch.Tensor]]:
        model = DiffusionModel.from_pretrained(tmp_path / "model")
        pictures = [
            picture.tobytes()
            for sampler in ("euler_a", "dpmpp_2m_sde", "ddpm")
            for picture in model.generate("a red circle", seed=3, sampler=sampler, num_inference_steps=3)
        ]
        model.train(data, (*STAGES, DECODER), steps=2, output_dir=tmp_path / name)
        return pictures, model.state_dict()

    pictures, weights = work("plain")
    with defaults(dtype, device):
        others, learned = work("changed")
    assert others == pictures
    for name, tensor in weights.items():
        assert learned[name].dtype == tensor.dtype and torch.equal(learned[name], tensor), name


def test_a_model_of_random_weights_generates_in_float64() -> None:
    with defaults(torch.float64, None):
        model = tiny_model()
        assert model.unet.dtype == torch.float64
        assert len(model.generate("a fox", seed=1, num_inference_steps=2)) == 1
