"""Diffusers' folders of Stable Diffusion 1.x and 2.x."""

from stable_diffusion.checkpoints.diffusers.folder import is_diffusers, read, read_text_encoder, write

__all__ = ["is_diffusers", "read", "read_text_encoder", "write"]
