"""CompVis' single files of Stable Diffusion 1.x and 2.x, ``.safetensors`` and ``.ckpt``: one dictionary of all parts.

A table for each part says how its blocks are named there; the rest of a tensor's name is the same. Shapes
say how the networks are built. What the U-Net predicts is in neither: see ``_prediction_type``.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stable_diffusion.checkpoints.checkpoint import Checkpoint, State, packaged
from stable_diffusion.checkpoints.compvis_names import (
    is_second,
    rename,
    renamed,
    text_blocks,
    unet_blocks,
    vae_blocks,
)
from stable_diffusion.checkpoints.weights import read_weights
from stable_diffusion.config import (
    CLIP_H,
    CLIP_L,
    AutoencoderKLConfig,
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
    from_dict,
    to_dict,
)
from stable_diffusion.errors import InputError, unknown_name
from stable_diffusion.nn.text import TextEncoder
from stable_diffusion.nn.unet import UNet
from stable_diffusion.nn.vae import AutoencoderKL

UNET, VAE, EMA = "model.diffusion_model.", "first_stage_model.", "model_ema.diffusion_model"
CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "cond_stage_model.model."

PREFIXES = (
    # Other spellings of whole models, and files of one part; the first that fits holds.
    ("conditioner.embedders.0.model.", OPEN_CLIP),
    (CLIP, CLIP),
    ("cond_stage_model.transformer.", CLIP),
    *((bare, VAE + bare) for bare in ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "loss.")),
    *((bare, UNET + bare) for bare in ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.")),
    ("out.", UNET + "out."),
)
# What sampling does not need: the schedule's 12 tables, counters, losses, position numbers, CLIP's head.
UNUSED = re.compile(
    r"^\w*alphas_cumprod(_prev)?$|^betas$|^posterior_\w+$|^scale_factor$|^model_ema\.|"
    r"^v_pred$|^ztsnr$|position_ids$|^first_stage_model\.(loss|model_ema)\.|"
    r"^cond_stage_model\.\w+\.(text_model\.)?(text_projection|logit_scale|attn_mask)"
)
OTHER_KINDS = (
    (r"\blora_(down|up|mid|A|B)\b|_lora\.(down|up)\.|\.(hada|lokr)_|\.oft_blocks", "a LoRA: use --lora"),
    (r"^(emb_params|string_to_param|clip_[lg])$", "a textual inversion: use --embedding"),
    (r"^conditioner\.embedders\.1\.model\.", "Stable Diffusion XL"),
    (r"joint_blocks\.", "Stable Diffusion 3"),
    (r"double_blocks\.", "Flux"),
    (r"^depth_model\.", "the depth-guided Stable Diffusion 2"),
    (r"^embedder\.model\.", "Stable Diffusion 2 unCLIP"),
    (r"^low_scale_model\.", "the x4 upscaler"),
    (r"^control_model\.", "a ControlNet"),
    (r"^(down_blocks|up_blocks|encoder\.down_blocks)\.", "one part in diffusers' layout: give its folder"),
)
CHANNELS = {5: "the depth-guided Stable Diffusion 2", 7: "the x4 upscaler", 8: "InstructPix2Pix"}
CONTEXTS = {1280: "the refiner of Stable Diffusion XL", 2048: "Stable Diffusion XL"}
PREDICTIONS: dict[str, Literal["epsilon", "v_prediction"]] = {
    **{"epsilon": "epsilon", "eps": "epsilon"},
    **{"v_prediction": "v_prediction", "v": "v_prediction"},
}
STEPS = {875000: "eps", 110000: "v"}  # of the published 2.0-base and 2.1
# ComfyUI's heuristic, not verified on the published files: the deviation of this bias is larger in those for v.
TELLTALE, TELLTALE_STD = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09
CONFIG = "mini_stable_diffusion.config"


def is_single_file(path: Path) -> bool:
    """Whether `path` is one file, not a folder. ``read`` tells by its content what it is."""
    return path.is_file()


def read(path: Path, *, prediction_type: str | None = None, ema: bool = False) -> Checkpoint:
    """The whole model in a single file.

    Args:
        path: the file.
        prediction_type: what the U-Net predicts, ``epsilon`` or ``v_prediction``; None finds out.
        ema: whether to take the U-Net's averaged weights from a file that has both.

    Raises:
        InputError: the file is damaged, of another kind of model, or lacks something.
    """
    file = _load(path)
    for name, prefixes in (("U-Net", UNET), ("autoencoder", VAE), ("text encoder", (CLIP, OPEN_CLIP))):
        if not any(key.startswith(prefixes) for key in file.tensors):
            raise InputError(f"{path} holds no {name}: give a file of the whole model")
    config, found = _config(file, prediction_type)
    assert isinstance(config.vae, AutoencoderKLConfig)
    (text,) = config.text_encoders
    notes = [f"The U-Net predicts {config.schedule.prediction_type}: {found}."]
    if any(key.startswith(EMA) for key in file.tensors):
        notes.append(
            f"The U-Net's {'averaged (EMA)' if ema else 'plain, not its averaged (EMA),'} weights are read."
        )
    parts = (UNET, VAE, CLIP, OPEN_CLIP)
    if others := [key for key in file.tensors if not key.startswith(parts) and not UNUSED.search(key)]:
        notes.append(f"{_count(others, len(file.tensors))} belong to no part of the model and are left out.")
    return Checkpoint(
        config,
        vae=_vae_state(file, config.vae),
        unet=_unet_state(file, config.unet, ema),
        text_encoders=[_text_state(file, text)],
        # The second pads with "!": a folder of the same vocabulary whose special_tokens_map.json says so.
        tokenizers=[packaged("clip-tokenizer-2" if is_second(text) else "clip-tokenizer")],
        notes=tuple(notes),
    )


def read_vae(path: Path) -> tuple[AutoencoderKLConfig, State]:
    """The autoencoder in a file of its own or of a whole model. Raises InputError as ``read`` does."""
    file = _load(path)
    stored = _stored_config(file)
    config = stored.vae if stored is not None else _vae_config(_part(file.tensors, VAE))
    assert isinstance(config, AutoencoderKLConfig)
    return config, _vae_state(file, config)


def read_unet(path: Path, *, ema: bool = False) -> tuple[UNetConfig, State]:
    """The U-Net in a file of its own or of a whole model. Raises InputError as ``read`` does."""
    file = _load(path)
    stored = _stored_config(file)
    config = stored.unet if stored is not None else _unet_config(file)
    return config, _unet_state(file, config, ema)


def write(path: Path, checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> None:
    """Writes a ``.safetensors`` file of the whole model beside its final name, then puts it in place.

    Args:
        path: the file; one that is there is replaced.
        checkpoint: what to write.
        dtype: number format of the file; None keeps the tensors'.

    Raises:
        InputError: `path` has another ending or is a folder, or the layout has no place for such a model.
    """
    if path.suffix != ".safetensors" or path.is_dir():
        raise InputError(f"a single file ends in .safetensors, got {path}")
    tensors = to_single(checkpoint.config, checkpoint.unet, checkpoint.vae, checkpoint.text_encoders[0])
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        save_file(tensors, building / path.name, metadata=_metadata(checkpoint.config))
        (building / "mode").touch()  # what others may read is for the umask to say
        (building / path.name).chmod((building / "mode").stat().st_mode)
        (building / path.name).replace(path)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def to_single(config: ModelConfig, unet: State, vae: State, text: State) -> State:
    """The parts' tensors under the names of a single file. Raises InputError where they have no place there."""
    vae_config, text_config = _check_fits(config)
    second = is_second(text_config)
    tensors = renamed(unet, unet_blocks(config.unet), UNET) | renamed(vae, vae_blocks(vae_config), VAE)
    for name, tensor in tensors.items():
        if ".mid.attn_1." in name and tensor.ndim == 2:
            tensors[name] = tensor[:, :, None, None]
    text = renamed(text, text_blocks(text_config), "")
    if second:
        text = _unused_head(_fused(text), text_config.num_hidden_layers - text_config.skip_last_layers)
    else:
        text["embeddings.position_ids"] = torch.arange(text_config.max_position_embeddings)[None]
    return tensors | {(OPEN_CLIP if second else CLIP) + name: tensor for name, tensor in text.items()}


