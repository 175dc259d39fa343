"""The text encoders: equal to transformers', the packaged BERT included, and several of them in one prompt encoder."""

from __future__ import annotations

import functools
import operator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import stable_diffusion
from stable_diffusion.config import BERT_BASE, CLIP_H, CLIP_L, CLIP_MINI, MINILM, TextEncoderConfig
from stable_diffusion.errors import InputError
from stable_diffusion.nn import text
from stable_diffusion.nn.text import BERT_NAMES, PromptEmbeds, PromptEncoder, TextEncoder
from stable_diffusion.nn.tokenizer import Tokenizer

from .reference import TOLERANCES, error, quietly, randomise, reference_text

WEIGHTS = Path(stable_diffusion.__file__).parent / "weights"
SMALL = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}
CLIP = replace(CLIP_L, **SMALL)
BERT = replace(BERT_BASE, **SMALL)
IDS = torch.tensor([[7, 320, 2368, 14, 9, 9, 9], [7, 5, 6, 2, 1, 320, 9]])
MASK = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
PROMPTS = ["a red apple", "", "a very small picture of a green house on a hill"]


def renamed(state: dict[str, Tensor], *, back: bool = False) -> dict[str, Tensor]:
    """A state under our names for BERT's published ones, or the other way."""
    result = {}
    for name, tensor in state.items():
        for theirs, ours in reversed(BERT_NAMES) if back else BERT_NAMES:
            name = name.replace(ours, theirs) if back else name.replace(theirs, ours)
        result[name] = tensor
    return result


def encoder_like(reference: nn.Module, config: TextEncoderConfig) -> TextEncoder:
    """Our encoder with the reference's weights, in float64."""
    ours = TextEncoder(config).double().eval()
    state = reference.state_dict()
    ours.load_state_dict(renamed(state) if config.architecture == "bert" else state)
    return ours


@functools.cache
def tokenizer(architecture: str, context_length: int) -> Tokenizer:
    folder = {"clip": "clip-tokenizer", "bert": "all-MiniLM-L6-v2"}[architecture]
    return Tokenizer(WEIGHTS / folder, architecture, context_length)


def prompt_encoder(*configs: TextEncoderConfig, width: int) -> PromptEncoder:
    """A random prompt encoder in float64."""
    tokenizers = [tokenizer(config.architecture, config.context_length) for config in configs]
    return randomise(PromptEncoder(configs, tokenizers, width))


@torch.no_grad()
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_equals_transformers(act: str) -> None:
    """Parity: the hidden states after the final norm, in float64 and float32."""
    config = replace(CLIP, hidden_act=act)
    reference = reference_text(config)
    ours = encoder_like(reference, config)
    assert set(ours.state_dict()) == set(reference.state_dict())
    for dtype, tolerance in TOLERANCES:
        expected = reference.to(dtype)(IDS).last_hidden_state
        assert error(ours.to(dtype)(IDS), expected) < tolerance
    other = replace(config, hidden_act="gelu" if act == "quick_gelu" else "quick_gelu")
    assert error(encoder_like(reference, other).to(dtype)(IDS), expected) > 1e-4


@torch.no_grad()
def test_clip_penultimate_layer() -> None:
    """Parity: skipping a layer gives the state before the last, normed; so does a model saved without that layer."""
    config = replace(CLIP, hidden_act="gelu", skip_last_layers=1)
    reference = reference_text(config)
    hidden = reference(IDS, output_hidden_states=True)
    penultimate = reference.final_layer_norm(hidden.hidden_states[-2])
    ours = encoder_like(reference, config)(IDS)
    assert error(ours, penultimate) < 1e-10
    assert error(ours, hidden.last_hidden_state) > 1e-3
    shorter = replace(config, num_hidden_layers=2, skip_last_layers=0)
    saved_without = TextEncoder(shorter).double()
    saved_without.load_state_dict({k: v for k, v in reference.state_dict().items() if "layers.2." not in k})
    assert error(saved_without(IDS), penultimate) < 1e-10


