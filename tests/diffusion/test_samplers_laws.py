"""Laws of samplers: what mathematics demands of each, and the contract that all of them keep."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from stable_diffusion.config import SamplerConfig, ScheduleConfig
from stable_diffusion.diffusion.names import ALIASES, SAMPLERS, sampler_name
from stable_diffusion.diffusion.samplers import (
    Step,
    ddim,
    ddpm,
    dpmpp,
    initial_scale,
    lcm,
    sample,
    sampler_named,
    sampling_levels,
)
from stable_diffusion.diffusion.schedule import CLEAN, Level, Schedule
from stable_diffusion.errors import InputError

from .reference import (
    FLOW,
    SHAPE,
    STABLE_DIFFUSION,
    ZERO_SNR,
    denoiser,
    network,
    noise_source,
    normal,
    per_image_noise,
)

DETERMINISTIC = ["ddim", "pndm", "euler", "heun", "dpmpp_1m", "dpmpp_2m", "dpmpp_3m", "unipc"]
STOCHASTIC = ["ddpm", "euler_a", "dpmpp_2m_sde", "lcm", "tcd"]
MEAN, DEVIATION = 0.7, 0.5  # of the Gaussian data


def gaussian(x: Tensor, level: Level) -> Tensor:
    """E[x0 | x] of data N(MEAN, DEVIATION²): the best denoiser, in closed form."""
    gain = level.alpha * DEVIATION**2 / (level.alpha**2 * DEVIATION**2 + level.sigma**2)
    return MEAN + gain * (x - level.alpha * MEAN)


def marginal(level: Level) -> tuple[float, float]:
    """Mean and standard deviation of the noisy Gaussian."""
    return level.alpha * MEAN, math.hypot(level.alpha * DEVIATION, level.sigma)


def transported(x: Tensor, level: Level, to: Level) -> Tensor:
    """The probability-flow ODE's solution: it keeps (x - mean) / deviation."""
    (mean, deviation), (mean_to, deviation_to) = marginal(level), marginal(to)
    return mean_to + deviation_to * (x - mean) / deviation


def preserving(ratios: list[float]) -> list[Level]:
    return [Level(500.0, 1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio)) for ratio in ratios]


def geometric(count: int, high: float, low: float) -> list[Level]:
    """Levels with equal steps of log(sigma / alpha)."""
    return preserving([high * (low / high) ** (i / count) for i in range(count + 1)])


def straight(count: int, high: float, low: float) -> list[Level]:
    """Levels of a rectified flow with equal steps of sigma."""
    sigmas = [high + (low - high) * i / count for i in range(count + 1)]
    return [Level(1000 * sigma, 1 - sigma, sigma) for sigma in sigmas]


def last(
    run: Any, denoise: Any, x: Tensor, levels: list[Level], noise: Any = normal, **settings: Any
) -> Tensor:
    return list(run(denoise, x, levels, noise=noise, **settings))[-1].x


def walk(name: str, schedule: Schedule = STABLE_DIFFUSION, count: int = 6, **settings: Any) -> list[Step]:
    config = SamplerConfig(name=name, **settings)
    levels = sampling_levels(config, schedule, count)
    x = normal() * initial_scale(config, schedule, levels[0])
    denoise = denoiser(schedule.config.prediction_type)
    return list(sample(config, denoise, x, levels, noise=noise_source(1)))