class _File(NamedTuple):
    path: Path
    tensors: State
    """Under the names of whole models."""
    metadata: dict[str, str]
    global_step: object = None


def _load(path: Path) -> _File:
    """A file's tensors, mapped into memory. Raises InputError for a damaged file or one of another kind."""
    root, metadata = read_weights(path)
    step = root.get("global_step")
    for _ in range(3):  # it may nest, but a pickle may also hold itself
        root = root["state_dict"] if isinstance(root.get("state_dict"), dict) else root
    names = "\n".join(name for name in root if isinstance(name, str))
    for pattern, kind in OTHER_KINDS:
        if re.search(pattern, names, re.MULTILINE):
            raise _other_kind(path, kind)
    found = {name: t.detach() for name, t in root.items() if isinstance(t, Tensor)}
    tensors = {_whole(name): t for name, t in found.items() if isinstance(name, str)}
    if not any(name.startswith((UNET, VAE, CLIP, OPEN_CLIP)) for name in tensors):
        if 0 < len(tensors) < 10 and all(t.ndim in (1, 2) for t in tensors.values()):
            raise _other_kind(path, OTHER_KINDS[1][1])
        raise InputError(f"{path} has {len(tensors)} tensors, none of Stable Diffusion 1.x or 2.x")
    return _File(path, tensors, metadata, step)


