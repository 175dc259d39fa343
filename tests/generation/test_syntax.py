"""The marks of other programs in prompts: named where they are marks, and silence about ordinary writing."""

from __future__ import annotations

import time

import pytest

from stable_diffusion.generation.syntax import note_of

MARKS = {
    "a fox <lora:style:0.8>": "<lora:style:0.8>",
    "<lora:my style-v2>, a fox": "<lora:my style-v2>",
    "<lora:style:1:0.5> <hypernet:x:1>": "<lora:style:1:0.5>",
    "<lyco:style:1>": "<lyco:style:1>",
    "a fox, embedding:easynegative": "embedding:easynegative",
    "(embedding:bad/hands-5:1.2)": "(embedding:bad/hands-5:1.2)",
    "a (red:1.3) fox": "(red:1.3)",
    "a (bright red, big:0.8) fox": "(bright red, big:0.8)",
    "(fox: 1.2)": "(fox: 1.2)",
    "(fox:2)": "(fox:2)",
    "(fox:-.5)": "(fox:-.5)",
    "(sd15:1.5)": "(sd15:1.5)",
    "(a fox (red:1.2):0.9)": "(red:1.2)",
    "(狐:1.3)": "(狐:1.3)",
    "((masterpiece, best quality)), a fox": "((masterpiece, best quality))",
    "(((fox)))": "(((fox)))",
    "a [blurry] fox": "[blurry]",
    "[[fox]]": "[fox]",
    "a [fox:wolf:0.5]": "[fox:wolf:0.5]",
    "a [FOX:0.5]": "[FOX:0.5]",
    "a [fox::0.5]": "[fox::0.5]",
    "a [fox|wolf]": "[fox|wolf]",
    r"miku \(vocaloid\)": r"\(vocaloid\)",
    "a fox BREAK a wolf": "BREAK",
    "a fox,\nBREAK\na wolf": "BREAK",
    "a fox AND a wolf": "AND",
    "a __colour__ fox": "__colour__",
    "a __animals/small*__": "__animals/small*__",
    "a {red|blue} fox": "{red|blue}",
    "a {2$$red|blue|green} fox": "{2$$red|blue|green}",
    "{{{fox}}}": "{{{fox}}}",
    "a (red fox)1.3": "(red fox)1.3",
    "a (red fox)++": "(red fox)++",
    "a fox --ar 16:9": "--ar",
    "fox::2 wolf::-1": "::2",
}

ORDINARY = [
    "",
    "a fox (in the snow)",
    "a fox (2024) (1.5)",
    "a portrait (16:9), at noon (12:30)",
    "a plan (scale 1:50), a screen (ratio 1:1.85)",
    "John (3:16), (see: figure 5)",
    "a cat :) (cat :3) (:3) ;-)",
    "a fox [1], [2024], array[index], [sic], […]",
    "a sign [EXIT]",
    "((a fox) and (a wolf))",
    "f((x))",
    "TAKE A BREAK TODAY",
    "a sign that says BREAK",
    'a sign that says "BREAK" in red',
    "A BLACK AND WHITE FOX",
    "salt and pepper, a coffee break, BREAKFAST AT NOON",
    "____ is missing, snake_case, __",
    "the C++ logo, a++",
    "{fox}, a | b, {}",
    "a <cat-toy> on a table, I <3 foxes, 1 < 2 > 0",
    r"¯\_(ツ)_/¯ C:\(pictures)",
    "embedding: a picture in words; an embedding:",
    "a fox -- and a wolf --",
    "std::vector, 10::20 a ratio of 3:4",
    "a flat color illustration of a fox, noto style",
]


@pytest.mark.parametrize("prompt", MARKS)
def test_a_mark_of_another_program_is_named(prompt: str) -> None:
    note = note_of(["a fox", prompt])
    assert note is not None and note.startswith(repr(MARKS[prompt]))
    assert ("`lora`" in note) is (MARKS[prompt].startswith(("<", "embedding:")))


@pytest.mark.parametrize("prompt", ORDINARY)
def test_ordinary_writing_is_not_noted(prompt: str) -> None:
    assert note_of([prompt]) is None


def test_one_note_names_at_most_three_and_each_once() -> None:
    note = note_of(["(a:1.1) (a:1.1) (b:1.2)", "(c:1.3) (d:1.4)", f"({'x' * 100}:1.1)"])
    assert note is not None and note.startswith("'(a:1.1)', '(b:1.2)', '(c:1.3)', …: ")
    assert "…'" in str(note_of([f"({'x' * 100}:1.1)"]))


@pytest.mark.parametrize(
    "part", ["(", "[", "(a,", "(a:", "{a|", "((a", "__a", "<lora:", "\\(a", "[a:", "(a)", ":", "a,"]
)
def test_no_text_takes_long(part: str) -> None:
    began = time.perf_counter()
    note_of([part * 20_000])
    assert time.perf_counter() - began < 2
