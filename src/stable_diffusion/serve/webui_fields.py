"""What clients of AUTOMATIC1111's API send, as fields of a request; what is not done here is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from PIL import Image, ImageOps

from stable_diffusion import images
from stable_diffusion.diffusion.names import ALIASES, SAMPLERS, SPACING_ALIASES, SPACINGS
from stable_diffusion.errors import InputError, shown
from stable_diffusion.generation.prompt_weights import lora_name, without_loras
from stable_diffusion.generation.request import LARGEST_SEED
from stable_diffusion.generation.strangers import LIMITS
from stable_diffusion.serve.door import Refused, Served, read_picture
from stable_diffusion.serve.jobs import Busy

DONE = (
    *("prompt", "negative_prompt", "seed", "subseed", "subseed_strength", "batch_size", "n_iter", "steps"),
    *("cfg_scale", "width", "height", "sampler_name", "sampler_index", "scheduler", "eta", "enable_hr"),
    *("hr_scale", "denoising_strength", "override_settings"),
)
DONE_WITH_IMAGES = ("init_images", "mask", "resize_mode", "inpainting_mask_invert", "include_init_images")
NO_EFFECT = (
    *("do_not_save_samples", "do_not_save_grid", "save_images"),  # no file is ever written here
    *("mask_blur", "mask_blur_x", "mask_blur_y", "mask_round", "inpainting_fill"),  # a mask's edge is sharp
    *("inpaint_full_res", "inpaint_full_res_padding", "image_cfg_scale", "s_min_uncond", "refiner_switch_at"),
    *("script_args", "override_settings_restore_afterwards", "disable_extra_networks", "comments"),
    "force_task_id",
)
"""Taken with any value, since clients send them whatever their user chose."""
ONLY: dict[str, tuple[Any, ...]] = {
    "alwayson_scripts": ({},),
    "clip_skip": (1, 0),
    "firstpass_image": (),
    "firstphase_height": (0,),
    "firstphase_width": (0,),
    "infotext": ("",),
    "init_latent": (),
    "initial_noise_multiplier": (1,),
    "latent_mask": (),
    "refiner_checkpoint": ("", "None"),
    "restore_faces": (False,),
    "s_churn": (0,),
    "s_noise": (1,),
    "s_tmax": (0,),
    "s_tmin": (0,),
    "script_name": ("", "None"),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "send_images": (True,),
    "styles": ([],),
    "tiling": (False,),
}
"""What is not done here, with the values that ask for nothing; null is another."""
ONLY_HIRES: dict[str, tuple[Any, ...]] = {
    "hr_checkpoint_name": ("", "Use same checkpoint"),
    "hr_negative_prompt": ("",),
    "hr_prompt": ("",),
    "hr_resize_x": (0,),
    "hr_resize_y": (0,),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"),
    "hr_second_pass_steps": (0,),
    "hr_upscaler": ("Latent", "Latent (bicubic)"),
}
"""The same where ``enable_hr`` is true; they have no effect where it is not."""
ONLY_SETTINGS: dict[str, tuple[Any, ...]] = {
    "CLIP_stop_at_last_layers": (1, 0),
    "eta_noise_seed_delta": (0,),
    "forge_additional_modules": ([],),
    "samples_format": ("png",),
    "sd_vae": ("", "Automatic", "None"),
}
"""The same for the keys of ``override_settings``; others have no effect, as most are of the webui's own page."""
CHOICE = "sd_model_checkpoint"
RENAMED = {
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "mask_image": "mask",
    "spacing": "scheduler",
    "variation_seed": "subseed",
    "variation_strength": "subseed_strength",
    "hires_strength": "denoising_strength",
    "hires": "hr_scale",
}
"""Our fields that errors name, as clients call them."""
_SPACINGS = {**{name: name for name in SPACINGS}, **SPACING_ALIASES}


@contextmanager
def refusals() -> Iterator[None]:
    """Errors inside as A1111's: 422 for what a client may not ask for, in the words of its fields."""
    try:
        yield
    except InputError as error:
        if isinstance(error, Busy) or (isinstance(error, Refused) and error.status != 400):
            raise
        said = re.sub(rf"\b({'|'.join(RENAMED)})\b", lambda found: RENAMED[found[1]], str(error))
        field = getattr(error, "field", None)
        raise Refused(said, status=422, field=RENAMED.get(field or "", field)) from error


