"""Every reader on damaged and hostile files: each ends with what was read or with one sentence, and soon.

A case is a valid small file that was changed at random; its number decides how. `python -m tests.test_fuzz COUNT`
runs so many cases of each reader in processes of their own, which see crashes, hangs and memory, and prints what it
found; `python -m tests.test_fuzz READER NUMBER` runs one case here.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin, features
from safetensors.torch import save_file

from stable_diffusion import DiffusionModel, images
from stable_diffusion.checkpoints.info import describe
from stable_diffusion.config import ScheduleConfig
from stable_diffusion.data.cache import ArrayCache
from stable_diffusion.data.coco import CocoImageLoader, coco_splits
from stable_diffusion.data.icon_packages import NAMES, PACKAGES, all_drawings, draw
from stable_diffusion.errors import InputError
from stable_diffusion.generation.metadata import read_settings, save_png
from stable_diffusion.generation.request import parse
from stable_diffusion.nn.tokenizer import Tokenizer
from stable_diffusion.training.recipe import read_recipe
from tests.tiny import KL, STAGES, TINY, shapes, tiny_model

LIMIT = 2 * 2**30  # bytes of memory
SECONDS = 10  # of one case

LIKE_SD = replace(
    TINY,
    vae=replace(KL, scaling_factor=0.18215),
    unet=replace(TINY.unet, pooled_projection_dim=None),
    schedule=ScheduleConfig(kind="scaled_linear", prediction_type="epsilon"),
)


class Reader(NamedTuple):
    """A valid input, and what reads it."""

    make: Callable[[Path], None]
    """Writes the input's files into a folder."""
    read: Callable[[Path], object]
    part: float = 1.0
    """How many of the cases it gets: less where one takes long."""
    aim: str = ""
    """What the names of the files to be changed contain."""


# Valid inputs


def small_vocabulary(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    letters = [chr(number) for number in (*range(33, 127), *range(161, 173), *range(174, 324))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "fo", "fox</w>"]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\nf o\nfo x</w>\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"pad_token": "<|endoftext|>", "model_max_length": 77}')
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<|startoftext|>"}}')


def wordpieces(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fox", "##es"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def tokenizer_json(folder: Path) -> None:
    small_vocabulary(folder)
    Tokenizer(folder, "clip", 16)._tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").unlink()


def native_folder(folder: Path) -> None:
    tiny_model(LIKE_SD).save_pretrained(folder / "model")
    small_vocabulary(folder / "model" / "tokenizer")


def diffusers_folder(folder: Path) -> None:
    tiny_model(LIKE_SD).export(folder / "model", format="diffusers")
    small_vocabulary(folder / "model" / "tokenizer")


def single_file(folder: Path) -> None:
    tiny_model(LIKE_SD).export(folder / "model.safetensors", format="single-file")


def checkpoint(folder: Path, zipped: bool = True) -> None:
    from safetensors.torch import load_file

    single_file(folder)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    content = {"state_dict": state, "global_step": 7}
    torch.save(content, folder / "model.ckpt", _use_new_zipfile_serialization=zipped)


def lora(folder: Path) -> None:
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, folder / "lora.safetensors", metadata={"ss_base_model_version": "sd_v1"})


def peft(folder: Path) -> None:
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 64), f"{name}.lora_B.weight": torch.randn(64, 2)}
    said = {"unet.lora_alpha": 2, "unet.use_rslora": True, "unet.alpha_pattern": {"to_q": 3}}
    metadata = {"lora_adapter_metadata": json.dumps(said)}
    save_file(tensors, folder / "lora.safetensors", metadata=metadata)


def embedding(folder: Path) -> None:
    content = {
        "string_to_param": {"*": torch.randn(2, 32)},
        "string_to_token": {"*": 265},
        "name": "<new>",
        "step": 1,
    }
    torch.save(content, folder / "embedding.pt")


def autoencoder(folder: Path) -> None:
    tiny_model(LIKE_SD).export(folder / "model", format="diffusers")


