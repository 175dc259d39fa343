"""Pictures in files and tensors: what is read is what was drawn, and what cannot be read says so."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin, features
from safetensors.torch import save_file

from stable_diffusion import images
from stable_diffusion.data.item import ahead
from stable_diffusion.errors import InputError
from stable_diffusion.files import read_json
from stable_diffusion.generation.metadata import parameters, read_settings, save_png
from stable_diffusion.images import (
    MAX_PIXELS,
    binary_mask,
    check_header,
    cover,
    layers,
    mask_tensor,
    open_image,
    open_mask,
    to_pil,
    to_rgb,
    to_tensor,
)

SETTINGS = {
    "prompt": "a cat",
    "negative_prompt": "blurry",
    "seed": 0,
    "num_inference_steps": 20,
    "guidance_scale": 7.0,
    "sampler": "euler",
    "width": 512,
    "height": 384,
    "model": "mini",
}


def noise(width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels.squeeze(-1) if channels == 1 else pixels, mode)


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int64)


def reason(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_image(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    return text


# Reading


def test_png_is_read_exactly(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    read = open_image(tmp_path / "a.png")
    assert read.mode == "RGB"
    assert (array(read) == array(noise())).all()


def test_a_jpeg_may_be_called_png(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10), (200, 30, 30)).save(tmp_path / "a.png", format="JPEG")
    assert np.abs(array(open_image(tmp_path / "a.png"))[5, 10] - (200, 30, 30)).max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    # The upright picture is red, green / blue, white; the file holds it as a camera in that orientation does.
    upright = np.zeros((32, 64, 3), dtype=np.uint8)
    upright[:16, :32], upright[:16, 32:], upright[16:, :32], upright[16:, 32:] = (
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
    )
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    read = open_image(path)
    assert read.size == (64, 32)
    for x, y in [(16, 8), (48, 8), (16, 24), (48, 24)]:
        assert np.abs(array(read)[y, x] - upright[y, x]).max() < 40


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_exif_is_no_reason_to_refuse(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\0")
    assert open_image(tmp_path / "a.jpg").size == (8, 8)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)])
    image.save(tmp_path / "rgba.png")
    opaque, clear, half = array(open_image(tmp_path / "rgba.png"))[0]
    assert tuple(opaque) == (255, 0, 0)
    assert tuple(clear) == (255, 255, 255)
    assert np.abs(half - 127).max() <= 1


def test_transparent_grey_and_palette(tmp_path: Path) -> None:
    grey = Image.new("LA", (2, 1))
    grey.putdata([(10, 255), (10, 0)])
    grey.save(tmp_path / "la.png")
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png", transparency=1)
    assert array(open_image(tmp_path / "la.png")).tolist() == [[[10] * 3, [255] * 3]]
    assert array(open_image(tmp_path / "p.png")).tolist() == [[[10, 20, 30], [255] * 3]]


def test_palette_grey_and_cmyk(tmp_path: Path) -> None:
    palette = Image.new("P", (1, 1))
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "p.png")
    Image.new("L", (1, 1), 77).save(tmp_path / "l.png")
    Image.new("1", (1, 1), 1).save(tmp_path / "1.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert array(open_image(tmp_path / "p.png")).tolist() == [[[10, 20, 30]]]
    assert array(open_image(tmp_path / "l.png")).tolist() == [[[77] * 3]]
    assert array(open_image(tmp_path / "1.png")).tolist() == [[[255] * 3]]
    assert np.abs(array(open_image(tmp_path / "cmyk.jpg"))[4, 4] - (255, 0, 0)).max() < 40


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert array(open_image(tmp_path / "a.png"))[0, :, 1].tolist() == [0, 1, 128, 255]


def test_floating_point_pictures_are_refused(tmp_path: Path) -> None:
    Image.new("F", (2, 2)).save(tmp_path / "a.tif")
    assert "floating-point" in reason(tmp_path / "a.tif")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "does not exist" in reason(tmp_path / "none.png")
    reason(tmp_path)


@pytest.mark.parametrize("content", [b"", b"this is a text, not a picture\n", b"\x89PNG\r\n\x1a\n"])
def test_not_a_picture(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    reason(tmp_path / "a.png")
    with pytest.raises(InputError):
        check_header(tmp_path / "a.png")


def test_text_is_told_apart_from_damage(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"this is a text, not a picture\n")
    assert "not a picture" in reason(tmp_path / "a.png")
    noise(64, 64).save(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:2000])
    damage = reason(tmp_path / "b.png")
    assert "damaged" in damage and "not a picture" not in damage


@pytest.mark.parametrize("suffix", ["eps", "ico", "pcx", "sgi", "pdf", "icns"])
def test_formats_that_nobody_needs_are_refused(tmp_path: Path, suffix: str) -> None:
    noise(32, 32).save(tmp_path / f"a.{suffix}")
    (tmp_path / f"a.{suffix}").rename(tmp_path / "a.png")
    assert "not a picture" in reason(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise(200, 200).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in reason(path) or suffix == "webp"


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damage_anywhere_is_one_sentence_or_a_picture(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png", "webp", "gif", "bmp", "tif", *(["avif"] if features.check("avif") else [])):
        file = io.BytesIO()
        noise(16, 16).save(file, format={"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
        for _ in range(60):
            content = bytearray(file.getvalue())
            for place in rng.integers(0, min(len(content), 200), 4):
                content[place] = rng.integers(256)
            path = tmp_path / f"a.{suffix}"
            path.write_bytes(content)
            try:
                open_image(path)
            except InputError as error:
                assert str(path) in str(error) and "\n" not in str(error)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A file that says it has these pixels, but holds a thousand bytes of them."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def gif(width: int, height: int) -> bytes:
    return (
        b"GIF89a"
        + struct.pack("<HH", width, height)
        + bytes.fromhex("800000000000ffffff2c00000000")
        + (struct.pack("<HH", width, height) + bytes.fromhex("000202440100 3b".replace(" ", "")))
    )


def webp(width: int, height: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides
    lossless = b"VP8L" + struct.pack("<I", 10) + b"\x2f" + bits(width, height) + bytes(5)
    return b"RIFF" + struct.pack("<I", len(body + lossless)) + body + lossless


def bits(width: int, height: int) -> bytes:
    return ((width - 1) | (height - 1) << 14).to_bytes(4, "little")


BOMBS = {
    "60,000 a side": png(60_000, 60_000),
    "13,000 a side": png(13_000, 13_000),
    "one row": png(178_000_000, 1),
    "one too many": png(MAX_PIXELS + 1, 1),
    "a GIF": gif(13_000, 13_000),
    "a WebP": webp(16_000, 11_000),
}


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize("bomb", BOMBS)
def test_too_many_pixels_are_refused_before_they_are_decoded(
    tmp_path: Path, bomb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(BOMBS[bomb])
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert "67,108,864 pixels are the most" in reason(tmp_path / "a.png")
    with pytest.raises(InputError, match="67,108,864 pixels are the most"):
        check_header(tmp_path / "a.png")


def test_a_picture_without_memory_for_it_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: object) -> None:
        raise MemoryError

    noise().save(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert "is too large" in reason(tmp_path / "a.png")


def test_only_so_many_pixels_are_decoded_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_free", [1000])
    at_work, most = [0], [0]
    load = ImageFile.ImageFile.load

    def counted(image: ImageFile.ImageFile) -> object:
        at_work[0] += image.width * image.height
        most[0] = max(most[0], at_work[0])
        time.sleep(0.01)
        result = load(image)
        at_work[0] -= image.width * image.height
        return result

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    noise(20, 20).save(tmp_path / "a.png")
    assert len(list(ahead(open_image, [tmp_path / "a.png"] * 20))) == 20
    assert 400 < most[0] <= 1000
    assert images._free == [1000]
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    assert "damaged" in reason(tmp_path / "b.png") and images._free == [1000], "an error gives its room back"


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_texts_that_fill_the_memory_are_refused(tmp_path: Path, kind: bytes) -> None:
    start = b"key\0\1\0\0\0" if kind == b"iTXt" else b"key\0\0"
    bomb = chunk(kind, start + zlib.compress(bytes(100_000_000)))
    (tmp_path / "a.png").write_bytes(png(16, 16, bomb))
    assert "damaged" in reason(tmp_path / "a.png")
    with pytest.raises(InputError):
        read_settings(tmp_path / "a.png")


def test_a_jpeg_of_endless_scans_is_refused(tmp_path: Path) -> None:
    file = io.BytesIO()
    noise(64, 64).save(file, format="JPEG", progressive=True)
    content = file.getvalue()
    (tmp_path / "a.jpg").write_bytes(content)
    assert open_image(tmp_path / "a.jpg").size == (64, 64)
    last = content.rindex(b"\xff\xda")
    (tmp_path / "a.jpg").write_bytes(content[:-2] + (content[last : last + 10] + b"\0") * 600 + b"\xff\xd9")
    assert "more than 500 scans" in reason(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="more than 500 scans"):
        open_mask(tmp_path / "a.jpg")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such pipes and devices")
def test_pipes_devices_and_loops_are_one_sentence_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name, said in (("pipe", "is not a file"), ("zero", "is not a file"), ("loop", "cannot open")):
        assert said in reason(tmp_path / f"{name}.png")
        with pytest.raises(InputError, match=r"is not a file|does not exist|cannot open"):
            read_json(tmp_path / f"{name}.png")


def test_reading_does_not_import_torch(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    code = (
        "import sys; from stable_diffusion.images import open_image; from stable_diffusion.data import coco, shapes;"
        f"open_image({str(tmp_path / 'a.png')!r}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Tensors


def test_tensor_layout_and_range() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    image.putpixel((2, 0), (255, 0, 0))
    tensor = to_tensor([image, image])
    assert tensor.shape == (2, 3, 2, 3)
    assert tensor.dtype == torch.float32
    assert tensor[0, :, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])
    assert tensor[1, :, 0, 2].tolist() == [1, -1, -1]


def test_every_value_survives_the_round_trip() -> None:
    image = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    for dtype in (torch.float32, torch.float64):
        (back,) = to_pil(to_tensor([image]).to(dtype))
        assert (array(back) == array(image)).all()


def test_batch_round_trip_keeps_the_order() -> None:
    images = [Image.new("RGB", (4, 6), colour) for colour in ("red", "lime", "blue")]
    assert [array(back).tolist() for back in to_pil(to_tensor(images))] == [array(i).tolist() for i in images]


def test_values_are_clamped_and_rounded() -> None:
    values = torch.tensor([-3.0, 3.0, 0.6 / 127.5 - 1, 0.4 / 127.5 - 1]).view(1, 1, 1, 4).expand(1, 3, 1, 4)
    assert array(to_pil(values)[0])[0, :, 0].tolist() == [0, 255, 1, 0]


def test_opacity_survives_its_layers() -> None:
    """A picture on white and its opacity are the picture, where it shows: exactly on white, closely elsewhere."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 4), dtype=np.uint8)
    pixels[:8, :, 3], pixels[8:16, :, 3] = 0, 255
    image = Image.fromarray(pixels, "RGBA")
    values = torch.from_numpy(layers(image)).permute(2, 0, 1)[None] / 127.5 - 1
    (back,) = to_pil(values)
    assert back.mode == "RGBA" and array(back)[0, 0].tolist() == [255, 255, 255, 0]
    assert (array(back)[..., 3] == pixels[..., 3]).all()
    assert (array(back)[8:16, :, :3] == pixels[8:16, :, :3]).all()
    assert np.abs(array(to_rgb(back)).astype(int) - array(to_rgb(image))).max() <= 1
    for ground in ("black", "teal"):
        under = Image.new("RGBA", image.size, ground)
        shown = [array(Image.alpha_composite(under, one)).astype(int) for one in (image, back)]
        assert np.abs(shown[0] - shown[1]).max() <= 2


