"""What is printed goes through whatever streams and encodings there are, and no text from a file steers a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from stable_diffusion import DiffusionModel, InputError, cli
from stable_diffusion.checkpoints.checkpoint import packaged
from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.data.shapes import write_shapes
from stable_diffusion.errors import printable
from stable_diffusion.generation.metadata import save_png
from stable_diffusion.nn import tokenizer
from tests.test_cli import RECIPE
from tests.tiny import KL, TINY, tiny_model

ROOT = Path(__file__).parents[1]
CLIP = tokenizer._clip(packaged("clip-tokenizer"))
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\u202e"
LATIN = os.fsdecode(b"caf\xe9")
CONTROLS = re.compile("[\0-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
posix = pytest.mark.skipif(sys.platform != "linux", reason="file names are text elsewhere")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model(replace(TINY, vae=KL)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tokenizer, "_clip", lambda folder: CLIP)  # building it takes longer than drawing


def minisd(*arguments: object) -> int | str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            return end.code
    return 0


def encoded(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding, newline="\n")


def content(stream: io.TextIOWrapper) -> bytes:
    stream.flush()
    return stream.buffer.getvalue()  # type: ignore[attr-defined, no-any-return]


def pictures() -> list[str]:
    return sorted(path.name for path in Path("pictures").iterdir())


@pytest.mark.parametrize("missing", [("stdout",), ("stderr",), ("stdin", "stdout", "stderr")])
def test_without_a_stream_everything_is_done(
    missing: tuple[str, ...], model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python has None for a stream that is closed, and for all of them without a console."""
    for name in missing:
        monkeypatch.setattr(sys, name, None)
    assert minisd("generate", "a", "b", "--model", model, "--seed", 1, "--steps", 1) == 0
    assert pictures() == ["a-1.png", "b-2.png"]
    assert minisd("generate", "a", "--model", "nowhere") == 2
    for name in missing:
        getattr(sys, name).close()
    if missing == ("stderr",):
        assert capsys.readouterr().out.splitlines() == ["pictures/a-1.png", "pictures/b-2.png"]


