"""Laws: every field of every setting takes a value that works or refuses it in one sentence, wherever it comes from."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stable_diffusion import config as configs
from stable_diffusion.checkpoints.diffusers import schedulers
from stable_diffusion.checkpoints.diffusers import settings as theirs
from stable_diffusion.config import (
    MINILM,
    PRESETS,
    Guidance,
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from stable_diffusion.data.sources import SOURCES
from stable_diffusion.diffusion.samplers import sampling_levels
from stable_diffusion.diffusion.schedule import Schedule
from stable_diffusion.errors import InputError
from stable_diffusion.fields import Settings, from_dict, to_dict
from stable_diffusion.files import read_json
from stable_diffusion.nn.text import TextEncoder
from stable_diffusion.nn.unet import UNet
from stable_diffusion.nn.vae import autoencoder
from stable_diffusion.training.recipe import read_recipe
from stable_diffusion.training.stage import OptimizerSettings, StageSettings
from stable_diffusion.training.stages import STAGES
from tests.tiny import KL, TINY, UNCONDITIONAL, VQ, tiny_model

DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]

NUMBERS = [0, -1, 1, 2, 3, 5, 7, 9, 130, 10**9, 2**63, 10**30, 10**400, -(10**400)]
NUMBERS += [0.0, -0.0, 0.5, 1.0, 1.5, -0.5, 1e-300, 1e9, 1e300, 1e308, math.nan, math.inf, -math.inf]  # type: ignore[list-item]
OTHERS = [
    True,
    False,
    "",
    "x",
    "7",
    "nan",
    "a/../b",
    "\0",
    "ü" * 5000,
    "eulre",
    "kl",
    "mini",
    {},
    {"a": 1},
    {"": {}},
]
LISTS: list[Any] = [
    [],
    [[]],
    [1],
    [0],
    [-1],
    [7],
    [True],
    [True, False],
    ["x"],
    [8, 16],
    [7, 9],
    [64, 32],
    [8.5, 9.5],
]
LISTS += [
    [10**9, 10**9],
    [10**30],
    [2] * 50,
    [math.nan, 1.0],
    [0.9, 0.1],
    [0.1, 0.9],
    ["minilm"],
    [{}],
    ["a", "b"],
]
STORED: list[Any] = [*NUMBERS, *OTHERS, *LISTS, None, DEEP]
"""What JSON can hold."""
GIVEN: list[Any] = [
    *STORED,
    10**5000,
    object(),
    int,
    torch.ones(2),
    torch.tensor(3),
    np.float64(2),
    np.int64(2),
]
GIVEN += [b"x", Path("x"), (1, 2), {1, 2}, range(3), 1j, TINY, TINY.vae, UNCONDITIONAL.unet]
"""What Python can."""


OTHER_WORDS = {
    **{"patch_size": ("factor",), "block_out_channels": ("factor",), "name": ("sampler",)},
    **{"hidden_size": ("pooled_projection_dim",), "kind": ("name",)},
}
"""What else an error may speak of: the setting that another one no longer fits."""


def refused(error: InputError, name: str) -> None:
    """One sentence, which names the setting and which a terminal shows in a few lines."""
    text = str(error)
    assert any(word in text for word in (name, *OTHER_WORDS.get(name, ()))), (name, text)
    assert len(text) < 600 and "\n" not in text and "\0" not in text
    assert not re.search(r"Exception raised|Traceback|\.cpp|frame #", text), text


@functools.cache
@torch.no_grad()
def build(vae_config: Any, unet_config: UNetConfig, text_configs: tuple[TextEncoderConfig, ...]) -> None:
    """Builds networks and lets a small picture and a prompt walk through them."""
    vae, unet = autoencoder(vae_config), UNet(unet_config)
    read = [
        TextEncoder(config)(torch.zeros(1, config.context_length, dtype=torch.long))
        for config in text_configs
    ]
    side, latents = 2 * vae_config.factor, vae_config.latent_channels
    if side <= 64:
        assert vae.encode(torch.zeros(1, 3, side, side)).shape == (1, latents, 2, 2)
        assert vae.decode(torch.zeros(1, latents, 2, 2)).shape == (1, 3, side, side)
    width, pooled = unet_config.cross_attention_dim, unet_config.pooled_projection_dim
    tokens = None if width is None else torch.zeros(1, sum(x.shape[1] for x in read), width)
    labels = None if pooled is None else torch.zeros(1, pooled)
    if unet_config.num_class_embeds is not None:
        labels = torch.zeros(1, dtype=torch.long)
    sample = torch.zeros(1, unet_config.in_channels, 4, 4)
    assert unet(sample, torch.zeros(1), tokens, None, labels).shape == (1, latents, 4, 4)


@functools.cache
def walk(schedule: ScheduleConfig, sampler: SamplerConfig, steps: int) -> None:
    """The levels of a walk are numbers, or it is said why there are none."""
    try:
        levels = sampling_levels(sampler, Schedule(schedule), steps)
    except InputError as error:  # a spacing or a number of steps that the schedule cannot have
        refused(error, "")
    else:
        assert all(math.isfinite(level.alpha) and math.isfinite(level.sigma) for level in levels)


def paths(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in plain data."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from paths(value, (*path, key))


def changed(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value in that place."""
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = value if len(path) == 1 else changed(data[path[0]], path[1:], value)
    return copy


