"""What a scheduler_config.json says: each setting of each class is honoured as in diffusers, or a note names it."""

from __future__ import annotations

import ast
import inspect
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from stable_diffusion import DiffusionModel, InputError, SamplerConfig
from stable_diffusion.checkpoints import read
from stable_diffusion.checkpoints.diffusers.schedulers import (
    FORWARD,
    sampler_config,
    schedule_config,
    scheduler_notes,
)
from stable_diffusion.checkpoints.info import describe
from stable_diffusion.cli import main
from stable_diffusion.config import ScheduleConfig
from stable_diffusion.diffusion.names import SAMPLERS, SCHEDULERS
from tests.checkpoints import sd
from tests.checkpoints.test_diffusers import TOLERANCE, error, ours
from tests.nn.reference import normal, quietly

NEAREST = {cls: name for name, row in SAMPLERS.items() for cls in row.nearest_to}
OWN = {row.diffusers: name for name, row in reversed(SAMPLERS.items())}
WITHOUT_EFFECT = {
    # They need clip_sample, thresholding or use_dynamic_shifting, of which a note tells.
    *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "time_shift_type"),
    "euler_at_final",  # the step to clean latents is Euler's anyway
}
OF_THEIR_STEPS = {
    # Settings of steps that are not here.
    *("solver_order", "algorithm_type", "solver_type", "lower_order_final", "predictor_order"),
    *("corrector_order", "tau_func", "noise_sampler_seed"),
}


def said(cls: str, **settings: Any) -> dict[str, Any]:
    """A published file of that class: Stable Diffusion's schedule, and what else it says."""
    return {**sd.SCHEDULER, "_class_name": cls, **settings}


