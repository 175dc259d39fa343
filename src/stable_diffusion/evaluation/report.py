"""What an evaluation found, as JSON and as one page that carries its pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from stable_diffusion.data.cache import Array
from stable_diffusion.errors import InputError, shown
from stable_diffusion.evaluation.benchmark import Benchmark, Seen, Share
from stable_diffusion.evaluation.pictures import RULE
from stable_diffusion.evaluation.scores import Scores
from stable_diffusion.evaluation.tasks import Boxed
from stable_diffusion.files import check_place, is_file, read_bytes, read_json, replacing, write_json

THUMBNAIL = 160  # pixels, at most
GENERATOR = '<meta name="generator" content="minisd evaluate">'


@dataclass(frozen=True)
class GroupScores:
    """Of one part of the set."""

    name: str
    pictures: int
    scores: dict[str, Scores]
    """The generated pictures' and the controls', by the kind of pictures."""


@dataclass(frozen=True)
class Codec:
    """What autoencoders of one size make of held-out pictures."""

    pictures: int
    latents: tuple[int, int, int]
    """Channels, height, width."""
    psnr: float
    """In dB, the mean over the pictures."""
    pca_psnr: float | None
    """Of a principal component analysis of patches, fitted on training pictures."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All scores of a model, and what they were made with."""

    model: str
    weights: str | None
    """Digest of the weights and the configuration; None for pictures that another program generated."""
    size: int
    """Side of all pictures, real ones too, in pixels."""
    sampler: dict[str, Any]
    num_inference_steps: int
    guidance: dict[str, Any]
    data: str
    count: int
    seed: int
    objects: int | None
    """Objects that the asked one is looked for among."""
    left_out: tuple[str, ...]
    """Scores that the set does not allow, and why."""
    groups: tuple[GroupScores, ...]
    benchmark: Benchmark | None
    """None for a set without scenes."""
    codec: Codec | None


@dataclass(frozen=True)
class Example:
    """A generated picture beside the real one whose caption was asked for."""

    caption: str
    generated: Array
    real: Array
    rank: int | None
    """Objects that are nearer than the asked one."""


@dataclass(frozen=True)
class Neighbour:
    """A generated picture beside the nearest training picture."""

    caption: str
    generated: Array
    training: Array
    ratio: float


@dataclass(frozen=True)
class Shown:
    """The page's pictures, uint8 ``h w 3``."""

    examples: dict[str, list[Example]]
    neighbours: list[Neighbour]
    codec: list[list[Array]]
    """Real, round trip, and the linear code's, if there is one."""
    tasks: dict[str, list[Boxed]] = field(default_factory=dict)


def write_report(report: Report, shown: Shown, folder: Path) -> tuple[Path, Path]:
    """Writes ``scores.json`` and ``index.html``, which replace those of an earlier evaluation.

    Raises:
        InputError: as ``check_folder`` does.
    """
    scores, shown_page = check_folder(folder, report.data)
    write_json(scores, {**asdict(report), "rule": RULE})
    with replacing(shown_page) as building:
        building.write_text(page(report, shown), encoding="utf-8", errors="backslashreplace")
    return scores, shown_page


def check_folder(folder: Path, data: str) -> tuple[Path, Path]:
    """The files of a report in the folder, on the set of that name.

    Raises InputError where they cannot be written, or are of something else, such as another set.
    """
    paths = folder / "scores.json", folder / "index.html"
    for path, mark in zip(paths, (b'"rule": "Pictures are taken', GENERATOR.encode()), strict=True):
        check_place(path)
        if is_file(path) and mark not in read_bytes(path):
            raise InputError(f"{path} is not of an evaluation, and would be replaced: choose another --out")
    if is_file(paths[0]) and (other := read_json(paths[0]).get("data")) != data:
        raise InputError(
            f"{paths[0]} has the scores on the set {shown(other)}, and would be replaced: choose another --out"
        )
    return paths


