"""Training of the detector, on scenes composed as it goes: one command, one seed."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stable_diffusion.data.item import Progress, Split
from stable_diffusion.errors import InputError
from stable_diffusion.evaluation.benchmark import is_plain
from stable_diffusion.evaluation.detector import (
    SIZE,
    STRIDE,
    Detector,
    boxes_of,
    intersection_over_union,
)
from stable_diffusion.evaluation.features import MobileNetV2
from stable_diffusion.evaluation.pictures import pictures
from stable_diffusion.evaluation.scenes import Composer, Scene, Sprite, cut_out
from stable_diffusion.nn.vae import AutoencoderKL, AutoencoderTiny
from stable_diffusion.runtime import has_native_bf16

STEPS = 2600
BATCH = 32
RATE = 2e-3
DECAY = 0.05
SMOOTHING = 0.1
FROZEN = 7
"""Blocks of MobileNetV2 that stay as they are, down to stride 8: edges and textures, and most of the time."""
ROUND_TRIPS = 1 / 16
"""Part of the pictures that go through the autoencoder, their latents disturbed: they suffer as generated ones do."""
DISTURBANCE = 0.35
"""Largest standard deviation of that noise; latents have about 1."""
REACH = 12.0
"""Pixels from a thing's centre within which cells learn its box and its name, at most; less for small things."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What cells should say, of a batch."""

    centres: Float[Tensor, "b i j"]
    """1 at centres, falling off around them (CenterNet, equation 1)."""
    cells: Tensor
    """Picture, row and column of each cell that learns a box and a name, ``n 3``."""
    boxes: Float[Tensor, "n 4"]
    labels: Tensor
    weights: Float[Tensor, " n"]
    """Of these cells: 1 in all for each thing."""


def plain_drawings(splits: Sequence[Split]) -> tuple[list[Sprite], list[str]]:
    """The drawings of one thing on white, of all splits, cut out; and the names that their labels number.

    Raises:
        InputError: the set has none, as its pictures have no field ``object``.
    """
    plain = {
        split.name: [
            row
            for row, entry in enumerate(split.entries)
            if is_plain(entry) and isinstance(entry.fields.get("object"), str)
        ]
        for split in splits
    }
    objects = {s.name: [str(s.entries[row].fields["object"]) for row in plain[s.name]] for s in splits}
    names = sorted({name for some in objects.values() for name in some})
    if not names:
        raise InputError(
            "the set names no objects: the detector learns from pictures with the field 'object'"
        )
    number = {name: i for i, name in enumerate(names)}
    sprites = []
    for split in splits:
        labels = [number[name] for name in objects[split.name]]
        sprites += cut_out(pictures(split, SIZE, plain[split.name]), labels)
    return sprites, names


