"""Models under a name of the Hugging Face hub: from its cache on this machine, else from the network."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path, PurePosixPath

from stable_diffusion.checkpoints.diffusers.weights import WEIGHTS, choose_weights
from stable_diffusion.errors import InputError
from stable_diffusion.files import exists, tidy

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

SHARD = re.compile(r"(.*-)\d+-of-(\d+)(\..*)")

INDICES = ("model_index.json", "config.json")

PARTS = re.compile(r"(unet|vae|text_encoder(_\d+)?|text_projection|tokenizer(_\d+)?|scheduler)")


def find(path: str | Path, *, variant: str | None = None) -> Path:
    """`path`, or where nothing is there, the folder of the hub model of that name, ``owner/name``.

    A name is a text: a ``Path``, and a text that begins with ``./``, is never one.

    Raises:
        InputError: see ``fetch``.
    """
    tidy(Path(path))  # a process was killed, perhaps, as it replaced the model
    if exists(Path(path)):
        return Path(path)
    if not isinstance(path, str) or NAME.fullmatch(path) is None:
        raise InputError(
            f"{path} does not exist: give a model folder, a file of weights, or a hub name (owner/name)"
        )
    return fetch(path, variant=variant)


def stored_name(path: str | Path) -> str:
    """The text to store for `path`: with ``./`` where something is here that could be taken for a hub name."""
    return f"./{path}" if NAME.fullmatch(str(path)) and Path(path).exists() else str(path)


def fetch(name: str, *, variant: str | None = None) -> Path:
    """The folder of a hub model on this machine, downloaded where the cache does not have it whole.

    Only what is read is downloaded: configurations, tokenizers and one file of weights a part. The network is not
    asked where there is a folder of the owner's name: then `name` is a mistyped path.

    Raises:
        InputError: neither cache nor network has it, or the package huggingface_hub is not installed.
    """
    absent = f"{name} does not exist: give a model folder or a file of weights"
    try:
        from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
        from huggingface_hub.utils import HfHubHTTPError  # type: ignore[attr-defined]
    except ImportError:
        raise InputError(
            f"{absent}; as a name of the Hugging Face hub it needs pip install 'mini-stable-diffusion[hub]'"
        ) from None
    owner = name.partition("/")[0]
    mistyped = Path(owner).exists()
    # The bases: its HTTP library's errors, and the library is another one in other versions.
    failures: tuple[type[Exception], ...] = (OSError, ValueError, ImportError, *HfHubHTTPError.__bases__)
    try:
        for index in INDICES:
            found = try_to_load_from_cache(name, index)
            if isinstance(found, str):
                cached = Path(found).parent
                names = [path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()]
                if is_whole(names, variant):
                    return cached
        if not mistyped:
            # One request that is not repeated: other requests of its client are, five times in 23 seconds.
            listed = HfApi().model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT).siblings or []
            if wanted := needed([file.rfilename for file in listed], variant):
                return Path(snapshot_download(name, allow_patterns=wanted))
    except failures as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__
        raise InputError(
            f"{absent}; as a name of the Hugging Face hub it is not whole in the cache, and the network did not give"
            f" it ({reason})"
        ) from None
    if mistyped:
        raise InputError(
            f"{absent}; it is not in the cache of the Hugging Face hub, which is not asked for it because {owner} is"
            " a folder here"
        )
    raise InputError(f"the hub's {name} is not a model folder: download a file and give its path")


def needed(names: list[str], variant: str | None = None) -> list[str]:
    """Of the files of a hub model, those that are read; none where it is not a model folder."""
    tops = [name for name in names if name in (*INDICES, "README.md")]
    if not set(INDICES) & set(tops):
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
