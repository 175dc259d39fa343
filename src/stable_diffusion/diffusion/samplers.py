"""Samplers: from noise to clean latents through a list of levels.

A sampler is a function ``f(denoise, x, levels, *, noise)`` that yields a Step for every level but the last. It
knows nothing of networks: ``denoise(x, level)`` gives clean latents. All of them can start at alpha = 0, the
first level of a rectified flow and of a zero-terminal-SNR schedule, so none divides by an alpha that can be 0. A new
sampler is one function here and one row in `names`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stable_diffusion.config import SamplerConfig
from stable_diffusion.diffusion.names import FLOW_SPACING, SAMPLERS, sampler_name, spacing_named
from stable_diffusion.diffusion.objective import Denoiser, posterior_std, to_eps
from stable_diffusion.diffusion.schedule import Level, Schedule

Latents = Float[Tensor, "b c h w"]
Noise = Callable[[], Latents]
"""Samples standard normal latents, each image's from its own generator."""


@dataclass(frozen=True)
class Step:
    """One step of a sampler."""

    index: int
    """Index of the step, from 0."""
    total: int
    """Number of steps in all."""
    level: Level
    """The level that was denoised."""
    x: Latents
    """The latents at the next level."""
    x0: Latents
    """The network's prediction of the clean latents."""


def _ratio(level: Level, to: Level) -> float:
    """(sigma / alpha) at `to` over that at `level`: e^-h of the DPM-Solver papers; 0 from alpha = 0 or to clean."""
    return (to.sigma * level.alpha) / (level.sigma * to.alpha)


def _transfer(x0: Latents, eps: Latents, to: Level) -> Latents:
    """The point at level `to` of the line that x0 and eps span: a DDIM step (Song et al. 2020, equation 12)."""
    return to.alpha * x0 + to.sigma * eps


def ddim(
    denoise: Denoiser, x: Latents, levels: list[Level], *, noise: Noise, eta: float = 0.0
) -> Iterator[Step]:
    """Song et al. 2020, equations 12 and 16: eta 0 is deterministic, eta 1 is DDPM's posterior.

    With eta 0 it is Euler's method on Karras et al. 2022, equation 1, and on a rectified flow's line; with eta 1
    it is k-diffusion's ancestral Euler.
    """
    for i, (level, to) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        eps = to_eps(x0, x, level.alpha, level.sigma)
        std = eta * posterior_std(level, to)
        x = to.alpha * x0 + math.sqrt(max(to.sigma**2 - std**2, 0.0)) * eps
        if std > 0:
            x = x + std * noise()
        yield Step(i, len(levels) - 1, level, x, x0)


def ddpm(
    denoise: Denoiser,
    x: Latents,
    levels: list[Level],
    *,
    noise: Noise,
    variance: Literal["small", "large"] = "small",
) -> Iterator[Step]:
    """Ho et al. 2020, algorithm 2, with either variance of section 3.2: the posterior's, or beta."""
    for i, (level, to) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        eps = to_eps(x0, x, level.alpha, level.sigma)
        posterior = posterior_std(level, to)
        x = to.alpha * x0 + math.sqrt(to.sigma**2 - posterior**2) * eps
        if to.sigma > 0:
            # The variance that q(x_t | x_s) adds: beta where alpha² + sigma² = 1, its counterpart on a rectified flow.
            added = level.sigma**2 - (level.alpha / to.alpha * to.sigma) ** 2
            x = x + (posterior if variance == "small" else math.sqrt(added)) * noise()
        yield Step(i, len(levels) - 1, level, x, x0)


def pndm(denoise: Denoiser, x: Latents, levels: list[Level], *, noise: Noise) -> Iterator[Step]:
    """Liu et al. 2022 (PNDM) as Stable Diffusion uses it: linear multistep on eps, without Runge-Kutta steps.

    The first step evaluates the network at both of its ends and takes the mean (equation 22 of order 1).
    """
    history: list[Latents] = []
    for i, (level, to) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        history = [to_eps(x0, x, level.alpha, level.sigma), *history[:3]]
        e = history
        if len(e) == 1 and to.sigma > 0 and i + 2 < len(levels):
            ahead = _transfer(x0, e[0], to)
            again = to_eps(denoise(ahead, to), ahead, to.alpha, to.sigma)
            eps = (again + e[0]) / 2
        elif len(e) == 1:
            eps = e[0]
        elif len(e) == 2:
            eps = (3 * e[0] - e[1]) / 2
        elif len(e) == 3:
            eps = (23 * e[0] - 16 * e[1] + 5 * e[2]) / 12
        else:
            eps = (55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3]) / 24
        # A DDIM step with `eps` in place of the network's: the noise that is not e[0] moves x0 as well.
        moved = to.sigma - to.alpha * level.sigma / level.alpha if level.alpha > 0 else 0.0
        x = _transfer(x0, e[0], to) + moved * (eps - e[0])
        yield Step(i, len(levels) - 1, level, x, x0)


