"""The forward process: how much signal and how much noise there is at each time.

Everything is float64 on the CPU; networks see float32 scalars.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor

from stable_diffusion.config import ScheduleConfig
from stable_diffusion.diffusion.names import FLOW_SPACING, LCM_STEPS, Grid, spacing_named
from stable_diffusion.errors import InputError

FLOAT64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
"""How schedules compute, whatever torch's defaults are set to."""


@dataclass(frozen=True)
class Level:
    """A noise level: x = alpha * x0 + sigma * eps, at the time `t` that the network is given.

    `t` runs from 0 (nearly clean) to the number of training timesteps; it is -1 at the clean level, at which no
    network is evaluated.
    """

    t: float
    alpha: float
    sigma: float
    via: Level | None = None
    """The cleaner level that TCD's step to this one passes, before it adds noise."""


CLEAN = Level(-1.0, 1.0, 0.0)


def linear_betas(config: ScheduleConfig) -> Float[Tensor, " t"]:
    """Ho et al. 2020, section 4: from 1e-4 to 0.02 there."""
    return torch.linspace(config.beta_start, config.beta_end, config.num_train_timesteps, **FLOAT64)


def scaled_linear_betas(config: ScheduleConfig) -> Float[Tensor, " t"]:
    """Rombach et al. 2022 (their "linear"): linear in the square root of beta."""
    ends = math.sqrt(config.beta_start), math.sqrt(config.beta_end)
    return torch.linspace(*ends, config.num_train_timesteps, **FLOAT64) ** 2


