"""The U-Net: equal to diffusers', with all features on; and what must hold of a fresh one."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stable_diffusion.config import MINI, SD15, SD21, UNetConfig
from stable_diffusion.nn import blocks, unet
from stable_diffusion.nn.unet import UNet

from .reference import TOLERANCES, error, normal, reference_unet

SD15_LIKE = UNetConfig(
    block_out_channels=(16, 32, 32, 32),
    num_attention_heads=(2, 2, 2, 2),
    cross_attention_dim=20,
    norm_num_groups=4,
)
SD21_LIKE = replace(
    SD15_LIKE,
    num_attention_heads=(1, 2, 4, 4),
    cross_attention_dim=24,
    use_linear_projection=True,
    upcast_attention=True,
)
SMALL = replace(
    SD15_LIKE,
    block_out_channels=(16, 32),
    attention_levels=(True, False),
    num_attention_heads=(2, 4),
    layers_per_block=1,
)
CONFIGS = {
    "sd15": SD15_LIKE,
    "sd21": SD21_LIKE,
    "sd15-inpainting": replace(SD15_LIKE, in_channels=9),
    "sd21-inpainting": replace(SD21_LIKE, in_channels=9),
    "three-levels": replace(
        SD21_LIKE,
        block_out_channels=(16, 24, 32),
        attention_levels=(False, True, True),
        num_attention_heads=(1, 3, 2),
        layers_per_block=1,
    ),
    "two-levels": SMALL,
    "labels": replace(SMALL, num_class_embeds=5),
    "pooled": replace(SMALL, pooled_projection_dim=12, layers_per_block=2),
    "no-middle": replace(SMALL, mid_block_type=None, attention_levels=(True, True)),
    "guidance": replace(SMALL, time_cond_proj_dim=11),
}
WITHOUT_TEXT = replace(SMALL, cross_attention_dim=None, num_class_embeds=5, in_channels=1, out_channels=2)
COMPRESSED = replace(SD15.unet, layers_per_block=1)
THREE_LEVELS: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "attention_levels": (True,) * 3,
    "num_attention_heads": (8,) * 3,
}
TRAINED = ("three-levels", "labels", "pooled", "no-middle", "guidance")
MASK = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])


def inputs(config: UNetConfig, dtype: torch.dtype, size: tuple[int, int] = (15, 18)) -> dict[str, Tensor]:
    """Two noisy latents of an odd size, by default, with everything that the configuration reads."""
    batch = {
        "sample": normal(2, config.in_channels, *size, dtype=dtype),
        "timesteps": torch.tensor([3.0, 701.0]),
    }
    if config.cross_attention_dim:
        batch["encoder_hidden_states"] = normal(2, 7, config.cross_attention_dim, seed=1, dtype=dtype)
    if config.num_class_embeds:
        batch["class_labels"] = torch.tensor([0, 4])
    if config.pooled_projection_dim:
        batch["class_labels"] = normal(2, config.pooled_projection_dim, seed=2, dtype=dtype)
    if config.time_cond_proj_dim:
        batch["timestep_cond"] = normal(2, config.time_cond_proj_dim, seed=4, dtype=dtype)
    return batch


@functools.cache
def pair(name: str) -> tuple[torch.nn.Module, UNet]:
    """The reference of a configuration, and ours with its weights, in float64."""
    reference = reference_unet(CONFIGS[name])
    ours = UNet(CONFIGS[name]).double().eval()
    ours.load_state_dict(reference.state_dict())
    return reference, ours


@torch.no_grad()
def of_reference(reference: torch.nn.Module, batch: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
    batch = {"encoder_hidden_states": None, **batch}
    batch["timestep"] = batch.pop("timesteps")
    return reference(**batch, encoder_attention_mask=mask).sample


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name: str) -> None:
    """Parity: the same weights give diffusers' prediction, in float64 and float32."""
    reference, ours = pair(name)
    try:
        for dtype, tolerance in TOLERANCES:
            batch = inputs(ours.config, dtype)
            assert error(ours.to(dtype)(**batch), of_reference(reference.to(dtype), batch)) < tolerance
    finally:
        reference.double(), ours.double()


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sd21", "three-levels"])
def test_mask_equals_diffusers(name: str) -> None:
    """Parity: masked tokens are not read, in diffusers and here, and masking changes the prediction."""
    reference, ours = pair(name)
    batch = inputs(ours.config, torch.float64)
    masked = ours(**batch, encoder_attention_mask=MASK)
    assert error(masked, of_reference(reference, batch, MASK)) < 1e-10
    assert error(masked[1:], ours(**batch)[1:]) > 1e-4
    batch["encoder_hidden_states"][1, 3:] = 9
    assert error(ours(**batch, encoder_attention_mask=MASK), masked) < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (9, 23), (16, 7)], ids=str)
