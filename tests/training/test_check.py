"""The overfit check: it says yes to a set-up that learns, and no to one that does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stable_diffusion import InputError
from stable_diffusion.config import ModelConfig
from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.training import check
from stable_diffusion.training.check import Verdict, _Few, check_stages, overfit
from stable_diffusion.training.events import TrainStep
from stable_diffusion.training.stage import StageSettings
from tests.tiny import DECODER, STAGES, TEXT, TINY, tiny_model

LEARNS = (
    replace(  # eight channels of latents: with four, the autoencoder is too poor to tell the pictures apart
        TINY,
        vae=replace(TINY.vae, latent_channels=8),
        unet=replace(TINY.unet, in_channels=8, out_channels=8),
        text_encoders=(replace(TEXT, max_position_embeddings=32, context_length=32),),
        num_inference_steps=8,
    )
)


def with_rate(rate: float) -> list[StageSettings]:
    return [replace(stage, learning_rate=rate) for stage in STAGES]


def verdict(config: ModelConfig, rate: float, data: CocoImageLoader, folder: Path) -> Verdict:
    *_, last = overfit(tiny_model(config), data, with_rate(rate), output_dir=folder)
    assert isinstance(last, Verdict) and last.pictures == 8
    return last


@pytest.mark.slow
def test_a_set_up_that_learns(tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(check.STEPS, "autoencoder", 2000)  # for the smallest autoencoder there is
    good = verdict(LEARNS, 3e-3, data, tmp_path)
    assert good.learns and good.right >= 7 and good.error < 30
    assert "the set-up learns" in str(good)


def test_a_set_up_that_does_not(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "STEPS", {"autoencoder": 3, "denoiser": 3})
    *events, bad = overfit(tiny_model(), data, with_rate(0.0), output_dir=tmp_path)
    trained = [step.stage for step in events if isinstance(step, TrainStep) and step.loss is not None]
    assert trained == ["autoencoder"] * 3 + ["denoiser"] * 3
    assert isinstance(bad, Verdict) and not bad.learns and bad.right < 4
    assert "does NOT learn" in str(bad)


def test_it_is_long_enough_whatever_the_recipe(data: CocoImageLoader) -> None:
    autoencoder, denoiser = check_stages([*STAGES, DECODER])
    assert (autoencoder.min_steps, denoiser.min_steps) == (800, 1600)
    assert denoiser.batch_size == 8 and denoiser.learning_rate == STAGES[1].learning_rate


def test_its_pictures_have_captions_of_their_own(data: CocoImageLoader) -> None:
    few = _Few(data, 8)
    captions = [entry.captions for entry in few.entries()]
    assert len(captions) == 8 == len(set(captions)) and all(len(one) == 1 for one in captions)
    whole = {entry.key: entry for entry in data.entries()}
    for entry in few.entries():
        assert entry.captions[0] in whole[entry.key].captions and entry.version == whole[entry.key].version
        assert few.image(entry.key).tobytes() == data.image(entry.key).tobytes()


def test_one_picture_is_too_few(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "PICTURES", 1)
    with pytest.raises(InputError, match="at least 2 pictures with captions of their own, got 1"):
        verdict(TINY, 1e-3, data, tmp_path)


def test_the_door_says_the_verdict(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "STEPS", {"autoencoder": 1, "denoiser": 1})
    assert tiny_model().check(data, with_rate(0.0), output_dir=tmp_path) is False
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("training tiny on 8 pictures") and "does NOT learn" in last
