"""The front door: the blocks that can be called, and one clear sentence for every argument that cannot be used."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from stable_diffusion import DiffusionModel, Guidance, InputError, SamplerConfig
from stable_diffusion.config import MINILM
from stable_diffusion.diffusion.names import SAMPLERS
from tests.lively import lively
from tests.tiny import KL, TEXT, TINY, tiny_model


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return lively(tiny_model(replace(TINY, vae=KL)))


def picture(width: int = 32, height: int = 32) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


# The blocks


def test_encode_and_decode(model: DiffusionModel) -> None:
    latents = model.encode(picture(48, 32))
    assert (latents.shape, latents.dtype) == ((1, 4, 8, 12), torch.float32)
    assert not latents.requires_grad
    batch = model.encode([picture(48, 32), Image.new("RGBA", (48, 32))])
    assert batch.shape == (2, 4, 8, 12)
    assert torch.allclose(batch[:1], latents, atol=1e-4)
    pixels = torch.from_numpy(np.asarray(picture(48, 32)).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.allclose(model.encode(pixels), latents, atol=1e-4)
    pictures = model.decode(batch)
    assert [(p.size, p.mode) for p in pictures] == [((48, 32), "RGB")] * 2
    assert np.asarray(pictures[0]).std() > 5


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((33, 32), "width must be a multiple of 4, got 33; nearest are 32 and 36"),
        ((32, 3), "the smallest is 4"),
    ],
)
def test_encode_refuses_sizes_by_name(size: tuple[int, int], message: str, model: DiffusionModel) -> None:
    with pytest.raises(InputError, match=message):
        model.encode(picture(*size))


def test_encode_refuses_pictures_of_several_sizes_and_none(model: DiffusionModel) -> None:
    with pytest.raises(InputError, match="32x32, 48x32"):
        model.encode([picture(), picture(48, 32)])
    with pytest.raises(InputError, match="none"):
        model.encode([])


def test_decode_refuses_nan(model: DiffusionModel) -> None:
    with pytest.raises(InputError, match="NaN"):
        model.decode(torch.full((1, 4, 8, 8), math.nan))


def test_add_noise_is_the_line_between_picture_and_noise(model: DiffusionModel) -> None:
    x0, noise = torch.ones(2, 4, 8, 8), torch.zeros(2, 4, 8, 8)
    assert torch.allclose(model.scheduler.add_noise(x0, noise, 250), x0 * 0.75)
    assert torch.equal(
        model.scheduler.add_noise(x0, noise, torch.tensor([0.0, 1000.0])), torch.stack([x0[0], noise[0]])
    )
    with pytest.raises(InputError, match="from 0 to 1000"):
        model.scheduler.add_noise(x0, noise, 1001)


def test_encode_prompt(model: DiffusionModel) -> None:
    one, both = model.encode_prompt("a cat"), model.encode_prompt(["a cat", ""])
    assert (one.tokens.shape, one.pooled.shape, one.mask) == ((1, 16, 32), (1, 32), None)
    assert torch.allclose(both.tokens[:1], one.tokens, atol=1e-5)
    assert not torch.allclose(both.tokens[1], one.tokens[0], atol=1e-2)
    assert not one.tokens.requires_grad


def test_the_forward_pass_is_the_unet(model: DiffusionModel) -> None:
    embeds = model.encode_prompt("a cat")
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0])
    with torch.no_grad():
        output = model(x, t, embeds.tokens, embeds.mask, embeds.pooled)
        assert torch.equal(output, model.unet(x, t, embeds.tokens, embeds.mask, embeds.pooled))


def test_train_and_eval_with_a_bool_are_those_of_a_module(model: DiffusionModel) -> None:
    assert model.train(True) is model
    assert model.unet.training
    assert model.eval() is model
    assert not any(part.training for part in model.modules())
    assert model.train() is model
    model.eval()


# Words that do not fit


def test_a_prompt_that_is_far_too_long_does_not_flood_the_terminal(model: DiffusionModel) -> None:
    with pytest.warns(UserWarning, match="words are left out") as caught:
        model.encode_prompt("word " * 10_000)
    assert len(str(caught[0].message)) < 1500


def test_a_prompt_that_is_too_long_warns_once_and_names_the_cut_words(model: DiffusionModel) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen Fifteen sixteen"
    calls: list[Callable[[], object]] = [
        lambda: model.generate(long, seed=0, num_inference_steps=1),
        lambda: model.generate([long, "short"], seed=0, num_inference_steps=1, num_images_per_prompt=3),
        lambda: model.generate("short", long, seed=0, num_inference_steps=1),
        lambda: model.encode_prompt(long),
        lambda: model.encode_prompt(["", long]),
    ]
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
        assert len(caught) == 1
        message = str(caught[0].message)
        assert "'Fifteen sixteen'" in message
        assert "fourteen" not in message.partition("left out")[2]
        assert "16 tokens" in message
        assert caught[0].filename == __file__  # it blames the caller's line
    model.encode_prompt(
        long.removesuffix(" Fifteen sixteen")
    )  # fits: no warning, which would be an error here


def test_each_encoder_says_what_it_cuts() -> None:
    unet = replace(TINY.unet, pooled_projection_dim=None)
    both = replace(TINY, text_encoders=(TEXT, replace(MINILM, context_length=8)), unet=unet)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        embeds = tiny_model(both).encode_prompt("one two three four five six seven")
    assert ["'seven'" in str(w.message) for w in caught] == [True]
    assert embeds.tokens.shape == (1, 16 + 8, 32)
    assert embeds.mask is not None
    assert embeds.mask.all()


# Arguments that cannot be used


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt must be a text or a list of texts, got None"),
    ({"prompt": 3}, "prompt must be a text or a list of texts, got 3"),
    ({"prompt": []}, r"prompt must be a text or a list of texts, got \[\]"),
    ({"prompt": ["a", 1]}, "prompt must be a text or a list of texts"),
    ({"prompt": b"a"}, "prompt must be a text"),
    ({"prompt": {"a": 1}}, "prompt must be a text"),
    ({"negative_prompt": 3}, "negative_prompt must be a text"),
    ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, "one for each of the 3 prompts, got 2"),
    ({"width": 50}, "width must be a multiple of 4, got 50; nearest are 48 and 52"),
    ({"height": 2}, "height must be a multiple of 4, got 2; the smallest is 4"),
    ({"width": 0}, "width must be from 1 to 65536, got 0"),
    ({"height": -8}, "height must be from 1 to 65536, got -8"),
    ({"height": 32.0}, "height must be of type int, got 32.0"),
    ({"strength": 0, "image": picture()}, "strength must be above 0 and at most 1, got 0"),
    ({"strength": 1.1, "image": picture()}, "strength must be above 0 and at most 1, got 1.1"),
    ({"strength": -0.5}, "strength must be above 0"),
    ({"strength": math.nan}, "strength must be a finite number, got nan"),
    ({"strength": "0.5"}, "strength must be of type float, got '0.5'"),
    ({"sampler": "dpmpp2m"}, "did you mean 'dpmpp_2m'.*" + ", ".join(sorted(SAMPLERS))),
    ({"sampler": "nonsense"}, "choose one of " + ", ".join(sorted(SAMPLERS))),
    ({"sampler": 3}, "sampler must be of type str, got 3"),
    ({"sampler": SamplerConfig(name="euler", spacing="karras")}, "spacing 'karras'"),
    ({"num_inference_steps": 0}, "num_inference_steps must be from 1 to 100000, got 0"),
    ({"num_inference_steps": -1}, "num_inference_steps must be from 1"),
    ({"num_inference_steps": 2.5}, "num_inference_steps must be of type int"),
    ({"num_inference_steps": True}, "num_inference_steps must be of type int"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt must be from 1 to 100000, got 0"),
    ({"guidance_scale": "strong"}, "guidance_scale must be of type float"),
    ({"guidance_scale": math.inf}, "guidance_scale must be a finite number, got inf"),
    ({"guidance_scale": False}, "guidance_scale must be of type float"),
    ({"seed": True}, "seed must be of type int, got True"),
    ({"seed": -1}, "seed must be from 0 to 9223372036854775807, got -1"),
    ({"seed": 2**63}, "seed must be from 0 to 9223372036854775807"),
    ({"seed": 1.0}, "seed must be of type int, got 1.0"),
    ({"mask_image": picture()}, "mask_image needs the image that it masks"),
    ({"image": "nowhere.png"}, "nowhere.png does not exist"),
    ({"image": Path(__file__)}, "is not a picture"),
    ({"image": 3}, "image must be a picture or the path of one, got 3"),
    ({"image": picture(), "mask_image": "nowhere.png"}, "nowhere.png does not exist"),
    (
        {"latents": torch.zeros(1, 4, 8, 9)},
        r"latents must be a tensor of the shape \(1, 4, 8, 8\), got \(1, 4, 8, 9\)",
    ),
    ({"latents": torch.zeros(4, 8, 8)}, r"latents must be a tensor of the shape \(1, 4, 8, 8\)"),
    ({"latents": torch.zeros(1, 4, 8, 8), "num_images_per_prompt": 2}, r"of the shape \(2, 4, 8, 8\)"),
    ({"latents": [0.0]}, "latents must be a tensor of the shape"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=[str(i) + str(next(iter(a))) for i, (a, _) in enumerate(BAD)]
)
def test_an_argument_that_cannot_be_used_is_one_clear_sentence(
    arguments: dict[str, Any], message: str, model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.unet, "predict", None)  # nothing is computed before the arguments are checked
    with pytest.raises(InputError, match=message) as caught:
        model.generate(**{"prompt": "a"} | arguments)
    assert "\n" not in str(caught.value)


def test_more_steps_than_the_schedule_has_are_refused() -> None:
    from stable_diffusion.config import ScheduleConfig

    network = tiny_model(replace(TINY, schedule=ScheduleConfig()))
    with pytest.raises(InputError, match="at most 1000"):
        network.generate("a", num_inference_steps=1001, sampler="ddim")


def test_unknown_presets_and_presets_without_vocabulary_are_refused() -> None:
    with pytest.raises(InputError, match=r"'sd-15': did you mean 'sd15'.* choose one of mini, sd15, sd21"):
        DiffusionModel("sd-15")
    with pytest.raises(InputError, match="from_pretrained"):
        DiffusionModel("sd15")


@pytest.mark.parametrize("guidance", [{"interval": (0.8, 0.2)}, {"interval": (-0.1, 1.0)}, {"rescale": 1.5}])
def test_guidance_out_of_range(guidance: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"(interval|rescale) must be"):
        Guidance(**guidance)


def test_training_needs_the_models_own_weights(tmp_path: Path) -> None:
    """A LoRA that acts would be trained around, and one that is fused undone over what was learned."""
    network = tiny_model()
    network.adapters.add("a", {})
    for train in (network.train, network.check):
        with pytest.raises(InputError, match=r"unload its LoRAs first \(a\)"):
            train(cast(Any, None), output_dir=tmp_path)


def test_a_picture_says_which_model_made_it(tmp_path: Path) -> None:
    """What was loaded, and how, is in its settings, so that the command can make it again."""
    tiny_model().save_pretrained(tmp_path / "tiny")
    network = DiffusionModel.from_pretrained(tmp_path / "tiny", prediction_type="flow_prediction")
    (made,) = network.generate("a", seed=0)
    loading = {"model": str(tmp_path / "tiny"), "prediction_type": "flow_prediction"}
    assert made.info["settings"].items() >= loading.items()
    assert DiffusionModel.from_pretrained().request("a fox").model is None
