"""Autoencoders: pixels to latents and back.

Every codec here has ``encode(images) -> latents`` of unit standard deviation, ``decode(latents) -> images`` in
[-1, 1], and a ``config`` with ``factor`` (pixels per latent along a side) and ``latent_channels``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import pairwise, starmap
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from stable_diffusion.config import AutoencoderKLConfig, AutoencoderTinyConfig
from stable_diffusion.nn.blocks import (
    VAE_NORM_EPS,
    Attention,
    Downsample,
    Placed,
    ResnetBlock,
    Upsample,
    embedding,
)
from stable_diffusion.nn.norms import GroupNorm


class Posterior(NamedTuple):
    """The diagonal Gaussian q(z|x) of the KL autoencoder, before the scaling factor."""

    mean: Float[Tensor, "b c h w"]
    logvar: Float[Tensor, "b c h w"]

    def sample(self, noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """A sample, given standard normal noise."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def mode(self) -> Float[Tensor, "b c h w"]:
        """The most likely latents: the mean."""
        return self.mean

    def kl(self) -> Float[Tensor, " b"]:
        """KL divergence from the standard normal, in nats per picture (Kingma & Welling 2013, appendix B)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class VectorQuantizer(nn.Module):
    """Snaps every latent pixel to its nearest codebook entry (van den Oord et al. 2017, equation 2)."""

    COMMITMENT = 0.25  # beta of equation 3

    def __init__(self, codebook_size: int, channels: int) -> None:
        super().__init__()
        self.embedding = embedding(codebook_size, channels)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)

    def forward(
        self, z: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b c h w"], Int[Tensor, "b h w"], Float[Tensor, ""]]:
        """Quantised latents (gradients pass straight through), the entries' indices, and the codebook loss."""
        pixels = z.movedim(1, -1)  # b h w c
        indices = torch.cdist(pixels.flatten(0, 2), self.embedding.weight).argmin(dim=-1)
        entries = self.embedding(indices).view_as(pixels).movedim(-1, 1)
        loss = F.mse_loss(entries, z.detach()) + self.COMMITMENT * F.mse_loss(z, entries.detach())
        return z + (entries - z).detach(), indices.view(pixels.shape[:-1]), loss


def _resnets(channels: Iterable[int], groups: int) -> nn.ModuleList:
    """Residual blocks in a row, whose inputs and outputs have these numbers of channels."""
    return nn.ModuleList(starmap(partial(ResnetBlock, groups=groups, eps=VAE_NORM_EPS), pairwise(channels)))


class _Middle(nn.Module):
    """Block, attention over all pixels with one head, block."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(channels, num_heads=1, bias=True, groups=groups)])
        self.resnets = _resnets([channels] * 3, groups)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        x = self.resnets[0](x)
        x = self.attentions[0](x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[-2:])
        return self.resnets[1](x)


class _Level(nn.Module):
    """Residual blocks at one resolution, then a change of resolution or none."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        layers: int,
        groups: int,
        *,
        down: bool = False,
        up: bool = False,
    ) -> None:
        super().__init__()
        self.resnets = _resnets([in_channels] + [channels] * layers, groups)
        self.downsamplers = nn.ModuleList([Downsample(channels, asymmetric=True)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(channels)] if up else [])

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        for block in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = block(x)
        return x


