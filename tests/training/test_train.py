"""Whole runs of a tiny model: resumed, planned, reproducible, offline, with every kind of part."""

from __future__ import annotations

import json
import random
import re
import socket
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stable_diffusion import DiffusionModel
from stable_diffusion.config import MINILM, ModelConfig
from stable_diffusion.data.coco import CocoImageLoader
from stable_diffusion.data.item import Entry
from stable_diffusion.errors import InputError
from stable_diffusion.training.compute import Computer, autocast_dtype
from stable_diffusion.training.events import TrainStep
from stable_diffusion.training.stage import StageSettings
from stable_diffusion.training.workspace import Workspace
from tests.tiny import DECODER, KL, STAGES, TEXT, TINY, UNCONDITIONAL, VQ, shapes, tiny_model
from tests.training.record import Record, copied, differing


def trained(
    folder: Path,
    data: CocoImageLoader,
    record: Record | None = None,
    config: ModelConfig = TINY,
    stages: Sequence[StageSettings] = STAGES,
    **settings: Any,
) -> dict[str, torch.Tensor]:
    """The state after training ``tiny_model()`` in a folder."""
    observers = [] if record is None else [record]
    return tiny_model(config).train(
        data, stages, output_dir=folder, return_state_dict=True, observers=observers, **settings
    )


# Resuming.


@pytest.fixture(scope="module")
def straight(data: CocoImageLoader, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Record, Any]:
    """A run of 20 steps a stage that nothing stopped."""
    folder, record = tmp_path_factory.mktemp("straight"), Record()
    return folder, record, trained(folder, data, record, steps=20)


@pytest.mark.parametrize("stage", ["autoencoder", "denoiser"])
def test_20_steps_are_10_and_10(
    tmp_path: Path, data: CocoImageLoader, straight: tuple[Path, Record, Any], stage: str
) -> None:
    folder, whole, state = straight
    first, second = Record(stage, 9), Record()
    trained(tmp_path, data, first, steps=20)
    assert not (tmp_path / "model").exists(), "a run that was stopped is not finished"
    assert differing(trained(tmp_path, data, second, steps=20), state) == []
    for name in ("autoencoder", "denoiser"):
        assert first.curve(name) + second.curve(name) == whole.curve(name)
        assert not differing(
            load_file(tmp_path / f"{name}.safetensors"), load_file(folder / f"{name}.safetensors")
        )
    assert [step.index for step in second.stage(stage)] == list(range(10, 20))


ALL_STAGES = (*STAGES, DECODER)


def test_the_decoders_stage_comes_last_and_resumes(tmp_path: Path, data: CocoImageLoader) -> None:
    stage = "decoder"
    whole, first, second = Record(), Record(stage, 9), Record()
    state = trained(tmp_path / "whole", data, whole, stages=ALL_STAGES, steps=20)
    trained(tmp_path / "parts", data, first, stages=ALL_STAGES, steps=20)
    assert differing(trained(tmp_path / "parts", data, second, stages=ALL_STAGES, steps=20), state) == []
    assert first.curve(stage) + second.curve(stage) == whole.curve(stage)
    order = [event.stage for event in whole.events if isinstance(event, TrainStep) and event.loss is not None]
    assert list(dict.fromkeys(order)) == ["autoencoder", "denoiser", "decoder"]


@pytest.mark.parametrize("vae", [TINY.vae, KL, VQ], ids=["tiny", "kl", "vq"])
def test_the_decoders_stage_trains_the_decoder_alone(tmp_path: Path, data: CocoImageLoader, vae: Any) -> None:
    config = replace(TINY, vae=vae)
    before = trained(tmp_path / "none", data, config=config, steps=3)
    after = trained(tmp_path / "with", data, config=config, stages=ALL_STAGES, steps=3)
    changed = {name for name in differing(before, after) if name.startswith("vae.")}
    assert changed and all(name.startswith(("vae.decoder.", "vae.post_quant_conv.")) for name in changed)


