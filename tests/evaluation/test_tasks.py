"""The benchmark as a whole, by the packaged detector, on real drawings: what it must say of models that we know."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from stable_diffusion.data.icon_sprites import turned
from stable_diffusion.data.item import Entry, Split
from stable_diffusion.errors import InputError
from stable_diffusion.evaluation import features
from stable_diffusion.evaluation.benchmark import SEEDS
from stable_diffusion.evaluation.report import Report, Shown, page
from stable_diffusion.evaluation.run import evaluate
from tests.evaluation.real import NAMES, beside, drawings, scene, sprite
from tests.evaluation.test_run import Halves, Model, Numbers
from tests.tiny import TINY

PAIRS = [(NAMES[i], NAMES[(i + 3) % len(NAMES)]) for i in range(len(NAMES))]


def coloured(*things: tuple[str, str]) -> list[Any]:
    return [turned(sprite(name), colour) for name, colour in things]


def entries() -> Iterator[tuple[str, str, dict[str, Any], Image.Image]]:
    """Split, caption, fields and picture of each entry."""
    for style, of_style in (("noto", drawings()), ("flat", drawings() // 4 * 3)):
        for name, picture in zip(NAMES, of_style, strict=True):
            held_out = style == "flat" and name in NAMES[:2]
            fields = {"object": name, "style": style}
            yield "test_plain" if held_out else "train", f"{name}, {style}", fields, Image.fromarray(picture)
    for a, b in PAIRS:
        things = [{"object": name, "colour": None} for name in (a, b)]
        yield "test_pair", f"{a} and {b}", {"task": "two", "things": things}, picture_of([a, b])
        yield (
            "test_position",
            f"{a} above {b}",
            {"task": "position", "things": things, "relation": "above"},
            Image.fromarray(scene((a, 35, 3, 56), (b, 35, 66, 56))),
        )
        colours = ("red", "blue")
        things = [{"object": name, "colour": colour} for name, colour in zip((a, b), colours, strict=True)]
        fields = {"task": "binding", "things": things, "relation": "next to"}
        yield "test_binding", f"red {a}, blue {b}", fields, picture_of(coloured((a, "red"), (b, "blue")))
        yield (
            "test_colour",
            f"green {a}",
            {"task": "colour", "things": [{"object": a, "colour": "green"}]},
            Image.fromarray(scene((*coloured((a, "green")), 8, 8, 112))),
        )
        number = 2 + NAMES.index(a) % 3
        fields = {"task": "counting", "things": [{"object": a, "colour": None}] * number}
        yield "test_count", f"{number} of {a}", fields, picture_of([a] * number)


def picture_of(things: Sequence[Any]) -> Image.Image:
    return Image.fromarray(beside(things))


class Pictures:
    """The set's source: its pictures are in memory."""

    def __init__(self) -> None:
        self.all = {caption: (split, fields, picture) for split, caption, fields, picture in entries()}

    def entries(self) -> list[Entry]:
        return [Entry(key=c, captions=(c,), fields=fields) for c, (_, fields, _) in self.all.items()]

    def image(self, key: str) -> Image.Image:
        return self.all[key][2]

    def splits(self) -> list[Split]:
        names = dict.fromkeys(split for split, _, _ in self.all.values())
        return [
            Split(name=name, source=self, entries=[e for e in self.entries() if self.all[e.key][0] == name])
            for name in names
        ]


@pytest.fixture(scope="module")
def source() -> Pictures:
    return Pictures()


def scored(
    source: Pictures,
    folder: Path,
    change: Callable[[Image.Image], Image.Image],
    monkeypatch: pytest.MonkeyPatch,
    elsewhere: Path | None = None,
) -> tuple[Report, Shown]:
    """The scores of a model that knows all scenes and makes `change` of them."""
    monkeypatch.setattr(features, "SIZE", 64)  # which takes less time
    model = Model(config=replace(TINY, sample_size=128), vae=Halves(), unet=Numbers(), text_encoder=Numbers())
    steps = evaluate(
        model,
        lambda captions, seed: [change(source.image(caption)) for caption in captions],
        "scenes",
        source.splits(),
        out=folder / "out",
        cache=folder / "cache",
        count=8,
        only=[split.name for split in source.splits() if split.name.startswith("test_")],
        folder=elsewhere,
    )
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def rights(report: Report, kind: str = "generated") -> dict[str, float]:
    assert report.benchmark is not None
    return {task.task: task.scores[kind]["right"].value for task in report.benchmark.tasks}


