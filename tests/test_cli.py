"""The command: what it prints, what it writes, and that every input that cannot be used is one sentence."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file

from stable_diffusion import DiffusionModel, InputError, cli
from stable_diffusion.checkpoints import hub
from stable_diffusion.checkpoints.checkpoint import packaged
from stable_diffusion.config import Styles
from stable_diffusion.evaluation import run
from stable_diffusion.generation.request import FIELDS, SHORT
from stable_diffusion.generation.strangers import FILES, LIMITS
from stable_diffusion.nn import tokenizer
from tests.lively import lively
from tests.tiny import KL, STAGES, TINY, shapes, tiny_model

ROOT = Path(__file__).parents[1]
PACKAGED = json.loads((packaged("model") / "config.json").read_text(encoding="utf-8"))
CLIP = tokenizer._clip(packaged("clip-tokenizer"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    styles = Styles(words=("noto style", "3d render"), default="noto style")
    network = lively(tiny_model(replace(TINY, vae=KL, prompts=("a fox",), styles=styles)))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    network.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tokenizer, "_clip", lambda folder: CLIP)  # building it takes longer than drawing


class Result:
    def __init__(self, code: int | str | None, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def paths(self) -> list[Path]:
        return [Path(line) for line in self.out.splitlines()]


@pytest.fixture
def minisd(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object) -> Result:
        code: int | str | None = 0
        with warnings.catch_warnings():
            # Notes in the command; in tests warnings are errors otherwise.
            warnings.simplefilter("default", UserWarning)
            try:
                cli.main([str(argument) for argument in arguments])
            except SystemExit as end:
                code = end.code
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def everything() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def picture(path: str, width: int = 32, height: int = 32, seed: int = 0) -> Path:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return Path(path)


def mask(path: str, width: int = 32, height: int = 32) -> Path:
    values = np.zeros((height, width), dtype=np.uint8)
    values[8:24, 8:24] = 255
    Image.fromarray(values).save(path)
    return Path(path)


def settings(path: Path) -> dict[str, Any]:
    with Image.open(path) as image:
        return dict(json.loads(image.text["minisd"]))  # type: ignore[attr-defined]


# generate


def test_generate_prints_the_path_and_nothing_else(minisd: Any, model: str) -> None:
    result = minisd("generate", "a red circle", "--model", model, "--seed", 3)
    assert result.code == 0
    (path,) = result.paths
    assert path == Path("pictures/a-red-circle-3.png")
    with Image.open(path) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
        assert image.text["parameters"].startswith("a red circle\nSteps: 4, Sampler: Euler,")  # type: ignore[attr-defined]
    assert " a second" in result.err
    assert everything() == ["pictures", "pictures/a-red-circle-3.png"]


def test_nothing_is_overwritten(minisd: Any, model: str) -> None:
    arguments = ("generate", "a", "--model", model, "--seed", 3)
    paths = [minisd(*arguments).paths[0] for _ in range(3)]
    assert [path.name for path in paths] == ["a-3.png", "a-3-2.png", "a-3-3.png"]
    assert len({path.read_bytes() for path in paths}) == 1
    named = [minisd(*arguments, "--output", "out/mine.png").paths[0] for _ in range(2)]
    assert named == [Path("out/mine.png"), Path("out/mine-2.png")]
    assert minisd(*arguments, "--output", "folder").paths == [Path("folder/a-3.png")]


def test_count_and_several_prompts(minisd: Any, model: str) -> None:
    result = minisd("generate", "a", "b", "--count", 2, "--model", model, "--seed", 10)
    assert [path.name for path in result.paths] == ["a-10.png", "a-11.png", "b-12.png", "b-13.png"]
    assert [settings(path)["seed"] for path in result.paths] == [10, 11, 12, 13]
    single = minisd("generate", "b", "--model", model, "--seed", 12, "--output", "single").paths[0]
    assert single.read_bytes() == result.paths[2].read_bytes()


def test_every_option_reaches_the_picture_and_its_settings(minisd: Any, model: str) -> None:
    """Each field by its own name, and by the short one that people type."""
    given = {
        "model": model,
        "negative_prompt": "blurry",
        "prompt_syntax": "a1111",
        "seed": 0,
        "num_inference_steps": 6,
        "guidance_scale": 3.5,
        "guidance_interval": [0.25, 0.75],
        "guidance_rescale": 0.5,
        "sampler": "ddim",
        "spacing": "trailing",
        "eta": 0.25,
        "variance": "large",
        "width": 48,
        "height": 32,
        "image": str(picture("given.png")),
        "mask_image": str(mask("mask.png")),
        "strength": 0.5,
    }
    added = {
        "num_images_per_prompt",
        "prediction_type",
        "variant",
        "ema",
        "vae",
        "text_encoder",
        "lora",
        "embedding",
        "variation_seed",
        "variation_strength",
        "mix_prompt",
        "mix_strength",
        "hires",
        "hires_strength",
    }
    assert given.keys() | added == FIELDS.keys() - {"prompt", "latents"}, (
        "the others: tests/checkpoints, test_generate_command"
    )
    pictures = []
    none: dict[str, str] = {}
    for names in (none, SHORT):
        words: list[object] = []
        for name, value in given.items():
            option = f"--{names.get(name, name).replace('_', '-')}"
            words += [option, *(value if isinstance(value, list) else [value])]
        pictures += minisd("generate", "a", *words, "--device", "cpu").paths
    for path in pictures:
        assert settings(path) == given | {"prompt": "a"}
        with Image.open(path) as image:
            assert image.size == (48, 32)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_seeds_begin_again_after_the_last(minisd: Any, model: str) -> None:
    """As in a request of several pictures."""
    result = minisd("generate", "a", "--count", 2, "--model", model, "--steps", 1, "--seed", 2**63 - 1)
    assert [settings(path)["seed"] for path in result.paths] == [2**63 - 1, 0]
    result = minisd("generate", "a", "--count", 2, "--model", model, "--steps", 1, "--seed", 2**63)
    assert result.code == 2 and result.out == "" and "seed must be" in result.err


def test_files_on_a_drive_are_named_whole(minisd: Any, model: str) -> None:
    for option in ("--lora", "--embedding"):
        result = minisd("generate", "a", "--model", model, option, r"C:\files\cat.safetensors")
        assert result.code == 2 and r"C:\files\cat.safetensors does not exist" in result.err


def test_a_size_is_a_side_or_two(minisd: Any, model: str) -> None:
    sizes = []
    for size in ("16", "24x16"):
        (path,) = minisd("generate", "a", "--model", model, "--steps", 1, "--size", size).paths
        with Image.open(path) as image:
            sizes.append(image.size)
    assert sizes == [(16, 16), (24, 16)]


def test_unmasked_bytes_are_identical(minisd: Any, model: str) -> None:
    given = picture("given.png", 40, 32)
    mask("mask.png", 40, 32)
    (path,) = minisd("generate", "a", "--model", model, "--image", given, "--mask", "mask.png").paths
    with Image.open(path) as image, Image.open(given) as before, Image.open("mask.png") as where:
        outside = np.asarray(where) == 0
        assert np.array_equal(np.asarray(image)[outside], np.asarray(before)[outside])
        assert (np.asarray(image)[~outside] != np.asarray(before)[~outside]).mean() > 0.9


def test_a_mask_drawn_on_a_transparent_layer_is_repainted_where_it_is_drawn(minisd: Any, model: str) -> None:
    given = picture("given.png")
    drawn = Image.new("RGBA", (32, 32))
    drawn.paste("white", (8, 8, 16, 24))
    drawn.save("mask.png")
    result = minisd("generate", "a", "--model", model, "--image", given, "--mask", "mask.png")
    assert "minisd: note: all that is opaque in the mask is white" in result.err
    with Image.open(result.paths[0]) as image, Image.open(given) as before:
        changed = (np.asarray(image) != np.asarray(before)).any(-1)
    assert Image.fromarray(changed).getbbox() == (8, 8, 16, 24)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--negative", "x", "--steps", "3", "--guidance", "0", "--sampler", "euler_a", "--size", "24x32"],
        ["--image", "given.png", "--strength", "0.6"],
        ["--image", "given.png", "--mask", "mask.png", "--strength", "1"],
    ],
    ids=["plain", "options", "image", "mask"],
)
def test_from_makes_a_picture_again_byte_for_byte(options: list[str], minisd: Any, model: str) -> None:
    picture("given.png", 36, 32)
    mask("mask.png", 36, 32)
    (first,) = minisd("generate", 'say "hé" 🦊', "--model", model, *options).paths
    (again,) = minisd("generate", "--from", first).paths
    assert again != first
    assert again.read_bytes() == first.read_bytes()
    (twice,) = minisd("generate", "--from", again).paths
    assert twice.read_bytes() == first.read_bytes()


def test_from_with_other_settings_changes_only_those(minisd: Any, model: str) -> None:
    (first,) = minisd("generate", "a", "--model", model, "--seed", 5, "--steps", 3).paths
    before = settings(first)
    for option, value, key in (
        ("--seed", 6, "seed"),
        ("--steps", 5, "num_inference_steps"),
        ("--guidance", 4.0, "guidance_scale"),
        ("--sampler", "heun", "sampler"),
        ("--negative", "x", "negative_prompt"),
    ):
        (other,) = minisd("generate", "--from", first, option, value).paths
        assert settings(other) == before | {key: value}
        assert Image.open(other).tobytes() != Image.open(first).tobytes()
    (other,) = minisd("generate", "b", "--from", first).paths
    assert settings(other) == before | {"prompt": "b"}
    (other,) = minisd("generate", "--from", first, "--size", "16").paths
    assert settings(other) == before | {"width": 16, "height": 16}
    assert [settings(p)["seed"] for p in minisd("generate", "--from", first, "--count", 3).paths] == [5, 6, 7]


def stranger(**settings: Any) -> str:
    """A picture of somebody else's, with settings of theirs."""
    plain = {"model": None, "prompt": "a", "negative_prompt": "", "seed": 1, "num_inference_steps": 1}
    plain |= {"guidance_scale": 1.0, "guidance_interval": [0.0, 1.0], "guidance_rescale": 0.0}
    plain |= {"sampler": "euler", "spacing": None, "eta": 0.0, "variance": "small", "width": 32, "height": 32}
    chunks = PngInfo()
    chunks.add_text("minisd", json.dumps({**plain, **settings}))
    Image.new("RGB", (8, 8)).save("stranger.png", pnginfo=chunks)
    return "stranger.png"


