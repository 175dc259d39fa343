"""Which things a picture of icons shows, and where: a small detector of our own that the package carries.

It finds centres, as CenterNet does (Zhou et al. 2019, "Objects as Points"): every cell of a grid says whether a thing's
centre lies in it, how far the four sides of its box are, and by a vector what it is. Classes are directions in the
vectors' space, so that thousands of names are a small table. ``tools/train_detector.py`` makes its weights.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from stable_diffusion.data.cache import Array
from stable_diffusion.evaluation.features import MEAN, STD, MobileNetV2
from stable_diffusion.nn.blocks import Placed

FOLDER = Path(__file__).parents[1] / "weights" / "detector"
WEIGHTS, NAMES = "detector.safetensors", "names.json"

SIZE = 128
"""Side in pixels at which the detector sees every picture."""
STRIDE = 8
"""Side of a cell in pixels."""
WIDTH = 128
"""Channels of the joined maps, and of the vectors."""
FINEST = 3
READ = {FINEST: 4 * 24, 6: 32, 13: 96, 17: 320}
"""Blocks of MobileNetV2 whose maps are read, at strides 4 (as four times the channels at 8), 8, 16 and 32."""
LAST = max(READ) + 1
SHARPNESS = 20.0
"""Of the classes: their logits are cosines times this."""
AMONG = 5
"""Names that a thing may go by: the drawings of many objects are much alike."""
LEAST = 0.4
"""Probability of a centre from which it counts."""
LARGE = 80.0
"""Side in pixels above which a thing's name is read in the picture at half its size: there it is as large as most that
the detector learned."""
OVERLAP = 0.6
"""Part of the smaller of two boxes that both share from which they are one thing."""
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Found:
    """One thing that the detector sees."""

    box: tuple[float, float, float, float]
    """Left, top, right and bottom, in pixels of the picture."""
    probability: float
    names: tuple[str, ...]
    """The ``AMONG`` most probable ones, the most probable first."""

    @property
    def area(self) -> float:
        """Of the box, in pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


def _convolution(ins: int, outs: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(ins, outs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outs), nn.ReLU())


