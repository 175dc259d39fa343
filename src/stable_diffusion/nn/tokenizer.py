"""Prompts to token ids, equal to the published CLIP and BERT tokenizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor

from stable_diffusion.errors import InputError

T = TypeVar("T")

# What CLIP's byte-pair encoding takes for words: special tokens (which get here only when typed in capitals),
# contractions, runs of letters, single digits, runs of other characters.
CLIP_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

SPECIAL = {  # begin, end, padding, and others that a text may contain
    "clip": ("<|startoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "bert": ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]"),
}
FILES = {"clip": ("vocab.json", "merges.txt"), "bert": ("vocab.txt",)}
"""A vocabulary; ``tokenizer.json`` may stand for it."""
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
"""The second takes precedence: in it 2.x pads with "!"."""
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenBatch(NamedTuple):
    """Token ids of a batch of texts, all of the same length."""

    input_ids: Int[Tensor, "b n"]
    attention_mask: Bool[Tensor, "b n"]
    """True at real tokens, begin and end included; False at padding."""
    cut: list[str]
    """What was cut off the end of each text; empty where all of it fitted."""


class Tokenizer:
    """A text encoder's tokenizer, read from the files of a published tokenizer folder.

    Args:
        folder: has ``vocab.json`` and ``merges.txt`` (CLIP), ``vocab.txt`` (BERT), or ``tokenizer.json``.
        architecture: which of the two it is.
        context_length: tokens that texts are padded or truncated to, begin and end included.

    Raises:
        InputError: the folder has none of these files, or damaged ones.
    """

    def __init__(self, folder: Path, architecture: Literal["clip", "bert"], context_length: int) -> None:
        self.folder = folder
        self.context_length = context_length
        build = {"clip": _clip, "bert": _bert}[architecture]
        files = FILES[architecture]
        shared = folder.parent / f"{architecture}-tokenizer"  # packaged: only the special tokens are its own
        own = any((folder / name).is_file() for name in (*files, "tokenizer.json"))
        words = shared if shared.is_dir() and not own else folder
        if all((words / name).is_file() for name in files):
            self.files = [words / name for name in files]
            self._tokenizer = _undamaged(build, words)
        elif (folder / "tokenizer.json").is_file():
            self.files = [folder / "tokenizer.json"]
            self._tokenizer = _undamaged(_from_json, folder)
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
        else:
            raise InputError(f"{folder} has no tokenizer: it needs {' and '.join(files)}, or tokenizer.json")
        self.files += filter(Path.is_file, (folder / name for name in SETTINGS))
        _undamaged(lambda folder: self._add_special(_settings(folder), architecture), folder)
        self._added: dict[int, list[int]] = {}

    def _add_special(self, settings: dict[str, Any], architecture: str) -> None:
        begin, end, default_pad = SPECIAL[architecture][:3]
        pad = _special(settings.get("pad_token", default_pad)).content
        # Those of tokenizer.json.
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        special = _special_tokens(settings, architecture)
        self._tokenizer.add_special_tokens([token for token in special if token.content not in known])
        numbers = self._tokenizer.get_vocab()
        self.begin_id, self.end_id, self.pad_id = (numbers[token] for token in (begin, end, pad))
        self._encode(["a \u16a0"])  # where the token for unknown letters is missing, this shows it

    @property
    def size(self) -> int:
        """Rows that a table of embeddings needs for it: one more than its largest number."""
        return 1 + max(self._tokenizer.get_vocab().values())

    def __call__(self, texts: list[str]) -> TokenBatch:
        """The texts' tokens. A text that is too long keeps its begin and end tokens."""
        room = self.context_length - 2
        rows, cut = [], []
        for text, encoding in zip(texts, self._encode(texts), strict=True):
            found, offsets = self._expanded(encoding)
            rows.append(found[:room])
            dropped = offsets[room:]
            cut.append(text[dropped[0][0] :] if dropped else "")
        return self.batch(rows, cut)

    def batch(self, rows: list[list[int]], cut: list[str]) -> TokenBatch:
        """Rows of ids that the context has room for, with begin, end and padding."""
        ids, mask = [], []
        for row in rows:
            padding = self.context_length - 2 - len(row)
            ids.append([self.begin_id, *row, self.end_id] + [self.pad_id] * padding)
            mask.append([True] * (len(row) + 2) + [False] * padding)
        return TokenBatch(torch.tensor(ids, device="cpu"), torch.tensor(mask, device="cpu"), cut)

    def tokens(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        """Each text's ids, however many, and where in it each begins.

        Those of one character begin together, and so do those of one textual inversion.
        """
        found = [self._expanded(encoding) for encoding in self._encode(texts)]
        return [[(i, start) for i, (start, _) in zip(*pair, strict=True)] for pair in found]

    def add_tokens(self, tokens: dict[str, list[int]]) -> None:
        """Makes each word, in upper or lower case, a token that stands for the ids in its list.

        The ids after the first are also words of their own, under diffusers' names: ``word_1``, ``word_2`` ….
        Raises InputError, and adds nothing, where the vocabulary has one of them already.
        """
        known = self._tokenizer.get_vocab()
        words: dict[str, list[int]] = {}
        for token, ids in tokens.items():
            word = self._tokenizer.normalizer.normalize_str(token)
            new = {word: ids} | {f"{word}_{i}": [ids[i]] for i in range(1, len(ids))}
            if taken := sorted(new.keys() & (known.keys() | words.keys())):
                raise InputError(f"the vocabulary has {taken[0]!r} already: give the embedding another token")
            words |= new
        self._tokenizer.add_tokens([AddedToken(word) for word in words])
        numbers = self._tokenizer.get_vocab()
        self._added |= {numbers[word]: ids for word, ids in words.items()}

    def _expanded(self, encoding: Any) -> tuple[list[int], list[Any]]:
        """An encoding's ids and offsets, with added words replaced by the ids that they stand for."""
        if not self._added:
            return encoding.ids, encoding.offsets
        places = zip(encoding.ids, encoding.offsets, strict=True)
        pairs = [(row, place) for i, place in places for row in self._added.get(i, [i])]
        return [row for row, _ in pairs], [place for _, place in pairs]

    def _encode(self, texts: list[str]) -> list[Any]:
        # A command line can contain bytes that are not text (lone surrogates); each becomes a question mark.
        sound = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        return self._tokenizer.encode_batch(sound, add_special_tokens=False)


def _undamaged(build: Callable[[Path], T], folder: Path) -> T:
    """What `build` reads in a tokenizer's folder. Raises InputError for damaged files."""
    try:
        return build(folder)
    except (OSError, MemoryError):  # the reader of the model says it
        raise
    except Exception as error:  # the tokenizers library raises no narrower class
        reason = str(error).partition("\n")[0]
        message = f"the tokenizer in {folder} is damaged ({reason}): copy or download it again"
        raise InputError(message) from error


def _from_json(folder: Path) -> FastTokenizer:
    return FastTokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))