def test_rates_are_the_planned_ones(straight: tuple[Path, Record, Any]) -> None:
    _, record, _ = straight
    for settings in STAGES:
        assert [rate for _, _, rate in record.curve(settings.name)] == [
            settings.rate(i, 20) for i in range(20)
        ]


def test_a_finished_run_gives_its_weights_again(
    data: CocoImageLoader, straight: tuple[Path, Record, Any]
) -> None:
    folder, _, state = straight
    record = Record()
    again = trained(folder, data, record)  # the length is the stored one
    assert differing(again, state) == []
    assert record.events == [record.plan], "nothing is computed again"


def test_the_finished_model_is_written_and_draws(straight: tuple[Path, Record, Any]) -> None:
    folder, _, state = straight
    model = DiffusionModel.from_pretrained(folder / "model")
    assert differing(model.state_dict(), state) == []
    (picture,) = model.generate("a red circle", seed=0)
    assert picture.size == (32, 32)


def test_returned_weights_are_copies(tmp_path: Path, data: CocoImageLoader) -> None:
    model = tiny_model()
    state = model.train(data, STAGES, output_dir=tmp_path, steps=1, return_state_dict=True)
    before = copied(state)
    with torch.no_grad():
        model.unet.conv_in.weight.zero_()
    assert differing(state, before) == []
    assert model.train(data, STAGES, output_dir=tmp_path, steps=1) is None


def test_a_folder_of_another_run_is_refused(tmp_path: Path, data: CocoImageLoader) -> None:
    trained(tmp_path / "run", data, steps=1)
    kept = (tmp_path / "run/denoiser.safetensors").read_bytes()
    other_data = shapes(tmp_path / "other", count=6)
    other_stages = (STAGES[0], replace(STAGES[1], caption_dropout=0.2))
    for refused in (
        lambda: trained(tmp_path / "run", other_data),
        lambda: trained(tmp_path / "run", data, stages=other_stages),
        lambda: trained(tmp_path / "run", data, seed=1),
    ):
        with pytest.raises(
            InputError,
            match=r"of (another recipe, model or seed|other pictures or captions): .* resume=False",
        ):
            refused()
    assert (tmp_path / "run/denoiser.safetensors").read_bytes() == kept
    record = Record()
    trained(tmp_path / "run", other_data, record, steps=2, resume=False)
    assert [step.index for step in record.stage("autoencoder")] == [0, 1]


def test_without_resume_it_begins_anew(
    tmp_path: Path, data: CocoImageLoader, straight: tuple[Path, Record, Any]
) -> None:
    _, whole, _ = straight
    trained(tmp_path, data, Record("denoiser", 3), steps=20)
    record = Record()
    trained(tmp_path, data, record, steps=20, resume=False)
    assert record.curve("autoencoder") == whole.curve("autoencoder")
    assert record.curve("denoiser") == whole.curve("denoiser")


def test_global_random_numbers_say_nothing(
    tmp_path: Path, data: CocoImageLoader, straight: tuple[Path, Record, Any]
) -> None:
    _, _, state = straight
    model = tiny_model()
    torch.manual_seed(123)
    np.random.seed(123)
    random.seed(123)
    torch.rand(17)
    scrambled = model.train(
        data,
        STAGES,
        output_dir=tmp_path,
        steps=20,
        return_state_dict=True,
        callback=lambda _: bool(torch.rand(1) > 2),
    )
    assert differing(scrambled, state) == []


def test_another_seed_is_another_run(
    tmp_path: Path, data: CocoImageLoader, straight: tuple[Path, Record, Any]
) -> None:
    _, whole, _ = straight
    record = Record()
    trained(tmp_path, data, record, seed=1, steps=2)
    assert record.curve("autoencoder")[0] != whole.curve("autoencoder")[0]


# What it leaves.


