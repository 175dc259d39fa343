"""The U-Net that predicts the noise in latents, from the smallest preset to Stable Diffusion 2.1.

Its attributes carry the names of diffusers' tensors, so a published checkpoint loads without a table.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from stable_diffusion.config import UNetConfig
from stable_diffusion.nn.blocks import (
    UNET_NORM_EPS,
    Downsample,
    KeysValues,
    Placed,
    ResnetBlock,
    SpatialTransformer,
    TimestepEmbedding,
    Upsample,
    embedding,
    timestep_features,
    zero,
)
from stable_diffusion.nn.norms import GroupNorm


class UNetLevel(nn.Module):
    """Residual blocks at one resolution, each followed by a transformer where the level has attention."""

    def __init__(
        self,
        config: UNetConfig,
        index: int,
        channels: list[tuple[int, int]],
        *,
        attention: bool,
        time_width: int,
        down: bool = False,
        up: bool = False,
    ) -> None:
        super().__init__()
        groups = config.norm_num_groups
        width = config.block_out_channels[index]
        resnet = partial(ResnetBlock, groups=groups, eps=UNET_NORM_EPS, time_width=time_width)
        transformer = partial(
            SpatialTransformer,
            width,
            num_heads=config.num_attention_heads[index],
            context_width=config.cross_attention_dim,
            groups=groups,
            linear=config.use_linear_projection,
            upcast=config.upcast_attention,
        )
        self.resnets = nn.ModuleList([resnet(*pair) for pair in channels])
        self.attentions = nn.ModuleList([transformer() for _ in channels if attention])
        self.downsamplers = nn.ModuleList([Downsample(width)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(width)] if up else [])


class UNet(Placed):
    """The noise predictor (Ronneberger et al. 2015; Rombach et al. 2022, section 3.3).

    A path down through the levels, a middle, which compressed networks lack, and a path up that also reads the feature
    maps of the path down.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        time_width = 4 * widths[0]
        last = len(widths) - 1
        level = partial(UNetLevel, config, time_width=time_width)

        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], time_width, config.time_cond_proj_dim)
        self.class_embedding: nn.Module | None = None
        if config.num_class_embeds is not None:
            self.class_embedding = embedding(config.num_class_embeds, time_width)
        elif config.pooled_projection_dim is not None:
            self.class_embedding = TimestepEmbedding(config.pooled_projection_dim, time_width)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # channels that the path up will read
        for i, width in enumerate(widths):
            channels = [(skips[-1], width)] + [(width, width)] * (config.layers_per_block - 1)
            self.down_blocks.append(level(i, channels, attention=config.attention_levels[i], down=i < last))
            skips += [width] * (config.layers_per_block + (i < last))

        self.mid_block: UNetLevel | None = None
        if config.mid_block_type is not None:
            self.mid_block = level(last, [(widths[-1], widths[-1])] * 2, attention=True)
            del self.mid_block.attentions[1]  # the middle is block, transformer, block

        self.up_blocks = nn.ModuleList()
        current = widths[-1]
        for i, width in reversed(list(enumerate(widths))):
            channels = []
            for _ in range(config.layers_per_block + 1):
                channels.append((current + skips.pop(), width))
                current = width
            self.up_blocks.append(level(i, channels, attention=config.attention_levels[i], up=i > 0))

        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], UNET_NORM_EPS)
        self.conv_out = zero(nn.Conv2d(widths[0], config.out_channels, 3, padding=1))

    def forward(
        self,
        sample: Float[Tensor, "b c h w"],
        timesteps: Float[Tensor, " b"],
        encoder_hidden_states: Float[Tensor, "b n d"] | None = None,
        encoder_attention_mask: Bool[Tensor, "b n"] | None = None,
        class_labels: Int[Tensor, " b"] | Float[Tensor, "b p"] | None = None,
        timestep_cond: Float[Tensor, "b g"] | None = None,
    ) -> Float[Tensor, "b c2 h w"]:
        """The prediction for noisy latents.

        Args:
            sample: noisy latents of about unit standard deviation.
            timesteps: the noise level of each sample, from 0 (clean) to the number of training timesteps.
            encoder_hidden_states: text tokens; None for a network without text.
            encoder_attention_mask: True where a token may be attended to; None attends to all.
            class_labels: labels, or pooled text vectors, for a network that has an embedding for them.
            timestep_cond: ``guidance_features`` of the guidance scales, for a network that reads them.
        """
        time = self.embed_time(timesteps, class_labels, timestep_cond)
        return self.predict(sample, time, self.keys_values(encoder_hidden_states), encoder_attention_mask)

    def embed_time(
        self,
        timesteps: Float[Tensor, " b"],
        class_labels: Int[Tensor, " b"] | Float[Tensor, "b p"] | None = None,
        timestep_cond: Float[Tensor, "b g"] | None = None,
    ) -> Float[Tensor, "b t"]:
        """The time embedding, with those of labels and guidance scale, as every residual block reads it."""
        features = timestep_features(timesteps, self.config.block_out_channels[0])
        dtype = self.conv_in.weight.dtype
        condition = None if timestep_cond is None else timestep_cond.to(dtype)
        time = self.time_embedding(features.to(dtype), condition)
        if self.class_embedding is not None:
            time = time + self.class_embedding(class_labels)
        return F.silu(time)

    def keys_values(self, text: Float[Tensor, "b n d"] | None) -> list[KeysValues | None]:
        """What each transformer reads of the text tokens, in the order in which ``predict`` meets them."""
        levels = (*self.down_blocks, self.mid_block, *self.up_blocks)
        transformers = [
            transformer for level in levels if level is not None for transformer in level.attentions
        ]
        return [None if text is None else transformer.keys_values(text) for transformer in transformers]

    def predict(
        self,
        sample: Float[Tensor, "b c h w"],
        time: Float[Tensor, "b t"],
        keys_values: list[KeysValues | None],
        mask: Bool[Tensor, "b n"] | None,
    ) -> Float[Tensor, "b c2 h w"]:
        """``forward`` from what ``embed_time`` and ``keys_values`` gave, which a walk computes once."""
        contexts = keys_values[::-1]
        hidden = self.conv_in(sample)
        skips = [hidden]
        for level in self.down_blocks:
            assert isinstance(level, UNetLevel)
            for i, resnet in enumerate(level.resnets):
                hidden = resnet(hidden, time)
                if level.attentions:
                    hidden = level.attentions[i](hidden, contexts.pop(), mask)
                skips.append(hidden)
            for downsample in level.downsamplers:
                hidden = downsample(hidden)
                skips.append(hidden)

        if self.mid_block is not None:
            hidden = self.mid_block.resnets[0](hidden, time)
            hidden = self.mid_block.attentions[0](hidden, contexts.pop(), mask)
            hidden = self.mid_block.resnets[1](hidden, time)

        for level in self.up_blocks:
            assert isinstance(level, UNetLevel)
            for i, resnet in enumerate(level.resnets):
                hidden = resnet(torch.cat([hidden, skips.pop()], dim=1), time)
                if level.attentions:
                    hidden = level.attentions[i](hidden, contexts.pop(), mask)
            for upsample in level.upsamplers:
                hidden = upsample(hidden, tuple(skips[-1].shape[-2:]))  # the skip's size: odd sizes come back

        return self.conv_out(F.silu(self.conv_norm_out(hidden)))
