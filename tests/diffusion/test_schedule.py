"""Schedules: their constants, their law q(x_t | x_0), the levels that they give, and their errors."""

from __future__ import annotations

import math
from itertools import pairwise

import diffusers
import pytest
import scipy.stats
import torch
from diffusers.schedulers import AysSchedules
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from stable_diffusion.config import ScheduleConfig
from stable_diffusion.diffusion.names import SPACINGS, spacing_named
from stable_diffusion.diffusion.schedule import (
    BETAS,
    CLEAN,
    Level,
    Schedule,
    _beta_quantiles,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
)
from stable_diffusion.errors import InputError

from .reference import FLOW, STABLE_DIFFUSION, ZERO_SNR, normal

DDPM_CONFIG = ScheduleConfig(kind="linear", beta_start=1e-4, beta_end=0.02)
DDPM = Schedule(DDPM_CONFIG)
COSINE = Schedule(ScheduleConfig(kind="cosine"))
DISCRETE = {"ddpm": DDPM, "stable_diffusion": STABLE_DIFFUSION, "cosine": COSINE, "zero_snr": ZERO_SNR}
ALL = {**DISCRETE, "flow": FLOW}


def test_ddpm_betas() -> None:
    """Ho et al. 2020, section 4: 1000 betas, linear from 1e-4 to 0.02."""
    betas = linear_betas(DDPM_CONFIG)
    assert betas.dtype == torch.float64 and len(betas) == 1000
    assert (float(betas[0]), float(betas[-1])) == (1e-4, 0.02)
    torch.testing.assert_close(betas.diff(), torch.full((999,), (0.02 - 1e-4) / 999, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kind", "reference"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_alpha_bars_equal_the_reference(kind: str, reference: str) -> None:
    """alpha_bar_t = prod (1 - beta_s), against diffusers' float32 table."""
    config = ScheduleConfig(kind=kind, beta_start=1e-4, beta_end=0.02)
    theirs = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule=reference)
    torch.testing.assert_close(BETAS[kind](config), theirs.betas.double(), rtol=3e-5, atol=3e-7)
    torch.testing.assert_close(
        Schedule(config).alphas_cumprod, theirs.alphas_cumprod.double(), rtol=2e-4, atol=1e-7
    )


def test_stable_diffusion_constants() -> None:
    """Stable Diffusion's published table: alpha_bar from .99915 to .0046601, sigma / alpha .02917 to 14.6146."""
    bars = STABLE_DIFFUSION.alphas_cumprod
    assert float(bars[0]) == pytest.approx(0.99915, abs=1e-12)
    assert float(bars[-1]) == pytest.approx(0.0046601, abs=5e-8)
    assert STABLE_DIFFUSION.ratio_range() == pytest.approx((0.02917, 14.6146), rel=2e-4)
    betas = scaled_linear_betas(ScheduleConfig())
    assert (float(betas[0]), float(betas[-1])) == pytest.approx((0.00085, 0.012), rel=1e-12)


def test_cosine_alpha_bar() -> None:
    """Nichol & Dhariwal 2021, equation 17: alpha_bar = f(t) / f(0), f = cos², s = 0.008, until the clip."""
    time = torch.arange(1, 1000, dtype=torch.float64) / 1000
    f = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
    f0 = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(COSINE.alphas_cumprod[:-1], f / f0, rtol=1e-9, atol=0)
    assert float(cosine_betas(COSINE.config)[-1]) == 0.999


def test_zero_terminal_snr() -> None:
    """Lin et al. 2023, algorithm 1: the last alpha is exactly 0, the first unchanged, as in the reference."""
    bars = ZERO_SNR.alphas_cumprod
    assert float(bars[-1]) == 0.0
    assert float(bars[0]) == pytest.approx(float(STABLE_DIFFUSION.alphas_cumprod[0]), rel=1e-14)
    betas = rescale_zero_terminal_snr(scaled_linear_betas(ScheduleConfig()))
    torch.testing.assert_close(bars, torch.cumprod(1 - betas, 0), rtol=1e-9, atol=1e-15)
    assert ZERO_SNR.level(999) == Level(999, 0.0, 1.0)


@pytest.mark.parametrize("name", DISCRETE)
def test_levels_preserve_variance(name: str) -> None:
    """alpha² + sigma² = 1 and alpha² = alpha_bar at whole and fractional times, noise growing with t."""
    schedule = DISCRETE[name]
    levels = [schedule.level(t / 4) for t in range(4 * 999 + 1)]
    assert all(abs(level.alpha**2 + level.sigma**2 - 1) < 1e-12 for level in levels)
    assert all(a.alpha > b.alpha or b.alpha == 0 for a, b in pairwise(levels))
    bars = torch.tensor([level.alpha**2 for level in levels[::4]], dtype=torch.float64)
    torch.testing.assert_close(bars, schedule.alphas_cumprod, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rectified_flow(shift: float) -> None:
    """Liu et al. 2022: alpha = 1 - sigma; Esser et al. 2024, equation 23: sigma = shift s / (1 + (shift - 1) s)."""
    schedule = Schedule(ScheduleConfig(kind="flow", prediction_type="flow_prediction", shift=shift))
    levels = schedule.levels(4, "trailing")
    expected = [shift * s / (1 + (shift - 1) * s) for s in (1, 0.75, 0.5, 0.25)]
    assert [level.sigma for level in levels[:-1]] == pytest.approx(expected, rel=1e-12)
    assert [level.alpha for level in levels[:-1]] == pytest.approx([1 - s for s in expected], rel=1e-12)
    assert [level.t for level in levels[:-1]] == pytest.approx([1000 * s for s in expected], rel=1e-12)
    assert levels[0] == Level(1000, 0.0, 1.0) and levels[-1] == CLEAN == schedule.final()
    assert schedule.is_flow and len(schedule.alphas_cumprod) == 0


@pytest.mark.parametrize("grid", ["rounded", "fractional", "intervals"])
@pytest.mark.parametrize("count", [1, 2, 7, 50, 333, 500, 998, 999, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ALL)
def test_noise_falls_at_every_step(name: str, spacing: str, count: int, grid: str) -> None:
    """Any number of steps that is allowed gives finite levels without repetition, ending clean; others are refused."""
    most = math.inf if name == "flow" else 50 if spacing == "lcm" else 1000 - (grid == "intervals")
    most = 999 if spacing == "sgm_uniform" and name != "flow" else most
    finite = ("karras", "exponential", "beta", "align_your_steps")
    cannot_be = {"flow": (*finite, "lcm"), "zero_snr": finite}.get(name, ())
    if count > most or spacing in cannot_be:
        with pytest.raises(InputError, match=r"at most|'trailing'"):
            ALL[name].levels(count, spacing, grid)
        return
    levels = ALL[name].levels(count, spacing, grid)
    assert len(levels) == count + 1 and levels[-1] == CLEAN
    assert all(map(math.isfinite, (value for level in levels for value in (level.alpha, level.sigma))))
    assert all(a.sigma > b.sigma or a.alpha < b.alpha for a, b in pairwise(levels))


@pytest.mark.parametrize("name", ALL)
def test_add_noise_has_the_moments_of_q(name: str) -> None:
    """Ho et al. 2020, equation 4: q(x_t | x_0) = N(alpha x_0, sigma² I), one time for each sample."""
    schedule, count = ALL[name], 20_000
    times = torch.tensor([0, 1, 250, 500, 998, 999])
    x0 = torch.full((6, 1, 1, count), 0.8, dtype=torch.float64)
    x = schedule.add_noise(x0, normal(3, tuple(x0.shape)), times)
    for t, sample in zip(times.tolist(), x, strict=True):
        alpha = math.sqrt(float(schedule.alphas_cumprod[t])) if not schedule.is_flow else 1 - t / 1000
        sigma = math.sqrt(1 - alpha**2) if not schedule.is_flow else t / 1000
        assert float(sample.mean()) == pytest.approx(alpha * 0.8, abs=4 * sigma / math.sqrt(count) + 1e-12)
        assert float(sample.std()) == pytest.approx(sigma, rel=4 / math.sqrt(2 * count), abs=1e-12)


def test_add_noise_equals_the_reference() -> None:
    """Equation 4 against diffusers, and one time for all."""
    reference = diffusers.DDPMScheduler()
    reference.alphas_cumprod = STABLE_DIFFUSION.alphas_cumprod
    x0, noise, times = normal(1), normal(2), torch.tensor([17, 940])
    expected = reference.add_noise(x0, noise, times)
    torch.testing.assert_close(STABLE_DIFFUSION.add_noise(x0, noise, times), expected, rtol=1e-12, atol=1e-14)
    expected = reference.add_noise(x0, noise, torch.tensor([17, 17]))
    torch.testing.assert_close(STABLE_DIFFUSION.add_noise(x0, noise, 17), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_noise_keeps_the_dtype(dtype: torch.dtype) -> None:
    """The table is float64, the latents are what they were."""
    x0 = normal(1).to(dtype)
    assert STABLE_DIFFUSION.add_noise(x0, x0, torch.tensor([3, 7])).dtype == dtype


@pytest.mark.parametrize("ratio", [0.03, 0.5, 1.0, 3.0, 14.0])
def test_time_inverts_the_ratio(ratio: float) -> None:
    """time(sigma / alpha) is between the timesteps whose ratios enclose it, exact on timesteps, clamped outside."""
    t = STABLE_DIFFUSION.time(ratio)
    low, high = STABLE_DIFFUSION.level(math.floor(t)), STABLE_DIFFUSION.level(math.floor(t) + 1)
    assert low.sigma / low.alpha <= ratio <= high.sigma / high.alpha
    whole = STABLE_DIFFUSION.level(round(t))
    assert STABLE_DIFFUSION.time(whole.sigma / whole.alpha) == pytest.approx(round(t), abs=1e-9)
    assert (STABLE_DIFFUSION.time(1e-6), STABLE_DIFFUSION.time(1e6)) == (0.0, 999.0)


def test_training_timesteps_of_a_discrete_schedule() -> None:
    """Ho et al. 2020, algorithm 1: uniform over all T timesteps."""
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    times = STABLE_DIFFUSION.training_timesteps(uniform)
    assert torch.equal(times.unique(return_counts=True)[1], torch.full((1000,), 10))
    ends = STABLE_DIFFUSION.training_timesteps(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [0, 999]


def test_training_times_of_rectified_flow() -> None:
    """Esser et al. 2024, section 3.1: logit(sigma) ~ N(0, 1) before the shift, N(log shift, 1) after it."""
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logits = torch.logit(FLOW.training_timesteps(uniform) / 1000)
    assert float(logits.mean()) == pytest.approx(math.log(3.0), abs=1e-6)
    assert float(logits.std()) == pytest.approx(1.0, abs=1e-3)
    ends = FLOW.training_timesteps(torch.tensor([0.0, 1.0]))
    assert bool(((ends >= 0) & (ends <= 1000)).all())


@pytest.mark.parametrize(
    ("schedule", "count", "spacing", "message"),
    [
        (STABLE_DIFFUSION, 0, "leading", "at least 1, got 0"),
        (FLOW, -3, "trailing", "at least 1, got -3"),
        (STABLE_DIFFUSION, 1001, "leading", "at most 1000 here, got 1001"),
        (STABLE_DIFFUSION, 51, "lcm", "at most 50 here, got 51"),
        (STABLE_DIFFUSION, 5, "trailin", "did you mean 'trailing'"),
        (STABLE_DIFFUSION, 5, "other", "karras, lcm, leading, linspace, sgm_uniform, trailing"),
        *((FLOW, 5, name, "use 'trailing'") for name, row in SPACINGS.items() if not row.flow),
        *((ZERO_SNR, 5, name, "use 'trailing'") for name, row in SPACINGS.items() if row.finite),
    ],
)
def test_levels_that_cannot_be(schedule: Schedule, count: int, spacing: str, message: str) -> None:
    """Each error says what was given and what is allowed."""
    with pytest.raises(InputError, match=message):
        schedule.levels(count, spacing)


def test_beta_quantiles_equal_scipys() -> None:
    mass = torch.linspace(0, 1, 1001, dtype=torch.float64)
    expected = torch.from_numpy(scipy.stats.beta.ppf(mass.numpy(), 0.6, 0.6))
    torch.testing.assert_close(_beta_quantiles(mass), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("count", [5, 10, 20])
def test_align_your_steps_on_other_numbers_of_steps(count: int) -> None:
    """Sabour et al. 2024: log(sigma) is interpolated between the published levels; 5 and 20 steps share some."""
    ten = STABLE_DIFFUSION.levels(10, "align_your_steps", "fractional")
    levels = STABLE_DIFFUSION.levels(count, "ays", "fractional")
    published = AysSchedules["StableDiffusionSigmas"]
    assert [level.sigma / level.alpha for level in ten[:-1]] == pytest.approx(published[:-1], rel=8e-3)
    shared = range(0, 10, 2 if count == 5 else 1)
    ours = [levels[i * count // 10] for i in shared]
    assert [level.sigma for level in ours] == pytest.approx([ten[i].sigma for i in shared], rel=1e-12)


def test_sgm_uniform_leaves_the_first_timestep_out() -> None:
    assert [level.t for level in STABLE_DIFFUSION.levels(5, "SGM Uniform", "fractional")] == pytest.approx(
        [999 * i / 5 for i in (5, 4, 3, 2, 1)] + [-1]
    )


def test_spacings_by_other_programs_names() -> None:
    for name, row in SPACINGS.items():
        for alias in (name, name.title(), row.webui or name, *row.aliases):
            assert spacing_named(alias) is row


@pytest.mark.parametrize("times", [-1, 1000, [0, 1000], math.nan])
def test_times_outside_the_schedule(times: float | list[int]) -> None:
    """A time below 0 or above T - 1 is an error, not the other end of the table."""
    with pytest.raises(InputError, match="from 0 to 999"):
        STABLE_DIFFUSION.add_noise(normal(), normal(), torch.as_tensor(times))


def test_rectified_flow_has_a_time_more() -> None:
    """t = T is pure noise."""
    noise = normal(1)
    assert torch.equal(FLOW.add_noise(normal(), noise, 1000.0), noise)
    with pytest.raises(InputError, match="from 0 to 1000"):
        FLOW.add_noise(normal(), noise, 1001.0)
