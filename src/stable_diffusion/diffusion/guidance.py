"""Classifier-free guidance (Ho & Salimans 2022)."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from stable_diffusion.config import Guidance
from stable_diffusion.diffusion.schedule import Level, Schedule


def is_on(guidance: Guidance, level: Level, schedule: Schedule) -> bool:
    """Whether a level needs the unconditional prediction: not at scale 1 and below, nor outside the interval.

    Below 1 guidance is off, as in diffusers: model cards of few-step models write 0 for it.
    """
    low, high = guidance.interval
    return guidance.scale > 1 and low <= level.t / schedule.num_train_timesteps <= high


def guide(
    conditional: Float[Tensor, "b c h w"], unconditional: Float[Tensor, "b c h w"], guidance: Guidance
) -> Float[Tensor, "b c h w"]:
    """The guided prediction: from the unconditional one, `scale` times the difference to the conditional one.

    Ho & Salimans 2022, equation 6, with w = scale - 1: a scale of 1 is the conditional prediction, 0 the
    unconditional. The rescaling is Lin et al. 2023, equations 15 and 16.
    """
    guided = unconditional + guidance.scale * (conditional - unconditional)
    if guidance.rescale:
        axes = (1, 2, 3)
        matched = guided * (conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True))
        guided = guidance.rescale * matched + (1 - guidance.rescale) * guided
    return guided
