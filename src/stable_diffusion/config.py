"""A model's settings: typed, frozen dataclasses and the presets built from them.

Field names follow diffusers where it has the setting. A configuration turns into JSON with ``to_dict`` and
back with ``from_dict``, which refuses unknown keys. Ranges stand in the annotations (see `fields`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from stable_diffusion.diffusion.names import sampler_name, spacing_named
from stable_diffusion.errors import InputError, unknown_name
from stable_diffusion.fields import Rule, Settings, sized, within
from stable_diffusion.fields import documented as documented
from stable_diffusion.fields import from_dict as from_dict
from stable_diffusion.fields import to_dict as to_dict
from stable_diffusion.fields import typed as typed

# Far above every published model's, so that a damaged or hostile file cannot ask for what no memory holds.
Width = Annotated[int, within(1, 16384)]
"""Channels, or numbers of a vector."""
Depth = Annotated[int, within(1, 32)]
"""Blocks of a level, one after the other."""
Vocabulary = Annotated[int, within(1, 2**20)]
"""Vectors of a table."""
Part = Annotated[float, within(0, 1)]
GuidanceScale = Annotated[float, within(-10_000, 10_000)]
Beta = Annotated[float, within(1e-8, 0.999)]
"""Variance that a step of the forward process adds."""
Widths = Annotated[tuple[Width, ...], sized(1, 8)]
"""Of each level."""
Blocks = tuple[Annotated[int, within(0, 32)], ...]
"""Of each level, some of which may have none."""
SamplerName = Annotated[str, Rule("a sampler", lambda name: bool(sampler_name(name)))]
SpacingName = Annotated[str, Rule("a spacing", lambda name: bool(spacing_named(name)))]
Interval = Annotated[
    tuple[float, float],
    Rule("two numbers from 0 to 1, in order", lambda ends: 0 <= ends[0] <= ends[1] <= 1),
]


def _same_length(settings: object, *names: str) -> None:
    lengths = {name: len(getattr(settings, name)) for name in names}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"{' and '.join(names)} must be lists of one length, an entry a level: got {said}")


def _divides(name: str, divisor: int, widths: Iterable[int], of: str) -> None:
    for width in widths:
        if width % divisor:
            raise InputError(f"{name} must divide {of}, got {divisor} for {width}")


@dataclass(frozen=True, kw_only=True)
class UNetConfig(Settings):
    """The network that predicts noise (`nn.unet`)."""

    in_channels: Width = 4
    """Channels of the input: those of the latents, plus mask and masked latents for inpainting (4 + 1 + 4)."""
    out_channels: Width = 4
    """Channels of the prediction."""
    block_out_channels: Widths = (320, 640, 1280, 1280)
    """Channels of each level; the resolution halves from one level to the next."""
    layers_per_block: Depth = 2
    """Residual blocks of a level on the way down (one more on the way up)."""
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    """Which levels have transformer blocks."""
    num_attention_heads: tuple[Width, ...] = (8, 8, 8, 8)
    """Attention heads of each level."""
    cross_attention_dim: Width | None = 768
    """Width of the text tokens that cross-attention reads; None for a network that reads none."""
    norm_num_groups: Width = 32
    use_linear_projection: bool = False
    """Whether the transformers' projections are linear layers (SD 2.x) or 1x1 convolutions (SD 1.x)."""
    upcast_attention: bool = False
    """Whether attention is computed in float32 whatever the weights (SD 2.1)."""
    num_class_embeds: Vocabulary | None = None
    """Number of class labels, whose embeddings are added to the timestep embedding; None for none."""
    pooled_projection_dim: Width | None = None
    """Width of a pooled text vector that is added to the timestep embedding; None for none."""
    mid_block_type: Literal["UNetMidBlock2DCrossAttn"] | None = "UNetMidBlock2DCrossAttn"
    """What is between the way down and the way up; None for nothing, as in compressed models (Kim et al. 2023)."""
    time_cond_proj_dim: Annotated[int, within(4, 65536)] | None = None
    """Width of the embedded guidance scale of a network distilled from a guided one (Luo et al. 2023); None for others,
    which classifier-free guidance evaluates twice."""

    def check(self) -> None:
        """Raises InputError where the levels' settings do not fit together."""
        _same_length(self, "block_out_channels", "attention_levels", "num_attention_heads")
        widths = self.block_out_channels
        _divides("norm_num_groups", self.norm_num_groups, widths, "block_out_channels")
        if widths[0] % 2:
            raise InputError(
                f"the first of block_out_channels must be even, since timesteps become that many sines and cosines,"
                f" got {widths[0]}"
            )
        for i, heads in enumerate(self.num_attention_heads):
            # Below the last is the middle, which has attention.
            if self.attention_levels[i] or (self.mid_block_type and i == len(widths) - 1):
                _divides("num_attention_heads", heads, widths[i : i + 1], "its level's block_out_channels")
        if self.num_class_embeds is not None and self.pooled_projection_dim is not None:
            raise InputError("num_class_embeds and pooled_projection_dim exclude each other: leave one out")


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig(Settings):
    """Stable Diffusion's autoencoder (`nn.vae.AutoencoderKL`)."""

    kind: Literal["kl"] = "kl"
    in_channels: Width = 3
    latent_channels: Width = 4
    block_out_channels: Widths = (128, 256, 512, 512)
    """Channels of each level; the resolution halves from one level to the next."""
    layers_per_block: Depth = 2
    norm_num_groups: Width = 32
    scaling_factor: Annotated[float, within(1e-6, 10**6)] = 0.18215
    """What latents are multiplied with to have unit standard deviation; 1 where the weights already do that."""
    codebook_size: Vocabulary | None = None
    """Entries of a vector-quantised latent space (VQ regulariser); None for the KL regulariser."""

    def check(self) -> None:
        """Raises InputError where the groups do not divide every width."""
        _divides("norm_num_groups", self.norm_num_groups, self.block_out_channels, "block_out_channels")

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return int(2 ** (len(self.block_out_channels) - 1))


