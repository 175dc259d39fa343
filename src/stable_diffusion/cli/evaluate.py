"""``minisd evaluate``: scores of a model."""

from __future__ import annotations

import warnings
from pathlib import Path

import tyro

from stable_diffusion.cli.show import finished, say, tell
from stable_diffusion.files import slug


def evaluate(
    model: tyro.conf.Positional[str | None] = None,
    *,
    data: Path,
    out: Path | None = None,
    count: int = 500,
    splits: tuple[str, ...] = (),
    seed: int = 0,
    pictures: Path | None = None,
    cache: Path = Path("runs/features"),
    device: str | None = None,
) -> None:
    """Score a model on a captioned set: a JSON file of scores and a page with pictures. The same command goes on.

    Args:
        model: A model folder, a single file or a hub name (owner/name). By default the model that the package carries.
        data: The set: annotations/captions_NAME.json, and the pictures in NAME. What it says of objects and styles,
            as the icons do, is scored too; scenes of icons are prompts of a benchmark, docs/benchmark.md.
        out: Folder for scores.json and index.html; by default runs/evaluation/ and the names of the model, the set and
            the splits.
        count: Pictures to generate of each part of the set; of the benchmark's tasks so many prompts, four pictures
            each.
        splits: Parts of the set, such as val test_style; by default all.
        seed: Decides on pictures, captions and noise: the same for every model.
        pictures: Folder of pictures that another program generated, which the benchmark judges in place of a model's.
            Where it holds none, prompts.json is written there: what to generate.
        cache: Folder where features of the real pictures are kept for the next model.
        device: cuda, mps or cpu. By default the first of these that is there.
    """
    from stable_diffusion import Config, DiffusionModel
    from stable_diffusion.data.coco import coco_splits
    from stable_diffusion.evaluation.report import check_folder, write_report
    from stable_diffusion.evaluation.run import evaluate as evaluation

    tell("minisd: reading the model and the set")
    loaded = DiffusionModel.from_pretrained(model).to(Config(device).DEVICE)
    for note in loaded.notes:
        warnings.warn(note, stacklevel=1)
    name = data.resolve().name
    judged = loaded.config.name if pictures is None else pictures.resolve().name
    folder = Path("runs/evaluation", slug("-".join([judged, name, *splits]))) if out is None else out
    check_folder(folder, name)
    steps = evaluation(
        loaded,
        lambda captions, first: loaded.generate(captions, seed=first),
        name,
        coco_splits(data),
        out=folder,
        cache=cache,
        count=count,
        only=splits,
        seed=seed,
        folder=pictures,
    )
    for path in write_report(*finished(steps), folder):
        say(path)
