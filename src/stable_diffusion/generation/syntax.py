"""What other programs read in a prompt as an instruction, and what is plain text here."""

from __future__ import annotations

import re
from collections.abc import Iterable

from stable_diffusion.errors import shortened, three_of

INSTRUCTION = re.compile(
    r"""
      <(?:lora|lyco|hypernet):[^<>]+>                                # AUTOMATIC1111: networks
    | (?<!\w)embedding:[\w./\\-]+                                    # ComfyUI: textual inversions
    | (?<!\\)\((?:[^()]*[\s,:])?(?!\d+(?:\.\d+)?:)[^\s,:()]+         # (word:1.3), no ratio or time of day
        :(?:\s?[+-]?\d*\.\d+|[+-]?\d)\s*\)
    | (?<![\w\\(])\({2,}[^()]+\){2,}                                 # ((word))
    | (?<![\w\\])\[(?!sic\])                                         # [word], [a:b:0.5], [a|b]; no number, no CAPITALS
        (?=[^][]*(?:[^\W\d_A-Z]|:\d*\.?\d+\s*\]))[^][]+\]
    | \\\([^()]+\\\)                                                 # brackets that are meant as such: \(word\)
    | (?<![A-Z]\s)(?<!["'\w])(?:BREAK|AND)(?=[\s,]+\S)(?![\s,]+[A-Z]{2})
    | (?<!\w)__[^\W_][\w/*.-]*?__(?!\w)                              # dynamic prompts: wildcards
    | \{[^{}]*\|[^{}]*\}                                             # and choices
    | (?<!\{)\{{2,}[^{}]+\}{2,}                                      # NovelAI: {{word}}
    | \([^()]+\)(?:\d?\.\d+|\++(?=[\s,]|$))                          # Compel: (word)1.3, (word)++
    | (?<!\S)--(?:ar|chaos|iw|niji|no|q|s|style|stylize|tile|v)(?!\S)  # Midjourney
    | (?<=[^\W\d])::-?\d[\d.]*
    """,
    re.VERBOSE,
)


def note_of(texts: Iterable[str], *, plain: bool = True) -> str | None:
    """A note that names the parts of texts that other programs read as instructions; None where there are none.

    Where texts are `plain`, it says how to have some of them obeyed.
    """
    found = list(dict.fromkeys(match[0] for text in texts for match in INSTRUCTION.finditer(text)))
    if not found:
        return None
    parts = three_of([repr(shortened(part, 40)) for part in found])
    named = any(part.startswith(("<", "embedding:")) for part in found)
    where = "; files of weights are not named in the prompt, but in `lora` and `embedding`" if named else ""
    hint = "; with prompt_syntax a1111, weights, BREAK and <lora:…> are obeyed" if plain else ""
    return f"{parts}: other programs read this as an instruction, here it is text like any other{where}{hint}"
