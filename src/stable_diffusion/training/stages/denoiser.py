"""The denoiser's stage: the U-Net, and the text encoders that are trained jointly, on cached latents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stable_diffusion.config import Part
from stable_diffusion.data.cache import Array
from stable_diffusion.diffusion.objective import loss_weight, target
from stable_diffusion.diffusion.schedule import FLOAT64
from stable_diffusion.nn.text import PromptEmbeds
from stable_diffusion.nn.unet import UNet
from stable_diffusion.training.draw import FLOAT32, Draw, Samples
from stable_diffusion.training.events import TrainStep
from stable_diffusion.training.stage import Batch, Stage, StageSettings
from stable_diffusion.training.text import FrozenText, TextCache
from stable_diffusion.training.whitening import whitened
from stable_diffusion.training.workspace import TrainableParts, Workspace, latent_shape


@dataclass(frozen=True, kw_only=True)
class DenoiserSettings(StageSettings):
    """Settings of the stage ``denoiser``."""

    kind: str = "denoiser"
    learning_rate: float = 8e-4
    epochs: float = 30.0
    min_steps: int = 300
    caption_dropout: Part = 0.1
    """Part of the captions that training replaces by the empty one, which guidance needs."""
    loss_weight: Literal["simple", "min_snr", "bound"] = "simple"
    """Weight of each noise level in the loss (`diffusion.objective`)."""


class DenoiserStage(Stage):
    """Weighted squared error of the prediction at random noise levels (Ho et al. 2020, algorithm 1)."""

    share = 0.85
    latents: Array  # b c h w, float16
    captions_of: Sequence[Sequence[int]]  # numbers of each picture's captions
    text_caches: FrozenText

    def __init__(self, parts: TrainableParts, settings: DenoiserSettings) -> None:
        super().__init__(settings)
        self.unet, self.text_encoder = parts.unet, parts.text_encoder
        self.scheduler, self.config = parts.scheduler, parts.config
        self.dropout, self.loss_weight = settings.caption_dropout, settings.loss_weight
        # Before the data is read: whether the schedule has that weight.
        loss_weight(self.loss_weight, self.scheduler.config.prediction_type, torch.ones(1), self.scheduler)
        self.captions: Sequence[str] = [""]  # every distinct caption; the empty one first
        self.whitened = ExitStack()

    def prepare(self, workspace: Workspace) -> Iterator[TrainStep]:
        """Encodes pictures and captions, and lets the U-Net read whitened text until ``finish``."""
        self.latents = yield from workspace.latents()
        self.text_caches = yield from workspace.text()
        self.captions, self.captions_of = workspace.captions, workspace.captions_of
        self.samples = Samples(len(self.latents), [entry.weight for entry in workspace.kept])
        changes = [None if cache is None else cache.change for cache in self.text_caches]
        self.whitened.enter_context(whitened(self.unet, self.text_encoder, changes))

    def batch(self, draw: Draw) -> Batch:
        """Latents, noise, times, alpha, sigma and loss weight; then for each encoder what it says or has to read."""
        indices = draw.indices(self.samples)
        generator = draw.generator()
        noise = draw.share(
            torch.randn(draw.batch_size, *self.latents.shape[1:], generator=generator, **FLOAT32)
        )
        lots = draw.share(torch.rand(draw.batch_size, 3, generator=generator, **FLOAT64))
        uniform, dropped, chosen = lots.unbind(dim=1)
        captions = [
            self.captions_of[index][int(lot * len(self.captions_of[index]))] if keep else 0
            for index, lot, keep in zip(indices, chosen.tolist(), dropped >= self.dropout, strict=True)
        ]
        latents = torch.from_numpy(self.latents[indices]).to(self.device).float()
        return self._tensors(latents, noise, uniform, captions, self.text_caches)

    def example(self, count: int) -> Batch:
        """Random latents with the empty caption, or a blank one of full length."""
        latents = torch.randn(count, *latent_shape(self.config), **FLOAT32)
        times = torch.linspace(0.1, 0.9, count, **FLOAT32)
        configs = self.text_encoder.configs
        blank = [None if config.trainable else TextCache.blank(config) for config in configs]
        return self._tensors(latents, latents.flip(0), times, [0] * count, blank)

    def _tensors(
        self, x0: Tensor, noise: Tensor, uniform: Tensor, captions: list[int], caches: FrozenText
    ) -> Batch:
        text: list[Tensor] = []
        for cache, tokenizer in zip(caches, self.text_encoder.tokenizers, strict=True):
            if cache is not None:
                text += cache.read(captions, self.device)
            else:
                tokens = tokenizer([self.captions[number] for number in captions])
                text += [tokens.input_ids, tokens.attention_mask]
        scalars = [value.float() for value in self._noise_levels(uniform)]
        return (*self.placed(x0, noise), *(value.to(self.device) for value in scalars + text))

    def _noise_levels(self, uniform: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], ...]:
        """Times, alpha, sigma and loss weight, from uniform samples."""
        timesteps = self.scheduler.training_timesteps(uniform)
        prediction = self.scheduler.config.prediction_type
        weight = loss_weight(self.loss_weight, prediction, timesteps, self.scheduler)
        return (timesteps, *self.scheduler.alpha_sigma(timesteps), weight)

    def forward(
        self,
        x0: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        timesteps: Float[Tensor, " b"],
        alpha: Float[Tensor, " b"],
        sigma: Float[Tensor, " b"],
        weight: Float[Tensor, " b"],
        *text: Tensor,
    ) -> dict[str, Tensor]:
        embeds = self._embeds(list(text), len(x0))
        alpha, sigma = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        output = self._predict(self.unet, alpha * x0 + sigma * noise, timesteps, embeds)
        wanted = target(self.scheduler.config.prediction_type, x0, noise, alpha, sigma)
        return {"prediction": (weight * ((output - wanted) ** 2).mean(dim=(1, 2, 3))).mean()}

    def _predict(self, unet: UNet, x: Tensor, timesteps: Tensor, embeds: PromptEmbeds) -> Tensor:
        pooled = embeds.pooled if self.config.unet.pooled_projection_dim is not None else None
        return unet(x, timesteps, embeds.tokens, embeds.mask, pooled).float()

    def _embeds(self, text: list[Tensor], count: int) -> PromptEmbeds:
        parts = []
        for i, config in enumerate(self.text_encoder.configs):
            if config.trainable:
                parts.append(self.text_encoder.read(i, text.pop(0), text.pop(0)))
            else:
                tokens, mask, pooled = text.pop(0), text.pop(0), text.pop(0)
                parts.append(PromptEmbeds(tokens, None if config.reads_padding else mask, pooled))
        return self.text_encoder.join(parts) if parts else self.text_encoder([""] * count)

    def finish(self, done: bool) -> None:
        """Folds the change of basis into the layers that read text: they read it as it is again."""
        self.whitened.close()
