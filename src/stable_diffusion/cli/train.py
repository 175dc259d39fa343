"""``minisd train``: a model from a recipe, or from captioned images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from stable_diffusion.cli.show import finished, say, tell
from stable_diffusion.data.sources import Coco, open_source
from stable_diffusion.errors import InputError
from stable_diffusion.files import slug
from stable_diffusion.runtime import first_process, keep_freed_memory

if TYPE_CHECKING:
    from stable_diffusion import DiffusionModel, ModelConfig

DECODER = ("encoder_pooling", "decoder_block_out_channels", "decoder_blocks", "alpha")
"""Settings of a light autoencoder that leave its encoder's weights what they are."""


def train(
    recipe: tyro.conf.Positional[Path | None] = None,
    *,
    images: Path | None = None,
    captions: Path | None = None,
    config: str = "mini",
    start: str | None = None,
    vae: str | None = None,
    output: Path | None = None,
    seed: int | None = None,
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
        vae: A model whose autoencoder is taken as it is, instead of training one.
        output: Folder of checkpoints and of the finished model; by default runs/ and the model's name.
        seed: Of the random numbers, instead of the recipe's; its run needs an --output of its own.
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
    from stable_diffusion.config import preset, to_dict, typed
    from stable_diffusion.training.draw import SEED
    from stable_diffusion.training.observers import TensorBoard
    from stable_diffusion.training.recipe import Recipe, read_recipe
    from stable_diffusion.training.run import check_lengths

    typed(SEED | None, seed, "seed")
    check_lengths(steps, minutes)  # before a set is made
    if check and start is not None:
        raise InputError("give --check or --start, not both: the check begins with random weights")
    if vae is not None and (check or start is not None):
        raise InputError(
            "give --vae without --check, which trains an autoencoder, and --start, which brings one"
        )
    loaded = None if start is None else DiffusionModel.from_pretrained(start)
    given = None if vae is None else DiffusionModel.from_pretrained(vae)
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
    if given is not None and given.config.vae != plan.config.vae:
        raise InputError(
            f"the model {given.config.name!r} has another vae than the recipe: --vae needs the same one"
        )
    seed = plan.seed if seed is None else seed
    folder = Path("runs", slug(plan.config.name)) if output is None else output
    folder = folder.with_name(f"{folder.name}-check") if check else folder
    native.check_place(folder / "model")  # before a set is made, which takes its time too
    if first_process():
        tell("minisd: reading pictures and captions")
    data = finished(open_source(plan.data, Path("datasets", plan.folder or plan.name)))
    if (where := Config(device).DEVICE) == "cpu":
        keep_freed_memory()
    # Of the first weights: a recipe gives one model, and a run that was stopped finds them again.
    torch.manual_seed(seed)
    if check:
        model = DiffusionModel(plan.config).to(where)
        if not model.check(data, plan.stages, output_dir=folder, autocast=autocast):
            raise SystemExit(1)
        return
    stages = plan.stages
    if loaded is not None or given is not None:
        stages = tuple(stage for stage in stages if stage.kind != "autoencoder")
    if loaded is not None:
        _take_settings(loaded, plan.config)
    if first_process():
        tell("minisd: building the model, and measuring what a step takes unless the run goes on")
    model = DiffusionModel(plan.config) if loaded is None else loaded
    if given is not None:
        model.vae.load_state_dict(given.vae.state_dict())
    model = model.to(where)
    model.train(
        data,
        stages,
        seed=seed,
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


def _take_settings(model: DiffusionModel, settings: ModelConfig) -> None:
    """Lets the model be trained further as a recipe says.

    A light autoencoder may get another decoder on its latents, for larger pictures or for opacity: it begins with the
    weights that fit (`nn.vae.AutoencoderTiny.begin_as`) and has to be trained.
    """
    from stable_diffusion.nn.vae import AutoencoderTiny, autoencoder

    own, kept = _kept(model.config), _kept(settings)
    for part, value in kept.items():
        if value != own[part]:
            raise InputError(
                f"the model {model.config.name!r} has another {part} than the recipe: --start needs the same one"
            )
    if settings.vae != model.config.vae:
        before, model.vae = model.vae, autoencoder(settings.vae).eval()
        # Other autoencoders are equal.
        assert isinstance(before, AutoencoderTiny) and isinstance(model.vae, AutoencoderTiny)
        model.vae.begin_as(before)
    model.config = settings


def _kept(config: ModelConfig) -> dict[str, object]:
    """What a model that is trained further keeps, by the part of the configuration that says it."""
    from stable_diffusion.config import to_dict

    parts: dict[str, object] = {
        "vae": {name: value for name, value in to_dict(config.vae).items() if name not in DECODER},
        "sample_size": config.sample_size // config.vae.factor,  # of the latents
    }
    return parts | {part: getattr(config, part) for part in ("unet", "text_encoders", "schedule")}
