"""Prompts to token numbers, equal to the published CLIP and BERT tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from stable_diffusion.errors import InputError

# The words of CLIP's byte-pair encoding: contractions, runs of letters, single digits, runs of other signs.
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class TokenBatch(NamedTuple):
    """Token numbers of a batch of texts, all of the same length."""

    input_ids: Int[Tensor, "b n"]
    attention_mask: Bool[Tensor, "b n"]
    """True at real tokens, begin and end included; False at padding."""
    cut: list[str]
    """The end of each text that did not fit; empty where all of it did."""


class Tokenizer:
    """A text encoder's tokenizer, read from the files of a published tokenizer folder.

    Args:
        folder: has ``vocab.json`` and ``merges.txt`` (CLIP), ``vocab.txt`` (BERT), or ``tokenizer.json``.
        architecture: which of the two it is.
        context_length: tokens that texts are padded or cut to, begin and end included.

    Raises:
        InputError: the folder has none of these files.
    """

    def __init__(self, folder: Path, architecture: Literal["clip", "bert"], context_length: int) -> None:
        self.folder = folder
        self.context_length = context_length
        build = {"clip": _clip, "bert": _bert}[architecture]
        files = {"clip": ("vocab.json", "merges.txt"), "bert": ("vocab.txt",)}[architecture]
        if all((folder / name).is_file() for name in files):
            self.files = [folder / name for name in files]
            self._tokenizer = build(folder)
        elif (folder / "tokenizer.json").is_file():
            self.files = [folder / "tokenizer.json"]
            self._tokenizer = FastTokenizer.from_file(str(folder / "tokenizer.json"))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        else:
            raise InputError(
                f"{folder} has no tokenizer: it needs {' and '.join(files)}, or tokenizer.json"
            )
        self.files += [
            path for name in ("special_tokens_map.json", "tokenizer_config.json") if (path := folder / name).is_file()
        ]
        begin, end, default_pad = {
            "clip": ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>"),
            "bert": ("[CLS]", "[SEP]", "[PAD]"),
        }[architecture]
        pad = _pad_token(folder) or default_pad
        self._tokenizer.add_special_tokens([AddedToken(pad, special=True)])
        self.begin_id, self.end_id, self.pad_id = map(self._tokenizer.token_to_id, (begin, end, pad))

    def __call__(self, texts: list[str]) -> TokenBatch:
        """The texts' tokens. A text that is too long keeps its begin and end tokens."""
        room = self.context_length - 2
        ids, mask, cut = [], [], []
        for text, encoding in zip(texts, self._encode(texts), strict=True):
            kept = encoding.ids[:room]
            dropped = encoding.offsets[room:]
            cut.append(text[dropped[0][0] :] if dropped else "")
            padding = room - len(kept)
            ids.append([self.begin_id, *kept, self.end_id] + [self.pad_id] * padding)
            mask.append([True] * (len(kept) + 2) + [False] * padding)
        return TokenBatch(torch.tensor(ids), torch.tensor(mask), cut)

    def _encode(self, texts: list[str]) -> list:
        return self._tokenizer.encode_batch(texts, add_special_tokens=False)


def _clip(folder: Path) -> FastTokenizer:
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = FastTokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            continuing_subword_prefix="",
            end_of_word_suffix="</w>",
            fuse_unk=False,
            unk_token="<|endoftext|>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return tokenizer


def _bert(folder: Path) -> FastTokenizer:
    words = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = FastTokenizer(
        models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    return tokenizer


def _pad_token(folder: Path) -> str | None:
    """The padding that the folder names: Stable Diffusion 2.x pads with "!", and its special_tokens_map.json rules."""
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if path.is_file():
            token = json.loads(path.read_text(encoding="utf-8")).get("pad_token")
            if token is not None:
                return str(token["content"] if isinstance(token, dict) else token)
    return None
