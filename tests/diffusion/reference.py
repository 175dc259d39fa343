"""A toy network, and the same walk through our samplers and through diffusers' schedulers with our table."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import diffusers
import torch
from diffusers.schedulers import AysSchedules
from torch import Tensor

from stable_diffusion.config import Guidance, SamplerConfig, ScheduleConfig
from stable_diffusion.diffusion.guidance import guide
from stable_diffusion.diffusion.objective import Denoiser, to_x0
from stable_diffusion.diffusion.samplers import Step, initial_scale, sample, sampling_levels
from stable_diffusion.diffusion.schedule import Level, Schedule

SHAPE = (2, 4, 6, 6)

STABLE_DIFFUSION = Schedule(ScheduleConfig())
ZERO_SNR = Schedule(ScheduleConfig(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
FLOW = Schedule(ScheduleConfig(kind="flow", prediction_type="flow_prediction", shift=3.0))

DPM = diffusers.DPMSolverMultistepScheduler
REFERENCES: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpmpp_2m": (DPM, {}),
    "dpmpp_2m_sde": (DPM, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_1m": (DPM, {"solver_order": 1}),
    "dpmpp_3m": (DPM, {"solver_order": 3}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {"set_alpha_to_one": False}),
    "tcd": (diffusers.TCDScheduler, {}),
}
ALIGNED = AysSchedules["StableDiffusionTimesteps"]
VARIANCE_EXPLODING = ("euler", "euler_a", "heun")  # there the reference keeps x / alpha
_WEIGHT = 0.3 * torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def normal(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def noise_source(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> Any:
    """One generator, so each call gives the next draw."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, dtype=dtype, generator=generator)


def per_image_noise(seeds: list[int], shape: tuple[int, ...] = SHAPE[1:]) -> Callable[[], Tensor]:
    """A generator for each image, as `generate` has."""
    sources = [noise_source(seed, shape) for seed in seeds]
    return lambda: torch.stack([draw() for draw in sources])


def network(x: Tensor, t: float, guidance: float = 7.5) -> Tensor:
    """A network without parts, smooth and nonlinear, that depends on x, t and guidance."""
    mixed = torch.einsum("bchw,cd->bdhw", x, _WEIGHT.to(x.dtype)) + t / 1000
    return guide(torch.tanh(mixed), torch.tanh(0.9 * mixed - 0.05), Guidance(scale=guidance))


def denoiser(prediction: str = "epsilon", guidance: float = 7.5) -> Denoiser:
    def denoise(x: Tensor, level: Level) -> Tensor:
        return to_x0(prediction, network(x, level.t, guidance), x, level.alpha, level.sigma)

    return denoise


def steps(
    name: str,
    count: int,
    schedule: Schedule = STABLE_DIFFUSION,
    *,
    prediction: str = "epsilon",
    guidance: float = 7.5,
    **settings: Any,
) -> list[Step]:
    """Our walk from seed 0, with noise from seed 1."""
    config = SamplerConfig(name=name, **settings)
    levels = sampling_levels(config, schedule, count)
    x = normal() * initial_scale(config, schedule, levels[0])
    draw = noise_source(1, dtype=torch.float32 if name == "dpmpp_2m_sde" else torch.float64)
    noise = lambda: draw().double()  # noqa: E731 (the reference draws that one sampler's noise in float32)
    return list(sample(config, denoiser(prediction, guidance), x, levels, noise=noise))


def reference_scheduler(
    name: str,
    count: int,
    schedule: Schedule = STABLE_DIFFUSION,
    *,
    spacing: str | None = None,
    prediction: str = "epsilon",
    **more: Any,
) -> Any:
    """diffusers' scheduler with our float64 table, ready for `count` steps."""
    cls, settings = REFERENCES[name]
    config = schedule.config
    aligned = {"timesteps": ALIGNED} if spacing == "align_your_steps" else {"num_inference_steps": count}
    if spacing in ("karras", "exponential", "beta"):
        settings = {**settings, f"use_{spacing}_sigmas": True}
    elif spacing == "sgm_uniform":
        settings = {**settings, "timestep_spacing": "linspace"}  # which that is in the multistep solvers
    elif spacing is not None and spacing != "align_your_steps":
        settings = {**settings, "timestep_spacing": spacing}
    scheduler = cls(
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.kind,
        steps_offset=config.steps_offset,
        prediction_type=prediction,
        **{**settings, **more},
    )
    scheduler.alphas_cumprod = schedule.alphas_cumprod.clone()
    if hasattr(scheduler, "final_alpha_cumprod") and not scheduler.config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(**aligned)
    return scheduler


def reference_walk(
    name: str, count: int, schedule: Schedule = STABLE_DIFFUSION, *, eta: float | None = None, **settings: Any
) -> list[Tensor]:
    """diffusers' walk from the same start with the same noise: the latents after each of `count` steps."""
    scheduler = reference_scheduler(name, count, schedule, **settings)
    known = inspect.signature(scheduler.step).parameters
    options: dict[str, Any] = {"eta": eta} if "eta" in known and eta is not None else {}
    if "generator" in known:
        options["generator"] = torch.Generator().manual_seed(1)
    x = normal() * scheduler.init_noise_sigma
    walk = []
    timesteps = scheduler.timesteps.tolist()
    for i, t in enumerate(scheduler.timesteps):
        if name == "ddim":
            # It takes t - 1000 // steps for the next timestep; give it the stride that its own list has.
            following = timesteps[i + 1] if i + 1 < len(timesteps) else -1
            scheduler.num_inference_steps = Fraction(1000, timesteps[i] - following)
        output = network(scheduler.scale_model_input(x, t), float(t))
        # From a tensor of a whole number LCM's boundary condition would be float32.
        x = scheduler.step(output, int(t) if name == "lcm" else t, x, **options).prev_sample
        sigma = float(scheduler.sigmas[scheduler.step_index]) if name in VARIANCE_EXPLODING else 0.0
        walk.append(x.double() / (1 + sigma**2) ** 0.5)
    if name == "pndm":  # the first step is two calls
        return walk[1:]
    if name == "heun":  # each step is two calls, the last one
        return [*walk[1:-1:2], walk[-1]]
    return walk


def error(ours: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((ours - reference).abs().max() / reference.abs().max())
