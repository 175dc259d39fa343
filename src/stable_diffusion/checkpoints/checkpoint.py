"""A checkpoint in memory: what every reader of files gives, and what a model is put together from."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stable_diffusion.config import ModelConfig, TextEncoderConfig
from stable_diffusion.errors import InputError
from stable_diffusion.nn.text import BERT_NAMES

State = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration with its tensors, under our names and in the files' number format."""

    config: ModelConfig
    vae: State
    unet: State
    text_encoders: list[State]
    """One for each of the configuration's text encoders."""
    tokenizers: list[Path]
    """Folder of each text encoder's tokenizer."""
    projections: State = field(default_factory=dict)
    """The prompt encoder's projections, where it has them."""
    notes: tuple[str, ...] = ()
    """What a reader found out or left aside, in sentences for the user."""


def read_tensors(path: Path) -> State:
    """The tensors of a safetensors file. Raises InputError where it is missing, truncated or of another kind."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: a model folder needs it")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a whole safetensors file ({error}): copy or download it again"
        ) from None


def is_weights(path: Path) -> bool:
    """Whether a file is called as weights are, or begins as safetensors or PyTorch's pickles do."""
    if path.suffix.lower() in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        return True
    with path.open("rb") as file:
        start = file.read(9)
    return start[:2] in (b"PK", b"\x80\x02") or start[8:] == b"{"


def packaged(name: str) -> Path:
    """The folder of that name among the weights that the package carries."""
    return Path(str(files("stable_diffusion"))) / "weights" / name


def text_state(published: State, config: TextEncoderConfig) -> State:
    """A published text encoder's tensors under our names.

    Accepts the prefixes ``text_model.`` and ``bert.`` or none, and BERT's ``LayerNorm.gamma`` and ``beta``.
    Tensors that a prompt's tokens do not need are left out: position numbers, poolers, projections and heads.
    """
    state = {}
    for name, tensor in published.items():
        for prefix in ("text_model.", "bert."):
            name = name.removeprefix(prefix)
        if config.architecture == "bert":
            older = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
            for theirs, ours in (*older, *BERT_NAMES):
                name = name.replace(theirs, ours)
        kept = name.startswith(("embeddings.", "encoder.", "final_layer_norm."))
        if kept and not name.endswith("position_ids"):
            state[name] = tensor
    return state


def published_text_state(state: State, config: TextEncoderConfig) -> State:
    """Our names as published ones: the inverse of ``text_state``, in the form that today's libraries read."""
    if config.architecture == "clip":
        return {f"text_model.{name}": tensor for name, tensor in state.items()}
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in reversed(BERT_NAMES):
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    return renamed
