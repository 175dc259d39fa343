"""``minisd train``: a model from a recipe, or from captioned images."""

from __future__ import annotations

from dataclasses import replace
from operator import ge
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from stable_diffusion.cli.show import finished, say, tell
from stable_diffusion.data.sources import Coco, open_source
from stable_diffusion.errors import InputError
from stable_diffusion.files import slug
from stable_diffusion.runtime import first_process, keep_freed_memory

DECODER = ("encoder_pooling", "decoder_block_out_channels", "decoder_blocks", "alpha")
"""Settings of a light autoencoder on which its latents do not depend."""

if TYPE_CHECKING:
    from stable_diffusion import DiffusionModel, ModelConfig


def train(
    recipe: tyro.conf.Positional[Path | None] = None,
    *,
    images: Path | None = None,
    captions: Path | None = None,
    config: str = "mini",
    start: str | None = None,
    output: Path | None = None,
    steps: int | None = None,
    minutes: float | None = None,
    fresh: bool = False,
    autocast: bool = True,
    compile: bool = False,
    tensorboard: bool = False,
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
        steps: Steps of each stage, instead of the recipe's epochs.
        minutes: Time for the steps of all stages, which begin once the data is read; measured again as it runs.
        fresh: Begin anew instead of going on from a checkpoint.
        autocast: Compute in 16 bits where the device is good at it.
        compile: Compile the stages first that take long enough for it to pay: it costs minutes, on a GPU one.
        tensorboard: Write losses for TensorBoard too, into the output folder's tensorboard/.
        check: Only learn eight of the pictures by heart, in minutes, and say whether the set-up learns.
        device: cuda, mps or cpu. By default the first of these that is there.
    """
    import torch

    from stable_diffusion import Config, DiffusionModel
    from stable_diffusion.checkpoints import native
    from stable_diffusion.config import preset, to_dict
    from stable_diffusion.training.observers import TensorBoard
    from stable_diffusion.training.recipe import Recipe, read_recipe
    from stable_diffusion.training.run import check_lengths

    check_lengths(steps, minutes)  # before a set is made
    if check and start is not None:
        raise InputError("give --check or --start, not both: the check begins with random weights")
    loaded = None if start is None else DiffusionModel.from_pretrained(start)
    if recipe is not None:
        if images is not None or captions is not None:
            raise InputError("give a recipe, or --images and --captions, not both")
        plan = read_recipe(recipe)
    else:
        if images is None or captions is None:
            raise InputError("give a recipe file, or both --images and --captions")
        settings = preset(config) if loaded is None else loaded.config
        source = Coco(images=str(images), captions=str(captions))
        plan = Recipe(name=settings.name, data=source, config=settings)
    folder = Path("runs", slug(plan.config.name)) if output is None else output
    folder = folder.with_name(f"{folder.name}-check") if check else folder
    native.check_place(folder / "model")  # before a set is made, which takes its time too
    if first_process():
        tell("minisd: reading pictures and captions")
    data = finished(open_source(plan.data, Path("datasets") / plan.name))
    if (where := Config(device).DEVICE) == "cpu":
        keep_freed_memory()
    # Of the first weights: a recipe gives one model, and a run that was stopped finds them again.
    torch.manual_seed(plan.seed)
    if check:
        model = DiffusionModel(plan.config).to(where)
        if not model.check(data, plan.stages, output_dir=folder, autocast=autocast):
            raise SystemExit(1)
        return
    stages = plan.stages
    if loaded is not None:
        stages = tuple(stage for stage in stages if stage.kind != "autoencoder")
        loaded = _as_in(plan.config, loaded)
    if first_process():
        tell("minisd: building the model, and measuring what a step takes unless the run goes on")
    model = (DiffusionModel(plan.config) if loaded is None else loaded).to(where)
    model.train(
        data,
        stages,
        seed=plan.seed,
        steps=steps,
        minutes=minutes,
        output_dir=folder,
        resume=not fresh,
        autocast=autocast,
        compiler=torch.compile if compile else None,
        observers=[TensorBoard(folder / "tensorboard")] if tensorboard and first_process() else [],
        about={"data": to_dict(plan.data)},
    )
    say(folder / "model")


def _as_in(recipe: ModelConfig, model: DiffusionModel) -> DiffusionModel:
    """The model with the recipe's settings, to be trained further.

    Where the recipe's U-Net has attention on levels on which the model's has none, the new blocks begin as the
    identity: the function stays what it was. A light autoencoder whose encoder is the same may have another decoder
    for larger pictures or for opacity: that begins with the weights that fit and has to be trained.
    """
    own = model.config
    for part in ("text_encoders", "schedule"):
        if getattr(recipe, part) != getattr(own, part):
            raise _other_part(own.name, part)
    if not _same_encoder(recipe, own):
        raise _other_part(own.name, "vae")
    if recipe.sample_size // recipe.vae.factor != own.sample_size // own.vae.factor:
        raise _other_part(own.name, "sample_size")
    if recipe.unet == own.unet and recipe.vae == own.vae:
        model.config = recipe
        return model
    more = all(map(ge, recipe.unet.attention_levels, own.unet.attention_levels))
    if replace(recipe.unet, attention_levels=own.unet.attention_levels) != own.unet or not more:
        raise _other_part(own.name, "unet")
    grown = type(model)(recipe)
    state = grown.state_dict()
    for name, tensor in model.state_dict().items():
        if name in state and state[name].shape == tensor.shape:
            state[name] = tensor
    grown.load_state_dict(state)
    if recipe.vae != own.vae:
        grown.vae.begin_as(model.vae)
    return grown


def _same_encoder(recipe: ModelConfig, own: ModelConfig) -> bool:
    """Whether two models' autoencoders give the same latents."""
    if not recipe.vae.kind == own.vae.kind == "tiny":
        return recipe.vae == own.vae
    return replace(recipe.vae, **{name: getattr(own.vae, name) for name in DECODER}) == own.vae


def _other_part(model: str, part: str) -> InputError:
    return InputError(f"the model {model!r} has another {part} than the recipe: --start needs the same one")