def cosine_betas(config: ScheduleConfig) -> Float[Tensor, " t"]:
    """Nichol & Dhariwal 2021, equation 17, with beta at most 0.999."""
    time = torch.arange(config.num_train_timesteps + 1, **FLOAT64) / config.num_train_timesteps
    alpha_bar = ((time + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


BETAS = {"linear": linear_betas, "scaled_linear": scaled_linear_betas, "cosine": cosine_betas}


class Schedule:
    """The forward process of a configuration, discrete (DDPM's family) or continuous (rectified flow).

    Attributes:
        alphas_cumprod: alpha squared at t = 0 … T - 1; empty for rectified flow.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        self.config = config
        self.num_train_timesteps = config.num_train_timesteps
        self.alphas_cumprod = torch.empty(0, **FLOAT64)
        if config.kind != "flow":
            self.alphas_cumprod = torch.cumprod(1 - BETAS[config.kind](config), dim=0)
            if config.rescale_betas_zero_snr:
                self.alphas_cumprod = _zero_terminal_snr(self.alphas_cumprod)
        # sigma / alpha at every timestep; infinite at the end of a zero-terminal-SNR schedule.
        self._ratios: list[float] = ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt().tolist()

    @property
    def is_flow(self) -> bool:
        return self.config.kind == "flow"

    def level(self, t: float) -> Level:
        """The level at time `t`, from 0 to T - 1, or from 0 to T for rectified flow.

        Between two timesteps of a discrete schedule sigma / alpha is interpolated linearly, as k-diffusion does.
        """
        if self.is_flow:
            sigma = t / self.num_train_timesteps
            return Level(t, 1 - sigma, sigma)
        lower = math.floor(t)
        if lower == t:
            alpha_bar = float(self.alphas_cumprod[lower])
            return Level(t, math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))
        low, high = self._ratios[lower], self._ratios[lower + 1]
        return _preserving(t, low + (t - lower) * (high - low))

    def levels(self, num_inference_steps: int, spacing: str, grid: Grid = "rounded") -> list[Level]:
        """The levels from noise to clean latents: `num_inference_steps` of them, then the clean one.

        Args:
            num_inference_steps: at least 1; at most the training timesteps of a discrete schedule.
            spacing: a row of `names.SPACINGS`, whose functions are below. A rectified flow has no discrete timesteps:
                each spacing that it can have gives equal steps from pure noise.
            grid: how a sampler's authors round (see `names.Grid`).

        Raises:
            InputError: a number of steps outside the range, or a spacing that the schedule cannot have.
        """
        if num_inference_steps < 1:
            raise InputError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        row = spacing_named(spacing)
        if row.finite and self._ratios[-1:] == [math.inf]:
            raise InputError(
                f"spacing {spacing!r} needs a finite noise level; a zero-terminal-SNR schedule has none: use"
                f" {FLOW_SPACING!r}"
            )
        if self.is_flow:
            if not row.flow:
                raise InputError(
                    f"spacing {spacing!r} is for the DDPM family; use {FLOW_SPACING!r} for a rectified flow"
                )
            sigmas = self._shift(torch.linspace(1, 0, num_inference_steps + 1, **FLOAT64)[:-1])
            return [*(self.level(sigma * self.num_train_timesteps) for sigma in sigmas.tolist()), CLEAN]
        left_out = grid == "intervals" or row.leaves_first
        most = row.most_steps or self.num_train_timesteps - left_out
        if num_inference_steps > most:
            raise InputError(f"num_inference_steps must be at most {most} here, got {num_inference_steps}")
        place: Callable[[Schedule, int, Grid], list[Level]] = globals()[row.function]
        return [*place(self, num_inference_steps, grid), CLEAN]

    def final(self) -> Level:
        """Where the DDIM family ends: clean latents, or the first timestep's level as Stable Diffusion does."""
        return CLEAN if self.is_flow or self.config.set_alpha_to_one else self.level(0)

    def add_noise(
        self,
        x0: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        timesteps: Num[Tensor, "*b"] | float,
    ) -> Float[Tensor, "b c h w"]:
        """A sample of q(x_t | x_0): ``alpha * x0 + sigma * noise`` (Ho et al. 2020, equation 4).

        Args:
            x0: clean latents.
            noise: standard normal.
            timesteps: one time for each sample, or one for all: 0 … T - 1, or 0 to T for rectified flow.

        Raises:
            InputError: a time outside the schedule.
        """
        alpha, sigma = self.alpha_sigma(torch.as_tensor(timesteps, device="cpu").expand(len(x0)))
        shape = (-1, 1, 1, 1)
        alpha, sigma = (value.to(x0.device, x0.dtype).view(shape) for value in (alpha, sigma))
        return alpha * x0 + sigma * noise

    def alpha_sigma(self, timesteps: Num[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """alpha and sigma at each time, in float64 on the CPU."""
        last = self.num_train_timesteps - (0 if self.is_flow else 1)
        times = timesteps.detach().cpu().double()
        if not bool(((times >= 0) & (times <= last)).all()):
            raise InputError(f"timesteps must be from 0 to {last}, got {times.tolist()}")
        levels = [self.level(t) for t in times.tolist()]
        table = torch.tensor([(level.alpha, level.sigma) for level in levels], **FLOAT64)
        return table[:, 0], table[:, 1]

    def training_timesteps(self, uniform: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Times to train at, from uniform samples in (0, 1).

        Discrete schedules: uniform over 0 … T - 1. Rectified flow: logit-normal (Esser et al. 2024, section
        3.1), which puts more samples in the middle, then shifted.
        """
        uniform = uniform.double()
        if not self.is_flow:
            return (uniform * self.num_train_timesteps).floor().clamp(max=self.num_train_timesteps - 1)
        normal = math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(-1 + 1e-12, 1 - 1e-12))
        return self._shift(torch.sigmoid(normal)) * self.num_train_timesteps

    def _shift(self, sigma: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return self.config.shift * sigma / (1 + (self.config.shift - 1) * sigma)

    def ratio_range(self) -> tuple[float, float]:
        """The smallest and the largest sigma / alpha of a discrete schedule."""
        return self._ratios[0], self._ratios[-1]

    def time(self, ratio: float) -> float:
        """The time at which sigma / alpha is `ratio`, interpolated linearly in its logarithm (k-diffusion)."""
        last = self.num_train_timesteps - 1
        upper = min(max(bisect.bisect_right(self._ratios, ratio), 1), last)
        low, high = math.log(self._ratios[upper - 1]), math.log(self._ratios[upper])
        return min(max(upper - 1 + (math.log(ratio) - low) / (high - low), 0.0), float(last))


def _preserving(t: float, ratio: float) -> Level:
    """The variance-preserving level (alpha² + sigma² = 1) of a noise-to-signal ratio."""
    if math.isinf(ratio):  # between the last two timesteps of a zero-terminal-SNR schedule
        return Level(t, 0.0, 1.0)
    alpha = 1 / math.sqrt(1 + ratio**2)
    return Level(t, alpha, ratio * alpha)


def _zero_terminal_snr(alphas_cumprod: Float[Tensor, " t"]) -> Float[Tensor, " t"]:
    """Lin et al. 2023, algorithm 1: shifts and scales alpha so that the last is 0 and the first unchanged."""
    alpha = alphas_cumprod.sqrt()
    return ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2


def leading(schedule: Schedule, steps: int, grid: Grid) -> list[Level]:
    """Multiples of a stride from `steps_offset` up (Lin et al. 2023, table 2)."""
    first = 1 if grid == "intervals" else 0
    stride = schedule.num_train_timesteps // (steps + first)
    # The offset shrinks where it would push the first timestep past the last one.
    room = schedule.num_train_timesteps - 1 - (steps - 1 + first) * stride
    offset = min(schedule.config.steps_offset, room)
    return [schedule.level((i + first) * stride + offset) for i in reversed(range(steps))]


def linspace(schedule: Schedule, steps: int, grid: Grid) -> list[Level]:
    """From the last timestep to the first, both included (Lin et al. 2023, table 2)."""
    return _even(schedule, steps, steps + (grid == "intervals"), rounded=grid != "fractional")


def sgm_uniform(schedule: Schedule, steps: int, grid: Grid) -> list[Level]:
    """From the last timestep to the first, which is left out (Stability AI's generative-models)."""
    return _even(schedule, steps, steps + 1, rounded=grid == "intervals")


def _even(schedule: Schedule, steps: int, points: int, *, rounded: bool) -> list[Level]:
    times = torch.linspace(schedule.num_train_timesteps - 1, 0, points, **FLOAT64)[:steps]
    return [schedule.level(t) for t in (times.round() if rounded else times).tolist()]


def trailing(schedule: Schedule, steps: int, grid: Grid) -> list[Level]:
    """From the last timestep down, the first left out (Lin et al. 2023, table 2)."""
    stride = schedule.num_train_timesteps / steps
    return [schedule.level(round(schedule.num_train_timesteps - i * stride) - 1) for i in range(steps)]


def lcm(schedule: Schedule, steps: int, grid: Grid) -> list[Level]:
    """The trailing grid of `LCM_STEPS` that latent consistency models are distilled on, skipping (Luo et al. 2023)."""
    stride = schedule.num_train_timesteps // LCM_STEPS
    return [schedule.level((LCM_STEPS - LCM_STEPS * i // steps) * stride - 1) for i in range(steps)]


def karras(schedule: Schedule, steps: int, grid: Grid) -> list[Level]:
    """Karras et al. 2022, equation 5, with rho = 7."""
    low, high = schedule.ratio_range()
    ramp = torch.linspace(0, 1, steps, **FLOAT64)
    ratios = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    return _at_ratios(schedule, ratios, grid)


def exponential(schedule: Schedule, steps: int, grid: Grid) -> list[Level]:
    """Equal steps of log(sigma / alpha) (Lu et al. 2022, DPM-Solver, section 3.4)."""
    low, high = schedule.ratio_range()
    ratios = torch.linspace(math.log(high), math.log(low), steps, **FLOAT64).exp()
    return _at_ratios(schedule, ratios, grid, cut=True)


def beta(schedule: Schedule, steps: int, grid: Grid) -> list[Level]:
    """Quantiles of the distribution Beta(0.6, 0.6), dense at both ends (Lee et al. 2024)."""
    low, high = schedule.ratio_range()
    quantiles = _beta_quantiles(torch.linspace(1, 0, steps, **FLOAT64))
    return _at_ratios(schedule, low + quantiles * (high - low), grid, cut=True)


def _beta_quantiles(mass: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Inverts the distribution function of Beta(0.6, 0.6) by bisection, to 1e-16.

    Up to 1/2 the function is its power series (Abramowitz & Stegun, 26.5.4), scaled to give 1/2 there, and the other
    half mirrors it.
    """
    powers = torch.arange(60, **FLOAT64)
    terms = torch.cumprod(torch.cat([powers.new_ones(1), (powers[1:] - 0.6) / powers[1:]]), 0) / (
        powers + 0.6
    )

    def below(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return x**0.6 * (terms * x[:, None] ** powers).sum(1)

    low = torch.zeros_like(mass)
    high = low + 0.5
    wanted = 2 * torch.minimum(mass, 1 - mass) * below(high)
    for _ in range(53):
        middle = (low + high) / 2
        less = below(middle) < wanted
        low, high = torch.where(less, middle, low), torch.where(less, high, middle)
    return torch.where(mass > 0.5, 1 - low, low)


ALIGNED = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0)


def align_your_steps(schedule: Schedule, steps: int, grid: Grid) -> list[Level]:
    """The ten steps that Sabour et al. 2024 found for Stable Diffusion 1.5; other numbers interpolate log(sigma)."""
    last = schedule.num_train_timesteps - 1
    levels = [schedule.level(t * last / ALIGNED[0]) for t in ALIGNED]
    knots = torch.tensor([level.sigma / level.alpha for level in levels], **FLOAT64).log()
    places = torch.linspace(0, len(ALIGNED) - 1, steps + 1, **FLOAT64)[:steps]
    lower = places.long()
    ratios = torch.lerp(knots[lower], knots[lower + 1], places - lower).exp()
    return _at_ratios(schedule, ratios, grid)


def _at_ratios(
    schedule: Schedule, ratios: Float[Tensor, " n"], grid: Grid, *, cut: bool = False
) -> list[Level]:
    """Levels of these sigma / alpha.

    On the grid of intervals the network is given the nearest whole timestep, or with `cut` the one below.
    """
    times = [schedule.time(ratio) for ratio in ratios.tolist()]
    if grid == "intervals":
        times = [float(math.floor(t + 1e-6) if cut else round(t)) for t in times]
    return [_preserving(t, ratio) for t, ratio in zip(times, ratios.tolist(), strict=True)]
