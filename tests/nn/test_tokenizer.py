"""The tokenizers: equal to transformers' on texts of many scripts; and which words did not fit."""

from __future__ import annotations

import functools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import stable_diffusion
from stable_diffusion.errors import InputError
from stable_diffusion.nn.tokenizer import Tokenizer

from .reference import quietly

WEIGHTS = Path(stable_diffusion.__file__).parent / "weights"
CLIP, BERT = WEIGHTS / "clip-tokenizer", WEIGHTS / "all-MiniLM-L6-v2"

# fmt: off
RANGES = [  # scripts, as ranges of code points
    *[(0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x17F), (0x1E00, 0x1EFF)],  # Latin
    *[(0x370, 0x3FF), (0x400, 0x4FF), (0x530, 0x58F), (0x10A0, 0x10FF)],  # Greek, Cyrillic, Armenian, Georgian
    *[(0x5D0, 0x5EA), (0x591, 0x5C7), (0x620, 0x6D3)],  # Hebrew, its points, Arabic
    *[(0x900, 0x97F), (0x980, 0x9FF), (0xB80, 0xBFF), (0xE01, 0xE5B), (0x1780, 0x17DD)],  # South and South-East Asia
    *[(0x3041, 0x30FF), (0x4E00, 0x9FFF), (0x20000, 0x20100), (0xAC00, 0xD7A3), (0x1100, 0x11FF)],  # East Asia
    *[(0x1200, 0x137C), (0x13A0, 0x13FD), (0x10330, 0x1034A), (0x1D400, 0x1D7FF)],  # Ethiopic, Cherokee, Gothic, maths
    *[(0x1F300, 0x1F64F), (0x1F900, 0x1F9FF), (0x1F1E6, 0x1F1FF), (0x2600, 0x27BF)],  # emoji, flags, signs
    *[(0x300, 0x36F), (0x21, 0x7E), (0x2010, 0x2060), (0x20A0, 0x20BF), (0xFF01, 0xFFEE)],  # marks, signs, widths
    *[(0x30, 0x39), (0x660, 0x669), (0x2160, 0x2188), (0xBC, 0xBE)],  # numbers
    *[(0x0, 0x20), (0x7F, 0xA0), (0x2000, 0x200F), (0xE000, 0xE010), (0xFFF0, 0xFFFF)],  # controls, private
]
PIECES = [
    *["I'm", "don't", "we'll", "she's", "they've", "I'd", "you're", "O'Neill's", "'s", "DON'T", "it’s", "'", "''s"],
    *["a", "photo", "of", "PHOTOGRAPH", "astronaut", "riding", "naïve", "Straße", "İstanbul", "ﬁne", "ǅ", "Σίσυφος"],
    *["8k", "1,000.50", "3.14159", "2nd", "x²", "½", "(masterpiece:1.2)", "[red|blue]", "--ar", "#tag", "@me", "a_b"],
    *["👩‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇩🇪", "❤️", "e\u0301", "A\u030a\u0327", "\u1112\u1161\u11ab"],
    *["नमस्ते", "ประเทศไทย", "北京", "한국어", "カﾅ"],
    *["<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "x<|endoftext|>y", "<|endoftext", "[SEP]", "[CLS]"],
    *["[MASK]", "<|StartOfText|>", "<|ENDOFTEXT|>…", "[PAD]"],
    *[ "[UNK]", "[sep]", "x[SEP]y", "[ MASK ]", "##ing", "</w>", "!", "!!!", "wow!", "! !", "?!", "...", "…"],
    *["pneumonoultramicroscopicsilicovolcanoconiosis", "a" * 99, "b" * 100, "c" * 101, "z" * 300, "日" * 120, "-" * 60],
    *["http://example.com/?q=1&r=%20", "C:\\dir", "\ufeff", "\u200b", "\u00ad", "\x00", "\ufffd", "\x07", "&amp;"],
]
SPACES = [" ", " ", " ", "", "  ", "\t", "\n", "\r\n", " \n ", "\u00a0", "\u3000", "\u2003", "\u2028", "\x0b", "\x85"]
# fmt: on


@functools.cache
def texts() -> list[str]:
    """1,000 texts: the pieces, words of one script, and mixtures of both; the same ones every time."""
    rng = random.Random(0)

    def word(low: int, high: int) -> str:
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 9)))

    def joined(words: list[str]) -> str:
        return "".join(word + rng.choice(SPACES) for word in words)

    result = ["", " ", "\n\t ", *PIECES]
    for low, high in RANGES:
        result += [joined([word(low, high) for _ in range(rng.randint(1, 12))]) for _ in range(6)]
    while len(result) < 1000:
        count = rng.choice([2, 5, 12, 40])
        result.append(
            joined([rng.choice([rng.choice(PIECES), word(*rng.choice(RANGES))]) for _ in range(count)])
        )
    return result


