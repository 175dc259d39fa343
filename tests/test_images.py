"""Pictures in files and tensors: what is read is what was drawn, and what cannot be read says so."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features

from stable_diffusion.errors import InputError
from stable_diffusion.generation.metadata import parameters, read_settings, save_png
from stable_diffusion.images import (
    binary_mask,
    check_header,
    cover,
    mask_tensor,
    open_image,
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
    assert "No such file" in reason(tmp_path / "none.png")
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


def test_formats_that_are_programs_are_refused(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
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


def test_decompression_bomb(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )
    (tmp_path / "a.png").write_bytes(png)
    assert "too large" in reason(tmp_path / "a.png")


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
    tensor = mask_tensor(binary_mask(mask, 4, 1))
    assert tensor.tolist() == [[[[0, 0, 1, 1]]]]
    assert tensor.dtype == torch.float32


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
def test_mask_modes_and_sizes(mode: str) -> None:
    mask = Image.new("L", (96, 48))
    mask.paste(255, (48, 0, 96, 48))  # the right half; the square in the middle is half of it
    tensor = mask_tensor(binary_mask(mask.convert(mode), 16, 16))
    assert tensor.shape == (1, 1, 16, 16)
    assert (tensor[0, 0, :, :8] == 0).all()
    assert (tensor[0, 0, :, 8:] == 1).all()


def test_16_bit_mask() -> None:
    mask = Image.fromarray(np.array([[0, 30000, 40000, 65535]], dtype=np.uint16))
    assert mask_tensor(binary_mask(mask, 4, 1)).flatten().tolist() == [0, 0, 1, 1]
    assert to_rgb(mask).getpixel((3, 0)) == (255, 255, 255)


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
        "Sampler: new, CFG scale: 0, Seed: 3, Denoising strength: 0.75"
    )
    assert parameters({}) == ""


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
