"""Export: what fits diffusers opens there and gives the same latents; what does not is said and goes by parts."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor

from stable_diffusion import DiffusionModel, InputError
from stable_diffusion.checkpoints import files as weight_files
from stable_diffusion.checkpoints.diffusers.schedulers import (
    sampler_config,
    schedule_config,
    scheduler_notes,
    scheduler_settings,
    unsaid,
)
from stable_diffusion.checkpoints.families import misfit
from stable_diffusion.cli import main
from stable_diffusion.config import MINILM, SD15, SD21, ModelConfig, SamplerConfig, ScheduleConfig
from stable_diffusion.diffusion.names import SAMPLERS, SPACINGS
from stable_diffusion.diffusion.samplers import sampling_levels
from stable_diffusion.diffusion.schedule import Schedule
from tests.checkpoints import sd
from tests.checkpoints.test_diffusers import TOLERANCE, error, ours, reference, theirs
from tests.lively import lively
from tests.nn.reference import normal, quietly
from tests.tiny import FINE, KL, TEXT, TINY, UNCONDITIONAL, VQ, tiny_model

CLIP = replace(
    TINY,
    name="clip",
    vae=KL,
    unet=replace(TINY.unet, pooled_projection_dim=None),
    schedule=ScheduleConfig(),
    sampler=SamplerConfig(name="ddim"),
)
BERT = replace(
    CLIP,
    name="bert",
    unet=replace(CLIP.unet, cross_attention_dim=MINILM.hidden_size, pooled_projection_dim=MINILM.hidden_size),
    text_encoders=(replace(MINILM, context_length=8),),
)
FLOW = replace(CLIP, name="flow", schedule=TINY.schedule, sampler=SamplerConfig(name="euler"))
DOCS = (Path(__file__).parents[2] / "docs" / "diffusers.md").read_text(encoding="utf-8")
PARTS = {"model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"}


def model(config: ModelConfig) -> DiffusionModel:
    network = tiny_model(config)
    lively(network.unet)
    lively(network.vae, 1)
    with torch.no_grad():
        network.unet.conv_out.weight.mul_(0.5)
    if config.text_encoders and config.text_encoders[0].architecture == "clip":
        lively(network.text_encoder.encoders[0], 2)
    return network


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", sd.KINDS)
def test_there_and_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """Diffusers' folder, ours, a single file, ours, diffusers' folder."""
    folder = sd.write(tmp_path / "published", kind)
    first = DiffusionModel.from_pretrained(folder)
    first.save_pretrained(tmp_path / "ours")
    DiffusionModel.from_pretrained(tmp_path / "ours").export(
        tmp_path / "one.safetensors", format="single-file"
    )
    DiffusionModel.from_pretrained(tmp_path / "one.safetensors").save_pretrained(tmp_path / "again")
    DiffusionModel.from_pretrained(tmp_path / "again").export(tmp_path / "last")
    last = DiffusionModel.from_pretrained(tmp_path / "last")
    assert same(first.state_dict(), last.state_dict())
    assert replace(last.config, name="") == replace(first.config, name="")
    prompt = "Ein Bär, 北京!"
    assert torch.equal(first.encode_prompt(prompt).tokens, last.encode_prompt(prompt).tokens)
    cls = "StableDiffusionInpaintPipeline" if kind == "inpaint" else "StableDiffusionPipeline"
    pipe = reference(tmp_path / "last", cls)
    assert type(quietly(diffusers.DiffusionPipeline.from_pretrained, tmp_path / "last")).__name__ == cls
    assert same(pipe.unet.state_dict(), last.unet.state_dict())
    if kind != "inpaint":
        noise = normal(1, 4, 8, 8, dtype=torch.float32)
        wanted = theirs(pipe, None, prompt=["a fox"], latents=noise.clone())
        assert error(ours(first, None, prompt=["a fox"], latents=noise), wanted) < TOLERANCE


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
def test_a_model_made_here_gives_the_same_latents_there(sampler: str, tmp_path: Path) -> None:
    network = model(replace(CLIP, sampler=SamplerConfig(name=sampler)))
    network.export(tmp_path / "out")
    assert files(tmp_path / "out") == PARTS
    noise = normal(1, 4, 8, 8, dtype=torch.float32)
    pipe = reference(tmp_path / "out")
    assert pipe.scheduler.config.steps_offset == 1, "a pipeline that is content with the file"
    assert pipe.tokenizer.model_max_length == TEXT.context_length
    wanted = theirs(pipe, None, prompt=["a red circle"], latents=noise.clone())
    assert error(ours(network, None, prompt=["a red circle"], latents=noise), wanted) < TOLERANCE
    assert error(ours(network, None, prompt=["a blue star"], latents=noise), wanted) > 10 * TOLERANCE
    assert same(network.state_dict(), DiffusionModel.from_pretrained(tmp_path / "out").state_dict())


def test_half_precision(tmp_path: Path) -> None:
    network = model(CLIP)
    network.export(tmp_path / "half", dtype=torch.float16)
    again = DiffusionModel.from_pretrained(tmp_path / "half", dtype=torch.float16)
    assert all(
        torch.equal(tensor.half(), again.state_dict()[n]) for n, tensor in network.state_dict().items()
    )


def test_rectified_flow_within_its_tolerance(tmp_path: Path) -> None:
    """Diffusers begins at 0.999 and cuts times to whole numbers: 5 %, where another prompt makes more."""
    network = model(FLOW)
    with pytest.warns(UserWarning, match="Diffusers walks a rectified flow from 0.999 on"):
        network.export(tmp_path / "flow")
    again = DiffusionModel.from_pretrained(tmp_path / "flow").config
    assert (again.schedule.kind, again.schedule.prediction_type) == ("flow", "flow_prediction")
    assert again.sampler.name == "euler"
    noise = normal(1, 4, 8, 8, dtype=torch.float32)
    pipe = reference(tmp_path / "flow")
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    settings: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 3.0, "latents": noise}
    wanted = theirs(pipe, None, prompt=["a red circle"], **settings | {"latents": noise.clone()})
    found = error(ours(network, None, prompt=["a red circle"], **settings), wanted)
    other = error(ours(network, None, prompt=["a blue star"], **settings), wanted)
    assert found < 0.05
    assert other > 2 * found


def test_skipped_layers_are_left_out(tmp_path: Path) -> None:
    text = replace(TEXT, num_hidden_layers=3, skip_last_layers=1)
    network = model(replace(CLIP, text_encoders=(text,)))
    network.export(tmp_path / "out")
    encoder = transformers.CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder")
    ids = network.text_encoder.tokenizers[0](["a fox"]).input_ids
    wanted = encoder(ids).last_hidden_state
    assert (network.encode_prompt("a fox").tokens - wanted).abs().max() < 1e-5


def test_a_model_of_bert_goes_by_parts(tmp_path: Path) -> None:
    network = model(BERT)
    with pytest.warns(UserWarning, match="its text encoder is BERT.* has its unet, vae and scheduler alone"):
        network.export(tmp_path / "out")
    assert files(tmp_path / "out") == {"unet", "vae", "scheduler"}
    unet = quietly(diffusers.UNet2DConditionModel.from_pretrained, tmp_path / "out", subfolder="unet")
    vae = quietly(diffusers.AutoencoderKL.from_pretrained, tmp_path / "out", subfolder="vae")
    x, t = normal(2, 4, 8, 8, dtype=torch.float32), torch.tensor([500.0, 20.0])
    text = network.encode_prompt(["a red circle", "a star"])
    with torch.no_grad():
        found = network(x, t, text.tokens, text.mask, text.pooled)
        wanted = unet(x, t, text.tokens, class_labels=text.pooled, encoder_attention_mask=text.mask).sample
        assert error(found, wanted) < 1e-5
        assert error(network.vae.decode(x), vae.decode(x / vae.config.scaling_factor).sample) < 1e-5


@pytest.mark.parametrize(
    ("config", "reason", "there"),
    [
        (TINY, "its light autoencoder is not Stable Diffusion's", {"unet", "scheduler"}),
        (FINE, "its light autoencoder gives pictures with opacity", {"unet", "scheduler"}),
        (
            replace(FINE, vae=replace(FINE.vae, alpha=False)),
            "its light autoencoder gives larger pictures than it reads",
            {"unet", "scheduler"},
        ),
        (replace(CLIP, vae=VQ), "its autoencoder has a codebook", {"unet", "scheduler"}),
        (replace(UNCONDITIONAL, vae=KL), "it has no text encoders", {"vae", "scheduler"}),
    ],
)
def test_what_does_not_fit_is_said(config: ModelConfig, reason: str, there: set[str], tmp_path: Path) -> None:
    network = model(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        network.export(tmp_path / "out")
    assert reason in str(caught[0].message)
    assert files(tmp_path / "out") == there
    if "unet" in there:
        unet = quietly(diffusers.UNet2DConditionModel.from_pretrained, tmp_path / "out", subfolder="unet")
        assert same(unet.state_dict(), network.unet.state_dict())
    with pytest.raises(InputError):
        network.export(tmp_path / "one.safetensors", format="single-file")
    assert not (tmp_path / "one.safetensors").exists()


def test_a_model_of_which_nothing_fits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="diffusers has no place for any part of 'unconditional': its light"):
        model(UNCONDITIONAL).export(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_offset_that_the_pipeline_changes_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="sets steps_offset to 1"):
        model(replace(CLIP, schedule=ScheduleConfig(steps_offset=0))).export(tmp_path / "out")


def test_the_reasons() -> None:
    assert misfit(SD15) is None
    assert misfit(SD21) is None
    assert "2 text encoders" in str(misfit(replace(CLIP, text_encoders=(TEXT, MINILM))))
    assert "projected" in str(misfit(replace(CLIP, unet=replace(CLIP.unet, cross_attention_dim=24))))
    assert "more than" in str(misfit(replace(CLIP, unet=replace(CLIP.unet, num_class_embeds=3))))
    assert "no scheduler" in str(
        misfit(replace(FLOW, schedule=replace(FLOW.schedule, prediction_type="sample")))
    )


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", [None, *SPACINGS])
def test_every_scheduler_comes_back(name: str, spacing: str | None) -> None:
    """With the same levels, or a note that says of what diffusers has no form."""
    schedule = ScheduleConfig(prediction_type="v_prediction", kind="linear", set_alpha_to_one=True)
    config = replace(CLIP, schedule=schedule, sampler=SamplerConfig(name=name, spacing=spacing))
    settings = json.loads(json.dumps(scheduler_settings(config)))
    assert schedule_config(settings) == schedule
    back = sampler_config(settings)
    assert back.name == name
    walked = [sampling_levels(sampler, Schedule(schedule), 7) for sampler in (back, config.sampler)]
    lost = [note for note in unsaid(config.sampler) if f"cannot have the spacing {spacing!r}" in note]
    assert (walked[0] == walked[1]) == (not lost)
    assert scheduler_notes(settings) == []
    scheduler = getattr(diffusers, settings["_class_name"]).from_config(settings)
    assert scheduler.config.prediction_type == "v_prediction"


def test_eta_is_for_the_call() -> None:
    """diffusers' pipelines take eta 0 unless told, for TCD too."""
    asked = "Diffusers' pipeline asks for eta with each call: give it eta="
    assert unsaid(SamplerConfig(name="tcd")) == [f"{asked}0.3."]
    assert unsaid(SamplerConfig(name="ddim", eta=0.5)) == [f"{asked}0.5."]
    for quiet in (
        SamplerConfig(name="ddim"),
        SamplerConfig(name="euler_a", eta=0.5),
    ):
        assert unsaid(quiet) == []
    assert unsaid(SamplerConfig(name="tcd", eta=0.0)) == [
        "A diffusers folder says nothing of eta: read here, the model has eta 0.3 again."
    ]