def test_returned_weights_are_the_averages(straight: tuple[Path, Record, Any]) -> None:
    folder, _, state = straight
    stored = load_file(folder / "denoiser.safetensors")
    averages = {
        name.removeprefix("average."): value for name, value in stored.items() if name.startswith("average.")
    }
    assert "unet.conv_in.weight" in averages
    for name, value in averages.items():
        reads_text = "attn2" in name or "class_embedding.linear_1" in name  # trained in other coordinates
        assert reads_text or torch.equal(state[name], value), name
    assert not torch.equal(state["unet.conv_in.weight"], stored["weights.unet.conv_in.weight"])


@pytest.mark.parametrize("trainable", [False, True])
def test_text_encoders_are_frozen_or_trained_along(
    tmp_path: Path, data: CocoImageLoader, trainable: bool
) -> None:
    config = replace(TINY, text_encoders=(replace(TEXT, trainable=trainable),))
    # Zero-initialised layers let no gradient through to the text in the first two steps.
    state, before = trained(tmp_path, data, config=config, steps=5), tiny_model(config).state_dict()
    changed = set(differing(state, before))
    text = {name for name in state if name.startswith("text_encoder.")}
    assert text & changed == (text if trainable else set())
    assert any(name.startswith("unet.") for name in changed) and any(
        name.startswith("vae.") for name in changed
    )


def test_clip_and_frozen_bert_together(tmp_path: Path, data: CocoImageLoader) -> None:
    config = replace(
        TINY,
        text_encoders=(replace(TEXT, trainable=True), MINILM),
        unet=replace(TINY.unet, pooled_projection_dim=32 + 384),
    )
    record = Record()
    state, before = trained(tmp_path, data, record, config, steps=5), tiny_model(config).state_dict()
    changed = differing(state, before)
    assert not [name for name in changed if name.startswith("text_encoder.encoders.1.")]
    for prefix in ("text_encoder.encoders.0.", "text_encoder.projections.0.", "text_encoder.projections.1."):
        assert [name for name in changed if name.startswith(prefix)]
    assert (
        len(record.stage("denoiser")) == 5 and (tmp_path / "model/text_encoder/model.safetensors").is_file()
    )
    assert not (tmp_path / "model/text_encoder_2").exists(), "the package carries it"
    model = DiffusionModel.from_pretrained(tmp_path / "model")
    assert differing(model.state_dict(), state) == []


@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, vae=KL),
        replace(TINY, vae=VQ),
        replace(TINY, vae=replace(KL, scaling_factor=0.18215)),
        UNCONDITIONAL,
        replace(TINY, schedule=replace(TINY.schedule, kind="scaled_linear", prediction_type="epsilon")),
    ],
    ids=["kl", "vq", "scaled", "unconditional", "epsilon"],
)
def test_every_kind_of_part_trains(tmp_path: Path, data: CocoImageLoader, config: ModelConfig) -> None:
    record = Record()
    state, before = trained(tmp_path, data, record, config), tiny_model(config).state_dict()
    assert [len(record.stage(stage)) for stage in ("autoencoder", "denoiser")] == [3, 3]
    assert record.stage("denoiser")[-1].skipped == 0
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    changed = {name.split(".")[0] for name in differing(state, before)}
    assert changed == {"vae", "unet"}
    (picture,) = DiffusionModel.from_pretrained(tmp_path / "model").generate("", seed=0)
    assert picture.size == (32, 32)


# The plan.


def test_the_first_line_says_stages_steps_and_time(
    tmp_path: Path, data: CocoImageLoader, capsys: pytest.CaptureFixture[str]
) -> None:
    record = Record()
    trained(tmp_path, data, record, steps=2)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and err == "", "no bar where nobody looks"
    assert re.fullmatch(
        r"training tiny on 9 pictures with \d+ captions: autoencoder 2 steps, denoiser 2 steps;"
        r" under a minute of steps on cpu in float32, after reading the data",
        out.strip(),
    )
    assert str(record.plan) == out.strip()
    assert min(record.plan.seconds.values()) > 0


def test_epochs_give_the_length(tmp_path: Path, data: CocoImageLoader) -> None:
    record = Record("reading pictures", 0)
    trained(tmp_path, data, record, stages=(replace(STAGES[0], epochs=5.0), STAGES[1]))
    assert record.plan.steps == {"autoencoder": round(5 * 9 / 4), "denoiser": 3}, (
        "epochs, but at least min_steps"
    )