def named(path: tuple[Any, ...]) -> str:
    return next(key for key in reversed(path) if isinstance(key, str))


SMALL = replace(TINY, text_encoders=(replace(TINY.text_encoders[0], vocab_size=100),))
BERT = replace(
    SMALL,
    text_encoders=(replace(MINILM, num_hidden_layers=1, vocab_size=100),),
    unet=replace(TINY.unet, pooled_projection_dim=384),
    schedule=ScheduleConfig(),
    sampler=SamplerConfig(name="dpmpp_2m"),
)
BASES: dict[str, tuple[ModelConfig, tuple[str, ...]]] = {
    "tiny": (SMALL, tuple(to_dict(SMALL))),
    "kl": (replace(SMALL, vae=KL), ("vae",)),
    "vq": (replace(SMALL, vae=VQ), ("vae",)),
    "bert": (BERT, ("text_encoders", "schedule", "sampler")),
    "unconditional": (UNCONDITIONAL, ("unet", "text_encoders")),
}
"""Models, and the parts of each that are changed."""


def some(count: int, place: object) -> list[Any]:
    """So many of the hostile values, others at each place."""
    return random.Random(str(place)).sample(STORED, min(count, len(STORED)))


EXTENT = pytest.mark.parametrize("count", [6, pytest.param(1000, marks=pytest.mark.slow)])
"""Values for each place: some in the fast tests, all in the slow ones."""


@EXTENT
@pytest.mark.parametrize("base", BASES)
def test_a_configuration_builds_or_is_refused(base: str, count: int) -> None:
    """Every place of a model's JSON with hostile values."""
    config, parts = BASES[base]
    data = json.loads(json.dumps(to_dict(config)))
    counts = {True: 0, False: 0}
    for path in (path for path in paths(data) if path[0] in parts):
        for value in some(count, path):
            try:
                config = from_dict(ModelConfig, changed(data, path, value))
            except InputError as error:
                # Of a part that is none, or of none of the kinds, the fault has another name.
                refused(error, named(path) if not isinstance(value, (dict, list)) else "")
                counts[False] += 1
                continue
            build(config.vae, config.unet, config.text_encoders)
            walk(config.schedule, config.sampler, min(config.num_inference_steps, 50))
            counts[True] += 1
            assert from_dict(ModelConfig, to_dict(config)) == config
    assert counts[True] > 1 and counts[False] > 20, counts


CLASSES = {
    *(part for part in vars(configs).values() if isinstance(part, type) and issubclass(part, Settings)),
    *(OptimizerSettings, *(row.settings for row in STAGES.values()), *SOURCES.values()),
} - {Settings}


