"""The README's words are true: its Python runs, its options, files and make words exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stable_diffusion import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_drawing_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python under "Drawing" gives the two pictures that it names."""
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "fox.png" in code)
    monkeypatch.chdir(tmp_path)
    exec(snippet, {})
    assert {path.name for path in tmp_path.iterdir()} == {"fox.png", "wolf.png"}


def test_blocks_can_be_called() -> None:
    """The calls in the table of blocks work on one picture."""
    from stable_diffusion import DiffusionModel

    model = DiffusionModel.from_pretrained()
    picture = model.generate("a fox", num_inference_steps=1, seed=0)[0]
    names = {"model": model, "picture": picture, "t": 500}
    import torch

    for code in re.findall(r"\| `([^`|]*model\.\w+[.(][^`|]*)`(?:, `([^`|]*)`)? \|", README):
        for line in filter(None, code):
            exec(line, names)
            names.setdefault("noise", torch.zeros_like(names["latents"]))
    assert {"latents", "noisy", "embeds"} <= names.keys()


def test_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Every `minisd` line names a command and options that its help lists."""
    lines = re.findall(r"^    minisd (\w+)([^#\n]*)", README, re.M)
    assert len(lines) >= 8
    for command, rest in lines:
        with pytest.raises(SystemExit) as exit:
            cli.main([command, "--help"])
        assert exit.value.code == 0
        helped = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", re.sub(r'"[^"]*"', "", rest)):
            assert option in helped, f"minisd {command} has no {option}"


def test_linked_files_and_make_words_exist() -> None:
    """Relative links lead to files; `make` words are in the Makefile."""
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in re.findall(r"make ([a-z]+)", README):
        assert word == "and" or re.search(rf"^{word}:", makefile, re.M), word
