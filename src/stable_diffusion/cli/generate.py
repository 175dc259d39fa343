"""``minisd generate``: pictures from words."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from stable_diffusion.config import ModelConfig, Styles, from_dict
from stable_diffusion.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from stable_diffusion import DiffusionModel

SIZE = re.compile(r"(\d+)(?:x(\d+))?")

# What a picture's settings hold, and which of it only some pictures have.
STORED: dict[str, tuple[type, ...]] = {
    "model": (str, type(None)),
    "prompt": (str,),
    "negative_prompt": (str,),
    "seed": (int,),
    "num_inference_steps": (int,),
    "guidance_scale": (int, float),
    "guidance_interval": (list,),
    "guidance_rescale": (int, float),
    "sampler": (str,),
    "spacing": (str, type(None)),
    "eta": (int, float),
    "variance": (str,),
    "width": (int,),
    "height": (int,),
}
SOMETIMES_STORED: dict[str, tuple[type, ...]] = {
    "strength": (int, float),
    "image": (str,),
    "mask_image": (str,),
    "prediction_type": (str,),
    "variant": (str,),
    "ema": (bool,),
    "vae": (str,),
    "lora": (list,),
    "embedding": (list,),
}
READING = ("prediction_type", "variant", "ema")
"""Of these, how the model's files are read."""
ADDITIONS = ("vae", "lora", "embedding")
"""And what is added to the model."""
OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def generate(
    prompt: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    model: Path | None = None,
    negative: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    seed: int | None = None,
    size: str | None = None,
    count: int = 1,
    image: Path | None = None,
    mask: Path | None = None,
    strength: float | None = None,
    prediction_type: str | None = None,
    variant: str | None = None,
    ema: bool = False,
    vae: str | None = None,
    lora: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    embedding: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = (),
    output: Path = Path("pictures"),
    device: str | None = None,
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
) -> None:
    """Draw pictures from words, or from a picture and words, and print their paths.

    Args:
        prompt: What to draw, in quotes; several prompts give several pictures.
        model: A model folder, ours or diffusers', a single file, or a hub name (owner/name). By default the model
            that the package carries.
        negative: What to steer away from.
        steps: Steps of the walk from noise to picture.
        guidance: How strongly to follow the prompt; 1 is no guidance.
        sampler: ddpm, ddim, pndm, euler, euler_a, heun, dpmpp_2m, dpmpp_2m_sde, unipc or lcm.
        seed: Seed of the first picture; the next one's is one more. By default one is drawn, and stored.
        size: Size in pixels: 128, or WIDTHxHEIGHT.
        count: Pictures of each prompt.
        image: A picture to begin with.
        mask: A picture that is white where --image is to be repainted.
        strength: How much of --image is given up, above 0 up to 1. By default 0.8.
        prediction_type: What the U-Net predicts (epsilon, v_prediction), whatever the files say.
        variant: Diffusers folders: files to prefer, such as fp16 or non_ema.
        ema: Single files: take the averaged weights where there are both.
        vae: Another autoencoder: a folder or file of Stable Diffusion's, or TAESD's.
        lora: A LoRA file, with :WEIGHT after it or without; the option can be given several times.
        embedding: A textual inversion, with :TOKEN after it or without; the option can be given several times.
        output: Folder for the pictures, or one picture's name; nothing is ever overwritten.
        device: cuda, mps or cpu. By default the first of these that is there.
        from_: A picture made here: make it again, with other settings where they are given.
    """
    from stable_diffusion import Config, DiffusionModel, images

    if count < 1:
        raise InputError(f"--count must be at least 1, got {count}")
    if output.suffix.lower() in OTHER_PICTURES:
        raise InputError(
            f"pictures are written as PNG: name {str(output)!r} with .png at the end, or name a folder"
        )
    given: dict[str, Any] = {
        "model": None if model is None else str(model),
        "negative_prompt": negative,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "sampler": sampler,
        "seed": seed,
        "image": None if image is None else str(image),
        "mask_image": None if mask is None else str(mask),
        "strength": strength,
        "prediction_type": prediction_type,
        "variant": variant,
        "ema": True if ema else None,
        "vae": vae,
        "lora": list(lora) or None,
        "embedding": list(embedding) or None,
    }
    settings = {key: value for key, value in given.items() if value is not None}
    if size is not None:
        settings |= _size(size)
    if from_ is not None:
        settings = {**_stored(from_), **settings}
        prompt = prompt or (str(settings["prompt"]),)
    settings.pop("prompt", None)
    if not prompt:
        example = (*_shown(settings.get("model")).prompts, "a red circle")[0]
        raise InputError(f'what shall be drawn? Give a prompt in quotes, such as "{example}"')
    source = settings.pop("model", None)
    reading = {key: settings.pop(key) for key in READING if key in settings}
    diffusion_model = DiffusionModel.from_pretrained(source, **reading)
    for note in diffusion_model.notes:
        warnings.warn(note, stacklevel=1)
    additions = {key: settings.pop(key) for key in ADDITIONS if key in settings}
    _add(diffusion_model, **additions)
    diffusion_model = diffusion_model.to(Config(device).DEVICE)
    first = settings.pop("seed", None)
    if first is None:
        first = int.from_bytes(os.urandom(4), "big")
    for number, text in enumerate(text for text in prompt for _ in range(count)):
        picture = _draw(diffusion_model, text, {**settings, "seed": first + number})
        path = _free_path(output, text, first + number)
        images.save_png(picture, path, picture.info["settings"] | {"model": source} | reading | additions)
        print(path, flush=True)


