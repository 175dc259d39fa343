"""The samplers and spacings by name: one row each, with what other programs call them.

No torch here, so that ``--help`` can list the names. A row names its function in `samplers` or `schedule`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from stable_diffusion.errors import unknown_name

Grid = Literal["rounded", "fractional", "intervals"]
"""Whole timesteps; fractional ones (k-diffusion's samplers); or whole ones that divide the range into `n` intervals
(the multistep solvers)."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a sampler's authors place the levels and scale the starting noise, and its names elsewhere."""

    function: str
    """Its name in `diffusion.samplers`."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the function that are fixed for this row."""
    settings: tuple[str, ...] = ()
    """Fields of ``SamplerConfig`` that the function reads."""
    spacing: str = "leading"
    grid: Grid = "rounded"
    ends_on_first_timestep: bool = False
    """Whether the last level is the schedule's ``final``, not clean latents."""
    begins_with_sigma: bool = False
    """Whether the starting noise is multiplied by sigma instead of 1, under the spacings that reach pure noise."""
    webui: str
    """Label in AUTOMATIC1111's webui."""
    diffusers: str
    """Scheduler class in diffusers."""
    diffusers_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings in ``scheduler_config.json`` that tell this row from others of the same class."""
    aliases: tuple[str, ...] = ()
    """Further names, in lower case: k-diffusion's and ComfyUI's."""


SAMPLERS = {
    "ddpm": Sampler(function="ddpm", settings=("variance",), webui="DDPM", diffusers="DDPMScheduler"),
    "ddim": Sampler(
        function="ddim",
        settings=("eta",),
        ends_on_first_timestep=True,
        webui="DDIM",
        diffusers="DDIMScheduler",
    ),
    "pndm": Sampler(function="pndm", ends_on_first_timestep=True, webui="PLMS", diffusers="PNDMScheduler"),
    "euler": Sampler(
        function="ddim",
        spacing="linspace",
        grid="fractional",
        begins_with_sigma=True,
        webui="Euler",
        diffusers="EulerDiscreteScheduler",
    ),
    "euler_a": Sampler(
        function="ddim",
        arguments={"eta": 1.0},
        spacing="linspace",
        grid="fractional",
        begins_with_sigma=True,
        webui="Euler a",
        diffusers="EulerAncestralDiscreteScheduler",
        aliases=("euler_ancestral",),
    ),
    "heun": Sampler(
        function="heun",
        spacing="linspace",
        grid="fractional",
        begins_with_sigma=True,
        webui="Heun",
        diffusers="HeunDiscreteScheduler",
    ),
    "dpmpp_2m": Sampler(
        function="dpmpp_2m",
        spacing="linspace",
        grid="intervals",
        webui="DPM++ 2M",
        diffusers="DPMSolverMultistepScheduler",
    ),
    "dpmpp_2m_sde": Sampler(
        function="dpmpp_2m",
        arguments={"sde": True},
        spacing="linspace",
        grid="intervals",
        webui="DPM++ 2M SDE",
        diffusers="DPMSolverMultistepScheduler",
        diffusers_settings={"algorithm_type": "sde-dpmsolver++"},
    ),
    "unipc": Sampler(
        function="unipc",
        spacing="linspace",
        grid="intervals",
        webui="UniPC",
        diffusers="UniPCMultistepScheduler",
        aliases=("uni_pc",),
    ),
    "lcm": Sampler(function="lcm", spacing="lcm", webui="LCM", diffusers="LCMScheduler"),
}

ALIASES = {
    alias: name
    for name, row in reversed(
        SAMPLERS.items()
    )  # of several rows of one scheduler class, the first has its name
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


@dataclass(frozen=True, kw_only=True)
class Spacing:
    """How levels are spread over a discrete schedule, and its names elsewhere."""

    function: str
    """Its name in `diffusion.schedule`."""
    diffusers: Mapping[str, Any] = field(default_factory=dict)
    """Settings in ``scheduler_config.json``."""
    webui: str | None = None
    """"Schedule type" in AUTOMATIC1111's webui."""
    flow: bool = True
    """Whether a rectified flow can have it: equal steps then, since a flow has no discrete timesteps."""


SPACINGS = {
    "leading": Spacing(function="leading", diffusers={"timestep_spacing": "leading"}),
    "linspace": Spacing(function="linspace", diffusers={"timestep_spacing": "linspace"}),
    "trailing": Spacing(function="trailing", diffusers={"timestep_spacing": "trailing"}),
    "karras": Spacing(function="karras", diffusers={"use_karras_sigmas": True}, webui="Karras", flow=False),
    "lcm": Spacing(function="lcm", flow=False),
}


def spacing_named(name: str) -> Spacing:
    """The row of a spacing. Raises InputError, with the list, for an unknown one."""
    if name not in SPACINGS:
        raise unknown_name("spacing", name, SPACINGS)
    return SPACINGS[name]