@dataclass(frozen=True, kw_only=True)
class AutoencoderTinyConfig(Settings):
    """A light autoencoder of plain ReLU blocks (`nn.vae.AutoencoderTiny`); the defaults are TAESD."""

    kind: Literal["tiny"] = "tiny"
    in_channels: Width = 3
    latent_channels: Width = 4
    patch_size: Annotated[int, within(1, 64)] = 1
    """Side of the squares of pixels that become channels before the first convolution."""
    block_out_channels: Widths = (64, 64, 64, 64)
    """Channels of each level, from the pixels to the latents; the resolution halves from one to the next."""
    encoder_blocks: Blocks = (1, 3, 3, 3)
    """Residual blocks of each level of the encoder, from the pixels to the latents."""
    decoder_blocks: Blocks = (1, 3, 3, 3)
    """Residual blocks of each level of the decoder, from the pixels to the latents."""
    encoder_pooling: Annotated[int, within(1, 64)] = 1
    """Side of the squares of pixels of which the encoder reads the mean. Where it halves the picture, the decoder has
    one level more, where it quarters it two."""
    decoder_block_out_channels: Widths | None = None
    """Channels of each level of the decoder, from the pixels to the latents; None for the encoder's."""
    alpha: bool = False
    """Whether the decoder gives four channels: the picture on white, and how opaque it is."""

    def check(self) -> None:
        """Raises InputError where the levels' settings do not fit together."""
        if self.decoder_block_out_channels is None:
            _same_length(self, "block_out_channels", "encoder_blocks", "decoder_blocks")
        else:
            _same_length(self, "block_out_channels", "encoder_blocks")
            _same_length(self, "decoder_block_out_channels", "decoder_blocks")
        size = self.patch_size * 2 ** (len(self.decoder_widths) - 1)
        if size != self.factor:
            raise InputError(
                f"the decoder makes {size} pixels a side of one latent, and the encoder reads {self.factor}: give"
                " decoder_block_out_channels and decoder_blocks another number of levels, or another encoder_pooling"
            )

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of each level of the decoder."""
        return self.decoder_block_out_channels or self.block_out_channels

    @property
    def factor(self) -> int:
        """Pixels per latent, along each side."""
        return int(self.encoder_pooling * self.patch_size * 2 ** (len(self.block_out_channels) - 1))


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig(Settings):
    """A text transformer with its tokenizer (`nn.text`); the defaults are CLIP ViT-L/14's."""

    architecture: Literal["clip", "bert"] = "clip"
    """``clip``: causal, normalised before each block, no mask; ``bert``: the opposite of each."""
    vocab_size: Vocabulary = 49408
    hidden_size: Width = 768
    intermediate_size: Annotated[int, within(1, 65536)] = 3072
    num_hidden_layers: Annotated[int, within(1, 100)] = 12
    num_attention_heads: Width = 12
    max_position_embeddings: Width = 77
    """Positions that the weights have."""
    context_length: Annotated[int, within(3, 16384)] = 77
    """Tokens that a prompt is padded or cut to, begin and end included."""
    hidden_act: Literal["gelu", "quick_gelu"] = "quick_gelu"
    layer_norm_eps: Part = 1e-5
    skip_last_layers: Annotated[int, within(0, 99)] = 0
    """Layers left out at the end: 1 gives the penultimate layer, which the final norm follows."""
    trainable: bool = False
    """Whether this encoder is trained jointly with the denoiser."""
    packaged: Literal["all-MiniLM-L6-v2", "clip-tokenizer", "clip-tokenizer-2"] | None = None
    """Folder inside the package that holds weights and tokenizer; None for random weights."""

    NAMED: ClassVar[dict[str, Any]] = {}  # TEXT_ENCODERS, below

    def check(self) -> None:
        """Raises InputError where heads, layers or lengths do not fit together."""
        _divides("num_attention_heads", self.num_attention_heads, (self.hidden_size,), "hidden_size")
        for name, most, of in (
            ("skip_last_layers", self.num_hidden_layers - 1, "below num_hidden_layers"),
            ("context_length", self.max_position_embeddings, "at most max_position_embeddings"),
        ):
            if getattr(self, name) > most:
                raise InputError(f"{name} must be {of}, got {getattr(self, name)} for {most}")

    @property
    def reads_padding(self) -> bool:
        """Whether padding is attended to, as in Stable Diffusion."""
        return self.architecture == "clip"


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Settings):
    """The forward process (`diffusion.schedule`) and what the network predicts of it."""

    kind: Literal["linear", "scaled_linear", "cosine", "flow"] = "scaled_linear"
    """``linear`` (DDPM), ``scaled_linear`` (Stable Diffusion), ``cosine`` (improved DDPM) or ``flow`` (rectified)."""
    num_train_timesteps: Annotated[int, within(2, 100_000)] = 1000
    beta_start: Beta = 0.00085
    beta_end: Beta = 0.012
    rescale_betas_zero_snr: bool = False
    """Whether the last step is pure noise (Lin et al. 2023, algorithm 1)."""
    shift: Annotated[float, within(0.001, 1000)] = 1.0
    """Rectified flow only: moves levels towards noise, for larger pictures (Esser et al. 2024, equation 23)."""
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon"
    """What the network predicts: the noise, the clean latents, v, or the flow's velocity."""
    steps_offset: Annotated[int, within(0, 100_000)] = 1
    """Added to the timesteps of the leading spacing."""
    set_alpha_to_one: bool = False
    """Whether the DDIM family ends on clean latents or, as Stable Diffusion does, on the first timestep's level."""