def test_sizes_equal_diffusers(size: tuple[int, int]) -> None:
    """Parity: any size works and comes back, multiples of 8 or not."""
    reference, ours = pair("sd15")
    batch = inputs(ours.config, torch.float64, size)
    assert error(ours(**batch), of_reference(reference, batch)) < 1e-10


@torch.no_grad()
def test_network_without_text_equals_diffusers() -> None:
    """Parity: it equals diffusers' network, which always reads a text, with what it reads weighted 0."""
    reference = reference_unet(replace(WITHOUT_TEXT, cross_attention_dim=8))
    for name, parameter in reference.named_parameters():
        if ".attn2.to_out" in name:
            parameter.zero_()
    ours = UNet(WITHOUT_TEXT).double().eval()
    text_only = (".attn2.", ".transformer_blocks.0.norm2.")
    ours.load_state_dict(
        {k: v for k, v in reference.state_dict().items() if not any(part in k for part in text_only)}
    )
    batch = inputs(WITHOUT_TEXT, torch.float64)
    expected = of_reference(reference, {**batch, "encoder_hidden_states": normal(2, 7, 8)})
    assert error(ours(**batch), expected) < 1e-10


@pytest.mark.parametrize("name", CONFIGS)
def test_names_are_diffusers(name: str) -> None:
    """Parity: the same tensor names with the same shapes."""
    reference, ours = pair(name)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }


@torch.no_grad()
@pytest.mark.parametrize(
    "mistake",
    [
        "block norm eps",
        "transformer norm eps",
        "tanh gelu",
        "gate before value",
        "sines first",
        "heads",
        "timestep",
    ],
)
def test_planted_mistakes_are_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity can fail: each of these small mistakes moves the prediction by far more than the tolerance."""
    reference, _ = pair("sd15")
    config = CONFIGS["sd15"]
    batch = inputs(config, torch.float64)
    expected = of_reference(reference, batch)
    if mistake == "block norm eps":
        monkeypatch.setattr(unet, "UNET_NORM_EPS", 1e-6)
    elif mistake == "transformer norm eps":
        monkeypatch.setattr(blocks, "VAE_NORM_EPS", 1e-5)
    elif mistake == "tanh gelu":
        monkeypatch.setattr(blocks.F, "gelu", functools.partial(F.gelu, approximate="tanh"))
    elif mistake == "gate before value":
        geglu = blocks.GatedFeedForward.GEGLU
        monkeypatch.setattr(
            geglu,
            "forward",
            lambda self, x: (lambda gate, value: value * F.gelu(gate))(*self.proj(x).chunk(2, -1)),
        )
    elif mistake == "sines first":
        right = unet.timestep_features
        monkeypatch.setattr(unet, "timestep_features", lambda t, w: right(t, w).roll(w // 2, dims=-1))
    elif mistake == "heads":
        config = replace(config, num_attention_heads=(1, 2, 2, 2))
    else:
        batch["timesteps"] = batch["timesteps"] + 0.001
    wrong = UNet(config).double()
    wrong.load_state_dict(reference.state_dict())
    assert error(wrong(**batch), expected) > 1e-8


def test_parameter_counts() -> None:
    """Facts: Stable Diffusion's numbers of parameters and tensors, and nine channels' surplus."""
    counts = {}
    with torch.device("meta"):
        for name, config in {
            "sd15": SD15.unet,
            "sd21": SD21.unet,
            "sd15-inpainting": replace(SD15.unet, in_channels=9),
            "sd21-inpainting": replace(SD21.unet, in_channels=9),
            "bk-sdm-base": COMPRESSED,
            "bk-sdm-small": replace(COMPRESSED, mid_block_type=None),
            "bk-sdm-tiny": replace(COMPRESSED, mid_block_type=None, **THREE_LEVELS),
        }.items():
            parameters = list(UNet(config).parameters())
            counts[name] = (sum(p.numel() for p in parameters), len(parameters))
    assert counts == {
        "sd15": (859_520_964, 686),
        "sd21": (865_910_724, 686),
        "sd15-inpainting": (859_535_364, 686),
        "sd21-inpainting": (865_925_124, 686),
        # Kim et al. 2023, table 1: 0.58, 0.48 and 0.32 billion.
        "bk-sdm-base": (579_384_964, 442),
        "bk-sdm-small": (482_346_884, 396),
        "bk-sdm-tiny": (323_384_964, 358),
    }


@torch.no_grad()
@pytest.mark.parametrize(
    "config", [MINI.unet, WITHOUT_TEXT, *CONFIGS.values()], ids=["mini", "no-text", *CONFIGS]
)
def test_fresh_network_predicts_zero(config: UNetConfig) -> None:
    """Law: with its last convolution at zero, a fresh network's prediction is exactly 0."""
    prediction = UNet(config)(**inputs(config, torch.float32, (8, 8)))
    assert prediction.shape == (2, config.out_channels, 8, 8)
    assert not prediction.any()


