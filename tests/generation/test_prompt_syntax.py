"""Journeys of AUTOMATIC1111's syntax: weights, long prompts and LoRAs in the prompt change pictures of small models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stable_diffusion import DiffusionModel, InputError
from stable_diffusion.config import MINILM, ModelConfig, Styles
from stable_diffusion.generation.metadata import parameters, read_settings, save_png
from stable_diffusion.generation.prompt_weights import Piece, parse_prompt
from stable_diffusion.generation.request import Request, parse
from stable_diffusion.generation.text import with_style_words
from stable_diffusion.nn.adapters import LoRA
from tests.lively import lively
from tests.tiny import TINY, tiny_model

STYLED = replace(TINY, styles=Styles(words=("noto style", "3d render"), default="noto style"))
BERT = replace(
    TINY,
    unet=replace(TINY.unet, cross_attention_dim=384, pooled_projection_dim=384),
    text_encoders=(replace(MINILM, context_length=8),),
)
WORDS = "apple house red green tree cloud river stone bird fish " * 20
"""200 tokens."""


@cache
def shared(config: ModelConfig) -> DiffusionModel:
    return lively(tiny_model(config))


@pytest.fixture
def model() -> DiffusionModel:
    return shared(TINY)


def drawn(
    model: DiffusionModel, prompt: str | list[str], syntax: str = "a1111", **fields: Any
) -> tuple[Tensor, tuple[str, ...]]:
    """The final latents, and the notes."""
    request = model.request(
        prompt, **{"prompt_syntax": syntax, "seed": 3, "num_inference_steps": 2, **fields}
    )
    steps = model.stream(request)
    while True:
        try:
            latents = next(steps).x
        except StopIteration as end:
            return latents, end.value.notes


@pytest.mark.parametrize("config", [TINY, STYLED], ids=["", "with a style"])
def test_prompts_without_marks_are_the_same_pictures(config: ModelConfig) -> None:
    network, prompts = shared(config), ["a fox, in the snow. ", "", "a wolf, 3d render"]
    plain, notes = drawn(network, prompts, "plain", negative_prompt="blurry")
    for same in (prompts, ["(a fox:1), in the snow. ", "(:1)", "a wolf, 3d render"]):
        found, more = drawn(network, same, negative_prompt="blurry")
        assert torch.equal(found, plain) and notes == more == ()
    assert torch.equal(drawn(network, r"a \(fox\)")[0], drawn(network, "a (fox)", "plain")[0])


@pytest.mark.parametrize("config", [TINY, STYLED, BERT], ids=["clip", "with a style", "bert"])
def test_weights_change_the_picture(config: ModelConfig) -> None:
    network = shared(config)
    plain, _ = drawn(network, "a red fox", "plain")
    for weighted in ("a (red:1.5) fox", "a ((red)) fox", "a [[red]] fox"):
        found, notes = drawn(network, weighted)
        assert torch.isfinite(found).all() and notes == ()
        assert float((found - plain).abs().max()) > 1e-3
    one, _ = drawn(network, "a fox", negative_prompt="a cat")
    other, _ = drawn(network, "a fox", negative_prompt="a (cat:1.5)")
    assert float((one - other).abs().max()) > 1e-3


def test_a_long_prompt_is_read_whole(model: DiffusionModel) -> None:
    """200 tokens are 15 contexts of this model's; with the negative prompt, and in a batch of shorter ones."""
    found, notes = drawn(model, WORDS)
    assert notes == ()
    cut, notes = drawn(model, WORDS, "plain")
    assert "16 tokens that the model reads; these words are left out" in notes[0]
    assert not torch.allclose(found, cut, atol=1e-3)
    assert not torch.allclose(found, drawn(model, WORDS.replace("fish", "boat", 20))[0], atol=1e-3)
    found, notes = drawn(model, ["a fox", WORDS, "a BREAK b"], negative_prompt="a cat BREAK a dog")
    assert notes == () and found.shape == (3, 4, 8, 8)


