"""A model's configuration from the shapes of a single file's tensors.

What a damaged file lacks gets the published value here, and is named when the tensors are matched.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Literal, NamedTuple

from stable_diffusion.checkpoints import families
from stable_diffusion.checkpoints.families import CLIP, OPEN_CLIP, UNET, VAE
from stable_diffusion.checkpoints.files import State
from stable_diffusion.config import (
    CLIP_H,
    CLIP_L,
    SD15,
    AutoencoderKLConfig,
    ModelConfig,
    SamplerConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from stable_diffusion.errors import InputError, unknown_name
from stable_diffusion.files import is_file

PREDICTIONS: dict[str, Literal["epsilon", "v_prediction"]] = {
    **{"epsilon": "epsilon", "eps": "epsilon"},
    **{"v_prediction": "v_prediction", "v": "v_prediction"},
}
STEPS = {875000: "eps", 110000: "v"}  # of the published 2.0-base and 2.1
# ComfyUI's heuristic, not verified on published files: this bias has a larger standard deviation in those for v.
TELLTALE, TELLTALE_STD = "output_blocks.11.1.transformer_blocks.0.norm1.bias", 0.09


class File(NamedTuple):
    """A single file in memory."""

    path: Path
    tensors: State
    """Under the names of whole models."""
    metadata: dict[str, str]
    global_step: object = None

    def has(self, *prefixes: str) -> bool:
        """Whether it has tensors of a part."""
        return any(name.startswith(prefixes) for name in self.tensors)

    def part(self, prefix: str) -> State:
        """The tensors of one part, without the prefix."""
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def model_config(file: File, stored: ModelConfig | None, asked: str | None) -> tuple[ModelConfig, str]:
    """The model's configuration, and how it was found out what the U-Net predicts.

    `stored` is what the file's metadata has, `asked` what the user says that the U-Net predicts.
    """
    unet = unet_config(file) if stored is None else stored.unet
    openclip = file.has(OPEN_CLIP) or (not file.has(CLIP) and unet.cross_attention_dim == CLIP_H.hidden_size)
    predicted, how = prediction_type(file, asked, openclip and unet.in_channels == 4, openclip)
    prediction = PREDICTIONS[predicted]
    if stored is not None:
        return replace(stored, schedule=replace(stored.schedule, prediction_type=prediction)), how
    v = prediction == "v_prediction"
    resolution = re.match(r"[1-9]\d{2,3}(?=x|$)", file.metadata.get("modelspec.resolution", ""))
    config = ModelConfig(
        name=file.path.stem,
        sample_size=int(resolution[0]) if resolution else 768 if v and openclip else 512,
        vae=vae_config(file) if file.has(VAE) else AutoencoderKLConfig(latent_channels=unet.out_channels),
        unet=replace(unet, upcast_attention=v and openclip),
        text_encoders=(text_config(file, openclip),),
        schedule=ScheduleConfig(prediction_type=prediction),
    )
    sampler = SamplerConfig(name="ddim" if v or config.reads_mask else "pndm")
    return replace(config, sampler=sampler), how


def prediction_type(file: File, asked: str | None, heuristic: bool, openclip: bool) -> tuple[str, str]:
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
        if is_file(sibling := file.path.with_suffix(ending)):
            text = sibling.read_text(encoding="utf-8", errors="replace")
            line = re.search(r"""^\s*parameterization:\s*["']?(\w+)""", text, re.MULTILINE)
            if line is None or line[1] in PREDICTIONS:
                how = "says so" if line else "names no other parameterization"
                return line[1] if line else "eps", f"{sibling.name} beside it {how}"
    if openclip and isinstance(file.global_step, int) and file.global_step in STEPS:
        return STEPS[file.global_step], f"its global_step {file.global_step} is that of a published model"
    if heuristic and (bias := file.tensors.get(UNET + TELLTALE)) is not None:
        std = float(bias.float().std())
        guess, sign = ("v", ">") if std > TELLTALE_STD else ("eps", "<=")
        return guess, f"a guess from one bias, whose standard deviation {std:.3f} is {sign} {TELLTALE_STD}"
    return "eps", f"nothing says otherwise, and most models of {'2.x inpainting' if openclip else '1.x'} do"


def unet_config(file: File) -> UNetConfig:
    """The U-Net's configuration. Raises InputError for one that ours cannot be."""
    state = file.part(UNET)
    levels: list[list[tuple[int, bool]]] = [[]]
    numbers = input_blocks(state)
    for n in numbers if has_gaps(state) else takewhile(numbers.__contains__, range(1, len(numbers) + 1)):
        block = [name for name in state if name.startswith(f"input_blocks.{n}.")]
        if any(name.startswith(f"input_blocks.{n}.0.op.") for name in block):
            levels.append([])
        else:
            width = _axis(state, rf"input_blocks\.{n}\.0\.(emb_layers\.1|out_layers\.\d)\.", 0, 32)
            levels[-1].append((width, any(name.startswith(f"input_blocks.{n}.1.") for name in block)))
    if not all(levels):
        raise InputError(f"{file.path} holds no whole U-Net: it has {len(numbers)} input blocks")
    channels = _axis(state, r"input_blocks\.0\.0\.weight$", 1, 4)
    context = _axis(state, r"attn2\.to_k\.weight$", 1, 768)
    if channels in families.CHANNELS:
        raise families.other(file.path, families.CHANNELS[channels])
    if context in families.WIDTHS and context > 1024:
        raise families.other(file.path, families.long_name(context))
    if any(name.startswith("label_emb.") for name in state):
        raise families.other(file.path, "a U-Net with a class embedding (unCLIP, x4 upscaler)")
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
        mid_block_type=SD15.unet.mid_block_type if file.has(f"{UNET}middle_block.") else None,
    )


def input_blocks(state: State) -> list[int]:
    """The numbers of a U-Net's blocks on the way down that are in a file, without the first convolution."""
    found = (re.match(r"input_blocks\.([1-9]\d*)\.", name) for name in state)
    return sorted({int(match[1]) for match in found if match})


def has_gaps(state: State) -> bool:
    """Whether a compressed model's blocks are named with gaps (see ``names.unet_blocks``)."""
    numbers = input_blocks(state)
    return 2 not in numbers and 3 in numbers


def vae_config(file: File) -> AutoencoderKLConfig:
    """The autoencoder's configuration."""
    state = file.part(VAE)
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


def text_config(file: File, openclip: bool) -> TextEncoderConfig:
    """The text encoder's configuration."""
    state, published = file.part(OPEN_CLIP if openclip else CLIP), CLIP_H if openclip else CLIP_L
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
        # OpenCLIP is read at its next to last layer; a few files leave out the last of the 24.
        num_hidden_layers=count - 1 if openclip and count != 23 else count,
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
