"""The autoencoders: equal to diffusers', scaled and normalised as they say, and one contract for all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from stable_diffusion.config import MINI, SD15, TAESD, AutoencoderKLConfig, AutoencoderTinyConfig
from stable_diffusion.nn import vae
from stable_diffusion.nn.vae import (
    AUTOENCODERS,
    AutoencoderKL,
    AutoencoderTiny,
    Posterior,
    VectorQuantizer,
    autoencoder,
)

from .reference import TOLERANCES, error, normal, randomise, reference_vae

KL = AutoencoderKLConfig(block_out_channels=(8, 16, 16, 16), norm_num_groups=4)
VQ = replace(KL, block_out_channels=(8, 16, 16), latent_channels=3, scaling_factor=1.0, codebook_size=32)
KLS = {
    "sd": KL,
    "two-levels": replace(
        KL, block_out_channels=(8, 16), layers_per_block=1, latent_channels=3, scaling_factor=0.5
    ),
    "grey": replace(KL, block_out_channels=(12, 8, 16), in_channels=1, latent_channels=6),
}
FINE = replace(
    MINI.vae,
    encoder_pooling=2,
    decoder_block_out_channels=(16, 64, 128),
    decoder_blocks=(1, 3, 4),
    alpha=True,
)
CODECS = {"kl": KL, "vq": VQ, "tiny": MINI.vae, "taesd": TAESD, "fine": FINE}


def images(config: AutoencoderKLConfig | AutoencoderTinyConfig, dtype: torch.dtype = torch.float64) -> Tensor:
    """Two pictures in [-1, 1], wider than high."""
    return normal(2, config.in_channels, 24, 40, seed=5, dtype=dtype).clamp(-1, 1)


def pair(config: AutoencoderKLConfig) -> tuple[nn.Module, AutoencoderKL]:
    """The reference of a configuration, and ours with its weights, in float64."""
    reference = reference_vae(config)
    ours = AutoencoderKL(config).double().eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


@torch.no_grad()
@pytest.mark.parametrize("config", KLS.values(), ids=KLS)
def test_kl_equals_diffusers(config: AutoencoderKLConfig) -> None:
    """Parity: posterior, its samples, its divergence, and the decoder, in float64 and float32."""
    reference, ours = pair(config)
    for dtype, tolerance in TOLERANCES:
        reference.to(dtype), ours.to(dtype)
        x = images(config, dtype)
        expected, posterior = reference.encode(x).latent_dist, ours.posterior(x)
        assert error(posterior.mean, expected.mean) < tolerance
        assert error(posterior.logvar, expected.logvar) < tolerance
        assert torch.equal(posterior.mode(), posterior.mean)
        assert error(posterior.kl(), expected.kl()) < tolerance
        drawn = expected.sample(torch.Generator().manual_seed(3))
        noise = torch.randn(drawn.shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
        assert error(posterior.sample(noise), drawn) < tolerance
        z = normal(*drawn.shape, seed=6, dtype=dtype)
        scale = reference.config.scaling_factor
        assert error(ours.encode(x), expected.mode() * scale) < tolerance
        assert error(ours.decode(z), reference.decode(z / scale).sample) < tolerance


@torch.no_grad()
def test_vq_equals_diffusers() -> None:
    """Parity: the quantised decoding, the chosen entries and the loss of diffusers' VQModel."""
    reference, ours = pair(VQ)
    for dtype, tolerance in TOLERANCES:
        reference.to(dtype), ours.to(dtype)
        x = images(VQ, dtype)
        z = reference.encode(x).latents
        assert error(ours.encode(x), z) < tolerance
        assert error(ours.decode(z), reference.decode(z).sample) < tolerance
        quantised, indices, loss = ours.quantize(z)
        expected, expected_loss, (_, _, expected_indices) = reference.quantize(z)
        assert error(quantised, expected) < tolerance
        assert torch.equal(indices.flatten(), expected_indices)
        assert indices.shape == (2, 6, 10) and len(indices.unique()) > 4
        # diffusers' default, its legacy form, has the factor on the other term: in value 1.25 times the error, as ours
        assert abs(loss - expected_loss) < tolerance * expected_loss


