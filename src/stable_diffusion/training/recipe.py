"""Recipes: one TOML file says on what data a model is trained, which stages train it, and with which settings."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from stable_diffusion.config import ModelConfig, preset
from stable_diffusion.data.sources import SourceConfig, source_config
from stable_diffusion.errors import InputError, shown, unknown_name
from stable_diffusion.fields import from_dict, typed
from stable_diffusion.files import read_bytes, slug
from stable_diffusion.training.draw import SEED
from stable_diffusion.training.stage import OptimizerSettings, StageSettings
from stable_diffusion.training.stages import DEFAULT, STAGES


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a file in ``recipes/`` says: ``[data]``, changes to a preset in ``[model]``, ``seed``, ``[[stage]]``."""

    name: str
    data: SourceConfig
    config: ModelConfig
    stages: tuple[StageSettings, ...] = DEFAULT
    seed: int = 0
    folder: str | None = None
    """Of a set that is made, in ``datasets/``, where several recipes share it; None for one of the recipe's name."""


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file, in today's form or in the older one with tables ``[model.training.X]``.

    Raises:
        InputError: no such file, not TOML, or a setting that does not exist.
    """
    text = read_bytes(path)
    try:
        content = tomllib.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not TOML in UTF-8: {error}") from None
    data, model = (_table(content.pop(name, {}), f"[{name}]") for name in ("data", "model"))
    seed, tables = content.pop("seed", 0), content.pop("stage", None)
    for table in content:
        raise InputError(f"{path} has {shown(table)}: a recipe has [data], [model], seed and [[stage]]")
    if "training" in model:
        if tables is not None:
            raise InputError(
                f"{path} has both [[stage]] and [model.training]: leave the latter, older one out"
            )
        tables, seed = _older(_table(model.pop("training"), "[model.training]"), model.get("base", "mini"))
    if "kind" in data:
        data["source"] = data.pop("kind")
    folder = typed(str | None, data.pop("folder", None), "folder")
    seed = typed(SEED, seed, "seed")
    base = preset(model.pop("base", "mini"))
    config = from_dict(ModelConfig, _with_none(model), base=base)
    stages = DEFAULT if tables is None else _stages(tables)
    return Recipe(
        name=path.stem,
        data=source_config(data),
        config=config,
        stages=stages,
        seed=seed,
        folder=None if folder is None else slug(folder),
    )


def _table(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{name} of a recipe must be a table, got {shown(value)}")
    return dict(value)


def _with_none(table: Mapping[str, Any]) -> dict[str, Any]:
    """With None where a setting is "none", as TOML has no word for it."""
    return {
        key: _with_none(value) if isinstance(value, dict) else None if value == "none" else value
        for key, value in table.items()
    }


def _stages(tables: object) -> tuple[StageSettings, ...]:
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise InputError("a recipe's stages are written as [[stage]], one such table each")
    for table in tables:
        if not isinstance(table.get("kind"), str) or table["kind"] not in STAGES:
            raise unknown_name("stage kind", table.get("kind"), STAGES)
    kinds = [table["kind"] for table in tables]
    return tuple(
        typed(STAGES[kind].settings, table, f"stage {i} ({kind})")
        for i, (kind, table) in enumerate(zip(kinds, tables, strict=True), start=1)
    )


def _older(training: Mapping[str, Any], base: str) -> tuple[Sequence[Mapping[str, Any]], Any]:
    """The stages and the seed that ``[model.training]`` says, as they are written today."""
    # Only the preset mini had lengths of its own.
    general = {} if base == "mini" else {**_GENERAL}
    tables: dict[str, dict[str, Any]] = {"autoencoder": {**general}, "denoiser": {**general}}
    ours = {"loss_weight", "caption_dropout"}
    for key, value in training.items():
        if key in STAGES:
            tables[key] = tables.get(key, {}) | _table(value, f"[model.training.{key}]")
        elif key not in {*ours, "seed"}:
            raise unknown_name("stage or setting of [model.training]", key, [*STAGES, *sorted(ours), "seed"])
    tables["denoiser"] |= {key: training[key] for key in ours & training.keys()}
    if decoder := tables.get("decoder"):  # whose two players shared an optimizer
        shared = {field.name for field in fields(OptimizerSettings)} & decoder.keys()
        decoder["discriminator"] = {key: decoder[key] for key in shared}
    for table in tables.values():
        table |= {"epochs": table.pop("passes")} if "passes" in table else {}
    stages = [{"kind": kind, **table} for kind, table in tables.items() if table.get("epochs") != 0]
    return stages, training.get("seed", 0)


_GENERAL = {"batch_size": 64, "learning_rate": 1e-3, "epochs": 10.0, "min_steps": 1000, "ema_decay": 0.999}