def read(body: Mapping[str, Any], served: Served, *, syntax: str, with_images: bool) -> dict[str, Any]:
    """The fields of a request that a body asks for.

    Args:
        body: of txt2img or img2img.
        served: the model.
        syntax: of the prompts.
        with_images: whether it is img2img's.

    Raises:
        Refused: what is not done here, or a value that a field cannot have.
    """
    check_only(body, ONLY)
    check_only(settings_of(body), ONLY_SETTINGS, "override_settings.")
    fields: dict[str, Any] = {"prompt": _text(body, "prompt") or "", "prompt_syntax": syntax}
    if syntax == "a1111" and (tags := without_loras(fields["prompt"])[1]):
        # As in the webui, the others do not act then; the weights are those of the tags.
        fields["lora"] = {
            name: weight for name, weight in served.loras.items() if {name, lora_name(name)} & tags.keys()
        }
    fields["negative_prompt"] = _text(body, "negative_prompt")
    fields["num_inference_steps"] = _whole(body, "steps", 1, LIMITS["num_inference_steps"])
    fields["guidance_scale"] = _number(body, "cfg_scale", -1000, 1000)
    for side in ("width", "height"):
        fields[side] = _whole(body, side, 1, LIMITS[side])
    fields["num_images_per_prompt"] = _count(body)
    fields["seed"] = _seed(body, "seed")
    if strength := _number(body, "subseed_strength", 0, 1):
        fields |= {"variation_seed": _seed(body, "subseed"), "variation_strength": strength}
    fields |= _sampling(body, served)
    if with_images:
        fields |= _pictures(body, fields["width"], fields["height"])
        fields["strength"] = _strength(body)
    elif flag(body, "enable_hr"):
        check_only(body, ONLY_HIRES)
        fields |= {"hires": _number(body, "hr_scale", 1, 4) or 2.0, "hires_strength": _strength(body)}
    return {name: value for name, value in fields.items() if value is not None}


def unread(body: Mapping[str, Any], *, with_images: bool) -> list[str]:
    """The names in a body that mean nothing here: those of other programs, and extensions'."""
    known = {*DONE, *NO_EFFECT, *ONLY, *ONLY_HIRES, *(DONE_WITH_IMAGES if with_images else ())}
    settings = {*ONLY_SETTINGS, CHOICE}
    names = [name for name in body if name not in known]
    return [*names, *(f"override_settings.{name}" for name in settings_of(body) if name not in settings)]


def settings_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a body sets for its pictures alone."""
    settings = body.get("override_settings")
    if settings is not None and not isinstance(settings, dict):
        raise Refused(
            f"override_settings must be an object, got {shown(settings)}", field="override_settings"
        )
    return settings or {}


def check_only(body: Mapping[str, Any], only: Mapping[str, tuple[Any, ...]], before: str = "") -> None:
    """Raises Refused for a field that asks for what is not done here."""
    for name, accepted in only.items():
        if body.get(name) is not None and body[name] not in accepted:
            raise not_done(before + name, accepted)


def not_done(name: str, accepted: tuple[Any, ...]) -> Refused:
    """The error for a field that asks for what is not done here."""
    harmless = f", or send {json.dumps(accepted[0])}" if accepted else ""
    return Refused(
        f"{name} asks for something that this server does not do: leave it out{harmless}", field=name
    )


def sampler_of(name: str, field: str = "sampler_name") -> tuple[str, str | None]:
    """Our sampler and spacing of a name such as ``DPM++ 2M Karras``. Raises Refused for an unknown one."""
    lower = name.lower()
    ending = max((alias for alias in _SPACINGS if lower.endswith(f" {alias}")), key=len, default=None)
    bare = lower if ending is None else lower[: -len(ending) - 1]
    sampler = ALIASES.get(bare, bare)
    if sampler not in SAMPLERS:
        known = ", ".join(row.webui for row in SAMPLERS.values())
        raise Refused(f"unknown {field} {shown(name)}: choose one of {known}", field=field)
    return sampler, None if ending is None else _SPACINGS[ending]


def spacings_of(served: Served) -> dict[str, str]:
    """The spacings that a model can have, each with the webui's name or ours."""
    is_flow = served.config.schedule.kind == "flow"
    return {name: row.webui or name for name, row in SPACINGS.items() if row.flow or not is_flow}


def repainted(mask: Image.Image, *, invert: bool) -> Image.Image:
    """A mask in black and white, as A1111 reads one: by opacity where it is RGBA and not all opaque, else by grey."""
    if mask.mode == "RGBA" and mask.getchannel("A").getextrema() != (255, 255):
        binary = mask.getchannel("A").point(lambda level: 255 if level > 128 else 0)
    else:
        grey = images.to_rgb(mask) if mask.mode[0] in "IF" else mask
        binary = grey.convert("L").point(lambda level: 255 if level > 127 else 0)
    return ImageOps.invert(binary) if invert else binary


