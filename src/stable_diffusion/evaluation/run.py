"""A whole evaluation: probes fitted on features of the real pictures, pictures generated, scores with controls."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageFilter
from torch import nn

from stable_diffusion import images
from stable_diffusion.config import ModelConfig, to_dict
from stable_diffusion.data.cache import Array, ArrayCache, digest
from stable_diffusion.data.item import Progress, Split
from stable_diffusion.errors import InputError, unknown_name
from stable_diffusion.evaluation import features as network_features
from stable_diffusion.evaluation.benchmark import SEEDS, Verdicts, benchmark_of
from stable_diffusion.evaluation.codec import PatchPCA, psnr, round_trips
from stable_diffusion.evaluation.detector import load_detector
from stable_diffusion.evaluation.distances import Nearest
from stable_diffusion.evaluation.elsewhere import check_prompts, pictures_of
from stable_diffusion.evaluation.features import MobileNetV2, feature_blocks, load_network
from stable_diffusion.evaluation.pictures import groups, in_order, pictures
from stable_diffusion.evaluation.report import Codec, Example, GroupScores, Neighbour, Report, Shown
from stable_diffusion.evaluation.scores import judge, learn
from stable_diffusion.evaluation.tasks import Judges, plain_splits, task_groups, task_verdicts
from stable_diffusion.files import slug
from stable_diffusion.nn.blocks import weight_bytes
from stable_diffusion.nn.vae import AutoencoderKL, AutoencoderTiny

GENERATED_TOGETHER = 4
BLUR = 1 / 32
"""Standard deviation of the blurred control, in sides of the picture."""
PCA_PICTURES = 2000
SHOWN = 12  # of each group
NEIGHBOURS = 24

Generate = Callable[[Sequence[str], int], Sequence[Image.Image]]
"""One picture of each caption, with the model's own settings; the seed is the first one's, then one more."""


class Parts(Protocol):
    """What evaluation needs of a model."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def vae(self) -> AutoencoderKL | AutoencoderTiny: ...
    @property
    def unet(self) -> nn.Module: ...
    @property
    def text_encoder(self) -> nn.Module: ...


def evaluate(
    parts: Parts,
    generate: Generate,
    data: str,
    splits: Sequence[Split],
    *,
    out: Path,
    cache: Path,
    count: int = 500,
    only: Sequence[str] = (),
    seed: int = 0,
    folder: Path | None = None,
) -> Generator[Progress, None, tuple[Report, Shown]]:
    """Scores a model on a captioned set; gives the scores, and pictures to show beside them.

    What was generated is kept in ``out/cache``, a group at a time, and used again by the same model. Of the fields
    of the set's entries, ``object`` and ``style`` are scored, ``style_words`` choose captions and ``part`` groups.
    Held-out scenes, whose entries have a ``task``, are scored by task.

    Args:
        parts: the model's parts.
        generate: makes pictures with them.
        data: the set's name.
        splits: all of its splits, whose real pictures the scores are learned from.
        out: folder of the generated pictures' cache.
        cache: folder where features of the real pictures are kept for the next model.
        count: pictures of each group, at least 2.
        only: names of the splits to score; none for all.
        seed: decides on pictures, captions and noise.
        folder: holds pictures of the tasks' prompts that another program generated. They are judged in place of the
            model's, of which the autoencoder and the size are used, and only tasks are scored.

    Raises:
        InputError: an argument outside what is said here, a picture that cannot be read, or no feature network.
    """
    if count < 2:
        raise InputError(f"count must be at least 2, got {count}")
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    for name in only:
        if name not in (names := [split.name for split in splits]):
            raise unknown_name("split", name, names)
    tasks = [group for group in task_groups(splits, seed) if not only or group.split.name in only]
    if folder is not None:
        if not tasks:
            raise InputError(
                "only a set with scenes has prompts for other programs: make one with minisd data icons"
            )
        check_prompts(folder, tasks, count, seed)
    splits = in_order(plain_splits(splits))
    network = load_network().to(parts.vae.device)
    config = parts.config
    size = config.sample_size
    real_features: dict[str, Array] = {}
    for split in splits:
        real_features[split.name] = yield from _split_features(network, split, size, cache / data)
    yield Progress("fitting probes", 0, 1)
    learned = learn(splits, real_features, bool(config.text_encoders))
    yield Progress("fitting probes", 1, 1)

    weights = digest(*weight_bytes(parts.vae, parts.unet, parts.text_encoder), to_dict(config))
    left_out = list(learned.left_out)
    scored: list[GroupScores] = []
    shown = Shown({}, [], [])
    scored_splits = [split for split in splits if folder is None and (not only or split.name in only)]
    for group in (part for split in scored_splits for part in groups(split, seed)):
        rows = group.rows[:count]
        if len(rows) < 2:
            left_out.append(f"{group.name}: it has one picture, and scores need two")
            continue
        captions = [group.caption(row, seed) if config.text_encoders else "" for row in rows]
        made = yield from _generated(group.name, generate, captions, seed, size, weights, out / "cache")
        real = np.stack(list(pictures(group.split, size, rows)))
        copies = {"round trips": round_trips(parts.vae, real), "blurred": map(_blurred, real)}
        features = {"real": real_features[group.split.name][rows]}
        for kind, some in {"generated": made, **copies}.items():
            features[kind] = yield from _features(network, f"{group.name}: {kind}", some, len(rows))
        judged = judge(learned, group, rows, features, real_features[group.split.name], seed)
        scored.append(GroupScores(group.name, len(rows), judged.scores))
        shown.examples[group.name] = [
            Example(captions[i], made[i], real[i], None if judged.ranks is None else int(judged.ranks[i]))
            for i in range(min(SHOWN, len(rows)))
        ]
        if judged.near is not None:
            training = next(split for split in splits if split.is_training)
            shown.neighbours.extend(_neighbours(captions, made, judged.near, training, size))
    benchmark = None
    if tasks and not config.text_encoders:
        left_out.append("tasks: the model reads no text")
    elif tasks:
        detector = load_detector().to(parts.vae.device)
        judges = Judges(detector=detector, network=network, styles=learned.styles)
        verdicts: dict[str, dict[str, Verdicts]] = {}
        for group in tasks:
            captions = [group.caption(row, seed) for row in group.rows[:count]]
            repeated = [caption for caption in captions for _ in range(SEEDS)]
            made = yield from (
                _generated(f"task-{group.name}", generate, repeated, seed, size, weights, out / "cache")
                if folder is None
                else pictures_of(folder, group, len(captions), size)
            )
            found, shown.tasks[group.name] = yield from task_verdicts(
                group, captions, made, parts.vae, judges, seed
            )
            verdicts |= found
        benchmark = benchmark_of(verdicts, digest(*weight_bytes(detector)), seed)
    shown.neighbours.sort(key=lambda neighbour: neighbour.ratio)
    del shown.neighbours[NEIGHBOURS:]
    codec, compared = _codec(parts.vae, splits, size, count, seed)
    shown.codec.extend(compared)
    report = Report(
        model=config.name if folder is None else folder.name,
        weights=weights if folder is None else None,
        size=size,
        sampler=to_dict(config.sampler),
        num_inference_steps=config.num_inference_steps,
        guidance=to_dict(config.guidance),
        data=data,
        count=count,
        seed=seed,
        objects=None if learned.objects is None else len(learned.objects.objects),
        left_out=tuple(left_out),
        groups=tuple(scored),
        benchmark=benchmark,
        codec=codec,
    )
    return report, shown