def pictures(folder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 4), dtype=np.uint8)
    image = Image.fromarray(pixels)
    for suffix in ("png", "webp", "tif", "tga", *(["avif"] if features.check("avif") else [])):
        image.save(folder / f"a.{suffix}")
    for suffix in ("jpg", "gif", "bmp", "ppm", *(["jp2"] if features.check("jpg_2000") else [])):
        image.convert("RGB").save(folder / f"b.{suffix}")
    image.convert("RGB").save(
        folder / "progressive.jpg", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0"
    )
    image.save(folder / "moving.webp", save_all=True, append_images=[image.rotate(90)])
    image.convert("P").save(
        folder / "moving.gif", save_all=True, append_images=[image.convert("P").rotate(90)]
    )
    image.save(folder / "moving.png", save_all=True, append_images=[image.rotate(90)])
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "grey16.png")
    image.convert("RGB").save(folder / "packed.tif", compression="tiff_lzw")
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "word " * 200, zip=True)
    text.add_itxt("Title", "words" * 100, zip=True)
    image.save(folder / "text.png", pnginfo=text)


def settings(folder: Path) -> None:
    request = tiny_model().request("a fox", guidance_interval=(0.2, 0.8))
    stored = request.to_dict() | {"lora": {"a.safetensors": 0.5}, "model": "tiny", "image": "a.png"}
    save_png(Image.new("RGB", (8, 8)), folder / "a.png", stored)


def coco(folder: Path) -> None:
    shapes(folder, 6, 16)


def recipe(folder: Path) -> None:
    for path in sorted(Path("recipes").glob("*.toml")):
        (folder / path.name).write_bytes(path.read_bytes())


def icon_archives(folder: Path) -> None:
    def archive(name: str, members: dict[str, bytes]) -> None:
        with tarfile.open(folder / name, "w:gz") as tar:
            for member, content in members.items():
                entry = tarfile.TarInfo(f"package/{member}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))

    image = io.BytesIO()
    Image.new("RGBA", (16, 16), "red").save(image, "WEBP")
    icons = {"icons": {"fox": {"body": "<rect width='9' height='9'/>"}}, "width": 16, "height": 16}
    icons["aliases"] = {"volpe": {"parent": "fox", "hFlip": True}}
    drawn = {"icons.json": icons, "chars.json": {"1f98a": "fox"}}
    for style, package in PACKAGES.items():
        if style == "fluent3d":
            archive(package.file, {"assets/1f98a.webp": image.getvalue()})
        else:
            archive(package.file, {name: json.dumps(content).encode() for name, content in drawn.items()})
    fox = {"label": "fox", "hexcode": "1F98A", "group": 3, "subgroup": 34, "version": 1, "tags": ["animal"]}
    groups = {"groups": {"3": "animals-nature"}, "subgroups": {"34": "animal-mammal"}}
    names = {"en/data.json": [fox], "meta/groups.json": groups}
    archive(NAMES.file, {name: json.dumps(content).encode() for name, content in names.items()})


def rows(folder: Path) -> None:
    for _ in ArrayCache(folder, "rows", "key", (4, 3), "float16").fill([np.ones((4, 3), np.float16)]):
        pass


def run(folder: Path) -> None:
    tiny_model().train(shapes(folder / "data", 6), STAGES, output_dir=folder / "run", steps=1)


# What reads them


@cache
def model() -> DiffusionModel:
    return tiny_model(LIKE_SD)


def read_lora(folder: Path) -> None:
    list(describe(folder / "lora.safetensors"))
    model().load_lora(folder / "lora.safetensors", name="a")
    model().unload_lora("a")


def read_embedding(folder: Path) -> None:
    list(describe(folder / "embedding.pt"))
    copy.deepcopy(model()).load_textual_inversion(folder / "embedding.pt")


def read_vae(folder: Path) -> None:
    model().load_vae(folder / "model" / "vae", preview=True)


def read_model(folder: Path) -> None:
    (path,) = folder.iterdir()
    if path.is_file():
        list(describe(path))
    else:
        DiffusionModel.from_pretrained(path).encode_prompt("a fox")


def read_pictures(folder: Path) -> None:
    failed = None
    for path in sorted(folder.iterdir()):
        try:
            images.binary_mask(images.open_image(path), 16, 16)
        except InputError as error:
            failed = error
    if failed:
        raise failed


def read_stored(folder: Path) -> None:
    found = parse(read_settings(folder / "a.png"), whole=True)
    model().request(**{name: value for name, value in found.items() if name not in ("image", "mask", "lora")})


def read_coco(folder: Path) -> None:
    for item in CocoImageLoader(folder / "train", folder / "annotations" / "captions_train.json"):
        assert item.captions
    coco_splits(folder)


def read_recipes(folder: Path) -> None:
    failed = None
    for path in sorted(folder.iterdir()):
        try:
            read_recipe(path)
        except InputError as error:
            failed = error
    if failed:
        raise failed


def read_icons(folder: Path) -> None:
    for drawing in all_drawings(folder)[0]:
        draw(drawing.source, 16)


def read_cache(folder: Path) -> None:
    cached = ArrayCache(folder, "rows", "key", (4, 3), "float16")
    for _ in cached.fill([np.ones((4, 3), np.float16)]):
        pass
    assert cached.read().shape == (4, 3)


def go_on(folder: Path) -> None:
    data = CocoImageLoader(folder / "data" / "train", folder / "data" / "annotations" / "captions_train.json")
    tiny_model().train(data, STAGES, output_dir=folder / "run", steps=2)


READERS: dict[str, Reader] = {
    "native folder": Reader(native_folder, read_model, 0.5),
    "diffusers folder": Reader(diffusers_folder, read_model, 0.5),
    "its config.json files": Reader(diffusers_folder, read_model, 1, "config.json"),
    "single file": Reader(single_file, read_model),
    "ckpt": Reader(checkpoint, read_model),
    "older ckpt": Reader(lambda folder: checkpoint(folder, zipped=False), read_model),
    "lora": Reader(lora, read_lora),
    "lora of PEFT": Reader(peft, read_lora, 0.5),
    "embedding": Reader(embedding, read_embedding, 0.5),
    "autoencoder": Reader(autoencoder, read_vae, 1, "vae"),
    "pictures and masks": Reader(pictures, read_pictures, 2),
    "settings in a PNG": Reader(settings, read_stored, 2),
    "COCO": Reader(coco, read_coco),
    "recipes": Reader(recipe, read_recipes),
    "icon packages": Reader(icon_archives, read_icons, 0.5),
    "CLIP vocabulary": Reader(small_vocabulary, lambda folder: Tokenizer(folder, "clip", 16)(["a fox"])),
    "BERT vocabulary": Reader(wordpieces, lambda folder: Tokenizer(folder, "bert", 16)(["a fox"])),
    "tokenizer.json": Reader(tokenizer_json, lambda folder: Tokenizer(folder, "clip", 16)(["a fox"])),
    "cache": Reader(rows, read_cache),
    "run folder": Reader(run, go_on, 0.02, "run/"),
}

# Changes

VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 7, 1.5, 1e308, 2**31, 2**63, 10**30, -(10**30), math.nan, math.inf),
    *("", "x", "x" * 10_000, "../../x", "a\0b", "\ud800", "7"),
    *([], {}, [0], [[]], {"a": 1}, [None] * 1000, [1, 2, 3, 4, 5]),
]
NUMBERS = [0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]


