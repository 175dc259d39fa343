"""Weighted and long prompts: the formula in float64, contexts as if read alone, and nothing changed by the weight 1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stable_diffusion.config import TextEncoderConfig
from stable_diffusion.nn import weighted
from stable_diffusion.nn.text import PromptEmbeds, PromptEncoder
from stable_diffusion.nn.weighted import MOST, Prompt, Token, chunks, emphasised, tokenize

from .test_text import BERT, CLIP, prompt_encoder
from .test_tokenizer import published

SHORT = replace(CLIP, context_length=16)
ENCODERS = {
    "clip": ((CLIP,), 24),
    "bert": ((BERT,), 24),
    "both": ((SHORT, BERT), 16),
    "pooled alone": ((SHORT,), 0),
}
TEXTS = ["a red apple", "", "a very small picture of a green house"]
RED: Prompt = [[("a ", 1.0), ("red", 1.3), (" apple ", 1.0), ("in the snow", 0.5)]]


def encoder(kind: str) -> PromptEncoder:
    configs, width = ENCODERS[kind]
    return prompt_encoder(*configs, width=width)


@torch.no_grad()
def embeds(encoder: PromptEncoder, *prompts: Prompt) -> PromptEmbeds:
    return weighted.embed(encoder, tokenize(encoder, prompts), len(prompts))


@torch.no_grad()
def plain(encoder: PromptEncoder, *texts: str) -> PromptEmbeds:
    return encoder(list(texts))


def off(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ENCODERS)
def test_the_weight_1_is_bit_for_bit_plain(kind: str, dtype: torch.dtype) -> None:
    network = encoder(kind).to(dtype)
    found = embeds(network, *([[(text, 1.0)]] if text else [[]] for text in TEXTS))
    for ours, theirs in zip(found, plain(network, *TEXTS), strict=True):
        assert (ours is theirs is None) or torch.equal(ours, theirs)


def states(network: PromptEncoder, ids: list[int], config: TextEncoderConfig) -> tuple[Tensor, int]:
    """One context's states, straight from the transformer, and how many of its tokens are real."""
    tokenizer = network.tokenizers[0]
    padding = [tokenizer.pad_id] * (config.context_length - 2 - len(ids))
    row = torch.tensor([[tokenizer.begin_id, *ids, tokenizer.end_id, *padding]])
    mask = None if config.reads_padding else torch.arange(row.shape[1])[None] < len(ids) + 2
    with torch.no_grad():
        return network.encoders[0](row, mask)[0], len(ids) + 2


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("config", [CLIP, BERT], ids=["clip", "bert"])
def test_the_weighted_states_are_the_formulas(config: TextEncoderConfig, centred: bool) -> None:
    """Each piece's tokens by themselves, times its weight, all of them scaled back: to the mean, or the magnitude."""
    network = prompt_encoder(config, width=24)
    norm = [m for m in network.encoders[0].modules() if isinstance(m, torch.nn.LayerNorm)][-1]
    if config is BERT:
        norm = network.encoders[0].encoder.layers[-1].layer_norm2  # type: ignore[union-attr,index,assignment]
    with torch.no_grad():
        norm.bias.sub_(norm.bias.mean() + (0.0 if centred else 0.4))
        if centred:
            norm.weight.fill_(1.0)  # then each state has the mean 0

    pieces = [network.tokenizers[0]([text]) for text, _ in RED[0]]
    ids, weights = [], []
    for batch, (_, weight) in zip(pieces, RED[0], strict=True):
        own = batch.input_ids[0, batch.attention_mask[0]].tolist()[1:-1]
        ids += own
        weights += [weight] * len(own)
    assert len(ids) == 6
    before, count = states(network, ids, config)
    changed = before.clone()
    for place, weight in enumerate(weights, start=1):
        changed[place] *= weight
    real = slice(None) if config.reads_padding else slice(count)
    if centred:
        assert before[real].mean().abs() < 1e-12
        expected = changed * (before[real].abs().mean() / changed[real].abs().mean())
    else:
        expected = changed * (before[real].mean() / changed[real].mean())

    found = embeds(network, RED)
    assert off(found.tokens[0][real], expected[real]) < 1e-12
    if not centred:
        assert torch.allclose(found.tokens[0][real].mean(), before[real].mean(), rtol=1e-12)
    pooled = before[count - 1] if config.reads_padding else expected[real].mean(0)
    assert off(found.pooled[0], pooled) < 1e-12
    assert off(found.tokens[0][real], before[real]) > 0.1, "another result without the weights"