def _whole(name: str) -> str:
    """A tensor's name in the file of a whole model."""
    for old, new in PREFIXES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _other_kind(path: Path, kind: str) -> InputError:
    rest = "" if ":" in kind else ": only Stable Diffusion 1.x and 2.x are supported"
    return InputError(f"{path} is {kind}{rest}")


def _part(tensors: State, prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


# Configurations from shapes. What a damaged file lacks gets the published value here, and is named by `_fitted`.


def _config(file: _File, prediction_type: str | None) -> tuple[ModelConfig, str]:
    """The model's configuration, and how it was found out what the U-Net predicts."""
    second = any(name.startswith(OPEN_CLIP) for name in file.tensors)
    stored = _stored_config(file)
    unet = _unet_config(file) if stored is None else stored.unet
    predicted, how = _prediction_type(file, prediction_type, second and unet.in_channels == 4, second)
    prediction = PREDICTIONS[predicted]
    if stored is not None:
        return replace(stored, schedule=replace(stored.schedule, prediction_type=prediction)), how
    v = prediction == "v_prediction"
    resolution = re.match(r"[1-9]\d{2,3}(?=x|$)", file.metadata.get("modelspec.resolution", ""))
    config = ModelConfig(
        name=file.path.stem,
        sample_size=int(resolution[0]) if resolution else 768 if v and second else 512,
        vae=_vae_config(_part(file.tensors, VAE)),
        unet=replace(unet, upcast_attention=v and second),
        text_encoders=(_text_config(file.tensors, second),),
        schedule=ScheduleConfig(prediction_type=prediction),
        sampler=SamplerConfig(name="ddim" if v or unet.in_channels == 9 else "pndm"),
    )
    return config, how


def _prediction_type(file: _File, asked: str | None, heuristic: bool, second: bool) -> tuple[str, str]:
    """A key of ``PREDICTIONS``, and the evidence: a file's tensors are the same for both."""
    if asked is not None:
        if asked not in PREDICTIONS:
            raise unknown_name("prediction type", asked, PREDICTIONS)
        return asked, "it was asked for"
    if (said := file.metadata.get("modelspec.prediction_type", "")) in PREDICTIONS:
        return said, "its metadata says so"
    if "v_pred" in file.tensors:
        return "v", "it holds a tensor named v_pred"
    for ending in (".yaml", ".yml"):
        if (sibling := file.path.with_suffix(ending)).is_file():
            text = sibling.read_text(encoding="utf-8", errors="replace")
            line = re.search(r"""^\s*parameterization:\s*["']?(\w+)""", text, re.MULTILINE)
            if line is None or line[1] in PREDICTIONS:
                how = "says so" if line else "names no other parameterization"
                return line[1] if line else "eps", f"{sibling.name} beside it {how}"
    if second and isinstance(file.global_step, int) and file.global_step in STEPS:
        return STEPS[file.global_step], f"its global_step {file.global_step} is that of a published model"
    if heuristic and (bias := file.tensors.get(UNET + TELLTALE)) is not None:
        deviation = float(bias.float().std())
        sign = ">" if deviation > TELLTALE_STD else "<="
        guess = "v" if deviation > TELLTALE_STD else "eps"
        return guess, f"a guess from one bias, whose deviation {deviation:.3f} is {sign} {TELLTALE_STD}"
    return "eps", f"nothing says otherwise, and most models of {'2.x inpainting' if second else '1.x'} do"


def _stored_config(file: _File) -> ModelConfig | None:
    """The configuration that ``write`` put into the metadata."""
    if CONFIG not in file.metadata:
        return None
    try:
        config = from_dict(ModelConfig, json.loads(file.metadata[CONFIG]))
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"the metadata {CONFIG} of {file.path} is damaged ({error})") from None
    vae, text = _check_fits(config)
    blocks = config.unet.layers_per_block + vae.layers_per_block + text.num_hidden_layers
    if blocks > len(file.tensors):
        raise InputError(f"the metadata {CONFIG} of {file.path} is damaged: it has no {blocks} blocks")
    return config


