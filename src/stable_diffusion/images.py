"""Pictures as files, PIL images and tensors: the one place where they are converted.

PIL images are outside, float tensors in [-1, 1] inside. torch is imported by the functions that need it, so
that checking files costs no start-up time.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stable_diffusion.errors import InputError, shown

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# PIL also opens formats that are programs (EPS runs Ghostscript); those are not read.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA", "ICO")

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What PIL's decoders raise, besides OSError, on damaged files.
_DAMAGE = (
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)


def open_image(path: str | Path) -> Image.Image:
    """The picture in a file, fully decoded: RGB, upright, on white where it is transparent.

    The content decides, not the suffix. Raises InputError for a file that is missing, not a picture, damaged,
    cut off, or too large to be decoded safely.
    """
    with opened(path) as image:
        return decoded(image)


def check_header(path: str | Path) -> None:
    """Raises InputError unless the file begins as a picture does; what follows the header is not read."""
    with opened(path):
        pass


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The image in a file as PIL has it, not decoded yet.

    Raises InputError for what ``open_image`` refuses, also where that shows only inside the ``with`` block.
    """
    try:
        with Image.open(path) as image:
            if image.format not in FORMATS:
                raise UnidentifiedImageError
            yield image
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path} is not a picture that can be read, whatever its name says: "
            "convert it to PNG or JPEG, or remove it"
        ) from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path} is too large to be decoded safely: make the picture smaller, or remove it"
        ) from error
    except OSError as error:
        if error.errno is not None:
            raise InputError(f"cannot open {path}: {error.strerror}; check the path") from error
        raise _damaged(path, error) from error
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def decoded(image: Image.Image) -> Image.Image:
    """The picture of an opened file: RGB, upright, on white where it is transparent."""
    image.load()
    return to_rgb(_upright(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB: transparency lies on white, and 16-bit grey is scaled down, not cut off.

    Raises InputError for floating-point images, whose range is not known.
    """
    if image.mode == "F":
        raise InputError("floating-point pictures have no fixed range: convert the picture to 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image, dtype=np.int64), 0, 65535)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """The largest centred crop of that aspect ratio, resized; nothing is stretched."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def to_tensor(images: Sequence[Image.Image]) -> Float[Tensor, "b 3 h w"]:
    """Images of one size as float32 in [-1, 1]. Raises InputError if there are none, or of several sizes."""
    import torch

    if not isinstance(images, Sequence) or not all(isinstance(image, Image.Image) for image in images):
        raise InputError(f"pictures must be PIL images, got {shown(images)}")
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        found = ", ".join(f"{width}x{height}" for width, height in sizes) or "none"
        raise InputError(f"a batch needs images of one size, got {found}: resize them first")
    pixels = np.stack([np.asarray(to_rgb(image)) for image in images])  # b h w 3
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1).contiguous()


def to_pil(images: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Tensors as RGB images; values outside [-1, 1] are clamped. Raises InputError for NaN and infinity."""
    import torch

    pixels = images.detach().to(torch.float32)
    finite = pixels.isfinite().flatten(1).all(1)  # b
    if not bool(finite.all()):
        first = int(finite.logical_not().nonzero()[0, 0]) + 1
        raise InputError(
            f"picture {first} of {len(pixels)} has NaN or infinite values, so no file is written: "
            "check the model's weights, or use float32"
        )
    pixels = pixels.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def binary_mask(mask: Image.Image, width: int, height: int) -> Image.Image:
    """A mask in black and white: white, to be repainted, where it is brighter than 127; fitted as ``cover`` does."""
    return cover(to_rgb(mask).convert("L"), width, height).point(lambda value: 255 if value > 127 else 0)


def mask_tensor(mask: Image.Image) -> Float[Tensor, "1 1 h w"]:
    """A binary mask as float32: 1 where it is white."""
    import torch

    return torch.from_numpy(np.asarray(mask) > 127).to(torch.float32)[None, None]


def free_name(folder: str | Path, stem: str, suffix: str = ".png") -> Path:
    """The first of ``stem.png``, ``stem-2.png``, ``stem-3.png`` … that is not in the folder yet."""
    path, number = Path(folder, stem + suffix), 1
    while os.path.lexists(path):
        number += 1
        path = path.with_name(f"{stem}-{number}{suffix}")
    return path


def _damaged(path: str | Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged or cut off ({error}): fetch or export it again, or remove it")


def _upright(image: Image.Image) -> Image.Image:
    # After decoding: PIL rotates TIFFs itself, and PNGs may have their EXIF after the pixels. Broken EXIF says
    # nothing about the pixels, so the picture is read all the same.
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except (OSError, *_DAMAGE):
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
