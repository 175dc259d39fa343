"""The words of README, CONTRIBUTING and docs are true: their code runs as it stands, what they name exists."""

from __future__ import annotations

import re
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from stable_diffusion import DiffusionModel, cli, config
from tests.test_import import PACKAGE, ROOMS
from tests.tiny import KL, TINY, tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "NOTICE")),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "benchmarks" / "LOG.md",
]
FITS_DIFFUSERS = replace(
    TINY,
    vae=KL,
    unet=replace(TINY.unet, pooled_projection_dim=None),
    schedule=config.ScheduleConfig(),
    sampler=config.SamplerConfig(name="ddim"),
)


def snippet(holds: str, text: str = README) -> str:
    """The one block of Python in a text that holds these words, as it stands there."""
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.S) if holds in code)
    return str(code)


def commands(text: str = README) -> list[str]:
    """Every line of an indented block that calls ``minisd``, without its comment, as it stands there."""
    return [line.strip() for line in re.findall(r"^    (minisd \w+[^#\n]*)", text, re.M)]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty working directory; the command's warnings are notes, as on a terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        yield tmp_path


def pictures(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("pictures/*.png")}


def test_generating_snippet_runs(here: Path) -> None:
    """The Python under "Generating pictures" gives the two pictures that it names."""
    exec(snippet("fox.png"), {})
    assert {path.name for path in here.iterdir()} == {"fox.png", "wolf.png"}


def test_streaming_snippet_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The steps are printed, and the last preview is a picture."""
    exec(snippet("model.stream("), {})
    assert capsys.readouterr().out.splitlines() == [f"step {i} of 4" for i in (1, 2, 3, 4)]
    with Image.open("preview.png") as preview:
        assert preview.size == (128, 128)


def test_every_snippet_is_run() -> None:
    """The last is run, and compiled, by tests/training/test_compile.py."""
    from tests.training.test_compile import SAMPLE

    found = re.findall(r"```python\n(.*?)```", README, re.S)
    assert found == [snippet("fox.png"), snippet("model.stream("), SAMPLE]


def test_generating_commands_run(here: Path) -> None:
    """Every line under "Generating pictures", in its order, with the files that it names."""
    cli.main(["generate", "a fox", "--seed", "7"])
    Image.new("RGB", (128, 128), "orange").save("photo.png")
    Image.new("L", (128, 128), 255).save("mask.png")
    tiny_model(FITS_DIFFUSERS).export("path/to/stable-diffusion")
    (section,) = re.findall(r"^## Generating pictures\n(.*?)^## ", README, re.M | re.S)
    lines, seen = commands(section), pictures(here)
    assert any(line.endswith("--from pictures/a-fox-7.png") for line in lines)
    assert len(lines) >= 5 and seen == {"a-fox-7.png"}
    for line in lines:
        cli.main(shlex.split(line)[1:])
        new = pictures(here) - seen
        assert len(new) == (4 if "--count 4" in line else 0 if ".webp" in line else 1), line
        seen |= new
        if line.endswith("--from pictures/a-fox-7.png"):
            assert [(here / "pictures" / name).read_bytes() for name in new] == [
                (here / "pictures" / "a-fox-7.png").read_bytes()
            ], "byte for byte"


def test_data_commands_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``minisd data shapes`` as it stands draws the set that the text names, and ``data check`` reads it."""
    (line,) = re.findall(r"`(minisd data shapes [^`]*)`", README)
    cli.main([*shlex.split(line)[1:], "--count", "10", "--size", "32"])
    folder, captions = re.findall(r"`imgFolder = '(.*?)'` and\s*`captionsFile = '(.*?)'`", README)[0]
    assert (here / folder).is_dir() and (here / captions).is_file()
    (check,) = re.findall(r"`(minisd data check) FOLDER`", README)
    capsys.readouterr()
    cli.main([*shlex.split(check)[1:], "shapes"])
    assert "train" in capsys.readouterr().out


def test_export_as_documented(here: Path) -> None:
    """The command and the Python under "A model that fits" give the picture that they name."""
    docs = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    (line,) = commands(docs)
    tiny_model(FITS_DIFFUSERS).save_pretrained("runs/mine/model")
    cli.main(shlex.split(line)[1:])
    exec(snippet("circle.png", docs), {})
    assert Image.open("circle.png").size == (32, 32)


def test_blocks_can_be_called() -> None:
    """The calls in the table of blocks work on one picture."""
    model = DiffusionModel.from_pretrained()
    picture = model.generate("a fox", num_inference_steps=1, seed=0)[0]
    names: dict[str, Any] = {"model": model, "picture": picture, "t": 500}
    for code in re.findall(r"\| `([^`|]*model\.\w+[.(][^`|]*)`(?:, `([^`|]*)`)? \|", README):
        for line in filter(None, code):
            exec(line, names)
            names.setdefault("noise", torch.zeros_like(names["latents"]))
    assert {"latents", "noisy", "embeds"} <= names.keys()


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_exist(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every `minisd` line names a command and options that its help lists, every recipe a file."""
    text = path.read_text(encoding="utf-8")
    lines = [*commands(text), *re.findall(r"`(minisd\s+\w[^`]*)`", text)]
    assert len(lines) >= 15 or path.name != "README.md"
    for line in lines:
        _, command, *rest = shlex.split(line)
        words = [command, *rest[:1]] if command == "data" else [command]
        with pytest.raises(SystemExit) as exit:
            cli.main([*words, "--help"])
        assert exit.value.code == 0
        helped = capsys.readouterr().out
        for word in rest:
            assert not word.startswith("--") or word in helped, f"minisd {command} has no {word}"
            assert not word.startswith("recipes/") or (ROOT / word).is_file(), word


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_what_is_named_exists(path: Path) -> None:
    """Relative links and names of files lead to files; `make` words are in the Makefile."""
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert (path.parent / target).exists(), target
    for name in files_named(text):
        assert any((folder / name).exists() for folder in (ROOT, PACKAGE)), name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.M):
        assert re.search(rf"^{word}:", makefile, re.M), word


def files_named(text: str) -> set[str]:
    """Paths below the project's folders or the package's, and names of Python and TOML files, that a text gives."""
    folders = "|".join(
        ["benchmarks", "docs", "recipes", "src", "tests", "tools", *sorted(set().union(*ROOMS))]
    )
    pattern = rf"(?<![\w/.-])((?:{folders})/[\w/.-]*\w|\w+\.(?:py|toml))/?(?![\w/-])"
    return set(re.findall(pattern, text))


def test_a_file_that_is_not_there_is_seen() -> None:
    """The check above can fail."""
    text = "`tests/test_nothing.py -x`, nn/ and `data/sources.py`, runs/mini/model, http://a.org/nn/b.py, `gone.py`"
    assert files_named(text) == {"tests/test_nothing.py", "data/sources.py", "gone.py"}


def test_contributing_names_what_is_in_the_files() -> None:
    """Where it says a table or a class "in" a file, that file defines it."""
    rows = re.findall(r"`(\w+)` in `([\w/]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len(rows) >= 3
    for name, file in rows:
        code = (PACKAGE / file).read_text(encoding="utf-8")
        assert re.search(rf"^(class |def |){name}\b", code, re.M), f"{name} in {file}"


def test_contributing_lists_the_rooms() -> None:
    """In the order in which tests/test_import.py checks them."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"`(__main__ → [^`]*)`", text)
    assert [set(floor.split(", ")) for floor in " ".join(line.split()).split(" → ")] == ROOMS
