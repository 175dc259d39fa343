"""What a PNG says of how it was made."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from stable_diffusion.diffusion.names import ALIASES, SAMPLERS, SPACING_ALIASES, SPACINGS
from stable_diffusion.errors import InputError
from stable_diffusion.files import create, json_object
from stable_diffusion.generation.given import split_file
from stable_diffusion.generation.prompt_weights import LORA, lora_name
from stable_diffusion.images import opened

_SHEET = "minisd-sheet"


def save_png(
    image: Image.Image, path: str | Path, settings: dict[str, Any], *, sheet: str | None = None
) -> Path:
    """Writes a PNG that carries the settings that made it; no reader ever sees half a file.

    Two text chunks hold them: ``minisd``, all of them as JSON, and ``parameters``, those that other programs
    know. ``settings`` holds JSON values. Folders are created. Returns the picture's name: `path`, or numbered
    (``a-2.png``) where that is taken. Of several pictures in one, the settings are the first one's, and `sheet` says
    how the others differ. Raises InputError where nothing can be written, or for another suffix than .png.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"pictures are written as PNG: name {str(path)!r} with .png at the end")
    chunks = png_chunks(settings)
    if sheet is not None:
        chunks.add_text(_SHEET, _text(sheet))
    return create(path, lambda building: image.save(building, format="PNG", pnginfo=chunks))


def png_chunks(settings: dict[str, Any]) -> PngImagePlugin.PngInfo:
    """The two text chunks of ``save_png``, for PIL's ``save``."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", _text(parameters(settings)))
    chunks.add_text("minisd", json.dumps(settings))
    return chunks


def save_webp(
    frames: Sequence[Image.Image],
    path: Path,
    milliseconds: Sequence[int],
    settings: dict[str, Any],
    *,
    sheet: str,
) -> Path:
    """Writes an animated WebP, without loss, that begins again at its end; returns its name as ``save_png`` does.

    Its EXIF holds the first frame's settings: as JSON with the `sheet` in the description, and as other programs read
    them in the user's comment.

    Args:
        frames: of one size.
        path: with .webp at its end.
        milliseconds: how long each frame is shown.
        settings: those of the first frame.
        sheet: how the others differ.
    """
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = json.dumps({_SHEET: sheet, "minisd": settings})
    comment = b"UNICODE\0" + _text(parameters(settings)).encode("utf-16-be")
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
    first, *others = frames
    how: dict[str, Any] = {"save_all": True, "append_images": others, "duration": [*milliseconds]}
    return create(
        path,
        lambda building: first.save(building, format="WEBP", loop=0, lossless=True, exif=exif, **how),
    )


def read_sheet(path: str | Path) -> str | None:
    """The `sheet` that ``save_png`` stored; None for a picture that is one."""
    with opened(path) as image:
        text = image.info.get(_SHEET)
    return text if isinstance(text, str) else None


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings that ``save_png`` stored. Raises InputError if the file holds none."""
    with opened(path) as image:
        text = image.info.get("minisd")
    if not isinstance(text, str):
        raise InputError(
            f"{path} holds no settings of mini-stable-diffusion: give a PNG that it wrote and no program changed"
        )
    try:
        return json_object("the text", text)
    except InputError as error:
        said = f"the settings in {path} are damaged ({error}): give a PNG that no program changed"
        raise InputError(said) from None


def parameters(settings: dict[str, Any]) -> str:
    """Settings as the text that AUTOMATIC1111's webui writes and many programs read; missing ones are left out.

    Files of weights have their names without folder and ending, and their hashes where the files are there.
    """
    sampler, spacing = str(settings.get("sampler", "")), str(settings.get("spacing")).lower()
    row = SAMPLERS.get(ALIASES.get(sampler.lower(), sampler))
    spread = SPACINGS.get(SPACING_ALIASES.get(spacing, spacing))
    size = [settings.get(side) for side in ("width", "height")]
    loras: Mapping[str, float] = settings.get("lora", {})
    embeddings = [split_file(text) for text in settings.get("embedding", ())]
    guidance, varied = settings.get("guidance_scale"), settings.get("variation_strength")
    fields = {
        "Steps": settings.get("num_inference_steps"),
        "Sampler": row.webui if row else sampler or None,
        "Schedule type": spread.webui if spread else None,
        "CFG scale": None if guidance is None else max(guidance, 1.0),  # webui's 0 ignores the prompt
        "Seed": settings.get("seed"),
        "Size": None if None in size else f"{size[0]}x{size[1]}",
        "Model": settings.get("model"),
        "VAE": None if settings.get("vae") is None else re.split(r"[\\/]", settings["vae"])[-1],
        "Variation seed": settings.get("variation_seed") if varied else None,
        "Variation seed strength": varied or None,
        "Denoising strength": settings.get("strength", settings.get("hires_strength")),
        "Hires upscale": settings.get("hires"),
        "Hires upscaler": "Latent (bicubic)" if "hires" in settings else None,
        "Lora hashes": _hashes({lora_name(file): _hash(file, True) for file in loras}),
        "TI hashes": _hashes({lora_name(word or file): _hash(file, False) for file, word in embeddings}),
    }
    words = str(settings.get("prompt") or "")
    named = (
        {found[1].strip() for found in LORA.finditer(words)}
        if settings.get("prompt_syntax") == "a1111"
        else ()
    )
    tags = (
        f"<lora:{lora_name(file)}:{loras[file]:g}>"
        for file in loras
        if file not in named and lora_name(file) not in named
    )
    lines = [" ".join(filter(None, (words, *tags)))]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    lines.append(", ".join(f"{key}: {_quoted(value)}" for key, value in fields.items() if value is not None))
    return "\n".join(lines).strip()


def _text(text: str) -> str:
    """Text without lone surrogates: bytes of a command line that are no text, for which UTF-8 has no form, JSON has."""
    return text.encode("utf-8", "replace").decode("utf-8")


@lru_cache
def _hash(file: str, is_lora: bool) -> str | None:
    """The first digits of a file's SHA-256; a LoRA's in safetensors is that of its tensors alone."""
    try:
        with Path(file).open("rb") as content:
            if is_lora and file.endswith(".safetensors"):
                content.seek(int.from_bytes(content.read(8), "little") + 8)
            return hashlib.file_digest(content, "sha256").hexdigest()[:12]
    except (OSError, ValueError, OverflowError):
        return None


def _hashes(hashes: Mapping[str, str | None]) -> str | None:
    return ", ".join(f"{name}: {digits}" for name, digits in hashes.items() if digits) or None


def _quoted(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text
