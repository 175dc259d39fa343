"""The consistency stage: what it teaches, by laws, and that a run with it goes on exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stable_diffusion.diffusion.guidance import guide
from stable_diffusion.training.draw import Draw, Samples
from stable_diffusion.training.stages.consistency import ConsistencySettings, ConsistencyStage
from tests.tiny import STAGES, TEXT, TINY, shapes, tiny_model

FLOW = replace(
    TINY,
    text_encoders=(replace(TEXT, trainable=True),),
    schedule=replace(TINY.schedule, kind="flow", prediction_type="flow_prediction", shift=3.0),
)
BATCH = 6


class To(nn.Module):
    """The velocity of a flow whose every path ends in one point, that of the text's first number or a fixed one."""

    def __init__(self, point: float | None = None) -> None:
        super().__init__()
        self.point, self.weight = point, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, timesteps: Tensor, tokens: Tensor, mask: Any, pooled: Any) -> Tensor:
        sigma = (timesteps / 1000).view(-1, 1, 1, 1)
        point = tokens[:, 0, 0].view(-1, 1, 1, 1) if self.point is None else self.point + self.weight
        return (x - point) / sigma


def stage_of(**settings: Any) -> ConsistencyStage:
    stage = ConsistencyStage(tiny_model(FLOW), ConsistencySettings(batch_size=BATCH, **settings))
    stage.latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).half().numpy()
    stage.samples = Samples(3)
    stage.captions = ["", "a red circle", "a blue square", "a green heart"]
    stage.captions_of = [[1], [2], [3]]
    stage.text_caches = [None] * len(FLOW.text_encoders)
    return stage


def draw(step: int = 0) -> Draw:
    return Draw(0, "consistency", step, range(BATCH), BATCH)


def test_who_is_consistent_has_nothing_to_learn() -> None:
    """On a flow into one point every prediction is that point, guided or not."""
    stage = stage_of()
    stage.unet, stage.teacher = To(0.3), (To(0.3),)  # type: ignore[assignment]
    loss = stage(*stage.batch(draw()))["consistency"]
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(stage.unet.weight.grad) == pytest.approx(0, abs=1e-3)  # type: ignore[arg-type]
    stage.unet = To(0.5)  # type: ignore[assignment]
    assert float(stage(*stage.batch(draw()))["consistency"].detach()) >= 0


def test_the_last_step_is_taught_by_the_guided_teacher() -> None:
    stage = stage_of(levels=2, guidance_scale=3.0)
    stage.levels = stage.levels[1:]  # from the last noisy level to the clean one
    stage.unet, stage.teacher = To(0.0), (To(None),)  # type: ignore[assignment]
    batch = stage.batch(draw())
    texts = stage._embeds(list(batch[8:]), BATCH + 1).tokens[:, 0, 0].detach()
    points = texts.view(-1, 1, 1, 1)
    wanted = guide(points[:-1], points[-1:].expand(BATCH, 1, 1, 1), stage.guidance)
    error = wanted.expand(-1, *batch[0].shape[1:]).square().sum(dim=(1, 2, 3)).sqrt().mean()
    assert float(stage(*batch)["consistency"].detach()) == pytest.approx(float(error), rel=0.02)


def test_levels_follow_each_other() -> None:
    stage = stage_of(levels=8)
    _, _, t, alpha, sigma, after, alpha_after, sigma_after, *_ = stage.batch(draw())
    assert (after < t).all()
    torch.testing.assert_close(alpha + sigma, torch.ones(BATCH))
    torch.testing.assert_close(alpha_after + sigma_after, torch.ones(BATCH))
    every = {round(level.sigma, 5) for level in stage.levels}
    assert {round(float(value), 5) for value in (*sigma, *sigma_after)} <= every


def test_only_the_u_net_is_trained() -> None:
    (player,) = stage_of().players().values()
    assert all(name.startswith("unet.") for name in player.parameters)


def test_a_run_with_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    data = shapes(tmp_path / "shapes")
    stages = (*STAGES, ConsistencySettings(batch_size=4, min_steps=1))

    def trained(folder: str, stops_at: int | None) -> dict[str, Tensor]:
        def stop(event: Any) -> bool:
            return getattr(event, "stage", "") == "consistency" and event.index + 1 == stops_at

        torch.manual_seed(0)
        model = tiny_model(FLOW)
        model.train(data, stages, output_dir=tmp_path / folder, steps=4, callback=stop)
        return {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}

    whole = trained("whole", None)
    stopped = trained("parts", 2)
    parts = trained("parts", None)
    assert not all(torch.equal(tensor, stopped[name]) for name, tensor in whole.items())
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
