"""Journeys over our own surface: jobs, their events and pictures, live typing."""

from __future__ import annotations

import base64
import io
import json

import pytest
from PIL import Image

from stable_diffusion.generation.metadata import parameters
from stable_diffusion.generation.request import FIELDS, LOADING
from tests.serve.served import Running, data_uri, until
from tests.tiny import TINY


def test_a_job_from_words_to_picture(tiny: Running) -> None:
    """Its picture has the bytes that the library gives, and its settings inside."""
    answer = tiny.post("/api/jobs", {"prompt": "a red circle", "seed": 7, "num_images_per_prompt": 2})
    assert answer.status == 202
    id = answer.json["id"]
    assert answer.headers["Location"] == f"/api/jobs/{id}"
    done = tiny.over(id)
    assert done["status"] == "done" and done["error"] is None and done["seconds"] > 0
    assert [picture["seed"] for picture in done["pictures"]] == [7, 8]
    expected = tiny.server.models.default.model.generate("a red circle", seed=8)[0]
    shown = tiny.get(done["pictures"][1]["url"])
    assert shown.headers["Content-Type"] == "image/png"
    assert shown.picture.tobytes() == expected.tobytes()
    assert json.loads(shown.picture.info["minisd"]) == done["pictures"][1]["settings"]
    assert shown.picture.info["parameters"] == parameters(expected.info["settings"])
    for format in ("jpeg", "webp"):
        other = tiny.get(f"{done['pictures'][1]['url']}?format={format}")
        assert other.headers["Content-Type"] == f"image/{format}"
        assert other.picture.format == format.upper()
    assert tiny.get(f"{done['pictures'][1]['url']}?format=gif").status == 400
    for missing in ("2", "-1", "x", "9" * 5000):
        assert tiny.get(f"/api/jobs/{id}/pictures/{missing}").status == 404


def test_a_second_pass_makes_the_picture_larger_than_the_size(tiny: Running) -> None:
    """Also where that is drawn at another one, and scaled."""
    for width, drawn in ((32, 32), (24, 32)):
        done = tiny.over(
            tiny.job(prompt="a", seed=7, width=width, height=width, hires=2, num_inference_steps=1)
        )
        picture = tiny.get(done["pictures"][0]["url"]).picture
        assert picture.size == (2 * width, 2 * width)
        assert done["pictures"][0]["settings"]["width"] == drawn


def test_models_say_what_can_be_asked(tiny: Running, packaged: Running) -> None:
    found = tiny.get("/api/models").json
    (model,) = found["models"]
    assert model["name"] == "tiny" and model["default"] is True and model["packaged"] is False
    assert (model["width"], model["factor"], model["num_inference_steps"]) == (32, TINY.vae.factor, 4)
    chosen = FIELDS.keys() - set(LOADING) - {"latents"}
    assert set(found["settings"]) == chosen and len(found["settings"]) == len(chosen)
    assert found["limits"]["waiting"] == 64 and "euler" in found["samplers"] and found["version"]
    assert [each["packaged"] for each in packaged.get("/api/models").json["models"]] == [True]


def test_events_tell_all_that_happens(tiny: Running) -> None:
    id = tiny.job(prompt="a", seed=1, previews=2, num_images_per_prompt=2)
    with tiny.events(f"/api/jobs/{id}/events") as events:
        found = list(events)
    names = [name for name, _ in found]
    assert names.count("picture") == 2 and names[-1] == "done"
    assert set(names) <= {"queued", "step", "picture", "done"}
    pictures = [data for name, data in found if name == "picture"]
    assert [picture["index"] for picture in pictures] == [0, 1]
    steps = [(data["picture"], data["step"]) for name, data in found if name == "step"]
    assert steps == sorted(steps)
    with tiny.events(f"/api/jobs/{id}/events") as events:
        again = list(events)
    assert [name for name, _ in again] == ["picture", "picture", "done"], "who comes late gets it all"
    assert [data for name, data in again if name == "picture"] == pictures