# Order: between two noisy levels, where the solution is smooth.
@pytest.mark.parametrize("grid", [lambda n: geometric(n, 4.0, 1.0), lambda n: straight(n, 0.9, 0.3)])
@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("ddim", 0.9, 1.1),
        ("euler", 0.9, 1.1),
        ("heun", 1.9, 2.1),
        ("dpmpp_1m", 0.9, 1.1),
        ("dpmpp_2m", 1.9, 2.1),
        ("dpmpp_3m", 1.9, 2.1),
        ("unipc", 2.7, 3.1),
        ("pndm", 1.9, 2.1),
    ],
)
def test_order(name: str, low: float, high: float, grid: Any) -> None:
    """The error on an analytic Gaussian falls as steps^-order; measured from 64 to 128 to 256 steps.

    UniPC's corrector adds one to the order 2 of its predictor (Zhao et al. 2023, theorem 3.1); PNDM's multistep
    of order 4 begins with steps of order 2, and that of DPM-Solver++ with one of order 1, which errs by h².
    """
    x = normal()
    errors = []
    for count in (64, 128, 256):
        levels = grid(count)
        exact = transported(x, levels[0], levels[-1])
        errors.append(float((last(sampler_named(name), gaussian, x, levels) - exact).abs().max()))
    for coarse, fine in pairwise(errors):
        assert low < math.log2(coarse / fine) < high


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_samplers_reach_the_gaussian(name: str) -> None:
    """From Stable Diffusion's noise to clean latents: the ODE's solution, without any noise to add."""
    config = SamplerConfig(name=name, spacing="trailing")
    levels = [*sampling_levels(config, STABLE_DIFFUSION, 500)[:-1], CLEAN]
    x = normal()
    exact = transported(x, levels[0], CLEAN)
    # The step to clean latents is of first order.
    tolerance = 2e-2 if name in ("ddim", "euler", "dpmpp_1m") else 1e-2

    def none() -> Tensor:
        raise AssertionError("noise was sampled")

    assert float((last(sampler_named(name), gaussian, x, levels, none) - exact).abs().max()) < tolerance


# From nearly pure noise to clean latents, over every kind of schedule.
PATHS = {
    "geometric": [*geometric(300, 14.0, 0.02), CLEAN],
    "stable diffusion": Schedule(ScheduleConfig()).levels(1000, "trailing"),
    "linear": Schedule(ScheduleConfig(kind="linear", beta_start=1e-4, beta_end=0.02)).levels(
        1000, "trailing"
    ),
    "cosine": Schedule(ScheduleConfig(kind="cosine")).levels(1000, "trailing"),
    "zero terminal SNR": ZERO_SNR.levels(1000, "trailing"),
    "flow": Schedule(replace(FLOW.config, shift=1.0)).levels(1000, "trailing"),
    "shifted flow": FLOW.levels(1000, "trailing"),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ddpm", {"variance": "small"}),
        ("ddpm", {"variance": "large"}),
        ("ddim", {"eta": 1.0}),
        ("ddim", {"eta": 0.5}),
        ("euler_a", {}),
        ("dpmpp_2m_sde", {}),
    ],
)
def test_stochastic_samplers_reproduce_the_gaussian(name: str, settings: dict[str, Any], path: str) -> None:
    """With many steps the samples have the data's mean and standard deviation, whichever path they took."""
    levels = PATHS[path]
    shape = (1, 1, 150, 150)
    mean, deviation = marginal(levels[0])
    x = mean + deviation * normal(7, shape)
    x = last(sampler_named(name), gaussian, x, levels, noise_source(8, shape), **settings)
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * DEVIATION / 150 + 5e-3)
    assert float(x.std()) == pytest.approx(DEVIATION, rel=4 / math.sqrt(2 * 150**2) + 1e-2)


def test_lcm_reproduces_the_gaussian() -> None:
    """A consistency function (the ODE's end point) gives the data's law at every one of its jumps."""
    levels = [*geometric(5, 14.0, 0.5), CLEAN]
    shape = (1, 1, 150, 150)
    mean, deviation = marginal(levels[0])
    x = mean + deviation * normal(7, shape)

    def consistent(x: Tensor, level: Level) -> Tensor:
        return transported(x, level, CLEAN)

    for step in lcm(consistent, x, levels, noise=noise_source(8, shape)):
        assert float(step.x0.mean()) == pytest.approx(MEAN, abs=1.5e-2)
        assert float(step.x0.std()) == pytest.approx(DEVIATION, rel=2e-2)


@pytest.mark.parametrize(("t", "s"), [(999, 998), (500, 499), (2, 1), (999, 700), (400, 100)])
@pytest.mark.parametrize("run", ["ddim", "ddpm", "euler_a"])
def test_ddim_with_eta_one_is_the_posterior(run: str, t: int, s: int) -> None:
    """Ho et al. 2020, equation 7: mean and standard deviation of q(x_s | x_t, x_0), from alpha_bar and beta."""
    settings = {"eta": 1.0} if run == "ddim" else {}
    bar_t, bar_s = (float(STABLE_DIFFUSION.alphas_cumprod[i]) for i in (t, s))
    alpha = bar_t / bar_s
    beta = 1 - alpha
    x, x0, z = normal(1), normal(2), normal(3)
    mean = (math.sqrt(bar_s) * beta * x0 + math.sqrt(alpha) * (1 - bar_s) * x) / (1 - bar_t)
    deviation = math.sqrt((1 - bar_s) / (1 - bar_t) * beta)
    levels = [STABLE_DIFFUSION.level(t), STABLE_DIFFUSION.level(s)]
    ours = last(sampler_named(run), lambda x, level: x0, x, levels, lambda: z, **settings)
    torch.testing.assert_close(ours, mean + deviation * z, rtol=1e-9, atol=1e-10)
    half = last(ddim, lambda x, level: x0, x, levels, lambda: z, eta=0.5)
    assert not torch.allclose(half, ours, atol=1e-5)


