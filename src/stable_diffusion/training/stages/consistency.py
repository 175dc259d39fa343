"""The consistency stage: a trained denoiser learns to jump to clean latents, guidance included."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import torch
from jaxtyping import Float
from torch import Tensor

from stable_diffusion.config import Guidance
from stable_diffusion.diffusion.guidance import guide
from stable_diffusion.diffusion.names import FLOW_SPACING
from stable_diffusion.diffusion.objective import to_eps, to_x0
from stable_diffusion.diffusion.schedule import FLOAT64
from stable_diffusion.fields import within
from stable_diffusion.nn.text import PromptEmbeds
from stable_diffusion.nn.unet import UNet
from stable_diffusion.training.events import TrainStep
from stable_diffusion.training.stage import Batch, Player
from stable_diffusion.training.stages.denoiser import DenoiserSettings, DenoiserStage
from stable_diffusion.training.text import FrozenText
from stable_diffusion.training.workspace import TrainableParts, Workspace

HUBER = 0.00054  # of the pseudo-Huber loss, times the square root of the dimension (Song & Dhariwal 2023, section 3.3)


@dataclass(frozen=True, kw_only=True)
class ConsistencySettings(DenoiserSettings):
    """Settings of the stage ``consistency``."""

    kind: str = "consistency"
    learning_rate: float = 2e-4
    caption_dropout: Annotated[float, within(0, 1)] = 0.0
    guidance_scale: Annotated[float, within(1, 100)] = 2.0
    """Of the teacher, the denoiser as it was at the stage's start; the student needs none."""
    levels: Annotated[int, within(2, 1000)] = 32
    """Of the teacher's walk, from one to the next of which the student must agree with itself."""


class ConsistencyStage(DenoiserStage):
    """Latent consistency distillation (Luo et al. 2023, equation 14), the student being its own target.

    From noisy latents it predicts the clean ones that it predicts after one of the teacher's guided steps (without an
    average of the student's weights: Song & Dhariwal 2023, section 3.2). Text encoders stay as they are.
    """

    share = 0.15
    teacher: tuple[UNet]  # in a tuple: no part of what is trained

    def __init__(self, parts: TrainableParts, settings: ConsistencySettings) -> None:
        super().__init__(parts, settings)
        self.guidance = Guidance(scale=settings.guidance_scale)
        self.levels = self.scheduler.levels(settings.levels, FLOW_SPACING)
        self.teacher = (self.unet,)  # to measure a step with

    def players(self) -> dict[str, Player]:
        """The U-Net alone."""
        ((kind, player),) = super().players().items()
        unet = {name: p for name, p in player.parameters.items() if name.startswith("unet.")}
        return {kind: player._replace(parameters=unet)}

    def prepare(self, workspace: Workspace) -> Iterator[TrainStep]:
        """As the denoiser's; the teacher is the U-Net as it is now."""
        yield from super().prepare(workspace)
        self.teacher = (copy.deepcopy(self.unet).requires_grad_(False),)

    def _noise_levels(self, uniform: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], ...]:
        """Time, alpha and sigma of a level of the teacher's walk, and of the next one."""
        pairs = list(pairwise(self.levels))
        chosen = [pairs[int(lot * len(pairs))] for lot in uniform.tolist()]
        rows = [(a.t, a.alpha, a.sigma, max(b.t, 0.0), b.alpha, b.sigma) for a, b in chosen]
        table = torch.tensor(rows, **FLOAT64)
        return table.unbind(dim=1)

    def _tensors(
        self, x0: Tensor, noise: Tensor, uniform: Tensor, captions: list[int], caches: FrozenText
    ) -> Batch:
        """With the empty caption behind the others, which guidance needs."""
        return super()._tensors(x0, noise, uniform, [*captions, 0], caches)

    def forward(
        self,
        x0: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        *more: Tensor,
    ) -> dict[str, Tensor]:
        """The pseudo-Huber distance of two predictions; `more` is what ``batch`` gives after the noise."""
        timesteps, after = more[0], more[3]
        alpha, sigma, alpha_after, sigma_after = (more[i].view(-1, 1, 1, 1) for i in (1, 2, 4, 5))
        x = alpha * x0 + sigma * noise
        with torch.no_grad():
            texts = self._embeds(list(more[6:]), len(x0) + 1)
            embeds = _rows(texts, lambda part: part[:-1])
            empty = _rows(texts, lambda part: part[-1:].expand_as(part[:-1]))
            both = self._predict(
                self.teacher[0], torch.cat([x, x]), torch.cat([timesteps] * 2), empty + embeds
            )
            uncond, cond = both.chunk(2)
            taught = self._clean(guide(cond, uncond, self.guidance), x, alpha, sigma)
            moved = alpha_after * taught + sigma_after * to_eps(taught, x, alpha, sigma)
            later = self._predict(self.unet, moved, after, embeds)
            wanted = torch.where(sigma_after > 0, self._clean(later, moved, alpha_after, sigma_after), taught)
        predicted = self._clean(self._predict(self.unet, x, timesteps, embeds), x, alpha, sigma)
        squares = (predicted - wanted).square().sum(dim=(1, 2, 3))
        softness = HUBER * math.sqrt(x0[0].numel())
        return {"consistency": ((squares + softness**2).sqrt() - softness).mean()}

    def _clean(self, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return to_x0(self.scheduler.config.prediction_type, output, x, alpha, sigma)


def _rows(texts: PromptEmbeds, choose: Callable[[Tensor], Tensor]) -> PromptEmbeds:
    tokens, mask, pooled = texts
    return PromptEmbeds(choose(tokens), None if mask is None else choose(mask), choose(pooled))
