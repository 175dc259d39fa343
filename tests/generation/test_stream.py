"""The stream of steps: cancelled, previewed, stopped, and alone in its thread; and networks that are no modules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stable_diffusion import DiffusionModel, InputError
from stable_diffusion.config import ModelConfig
from stable_diffusion.diffusion.schedule import Schedule
from stable_diffusion.generation import pipeline
from stable_diffusion.generation.pipeline import Result, Steps
from stable_diffusion.generation.request import Request
from stable_diffusion.nn.text import PromptEmbeds, PromptEncoder
from tests.lively import lively
from tests.tiny import KL, TINY, tiny_model


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return lively(tiny_model(replace(TINY, vae=KL)))


def test_a_stream_gives_the_steps_and_then_the_result(model: DiffusionModel) -> None:
    request = model.request("a fox", seed=3)
    steps = model.stream(request)
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as end:
            result = end.value
            break
    assert isinstance(result, Result) and result.notes == ()
    assert [step.index for step in seen] == [0, 1, 2, 3]
    (expected,) = model.generate("a fox", seed=3)
    assert result.pictures[0].tobytes() == expected.tobytes()
    assert Request.from_dict(result.pictures[0].info["settings"]) == request


def test_a_step_can_be_decoded_and_the_last_one_is_the_picture(model: DiffusionModel) -> None:
    steps = model.stream(model.request("a fox", seed=3))
    previews = [model.decode(step.x0)[0] for step in steps]
    assert len({preview.tobytes() for preview in previews}) == 4
    assert previews[-1].tobytes() == model.generate("a fox", seed=3)[0].tobytes()


def test_closing_a_stream_cancels_it(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    predict = model.unet.predict
    monkeypatch.setattr(model.unet, "predict", lambda *a: calls.append(1) or predict(*a))  # type: ignore[func-returns-value]
    steps = model.stream(model.request("a fox", seed=3, guidance_scale=1.0))
    next(steps)
    steps.close()
    assert len(calls) == 1
    with pytest.raises(StopIteration):
        next(steps)


def test_a_stream_that_is_sent_true_stops(model: DiffusionModel) -> None:
    steps = model.stream(model.request("a fox", seed=3))
    first = next(steps)
    with pytest.raises(StopIteration) as end:
        steps.send(True)
    assert end.value.value.pictures[0].tobytes() == model.decode(first.x0)[0].tobytes()


def test_notes_are_in_the_result_and_generate_warns(model: DiffusionModel) -> None:
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen Fifteen sixteen"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = pipeline.finished(model.stream(model.request([long, "b"], seed=0, num_images_per_prompt=2)))
    assert len(result.pictures) == 4
    (note,) = result.notes
    assert "'Fifteen sixteen'" in note
    with pytest.warns(UserWarning, match="Fifteen sixteen"):
        model.generate(long, seed=0)


def test_a_text_is_tokenised_once(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (tokenizer,) = model.text_encoder.tokenizers
    seen: list[list[str]] = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, texts: seen.append(texts) or call(self, texts)
    )
    model.generate(["a", "b"], "c", seed=0, num_images_per_prompt=2)
    assert seen == [["a", "b", "c"]]


def test_levels_are_planned_once(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    levels = Schedule.levels
    monkeypatch.setattr(Schedule, "levels", lambda self, *a: planned.append(a) or levels(self, *a))
    model.generate("a", seed=0)
    assert len(planned) == 1


def test_eight_threads_give_what_eight_calls_give(model: DiffusionModel) -> None:
    """Samplers, sizes and guidance of one thread are not seen by another."""
    calls: list[dict[str, Any]] = [
        {
            "prompt": f"picture {i}",
            "seed": i,
            "sampler": sampler,
            "width": 32 + 4 * i,
            "guidance_scale": 1.0 + i % 3,
        }
        for i, sampler in enumerate(
            ["euler", "ddim", "heun", "dpmpp_2m", "unipc", "euler_a", "dpmpp_2m_sde", "ddpm"]
        )
    ]
    serial = [model.generate(**call)[0].tobytes() for call in calls]
    with ThreadPoolExecutor(8) as threads:
        parallel = list(threads.map(lambda call: model.generate(**call)[0].tobytes(), calls * 2))
    assert parallel == serial * 2


def test_float16_on_a_cpu_is_computed_in_a_copy_for_each_thread() -> None:
    """float16 on a CPU is computed in a copy: the shared model keeps its weights."""
    network = lively(tiny_model(replace(TINY, vae=KL))).half()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    request = network.request("a", seed=0)
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(lambda _: pipeline.finished(network.stream(request)), range(4)))
    assert len({result.pictures[0].tobytes() for result in results}) == 1
    assert all(len(result.notes) == 1 for result in results)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_16_bit_retry_begins_anew_and_leaves_the_model_as_it_is() -> None:
    """Steps are counted from 0 again, each note is said once, and the weights stay in 16 bits."""
    network = lively(tiny_model(replace(TINY, vae=KL))).to(torch.bfloat16)

    def overflow(_: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output * (math.inf if output.dtype == torch.bfloat16 else 1.0)

    network.unet.conv_out.register_forward_hook(overflow)
    long = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    steps = network.stream(network.request(long, seed=0))
    indices = []
    while True:
        try:
            indices.append(next(steps).index)
        except StopIteration as end:
            result = end.value
            break
    assert indices == [0, 1, 2, 3]
    assert ["float32" in note for note in result.notes] == [True, False] and "sixteen" in result.notes[1]
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}


def test_what_a_stream_cannot_do_is_said_before_its_first_step(model: DiffusionModel) -> None:
    for fields, message in (
        ({"spacing": "karras"}, "spacing 'karras'"),
        ({"width": 33}, "multiple of 4"),
        ({"lora": {"a": 0.5}}, "unknown LoRA 'a'"),
        ({"vae": "taesd"}, "vae belongs to loading"),
    ):
        request = model.request("a", **fields)  # type: ignore[arg-type]
        with pytest.raises(InputError, match=message):
            model.stream(request)


class Pull:
    """A network of plain Python: it pulls latents towards a number that the prompt's length gives."""

    device, dtype = torch.device("cpu"), torch.float32
    reads_guidance = False

    def __init__(self) -> None:
        self.prepared: list[tuple[int, tuple[float, ...]]] = []
        self.asked: list[float] = []

    def prepare(
        self, prompt_embeds: PromptEmbeds, timesteps: Collection[float], guidance_scale: float
    ) -> Tensor:
        self.prepared.append((len(prompt_embeds.pooled), tuple(sorted(timesteps))))
        return prompt_embeds.pooled.mean(dim=1)[:, None, None, None]

    def __call__(self, sample: Tensor, timestep: float, prepared: Tensor) -> Tensor:
        self.asked.append(timestep)
        return sample - prepared  # a flow's velocity: from the target to the noise

    class Codec:
        """Four latents a pixel, by repetition."""

        device, dtype = torch.device("cpu"), torch.float32

        def encode(self, images: Tensor) -> Tensor:
            small = images[:, :1, ::4, ::4]
            return small.expand(-1, 4, -1, -1)

        def decode(self, latents: Tensor) -> Tensor:
            return latents[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3)


