"""Parity: our samplers walk where diffusers' schedulers walk, step by step."""

from __future__ import annotations

import pytest
import torch

from stable_diffusion.config import SamplerConfig, ScheduleConfig
from stable_diffusion.diffusion.names import SAMPLERS
from stable_diffusion.diffusion.samplers import initial_scale, sampling_levels
from stable_diffusion.diffusion.schedule import Schedule

from .reference import (
    REFERENCES,
    STABLE_DIFFUSION,
    VARIANCE_EXPLODING,
    ZERO_SNR,
    error,
    reference_scheduler,
    reference_walk,
    steps,
)

# That warning is about diffusers' own lines.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

EXACT = 1e-8  # the reference computes with our float64 table
SINGLE = 1e-5  # the reference computes in float32
COUNTS = [10, 25]
EXACT_SAMPLERS = ["ddpm", "ddim", "pndm", "lcm", "tcd"]
SINGLE_SAMPLERS = [name for name in SAMPLERS if name not in EXACT_SAMPLERS]


def spacings_of(name: str) -> list[str | None]:
    """Those that the reference can have."""
    row = SAMPLERS[name]
    if row.spacing == "lcm":
        return [None]
    spacings: list[str | None] = ["leading", "linspace", "trailing"]
    if name in SINGLE_SAMPLERS and name != "euler_a":
        spacings += ["karras", "exponential", "beta"]
    return [*spacings, "sgm_uniform"] if row.grid == "intervals" else spacings


def assert_equal_walks(ours, reference, tolerance: float) -> None:
    assert len(ours) == len(reference)
    for step, x in zip(ours, reference, strict=True):
        assert error(step.x, x) < tolerance, f"step {step.index}"


def assert_parity(name: str, count: int, tolerance: float, *, schedule=STABLE_DIFFUSION, **settings) -> None:
    assert_equal_walks(
        steps(name, count, schedule, **settings), reference_walk(name, count, schedule, **settings), tolerance
    )


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddpm_with_the_posterior_variance(count: int, prediction: str, spacing: str) -> None:
    """Ho et al. 2020, algorithm 2, sigma² = beta-tilde; the reference's smallest deviation is 1e-10, not 0."""
    assert_parity("ddpm", count, EXACT, spacing=spacing, prediction=prediction)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddpm_with_beta_for_variance(count: int, prediction: str) -> None:
    """Ho et al. 2020, section 3.2, sigma² = beta; only at t = 0 does the reference know its last step."""
    schedule = Schedule(ScheduleConfig(steps_offset=0))
    ours = steps("ddpm", count, schedule, prediction=prediction, variance="large")
    reference = reference_walk("ddpm", count, schedule, prediction=prediction, variance_type="fixed_large")
    assert_equal_walks(ours, reference, EXACT)
    small = steps("ddpm", count, schedule, prediction=prediction)
    assert error(small[-1].x, reference[-1]) > 1e-3


@pytest.mark.parametrize(
    ("count", "spacing"),
    [
        (count, spacing)
        for count in (1, 7, *COUNTS)
        for spacing in ("leading", "trailing", "linspace")
        if (count, spacing) != (1, "linspace")  # its one point is t = 0 there and t = 999 here
    ],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim(count: int, prediction: str, spacing: str, eta: float) -> None:
    """Song et al. 2020, equations 12 and 16."""
    assert_parity("ddim", count, EXACT, spacing=spacing, prediction=prediction, eta=eta)


@pytest.mark.parametrize("count", COUNTS)
def test_ddim_to_clean_latents(count: int) -> None:
    """set_alpha_to_one: the last step goes to alpha = 1."""
    schedule = Schedule(ScheduleConfig(set_alpha_to_one=True))
    reference = reference_walk("ddim", count, schedule, set_alpha_to_one=True)
    assert_equal_walks(steps("ddim", count, schedule), reference, EXACT)
    assert error(steps("ddim", count)[-1].x, reference[-1]) > 1e-4


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_ddim_from_zero_terminal_snr(count: int, eta: float, prediction: str) -> None:
    """Lin et al. 2023, section 3: trailing from alpha = 0."""
    settings = {"spacing": "trailing", "prediction": prediction, "eta": eta}
    assert steps("ddim", count, ZERO_SNR, **settings)[0].level.alpha == 0
    assert_parity("ddim", count, EXACT, schedule=ZERO_SNR, **settings)


@pytest.mark.parametrize("count", [2, *COUNTS])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_pndm(count: int, spacing: str) -> None:
    """Liu et al. 2022 on eps; under v the reference's multistep runs on v, which is another method."""
    assert_parity("pndm", count, EXACT, spacing=spacing)


@pytest.mark.parametrize("count", [1, 4, *COUNTS])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_lcm(count: int, prediction: str) -> None:
    """Luo et al. 2023, algorithm 3."""
    assert_parity("lcm", count, EXACT, prediction=prediction)


@pytest.mark.parametrize("count", [1, 4, *COUNTS])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [None, 0.0, 0.3, 0.5, 1.0])
def test_tcd(count: int, prediction: str, eta: float | None) -> None:
    """Zheng et al. 2024, strategic stochastic sampling; the reference's own eta is 0.3."""
    assert_parity("tcd", count, EXACT, prediction=prediction, eta=eta)
    if eta is None:
        assert torch.equal(steps("tcd", count)[-1].x, steps("tcd", count, eta=0.3)[-1].x)


