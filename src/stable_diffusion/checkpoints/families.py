"""What a file of weights is and for which family of models, by the names of its tensors and by its widths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from stable_diffusion.config import AutoencoderKLConfig, AutoencoderTinyConfig, ModelConfig
from stable_diffusion.errors import InputError

UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema.diffusion_model"
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."
"""How the names of each part's tensors begin in CompVis' single files of whole models."""
PREFIXES = (
    # Other spellings of whole models, and files of one part; the first that fits holds.
    ("conditioner.embedders.0.model.", OPEN_CLIP),
    (CLIP, CLIP),
    ("cond_stage_model.transformer.", CLIP),
    *((bare, VAE + bare) for bare in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "loss.")),
    *((bare, UNET + bare) for bare in ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.")),
    ("out.", UNET + "out."),
)

WIDTHS = {768: "SD 1.x", 1024: "SD 2.x", 1280: "SDXL's refiner", 2048: "SDXL"}
"""Models by the width of the text tokens that their U-Nets read."""

ENDINGS = {
    # How a LoRA's tensors end, and what they are: kohya and LyCORIS, PEFT, diffusers of 2023, diffusers before.
    **{".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid"},
    **{".alpha": "alpha", ".dora_scale": "dora_scale"},
    **{".lora_A.weight": "down", ".lora_B.weight": "up"},
    **{".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude"},
    **{".lora.down.weight": "down", ".lora.up.weight": "up"},
    **{".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up"},
    **{"_lora.down.weight": "down", "_lora.up.weight": "up"},
}
NAMED = r"(\.lora_(?:A|B|magnitude_vector))\.\w+(\.weight)$"
"""PEFT's endings with an adapter's name in the middle, such as ``default``."""
OTHER_ADAPTERS = {  # KohakuBlueleaf/LyCORIS, lycoris/modules
    **{r"\.hada_": "LoHa", r"\.lokr_": "LoKr", r"\.oft_": "OFT", r"\.on_input$": "IA3"},
    **{r"\.[ab][12]\.weight$": "GLoRA", r"\.diff(_b)?$": "whole weights", r"\.[wb]_norm$": "whole norms"},
}
CONTEXT = r"attn2[._](processor\.)?to_[kv]$|^(lora_te_|text_encoders?\.|text_model\.).*(q_proj|to_q)$"
"""A LoRA's modules that read the text's tokens, or make them."""
OTHER_LORAS = {
    r"^lora_te[12]_|^text_encoder_2\.|^text_encoders\.clip_g\.": "SDXL",
    r"(double|single|joint)_blocks|^(lora_)?transformer[._]": "a transformer such as Flux or SD 3",
}
"""LoRAs for other models, by patterns of their modules' names."""
VERSIONS = {  # kohya-ss/sd-scripts, library/train_util.py and library/sai_model_spec.py
    "ss_base_model_version": {"sd_v1": 768, "sd_v2": 1024, "sdxl": 2048},
    "modelspec.architecture": {
        f"stable-diffusion-{v}": w for v, w in (("v1", 768), ("v2", 1024), ("xl", 2048))
    },
    "ss_v2": {"True": 1024},
}

TAESD = r"^((en|de)coder\.layers\.)?\d+\.(conv\.\d+\.|skip\.)?(weight|bias)$"
DIFFUSERS_PART = "one part in diffusers' layout: give its folder"
KINDS = {
    # Patterns of a tensor's name, and what to say to those who wanted another kind; the first that fits holds.
    "lora": (
        "|".join([*(re.escape(end) + "$" for end in ENDINGS), NAMED, *OTHER_ADAPTERS]),
        "a LoRA: use load_lora, or --lora",
    ),
    "embedding": (
        r"^(emb_params|string_to_param|clip_[lg])$",
        "a textual inversion: use load_textual_inversion, or --embedding",
    ),
    "sdxl": (r"^conditioner\.embedders\.1\.model\.", "Stable Diffusion XL"),
    "sd3": (r"joint_blocks\.", "Stable Diffusion 3"),
    "flux": (r"double_blocks\.", "Flux"),
    "depth": (r"^depth_model\.", "the depth-guided Stable Diffusion 2"),
    "unclip": (r"^embedder\.model\.", "Stable Diffusion 2 unCLIP"),
    "upscaler": (r"^low_scale_model\.", "the x4 upscaler"),
    "controlnet": (r"^control_model\.", "a ControlNet"),
    "diffusers vae": (r"^(encoder\.down_blocks|decoder\.up_blocks)\.", DIFFUSERS_PART),
    "diffusers part": (r"^(down_blocks|up_blocks)\.", DIFFUSERS_PART),
    "taesd": (TAESD, "a light autoencoder (TAESD): use load_vae, or --vae"),
}
OTHER_PIPELINES = {
    **{"StableDiffusionXL": "SDXL", "StableDiffusion3": "Stable Diffusion 3", "Flux": "Flux"},
    **{"StableCascade": "Stable Cascade", "PixArt": "PixArt", "Kandinsky": "Kandinsky"},
}
"""By how the classes of diffusers' pipelines begin."""
CHANNELS = {5: KINDS["depth"][1], 7: KINDS["upscaler"][1], 8: "InstructPix2Pix"}
"""Of a U-Net's input, where they are not Stable Diffusion's."""


