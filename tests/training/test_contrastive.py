"""The contrastive stage: what its loss demands, by laws; that it learns, and that a run with it goes on exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stable_diffusion.config import MINILM
from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.errors import InputError
from stable_diffusion.training.draw import Draw, Samples
from stable_diffusion.training.stages.contrastive import (
    SCALE,
    ContrastiveSettings,
    ContrastiveStage,
    contrast,
    unit,
)
from tests.tiny import STAGES, TEXT, TINY, tiny_model

BATCH = 8
SETTINGS = ContrastiveSettings(batch_size=BATCH, min_steps=1, warmup_steps=2, learning_rate=2e-3)


def no_more(count: int) -> Tensor:
    """That each text is true of its picture alone."""
    return torch.eye(count, dtype=torch.bool)


def simplex(count: int) -> Tensor:
    """Vectors of length 1 that are as far from each other as can be."""
    return unit(torch.eye(count, dtype=torch.float64) - 1 / count)


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_perfect_towers_reach_the_minimum(scale: float) -> None:
    """Cosines of 1 and -1 / (n - 1), which no n vectors can better; and all that is near them is worse."""
    count = 6
    vectors, factor = simplex(count), torch.tensor(scale, dtype=torch.float64)
    least = math.log(1 + (count - 1) * math.exp(-scale * count / (count - 1)))
    assert contrast(vectors, vectors, no_more(count), factor).item() == pytest.approx(least, rel=1e-9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        noise = 0.3 * torch.randn(2, *vectors.shape, generator=generator, dtype=torch.float64)
        assert contrast(unit(vectors + noise[0]), unit(vectors + noise[1]), no_more(count), factor) > least


def test_towers_that_see_nothing_are_at_chance() -> None:
    same = unit(torch.ones(6, 4))
    assert contrast(same, same, no_more(6), torch.tensor(SCALE)).item() == pytest.approx(math.log(6))


def random_towers(count: int = 6, more: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, texts = (
        unit(torch.randn(n, 4, generator=generator, dtype=torch.float64)) for n in (count, count + more)
    )
    return images, texts, torch.eye(count, count + more, dtype=torch.bool)


def test_the_order_of_a_batch_changes_nothing() -> None:
    images, texts, true = random_towers()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2))
    places = torch.cat([order, torch.tensor([7, 6])])
    loss = contrast(images, texts, true, torch.tensor(5.0))
    again = contrast(images[order], texts[places], true[order][:, places], torch.tensor(5.0))
    assert again.item() == pytest.approx(loss.item(), rel=1e-9)


def test_what_is_true_of_both_is_no_negative() -> None:
    """A pair twice in a batch: as if the other were not there, whichever vectors it has."""
    images, texts, true = random_towers(more=0)
    true[0, 1] = true[1, 0] = True
    scale = torch.tensor(5.0)
    texts.requires_grad_()
    images.requires_grad_()
    loss = contrast(images, texts, true, scale)
    logits = (scale * images @ texts.T).detach()
    rows = [logits[0, [0, *range(2, 6)]], logits[1, 1:], *logits[2:]]
    columns = [logits[[0, *range(2, 6)], 0], logits[1:, 1], *logits.T[2:]]
    ends = torch.stack([line.logsumexp(0) for line in rows + columns]).view(2, -1)
    assert loss.item() == pytest.approx((ends - logits.diag()).mean().item(), rel=1e-6)
    loss.backward()
    assert torch.isfinite(images.grad).all() and torch.isfinite(texts.grad).all()  # type: ignore[arg-type]


def test_a_text_of_no_picture_is_a_negative_of_pictures_alone() -> None:
    images, texts, true = random_towers()
    scale = torch.tensor(5.0)
    logits = scale * images @ texts.T
    wanted = (logits.logsumexp(1) - logits.diag()).mean() + (
        logits[:, :6].logsumexp(0) - logits.diag()
    ).mean()
    assert contrast(images, texts, true, scale).item() == pytest.approx(wanted.item() / 2, rel=1e-6)


COLOURS = ("red", "blue", "green", "yellow", "purple")
PAIRS = [pair for two in list(combinations(COLOURS, 2))[:4] for pair in (two, two[::-1])]
CAPTIONS = ["", *(f"a {left} drum and a {right} fox" for left, right in PAIRS)]


def stage_of(**settings: Any) -> ContrastiveStage:
    """On eight pictures whose halves have a colour each, in both orders."""
    stage = ContrastiveStage(tiny_model(), replace(SETTINGS, **settings))
    stage.text_encoder.encoders[0].load_state_dict(stage.trained[0].state_dict())
    halves = np.random.default_rng(0).normal(size=(len(COLOURS), 4, 8, 4)).astype(np.float16)
    chosen = [[halves[COLOURS.index(colour)] for colour in pair] for pair in PAIRS]
    stage.latents = np.stack([np.concatenate(pair, axis=2) for pair in chosen])
    stage.samples = Samples(len(PAIRS))
    stage.captions, stage.captions_of = CAPTIONS, [[i + 1] for i in range(len(PAIRS))]
    stage.number = {caption: i for i, caption in enumerate(CAPTIONS)}
    stage.said = np.array(stage.captions_of)
    return stage


def draw(step: int = 0, places: range = range(BATCH)) -> Draw:
    return Draw(0, "contrastive", step, places, BATCH)


def test_a_batch_has_the_swaps_of_its_captions() -> None:
    stage = stage_of()
    latents, said, captions, ids, mask = stage.batch(draw())
    assert len(latents) == BATCH and len(captions) == len(ids) == len(mask) == 2 * BATCH
    assert said[:, 0].tolist() == captions[:BATCH].tolist()
    before = [i - 1 if i % 2 == 0 else i + 1 for i in captions[:BATCH].tolist()]
    assert captions[BATCH:].tolist() == before, "each pair of pictures is its other one's swap"
    assert int(mask.sum(dim=1).max()) == mask.shape[1], "padding is cut"
    again = stage.batch(draw())
    assert all(torch.equal(a, b) for a, b in zip((latents, said, captions, ids, mask), again, strict=True))
    assert not torch.equal(stage.batch(draw(1))[2], captions)


def test_processes_read_their_part_of_a_batch() -> None:
    stage = stage_of()
    whole, parts = stage.batch(draw(2)), [stage.batch(draw(2, range(i, BATCH, 2))) for i in range(2)]
    for i, part in enumerate(parts):
        assert torch.equal(whole[0][i::2], part[0]) and torch.equal(
            whole[2][:BATCH][i::2], part[2][: BATCH // 2]
        )


def test_a_swap_is_told_apart() -> None:
    """Of eight pictures that it has by heart, all of which are there with their colours swapped."""
    stage = stage_of().train()
    optimizer = torch.optim.AdamW([p for p in stage.parameters() if p.requires_grad], lr=2e-3)
    first = stage(*stage.batch(draw()))["contrastive"].item()
    assert first == pytest.approx((math.log(BATCH) + math.log(2 * BATCH - 1)) / 2, abs=1.0), "near chance"
    for step in range(80):
        loss = stage(*stage.batch(draw(step)))["contrastive"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    stage.eval().finish(True)
    with torch.no_grad():
        # The model's own text encoder, which the stage has given back.
        pooled = tiny_pooled(stage)
        latents = torch.from_numpy(stage.latents).float()
        cosines = unit(stage.image_tower(latents)) @ unit(stage.text_projection(pooled)).T
    assert loss.item() < 0.05
    assert cosines.argmax(dim=1).tolist() == cosines.argmax(dim=0).tolist() == list(range(len(PAIRS)))


def tiny_pooled(stage: ContrastiveStage) -> Tensor:
    """What the model's text encoder, of which the stage trained a copy, says of the captions."""
    stage.text_encoder.encoders[0].load_state_dict(stage.trained[0].state_dict())
    pooled: Tensor = stage.text_encoder.encode(0, CAPTIONS[1:]).pooled
    return pooled