def test_a_batch_gives_the_pictures_of_its_prompts_alone(model: DiffusionModel) -> None:
    """Of as many contexts, since U-Nets of Stable Diffusion also read empty ones."""
    prompts = ["a (red:1.3) fox BREAK a wolf", "a [tree] BREAK (house:0.5)"]
    batch, _ = drawn(model, prompts, negative_prompt="b BREAK c")
    for i, prompt in enumerate(prompts):
        alone, _ = drawn(model, prompt, negative_prompt="b BREAK c", seed=3 + i)
        assert torch.allclose(batch[i], alone[0], atol=1e-4)


def test_bert_reads_one_context_and_names_the_rest() -> None:
    network = shared(BERT)
    found, notes = drawn(network, "a red (fox:1.3) BREAK a blue wolf in the snow")
    cut, rest = notes
    assert cut.endswith(
        "is longer than the 8 tokens that the model reads; these words are left out: 'in the snow'"
    )
    assert rest == "BREAK begins nothing new: this model reads a prompt in one piece"
    assert torch.equal(found, drawn(network, "a red (fox:1.3) a blue wolf in")[0][:1])


def test_more_chunks_than_a_prompt_may_have_are_named(model: DiffusionModel) -> None:
    _, notes = drawn(model, " BREAK ".join(f"word {i}" for i in range(34)), num_inference_steps=1)
    assert "is longer than the 32 chunks that the model reads" in notes[0] and "'word 32 word 33'" in notes[0]


def test_what_is_not_done_is_one_note_and_text(model: DiffusionModel) -> None:
    found, notes = drawn(model, "a [fox:wolf:0.5]", negative_prompt="[a|b] <lora:x:1>")
    (note,) = notes
    assert note.startswith(
        "'[a|b]', '<lora:x:1>', '[fox:wolf:0.5]': other programs read this as an instruction"
    )
    plain, _ = drawn(model, "a [fox:wolf:0.5]", "plain", negative_prompt="[a|b] <lora:x:1>")
    assert torch.equal(found, plain)
    with pytest.warns(UserWarning, match=r"'\[fox:wolf:0.5\]': other programs"):
        model.generate("a [fox:wolf:0.5]", prompt_syntax="a1111", num_inference_steps=1, seed=0)


# The default style


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a fox", [[("a fox, noto style", 1)]]),
        ("a fox, .\n", [[("a fox, noto style", 1)]]),
        ("a (fox:1.5)", [[("a ", 1), ("fox", 1.5), (", noto style", 1)]]),
        ("(a fox, :1.5)", [[("a fox", 1.5), (", noto style", 1)]]),
        ("(a fox", [[("a fox", 1.1), (", noto style", 1)]]),
        ("a fox BREAK a wolf", [[("a fox", 1)], [("a wolf, noto style", 1)]]),
        ("a fox BREAK BREAK", [[("a fox", 1)], [(", noto style", 1)]]),
        ("a (3D:1.2) render", [[("a ", 1), ("3D", 1.2), (" render", 1)]]),
        ("(noto style:0.5), a fox", [[("noto style", 0.5), (", a fox", 1)]]),
        ("", [[]]),
        ("(:1.2)", [[]]),
    ],
)
def test_the_default_style_follows_at_the_weight_1(
    prompt: str, expected: list[list[tuple[str, float]]]
) -> None:
    found = with_style_words(parse_prompt(prompt), STYLED.styles)
    assert found == tuple(tuple(Piece(*piece) for piece in part) for part in expected)


# LoRAs


@pytest.fixture
def adapted() -> Iterator[DiffusionModel]:
    """A model with a LoRA on the U-Net and one on the text encoder, which is named by its file."""
    network = shared(TINY)
    generator = torch.Generator().manual_seed(0)
    layers = {"wide": network.unet.mid_block.attentions[0].proj_in}  # type: ignore[union-attr]
    layers["loras/words.safetensors"] = network.text_encoder.encoders[0].encoder.layers[0].mlp.fc1  # type: ignore[union-attr,index,assignment]
    for name, layer in layers.items():
        up, down = (
            torch.randn(*shape, generator=generator)
            for shape in ((len(layer.weight), 2), (2, layer.weight.shape[1]))
        )
        network.adapters.add(name, {layer: LoRA(up, down)}, weight=1.0)
    yield network
    for name in layers:
        network.unload_lora(name)


