"""Recipes: what a file says is what a run gets, and what it gets wrong is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stable_diffusion import CocoImageLoader, InputError
from stable_diffusion.checkpoints import native
from stable_diffusion.checkpoints.checkpoint import packaged
from stable_diffusion.cli.show import finished
from stable_diffusion.config import CLIP_MINI, MINI, MINILM, from_dict, to_dict
from stable_diffusion.data.icon_captions import STYLES, Thing, captions
from stable_diffusion.data.sources import Coco, Shapes, open_source
from stable_diffusion.generation.text import with_style
from stable_diffusion.training.recipe import Recipe, read_recipe
from stable_diffusion.training.stage import OptimizerSettings
from stable_diffusion.training.stages import DEFAULT, AutoencoderSettings, DecoderSettings, DenoiserSettings
from tests.tiny import shapes

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shapes_recipe() -> None:
    recipe = read_recipe(next(path for path in RECIPES if path.stem == "shapes-128"))
    assert recipe.name == recipe.config.name == "shapes-128" and isinstance(recipe.data, Shapes)
    assert recipe.data.size == recipe.config.sample_size == 128


def test_the_packaged_model_is_what_its_recipe_says() -> None:
    recipe = read_recipe(next(path for path in RECIPES if path.stem == "icons-128"))
    assert native.read(packaged("model")).config == recipe.config


def test_the_icons_recipe_names_the_styles_of_their_captions() -> None:
    """Styles are listed in the recipe, which says all that its model is; here is what holds them to the data."""
    styles = read_recipe(next(path for path in RECIPES if path.stem == "icons-128")).config.styles
    named = [(f"{style.name} style", style.look.removeprefix("a ")) for style in STYLES.values()]
    assert styles.words == tuple(word for pair in named for word in pair)
    assert styles.default == "noto style"
    fox = Thing(
        code="1f98a",
        object="fox",
        article="a",
        role="fox",
        group="animals-nature",
        nameable=True,
        keywords=("animal",),
    )
    for style in STYLES:
        assert all(with_style(caption, styles) == caption for caption in captions(fox, style))
    assert with_style("fox", styles) == "fox, noto style"


def test_it_says_what_differs_from_a_preset(tmp_path: Path) -> None:
    text = """
    seed = 7
    [data]
    source = "shapes"
    count = 12
    [model]
    base = "mini"
    name = "other"
    [model.vae]
    block_out_channels = [64, 96]
    [[stage]]
    kind = "decoder"
    epochs = 2
    gradient_accumulation_steps = 4
    [stage.discriminator]
    schedule = "constant"
    [[stage]]
    kind = "denoiser"
    name = "further"
    """
    recipe = read_recipe(written(tmp_path, text))
    assert recipe.data == Shapes(count=12)
    vae = replace(MINI.vae, block_out_channels=(64, 96))
    assert recipe.config == replace(MINI, name="other", vae=vae) and recipe.seed == 7
    judge = OptimizerSettings(schedule="constant")
    assert recipe.stages == (
        DecoderSettings(epochs=2.0, gradient_accumulation_steps=4, discriminator=judge),
        DenoiserSettings(name="further"),
    )


def test_an_older_recipe_is_read(tmp_path: Path) -> None:
    text = """
    [data]
    kind = "shapes"
    [model.training]
    seed = 3
    caption_dropout = 0.2
    [model.training.decoder]
    batch_size = 32
    learning_rate = 5e-4
    [model.training.denoiser]
    passes = 22
    [model.training.autoencoder]
    passes = 0
    """
    recipe = read_recipe(written(tmp_path, text))
    assert isinstance(recipe.data, Shapes) and recipe.config == MINI and recipe.seed == 3
    judge = OptimizerSettings(learning_rate=5e-4)
    assert recipe.stages == (
        DenoiserSettings(epochs=22.0, caption_dropout=0.2),
        DecoderSettings(batch_size=32, learning_rate=5e-4, discriminator=judge),
    )


def test_the_lengths_of_the_packaged_models_recipe() -> None:
    recipe = read_recipe(next(path for path in RECIPES if path.stem == "icons-128"))
    stages = [(stage.name, stage.batch_size, stage.epochs) for stage in recipe.stages]
    assert stages == [("autoencoder", 128, 75.0), ("denoiser", 256, 220.0), ("decoder", 32, 9.0)]


def test_the_default_stages_are_the_mini_presets() -> None:
    autoencoder, denoiser = DEFAULT
    assert isinstance(autoencoder, AutoencoderSettings) and isinstance(denoiser, DenoiserSettings)
    found = [(s.batch_size, s.learning_rate, s.epochs, s.min_steps, s.ema_decay) for s in DEFAULT]
    assert found == [(32, 1e-3, 6.0, 200, 0.995), (64, 8e-4, 30.0, 300, 0.999)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read_and_stored_again(path: Path) -> None:
    recipe = read_recipe(path)
    for settings in (recipe.config, recipe.data, *recipe.stages):
        assert from_dict(type(settings), to_dict(settings)) == settings


def test_none_is_a_word_for_what_toml_cannot_say(tmp_path: Path) -> None:
    """And recipes may share a set."""
    text = """
    [data]
    source = "shapes"
    folder = "../all"
    [model.unet]
    cross_attention_dim = "none"
    """
    recipe = read_recipe(written(tmp_path, text))
    assert recipe.config == replace(MINI, unet=replace(MINI.unet, cross_attention_dim=None))
    assert (recipe.name, recipe.folder) == ("mine", "all"), "no path"


def test_the_arms_of_the_text_study_differ_in_their_text_alone() -> None:
    arms = [read_recipe(path) for path in RECIPES if path.stem.startswith("text-")]
    assert len(arms) == 5
    for arm in arms:
        unet = replace(arm.config.unet, cross_attention_dim=384, pooled_projection_dim=384)
        assert replace(arm.config, name="", text_encoders=(MINILM,), unet=unet) == replace(
            arms[0].config, name="", text_encoders=(MINILM,)
        )
        assert (arm.data, arm.folder) == (arms[0].data, "icons-scenes")


def test_an_empty_recipe_is_the_preset(tmp_path: Path) -> None:
    assert read_recipe(written(tmp_path, "")) == Recipe(name="mine", data=Coco(), config=MINI)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\nname = 'a'", r"has 'modle': a recipe has \[data\], \[model\], seed and \[\[stage\]\]"),
        ("[model]\nbase = 'minni'", r"unknown preset 'minni': did you mean 'mini'\?"),
        ("[model]\nnmae = 'a'", r"unknown setting of ModelConfig 'nmae': did you mean 'name'\?"),
        ("[model.unet]\nblock_out_chanels = [8]", r"did you mean 'block_out_channels'\?"),
        ("[model.training.denoiser]\nlearning_rat = 1", r"did you mean 'learning_rate'\?"),
        ("[model.training.coarse]\npasses = 1", r"unknown stage or setting of \[model.training\] 'coarse'"),
        (
            "[[stage]]\nkind = 'denoiser'\n[model.training.denoiser]",
            r"both \[\[stage\]\] and \[model.training\]",
        ),
        ("[[stage]]\nkind = 'denoisr'", r"unknown stage kind 'denoisr': did you mean 'denoiser'\?"),
        ("[[stage]]\nepochs = 1", r"unknown stage kind None"),
        ("[stage]\nkind = 'denoiser'", r"written as \[\[stage\]\]"),
        ("seed = 1.5", r"seed must be of type int, got 1\.5"),
        ("[[stage]]\nkind = 'decoder'\n[stage.discriminator]\nema_decay = 0.9", r"'ema_decay'"),
        (
            "[[stage]]\nkind = 'denoiser'\nname = 'a/b'",
            r"name must be 1 to 40 letters, digits, _ or -, got 'a/b'",
        ),
        (
            "[[stage]]\nkind = 'denoiser'\nepochs = 0",
            r"stage 1 \(denoiser\): epochs must be from 1e-06 to 1000000, got 0.0",
        ),
        ("[[stage]]\nkind = 'denoiser'\nschedule = 'cosine'", r"unknown schedule 'cosine'"),
        (
            "[[stage]]\nkind = 'denoiser'\nlearning_rate = nan",
            "learning_rate must be a finite number, got nan",
        ),
        ("[[stage]]\nkind = 'denoiser'\nepochs = inf", "epochs must be a finite number, got inf"),
        (
            "[[stage]]\nkind = 'denoiser'\nweight_decay = -1.0",
            "weight_decay must be from 0 to 1000, got -1.0",
        ),
        (
            "[[stage]]\nkind = 'denoiser'\nmax_grad_norm = 0.0",
            "max_grad_norm must be above 0, got 0.0",
        ),
        ("[[stage]]\nkind = 'denoiser'\nema_decay = 2.0", "ema_decay must be from 0 to below 1, got 2.0"),
        (
            "[[stage]]\nkind = 'denoiser'\ncaption_dropout = 2.0",
            "caption_dropout must be from 0 to 1, got 2.0",
        ),
        ("[[stage]]\nkind = 'denoiser'\nbatch_size = 0", "batch_size must be from 1 to 1048576, got 0"),
        (
            "[[stage]]\nkind = 'decoder'\n[stage.discriminator]\nlearning_rate = -1.0",
            "stage 1 .decoder.: discriminator: learning_rate must be from 0 to 10, got -1.0",
        ),
        ("[[stage]]\nkind = ['denoiser']", "unknown stage kind"),
        ("data = 3", r"\[data\] of a recipe must be a table, got 3"),
        ("[model]\ntraining = 3", r"\[model.training\] of a recipe must be a table, got 3"),
        ("[model.training]\ndenoiser = 3", r"\[model.training.denoiser\] of a recipe must be a table, got 3"),
        (
            "[[stage]]\nkind = 'denoiser'\nlearning_rate = 'fast'",
            r"learning_rate must be of type float, got 'fast'",
        ),
        (
            "[data]\nsource = 'shapes'\ncuont = 5",
            r"unknown setting of Shapes 'cuont': did you mean 'count'\?",
        ),
        ("[data]\nkind = 'shape'", r"unknown source 'shape': did you mean 'shapes'\?"),
        ("[data\n", r"mine\.toml is not TOML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_recipe(written(tmp_path, text))


def test_an_older_recipe_of_another_preset_has_the_older_lengths(tmp_path: Path) -> None:
    """Only the preset mini had lengths of its own."""
    text = "[model]\nbase = 'sd15'\n[model.training.denoiser]\nbatch_size = 8"
    general = {"learning_rate": 1e-3, "epochs": 10.0, "min_steps": 1000, "ema_decay": 0.999}
    autoencoder = AutoencoderSettings(batch_size=64, **general)  # type: ignore[arg-type]
    denoiser = DenoiserSettings(batch_size=8, **general)  # type: ignore[arg-type]
    assert read_recipe(written(tmp_path, text)).stages == (autoencoder, denoiser)


def test_a_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml does not exist: check the path"):
        read_recipe(tmp_path / "none.toml")


def test_a_recipe_of_a_windows_editor(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes("seed = 3\n".encode("utf-8-sig"))
    assert read_recipe(path).seed == 3
    path.write_bytes("seed = 3\n".encode("utf-16"))
    with pytest.raises(InputError, match=r"mine\.toml is not TOML in UTF-8"):
        read_recipe(path)


def test_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drawn = finished(open_source(Shapes(count=10, size=32), Path("datasets/mine"))).entries()
    assert len(drawn) == 9 and (tmp_path / "datasets/mine/train" / drawn[0].key).is_file()
    same = shapes(tmp_path / "elsewhere").entries()
    assert [entry.captions for entry in drawn] == [entry.captions for entry in same]
    files = {"images": "elsewhere/val", "captions": "elsewhere/annotations/captions_val.json"}
    coco = finished(open_source(Coco(**files), Path("datasets/mine")))
    assert isinstance(coco, CocoImageLoader) and len(coco.entries()) == 1


def test_text_encoders_by_name(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text(
        '[model]\ntext_encoders = ["minilm", "clip-mini"]\nunet = {pooled_projection_dim = 640}\n'
    )
    assert read_recipe(path).config.text_encoders == (MINILM, CLIP_MINI)
    path.write_text('[model]\ntext_encoders = ["minilmm"]\n')
    with pytest.raises(InputError, match=r"'minilmm'.*minilm"):
        read_recipe(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipes_parts_fit_together(path: Path) -> None:
    config = read_recipe(path).config
    assert config.unet.in_channels == config.unet.out_channels == config.vae.latent_channels
    assert config.unet.pooled_projection_dim == sum(text.hidden_size for text in config.text_encoders)