def heun(denoise: Denoiser, x: Latents, levels: list[Level], *, noise: Noise) -> Iterator[Step]:
    """Karras et al. 2022, algorithm 1: an Euler step, corrected by the slope at its end.

    Plain Euler on the last step, and from alpha = 0, where sigma / alpha is infinite.
    """
    for i, (level, to) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        eps = to_eps(x0, x, level.alpha, level.sigma)
        x = _transfer(x0, eps, to)
        ratio = _ratio(level, to)
        if ratio > 0:
            ahead = denoise(x, to)
            x = x + to.alpha * (1 / ratio - 1) / 2 * (ahead - x0)
        yield Step(i, len(levels) - 1, level, x, x0)


def dpmpp(
    denoise: Denoiser,
    x: Latents,
    levels: list[Level],
    *,
    noise: Noise,
    order: Literal[1, 2, 3] = 2,
    sde: bool = False,
) -> Iterator[Step]:
    """DPM-Solver++ of several steps (Lu et al. 2022: equation 9, 2M is algorithm 2), or 2M's SDE form (appendix B).

    The first steps have no more orders than x0 that are known, and the last, to clean latents, is of first order; in
    fewer than 15 steps the one before it is at most of second order, as in the authors' code.
    """
    history: list[tuple[Latents, float]] = []  # x0 and h of earlier steps, newest first
    total = len(levels) - 1
    for i, (level, to) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        ratio = _ratio(level, to)
        h = -math.log(ratio) if ratio > 0 else math.inf
        near_end = total < 15 and i == total - 2
        used = 1 if to.sigma == 0 else min(order, len(history) + 1, 2 if near_end else 3)
        x0_ahead = x0
        if used == 2:
            before, h_before = history[0]
            x0_ahead = x0 + h / (2 * h_before) * (x0 - before)
        elif used == 3:
            (before, h_before), (oldest, h_oldest) = history
            slope, slope_before = (x0 - before) * (h / h_before), (before - oldest) * (h / h_oldest)
            bend = (slope - slope_before) / ((h_before + h_oldest) / h)
            phi_2 = 1 - (1 - ratio) / h
            phi_3 = phi_2 / h - 0.5
            x0_ahead = x0 + (phi_2 * (slope + h_before / h * bend) - phi_3 * bend) / (1 - ratio)
        decay = ratio**2 if sde else ratio
        kept = to.sigma / level.sigma * (ratio if sde else 1)
        x = kept * x + to.alpha * (1 - decay) * x0_ahead
        if sde and to.sigma > 0:
            x = x + to.sigma * math.sqrt(1 - ratio**2) * noise()
        history = [(x0, h), *history[:1]]
        yield Step(i, total, level, x, x0)


def unipc(denoise: Denoiser, x: Latents, levels: list[Level], *, noise: Noise) -> Iterator[Step]:
    """UniPC of order 2, B(h) = e^h - 1, on x0 (Zhao et al. 2023, algorithms 1 and 2).

    Each step predicts; the next network call also corrects that prediction, so correcting costs no extra call.
    """
    start, start_level = x, levels[0]  # where the step that is corrected started
    history: list[tuple[Latents, Level]] = []  # x0 and level of earlier calls, newest first
    for i, (level, to) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        if history:
            x = _unipc_step(start, history, start_level, level, corrected=x0)
        history = [(x0, level), *history[:1]]
        start, start_level = x, level
        x = _unipc_step(start, history if to.sigma > 0 else history[:1], level, to)
        yield Step(i, len(levels) - 1, level, x, x0)


