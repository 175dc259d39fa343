"""Laws of what lies between pictures: noise of two seeds, embeddings of two prompts; and of the second, larger pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stable_diffusion import DiffusionModel, InputError
from stable_diffusion.diffusion.samplers import Step
from stable_diffusion.generation.interpolate import mixed, slerp
from stable_diffusion.generation.metadata import parameters, read_settings, read_sheet, save_png
from stable_diffusion.generation.pipeline import Result
from stable_diffusion.generation.request import Request
from stable_diffusion.generation.strangers import check_stranger
from stable_diffusion.nn.text import PromptEmbeds
from tests.lively import lively
from tests.tiny import KL, TINY, tiny_model

CONFIG = replace(TINY, vae=KL)


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return lively(tiny_model(CONFIG))


def walked(
    model: DiffusionModel, stop: Callable[[Step], bool] = lambda step: False, **fields: Any
) -> tuple[list[Step], Result]:
    """The steps and the result of a request; `stop` ends it early."""
    stream = model.stream(model.request(**{"prompt": "a red circle", "seed": 3, **fields}))
    steps, sent = [], None
    while True:
        try:
            steps.append(stream.send(sent))
        except StopIteration as end:
            return steps, end.value
        sent = stop(steps[-1])


def bytes_of(model: DiffusionModel, **fields: Any) -> list[bytes]:
    return [picture.tobytes() for picture in walked(model, **fields)[1].pictures]


def alike(one: bytes, other: bytes) -> bool:
    """Up to rounding, which depends on the batch."""
    return (
        float(
            np.mean(np.abs(np.subtract(*(np.frombuffer(x, np.uint8).astype(int) for x in (one, other)))) <= 1)
        )
        > 0.999
    )


def noise(seed: int, side: int = 8) -> Tensor:
    return torch.randn(4, side, side, generator=torch.Generator().manual_seed(seed))[None]


# Seeds


def test_slerp_is_the_way_on_the_sphere() -> None:
    """It begins and ends exactly, keeps the norm, and turns by the same angle at every step."""
    a, b = noise(0), noise(1)
    b = b * (a.norm() / b.norm())
    assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    parts = [slerp(a, b, part / 4) for part in range(5)]
    assert all(float(part.norm() / a.norm()) == pytest.approx(1, abs=1e-6) for part in parts)
    angles = [
        math.acos(float((one * other).sum() / a.norm() ** 2)) for one, other in itertools.pairwise(parts)
    ]
    assert angles == pytest.approx([angles[0]] * 4, abs=1e-4) and angles[0] > 0.3
    assert float(torch.lerp(a, b, 0.5).norm() / a.norm()) < 0.8, "a line does not"


def test_slerp_is_each_pictures_own_and_takes_any_noise() -> None:
    a, b = torch.cat([noise(0), noise(1)]), torch.cat([noise(2), noise(3)])
    assert torch.equal(slerp(a, b, 0.3)[1:], slerp(a[1:], b[1:], 0.3))
    assert torch.equal(slerp(a, a, 0.3), a)
    assert torch.allclose(slerp(0 * a, b, 0.3), 0.3 * b)


def test_no_variation_is_the_picture_and_a_whole_one_has_the_other_seeds_noise(model: DiffusionModel) -> None:
    plain = bytes_of(model)
    assert bytes_of(model, variation_seed=9, variation_strength=0.0) == plain
    assert bytes_of(model, variation_seed=9, variation_strength=1.0) == bytes_of(model, seed=9)
    assert bytes_of(model, variation_seed=9, variation_strength=0.5) not in (plain, bytes_of(model, seed=9))


def test_only_the_first_noise_varies(model: DiffusionModel) -> None:
    """What a sampler adds on its way is the seed's."""
    varied = bytes_of(model, sampler="euler_a", variation_seed=9, variation_strength=1.0)
    assert varied == bytes_of(model, sampler="euler_a", latents=noise(9))
    assert varied != bytes_of(model, sampler="euler_a", seed=9)
    half = slerp(noise(3), noise(9), 0.5)
    varied = bytes_of(model, sampler="euler_a", variation_seed=9, variation_strength=0.5)
    assert varied == bytes_of(model, sampler="euler_a", latents=half)


