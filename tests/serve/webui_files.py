"""What the tests of the webui's interface share: its client, models, and pictures as it sends them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
import webuiapi
from PIL import Image
from safetensors.torch import save_file

from stable_diffusion.config import SamplerConfig, ScheduleConfig
from stable_diffusion.model import DiffusionModel
from tests.lively import lively
from tests.serve.served import PATIENCE, Running, until
from tests.tiny import TINY, tiny_model

DISCRETE = replace(
    TINY,
    name="discrete",
    schedule=ScheduleConfig(prediction_type="v_prediction"),
    sampler=SamplerConfig(name="ddim"),
)


def png(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return base64.b64encode(content.getvalue()).decode()


def colours(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def models(folder: Path) -> dict[str, DiffusionModel]:
    """Two, the second with a LoRA."""
    first, second = tiny_model(), tiny_model(DISCRETE, seed=1)
    for model in (first, second):
        lively(model.unet)
    second.load_lora(lora_file(second, folder / "fox.safetensors"), 0.0)
    return {"tiny": first, "discrete": second}


def lora_file(model: DiffusionModel, file: Path) -> Path:
    """A LoRA of one layer, as kohya's scripts name it."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    outputs, inputs = dict(model.unet.named_modules())[name].weight.shape
    values = torch.linspace(-1, 1, inputs)
    tensors = {"up": torch.ones(outputs, 1), "down": values[None]}
    module = f"lora_unet_{name.replace('.', '_')}"
    save_file({f"{module}.lora_{key}.weight": value for key, value in tensors.items()}, file)
    return file


def client(running: Running) -> webuiapi.WebUIApi:
    return webuiapi.WebUIApi(baseurl=f"{running.url}/sdapi/v1", steps=2)


Post = Callable[[str, Any], requests.Response]
"""Posts a body to a path below /sdapi/v1."""


def poster(running: Running) -> Post:
    return lambda name, body: requests.post(f"{running.url}/sdapi/v1/{name}", json=body, timeout=PATIENCE)


OURS = "sdapi 127.0.0.1"
"""The client that these tests are."""


@contextmanager
def asking(running: Running) -> Iterator[Callable[[dict[str, Any]], Future[requests.Response]]]:
    """Posts a txt2img in another thread, and is back when the job is in the queue."""
    with ThreadPoolExecutor(2) as threads:

        def start(body: dict[str, Any]) -> Future[requests.Response]:
            before = len(running.jobs.of(OURS))
            url = f"{running.url}/sdapi/v1/txt2img"
            answer = threads.submit(requests.post, url, json=body, timeout=PATIENCE)
            until(lambda: answer.done() or len(running.jobs.of(OURS)) > before)
            return answer

        yield start
