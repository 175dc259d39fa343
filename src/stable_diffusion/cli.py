"""The command ``minisd``: one function a command. torch is imported when a command needs it."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from stable_diffusion.config import MINI, ModelConfig, Styles, from_dict
from stable_diffusion.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from stable_diffusion import DiffusionModel
    from stable_diffusion.data.item import Progress

T = TypeVar("T")

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


def train(
    recipe: tyro.conf.Positional[Path | None] = None,
    *,
    images: Path | None = None,
    captions: Path | None = None,
    config: str = "mini",
    start: Path | None = None,
    output: Path | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    fresh: bool = False,
    autocast: bool = True,
    compile: bool = False,
    check: bool = False,
    device: str | None = None,
) -> None:
    """Train a model from a recipe, or from a folder of images with COCO captions. The same command goes on.

    Args:
        recipe: A recipe file, such as recipes/icons-128.toml.
        images: The image folder, instead of a recipe.
        captions: The captions file in COCO format.
        config: The preset to train from images: mini.
        start: A model to go on from, instead of random weights. Its autoencoder's latents stay as they are.
        output: Folder of checkpoints and of the finished model; by default runs/ and the model's name.
        steps: Steps of each stage, instead of the recipe's number of passes.
        minutes: Time for the whole training, instead of steps.
        fresh: Begin anew instead of going on from a checkpoint.
        autocast: Compute in 16 bits where the device is good at it.
        compile: Compile each stage first, for a minute or two: faster steps where latents are large.
        check: Only learn eight of the pictures by heart, in minutes, and say whether the set-up learns.
        device: cuda, mps or cpu. By default the first of these that is there.
    """
    import torch

    from stable_diffusion import CocoImageLoader, Config, DiffusionModel
    from stable_diffusion.config import preset
    from stable_diffusion.training.recipe import read_recipe

    if check and start is not None:
        raise InputError("give --check or --start, not both: the check begins with random weights")
    loaded = None if start is None else DiffusionModel.from_pretrained(start)
    if recipe is not None:
        if images is not None or captions is not None:
            raise InputError("give a recipe, or --images and --captions, not both")
        plan = read_recipe(recipe)
        settings, data = plan.config, plan.open_data()
    else:
        if images is None or captions is None:
            raise InputError("give a recipe file, or both --images and --captions")
        settings = preset(config) if loaded is None else loaded.config
        data = CocoImageLoader(images, captions)
    folder = Path("runs") / settings.name if output is None else output
    where = Config(device).DEVICE
    if check:
        from stable_diffusion.training.check import check_config

        model = DiffusionModel(check_config(settings)).to(where)
        if not model.check(data, output_dir=folder.with_name(f"{folder.name}-check"), autocast=autocast):
            raise SystemExit(1)
        return
    model = (DiffusionModel(settings) if loaded is None else _going_on(loaded, settings)).to(where)
    if compile:
        model = torch.compile(model)  # type: ignore[assignment] # it serves as the model (model.py)
    model.train(data, steps=steps, minutes=minutes, output_dir=folder, resume=not fresh, autocast=autocast)
    print(folder / "model")


def _going_on(model: DiffusionModel, settings: ModelConfig) -> DiffusionModel:
    """The model, with its denoiser to be trained further as `settings` say."""
    for part in ("sample_size", "vae", "unet", "text_encoders", "schedule"):
        if getattr(settings, part) != getattr(model.config, part):
            raise InputError(
                f"the model {model.config.name!r} has another {part} than the recipe: --start needs the same one"
            )
    training = settings.training
    autoencoder = replace(training.autoencoder, passes=0)
    model.config = replace(settings, training=replace(training, autoencoder=autoencoder))
    return model


def data_shapes(*, out: Path, size: int = 128, count: int = 5000, seed: int = 0) -> None:
    """Draw coloured shapes.

    Args:
        out: The folder to make.
        size: Side of the pictures in pixels.
        count: Number of pictures; every tenth is held out.
        seed: Of the drawing; the same seed gives the same files.
    """
    from stable_diffusion.data.shapes import write_shapes

    write_shapes(out, count=count, size=size, seed=seed)
    print(out)


def data_icons(*, out: Path, size: int = 128, packages: Path | None = None) -> None:
    """Make 20,000 named drawings in eight styles, from npm packages.

    Args:
        out: The folder to make.
        size: Side of the pictures in pixels.
        packages: A folder to keep the npm packages in; by default they are not kept.
    """
    from stable_diffusion.data.icons import write_icons

    print(_finished(write_icons(out, size, packages=packages)))


def data_check(
    folder: tyro.conf.Positional[Path | None] = None,
    *,
    images: Path | None = None,
    captions: Path | None = None,
    size: int = MINI.sample_size,
) -> None:
    """Say what training will see of a set: every picture is decoded, every caption measured.

    Args:
        folder: The set: annotations/captions_NAME.json, and the pictures in NAME, as COCO and the sets made here
            have them.
        images: An image folder, instead.
        captions: Its captions file in COCO format.
        size: Side of the pictures in training, in pixels.
    """
    from stable_diffusion.checkpoints.checkpoint import packaged
    from stable_diffusion.data.check import Split, check_set, find_splits
    from stable_diffusion.nn.tokenizer import Tokenizer

    if folder is not None:
        if images is not None or captions is not None:
            raise InputError("give the folder of a set, or --images and --captions, not both")
        splits = find_splits(folder)
    else:
        if images is None or captions is None:
            raise InputError("give the folder of a set, or both --images and --captions")
        splits = [Split(images.resolve().name, images, captions)]
    (text,) = MINI.text_encoders
    tokenizer = Tokenizer(packaged(str(text.packaged)), text.architecture, text.context_length)
    found = check_set(
        splits, size=size, cut=lambda texts: tokenizer(texts).cut, context_length=text.context_length
    )
    print(_finished(found))


def data(
    what: tyro.conf.OmitArgPrefixes[
        tyro.conf.OmitSubcommandPrefixes[
            Annotated[Any, tyro.conf.subcommand("shapes", constructor=data_shapes)]
            | Annotated[Any, tyro.conf.subcommand("icons", constructor=data_icons)]
            | Annotated[Any, tyro.conf.subcommand("check", constructor=data_check)]
        ]
    ],
) -> None:
    """Make a set of captioned images in COCO format, or check one."""
    # The subcommands have done it: `what` is what they return.


def _finished(steps: Generator[Progress, None, T]) -> T:
    """What the steps return at their end; meanwhile, on a terminal, a bar for each of the things they do."""
    from tqdm import tqdm

    what, bar = "", tqdm(disable=True)
    try:
        while True:
            step = next(steps)
            if step.what != what:
                bar.close()
                what, bar = step.what, tqdm(desc=step.what, total=step.total, disable=None)
            bar.update(step.done - bar.n)
    except StopIteration as end:
        return end.value
    finally:
        bar.close()


def evaluate(
    model: tyro.conf.Positional[Path | None] = None,
    *,
    data: Path,
    out: Path | None = None,
    count: int = 500,
    splits: tuple[str, ...] = (),
    seed: int = 0,
    cache: Path = Path("runs/features"),
    device: str | None = None,
) -> None:
    """Score a model on a captioned set: a JSON file of scores and a page with pictures. The same command goes on.

    Args:
        model: A model folder, a single file or a hub name (owner/name). By default the model that the package carries.
        data: The set: annotations/captions_NAME.json, and the pictures in NAME. What it says of objects and styles,
            as the icons do, is scored too.
        out: Folder for scores.json and index.html; by default runs/evaluation/ and the model's name.
        count: Pictures to draw of each part of the set.
        splits: Parts of the set, such as val test_style; by default all.
        seed: Decides on pictures, captions and noise: the same for every model.
        cache: Folder where features of the real pictures are kept for the next model.
        device: cuda, mps or cpu. By default the first of these that is there.
    """
    from stable_diffusion import Config, DiffusionModel
    from stable_diffusion.evaluation.report import write_report
    from stable_diffusion.evaluation.run import evaluate as evaluation

    loaded = DiffusionModel.from_pretrained(model).to(Config(device).DEVICE)
    for note in loaded.notes:
        warnings.warn(note, stacklevel=1)
    folder = Path("runs/evaluation") / loaded.config.name if out is None else out
    steps = evaluation(
        loaded,
        lambda captions, first: loaded.generate(captions, seed=first),
        data,
        out=folder,
        cache=cache,
        count=count,
        splits=splits,
        seed=seed,
    )
    for path in write_report(*_finished(steps), folder):
        print(path)


def info(path: tyro.conf.Positional[Path | None] = None) -> None:
    """Say what a model, a file of weights or a picture is; without a path, what the package's own model is.

    Args:
        path: A model folder, a single file, a LoRA, a hub name (owner/name), or a picture made here.
    """
    from stable_diffusion import images
    from stable_diffusion.checkpoints.checkpoint import is_weights, packaged
    from stable_diffusion.checkpoints.info import describe

    if path is not None and path.is_file() and not is_weights(path):
        for key, value in images.read_settings(path).items():
            print(f"{key}: {value}")
        return
    for line in describe(packaged("model") if path is None else path):
        print(line)


def export(
    model: tyro.conf.Positional[Path],
    out: tyro.conf.Positional[Path],
    *,
    format: Literal["diffusers", "single-file"] = "diffusers",
    half: bool = False,
    prediction_type: str | None = None,
    variant: str | None = None,
    ema: bool = False,
) -> None:
    """Write a model for other programs, and print its path. What diffusers' pipeline cannot hold goes by parts.

    Args:
        model: A model folder, a single file or a hub name (owner/name).
        out: The folder or the .safetensors file to write; nothing is ever overwritten.
        format: diffusers: a folder for StableDiffusionPipeline; single-file: CompVis' layout.
        half: Write 16-bit numbers, which halves the files.
        prediction_type: What the U-Net predicts (epsilon, v_prediction), whatever the files say.
        variant: Diffusers folders: files to prefer, such as fp16 or non_ema.
        ema: Single files: take the averaged weights where there are both.
    """
    import torch

    from stable_diffusion import DiffusionModel

    loaded = DiffusionModel.from_pretrained(model, prediction_type=prediction_type, variant=variant, ema=ema)
    for note in loaded.notes:
        warnings.warn(note, stacklevel=1)
    loaded.export(out, format=format, dtype=torch.float16 if half else None)
    print(out)


def _shown(model: str | None) -> ModelConfig:
    """What our model folder, or else the package's own model, says of itself; nothing where it cannot be read.

    It costs no import of torch: for help, and for what is wrong before the model is read.
    """
    folder = Path(__file__).with_name("weights") / "model" if model is None else Path(model)
    try:
        return from_dict(ModelConfig, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return ModelConfig()


def _examples() -> Iterator[str]:
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


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"minisd: note: {message}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. Input that cannot be used is one sentence on stderr and exit code 2."""
    warnings.showwarning = _show_warning
    arguments = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[..., Any]] = {
        "generate": generate,
        "train": train,
        "data": data,
        "evaluate": evaluate,
        "info": info,
        "export": export,
    }
    try:
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="minisd",
            description="Pictures from words, on a machine of your own.",
            args=arguments,
        )
        sys.stdout.flush()
    except BrokenPipeError:  # who read this, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except InputError as error:
        print(f"minisd: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code == 0 and list(arguments[:1]) == ["generate"]:
            for line in _examples():  # which tyro has no place for
                print(line)
        raise
    except KeyboardInterrupt:
        print("minisd: stopped; the same command goes on with a training", file=sys.stderr)
        raise SystemExit(130) from None