def test_little_variation_changes_little(model: DiffusionModel) -> None:
    clean = walked(model)[0][-1].x
    ways = [
        float((walked(model, variation_seed=9, variation_strength=s)[0][-1].x - clean).norm())
        for s in (0.02, 0.2, 0.6)
    ]
    assert ways == sorted(ways) and ways[0] < 0.2 * ways[-1]


def test_variations_share_the_seed_and_count_the_other(model: DiffusionModel) -> None:
    request = model.request("a", seed=5, num_images_per_prompt=2, variation_seed=2**63 - 1)
    assert (request.seeds, request.variation_seeds) == ((5, 6), (2**63 - 1, 0))
    request = replace(request, variation_strength=0.5)
    assert (request.seeds, request.variation_seeds) == ((5, 5), (2**63 - 1, 0))
    second = request.picture(1)
    assert (second.seed, second.variation_seed, second.seeds) == (5, 0, (5,))
    together = bytes_of(model, num_images_per_prompt=2, variation_seed=9, variation_strength=0.5)
    assert alike(together[1], bytes_of(model, variation_seed=10, variation_strength=0.5)[0])


def test_a_variation_without_a_seed_gets_one_that_is_stored(model: DiffusionModel) -> None:
    seeds = {model.request("a", variation_strength=0.5).variation_seed for _ in range(3)}
    assert len(seeds) == 3 and None not in seeds
    assert model.request("a").variation_seed is None
    request = model.request("a", variation_strength=0.5)
    assert Request.from_dict(request.to_dict()) == request


# Prompts


def test_mixing_begins_and_ends_with_the_plain_pictures(model: DiffusionModel) -> None:
    one, other = bytes_of(model), bytes_of(model, prompt="two blue stars")
    assert bytes_of(model, mix_prompt="two blue stars", mix_strength=0.0) == one
    assert bytes_of(model, mix_prompt="two blue stars", mix_strength=1.0) == other
    assert bytes_of(model, mix_prompt="two blue stars", mix_strength=0.5) not in (one, other)
    assert bytes_of(model, mix_prompt="a red circle", mix_strength=0.5) == one


def embeds(length: int, seed: int, width: int = 6) -> PromptEmbeds:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, width, 3, generator=generator)
    return PromptEmbeds(tokens, torch.arange(width)[None] < length, tokens[:, 0])


def test_embeddings_are_mixed_token_by_token() -> None:
    a, b = embeds(2, 0), embeds(4, 1)
    half = mixed(a, b, 0.5)
    assert torch.equal(half.mask, b.mask)  # type: ignore[arg-type]
    assert torch.allclose(half.tokens[:, :2], (a.tokens + b.tokens)[:, :2] / 2)
    assert torch.allclose(half.tokens[:, 2:4], (a.tokens[:, 1:2] + b.tokens[:, 2:4]) / 2), "its last token"
    assert torch.allclose(half.pooled, (a.pooled + b.pooled) / 2)
    whole = mixed(a._replace(mask=None), b._replace(mask=None), 0.25)
    assert whole.mask is None and torch.allclose(whole.tokens, 0.75 * a.tokens + 0.25 * b.tokens)


def test_padding_of_one_encoder_before_another_is_filled() -> None:
    """Where two encoders' tokens follow each other, what may be read is in two parts."""
    a, b = (
        PromptEmbeds(x.tokens, torch.tensor([[1, 1, 0, 1, 0, 0]], dtype=torch.bool), x.pooled)
        for x in (embeds(6, 0), embeds(6, 1))
    )
    read = mixed(a, b, 0.0)
    assert torch.equal(read.tokens[0], a.tokens[0, [0, 1, 1, 3, 3, 3]])


# The second pass


def test_hires_1_is_the_picture(model: DiffusionModel) -> None:
    assert bytes_of(model, hires=1.0, hires_strength=0.3) == bytes_of(model)


