"""Journeys of ``minisd generate`` beyond one picture: sheets, frames, prompts from files, and lines for scripts."""

from __future__ import annotations

import io
import json
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stable_diffusion import DiffusionModel, cli
from stable_diffusion.checkpoints.checkpoint import packaged
from stable_diffusion.cli.sheet import Block, sheet, wrapped
from stable_diffusion.generation.metadata import read_settings, read_sheet
from stable_diffusion.images import MAX_PIXELS
from stable_diffusion.nn import tokenizer
from tests.lively import lively
from tests.tiny import FINE, KL, TINY, tiny_model

CLIP = tokenizer._clip(packaged("clip-tokenizer"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    lively(tiny_model(replace(TINY, vae=KL))).save_pretrained(folder / "tiny")
    lively(tiny_model(FINE)).save_pretrained(folder / "fine")
    return folder


@pytest.fixture(autouse=True)
def _here(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny", "fine"):
        (tmp_path / name).symlink_to(folders / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer, "_clip", lambda folder: CLIP)  # building it takes longer than drawing


@dataclass(frozen=True)
class Run:
    code: Any
    out: str
    err: str

    @property
    def paths(self) -> list[Path]:
        assert self.code == 0, self.err
        return [Path(line) for line in self.out.splitlines()]


@pytest.fixture
def generate(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: object, model: str = "tiny") -> Run:
        code: Any = 0
        with warnings.catch_warnings():
            # Notes in the command; in tests warnings are errors otherwise.
            warnings.simplefilter("default", UserWarning)
            try:
                cli.main(["generate", *map(str, arguments), "--model", model])
            except SystemExit as end:
                code = end.code
        return Run(code, *capsys.readouterr())

    return run


def pixels(picture: Path | Image.Image) -> np.ndarray[Any, Any]:
    if isinstance(picture, Path):
        with Image.open(picture) as opened:
            return np.asarray(opened.convert("RGB"))
    return np.asarray(picture.convert("RGB"))


def holds(whole: np.ndarray[Any, Any], part: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Where a picture is in another one, as x and y."""
    high, wide = part.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(whole[..., 0], (high, wide))
    found = np.argwhere((windows[:, :, 0] == part[0, :, 0]).all(-1))
    return [(x, y) for y, x in found.tolist() if (whole[y : y + high, x : x + wide] == part).all()]


# Variations and larger pictures, as options


def test_variations_of_a_picture(generate: Any) -> None:
    (first,) = generate("a", "--seed", 7, "--steps", 2).paths
    varied = generate("--from", first, "--variation-strength", 0.3, "--count", 3).paths
    stored = [read_settings(path) for path in varied]
    seeds = [each["variation_seed"] for each in stored]
    assert {each["seed"] for each in stored} == {7} and [seed - seeds[0] for seed in seeds] == [0, 1, 2]
    assert len({pixels(path).tobytes() for path in (first, *varied)}) == 4
    (again,) = generate("--from", varied[1]).paths
    assert again.read_bytes() == varied[1].read_bytes()


def test_hires(generate: Any) -> None:
    result = generate("a", "--seed", 7, "--hires", 2, "--hires-strength", 0.5)
    assert pixels(result.paths[0]).shape == (64, 64, 3)
    assert "6 steps, " in result.err and "note: this model knows pictures of 32 pixels" in result.err
    (again,) = generate("--from", result.paths[0]).paths
    assert again.read_bytes() == result.paths[0].read_bytes()


# Prompts from a file, and lines of JSON


def test_prompts_from_a_file(generate: Any) -> None:
    text = "\ufeffa red circle\r\n\r\n# a comment\r\n  two blue stars, é  \r\n"
    for encoding in ("utf-8", "utf-16"):
        Path("prompts.txt").write_bytes(text.removeprefix("\ufeff" * (encoding == "utf-16")).encode(encoding))
        paths = generate("--prompts", "prompts.txt", "--seed", 4, "--steps", 1, "--output", encoding).paths
        assert [path.name for path in paths] == ["a-red-circle-4.png", "two-blue-stars-é-5.png"]
        assert read_settings(paths[1])["prompt"] == "two blue stars, é"


def test_prompts_from_standard_input(generate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\n#no\nb")))
    paths = generate("--prompts", "-", "--seed", 4, "--steps", 1, "--count", 2).paths
    assert [path.name for path in paths] == ["a-4.png", "a-5.png", "b-6.png", "b-7.png"]


def test_a_line_of_json_for_each_picture(generate: Any) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    result = generate(long, "b", "--seed", 4, "--steps", 1, "--json")
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [list(line) for line in lines] == [["path", "seed", "seconds", "notes", "settings"]] * 2
    for line, seed in zip(lines, (4, 5), strict=True):
        assert read_settings(line["path"]) == line["settings"]
        assert line["seed"] == seed and line["seconds"] > 0
    assert "sixteen" in lines[0]["notes"][0] and lines[1]["notes"] == []
    assert f"note: {lines[0]['notes'][0]}" in result.err


# Sweeps


def test_a_sweep_shows_what_the_command_makes_alone(generate: Any) -> None:
    """Values of the first setting beside each other, those of the second below each other."""
    base = ("a", "--seed", 7, "--steps", 2)
    result = generate(*base, "--sweep", "guidance=1,4", "sampler=euler,Euler a", "--json")
    (line,) = (json.loads(text) for text in result.out.splitlines())
    path = Path(line["path"])
    assert path == Path("pictures/a-7-sweep.png")
    assert line["sheet"] == read_sheet(path) == "--sweep guidance=1,4 'sampler=euler,Euler a'"
    whole, places = pixels(path), {}
    for column, guidance in enumerate((1, 4)):
        for row, sampler in enumerate(("euler", "Euler a")):
            (cell,) = generate(*base, "--guidance", guidance, "--sampler", sampler, "--output", "cells").paths
            ((x, y),) = holds(whole, pixels(cell))
            places[column, row] = x, y
            if (column, row) == (0, 0):
                assert line["settings"] == read_settings(cell) == read_settings(path)
    assert places[0, 0][0] == places[0, 1][0] < places[1, 0][0] == places[1, 1][0]
    assert places[0, 0][1] == places[1, 0][1] < places[0, 1][1] == places[1, 1][1]
    assert not Path("pictures/a-7.png").exists()


def test_a_sweep_of_one_setting_and_of_three(generate: Any) -> None:
    (one,) = generate("--seed", 7, "--steps", 1, "--sweep", 'prompt=a,"b, c"').paths
    (cell,) = generate("b, c", "--seed", 7, "--steps", 1).paths
    assert len(holds(pixels(one), pixels(cell))) == 1 and one.name == "a-7-sweep.png"
    (three,) = generate("a", "--seed", 7, "--sweep", "steps=1,2", "size=32,48", "guidance-scale=1,9").paths
    places = []
    for guidance in (1, 9):
        options = ("--seed", 7, "--steps", 2, "--size", 48, "--guidance", guidance, "--output", "cells")
        places += holds(pixels(three), pixels(generate("a", *options).paths[0]))
    (_, top), (_, below) = places
    assert len(places) == 2 and top + 48 * 2 < below


def test_a_sweep_over_variations_has_one_other_seed(generate: Any) -> None:
    """And its first cell, without variation, no note."""
    result = generate("a", "--seed", 7, "--steps", 1, "--sweep", "variation-strength=0,0.5,1")
    assert "no effect" not in result.err
    assert read_settings(result.paths[0]).keys().isdisjoint({"variation_seed", "variation_strength"})
    (plain,) = generate("a", "--seed", 7, "--steps", 1).paths
    assert len(holds(pixels(result.paths[0]), pixels(plain))) == 1


def test_each_picture_has_its_own_sweep(generate: Any) -> None:
    paths = generate("a", "b", "--seed", 7, "--steps", 1, "--sweep", "guidance=1,2").paths
    assert [path.name for path in paths] == ["a-7-sweep.png", "b-8-sweep.png"]


def test_from_a_sheet_makes_its_first_picture_after_a_note(generate: Any) -> None:
    (path,) = generate("a", "--seed", 7, "--steps", 1, "--sweep", "guidance=1,2").paths
    result = generate("--from", path)
    assert "holds several pictures, made with --sweep guidance=1,2: making the first of them" in result.err
    assert read_sheet(result.paths[0]) is None and read_settings(result.paths[0]) == read_settings(path)
    (again,) = generate("--from", path, "--sweep", "guidance=1,2").paths
    assert again.read_bytes() == path.read_bytes()


def test_info_says_that_a_file_is_a_sheet(generate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = generate("a", "--seed", 7, "--steps", 1, "--progressive").paths
    cli.main(["info", str(path)])
    assert capsys.readouterr().out.endswith("\nsheet: --progressive\n")


# Frames


def test_frames_between_two_prompts(generate: Any) -> None:
    """Their ends are the plain pictures, and each can be made again."""
    paths = generate("a", "--seed", 7, "--interpolate", "b c", "--frames", 10, "--steps", 2).paths
    assert [path.name for path in paths] == [f"a-7-frame-{number:02}.png" for number in range(1, 11)]
    (first,), (last,) = (generate(end, "--seed", 7, "--steps", 2).paths for end in ("a", "b c"))
    assert first.read_bytes() == paths[0].read_bytes()
    assert (pixels(last) == pixels(paths[-1])).all()
    middle = read_settings(paths[4])
    assert (middle["mix_prompt"], middle["mix_strength"]) == ("b c", 4 / 9)
    (again,) = generate("--from", paths[4]).paths
    assert again.read_bytes() == paths[4].read_bytes()
    assert len({path.read_bytes() for path in paths}) == 10


def test_frames_between_two_seeds_and_prompts_at_once(generate: Any) -> None:
    base = ("a", "--seed", 7, "--frames", 3, "--steps", 2)
    seeds = generate(*base, "--interpolate-seed", 0, "--output", "x.png").paths
    assert [path.name for path in seeds] == ["x-1.png", "x-2.png", "x-3.png"]
    both = generate(*base, "--interpolate-seed", 0, "--interpolate", "b", "--output", "y.png").paths
    for frames, prompt in ((seeds, "a"), (both, "b")):
        (end,) = generate(prompt, "--seed", 0, "--steps", 2).paths
        assert (pixels(end) == pixels(frames[-1])).all()
    stored = read_settings(both[1])
    assert (stored["variation_strength"], stored["mix_strength"], stored["variation_seed"]) == (0.5, 0.5, 0)


@pytest.mark.parametrize("model", ["tiny", "fine"])
def test_an_animation_goes_there_and_back(model: str, generate: Any) -> None:
    options = ("--seed", 7, "--steps", 1, "--interpolate", "b", "--frames", 4)
    result = generate("a", *options, "--output", "way.WEBP", "--json", model=model)
    line = json.loads(result.out)
    assert line["path"] == "way.WEBP" and line["settings"]["prompt"] == "a"
    with Image.open("way.WEBP") as animation:
        assert (animation.format, animation.n_frames, animation.info["loop"]) == ("WEBP", 6, 0)  # type: ignore[attr-defined]
        frames = []
        for number in range(6):
            animation.seek(number)
            frames.append(pixels(animation))
        said = json.loads(animation.getexif()[0x010E])
        comment = animation.getexif().get_ifd(0x8769)[0x9286]
    assert said == {"minisd-sheet": "--interpolate b --frames 4", "minisd": line["settings"]}
    assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be").startswith("a\nSteps: 1, Sampler: Euler")
    plain = [pixels(path) for path in generate("a", *options, model=model).paths]
    for frame, number in zip(frames, (0, 1, 2, 3, 2, 1), strict=True):
        assert (frame == plain[number]).all()


# From noise to the picture


def test_progressive_shows_the_steps_and_ends_with_the_picture(generate: Any) -> None:
    options = ("a", "--seed", 7, "--steps", 20)
    (path,) = generate(*options, "--progressive").paths
    (plain,) = generate(*options).paths
    assert path.name == "a-7-steps.png" and read_settings(path) == read_settings(plain)
    network = DiffusionModel.from_pretrained("tiny")
    request = network.request("a", seed=7, num_inference_steps=20)
    seen = [network.decode(step.x0)[0] for step in network.stream(request)]
    found = [holds(pixels(path), pixels(picture)) for picture in seen]
    shown = [index for index, places in enumerate(found) if places]
    assert shown == [0, 3, 5, 8, 11, 14, 16, 19]
    assert [found[index][0][0] for index in shown] == sorted(found[index][0][0] for index in shown)
    assert holds(pixels(path), pixels(plain)) == found[19]


def test_progressive_of_one_step_and_of_two_passes(generate: Any) -> None:
    for options in (("--steps", 1), ("--steps", 2, "--hires", 2)):
        (path,) = generate("a", "--seed", 7, *options, "--progressive").paths
        (plain,) = generate("a", "--seed", 7, *options).paths
        assert len(holds(pixels(path), pixels(plain))) == 1


# Sheets


def test_pictures_in_one_order_are_wrapped() -> None:
    pictures = [Image.new("RGB", (8, 8))] * 17
    blocks = wrapped([str(number) for number in range(17)], pictures)
    assert [len(block.columns) for block in blocks] == [6, 6, 5]
    assert [row for block in blocks for row in block.columns] == [str(number) for number in range(17)]


@pytest.mark.parametrize("label", ["", "a" * 500, "word " * 100, "é 北京 🦊", "\udcff\x1b\n", "x"])
def test_any_text_is_a_label(label: str) -> None:
    """Letters stand beside the pictures, never on them."""
    pictures = [Image.new("RGB", (size, size), "red") for size in (20, 40)]
    whole = sheet([Block(title=label, columns=[label, label], rows=[(label, pictures), (label, pictures)])])
    assert len(holds(pixels(whole), pixels(pictures[1]))) == 2
    assert (pixels(whole) == (255, 0, 0)).all(-1).sum() == 2 * (20**2 + 40**2)


# What cannot be used


def test_what_does_not_go_together_is_said_before_the_model_is_read(
    generate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unneeded(*_: object, **__: object) -> None:
        pytest.fail("the model was read")

    monkeypatch.setattr(DiffusionModel, "from_pretrained", unneeded)
    Path("empty.txt").write_text("\n# nothing\n \n")
    Path("latin.txt").write_bytes(b"caf\xe9\n")
    Image.new("RGB", (32, 32)).save("given.png")
    Path("folder").mkdir()
    before = sorted(Path().rglob("*"))
    failures = []
    for arguments, message in [
        (("a", "--prompts", "empty.txt"), "give prompts in quotes or with --prompts, not both"),
        (("--prompts", "empty.txt"), "empty.txt holds no prompts: write one per line"),
        (("--prompts", "latin.txt"), "latin.txt is not text in UTF-8"),
        (("--prompts", "nowhere.txt"), "nowhere.txt does not exist"),
        (("--prompts", "folder"), "folder is not a file"),
        (("a", "--sweep", "guidance"), "takes NAME=VALUE,VALUE such as guidance=1,3,5, got 'guidance'"),
        (("a", "--sweep", "guidance="), "takes NAME=VALUE,VALUE"),
        (("--sweep", "=1,2", "a"), "takes NAME=VALUE,VALUE"),
        (("a", "--sweep", "guidence=1,2"), "unknown setting of --sweep 'guidence': did you mean 'guidance'?"),
        (("a", "--sweep", "guidance=1,,2"), "guidance must be a number, got ''"),
        (("a", "--sweep", "guidance=1,x"), "guidance must be a number, got 'x'"),
        (("a", "--sweep", "steps=1,2.5"), "steps must be a whole number, got '2.5'"),
        (("a", "--sweep", "steps=1,0"), "--steps must be from 1 to 100000, got 0"),
        (("a", "--sweep", "seed=1," + "9" * 30), "seed must be from 0"),
        (("a", "--sweep", "sampler=ddim,eulr"), "unknown sampler 'eulr': did you mean 'euler'?"),
        (("a", "--sweep", "variance=small,huge"), "unknown variance 'huge'"),
        (("a", "--sweep", "size=32,3x"), "--size must be a number of pixels"),
        (("a", "--sweep", 'negative="a'), "cannot be read"),
        (("a", "--sweep", "model=a,b"), "--sweep cannot vary model: make a picture for each value"),
        (("a", "--sweep", "count=1,2"), "--sweep cannot vary count"),
        (("a", "--sweep", "guidance-interval=1,2"), "--sweep cannot vary guidance-interval"),
        (("a", "--sweep", "guidance=1", "guidance_scale=2"), "--sweep varies guidance_scale twice"),
        (("a", "--sweep", "size=32,64", "width=32,64"), "--sweep varies width twice"),
        (
            ("a", "--sweep", *(f"{name}=1" for name in ("seed", "steps", "guidance", "eta"))),
            "at most 3 settings",
        ),
        (("a", "--sweep", "seed=" + ",".join(map(str, range(101)))), "at most 100 pictures, got 101"),
        (("a", "--sweep", "seed=1,2", "size=8192"), f"and {MAX_PIXELS:,} are the most: ask for fewer"),
        (("a", "--sweep", "hires=4,2", "size=4096"), f"and {MAX_PIXELS:,} are the most: ask for fewer"),
        (("a", "--sweep", "mix_strength=0.1,0.2"), "--mix-strength needs the prompt to mix in"),
        (("a", "--sweep", "image=given.png,gone.png"), "gone.png does not exist"),
        (("a", "--sweep", "seed=1,2", "--interpolate", "b"), "give --sweep or --interpolate, not both"),
        (("a", "--progressive", "--interpolate-seed", 3), "give --interpolate or --progressive, not both"),
        (("a", "--frames", 3), "--frames goes with --interpolate or --interpolate-seed"),
        (("a", "--interpolate", "b", "--frames", 1), "--frames must be from 2 to 1000, got 1"),
        (("a", "--interpolate", "b", "--frames", 10**9), "--frames must be from 2 to 1000"),
        (("a", "--interpolate-seed", -1), "--variation-seed must be from 0"),
        (("a", "--interpolate", "b", "--output", "x.gif"), "'x.gif' with .png at the end"),
        (("a", "--output", "x.webp"), ".webp is for the frames of --interpolate"),
        (
            ("a", "--interpolate", "b", "--frames", 1000, "--size", 512, "--output", "x.webp"),
            "an animation of 1000 pictures would have 262,144,000 pixels",
        ),
        (("a", "--hires", 9), "hires must be from 1 to 4, got 9"),
        (("a", "--hires", 2, "--image", "given.png", "--mask", "given.png"), "does not go with mask_image"),
        (("a", "--variation-strength", 2), "--variation-strength must be from 0 to 1, got 2"),
        (("a", "--mix-strength", 0.5), "give mix_prompt as well"),
        (("a", "--image", "gone.png"), "gone.png does not exist"),
    ]:
        result = generate(*arguments)
        told = result.err.startswith("minisd: ") and result.err.count("\n") == 1 and message in result.err
        if result.code != 2 or result.out or not told or sorted(Path().rglob("*")) != before:
            failures.append((arguments, result))
    assert not failures, "\n".join(map(str, failures))


def test_nothing_is_drawn_where_one_cell_cannot_be(generate: Any) -> None:
    result = generate("a", "--sweep", "spacing=trailing,karras")
    assert result.code == 2 and "karras" in result.err and "steps" not in result.err
    assert not Path("pictures").exists()