def train(
    sprites: Sequence[Sprite],
    names: Sequence[str],
    vae: AutoencoderKL | AutoencoderTiny | None,
    trunk: MobileNetV2 | None,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
) -> Generator[tuple[Progress, dict[str, float]], None, Detector]:
    """Trains a detector of these names; yields the losses of each step.

    Args:
        sprites: what scenes are composed of.
        names: of their labels.
        vae: whose round trips some of the scenes make.
        trunk: MobileNetV2 with the weights that it begins with; they are changed.
        steps: of the optimizer, the learning rate rising over the first twentieth and falling after it.
        batch: scenes a step.
        seed: decides on the first weights and on all scenes.
    """
    random = np.random.default_rng(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        detector = Detector(names, trunk).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    detector.train().requires_grad_(True)
    detector.trunk[:FROZEN].eval().requires_grad_(False)
    _without_strides(detector.trunk[FROZEN:])
    learning = [parameter for parameter in detector.parameters() if parameter.requires_grad]
    noise = torch.Generator().manual_seed(seed)
    composer = Composer(sprites, SIZE)
    optimizer = torch.optim.AdamW(learning, lr=RATE, weight_decay=DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    fast = has_native_bf16("cpu")
    for step in range(1, steps + 1):
        scenes = [composer.scene(random) for _ in range(batch)]
        x = spoilt(images_of(scenes), vae, random, noise)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            outputs = detector(x.add(1).div(2))
        losses = losses_of(detector, outputs, targets_of(scenes))
        sum(losses.values(), torch.zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(learning, 10.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        yield Progress("training", step, steps), {k: float(v.detach()) for k, v in losses.items()}
    return detector.eval().requires_grad_(False)


def _without_strides(network: nn.Module) -> None:
    """Filters that act on each channel by itself skip no position, and every other result is dropped instead.

    The same numbers, in half of a training step: oneDNN 3.x computes the gradients of strided ones without vectors.
    """
    for conv in network.modules():
        if isinstance(conv, nn.Conv2d) and conv.groups > 1 and conv.stride == (2, 2):
            conv.stride = (1, 1)
            conv.register_forward_hook(lambda conv, ins, out: out[:, :, ::2, ::2])


def images_of(scenes: Sequence[Scene]) -> Float[Tensor, "b 3 h w"]:
    """The scenes' pictures in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in scenes]))
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def spoilt(
    x: Float[Tensor, "b 3 h w"],
    vae: AutoencoderKL | AutoencoderTiny | None,
    random: np.random.Generator,
    noise: torch.Generator,
) -> Float[Tensor, "b 3 h w"]:
    """The first of the pictures after a round trip with disturbed latents; of the others some blurred, some noisy."""
    count = round(len(x) * ROUND_TRIPS) if vae is not None else 0
    parts = [] if count == 0 else [_disturbed(x[:count], vae, random, noise)]
    for start in range(count, len(x), 8):
        part = x[start : start + 8]
        if (kind := random.random()) < 0.3:
            small = F.interpolate(
                part, scale_factor=random.uniform(0.5, 0.8), mode="bilinear", antialias=True
            )
            part = F.interpolate(small, x.shape[2:], mode="bilinear")
        elif kind < 0.5:
            part = part + random.uniform(0.02, 0.12) * torch.randn(part.shape, generator=noise)
        parts.append(part)
    gain = torch.from_numpy(random.uniform(0.9, 1.05, (len(x), 1, 1, 1)).astype(np.float32))
    return ((torch.cat(parts) * gain).clamp(-1, 1)).contiguous(memory_format=torch.channels_last)


def _disturbed(
    x: Tensor,
    vae: AutoencoderKL | AutoencoderTiny | None,
    random: np.random.Generator,
    noise: torch.Generator,
) -> Tensor:
    assert vae is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=has_native_bf16("cpu")):
        latents = vae.encode(x)
        level = torch.from_numpy(random.uniform(0, DISTURBANCE, (len(x), 1, 1, 1)).astype(np.float32))
        return vae.decode(latents + level * torch.randn(latents.shape, generator=noise)).float()


def targets_of(scenes: Sequence[Scene]) -> Targets:
    """What the cells should say of these scenes."""
    side = SIZE // STRIDE
    middles = (torch.arange(side) + 0.5) * STRIDE
    centres = torch.zeros(len(scenes), side, side)
    cells, boxes, labels, weights = [], [], [], []
    for number, scene in enumerate(scenes):
        order = np.argsort(-scene.boxes[:, 2:].max(1), kind="stable")
        for box, label in zip(
            torch.from_numpy(scene.boxes[order]), scene.labels[order].tolist(), strict=True
        ):
            width, height = (box[2:] - box[:2]).tolist()
            x, y = ((box[:2] + box[2:]) / 2).tolist()
            # A cell is wider than the standard deviation of the smallest things.
            spread_x, spread_y = max(width / 8, 4.0), max(height / 8, 4.0)
            across, down = ((middles - x) / spread_x) ** 2, ((middles - y) / spread_y) ** 2
            hill = torch.exp(-(across[None] + down[:, None]) / 2)
            row, column = (min(int(v / STRIDE), side - 1) for v in (y, x))
            hill[row, column] = 1
            centres[number] = torch.maximum(centres[number], hill)
            near_x = (middles - x).abs() <= max(min(width / 4, REACH), STRIDE / 2)
            near_y = (middles - y).abs() <= max(min(height / 4, REACH), STRIDE / 2)
            found = torch.nonzero(near_y[:, None] & near_x[None])
            cells.append(F.pad(found, (1, 0), value=number))
            boxes.append(box.expand(len(found), 4))
            labels.append(torch.full((len(found),), label))
            weights.append(torch.full((len(found),), 1 / max(len(found), 1)))
    return Targets(
        centres=centres,
        cells=torch.cat(cells),
        boxes=torch.cat(boxes),
        labels=torch.cat(labels),
        weights=torch.cat(weights),
    )


def losses_of(
    detector: Detector, outputs: tuple[Tensor, Tensor, Tensor], targets: Targets
) -> dict[str, Tensor]:
    """Of centres (CenterNet's focal loss, equation 1), of boxes (generalised IoU) and of names (cross-entropy)."""
    logits, sides, vectors = outputs
    things = targets.weights.sum().clamp(min=1)
    p = logits.sigmoid().clamp(1e-4, 1 - 1e-4)
    peak = targets.centres == 1
    focal = torch.where(peak, (1 - p) ** 2 * p.log(), (1 - targets.centres) ** 4 * p**2 * (1 - p).log())
    number, rows, columns = targets.cells.T
    boxes = boxes_of(sides[number, :, rows, columns], rows, columns)
    names = F.cross_entropy(
        detector.logits(vectors[number, :, rows, columns].float()),
        targets.labels,
        reduction="none",
        label_smoothing=SMOOTHING,
    )
    return {
        "centres": -focal.sum() / things,
        "boxes": 2 * (targets.weights * (1 - generalised(boxes, targets.boxes))).sum() / things,
        "names": (targets.weights * names).sum() / things,
    }


def generalised(a: Float[Tensor, "n 4"], b: Float[Tensor, "n 4"]) -> Float[Tensor, " n"]:
    """Generalised intersection over union of pairs of boxes, -1 to 1 (Rezatofighi et al. 2019)."""
    outer = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared
    return intersection_over_union(a, b) - (outer - union) / outer.clamp(min=1e-6)