def test_the_scale_is_learned_up_to_a_hundred() -> None:
    stage = stage_of()
    assert stage.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    with torch.no_grad():
        stage.logit_scale.fill_(6.0)
    stage(*stage.batch(draw()))["contrastive"].backward()
    assert stage.logit_scale.exp().item() == pytest.approx(100)
    assert stage.logit_scale.grad is not None and stage.logit_scale.grad.item() != 0


def test_it_needs_one_clip() -> None:
    for encoders in ((MINILM,), (TEXT, TEXT)):
        width = sum(text.hidden_size for text in encoders)
        unet = replace(TINY.unet, cross_attention_dim=None, pooled_projection_dim=width)
        with pytest.raises(
            InputError, match=r"trains a model's one CLIP text encoder, but 'tiny' has (none|2)"
        ):
            ContrastiveStage(tiny_model(replace(TINY, text_encoders=encoders, unet=unet)), SETTINGS)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_run_with_it_goes_on_bit_for_bit(tmp_path: Path, data: CocoImageLoader, trainable: bool) -> None:
    """And the encoder, frozen or not, is another one after it; a frozen one stays as the stage left it."""
    config = replace(TINY, text_encoders=(replace(TEXT, trainable=trainable),))
    stages = (STAGES[0], replace(SETTINGS, batch_size=4), STAGES[1])

    def trained(folder: str, stops_at: tuple[str, int] | None = None) -> dict[str, Tensor]:
        model = tiny_model(config)
        model.train(
            data,
            stages,
            output_dir=tmp_path / folder,
            steps=4,
            callback=lambda event: (getattr(event, "stage", ""), getattr(event, "index", 0)) == stops_at,
        )
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    whole = trained("whole")
    for stop in (("contrastive", 1), ("denoiser", 2)):
        stopped = trained(f"after-{stop[0]}", stop)
        assert not all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())
        parts = trained(f"after-{stop[0]}")
        assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    text = {name: tensor for name, tensor in whole.items() if name.startswith("text_encoder.encoders")}
    before = tiny_model(config).state_dict()
    assert not any(torch.equal(tensor, before[name]) for name, tensor in text.items())
    kept = stopped if not trainable else {}
    assert all(torch.equal(text[name], kept[name]) for name in text if kept)