@pytest.mark.parametrize(("t", "s"), [(999, 998), (999, 700)])
def test_ddpm_large_variance_is_beta(t: int, s: int) -> None:
    """Ho et al. 2020, section 3.2: the same mean, with the standard deviation sqrt(beta)."""
    levels = [STABLE_DIFFUSION.level(t), STABLE_DIFFUSION.level(s)]
    x, x0 = normal(1), normal(2)

    def step(z: float) -> Tensor:
        draw = torch.full(SHAPE, z, dtype=torch.float64)
        return last(ddpm, lambda x, level: x0, x, levels, lambda: draw, variance="large")

    beta = 1 - float(STABLE_DIFFUSION.alphas_cumprod[t] / STABLE_DIFFUSION.alphas_cumprod[s])
    torch.testing.assert_close(step(1.0) - step(0.0), torch.full(SHAPE, math.sqrt(beta), dtype=torch.float64))
    small = last(ddpm, lambda x, level: x0, x, levels, lambda: torch.zeros(SHAPE, dtype=torch.float64))
    torch.testing.assert_close(step(0.0), small)


@pytest.mark.parametrize("count", [1, 2, 5, 30])
@pytest.mark.parametrize("schedule", [FLOW, STABLE_DIFFUSION, ZERO_SNR])
@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"lcm"}))
def test_one_point_of_data_is_reached_exactly(name: str, schedule: Schedule, count: int) -> None:
    """On a single picture the ODE is a line: every sampler gives that point in any number of steps."""
    point = normal(9)
    config = SamplerConfig(name=name, spacing="trailing")
    levels = [*sampling_levels(config, schedule, count)[:-1], CLEAN]
    x = list(sample(config, lambda x, level: point, normal(), levels, noise=noise_source(1)))[-1].x
    torch.testing.assert_close(x, point, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_flow_of_one_point_is_straight(name: str) -> None:
    """Liu et al. 2022: each step is on the line from noise to the point."""
    point, x = normal(9), normal()
    levels = FLOW.levels(7, "trailing")
    for step, to in zip(
        sampler_named(name)(lambda x, level: point, x, levels, noise=normal), levels[1:], strict=True
    ):
        torch.testing.assert_close(step.x, to.alpha * point + to.sigma * x, rtol=0, atol=1e-12)


def test_euler_on_a_flow_is_eulers_method() -> None:
    """x + (sigma' - sigma) velocity, with the network's velocity: no conversion changes it."""
    levels, x = FLOW.levels(5, "trailing"), normal()
    ours = [step.x for step in sampler_named("euler")(denoiser("flow_prediction"), x, levels, noise=normal)]
    for i, result in enumerate(ours):
        x = x + (levels[i + 1].sigma - levels[i].sigma) * network(x, levels[i].t)
        torch.testing.assert_close(result, x, rtol=1e-10, atol=1e-10)


def test_the_first_step_of_the_sde_is_the_posterior() -> None:
    """Lu et al. 2022, appendix B: with the same noise, the first step is DDPM's posterior in continuous time."""
    levels = [STABLE_DIFFUSION.level(700), STABLE_DIFFUSION.level(650)]
    x, x0, z = normal(1), normal(2), normal(3)
    sde = last(dpmpp, lambda x, level: x0, x, levels, lambda: z, sde=True)
    posterior = last(ddim, lambda x, level: x0, x, levels, lambda: z, eta=1.0)
    torch.testing.assert_close(sde, posterior, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", [STABLE_DIFFUSION, FLOW])
def test_tcd_between_its_ends(schedule: Schedule) -> None:
    """Zheng et al. 2024: gamma 0 is DDIM; gamma 1 jumps to clean latents, and a consistency function keeps the data."""
    tcd, ddim = (walk(name, schedule, spacing="trailing", eta=0.0)[-1].x for name in ("tcd", "ddim"))
    torch.testing.assert_close(tcd, ddim, rtol=0, atol=1e-12)
    config = SamplerConfig(name="tcd", spacing="trailing", eta=1.0)
    levels = [*sampling_levels(config, schedule, 5)[:-1], CLEAN]
    shape = (1, 1, 150, 150)
    mean, deviation = marginal(levels[0])
    x = mean + deviation * normal(7, shape)

    def consistent(x: Tensor, level: Level) -> Tensor:
        return transported(x, level, CLEAN)

    x = last(sampler_named("tcd"), consistent, x, levels, noise_source(8, shape))
    assert float(x.mean()) == pytest.approx(MEAN, abs=1.5e-2)
    assert float(x.std()) == pytest.approx(DEVIATION, rel=3e-2)  # time 0 is not quite clean


# The contract, for every entry of the table.
@pytest.mark.parametrize("count", [1, 2, 3, 6])
@pytest.mark.parametrize("schedule", [STABLE_DIFFUSION, ZERO_SNR, FLOW])
@pytest.mark.parametrize("name", SAMPLERS)
def test_steps(name: str, schedule: Schedule, count: int) -> None:
    """A Step for each level but the last, in order, finite, also from alpha = 0."""
    spacing = "trailing" if schedule is ZERO_SNR else None
    config = SamplerConfig(name=name, spacing=spacing)
    levels = sampling_levels(config, schedule, count)
    assert (levels[0].alpha == 0) == (schedule is not STABLE_DIFFUSION)
    steps = walk(name, schedule, count, spacing=spacing)
    assert [step.index for step in steps] == list(range(count))
    assert [step.level for step in steps] == levels[:-1]
    for step in steps:
        assert step.total == count
        assert bool(step.x.isfinite().all()) and bool(step.x0.isfinite().all())
        assert step.x.shape == step.x0.shape == SHAPE


@pytest.mark.parametrize(
    "settings",
    [{"name": "ddim", "eta": 1.0}, {"name": "tcd", "eta": 1.0}, {"name": "ddpm", "variance": "large"}],
)
@pytest.mark.parametrize("schedule", [ZERO_SNR, FLOW])
def test_settings_from_pure_noise(settings: dict[str, Any], schedule: Schedule) -> None:
    """Noise may be added on the way from alpha = 0."""
    steps = walk(schedule=schedule, spacing="trailing", **settings)
    assert all(bool(step.x.isfinite().all()) for step in steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", SAMPLERS)
def test_dtype_and_input_are_kept(name: str, dtype: torch.dtype) -> None:
    """Latents keep their dtype, the start is not written to, and no step writes to an earlier one."""
    config = SamplerConfig(name=name)
    levels = sampling_levels(config, STABLE_DIFFUSION, 6)
    x = normal().to(dtype)
    before, seen = x.clone(), []
    for step in sample(config, denoiser("v_prediction"), x, levels, noise=noise_source(1, dtype=dtype)):
        assert step.x.dtype == step.x0.dtype == dtype
        seen.append((step, step.x.clone(), step.x0.clone()))
    assert torch.equal(x, before)
    assert all(torch.equal(step.x, a) and torch.equal(step.x0, b) for step, a, b in seen)


@pytest.mark.parametrize("name", SAMPLERS)
def test_device_is_kept(name: str) -> None:
    """No sampler moves latents or brings a tensor of its own (on the meta device, which mixes with none)."""
    config = SamplerConfig(name=name)
    levels = sampling_levels(config, STABLE_DIFFUSION, 6)
    x = torch.empty(SHAPE, device="meta")
    for step in sample(config, lambda x, level: 0.5 * x, x, levels, noise=lambda: torch.empty_like(x)):
        assert step.x.device == step.x0.device == x.device


@pytest.mark.parametrize("name", SAMPLERS)
def test_closing_stops(name: str) -> None:
    """A sampler asks the network only when a step is asked for, and closing it ends it."""
    calls = []

    def denoise(x: Tensor, level: Level) -> Tensor:
        calls.append(level)
        return 0.5 * x

    config = SamplerConfig(name=name)
    levels = sampling_levels(config, STABLE_DIFFUSION, 6)
    steps = sample(config, denoise, normal(), levels, noise=noise_source(1))
    assert not calls
    assert next(steps).index == 0
    asked = len(calls)
    assert asked <= 2
    steps.close()
    assert next(steps, None) is None and len(calls) == asked


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    """With a noise source for each image, image i of a batch is what it is alone."""
    config = SamplerConfig(name=name, eta=0.6)
    levels = sampling_levels(config, STABLE_DIFFUSION, 8)
    x = normal(0, (3, *SHAPE[1:]))

    def final(rows: list[int]) -> Tensor:
        noise = per_image_noise([10 + row for row in rows])
        return list(sample(config, denoiser("v_prediction"), x[rows], levels, noise=noise))[-1].x

    batch = final([0, 1, 2])
    for row in range(3):
        torch.testing.assert_close(final([row]), batch[row : row + 1], rtol=0, atol=1e-10)
    torch.testing.assert_close(final([2, 0]), batch[[2, 0]], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_global_randomness_is_left_alone(name: str) -> None:
    """Neither read nor advanced."""
    torch.manual_seed(0)
    first = walk(name)[-1].x
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(walk(name)[-1].x, first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_stochastic_samplers_draw(name: str) -> None:
    """They draw once a step and nothing on the last, to clean latents; the others never draw."""
    config = SamplerConfig(name=name, spacing="trailing")
    levels = [*sampling_levels(config, STABLE_DIFFUSION, 6)[:-1], CLEAN]
    draws, draw = [], noise_source(1)

    def noise() -> Tensor:
        draws.append(draw())
        return draws[-1]

    counts = [len(draws) for _ in sampler_named(name)(denoiser(), normal(), levels, noise=noise)]
    assert counts == ([0] * 6 if name in DETERMINISTIC else [1, 2, 3, 4, 5, 5])
    assert set(DETERMINISTIC) | set(STOCHASTIC) == set(SAMPLERS)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_where_the_ddim_family_ends(name: str) -> None:
    """Stable Diffusion's set_alpha_to_one = False: the last level is the first timestep's."""
    assert sampling_levels(SamplerConfig(name=name), STABLE_DIFFUSION, 5)[-1] == STABLE_DIFFUSION.level(0)
    assert sampling_levels(SamplerConfig(name=name), FLOW, 5)[-1] == CLEAN
    assert sampling_levels(SamplerConfig(name="euler"), STABLE_DIFFUSION, 5)[-1] == CLEAN


@pytest.mark.parametrize("name", SAMPLERS)
def test_start(name: str) -> None:
    """A rectified flow and a zero-terminal-SNR schedule begin with noise of standard deviation 1."""
    for schedule, spacing in ((FLOW, None), (ZERO_SNR, "trailing")):
        config = SamplerConfig(name=name, spacing=spacing)
        assert initial_scale(config, schedule, sampling_levels(config, schedule, 5)[0]) == 1.0


def test_aliases() -> None:
    """Every other program's name, in any case, points at an entry, and hides none."""
    for alias, name in ALIASES.items():
        assert alias == alias.lower() and alias not in SAMPLERS
        assert sampler_name(alias.title()) == name
    assert sampler_name("DPM++ 2M") == "dpmpp_2m"
    assert sampler_name("Euler a") == "euler_a"
    assert sampler_name("DDIM") == "ddim"


def test_unknown_sampler() -> None:
    """The error lists every name and the closest."""
    with pytest.raises(InputError, match="did you mean 'euler_a'") as caught:
        sampling_levels(SamplerConfig(name="euler_b"), STABLE_DIFFUSION, 5)
    assert all(name in str(caught.value) for name in SAMPLERS)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan])
def test_eta_outside_its_range(eta: float) -> None:
    """Song et al. 2020, equation 16: beyond 1 there is more noise than the level has."""
    for name in ("ddim", "DDIMScheduler", "tcd"):
        with pytest.raises(InputError, match=r"eta must be (from 0 to 1|a finite number)"):
            walk(name, eta=eta)


def test_eta_by_another_name() -> None:
    """An alias takes the same settings."""
    assert torch.equal(walk("ddim", eta=0.7)[-1].x, walk("DDIMScheduler", eta=0.7)[-1].x)
    assert not torch.equal(walk("ddim", eta=0.7)[-1].x, walk("ddim")[-1].x)