def page(report: Report, shown: Shown) -> str:
    """The scores as HTML that needs no other file."""
    parts = [
        f"<h1>{escape(report.model)} on {escape(report.data)}</h1>",
        f"<p>{report.size} pixels, {_settings(report)}, seed {report.seed}; at most {report.count} pictures of each"
        " part of the set, or prompts of each task.</p>",
        *([] if report.benchmark is None else _benchmark(report.benchmark, shown.tasks)),
        *([_summary(report.groups)] if report.groups else []),
        *(f"<p><b>Left out</b> – {escape(reason)}.</p>" for reason in report.left_out),
    ]
    for group in report.groups:
        parts += [f"<h2>{escape(group.name)}</h2>", f"<p>{group.pictures} pictures.</p>", _details(group)]
        examples = shown.examples[group.name]
        parts.append(_figures([([one.generated, one.real], _caption(one)) for one in examples]))
    if report.codec is not None:
        parts += ["<h2>The autoencoder alone</h2>", _codec(report.codec)]
        parts.append(_figures([(pictures, "") for pictures in shown.codec]))
    if shown.neighbours:
        parts.append(
            "<h2>Nearest training pictures</h2><p>Of all generated pictures those whose nearest training picture stands"
            " out most: generated, nearest, and the ratio of the distances to the nearest and the second nearest."
            " Below 0.33 a picture counts as memorised. Where training holds near copies of a picture, the ratio"
            " cannot tell.</p>"
        )
        pairs = [([n.generated, n.training], f"{n.ratio:.2f} · {n.caption}") for n in shown.neighbours]
        parts.append(_figures(pairs))
    parts.append(_explained(report))
    title = escape(f"{report.model} on {report.data}")
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{GENERATOR}\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )


def _settings(report: Report) -> str:
    if report.weights is None:
        return "generated by another program"
    sampler, guidance = escape(report.sampler["name"]), report.guidance["scale"]
    return f"{report.num_inference_steps} steps of {sampler}, guidance {guidance:g}, weights {report.weights}"


def _benchmark(benchmark: Benchmark, examples: dict[str, list[Boxed]]) -> list[str]:
    """The tasks' scores, what is right in the pictures of each, and pictures with what the detector sees."""
    rows = {"overall": benchmark.overall} | {
        task.task: {kind: scores["right"] for kind, scores in task.scores.items()} for task in benchmark.tasks
    }
    columns = {kind: [_interval(row[kind]) for row in rows.values()] for kind in benchmark.overall}
    ceiling = [row["generated"].value / max(row["real"].value, 1e-9) for row in rows.values()]
    parts = [
        "<h2>Tasks</h2>",
        _table(list(rows), {**columns, "Of the ceiling": [f"{value:.2f}" for value in ceiling]}),
        f"<p>Share of the pictures that show what the prompt asks for, {benchmark.seeds} of each prompt; small: 95 %"
        " intervals over prompts. Real scenes are the ceiling. docs/benchmark.md says how each task is judged.</p>",
    ]
    for task in benchmark.tasks:
        details = {
            title: [_interval(scores[title]) for scores in task.scores.values()]
            for title in task.scores["real"]
        }
        parts += [f"<h3>{escape(task.task)}</h3>", f"<p>{task.prompts} prompts.</p>"]
        parts.append(_table(list(task.scores), details))
        parts.append(
            _figures(
                [
                    (
                        [_boxed(*one.generated), _boxed(*one.real)],
                        f"{'✓' if one.right else '✗'} {one.caption} · {_names(one)}",
                    )
                    for one in examples.get(task.task, [])
                ]
            )
        )
    return parts


def _interval(share: Share) -> str:
    return f"{share.value:.2f} <small>{share.low:.2f} to {share.high:.2f}</small>"


def _names(example: Boxed) -> str:
    """What the detector sees in the generated picture, from the largest thing to the smallest."""
    return ", ".join(f"{thing.colour} {thing.found.names[0]}" for thing in example.generated[1]) or "nothing"


def _boxed(pixels: Array, seen: Sequence[Seen]) -> Array:
    """The picture, twice as large, with the boxes of what is seen."""
    image = Image.fromarray(pixels).resize((2 * pixels.shape[1], 2 * pixels.shape[0]))
    pen = ImageDraw.Draw(image)
    for thing in seen:
        pen.rectangle([2 * side for side in thing.found.box], outline="#e0007a", width=2)
    return np.asarray(image)


def _caption(example: Example) -> str:
    return example.caption + ("" if example.rank is None else f" · place {example.rank + 1}")


def _summary(groups: Sequence[GroupScores]) -> str:
    """The generated pictures' scores, each with the real ones' behind it."""

    def column(show: Callable[[Scores], str]) -> list[str]:
        pairs = [[show(group.scores[kind]) for kind in ("generated", "real")] for group in groups]
        return [f"{own} <small>{real or '–'}</small>" if own else "" for own, real in pairs]

    columns = {
        _DISTANCE: column(lambda scores: _distance(scores, interval=False)),
        _SHARES["object_top5"]: column(lambda scores: _share(scores.object_top5)),
        _SHARES["style"]: column(lambda scores: _share(scores.style)),
    }
    table = _table([group.name for group in groups], columns)
    return f"{table}<p>Small: the same score of real pictures.</p>"