@pytest.mark.parametrize(("parts", "batch"), [(1, 9), (12, 12)])
def test_a_batch_is_no_larger_than_the_set(
    tmp_path: Path, data: CocoImageLoader, parts: int, batch: int
) -> None:
    """Nine pictures have nine to give, unless micro-batches of one need more; epochs are of such batches."""
    stage = replace(STAGES[1], batch_size=64, gradient_accumulation_steps=parts, epochs=4.0, min_steps=1)
    record, epochs = Record("encoding pictures", 0), round(4 * 9 / batch)
    trained(tmp_path, data, record, stages=(stage,))
    assert record.plan.steps == {"denoiser": epochs}
    said = json.loads((tmp_path / "run.json").read_text())["recipe"]["stage"]
    assert [one["batch_size"] for one in said] == [batch]


def test_a_first_training_takes_minutes(tmp_path: Path) -> None:
    """On 16 pictures without a recipe: 8,000 pictures through the networks, which two cores do in four minutes."""
    record = Record("reading pictures", 0)
    tiny_model().train(shapes(tmp_path / "shapes", count=17), output_dir=tmp_path, observers=[record])
    said = json.loads((tmp_path / "run.json").read_text())["recipe"]["stage"]
    batches = {stage["name"]: stage["batch_size"] for stage in said}
    assert record.plan.pictures == 16 and batches == {"autoencoder": 16, "denoiser": 16}
    assert sum(record.plan.steps[name] * batch for name, batch in batches.items()) == 8_000


def test_a_short_trial_is_not_the_whole_training(tmp_path: Path, data: CocoImageLoader) -> None:
    """The steps of a trial are those of that call: without them, the recipe's length holds again."""
    record = Record()
    trained(tmp_path, data, record, steps=1)
    assert record.plan.steps == {"autoencoder": 1, "denoiser": 1}
    whole = Record()
    trained(tmp_path, data, whole)
    assert whole.plan.steps == {"autoencoder": 3, "denoiser": 3}
    assert [step.index for step in whole.stage("denoiser")] == [1, 2]


def test_minutes_are_turned_into_steps_once(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"autoencoder": 0.3, "denoiser": 0.6}
    monkeypatch.setattr(Computer, "measure", lambda _, stage: seconds[stage.settings.name])
    record = Record("reading pictures", 0)
    trained(tmp_path, data, record, minutes=0.1)  # 6 seconds
    steps = {"autoencoder": int(6 * 0.15 / 0.3), "denoiser": int(6 * 0.85 / 0.6)}
    assert record.plan.steps == steps
    monkeypatch.setattr(Computer, "measure", lambda *_: pytest.fail("measured twice"))
    again = Record("reading pictures", 1)
    trained(tmp_path, data, again, minutes=0.1)
    assert again.plan.steps == steps
    assert json.loads((tmp_path / "run.json").read_text())["asked"] == {"steps": None, "minutes": 0.1}


