"""AUTOMATIC1111's syntax: prompts taken apart as its webui takes them, the cases written by hand."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest

from stable_diffusion.errors import InputError
from stable_diffusion.generation.prompt_weights import (
    Piece,
    left_as_text,
    lora_name,
    lora_weights,
    parse_prompt,
    without_loras,
    words_of,
)
from stable_diffusion.generation.request import Request
from stable_diffusion.generation.syntax import note_of
from tests.tiny import TINY

UP, DOWN = 1.1, 1 / 1.1
CASES: dict[str, list[tuple[str, float]]] = {
    # no brackets
    "": [],
    " ": [(" ", 1)],
    "a fox": [("a fox", 1)],
    "a fox, 10:30, 16:9": [("a fox, 10:30, 16:9", 1)],
    "a | b": [("a | b", 1)],
    "{a|b} <c> __d__": [("{a|b} <c> __d__", 1)],
    # round brackets
    "(fox)": [("fox", UP)],
    "((fox))": [("fox", UP**2)],
    "(((fox)))": [("fox", UP**3)],
    "a (red) fox": [("a ", 1), ("red", UP), (" fox", 1)],
    "a (red fox) and (blue) wolf": [("a ", 1), ("red fox", UP), (" and ", 1), ("blue", UP), (" wolf", 1)],
    "(a)(b)": [("ab", UP)],
    "(a (b) c)": [("a ", UP), ("b", UP**2), (" c", UP)],
    "()": [],
    "a () fox": [("a  fox", 1)],
    # weights
    "(fox:1.3)": [("fox", 1.3)],
    "(fox:1)": [("fox", 1)],
    "a (fox:1.0) b": [("a fox b", 1)],
    "(fox:0)": [("fox", 0)],
    "(fox:.5)": [("fox", 0.5)],
    "(fox:2.)": [("fox", 2)],
    "(fox:-1)": [("fox", -1)],
    "(fox:+1.5)": [("fox", 1.5)],
    "(fox : 1.2 )": [("fox ", 1.2)],
    "(red fox, blue wolf:0.8)": [("red fox, blue wolf", 0.8)],
    "(a:b:1.3)": [("a:b", 1.3)],
    "(at 10:30:1.2)": [("at 10:30", 1.2)],
    "(a:1.3) (b:1.3)": [("a", 1.3), (" ", 1), ("b", 1.3)],
    "((fox:1.5))": [("fox", 1.5 * UP)],
    "(a (b:1.5) c:0.5)": [("a ", 0.5), ("b", 0.75), (" c", 0.5)],
    "(:1.3)": [],
    # numbers that are none, and numbers without a bracket
    "(fox:)": [("fox:", UP)],
    "(fox:big)": [("fox:big", UP)],
    "(fox:1.2.3)": [("fox:1.2.3", UP)],
    "(fox:1,3)": [("fox:1,3", UP)],
    "fox:1.3": [("fox:1.3", 1)],
    "fox:1.3)": [("fox:1.3)", 1)],
    # square brackets
    "[fox]": [("fox", DOWN)],
    "[[fox]]": [("fox", DOWN**2)],
    "a [red] fox": [("a ", 1), ("red", DOWN), (" fox", 1)],
    "([fox])": [("fox", 1)],
    "[a (b:1.5) c]": [("a ", DOWN), ("b", 1.5 * DOWN), (" c", DOWN)],
    "(a [b) c]": [("a ", UP), ("b", 1), (" c", DOWN)],
    # escapes
    r"\(fox\)": [("(fox)", 1)],
    r"\[fox\]": [("[fox]", 1)],
    r"(miku \(vocaloid\):1.2)": [("miku (vocaloid)", 1.2)],
    r"(\(:1.2)": [("(", 1.2)],
    r"(fox\)": [("fox)", UP)],
    r"a \\ b": [("a \\ b", 1)],
    r"\\(a)": [("\\", 1), ("a", UP)],
    r"a\b": [("ab", 1)],
    "a\\": [("a", 1)],
    # unbalanced
    "(fox": [("fox", UP)],
    "((fox)": [("fox", UP**2)],
    "a (b (c:1.5)": [("a ", 1), ("b ", UP), ("c", 1.5 * UP)],
    "[fox": [("fox", DOWN)],
    "fox)": [("fox)", 1)],
    "fox]": [("fox]", 1)],
    "(a))": [("a", UP), (")", 1)],
    ")(": [(")", 1)],
    "(fox:1.3]": [("fox:1.3]", UP)],
    # what is not done here is text
    "[fox:wolf:0.5]": [("[fox:wolf:0.5]", 1)],
    "[fox:0.5]": [("[fox:0.5]", 1)],
    "[fox::0.5]": [("[fox::0.5]", 1)],
    "[fox:wolf: 3 ]": [("[fox:wolf: 3 ]", 1)],
    "[fox|wolf]": [("[fox|wolf]", 1)],
    "(a [b|c]:1.2)": [("a [b|c]", 1.2)],
    "[(a:1.2)|b]": [("[", 1), ("a", 1.2), ("|b]", 1)],
    "[[a]:b:0.5]": [("[", 1), ("a", DOWN), (":b:0.5]", 1)],
    "a AND b": [("a AND b", 1)],
    # other scripts, lines, and bytes that are no text
    "(狐:1.3)、(🦊)": [("狐", 1.3), ("、", 1), ("🦊", UP)],
    "(ünïcödé [ñ]:1.2)": [("ünïcödé ", 1.2), ("ñ", 1.2 * DOWN)],
    "(a\nb:1.2)\n": [("a\nb", 1.2), ("\n", 1)],
    "（狐）": [("（狐）", 1)],
    "(\udcff:1.2)": [("\udcff", 1.2)],
}
BREAKS: dict[str, list[list[tuple[str, float]]]] = {
    "a BREAK b": [[("a", 1)], [("b", 1)]],
    " a\n BREAK\t\nb ": [[(" a", 1)], [("b ", 1)]],
    "a,BREAK,b": [[("a,", 1)], [(",b", 1)]],
    "BREAK a": [[], [("a", 1)]],
    "a BREAK ": [[("a", 1)]],
    "BREAK": [[]],
    "a BREAK BREAK b": [[("a", 1)], [], [("b", 1)]],
    "a BREAK BREAK": [[("a", 1)], []],
    "(a) b BREAK c": [[("a", UP), (" b", 1)], [("c", 1)]],
    "(a BREAK b:1.2) c": [[("a", 1.2)], [("b", 1.2), (" c", 1)]],
    "[a BREAK b]": [[("a", DOWN)], [("b", DOWN)]],
    "BREAKFAST, a break, OUTBREAK, BREAK_a": [[("BREAKFAST, a break, OUTBREAK, BREAK_a", 1)]],
}


def assert_same(text: str, expected: list[list[tuple[str, float]]]) -> None:
    found = parse_prompt(text)
    assert [[piece.text for piece in part] for part in found] == [
        [words for words, _ in part] for part in expected
    ]
    for part, wanted in zip(found, expected, strict=True):
        assert all(
            math.isclose(piece.weight, weight, rel_tol=1e-12)
            for piece, (_, weight) in zip(part, wanted, strict=True)
        )


@pytest.mark.parametrize("text", CASES)
def test_words_have_their_weights(text: str) -> None:
    assert_same(text, [CASES[text]])


@pytest.mark.parametrize("text", BREAKS)
def test_a_break_begins_a_part(text: str) -> None:
    assert_same(text, BREAKS[text])


def test_a_text_without_marks_is_one_piece_of_exactly_the_weight_1() -> None:
    for text in ("a fox, in the snow", "(a fox:1)", r"\(a\) fox", "[a|b] (fox:1.0)"):
        ((piece,),) = parse_prompt(text)
        assert piece.weight == 1.0 and piece.text == words_of(parse_prompt(text))


@pytest.mark.parametrize(
    "text", ["(a:1001)", "(a:-1001)", "((a:1000))", "(" * 100 + "a", "(a:" + "9" * 400 + ")"]
)
def test_weights_that_no_picture_survives_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"the weight of 'a' is .*: lower it, or close its brackets"):
        parse_prompt(text)
    with pytest.raises(InputError, match="the weight of 'a'"):
        lora_weights(request(f"b {text}"))
    assert parse_prompt("(a:1000)") == ((Piece("a", 1000.0),),)


@pytest.mark.parametrize(
    "part",
    [
        "(",
        "[",
        "(a,",
        "[a|",
        "[a|b]",
        "(a)",
        "(a:1)",
        ":1",
        ":1)",
        ": ",
        "1",
        ")",
        "]",
        "\\(",
        "BREAK ",
        " ",
        "<lora:",
    ],
)
def test_no_text_takes_long(part: str) -> None:
    began = time.process_time()
    text = part * 5_000
    for read in (parse_prompt, left_as_text, without_loras):
        try:
            read(f"{text}:{text}")
        except InputError as error:
            assert "brackets" in str(error)  # what opens thousands of them
    assert time.process_time() - began < 5


# What is text all the same


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a (red:1.3) ((fox)) [big]", None),
        ("a fox BREAK a wolf", None),
        (r"\(a:1.3\) \[fox\] \(\(b\)\)", None),
        ("a [fox:wolf:0.5]", "'[fox:wolf:0.5]'"),
        ("a ([fox|wolf]:1.2)", "'[fox|wolf]'"),
        ("a (fox) AND a wolf", "'AND'"),
        ("a {red|blue} (fox), __colour__", "'{red|blue}', '__colour__'"),
        ("(fox)++, <hypernet:a:1>", "'<hypernet:a:1>'"),
    ],
)
def test_only_what_is_not_done_is_noted(text: str, named: str | None) -> None:
    note = note_of([left_as_text(text)], plain=False)
    if named is None:
        assert note is None
    else:
        assert note is not None and note.startswith(f"{named}: other programs read this")
        assert "prompt_syntax" not in note


def test_the_note_for_plain_text_says_how_to_be_obeyed() -> None:
    assert "with prompt_syntax a1111, weights, BREAK and <lora:…> are obeyed" in str(note_of(["a (fox:1.3)"]))


# LoRAs


def request(*prompts: str, syntax: str = "a1111", **fields: object) -> Request:
    return Request.of(TINY, prompt=prompts, prompt_syntax=syntax, **fields)


def test_loras_are_taken_out_of_a_prompt() -> None:
    assert without_loras("a <lora:style:0.8> fox<lora:b>") == ("a  fox", {"style": 0.8, "b": 1.0})
    assert without_loras("<lora:a:0.5><lyco:a:-.25>") == ("", {"a": 0.25})
    assert without_loras("<lora: my style v1.5 : 1 >") == ("", {"my style v1.5": 1.0})
    assert without_loras("a <fox>, <lora, <hypernet:a:1>") == ("a <fox>, <lora, <hypernet:a:1>", {})
    assert parse_prompt(without_loras("(a <lora:b:0.5> fox:1.2)")[0]) == ((Piece("a  fox", 1.2),),)


@pytest.mark.parametrize(
    "tag", ["<lora:a:>", "<lora:a:much>", "<lora:a:1e3>", "<lora:a:nan>", "<lora:a:99999>"]
)
def test_a_loras_weight_is_a_number(tag: str) -> None:
    with pytest.raises(InputError, match=r"must be <lora:NAME> or <lora:NAME:WEIGHT> with one number"):
        without_loras(f"a {tag}")


def test_two_weights_in_a_tag_are_no_tag() -> None:
    with pytest.raises(InputError, match=r"with one number of at most 1000, got '<lora:a:1:0.5>'"):
        without_loras("<lora:a:1:0.5>")


def test_the_prompts_weights_stand_instead_of_the_requests() -> None:
    loras = {"a": 1.0, "dir/fine style-v1.5.safetensors": 0.5, "C:\\loras\\by,name.pt": 0.0}
    assert lora_weights(request("x <lora:a:0.3>", lora=loras)) == loras | {"a": 0.3}
    by_stem = request("<lora:fine style-v1.5:2> <lora:by_name:-1>", lora=loras)
    assert list(lora_weights(by_stem).values()) == [1.0, 2.0, -1.0]
    whole = request("<lora:dir/fine style-v1.5.safetensors:2>", lora=loras)
    assert list(lora_weights(whole).values()) == [1.0, 2.0, 0.0]
    both = request("<lora:dir/fine style-v1.5.safetensors:2><lora:fine style-v1.5:1>", lora=loras)
    assert list(lora_weights(both).values()) == [1.0, 3.0, 0.0]
    assert lora_weights(request("<lora:unknown:2>", lora=loras)) == loras | {"unknown": 2.0}
    assert lora_weights(request("<lora:a:0.3>", lora=loras, syntax="plain")) == loras
    negative = request("x", negative_prompt="<lora:a:0.3>", lora=loras)
    assert lora_weights(negative) == loras


def test_the_prompts_of_a_request_agree_on_their_loras() -> None:
    agreed = request("x <lora:a:0.5>", "<lora:a:0.5> y", lora={"a": 1.0})
    assert lora_weights(agreed) == {"a": 0.5}
    for other in ("y", "y <lora:a:0.4>", "y <lora:b:0.5>"):
        with pytest.raises(InputError, match="the prompts of one request share their LoRAs"):
            lora_weights(replace(agreed, prompt=("x <lora:a:0.5>", other)))


def test_a_name_that_fits_two_loras_is_an_error() -> None:
    loras = {"x/a.pt": 1.0, "y/a.safetensors": 1.0}
    with pytest.raises(
        InputError, match=r"<lora:a> could be any of x/a.pt, y/a.safetensors: give the whole name"
    ):
        lora_weights(request("<lora:a:1>", lora=loras))


def test_names_of_loras_are_those_that_a_picture_has() -> None:
    names = {"a": "a", "dir/a.b.safetensors": "a.b", "C:\\x\\a.pt": "a", "a:<b>,c.bin": "a__b__c"}
    assert {file: lora_name(file) for file in names} == names
