"""Models under a name of the Hugging Face hub: from its cache on this machine, else from the network."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path, PurePosixPath

from stable_diffusion.checkpoints.diffusers.weights import WEIGHTS, choose_weights
from stable_diffusion.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

SHARD = re.compile(r"(.*-)\d+-of-(\d+)(\..*)")

PARTS = re.compile(r"(unet|vae|text_encoder(_\d+)?|text_projection|tokenizer(_\d+)?|scheduler)")


def is_name(path: str | Path) -> bool:
    """Whether something that is not a path here can be a hub name, ``owner/name``."""
    name = path.as_posix() if isinstance(path, Path) else path
    return NAME.fullmatch(name) is not None and not Path(name.partition("/")[0]).exists()


def fetch(name: str, *, variant: str | None = None) -> Path:
    """The folder of a hub model on this machine, downloaded where the cache does not have it whole.

    Only what is read is downloaded: configurations, tokenizers and one file of weights a part.

    Raises:
        InputError: neither cache nor network has it, or the package huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        raise InputError(
            f"{name} does not exist: give a model folder; as a name of the Hugging Face hub it needs"
            " pip install 'mini-stable-diffusion[hub]'"
        ) from None
    # Its failures: of the network (httpx's, before version 1 requests'), of the disk, and of names.
    network = tuple(
        error
        for name in ("httpx", "httpx2")
        if importlib.util.find_spec(name)
        and (error := getattr(importlib.import_module(name), "HTTPError", None))
    )
    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        names = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
        if is_whole(names, variant):
            return cached
    except (OSError, ValueError, *network):
        pass
    try:
        wanted = needed(HfApi().list_repo_files(name), variant)
        if not wanted:
            raise InputError(f"the hub's {name} is not a model folder: download a file and give its path")
        return Path(snapshot_download(name, allow_patterns=wanted))
    except InputError:
        raise
    except (OSError, ValueError, *network) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise InputError(
            f"{name} does not exist: give a model folder; as a name of the Hugging Face hub it is not whole in the"
            f" cache, and the network did not give it ({reason})"
        ) from None


def needed(names: list[str], variant: str | None = None) -> list[str]:
    """Of the files of a hub model, those that are read; none where it is not a model folder."""
    tops = [name for name in names if name in ("model_index.json", "config.json", "README.md")]
    if not {"model_index.json", "config.json"} & set(tops):
        return []
    folders: dict[str, list[str]] = {}
    for path in map(PurePosixPath, names):
        if len(path.parts) == 2 and PARTS.fullmatch(path.parts[0]):
            folders.setdefault(path.parts[0], []).append(path.name)
    wanted = tops
    for folder, files in sorted(folders.items()):
        stem = WEIGHTS.get(re.sub(r"_\d+$", "", folder), "model")
        kept = choose_weights(files, stem, variant)
        kept += [file for file in files if file.endswith(("config.json", ".txt")) or file in TOKENIZER]
        wanted += [f"{folder}/{file}" for file in sorted(set(kept))]
    return wanted


TOKENIZER = ("vocab.json", "tokenizer.json", "special_tokens_map.json")


def is_whole(names: list[str], variant: str | None = None) -> bool:
    """Whether the files of a snapshot are enough to try: an index, and weights of U-Net and autoencoder."""
    wanted = needed(names, variant)
    whole = all(any(name.startswith(f"{part}/diffusion_") for name in wanted) for part in ("unet", "vae"))
    asked = variant is None or any(f".{variant}" in name for name in wanted)
    shards = Counter((m[1], m[3], int(m[2])) for m in map(SHARD.fullmatch, wanted) if m)
    indices = sum(".index." in name for name in wanted)
    complete = len(shards) == indices and all(count == total for (*_, total), count in shards.items())
    return whole and asked and complete
