"""What the autoencoder alone loses: its round trips beside those of a linear code of the same size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stable_diffusion import images
from stable_diffusion.data.cache import Array
from stable_diffusion.nn.vae import AutoencoderKL, AutoencoderTiny

TOGETHER = 4


@torch.no_grad()
def round_trips(vae: AutoencoderKL | AutoencoderTiny, pictures: Array) -> Iterator[Array]:
    """Uint8 pictures ``n h w 3``, encoded and decoded again, one after the other; on white."""
    for start in range(0, len(pictures), TOGETHER):
        pixels = images.to_tensor(list(map(Image.fromarray, pictures[start : start + TOGETHER])))
        decoded = vae.decode(vae.encode(pixels.to(vae.device, vae.dtype)))
        yield from map(np.asarray, map(images.to_rgb, images.to_pil(decoded.float())))


class PatchPCA:
    """The best linear code of square patches: as many numbers a patch as the autoencoder's latents have.

    Args:
        training: uint8 pictures ``n h w 3`` to fit it on; sides are multiples of `factor`.
        factor: side of a patch, what one position of the latents stands for.
        components: numbers a patch.
    """

    def __init__(self, training: Array, factor: int, components: int) -> None:
        self.factor = factor
        patches = self._patches(training)
        self.mean = patches.mean(0)
        centred = patches - self.mean
        self.basis = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -components:]

    def round_trip(self, pictures: Array) -> Array:
        """The pictures, encoded and decoded again."""
        n, height, width, _ = pictures.shape
        patches = (self._patches(pictures) - self.mean) @ self.basis @ self.basis.T + self.mean
        grid = patches.reshape(n, height // self.factor, width // self.factor, self.factor, self.factor, 3)
        pixels = grid.permute(0, 1, 3, 2, 4, 5).reshape(n, height, width, 3)
        return pixels.round().clamp(0, 255).to(torch.uint8).numpy()

    def _patches(self, pictures: Array) -> Tensor:
        n, height, width, _ = pictures.shape
        f = self.factor
        grid = torch.from_numpy(pictures).reshape(n, height // f, f, width // f, f, 3)
        return grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, f * f * 3).double()


def psnr(pictures: Array, copies: Array) -> float:
    """Peak signal-to-noise ratio of uint8 pictures in dB: the mean over the pictures."""
    errors = ((pictures.astype(np.float64) - copies) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(errors, 1e-3))).mean())