def kind(tensors: Mapping[str, Any]) -> str | None:
    """What a file is: a key of ``KINDS``, or in CompVis' layout ``unet``, ``vae`` or ``model``; None is unknown."""
    names = "\n".join(name for name in tensors if isinstance(name, str))
    for found, (pattern, _) in KINDS.items():
        if re.search(pattern, names, re.MULTILINE):
            return found
    wholes = [whole(name) for name in tensors if isinstance(name, str)]
    parts = {"unet": (UNET,), "vae": (VAE,), "model": (CLIP, OPEN_CLIP)}
    if there := [part for part, starts in parts.items() if any(name.startswith(starts) for name in wholes)]:
        return there[0] if len(there) == 1 else "model"
    values = [value for value in tensors.values() if isinstance(value, Tensor)]
    few = 0 < len(values) < 10 and all(tensor.ndim in (1, 2) for tensor in values)
    return "embedding" if few else None  # vectors under the words that they stand for


def whole(name: str) -> str:
    """The name of a single file's tensor as files of whole models have it."""
    for old, new in PREFIXES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def other(path: object, says: str) -> InputError:
    """The error for a file of a kind that is not wanted."""
    supported = "" if ":" in says else ": only Stable Diffusion 1.x and 2.x are supported"
    return InputError(f"{path} is {says}{supported}")


def long_name(width: int | None) -> str:
    """A model by the width of the text tokens that it reads."""
    if width not in WIDTHS:
        return f"an unknown base model (text width {width})"
    return re.sub(r"^SD ?", "Stable Diffusion ", WIDTHS[width])


def short_name(width: int | None) -> str:
    """Likewise, with the width."""
    if width is None:
        return "a model without text"
    return f"{WIDTHS[width]} ({width})" if width in WIDTHS else f"a model of width {width}"


def wrong_base(path: object, wanted: str, model: int | None) -> InputError:
    """The error for a file that is for other models than the one of this text width."""
    return InputError(f"{path} does not fit: this file is for {wanted}, the model is {short_name(model)}")


def check_width(path: object, width: int, model: int | None) -> None:
    """Raises InputError for a file that is for models of another text width."""
    if width != model:
        raise wrong_base(path, short_name(width), model)


def lora_part(name: str) -> tuple[str, str] | None:
    """The module that a LoRA's tensor belongs to, and what it is there; None for other tensors."""
    name = re.sub(NAMED, r"\1\2", name)
    ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
    return None if ending is None else (name.removesuffix(ending), ENDINGS[ending])


def lora_widths(downs: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterable[int]:
    """The text widths that a LoRA's matrices, by their modules' names, and then its metadata say."""
    yield from (int(down.shape[1]) for name, down in downs.items() if re.search(CONTEXT, name))
    for key, versions in VERSIONS.items():
        yield from (width for start, width in versions.items() if metadata.get(key, "").startswith(start))


def vae_misfit(vae: AutoencoderKLConfig | AutoencoderTinyConfig) -> str | None:
    """Likewise, of an autoencoder alone: Stable Diffusion's own, or a light one of TAESD's kind."""
    if isinstance(vae, AutoencoderKLConfig):
        return None if vae.codebook_size is None else "its autoencoder has a codebook"
    if vae.alpha:
        return "its light autoencoder gives pictures with opacity"
    if vae.encoder_pooling > 1:
        return "its light autoencoder gives larger pictures than it reads"
    widths = {*vae.block_out_channels, *vae.decoder_widths}
    taesd = vae.patch_size == 1 and len(widths) == 1
    return None if taesd else "its light autoencoder is not Stable Diffusion's"


def misfit(config: ModelConfig) -> str | None:
    """Why a model is not of Stable Diffusion's make, as the end of a sentence; None where it is."""
    text, unet = config.text_encoders, config.unet
    if (reason := vae_misfit(config.vae)) is not None:
        return reason
    if len(text) != 1:
        return f"it has {len(text) or 'no'} text encoders, and Stable Diffusion has one"
    if text[0].architecture != "clip":
        return "its text encoder is BERT, and Stable Diffusion's is CLIP"
    if text[0].hidden_size != unet.cross_attention_dim:
        return "its text tokens are projected"
    if unet.pooled_projection_dim is not None or unet.num_class_embeds is not None:
        return "its U-Net reads more than the text's tokens"
    if (config.schedule.kind == "flow") != (config.schedule.prediction_type == "flow_prediction"):
        return f"no scheduler of diffusers has {config.schedule.prediction_type} with {config.schedule.kind}"
    return None
