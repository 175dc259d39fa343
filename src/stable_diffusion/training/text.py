"""What frozen text encoders say of captions: cached, or encoded as a batch needs it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stable_diffusion.config import TextEncoderConfig
from stable_diffusion.data.cache import Array
from stable_diffusion.nn.text import PromptEncoder
from stable_diffusion.training.whitening import TextAffine, whitening

TOGETHER = 32  # captions that are encoded at once
MEASURED = 8192  # captions, at most, that whitening is measured on


class TextCache:
    """A frozen encoder's embeddings of every caption: for each its real tokens, then its pooled vector.

    Args:
        rows: all of them, one caption after the other, in float16.
        starts: first row of each caption, and the number of rows at the end.
        context_length: tokens that a caption is padded to.

    Attributes:
        change: the change of basis applied when they are read; None for none.
    """

    def __init__(self, rows: Array, starts: Array, context_length: int) -> None:
        self.rows, self.starts, self.context_length = rows, starts, context_length
        self.change: TextAffine | None = None

    @classmethod
    def blank(cls, config: TextEncoderConfig) -> TextCache:
        """Of one caption of full length, to measure with."""
        rows = np.zeros((config.context_length + 1, config.hidden_size), np.float16)
        return cls(rows, np.array([0, len(rows)]), config.context_length)

    def whitening(self, most: int = MEASURED) -> TextAffine:
        """What whitens the embeddings, measured on up to `most` captions."""
        captions = range(0, len(self.starts) - 1, 1 + len(self.starts) // most)
        rows = [self.rows[self.starts[i] : self.starts[i + 1]].astype(np.float32) for i in captions]
        tokens = torch.from_numpy(np.concatenate([row[:-1] for row in rows]))
        return TextAffine(whitening(tokens), whitening(torch.from_numpy(np.stack([row[-1] for row in rows]))))

    def read(self, captions: list[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Padded tokens, their mask, and the pooled vectors of the captions of these numbers."""
        first, last = self.starts[captions], self.starts[np.asarray(captions) + 1] - 1
        places = first[:, None] + np.arange(self.context_length)
        mask = places < last[:, None]
        padded = self.rows[np.where(mask, places, last[:, None])]
        padded[~mask] = 0
        tokens = torch.from_numpy(padded).to(device).float()
        pooled = torch.from_numpy(self.rows[last]).to(device).float()
        if self.change is not None:
            tokens, pooled = self.change.tokens(tokens), self.change.pooled(pooled)
        return tokens, torch.from_numpy(mask).to(device), pooled


class TextReader:
    """A frozen encoder's embeddings of every caption, encoded as they are read: no cache of gigabytes.

    Args:
        text_encoder: the model's.
        index: of the encoder in it.
        captions: all that there are.
        dtype: the 16-bit format to compute in; None for float32.

    Attributes:
        change: the change of basis applied when they are read; None for none.
    """

    def __init__(
        self,
        text_encoder: PromptEncoder,
        index: int,
        captions: Sequence[str],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.text_encoder, self.index, self.captions, self.dtype = text_encoder, index, captions, dtype
        self.change: TextAffine | None = None

    def whitening(self, most: int = MEASURED) -> TextAffine:
        """What whitens the embeddings, measured on up to `most` captions."""
        numbers = range(0, len(self.captions), 1 + len(self.captions) // most)
        chunks = [numbers[start : start + TOGETHER] for start in range(0, len(numbers), TOGETHER)]
        read = [self._encoded([*chunk]) for chunk in chunks]
        tokens = torch.cat([tokens[mask] for tokens, mask, _ in read])
        return TextAffine(whitening(tokens), whitening(torch.cat([pooled for _, _, pooled in read])))

    def read(self, captions: list[int], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Padded tokens, their mask, and the pooled vectors of the captions of these numbers."""
        tokens, mask, pooled = (x.to(device) for x in self._encoded(captions))
        if self.change is not None:
            tokens, pooled = self.change.tokens(tokens), self.change.pooled(pooled)
        return tokens, mask, pooled

    @torch.no_grad()
    def _encoded(self, captions: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        batch = self.text_encoder.tokenizers[self.index]([self.captions[i] for i in captions])
        context, reads_padding = batch.input_ids.shape[1], self.text_encoder.configs[self.index].reads_padding
        # What is behind the longest caption changes nothing, unless the encoder reads it.
        length = context if reads_padding else int(batch.attention_mask.sum(dim=1).max())
        device, ids, real = next(self.text_encoder.parameters()).device, batch.input_ids, batch.attention_mask
        with torch.autocast(device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            embeds = self.text_encoder.read(self.index, ids[:, :length], real[:, :length])
        mask = torch.ones(embeds.tokens.shape[:2], dtype=torch.bool) if embeds.mask is None else embeds.mask
        tokens = embeds.tokens.float() * mask[..., None]
        return (
            F.pad(tokens, (0, 0, 0, context - length)),
            F.pad(mask, (0, context - length)),
            embeds.pooled.float(),
        )


FrozenText = Sequence[TextCache | TextReader | None]
"""Of each text encoder; None for one that is trained jointly."""
