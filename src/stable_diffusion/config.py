"""A model's settings: typed, frozen dataclasses and the presets built from them.

Field names follow diffusers where it has the setting. A configuration turns into JSON with ``to_dict`` and
back with ``from_dict``, which refuses unknown keys.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import types
import typing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from stable_diffusion.errors import InputError, unknown_name

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The network that predicts noise (`nn.unet`)."""

    in_channels: int = 4
    """Channels of the input: those of the latents, plus mask and masked latents for inpainting (4 + 1 + 4)."""
    out_channels: int = 4
    """Channels of the prediction."""
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels of each level; the resolution halves from one level to the next."""
    layers_per_block: int = 2
    """Residual blocks of a level on the way down (one more on the way up)."""
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    """Which levels have transformer blocks."""
    num_attention_heads: tuple[int, ...] = (8, 8, 8, 8)
    """Attention heads of each level."""
    cross_attention_dim: int | None = 768
    """Width of the text tokens that cross-attention reads; None for a network without text."""
    norm_num_groups: int = 32
    use_linear_projection: bool = False
    """Whether the transformers' projections are linear layers (SD 2.x) or 1x1 convolutions (SD 1.x)."""
    upcast_attention: bool = False
    """Whether attention is computed in float32 whatever the weights (SD 2.1)."""
    num_class_embeds: int | None = None
    """Number of class labels, whose embeddings are added to the timestep embedding; None for none."""
    pooled_projection_dim: int | None = None
    """Width of a pooled text vector that is added to the timestep embedding; None for none."""
    mid_block_type: Literal["UNetMidBlock2DCrossAttn"] | None = "UNetMidBlock2DCrossAttn"
    """What is between the way down and the way up; None for nothing, as in compressed models (Kim et al. 2023)."""
    time_cond_proj_dim: int | None = None
    """Width of the embedded guidance scale of a network distilled from a guided one (Luo et al. 2023); None for others,
    which classifier-free guidance evaluates twice."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """Stable Diffusion's autoencoder (`nn.vae.AutoencoderKL`)."""

    kind: Literal["kl"] = "kl"
    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Channels of each level; the resolution halves from one level to the next."""
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    """What latents are multiplied with to have unit standard deviation; 1 where the weights already do that."""
    codebook_size: int | None = None
    """Entries of a vector-quantised latent space (VQ regulariser); None for the KL regulariser."""

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return int(2 ** (len(self.block_out_channels) - 1))


@dataclass(frozen=True, kw_only=True)
class AutoencoderTinyConfig:
    """A light autoencoder of plain ReLU blocks (`nn.vae.AutoencoderTiny`); the defaults are TAESD."""

    kind: Literal["tiny"] = "tiny"
    in_channels: int = 3
    latent_channels: int = 4
    patch_size: int = 1
    """Side of the squares of pixels that become channels before the first convolution."""
    block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    """Channels of each level, from the pixels to the latents; the resolution halves from one to the next."""
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    """Residual blocks of each level of the encoder, from the pixels to the latents."""
    decoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    """Residual blocks of each level of the decoder, from the pixels to the latents."""

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return int(self.patch_size * 2 ** (len(self.block_out_channels) - 1))


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """A text transformer with its tokenizer (`nn.text`); the defaults are CLIP ViT-L/14's."""

    architecture: Literal["clip", "bert"] = "clip"
    """``clip``: causal, normalised before each block, no mask; ``bert``: the opposite of each."""
    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    """Positions that the weights have."""
    context_length: int = 77
    """Tokens that a prompt is padded or cut to, begin and end included."""
    hidden_act: Literal["gelu", "quick_gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    skip_last_layers: int = 0
    """Layers left out at the end: 1 gives the penultimate layer, which the final norm follows."""
    trainable: bool = False
    """Whether this encoder is trained jointly with the denoiser."""
    packaged: Literal["all-MiniLM-L6-v2", "clip-tokenizer", "clip-tokenizer-2"] | None = None
    """Folder inside the package that holds weights and tokenizer; None for random weights."""

    @property
    def reads_padding(self) -> bool:
        """Whether padding is attended to, as in Stable Diffusion."""
        return self.architecture == "clip"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The forward process (`diffusion.schedule`) and what the network predicts of it."""

    kind: Literal["linear", "scaled_linear", "cosine", "flow"] = "scaled_linear"
    """``linear`` (DDPM), ``scaled_linear`` (Stable Diffusion), ``cosine`` (improved DDPM) or ``flow`` (rectified)."""
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    rescale_betas_zero_snr: bool = False
    """Whether the last step is pure noise (Lin et al. 2023, algorithm 1)."""
    shift: float = 1.0
    """Rectified flow only: moves levels towards noise, for larger pictures (Esser et al. 2024, equation 23)."""
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon"
    """What the network predicts: the noise, the clean latents, v, or the flow's velocity."""
    steps_offset: int = 1
    """Added to the timesteps of the leading spacing."""
    set_alpha_to_one: bool = False
    """Whether the DDIM family ends on clean latents or, as Stable Diffusion does, on the first timestep's level."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How sampling walks from noise to latents (`diffusion.samplers`)."""

    name: str = "ddim"
    """A row of `diffusion.names`, by our name or another program's."""
    spacing: str | None = None
    """How the levels are spread, likewise; None for the sampler's own."""
    eta: float | None = None
    """How much noise DDIM and TCD add: 0 is deterministic, 1 as much as can be; None for their own, 0 and 0.3."""
    variance: Literal["small", "large"] = "small"
    """DDPM only: the posterior's variance given clean latents, or beta (Ho et al. 2020, section 3.2)."""

    def __post_init__(self) -> None:
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise InputError(f"eta must be from 0 to 1, got {self.eta}")


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (`diffusion.guidance`)."""

    scale: float = 7.5
    """1 and below is no guidance, and half the work."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Part of the noise range, from 0 (clean) to 1 (noise), in which guidance is on (Kynkäänniemi et al. 2024)."""
    rescale: float = 0.0
    """How far the prediction's standard deviation is pulled back to the unguided one's, 0 to 1 (Lin et al. 2023,
    equation 15)."""

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise InputError(
                f"the guidance interval must be two numbers from 0 to 1, in order, got {low} and {high}"
            )
        if not 0 <= self.rescale <= 1:
            raise InputError(f"the guidance rescale must be from 0 to 1, got {self.rescale}")


@dataclass(frozen=True, kw_only=True)
class Styles:
    """What styles prompts can name (`generation.pipeline.with_style`); ``str`` is a sentence for the user."""

    words: tuple[str, ...] = ()
    """Phrases any of which in a prompt names a style, such as "noto style" or "black line drawing"."""
    default: str = ""
    """What generation adds to a prompt that names none, after a comma; empty adds nothing."""

    def __str__(self) -> str:
        default = f"; a prompt that names none is rendered in {self.default}" if self.default else ""
        return ", ".join(self.words or (self.default,)) + default


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model: its parts, and the settings that it generates with unless told otherwise."""

    name: str = "mini"
    sample_size: int = 512
    """Side of the pictures that the model was made for, in pixels."""
    vae: AutoencoderKLConfig | AutoencoderTinyConfig = AutoencoderKLConfig()
    unet: UNetConfig = UNetConfig()
    text_encoders: tuple[TextEncoderConfig, ...] = (TextEncoderConfig(),)
    """Each prompt's tokens are those of every encoder, one after the other; empty for a model without text."""
    schedule: ScheduleConfig = ScheduleConfig()
    sampler: SamplerConfig = SamplerConfig()
    num_inference_steps: int = 50
    guidance: Guidance = Guidance()
    prompts: tuple[str, ...] = ()
    """Prompts that show what the model can do."""
    styles: Styles = Styles()
    """Read by generation alone: training takes captions as they are."""

    @property
    def reads_mask(self) -> bool:
        """Whether the U-Net was made for inpainting: it reads a mask and masked latents beside the noisy ones."""
        return self.unet.in_channels == 2 * self.vae.latent_channels + 1


MINILM = TextEncoderConfig(
    architecture="bert",
    vocab_size=30522,
    hidden_size=384,
    intermediate_size=1536,
    num_hidden_layers=6,
    num_attention_heads=12,
    max_position_embeddings=512,
    context_length=32,
    hidden_act="gelu",
    layer_norm_eps=1e-12,
    packaged="all-MiniLM-L6-v2",
)
"""all-MiniLM-L6-v2: a BERT of 22.7 million parameters whose weights the package carries."""

BERT_BASE = replace(
    MINILM, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, context_length=77, packaged=None
)
"""bert-base-uncased; its weights come from a folder."""

CLIP_L = TextEncoderConfig()
"""CLIP ViT-L/14, Stable Diffusion 1.x's text encoder; its weights come from a folder."""

CLIP_H = replace(
    CLIP_L,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    hidden_act="gelu",
    skip_last_layers=1,
)
"""OpenCLIP ViT-H/14, Stable Diffusion 2.x's text encoder, read at its penultimate layer."""

CLIP_MINI = replace(
    CLIP_L,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=32,
    context_length=32,
    trainable=True,
    packaged="clip-tokenizer",
)
"""A small CLIP text transformer that starts from random weights and is trained jointly with the denoiser."""

TEXT_ENCODERS = {
    "minilm": MINILM,
    "bert-base": BERT_BASE,
    "clip-l": CLIP_L,
    "clip-h": CLIP_H,
    "clip-mini": CLIP_MINI,
}
"""By the names that recipes may call them."""

TAESD = AutoencoderTinyConfig()
"""The tiny autoencoder for Stable Diffusion's latents."""

MINI = ModelConfig(
    name="mini",
    sample_size=128,
    vae=AutoencoderTinyConfig(
        latent_channels=8,
        patch_size=4,
        block_out_channels=(64, 128),
        encoder_blocks=(2, 3),
        decoder_blocks=(3, 4),
    ),
    unet=UNetConfig(
        in_channels=8,
        out_channels=8,
        block_out_channels=(96, 192, 288),
        layers_per_block=1,
        attention_levels=(False, True, True),
        num_attention_heads=(3, 6, 9),
        cross_attention_dim=384,
        use_linear_projection=True,
        pooled_projection_dim=384,
    ),
    text_encoders=(MINILM,),
    schedule=ScheduleConfig(kind="flow", prediction_type="flow_prediction"),
    sampler=SamplerConfig(name="euler", spacing="trailing"),
    num_inference_steps=16,
    guidance=Guidance(scale=3.0),
)

SD15 = ModelConfig(name="sd15", sample_size=512, text_encoders=(CLIP_L,), sampler=SamplerConfig(name="pndm"))

SD21 = replace(
    SD15,
    name="sd21",
    sample_size=768,
    unet=replace(
        SD15.unet,
        num_attention_heads=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
        upcast_attention=True,
    ),
    text_encoders=(CLIP_H,),
    schedule=ScheduleConfig(prediction_type="v_prediction"),
    sampler=SamplerConfig(name="ddim"),
)

PRESETS = {"mini": MINI, "sd15": SD15, "sd21": SD21}


def preset(name: str) -> ModelConfig:
    """The preset of that name. Raises InputError with the choices for an unknown one."""
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries, lists, numbers and strings, ready for JSON."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_dict(cls: type[T], data: dict[str, Any], *, base: T | None = None) -> T:
    """The configuration that ``to_dict`` gave, or ``base`` (default: the class's defaults) changed by ``data``.

    Raises InputError for a key that the class does not have (with the nearest) or a value of the wrong type.
    """
    known = typing.get_type_hints(cls)
    if cls is ModelConfig:  # older files hold the settings of training too
        data = {key: value for key, value in data.items() if key != "training"}
    for key in data:
        if key not in known:
            raise unknown_name(f"setting of {cls.__name__}", key, known)
    values = {key: typed(known[key], value, key, getattr(base, key, None)) for key, value in data.items()}
    return cls(**values) if base is None else replace(base, **values)  # type: ignore[type-var] # T is a dataclass


def documented(cls: type) -> dict[str, str]:
    """The sentences below a class's fields, by the field: what ``--help`` shows of it."""
    try:
        module = ast.parse(Path(inspect.getfile(cls)).read_text(encoding="utf-8"))
    except OSError:  # a package without its sources
        return {}
    (tree,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    pairs = itertools.pairwise(tree.body)
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in pairs
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
    }


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def typed(hint: Any, value: Any, key: str, base: Any = None) -> Any:
    """`value`, as read from JSON or TOML, as an instance of the annotation `hint`.

    Raises InputError, naming `key`, for a value of another type.
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        if len(options) > 1:  # the two autoencoders, told apart by their `kind`
            kind = value.get("kind", getattr(base, "kind", None)) if isinstance(value, dict) else None
            kinds = {option.kind: option for option in options}
            if kind not in kinds:
                raise unknown_name("autoencoder kind", kind, kinds)
            options = [kinds[kind]]
            base = base if isinstance(base, options[0]) else None
        return typed(options[0], value, key, base)
    if hint is TextEncoderConfig and isinstance(value, str):
        if value not in TEXT_ENCODERS:
            raise unknown_name("text encoder", value, TEXT_ENCODERS)
        return TEXT_ENCODERS[value]
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value, base=base)
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        inner = typing.get_args(hint)
        items = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(items) == len(value):
            return tuple(typed(item, v, key, None) for item, v in zip(items, value, strict=True))
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise unknown_name(key, value, map(str, typing.get_args(hint)))
    if hint is float and type(value) is int and abs(value) < 10**300:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise InputError(f"{key} must be of type {expected}, got {value!r}")
