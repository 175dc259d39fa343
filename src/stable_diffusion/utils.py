"""The runtime settings under the name that the project's sample imports."""

from stable_diffusion.runtime import Config

__all__ = ["Config"]
