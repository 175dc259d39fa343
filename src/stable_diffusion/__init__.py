"""Mini Stable Diffusion: a compact latent-diffusion system.

    from stable_diffusion import DiffusionModel
    DiffusionModel.from_pretrained().generate("a fox, noto style")[0].save("fox.png")

Names are imported when they are first used, so that ``import stable_diffusion`` costs no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # by these aliases a type checker knows the names as the package's
    from stable_diffusion.config import Guidance as Guidance
    from stable_diffusion.config import ModelConfig as ModelConfig
    from stable_diffusion.config import SamplerConfig as SamplerConfig
    from stable_diffusion.data.coco import CocoImageLoader as CocoImageLoader
    from stable_diffusion.errors import InputError as InputError
    from stable_diffusion.generation.pipeline import Result as Result
    from stable_diffusion.generation.request import Request as Request
    from stable_diffusion.model import DiffusionModel as DiffusionModel
    from stable_diffusion.runtime import Config as Config

_HOMES = {
    "CocoImageLoader": "data.coco",
    "Config": "runtime",
    "DiffusionModel": "model",
    "Guidance": "config",
    "InputError": "errors",
    "ModelConfig": "config",
    "Request": "generation.request",
    "Result": "generation.pipeline",
    "SamplerConfig": "config",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
