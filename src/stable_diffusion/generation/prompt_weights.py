"""AUTOMATIC1111's prompt syntax, read as its webui reads it: weights of words, chunks, and LoRAs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import NamedTuple

from stable_diffusion.errors import InputError, shown
from stable_diffusion.generation.request import Request

NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
MARK = re.compile(rf"\\[][()\\]?|:\s*({NUMBER})\s*([)\]])|[][()|:]|[^][()|:\\]+")
BREAK = re.compile(r"(?:(?<!\s)\s+)?\bBREAK\b\s*")
LORA = re.compile(r"<(?:lora|lyco):([^<>:]*)(?::([^<>]*))?>")
"""A LoRA's tag: its name, and what stands after the name's colon."""
HEAVIEST = 1000.0
"""The largest weight, far beyond what any picture survives."""


class Piece(NamedTuple):
    """Words that have one weight."""

    text: str
    weight: float


Prompt = tuple[tuple[Piece, ...], ...]
"""The parts between a prompt's BREAKs, in order; a piece differs in weight from the one before it."""


def parse_prompt(text: str) -> Prompt:
    r"""A prompt's words with their weights.

    ``(words:1.3)`` multiplies the weight of the words by 1.3, ``(words)`` by 1.1, ``[words]`` divides by 1.1, and
    nested brackets multiply; an opening bracket that nothing closes acts to the end, and a closing one that nothing
    opened is text. ``\(``, ``\)``, ``\[``, ``\]`` and ``\\`` are those characters; any other backslash is dropped.
    BREAK as a word begins a new part, also within brackets, where the webui reads it as a word.

    What changes from step to step or joins several prompts is text as it stands, brackets included: ``[a:b:0.5]``,
    ``[a:0.5]``, ``[a|b]`` and AND.

    Raises:
        InputError: a weight above 1000 or below -1000.
    """
    marks = list(MARK.finditer(text))
    factors, closing = _brackets(marks)
    rounds, squares = [1.0], [1.0]  # what the open brackets of a kind multiply by, together
    parts: list[list[Piece]] = [[]]  # a piece a mark
    for i, mark in enumerate(marks):
        if i in factors:
            stack = rounds if mark[0] == "(" else squares
            stack.append(stack[-1] * factors[i])
        elif i in closing:
            (rounds if mark[0][-1] == ")" else squares).pop()
        else:
            weight = rounds[-1] * squares[-1]
            words = [mark[0][1:]] if mark[0][0] == "\\" else BREAK.split(mark[0])
            for number, word in enumerate(words):
                if number:
                    parts.append([])
                if word:
                    parts[-1].append(Piece(word, weight))
    if len(parts) > 1 and not words_of(parts[-1:]).strip():
        del parts[-1]
    return tuple(map(_merged, parts))


def left_as_text(text: str) -> str:
    """What ``parse_prompt`` leaves of a prompt as text, without brackets that are meant as such."""
    return words_of(parse_prompt(re.sub(r"\\[][()\\]", "", text)))


def words_of(prompt: Iterable[Iterable[Piece]]) -> str:
    """A prompt's words without their weights."""
    return " ".join("".join(piece.text for piece in part) for part in prompt)


def without_loras(text: str) -> tuple[str, dict[str, float]]:
    """A prompt without its ``<lora:name:0.8>``, and the weights that these give; equal names add up.

    Raises:
        InputError: a tag whose weight is not one number; without any it is 1.
    """
    weights: dict[str, float] = {}
    for found in LORA.finditer(text):
        name, weight = found[1].strip(), "1" if found[2] is None else found[2].strip()
        if not re.fullmatch(NUMBER, weight) or abs(float(weight)) > HEAVIEST:
            raise InputError(
                f"a LoRA in a prompt must be <lora:NAME> or <lora:NAME:WEIGHT> with one number of at most"
                f" {HEAVIEST:g}, got {shown(found[0])}"
            )
        weights[name] = weights.get(name, 0.0) + float(weight)
    return LORA.sub("", text), weights


def lora_name(file: str) -> str:
    """What a prompt calls a LoRA: its file's name without folder and ending, and without what ends a tag."""
    name = re.sub(r"\.(safetensors|ckpt|pt|pth|bin)$", "", re.split(r"[\\/]", file)[-1])
    return re.sub(r"[:<>,]", "_", name)


def lora_weights(request: Request) -> dict[str, float]:
    """The weights of a request's LoRAs: its own, and instead of them those that its prompts give.

    In negative prompts the tags are text, as in the webui.

    Raises:
        InputError: prompts that cannot be read, or of which one gives LoRAs other weights than another, or a name that
            fits two LoRAs.
    """
    weights = dict(request.lora)
    if request.prompt_syntax == "plain":
        return weights
    prompts = (*request.prompt, *([] if request.mix_prompt is None else [request.mix_prompt]))
    for text in (*prompts, *request.negative_prompt):
        parse_prompt(text)
    first, *others = (without_loras(prompt)[1] for prompt in prompts)
    if any(other != first for other in others):
        raise InputError(
            "the prompts of one request share their LoRAs: give <lora:…> the same weights in each of them, or make"
            " one request a prompt"
        )
    given: dict[str, float] = {}
    for name, weight in first.items():
        fitting = [name] if name in weights else [file for file in weights if lora_name(file) == name]
        if len(fitting) > 1:
            raise InputError(f"<lora:{name}> could be any of {', '.join(fitting)}: give the whole name")
        loaded = (*fitting, name)[0]
        given[loaded] = given.get(loaded, 0.0) + weight
    return weights | given


def _brackets(marks: list[re.Match[str]]) -> tuple[dict[int, float], set[int]]:
    """What each bracket that opens multiplies by, and those that close one; all other marks are text."""
    rounds: list[int] = []
    squares: list[int] = []
    factors: dict[int, float] = {}
    closing: set[int] = set()
    choices: set[int] = set()  # brackets with a | in them
    for i, mark in enumerate(marks):
        end = mark[2] or mark[0]
        if end == "(":
            rounds.append(i)
            factors[i] = 1.1
        elif end == "[":
            squares.append(i)
            factors[i] = 1 / 1.1
        elif end == "|" and squares:
            choices.add(squares[-1])
        elif end == ")" and rounds:
            opened = rounds.pop()
            factors[opened] = 1.1 if mark[1] is None else float(mark[1])
            closing.add(i)
        elif end == "]" and squares:
            opened = squares.pop()
            if mark[1] is None and opened not in choices:
                closing.add(i)
            else:  # [a:b:0.5], [a|b]
                del factors[opened]
    return factors, closing


def _merged(part: list[Piece]) -> tuple[Piece, ...]:
    """A part with one piece for neighbours of the same weight. Raises InputError for a weight that is too large."""
    pieces = []
    for weight, group in itertools.groupby(part, lambda piece: piece.weight):
        text = "".join(piece.text for piece in group)
        if not abs(weight) <= HEAVIEST:
            raise InputError(
                f"the weight of {shown(text, 40)} is {weight:.4g}, and at most {HEAVIEST:g} may be: lower it, or close"
                " its brackets"
            )
        pieces.append(Piece(text, weight))
    return tuple(pieces)
