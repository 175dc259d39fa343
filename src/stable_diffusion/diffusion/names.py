"""The samplers and spacings by name: one row each, with what other programs call them.

No torch here, so that ``--help`` can list the names. A row names its function in `samplers` or `schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stable_diffusion.errors import unknown_name

Grid = Literal["rounded", "fractional", "intervals"]
"""Whole timesteps; fractional ones (k-diffusion's samplers); or whole ones that divide the range into `n` intervals
(the multistep solvers)."""


@dataclass(frozen=True)
class Sampler:
    """How a sampler's authors place levels and begin, and its names elsewhere."""

    function: str
    """In `diffusion.samplers`."""
    webui: str
    """Label in AUTOMATIC1111's webui."""
    diffusers: str
    """Scheduler class in diffusers."""
    spacing: str = "leading"
    grid: Grid = "rounded"
    ends_on_first_timestep: bool = False
    """Whether the last level is the schedule's ``final``, not clean latents."""
    begins_with_sigma: bool = False
    """Whether the starting noise is multiplied by sigma instead of 1, under the spacings that reach pure noise."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the function, fixed for this row."""
    settings: tuple[str, ...] = ()
    """Fields of ``SamplerConfig`` that the function reads."""
    diffusers_settings: Mapping[str, Any] = field(default_factory=dict)
    """What sets this row apart from others of the same class, in ``scheduler_config.json``."""
    gamma: float | None = None
    """Its default of ``eta``, if each step passes the next level and adds noise to come back to it (TCD)."""
    aliases: tuple[str, ...] = ()
    """Further names, in lower case: k-diffusion's and ComfyUI's."""
    nearest_to: tuple[str, ...] = ()
    """Scheduler classes in diffusers that are not here, of which this is the nearest."""


_K: dict[str, Any] = {"spacing": "linspace", "grid": "fractional", "begins_with_sigma": True}  # k-diffusion's
_DPM: dict[str, Any] = {"spacing": "linspace", "grid": "intervals"}
_DPM_CLASS = "DPMSolverMultistepScheduler"

# fmt: off
SAMPLERS = {
    "ddpm": Sampler("ddpm", "DDPM", "DDPMScheduler", settings=("variance",),
                    nearest_to=("DDPMParallelScheduler",)),
    "ddim": Sampler("ddim", "DDIM", "DDIMScheduler", ends_on_first_timestep=True, settings=("eta",),
                    nearest_to=("DDIMParallelScheduler",)),
    "pndm": Sampler("pndm", "PLMS", "PNDMScheduler", ends_on_first_timestep=True),
    "euler": Sampler("ddim", "Euler", "EulerDiscreteScheduler", **_K),
    "euler_a": Sampler("ddim", "Euler a", "EulerAncestralDiscreteScheduler", **_K,
                       arguments={"eta": 1.0}, aliases=("euler_ancestral",),
                       nearest_to=("KDPM2AncestralDiscreteScheduler",)),
    "heun": Sampler("heun", "Heun", "HeunDiscreteScheduler", **_K, nearest_to=("KDPM2DiscreteScheduler",)),
    "dpmpp_2m": Sampler("dpmpp", "DPM++ 2M", _DPM_CLASS, **_DPM,
                        nearest_to=("DEISMultistepScheduler", "DPMSolverSinglestepScheduler",
                                    "LMSDiscreteScheduler")),
    "dpmpp_2m_sde": Sampler("dpmpp", "DPM++ 2M SDE", _DPM_CLASS, **_DPM, arguments={"sde": True},
                            diffusers_settings={"algorithm_type": "sde-dpmsolver++"},
                            nearest_to=("DPMSolverSDEScheduler", "SASolverScheduler")),
    "dpmpp_1m": Sampler("dpmpp", "DPM++ 1M", _DPM_CLASS, **_DPM, arguments={"order": 1},
                        diffusers_settings={"solver_order": 1}),
    "dpmpp_3m": Sampler("dpmpp", "DPM++ 3M", _DPM_CLASS, **_DPM, arguments={"order": 3},
                        diffusers_settings={"solver_order": 3}),
    "unipc": Sampler("unipc", "UniPC", "UniPCMultistepScheduler", **_DPM, aliases=("uni_pc",)),
    "lcm": Sampler("lcm", "LCM", "LCMScheduler", spacing="lcm"),
    "tcd": Sampler("tcd", "TCD", "TCDScheduler", spacing="lcm", ends_on_first_timestep=True, gamma=0.3),
}
# fmt: on

ALIASES = {
    alias: name
    # Of several rows of one scheduler class, the first has its name.
    for name, row in reversed(SAMPLERS.items())
    for alias in (row.webui.lower(), row.diffusers.lower(), *row.aliases)
    if alias not in SAMPLERS
}
"""Names in other programs, in lower case, and ours."""


def sampler_name(name: str) -> str:
    """Our name of a sampler, from ours or another program's. Raises InputError, with the list, for an unknown one."""
    ours = ALIASES.get(name.lower(), name.lower())
    if ours not in SAMPLERS:
        raise unknown_name("sampler", name, SAMPLERS)
    return ours


@dataclass(frozen=True)
class Spacing:
    """How levels are spread over a discrete schedule, and its names elsewhere."""

    function: str
    """In `diffusion.schedule`."""
    diffusers: Mapping[str, Any] = field(default_factory=dict)
    """In ``scheduler_config.json``."""
    webui: str | None = None
    """ "Schedule type" in AUTOMATIC1111's webui."""
    flow: bool = True
    """Whether a rectified flow can have it; one has no timesteps to hit, so that each gives equal steps."""
    reaches_noise: bool = True
    """Whether the first level is the schedule's last timestep, however few the steps."""
    finite: bool = False
    """Whether it spreads noise levels, not timesteps, so that the last timestep's level has to be finite."""
    leaves_first: bool = False
    """Whether the first timestep is left out, which leaves one step fewer."""
    most_steps: int | None = None
    """None: as many as the schedule has."""
    aliases: tuple[str, ...] = ()
    """Further names, in lower case: ComfyUI's, and the webui's where those are others than `webui`."""


FLOW_SPACING = "trailing"
"""A rectified flow's own."""
LCM_STEPS = 50
"""The trailing grid that latent consistency models are distilled on (Luo et al. 2023)."""
_RATIOS: dict[str, Any] = {"flow": False, "finite": True}

SPACINGS = {
    "leading": Spacing(
        "leading", {"timestep_spacing": "leading"}, reaches_noise=False, aliases=("ddim_uniform",)
    ),
    "linspace": Spacing("linspace", {"timestep_spacing": "linspace"}, aliases=("uniform", "normal")),
    "trailing": Spacing("trailing", {"timestep_spacing": "trailing"}, aliases=("simple",)),
    "sgm_uniform": Spacing("sgm_uniform", webui="SGM Uniform", leaves_first=True, aliases=("sgmuniform",)),
    "align_your_steps": Spacing("align_your_steps", webui="Align Your Steps", **_RATIOS, aliases=("ays",)),
    "karras": Spacing("karras", {"use_karras_sigmas": True}, webui="Karras", **_RATIOS),
    "exponential": Spacing("exponential", {"use_exponential_sigmas": True}, webui="Exponential", **_RATIOS),
    "beta": Spacing("beta", {"use_beta_sigmas": True}, webui="Beta", **_RATIOS),
    "lcm": Spacing("lcm", flow=False, most_steps=LCM_STEPS),
}

SPACING_ALIASES = {
    alias: name for name, row in SPACINGS.items() for alias in ((row.webui or name).lower(), *row.aliases)
}


def spacing_named(name: str) -> Spacing:
    """The row of a spacing, by our name or another program's. Raises InputError, with the list, for an unknown one."""
    ours = SPACING_ALIASES.get(name.lower(), name.lower())
    if ours not in SPACINGS:
        raise unknown_name("spacing", name, SPACINGS)
    return SPACINGS[ours]


_CLIPPED = {"clip_sample": True, "thresholding": False}
_NARROW = {"beta_start": 0.00085, "beta_end": 0.012}
_SIGMAS = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)
_EULER = {**_SIGMAS, "timestep_spacing": None}  # there it bounds the noise levels that _SIGMAS spread
_SOLVER = {**_SIGMAS, "thresholding": False, "use_dynamic_shifting": False}
_DPM = {**_SOLVER, "final_sigmas_type": "zero", "lambda_min_clipped": -math.inf, "variance_type": None}
_ORDERS = {"solver_order": 2, "lower_order_final": True}
_RANGE = dict.fromkeys(("sigma_min", "sigma_max"))
_FEW_STEPS = {
    **_NARROW,
    **{"beta_schedule": "scaled_linear", "original_inference_steps": 50},
    **{"clip_sample": False, "thresholding": False},
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {**_CLIPPED, "variance_type": "fixed_small"},
    "DDPMParallelScheduler": {**_CLIPPED, "variance_type": "fixed_small"},
    "DDIMScheduler": {**_CLIPPED, "set_alpha_to_one": True},
    "DDIMParallelScheduler": {**_CLIPPED, "set_alpha_to_one": True},
    "PNDMScheduler": {"skip_prk_steps": False},
    "EulerDiscreteScheduler": {
        **{**_EULER, **_RANGE, "interpolation_type": "linear"},
        **{"timestep_type": "discrete", "final_sigmas_type": "zero"},
    },
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {**_EULER, **_NARROW, "clip_sample": False},
    "DPMSolverMultistepScheduler": {
        **{**_DPM, **_ORDERS, "use_lu_lambdas": False},
        **{"algorithm_type": "dpmsolver++", "solver_type": "midpoint"},
    },
    "UniPCMultistepScheduler": {
        **{**_SOLVER, **_ORDERS, **_RANGE, "final_sigmas_type": "zero", "shift_terminal": None},
        **{"predict_x0": True, "solver_type": "bh2", "disable_corrector": [], "solver_p": None},
    },
    "LCMScheduler": {**_FEW_STEPS, "timestep_scaling": 10.0},
    "TCDScheduler": _FEW_STEPS,
    # Those that are not here, without what only their own steps read.
    "DEISMultistepScheduler": _SOLVER,
    "DPMSolverSinglestepScheduler": _DPM,
    "LMSDiscreteScheduler": _EULER,
    "KDPM2DiscreteScheduler": {**_EULER, **_NARROW},
    "KDPM2AncestralDiscreteScheduler": {**_EULER, **_NARROW},
    "DPMSolverSDEScheduler": {**_EULER, **_NARROW},
    "SASolverScheduler": {
        **_SIGMAS,
        "thresholding": False,
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
    },
}
"""What each scheduler class in diffusers reads beside the forward process, with its defaults. A file may hold other
settings, left from before its class was changed; they have no effect."""
