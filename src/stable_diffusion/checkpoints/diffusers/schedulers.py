"""What a ``scheduler_config.json`` says, both ways: the forward process, the sampler, and what has no place here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_diffusion.checkpoints.diffusers.settings import VERSION
from stable_diffusion.config import ModelConfig, SamplerConfig, ScheduleConfig, from_dict
from stable_diffusion.diffusion.names import SAMPLERS, SCHEDULERS, SPACINGS, sampler_name, spacing_named
from stable_diffusion.errors import InputError, shown, unknown_name

# With diffusers' own defaults, which hold where a file is silent and its class has no others.
SCHEDULE_SAME: dict[str, Any] = {
    **{"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "steps_offset": 0},
    **{"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "set_alpha_to_one": False},
}
FORWARD = {
    **SCHEDULE_SAME,
    **{"beta_schedule": "linear", "trained_betas": None, "use_flow_sigmas": False, "flow_shift": 1.0},
    "timestep_spacing": None,
}
"""What is read of every scheduler class: the forward process, and where the timesteps are."""

# What else gives the same there as here.
_OURS: dict[str, tuple[Any, ...]] = {
    **{"clip_sample": (False,), "skip_prk_steps": (True,), "timestep_spacing": (None, "linspace")},
    **{"algorithm_type": ("dpmsolver++", "deis"), "solver_type": ("midpoint", "bh2", "logrho")},
}

BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


def schedule_config(settings: dict[str, Any]) -> ScheduleConfig:
    """Our configuration of the forward process for a ``scheduler_config.json``."""
    read = _read(settings)
    found = {key: read[key] for key in SCHEDULE_SAME}
    if read["use_flow_sigmas"]:
        flow = {key: found[key] for key in ("num_train_timesteps", "prediction_type")}
        return from_dict(ScheduleConfig, {"kind": "flow", "shift": read["flow_shift"], **flow})
    if read["trained_betas"] is not None:
        raise InputError("scheduler_config.json: trained_betas are not supported, a named beta_schedule is")
    beta_schedule = str(read["beta_schedule"])
    if beta_schedule not in BETA_SCHEDULES:
        raise unknown_name("beta_schedule", beta_schedule, BETA_SCHEDULES)
    return from_dict(ScheduleConfig, {"kind": BETA_SCHEDULES[beta_schedule], **found})


def sampler_config(settings: dict[str, Any]) -> SamplerConfig:
    """The sampler that a ``scheduler_config.json`` names, or the nearest one, with its spacing."""
    read, name = _read(settings), _sampler(settings)
    if read["use_flow_sigmas"]:
        return SamplerConfig(name="euler" if name == "dpmpp_1m" else name)
    if SAMPLERS[name].spacing == "lcm":
        return SamplerConfig(name=name)  # whatever the file says of timesteps, as in diffusers
    if read.get("use_lu_lambdas"):
        read |= SPACINGS["exponential"].diffusers  # the same noise levels
    said = [ours for ours, row in SPACINGS.items() if row.diffusers and _says(read, row.diffusers)]
    if not said and read["timestep_spacing"] is not None:
        raise unknown_name("timestep_spacing", read["timestep_spacing"], SPACINGS)
    return SamplerConfig(
        name=name,
        spacing=said[-1] if said else None,  # noise levels before timesteps
        variance="large" if name == "ddpm" and read["variance_type"] == "fixed_large" else "small",
    )


def scheduler_notes(settings: dict[str, Any]) -> list[str]:
    """What of a ``scheduler_config.json`` our samplers do otherwise, in sentences for the user."""
    read, name, cls = _read(settings), _sampler(settings), str(settings["_class_name"])
    spacing = sampler_config(settings).spacing
    honoured = {**SAMPLERS[name].diffusers_settings, **(SPACINGS[spacing].diffusers if spacing else {})}
    if name == "ddpm":
        honoured["variance_type"] = "fixed_large"
    left = [
        f"{key} {shown(read[key])}"
        for key, default in SCHEDULERS[cls].items()
        if (key == "timestep_spacing" or key not in FORWARD)
        and read[key] not in _OURS.get(key, (default,))
        and (key not in honoured or read[key] != honoured[key])
    ]
    notes = [f"Left aside, of scheduler/scheduler_config.json: {', '.join(left)}."] if left else []
    if SAMPLERS[name].diffusers != cls:
        notes.append(f"The sampler of {cls} is not here: {name} is the nearest.")
    return notes


def _read(settings: dict[str, Any]) -> dict[str, Any]:
    """What its class reads of a ``scheduler_config.json``, with its defaults; null is silence."""
    name = str(settings["_class_name"])
    if name not in SCHEDULERS:
        raise unknown_name("scheduler class", name, SCHEDULERS)
    known = FORWARD | SCHEDULERS[name]
    return known | {key: settings[key] for key in known if settings.get(key) is not None}


def _sampler(settings: dict[str, Any]) -> str:
    """The sampler of a ``scheduler_config.json``, or the nearest one."""
    read, cls = _read(settings), settings["_class_name"]
    rows = {ours: row for ours, row in SAMPLERS.items() if cls in (row.diffusers, *row.nearest_to)}
    return max(rows, key=lambda ours: _says(read, rows[ours].diffusers_settings))


def scheduler_settings(config: ModelConfig) -> dict[str, Any]:
    """The ``scheduler_config.json``: the inverse of ``schedule_config`` and ``sampler_config``."""
    schedule, sampler = config.schedule, config.sampler
    name = sampler_name(sampler.name)
    forward = {"_diffusers_version": VERSION, **{key: getattr(schedule, key) for key in SCHEDULE_SAME}}
    if schedule.kind == "flow":  # DPM-Solver++ of the first order is Euler's step
        return {
            "_class_name": "DPMSolverMultistepScheduler",
            **{key: forward[key] for key in ("_diffusers_version", "num_train_timesteps", "prediction_type")},
            "flow_shift": schedule.shift,
            "steps_offset": 1,  # which its pipeline asks for
            **{"solver_order": 2, "use_flow_sigmas": True},
            **SAMPLERS["dpmpp_1m" if name in ("euler", "ddim") else name].diffusers_settings,
        }
    if not schedule.rescale_betas_zero_snr:
        del forward["rescale_betas_zero_snr"]
    beta_schedule = {ours: theirs for theirs, ours in BETA_SCHEDULES.items()}[schedule.kind]
    settings: dict[str, Any] = {
        "_class_name": SAMPLERS[name].diffusers,
        **SAMPLERS[name].diffusers_settings,
        **forward,
        **{"beta_schedule": beta_schedule, "trained_betas": None},
        **{"clip_sample": False, "skip_prk_steps": True},
    }
    settings |= _spacing_settings(sampler)
    if name == "ddpm" and sampler.variance == "large":
        settings["variance_type"] = "fixed_large"
    return settings


def unsaid(sampler: SamplerConfig) -> list[str]:
    """What ``scheduler_config.json`` cannot say of a sampler, in sentences for the user."""
    row = SAMPLERS[sampler_name(sampler.name)]
    notes = []
    if sampler.spacing not in (None, row.spacing) and not _spacing_settings(sampler):
        notes.append(
            f"Diffusers' {row.diffusers} cannot have the spacing {sampler.spacing!r}: its pictures differ."
        )
    eta = row.gamma if sampler.eta is None else sampler.eta
    if eta and (row.gamma is not None or "eta" in row.settings):
        notes.append(f"Diffusers' pipeline asks for eta with each call: give it eta={eta}.")
    if row.gamma and eta == 0:  # as the pipeline has it by itself
        notes.append(
            f"A diffusers folder says nothing of eta: read here, the model has eta {row.gamma} again."
        )
    return notes


def _spacing_settings(sampler: SamplerConfig) -> dict[str, Any]:
    """A sampler's spacing in ``scheduler_config.json``; empty where there is none, or its class cannot have it."""
    row = SAMPLERS[sampler_name(sampler.name)]
    if sampler.spacing is None or row.spacing == "lcm":
        return {}
    spacing = spacing_named(sampler.spacing)
    if spacing.leaves_first and row.grid == "intervals":
        spacing = SPACINGS["linspace"]  # whose timesteps are these in that class
    known = FORWARD | SCHEDULERS[row.diffusers]
    return {key: value for key, value in spacing.diffusers.items() if key in known}


def _says(settings: dict[str, Any], wanted: Mapping[str, Any]) -> int:
    """How many settings are as wanted; 0 unless all are."""
    return len(wanted) if all(settings.get(key) == value for key, value in wanted.items()) else 0
