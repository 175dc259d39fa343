"""Textual inversions: prompts read as in diffusers, every published form is read, misfits are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stable_diffusion import DiffusionModel, InputError
from stable_diffusion.checkpoints.checkpoint import packaged
from stable_diffusion.nn import tokenizer
from tests.checkpoints import sd
from tests.nn.reference import normal, quietly
from tests.tiny import TINY, UNCONDITIONAL, tiny_model

PROMPTS = [
    "a photo of a <fox> in the snow",
    "<fox>, <FOX> and<fox>es",
    "<fox> " * 40 + "end",  # cut within
    "a fox",
    "",
]

CLIP = tokenizer._clip(packaged("clip-tokenizer"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd.write(tmp_path_factory.mktemp("stable-diffusion") / "sd", "1.5")


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_clip", lambda folder: copy.deepcopy(CLIP))


@pytest.fixture
def model(folder: Path) -> DiffusionModel:
    return DiffusionModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def untouched(folder: Path) -> DiffusionModel:
    """A model for what changes nothing."""
    return DiffusionModel.from_pretrained(folder)


def vectors(count: int, width: int = 32, seed: int = 0) -> Tensor:
    return normal(count, width, seed=seed, dtype=torch.float32)


def reference(folder: Path) -> Any:
    return quietly(diffusers.StableDiffusionPipeline.from_pretrained, folder, safety_checker=None)


def theirs(pipe: Any, prompt: str) -> Tensor:
    with torch.no_grad():
        return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


def ours(model: DiffusionModel, prompt: str) -> Tensor:
    batch = model.text_encoder.tokenizers[0]([prompt])
    with torch.no_grad():
        return model.text_encoder.read(0, batch.input_ids, batch.attention_mask).tokens


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_prompts_read_as_in_diffusers(
    count: int, ending: str, model: DiffusionModel, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"learned_embeds.{ending}"
    embeds = {"<fox>": vectors(count) if count > 1 else vectors(1)[0]}
    save_file(embeds, path) if ending == "safetensors" else torch.save(embeds, path)
    pipe = reference(folder)
    plain = theirs(pipe, PROMPTS[0])
    quietly(pipe.load_textual_inversion, path)
    assert model.load_textual_inversion(path) == ["<fox>"]
    # Several vectors diffusers writes into the prompt word by word, which it does well where the word stands alone.
    for prompt in PROMPTS if count == 1 else [PROMPTS[0], *PROMPTS[2:]]:
        wanted = theirs(pipe, prompt)
        assert float((ours(model, prompt) - wanted).abs().amax()) < 1e-5
    assert float((plain - theirs(pipe, PROMPTS[0])).abs().amax()) > 0.1


def test_two_files_and_another_name(model: DiffusionModel, folder: Path, tmp_path: Path) -> None:
    pipe = reference(folder)
    for i, token in enumerate(("<fox>", "snowy-style")):
        path = tmp_path / f"{i}.safetensors"
        save_file({"<old>": vectors(1 + i, seed=i)}, path)
        quietly(pipe.load_textual_inversion, path, token=token)
        assert model.load_textual_inversion(path, token) == [token]
    prompt = "a <fox> in snowy-style , snow"
    assert float((ours(model, prompt) - theirs(pipe, prompt)).abs().amax()) < 1e-5
    ids = model.text_encoder.tokenizers[0]([prompt]).input_ids[0].tolist()
    assert [i for i in ids if i > 49407] == [49408, 49409, 49410]


FORMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a1111": (
        lambda path: torch.save(
            {
                "string_to_token": {"*": 265},
                "string_to_param": {"*": vectors(2)},
                "name": "my-fox",
                "step": 9,
            },
            path,
        ),
        "my-fox",
    ),
    "a1111 parameters": (
        lambda path: torch.save(
            {"string_to_param": nn.ParameterDict({"*": nn.Parameter(vectors(2))}), "name": None}, path
        ),
        "file",
    ),
    "kohya": (lambda path: save_file({"emb_params": vectors(2)}, path), "file"),
    "kohya half": (lambda path: save_file({"emb_params": vectors(2).half()}, path), "file"),
    "diffusers": (lambda path: save_file({"<x>": vectors(2)}, path), "<x>"),
    "bare": (lambda path: torch.save(vectors(2), path), "file"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_is_read(form: str, model: DiffusionModel, tmp_path: Path) -> None:
    write, word = FORMS[form]
    path = tmp_path / "file.pt"
    write(path if not form.startswith(("kohya", "diffusers")) else path.with_suffix(".safetensors"))
    path = path if path.is_file() else path.with_suffix(".safetensors")
    if word == "file":  # a word of the vocabulary: another is needed
        with pytest.raises(InputError, match="the vocabulary has 'file' already"):
            model.load_textual_inversion(path)
        word = "<file>"
        model.load_textual_inversion(path, word)
    else:
        assert model.load_textual_inversion(path) == [word]
    table = model.text_encoder.encoders[0].embeddings.token_embedding
    ids = model.text_encoder.tokenizers[0]([f"a {word} b"]).input_ids
    assert ids[0, 1:5].tolist() == [320, 49408, 49409, 321]
    torch.testing.assert_close(table(ids)[0, 2:4], vectors(2), rtol=1e-3, atol=1e-3)


def test_a_model_is_saved_without_them(model: DiffusionModel, folder: Path, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file({"<fox>": vectors(3)}, tmp_path / "a.safetensors")
    model.load_textual_inversion(tmp_path / "a.safetensors")
    assert model.state_dict().keys() == before.keys()
    model.save_pretrained(tmp_path / "saved")
    again = DiffusionModel.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())
    assert again.load_textual_inversion(tmp_path / "a.safetensors") == ["<fox>"]
    assert torch.equal(ours(again, PROMPTS[0]), ours(model, PROMPTS[0]))


def test_they_follow_the_model_to_another_format(model: DiffusionModel, tmp_path: Path) -> None:
    save_file({"<fox>": vectors(2).half()}, tmp_path / "a.safetensors")
    model.load_textual_inversion(tmp_path / "a.safetensors")
    assert model.double().encode_prompt("a <fox>").tokens.dtype == torch.float64
    save_file({"<cat>": vectors(2)}, tmp_path / "b.safetensors")
    model.load_textual_inversion(tmp_path / "b.safetensors")
    assert model.bfloat16().encode_prompt("a <fox> <cat>").tokens.dtype == torch.bfloat16


def test_words_that_are_cut_are_named(model: DiffusionModel, tmp_path: Path) -> None:
    save_file({"<fox>": vectors(10)}, tmp_path / "a.safetensors")
    model.load_textual_inversion(tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="left out: '<fox> end'"):
        model.encode_prompt("<fox> " * 8 + "end")


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "sdxl": ({"clip_g": vectors(1, 1280), "clip_l": vectors(1, 768)}, "SDXL"),
    "sd1": ({"<x>": vectors(1, 768)}, r"this file is for SD 1.x \(768\), the model is"),
    "sd2": ({"emb_params": vectors(1, 1024)}, r"this file is for SD 2.x \(1024\), the model is"),
    "nan": ({"<x>": vectors(1) * torch.nan}, "NaN"),
    "no vector": ({"<x>": vectors(1)[:0]}, "holds nothing"),
    "lora": ({"lora_unet_x.lora_down.weight": vectors(2)[None]}, "not a textual inversion"),
    "numbers": ({"<x>": torch.ones(1, 32, dtype=torch.int64)}, "not a textual inversion"),
    "blank": ({" ": vectors(1)}, "empty"),
    "known": ({"fox</w>": vectors(1), "<y>": vectors(1)}, "the vocabulary has 'fox</w>' already"),
    "twice": ({"<x>": vectors(1), "<X>": vectors(1)}, "the vocabulary has '<x>' already"),
    "its own": ({"<x>": vectors(2), "<x>_1": vectors(1)}, "already"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_refused_and_changes_nothing(
    name: str, untouched: DiffusionModel, tmp_path: Path
) -> None:
    tensors, message = BAD[name]
    before = ours(untouched, "a <x> <y> fox")
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=message) as caught:
        untouched.load_textual_inversion(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)
    assert torch.equal(ours(untouched, "a <x> <y> fox"), before)


def test_the_same_word_again_is_an_error(model: DiffusionModel, tmp_path: Path) -> None:
    save_file({"<fox>": vectors(2)}, tmp_path / "a.safetensors")
    model.load_textual_inversion(tmp_path / "a.safetensors")
    before = ours(model, PROMPTS[0])
    for token in (None, "<Fox>", "<fox>_1"):
        with pytest.raises(InputError, match="already: give the embedding another token"):
            model.load_textual_inversion(tmp_path / "a.safetensors", token)
    assert torch.equal(ours(model, PROMPTS[0]), before)


def test_several_words_have_no_common_name(model: DiffusionModel, tmp_path: Path) -> None:
    save_file({"<x>": vectors(1), "<y>": vectors(2)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="2 words"):
        model.load_textual_inversion(tmp_path / "a.safetensors", "<z>")
    assert sorted(model.load_textual_inversion(tmp_path / "a.safetensors")) == ["<x>", "<y>"]


def test_a_model_without_clip_has_no_place_for_them(tmp_path: Path) -> None:
    save_file({"<x>": vectors(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="CLIP"):
        tiny_model(UNCONDITIONAL).load_textual_inversion(tmp_path / "a.safetensors")
    assert tiny_model(TINY).load_textual_inversion(tmp_path / "a.safetensors") == ["<x>"]


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04.", b"PK\x03\x04xx", None])
@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_damaged_and_missing_files(
    content: bytes | None, ending: str, untouched: DiffusionModel, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{ending}"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=path.name) as caught:
        untouched.load_textual_inversion(path)
    assert "\n" not in str(caught.value)
