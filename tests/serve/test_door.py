"""Laws of what clients may know: names of models and files, and no folder of this machine."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from stable_diffusion import cli
from stable_diffusion.cli import serve
from stable_diffusion.serve.door import Served
from tests.serve.served import Running, serving
from tests.serve.webui_files import lora_file
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (None, None),
        ("owner/name", "owner/name"),
        ("./owner/name", "mine"),
        ("/models/model", "mine"),
        (r"C:\me\model.ckpt", "mine"),
        ("..", "mine"),
    ],
)
def test_a_model_by_its_name(model: str | None, told: str | None) -> None:
    """None is the packaged model, which other machines have too; so is what the hub has."""
    served = Served(name="mine", model=tiny_model(), created=1)
    assert served.public({"model": model, "seed": 3}) == {"model": told, "seed": 3}


def test_files_without_their_folders() -> None:
    settings = {
        "model": None,
        "vae": "/models/vae/",
        "text_encoder": r"C:\me\clip",
        "embedding": ["/models/a.pt:word", r"C:\me\b.pt", "c.pt:<x>"],
        "lora": {"style": 0.5},
    }
    told = Served(name="mine", model=tiny_model(), created=1).public(settings)
    assert told == {
        "model": None,
        "vae": "vae",
        "text_encoder": "clip",
        "embedding": ["a.pt:word", "b.pt", "c.pt:<x>"],
        "lora": {"style": 0.5},
    }
    assert settings["vae"] == "/models/vae/"


def test_no_surface_tells_a_path(tmp_path: Path) -> None:
    """Neither in answers nor in the files of pictures, whose bytes are those of the model in its folder."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "mine")
    served = serve.loaded(
        [str(tmp_path / "mine")], [str(lora_file(model, tmp_path / "fox.safetensors"))], [], None, "cpu"
    )
    asked = {"prompt": "a", "seed": 1, "num_inference_steps": 1}
    with serving({each.name: each.model for each in served}) as running:
        (picture,) = running.over(running.job(**asked))["pictures"]
        assert (picture["settings"]["model"], picture["settings"]["lora"]) == ("mine", {"fox": 1.0})
        answers = {
            "ours": running.get(picture["url"]).body,
            "openai": image(
                running, "/v1/images/generations", {"prompt": "a", "steps": 1}, "data", "b64_json"
            ),
            "webui": image(running, "/sdapi/v1/txt2img", {"prompt": "a", "steps": 1}, "images"),
        }
        for path in ("/api/models", "/v1/models", *(f"/sdapi/v1/{name}" for name in ("sd-models", "loras"))):
            answers[path] = running.get(path).body
    for name, answer in answers.items():
        assert str(tmp_path).encode() not in answer, name
    expected = served[0].model.generate("a", seed=1, num_inference_steps=1)[0]
    assert Image.open(io.BytesIO(answers["ours"])).tobytes() == expected.tobytes()


def image(running: Running, path: str, body: dict[str, object], *keys: str) -> bytes:
    """The first file in an answer, which itself says no path either."""
    answer = running.post(path, body)
    assert answer.status == 200
    (found,) = answer.json[keys[0]]
    file = base64.b64decode(found[keys[1]] if keys[1:] else found)
    assert json.loads(Image.open(io.BytesIO(file)).info["minisd"])["model"] == "mine"
    assert b'"model": "mine"' in file and b"Model: mine" in file
    return file + answer.body


def test_the_packaged_models_pictures_can_be_made_again(packaged: Running, tmp_path: Path) -> None:
    """By ``minisd generate --from``: they name no model."""
    done = packaged.over(packaged.job(prompt="a fox", seed=7, num_inference_steps=2))
    file = tmp_path / "fox.png"
    file.write_bytes(packaged.get(done["pictures"][0]["url"]).body)
    cli.main(["generate", "--from", str(file), "--output", str(tmp_path / "again.png")])
    assert Image.open(tmp_path / "again.png").tobytes() == Image.open(file).tobytes()