def _unet_config(file: _File) -> UNetConfig:
    state = _part(file.tensors, UNET)
    levels: list[list[tuple[int, bool]]] = [[]]
    n = 1
    while block := [name for name in state if name.startswith(f"input_blocks.{n}.")]:
        if any(name.startswith(f"input_blocks.{n}.0.op.") for name in block):
            levels.append([])
        else:
            width = _axis(state, rf"input_blocks\.{n}\.0\.(emb_layers\.1|out_layers\.\d)\.", 0, 32)
            levels[-1].append((width, any(name.startswith(f"input_blocks.{n}.1.") for name in block)))
        n += 1
    if not all(levels):
        raise InputError(f"{file.path} holds no whole U-Net: it has {n - 1} input blocks")
    channels = _axis(state, r"input_blocks\.0\.0\.weight$", 1, 4)
    context = _axis(state, r"attn2\.to_k\.weight$", 1, 768)
    for table, number in ((CHANNELS, channels), (CONTEXTS, context)):
        if number in table:
            raise _other_kind(file.path, table[number])
    if any(name.startswith("label_emb.") for name in state):
        raise _other_kind(file.path, "a U-Net with a class embedding (unCLIP, x4 upscaler)")
    widths = tuple(level[0][0] for level in levels)
    linear = any(name.endswith("proj_in.weight") and t.ndim == 2 for name, t in state.items())
    return UNetConfig(
        in_channels=channels,
        out_channels=_axis(state, r"^out\.2\.weight$", 0, 4),
        block_out_channels=widths,
        layers_per_block=len(levels[0]),
        attention_levels=tuple(any(attention for _, attention in level) for level in levels),
        # Heads leave no trace in shapes: 1.x has 8 everywhere, in 2.x each is 64 wide.
        num_attention_heads=tuple(max(1, width // 64) if linear else 8 for width in widths),
        cross_attention_dim=context,
        norm_num_groups=math.gcd(32, *widths),
        use_linear_projection=linear,
    )


def _vae_config(state: State) -> AutoencoderKLConfig:
    blocks = {
        tuple(map(int, m.groups()))
        for name in state
        if (m := re.match(r"encoder\.down\.(\d+)\.block\.(\d+)\.", name))
    }
    levels = _length({i for i, _ in blocks})
    widths = tuple(_axis(state, rf"encoder\.down\.{i}\.block\.0\.conv\d\.", 0, 32) for i in range(levels))
    return AutoencoderKLConfig(
        in_channels=_axis(state, r"encoder\.conv_in\.weight$", 1, 3),
        latent_channels=_axis(state, r"decoder\.conv_in\.weight$", 1, 4),
        block_out_channels=widths,
        layers_per_block=_length({j for _, j in blocks}),
        norm_num_groups=math.gcd(32, *widths),
    )


def _text_config(tensors: State, second: bool) -> TextEncoderConfig:
    state, published = _part(tensors, OPEN_CLIP if second else CLIP), CLIP_H if second else CLIP_L
    layers = {
        int(m[1])
        for name in state
        if (m := re.match(r"(?:encoder\.layers|transformer\.resblocks)\.(\d+)\.", name))
    }
    count = _length(layers)
    width = _axis(state, r"token_embedding\.weight$", 1, published.hidden_size)
    positions = _axis(state, r"position(_embedding\.weight|al_embedding)$", 0, 77)
    return replace(
        published,
        vocab_size=_axis(state, r"token_embedding\.weight$", 0, published.vocab_size),
        hidden_size=width,
        intermediate_size=_axis(state, r"\.(fc1|c_fc)\.", 0, published.intermediate_size),
        # The second reads its next to last layer; a few files leave out the last of the 24.
        num_hidden_layers=count - 1 if second and count != 23 else count,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=positions,
        context_length=positions,
        skip_last_layers=0,
    )


def _length(numbers: set[int]) -> int:
    """How many blocks there are by the numbers in names, of which a damaged file may lack or invent one."""
    return max(1, min(1 + max(numbers, default=0), 1 + len(numbers)))


def _axis(state: State, pattern: str, axis: int, otherwise: int) -> int:
    """The length of an axis of the first tensor whose name fits."""
    sizes = (t.shape[axis] for name, t in state.items() if t.ndim > axis and re.search(pattern, name))
    return next((size for size in sizes if size > 0), otherwise)


# Tensors in and out.


def _unet_state(file: _File, config: UNetConfig, ema: bool) -> State:
    module = _built(file.path, UNet, config)
    table, state = unet_blocks(config), _part(file.tensors, UNET)
    if ema:
        averaged = _part(file.tensors, EMA)
        if not averaged:
            raise InputError(f"{file.path} holds no averaged (EMA) weights: read its plain ones")
        names = {
            name.replace(".", ""): name for name in (rename(ours, table) for ours in module.state_dict())
        }
        state = {names.get(flat, flat): tensor for flat, tensor in averaged.items()}
    return _fitted(file.path, "U-Net", module, table, state)


def _vae_state(file: _File, config: AutoencoderKLConfig) -> State:
    module = _built(file.path, AutoencoderKL, config)
    state = {k: t for k, t in _part(file.tensors, VAE).items() if not UNUSED.search(VAE + k)}
    return _fitted(file.path, "autoencoder", module, vae_blocks(config), state)


def _text_state(file: _File, config: TextEncoderConfig) -> State:
    module = _built(file.path, TextEncoder, config)
    prefix = OPEN_CLIP if is_second(config) else CLIP
    state = {k: t for k, t in _part(file.tensors, prefix).items() if not UNUSED.search(prefix + k)}
    if is_second(config):  # the last layer, which the U-Net does not read
        beyond = f"transformer.resblocks.{config.num_hidden_layers}."
        state = {k: t for k, t in _split(state).items() if not k.startswith(beyond)}
    return _fitted(file.path, "text encoder", module, text_blocks(config), state)


def _built(path: Path, cls: Callable[[Any], nn.Module], config: object) -> nn.Module:
    """The part without memory for its weights: names and shapes."""
    try:
        with torch.device("meta"):
            return cls(config)
    except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path} describes a network that cannot be built ({error}): is it damaged?"
        ) from None