def _clip(folder: Path) -> FastTokenizer:
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = (line.split(" ") for line in lines if line and not line.startswith("#version"))
    merges = [(first, second) for first, second in pairs]
    if not merges:
        raise ValueError("merges.txt is empty")
    bpe = models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    tokenizer = FastTokenizer(bpe)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    bytes_as_letters = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_as_letters])
    return tokenizer


def _bert(folder: Path) -> FastTokenizer:
    # Only a line feed ends a word: multilingual lists contain characters that splitlines takes for line ends.
    words = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    tokenizer = FastTokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    """The folder's special tokens."""
    settings: dict[str, Any] = {}
    for name in SETTINGS:
        if (path := folder / name).is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            settings |= {key: value for key, value in found.items() if value is not None}
    return settings


def _special_tokens(settings: dict[str, Any], architecture: str) -> list[AddedToken]:
    """The special tokens; published folders say which of them are recognised in capitals too."""
    named = [settings[role] for role in ROLES if role in settings]
    tokens = {token.content: token for token in map(_special, [*SPECIAL[architecture], *named])}
    for token in map(_special, settings.get("added_tokens_decoder", {}).values()):
        if token.content in tokens:
            tokens[token.content] = token
    return list(tokens.values())


def _special(token: str | dict[str, Any]) -> AddedToken:
    flags = {"content": token} if isinstance(token, str) else token
    known = ("content", "single_word", "lstrip", "rstrip", "normalized")
    return AddedToken(**{key: flags[key] for key in known if key in flags}, special=True)