@pytest.mark.parametrize("cls", sorted(CLASSES, key=lambda cls: cls.__name__))
def test_python_gets_the_same_checks(cls: Any) -> None:
    """Every field of every class with what Python can hold: kept as the type that is written there, or refused."""
    for field in dataclasses.fields(cls):
        for value in GIVEN:
            try:
                made = cls(**{field.name: value})
            except InputError as error:
                refused(error, field.name if not isinstance(value, (dict, list, tuple)) else "")
                continue
            assert json.loads(json.dumps(to_dict(made), allow_nan=False)) is not None
            assert replace(made) == made == from_dict(cls, to_dict(made))


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return json.dumps(value)


@EXTENT
def test_a_recipe_is_read_or_refused(tmp_path: Path, count: int) -> None:
    """Every setting of every stage and of every source, the model's, and the seed."""
    path = tmp_path / "mine.toml"
    places = [
        ("[[stage]]\n" + f'kind = "{kind}"\n', field)
        for kind in STAGES
        for field in _fields(STAGES[kind].settings)
    ]
    places += [
        ('[[stage]]\nkind = "decoder"\n[stage.discriminator]\n', field)
        for field in _fields(OptimizerSettings)
    ]
    places += [
        (f'[data]\nsource = "{name}"\n', field) for name, cls in SOURCES.items() for field in _fields(cls)
    ]
    places += [("", "seed"), ("", "data"), ("", "model"), ("", "stage"), ("[data]\n", "source")]
    places += [("[model]\n", key) for key in ("base", "text_encoders", "training", "sampler", "sample_size")]
    for table, field in places:
        for value in some(count, (table, field)):
            if value is None or value is DEEP:  # which TOML cannot say
                continue
            path.write_text(f"{table}{field} = {toml(value)}\n", encoding="utf-8")
            try:
                recipe = read_recipe(path)
            except InputError as error:
                refused(error, "")
                continue
            for stage in recipe.stages:
                assert math.isfinite(stage.rate(0, 100)) and re.fullmatch(r"[\w-]+", stage.name)
                assert (
                    1 <= stage.gradient_accumulation_steps <= stage.batch_size and 0 < stage.epochs < math.inf
                )


def _fields(cls: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.name != "kind"]


SD = replace(TINY, vae=KL, unet=replace(TINY.unet, pooled_projection_dim=None), schedule=ScheduleConfig())
FORMS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]] = {
    "unet": (theirs.unet_settings(SD), theirs.unet_config),
    "vae": (theirs.vae_settings(SD), theirs.autoencoder_config),
    "text_encoder": (theirs.text_settings(SD.text_encoders[0]), theirs.text_encoder_config),
    "schedule": (schedulers.scheduler_settings(SD), schedulers.schedule_config),
    "sampler": (schedulers.scheduler_settings(SD), schedulers.sampler_config),
    "taesd": (theirs.vae_settings(TINY), theirs.tiny_config),
}


@pytest.mark.parametrize("form", FORMS)
def test_diffusers_settings_are_read_or_refused(form: str) -> None:
    """Every setting of every JSON file of a diffusers folder."""
    data, read = FORMS[form]
    read(json.loads(json.dumps(data)))
    for path in paths(json.loads(json.dumps(data))):
        for value in (value for value in STORED if value is not DEEP):  # which read_json refuses
            try:
                config = read(changed(data, path, value))
            except InputError as error:
                refused(error, "")
                continue
            assert isinstance(config, Settings)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["schedule", "sampler", "guidance", "num_inference_steps", "sample_size"])
def test_what_is_accepted_generates_or_says_why_not(part: str) -> None:
    """Two steps of a real model, or one sentence."""
    for base in (TINY, SD):
        data = json.loads(json.dumps(to_dict(base)))
        for path in (path for path in paths(data) if path[0] == part):
            for value in STORED:
                try:
                    config = from_dict(ModelConfig, changed(data, path, value))
                    size = min(config.sample_size, 64) // 8 * 8 or 8
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", UserWarning)
                        model = tiny_model(config)
                        given = {"num_inference_steps": min(config.num_inference_steps, 3)}
                        model.generate("a fox", seed=0, width=size, height=size, **given)
                except InputError as error:
                    refused(error, "")