def test_steps_count_over_both_passes(model: DiffusionModel) -> None:
    steps, result = walked(model, num_inference_steps=6, hires=2, hires_strength=0.5)
    assert [(step.index, step.total) for step in steps] == [(i, 9) for i in range(9)]
    assert [step.x.shape[-1] for step in steps] == [8] * 6 + [16] * 3
    assert [step.level for step in steps[6:]] == [step.level for step in steps[3:6]]
    assert result.pictures[0].size == (64, 64)
    assert (result.pictures[0].info["settings"]["width"], result.pictures[0].info["settings"]["hires"]) == (
        32,
        2,
    )
    assert result.pictures[0].tobytes() == model.decode(steps[-1].x)[0].tobytes()


@pytest.mark.parametrize("sampler", ["euler", "euler_a"])
def test_a_whole_second_pass_is_text_to_image_of_that_size(sampler: str, model: DiffusionModel) -> None:
    steps, _ = walked(model, sampler=sampler, hires=1.5, hires_strength=1.0)
    plain, _ = walked(model, sampler=sampler, width=48, height=48)
    assert torch.equal(steps[-1].x, plain[-1].x)


def test_little_strength_keeps_the_enlarged_latents_more_than_much(model: DiffusionModel) -> None:
    ways = []
    for strength in (0.1, 0.5, 1.0):
        steps, _ = walked(model, num_inference_steps=10, hires=2, hires_strength=strength)
        large = torch.nn.functional.interpolate(steps[9].x, (16, 16), mode="bicubic")
        ways.append(float((steps[-1].x - large).norm()))
    assert ways == sorted(ways)


def test_the_second_pass_begins_at_the_enlarged_latents_noised_to_its_first_level(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []
    predict = model.unet.predict
    monkeypatch.setattr(model.unet, "predict", lambda x, *a: given.append(x) or predict(x, *a))  # type: ignore[func-returns-value]
    steps, _ = walked(model, hires=2, hires_strength=0.5, guidance_scale=1.0)
    level = steps[4].level
    large = torch.nn.functional.interpolate(steps[3].x, (16, 16), mode="bicubic")
    assert torch.allclose(given[4], level.alpha * large + level.sigma * noise(3, 16), atol=1e-6)


def test_hires_goes_with_an_image_and_with_several_pictures(model: DiffusionModel) -> None:
    image = Image.new("RGB", (40, 24), "orange")
    steps, result = walked(model, image=image, strength=0.5, hires=2, num_images_per_prompt=2)
    assert [picture.size for picture in result.pictures] == [(80, 48)] * 2
    assert steps[-1].total == 2 + 2
    alone = walked(model, image=image, strength=0.5, hires=2, seed=4)[1].pictures[0]
    assert alike(alone.tobytes(), result.pictures[1].tobytes())


def test_a_larger_size_is_a_multiple_of_the_factor(model: DiffusionModel) -> None:
    _, result = walked(model, hires=1.3, hires_strength=0.3)
    assert result.pictures[0].size == (40, 40)  # 8 latents become 10.4


def test_stopped_in_the_first_pass_it_is_the_small_picture(model: DiffusionModel) -> None:
    steps, result = walked(model, stop=lambda step: step.index == 1, hires=2)
    assert len(steps) == 2
    assert result.pictures[0].tobytes() == model.decode(steps[-1].x0)[0].tobytes()
    steps, result = walked(model, stop=lambda step: step.index == 4, hires=2)
    assert result.pictures[0].size == (64, 64)


# What is said of it


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"variation_seed": 3}, "the variation seed has no effect: variation_strength is 0"),
        ({"mix_prompt": "b"}, "the prompt to mix in has no effect: mix_strength is 0"),
        (
            {"hires": 2, "hires_strength": 0.3},
            "this model knows pictures of 32 pixels alone",
        ),
    ],
)
def test_what_does_little_good_is_a_note(fields: dict[str, Any], note: str, model: DiffusionModel) -> None:
    (said,) = walked(model, **fields)[1].notes
    assert said.startswith(note)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variation_strength": 1.5}, "variation_strength must be from 0 to 1, got 1.5"),
        ({"variation_seed": -1}, "variation_seed must be from 0 to"),
        ({"mix_strength": 0.5}, "mix_strength needs the prompt to mix in: give mix_prompt as well"),
        ({"hires": 0.5}, "hires must be from 1 to 4, got 0.5"),
        ({"hires": 5}, "hires must be from 1 to 4, got 5"),
        ({"hires_strength": 0}, "hires_strength must be above 0 and at most 1, got 0"),
        (
            {"hires": 2, "image": Image.new("RGB", (8, 8)), "mask_image": Image.new("L", (8, 8), 255)},
            "it does not go with mask_image: repaint first, then give the result as image",
        ),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Request.of(CONFIG, prompt="a", **fields)


