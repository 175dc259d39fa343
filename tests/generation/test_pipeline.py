"""Generation over a small random model: seeds and batches, guidance, image-to-image, inpainting, damaged weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from stable_diffusion import DiffusionModel, Guidance, InputError, SamplerConfig, images
from stable_diffusion.config import ModelConfig, ScheduleConfig, Styles
from stable_diffusion.diffusion.names import SAMPLERS
from stable_diffusion.diffusion.samplers import Step
from stable_diffusion.errors import InputError as SameError
from stable_diffusion.generation import pipeline
from stable_diffusion.generation.metadata import read_settings, save_png
from stable_diffusion.generation.text import with_style
from stable_diffusion.nn.unet import UNet
from tests.lively import lively
from tests.tiny import FINE, KL, TINY, UNCONDITIONAL, tiny_model

FLOW = replace(TINY, vae=KL)
EPS = replace(FLOW, schedule=ScheduleConfig())
V_ZERO_SNR = replace(
    FLOW, schedule=ScheduleConfig(prediction_type="v_prediction", rescale_betas_zero_snr=True)
)
INPAINT = replace(EPS, unet=replace(EPS.unet, in_channels=9))
SCHEDULES = {"flow": FLOW, "eps": EPS, "v": V_ZERO_SNR}
PROMPTS = ["a red circle", "", "two blue stars"]


def model(config: ModelConfig = FLOW, seed: int = 0) -> DiffusionModel:
    return lively(tiny_model(config), seed)


@cache
def shared(config: ModelConfig, dtype: torch.dtype = torch.float32) -> DiffusionModel:
    """The same for several tests, which leave its weights as they are."""
    return model(config).to(dtype)


@pytest.fixture
def flow() -> DiffusionModel:
    return shared(FLOW)


@pytest.fixture
def eps() -> DiffusionModel:
    return shared(EPS)


def walk(model: DiffusionModel, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Image.Image]]:
    """The final latents, and the pictures."""
    steps: list[Step] = []
    pictures = model.generate(*args, **kwargs, callback=steps.append)
    return steps[-1].x, pictures


def array(pictures: list[Image.Image]) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(picture, dtype=int) for picture in pictures])


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def mask(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).choice([0, 255], (height, width)).astype(np.uint8))


def given_to(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The latents that the U-Net is run with."""
    given: list[Tensor] = []
    predict = model.unet.predict

    def keeping(x: Tensor, *args: Any) -> Tensor:
        given.append(x)
        return predict(x, *args)

    monkeypatch.setattr(model.unet, "predict", keeping)
    return given


# The same seed in any batch


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_seed_gives_one_picture_in_any_batch_in_float64(kind: str, sampler: str) -> None:
    network = shared(SCHEDULES[kind], torch.float64)
    batch, _ = walk(network, PROMPTS, seed=7, sampler=sampler, num_inference_steps=3)
    for i, prompt in enumerate(PROMPTS):
        single, _ = walk(network, prompt, seed=7 + i, sampler=sampler, num_inference_steps=3)
        assert single.dtype == torch.float64
        assert float((single[0] - batch[i]).abs().max() / batch[i].abs().max()) < 1e-10
    other, _ = walk(network, PROMPTS[0], seed=8, sampler=sampler, num_inference_steps=3)
    assert float((other[0] - batch[0]).abs().max()) > 0.1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_gives_one_picture_in_any_batch_in_float32(sampler: str, flow: DiffusionModel) -> None:
    batch = array(flow.generate(PROMPTS, seed=7, sampler=sampler))
    for i, prompt in enumerate(PROMPTS):
        single = array(flow.generate(prompt, seed=7 + i, sampler=sampler))[0]
        assert batch[i].std() > 5
        assert (np.abs(single - batch[i]) <= 1).mean() >= 0.999


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_global_generators_change_nothing_and_are_not_changed(sampler: str, flow: DiffusionModel) -> None:
    results, states = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state()
        arguments: dict[str, Any] = {"image": picture(), "mask_image": mask(), "strength": 1.0}
        results.append([walk(flow, "a", seed=3, sampler=sampler)[0], walk(flow, "a", seed=3, **arguments)[0]])
        states.append(torch.equal(before, torch.get_rng_state()))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert states == [True, True]