def parameters(cls: str) -> dict[str, Any]:
    """What diffusers' class takes, with its defaults, from its source: one class needs a library that is not there."""
    modules = Path(inspect.getfile(diffusers.DDIMScheduler)).parent
    for path in modules.glob("scheduling_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == cls:
                (init,) = (f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__")
                values = [
                    eval(ast.unparse(default), {}) for default in init.args.defaults
                ]  # numbers and names of types
                return dict(zip([arg.arg for arg in init.args.args[1:]], values, strict=True))
    raise AssertionError(f"diffusers has no {cls}")


@pytest.mark.parametrize("cls", SCHEDULERS)
def test_no_setting_falls_through(cls: str) -> None:
    """Every parameter of the class is read, with the class's own default, or has no effect."""
    assert (cls in OWN) != (cls in NEAREST)
    theirs = parameters(cls)
    few_steps = SAMPLERS[OWN.get(cls, "ddim")].spacing == "lcm"
    for key, default in theirs.items():
        if key in WITHOUT_EFFECT or (cls in NEAREST and key in OF_THEIR_STEPS):
            continue
        if few_steps and key in ("set_alpha_to_one", "timestep_spacing", "timestep_scaling"):
            continue  # LCM and TCD take them and do as they do
        known = FORWARD | SCHEDULERS[cls]
        assert key in known
        if key == "timestep_spacing":
            assert default == SAMPLERS[(OWN | NEAREST)[cls]].spacing
        else:
            assert known[key] == (default if default is not None or key != "disable_corrector" else [])
    assert set(SCHEDULERS[cls]) <= set(theirs)


def another(key: str, default: Any) -> Any:
    values = {
        **{"timestep_spacing": "leading", "final_sigmas_type": "sigma_min", "variance_type": "learned"},
        **{"interpolation_type": "log_linear", "timestep_type": "continuous", "solver_type": "heun"},
        **{"algorithm_type": "dpmsolver", "skip_prk_steps": False, "clip_sample": True},
    }
    return values.get(key, not default if isinstance(default, bool) else 5)


@pytest.mark.parametrize(
    ("cls", "key"), [(cls, key) for cls, keys in SCHEDULERS.items() for key in keys if key not in FORWARD]
)
def test_each_setting_is_honoured_or_named(cls: str, key: str) -> None:
    plain = said(cls, clip_sample=False)
    changed = plain | {key: another(key, SCHEDULERS[cls][key])}
    assert not any("Left aside" in note for note in scheduler_notes(plain))
    named = any(f"{key} {changed[key]!r}" in note for note in scheduler_notes(changed))
    assert named != (sampler_config(changed) != sampler_config(plain) and key != "use_lu_lambdas")
    assert scheduler_notes(plain | {key: None}) == scheduler_notes(
        {name: value for name, value in plain.items() if name != key}
    )


def test_a_silent_file_has_its_classes_defaults() -> None:
    """diffusers' DDIM and DDPM clip, PNDM begins with Runge-Kutta steps, and few-step models have their own betas."""
    for cls, left in (
        ("DDIM", "clip_sample True"),
        ("DDPM", "clip_sample True"),
        ("PNDM", "skip_prk_steps False"),
    ):
        assert scheduler_notes({"_class_name": f"{cls}Scheduler"}) == [
            f"Left aside, of scheduler/scheduler_config.json: {left}."
        ]
    for cls in ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"):
        assert schedule_config({"_class_name": f"{cls}Scheduler"}) == ScheduleConfig(
            kind="linear", steps_offset=0
        )
    for cls in ("LCM", "TCD"):
        found = schedule_config({"_class_name": f"{cls}Scheduler"})
        assert (found.kind, found.beta_start, found.beta_end) == ("scaled_linear", 0.00085, 0.012)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (said("DDPMScheduler", variance_type="fixed_large"), SamplerConfig(name="ddpm", variance="large")),
        (said("DPMSolverMultistepScheduler", solver_order=1), SamplerConfig(name="dpmpp_1m")),
        (said("DPMSolverMultistepScheduler", solver_order=3), SamplerConfig(name="dpmpp_3m")),
        (
            said("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", use_beta_sigmas=True),
            SamplerConfig(name="dpmpp_2m_sde", spacing="beta"),
        ),
        (
            said("DPMSolverMultistepScheduler", use_karras_sigmas=True, timestep_spacing="leading"),
            SamplerConfig(name="dpmpp_2m", spacing="karras"),
        ),
        (
            said("EulerDiscreteScheduler", use_exponential_sigmas=True),
            SamplerConfig(name="euler", spacing="exponential"),
        ),
        # What the class does not read, a file that had another one has left over.
        (said("EulerAncestralDiscreteScheduler", use_karras_sigmas=True), SamplerConfig(name="euler_a")),
        (said("DDIMScheduler", use_beta_sigmas=True, solver_order=3), SamplerConfig(name="ddim")),
        (said("LCMScheduler", timestep_spacing="leading"), SamplerConfig(name="lcm")),
        (said("TCDScheduler", timestep_spacing="trailing"), SamplerConfig(name="tcd")),
    ],
)
def test_what_is_honoured(settings: dict[str, Any], expected: SamplerConfig) -> None:
    assert sampler_config(settings) == expected
    assert scheduler_notes(settings) == []


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        (
            said("EulerDiscreteScheduler", use_karras_sigmas=True, timestep_spacing="leading"),
            "timestep_spacing 'leading'",
        ),
        (
            said("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++", solver_order=3),
            "solver_order 3",
        ),
        (
            said("DPMSolverMultistepScheduler", solver_type="heun", final_sigmas_type="sigma_min"),
            "final_sigmas_type 'sigma_min', solver_type 'heun'",
        ),
        (
            said("DPMSolverMultistepScheduler", use_flow_sigmas=True, use_karras_sigmas=True),
            "use_karras_sigmas True",
        ),
        (
            said("UniPCMultistepScheduler", solver_type="bh1", solver_order=3),
            "solver_order 3, solver_type 'bh1'",
        ),
    ],
)
def test_what_is_left_aside(settings: dict[str, Any], left: str) -> None:
    assert scheduler_notes(settings) == [f"Left aside, of scheduler/scheduler_config.json: {left}."]


def test_uniform_log_snr_takes_the_same_levels() -> None:
    """use_lu_lambdas has the exponential spacing's levels and rounds their timesteps, which the spacing cuts."""
    settings = said("DPMSolverMultistepScheduler", use_lu_lambdas=True)
    assert sampler_config(settings).spacing == "exponential"
    assert scheduler_notes(settings) == [
        "Left aside, of scheduler/scheduler_config.json: use_lu_lambdas True."
    ]


