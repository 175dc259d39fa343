"""What tests of the OpenAI surface send, and what they read in its answers."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image

QUICK = {"model": "tiny", "prompt": "a fox"}


def photo() -> Image.Image:
    """A picture of the packaged model's size."""
    ramp = np.add.outer(np.arange(128), np.arange(128)).astype(np.uint8)
    return Image.fromarray(np.dstack([ramp, 255 - ramp, np.full_like(ramp, 90)]))


def half_erased(size: tuple[int, int] = (128, 128)) -> Image.Image:
    """A mask whose right half is transparent, and all of which is white: its colour says nothing."""
    mask = Image.new("RGBA", size, "white")
    mask.paste((255, 255, 255, 0), (size[0] // 2, 0, *size))
    return mask


def file(picture: Image.Image, format: str = "PNG") -> bytes:
    content = io.BytesIO()
    picture.save(content, format=format)
    return content.getvalue()


def opened(item: Any) -> Image.Image:
    """The picture of an item, or of an event."""
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


def settings(item: Any) -> dict[str, Any]:
    return json.loads(opened(item).text["minisd"])
