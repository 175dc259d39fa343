"""Parity: folders of Stable Diffusion give diffusers' latents, and near misses do not. Damaged folders are refused."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from stable_diffusion import DiffusionModel, InputError, SamplerConfig
from stable_diffusion.diffusion.samplers import Step
from tests.checkpoints import sd
from tests.nn.reference import normal, quietly

PROMPTS = [
    "",
    "cat " * 74 + "end",  # with begin and end exactly 77 tokens
    "a painting of " * 40 + "a fox",  # cut
    "Ein Bär, 北京 🦊 naïve ½ — don't!",
]
NEGATIVE = "blurry, low quality"
TOLERANCE = 1e-4
CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("stable-diffusion")
    return {kind: sd.write(root / f"sd-{kind}", kind) for kind in sd.KINDS}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, DiffusionModel]:
    return {kind: DiffusionModel.from_pretrained(folder) for kind, folder in folders.items()}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger("diffusers"), logging.getLogger("transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@cache
def reference(folder: Path, cls: str = "StableDiffusionPipeline") -> Any:
    pipe = quietly(getattr(diffusers, cls).from_pretrained, folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.folder = folder
    return pipe


def theirs(pipe: Any, sampler: str | None, **arguments: Any) -> Any:
    settings = json.loads((pipe.folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    name = settings.pop("_class_name")
    cls = getattr(diffusers, name) if sampler is None else CLASSES[sampler]
    pipe.scheduler = cls.from_config(
        {key: value for key, value in settings.items() if not key.startswith("_")}
    )
    own: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 7.5, "negative_prompt": NEGATIVE}
    arguments = {"output_type": "latent"} | own | arguments
    arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(arguments["prompt"])
    return pipe(**arguments).images


def ours(model: DiffusionModel, sampler: str | SamplerConfig | None, **arguments: Any) -> Tensor:
    last: list[Step] = []
    own: dict[str, Any] = {"num_inference_steps": 10, "guidance_scale": 7.5, "negative_prompt": NEGATIVE}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the prompt .* is longer")
        model.generate(**own | arguments, sampler=sampler, callback=last.append)
    return last[-1].x


def error(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    assert one.dtype == other.dtype
    assert 0.01 < other.std() < 1e4, "latents that died or exploded show nothing"
    return float((one - other).abs().amax() / other.abs().amax())


def picture(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def mask(width: int = 32, height: int = 32) -> Image.Image:
    values = np.zeros((height, width), dtype=np.uint8)
    values[8:28, 4:20] = 255
    return Image.fromarray(values)


@pytest.mark.parametrize(
    ("kind", "sampler"),
    # PNDM with a v-model is left out: diffusers combines earlier v, the paper and we earlier eps.
    [
        *(("1.5", name) for name in (None, *CLASSES)),
        *(("2.1", name) for name in (None, *CLASSES) if name != "pndm"),
    ],
)
def test_text_to_image_gives_the_latents_of_diffusers(
    kind: str, sampler: str | None, folders: dict[str, Path], models: dict[str, DiffusionModel]
) -> None:
    """None is the sampler that the folder names: PNDM for 1.5, DDIM for 2.1."""
    noise = normal(len(PROMPTS), 4, 8, 8, dtype=torch.float32)
    wanted = theirs(reference(folders[kind]), sampler, prompt=PROMPTS, latents=noise.clone())
    found = ours(models[kind], sampler, prompt=PROMPTS, latents=noise)
    assert error(found, wanted) < TOLERANCE


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, -2.0])
def test_without_guidance_the_latents_are_those_of_diffusers(
    scale: float, folders: dict[str, Path], models: dict[str, DiffusionModel]
) -> None:
    """1 and below is off, and what else is said of guidance has no effect then."""
    noise = normal(len(PROMPTS), 4, 8, 8, dtype=torch.float32)
    settings: dict[str, Any] = {"prompt": PROMPTS, "guidance_scale": scale, "guidance_rescale": 0.7}
    settings["negative_prompt"] = ""
    wanted = theirs(reference(folders["1.5"]), "ddim", latents=noise.clone(), **settings)
    assert error(ours(models["1.5"], "ddim", latents=noise, **settings), wanted) < TOLERANCE


def test_the_exact_prompt_has_77_tokens(models: dict[str, DiffusionModel]) -> None:
    tokenizer = models["1.5"].text_encoder.tokenizers[0]
    batch = tokenizer(PROMPTS)
    assert batch.attention_mask.sum(dim=1).tolist()[:3] == [2, 77, 77]
    assert [bool(cut) for cut in batch.cut] == [False, False, True, False]


@pytest.mark.parametrize("kind", ["1.5", "2.1"])
@pytest.mark.parametrize(
    "change",
    [
        {"guidance_scale": 7.6},
        {"num_inference_steps": 11},
        {"prompt": ["a dog"]},
        {"negative_prompt": ""},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_small_difference_breaks_the_parity(
    kind: str, change: dict[str, Any], folders: dict[str, Path], models: dict[str, DiffusionModel]
) -> None:
    noise = normal(1, 4, 8, 8, dtype=torch.float32)
    wanted = theirs(reference(folders[kind]), "ddim", prompt=["a cat"], latents=noise.clone())
    assert error(ours(models[kind], "ddim", prompt=["a cat"], latents=noise), wanted) < TOLERANCE
    assert (
        error(ours(models[kind], "ddim", **{"prompt": ["a cat"], "latents": noise} | change), wanted)
        > 10 * TOLERANCE
    )


def test_sizes_that_are_not_square(folders: dict[str, Path], models: dict[str, DiffusionModel]) -> None:
    noise = normal(1, 4, 8, 12, dtype=torch.float32)
    size = {"height": 32, "width": 48}
    wanted = theirs(reference(folders["1.5"]), "ddim", prompt=["a cat"], latents=noise.clone(), **size)
    assert error(ours(models["1.5"], "ddim", prompt=["a cat"], latents=noise, **size), wanted) < TOLERANCE


def test_the_decoded_picture_is_the_one_of_diffusers(
    folders: dict[str, Path], models: dict[str, DiffusionModel]
) -> None:
    noise = normal(1, 4, 8, 8, dtype=torch.float32)
    settings: dict[str, Any] = {"num_inference_steps": 5, "latents": noise}
    (image,) = theirs(reference(folders["1.5"]), "ddim", prompt=["a cat"], output_type="pil", **settings)
    wanted = np.asarray(image, dtype=int)
    (image,) = models["1.5"].generate("a cat", NEGATIVE, sampler="ddim", guidance_scale=7.5, **settings)
    found = np.asarray(image, dtype=int)
    assert wanted.std() > 5
    assert np.abs(found - wanted).max() <= 1


@pytest.mark.parametrize("strength", [0.6, 1.0, 0.1])
@pytest.mark.parametrize("kind", ["1.5", "2.1"])
def test_image_to_image(
    kind: str,
    strength: float,
    folders: dict[str, Path],
    models: dict[str, DiffusionModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The reference draws from the encoder's posterior, we take its mode.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipe = reference(folders[kind], "StableDiffusionImg2ImgPipeline")
    same: dict[str, Any] = {
        "prompt": ["a fox"],
        "image": picture(),
        "strength": strength,
        "num_inference_steps": 20,
    }
    generator = torch.Generator().manual_seed(5)
    wanted = theirs(pipe, "ddim", generator=generator, **same)
    found = ours(models[kind], "ddim", seed=5, **same)
    if (
        strength == 1
    ):  # there diffusers keeps what the first level leaves of the picture, we begin at pure noise
        assert TOLERANCE < error(found, wanted) < 1
        assert torch.equal(
            found, ours(models[kind], "ddim", seed=5, prompt=["a fox"], num_inference_steps=20)
        )
    else:
        assert error(found, wanted) < TOLERANCE
        assert error(ours(models[kind], "ddim", seed=6, **same), wanted) > 10 * TOLERANCE


@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("kind", ["1.5", "2.1", "inpaint"])
def test_inpainting(
    kind: str,
    strength: float,
    folders: dict[str, Path],
    models: dict[str, DiffusionModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipe = reference(folders[kind], "StableDiffusionInpaintPipeline")
    same: dict[str, Any] = {
        "prompt": ["a fox"],
        "image": picture(),
        "mask_image": mask(),
        "strength": strength,
    }
    generator = torch.Generator().manual_seed(5)
    wanted = theirs(pipe, "ddim", generator=generator, height=32, width=32, **same)
    found = ours(models[kind], "ddim", seed=5, **same)
    assert error(found, wanted) < TOLERANCE
    assert (
        error(ours(models[kind], "ddim", seed=5, **same | {"image": picture(seed=1)}), wanted)
        > 10 * TOLERANCE
    )


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("kind", ["1.5", "2.1", "inpaint"])
def test_every_sampler_changes_pictures_as_diffusers_does(
    kind: str,
    sampler: str,
    folders: dict[str, Path],
    models: dict[str, DiffusionModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Image-to-image and inpainting; a 9-channel network only inpaints."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    settings: dict[str, Any] = {
        "prompt": ["a fox"],
        "image": picture(),
        "strength": 0.6,
        "num_inference_steps": 20,
    }
    classes = {"StableDiffusionInpaintPipeline": {"mask_image": mask()}}
    if kind != "inpaint":
        classes["StableDiffusionImg2ImgPipeline"] = {}
    for cls, extra in classes.items():
        size = {"height": 32, "width": 32} if extra else {}
        generator = torch.Generator().manual_seed(5)
        wanted = theirs(
            reference(folders[kind], cls), sampler, generator=generator, **settings, **extra, **size
        )
        assert error(ours(models[kind], sampler, seed=5, **settings, **extra), wanted) < TOLERANCE


def test_inpainting_with_pndm(
    folders: dict[str, Path], models: dict[str, DiffusionModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At strength 1. Below it diffusers counts PNDM's doubled timestep and runs one level behind its latents."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipe = reference(folders["1.5"], "StableDiffusionInpaintPipeline")
    same: dict[str, Any] = {"prompt": ["a fox"], "image": picture(), "mask_image": mask(), "strength": 1.0}
    generator = torch.Generator().manual_seed(5)
    wanted = theirs(pipe, "pndm", generator=generator, height=32, width=32, **same)
    assert error(ours(models["1.5"], "pndm", seed=5, **same), wanted) < TOLERANCE


@pytest.mark.parametrize("kind", ["1.5", "2.1"])
def test_a_single_file_gives_the_latents_of_diffusers(
    kind: str, folders: dict[str, Path], models: dict[str, DiffusionModel], tmp_path: Path
) -> None:
    """The folder as one file in CompVis' layout, read back: the whole way, 2.x' padding token included."""
    models[kind].export(tmp_path / "model.safetensors", format="single-file")
    model = DiffusionModel.from_pretrained(tmp_path / "model.safetensors")
    noise = normal(len(PROMPTS), 4, 8, 8, dtype=torch.float32)
    wanted = theirs(reference(folders[kind]), "ddim", prompt=PROMPTS, latents=noise.clone())
    assert error(ours(model, "ddim", prompt=PROMPTS, latents=noise), wanted) < TOLERANCE


def test_what_the_folder_says_is_what_the_model_does(models: dict[str, DiffusionModel]) -> None:
    first, second, inpaint = (models[kind].config for kind in sd.KINDS)
    assert (first.sampler.name, second.sampler.name, inpaint.sampler.name) == ("pndm", "ddim", "ddim")
    assert (first.schedule.prediction_type, second.schedule.prediction_type) == ("epsilon", "v_prediction")
    assert (first.sample_size, first.num_inference_steps, first.guidance.scale) == (32, 50, 7.5)
    assert first.vae.scaling_factor == 0.18215
    assert first.unet.num_attention_heads == (8, 8, 8)
    assert second.unet.num_attention_heads == (2, 4, 8)
    assert (first.unet.use_linear_projection, second.unet.use_linear_projection) == (False, True)
    assert (second.unet.upcast_attention, inpaint.unet.in_channels) == (True, 9)
    assert (first.text_encoders[0].hidden_act, second.text_encoders[0].hidden_act) == ("quick_gelu", "gelu")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_todays_names_and_half_precision_files_are_read(
    part: str, folders: dict[str, Path], models: dict[str, DiffusionModel], tmp_path: Path
) -> None:
    """What diffusers saves today: other names, fp16 in files that are named so, and a tokenizer.json."""
    pipe = reference(folders["2.1"])
    quietly(pipe.save_pretrained, tmp_path / "new", variant="fp16" if part == "unet" else None)
    assert not (tmp_path / "new" / "text_encoder" / "model.safetensors").exists() or part == "vae"
    again = DiffusionModel.from_pretrained(tmp_path / "new")
    before = models["2.1"].state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again.encode_prompt(PROMPTS[3]).tokens, models["2.1"].encode_prompt(PROMPTS[3]).tokens)


def test_old_attention_weights_as_convolutions_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(folders["1.5"], tmp_path)
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    convolutions = {
        n: t[:, :, None, None] if ".attentions." in n and t.ndim == 2 else t for n, t in state.items()
    }
    save_file({name: tensor.contiguous() for name, tensor in convolutions.items()}, path)
    before, after = DiffusionModel.from_pretrained(folders["1.5"]), DiffusionModel.from_pretrained(folder)
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())


def _copy(folder: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "copy"))


FILES = [
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "tokenizer/vocab.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(folders["1.5"], tmp_path)
    (folder / name).unlink()
    with pytest.raises(InputError, match=name.rpartition("/")[2]):
        DiffusionModel.from_pretrained(folder)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe"])
def test_a_damaged_file_is_refused(
    name: str, content: bytes, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = _copy(folders["1.5"], tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        DiffusionModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("safetensors")])
def test_a_truncated_file_is_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = _copy(folders["1.5"], tmp_path)
    whole = (folder / name).read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        (folder / name).write_bytes(whole[:size])
        with pytest.raises(InputError, match="not a whole safetensors file"):
            DiffusionModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        (
            "unet/config.json",
            "down_block_types",
            ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            "AttnDownBlock2D",
        ),
        ("unet/config.json", "block_out_channels", [32, 48, 96], "of another shape"),
        ("unet/config.json", "layers_per_block", 3, "are missing"),
        ("unet/config.json", "layers_per_block", 1, "are unexpected"),
        ("scheduler/scheduler_config.json", "_class_name", "KarrasVeScheduler", "KarrasVeScheduler"),
        ("scheduler/scheduler_config.json", "beta_schedule", "sigmoid", "sigmoid"),
        ("scheduler/scheduler_config.json", "prediction_type", "x0", "x0"),
        ("text_encoder/config.json", "hidden_act", "relu", "relu"),
        ("text_encoder/config.json", "hidden_size", "wide", "hidden_size"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_name(
    file: str, key: str, value: object, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = _copy(folders["1.5"], tmp_path)
    settings = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps(settings | {key: value}), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        DiffusionModel.from_pretrained(folder)


@pytest.mark.slow
def test_full_size(tmp_path: Path) -> None:
    """Stable Diffusion 1.5 as it is: 1.07 billion random parameters, from the published form of its folder."""
    unet = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768}
    vae = {"sample_size": 512, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    folder = sd.build(
        tmp_path / "sd15",
        unet | {"attention_head_dim": 8},
        vae | {"latent_channels": 4},
        text | {"hidden_act": "quick_gelu", "projection_dim": 768},
        sd.SCHEDULER,
    )
    noise = normal(1, 4, 8, 8, dtype=torch.float32)
    settings: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64}
    pipe = reference(folder)
    wanted = theirs(pipe, None, prompt=["a fox"], latents=noise.clone(), **settings)
    reference.cache_clear()
    del pipe
    model = DiffusionModel.from_pretrained(folder)
    assert sum(p.numel() for p in model.unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in model.vae.parameters()) == 83_653_863
    assert sum(p.numel() for p in model.text_encoder.parameters()) == 123_060_480
    assert error(ours(model, None, prompt=["a fox"], latents=noise, **settings), wanted) < TOLERANCE
    other = ours(model, None, prompt=["a dog"], latents=noise, **settings)
    assert error(other, wanted) > 10 * TOLERANCE
