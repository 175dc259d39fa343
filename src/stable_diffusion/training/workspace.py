"""What stages are prepared with: decoded pictures, latents and text, each made once and kept on disk."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from stable_diffusion.config import ModelConfig, TextEncoderConfig, to_dict
from stable_diffusion.data.cache import Array, ArrayCache, digest
from stable_diffusion.data.item import Entry, Source, squares
from stable_diffusion.errors import InputError, three_of
from stable_diffusion.files import read_json, write_json, writing
from stable_diffusion.generation.pipeline import Parts
from stable_diffusion.images import layers
from stable_diffusion.nn.blocks import weight_bytes
from stable_diffusion.nn.unet import UNet
from stable_diffusion.nn.vae import AutoencoderKL, AutoencoderTiny
from stable_diffusion.training.events import TrainStep
from stable_diffusion.training.text import TOGETHER, FrozenText, TextCache, TextReader

MOST_CACHED = 100_000  # captions whose embeddings are kept on disk: 20 KB each and an hour for 400,000


class TrainableParts(Parts, Protocol):
    """What training needs of a model."""

    @property
    def vae(self) -> AutoencoderKL | AutoencoderTiny: ...
    @property
    def unet(self) -> UNet: ...


class Workspace:
    """A run's data, encoded by its model as it is when it is asked. Each method yields progress and returns.

    Args:
        parts: the model's.
        data: captioned pictures.
        entries: those of `data`.
        folder: of the caches.
        dtype: the 16-bit format in which pictures, and captions as they are needed, are encoded; None for float32.

    Attributes:
        kept: the entries whose pictures can be decoded, in the order of all rows; complete after ``pictures``.
        captions: every distinct caption, sorted; the empty one first.
    """

    def __init__(
        self,
        parts: TrainableParts,
        data: Source,
        entries: Sequence[Entry],
        folder: Path,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.parts, self.data, self.folder, self.dtype = parts, data, folder, dtype
        self.kept = self.entries = entries
        self.captions = ["", *sorted({caption for entry in entries for caption in entry.captions} - {""})]
        self.size, self.alpha = parts.config.sample_size, parts.config.alpha
        of = (self.size, "alpha") if self.alpha else (self.size,)
        self._key = digest([(entry.key, entry.version) for entry in entries], *of)
        self._pictures: Array | None = None

    @property
    def captions_of(self) -> list[list[int]]:
        """Numbers of the captions of each entry of `kept`."""
        number = {caption: i for i, caption in enumerate(self.captions)}
        return [[number[caption] for caption in entry.captions] for entry in self.kept]

    def pictures(self) -> Generator[TrainStep, None, Array]:
        """Every picture at the training size, ``b h w 3``, uint8; ``b h w 4`` where the decoder gives opacity, too."""
        if self._pictures is not None:
            return self._pictures
        count, size, alpha = len(self.entries), self.size, self.alpha
        record = self.folder / "damaged.json"

        def blocks() -> Iterator[Array]:
            damaged: list[int] = []
            keys = [entry.key for entry in self.entries]
            for i, picture in enumerate(squares(self.data, keys, size, alpha=alpha)):
                if isinstance(picture, InputError):  # named below; until now only its header was read
                    damaged.append(i)
                    picture = Image.new("RGB", (size, size))
                yield (layers(picture) if alpha else np.asarray(picture))[None]
            write_json(record, {"rows": damaged})

        cache = ArrayCache(self.folder, "pictures", self._key, (count, size, size, 3 + alpha), "uint8")
        if PartialState().is_main_process and _rows(record, count) is None:
            with writing(cache.path):
                cache.path.unlink(missing_ok=True)  # nobody knows which of its rows are blank
        pictures = yield from _filled(cache, blocks(), "reading pictures", np.arange(count + 1))
        if damaged := _rows(record, count):
            names = three_of([self.entries[i].key for i in damaged])
            warnings.warn(
                f"{len(damaged)} pictures cannot be decoded and are left out: {names}", stacklevel=2
            )
            kept = sorted(set(range(count)) - set(damaged))
            if not kept:
                raise InputError(f"none of the {count} pictures can be decoded: check the image folder")
            self.kept, pictures = [self.entries[i] for i in kept], pictures[kept]
        self._pictures = pictures
        return pictures

    def latents(self) -> Generator[TrainStep, None, Array]:
        """The latents of every picture, in float16."""
        pictures, vae = (yield from self.pictures()), self.parts.vae
        count = len(pictures)

        @torch.no_grad()
        def blocks() -> Iterator[Array]:
            for start in range(0, count, TOGETHER):
                indices = list(range(start, min(start + TOGETHER, count)))
                pixels = read_pixels(pictures, indices, vae.device).contiguous(
                    memory_format=torch.channels_last
                )
                with torch.autocast(
                    vae.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None
                ):
                    latents = vae.encode(pixels)
                yield latents.float().cpu().numpy()

        shape = (count, *latent_shape(self.parts.config))
        cache = ArrayCache(
            self.folder, "latents", digest(self._key, shape, self.dtype, *weight_bytes(vae)), shape, "float16"
        )
        return (yield from _filled(cache, blocks(), "encoding pictures", np.arange(count + 1)))

    def text(self) -> Generator[TrainStep, None, FrozenText]:
        """Each frozen encoder's embeddings of the captions, whitened; None for an encoder that is trained."""
        caches: list[TextCache | TextReader | None] = []
        for i, config in enumerate(self.parts.text_encoder.configs):
            if config.trainable:
                caches.append(None)
            elif len(self.captions) > MOST_CACHED:
                caches.append(TextReader(self.parts.text_encoder, i, self.captions, self.dtype))
            else:
                caches.append((yield from self._encoded(i, config)))
        # Eigenvectors may differ from one machine to another: the first process's count.
        changes = broadcast_object_list([[cache and cache.whitening() for cache in caches]])[0]
        for cache, change in zip(caches, changes, strict=True):
            if cache is not None:
                cache.change = change
        return caches

    def _encoded(self, i: int, config: TextEncoderConfig) -> Generator[TrainStep, None, TextCache]:
        captions, encoder = self.captions, self.parts.text_encoder
        chunks = [captions[start : start + TOGETHER] for start in range(0, len(captions), TOGETHER)]
        read = [encoder.tokenizers[i](chunk).attention_mask | config.reads_padding for chunk in chunks]
        masks = torch.cat(read)
        starts = np.concatenate([[0], np.cumsum(masks.sum(dim=1).numpy() + 1)])

        @torch.no_grad()
        def blocks() -> Iterator[Array]:
            for chunk in chunks:
                embeds = encoder.encode(i, chunk)
                tokens, pooled = embeds.tokens.cpu(), embeds.pooled.cpu()
                mask = tokens.new_ones(tokens.shape[:2]).bool() if embeds.mask is None else embeds.mask.cpu()
                for said, real, whole in zip(tokens, mask, pooled, strict=True):
                    yield torch.cat([said[real], whole[None]]).numpy()

        key = digest(captions, to_dict(config), *weight_bytes(encoder.encoders[i]))
        shape = (int(starts[-1]), config.hidden_size)
        cache = ArrayCache(self.folder, f"captions-{i + 1}", key, shape, "float16")
        rows = yield from _filled(cache, blocks(), "encoding captions", starts)
        return TextCache(rows, starts, config.context_length)


def _rows(path: Path, count: int) -> list[int] | None:
    """Which of so many rows a file lists; None where there is no such file, or it is damaged."""
    try:
        rows = read_json(path).get("rows")
    except InputError:
        return None
    return rows if isinstance(rows, list) and all(i in range(count) for i in rows) else None


def _filled(
    cache: ArrayCache, blocks: Iterable[Array], doing: str, starts: Array
) -> Generator[TrainStep, None, Array]:
    """A cache's rows, which the first process fills; `starts` are each item's first row, and the end."""
    with PartialState().main_process_first():
        for done in cache.fill(blocks):
            yield TrainStep(doing, int(np.searchsorted(starts, done)) - 1, len(starts) - 1)
        return cache.read()


def read_pixels(
    pictures: Array, indices: list[int], device: torch.device | str = "cpu"
) -> Float[Tensor, "b c h w"]:
    """Rows of the picture cache as floats in [-1, 1]."""
    return torch.from_numpy(pictures[indices]).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def latent_shape(config: ModelConfig) -> tuple[int, int, int]:
    """Channels and sides of the latents of a model's training pictures."""
    side = config.sample_size // config.vae.factor
    return config.vae.latent_channels, side, side