def test_the_library_needs_no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    for _ in write_shapes(Path("shapes"), 8, 32, 0):
        pass
    data = CocoImageLoader("shapes/train", "shapes/annotations/captions_train.json")
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert len(model.generate("a", num_inference_steps=1)) == 1
    model.train(data, steps=1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_standard_output_is_one_sentence(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (
        ("generate", "a", "--model", model, "--seed", 1, "--steps", 1),
        ("info", model),
        ("--help",),
    ):
        with Path("/dev/full").open("w") as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert minisd(*arguments) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last == "minisd: cannot read or write standard output: No space left on device"
    assert pictures() == ["a-1.png"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_notes_that_nobody_can_read_end_no_work(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert minisd("generate", "a " * 90, "--model", model, "--seed", 1, "--steps", 1, "--count", 2) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(pictures()) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="pipes end otherwise there")
def test_a_training_outlives_who_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("smallest.toml").write_text(RECIPE, encoding="utf-8")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert minisd("train", "smallest.toml", "--steps", 1, "--no-autocast", "--output", "run") == 0
    assert Path("run/model/config.json").is_file()


@pytest.mark.skipif(sys.platform == "win32", reason="descriptors are not inherited there")
def test_as_a_process_without_streams(model: str) -> None:
    """Descriptors that are really closed, whose numbers files must not get; and a quiet end where output is full."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "ascii"}
    command = [
        sys.executable,
        "-m",
        "stable_diffusion",
        "generate",
        "a",
        "лиса",
        "--model",
        model,
        "--seed",
        "1",
    ]
    shell = 'exec "$@" <&- >&- 2>&-'
    done = subprocess.run(["sh", "-c", shell, "sh", *command], env=environment, check=False)
    assert done.returncode == 0
    assert pictures() == ["a-1.png", "лиса-2.png"]
    for name in pictures():
        with Image.open(Path("pictures", name)) as picture:
            picture.load()
    full = 'exec "$@" >/dev/full'
    if Path("/dev/full").exists():
        done = subprocess.run(
            ["sh", "-c", full, "sh", *command[:3], "--help"], env=environment, stderr=subprocess.PIPE
        )
        assert done.returncode == 2
        assert done.stderr == b"minisd: cannot read or write standard output: No space left on device\n"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8", "cp437"])
def test_every_text_can_be_printed_in_every_encoding(
    encoding: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, err = encoded(encoding), encoded(encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert minisd("generate", "лиса", "äö", "--model", model, "--seed", 1, "--steps", 1) == 0
    assert pictures() == ["äö-2.png", "лиса-1.png"]
    expected = "pictures/лиса-1.png\npictures/äö-2.png\n".encode(encoding, "backslashreplace")
    assert content(out) == expected
    assert minisd("generate", "a", "--model", "лиса") == 2
    assert "лиса does not exist".encode(encoding, "backslashreplace") in content(err)


@posix
def test_names_that_are_no_text_are_printed_as_they_are(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that reads the path finds the file."""
    out = encoded("utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    assert minisd("generate", "a", "--model", model, "--seed", 1, "--steps", 1, "--output", LATIN) == 0
    assert content(out) == b"caf\xe9/a-1.png\n"
    assert os.path.exists(content(out).strip())  # noqa: PTH110


@posix
def test_a_set_with_names_that_are_no_text(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked, trained on and scored: whatever is stored of the names can be read again."""
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, encoded("utf-8"))
    minisd("data", "shapes", "--out", LATIN, "--count", 10, "--size", 32)
    for split in ("train", "val"):
        file = Path(LATIN, "annotations", f"captions_{split}.json")
        said = json.loads(file.read_text(encoding="utf-8"))
        for image in said["images"]:
            name = f"{LATIN}-{image['file_name']}"
            Path(LATIN, split, image["file_name"]).rename(Path(LATIN, split, name))
            image["file_name"] = name
        file.write_text(json.dumps(said), encoding="utf-8")
    (Path(LATIN, "train") / f"{LATIN}.png").write_bytes(b"")
    assert minisd("data", "check", LATIN, "--size", 64) == 0
    report = content(sys.stdout).decode(errors="surrogateescape")  # type: ignore[arg-type]
    assert r"left out: 1 images without captions (caf\udce9.png)" in report
    with pytest.warns(UserWarning, match=r"caf\\udce9\.png"):
        data = CocoImageLoader(Path(LATIN, "train"), Path(LATIN, "annotations", "captions_train.json"))
    about = {"data": {"images": f"{LATIN}/train"}}
    tiny_model().train(data, steps=1, output_dir=f"{LATIN}/run", about=about)
    run = json.loads(Path(LATIN, "run", "run.json").read_text(encoding="utf-8"))
    assert run["recipe"]["data"]["images"] == f"{LATIN}/train"
    evaluated = minisd("evaluate", model, "--data", LATIN, "--count", 2, "--out", LATIN + "/scores")
    assert evaluated == 0, content(sys.stderr)  # type: ignore[arg-type]
    assert json.loads(Path(LATIN, "scores", "scores.json").read_text(encoding="utf-8"))
    assert Path(LATIN, "scores", "index.html").read_text(encoding="utf-8")


def test_printable_leaves_text_of_every_script() -> None:
    for text in ("a fox", "лиса, ÄÖ", "北京　狐", "שועל", "👩‍🚀 é"):
        assert printable(text) == text
    assert printable(ESCAPES + "\n\udce9") == r"\x1b[2J\x1b]0;title\x07\x9b31m\r\x08\u202e\n\udce9"


def test_no_text_from_a_file_steers_a_terminal(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Prompts, names, metadata, settings and captions, in results, reports, notes and errors."""
    save_png(Image.new("RGB", (8, 8)), "hostile.png", {"prompt": f"a{ESCAPES}\nseed: 5", ESCAPES: 1})
    folder = Path("hostile")
    DiffusionModel.from_pretrained(model).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    hostile = config | {"name": f"x{ESCAPES}", "prompts": [ESCAPES], "styles": {"words": [ESCAPES]}}
    (folder / "config.json").write_text(json.dumps(hostile), encoding="utf-8")
    (folder / "README.md").write_text(f"---\nlicense: {ESCAPES}\n---\n", encoding="utf-8")
    Path("unknown").mkdir()
    Path("unknown/config.json").write_text(json.dumps(config | {ESCAPES: 1}), encoding="utf-8")
    lora = {f"lora_unet_mid_block.lora_{name}.weight": torch.zeros(1, 1) for name in ("down", "up")}
    save_file(lora, "lora.safetensors", {"ss_base_model_version": ESCAPES, ESCAPES: ESCAPES})
    minisd("data", "shapes", "--out", "shapes", "--count", 4, "--size", 32)
    file = Path("shapes/annotations/captions_val.json")
    said = json.loads(file.read_text(encoding="utf-8"))
    said["annotations"].append({"image_id": ESCAPES, "caption": "x"})
    said["annotations"][0]["caption"] = ESCAPES * 30
    said["images"][0]["style"] = ESCAPES
    file.write_text(json.dumps(said), encoding="utf-8")
    Path("recipe.toml").write_text('"\\u001b[2J" = 1\n', encoding="utf-8")
    capsys.readouterr()
    for arguments, code in (
        (("info", "hostile.png"), 0),
        (("info", "hostile"), 0),
        (("info", "unknown"), 2),
        (("info", "lora.safetensors"), 0),
        (("data", "check", "shapes"), 0),
        (("train", "recipe.toml"), 2),
        (("generate", ESCAPES + " word" * 99, "--model", "hostile", "--steps", 1), 0),
        (("generate", "a", "--model", model, "--sampler", ESCAPES), 2),
        (("generate", "--from", "hostile.png"), 2),
    ):
        assert minisd(*arguments) == code, arguments
        printed = capsys.readouterr()
        assert "[2J" in printed.out + printed.err or arguments[0] == "generate", arguments
        found = CONTROLS.search(printed.out + printed.err)
        assert found is None, (arguments, found)
    minisd("info", "hostile.png")
    assert "\nseed: 5" not in capsys.readouterr().out


def test_an_error_in_python_keeps_its_text() -> None:
    with pytest.raises(InputError, match="\x1b"):
        DiffusionModel.from_pretrained("\x1b")