def _unipc_step(
    x: Latents,
    history: list[tuple[Latents, Level]],
    level: Level,
    to: Level,
    corrected: Latents | None = None,
) -> Latents:
    """A step from `level` to `to`: UniP, or UniC where `corrected` is the network's x0 at `to`."""
    x0 = history[0][0]
    ratio = _ratio(level, to)
    base = to.sigma / level.sigma * x + to.alpha * (1 - ratio) * x0
    h = -math.log(ratio) if ratio > 0 else math.inf
    slope = torch.zeros_like(x)
    r = 0.0  # place of the older call, in units of this step; minus infinity from alpha = 0
    if len(history) > 1:
        older, older_level = history[1]
        ratio_before = _ratio(older_level, level)
        h_before = -math.log(ratio_before) if ratio_before > 0 else math.inf
        r = -h_before / h
        slope = (older - x0) / r
    if corrected is None:
        return base + to.alpha * (1 - ratio) * 0.5 * slope
    ahead = corrected - x0
    if r == 0.0:
        return base + to.alpha * (1 - ratio) * 0.5 * ahead
    # Equation 9 for p = 2: a_1 + a_2 = b_1 and r a_1 + a_2 = b_2, with b from phi_k(-h) / B(-h).
    phi_2 = math.expm1(-h) / -h - 1
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / math.expm1(-h), 2 * phi_3 / math.expm1(-h)
    a_1 = (b_2 - b_1) / (r - 1)
    return base + to.alpha * (1 - ratio) * (a_1 * slope + (b_1 - a_1) * ahead)


def lcm(denoise: Denoiser, x: Latents, levels: list[Level], *, noise: Noise) -> Iterator[Step]:
    """Latent consistency models (Luo et al. 2023, algorithm 3): jump to clean latents, add noise, again."""
    for i, (level, to) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        # Boundary condition of Song et al. 2023, appendix C, with sigma_data 0.5 and time scaled by 10.
        scaled = 10 * level.t
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        x0 = c_skip * x + c_out * x0
        x = x0 if to.sigma == 0 else _transfer(x0, noise(), to)
        yield Step(i, len(levels) - 1, level, x, x0)


def tcd(denoise: Denoiser, x: Latents, levels: list[Level], *, noise: Noise) -> Iterator[Step]:
    """Trajectory consistency (Zheng et al. 2024, strategic stochastic sampling): past the next level, back by noise.

    It lands on the next level's ``via``; without one the step is DDIM's.
    """
    for i, (level, to) in enumerate(pairwise(levels)):
        x0 = denoise(x, level)
        eps = to_eps(x0, x, level.alpha, level.sigma)
        kept = to.sigma if to.via is None else min(to.alpha * to.via.sigma / to.via.alpha, to.sigma)
        x = to.alpha * x0 + kept * eps
        if kept < to.sigma:
            x = x + math.sqrt(to.sigma**2 - kept**2) * noise()
        yield Step(i, len(levels) - 1, level, x, x0)


def sampler_named(name: str) -> Callable[..., Iterator[Step]]:
    """The function of a sampler, by our name or another program's. Raises InputError for an unknown one."""
    row = SAMPLERS[sampler_name(name)]
    return functools.partial(globals()[row.function], **row.arguments)


def sampling_levels(config: SamplerConfig, schedule: Schedule, num_inference_steps: int) -> list[Level]:
    """The levels from noise to clean latents, first to last.

    Raises:
        InputError: an unknown sampler or spacing, or steps that the schedule cannot have.
    """
    row = SAMPLERS[sampler_name(config.name)]
    levels = schedule.levels(num_inference_steps, _spacing(config, schedule), row.grid)
    if row.ends_on_first_timestep:
        levels[-1] = schedule.final()
    if row.gamma is not None:
        kept = 1 - (row.gamma if config.eta is None else config.eta)
        levels = [
            # Whole timesteps stay whole.
            replace(to, via=schedule.level(to.t * kept // 1 if to.t % 1 == 0 else to.t * kept))
            if to.sigma > 0
            else to
            for to in levels
        ]
    return levels


def initial_scale(config: SamplerConfig, schedule: Schedule, level: Level) -> float:
    """The factor of the standard normal noise that text-to-image starts from at the first level."""
    row = SAMPLERS[sampler_name(config.name)]
    from_sigma = row.begins_with_sigma and spacing_named(_spacing(config, schedule)).reaches_noise
    return level.sigma if from_sigma or schedule.is_flow else 1.0


def _spacing(config: SamplerConfig, schedule: Schedule) -> str:
    own = FLOW_SPACING if schedule.is_flow else SAMPLERS[sampler_name(config.name)].spacing
    return own if config.spacing is None else config.spacing


def sample(
    config: SamplerConfig, denoise: Denoiser, x: Latents, levels: list[Level], *, noise: Noise
) -> Iterator[Step]:
    """Runs the configured sampler.

    Raises:
        InputError: an unknown sampler.
    """
    row = SAMPLERS[sampler_name(config.name)]
    settings = {name: value for name in row.settings if (value := getattr(config, name)) is not None}
    return sampler_named(config.name)(denoise, x, levels, noise=noise, **settings)
