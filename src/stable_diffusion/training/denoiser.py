"""The denoiser's stage: the U-Net, and the text encoders that train along, on cached latents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from stable_diffusion.config import ModelConfig, TextEncoderConfig
from stable_diffusion.data.cache import Array
from stable_diffusion.diffusion.objective import loss_weight, target
from stable_diffusion.diffusion.schedule import Schedule
from stable_diffusion.nn.text import PromptEmbeds, PromptEncoder
from stable_diffusion.nn.unet import UNet
from stable_diffusion.training.loop import Draw
from stable_diffusion.training.whitening import TextAffine, whitening


class TextCache:
    """A frozen encoder's embeddings of every caption: for each its real tokens, then its pooled vector.

    Args:
        rows: all of them, one caption after the other, in float16.
        starts: first row of each caption, and the number of rows at the end.
        context_length: tokens that a caption is padded to.

    Attributes:
        change: what they are changed by as they are read; None for as they are.
    """

    def __init__(self, rows: Array, starts: Array, context_length: int) -> None:
        self.rows, self.starts, self.context_length = rows, starts, context_length
        self.change: TextAffine | None = None

    def whitening(self, most: int = 8192) -> TextAffine:
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


class DenoiserStage(nn.Module):
    """Weighted squared error of the prediction at random noise levels (Ho et al. 2020, algorithm 1)."""

    name = "denoiser"

    def __init__(
        self, unet: UNet, text_encoder: PromptEncoder, scheduler: Schedule, config: ModelConfig
    ) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder
        self.scheduler = scheduler
        self.config = config
        self.settings = config.training.denoiser
        self.latents: Array | None = None  # b c h w, float16
        self.weights: tuple[float, ...] | None = None  # how often each picture is drawn
        self.captions: list[str] = [""]  # every distinct caption; the empty one first
        self.captions_of: Sequence[Sequence[int]] = []  # numbers of each picture's captions
        self.text_caches: list[TextCache | None] = []  # of each frozen encoder

    def batch(self, draw: Draw) -> tuple[Tensor, ...]:
        """Latents, noise, times, alpha, sigma and loss weight; then for each encoder what it says or has to read."""
        assert self.latents is not None, "set `latents` and the captions first"
        indices = draw.indices(len(self.latents), self.weights)
        generator = draw.generator()
        noise = draw.share(torch.randn(draw.batch_size, *self.latents.shape[1:], generator=generator))
        lots = draw.share(torch.rand(draw.batch_size, 3, generator=generator, dtype=torch.float64))
        uniform, dropped, chosen = lots.unbind(dim=1)
        captions = [
            self.captions_of[index][int(lot * len(self.captions_of[index]))] if keep else 0
            for index, lot, keep in zip(
                indices, chosen.tolist(), dropped >= self.config.training.caption_dropout, strict=True
            )
        ]
        latents = torch.from_numpy(self.latents[indices]).to(self.unet.conv_out.weight.device).float()
        return self._tensors(latents, noise, uniform, captions)

    def example(self) -> tuple[Tensor, ...]:
        vae = self.config.vae
        size = self.config.sample_size // vae.factor
        count = self.settings.batch_size
        latents = torch.randn(count, vae.latent_channels, size, size)
        caches, self.text_caches = self.text_caches, [_blank(c) for c in self.text_encoder.configs]
        try:
            return self._tensors(latents, latents.flip(0), torch.linspace(0.1, 0.9, count), [0] * count)
        finally:
            self.text_caches = caches

    def _tensors(self, x0: Tensor, noise: Tensor, uniform: Tensor, captions: list[int]) -> tuple[Tensor, ...]:
        device = self.unet.conv_out.weight.device
        timesteps = self.scheduler.training_timesteps(uniform)
        alpha, sigma = self.scheduler.alpha_sigma(timesteps)
        prediction = self.scheduler.config.prediction_type
        weight = loss_weight(self.config.training.loss_weight, prediction, timesteps, self.scheduler)
        text: list[Tensor] = []
        for i, cache in enumerate(self.text_caches):
            if cache is not None:
                text += cache.read(captions, device)
            else:
                tokens = self.text_encoder.tokenizers[i]([self.captions[c] for c in captions])
                text += [tokens.input_ids, tokens.attention_mask]
        scalars = [value.float().to(device) for value in (timesteps, alpha, sigma, weight)]
        channels_last = [value.to(device, memory_format=torch.channels_last) for value in (x0, noise)]
        return (*channels_last, *scalars, *(value.to(device) for value in text))

    def forward(
        self,
        x0: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        timesteps: Float[Tensor, " b"],
        alpha: Float[Tensor, " b"],
        sigma: Float[Tensor, " b"],
        weight: Float[Tensor, " b"],
        *text: Tensor,
    ) -> Float[Tensor, ""]:
        embeds = self._embeds(list(text), len(x0))
        alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        pooled = embeds.pooled if self.config.unet.pooled_projection_dim is not None else None
        output = self.unet(alpha * x0 + sigma * noise, timesteps, embeds.tokens, embeds.mask, pooled)
        wanted = target(self.scheduler.config.prediction_type, x0, noise, alpha, sigma)
        return (weight * ((output.float() - wanted) ** 2).mean(dim=(1, 2, 3))).mean()

    def _embeds(self, text: list[Tensor], count: int) -> PromptEmbeds:
        parts = []
        for i, config in enumerate(self.text_encoder.configs):
            if config.trainable:
                parts.append(self.text_encoder.read(i, text.pop(0), text.pop(0)))
            else:
                tokens, mask, pooled = text.pop(0), text.pop(0), text.pop(0)
                parts.append(PromptEmbeds(tokens, mask if config.architecture == "bert" else None, pooled))
        return self.text_encoder.join(parts) if parts else self.text_encoder([""] * count)


def _blank(config: TextEncoderConfig) -> TextCache | None:
    """A frozen encoder's cache of one caption of full length, to measure with."""
    if config.trainable:
        return None
    rows = config.context_length + 1
    return TextCache(np.zeros((rows, config.hidden_size), np.float16), np.array([0, rows]), rows - 1)