def changed_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bits flipped, the end cut off, parts repeated, removed, zeroed or moved, large numbers."""
    data, size = bytearray(content), max(1, len(content))
    near = min(size, rng.choice([64, 1024, size]))  # headers are what says how much there is
    start = rng.randrange(near)
    stop = start + rng.choice([1, 4, 16, 256])
    kind = rng.randrange(8)
    if kind == 0:
        for _ in range(rng.choice([1, 3, 20])):
            place = rng.randrange(near)
            if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[rng.randrange(size) :]
    elif kind == 2:
        data[start:start] = data[start:stop] * rng.choice([1, 2, 100])
    elif kind == 3:
        del data[start:stop]
    elif kind == 4:
        data[start:stop] = bytes(len(data[start:stop]))
    elif kind == 5:
        length = rng.choice([1, 2, 4, 8])
        order = rng.choice(["little", "big"])
        value = rng.choice(NUMBERS) % 2 ** (8 * length)
        data[start : start + length] = value.to_bytes(length, order)  # type: ignore[arg-type]
    elif kind == 6:
        other = rng.randrange(size)
        data[start:stop] = data[other : other + stop - start]
    else:
        data[start:stop] = rng.randbytes(stop - start)
    return bytes(data)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a value with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from places(value[key])


def changed_value(rng: random.Random, value: Any) -> Any:
    """One to three values somewhere in it replaced, removed, named otherwise or repeated."""
    for _ in range(rng.choice([1, 1, 2, 3])):
        found = list(places(value)) if isinstance(value, (dict, list)) else []
        if not found or rng.random() < 0.02:
            return copy.deepcopy(rng.choice(VALUES))
        container, key = rng.choice(found)
        kind = rng.randrange(10)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(["x", "", f"{key}s", key.upper()])] = container.pop(key)
        elif kind == 2 and isinstance(container, list):
            container[key:key] = [container[key]] * rng.choice([1, 50])
        elif kind == 3 and isinstance(container[key], (int, float)):
            container[key] *= rng.choice([-1, 2, 0.5, 1000, 10**9])
        else:
            container[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def changed_json(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.03:
        depth = rng.choice([100, 5000, 200_000])
        return (b"[" * depth if rng.random() < 0.5 else b'{"a":' * depth) + (b"]" * depth) * rng.randrange(2)
    if rng.random() < 0.03:
        return content.replace(b": ", b": " + b"9" * 5000, 1)
    text = json.dumps(changed_value(rng, json.loads(content)))
    return text.encode(rng.choice(["utf-8"] * 9 + ["utf-16"]))


def changed_toml(rng: random.Random, content: bytes) -> bytes:
    lines = content.decode().split("\n")
    settings = [number for number, line in enumerate(lines) if " = " in line]
    number = rng.choice(settings)
    value = rng.choice([value for value in VALUES if value is not None and value != {}])
    text = {"nan": "nan", "Infinity": "inf"}.get(json.dumps(value), json.dumps(value)).replace("NaN", "nan")
    if rng.random() < 0.05:
        text = "[" * 10_000 + "]" * 10_000
    lines[number] = lines[number].partition(" = ")[0] + " = " + text.replace('{"a": 1}', "{a = 1}")
    return "\n".join(lines).encode()


def changed_header(rng: random.Random, content: bytes) -> bytes:
    """The JSON at the head of a safetensors file, or that within its metadata."""
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length]
    said = json.loads(header)
    inner = [key for key, value in said.get("__metadata__", {}).items() if value.startswith("{")]
    if inner and rng.random() < 0.5:
        key = rng.choice(inner)
        text = changed_json(rng, said["__metadata__"][key].encode())
        said["__metadata__"][key] = text.decode("utf-8", "replace")
        header = json.dumps(said).encode()
    else:
        header = changed_json(rng, header)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def changed_archive(rng: random.Random, content: bytes) -> bytes:
    """One member of a zip archive, mostly the pickle."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(result, "w") as new:
        names = old.namelist()
        chosen = rng.choice([*[name for name in names if name.endswith("data.pkl")] * 8, *names[:8]])
        for name in names:
            data = old.read(name)
            if name == chosen:
                for _ in range(rng.choice([1, 1, 4])):
                    data = changed_bytes(rng, data)
            new.writestr(name, data)
    return result.getvalue()