def test_the_documented_example_of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", DOCS, re.S) if "bert-model" in code)
    monkeypatch.chdir(tmp_path)
    flow = replace(BERT, schedule=FLOW.schedule, sampler=FLOW.sampler)
    network = model(flow)
    network.save_pretrained("bert-model")
    names: dict[str, Any] = {}
    with pytest.warns(UserWarning, match="BERT"):
        quietly(exec, snippet, names)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    settings: dict[str, Any] = {"num_inference_steps": 16, "guidance_scale": 3.0, "negative_prompt": ""}
    wanted = ours(network, "euler", prompt=["a red circle"], latents=noise, **settings)
    assert error(names["latents"], wanted) < 0.05
    assert names["picture"].shape == (1, 3, 32, 32)


# The target


def test_nothing_is_overwritten_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = model(CLIP)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    (tmp_path / "one.safetensors").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(InputError, match=f"{name} exists: choose another name"):
            network.export(tmp_path / name)
    with pytest.raises(InputError, match="exists: choose another name"):
        network.export(tmp_path / "one.safetensors", format="single-file")
    with pytest.raises(InputError, match="unknown format 'onnx'"):
        network.export(tmp_path / "new", format="onnx")  # type: ignore[arg-type]
    calls = 0
    save = weight_files.save_file

    def failing(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(weight_files, "save_file", failing)
    with pytest.raises(InputError, match=rf"cannot write {tmp_path / 'new'}: No space left"):
        network.export(tmp_path / "new")
    assert files(tmp_path) == {"file", "folder", "one.safetensors"}
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"mine"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model(CLIP).save_pretrained(tmp_path / "ours")
    main(["export", str(tmp_path / "ours"), str(tmp_path / "out"), "--format", "diffusers", "--half"])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert files(tmp_path / "out") == PARTS
    with pytest.raises(SystemExit) as caught:
        main(["export", str(tmp_path / "ours"), str(tmp_path / "out")])
    assert caught.value.code == 2
    assert "exists: choose another name" in capsys.readouterr().err