def test_a_sampler_that_does_not_exist_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('[model.sampler]\nname = "eulre"\n')
    with pytest.raises(InputError, match=r"sampler: unknown sampler 'eulre': did you mean 'euler'\?"):
        read_recipe(tmp_path / "mine.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_size": 130}, "sample_size must be a multiple of the autoencoder's factor 4, got 130"),
        (
            {"unet": {"norm_num_groups": 7}},
            "unet: norm_num_groups must divide block_out_channels, got 7 for 32",
        ),
        (
            {"unet": {"num_attention_heads": [2, 5]}},
            "num_attention_heads must divide its level's .* got 5 for 64",
        ),
        ({"unet": {"attention_levels": [True]}}, "must be lists of one length.*attention_levels 1"),
        ({"unet": {"layers_per_block": 10**9}}, "layers_per_block must be from 1 to 32, got 1000000000"),
        ({"unet": {"block_out_channels": []}}, "block_out_channels must be a list of 1 to 8 items"),
        ({"unet": {"in_channels": 5}}, "unet.in_channels must be 4 or 9, to fit"),
        ({"unet": {"pooled_projection_dim": 31}}, "unet.pooled_projection_dim must be None or 32"),
        ({"text_encoders": []}, "unet.pooled_projection_dim must be None,"),
        ({"vae": {"encoder_blocks": [1]}}, "encoder_blocks 1"),
        ({"vae": {"decoder_block_out_channels": [8, 16, 32]}}, "decoder_blocks 2"),
        ({"vae": {"encoder_pooling": 2}}, "makes 4 pixels a side of one latent, and the encoder reads 8"),
        (
            {"vae": {"decoder_block_out_channels": [8, 16, 32], "decoder_blocks": [1, 1, 1]}},
            "makes 8 pixels a side of one latent, and the encoder reads 4",
        ),
        ({"vae": {"in_channels": 1}}, "vae.in_channels must be 3"),
        ({"schedule": {"prediction_type": "epsilon"}}, "prediction_type must be another than 'epsilon'"),
        ({"sampler": {"spacing": "karras"}}, "sampler.spacing 'karras' is for the DDPM family: leave it out"),
        ({"vae": {"kind": "vq"}}, "unknown vae kind 'vq': choose one of kl, tiny"),
        ({"guidance": {"scale": math.nan}}, "guidance: scale must be a finite number, got nan"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_dict(ModelConfig, change, base=TINY)


def test_a_vocabulary_that_is_smaller_than_the_tokenizers_is_said() -> None:
    with pytest.raises(InputError, match="needs a vocab_size of 49408, but the text encoder has 100"):
        tiny_model(SMALL)


def test_nesting_is_bounded(tmp_path: Path) -> None:
    """Where a parser takes it, what walks or shows the value must not run out of stack."""
    for depth in (33, 500, 5000, 300_000):
        for opening, closing in (("[", "]"), ('{"a": ', "}")):
            (tmp_path / "config.json").write_text('{"unet": ' + opening * depth + "1" + closing * depth + "}")
            with pytest.raises(InputError) as caught:
                read_json(tmp_path / "config.json")
            refused(caught.value, "config.json")
    (tmp_path / "config.json").write_text('{"unet": {"layers_per_block": ' + "9" * 5000 + "}}")
    with pytest.raises(InputError, match="is not JSON"):
        read_json(tmp_path / "config.json")


def test_a_subclass_keeps_the_range_of_a_field_that_it_gives_another_default() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Mine(StageSettings):
        kind: str = "mine"
        batch_size: int = 8

    with pytest.raises(InputError, match="batch_size must be from 1"):
        Mine(batch_size=0)


def test_presets_and_defaults_hold_their_own_ranges() -> None:
    for config in (*PRESETS.values(), *(row.settings() for row in STAGES.values()), Guidance()):
        assert replace(config) == config