def _fitted(path: Path, part: str, module: nn.Module, table: dict[str, str], state: State) -> State:
    """The state under the module's names. Raises InputError where names or shapes are others."""
    wanted = module.state_dict()
    names = {rename(ours, table): ours for ours in wanted}
    found = {}
    for theirs in names.keys() & state.keys():
        tensor, shape = state[theirs], wanted[names[theirs]].shape
        # Attention is a 1x1 convolution there.
        found[theirs] = tensor.flatten(1) if tensor.ndim == 4 and len(shape) == 2 else tensor
    wrong = [theirs for theirs, tensor in found.items() if tensor.shape != wanted[names[theirs]].shape]
    extra = state.keys() - names.keys()
    for problem, keys in (
        ("missing", names.keys() - found.keys()),
        ("unexpected", extra),
        ("of another shape", wrong),
    ):
        if keys:
            raise InputError(f"{path} does not fit: of the {part}, {_count(keys, len(names))} are {problem}")
    return {ours: found[theirs] for theirs, ours in names.items()}


def _count(names: Iterable[str], total: int) -> str:
    """A number of tensors, and three of their names."""
    names = sorted(names)
    return f"{len(names)} of {total} tensors ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def _split(state: State) -> State:
    """OpenCLIP's fused attention as three projections; the rows are queries, keys, values."""
    found = {}
    for name, tensor in state.items():
        stem, fused, leaf = name.partition(".attn.in_proj_")
        if fused and tensor.ndim > 0 and len(tensor) % 3 == 0:
            for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{stem}.attn.{letter}_proj.{leaf}"] = third
        else:
            found[name] = tensor
    return found


