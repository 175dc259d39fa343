"""Pictures as files, PIL images and tensors: the one place where they are converted.

PIL images are outside, float tensors in [-1, 1] inside. torch is imported by the functions that need it, so
that checking files costs no start-up time.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from stable_diffusion.errors import InputError, shown
from stable_diffusion.files import check_is_file

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# PIL also opens formats that are programs (EPS runs Ghostscript) or hold pictures of other sizes than they say
# (ICO); those are not read.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "TGA")

MAX_SCANS = 500
"""Scans of a JPEG: a progressive one has about ten, but a file may declare 100,000."""
MAX_PIXELS = 8192 * 8192
"""Of a picture that is read, and of all that are decoded at the same time: decoding takes up to 24 bytes for each."""

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

_TOO_LARGE = f"is too large: make it smaller ({MAX_PIXELS:,} pixels are the most, as 8192x8192), or remove it"

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


def open_image(path: str | Path, *, alpha: bool = False) -> Image.Image:
    """The picture in a file, as ``decoded``.

    The content decides, not the suffix. Raises InputError for a file that is missing, not a picture, damaged,
    cut off, or has more than ``MAX_PIXELS``.
    """
    with opened(path) as image:
        return decoded(image, alpha=alpha)


def open_mask(path: str | Path) -> Image.Image:
    """The mask in a file, fully decoded and upright, with its transparency; ``binary_mask`` says what it means.

    Raises InputError as ``open_image`` does.
    """
    with opened(path) as image:
        mask = loaded(image)
        return mask.convert("RGBA") if _is_transparent(mask) else mask.copy()


def check_header(path: str | Path) -> None:
    """Raises InputError unless the file begins as a picture does; what follows the header is not read."""
    with opened(path):
        pass


@contextmanager
def opened(path: str | Path, content: BinaryIO | None = None) -> Iterator[Image.Image]:
    """The image in a file as PIL has it, not decoded yet; waits while others of many pixels are open.

    Where its content is given, the path only names it.

    Raises InputError for what ``open_image`` refuses, also where that shows only inside the ``with`` block.
    """
    if content is None:
        check_is_file(Path(path))
    try:
        Image.init()
        known = [name for name in FORMATS if name in Image.OPEN]  # AVIF is new
        with Image.open(content or path, formats=known) as image, _room_for(image.size):
            yield image
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path} is not a picture that can be read, whatever its name says: "
            "convert it to PNG or JPEG, or remove it"
        ) from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise InputError(f"{path} {_TOO_LARGE}") from error
    except OSError as error:
        if error.errno is not None:
            raise InputError(f"cannot open {path}: {error.strerror}; check the path") from error
        raise _damaged(path, error) from error
    except _DAMAGE as error:
        raise _damaged(path, error) from error


_free, _some_freed = [MAX_PIXELS], threading.Condition()


@contextmanager
def _room_for(size: tuple[int, int]) -> Iterator[None]:
    """Waits until so many pixels may be decoded. Raises InputError where there are too many in one picture."""
    pixels = size[0] * size[1]
    if pixels > MAX_PIXELS:
        raise InputError(f"a picture of {size[0]}x{size[1]} pixels {_TOO_LARGE}")
    with _some_freed:
        _some_freed.wait_for(lambda: pixels <= _free[0])
        _free[0] -= pixels
    try:
        yield
    finally:
        with _some_freed:
            _free[0] += pixels
            _some_freed.notify_all()


def decoded(image: Image.Image, *, alpha: bool = False) -> Image.Image:
    """The picture of an opened file, fully decoded and upright: ``to_rgb``, or with `alpha` ``with_alpha``."""
    picture = loaded(image)
    return with_alpha(picture) if alpha else to_rgb(picture)


def loaded(image: Image.Image) -> Image.Image:
    """The picture of an opened file as it is, fully decoded and upright."""
    if isinstance(image, JpegImageFile) and image.fp is not None:
        image.fp.seek(0)
        if image.fp.read().count(b"\xff\xda") > MAX_SCANS:
            raise InputError(f"a JPEG of more than {MAX_SCANS} scans: save it anew, or remove it")
    image.load()
    return _upright(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB: transparency lies on white, and 16-bit grey is scaled down, not cut off.

    Raises InputError for floating-point images, whose range is not known.
    """
    if image.mode == "F":
        raise InputError("floating-point pictures have no fixed range: convert the picture to 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        grey *= 255
        grey += 32767
        grey //= 65535
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def with_alpha(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGBA where it may be transparent, else as ``to_rgb``."""
    return image.convert("RGBA") if _is_transparent(image) else to_rgb(image)


def same_shape(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes have one aspect ratio, up to a pixel of rounding of the other."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(other)


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


def layers(image: Image.Image) -> npt.NDArray[np.uint8]:
    """The picture on white and how opaque it is, ``h w 4``: what a decoder of transparent pictures gives."""
    opacity = with_alpha(image).convert("RGBA").getchannel("A")
    return np.dstack([np.asarray(to_rgb(image)), np.asarray(opacity)])


def from_layers(pixels: npt.NDArray[np.uint8]) -> Image.Image:
    """The RGBA picture that ``layers`` came from, up to rounding; white where it is transparent.

    It is at least so opaque that it can look on white as it is said to.
    """
    white, opacity = pixels[..., :3].astype(np.int32), pixels[..., 3].astype(np.int32)
    opacity = np.maximum(opacity, 255 - white.min(axis=-1))
    missing = (255 - white) * 255  # from white, as seen through the opacity
    colour = 255 - (missing + opacity[..., None] // 2) // np.maximum(opacity, 1)[..., None]
    return Image.fromarray(np.dstack([colour, opacity]).astype(np.uint8), "RGBA")


def to_pil(images: Float[Tensor, "b c h w"]) -> list[Image.Image]:
    """Tensors as RGB images, or, with four channels, those of ``layers``, as RGBA ones.

    Values outside [-1, 1] are clamped. Raises InputError for NaN and infinity.
    """
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
    make = Image.fromarray if pixels.shape[1] == 3 else from_layers
    return [make(array) for array in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def binary_mask(mask: Image.Image, width: int, height: int) -> tuple[Image.Image, str | None]:
    """A mask in black and white, fitted as ``cover`` does, and a note where its meaning had to be found out.

    White is repainted: what is brighter than 127, where levels from 0 to 1 count as 0 to 255. In a mask with
    transparent pixels it is the opaque part if all of that is white, a drawing on a layer of its own, else the
    transparent part, a hole in a picture; the note says which.

    Raises InputError where nothing is repainted.
    """
    note = None
    levels = np.asarray(mask if mask.mode[0] in "IF" else to_rgb(mask).convert("L"))
    if levels.max() <= 1:
        grey = Image.fromarray((np.clip(levels, 0, 1) * 255).astype(np.uint8))
    else:
        grey = to_rgb(mask).convert("L")
    if _is_transparent(mask):
        layer = mask.convert("RGBA")
        alpha = layer.getchannel("A")
        opaque = np.asarray(alpha) > 127
        if not opaque.all():
            white = bool((np.asarray(layer.convert("L"))[opaque] > 127).all())
            grey = alpha if white else ImageChops.invert(alpha)
            part = "all that is opaque in the mask is white: the opaque part"
            if not white:
                part = "the mask is transparent beside a part that is not white: the transparent part"
            note = f"{part} is repainted"
    fitted = cover(grey, width, height)
    brightest = int(np.asarray(fitted).max())
    if brightest <= 127:
        raise InputError(
            f"the mask repaints nothing of the {width}x{height} pixels: what is brighter than 127 is repainted,"
            f" and its brightest pixel there has {brightest}; draw that part white"
        )
    return fitted.point(lambda value: 255 if value > 127 else 0), note


def mask_tensor(mask: Image.Image) -> Float[Tensor, "1 1 h w"]:
    """A binary mask as float32: 1 where it is white."""
    import torch

    return torch.from_numpy(np.asarray(mask) > 127).to(torch.float32)[None, None]


def _damaged(path: str | Path, error: Exception) -> InputError:
    return InputError(f"{path} is damaged or cut off ({error}): fetch or export it again, or remove it")


def _is_transparent(image: Image.Image) -> bool:
    """Whether it may have transparent pixels; 16-bit grey is read without them."""
    return image.has_transparency_data and not image.mode.startswith("I")


def _upright(image: Image.Image) -> Image.Image:
    # After decoding: PIL rotates TIFFs itself, and PNGs may have their EXIF after the pixels. Broken EXIF says
    # nothing about the pixels, so the picture is read all the same.
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except (OSError, *_DAMAGE):
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