# A model whose scheduler says it


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd.write(tmp_path_factory.mktemp("schedulers") / "sd", "1.5")


@pytest.fixture(scope="module")
def pipe(published: Path) -> Any:
    found = quietly(diffusers.StableDiffusionPipeline.from_pretrained, published, safety_checker=None)
    found.set_progress_bar_config(disable=True)
    return found


def folder_with(settings: dict[str, Any], published: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(published, tmp_path / "copy"))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    "settings",
    [
        said("EulerDiscreteScheduler", use_exponential_sigmas=True),
        said("EulerDiscreteScheduler", use_beta_sigmas=True),
        said("HeunDiscreteScheduler", use_beta_sigmas=True),
        said("DPMSolverMultistepScheduler", solver_order=1),
        said("DPMSolverMultistepScheduler", solver_order=3),
        said(
            "DPMSolverMultistepScheduler", solver_order=3, use_karras_sigmas=True, timestep_spacing="leading"
        ),
        said("UniPCMultistepScheduler", timestep_spacing="trailing"),
        said("TCDScheduler", timestep_spacing="trailing"),
        {"_class_name": "HeunDiscreteScheduler"},
    ],
    ids=lambda settings: "-".join(
        str(value) for key, value in settings.items() if sd.SCHEDULER.get(key) != value
    ),
)
def test_a_folder_gives_the_latents_of_diffusers(
    settings: dict[str, Any], published: Path, pipe: Any, tmp_path: Path
) -> None:
    model = DiffusionModel.from_pretrained(folder_with(settings, published, tmp_path))
    pipe.scheduler = quietly(getattr(diffusers, settings["_class_name"]).from_config, settings)
    noise = normal(1, 4, 8, 8, dtype=torch.float32)
    wanted = quietly(
        pipe,
        prompt="a fox",
        negative_prompt="blurry",
        num_inference_steps=10,
        latents=noise.clone(),
        output_type="latent",
    ).images
    request = {"prompt": "a fox", "negative_prompt": "blurry", "latents": noise}
    assert error(ours(model, None, eta=0.0, **request), wanted) < TOLERANCE
    assert error(ours(model, None, eta=0.0, **request, num_inference_steps=9), wanted) > 10 * TOLERANCE


@pytest.mark.parametrize("cls", NEAREST)
def test_a_class_that_is_not_here_does_not_block_the_model(
    cls: str, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The forward process is the same: the nearest sampler with a note; `info`, another sampler and `export` work."""
    folder = folder_with(said(cls, use_karras_sigmas=True, algorithm_type="deis"), published, tmp_path)
    note = f"The sampler of {cls} is not here: {NEAREST[cls]} is the nearest."
    assert read(folder).notes[-1] == note
    assert any(line.strip() == note for line in describe(folder))
    model = DiffusionModel.from_pretrained(folder)
    assert model.config.sampler.name == NEAREST[cls]
    assert model.config.schedule == DiffusionModel.from_pretrained(published).config.schedule
    if cls == "DEISMultistepScheduler":
        options = ["--sampler", "euler", "--steps", "2", "--output", str(tmp_path / "a.png")]
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            main(["generate", "a fox", "--model", str(folder), *options])
            main(["export", str(folder), str(tmp_path / "out")])
        assert capsys.readouterr().err.count(note) == 2
        assert DiffusionModel.from_pretrained(tmp_path / "out").config.sampler == model.config.sampler


def test_a_class_of_another_process_is_refused_with_the_list() -> None:
    with pytest.raises(
        InputError, match=r"unknown scheduler class 'EDMEulerScheduler'.*DEISMultistepScheduler"
    ):
        schedule_config(said("EDMEulerScheduler"))


@pytest.mark.parametrize(
    "settings", [{"beta_start": "small"}, {"flow_shift": math.nan, "use_flow_sigmas": "yes"}]
)
def test_values_of_another_type_are_sentences(settings: dict[str, Any]) -> None:
    try:
        found = schedule_config(said("DPMSolverMultistepScheduler", **settings))
    except InputError as caught:
        assert "\n" not in str(caught)
    else:
        assert found.kind == "flow"