@pytest.mark.parametrize(
    "config",
    [*(CONFIGS[name] for name in TRAINED), WITHOUT_TEXT],
    ids=[*TRAINED, "no-text"],
)
def test_gradients_reach_every_parameter(config: UNetConfig) -> None:
    """Law: zero layers hold back the first steps only; from the third on every parameter learns."""
    torch.manual_seed(0)
    network = UNet(config)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    batch = inputs(network.config, torch.float32, (8, 8))
    target = normal(2, network.config.out_channels, 8, 8, seed=3, dtype=torch.float32)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(network(**batch), target).backward()
        optimizer.step()
    assert [k for k, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_upcast_attention_computes_in_float32() -> None:
    """Law: in half precision attention is computed in float32 and rounded once; float64 stays as it is."""
    query, key, value = (normal(2, 6, 8, seed=i) for i in range(3))
    half = [x.bfloat16() for x in (query, key, value)]
    exact = blocks.attend(*(x.float() for x in half), num_heads=2)
    assert torch.equal(blocks.attend(*half, num_heads=2, upcast=True), exact.bfloat16())
    kept = blocks.attend(query, key, value, num_heads=2, upcast=True)
    assert torch.equal(kept, blocks.attend(query, key, value, num_heads=2))


@torch.no_grad()
def test_prediction_does_not_depend_on_the_batch() -> None:
    """Law: a picture's prediction is the same alone and in a batch."""
    _, ours = pair("sd21")
    batch = inputs(ours.config, torch.float64)
    alone = ours(**{key: value[1:] for key, value in batch.items()}, encoder_attention_mask=MASK[1:])
    assert error(alone, ours(**batch, encoder_attention_mask=MASK)[1:]) < 1e-10


def test_timestep_features_are_vaswanis() -> None:
    """Law: cosines at frequencies 10000^(-i/half), then the sines of the same angles."""
    features = blocks.timestep_features(torch.tensor([0.0, 10.0]), 8).double()
    angles = 10 * 10000 ** (-torch.arange(4, dtype=torch.float64) / 4)
    assert torch.equal(features[0], torch.tensor([1.0] * 4 + [0.0] * 4, dtype=torch.float64))
    assert torch.allclose(features[1], torch.cat([angles.cos(), angles.sin()]), atol=1e-5)


@pytest.mark.parametrize("width", [256, 11])
def test_guidance_features_are_those_of_latent_consistency_models(width: int) -> None:
    """Parity with diffusers' pipeline, which is given w = scale - 1, in its float32."""
    scales = torch.tensor([0.0, 1.0, 4.5, 8.0])
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    expected = embed(None, scales - 1, embedding_dim=width)
    torch.testing.assert_close(blocks.guidance_features(scales, width), expected, atol=1e-3, rtol=0)
    exact = blocks.guidance_features(torch.tensor([1.001]), 6)[0]
    angles = torch.tensor([1.0, 0.01, 1e-4])
    torch.testing.assert_close(exact, torch.cat([angles.sin(), angles.cos()]), atol=1e-3, rtol=0)