def test_means_are_restored_for_each_context_by_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 8, generator=generator, dtype=torch.float64) + 0.5
    weights = torch.ones(4, 6, dtype=torch.float64)
    weights[0, 2], weights[1, 3], weights[2, :3] = 1.5, -0.5, 0.0
    found = emphasised(x, weights, None)
    assert torch.allclose(found.mean((1, 2)), x.mean((1, 2)), rtol=1e-12)
    assert torch.equal(found[3], x[3]) and not found[2, :3].any()
    for i in range(4):
        assert torch.equal(emphasised(x[i : i + 1], weights[i : i + 1], None)[0], found[i])


def test_a_mean_that_is_an_accident_scales_nothing() -> None:
    """As of the packaged BERT, where the ratio of means is any number, of any sign."""
    x = torch.tensor([[[1.0, -1.0], [0.5, -0.499], [1.0, -1.001], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, True, False]])
    found = emphasised(x, torch.tensor([[1.0, 2.0, 1.0, 1.0]]), mask)
    ratio = found[0, 0, 0] / x[0, 0, 0]
    assert torch.allclose(ratio, torch.tensor(2.5 / 3.0), atol=1e-3)
    flipped = emphasised(x[:, :2] + 0.1, torch.tensor([[-1.0, -1.0]]), None)
    assert torch.allclose(flipped, -x[:, :2] - 0.1), "a mean of another sign turns nothing round"


def test_parts_are_contexts_that_are_read_alone() -> None:
    """The states of two parts are those of two prompts, one after the other; BERT reads on in one context."""
    clip = encoder("clip")
    alone = plain(clip, "a red apple", "a blue house")
    found = embeds(clip, [[("a red apple ", 1.0)], [(" a blue house", 1.0)]])
    assert off(found.tokens, alone.tokens.reshape(1, 154, 24)) < 1e-12 and found.mask is None
    assert off(found.pooled[0], alone.pooled.mean(0)) < 1e-12
    bert = encoder("bert")
    found = embeds(bert, [[("a red apple ", 1.0)], [(" a blue house", 1.0)]])
    assert torch.equal(found.tokens, plain(bert, "a red apple a blue house").tokens)
    both = encoder("both")
    found = embeds(both, [[("a red apple ", 1.0)], [(" a blue house", 1.0)]])
    assert found.tokens.shape == (1, 2 * 16 + 77, 16)
    assert found.mask is not None and found.mask.sum() == 2 * 16 + 8


def test_weights_act_in_the_context_they_stand_in() -> None:
    clip = encoder("clip")
    first, second = (
        [("a ", 1.0), ("red", 1.4), (" apple", 1.0)],
        [("a ", 1.0), ("blue", 0.6), (" house", 1.0)],
    )
    found = embeds(clip, [first, second])
    alone = embeds(clip, [first], [second])
    assert off(found.tokens, alone.tokens.reshape(1, 154, 24)) < 1e-12


def test_a_long_prompt_is_contexts_of_75_tokens() -> None:
    clip = encoder("clip")
    words = ["apple", "house", "red", "green"] * 50
    (batch,) = tokenize(clip, [[[(" ".join(words), 1.0)]]])
    assert batch.input_ids.shape == (1, 3, 77) and batch.cut == [""]
    assert batch.attention_mask.sum(-1).tolist() == [[77, 77, 52]]
    found = embeds(clip, [[(" ".join(words), 1.0)]])
    alone = plain(clip, *(" ".join(words[i : i + 75]) for i in (0, 75, 150)))
    assert off(found.tokens, alone.tokens.reshape(1, 231, 24)) < 1e-12


def test_shorter_prompts_are_padded_with_empty_contexts() -> None:
    clip = encoder("clip")
    longer: Prompt = [[("a house ", 1.0)], [], [("a tree", 1.2)]]
    found = embeds(clip, longer, RED, [[]])
    empty = plain(clip, "").tokens[0]
    assert off(found.tokens[0, 77:154], empty) < 1e-12, "a part without words"
    for i, own in ((1, embeds(clip, RED)), (2, plain(clip, ""))):
        assert off(found.tokens[i], torch.cat([own.tokens[0], empty, empty])) < 1e-12
        assert off(found.pooled[i], own.pooled[0]) < 1e-12


