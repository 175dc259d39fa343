"""A model that is real in every part and trains in milliseconds, for the tests of what stands on the networks.

Pictures of 32 pixels, latents of 4 x 8 x 8, two U-Net levels, a CLIP of one layer. The text encoder has random
weights, since nothing here has to be beautiful; tests that need the packaged BERT replace ``text_encoders``.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from stable_diffusion.config import (
    CLIP_MINI,
    AutoencoderKLConfig,
    AutoencoderTinyConfig,
    Guidance,
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
    UNetConfig,
)
from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.data.sources import Shapes
from stable_diffusion.model import DiffusionModel
from stable_diffusion.training.stages import AutoencoderSettings, DecoderSettings, DenoiserSettings

TEXT = replace(
    CLIP_MINI,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
    context_length=16,
    trainable=False,
)
"""A CLIP that stays as it is; ``replace(TEXT, trainable=True)`` is one that is trained jointly."""

TINY = ModelConfig(
    name="tiny",
    sample_size=32,
    vae=AutoencoderTinyConfig(
        latent_channels=4,
        patch_size=2,
        block_out_channels=(16, 32),
        encoder_blocks=(1, 1),
        decoder_blocks=(1, 1),
    ),
    unet=UNetConfig(
        block_out_channels=(32, 64),
        layers_per_block=1,
        attention_levels=(False, True),
        num_attention_heads=(2, 4),
        cross_attention_dim=32,
        norm_num_groups=8,
        use_linear_projection=True,
        pooled_projection_dim=32,
    ),
    text_encoders=(TEXT,),
    schedule=ScheduleConfig(kind="flow", prediction_type="flow_prediction"),
    sampler=SamplerConfig(name="euler", spacing="trailing"),
    num_inference_steps=4,
    guidance=Guidance(scale=2.0),
)
"""Light autoencoder, rectified flow, one frozen CLIP."""

FINE = replace(
    TINY,
    name="fine",
    sample_size=64,
    vae=replace(
        TINY.vae,
        encoder_pooling=2,
        decoder_block_out_channels=(8, 16, 32),
        decoder_blocks=(1, 1, 1),
        alpha=True,
    ),
)
"""TINY's latents, decoded to pictures twice as large that have opacity."""

STAGES = (
    AutoencoderSettings(batch_size=4, epochs=1, min_steps=3, warmup_steps=2, ema_decay=0.999),
    DenoiserSettings(batch_size=4, epochs=1, min_steps=3, warmup_steps=2, learning_rate=1e-3),
)
"""Three steps each, unless told otherwise."""

DECODER = DecoderSettings(batch_size=4)

KL = AutoencoderKLConfig(
    block_out_channels=(8, 16, 16), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0
)
"""Stable Diffusion's kind of autoencoder, with the same latents as TINY's."""

VQ = replace(KL, codebook_size=16)
"""The same with a codebook."""

UNCONDITIONAL = replace(
    TINY,
    name="unconditional",
    unet=replace(TINY.unet, cross_attention_dim=None, pooled_projection_dim=None),
    text_encoders=(),
)
"""A model without text."""


def tiny_model(config: ModelConfig = TINY, seed: int = 0) -> DiffusionModel:
    """The model of `config` with the random weights of `seed`; the global generator stays where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiffusionModel(config)


def shapes(folder: Path, count: int = 10, size: int = 32, split: str = "train") -> CocoImageLoader:
    """Nine tenths of `count` drawn pictures with captions, in COCO's format."""
    list(Shapes(count=count, size=size).make(folder))
    return CocoImageLoader(folder / split, folder / "annotations" / f"captions_{split}.json")


def coco_test2017(folder: Path, count: int = 10, size: int = 32) -> None:
    """Drawn pictures under the names that the README's training sample reads: ``test2017`` and its captions file."""
    list(Shapes(count=count, size=size).make(folder / "shapes"))
    (folder / "shapes" / "train").rename(folder / "test2017")
    (folder / "annotations").mkdir()
    captions = json.loads((folder / "shapes/annotations/captions_train.json").read_text(encoding="utf-8"))
    (folder / "annotations/captions_test2017.json").write_text(json.dumps(captions), encoding="utf-8")