def test_the_seed_of_picture_i_is_seed_plus_i(flow: DiffusionModel) -> None:
    pictures = flow.generate(["a", "b"], seed=10, num_images_per_prompt=2)
    assert [p.info["settings"]["prompt"] for p in pictures] == ["a", "a", "b", "b"]
    assert [p.info["settings"]["seed"] for p in pictures] == [10, 11, 12, 13]
    third = array(flow.generate("b", seed=12))[0]
    assert (np.abs(third - array(pictures)[2]) <= 1).mean() > 0.999
    assert np.abs(array(pictures)[2] - array(pictures)[3]).mean() > 5


def test_the_largest_seed_is_legal_and_the_next_one_is_0(flow: DiffusionModel) -> None:
    pictures = flow.generate("a", seed=2**63 - 1, num_images_per_prompt=2)
    assert [p.info["settings"]["seed"] for p in pictures] == [2**63 - 1, 0]


def test_seed_0_is_a_seed_and_none_is_a_new_one(flow: DiffusionModel) -> None:
    assert np.array_equal(array(flow.generate("a", seed=0)), array(flow.generate("a", seed=0)))
    drawn = [flow.generate("a")[0].info["settings"]["seed"] for _ in range(3)]
    assert len(set(drawn)) == 3
    (first,) = flow.generate("a")
    (again,) = flow.generate("a", seed=first.info["settings"]["seed"])
    assert again.tobytes() == first.tobytes()


def test_noise_is_that_of_the_seeds_generator(flow: DiffusionModel) -> None:
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (5, 6)])
    given, _ = walk(flow, ["a", "b"], latents=noise, seed=99)
    drawn, _ = walk(flow, ["a", "b"], seed=5)
    assert torch.equal(given, drawn)


def test_a_picture_has_the_bytes_of_the_settings_it_stores(flow: DiffusionModel) -> None:
    (first,) = flow.generate(
        "a", "b", seed=4, guidance_scale=Guidance(scale=3, interval=(0.1, 0.9), rescale=0.5)
    )
    settings = dict(first.info["settings"])
    assert settings.pop("model") == "tiny"
    keys = ("guidance_scale", "guidance_interval", "guidance_rescale")
    scale, interval, rescale = (settings.pop(key) for key in keys)
    parts = {key: settings.pop(key) for key in ("spacing", "eta", "variance")}
    settings["sampler"] = SamplerConfig(name=settings["sampler"], **parts)
    settings["guidance_scale"] = Guidance(scale=scale, interval=tuple(interval), rescale=rescale)
    (again,) = flow.generate(settings.pop("prompt"), **settings)
    assert again.tobytes() == first.tobytes()


# Guidance, text and steps


def test_text_negative_text_guidance_and_steps_change_the_picture(flow: DiffusionModel) -> None:
    base, _ = walk(flow, "a red circle", seed=0)
    for arguments in (
        {"prompt": "a blue circle"},
        {"negative_prompt": "blurry"},
        {"guidance_scale": 2.2},
        {"num_inference_steps": 5},
        {"seed": 1},
        {"guidance_scale": Guidance(scale=2.0, interval=(0.0, 0.5))},
        {"guidance_scale": Guidance(scale=2.0, rescale=0.7)},
    ):
        other, _ = walk(flow, **{"prompt": "a red circle", "seed": 0} | arguments)
        assert float((base - other).abs().max()) > 1e-3, arguments
    same, _ = walk(flow, "a red circle", "", seed=0, guidance_scale=2, num_inference_steps=4, sampler="euler")
    assert torch.equal(base, same)


