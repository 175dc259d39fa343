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
LEAST = 0.3
"""Probability of a centre from which it counts."""
OVERLAP = 0.5
"""Intersection over union from which two boxes are one thing."""
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
        self.trunk = (MobileNetV2() if trunk is None else trunk).features[:LAST]
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
        for i in range(LAST):
            x = self.trunk[i](x)
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
        x = torch.from_numpy(np.stack(batch)).to(detector.device).permute(0, 3, 1, 2).float()
        x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True) if scale != 1 else x
        centres, sides, vectors = detector(x.clamp(0, 255) / 255)
        for picture in zip(centres.sigmoid(), sides, vectors, strict=True):
            yield _things(detector, *picture, scale=scale, least=least)


def _things(
    detector: Detector, centres: Tensor, sides: Tensor, vectors: Tensor, *, scale: float, least: float
) -> list[Found]:
    """What one picture's maps say."""
    peaks = centres == F.max_pool2d(centres[None], 3, 1, 1)[0]
    rows, columns = torch.nonzero(peaks & (centres >= least), as_tuple=True)
    probabilities = centres[rows, columns]
    boxes = boxes_of(sides[:, rows, columns].T, rows, columns).clamp(0, SIZE) * scale
    kept = distinct(boxes, probabilities)
    best = detector.logits(vectors[:, rows, columns].T.float()[kept]).topk(AMONG, dim=1).indices.tolist()
    found = [
        Found(
            box=(box[0], box[1], box[2], box[3]),
            probability=probability,
            names=tuple(detector.names[i] for i in names),
        )
        for box, probability, names in zip(
            boxes[kept].tolist(), probabilities[kept].tolist(), best, strict=True
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
    """Of boxes that overlap by more than ``OVERLAP`` the most probable one: indices, the most probable first."""
    order = probabilities.argsort(descending=True, stable=True)
    overlaps = intersection_over_union(boxes[order, None], boxes[None, order])
    kept: list[int] = []
    for i in range(len(order)):
        if all(overlaps[i, j] <= OVERLAP for j in kept):
            kept.append(i)
    return order[kept]


def intersection_over_union(a: Float[Tensor, "*n 4"], b: Float[Tensor, "*m 4"]) -> Float[Tensor, "*k"]:
    """Of boxes that are broadcast against each other."""
    shared = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)]
    inside = shared.prod(-1)
    return inside / (areas[0] + areas[1] - inside).clamp(min=1e-6)