class _Encoder(nn.Module):
    def __init__(self, config: AutoencoderKLConfig, out_channels: int) -> None:
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        steps = enumerate(pairwise((widths[0], *widths)))
        self.down_blocks = nn.ModuleList(
            [_Level(*step, config.layers_per_block, groups, down=i < len(widths) - 1) for i, step in steps]
        )
        self.mid_block = _Middle(widths[-1], groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], VAE_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class _Decoder(nn.Module):
    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _Middle(widths[0], groups)
        steps = enumerate(pairwise((widths[0], *widths)))
        self.up_blocks = nn.ModuleList(
            [_Level(*step, config.layers_per_block + 1, groups, up=i < len(widths) - 1) for i, step in steps]
        )
        self.conv_norm_out = GroupNorm(groups, widths[-1], VAE_NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.in_channels, 3, padding=1)

    def forward(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        z = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            z = level(z)
        return self.conv_out(F.silu(self.conv_norm_out(z)))


class AutoencoderKL(Placed):
    """Stable Diffusion's autoencoder, with the KL or the VQ regulariser (Rombach et al. 2022, section 3.1)."""

    def __init__(self, config: AutoencoderKLConfig) -> None:
        super().__init__()
        self.config = config
        z = config.latent_channels
        moments = z if config.codebook_size else 2 * z
        self.encoder = _Encoder(config, moments)
        self.quant_conv = nn.Conv2d(moments, moments, 1)
        self.quantize = VectorQuantizer(config.codebook_size, z) if config.codebook_size else None
        self.post_quant_conv = nn.Conv2d(z, z, 1)
        self.decoder = _Decoder(config)

    def posterior(self, images: Float[Tensor, "b rgb height width"]) -> Posterior:
        """q(z|x); with the VQ regulariser a single point, given as a log-variance of -30."""
        moments = self.quant_conv(self.encoder(images))
        if self.quantize is not None:
            return Posterior(moments, torch.full_like(moments, -30))
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def encode(self, images: Float[Tensor, "b rgb height width"]) -> Float[Tensor, "b c h w"]:
        """Latents of unit standard deviation: the posterior's mode, scaled. Images are in [-1, 1]."""
        return self.posterior(images).mode() * self.config.scaling_factor

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b rgb height width"]:
        """Images in about [-1, 1]; with the VQ regulariser the latents are quantised first."""
        z = latents / self.config.scaling_factor
        if self.quantize is not None:
            z, _, _ = self.quantize(z)
        return self.decoder(self.post_quant_conv(z))

    @torch.no_grad()
    def normalise(self, mean: Float[Tensor, " c"], std: Float[Tensor, " c"]) -> None:
        """Folds the measured mean and standard deviation of ``encode``'s latents into the outermost convolutions.

        Afterwards latents have mean 0 and standard deviation 1, and every picture decodes as before. A codebook is
        transformed in the same way; its channels share one standard deviation, since scaling them differently could
        change which entry is nearest.
        """
        mean = mean / self.config.scaling_factor  # the weights' units
        c = len(mean)
        quant, post = self.quant_conv, self.post_quant_conv
        assert quant.bias is not None and post.bias is not None
        if self.quantize is not None:
            std = std.square().mean().sqrt().expand(c)
        quant.weight[:c] /= std[:, None, None, None]
        quant.bias[:c] = (quant.bias[:c] - mean) / std
        if self.quantize is None:
            quant.bias[c:] -= 2 * std.log()
        else:
            self.quantize.embedding.weight.sub_(mean).div_(std)
        post.bias += (post.weight[:, :, 0, 0] * mean).sum(dim=1)
        post.weight *= std[None, :, None, None]


class _TinyBlock(nn.Module):
    """Three convolutions and a skip, ReLU throughout, no normalisation: fast on a CPU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )
        same = in_channels == channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        return F.relu(self.conv(x) + self.skip(x))


class _Layers(nn.Module):
    """A sequence under the published names `layers.N`."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h2 w2"]:
        return self.layers(x)