def _add(
    model: DiffusionModel, vae: str | None = None, lora: Sequence[str] = (), embedding: Sequence[str] = ()
) -> None:
    """Puts the files that the command names into the model, and says what was applied."""
    if vae is not None:
        model.load_vae(vae)
    for text in map(str, lora):
        file, weight = _file_and(text)
        try:
            number = 1.0 if weight is None else float(weight)
        except ValueError:
            raise InputError(f"--lora must be FILE or FILE:WEIGHT such as {file}:0.8, got {text!r}") from None
        print(model.load_lora(file, number), file=sys.stderr)
    for text in map(str, embedding):
        words = model.load_textual_inversion(*_file_and(text))
        print(f"prompts can have {', '.join(words)}", file=sys.stderr)


def _file_and(text: str) -> tuple[str, str | None]:
    """A file, and what follows its last colon; a colon that is a part of the file's name stays there."""
    file, colon, rest = text.rpartition(":")
    return (text, None) if not colon or Path(text).exists() else (file, rest)


def _stored(path: Path) -> dict[str, Any]:
    """The settings in a picture. Raises InputError where they are not those that this command writes."""
    from stable_diffusion import images

    settings = images.read_settings(path)
    kinds = STORED | {key: kind for key, kind in SOMETIMES_STORED.items() if key in settings}
    wrong = [key for key, kind in kinds.items() if key not in settings or not isinstance(settings[key], kind)]
    wrong += sorted(settings.keys() - kinds.keys())
    if wrong or len(settings["guidance_interval"]) != 2:
        raise InputError(
            f"the settings in {path} are not this version's ({', '.join(wrong[:3]) or 'guidance_interval'}):"
            " give a PNG that it wrote and no program changed"
        )
    return settings


def _draw(model: DiffusionModel, prompt: str, settings: dict[str, Any]) -> Image.Image:
    """One picture, from settings as a picture stores them or as the command was given.

    One at a time, so that a picture has the same bytes whether it was made alone or among others.
    """
    from stable_diffusion import Guidance, SamplerConfig

    arguments = dict(settings)
    if "spacing" in arguments:
        fields = {key: arguments.pop(key) for key in ("spacing", "eta", "variance")}
        arguments["sampler"] = SamplerConfig(name=arguments["sampler"], **fields)
    if "guidance_interval" in arguments:
        interval, rescale = tuple(arguments.pop("guidance_interval")), arguments.pop("guidance_rescale")
        arguments["guidance_scale"] = Guidance(
            scale=arguments["guidance_scale"], interval=interval, rescale=rescale
        )
    began, steps = time.perf_counter(), 0

    def count(_: object) -> None:
        nonlocal steps
        steps += 1

    (picture,) = model.generate(prompt, **arguments, callback=count)
    print(f"{steps} steps, {steps / (time.perf_counter() - began):.1f} steps a second", file=sys.stderr)
    sources = {key: settings[key] for key in ("image", "mask_image") if key in settings}
    picture.info["settings"] |= sources
    return picture


def _shown(model: str | None) -> ModelConfig:
    """What our model folder, or else the package's own model, says of itself; nothing where it cannot be read.

    It costs no import of torch: for help, and for what is wrong before the model is read.
    """
    folder = Path(__file__).parents[1] / "weights" / "model" if model is None else Path(model)
    try:
        return from_dict(ModelConfig, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return ModelConfig()


def examples() -> Iterator[str]:
    """The lines below the help of ``generate``: prompts and styles of the package's own model."""
    config = _shown(None)
    if config.prompts:
        yield f"What the packaged model, {config.name}, draws:"
    for prompt in config.prompts:
        yield f'  minisd generate "{prompt}"'
    if config.styles != Styles():
        yield textwrap.fill(f"Its styles: {config.styles}.", 80, subsequent_indent="  ")


def _size(text: str) -> dict[str, int]:
    match = SIZE.fullmatch(text)
    if match is None:
        raise InputError(f"--size must be a number of pixels, or WIDTHxHEIGHT such as 128x192, got {text!r}")
    return {"width": int(match[1]), "height": int(match[2] or match[1])}


def _free_path(output: Path, prompt: str, seed: int) -> Path:
    """A name that no file has: in the folder `output` by prompt and seed, or `output` itself, numbered."""
    from stable_diffusion.images import free_name

    if output.suffix.lower() == ".png":
        return free_name(output.parent, output.stem)
    words = re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60].strip("-") or "picture"
    return free_name(output, f"{words}-{seed}")