def test_what_is_dark_on_white_is_opaque() -> None:
    """Whatever opacity is said of it: the picture on white is what was decoded."""
    values = torch.tensor([-1.0, 0.0, 1.0, -1.0]).view(1, 4, 1, 1)
    (picture,) = to_pil(values)
    assert picture.getpixel((0, 0)) == (0, 128, 255, 255)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_not_finite(value: float, dtype: torch.dtype) -> None:
    images = torch.zeros(3, 3, 4, 4, dtype=dtype)
    images[1, 2, 3, 0] = value
    with pytest.raises(InputError, match=r"picture 2 of 3 has NaN.*no file is written"):
        to_pil(images)


def test_batches_have_one_size() -> None:
    with pytest.raises(InputError, match=r"4x5, 5x4"):
        to_tensor([Image.new("RGB", (5, 4)), Image.new("RGB", (4, 5))])
    with pytest.raises(InputError, match="none"):
        to_tensor([])


# Sizes


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 300), (100, 100), (37, 41)])
def test_cover_crops_and_does_not_stretch(width: int, height: int) -> None:
    # A centred circle stays a centred circle.
    y, x = np.mgrid[:height, :width]
    radius = min(width, height) * 0.4
    disc = (x + 0.5 - width / 2) ** 2 + (y + 0.5 - height / 2) ** 2 < radius**2
    inside = array(cover(Image.fromarray((disc * 255).astype(np.uint8)), 64, 64)) > 127
    rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    assert abs(len(rows) - 0.8 * 64) <= 2
    assert abs(len(columns) - 0.8 * 64) <= 2
    assert abs(rows.mean() - 31.5) <= 1
    assert abs(columns.mean() - 31.5) <= 1


