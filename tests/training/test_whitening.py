"""Whitened text: mean 0, covariance 1, and a network that computes what it did, going in and coming out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stable_diffusion.config import ModelConfig
from stable_diffusion.nn.text import PromptEmbeds
from stable_diffusion.training.whitening import FLOOR, Affine, TextAffine, whitened, whitening
from stable_diffusion.training.workspace import TextCache
from tests.tiny import TEXT, TINY, tiny_model

PROMPTS = ["a red circle", "a blue square on the left", ""]


def cone(rows: int = 4000, width: int = 6) -> torch.Tensor:
    """Rows that share a large mean and vary along some directions far more than along others."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) * torch.logspace(0, -2, width)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mix + 3


def test_whitened_rows_have_mean_0_and_covariance_1() -> None:
    rows = cone()
    change = whitening(rows)
    white = change(rows)
    assert white.mean(0).abs().max() < 1e-10
    variances, directions = torch.linalg.eigh(torch.cov(rows.T))
    expected = directions * (variances / (variances + FLOOR * variances.mean())) @ directions.T
    torch.testing.assert_close(torch.cov(white.T), expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(change.inverse()(white), rows, atol=1e-10, rtol=0)


def test_what_is_measured_slightly_otherwise_changes_the_coordinates_slightly() -> None:
    """So a run goes on with other threads: along directions that vary alike, single eigenvectors turn anyhow."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40_000, 8, generator=generator, dtype=torch.float64) + 3
    again = rows + 1e-2 * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    axes = [torch.linalg.eigh(torch.cov(x.T)).eigenvectors for x in (rows, again)]
    assert (axes[0] - axes[1]).abs().max() > 0.01, "eigenvectors would do"
    assert (whitening(rows).matrix - whitening(again).matrix).abs().max() < 1e-3


def test_a_direction_that_never_varies_stays_finite() -> None:
    rows = cone()
    rows[:, 2] = 7.0
    assert torch.isfinite(whitening(rows)(rows)).all()


def test_the_caches_embeddings_are_whitened_as_they_are_read() -> None:
    rows = cone(300, 5).float().numpy().astype(np.float16)
    cache = TextCache(rows, np.arange(0, 301, 3), 4)  # two tokens and a pooled vector each
    plain = cache.read(list(range(100)))
    cache.change = cache.whitening()
    tokens, mask, pooled = cache.read(list(range(100)))
    assert torch.equal(mask, plain[1])
    for x in (tokens[mask], pooled):
        assert x.mean(0).abs().max() < 1e-3 and 0.5 < torch.cov(x.T).diagonal().max() < 1.05
    torch.testing.assert_close(cache.change.tokens(plain[0])[mask], tokens[mask])


BERT = replace(TEXT, architecture="bert", layer_norm_eps=1e-12, hidden_act="gelu")
POOLED = replace(TINY.unet, pooled_projection_dim=TEXT.hidden_size)
ONE = replace(TINY, text_encoders=(TEXT,), unet=POOLED)
TWO = replace(
    TINY,
    text_encoders=(replace(TEXT, trainable=True), TEXT),
    unet=replace(POOLED, pooled_projection_dim=2 * TEXT.hidden_size),
)


def changed(config: ModelConfig) -> list[TextAffine | None]:
    width = TEXT.hidden_size
    generator = torch.Generator().manual_seed(1)

    def some() -> Affine:
        matrix = torch.randn(width, width, generator=generator, dtype=torch.float64) + 3 * torch.eye(width)
        return Affine(torch.randn(width, generator=generator, dtype=torch.float64), matrix)

    return [None if c.trainable else TextAffine(some(), some()) for c in config.text_encoders]


@pytest.mark.parametrize("config", [ONE, TWO], ids=["one encoder", "two, of which one trains"])
def test_the_network_computes_what_it_did(config: ModelConfig) -> None:
    model = tiny_model(config).double()
    with torch.no_grad():
        for parameter in model.unet.parameters():  # a new network predicts 0, whatever it reads
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.05)
    changes = changed(config)
    parts = [model.text_encoder.encode(i, PROMPTS) for i in range(len(changes))]
    x = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = x[:, : config.unet.in_channels]

    def output(parts: list[PromptEmbeds]) -> torch.Tensor:
        embeds = model.text_encoder.join(parts)
        with torch.no_grad():
            return model.unet(x, torch.tensor([1.0, 400.0, 900.0]), embeds.tokens, embeds.mask, embeds.pooled)

    before, state = output(parts), {k: v.clone() for k, v in model.state_dict().items()}
    with whitened(model.unet, model.text_encoder, changes):
        white = [
            part
            if change is None
            else PromptEmbeds(change.tokens(part.tokens), part.mask, change.pooled(part.pooled))
            for part, change in zip(parts, changes, strict=True)
        ]
        torch.testing.assert_close(output(white), before, atol=1e-9, rtol=1e-9)
        assert not torch.allclose(output(parts), before, atol=1e-3), "the change is one"
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], atol=1e-9, rtol=1e-9)