@dataclass(frozen=True, kw_only=True)
class SamplerConfig(Settings):
    """How sampling walks from noise to latents (`diffusion.samplers`)."""

    name: SamplerName = "ddim"
    """A row of `diffusion.names`, by our name or another program's."""
    spacing: SpacingName | None = None
    """How the levels are spread, likewise; None for the sampler's own."""
    eta: Part | None = None
    """How much noise DDIM and TCD add: 0 is deterministic, 1 as much as can be; None for their own, 0 and 0.3."""
    variance: Literal["small", "large"] = "small"
    """DDPM only: the posterior's variance given clean latents, or beta (Ho et al. 2020, section 3.2)."""


@dataclass(frozen=True, kw_only=True)
class Guidance(Settings):
    """Classifier-free guidance (`diffusion.guidance`)."""

    scale: GuidanceScale = 7.5
    """1 and below is no guidance, and half the work."""
    interval: Interval = (0.0, 1.0)
    """Part of the noise range, from 0 (clean) to 1 (noise), in which guidance is on (Kynkäänniemi et al. 2024)."""
    rescale: Part = 0.0
    """How far the prediction's standard deviation is pulled back to the unguided one's, 0 to 1 (Lin et al. 2023,
    equation 15)."""


@dataclass(frozen=True, kw_only=True)
class Styles(Settings):
    """What styles prompts can name (`generation.text.with_style`); ``str`` is a sentence for the user."""

    words: tuple[str, ...] = ()
    """Phrases any of which in a prompt names a style, such as "noto style" or "black line drawing"."""
    default: str = ""
    """What generation adds to a prompt that names none, after a comma; empty adds nothing."""

    def __str__(self) -> str:
        default = f"; a prompt that names none is rendered in {self.default}" if self.default else ""
        return ", ".join(self.words or (self.default,)) + default


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Settings):
    """A whole model: its parts, and the settings that it generates with unless told otherwise."""

    name: str = "mini"
    sample_size: Annotated[int, within(1, 16384)] = 512
    """Side of the pictures that the model was made for, in pixels."""
    vae: AutoencoderKLConfig | AutoencoderTinyConfig = AutoencoderKLConfig()
    unet: UNetConfig = UNetConfig()
    text_encoders: Annotated[tuple[TextEncoderConfig, ...], sized(0, 8)] = (TextEncoderConfig(),)
    """Each prompt's tokens are those of every encoder, one after the other; empty for a model without text."""
    schedule: ScheduleConfig = ScheduleConfig()
    sampler: SamplerConfig = SamplerConfig()
    num_inference_steps: Annotated[int, within(1, 100_000)] = 50
    guidance: Guidance = Guidance()
    prompts: tuple[str, ...] = ()
    """Prompts that show what the model can do."""
    styles: Styles = Styles()
    """Read by generation alone: training takes captions as they are."""

    FORMER: ClassVar[tuple[str, ...]] = ("training",)

    def check(self) -> None:
        """Raises InputError where the parts do not fit together."""
        unet, vae, latents = self.unet, self.vae, self.vae.latent_channels
        pooled = unet.pooled_projection_dim
        texts = sum(text.hidden_size for text in self.text_encoders)
        for name, value, choices, of in (
            ("vae.in_channels", vae.in_channels, (3,), "the pictures, which are RGB"),
            ("unet.in_channels", unet.in_channels, (latents, 2 * latents + 1), "vae.latent_channels"),
            ("unet.out_channels", unet.out_channels, (latents,), "vae.latent_channels"),
            ("unet.pooled_projection_dim", pooled, (None, texts or None), "the text_encoders' hidden_size"),
        ):
            if value not in choices:
                said = " or ".join(dict.fromkeys(str(choice) for choice in choices))
                raise InputError(f"{name} must be {said}, to fit {of}, got {value}")
        if self.sample_size % vae.factor:
            raise InputError(
                f"sample_size must be a multiple of the autoencoder's factor {vae.factor}, got {self.sample_size}"
            )
        if self.schedule.kind == "flow":
            if self.schedule.prediction_type == "epsilon":
                raise InputError(
                    "schedule.prediction_type must be another than 'epsilon' for a rectified flow, which starts from"
                    " pure noise: flow_prediction, v_prediction or sample"
                )
            if self.sampler.spacing and not spacing_named(self.sampler.spacing).flow:
                raise InputError(
                    f"sampler.spacing {self.sampler.spacing!r} is for the DDPM family: leave it out for a flow"
                )
        if (unet.cross_attention_dim is None and pooled is None) != (not self.text_encoders):
            raise InputError(
                "text_encoders need a unet.cross_attention_dim, of their tokens, or a unet.pooled_projection_dim, and"
                " the other way round"
            )

    @property
    def alpha(self) -> bool:
        """Whether the pictures have opacity."""
        return isinstance(self.vae, AutoencoderTinyConfig) and self.vae.alpha

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

CLIP_MINI_FROZEN = replace(CLIP_MINI, trainable=False)
"""The same, to be trained by a stage ``contrastive`` alone."""

TEXT_ENCODERS = {
    "minilm": MINILM,
    "bert-base": BERT_BASE,
    "clip-l": CLIP_L,
    "clip-h": CLIP_H,
    "clip-mini": CLIP_MINI,
    "clip-mini-frozen": CLIP_MINI_FROZEN,
}
"""By the names that recipes may call them."""
TextEncoderConfig.NAMED.update(TEXT_ENCODERS)

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


def preset(name: object) -> ModelConfig:
    """The preset of that name. Raises InputError with the choices for an unknown one."""
    if not isinstance(name, str) or name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]