def test_a_variation_of_json_names_its_seed() -> None:
    plain = Request.of(CONFIG, prompt="a").to_dict()
    with pytest.raises(InputError, match="give variation_seed as well"):
        Request.from_dict(plain | {"variation_strength": 0.5})


def test_a_stranger_may_not_ask_for_much_by_hires() -> None:
    check_stranger({"width": 1024, "hires": 2.0})
    with pytest.raises(InputError, match="height times hires may be at most 2048"):
        check_stranger({"width": 512, "height": 1024, "hires": 4.0})
    with pytest.raises(InputError, match="at most 10,000 letters"):
        check_stranger({"prompt": ("a" * 5000,), "mix_prompt": "b" * 5001})


def test_a_png_stores_it_and_says_it_as_other_programs_do(model: DiffusionModel, tmp_path: Path) -> None:
    fields = {"variation_seed": 9, "variation_strength": 0.25, "mix_prompt": "b", "mix_strength": 0.5}
    (picture,) = walked(model, hires=2, hires_strength=0.5, **fields)[1].pictures
    path = save_png(picture, tmp_path / "a.png", picture.info["settings"])
    stored = read_settings(path)
    assert stored.items() >= {**fields, "hires": 2, "hires_strength": 0.5}.items()
    (again,) = walked(model, **{k: v for k, v in stored.items() if k != "model"})[1].pictures
    assert again.tobytes() == picture.tobytes()
    told = parameters(stored)
    assert "Seed: 3, Size: 32x32" in told
    assert "Variation seed: 9, Variation seed strength: 0.25, Denoising strength: 0.5" in told
    assert "Hires upscale: 2, Hires upscaler: Latent (bicubic)" in told
    plain = parameters(model.request("a", variation_seed=9).to_dict())
    assert "Variation" not in plain and "Hires" not in plain


def test_a_sheet_says_that_it_is_one(tmp_path: Path) -> None:
    plain = Request.of(CONFIG, prompt="a", seed=1).to_dict()
    picture = Image.new("RGB", (8, 8))
    path = save_png(picture, tmp_path / "a.png", plain, sheet="--sweep prompt=\udcff,é")
    assert read_settings(path) == json_like(plain)
    assert read_sheet(path) == "--sweep prompt=?,é"
    assert read_sheet(save_png(picture, tmp_path / "b.png", plain)) is None


def json_like(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def test_mixed_prompts_are_read_in_the_syntax_of_the_request(model: DiffusionModel) -> None:
    """Words have weights, and both prompts the same LoRAs."""
    fields = {"prompt_syntax": "a1111", "mix_strength": 0.5}
    heavy = bytes_of(model, mix_prompt="two (blue:1.5) stars", **fields)
    assert heavy != bytes_of(model, mix_prompt="two blue stars", **fields)
    ends = {"prompt": "two (blue:1.5) stars", "prompt_syntax": "a1111"}
    assert bytes_of(model, mix_prompt=ends["prompt"], **fields | {"mix_strength": 1.0}) == bytes_of(
        model, **ends
    )
    with pytest.raises(InputError, match="the prompts of one request share their LoRAs"):
        model.stream(model.request("a", mix_prompt="b <lora:x:1>", **fields))