def test_a_model_that_gives_back_the_scenes_reaches_the_ceiling(
    source: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, shown = scored(source, tmp_path, lambda picture: picture, monkeypatch)
    assert report.benchmark is not None and report.benchmark.seeds == SEEDS
    ceiling = rights(report, "real")
    assert list(ceiling) == ["single", "style", "two", "counting", "colour", "position", "binding"]
    assert rights(report) == ceiling
    assert min(value for task, value in ceiling.items() if task != "style") >= 0.7, ceiling
    shuffled = rights(report, "shuffled captions")
    assert max(shuffled[task] for task in ("two", "counting", "colour", "position", "binding")) <= 0.4
    assert [group.name for group in report.groups] == ["test_plain"], "scenes are scored by task alone"
    html = page(report, shown)
    assert "<h2>Tasks</h2>" in html and "overall" in html and "baby chick above watermelon" in html


def test_each_kind_of_mistake_costs_its_task(
    source: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Upside down nothing is above; half of the scene erased, no number is right; grey has no colour."""

    def without_the_right(picture: Image.Image) -> Image.Image:
        erased = picture.copy()
        erased.paste("white", (64, 0, 128, 128))
        return erased

    erased, _ = scored(source, tmp_path / "erased", without_the_right, monkeypatch)
    ceiling, found = rights(erased, "real"), rights(erased)
    assert found["two"] == found["binding"] == 0 and found["counting"] <= 0.3 * ceiling["counting"]

    def grey(picture: Image.Image) -> Image.Image:
        return ImageOps.grayscale(picture).convert("RGB")

    drained, _ = scored(source, tmp_path / "grey", grey, monkeypatch)
    found = rights(drained)
    assert found["colour"] == found["binding"] == 0 and found["counting"] >= 0.5

    def turned_over(picture: Image.Image) -> Image.Image:
        pixels = np.asarray(picture)
        return Image.fromarray(np.concatenate([pixels[64:], pixels[:64]]))  # halves exchanged

    over, _ = scored(source, tmp_path / "over", turned_over, monkeypatch)
    assert rights(over)["position"] == 0
    assert over.benchmark is not None
    (position,) = (task for task in over.benchmark.tasks if task.task == "position")
    assert position.scores["generated"]["objects"].value >= 0.5


def test_pictures_of_another_program(
    source: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run says what to generate; then its scores are those of a model that generates the same."""
    folder = tmp_path / "theirs"

    def judged() -> tuple[Report, Shown]:
        return scored(source, tmp_path, lambda picture: picture, monkeypatch, elsewhere=folder)

    with pytest.raises(InputError, match=r"prompts\.json now lists \d+ pictures"):
        judged()
    wanted = json.loads((folder / "prompts.json").read_text())["prompts"]
    assert len({(one["prompt"], one["seed"]) for one in wanted}) == len(wanted)
    with pytest.raises(InputError, match="does not exist"):
        judged()
    for one in wanted:
        (folder / one["file"]).parent.mkdir(exist_ok=True)
        source.image(one["prompt"]).save(folder / one["file"])
    report, shown = judged()
    assert (report.model, report.weights, report.groups) == ("theirs", None, ())
    assert "generated by another program" in page(report, shown)
    ours, _ = scored(source, tmp_path, lambda picture: picture, monkeypatch)
    assert report.benchmark == ours.benchmark
    (folder / "prompts.json").write_text('{"prompts": []}')
    with pytest.raises(InputError, match="of another set, count, seed"):
        judged()
