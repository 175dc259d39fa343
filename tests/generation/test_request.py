"""The request: defaults, checks, and its JSON, which is the command's options and a PNG's settings."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from stable_diffusion import Guidance, InputError, SamplerConfig
from stable_diffusion.cli.generate import Options
from stable_diffusion.config import ModelConfig, documented
from stable_diffusion.generation.given import split_file
from stable_diffusion.generation.request import FIELDS, REQUIRED, Request, parse
from stable_diffusion.generation.strangers import FILES, LIMITS, check_stranger, named_files
from tests.tiny import KL, TINY, UNCONDITIONAL

CONFIG = replace(TINY, vae=KL)


def picture(path: Path, width: int = 32, height: int = 32) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def test_a_request_is_the_models_defaults_and_what_is_given() -> None:
    request = Request.of(CONFIG, prompt="a fox", seed=3)
    assert (request.prompt, request.negative_prompt, request.seed) == (("a fox",), ("",), 3)
    assert (request.num_inference_steps, request.guidance) == (CONFIG.num_inference_steps, CONFIG.guidance)
    assert request.sampler_config == CONFIG.sampler
    assert (request.width, request.height, request.model) == (32, 32, "tiny")
    other = Request.of(
        CONFIG, prompt="a", guidance_scale=Guidance(scale=2.0, rescale=0.5), sampler="DPM++ 2M"
    )
    assert (other.guidance_scale, other.guidance_rescale) == (2.0, 0.5)
    # Not the spacing of the model's own sampler.
    assert other.sampler_config == SamplerConfig(name="DPM++ 2M")
    assert Request.of(CONFIG, prompt="a", guidance_scale=0, seed=0).guidance_scale == 0.0
    assert Request.of(CONFIG, prompt="a", width=None, sampler=None).width == 32


def test_it_is_frozen() -> None:
    request = Request.of(CONFIG, prompt="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.seed = 3  # type: ignore[misc]


def test_every_picture_has_its_own_request() -> None:
    request = Request.of(
        CONFIG, prompt=["a", "b"], negative_prompt=["x", "y"], num_images_per_prompt=2, seed=2**63 - 2
    )
    assert request.prompts == ("a", "a", "b", "b")
    assert request.negative_prompts == ("x", "x", "y", "y")
    assert request.seeds == (2**63 - 2, 2**63 - 1, 0, 1)
    third = request.picture(2)
    assert (third.prompts, third.negative_prompts, third.seeds) == (("b",), ("y",), (0,))
    assert third == Request.of(CONFIG, prompt="b", negative_prompt="y", seed=0)


def test_json_and_back(tmp_path: Path) -> None:
    image = picture(tmp_path / "image.png")
    mask = picture(tmp_path / "mask.png")
    for fields in (
        {},
        {"prompt": ["a", "b"], "negative_prompt": ["", "x"], "num_images_per_prompt": 3},
        {"image": image, "mask_image": str(mask), "strength": 1},
        {"lora": {"style": 0.5, "other": -1}, "embedding": ("a.pt",), "vae": "taesd", "ema": True},
        {"sampler": "ddim", "spacing": "karras", "eta": 0.25, "guidance_interval": (0.25, 0.75)},
    ):
        request = Request.of(CONFIG, **{"prompt": "a", "seed": 1, **fields})
        text = json.dumps(request.to_dict())
        assert Request.from_dict(json.loads(text)) == request
        assert json.loads(text)["seed"] == 1


def test_what_says_nothing_is_left_out(tmp_path: Path) -> None:
    plain = Request.of(CONFIG, prompt="a", seed=0).to_dict()
    assert list(plain) == REQUIRED
    assert plain["prompt"] == "a" and plain["negative_prompt"] == ""
    image = Request.of(CONFIG, prompt="a", image=picture(tmp_path / "a.png")).to_dict()
    assert set(image) - set(plain) == {"image", "strength"}
    assert image["strength"] == 0.8
    in_memory = Request.of(
        CONFIG, prompt="a", image=Image.new("RGB", (32, 32)), latents=torch.zeros(1, 4, 8, 8)
    )
    assert set(in_memory.to_dict()) - set(plain) == {"strength"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"promt": "a"}, "unknown setting 'promt': did you mean 'prompt'"),
        ({"latents": []}, "unknown setting 'latents'"),
        ({"seed": "1"}, "seed must be of type int, got '1'"),
        ({"seed": True}, "seed must be of type int, got True"),
        ({"prompt": ["a", 3]}, "prompt must be of type str, got 3"),
        ({"image": 3}, "image must be of type str, got 3"),
        ({"variance": "huge"}, "variance"),
        ({"lora": ["a.pt:x"]}, "lora must be NAME or NAME:WEIGHT such as a.pt:0.8, got 'x'"),
        ({"lora": {"a": "x"}}, "lora must be NAME or NAME:WEIGHT such as a:0.8, got 'x'"),
        ({"lora": {"a": math.nan}}, "the weight of the LoRA 'a' must be a finite number, got nan"),
        ({"lora": 3}, "lora must give the weight of each name, got 3"),
        ({"guidance_interval": [0.1]}, "guidance_interval"),
    ],
)
def test_json_that_cannot_be_read(data: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(data)


@pytest.mark.parametrize("data", [[], None, 3, "x"])
def test_a_request_is_an_object(data: Any) -> None:
    with pytest.raises(InputError, match="a request must be an object of settings"):
        Request.from_dict(data)


@pytest.mark.parametrize("field", ["guidance_scale", "strength", "eta", "lora"])
def test_numbers_without_bounds_are_refused(field: str) -> None:
    value: Any = {"a": 10**400} if field == "lora" else 10**400
    with pytest.raises(InputError):
        Request.of(CONFIG, prompt="a", **{field: value})
    with pytest.raises(InputError):
        parse({field: value})


@pytest.mark.parametrize("name", FIELDS)
def test_whatever_a_field_is_given_is_a_sentence_or_a_request(name: str) -> None:
    nested: Any = "x"
    for _ in range(200):
        nested = [nested]
    hostile: list[Any] = [
        None,
        True,
        -1,
        0,
        10**30,
        10**400,
        1e308,
        math.nan,
        -math.inf,
        "",
        "a",
        "\0",
        "x" * 9999,
    ]
    hostile += [[], {}, nested, ["a", "b"], [1, 2], [None, None], [[0, 1], [0, 1]], [math.nan, 0.5], "\udcff"]
    hostile += [{"a": "b"}, {"a": None}, {"a": math.nan}, {"": 1}, {1: 2}, b"x", object(), 2**31, 2**63]
    plain = Request.of(CONFIG, prompt="a").to_dict()
    for value in hostile:
        for read in (
            lambda: parse({name: value}),  # noqa: B023 # called at once
            lambda: Request.from_dict(plain | {name: value}),  # noqa: B023
            lambda: Request.of(CONFIG, **{"prompt": "a", name: value}).check(CONFIG, {"model": "tiny"}),  # noqa: B023
        ):
            try:
                read()
            except InputError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(
    "field", ["prompt", "width", "num_inference_steps", "seed", "strength", "lora", "image"]
)
def test_what_cannot_be_shown_is_refused_all_the_same(field: str) -> None:
    """Python writes out no number of thousands of digits, and no list that holds itself a thousand times."""
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    for value in (10**5000, deep, [["x" * 5000]] * 5000):
        with pytest.raises(InputError) as caught:
            Request.of(CONFIG, **{"prompt": "a", field: value})
        assert len(str(caught.value)) < 300


def test_numbers_of_numpy_are_numbers() -> None:
    request = Request.of(CONFIG, prompt="a", seed=np.int64(3), guidance_scale=np.float32(2))
    assert (request.seed, request.guidance_scale) == (3, 2.0)
    assert json.loads(json.dumps(request.to_dict()))["seed"] == 3


@pytest.mark.parametrize("name", LIMITS)
def test_a_stranger_may_ask_for_less_than_the_user_and_nobody_for_what_no_memory_holds(name: str) -> None:
    most = LIMITS[name]
    check_stranger({name: most})
    with pytest.raises(InputError, match=f"{name} may be at most {most}, got {most + 1}"):
        check_stranger({name: most + 1})
    assert getattr(Request.of(CONFIG, **{"prompt": "a", name: most + 1}), name) == most + 1
    with pytest.raises(InputError, match=f"{name} must be from 1 to .*, got 1000000"):
        Request.of(CONFIG, **{"prompt": "a", name: 1000000})


def test_prompts_of_a_stranger_are_pictures() -> None:
    with pytest.raises(InputError, match="num_images_per_prompt may be at most 16, got 18"):
        check_stranger({"prompt": ("a",) * 9, "num_images_per_prompt": 2})
    check_stranger({"prompt": ("a" * 6_000,), "negative_prompt": ("b" * 4_000,)})
    with pytest.raises(InputError, match="the prompts may have at most 10,000 letters, got 10,001"):
        check_stranger({"prompt": ("a" * 6_001,), "negative_prompt": ("b" * 4_000,)})


def test_every_field_that_names_files_is_known_as_one() -> None:
    """A new field that loads something has to be one that a stranger's settings cannot choose in silence."""
    assert set(FILES) == {"model", "vae", "embedding", "lora", "image", "mask_image"} | set(FILES) & {
        "text_encoder"
    }
    fields = {
        "model": "m",
        "vae": None,
        "lora": {"l": 1.0},
        "embedding": ("e", "f:g"),
        "image": "i",
        "seed": 3,
    }
    assert list(named_files(fields)) == [
        ("model", "m"),
        ("embedding", "e"),
        ("embedding", "f:g"),
        ("lora", "l"),
        ("image", "i"),
    ]