def changed_stored(rng: random.Random, content: bytes) -> bytes:
    """The settings in a PNG."""
    with Image.open(io.BytesIO(content)) as image:
        text = json.loads(image.text["minisd"])  # type: ignore[attr-defined]
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("minisd", changed_json(rng, json.dumps(text).encode()).decode("utf-8", "replace"))
        result = io.BytesIO()
        image.save(result, "PNG", pnginfo=chunks)
    return result.getvalue()


def changed_tar(rng: random.Random, content: bytes) -> bytes:
    result = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as old, tarfile.open(fileobj=result, mode="w:gz") as new:
        for member in old:
            file = old.extractfile(member)
            data = file.read() if file else b""
            data = changed_json(rng, data) if member.name.endswith(".json") else changed_bytes(rng, data)
            member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    return result.getvalue()


def changed(rng: random.Random, name: str, content: bytes) -> bytes:
    """A file's content after one change, which knows its form seven times of ten."""
    kinds: dict[str, Callable[[random.Random, bytes], bytes]] = {
        ".json": changed_json,
        ".toml": changed_toml,
        ".safetensors": changed_header,
        ".tgz": changed_tar,
    }
    suffix = Path(name).suffix
    if content.startswith(b"PK"):
        kinds[suffix] = changed_archive
    if b"tEXtminisd" in content:
        kinds[suffix] = changed_stored
    if suffix in kinds and rng.random() < 0.7:
        return kinds[suffix](rng, content)
    if rng.random() < 0.02:
        return b""
    return changed_bytes(rng, content)


# Cases