def test_guidance_1_runs_half_the_batch_and_is_the_conditional_prediction(
    flow: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = given_to(flow, monkeypatch)
    one, _ = walk(flow, ["a", "b"], seed=0, guidance_scale=1, num_inference_steps=2)
    assert [len(x) for x in given] == [2, 2]
    given.clear()
    with pytest.warns(UserWarning, match="the negative prompt has no effect"):
        other, _ = walk(flow, ["a", "b"], "other", seed=0, guidance_scale=1.0, num_inference_steps=2)
    assert torch.equal(one, other)
    given.clear()
    almost, _ = walk(flow, ["a", "b"], "no", seed=0, guidance_scale=1 + 1e-6, num_inference_steps=2)
    assert [len(x) for x in given] == [4, 4]
    assert torch.allclose(one, almost, atol=1e-3)


@pytest.mark.parametrize(
    "guidance", [0, 0.5, -2.0, Guidance(scale=0.0, rescale=0.7), Guidance(scale=-1.0, interval=(0.2, 0.8))]
)
def test_below_1_guidance_is_off_as_at_1(flow: DiffusionModel, guidance: float | Guidance) -> None:
    """Model cards of few-step models write 0 and mean that; what the rest of guidance says changes nothing."""
    off, _ = walk(flow, "a", seed=0, guidance_scale=guidance)
    assert torch.equal(off, walk(flow, "a", seed=0, guidance_scale=1)[0])
    assert not torch.allclose(off, walk(flow, "b", seed=0, guidance_scale=guidance)[0], atol=1e-3)


def test_a_negative_prompt_without_guidance_gets_a_note(flow: DiffusionModel) -> None:
    def notes(**settings: Any) -> tuple[str, ...]:
        request = flow.request("a", seed=0, num_inference_steps=1, **settings)
        return pipeline.finished(flow.stream(request)).notes

    (note,) = notes(negative_prompt="blurry", guidance_scale=0)
    assert note == "the negative prompt has no effect: guidance is off at a scale of 1 and below"
    assert notes(negative_prompt="blurry", guidance_scale=2) == notes(guidance_scale=0) == ()


def test_outside_its_interval_guidance_is_the_conditional_prediction(
    flow: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = given_to(flow, monkeypatch)
    inside, _ = walk(
        flow, "a", seed=0, guidance_scale=Guidance(scale=4.0, interval=(0.4, 0.6)), num_inference_steps=4
    )
    assert [len(x) for x in given] == [1, 1, 2, 1]  # t = 1, 3/4, 1/2, 1/4
    never, _ = walk(
        flow, "a", seed=0, guidance_scale=Guidance(scale=4.0, interval=(0.55, 0.6)), num_inference_steps=4
    )
    conditional, _ = walk(flow, "a", seed=0, guidance_scale=1, num_inference_steps=4)
    assert torch.equal(never, conditional)
    assert not torch.allclose(inside, conditional, atol=1e-3)


def test_negative_prompts_go_with_their_prompts(flow: DiffusionModel) -> None:
    both, _ = walk(flow, ["a", "b"], ["x", "y"], seed=0, num_images_per_prompt=2)
    for i, (prompt, negative) in enumerate([("a", "x"), ("a", "x"), ("b", "y"), ("b", "y")]):
        single, _ = walk(flow, prompt, negative, seed=i)
        assert torch.allclose(both[i], single[0], atol=1e-3)
        swapped, _ = walk(flow, prompt, "y" if negative == "x" else "x", seed=i)
        assert not torch.allclose(both[i], swapped[0], atol=1e-3)


def test_a_sampler_can_be_given_by_other_programs_names(flow: DiffusionModel) -> None:
    for name, alias in (("euler_a", "Euler a"), ("dpmpp_2m", "DPM++ 2M"), ("pndm", "PNDMScheduler")):
        assert torch.equal(
            walk(flow, "a", seed=0, sampler=name)[0], walk(flow, "a", seed=0, sampler=alias)[0]
        )


def test_eta_and_spacing_reach_the_sampler(eps: DiffusionModel) -> None:
    base, _ = walk(eps, "a", seed=0, sampler="ddim")
    for config in (
        SamplerConfig(name="ddim", eta=1.0),
        SamplerConfig(name="ddim", spacing="trailing"),
        SamplerConfig(name="ddim", spacing="karras"),
    ):
        assert not torch.allclose(base, walk(eps, "a", seed=0, sampler=config)[0], atol=1e-3)
    small, large = (SamplerConfig(name="ddpm", variance=kind) for kind in ("small", "large"))  # type: ignore[arg-type]
    assert not torch.allclose(
        walk(eps, "a", seed=0, sampler=small)[0], walk(eps, "a", seed=0, sampler=large)[0]
    )


def test_a_model_without_text_draws_the_empty_prompt() -> None:
    network = model(UNCONDITIONAL)
    (one,) = network.generate("", seed=0)
    assert one.size == (32, 32)
    with pytest.raises(InputError, match="no text encoder"):
        network.generate("a cat")


def test_a_model_can_read_the_pooled_vector_alone() -> None:
    """It follows the prompt, with guidance, as far as the vector does: not at all where that is the same."""
    network = model(replace(TINY, unet=replace(TINY.unet, cross_attention_dim=None)))
    cat, dog = network.generate(["a cat", "a dog"], seed=0, guidance_scale=3.0)
    assert cat.tobytes() != network.generate("a dog", seed=0, guidance_scale=3.0)[0].tobytes()
    assert cat.tobytes() != dog.tobytes()
    with torch.no_grad():
        network.unet.class_embedding.linear_1.weight.zero_()  # type: ignore[union-attr]
    same = [network.generate(prompt, seed=0)[0].tobytes() for prompt in ("a cat", "a dog")]
    assert same[0] == same[1]


# Styles

STYLES = Styles(words=("noto style", "line icon style", "3d render"), default="noto style")


@pytest.mark.parametrize(
    ("prompt", "styled"),
    [
        ("a fox", "a fox, noto style"),
        ("A fox. ", "A fox, noto style"),
        ("🦊", "🦊, noto style"),
        ("a fox in style", "a fox in style, noto style"),
        ("a fox, Line  Icon\nSTYLE", None),
        ("a fox (noto style)", None),
        ("3d renders of a fox", "3d renders of a fox, noto style"),
        ("a2-3d rendered fox", "a2-3d rendered fox, noto style"),
        ("a 3d render of a fox", None),
        ("", None),
        ("  ", None),
        ("…", "…, noto style"),
        (",.", None),
    ],
)
def test_a_prompt_that_names_no_style_gets_the_default_one(prompt: str, styled: str | None) -> None:
    assert with_style(prompt, STYLES) == (prompt if styled is None else styled)
    assert with_style(with_style(prompt, STYLES), STYLES) == (styled or prompt)
    assert with_style(prompt, Styles()) == prompt
    assert with_style(prompt, replace(STYLES, default="")) == prompt


def test_words_are_words_and_no_patterns() -> None:
    styles = Styles(words=("b+w",), default="flat (2d)")
    assert with_style("a fox, B+W", styles) == "a fox, B+W"
    assert with_style("a fox, flat (2d)", styles) == "a fox, flat (2d)"
    assert with_style("a fox, bbw", styles) == "a fox, bbw, flat (2d)"


def test_the_default_style_is_drawn_and_not_stored(flow: DiffusionModel) -> None:
    """Legal beside every other prompt: the empty one and negative ones stay as they are."""
    styled = shared(replace(FLOW, styles=STYLES))
    latents, pictures = walk(styled, ["a fox", "a fox, 3d render", ""], "a cat", seed=3)
    explicit = ["a fox, noto style", "a fox, 3d render", ""]
    assert torch.equal(latents, walk(flow, explicit, "a cat", seed=3)[0])
    assert not torch.allclose(latents[0], walk(flow, "a fox", "a cat", seed=3)[0][0], atol=1e-2)
    assert [p.info["settings"]["prompt"] for p in pictures] == ["a fox", "a fox, 3d render", ""]
    assert all(p.info["settings"]["negative_prompt"] == "a cat" for p in pictures)


def test_a_style_that_does_not_fit_is_named_as_cut() -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    with pytest.warns(UserWarning, match="left out: 'noto style'"):
        shared(replace(FLOW, styles=STYLES)).generate(long, num_inference_steps=1, seed=0)


def test_what_other_programs_would_obey_is_named(flow: DiffusionModel) -> None:
    """In prompts and in negative ones, and where the text alone is encoded."""
    with pytest.warns(UserWarning, match=r"'\(\(bad\)\)', '\(fox:1.3\)': other programs read this"):
        flow.generate("a (fox:1.3)", "((bad))", num_inference_steps=1, seed=0)
    with pytest.warns(UserWarning, match="'<lora:x:1>': .* but in `lora`"):
        flow.encode_prompt("a fox <lora:x:1>")


# Image-to-image and inpainting


def test_strength_1_is_text_to_image(eps: DiffusionModel) -> None:
    for sampler in ("ddim", "euler", "dpmpp_2m_sde"):
        text, _ = walk(eps, "a", seed=3, sampler=sampler)
        image, _ = walk(eps, "a", seed=3, sampler=sampler, image=picture(), strength=1)
        assert torch.equal(text, image)


@pytest.mark.parametrize(
    ("strength", "steps", "taken"),
    [(0.6, 10, 6), (0.8, 4, 3), (0.5, 3, 1), (0.01, 10, 1), (1e-9, 1, 1), (1.0, 10, 10), (0.999, 10, 9)],
)
def test_strength_takes_the_last_k_of_n_steps(
    strength: float, steps: int, taken: int, eps: DiffusionModel
) -> None:
    seen: list[Step] = []
    arguments: dict[str, Any] = {"seed": 0, "sampler": "ddim", "num_inference_steps": steps}
    eps.generate("a", image=picture(), strength=strength, callback=seen.append, **arguments)
    whole: list[Step] = []
    eps.generate("a", callback=whole.append, **arguments)
    assert [step.level for step in seen] == [step.level for step in whole][-taken:]
    assert [(step.index, step.total) for step in seen] == [(i, taken) for i in range(taken)]


def test_image_to_image_begins_at_the_picture_noised_to_the_first_level(
    eps: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = given_to(eps, monkeypatch)
    seen: list[Step] = []
    eps.generate(
        "a",
        image=picture(),
        strength=0.5,
        seed=9,
        sampler="ddim",
        num_inference_steps=10,
        callback=seen.append,
    )
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(9))[None]
    expected = eps.scheduler.add_noise(eps.encode(picture()), noise, seen[0].level.t)
    assert torch.allclose(given[0][:1], expected, atol=1e-5)
    assert torch.equal(given[0][0], given[0][1])  # with and without the prompt


def test_little_strength_keeps_the_picture_more_than_much(eps: DiffusionModel) -> None:
    arguments: dict[str, Any] = {"seed": 0, "sampler": "ddim", "num_inference_steps": 20, "image": picture()}
    clean = eps.encode(picture())
    distances = [
        float((walk(eps, "a", strength=s, **arguments)[0] - clean).norm()) for s in (0.05, 0.3, 0.6, 1.0)
    ]
    assert distances == sorted(distances)


@pytest.mark.parametrize("config", [FLOW, EPS, INPAINT], ids=["flow", "eps", "nine channels"])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "heun", "pndm"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_bytes_outside_the_mask_are_identical(config: ModelConfig, sampler: str, strength: float) -> None:
    network, given, where = shared(config), picture(48, 32), mask(48, 32)
    (result,) = network.generate(
        "a", image=given, mask_image=where, strength=strength, sampler=sampler, seed=0
    )
    outside = np.asarray(where) == 0
    assert result.size == given.size
    assert np.array_equal(np.asarray(result)[outside], np.asarray(given)[outside])
    inside = ~outside
    assert (np.asarray(result)[inside] != np.asarray(given)[inside]).mean() > 0.9


@pytest.mark.parametrize("mode", ["RGBA", "RGB"])
def test_bytes_outside_the_mask_are_identical_with_opacity(mode: str) -> None:
    """Those of the given picture as RGBA; pictures of a model without opacity have none whatever is given."""
    given = picture(64, 64)
    if mode == "RGBA":
        given.putalpha(Image.linear_gradient("L").resize((64, 64)))
    where = mask(64, 64)
    (result,) = shared(FINE).generate("a", image=given, mask_image=where, seed=0)
    assert result.mode == "RGBA"
    outside = np.asarray(where) == 0
    assert np.array_equal(np.asarray(result)[outside], np.asarray(given.convert("RGBA"))[outside])
    assert (np.asarray(result)[~outside] != np.asarray(given.convert("RGBA"))[~outside]).mean() > 0.5
    (plain,) = shared(FLOW).generate("a", image=given, mask_image=where, seed=0)
    assert plain.mode == "RGB"
    assert np.array_equal(np.asarray(plain)[outside], np.asarray(images.to_rgb(given))[outside])


def test_opacity_is_not_encoded(tmp_path: Path) -> None:
    """A picture with opacity is that picture on white; a generated one says in its file how it was made."""
    network, given = shared(FINE), picture(64, 64)
    given.putalpha(77)
    assert torch.equal(network.encode(given), network.encode(images.to_rgb(given)))
    (result,) = network.generate("a", seed=0)
    assert (result.mode, result.size) == ("RGBA", (64, 64))
    path = save_png(result, tmp_path / "a.png", result.info["settings"])
    with Image.open(path) as read:
        assert read.mode == "RGBA" and read.tobytes() == result.tobytes()
    assert read_settings(path)["seed"] == 0


def test_a_mask_has_the_pictures_geometry(eps: DiffusionModel) -> None:
    """The same crop and the same scale; at another size of the same shape too."""
    given, where = picture(96, 32), np.zeros((32, 96), dtype=np.uint8)
    where[8:24, 40:56] = 255
    for mask_image in (Image.fromarray(where), Image.fromarray(where).resize((48, 16))):
        (result,) = eps.generate("a", image=given, mask_image=mask_image, width=32, height=32, seed=0)
        cropped, inside = np.asarray(given)[:, 32:64], where[:, 32:64] > 127
        assert np.array_equal(np.asarray(result)[~inside], cropped[~inside])
        assert (np.asarray(result)[inside] != cropped[inside]).mean() > 0.9
    with pytest.raises(InputError, match="the mask has 32x96 pixels and the image 96x32: give a mask of"):
        eps.generate("a", image=given, mask_image=Image.fromarray(where.T))


def test_a_mask_may_be_a_pixel_off_where_its_size_was_rounded(eps: DiffusionModel) -> None:
    given = picture(47, 33)
    (result,) = eps.generate("a", image=given, mask_image=Image.new("L", (24, 17), 255), seed=0)
    assert result.size == (44, 32)


def test_what_a_mask_with_transparency_means_is_a_note(eps: DiffusionModel) -> None:
    given, mask_image = picture(), Image.new("RGBA", (32, 32))
    mask_image.paste("white", (8, 8, 16, 16))
    with pytest.warns(UserWarning, match="the opaque part is repainted"):
        (result,) = eps.generate("a", image=given, mask_image=mask_image, seed=0)
    changed = (np.asarray(result) != np.asarray(given)).any(-1)
    assert Image.fromarray(changed).getbbox() == (8, 8, 16, 16)


def test_a_mask_between_the_latents_is_an_error(eps: DiffusionModel) -> None:
    mask_image = Image.new("L", (32, 32))
    mask_image.paste(255, (9, 9, 11, 11))
    with pytest.raises(InputError, match="each of which is 4x4 pixels: draw it larger"):
        eps.generate("a", image=picture(), mask_image=mask_image)


def test_grey_masks_are_halved(eps: DiffusionModel) -> None:
    given = picture()
    with pytest.raises(InputError, match="repaints nothing"):
        eps.generate("a", image=given, mask_image=Image.new("L", (32, 32), 127), seed=0)
    (repainted,) = eps.generate("a", image=given, mask_image=Image.new("L", (32, 32), 128), seed=0)
    assert (np.asarray(repainted) != np.asarray(given)).mean() > 0.9


def test_inpainting_is_held_to_the_picture_at_every_level(
    eps: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = np.zeros((32, 32), dtype=np.uint8)
    where[:, 16:] = 255
    given = given_to(eps, monkeypatch)
    steps: list[Step] = []
    eps.generate(
        "a", image=picture(), mask_image=Image.fromarray(where), seed=2, sampler="ddim", callback=steps.append
    )
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(2))[None]
    clean = eps.encode(picture())
    for both, step in zip(given, steps, strict=True):
        x = both[:1]
        noised = eps.scheduler.add_noise(clean, noise, step.level.t)
        assert torch.allclose(x[..., :4], noised[..., :4], atol=1e-5)
        assert not torch.allclose(x[..., 4:], noised[..., 4:], atol=1e-2) or step.index == 0
    assert torch.equal(steps[-1].x[..., :4], clean[..., :4])


def test_a_network_for_inpainting_reads_mask_and_masked_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    network = shared(INPAINT)
    given = given_to(network, monkeypatch)
    where = np.zeros((32, 32), dtype=np.uint8)
    where[:, 16:] = 255
    network.generate(["a", "b"], image=picture(), mask_image=Image.fromarray(where), seed=2, sampler="ddim")
    grey = np.asarray(picture()).copy()
    assert given[0].shape == (4, 9, 8, 8)
    assert torch.equal(given[0][:, 4, :, :4], torch.zeros(4, 8, 4))
    assert torch.equal(given[0][:, 4, :, 4:], torch.ones(4, 8, 4))
    pixels = torch.from_numpy(grey).permute(2, 0, 1)[None] / 127.5 - 1
    pixels[..., 16:] = 0
    assert torch.allclose(given[0][:1, 5:], network.encode(pixels), atol=1e-5)
    with pytest.raises(InputError, match="give image and mask_image"):
        network.generate("a")


# Sizes


def test_the_size_is_the_models_the_arguments_or_the_images(flow: DiffusionModel) -> None:
    def size(**arguments: Any) -> tuple[int, int]:
        return flow.generate("a", seed=0, num_inference_steps=1, **arguments)[0].size

    assert size() == (32, 32)
    assert size(width=48) == (48, 32)
    assert size(height=16, width=24) == (24, 16)
    assert size(image=picture(48, 40)) == (48, 40)
    assert size(image=picture(47, 33)) == (44, 32)  # the multiples of 4 below
    assert size(image=picture(47, 33), width=64) == (64, 32)
    assert size(image=picture(3, 200)) == (4, 200)
    width, height = size(image=picture(400, 200))  # far too large: the same shape with the model's area
    assert (width, height) == (44, 20)
    assert size(image=picture(400, 200), width=100, height=64) == (100, 64)


def test_a_picture_of_another_size_is_fitted_not_stretched(flow: DiffusionModel) -> None:
    wide = Image.new("RGB", (96, 32), "white")
    wide.paste("black", (32, 0, 64, 32))
    corner = Image.new("L", (96, 32))
    corner.paste(255, (32, 0, 36, 4))
    (result,) = flow.generate("a", image=wide, mask_image=corner, width=32, height=32, seed=0)
    result.paste("black", (0, 0, 4, 4))
    assert result.getextrema() == ((0, 0), (0, 0), (0, 0))


# Callbacks


def test_a_callback_reads_every_step_and_stops(flow: DiffusionModel) -> None:
    steps: list[Step] = []
    flow.generate("a", seed=0, num_inference_steps=6, callback=steps.append)
    assert [(step.index, step.total) for step in steps] == [(i, 6) for i in range(6)]
    assert all(step.x.shape == step.x0.shape == (1, 4, 8, 8) for step in steps)
    assert steps[0].level.t == 1000
    levels = [step.level.sigma for step in steps]
    assert levels == sorted(levels, reverse=True)

    seen: list[Step] = []

    def stop(step: Step) -> bool:
        seen.append(step)
        return step.index == 2

    (stopped,) = flow.generate("a", seed=0, num_inference_steps=6, callback=stop)
    assert len(seen) == 3
    assert stopped.tobytes() == flow.decode(seen[-1].x0)[0].tobytes()
    errors = [2**32]  # returning something true that is not True goes on
    flow.generate("a", seed=0, num_inference_steps=6, callback=lambda step: errors.append(step.index))
    assert errors == [2**32, 0, 1, 2, 3, 4, 5]


# Number formats and damaged weights


def test_no_float64_reaches_a_network_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in SCHEDULES.values():
        network = shared(config)
        found: set[torch.dtype] = set()

        def spy(part: Any, name: str, found: set[torch.dtype] = found) -> None:
            inner = getattr(part, name)

            def noting(*args: Any) -> Any:
                found.update(a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point())
                return inner(*args)

            monkeypatch.setattr(part, name, noting)

        spy(network.unet, "predict")
        spy(network.vae, "decode")
        spy(network.vae, "encode")
        for sampler in SAMPLERS:
            network.generate(
                "a", seed=0, sampler=sampler, num_inference_steps=2, image=picture(), mask_image=mask()
            )
        assert found == {torch.float32}


PARTS: dict[str, tuple[Callable[[DiffusionModel], Tensor], str, dict[str, Any]]] = {
    "unet": (lambda m: m.unet.conv_in.weight, "the U-Net gave NaN or infinity at step 1 of 4", {}),
    "decoder": (lambda m: m.vae.decoder.conv_in.weight, "the autoencoder's decoder gave NaN", {}),
    "encoder": (
        lambda m: m.vae.encoder.conv_in.weight,
        "the autoencoder's encoder gave NaN",
        {"image": picture()},
    ),
    "text": (lambda m: m.text_encoder.encoders[0].final_layer_norm.weight, "the text encoder gave NaN", {}),
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", PARTS)
def test_poisoned_weights_are_an_error_that_names_the_part(part: str, value: float) -> None:
    network = model()
    weight, message, arguments = PARTS[part]
    with torch.no_grad():
        weight(network).flatten()[0] = value
    with pytest.raises(InputError, match=message):
        network.generate("a", seed=0, **arguments)
    assert pipeline.NonFinite.__mro__[1] is SameError


def test_a_16_bit_nan_is_computed_again_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    network = model().to(torch.bfloat16)
    predict = UNet.predict

    def overflowing(unet: UNet, x: Tensor, *args: Any) -> Tensor:
        return predict(unet, x, *args) * (math.inf if x.dtype == torch.bfloat16 else 1)

    monkeypatch.setattr(UNet, "predict", overflowing)
    with pytest.warns(UserWarning, match="computing again in float32"):
        (retried,) = network.generate("a", seed=0)
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}
    monkeypatch.setattr(UNet, "predict", predict)
    (expected,) = network.widened().generate("a", seed=0)
    assert retried.tobytes() == expected.tobytes()

    with torch.no_grad():
        network.unet.conv_in.weight.flatten()[0] = math.nan
    with pytest.raises(InputError, match="the U-Net"):
        network.generate("a", seed=0)
    assert network.unet.conv_in.weight.dtype == torch.bfloat16


def test_bfloat16_gives_about_the_picture_of_float32() -> None:
    network = model()
    exact = array(network.generate("a", seed=0))
    rounded = array(network.to(torch.bfloat16).generate("a", seed=0))
    assert 0 < np.abs(exact - rounded).mean() < 10


@pytest.mark.parametrize(
    "how", [lambda m: m.to(torch.float16), lambda m: m.to("cpu", torch.float16), lambda m: m.half()]
)
def test_float16_on_a_cpu_is_a_note_and_a_picture(how: Callable[[DiffusionModel], DiffusionModel]) -> None:
    network = how(model())
    pictures = []
    for _ in range(2):
        with pytest.warns(UserWarning, match="float16 is not a format to compute in on a CPU") as notes:
            pictures += network.generate("a", seed=0)
        assert len(notes) == 1
        assert {p.dtype for p in network.parameters()} == {torch.float16}
    assert (
        pictures[0].tobytes() == pictures[1].tobytes() == network.widened().generate("a", seed=0)[0].tobytes()
    )
