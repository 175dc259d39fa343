"""A checkpoint in memory: what every reader of files gives, and what a model is put together from."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import torch
from torch import nn

from stable_diffusion.checkpoints.files import State, assign
from stable_diffusion.config import ModelConfig, TextEncoderConfig
from stable_diffusion.nn.text import BERT_NAMES, PromptEncoder


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration with its tensors, under our names and in the files' number format.

    Those of an autoencoder or a text encoder are empty where the model came without.
    """

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
    tokenizer_files: list[list[Path]] = field(default_factory=list)
    """Each tokenizer's files, where the checkpoint is to be written."""

    @property
    def missing(self) -> list[str]:
        """What the model came without."""
        return ["autoencoder"] * (not self.vae) + ["text encoder"] * (not all(self.text_encoders))

    @classmethod
    def of(cls, config: ModelConfig, vae: nn.Module, unet: nn.Module, text: PromptEncoder) -> Checkpoint:
        """The checkpoint of a model's parts, to be written."""
        return cls(
            config,
            vae.state_dict(),
            unet.state_dict(),
            [encoder.state_dict() for encoder in text.encoders],
            [tokenizer.folder for tokenizer in text.tokenizers],
            text.projections.state_dict(),
            tokenizer_files=[tokenizer.files for tokenizer in text.tokenizers],
        )

    def fill(self, vae: nn.Module, unet: nn.Module, text: PromptEncoder, dtype: torch.dtype) -> None:
        """Makes the tensors, which are taken out of the checkpoint, the weights of a model's parts.

        Raises InputError where names or shapes do not fit.
        """
        assign("vae", vae, self.vae, dtype)
        assign("unet", unet, self.unet, dtype)
        assign("text_projection", text.projections, self.projections, dtype)
        for i, state in enumerate(self.text_encoders):
            assign(f"text_encoder_{i + 1}", text.encoders[i], state, dtype)


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