def test_vq_loss_is_equation_3() -> None:
    """Law: entries move to the latents, latents by a quarter to the entries, and gradients pass straight through."""
    quantizer = VectorQuantizer(2, 1)
    quantizer.embedding.weight.data = torch.tensor([[0.0], [1.0]])
    z = torch.tensor([0.2, 0.9, 0.6]).view(1, 1, 1, 3).requires_grad_()
    quantised, indices, loss = quantizer(z)
    assert indices.flatten().tolist() == [0, 1, 1]
    assert torch.allclose(quantised.flatten(), torch.tensor([0.0, 1.0, 1.0]))
    squares = (0.2**2 + 0.1**2 + 0.4**2) / 3
    assert torch.isclose(loss, torch.tensor(1.25 * squares))
    to_z, to_entries = torch.autograd.grad(loss, [z, quantizer.embedding.weight], retain_graph=True)
    assert torch.allclose(to_z.flatten(), 0.25 * 2 / 3 * torch.tensor([0.2, -0.1, -0.4]))
    assert torch.allclose(to_entries.flatten(), 2 / 3 * torch.tensor([-0.2, 0.1 + 0.4]))
    (through,) = torch.autograd.grad((quantised * torch.tensor([1.0, 2.0, 3.0])).sum(), z)
    assert through.flatten().tolist() == [1, 2, 3]


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [TAESD, replace(TAESD, block_out_channels=(8, 8, 8), encoder_blocks=(2, 1, 3), decoder_blocks=(1, 2, 1))],
    ids=["taesd", "small"],
)
def test_tiny_equals_diffusers(config: AutoencoderTinyConfig) -> None:
    """Parity: diffusers' AutoencoderTiny, outlying latents included."""
    reference = randomise(
        diffusers.AutoencoderTiny(
            encoder_block_out_channels=config.block_out_channels,
            decoder_block_out_channels=config.block_out_channels,
            num_encoder_blocks=config.encoder_blocks,
            num_decoder_blocks=config.decoder_blocks[::-1],
        )
    )
    ours = AutoencoderTiny(config).double()
    ours.load_state_dict(reference.state_dict())
    assert list(ours.state_dict()) == list(reference.state_dict())
    for dtype, tolerance in TOLERANCES:
        reference.to(dtype), ours.to(dtype)
        x = images(config, dtype)
        z = 5 * normal(2, 4, 5, 6, dtype=dtype)
        assert error(ours.encode(x), reference.encode(x).latents) < tolerance
        assert error(ours.decode(z), reference.decode(z).sample) < tolerance


@pytest.mark.parametrize("config", [*KLS.values(), VQ], ids=[*KLS, "vq"])
def test_names_are_diffusers(config: AutoencoderKLConfig) -> None:
    """Parity: the same tensor names with the same shapes."""
    reference, ours = pair(config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }


@torch.no_grad()
@pytest.mark.parametrize("mistake", ["norm eps", "symmetric padding", "quant convolution left out"])
def test_planted_mistakes_are_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity can fail: each of these mistakes moves the latents by far more than the tolerance."""
    reference, _ = pair(KL)
    if mistake == "norm eps":
        monkeypatch.setattr(vae, "VAE_NORM_EPS", 1e-5)
    wrong = AutoencoderKL(KL).double()
    wrong.load_state_dict(reference.state_dict())
    if mistake == "symmetric padding":
        for module in wrong.encoder.down_blocks.modules():
            if isinstance(module, vae.Downsample):
                module.asymmetric, module.conv.padding = False, (1, 1)
    elif mistake == "quant convolution left out":
        wrong.quant_conv = nn.Identity()
    x = images(KL)
    assert error(wrong.posterior(x).mean, reference.encode(x).latent_dist.mean) > 1e-8


def test_parameter_counts() -> None:
    """Facts: Stable Diffusion's autoencoder and TAESD, in tensors and parameters."""

    def counts(module: nn.Module) -> tuple[int, int]:
        return len(module.state_dict()), sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        assert counts(autoencoder(SD15.vae)) == (248, 83_653_863)
        taesd = autoencoder(TAESD)
        assert counts(taesd.encoder) == (67, 1_222_532)
        assert counts(taesd.decoder) == (67, 1_222_531)


@torch.no_grad()
@pytest.mark.parametrize("config", CODECS.values(), ids=CODECS)
def test_codec_contract(config: AutoencoderKLConfig | AutoencoderTinyConfig) -> None:
    """Contract: latents are `factor` times smaller with `latent_channels`, pictures come back in their size.

    With opacity they come back with a channel more.
    """
    codec = randomise(autoencoder(config))
    x = normal(2, config.in_channels, 3 * config.factor, 4 * config.factor).clamp(-1, 1)
    latents = codec.encode(x)
    assert codec.config is config
    assert latents.shape == (2, config.latent_channels, 3, 4)
    alpha = isinstance(config, AutoencoderTinyConfig) and config.alpha
    assert codec.decode(latents).shape == (2, config.in_channels + alpha, *x.shape[2:])
    assert error(codec.encode(x[1:]), latents[1:]) < 1e-10
    assert error(codec.decode(latents[1:]), codec.decode(latents)[1:]) < 1e-10


