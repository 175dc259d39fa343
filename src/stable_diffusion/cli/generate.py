"""``minisd generate``: pictures from words."""

from __future__ import annotations

import dataclasses
import os
import re
import textwrap
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from stable_diffusion.cli.show import say, tell
from stable_diffusion.config import ModelConfig, Styles, from_dict
from stable_diffusion.diffusion.names import SAMPLERS, SPACINGS
from stable_diffusion.errors import InputError, shown
from stable_diffusion.files import check_place, read_json, slug
from stable_diffusion.generation.request import (
    DOCS,
    FIELDS,
    HINTS,
    LARGEST_SEED,
    LOADING,
    PICTURES,
    SHORT,
    parse,
    split_file,
)
from stable_diffusion.generation.strangers import check_stranger, named_files

if TYPE_CHECKING:
    from PIL import Image

    from stable_diffusion import DiffusionModel

SIZE = re.compile(r"(\d+)(?:x(\d+))?")
OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")

MORE = {
    "model": " By default the model that the package carries.",
    "seed": " By default a random one, which is stored.",
    "strength": f" By default {FIELDS['strength'].default}.",
    "sampler": f" {', '.join(SAMPLERS)}.",
    "spacing": f" {', '.join(SPACINGS)}.",
    "lora": " Here a name is a file: FILE or FILE:WEIGHT; may be repeated. In a prompt, <lora:NAME:WEIGHT> names"
    " it without folder and ending.",
    "embedding": " May be repeated.",
}
"""What the help adds to a field's sentence."""


def _options() -> type:
    """The fields of a request as options: nothing given takes the model's own value."""
    options: list[Any] = []
    for name in FIELDS:
        if name in ("prompt", "latents"):
            continue
        help = DOCS.get(name, "") + MORE.get(name, "")
        aliases = [f"--{SHORT[name]}"] if name in SHORT else []
        argument = tyro.conf.arg(help=help, help_behavior_hint="", aliases=aliases)
        if name in ("lora", "embedding"):
            options.append((name, Annotated[tuple[str, ...], tyro.conf.UseAppendAction, argument], ()))
        elif HINTS[name] is bool:
            options.append((name, Annotated[bool, argument], False))
        else:
            kind = {"negative_prompt": str, **dict.fromkeys(PICTURES, Path)}.get(name, HINTS[name])
            options.append((name, Annotated[kind | None, argument], None))
    return dataclasses.make_dataclass("Options", options, frozen=True)


Options = _options()


def generate(
    prompt: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    options: Annotated[Options, tyro.conf.arg(name="")] = Options(),  # type: ignore[valid-type] # noqa: B008
    size: str | None = None,
    output: Path = Path("pictures"),
    device: str | None = None,
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
) -> None:
    """Generate pictures from words, or from a picture and words, and print their paths.

    Args:
        prompt: What to generate, in quotes; several prompts give several pictures.
        options: All that makes a picture.
        size: Width and height in pixels: 128, or WIDTHxHEIGHT.
        output: Folder for the pictures, or one picture's name; nothing is ever overwritten.
        device: cuda, mps or cpu. By default the first of these that is there.
        from_: A picture made here: make it again, with other settings where they are given. What it asks for is taken
            up to 2048 pixels a side and 150 steps; files that it names are read if they are here, after a note.
    """
    from stable_diffusion import Config, DiffusionModel
    from stable_diffusion.generation.metadata import save_png

    if output.suffix.lower() in OTHER_PICTURES:
        raise InputError(
            f"pictures are written as PNG: name {str(output)!r} with .png at the end, or name a folder"
        )
    settings = {**_given(options), **_size(size), **({"prompt": prompt} if prompt else {})}
    if from_ is not None:
        settings = _stored(from_, settings)
    prompt = settings.pop("prompt", ())
    count = settings.pop("num_images_per_prompt", 1)
    if not prompt:
        example = (*_shown(settings.get("model")).prompts, "a red circle")[0]
        raise InputError(f'what shall be drawn? Give a prompt in quotes, such as "{example}"')
    reading = {name: settings.pop(name) for name in LOADING if name in settings}
    embedding = reading.pop("embedding", ())
    check_place(_path(output, prompt[0], 0))
    model = DiffusionModel.from_pretrained(reading.pop("model", None), **reading)
    for note in model.notes:
        warnings.warn(note, stacklevel=1)
    _add(model, settings.get("lora", {}), embedding)
    if model.adapters.weights and settings.get("prompt_syntax", "plain") == "plain":
        model.fuse_lora(keep=False)  # one weight for all pictures
    model = model.to(Config(device).DEVICE)
    first = settings.pop("seed", None)
    if first is None:
        first = int.from_bytes(os.urandom(4), "big")
    for number, text in enumerate(text for text in prompt for _ in range(count)):
        seed = (first + number) % (LARGEST_SEED + 1)
        picture = _picture(model, text, {**settings, "seed": seed})
        say(save_png(picture, _path(output, text, seed), picture.info["settings"]))