class Residual(nn.Module):
    """Two convolutions around a skip (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _convolution(channels, channels, 3)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return F.relu(x + self.norm2(self.conv2(self.conv1(x))))


class Detector(Placed):
    """Maps of MobileNetV2 at strides 4 to 32, joined at stride 8 (Lin et al. 2017), and three heads.

    Args:
        names: the classes.
        trunk: what the weights of MobileNetV2 begin as; random without it.
    """

    def __init__(self, names: Sequence[str], trunk: MobileNetV2 | None = None) -> None:
        super().__init__()
        self.names = tuple(names)
        blocks = (MobileNetV2() if trunk is None else trunk).features.children()
        self.trunk = nn.Sequential(*itertools.islice(blocks, LAST))
        self.lateral = nn.ModuleDict({str(i): nn.Conv2d(ins, WIDTH, 1) for i, ins in READ.items()})
        self.coarse = _convolution(WIDTH, WIDTH, 3)
        self.joined = Residual(WIDTH)
        self.where = nn.Conv2d(WIDTH, 5, 1)
        self.what = nn.Sequential(_convolution(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1))
        self.classes = nn.Parameter(0.1 * torch.randn(len(self.names), WIDTH))  # short ones turn fast
        nn.init.constant_(self.where.bias[:1], -4.0)  # type: ignore[index]  # few cells hold a centre

    def forward(
        self, x: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b i j"], Float[Tensor, "b 4 i j"], Float[Tensor, "b d i j"]]:
        """Logits of a centre, the box's sides in pixels from the cell's middle, and vectors, of pixels in [0, 1]."""
        mean, std = (x.new_tensor(v)[:, None, None] for v in (MEAN, STD))
        x = (x - mean) / std
        maps = {}
        for i, block in enumerate(self.trunk):
            x = block(x)
            if i in READ:
                maps[i] = self.lateral[str(i)](F.pixel_unshuffle(x, 2) if i == FINEST else x)
        finest, fine, middle, coarse = maps.values()
        middle = self.coarse(middle + F.interpolate(coarse, scale_factor=2, mode="nearest"))
        x = self.joined(finest + fine + F.interpolate(middle, scale_factor=2, mode="nearest"))
        where = self.where(x).float()
        return where[:, 0], 2 * STRIDE * F.softplus(where[:, 1:]), self.what(x)

    def logits(self, vectors: Float[Tensor, "n d"]) -> Float[Tensor, "n classes"]:
        """Of each class."""
        return SHARPNESS * F.normalize(vectors, dim=1) @ F.normalize(self.classes, dim=1).T


def load_detector(folder: Path = FOLDER) -> Detector:
    """The packaged detector, or one that was trained here, for computing only."""
    names = json.loads((folder / NAMES).read_text(encoding="utf-8"))
    detector = Detector(names)
    detector.load_state_dict({k: v.float() for k, v in load_file(folder / WEIGHTS).items()})
    return detector.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@torch.inference_mode()
def detect(detector: Detector, pictures: Iterable[Array], least: float = LEAST) -> Iterator[list[Found]]:
    """The things in each picture, the largest first; pictures are uint8 RGB squares, ``h w 3``, of one size."""
    pictures = iter(pictures)
    while batch := list(itertools.islice(pictures, BATCH)):
        scale = len(batch[0]) / SIZE
        x = torch.from_numpy(np.stack(batch)).to(detector.device).permute(0, 3, 1, 2).float().div(255)
        whole, half = (
            detector(F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1))
            for side in (SIZE, SIZE // 2)
        )
        for i in range(len(batch)):
            one = tuple((centres[i], sides[i], vectors[i]) for centres, sides, vectors in (whole, half))
            yield _things(detector, *one, scale=scale, least=least)


Maps = tuple[Tensor, Tensor, Tensor]
"""What the detector says of one picture: logits of centres, sides, vectors."""


def _things(detector: Detector, whole: Maps, half: Maps, *, scale: float, least: float) -> list[Found]:
    """What one picture's maps say; the names of large things stand in those of the half."""
    centres, sides, vectors = whole
    p = centres.sigmoid()
    rows, columns = torch.nonzero((p == F.max_pool2d(p[None], 3, 1, 1)[0]) & (p >= least), as_tuple=True)
    boxes = boxes_of(sides[:, rows, columns].T, rows, columns).clamp(0, SIZE)
    kept = distinct(boxes, p[rows, columns])
    boxes, rows, columns = boxes[kept], rows[kept], columns[kept]
    large = (boxes[:, 2:] - boxes[:, :2]).amax(1) > LARGE
    middles = ((boxes[:, :2] + boxes[:, 2:]) / (4 * STRIDE)).long().clamp(max=half[0].shape[0] - 1)
    named = torch.where(large, half[2][:, middles[:, 1], middles[:, 0]], vectors[:, rows, columns]).T.float()
    best = detector.logits(named).topk(min(AMONG, len(detector.names)), dim=1).indices.tolist()
    found = [
        Found(
            box=(box[0], box[1], box[2], box[3]),
            probability=probability,
            names=tuple(detector.names[i] for i in names),
        )
        for box, probability, names in zip(
            (boxes * scale).tolist(), p[rows, columns].tolist(), best, strict=True
        )
    ]
    return sorted(found, key=lambda thing: -thing.area)


def boxes_of(
    sides: Float[Tensor, "n 4"], rows: Float[Tensor, " n"], columns: Float[Tensor, " n"]
) -> Float[Tensor, "n 4"]:
    """Left, top, right, bottom, from their distances to the middles of cells."""
    x, y = STRIDE * (columns + 0.5), STRIDE * (rows + 0.5)
    return torch.stack([x, y, x, y], dim=1) + sides * sides.new_tensor([-1, -1, 1, 1])


def distinct(boxes: Float[Tensor, "n 4"], probabilities: Float[Tensor, " n"]) -> Tensor:
    """Of boxes that share more than ``OVERLAP`` of the smaller the most probable one, the most probable first.

    So a wheel does not count beside its car, nor what two things together look like.
    """
    order = probabilities.argsort(descending=True, stable=True)
    a, b = boxes[order, None], boxes[None, order]
    smaller = torch.minimum(_area(a), _area(b)).clamp(min=1e-6)
    overlaps = _shared(a, b) / smaller
    kept: list[int] = []
    for i in range(len(order)):
        if all(overlaps[i, j] <= OVERLAP for j in kept):
            kept.append(i)
    return order[kept]


def intersection_over_union(a: Float[Tensor, "*n 4"], b: Float[Tensor, "*m 4"]) -> Float[Tensor, "*k"]:
    """Of boxes that are broadcast against each other."""
    shared = _shared(a, b)
    return shared / (_area(a) + _area(b) - shared).clamp(min=1e-6)


def _shared(a: Tensor, b: Tensor) -> Tensor:
    return (
        (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    )


def _area(box: Tensor) -> Tensor:
    return (box[..., 2:] - box[..., :2]).prod(-1)
