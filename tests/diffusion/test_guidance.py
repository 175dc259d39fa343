"""Classifier-free guidance: its fixed points, the rescaling, the interval."""

from __future__ import annotations

import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from stable_diffusion.config import Guidance
from stable_diffusion.diffusion.guidance import guide, is_on

from .reference import FLOW, STABLE_DIFFUSION, normal

CONDITIONAL, UNCONDITIONAL = normal(1), 0.5 + 2 * normal(2)


def test_scale_one_is_the_conditional_prediction() -> None:
    """Ho & Salimans 2022, equation 6, w = 0."""
    torch.testing.assert_close(guide(CONDITIONAL, UNCONDITIONAL, Guidance(scale=1.0)), CONDITIONAL)


def test_scale_zero_is_the_unconditional_prediction() -> None:
    """Ho & Salimans 2022, equation 6, w = -1, bit for bit."""
    assert torch.equal(guide(CONDITIONAL, UNCONDITIONAL, Guidance(scale=0.0)), UNCONDITIONAL)


def test_scale_extrapolates() -> None:
    """Ho & Salimans 2022, equation 6: (1 + w) conditional - w unconditional, w = scale - 1."""
    expected = 7.5 * CONDITIONAL - 6.5 * UNCONDITIONAL
    torch.testing.assert_close(guide(CONDITIONAL, UNCONDITIONAL, Guidance(scale=7.5)), expected)
    assert not torch.allclose(guide(CONDITIONAL, UNCONDITIONAL, Guidance(scale=7.6)), expected, atol=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_equal_predictions_are_left_alone(scale: float) -> None:
    """A prompt that changes nothing gives the same at every scale, rescaled or not."""
    for rescale in (0.0, 0.7):
        guided = guide(CONDITIONAL, CONDITIONAL, Guidance(scale=scale, rescale=rescale))
        torch.testing.assert_close(guided, CONDITIONAL)


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
def test_rescale_equals_the_reference(rescale: float) -> None:
    """Lin et al. 2023, equations 15 and 16, against diffusers' rescale_noise_cfg."""
    guided = guide(CONDITIONAL, UNCONDITIONAL, Guidance(scale=7.5))
    expected = rescale_noise_cfg(guided, CONDITIONAL, guidance_rescale=rescale)
    ours = guide(CONDITIONAL, UNCONDITIONAL, Guidance(scale=7.5, rescale=rescale))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_full_rescale_has_the_conditional_deviation() -> None:
    """Lin et al. 2023, equation 15: each picture gets its own conditional deviation back."""
    conditional = CONDITIONAL * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
    guided = guide(conditional, UNCONDITIONAL, Guidance(scale=7.5, rescale=1.0))
    torch.testing.assert_close(guided.std((1, 2, 3)), conditional.std((1, 2, 3)))


@pytest.mark.parametrize("schedule", [STABLE_DIFFUSION, FLOW])
def test_interval(schedule) -> None:
    """Kynkäänniemi et al. 2024: guidance only inside the interval, ends included."""
    guidance = Guidance(scale=3.0, interval=(0.2, 0.8))
    on = [is_on(guidance, schedule.level(t), schedule) for t in (0, 199, 200, 500, 800, 801, 999)]
    assert on == [False, False, True, True, True, False, False]


def test_no_guidance_at_scale_one_and_below() -> None:
    """It spares the unconditional call; above 1 the whole range needs it by default."""
    levels = [STABLE_DIFFUSION.level(t) for t in (0, 500, 999)] + [FLOW.level(1000)]
    schedules = [STABLE_DIFFUSION] * 3 + [FLOW]
    for scale, expected in ((1, False), (0, False), (0.5, False), (-3, False), (1.01, True), (7.5, True)):
        on = [is_on(Guidance(scale=scale), *pair) for pair in zip(levels, schedules, strict=True)]
        assert on == [expected] * 4