def test_contract_covers_every_kind() -> None:
    """Contract: a new kind of autoencoder comes with a configuration in the test above."""
    assert {config.kind for config in CODECS.values()} == set(AUTOENCODERS)
    assert [config.factor for config in (SD15.vae, TAESD, MINI.vae, VQ, FINE)] == [*(8, 8, 8, 4, 16)]


@torch.no_grad()
def test_scaling_factor() -> None:
    """Law: latents are the posterior's mode times the factor, and decoding takes the factor out again."""
    _, ours = pair(KL)
    _, plain = pair(replace(KL, scaling_factor=1.0))
    x = images(KL)
    assert error(ours.encode(x), 0.18215 * plain.encode(x)) < 1e-10
    assert error(ours.decode(ours.encode(x)), plain.decode(plain.encode(x))) < 1e-10


def measured(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel."""
    return latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3), correction=0)


@torch.no_grad()
def test_normalise_kl() -> None:
    """Law: folding gives latents of mean 0 and standard deviation 1, and changes no picture and no sample."""
    _, ours = pair(replace(KL, scaling_factor=1.0))
    x, noise = images(KL), normal(2, 4, 3, 5, seed=7)
    before = ours.decode(ours.encode(x))
    drawn = ours.decode(ours.posterior(x).sample(noise))
    mean, std = measured(ours.encode(x))
    assert mean.abs().max() > 0.1 and (std - 1).abs().max() > 0.1
    ours.normalise(mean, std)
    mean, std = measured(ours.encode(x))
    assert mean.abs().max() < 1e-10 and (std - 1).abs().max() < 1e-10
    assert error(ours.decode(ours.encode(x)), before) < 1e-10
    assert error(ours.decode(ours.posterior(x).sample(noise)), drawn) < 1e-10


@torch.no_grad()
def test_normalise_vq() -> None:
    """Law: folding gives mean 0 and standard deviation 1 overall, and changes no pixel's entry and no picture."""
    _, ours = pair(VQ)
    x = images(VQ)
    z = ours.encode(x)
    before, (_, indices, _) = ours.decode(z), ours.quantize(z)
    mean, std = measured(z)
    assert std.max() > 1.1 * std.min()
    ours.normalise(mean, std)
    z = ours.encode(x)
    mean, _ = measured(z)
    assert mean.abs().max() < 1e-10 and abs(z.square().mean() - 1) < 1e-10
    assert torch.equal(ours.quantize(z)[1], indices)
    assert error(ours.decode(z), before) < 1e-10


@torch.no_grad()
def test_normalise_tiny() -> None:
    """Law: folding gives latents of mean 0 and standard deviation 1; the decoder stays, it is trained on them."""
    codec = randomise(AutoencoderTiny(MINI.vae))
    decoder = {k: v.clone() for k, v in codec.decoder.state_dict().items()}
    x = images(MINI.vae)
    before = codec.encode(x)
    mean, std = measured(before)
    codec.normalise(mean, std)
    after = codec.encode(x)
    assert error(after * std[:, None, None] + mean[:, None, None], before) < 1e-10
    mean, std = measured(after)
    assert mean.abs().max() < 1e-10 and (std - 1).abs().max() < 1e-10
    assert all(torch.equal(v, decoder[k]) for k, v in codec.decoder.state_dict().items())


def test_divergence_is_the_integral() -> None:
    """Law: the closed form of the divergence is the integral of q (log q - log p)."""
    mean, logvar = (torch.tensor(value, dtype=torch.float64).view(1, 1, 1, 1) for value in (0.7, -1.2))
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    q = torch.distributions.Normal(mean.flatten(), (0.5 * logvar).exp().flatten())
    p = torch.distributions.Normal(torch.zeros_like(z), 1.0)
    integral = torch.trapezoid(q.log_prob(z).exp() * (q.log_prob(z) - p.log_prob(z)), z)
    torch.testing.assert_close(Posterior(mean, logvar).kl()[0], integral, rtol=1e-9, atol=0)
    assert not Posterior(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)).kl().any()