def test_cover_keeps_a_picture_of_the_asked_size() -> None:
    assert (array(cover(noise(), 24, 16)) == array(noise())).all()


def test_cover_crops_the_sides_equally() -> None:
    stripes = Image.fromarray(np.repeat(np.arange(30, dtype=np.uint8)[None], 10, 0))
    assert array(cover(stripes, 10, 10))[5].tolist() == list(range(10, 20))


def test_cover_is_antialiased() -> None:
    board = Image.fromarray((np.indices((256, 256)).sum(0) % 2 * 255).astype(np.uint8))
    small = array(cover(board, 32, 32))[2:-2, 2:-2]
    assert np.abs(small - 127.5).max() < 8


def test_mask_is_binary_and_white_is_one() -> None:
    mask = Image.new("L", (4, 1))
    mask.putdata([0, 127, 128, 255])
    tensor = mask_tensor(binary_mask(mask, 4, 1)[0])
    assert tensor.tolist() == [[[[0, 0, 1, 1]]]]
    assert tensor.dtype == torch.float32


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
def test_mask_modes_and_sizes(mode: str) -> None:
    mask = Image.new("L", (96, 48))
    mask.paste(255, (48, 0, 96, 48))  # the right half; the square in the middle is half of it
    tensor = mask_tensor(binary_mask(mask.convert(mode), 16, 16)[0])
    assert tensor.shape == (1, 1, 16, 16)
    assert (tensor[0, 0, :, :8] == 0).all()
    assert (tensor[0, 0, :, 8:] == 1).all()


