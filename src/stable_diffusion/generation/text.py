"""Prompts to embeddings, with notes on what is not read; and the style of prompts that name none."""

from __future__ import annotations

import re

from stable_diffusion.config import Styles
from stable_diffusion.errors import shortened, shown
from stable_diffusion.generation import syntax
from stable_diffusion.generation.prompt_weights import Piece, Prompt, words_of
from stable_diffusion.nn import weighted
from stable_diffusion.nn.text import PromptEmbeds, PromptEncoder


def encode_texts(text_encoder: PromptEncoder, texts: list[str], notes: list[str]) -> PromptEmbeds:
    """Embeddings of texts; notes name the words beyond an encoder's context, and what other programs would obey."""
    if note := syntax.note_of(texts):
        notes.append(note)
    batches = text_encoder.tokenize(texts)
    for batch, tokenizer in zip(batches, text_encoder.tokenizers, strict=True):
        _note_cut(texts, batch.cut, f"{tokenizer.context_length} tokens", notes)
    return text_encoder.embed(batches, len(texts))


def encode_weighted(text_encoder: PromptEncoder, prompts: list[Prompt], notes: list[str]) -> PromptEmbeds:
    """Embeddings of prompts whose words have weights; notes name the words that a BERT has no room for."""
    batches = weighted.tokenize(text_encoder, prompts)
    texts, berts = [words_of(prompt) for prompt in prompts], []
    for batch, config in zip(batches, text_encoder.configs, strict=True):
        berts.append(config.architecture == "bert")
        most = f"{config.context_length} tokens" if berts[-1] else f"{weighted.MOST} chunks"
        _note_cut(texts, batch.cut, most, notes)
    if all(berts) and any(len(prompt) > 1 for prompt in prompts):
        notes.append("BREAK begins nothing new: this model reads a prompt in one piece")
    return weighted.embed(text_encoder, batches, len(prompts))


def _note_cut(texts: list[str], cuts: list[str], limit: str, notes: list[str]) -> None:
    """Adds a note for each text of which an encoder leaves words out."""
    for text, cut in zip(texts, cuts, strict=True):
        if cut:
            notes.append(
                f"the prompt {shortened(text, 40)!r} is longer than the {limit} that the model reads; these"
                f" words are left out: {shown(cut, 1000)}"
            )


STYLE_STRIPS = " \t\n,."
"""Characters at a prompt's end for which the comma before the style stands."""


def with_style(prompt: str, styles: Styles) -> str:
    """The prompt with the default style at its end, unless it is empty or names a style.

    A style's words count in upper and lower case, but not as parts of longer words.
    """
    bare = prompt.rstrip(STYLE_STRIPS)
    if not bare or not styles.default:
        return prompt
    text = " ".join(bare.split()).casefold()
    named = (re.escape(" ".join(phrase.split()).casefold()) for phrase in (*styles.words, styles.default))
    if any(re.search(rf"(?<!\w){phrase}(?!\w)", text) for phrase in named):
        return prompt
    return f"{bare}, {styles.default}"


def with_style_words(prompt: Prompt, styles: Styles) -> Prompt:
    """``with_style`` for a prompt whose words have weights; the style's have the weight 1."""
    words = words_of(prompt)
    if with_style(words, styles) == words:
        return prompt
    *before, last = prompt
    *pieces, (text, weight) = last or (Piece("", 1.0),)
    kept, style = text.rstrip(STYLE_STRIPS), f", {styles.default}"
    end = (Piece(kept + style, 1.0),) if weight == 1 else (Piece(kept, weight), Piece(style, 1.0))
    return (*before, (*pieces, *end))