class Cases:
    """The cases of a reader, in a folder of their own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.reader, self.folder = name, READERS[name], folder
        folder.mkdir()
        self.reader.make(folder)
        self.files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.reader.read(folder)  # whole, it is read
        self.aims = [path for path in self.files if self.reader.aim in str(path.relative_to(folder))]

    def attempt(self, number: int) -> str | None:
        """Runs a case; what it raised that users should not see, or None."""
        rng = random.Random(f"{self.name} {number}")
        chosen = {rng.choice(self.aims)} | ({rng.choice(self.aims)} if rng.random() < 0.1 else set())
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in self.files:
                path.unlink()
        for path, content in self.files.items():
            data = changed(rng, path.name, content) if path in chosen else content
            if (
                path in chosen
                or not path.is_file()
                or path.stat().st_size != len(content)
                or self.name == "run folder"
            ):
                path.unlink(missing_ok=True)  # a model may still have the old one mapped
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.reader.read(self.folder)
        except InputError as error:
            if "\n" in str(error) or "more memory than" in str(error):
                return f"says {str(error)[:300]!r}"
        except Exception:
            lines = traceback.format_exc().strip().split("\n")
            place = [line.strip() for line in lines if "stable_diffusion/" in line]
            return (
                f"{lines[-1][:200]} at {re.sub('.*stable_diffusion/', '', place[-1]) if place else lines[-3]}"
            )
        finally:
            for path in chosen:
                path.unlink(missing_ok=True)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.files[path])
        return None


def work(name: str, first: int, last: int) -> None:
    """Runs cases in this process, whose end and whose memory tell the rest."""
    import resource

    with tempfile.TemporaryDirectory() as folder:
        cases = Cases(name, Path(folder, "cases"))
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * LIMIT, mapped + 3 * LIMIT))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in range(first, last):
            print(f"start {number}", flush=True)
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # their signals end the process
            signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
            found = cases.attempt(number)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            if found:
                print(f"traceback {number}: {found}", flush=True)
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > LIMIT:
                print(f"memory {number}", flush=True)
                return


def fuzz(name: str, count: int) -> list[str]:
    """What went wrong in the first cases of a reader."""
    found, number = [], 0
    while number < count:
        command = [sys.executable, "-m", "tests.test_fuzz", name, str(number), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        started = [int(line.split()[1]) for line in lines if line.startswith("start ")]
        if not started:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        found += [f"{name}, {line}" for line in lines if line.startswith(("traceback ", "memory "))]
        number = started[-1] + 1
        if done.returncode:
            ended = -done.returncode
            kind = "hang" if ended in (signal.SIGPROF, signal.SIGALRM) else f"crash ({ended})"
            found.append(f"{name}, {kind} {started[-1]}: {done.stderr[-300:]}")
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in READERS if name != "run folder"])
def test_a_few_damaged_files_end_as_one_sentence(tmp_path: Path, name: str) -> None:
    cases = Cases(name, tmp_path / "cases")
    found = [(number, cases.attempt(number)) for number in range(round(12 * READERS[name].part))]
    assert not [each for each in found if each[1]]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and time as Linux has them")
@pytest.mark.parametrize("name", READERS)
def test_no_damaged_file_crashes_hangs_or_fills_the_memory(name: str) -> None:
    assert fuzz(name, round(int(os.environ.get("FUZZ_CASES", "400")) * READERS[name].part)) == []


def main() -> None:
    if len(sys.argv) == 4:
        work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    elif len(sys.argv) == 3:
        with tempfile.TemporaryDirectory() as folder:
            print(Cases(sys.argv[1], Path(folder, "cases")).attempt(int(sys.argv[2])))
    else:
        total, kinds = 0, Counter[str]()
        for name, reader in READERS.items():
            count, began = max(1, round(int(sys.argv[1]) * reader.part)), time.monotonic()
            found = fuzz(name, count)
            total += count
            kinds.update(line.removeprefix(f"{name}, ").split()[0] for line in found)
            print(
                f"{name}: {count} cases, {len(found)} findings, {time.monotonic() - began:.0f} s", flush=True
            )
            for line in found:
                print(f"  {line}", flush=True)
        print(
            f"{total} cases: "
            + ", ".join(f"{kinds[k]} {k}" for k in ("traceback", "crash", "hang", "memory"))
        )


if __name__ == "__main__":
    main()