@pytest.mark.parametrize("config", [KL, VQ, MINI.vae, FINE], ids=["kl", "vq", "tiny", "fine"])
def test_gradients_reach_every_parameter(config: AutoencoderKLConfig | AutoencoderTinyConfig) -> None:
    """Law: what a reconstruction and its regulariser ask for reaches every parameter."""
    codec = randomise(autoencoder(config))
    x = normal(2, config.in_channels, 32, 48).clamp(-1, 1)
    if isinstance(codec, AutoencoderTiny):
        loss = (codec.decode(codec.encode(x)) - x[:, :1]).square().mean()
    else:
        z = codec.posterior(x)
        loss = (codec.decode(z.mean * config.scaling_factor) - x).square().mean()
        loss = loss + (z.kl().mean() if codec.quantize is None else codec.quantize(z.mean)[2])
    loss.backward()
    assert [k for k, p in codec.named_parameters() if p.grad is None or not p.grad.any()] == []


# Decoders of larger pictures and of opacity, on the same latents.


@torch.no_grad()
def test_pooling_is_what_the_encoder_sees() -> None:
    """Law: latents of a picture are those of its mean over squares, with the same weights; opacity is not read."""
    fine, plain = (AutoencoderTiny(config).double() for config in (FINE, MINI.vae))
    fine.encoder.load_state_dict(plain.encoder.state_dict())
    x = normal(2, 4, 32, 48)
    pooled = x[:, :3].unflatten(2, (16, 2)).unflatten(4, (24, 2)).mean(dim=(3, 5))
    assert error(fine.encode(x), plain.encode(pooled)) < 1e-10


def light(x: Tensor, scale: float = 1.0) -> AutoencoderTiny:
    """Random, and decoding `x`'s latents to pictures within the range, which a new level keeps."""
    codec = randomise(AutoencoderTiny(MINI.vae)).double()
    decoded = codec.decode(codec.encode(x)) + 1
    last = codec.decoder.layers[-2]
    last.weight.mul_(0.9 / decoded.abs().max() * scale), last.bias.mul_(0.9 / decoded.abs().max() * scale)
    last.bias.add_(0.5)
    return codec


@torch.no_grad()
def test_a_new_level_begins_as_bicubic_interpolation() -> None:
    """Law: the encoder is the other's; pictures are its pictures, twice as large, and opacity its darkness likewise."""
    x = normal(2, 3, 32, 48)
    plain, fine = light(x), AutoencoderTiny(FINE).double()
    fine.begin_as(plain)
    z = plain.encode(x)
    small = plain.decode(z)
    assert small.min() > -1 and small.max() < 1 and small.std() > 0.05
    large = nn.functional.interpolate(small, scale_factor=2, mode="bicubic")
    inside = (
        slice(None),
        slice(None),
        slice(4, -4),
        slice(4, -4),
    )  # at the edge white lies beside it, not a copy
    decoded = fine.decode(z)
    assert error(decoded[:, :3][inside], large[inside]) < 1e-5  # whose weights torch computes in float32
    assert error(decoded[:, 3:][inside], -large.mean(dim=1, keepdim=True)[inside]) < 1e-5
    assert error(fine.encode(nn.functional.interpolate(x, scale_factor=2)), z) < 1e-10


@torch.no_grad()
def test_opacity_is_begun_and_left_out() -> None:
    """Law: with opacity the pictures stay, whose darkness it is; without it again they stay, too."""
    x = normal(2, 3, 32, 48)
    plain = light(x)
    z = plain.encode(x)
    clear, back = AutoencoderTiny(replace(MINI.vae, alpha=True)).double(), AutoencoderTiny(MINI.vae).double()
    clear.begin_as(plain), back.begin_as(clear)
    small = plain.decode(z)
    assert error(clear.decode(z), torch.cat([small, -small.mean(dim=1, keepdim=True)], dim=1)) < 1e-10
    assert error(back.decode(z), small) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        {"decoder_block_out_channels": (8, 64, 128)},
        {
            "encoder_pooling": 4,
            "decoder_block_out_channels": (16, 16, 64, 128),
            "decoder_blocks": (1, 1, 3, 4),
        },
        {"decoder_blocks": (1, 3, 3)},
    ],
    ids=["narrow", "two levels", "other levels"],
)
def test_what_cannot_go_on_begins_anew(change: dict[str, Any]) -> None:
    """Law: the encoder is the other's all the same."""
    x = normal(2, 3, 64, 64)
    plain, fine = light(x), AutoencoderTiny(replace(FINE, **change)).double()
    fine.begin_as(plain)
    pooled = nn.functional.avg_pool2d(x, fine.config.encoder_pooling)
    assert error(fine.encode(x), plain.encode(pooled)) < 1e-10