def _details(group: GroupScores) -> str:
    rows = group.scores.values()
    columns = {_DISTANCE: [_distance(scores) for scores in rows]}
    for name, title in _SHARES.items():
        columns[title] = [_share(getattr(scores, name)) for scores in rows]
    return _table(list(group.scores), columns)


def _table(rows: Sequence[str], columns: dict[str, list[str]]) -> str:
    """A table of rows and of the columns that have anything in them."""
    columns = {title: cells for title, cells in columns.items() if any(cells)}
    lines = ["".join(f"<th>{title}" for title in ("", *columns))]
    for i, name in enumerate(rows):
        lines.append(f"<th>{escape(name)}" + "".join(f"<td>{cells[i] or '–'}" for cells in columns.values()))
    return f'<div class="wide"><table>{"".join(f"<tr>{line}" for line in lines)}</table></div>'


def _distance(scores: Scores, interval: bool = True) -> str:
    if scores.kernel_distance is None:
        return ""
    distance = scores.kernel_distance
    value, low, high = (f"{1000 * number:.1f}" for number in (distance.value, distance.low, distance.high))
    return f"{value} <small>{low} to {high}</small>" if interval else value


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _codec(codec: Codec) -> str:
    size = " × ".join(map(str, codec.latents))
    linear, order = "", "Real, round trip."
    if codec.pca_psnr is not None:
        linear = f"; a linear code of the same size (PCA) gives {codec.pca_psnr:.1f} dB"
        order = "Real, round trip, linear code."
    return (
        f"<p>Round trips of {codec.pictures} held-out pictures through latents of {size}:"
        f" {codec.psnr:.1f} dB{linear}. {order}</p>"
    )


def _figures(figures: Sequence[tuple[Sequence[Array], str]]) -> str:
    cells = (
        f"<figure>{''.join(map(_picture, pictures))}<figcaption>{escape(text)}</figcaption></figure>"
        for pictures, text in figures
    )
    return f'<div class="grid">{"".join(cells)}</div>'


def _picture(pixels: Array) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/webp;base64,{data}">'


def _explained(report: Report) -> str:
    among = "" if report.objects is None else f" of all {report.objects:,}"
    sentences = (
        RULE + " Settings are the model's own.",
        "Each generated picture stands before the real one whose caption was asked for. All, real ones too, have"
        " the model's size, and a MobileNetV2 that was trained on ImageNet looks at them.",
        "Kernel distance: the squared maximum mean discrepancy with KID's cubic kernel, unbiased, in the"
        " means of MobileNetV2's last maps, from the real pictures whose captions were asked for; below it is a"
        " 95 % bootstrap interval. The real row is one half of the part's pictures against the other. Other"
        " networks' features give other numbers.",
        f"Object: whether the asked object is the nearest{among}, or among the five nearest, by linear discriminant"
        " analysis of its middle blocks' maps: means, standard deviations, and means of quarters. Class means are of"
        " training pictures, or, where training has none of an object, of all held-out ones; the very picture whose"
        " caption was asked for is left out of them.",
        "Style: a ridge regression of the same features, fitted on the training pictures.",
        "Nearest: distances to training pictures, nearest over second nearest, as a median, and the share below"
        " 1/3; in the features that the kernel distance uses.",
        "Controls: real pictures show what the scores allow at best, round trips what the autoencoder takes away,"
        " blurred pictures what blur costs, shuffled captions (the generated pictures against each other's"
        " captions) what chance gives.",
    )
    return "<h2>How it was measured</h2><ul>" + "".join(f"<li>{escape(s)}" for s in sentences) + "</ul>"


_DISTANCE = "Kernel distance × 1000"
_SHARES = {
    "object_top1": "Object nearest",
    "object_top5": "Object in five",
    "style": "Style",
    "nearest_ratio": "Nearest ratio",
    "memorised": "Memorised",
}

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: right; font-weight: normal; }
th:first-child { text-align: left; }
small { opacity: .7; font-weight: normal; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .8rem; margin: 1rem 0; }
figure { margin: 0; display: flex; flex-wrap: wrap; gap: 2px; align-content: start; }
figure img { flex: 1 1 30%; min-width: 0; max-width: 50%; object-fit: contain; background: #fff; }
figcaption { flex-basis: 100%; font-size: .8rem; overflow-wrap: anywhere; }
"""