def test_padding_is_the_tokenizers(tmp_path: Path) -> None:
    """Stable Diffusion 2's pads with another token than the end."""
    clip = encoder("clip")
    clip.tokenizers = [type(clip.tokenizers[0])(published(tmp_path / "sd2", "!"), "clip", 77)]
    (batch,) = tokenize(clip, [[[("apple", 1.5)]], [[("a", 1.0)], [("b", 1.0)]]])
    assert batch.input_ids[0, 0, 2:4].tolist() == [49407, 0] and batch.input_ids[0, 1, :3].tolist() == [
        49406,
        49407,
        0,
    ]
    assert batch.weights[0].sum() == 154.5 and batch.weights[0, 0, 1] == 1.5
    assert batch.own.tolist() == [[True, False], [True, True]]


def test_what_bert_has_no_room_for_is_named() -> None:
    short = replace(BERT, context_length=6)
    (batch,) = tokenize(
        prompt_encoder(short, width=24), [[[("a red ", 1.0), ("green", 1.2)], [("apple, blue", 1.0)]], RED]
    )
    assert batch.cut == [", blue", "the snow"]
    assert batch.weights[0, 0].tolist() == [1, 1, 1, 1.2, 1, 1]


def test_more_contexts_than_a_prompt_may_have_are_named() -> None:
    network = prompt_encoder(SHORT, width=24)
    parts: Prompt = [[(f"apple {i}", 1.0)] for i in range(MOST + 2)]
    (batch,) = tokenize(network, [parts])
    assert batch.input_ids.shape == (1, MOST, 16) and batch.cut == [f"apple {MOST} apple {MOST + 1}"]


# Where a chunk ends


def lengths(text: str, room: int, *, joined: tuple[int, ...] = ()) -> list[int]:
    """How long the chunks of tokens are, a letter or a comma each; those joined begin where the one before does."""
    starts: list[int] = []
    for i in range(len(text)):
        starts.append(starts[-1] if i in joined else i)
    tokens = [Token(ord(letter), 1.0, start) for letter, start in zip(text, starts, strict=True)]
    found = list(chunks(tokens, room, ord(",")))
    assert [token for chunk in found for token in chunk] == tokens
    return [len(chunk) for chunk in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [0]),
        ("a" * 75, [75]),
        ("a" * 76, [75, 1]),
        ("a" * 74 + "," + "b" * 9, [75, 9]),
        ("a" * 54 + "," + "b" * 30, [75, 10]),  # a comma that is too far back
        ("a" * 55 + "," + "b" * 30, [56, 30]),
        ("a" * 56 + ",b,c," + "d" * 30, [61, 30]),
        ("a" * 60 + "," + "b" * 14 + ",c", [75, 2]),  # the next token is a comma
        ("a" * 60 + "," + "b" * 80, [61, 75, 5]),
    ],
)
def test_a_chunk_ends_at_a_comma_near_its_end(text: str, expected: list[int]) -> None:
    assert lengths(text, 75) == expected


def test_half_of_a_small_context_may_be_given_up_for_a_comma() -> None:
    assert lengths("aaaaaa," + "b" * 20, 14) == [14, 13]
    assert lengths("aaaaaaa," + "b" * 20, 14) == [8, 14, 6]
    assert lengths("," * 9, 2) == [2, 2, 2, 2, 1]
    assert lengths("abc", 1) == [1, 1, 1]


def test_no_cut_parts_what_begins_together() -> None:
    assert lengths("a" * 20, 14, joined=(13, 14, 15)) == [12, 8]
    assert lengths("a" * 20, 14, joined=tuple(range(1, 20))) == [14, 6]
    assert lengths("a" * 20, 14, joined=tuple(range(13, 20))) == [12, 8]


def test_a_textual_inversion_stays_whole() -> None:
    network = prompt_encoder(SHORT, width=24)
    network.tokenizers = [type(network.tokenizers[0])(network.tokenizers[0].folder, "clip", 16)]
    network.tokenizers[0].add_tokens({"<fox>": [320, 321, 322, 323]})
    (batch,) = tokenize(network, [[[("a b c d e f g h i j k l ", 1.0), ("<fox>", 1.2), (" m", 1.0)]]])
    assert batch.attention_mask.sum(-1).tolist() == [[14, 7]]
    assert batch.input_ids[0, 1, 1:5].tolist() == [320, 321, 322, 323]
    assert batch.weights[0, 1].tolist() == [1, 1.2, 1.2, 1.2, 1.2, *[1] * 11]