@pytest.mark.parametrize("count", [3, 14, 15, 16])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_end_of_the_third_order(count: int, prediction: str) -> None:
    """In fewer than 15 steps the last but one is of second order."""
    assert_parity("dpmpp_3m", count, SINGLE, prediction=prediction)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_1m", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m"])
def test_align_your_steps(name: str, prediction: str) -> None:
    """Sabour et al. 2024: diffusers takes the ten published timesteps, and so do our ten steps."""
    assert_parity(name, 10, SINGLE, spacing="align_your_steps", prediction=prediction)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("name", "spacing"), [(name, spacing) for name in SINGLE_SAMPLERS for spacing in spacings_of(name)]
)
def test_samplers_that_the_reference_runs_in_single_precision(
    name: str, spacing: str, prediction: str, count: int
) -> None:
    """Karras et al. 2022; Lu et al. 2022; Zhao et al. 2023: the latents after every step."""
    assert_parity(name, count, SINGLE, spacing=spacing, prediction=prediction)


@pytest.mark.parametrize("name", SAMPLERS)
def test_parity_can_fail(name: str) -> None:
    """One step more, another prediction or guidance + 0.1 are not equal."""
    reference = reference_walk(name, 10)[-1]
    tolerance = EXACT if name in EXACT_SAMPLERS else SINGLE
    assert error(steps(name, 10)[-1].x, reference) < tolerance
    assert error(steps(name, 11)[-1].x, reference) > 10 * SINGLE
    assert error(steps(name, 10, prediction="v_prediction")[-1].x, reference) > 10 * SINGLE
    assert error(steps(name, 10, guidance=7.6)[-1].x, reference) > 10 * SINGLE


def reference_agrees(name: str, spacing: str | None, count: int) -> bool:
    """One point of linspace is t = 0 there and t = 999 here, and what spreads noise levels begins with it."""
    return count > 1 or spacing in (None, "leading", "trailing") or SAMPLERS[name].grid == "intervals"


@pytest.mark.parametrize(
    ("name", "spacing", "count"),
    [
        (name, spacing, count)
        for name in SAMPLERS
        for spacing in spacings_of(name)
        for count in (1, 2, 7, 10, 25, 50)
        if reference_agrees(name, spacing, count)
    ],
)
def test_timesteps_and_levels(name: str, spacing: str | None, count: int) -> None:
    """Timesteps, noise levels and the start's deviation equal the reference's vectors."""
    config = SamplerConfig(name=name, spacing=spacing)
    levels = sampling_levels(config, STABLE_DIFFUSION, count)
    scheduler = reference_scheduler(name, count, spacing=spacing)
    timesteps = scheduler.timesteps
    if name == "pndm":
        timesteps = torch.cat([timesteps[:1], timesteps[2:]])  # the second is asked twice
    elif name == "heun":
        timesteps = timesteps[::2]
    ours = torch.tensor([level.t for level in levels[:-1]], dtype=torch.float64)
    assert len(levels) == count + 1
    torch.testing.assert_close(ours, timesteps.double(), rtol=1e-6, atol=1e-4)
    if hasattr(scheduler, "sigmas"):
        sigmas = scheduler.sigmas[::2] if name == "heun" else scheduler.sigmas[:-1]
        ratios = torch.tensor([level.sigma / level.alpha for level in levels[:-1]], dtype=torch.float64)
        torch.testing.assert_close(ratios, sigmas.double(), rtol=1e-6, atol=0)
    first = levels[0]
    scale = float(scheduler.init_noise_sigma) * (first.alpha if name in VARIANCE_EXPLODING else 1)
    assert initial_scale(config, STABLE_DIFFUSION, first) == pytest.approx(scale, rel=1e-6)


def test_every_sampler_has_a_reference() -> None:
    """A new sampler needs an entry in the table of references."""
    assert set(REFERENCES) == set(SAMPLERS)
