"""Prompts, one a line."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

from stable_diffusion.errors import InputError
from stable_diffusion.files import read_bytes


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a file, or of standard input for ``-``, but for blank ones and those that begin with #.

    Raises:
        InputError: a file that is not there or no text, or that has no such line.
    """
    standard = str(path) == "-"
    name = "standard input" if standard else str(path)
    content = sys.stdin.buffer.read() if standard else read_bytes(path)
    wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # as PowerShell writes it
    try:
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{name} is not text in UTF-8: save it as that") from None
    lines = (line.strip() for line in text.replace("\r", "\n").split("\n"))
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise InputError(f"{name} holds no prompts: write one per line")
    return prompts
