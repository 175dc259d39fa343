"""``minisd generate``: pictures from words."""

from __future__ import annotations

import dataclasses
import os
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from stable_diffusion.cli.drawing import Plain, Work, place
from stable_diffusion.cli.frames import Frames, Progressive
from stable_diffusion.cli.prompts import read_prompts
from stable_diffusion.cli.show import say, tell
from stable_diffusion.cli.sweep import Sweep
from stable_diffusion.config import ModelConfig, Styles, from_dict
from stable_diffusion.diffusion.names import SAMPLERS, SPACINGS
from stable_diffusion.errors import InputError, shortened, shown
from stable_diffusion.files import check_place, read_json
from stable_diffusion.generation.given import split_file
from stable_diffusion.generation.request import (
    DOCS,
    FIELDS,
    HINTS,
    LOADING,
    PICTURES,
    SHORT,
    Request,
    parse,
)
from stable_diffusion.generation.strangers import check_stranger, named_files

if TYPE_CHECKING:
    from stable_diffusion import DiffusionModel

SIZE = re.compile(r"(\d+)(?:x(\d+))?")
OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")

MORE = {
    "model": " By default the model that the package carries.",
    "seed": " By default a random one, which is stored.",
    "strength": f" By default {FIELDS['strength'].default}.",
    "variation_seed": " By default a random one, which is stored.",
    "hires_strength": f" By default {FIELDS['hires_strength'].default}.",
    "sampler": f" {', '.join(SAMPLERS)}.",
    "spacing": f" {', '.join(SPACINGS)}.",
    "lora": " Here a name is a file: FILE or FILE:WEIGHT; may be repeated. In a prompt, <lora:NAME:WEIGHT> names"
    " it without folder and ending.",
    "embedding": " May be repeated.",
}
"""What the help adds to a field's sentence."""


_FIELD = re.compile("(" + "|".join(name for name in FIELDS if "_" in name) + r")\b")


def in_options(said: str) -> str:
    """A sentence that begins with a field in the words of the command: num_inference_steps is --steps."""
    if (name := _FIELD.match(said)) is None:
        return said
    return f"--{SHORT.get(name[0], name[0].replace('_', '-'))}{said[name.end() :]}"


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
    prompts: Path | None = None,
    json: bool = False,
    sweep: tuple[str, ...] = (),
    interpolate: str | None = None,
    interpolate_seed: int | None = None,
    frames: int | None = None,
    progressive: bool = False,
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
        prompts: A file of prompts, one per line, or - for standard input; lines that begin with # are left out.
        json: Print a line of JSON for each file: path, seed, seconds, notes and settings.
        sweep: One sheet of pictures that differ in one to three settings, such as guidance=1,3,5 sampler=ddim,unipc;
            values that have commas in double quotes.
        interpolate: A second prompt: make the frames from the first to it; with --output NAME.webp as an animation.
        interpolate_seed: A second seed, likewise.
        frames: How many frames, 8 by default.
        progressive: One sheet that shows a picture as it comes out of the noise.
    """
    from stable_diffusion import Config, DiffusionModel

    work = _work(output, sweep, interpolate, interpolate_seed, frames, progressive)
    settings = {**_given(options), **_size(size)}
    if prompts is not None and prompt:
        raise InputError("give prompts in quotes or with --prompts, not both")
    if len(prompt) > 2 and not any(" " in each for each in prompt):
        warnings.warn(
            f"{len(prompt)} prompts of one word each: put a prompt of several words in quotes", stacklevel=1
        )
    if prompts is not None:
        prompt = read_prompts(prompts)
    if prompt:
        settings["prompt"] = prompt
    if from_ is not None:
        settings = _stored(from_, settings)
    asked = work.fields(settings)
    reading = {name: asked.pop(name) for name in LOADING if name in asked}
    config = _shown(reading.get("model"))
    if not asked.get("prompt"):
        example = (*config.prompts, "a red circle")[0]
        raise InputError(f'what shall be generated? Give a prompt in quotes, such as "{example}"')
    draft = Request.of(config, **asked)
    asked |= {name: getattr(draft, name) for name in ("seed", "variation_seed", *PICTURES)}  # once for all
    drafts = work.requests(partial(Request.of, config), asked, draft.picture(0))
    check_place(place(output, draft))
    embedding = reading.pop("embedding", ())
    model = DiffusionModel.from_pretrained(reading.pop("model", None), **reading)
    for note in model.notes:
        warnings.warn(note, stacklevel=1)
    _add(model, asked.get("lora", {}), embedding)
    if model.adapters.weights and all(each.prompt_syntax == "plain" for each in drafts):
        model.fuse_lora(keep=False)  # one weight for all pictures
    model = model.to(Config(device).DEVICE)
    request = model.request(**asked)
    pictures = [request.picture(index) for index in range(len(request.prompts))]
    for picture in pictures:
        model.stream(picture)  # which says what the model cannot make
    for picture in pictures:
        requests = work.requests(model.request, asked, picture)
        for each in requests:
            model.stream(each)
        for made in work.make(model, requests, output):
            say(made.line() if json else made.path)


def _work(
    output: Path,
    sweep: tuple[str, ...],
    prompt: str | None,
    seed: int | None,
    frames: int | None,
    progressive: bool,
) -> Work:
    """What is made of each picture. Raises InputError where options do not go together."""
    interpolates = prompt is not None or seed is not None
    chosen = {"--sweep": bool(sweep), "--interpolate": interpolates, "--progressive": progressive}
    names = [name for name, given in chosen.items() if given]
    if len(names) > 1:
        raise InputError(f"give {' or '.join(names)}, not both")
    if frames is not None and not interpolates:
        raise InputError("--frames goes with --interpolate or --interpolate-seed: give one of them")
    animated = interpolates and output.suffix.lower() == ".webp"
    if output.suffix.lower() in OTHER_PICTURES and not animated:
        said = f"pictures are written as PNG: name {str(output)!r} with .png at the end, or name a folder"
        raise InputError(f"{said}; .webp is for the frames of --interpolate")
    if sweep:
        return Sweep(sweep, _size)
    if interpolates:
        return Frames(frames, prompt=prompt, seed=seed, animated=animated)
    return Progressive() if progressive else Plain()


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
    from stable_diffusion.generation.metadata import read_settings, read_sheet

    if (sheet := read_sheet(path)) is not None:
        warnings.warn(
            f"{path} holds several pictures, made with {shortened(sheet, 80)}: making the first of them; repeat these"
            " words for all",
            stacklevel=1,
        )
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
        yield f"What the packaged model, {config.name}, generates:"
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