def test_16_bit_mask() -> None:
    mask = Image.fromarray(np.array([[0, 30000, 40000, 65535]], dtype=np.uint16))
    assert mask_tensor(binary_mask(mask, 4, 1)[0]).flatten().tolist() == [0, 0, 1, 1]
    assert to_rgb(mask).getpixel((3, 0)) == (255, 255, 255)


DRAWN = np.zeros((12, 20), dtype=np.uint8)
DRAWN[2:6, 3:9] = 1
HOLE = np.where(DRAWN, 0, 255).astype(np.uint8)


def layer(colour: tuple[int, int, int] | Image.Image, alpha: np.ndarray) -> Image.Image:
    """A picture with that transparency."""
    picture = Image.new("RGB", (20, 12), colour) if isinstance(colour, tuple) else colour.copy()
    picture.putalpha(Image.fromarray(alpha))
    return picture


def on_black(colour: tuple[int, int, int]) -> Image.Image:
    return Image.fromarray(DRAWN[..., None] * np.array(colour, dtype=np.uint8))


MASKS = {
    "white on black": (on_black((255, 255, 255)), None),
    "a colour brighter than 127": (on_black((0, 255, 0)), None),
    "0 and 1": (Image.fromarray(DRAWN), None),
    "0 and 1 in three channels": (on_black((1, 1, 1)), None),
    "0 and 1 in 16 bits": (Image.fromarray(DRAWN.astype(np.uint16)), None),
    "0 and 1 in 32 bits": (Image.fromarray(DRAWN.astype(np.int32)), None),
    "floating point": (Image.fromarray(DRAWN.astype(np.float32)), None),
    "bits": (Image.fromarray(DRAWN.astype(bool)), None),
    "a palette": (on_black((255, 255, 255)).quantize(2), None),
    "white on black, opaque alpha": (layer(on_black((255, 255, 255)), np.full_like(HOLE, 255)), None),
    "white on transparent": (layer((255, 255, 255), 255 - HOLE), "opaque part"),
    "grey 200 on transparent": (layer((200, 200, 200), 255 - HOLE), "opaque part"),
    "white on transparent black": (layer(on_black((255, 255, 255)), 255 - HOLE), "opaque part"),
    "soft edges count from 128 on": (
        layer((255, 255, 255), np.where(DRAWN, 128, 127).astype(np.uint8)),
        "opaque",
    ),
    "a palette with transparency": (layer((255, 255, 255), 255 - HOLE).quantize(), "opaque part"),
    "grey with alpha": (layer((255, 255, 255), 255 - HOLE).convert("LA"), "opaque part"),
    "a hole in a picture": (layer(noise(20, 12), HOLE), "transparent part"),
    "a hole in black": (layer((0, 0, 0), HOLE), "transparent part"),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_drawn_part_is_repainted_however_it_was_drawn(tmp_path: Path, name: str) -> None:
    mask, said = MASKS[name]
    found, note = binary_mask(mask, 20, 12)
    assert (array(found) == DRAWN * 255).all()
    assert note is None if said is None else note is not None and said in note
    suffix = "tif" if mask.mode in "FI" else "png"
    mask.save(tmp_path / f"mask.{suffix}")
    assert (array(binary_mask(open_mask(tmp_path / f"mask.{suffix}"), 20, 12)[0]) == DRAWN * 255).all()


def test_transparency_without_an_alpha_channel(tmp_path: Path) -> None:
    """A PNG can name one grey level or colour that is transparent."""
    for colour, mode in ((0, "L"), ((0, 0, 0), "RGB")):
        Image.fromarray(DRAWN * 255).convert(mode).save(tmp_path / "mask.png", transparency=colour)
        found, note = binary_mask(open_mask(tmp_path / "mask.png"), 20, 12)
        assert (array(found) == DRAWN * 255).all()
        assert note is not None and "opaque part" in note


def test_a_mask_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    layer((255, 255, 255), 255 - HOLE).rotate(180).save(tmp_path / "mask.png", exif=exif)
    assert (array(binary_mask(open_mask(tmp_path / "mask.png"), 20, 12)[0]) == DRAWN * 255).all()


@pytest.mark.parametrize(
    ("mask", "brightest"),
    [
        (Image.new("L", (8, 8)), 0),
        (Image.new("L", (8, 8), 100), 100),
        (Image.new("RGB", (8, 8), "red"), 76),
        (Image.new("RGBA", (8, 8)), 0),
        (layer((255, 255, 255), np.full_like(HOLE, 127)), 127),
    ],
    ids=["black", "grey", "red", "transparent", "half transparent"],
)
def test_a_mask_that_repaints_nothing_is_an_error(mask: Image.Image, brightest: int) -> None:
    with pytest.raises(InputError, match=f"repaints nothing .* its brightest pixel there has {brightest};"):
        binary_mask(mask, 8, 8)


def test_a_mask_whose_white_part_is_cropped_repaints_nothing() -> None:
    mask = Image.new("L", (40, 10))
    mask.paste(255, (0, 0, 8, 10))
    assert binary_mask(mask, 40, 10)[0].getbbox() == (0, 0, 8, 10)
    with pytest.raises(InputError, match="nothing of the 10x10 pixels"):
        binary_mask(mask, 10, 10)


# Settings in files

PROMPTS = [
    "",
    "plain",
    'commas, colons: and "quotes"',
    "two\nlines",
    "кот, 猫, 🐈‍⬛ émoji",
    "Negative prompt: Steps: 3",
    "nul \0 and tab \t",
    "x" * 100_000,
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_settings_come_back(tmp_path: Path, prompt: str) -> None:
    settings = {
        **SETTINGS,
        "prompt": prompt,
        "negative_prompt": prompt,
        "sampler": "ddim",
    }
    save_png(noise(), tmp_path / "a.png", settings)
    assert read_settings(tmp_path / "a.png") == settings
    assert (array(open_image(tmp_path / "a.png")) == array(noise())).all()
    with Image.open(tmp_path / "a.png") as image:
        assert image.text["parameters"] == parameters(settings)


def test_bytes_that_are_no_text_do_not_stop_the_picture(tmp_path: Path) -> None:
    save_png(noise(), tmp_path / "a.png", {"prompt": "caf\udce9"})
    assert read_settings(tmp_path / "a.png") == {"prompt": "caf\udce9"}


def test_parameters_text() -> None:
    assert parameters(SETTINGS) == (
        "a cat\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: Euler, CFG scale: 7, Seed: 0, Size: 512x384, Model: mini"
    )


def test_parameters_text_quotes_and_omits() -> None:
    settings = {
        "prompt": "a",
        "sampler": "dpmpp_2m",
        "spacing": "karras",
        "model": 'C:\\my, "model"',
    }
    assert parameters(settings) == (
        'a\nSampler: DPM++ 2M, Schedule type: Karras, Model: "C:\\\\my, \\"model\\""'
    )
    assert parameters({"guidance_scale": 0.0, "strength": 0.75, "seed": 3, "sampler": "new"}) == (
        "Sampler: new, CFG scale: 1, Seed: 3, Denoising strength: 0.75"
    )
    assert parameters({}) == ""


A1111_FIELD = re.compile(r'([\w /-]+): ("(?:[^"\\]|\\.)*"|[^,]*)(?:, |$)')
"""A field of the last line, as AUTOMATIC1111's webui and its readers take it apart."""


def test_parameters_name_files_of_weights_as_a1111_does(tmp_path: Path) -> None:
    """Its readers put LoRAs back by the tags in the prompt, and look files up by the hashes."""
    lora, word = tmp_path / "fine style-v1.5.safetensors", tmp_path / "bad.hands.pt"
    save_file({"x": torch.ones(3)}, lora, {"note": "of no account"})
    word.write_bytes(b"vectors")
    text = parameters(
        SETTINGS
        | {
            "lora": {str(lora): 0.8, "C:\\loras\\other.safetensors": 1.0, "by:name": -0.5},
            "embedding": [str(word), f"{word}:<hand>", "gone.pt"],
            "vae": "/models/vae-ft-mse.safetensors",
        }
    )
    prompt, negative, last = text.split("\n")
    assert prompt == "a cat <lora:fine style-v1.5:0.8> <lora:other:1> <lora:by_name:-0.5>"
    assert negative == "Negative prompt: blurry"
    fields = {
        key: json.loads(value) if value[0] == '"' else value for key, value in A1111_FIELD.findall(last)
    }
    tensors = hashlib.sha256(torch.ones(3).numpy().tobytes()).hexdigest()[:12]
    vectors = hashlib.sha256(b"vectors").hexdigest()[:12]
    assert fields["Lora hashes"] == f"fine style-v1.5: {tensors}"
    assert fields["TI hashes"] == f"bad.hands: {vectors}, _hand_: {vectors}"
    assert fields["VAE"] == "vae-ft-mse.safetensors"
    assert (fields["Seed"], fields["Model"]) == ("0", "mini")
    assert parameters({"lora": {"a": 0.5}}) == "<lora:a:0.5>"


def test_settings_missing_or_damaged(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.png")
    with pytest.raises(InputError, match="holds no settings"):
        read_settings(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(InputError, match="not a picture"):
        read_settings(tmp_path / "b.png")
    for text in ("{", "[1]", json.dumps("x"), "[" * 100_000):
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("minisd", text)
        noise().save(tmp_path / "c.png", pnginfo=chunks)
        with pytest.raises(InputError, match="damaged"):
            read_settings(tmp_path / "c.png")


def test_saving_makes_folders_and_leaves_nothing_else(tmp_path: Path) -> None:
    save_png(noise(), tmp_path / "new" / "ö" / "a.png", {"seed": 1})
    assert [path.name for path in (tmp_path / "new" / "ö").iterdir()] == ["a.png"]
    assert read_settings(tmp_path / "new" / "ö" / "a.png") == {"seed": 1}


def test_a_failed_save_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(noise(), tmp_path / "a.png", {"seed": 1})
    before = (tmp_path / "a.png").read_bytes()

    def full(self: Image.Image, path: Path, **kwargs: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(InputError, match="No space left"):
        save_png(noise(), tmp_path / "a.png", {"seed": 2})
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_saving_where_it_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        save_png(noise(), tmp_path / "file" / "a.png", {})
    with pytest.raises(InputError, match=r"\.png at the end"):
        save_png(noise(), tmp_path / "a.jpg", {})


def test_a_name_that_is_taken_is_numbered(tmp_path: Path) -> None:
    (tmp_path / "a.b-2.png").symlink_to("nowhere")
    names = [save_png(noise(), tmp_path / "a.b.png", {"seed": seed}).name for seed in range(3)]
    assert names == ["a.b.png", "a.b-3.png", "a.b-4.png"]
    assert [read_settings(tmp_path / name)["seed"] for name in names] == [0, 1, 2]