def test_json_must_be_whole() -> None:
    with pytest.raises(InputError, match=r"seed, .* not given"):
        Request.from_dict({"prompt": "a"})


def test_a_picture_brings_no_path_of_its_own(tmp_path: Path) -> None:
    """What a PNG's text says is no file that a request was made from."""
    chunks = PngInfo()
    chunks.add_text("path", "/etc/hostname")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png", pnginfo=chunks)
    with Image.open(tmp_path / "a.png") as image:
        request = Request.of(CONFIG, prompt="a", image=image)
    assert "image" not in request.to_dict()


def test_a_request_keeps_its_own_weights() -> None:
    weights = {"a": 0.5}
    request = Request.of(CONFIG, prompt="a", lora=weights)
    weights["a"] = 3.0
    assert request.lora == {"a": 0.5}
    assert pickle.loads(pickle.dumps(request)) == request


def test_the_weights_of_loras_as_older_pictures_have_them() -> None:
    assert parse({"lora": ["a.pt", "dir/b.pt:0.5", "c:-1", "a.pt:0.5"]}) == {
        "lora": {"a.pt": 1.5, "dir/b.pt": 0.5, "c": -1.0}
    }


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (CONFIG, {"width": 50}, "multiple of 4, got 50; nearest are 48 and 52"),
        (UNCONDITIONAL, {}, "no text encoder"),
        (replace(CONFIG, unet=replace(CONFIG.unet, in_channels=9)), {}, "give image and mask_image"),
        (CONFIG, {"latents": torch.zeros(2, 4, 8, 8)}, "latents must be a tensor of the shape"),
        (CONFIG, {"latents": np.zeros((1, 4, 8, 8))}, "latents must be a tensor of the shape"),
        (CONFIG, {"latents": torch.zeros(1, 4, 8, 8) * 1j}, "latents must be .*, got complex numbers"),
        (
            CONFIG,
            {"latents": torch.zeros(1, 4, 8, 8, device="meta")},
            "latents must be .*, got the meta device",
        ),
        (CONFIG, {"image": Image.new("RGB", (0, 8))}, "image must have pixels, got 0x8 of them"),
        (
            CONFIG,
            {"image": Image.new("RGB", (64, 64)), "mask_image": Image.new("L", (0, 0))},
            "mask_image must have pixels, got 0x0 of them",
        ),
        (CONFIG, {"colour": "red"}, "unknown setting 'colour'"),
        (CONFIG, {"steps": 4}, "unknown setting 'steps': here it is called 'num_inference_steps'"),
        (CONFIG, {"lora": {"a": "x"}}, "lora must be NAME or NAME:WEIGHT such as a:0.8, got 'x'"),
        (CONFIG, {"lora": "x.safetensors"}, "lora must give the weight of each name, got 'x.safetensors'"),
        (CONFIG, {"guidance_interval": (0.2,)}, "guidance_interval must be of type"),
        (CONFIG, {"guidance_interval": 0.5}, "guidance_interval must be of type"),
        (CONFIG, {"guidance_interval": (0.8, 0.2)}, "guidance_interval must be"),
        (CONFIG, {"guidance_rescale": 2.0}, "guidance_rescale must be"),
        (CONFIG, {"variance": "banana"}, "unknown variance 'banana'"),
        (CONFIG, {"spacing": 3}, "spacing must be of type str, got 3"),
        (CONFIG, {"eta": 2}, "eta must be from 0 to 1, got 2"),
        (CONFIG, {"ema": "no"}, "ema must be of type bool, got 'no'"),
        (CONFIG, {"embedding": "ab"}, "embedding must be of type tuple, got 'ab'"),
        (CONFIG, {"vae": "taesd"}, "vae belongs to loading, and this model has None: load one with 'taesd'"),
        (CONFIG, {"model": "other"}, "model belongs to loading, and this model has 'tiny'"),
    ],
)
def test_what_a_model_cannot_make(config: ModelConfig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Request.of(config, prompt="a", **fields).check(config, {"model": config.name})


def test_the_commands_options_are_the_fields() -> None:
    """One schema: a new field is an option at once, with its sentence as help."""
    options = {described.name for described in dataclasses.fields(Options)}
    assert options == FIELDS.keys() - {"prompt", "latents"}
    assert documented(Request).keys() == FIELDS.keys()
    assert all(documented(Request).values())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("style.safetensors", ("style.safetensors", None)),
        ("style.safetensors:0.8", ("style.safetensors", "0.8")),
        (r"C:\loras\style.safetensors", (r"C:\loras\style.safetensors", None)),
        (r"C:\loras\style.safetensors:0.8", (r"C:\loras\style.safetensors", "0.8")),
        ("d:/loras/style.safetensors:0.8", ("d:/loras/style.safetensors", "0.8")),
        (r"\\server\share\style.safetensors:0.8", (r"\\server\share\style.safetensors", "0.8")),
        (r"C:\embeddings\cat.pt:<cat/dog>", (r"C:\embeddings\cat.pt", "<cat/dog>")),
        ("C:0.8", ("C", "0.8")),
    ],
)
def test_a_drive_is_part_of_a_file_s_name(text: str, expected: tuple[str, str | None]) -> None:
    assert split_file(text) == expected
    if expected[1] in (None, "0.8"):
        assert parse({"lora": [text]}) == {"lora": {expected[0]: float(expected[1] or 1)}}