def _fused(state: State) -> State:
    found = dict(state)
    for name in state:
        if ".attn.q_proj." in name:
            thirds = [found.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            found[name.replace("q_proj.", "in_proj_")] = torch.cat(thirds)
    return found


def _unused_head(state: State, layers: int) -> State:
    """The state with what files of 2.x have beyond the layers that are read, made anew as kohya's scripts do."""
    last, beyond = f"transformer.resblocks.{layers - 1}.", f"transformer.resblocks.{layers}."
    copies = {name.replace(last, beyond): t.clone() for name, t in state.items() if name.startswith(last)}
    width, dtype = state["token_embedding.weight"].shape[1], state["token_embedding.weight"].dtype
    head = {
        "text_projection": torch.ones(width, width, dtype=dtype),
        "logit_scale": torch.ones((), dtype=dtype),
    }
    return copies | head | state


def _check_fits(config: ModelConfig) -> tuple[AutoencoderKLConfig, TextEncoderConfig]:
    """The configurations of the autoencoder and the text encoder, where the layout has a place for the model."""
    vae, text, unet = config.vae, config.text_encoders[:1], config.unet
    reason = ""
    if not isinstance(vae, AutoencoderKLConfig) or vae.codebook_size or vae.scaling_factor != 0.18215:
        reason = "its autoencoder is not Stable Diffusion's"
    elif len(config.text_encoders) != 1 or text[0].architecture != "clip" or text[0].vocab_size != 49408:
        reason = "it reads its prompts with other than one CLIP text encoder"
    elif text[0].skip_last_layers > is_second(text[0]) or text[0].hidden_size != unet.cross_attention_dim:
        reason = "its U-Net reads other than the text encoder's usual layer"
    elif unet.num_class_embeds or unet.pooled_projection_dim:
        reason = "its U-Net has a class embedding"
    elif (config.schedule.prediction_type, config.schedule.kind) not in (
        ("epsilon", "scaled_linear"),
        ("v_prediction", "scaled_linear"),
    ):
        reason = "it is trained for another process than Stable Diffusion's, with eps or v"
    if reason:
        raise InputError(f"{config.name} does not fit into a single file of Stable Diffusion: {reason}")
    assert isinstance(vae, AutoencoderKLConfig)
    return vae, text[0]


def _metadata(config: ModelConfig) -> dict[str, str]:
    """The header's metadata: modelspec's keys, and the configuration, since shapes do not tell all of it."""
    v = config.schedule.prediction_type == "v_prediction"
    second = is_second(config.text_encoders[0])
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"stable-diffusion-v{('2-768-v' if v else '2-512') if second else 1}",
        "modelspec.title": config.name,
        "modelspec.resolution": f"{config.sample_size}x{config.sample_size}",
        "modelspec.prediction_type": "v" if v else "epsilon",
        CONFIG: json.dumps(to_dict(config)),
    }
