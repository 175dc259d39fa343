"""OKLab (Ottosson 2020, "A perceptual color space for image processing"): distances about those that people see."""

from __future__ import annotations

import numpy as np

from stable_diffusion.data.cache import Array

# Linear sRGB to the responses of cones, and these to OKLab.
_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
_AXES = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


def to_oklab(rgb: Array) -> Array:
    """Lightness 0 to 1, and the axes green to red and blue to yellow, of sRGB in [0, 1], ``... 3``."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)  # IEC 61966-2-1
    return np.cbrt(linear @ _CONES.T) @ _AXES.T


def from_oklab(lab: Array) -> Array:
    """The inverse; what sRGB cannot show is clamped."""
    linear = np.clip((lab @ np.linalg.inv(_AXES).T) ** 3 @ np.linalg.inv(_CONES).T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