def test_measuring_is_about_right(tmp_path: Path, data: CocoImageLoader) -> None:
    """A tenth to ten times the true time: this machine may be busy."""
    record = Record()
    trained(tmp_path, data, record, steps=10)
    for stage in ("autoencoder", "denoiser"):
        true = STAGES[1].batch_size / record.stage(stage)[-1].images_per_second
        assert 0.1 < record.plan.seconds[stage] / true < 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 5, "minutes": 1.0}, r"steps or minutes, not both: got steps 5 and minutes 1.0"),
        ({"steps": 0}, r"steps must be above 0, got 0"),
        ({"minutes": -1}, r"minutes must be above 0, got -1"),
        ({"minutes": float("nan")}, r"minutes must be a finite number, got nan"),
    ],
)
def test_lengths_that_are_none(
    tmp_path: Path, data: CocoImageLoader, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        trained(tmp_path / "run", data, **settings)
    assert not (tmp_path / "run").exists()


class Empty:
    """A source without pictures."""

    def entries(self) -> list[Entry]:
        return []

    def image(self, key: str) -> Image.Image:
        raise KeyError(key)


def test_an_empty_set_and_16_bit_weights_are_refused(tmp_path: Path, data: CocoImageLoader) -> None:
    with pytest.raises(InputError, match="the set is empty"):
        tiny_model().train(Empty(), output_dir=tmp_path / "run")
    with pytest.raises(InputError, match="float32"):
        tiny_model().to(torch.bfloat16).train(data, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_giving_up_names_the_stage(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From latents with NaN, the denoiser learns nothing and says so; the autoencoder's state stays."""
    encode = Workspace.latents

    def poisoned(self: Workspace) -> Any:
        latents = yield from encode(self)
        return latents * np.float16(np.nan)

    monkeypatch.setattr(Workspace, "latents", poisoned)
    with pytest.raises(InputError, match=r"^denoiser: the gradient was not finite 20 times"):
        trained(tmp_path, data, steps=25)
    assert (tmp_path / "autoencoder.safetensors").is_file()
    assert not (tmp_path / "denoiser.safetensors").exists() and not (tmp_path / "model").exists()


def test_train_with_a_bool_is_torchs(data: CocoImageLoader) -> None:
    model = tiny_model()
    assert not model.training
    assert model.train() is model and model.training and model.unet.training
    assert model.train(False) is model and not model.training and not model.unet.training
    assert model.train(True).eval() is model and not model.vae.training


def test_the_model_is_in_evaluation_mode_afterwards(tmp_path: Path, data: CocoImageLoader) -> None:
    model = tiny_model()
    model.train(data, STAGES, output_dir=tmp_path, steps=1)
    assert not any(module.training for module in model.modules())


# Number formats.


CPU = torch.device("cpu")


def test_bf16_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for feature in ("avx512_bf16", "amx_bf16"):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda feature=feature: {feature: True})
        assert autocast_dtype(CPU) == torch.bfloat16


def test_float32_with_one_warning_elsewhere(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False})
    record = Record()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trained(tmp_path, data, record, steps=1, autocast=True)
    ours = [str(w.message) for w in seen if "16 bits" in str(w.message)]
    assert ours == ["this cpu is not faster in 16 bits: training in float32"]
    assert record.plan.number_format == "float32"


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), torch.bfloat16), ((7, 5), torch.float16)])
def test_gpus_new_and_old(monkeypatch: pytest.MonkeyPatch, capability: Any, expected: torch.dtype) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert autocast_dtype(torch.device("cuda")) == expected


def test_autocast_changes_the_computation_and_not_the_weights_format(
    tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch, straight: tuple[Path, Record, Any]
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    record = Record()
    state = trained(tmp_path, data, record, steps=20, autocast=True)
    assert record.plan.number_format == "bfloat16"
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    for stage in ("autoencoder", "denoiser"):
        losses, exact = ([loss for _, loss, _ in r.curve(stage)] for r in (record, straight[1]))
        assert losses != exact and losses == pytest.approx(exact, rel=0.1)


# Without a network.


def test_offline(tmp_path: Path, data: CocoImageLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    config = replace(
        TINY,
        text_encoders=(MINILM,),
        unet=replace(TINY.unet, cross_attention_dim=384, pooled_projection_dim=384),
    )
    trained(tmp_path / "run", data, config=config, steps=1)
    assert not (tmp_path / "nobody").exists()


def test_stages_have_settings_of_their_own(tmp_path: Path, data: CocoImageLoader) -> None:
    stage = replace(STAGES[1], batch_size=2, learning_rate=0.5, warmup_steps=0, min_steps=2, epochs=0.01)
    record = Record()
    trained(tmp_path, data, record, stages=(STAGES[0], stage))
    assert [rate for _, _, rate in record.curve("denoiser")] == [stage.rate(i, 2) for i in range(2)]
    assert record.curve("autoencoder")[0][2] < 0.01