def published(target: Path, pad: str) -> Path:
    """A copy of the CLIP tokenizer with the settings files that published folders have."""
    target.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(CLIP / name, target)
    token = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    end = {"content": "<|endoftext|>", **token}
    begin = {"content": "<|startoftext|>", **token}
    special = {"bos_token": begin, "eos_token": end, "pad_token": pad, "unk_token": end}
    config = {
        **special,
        "pad_token": "<|endoftext|>",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    (target / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (target / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return target


def transformers_tokenizer(architecture: str, folder: Path) -> Any:
    kind = {"clip": transformers.CLIPTokenizer, "bert": transformers.BertTokenizer}[architecture]
    return quietly(kind.from_pretrained, folder)


def assert_equal(architecture: str, folder: Path, length: int, reference: Any = None) -> None:
    """Our token numbers and masks are transformers' on all texts."""
    ours = Tokenizer(folder, architecture, length)
    batch = ours(texts())
    reference = reference or transformers_tokenizer(architecture, folder)
    expected = reference(
        texts(), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    different = [
        t for t, a, b in zip(texts(), batch.input_ids, expected["input_ids"], strict=True) if not a.equal(b)
    ]
    assert different == []
    assert batch.input_ids.shape == (1000, length) and batch.input_ids.dtype == torch.int64
    assert batch.attention_mask.dtype == torch.bool
    assert torch.equal(batch.attention_mask, expected["attention_mask"].bool())


def test_texts_are_many_and_varied() -> None:
    """The texts are 1,000, some longer than the context, of more than 3,000 different characters."""
    assert len(texts()) == 1000 and len(set(texts())) > 950
    cut = Tokenizer(CLIP, "clip", 77)(texts()).cut
    assert 100 < sum(map(bool, cut)) < 900
    assert len(set("".join(texts()))) > 3000


@pytest.mark.parametrize("length", [77, 32])
@pytest.mark.parametrize(("architecture", "folder"), [("clip", CLIP), ("bert", BERT)], ids=["clip", "bert"])
def test_equals_transformers(architecture: str, folder: Path, length: int) -> None:
    """Parity: token numbers and masks, padded and cut, on 1,000 texts of many scripts."""
    assert_equal(architecture, folder, length)


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"], ids=["sd15", "sd21"])
def test_published_folders_equal_transformers(pad: str, tmp_path: Path) -> None:
    """Parity: folders of Stable Diffusion 1.x and 2.x; 2.x pads with "!" whatever tokenizer_config.json says."""
    folder = published(tmp_path / "tokenizer", pad)
    assert_equal("clip", folder, 77)
    ids = Tokenizer(folder, "clip", 77)(["a cat", "wow!"]).input_ids
    assert ids[0, :4].tolist() == [49406, 320, 2368, 49407]
    assert ids[0, 4:].unique().tolist() == [0 if pad == "!" else 49407]
    assert (0 in ids[1, :4]) == (pad == "!")


@pytest.mark.parametrize(("architecture", "source"), [("clip", CLIP), ("bert", BERT)], ids=["clip", "bert"])
def test_tokenizer_json_alone(architecture: str, source: Path, tmp_path: Path) -> None:
    """Parity: what today's transformers saves, tokenizer.json with its padding and cutting, gives the same tokens."""
    reference = transformers_tokenizer(architecture, source)
    reference(["a"], padding="max_length", truncation=True, max_length=9)  # leaves both switched on
    reference.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]
    ours = Tokenizer(tmp_path, architecture, 40)
    original = Tokenizer(source, architecture, 40)
    assert torch.equal(ours(texts()).input_ids, original(texts()).input_ids)
    assert (ours.begin_id, ours.end_id, ours.pad_id) == (original.begin_id, original.end_id, original.pad_id)
    assert_equal(architecture, tmp_path, 40, transformers_tokenizer(architecture, source))


def test_saved_by_transformers_4(tmp_path: Path) -> None:
    """Parity: its tokenizer_config.json says again, and with priority, how special tokens are recognised."""
    folder = published(tmp_path / "tokenizer", "<|endoftext|>")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    roles = ("bos_token", "eos_token", "unk_token")
    begin, end, _ = (config[role] | {"special": True} for role in roles)
    config |= {role: config[role]["content"] for role in roles}
    config["added_tokens_decoder"] = {"49406": begin, "49407": end}
    path.write_text(json.dumps(config), encoding="utf-8")
    assert_equal("clip", folder, 77)


def test_saved_by_transformers(tmp_path: Path) -> None:
    """Parity: a 2.x folder that today's transformers saved anew still pads with "!"."""
    reference = transformers_tokenizer("clip", published(tmp_path / "old", "!"))
    reference.save_pretrained(tmp_path / "new")
    assert Tokenizer(tmp_path / "new", "clip", 77).pad_id == 0
    assert_equal("clip", tmp_path / "new", 77, reference)


@pytest.mark.parametrize(("architecture", "folder"), [("clip", CLIP), ("bert", BERT)], ids=["clip", "bert"])
def test_cut_names_the_words_that_did_not_fit(architecture: str, folder: Path) -> None:
    """Contract: exactly the rest of the text as it was typed, nothing where all of it fitted."""
    tokenizer = Tokenizer(folder, architecture, 8)
    fits, rest = "A red Apple on the table", "Under a Blue sky,  café"
    batch = tokenizer([fits, f"{fits} {rest}", "", f"  {fits}\t\n{rest}", "the " * 6 + "end"])
    assert batch.cut == ["", rest, "", rest, "end"]
    assert torch.equal(batch.input_ids[0], batch.input_ids[1])
    assert batch.input_ids[1, -1] == tokenizer.end_id and batch.attention_mask[1].all()


@pytest.mark.parametrize(("architecture", "folder"), [("clip", CLIP), ("bert", BERT)], ids=["clip", "bert"])
def test_cut_and_kept_make_the_text(architecture: str, folder: Path) -> None:
    """Law: every text ends in its end token; what is kept up to a space has the tokens that the text begins with."""
    tokenizer = Tokenizer(folder, architecture, 32)
    batch, compared = tokenizer(texts()), 0
    for text, ids, mask, cut in zip(texts(), batch.input_ids, batch.attention_mask, batch.cut, strict=True):
        assert text.endswith(cut)
        kept = text[: len(text) - len(cut)]
        assert ids[mask][-1] == tokenizer.end_id
        if cut:
            assert mask.all()
            if kept.endswith(" "):
                compared += 1
                alone = tokenizer([kept])
                length = int(alone.attention_mask.sum()) - 1  # without its end token
                assert torch.equal(alone.input_ids[0, :length], ids[:length]), text
    assert compared > 15


def test_begin_end_and_padding() -> None:
    """Facts: the published numbers, and an empty text."""
    clip, bert = Tokenizer(CLIP, "clip", 77), Tokenizer(BERT, "bert", 32)
    assert (clip.begin_id, clip.end_id, clip.pad_id) == (49406, 49407, 49407)
    assert (bert.begin_id, bert.end_id, bert.pad_id) == (101, 102, 0)
    assert clip([""]).input_ids[0].tolist() == [49406] + [49407] * 76
    assert bert([""]).input_ids[0].tolist() == [101, 102] + [0] * 30
    assert bert([""]).attention_mask[0].tolist() == [True] * 2 + [False] * 30


def test_files_are_what_was_read(tmp_path: Path) -> None:
    """Contract: `files` names what a saved model must carry."""
    assert [path.name for path in Tokenizer(CLIP, "clip", 77).files] == ["vocab.json", "merges.txt"]
    assert [path.name for path in Tokenizer(BERT, "bert", 32).files] == ["vocab.txt"]
    folder = published(tmp_path / "tokenizer", "!")
    assert {path.name for path in Tokenizer(folder, "clip", 77).files} == {
        path.name for path in folder.iterdir()
    }
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Tokenizer(folder, "clip", 77).files:
        shutil.copy(path, copy)
    assert Tokenizer(copy, "clip", 77).pad_id == 0


@pytest.mark.parametrize(
    ("architecture", "present", "missing"),
    [
        ("clip", [], "vocab.json and merges.txt"),
        ("clip", ["vocab.json"], "merges.txt"),
        ("bert", [], "vocab.txt"),
    ],
)
def test_missing_files(architecture: str, present: list[str], missing: str, tmp_path: Path) -> None:
    """Bad input: one sentence with the folder and the files that it needs."""
    for name in present:
        shutil.copy(CLIP / name, tmp_path)
    with pytest.raises(InputError, match=missing) as raised:
        Tokenizer(tmp_path, architecture, 77)
    assert str(tmp_path) in str(raised.value)
    with pytest.raises(InputError):
        Tokenizer(tmp_path / "nowhere", architecture, 77)


def test_vocabulary_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    """Parity: a word list may hold characters that Unicode calls line ends, as a multilingual one does."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "\u2028", "\x85", "b", "##c"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8", newline="\n")
    assert Tokenizer(tmp_path, "bert", 8)(["a b bc"]).input_ids[0, :6].tolist() == [2, 5, 8, 8, 9, 3]
    assert_equal("bert", tmp_path, 16)


def small_clip(folder: Path, **changes: Any) -> Path:
    """A folder whose files are whole, but for the changes."""
    words = ["a", "a</w>", "aa</w>", "<|startoftext|>", "<|endoftext|>"]
    files: dict[str, Any] = {"vocab.json": {word: number for number, word in enumerate(words)}}
    files |= {"merges.txt": "#version: 0.2\na a</w>", "tokenizer_config.json": {"pad_token": "<|endoftext|>"}}
    for name, content in (
        files | {name.replace("_json", ".json"): value for name, value in changes.items()}
    ).items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_json": {"a": 0, "a</w>": 1, "aa</w>": 2, "<|startoftext|>": 3}},
        {"vocab_json": {"a": "x"}},
        {"vocab_json": []},
        {"tokenizer_config_json": 7},
        {"tokenizer_config_json": {"pad_token": 7}},
        {"tokenizer_config_json": {"bos_token": {"content": []}}},
        {"tokenizer_config_json": {"added_tokens_decoder": [1]}},
        {"tokenizer_config_json": "[" * 100_000},
    ],
)
def test_a_damaged_vocabulary_or_its_settings_are_one_sentence(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert Tokenizer(small_clip(tmp_path), "clip", 8)(["a"]).input_ids[0, 0] == 3
    with pytest.raises(InputError, match=f"the tokenizer in {tmp_path} is damaged") as caught:
        Tokenizer(small_clip(tmp_path, **changes), "clip", 8)
    assert "\n" not in str(caught.value)


def test_a_word_list_without_the_token_for_unknown_words(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[CLS]\n[SEP]\n[PAD]\na\n")
    with pytest.raises(InputError, match="is damaged"):
        Tokenizer(tmp_path, "bert", 8)