def _neighbours(
    captions: list[str], generated: Array, near: Nearest, training: Split, size: int
) -> Iterator[Neighbour]:
    for i in np.argsort(near.ratio, kind="stable")[:NEIGHBOURS].tolist():
        (picture,) = pictures(training, size, [int(near.index[i])])
        yield Neighbour(captions[i], generated[i], picture, float(near.ratio[i]))


def _codec(
    vae: AutoencoderKL | AutoencoderTiny, splits: Sequence[Split], size: int, count: int, seed: int
) -> tuple[Codec | None, list[list[Array]]]:
    """What the autoencoder and a linear code make of held-out pictures, if there are any; and some to show."""
    held_out = [group for split in splits if not split.is_training for group in groups(split, seed)]
    if not held_out:
        return None, []
    each = -(-count // len(held_out))  # about as many in all as a group has
    real = np.stack([x for group in held_out for x in pictures(group.split, size, group.rows[:each])])
    kinds = [real, np.stack(list(round_trips(vae, real)))]
    factor, channels = vae.config.factor, vae.config.latent_channels
    for split in splits:
        if split.is_training:
            (group,) = groups(split, seed)
            training = np.stack(list(pictures(split, size, group.rows[:PCA_PICTURES])))
            kinds.append(PatchPCA(training, factor, channels).round_trip(real))
    codec = Codec(
        pictures=len(real),
        latents=(channels, size // factor, size // factor),
        psnr=psnr(real, kinds[1]),
        pca_psnr=psnr(real, kinds[2]) if len(kinds) > 2 else None,
    )
    return codec, [[kind[i] for kind in kinds] for i in range(0, len(real), -(-len(real) // SHOWN))]


def _split_features(
    network: MobileNetV2, split: Split, size: int, folder: Path
) -> Generator[Progress, None, Array]:
    """Features of every real picture of a split, from the cache where they are there."""
    seen = network_features.SIZE, network_features.BLOCKS, network_features.CELLS
    versions = [(entry.key, entry.version) for entry in split.entries]
    shape = (len(split.entries), network_features.WIDTH)
    depends = digest(*weight_bytes(network), seen, versions, size)
    stored = ArrayCache(folder, f"features-{slug(split.name)}", depends, shape, "float32")
    for done in stored.fill(feature_blocks(network, pictures(split, size))):
        yield Progress(f"{split.name}: features", done, len(split.entries))
    return np.array(stored.read())


def _features(
    network: MobileNetV2, what: str, some: Iterable[Array], total: int
) -> Generator[Progress, None, Array]:
    blocks: list[Array] = []
    for block in feature_blocks(network, some):
        blocks.append(block)
        yield Progress(what, sum(map(len, blocks)), total)
    return np.concatenate(blocks)


def _generated(
    name: str, generate: Generate, captions: list[str], seed: int, size: int, weights: str, folder: Path
) -> Generator[Progress, None, Array]:
    """The model's pictures of the captions, uint8, from the cache where it has made them before."""
    depends = digest(weights, captions, seed, size)
    shape = (len(captions), size, size, 3)
    stored = ArrayCache(folder, f"generated-{slug(name)}", depends, shape, "uint8")

    def blocks() -> Iterator[Array]:
        for start in range(0, len(captions), GENERATED_TOGETHER):
            some = generate(captions[start : start + GENERATED_TOGETHER], seed + start)
            yield np.stack([np.asarray(images.cover(images.to_rgb(picture), size, size)) for picture in some])

    for done in stored.fill(blocks()):
        yield Progress(f"{name}: generating", done, len(captions))
    return stored.read()


def _blurred(picture: Array) -> Array:
    radius = BLUR * len(picture)
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(radius)))
