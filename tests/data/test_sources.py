"""The table of sources: each row runs, settings come from its fields alone, and looking at it costs nothing."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stable_diffusion import cli
from stable_diffusion.data.item import Progress, Source
from stable_diffusion.data.sources import (
    SOURCES,
    Coco,
    Icons,
    MadeConfig,
    Shapes,
    open_source,
    source_config,
)
from stable_diffusion.errors import InputError


def finished(steps: Any) -> tuple[list[Progress], Source]:
    found = []
    while True:
        try:
            found.append(next(steps))
        except StopIteration as end:
            return found, end.value


@pytest.mark.parametrize("name", SOURCES)
def test_every_row_is_a_dataclass_of_settings(name: str) -> None:
    row = SOURCES[name]
    assert dataclasses.is_dataclass(row)
    settings = source_config({"source": name})
    assert isinstance(settings, row)
    for field in dataclasses.fields(row):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, field.name, None)


@pytest.mark.parametrize("name", [name for name, row in SOURCES.items() if issubclass(row, MadeConfig)])
def test_the_command_s_options_are_the_fields(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["data", name, "--help"])
    words = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    options = dict(re.findall(r"^\W*--(\w+)(?:, --no-\w+)? (.*)", words, re.MULTILINE))
    assert set(options) == {field.name for field in dataclasses.fields(SOURCES[name])} | {"out"}
    assert all(len(sentence.split()) > 4 for sentence in options.values()), options
    assert str(SOURCES[name].__doc__).split()[0] in words


def test_a_recipe_s_table_gives_settings() -> None:
    assert source_config({"images": "a", "captions": "b.json"}) == Coco(images="a", captions="b.json")
    assert source_config({"source": "shapes", "count": 9}) == Shapes(count=9)
    assert source_config({"source": "icons", "packages": "npm"}) == Icons(packages="npm")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"source": "shape"}, "did you mean 'shapes'"),
        ({"source": "icons", "sizes": 3}, "did you mean 'size'"),
        ({"source": "icons", "count": 3}, "'count'"),
        ({"source": "shapes", "size": "big"}, "size must be of type int"),
    ],
)
def test_what_a_source_does_not_have_is_one_sentence(table: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        source_config(table)


def test_a_made_set_is_made_once_and_opened(tmp_path: Path) -> None:
    config = source_config({"source": "shapes", "count": 10, "size": 32})
    steps, source = finished(open_source(config, tmp_path / "set"))
    assert steps[-1] == ("drawing", 10, 10)
    entries = source.entries()
    assert len(entries) == 9
    assert {entry.fields["split"] for entry in entries} == {"train"}
    assert source.image(entries[8].key).size == (32, 32)
    again, _ = finished(open_source(config, tmp_path / "set"))
    assert again == []


def test_pictures_of_one_s_own_are_opened_where_they_lie(tmp_path: Path) -> None:
    list(Shapes(count=10, size=32).make(tmp_path / "mine"))
    config = Coco(
        images=str(tmp_path / "mine/val"), captions=str(tmp_path / "mine/annotations/captions_val.json")
    )
    assert not isinstance(config, MadeConfig)
    steps, source = finished(open_source(config, tmp_path / "unused"))
    assert (steps, len(source.entries())) == ([], 1)
    assert not (tmp_path / "unused").exists()


def test_the_table_is_light() -> None:
    code = "import sys, stable_diffusion.data.sources; print(*sorted({'PIL', 'numpy', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == ""