def test_previews_come_evenly(packaged: Running) -> None:
    """Three of eight steps, as pictures of the model's size, each once."""
    with packaged.events("/api/live", {"prompt": "a fox", "seed": 7, "previews": 3}) as events:
        found = list(events)
    previews = [data for name, data in found if name == "step" and "preview" in data]
    assert [data["step"] for data in previews] == [2, 4, 6]
    with Image.open(io.BytesIO(base64.b64decode(previews[0]["preview"].partition(",")[2]))) as preview:
        assert preview.size == (128, 128)
    (picture,) = [data for name, data in found if name == "picture"]
    assert "url" not in picture and picture["png"].startswith("data:image/png;base64,")
    assert found[-1][0] == "done"


def test_who_closes_a_live_stream_frees_the_place(packaged: Running) -> None:
    """Within a step, though the picture has a hundred."""
    with packaged.events("/api/live", {"prompt": "a fox", "num_inference_steps": 100}) as events:
        assert next(name for name, _ in events if name == "step")
    until(lambda: packaged.jobs.running is None, 20)


def test_a_dropped_stream_leaves_its_job(tiny: Running) -> None:
    id = tiny.job(prompt="a", num_inference_steps=30)
    with tiny.events(f"/api/jobs/{id}/events") as events:
        next(events)
    assert tiny.over(id)["status"] == "done"


def test_a_job_is_cancelled_by_its_id_alone(packaged: Running) -> None:
    first, second = (packaged.job(prompt="a fox", num_inference_steps=steps) for steps in (140, 1))
    assert packaged.ask("DELETE", f"/api/jobs/{first}").status == 204
    assert packaged.over(first)["status"] == "cancelled"
    assert packaged.over(second)["status"] == "done"
    assert packaged.ask("DELETE", f"/api/jobs/{second}").status == 204, "one that is over stays"
    assert packaged.over(second)["status"] == "done"
    with packaged.events(f"/api/jobs/{first}/events") as events:
        assert list(events)[-1] == ("cancelled", {})


def test_sizes_are_drawn_natively_and_scaled(tiny: Running) -> None:
    done = tiny.over(tiny.job(prompt="a", width=100, height=50, seed=3))
    (picture,) = done["pictures"]
    assert (picture["width"], picture["height"]) == (100, 50)
    drawn = picture["settings"]
    assert abs(drawn["width"] * drawn["height"] - 32**2) < 32 * 8 and drawn["width"] > 1.5 * drawn["height"]
    assert tiny.get(picture["url"]).picture.size == (100, 50)