def _sampling(body: Mapping[str, Any], served: Served) -> dict[str, Any]:
    """The sampler, its spacing and its eta, each only where it is said."""
    fields: dict[str, Any] = {}
    possible = spacings_of(served)
    field = "sampler_name" if _text(body, "sampler_name") else "sampler_index"
    if name := _text(body, field):
        fields["sampler"], spacing = sampler_of(name, field)
        if spacing in possible:
            fields["spacing"] = spacing  # a rectified flow has its own; clients write Karras behind any name
    scheduler = (_text(body, "scheduler") or "automatic").lower()
    if scheduler != "automatic" and "spacing" not in fields:
        fields["spacing"] = _SPACINGS.get(scheduler)
        if fields["spacing"] not in possible:
            known = ", ".join(("Automatic", *possible.values()))
            said = f"the model {served.name!r} has no scheduler {shown(scheduler)}: choose one of {known}"
            raise Refused(said, field="scheduler")
    eta = _number(body, "eta", 0, 1)
    sampler = fields.get("sampler", served.config.sampler.name)
    if "eta" in SAMPLERS[sampler].settings:
        fields["eta"] = eta
    elif eta not in (None, fixed := SAMPLERS[sampler].arguments.get("eta", eta)):
        said = f"eta of {SAMPLERS[sampler].webui} is {fixed:g} here: leave it out, or send {fixed:g}"
        raise Refused(said, field="eta")
    return fields


def _pictures(body: Mapping[str, Any], width: int | None, height: int | None) -> dict[str, Any]:
    """The picture to begin with and its mask, which A1111's resize mode 0 stretches and 1 crops."""
    given = body.get("init_images")
    if not isinstance(given, list) or len(given) != 1:
        got = f"{len(given)} of them" if isinstance(given, list) else shown(given)
        raise Refused(f"init_images must be a list of one picture, got {got}", field="init_images")
    mode = _whole(body, "resize_mode", 0, 3) or 0
    if mode > 1:
        raise not_done("resize_mode", (0, 1))
    image = images.with_alpha(read_picture(given[0], "init_images"))
    if mode == 0 and (width or height):
        # The image's own sides may be far longer than those that can be asked for.
        wide, high = (
            min(own, LIMITS[side]) for side, own in zip(("width", "height"), image.size, strict=True)
        )
        image = _stretched(image, width or wide, height or high, Image.Resampling.LANCZOS)
    if body.get("mask") is None:
        return {"image": image}
    invert = body.get("inpainting_mask_invert") or 0
    if invert not in (0, 1):
        said = f"inpainting_mask_invert must be 0 or 1, got {shown(invert)}"
        raise Refused(said, field="inpainting_mask_invert")
    mask = repainted(read_picture(body["mask"], "mask"), invert=bool(invert))
    if mode == 0:
        mask = _stretched(mask, *image.size, Image.Resampling.NEAREST)
    return {"image": image, "mask_image": mask}


def _stretched(picture: Image.Image, width: int, height: int, by: Image.Resampling) -> Image.Image:
    """The picture in that shape, at that size where it had another."""
    return (
        picture if images.same_shape(picture.size, (width, height)) else picture.resize((width, height), by)
    )


def _count(body: Mapping[str, Any]) -> int:
    most = LIMITS["num_images_per_prompt"]
    count = (_whole(body, "batch_size", 1, most) or 1) * (_whole(body, "n_iter", 1, most) or 1)
    if count > most:
        said = f"batch_size times n_iter may be at most {most}, got {count}: ask for fewer pictures at a time"
        raise Refused(said, field="n_iter")
    return count


def _seed(body: Mapping[str, Any], name: str) -> int | None:
    """A seed; None, for a random one, where it is negative."""
    seed = _whole(body, name, -LARGEST_SEED, LARGEST_SEED)
    return None if seed is None or seed < 0 else seed


def _strength(body: Mapping[str, Any]) -> float | None:
    strength = _number(body, "denoising_strength", 0, 1)
    if strength == 0:
        raise Refused(
            "denoising_strength must be above 0: at 0 the picture stays as it is", field="denoising_strength"
        )
    return strength


def _text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise Refused(f"{name} must be a text, got {shown(value)}", field=name)
    return value


def flag(body: Mapping[str, Any], name: str) -> bool:
    """Whether a field is true; raises Refused for what is neither."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(f"{name} must be true or false, got {shown(value)}", field=name)
    return bool(value)


def _number(body: Mapping[str, Any], name: str, low: float, high: float) -> float | None:
    """A number, which may stand in a text, as A1111 takes it."""
    value = body.get(name)
    if value is None:
        return None
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or not low <= number <= high:
        raise Refused(f"{name} must be a number from {low} to {high}, got {shown(value)}", field=name)
    return number


def _whole(body: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    """A whole number, likewise."""
    value = body.get(name)
    if value is None:
        return None
    try:
        number = int(value)  # not by way of float, for the sake of large seeds
        exact = not isinstance(value, bool) and (isinstance(value, str) or number == value)
    except (TypeError, ValueError, OverflowError):
        number, exact = 0, False
    if not exact or not low <= number <= high:
        raise Refused(f"{name} must be a whole number from {low} to {high}, got {shown(value)}", field=name)
    return number