@pytest.mark.parametrize("name", FILES)
def test_a_picture_fetches_nothing(
    name: str, minisd: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not from the hub, nor from a Windows share, for which a look is a connection."""
    looked: list[str] = []
    stat = os.stat

    def look(path: Any, *args: Any, **kwargs: Any) -> os.stat_result:
        looked.append(str(path))
        return stat(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", look)
    monkeypatch.setattr(hub, "fetch", lambda *_, **__: pytest.fail("it asked the network"))
    given = () if name == "model" else ("--model", model)
    for text in ("owner/name", "https://host/x", "gone.pt", "a" * 5000, "\0", "//host/a", "\\\\host\\a:b"):
        value: Any = {"lora": {text: 1.0}, "embedding": [text]}.get(name, text)
        result = minisd("generate", "--from", stranger(**{name: value}), *given)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert f"stranger.png names the {name} " in result.err and "give --" in result.err
    assert "owner/name" in looked
    assert not any(path.startswith(("//", "\\\\")) for path in looked)
    older = minisd("generate", "--from", stranger(lora=["//host/a:0.5"]), *given)
    assert "names the lora '//host/a:0.5', which is on another machine: give --lora" in older.err


def test_what_a_picture_names_here_is_read_after_a_note(minisd: Any, model: str) -> None:
    picture("given.png")
    mask("mask.png")
    named = stranger(model=model, image="given.png", mask_image="mask.png", strength=0.5)
    result = minisd("generate", "--from", named)
    assert result.code == 0
    lines = result.err.splitlines()
    for name, text in (("model", model), ("image", "given.png"), ("mask_image", "mask.png")):
        assert f"minisd: note: stranger.png names the {name} {text!r}: reading it" in lines
    repeated = minisd(
        "generate", "--from", named, "--model", model, "--image", "given.png", "--mask", "mask.png"
    )
    assert repeated.code == 0 and "names" not in repeated.err
    assert repeated.paths[0].read_bytes() == result.paths[0].read_bytes()
    Path("folder").mkdir()
    said, refused = minisd("generate", "--from", stranger(model="folder")).err.splitlines()
    assert "names the model 'folder': reading it" in said and "is not a model" in refused


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({"num_inference_steps": 151}, ("--steps", 1)),
        ({"width": 2052}, ("--size", 32)),
        ({"height": 4096}, ("--height", 32)),
        ({"num_images_per_prompt": 17}, ("--count", 1)),
        ({"prompt": ["a"] * 9, "num_images_per_prompt": 2}, ("--count", 1, "a")),
    ],
)
def test_a_picture_may_ask_for_so_much_and_the_user_for_more(
    asked: dict[str, Any], options: tuple[object, ...], minisd: Any, model: str
) -> None:
    base = ("generate", "--model", model, "--from", stranger(**asked))
    result = minisd(*base)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert "may be at most" in result.err and "on the command line" in result.err
    assert minisd(*base, *options).code == 0
    if "num_inference_steps" in asked:
        assert minisd(*base, "--steps", 151, "--size", 16).code == 0, "what is typed is the user's"


def test_the_help_says_how_much_a_picture_may_ask_for(minisd: Any) -> None:
    said = " ".join(minisd("generate", "--help").out.split())
    for name in ("width", "height", "num_inference_steps"):
        assert str(LIMITS[name]) in said


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("", "picture-1.png"),
        ("🦊🦊", "picture-1.png"),
        ('a "red" circle; rm -rf $HOME `ls` \\ %PATH%', "a-red-circle-rm-rf-home-ls-path-1.png"),
        ("../../etc/passwd", "etc-passwd-1.png"),
        ("ÄÖÜ 北京", "äöü-北京-1.png"),
        ("two\nlines", "two-lines-1.png"),
        ("-", "picture-1.png"),
        ("word " * 12, "word-" * 12 + "1.png"),
        ("NUL", "_nul-1.png"),
        ("\udcff", "picture-1.png"),  # how a byte that is no text comes in from a command line
    ],
)
def test_any_text_is_a_prompt_and_gives_a_safe_name(prompt: str, name: str, minisd: Any, model: str) -> None:
    result = minisd("generate", prompt, "--model", model, "--steps", 1, "--seed", 1)
    assert result.paths == [Path("pictures") / name]
    assert settings(result.paths[0])["prompt"] == prompt
    (again,) = minisd("generate", "--from", result.paths[0]).paths
    assert again.read_bytes() == result.paths[0].read_bytes()


def test_a_prompt_that_is_too_long_is_a_note(minisd: Any, model: str) -> None:
    result = minisd("generate", "one two three " * 9 + "end", "--model", model, "--steps", 1)
    assert result.code == 0
    notes = [line for line in result.err.splitlines() if line.startswith("minisd: note: ")]
    assert len(notes) == 1
    assert "three end" in notes[0]


# What cannot be used


def test_bad_inputs_are_one_sentence_and_exit_code_2(minisd: Any, model: str) -> None:
    picture("given.png")
    Image.new("L", (32, 32)).save("black.png")
    mask("wide.png", 64, 32)
    Path("text.png").write_text("not a picture")
    Path("cut.png").write_bytes(Path("given.png").read_bytes()[:500])
    Path("folder").mkdir()
    for name, chunk in {
        "damaged.png": "{",
        "list.png": "[]",
        "empty.png": "{}",
        "foreign.png": '{"prompt": "a", "x": 1}',
        "typed.png": '{"prompt": 3, "seed": "a"}',
        "half.png": '{"prompt": "a", "spacing": null, "sampler": "euler"}',
        "odd.png": '{"prompt": "a", "guidance_interval": 3, "guidance_scale": 1}',
    }.items():
        chunks = PngInfo()
        chunks.add_text("minisd", chunk)
        Image.new("RGB", (8, 8)).save(name, pnginfo=chunks)
    hostile: list[dict[str, Any]] = [{"guidance_interval": ["a", "b"]}, {"width": 10**30}, {"eta": math.nan}]
    hostile += [{"prompt": [["a"]]}, {"seed": None}, {"lora": {"a": [1]}}, {"sampler": {}}, {"ema": "yes"}]
    for number, settings in enumerate(hostile):
        Path(stranger(**settings)).rename(f"hostile-{number}.png")
    before = everything()
    failures: list[tuple[Any, ...]] = []
    base: tuple[object, ...] = ("generate", "a", "--model", model)
    for arguments, message in [
        (("generate", "--model", model), 'what shall be generated? Give a prompt in quotes, such as "a fox"'),
        (
            ("generate", "--model", "folder"),
            'what shall be generated? Give a prompt in quotes, such as "a red circle"',
        ),
        (
            ("generate",),
            f'what shall be generated? Give a prompt in quotes, such as "{PACKAGED["prompts"][0]}"',
        ),
        ((*base, "--size", 33), "multiple of 4, got 33; nearest are 32 and 36"),
        ((*base, "--size", "32x"), "WIDTHxHEIGHT"),
        ((*base, "--size", "0"), "width must be"),
        ((*base, "--steps", 0), "--steps must be from 1 to 100000, got 0"),
        ((*base, "--count", 0), "--count must be from 1 to"),
        ((*base, "--count", -2), "--count must be from 1 to"),
        ((*base, "--seed", -1), "seed must be"),
        ((*base, "--seed", 2**64), "seed must be"),
        ((*base, "--guidance", "nan"), "--guidance must be a finite number, got nan"),
        ((*base, "--sampler", "eulr"), "did you mean 'euler'"),
        ((*base, "--strength", 0), "strength must be above 0"),
        ((*base, "--strength", 2), "strength must be above 0"),
        ((*base, "--image", "nowhere.png"), "nowhere.png does not exist"),
        ((*base, "--image", "text.png"), "text.png is not a picture"),
        ((*base, "--image", "cut.png"), "cut.png is damaged or cut off"),
        ((*base, "--image", "folder"), "minisd: folder is not a file: check the path"),
        ((*base, "--mask", "given.png"), "--mask needs the image"),
        ((*base, "--image", "given.png", "--mask", "text.png"), "text.png is not a picture"),
        ((*base, "--image", "given.png", "--mask", "black.png"), "the mask repaints nothing"),
        (
            (*base, "--image", "given.png", "--mask", "wide.png"),
            "the mask has 64x32 pixels and the image 32x32",
        ),
        ((*base, "--output", "picture.jpg"), "picture.jpg"),
        ((*base, "--device", "nonsense"), "no device 'nonsense' here: choose one of cpu"),
        ((*base, "--device", "cpu:x"), "no device 'cpu:x'"),
        (("generate", "a", "--model", "nowhere"), "nowhere does not exist"),
        (("generate", "a", "--model", "given.png"), "is not a model"),
        (("generate", "a", "--model", "folder"), "is not a model"),
        (("generate", "--from", "nowhere.png"), "nowhere.png does not exist"),
        (("generate", "--from", "given.png"), "holds no settings"),
        (("generate", "--from", "damaged.png"), "damaged"),
        (("generate", "--from", "list.png"), "damaged"),
        (("generate", "--from", "empty.png"), "empty.png"),
        (("generate", "--from", "foreign.png", "--model", model), "foreign.png"),
        (("generate", "--from", "typed.png", "--model", model), "typed.png"),
        (("generate", "--from", "half.png", "--model", model), "half.png"),
        (("generate", "--from", "odd.png", "--model", model), "odd.png"),
        *(
            (("generate", "--from", f"hostile-{number}.png", "--model", model), next(iter(settings)))
            for number, settings in enumerate(hostile)
        ),
        (("info", "nowhere"), "nowhere does not exist"),
        (("info", "x" * 5000), "File name too long"),
        (("info", "given.png"), "holds no settings"),
        (("info", "text.png"), "text.png is not a picture"),
        (("info", "folder"), "is not a model"),
        (("train",), "give a recipe file"),
        (("train", "nowhere.toml"), "nowhere.toml does not exist"),
        (("train", "text.png"), "is not TOML"),
        (("train", "folder"), "folder"),
        (("train", "given.png"), "given.png"),
        (("train", "--images", "folder"), "both --images and --captions"),
        (("train", "x.toml", "--images", "folder"), "not both"),
        (("train", "x.toml", "--check", "--start", "folder"), "not both"),
        (("train", "x.toml", "--vae", "folder", "--start", "folder"), "give --vae without"),
        (("train", "x.toml", "--seed", "-1"), "seed must be from 0"),
        (("train", "--images", "folder", "--captions", "nowhere.json"), "nowhere.json"),
        (("train", "--images", "folder", "--captions", "text.png"), "text.png"),
        (
            ("train", "--images", "folder", "--captions", "nowhere.json", "--config", "big"),
            "unknown preset 'big'",
        ),
        (("data", "shapes", "--out", "given.png"), "given.png"),
        (("data", "shapes", "--out", "new", "--count", 0), "count must be from 2"),
        (("data", "shapes", "--out", "new", "--size", 0), "size must be from 16"),
        (("data", "check"), "give the folder of a set, or both --images and --captions"),
        (("data", "check", "--images", "folder"), "or both --images and --captions"),
        (("data", "check", "folder", "--captions", "x.json"), "not both"),
        (("data", "check", "nowhere"), "there is no folder 'nowhere'"),
        (("data", "check", "folder"), "'folder' holds no set, which is annotations/captions_NAME.json"),
        (("data", "check", "--images", "folder", "--captions", "text.png"), "text.png"),
    ]:
        try:
            result = minisd(*arguments)
        except Exception as error:
            failures.append((arguments, repr(error)))
            continue
        said = result.err.removeprefix("minisd: reading pictures and captions\n")
        told = said.startswith("minisd: ") and said.count("\n") == 1 and message in said
        changed = sorted(set(everything()) - set(before))
        if result.code != 2 or result.out or not told or changed:
            failures.append((arguments, result.code, result.out, result.err, changed))
    assert not failures, "\n".join(map(str, failures))


def test_a_place_is_looked_at_before_the_work(
    minisd: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model is read and no set is made for pictures, a model or scores that have no place."""
    minisd("data", "shapes", "--out", "shapes", "--count", 4, "--size", 32)
    Path("smallest.toml").write_text(RECIPE, encoding="utf-8")
    Path("file").touch()
    for folder in ("run/model", "runs/smallest/model", "taken.png", "taken", "scores/index.html"):
        Path(folder).mkdir(parents=True)
        (Path(folder) / "mine").touch()
    Path("page").mkdir()
    Path("page/index.html").write_text("mine", encoding="utf-8")
    before = everything()

    def unneeded(*_: object, **__: object) -> None:
        pytest.fail("the work has begun")

    monkeypatch.setattr(run, "evaluate", unneeded)
    evaluate = ("evaluate", model, "--data", "shapes", "--count", 2, "--out")
    commands = [(*evaluate, folder) for folder in ("file", "scores", "page", "𐍈" * 64)]
    begin, train = DiffusionModel.from_pretrained, DiffusionModel.train  # the latter is also PyTorch's
    for arguments in [
        *(
            ("generate", "a", "--model", model, "--output", out)
            for out in ("file", "file/x", "taken.png", "𐍈" * 64)
        ),
        *(("export", model, out) for out in ("file", "file/x", "taken", "𐍈" * 64)),
        ("export", model, "x", "--format", "single-file"),
        ("train", "smallest.toml"),
        ("train", "smallest.toml", "--output", "run"),
        ("train", "smallest.toml", "--output", "file"),
        ("train", "smallest.toml", "--output", "file/x"),
        *commands,
    ]:
        monkeypatch.setattr(DiffusionModel, "from_pretrained", begin if arguments in commands else unneeded)
        monkeypatch.setattr(DiffusionModel, "train", train if arguments in commands else unneeded)
        result = minisd(*arguments)
        assert (result.code, result.out) == (2, ""), arguments
        said = result.err.removeprefix("minisd: reading the model and the set\n")
        assert said.startswith("minisd: ") and said.count("\n") == 1, (arguments, result.err)
        assert everything() == before, arguments


def test_a_long_prompt_in_any_script_has_a_name(minisd: Any, model: str) -> None:
    (path,) = minisd("generate", "𐍈" * 60, "--model", model, "--steps", 1, "--seed", 2**62).paths
    assert path.name == f"{'𐍈' * 45}-{2**62}.png"


def test_a_models_name_is_never_a_path(tmp_path: Path) -> None:
    """Whoever made the model, or the recipe (see below), does not choose where files are written."""
    network = tiny_model(replace(TINY, name="../../../y"))
    network.train(shapes(Path("shapes")), STAGES, steps=1)
    assert DiffusionModel.from_pretrained("runs/y/model").config.name == "../../../y"
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert {str(path) for path in Path().iterdir()} == {"runs", "shapes"}


def test_too_little_memory_is_one_sentence(minisd: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    ):

        def failing(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(DiffusionModel, "stream", failing)
        result = minisd("generate", "a", "--model", model)
        assert result.code == 2
        assert result.err.startswith("minisd: there is too little memory") and result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--colour", "red"], "unknown word '--colour'; see minisd generate --help"),
        (["generate", "a", "--stps", "4"], "unknown word '--stps', did you mean '--steps'?"),
        (["generate", "a", "--steps", "many"], "--steps must be a whole number, got 'many'"),
        (["generate", "a", "--guidance", "big"], "--guidance must be a number, got 'big'"),
        (
            ["generate", "a", "--guidance-interval", "0", "x"],
            "--guidance-interval must be 2 numbers, got '0 x'",
        ),
        (["generate", "a", "--variance", "big"], "invalid choice 'big' for argument '--variance'"),
        (["generate", "a", "--seed"], "Missing value for argument '--seed'"),
        (["generat", "a"], "unknown word 'generat', did you mean 'generate'?"),
        (
            ["--foo"],
            "unknown word '--foo', choose one of generate, serve, mcp, train, data, evaluate, info, export",
        ),
        (["data", "squares", "--out", "x"], "unknown word 'squares', did you mean 'shapes'?"),
        (["data", "shapes", "--out", "x", "--count", "many"], "--count must be a whole number, got 'many'"),
        (["data", "shapes"], "Missing from minisd data shapes: --out PATH The folder to make"),
        (["info", "a", "b"], "unknown word 'b'"),
        (["train", "--image", "x"], "unknown word '--image', did you mean '--images'?"),
        ([], "Expected one of {generate, serve, mcp, train, data, evaluate, info, export}"),
    ],
)
def test_an_option_that_does_not_exist_is_exit_code_2(
    arguments: list[str], message: str, minisd: Any
) -> None:
    result = minisd(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("minisd: ") and result.err.count("\n") == 1 and message in result.err
    assert everything() == []


@pytest.mark.parametrize("part", ["unet.conv_out.bias", "vae.decoder.conv_out.bias"])
def test_damaged_weights_write_no_file(part: str, minisd: Any, model: str) -> None:
    network = DiffusionModel.from_pretrained(model)
    with torch.no_grad():
        network.get_parameter(part)[0] = math.nan
    network.save_pretrained("damaged")
    result = minisd("generate", "a", "--model", "damaged")
    assert result.code == 2
    assert result.out == ""
    assert {"unet": "the U-Net gave NaN", "vae": "the autoencoder's decoder gave NaN"}[
        part[: part.index(".")]
    ] in result.err
    assert not Path("pictures").exists()


# info, data, train


def test_info_of_a_model_and_of_a_picture(minisd: Any, model: str) -> None:
    result = minisd("info", model)
    assert result.code == 0
    assert result.out.startswith("tiny: 32 pixels, flow schedule")
    assert "unet: " in result.out
    assert "million parameters in float32" in result.out
    assert 'minisd generate "a fox"' in result.out
    assert "styles: noto style, 3d render; a prompt that names none is rendered in noto style" in result.out
    (path,) = minisd("generate", "a blue star", "--model", model, "--seed", 4).paths
    result = minisd("info", path)
    assert "prompt: a blue star\n" in result.out
    assert "seed: 4\n" in result.out


def test_data_shapes(minisd: Any) -> None:
    result = minisd("data", "shapes", "--out", "shapes", "--count", 10, "--size", 32, "--seed", 1)
    assert result.code == 0
    assert len(result.out.splitlines()) == 1
    captions = json.loads(Path("shapes/annotations/captions_train.json").read_text(encoding="utf-8"))
    assert len(list(Path("shapes/train").iterdir())) == len(captions["images"]) == 9


def test_data_check(minisd: Any) -> None:
    minisd("data", "shapes", "--out", "shapes", "--count", 10, "--size", 32)
    result = minisd("data", "check", "shapes", "--size", 64)
    assert result.code == 0
    assert result.err.splitlines() == [
        f"minisd: {s}: {what}" for s in ("train", "val") for what in ("pictures", "captions")
    ]
    assert [line for line in result.out.splitlines() if not line.startswith(" ")] == [
        "train: 9 pictures with 32 captions",
        "val: 1 pictures with 4 captions",
    ]
    assert "  enlarged to 64 pixels: 9 (000000.png, 000001.png, 000002.png, …)\n" in result.out
    assert "all within the 32 tokens" in result.out
    captions = "shapes/annotations/captions_val.json"
    alone = minisd("data", "check", "--images", "shapes/val", "--captions", captions, "--size", 64)
    assert alone.out == result.out[result.out.index("val: ") :]


def test_data_check_measures_captions_as_the_mini_preset_does(minisd: Any) -> None:
    minisd("data", "shapes", "--out", "shapes", "--count", 10, "--size", 32)
    file = Path("shapes/annotations/captions_train.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    content["annotations"][0]["caption"] = "a " * 30 + "two three"  # and begin and end
    file.write_text(json.dumps(content), encoding="utf-8")
    result = minisd("data", "check", "shapes")
    assert (
        "captions longer than the 32 tokens that the text encoder reads: 1; the longest, 'a a " in result.out
    )
    assert "two three', loses 'two three'\n" in result.out


def test_help_of_generate_shows_what_the_packaged_model_draws(
    minisd: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = minisd("generate", "--help")
    assert result.code == 0
    lines = [f'  minisd generate "{prompt}"' for prompt in PACKAGED["prompts"]]
    told = f"What the packaged model, {PACKAGED['name']}, generates:"
    below = result.out.splitlines()[result.out.splitlines().index(told) + 1 :]
    assert below[: len(lines)] == lines
    assert " ".join(line.strip() for line in below[len(lines) :]) == (
        f"Its styles: {', '.join(PACKAGED['styles']['words'])};"
        f" a prompt that names none is rendered in {PACKAGED['styles']['default']}."
    )
    assert "draws:" not in minisd("info", "--help").out
    styled = cli.generate._shown(model)
    monkeypatch.setattr(cli.generate, "_shown", lambda model: styled)
    assert minisd("generate", "-h").out.splitlines()[-4:] == [
        "What the packaged model, tiny, generates:",
        '  minisd generate "a fox"',
        "Its styles: noto style, 3d render; a prompt that names none is rendered in noto",
        "  style.",
    ]


def test_a_picture_in_the_default_style_keeps_its_prompt(minisd: Any, model: str) -> None:
    (plain,) = minisd("generate", "a fox", "--model", model, "--seed", 3).paths
    assert (plain.name, settings(plain)["prompt"]) == ("a-fox-3.png", "a fox")
    (again,) = minisd("generate", "--from", plain).paths
    assert again.read_bytes() == plain.read_bytes()
    (named,) = minisd("generate", "a fox, noto style", "--model", model, "--seed", 3).paths
    (other,) = minisd("generate", "a fox, 3d render", "--model", model, "--seed", 3).paths
    assert Image.open(named).tobytes() == Image.open(plain).tobytes()
    assert Image.open(other).tobytes() != Image.open(plain).tobytes()


RECIPE = """
[data]
source = "shapes"
count = 10
size = 32

[model]
name = "../smallest"
sample_size = 32
num_inference_steps = 2

[model.vae]
patch_size = 2
block_out_channels = [16, 32]
encoder_blocks = [1, 1]
decoder_blocks = [1, 1]

[model.unet]
block_out_channels = [32, 64]
attention_levels = [false, true]
num_attention_heads = [2, 4]
norm_num_groups = 8

[[stage]]
kind = "autoencoder"
batch_size = 2

[[stage]]
kind = "denoiser"
batch_size = 2
"""


FINER = """encoder_pooling = 2
decoder_block_out_channels = [8, 16, 32]
decoder_blocks = [1, 1, 1]
alpha = true
"""


def test_train_a_recipe_then_draw_with_its_model(minisd: Any) -> None:
    Path("smallest.toml").write_text(RECIPE, encoding="utf-8")
    result = minisd("train", "smallest.toml", "--steps", 2, "--no-autocast")
    assert result.code == 0, result.err
    told = ["reading pictures and captions", "drawing", "building the model, and measuring"]
    for line, begin in zip(result.err.splitlines(), told, strict=False):
        assert line.startswith(f"minisd: {begin}"), result.err
    assert result.out.splitlines()[-1] == str(Path("runs/smallest/model"))
    drawn = minisd("generate", "a red circle", "--model", "runs/smallest/model", "--seed", 1)
    assert drawn.paths == [Path("pictures/a-red-circle-1.png")]
    assert minisd("train", "smallest.toml", "--steps", 2, "--no-autocast").code == 0
    going_on = ("train", "smallest.toml", "--steps", 1, "--no-autocast", "--start", "runs/smallest/model")
    assert minisd(*going_on, "--output", "further").code == 0
    for part, kept in (("vae", True), ("unet", False)):
        file = f"model/{part}/diffusion_pytorch_model.safetensors"
        before, after = load_file(f"runs/smallest/{file}"), load_file(f"further/{file}")
        assert all(torch.equal(value, after[name]) for name, value in before.items()) is kept
    Path("other.toml").write_text(
        RECIPE.replace("norm_num_groups = 8", "norm_num_groups = 4"), encoding="utf-8"
    )
    for seed in (1, 2):
        arm = (
            "train",
            "other.toml",
            "--vae",
            "runs/smallest/model",
            "--seed",
            seed,
            "--output",
            f"arm-{seed}",
        )
        assert minisd(*arm, "--steps", 1, "--no-autocast").code == 0
    runs = ("runs/smallest", "arm-1", "arm-2")
    vaes, unets = (
        [load_file(f"{run}/model/{part}/diffusion_pytorch_model.safetensors") for run in runs]
        for part in ("vae", "unet")
    )
    assert all(torch.equal(value, vae[name]) for vae in vaes for name, value in vaes[0].items())
    assert not torch.equal(unets[1]["conv_in.weight"], unets[2]["conv_in.weight"])
    assert not (Path("arm-1") / "autoencoder.safetensors").exists()
    Path("wider.toml").write_text(RECIPE.replace("[16, 32]", "[16, 48]"), encoding="utf-8")
    result = minisd("train", "wider.toml", "--vae", "runs/smallest/model", "--output", "wider")
    assert result.code == 2 and "'../smallest' has another vae than the recipe" in result.err
    result = minisd("train", "other.toml", "--start", "runs/smallest/model", "--output", "other")
    assert (
        result.code == 2
        and "'../smallest' has another unet than the recipe" in result.err
        and not Path("other").exists()
    )
    finer = RECIPE.replace("size = 32", "size = 64").replace("decoder_blocks = [1, 1]", FINER)
    finer = finer[: finer.index("[[stage]]")] + '[[stage]]\nkind = "decoder"\nbatch_size = 2\n'
    Path("finer.toml").write_text(finer, encoding="utf-8")
    result = minisd(
        "train", "finer.toml", "--steps", 1, "--start", "runs/smallest/model", "--output", "finer"
    )
    assert result.code == 0, result.err
    file = "model/vae/diffusion_pytorch_model.safetensors"
    before, after = load_file(f"runs/smallest/{file}"), load_file(f"finer/{file}")
    assert all(torch.equal(after[name], x) for name, x in before.items() if name.startswith("encoder."))
    (drawn,) = minisd("generate", "a red circle", "--model", "finer/model", "--seed", 1).paths
    with Image.open(drawn) as picture:
        assert (picture.size, picture.mode) == ((64, 64), "RGBA")
    for change, part in (("encoder_blocks = [1, 2]", "vae"), ("sample_size = 128", "sample_size")):
        key = change.partition(" =")[0]
        other = re.sub(rf"^{key} = .*", change, finer, count=1, flags=re.MULTILINE)
        Path("other.toml").write_text(other, encoding="utf-8")
        result = minisd("train", "other.toml", "--start", "runs/smallest/model", "--output", "other")
        assert result.code == 2 and f"has another {part} than" in result.err
    unknown = RECIPE.replace("norm_num_groups", "norm_groups")
    Path("smallest.toml").write_text(unknown, encoding="utf-8")
    result = minisd("train", "smallest.toml")
    assert result.code == 2
    assert "'norm_groups': did you mean 'norm_num_groups'" in result.err


def test_the_version(minisd: Any) -> None:
    result = minisd("--version")
    assert (result.code, result.err) == (0, "")
    assert re.fullmatch(r"minisd (\d+\.\d+\.\d+|not installed)\n", result.out)


def test_train_checks_a_recipe_and_wants_tensorboard(minisd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from stable_diffusion.training import check

    Path("smallest.toml").write_text(RECIPE, encoding="utf-8")
    monkeypatch.setattr(check, "STEPS", {"autoencoder": 1, "denoiser": 1})
    result = minisd("train", "smallest.toml", "--check", "--no-autocast")
    assert result.code == 1 and "does NOT learn" in result.out and Path("runs/smallest-check").is_dir()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = minisd("train", "smallest.toml", "--steps", 1, "--tensorboard")
    assert result.code == 2 and "pip install 'mini-stable-diffusion[tensorboard]'" in result.err


def test_as_a_process(model: str) -> None:
    """One real start: output only where it belongs, and plain exit codes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "stable_diffusion"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, encoding="utf-8", check=False
        )

    done = run("generate", "a fox 🦊", "--model", model, "--seed", "1")
    assert (done.returncode, done.stdout) == (0, str(Path("pictures/a-fox-1.png")) + "\n")
    failed = run("generate", "a", "--model", "nowhere")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert (
        failed.stderr
        == "minisd: nowhere does not exist: give a model folder, a file of weights, or a hub name (owner/name)\n"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
def test_a_reader_that_leaves_early() -> None:
    """No traceback where output goes to a pipe that is closed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        command = [sys.executable, "-m", "stable_diffusion", "info"]
        done = subprocess.run(command, env=environment, stdout=pipe, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


# Stopped


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_signal_that_comes_within_an_import_is_not_swallowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "swallows.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(0.1)\n"
        "except KeyboardInterrupt:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def command(path: str) -> None:
        __import__("swallows")
        time.sleep(5)

    monkeypatch.setitem(cli.COMMANDS, "info", command)
    with pytest.raises(SystemExit) as ended:
        cli.main(["info", "--path", "a"])
    assert ended.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "minisd: stopped\n"


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_signal_within_an_import_that_the_command_does_not_outlive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alarm by which it would have been told again would end the process."""
    (tmp_path / "signalled.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    monkeypatch.syspath_prepend(tmp_path)

    def command(path: str) -> None:
        __import__("signalled")

    monkeypatch.setitem(cli.COMMANDS, "info", command)
    cli.main(["info", "--path", "a"])
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_signal_that_became_another_error_is_a_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(path: str) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise InputError("the file is damaged") from None

    monkeypatch.setitem(cli.COMMANDS, "info", command)
    with pytest.raises(SystemExit) as ended:
        cli.main(["info", "--path", "a"])
    assert ended.value.code == 128 + signal.SIGINT
    assert capsys.readouterr().err == "minisd: stopped\n"