@dataclass(frozen=True)
class Parts:
    config: ModelConfig
    vae: Any
    network: Any
    text_encoder: PromptEncoder
    scheduler: Schedule

    def adapted(self, weights: Mapping[str, float]) -> AbstractContextManager[object]:
        return nullcontext()

    def widened(self) -> Parts:
        raise AssertionError("float32 already")


def test_the_pipeline_runs_over_a_network_that_is_no_module(model: DiffusionModel) -> None:
    network = Pull()
    parts = Parts(model.config, Pull.Codec(), network, model.text_encoder, model.scheduler)
    request = Request.of(model.config, prompt=["a", "b"], seed=0, num_inference_steps=5)
    steps: Steps = pipeline.stream(parts, request, pipeline.plan(parts, request))
    result = pipeline.finished(steps)
    assert [picture.size for picture in result.pictures] == [(32, 32)] * 2
    assert len(network.asked) == 5
    # Prepared once for both halves of the guided batch, for the very levels that are asked for.
    assert network.prepared == [(4, tuple(sorted(network.asked)))]
    again = pipeline.finished(
        pipeline.stream(parts, replace(request, prompt=("a",)), pipeline.plan(parts, request))
    )
    assert again.pictures[0].tobytes() == result.pictures[0].tobytes()
    image = replace(request, image=result.pictures[0], mask_image=result.pictures[0], strength=0.5)
    repainted = pipeline.finished(pipeline.stream(parts, image, pipeline.plan(parts, image)))
    mask = np.asarray(pipeline.fitted(parts, image, [])[1]) > 127
    before = np.asarray(result.pictures[0])
    for picture in map(np.asarray, repainted.pictures):
        assert (
            mask.any() and (picture[~mask] == before[~mask]).all() and (picture[mask] != before[mask]).any()
        )


def test_outside_the_interval_half_the_network_is_prepared(model: DiffusionModel) -> None:
    network = Pull()
    parts = Parts(model.config, Pull.Codec(), network, model.text_encoder, model.scheduler)
    fields = {"num_inference_steps": 4, "seed": 0, "sampler": "heun", "spacing": "trailing"}
    request = Request.of(model.config, prompt="a", guidance_interval=(0.0, 0.6), **fields)
    pipeline.finished(pipeline.stream(parts, request, pipeline.plan(parts, request)))
    assert network.prepared == [(2, (250.0, 500.0)), (1, (750.0, 1000.0))]
    assert set(network.asked) == {250.0, 500.0, 750.0, 1000.0}
