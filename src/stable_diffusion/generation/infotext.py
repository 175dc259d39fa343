"""What AUTOMATIC1111's webui says of a picture in a text, which ``metadata.parameters`` writes too, read."""

from __future__ import annotations

import contextlib
import json
import re

_SETTING = re.compile(r'(\w[\w /-]{0,60}):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')


def read_parameters(text: str) -> dict[str, str]:
    """The settings in a text such as ``parameters`` gives, by the webui's names; Size as ``Size-1`` and ``Size-2``.

    What does not look like one is the prompt.
    """
    *lines, last = text.strip().split("\n")
    found = dict(_SETTING.findall(last))
    if len(found) < 3:  # a line of the prompt with a colon in it
        lines, found = [*lines, last], {}
    words = "\n".join(lines)
    prompt, _, negative = words.partition("\nNegative prompt:")
    if words.startswith("Negative prompt:"):
        prompt, negative = "", words.removeprefix("Negative prompt:")
    settings = {"Prompt": prompt.strip(), "Negative prompt": negative.strip()} if text.strip() else {}
    for name, value in found.items():
        size = re.fullmatch(r"(\d+)x(\d+)", value)
        if size:
            settings |= {f"{name}-1": size[1], f"{name}-2": size[2]}
        else:
            settings[name] = _unquoted(value)
    return settings


def _unquoted(text: str) -> str:
    if text[:1] == '"':
        with contextlib.suppress(ValueError):
            return str(json.loads(text))
    return text.strip()