@pytest.mark.parametrize("size", [{}, {"width": 80, "height": 80}])
def test_a_mask_keeps_the_other_bytes(tiny: Running, size: dict[str, int]) -> None:
    """At the size of the image, whether that is drawn or scaled."""
    side = size.get("width", 32)
    image = Image.effect_noise((side, side), 60).convert("RGB")
    mask = Image.new("L", (side, side))
    mask.paste(255, (0, 0, side // 2, side))
    fields = {"image": data_uri(image), "mask_image": data_uri(mask), "strength": 1.0, **size}
    (picture,) = tiny.over(tiny.job(prompt="a", **fields))["pictures"]
    drawn = tiny.get(picture["url"]).picture
    box = (side // 2, 0, side, side)
    assert drawn.crop(box).tobytes() == image.crop(box).tobytes()
    assert drawn.tobytes() != image.tobytes()
    alone = tiny.server.models.default.model.generate(
        "a", image=image, mask_image=mask, strength=1.0, seed=picture["seed"]
    )
    if not size:
        assert drawn.tobytes() == alone[0].tobytes()


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({}, "prompt", "prompt is missing"),
        ({"prompt": 3}, "prompt", "prompt"),
        ({"prompt": "a", "steps": 3}, "steps", "here it is called 'num_inference_steps'"),
        ({"prompt": "a", "nonsense": 3}, "nonsense", "unknown setting"),
        ({"prompt": "a", "num_inference_steps": 151}, "num_inference_steps", "at most 150"),
        ({"prompt": "a", "num_images_per_prompt": 17}, "num_images_per_prompt", "at most 16"),
        ({"prompt": "a", "width": 2049}, "width", "at most 2048"),
        ({"prompt": "a", "guidance_scale": "x"}, "guidance_scale", "guidance_scale must be"),
        ({"prompt": "a", "sampler": "none"}, "sampler", "unknown sampler"),
        ({"prompt": "a", "previews": 21}, "previews", "from 0 to 20"),
        ({"prompt": "a", "previews": True}, "previews", "previews"),
        ({"prompt": "a", "seed": -1}, "seed", "seed must be from 0"),
        ({"prompt": "a", "vae": "x"}, "vae", "when the server starts"),
        ({"prompt": "a", "lora": {"x": 1}}, "lora", "unknown LoRA 'x'"),
        ({"prompt": "a <lora:x:1>"}, None, "x"),
        ({"prompt": "a", "spacing": "karras"}, "spacing", "flow"),
        ({"prompt": "a", "width": 1024, "hires": 4}, "width", "times hires may be at most 2048"),
        ({"prompt": "a", "image": "/etc/passwd"}, "image", "must be a picture in base64"),
        ({"prompt": "a", "image": "http://127.0.0.1/x.png"}, "image", "nothing is fetched"),
        (
            {"prompt": "a", "mask_image": data_uri(Image.new("L", (8, 8), 255))},
            "mask_image",
            "needs the image",
        ),
        ({"prompt": "x" * 10_001}, None, "at most 10,000 letters"),
    ],
    ids=lambda value: next(reversed(value)) if isinstance(value, dict) and value else None,
)
def test_what_cannot_be_asked_is_a_sentence(
    tiny: Running, fields: dict[str, object], field: str, said: str
) -> None:
    answer = tiny.post("/api/jobs", fields)
    assert answer.status == 400
    assert answer.json["error"]["field"] == field
    assert said in answer.json["error"]["message"]


def test_other_bodies_and_paths(tiny: Running) -> None:
    assert tiny.post("/api/jobs", {"prompt": "a", "model": "other"}).status == 404
    assert tiny.post("/api/jobs", b"{}", **{"Content-Type": "text/plain"}).status == 415
    for body in (b"[]", b"{", b'{"prompt": "\xff"}', b"[" * 100_000, b'{"prompt": ' + b"1" * 5000 + b"}"):
        assert tiny.post("/api/jobs", body, **{"Content-Type": "application/json"}).status == 400, body[:20]
    for path in (
        "/api/jobs/none",
        "/api/jobs/none/events",
        "/api/jobs/none/pictures/0",
        "/api/nothing",
        "/api/jobs/",
    ):
        answer = tiny.get(path)
        assert answer.status == 404 and set(answer.json["error"]) == {"message", "field"}
    refused = tiny.get("/api/live")
    assert refused.status == 405 and refused.headers["Allow"] == "POST"


def test_half_a_letter_is_no_fault(tiny: Running) -> None:
    """A prompt that ends within an emoji, as it is typed."""
    body = b'{"prompt": "a \\ud83d", "seed": 1, "num_inference_steps": 1}'
    answer = tiny.post("/api/jobs", body, **{"Content-Type": "application/json"})
    (picture,) = tiny.over(answer.json["id"])["pictures"]
    assert picture["settings"]["prompt"] == "a \ufffd"
    whole = b'{"prompt": "a \\ud83d\\ude00", "seed": 1, "num_inference_steps": 1}'
    answer = tiny.post("/api/jobs", whole, **{"Content-Type": "application/json"})
    assert tiny.over(answer.json["id"])["pictures"][0]["settings"]["prompt"] == "a \U0001f600"


def test_prompts_are_read_as_the_server_says(tiny: Running) -> None:
    """Unless the request says how, also where it says null."""
    asked = [{}, {"prompt_syntax": None}, {"prompt_syntax": "plain"}]
    syntaxes = []
    for fields in asked:
        id = tiny.job(prompt="a (red:1.3) circle", seed=1, num_inference_steps=1, **fields)
        syntaxes.append(tiny.over(id)["pictures"][0]["settings"].get("prompt_syntax", "plain"))
    assert syntaxes == ["a1111", "a1111", "plain"]
