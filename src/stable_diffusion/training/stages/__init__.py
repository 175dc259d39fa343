"""The stages that a recipe can have: one file and one row each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from stable_diffusion.training.stage import Stage, StageSettings
from stable_diffusion.training.stages.autoencoder import AutoencoderSettings, AutoencoderStage
from stable_diffusion.training.stages.consistency import ConsistencySettings, ConsistencyStage
from stable_diffusion.training.stages.contrastive import ContrastiveSettings, ContrastiveStage
from stable_diffusion.training.stages.decoder import DecoderSettings, DecoderStage
from stable_diffusion.training.stages.denoiser import DenoiserSettings, DenoiserStage


class Kind(NamedTuple):
    """A kind of stage."""

    settings: type[StageSettings]
    stage: Callable[[Any, Any], Stage]
    """Made from a model's parts and its settings."""


STAGES = {
    "autoencoder": Kind(AutoencoderSettings, AutoencoderStage),
    "contrastive": Kind(ContrastiveSettings, ContrastiveStage),
    "denoiser": Kind(DenoiserSettings, DenoiserStage),
    "consistency": Kind(ConsistencySettings, ConsistencyStage),
    "decoder": Kind(DecoderSettings, DecoderStage),
}

DEFAULT: tuple[StageSettings, ...] = (AutoencoderSettings(), DenoiserSettings())
"""What is trained where no recipe says it: the mini preset from random weights."""