def test_a_lora_in_the_prompt_has_its_weight(adapted: DiffusionModel) -> None:
    pictures = []
    for unet, text in ((1, 1), (0.3, 1), (1, 0.3), (0, 0)):
        said, _ = drawn(adapted, f"a fox <lora:wide:{unet}><lora:words:{text}>")
        given, _ = drawn(adapted, "a fox", lora={"wide": unet, "loras/words.safetensors": text})
        assert torch.equal(said, given)
        assert not any(torch.allclose(said, other, atol=1e-3) for other in pictures)
        pictures.append(said)
    assert torch.equal(drawn(adapted, "a fox <lora:words:1>")[0], pictures[0]), (
        "those not named keep their weight"
    )
    as_text, notes = drawn(adapted, "a fox <lora:wide:0.3>", "plain")
    assert "'<lora:wide:0.3>': other programs" in notes[0] and not torch.allclose(
        as_text, pictures[1], atol=1e-3
    )


def test_what_a_prompt_asks_and_the_model_lacks_is_said_before_the_first_step(
    adapted: DiffusionModel,
) -> None:
    for prompt, message in (
        (
            "a <lora:wode:1>",
            "unknown LoRA 'wode': did you mean 'wide'. choose one of loras/words.safetensors, wide",
        ),
        ("a <lora:wide:much>", "must be <lora:NAME>"),
        ("a (fox:5000)", "the weight of 'fox' is 5000"),
        (["a <lora:wide:1>", "b"], "the prompts of one request share their LoRAs"),
    ):
        request = adapted.request(prompt, prompt_syntax="a1111")
        with pytest.raises(InputError, match=message):
            adapted.stream(request)
    with pytest.raises(InputError, match="unknown prompt_syntax 'comfy': choose one of a1111, plain"):
        adapted.request("a", prompt_syntax="comfy")


# What is stored


def test_a_picture_is_made_again_from_its_file(adapted: DiffusionModel, tmp_path: Path) -> None:
    prompt = "a (fox:1.3) <lora:words:0.5> BREAK " + WORDS[:90]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (picture,) = adapted.generate(prompt, prompt_syntax="a1111", num_inference_steps=2, seed=5)
    path = save_png(picture, tmp_path / "a.png", picture.info["settings"])
    stored = read_settings(path)
    assert stored["prompt"] == prompt and stored["prompt_syntax"] == "a1111"
    assert stored["lora"] == {"wide": 1.0, "loras/words.safetensors": 1.0}
    (again,) = adapted.generate(**parse(stored))
    assert again.tobytes() == picture.tobytes()
    (plain,) = adapted.generate(**parse({**stored, "prompt_syntax": "plain", "prompt": "a fox"}))
    assert plain.tobytes() != picture.tobytes() and "prompt_syntax" not in plain.info["settings"]


def test_loras_are_written_once() -> None:
    settings = {"prompt": "a fox <lora:words:0.5>", "lora": {"loras/words.safetensors": 1.0, "b.pt": 0.7}}
    assert parameters({**settings, "prompt_syntax": "a1111"}) == "a fox <lora:words:0.5> <lora:b:0.7>"
    assert parameters(settings) == "a fox <lora:words:0.5> <lora:words:1> <lora:b:0.7>"
    whole = {**settings, "prompt": "<lora:b.pt> a <lora:words>", "prompt_syntax": "a1111"}
    assert parameters(whole) == "<lora:b.pt> a <lora:words>"


def test_the_syntax_is_stored_where_it_is_not_plain() -> None:
    plain, other = (
        Request.of(TINY, prompt="a", seed=0, prompt_syntax=syntax) for syntax in ("plain", "a1111")
    )
    assert "prompt_syntax" not in plain.to_dict() and other.to_dict()["prompt_syntax"] == "a1111"
    assert Request.from_dict(other.to_dict()) == other != plain
