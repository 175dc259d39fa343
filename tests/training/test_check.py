"""The overfit check: it says yes to a set-up that learns, and no to one that does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stable_diffusion import InputError
from stable_diffusion.config import ModelConfig
from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.training import check
from stable_diffusion.training.check import Verdict, _Few, check_config, overfit
from stable_diffusion.training.loop import TrainStep
from tests.tiny import TEXT, TINY, tiny_model

LEARNS = (
    replace(  # eight channels of latents: with four, the autoencoder is too poor to tell the pictures apart
        TINY,
        vae=replace(TINY.vae, latent_channels=8),
        unet=replace(TINY.unet, in_channels=8, out_channels=8),
        text_encoders=(replace(TEXT, max_position_embeddings=32, context_length=32),),
        num_inference_steps=8,
    )
)


def with_rate(config: ModelConfig, rate: float) -> ModelConfig:
    training = config.training
    stages = {
        name: replace(getattr(training, name), learning_rate=rate) for name in ("autoencoder", "denoiser")
    }
    return replace(config, training=replace(training, **stages))


def verdict(config: ModelConfig, data: CocoImageLoader, folder: Path) -> Verdict:
    *_, last = overfit(tiny_model(check_config(config)), data, folder, autocast=False)
    assert isinstance(last, Verdict) and last.pictures == 8
    return last


@pytest.mark.slow
def test_a_set_up_that_learns(tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "AUTOENCODER_STEPS", 1000)  # for the smallest autoencoder there is
    good = verdict(with_rate(LEARNS, 3e-3), data, tmp_path)
    assert good.learns and good.right >= 7 and good.error < 30
    assert "the set-up learns" in str(good)


def test_a_set_up_that_does_not(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "AUTOENCODER_STEPS", 3)
    monkeypatch.setattr(check, "DENOISER_STEPS", 3)
    config = check_config(with_rate(TINY, 0.0))
    *events, bad = overfit(tiny_model(config), data, tmp_path, autocast=False)
    trained = [step.stage for step in events if isinstance(step, TrainStep) and step.loss is not None]
    assert trained == ["autoencoder"] * 3 + ["denoiser"] * 3
    assert isinstance(bad, Verdict) and not bad.learns and bad.right < 4
    assert "does NOT learn" in str(bad)


def test_it_is_long_enough_whatever_the_recipe(data: CocoImageLoader) -> None:
    training = check_config(TINY).training
    assert (training.autoencoder.min_steps, training.denoiser.min_steps) == (400, 800)
    assert training.decoder is None and training.denoiser.batch_size == 16
    assert training.denoiser.learning_rate == TINY.training.denoiser.learning_rate


def test_its_pictures_have_captions_of_their_own(data: CocoImageLoader) -> None:
    few = _Few(data, 8)
    captions = [few.captions(i) for i in range(len(few))]
    assert len(few) == 8 == len(set(captions)) and all(len(one) == 1 for one in captions)
    for i in range(8):
        assert few[i].captions == few.captions(i) and few.captions(i)[0] in data.captions(few.order[i])
        assert few[i].image.tobytes() == data[few.order[i]].image.tobytes() and few.path(i) == data.path(
            few.order[i]
        )


def test_one_picture_is_too_few(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "PICTURES", 1)
    with pytest.raises(InputError, match="at least 2 pictures with captions of their own, got 1"):
        verdict(TINY, data, tmp_path)


def test_the_door_says_the_verdict(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "AUTOENCODER_STEPS", 1)
    monkeypatch.setattr(check, "DENOISER_STEPS", 1)
    assert tiny_model(check_config(with_rate(TINY, 0.0))).check(data, output_dir=tmp_path) is False
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("training tiny on 8 pictures") and "does NOT learn" in last