@torch.no_grad()
def test_bert_equals_transformers() -> None:
    """Parity: the hidden states of real tokens and of padding, with and without a mask, in float64 and float32."""
    reference = reference_text(BERT)
    ours = encoder_like(reference, BERT)
    for dtype, tolerance in TOLERANCES:
        reference.to(dtype), ours.to(dtype)
        masked = ours(IDS, MASK)
        assert error(masked, reference(IDS, attention_mask=MASK.long()).last_hidden_state) < tolerance
        assert error(ours(IDS), reference(IDS).last_hidden_state) < tolerance
        assert error(masked[:1], ours(IDS)[:1]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("mistake", ["clip norm eps", "bert norm eps", "tanh gelu", "not causal"])
def test_planted_mistakes_are_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity can fail: each of these mistakes moves the hidden states by far more than the tolerance."""
    config = BERT if mistake in ("bert norm eps", "tanh gelu") else CLIP
    reference = reference_text(config)
    expected = reference(IDS).last_hidden_state
    if "eps" in mistake:
        config = replace(config, layer_norm_eps=1e-6)
    elif mistake == "tanh gelu":
        monkeypatch.setattr(text.F, "gelu", functools.partial(F.gelu, approximate="tanh"))
    else:
        right = text.attend
        monkeypatch.setattr(text, "attend", lambda *args, causal, **kwargs: right(*args, **kwargs))
    assert error(encoder_like(reference, config)(IDS), expected) > 1e-8


def test_bert_names_are_invertible() -> None:
    """Law: the table turns every published name into ours, and back."""
    reference = reference_text(BERT)
    published = reference.state_dict()
    ours = renamed(published)
    assert set(ours) == set(TextEncoder(BERT).state_dict())
    assert set(renamed(ours, back=True)) == set(published)
    assert all(torch.equal(tensor, published[name]) for name, tensor in renamed(ours, back=True).items())


def test_parameter_counts() -> None:
    """Facts: the published encoders' sizes. Stable Diffusion 2.x's folders leave out the layer that is skipped."""
    configs = {
        "clip-l": CLIP_L,
        "clip-h": replace(CLIP_H, num_hidden_layers=23, skip_last_layers=0),
        "minilm": MINILM,
    }
    counts = {}
    with torch.device("meta"):
        for name, config in configs.items():
            parameters = list(TextEncoder(config).parameters())
            counts[name] = (sum(p.numel() for p in parameters), len(parameters))
    assert counts["clip-l"] == (123_060_480, 196)
    assert counts["clip-h"] == (340_387_840, 372)
    assert counts["minilm"] == (22_565_376, 101)


@functools.cache
def minilm() -> PromptEncoder:
    """The packaged BERT in float32."""
    encoder = PromptEncoder((MINILM,), [tokenizer("bert", MINILM.context_length)], MINILM.hidden_size).eval()
    state = load_file(WEIGHTS / "all-MiniLM-L6-v2" / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    encoder.encoders[0].load_state_dict(renamed(state))
    return encoder


@torch.no_grad()
def test_packaged_bert_equals_transformers() -> None:
    """Parity: the real weights, in float32, give what transformers makes of the same folder."""
    reference = quietly(
        transformers.BertModel.from_pretrained,
        WEIGHTS / "all-MiniLM-L6-v2",
        add_pooling_layer=False,
        dtype=torch.float32,
        attn_implementation="sdpa",
    ).eval()
    theirs = transformers.BertTokenizer.from_pretrained(WEIGHTS / "all-MiniLM-L6-v2")
    batch = theirs(PROMPTS, padding="max_length", max_length=MINILM.context_length, return_tensors="pt")
    expected = reference(**batch).last_hidden_state
    embeds = minilm()(PROMPTS)
    assert embeds.tokens.dtype == torch.float32
    assert torch.equal(embeds.mask, batch["attention_mask"].bool())
    assert error(embeds.tokens, expected) < 1e-5
    real = batch["attention_mask"][..., None]
    assert error(embeds.pooled, (expected * real).sum(dim=1) / real.sum(dim=1)) < 1e-5


@torch.no_grad()
def test_packaged_bert_knows_meanings() -> None:
    """Law: with the real weights, like meanings have like vectors."""
    apple, same, car = minilm()(["a red apple", "a crimson apple", "a blue car"]).pooled
    assert F.cosine_similarity(apple, same, dim=0) > F.cosine_similarity(apple, car, dim=0) + 0.3


@torch.no_grad()
def test_clip_pooled_is_the_state_at_the_end_token() -> None:
    """Parity: transformers' pooled vector, whatever the length and whatever pads."""
    reference = reference_text(CLIP)
    encoder = PromptEncoder((CLIP,), [tokenizer("clip", 77)], CLIP.hidden_size).double()
    encoder.encoders[0].load_state_dict(reference.state_dict())
    prompts = [*PROMPTS, "dog " * 100]
    expected = reference(tokenizer("clip", 77)(prompts).input_ids)
    embeds = encoder(prompts)
    assert embeds.mask is None
    assert error(embeds.tokens, expected.last_hidden_state) < 1e-10
    assert error(embeds.pooled, expected.pooler_output) < 1e-10
    assert torch.equal(embeds.pooled[1], embeds.tokens[1, 1]) and torch.equal(
        embeds.pooled[3], embeds.tokens[3, 76]
    )


@torch.no_grad()
@pytest.mark.parametrize("config", [CLIP, BERT], ids=["clip", "bert"])
def test_single_encoder_of_the_right_width_has_no_projection(config: TextEncoderConfig) -> None:
    """Contract: its hidden states are the tokens; of another width, they are projected."""
    plain = prompt_encoder(config, width=24)
    assert list(plain.projections) == [] and not any("projections" in name for name in plain.state_dict())
    projected = prompt_encoder(config, width=10)
    assert [p.weight.shape for p in projected.projections] == [(10, 24)]
    part = projected.encode(0, PROMPTS)
    embeds = projected(PROMPTS)
    assert embeds.tokens.shape == (3, 77, 10) and embeds.pooled.shape == (3, 24)
    assert error(embeds.tokens, projected.projections[0](part.tokens)) < 1e-10
    assert error(plain(PROMPTS).tokens, plain.encode(0, PROMPTS).tokens) == 0


@torch.no_grad()
def test_clip_and_bert_together() -> None:
    """Contract: tokens joined, CLIP's all readable and BERT's where real, pooled side by side."""
    clip, bert = replace(CLIP, trainable=True), replace(BERT, hidden_size=32, context_length=20)
    encoder = prompt_encoder(clip, bert, width=16)
    embeds = encoder(PROMPTS)
    assert embeds.tokens.shape == (3, 77 + 20, 16)
    assert embeds.mask.dtype == torch.bool and embeds.mask[:, :77].all()
    assert embeds.mask[:, 77:].sum(dim=1).tolist() == [5, 2, 13]  # words, begin and end
    assert embeds.pooled.shape == (3, 24 + 32)
    for i, part in enumerate((slice(None, 77), slice(77, None))):
        assert (
            error(embeds.tokens[:, part], encoder.projections[i](encoder.encode(i, PROMPTS).tokens)) < 1e-10
        )
    assert torch.equal(embeds.pooled, torch.cat([encoder.encode(i, PROMPTS).pooled for i in range(2)], dim=1))
    joined = encoder.join([encoder.encode(i, PROMPTS) for i in range(2)])
    assert torch.equal(joined.tokens, embeds.tokens) and torch.equal(joined.mask, embeds.mask)


@torch.no_grad()
def test_pooled_vectors_alone() -> None:
    """Contract: for a U-Net that reads no tokens there are none, and nothing is projected."""
    pooled, whole = prompt_encoder(CLIP, BERT, width=0), prompt_encoder(CLIP, BERT, width=16)
    assert not pooled.projections
    whole.encoders.load_state_dict(pooled.encoders.state_dict())
    embeds = pooled(PROMPTS)
    assert embeds.tokens.shape == (3, 0, 0) and embeds.mask is None
    assert torch.equal(embeds.pooled, whole(PROMPTS).pooled)


def test_frozen_and_trainable() -> None:
    """Contract: gradients reach the projections and the trainable encoders, and no frozen one."""
    encoder = prompt_encoder(replace(CLIP, trainable=True), BERT, width=16)
    embeds = encoder(PROMPTS)
    (embeds.tokens.square().sum() + embeds.pooled.square().sum()).backward()
    without = {name for name, p in encoder.named_parameters() if p.grad is None}
    assert without == {name for name, _ in encoder.named_parameters() if name.startswith("encoders.1.")}
    assert not any(p.requires_grad for p in encoder.encoders[1].parameters())
    assert all(p.grad.any() for name, p in encoder.named_parameters() if name not in without)
    assert TextEncoder(CLIP_MINI).config.trainable and not MINILM.trainable


@torch.no_grad()
def test_prompt_does_not_depend_on_the_batch() -> None:
    """Law: a prompt's embeddings are the same alone and among others."""
    encoder = prompt_encoder(CLIP, BERT, width=16)
    together = encoder(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        alone = encoder([prompt])
        assert error(alone.tokens, together.tokens[i : i + 1]) < 1e-10
        assert error(alone.pooled, together.pooled[i : i + 1]) < 1e-10
        assert torch.equal(alone.mask, together.mask[i : i + 1])


@torch.no_grad()
@pytest.mark.parametrize("configs", [(CLIP,), (BERT,), (CLIP, BERT)], ids=["clip", "bert", "both"])
def test_embeds_add_and_move(configs: tuple[TextEncoderConfig, ...]) -> None:
    """Contract: `+` joins batches, `.to` changes the type or the device of all but the mask's type."""
    encoder = prompt_encoder(*configs, width=24)
    joined = encoder(PROMPTS[:1]) + encoder(PROMPTS[1:])
    whole = encoder(PROMPTS)
    assert isinstance(joined, PromptEmbeds)
    assert error(joined.tokens, whole.tokens) < 1e-10 and error(joined.pooled, whole.pooled) < 1e-10
    assert (joined.mask is None) == (whole.mask is None) == (configs == (CLIP,))
    moved = whole.to(torch.device("meta"), torch.float16)
    assert {moved.tokens.dtype, moved.pooled.dtype} == {torch.float16}
    assert moved.tokens.is_meta and moved.pooled.is_meta
    if whole.mask is not None:
        assert torch.equal(joined.mask, whole.mask)
        assert moved.mask.is_meta and moved.mask.dtype == torch.bool
        assert torch.equal(whole.to(torch.float32).mask, whole.mask)
    with pytest.raises(TypeError):
        operator.add(whole, (1, 2, 3))


def test_model_without_text() -> None:
    """Contract: no encoder gives tokens of no length, one row a prompt, and no mask."""
    embeds = PromptEncoder((), [], 16)(PROMPTS)
    assert embeds.tokens.shape[:2] == (3, 0) and embeds.pooled.shape == (3, 0) and embeds.mask is None


def test_a_vocabulary_that_is_larger_than_the_encoder_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n[SEP]\n[PAD]\n[MASK]\na\nfox\n")
    config = replace(MINILM, vocab_size=6, num_hidden_layers=1, packaged=None)
    with pytest.raises(InputError, match="needs a vocab_size of 7, but the text encoder has 6"):
        PromptEncoder((config,), [Tokenizer(tmp_path, "bert", 8)], config.hidden_size)