def _given(options: Any) -> dict[str, Any]:
    """The fields that the command gives."""
    plain = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if value is not None and value is not False and value != ()
    }
    return parse(plain)


def _stored(path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in a picture, which may be a stranger's, but for those that are given.

    Raises InputError where they are not those that this command writes, or choose what only the user may.
    """
    from stable_diffusion.generation.metadata import read_settings

    stored = {name: value for name, value in read_settings(path).items() if name not in given}
    for name, text in named_files(stored):
        if re.match(r"[\\/]{2}", text):  # before a look for it, with which Windows would ask that server
            raise InputError(
                f"{path} names the {name} {shown(text)}, which is on another machine: give --{SHORT.get(name, name)}"
            )
    try:
        settings = parse({**stored, **given}, whole=True)
        stored = {name: settings[name] for name in stored}
        check_stranger(stored)
    except InputError as error:
        raise InputError(
            f"the settings in {path} cannot be taken ({error}): give a PNG that this version wrote and no program"
            " changed, or repeat what you want of them on the command line"
        ) from None
    for name, text in named_files(stored):
        file = split_file(text)[0] if name == "embedding" else text
        if not os.path.exists(file):  # noqa: PTH110 # which has no error for names that no file can have
            raise InputError(
                f"{path} names the {name} {shown(text)}, which is not here, and nothing is fetched for a picture:"
                f" give --{SHORT.get(name, name)}"
            )
        warnings.warn(f"{path} names the {name} {text!r}: reading it", stacklevel=1)
    return settings


def _add(model: DiffusionModel, lora: Mapping[str, float], embedding: tuple[str, ...]) -> None:
    """Puts the files that the command names into the model, and says what was applied."""
    for file, weight in lora.items():
        tell(model.load_lora(file, weight, name=file))
    for text in embedding:
        words = model.load_textual_inversion(*split_file(text))
        tell(f"prompts can have {', '.join(words)}")


def _picture(model: DiffusionModel, prompt: str, settings: dict[str, Any]) -> Image.Image:
    """One picture: alone, so that it has the same bytes whether others are made beside it or not."""
    began, steps = time.perf_counter(), 0

    def count(_: object) -> None:
        nonlocal steps
        steps += 1

    (picture,) = model.generate(prompt, **settings, callback=count)
    tell(f"{steps} steps, {steps / (time.perf_counter() - began):.1f} steps a second")
    return picture


def _shown(model: str | None) -> ModelConfig:
    """What our model folder, or else the package's own model, says of itself; nothing where it cannot be read.

    It costs no import of torch: for help, and for what is wrong before the model is read.
    """
    folder = Path(__file__).parents[1] / "weights" / "model" if model is None else Path(model)
    try:
        return from_dict(ModelConfig, read_json(folder / "config.json"))
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


def _size(text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    match = SIZE.fullmatch(text)
    if match is None:
        raise InputError(f"--size must be a number of pixels, or WIDTHxHEIGHT such as 128x192, got {text!r}")
    return {"width": int(match[1]), "height": int(match[2] or match[1])}


def _path(output: Path, prompt: str, seed: int) -> Path:
    """Where a picture goes: into the folder `output` by prompt and seed, or `output` itself."""
    if output.suffix.lower() == ".png":
        return output.with_suffix(".png")
    return output / f"{slug(prompt.lower().replace('.', ' '), 'picture')}-{seed}.png"
