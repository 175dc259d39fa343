"""CompVis' single files of Stable Diffusion 1.x and 2.x, ``.safetensors`` and ``.ckpt``: one dictionary of all parts.

A table for each part says how its blocks are named there; the rest of a tensor's name is the same. Shapes
say how the networks are built. What the U-Net predicts is in neither: see ``infer.prediction_type``.
"""

from stable_diffusion.checkpoints.single_file.read import read, read_vae
from stable_diffusion.checkpoints.single_file.write import write

__all__ = ["read", "read_vae", "write"]