class AutoencoderTiny(Placed):
    """A light autoencoder of plain ReLU blocks; with the default configuration, TAESD (madebyollin/taesd).

    The decoder first squashes latents to (-3, 3), so that an outlier cannot spoil a picture.
    """

    def __init__(self, config: AutoencoderTinyConfig) -> None:
        super().__init__()
        self.config = config
        widths, z, patch = config.block_out_channels, config.latent_channels, config.patch_size
        pixels = config.in_channels * patch**2
        shown = pixels + config.alpha * patch**2

        def conv(c_in: int, c_out: int, *, stride: int = 1, bias: bool = True) -> nn.Module:
            return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=bias)

        down: list[nn.Module] = [nn.PixelUnshuffle(patch)] if patch > 1 else []
        down.append(conv(pixels, widths[0]))
        for i, (width, blocks) in enumerate(zip(widths, config.encoder_blocks, strict=True)):
            if i > 0:
                down.append(conv(widths[i - 1], width, stride=2, bias=False))
            down += [_TinyBlock(width, width) for _ in range(blocks)]
        self.encoder = _Layers([*down, conv(widths[-1], z)])

        widths = config.decoder_widths
        up: list[nn.Module] = [conv(z, widths[-1]), nn.ReLU()]
        for i in reversed(range(len(widths))):
            up += [_TinyBlock(widths[i], widths[i]) for _ in range(config.decoder_blocks[i])]
            if i >= len(config.decoder_widths) - len(config.block_out_channels) + 1:
                up += [nn.Upsample(scale_factor=2), conv(widths[i], widths[i - 1], bias=False)]
            elif i > 0:  # finer than the encoder reads: each quarter has channels of its own
                up += [conv(widths[i], 4 * widths[i - 1]), nn.PixelShuffle(2)]
        up.append(conv(widths[0], shown))
        self.decoder = _Layers([*up, nn.PixelShuffle(patch)] if patch > 1 else up)

    def encode(self, images: Float[Tensor, "b rgba height width"]) -> Float[Tensor, "b c h w"]:
        """Latents of about unit standard deviation. Images are in [-1, 1], on white; opacity is not read."""
        images = F.avg_pool2d(images[:, : self.config.in_channels], self.config.encoder_pooling)
        return self.encoder((images + 1) / 2)

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b rgba height width"]:
        """Images in about [-1, 1]; with ``alpha``, on white, and their opacity as a fourth channel from -1 to 1."""
        return self.decoder(torch.tanh(latents / 3) * 3) * 2 - 1

    @torch.no_grad()
    def normalise(self, mean: Float[Tensor, " c"], std: Float[Tensor, " c"]) -> None:
        """Folds the measured mean and standard deviation of the encoder's output into its last convolution.

        The decoder stays as it is: in training it sees normalised latents from the start.
        """
        last = self.encoder.layers[-1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        last.weight /= std[:, None, None, None]
        last.bias.sub_(mean).div_(std)

    @torch.no_grad()
    def begin_as(self, other: AutoencoderTiny) -> None:
        """Takes over the encoder of another one and, where the decoder's levels are the same, its pictures.

        One level more begins as bicubic interpolation of the other's pictures, and opacity as how far they are from
        white. Other levels begin with random weights, as does one that is too narrow to hold a picture.
        """
        self.encoder.load_state_dict(other.encoder.state_dict())
        mine, others = (
            list(zip(codec.config.decoder_widths, codec.config.decoder_blocks, strict=True))
            for codec in (self, other)
        )
        more = len(mine) - len(others)
        if mine[more:] != others:
            return
        own, state = self.decoder.state_dict(), other.decoder.state_dict()
        same = {name: x for name, x in state.items() if name in own and own[name].shape == x.shape}
        self.decoder.load_state_dict({**own, **same})
        colours, patch = self.config.in_channels, self.config.patch_size
        end = -1 if patch == 1 else -2
        weight, bias = (x[: colours * patch**2] for x in _weights(other.decoder.layers[end]))
        half = patch // 2
        if more == 0:
            darkness, its_bias = (x.unflatten(0, (colours, -1)).mean(0) for x in (weight, bias))
            last, last_bias = _weights(self.decoder.layers[end])
            last.copy_(torch.cat([weight, -darkness])[: len(last)])
            last_bias.copy_(torch.cat([bias, 1 - its_bias])[: len(last)])
        elif more == 1 and 0 < colours * half**2 <= self.config.decoder_widths[0]:
            first = len(other.decoder.layers) + end
            _begin_enlarging([*self.decoder.layers][first:], weight, bias, colours, half)


def _weights(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A convolution's kernels and biases."""
    assert isinstance(layer, nn.Conv2d) and layer.bias is not None
    return layer.weight, layer.bias


def _begin_enlarging(
    level: list[nn.Module],
    weight: Float[Tensor, "pixels c 3 3"],
    bias: Float[Tensor, " pixels"],
    colours: int,
    half: int,
) -> None:
    """Makes a decoder's new level of what were its last weights, and of bicubic interpolation of what they gave.

    Of the level's channels the first are how far from white the pixels are, so that beyond the picture's edge is white,
    too. The decoder worked in squares of pixels, of which the level has quarters, `half` as long.
    """
    (widen, widen_bias), (last, last_bias), patch = _weights(level[0]), _weights(level[-2]), 2 * half
    for new, old in ((widen, weight), (widen_bias, bias)):
        squares = old.unflatten(0, (colours, 2, half, 2, half))
        quarters = squares.permute(0, 2, 4, 1, 3, *range(5, squares.ndim)).flatten(0, 4)
        new[: len(quarters)] = -quarters
    widen_bias[: len(bias)] += 1
    for block in level:
        if isinstance(block, _TinyBlock):  # begins as the identity
            for parameter in block.conv[-1].parameters():
                nn.init.zeros_(parameter)
    # What each pixel of 3x3 quarters gives to those of the middle one, twice as many a side.
    pixels = torch.eye(9 * half**2, device=weight.device).view(-1, 1, 3 * half, 3 * half)
    shares = F.interpolate(pixels, scale_factor=2, mode="bicubic")[..., patch:-patch, patch:-patch]
    shares = shares.reshape(3, half, 3, half, -1).permute(4, 1, 3, 0, 2).flatten(1, 2)
    nn.init.zeros_(last)
    ink = last[:, : colours * half**2].unflatten(1, (colours, -1))  # a view
    for colour in range(colours):
        ink[colour * patch**2 : (colour + 1) * patch**2, colour] = -shares
        ink[colours * patch**2 :, colour] = shares[: len(last) - colours * patch**2] / colours
    nn.init.zeros_(last_bias)
    last_bias[: colours * patch**2] = 1


AUTOENCODERS = {"kl": AutoencoderKL, "tiny": AutoencoderTiny}


def autoencoder(config: AutoencoderKLConfig | AutoencoderTinyConfig) -> AutoencoderKL | AutoencoderTiny:
    """The autoencoder that a configuration describes, with random weights."""
    return AUTOENCODERS[config.kind](config)
