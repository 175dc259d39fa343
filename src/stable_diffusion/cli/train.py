"""``minisd train``: a model from a recipe, or from captioned images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from stable_diffusion.config import ModelConfig
from stable_diffusion.errors import InputError

if TYPE_CHECKING:
    from stable_diffusion import DiffusionModel


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
