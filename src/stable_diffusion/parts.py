"""ModelParts: what a model is made of, how it is built, read and written, and what can be added to it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from stable_diffusion import checkpoints, files
from stable_diffusion.checkpoints import Checkpoint, embeddings, hub, lora, native, taesd
from stable_diffusion.checkpoints.checkpoint import packaged
from stable_diffusion.checkpoints.files import building
from stable_diffusion.config import ModelConfig, preset
from stable_diffusion.diffusion.schedule import Schedule
from stable_diffusion.errors import InputError, shown
from stable_diffusion.fields import typed
from stable_diffusion.files import as_path
from stable_diffusion.generation.denoise import Network, UNetNetwork
from stable_diffusion.nn.adapters import Adapters
from stable_diffusion.nn.text import PromptEncoder
from stable_diffusion.nn.tokenizer import Tokenizer
from stable_diffusion.nn.unet import UNet
from stable_diffusion.nn.vae import AutoencoderKL, AutoencoderTiny, autoencoder

# What `from_pretrained` has read, for the `__init__` that it calls in this context.
_READING: ContextVar[tuple[Checkpoint, torch.dtype] | None] = ContextVar("reading", default=None)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class ModelParts(nn.Module):
    """``vae``, ``unet``, ``text_encoder`` and ``scheduler``, with the ``adapters`` that act on them.

    Args:
        config: a configuration whose text encoders the package carries, or the name of such a preset (``mini``). The
            networks start from random weights, the text encoders from their own. The presets ``sd15`` and ``sd21``
            read a vocabulary from files: load those with ``from_pretrained``.

    Attributes:
        notes: what reading the files found out or left aside, in sentences.
        origin: which model it is and how it was loaded: the fields of that name of its requests.
    """

    origin: dict[str, Any]

    def __init__(self, config: str | ModelConfig = "mini") -> None:
        super().__init__()
        config = preset(config) if isinstance(config, str) else config
        if not isinstance(config, ModelConfig):
            raise InputError(f"a model is made of a ModelConfig or of a preset's name, got {shown(config)}")
        self.config = config
        self.notes: tuple[str, ...] = ()
        self.origin = {"model": config.name}
        self.scheduler = Schedule(config.schedule)
        if (reading := _READING.get()) is not None and reading[0].config is config:
            _READING.set(None)
            self._read(*reading)
            return
        for text in self.config.text_encoders:
            if text.packaged is None:
                raise InputError(
                    f"the preset {self.config.name!r} reads its text encoder's vocabulary from files: load a folder"
                    " with DiffusionModel.from_pretrained(path)"
                )
        folders = [packaged(str(text.packaged)) for text in self.config.text_encoders]
        self._build(folders)
        for encoder, text in zip(self.text_encoder.encoders, self.config.text_encoders, strict=True):
            if state := native.packaged_text_encoder(text):
                encoder.load_state_dict({name: tensor.float() for name, tensor in state.items()})

    _preview: tuple[AutoencoderKL | AutoencoderTiny, ...] = ()

    def _build(self, tokenizer_folders: list[Path]) -> None:
        config = self.config
        self.vae = autoencoder(config.vae)
        self.unet = UNet(config.unet)
        self.adapters = Adapters()
        tokenizers = [
            Tokenizer(folder, text.architecture, text.context_length)
            for folder, text in zip(tokenizer_folders, config.text_encoders, strict=True)
        ]
        self.text_encoder = PromptEncoder(
            config.text_encoders, tokenizers, config.unet.cross_attention_dim or 0
        )
        super().train(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        prediction_type: str | None = None,
        variant: str | None = None,
        ema: bool = False,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
    ) -> Self:
        """The model in a folder, ours or diffusers', in a single file, or under a name of the Hugging Face hub.

        Diffusers folders and single files are those of Stable Diffusion 1.x and 2.x.

        Args:
            path: the folder, the file, or the name, a text; None for the model that the package carries.
            dtype: number format to compute in. float32 unless the device is good at another.
            prediction_type: what the U-Net predicts (``epsilon``, ``v_prediction`` …), whatever the files say.
            variant: diffusers folders: the files to prefer, such as ``fp16`` or ``non_ema``.
            ema: single files: whether to take the averaged weights where there are both.
            vae: another autoencoder, as ``load_vae`` takes it, for a model that has none or instead of its own.
            text_encoder: another CLIP text encoder, likewise: its folder, or that of a diffusers pipeline.

        Raises:
            InputError: nothing there, not a model, or files that are damaged or do not fit together.
        """
        _check_dtype(dtype)
        for given in filter(None, (path, vae, text_encoder)):
            as_path(given)  # a text may also be a name of the hub
        source = packaged("model") if path is None else path
        variant, ema = typed(str | None, variant, "variant"), typed(bool, ema, "ema")
        reading: dict[str, Any] = {"prediction_type": prediction_type, "variant": variant, "ema": ema}
        for name, given in (("vae", vae), ("text_encoder", text_encoder)):
            reading[name] = None if given is None else str(given)
        with files.reading(source):
            model = cls._from_checkpoint(checkpoints.read(source, **reading), dtype)
        model.origin = {"model": None if path is None else hub.stored_name(path), **reading}
        return model

    @classmethod
    def _from_checkpoint(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> Self:
        """The model of a checkpoint, whose tensors are taken out of it."""
        before = _READING.set((checkpoint, dtype))
        try:
            model = cls(checkpoint.config)
            if _READING.get() is not None:
                raise InputError(
                    f"{cls.__name__}.__init__ must hand its config to super().__init__(config) as it is:"
                    " from_pretrained fills that model"
                )
        finally:
            _READING.reset(before)
        return model.to(dtype).eval()

    def _read(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.notes = checkpoint.notes
        with building(f"no network has the configuration of {self.config.name!r}"):
            self._build(checkpoint.tokenizers)
        checkpoint.fill(self.vae, self.unet, self.text_encoder, dtype)

    def save_pretrained(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes a model folder (see `checkpoints.native`), replacing one that is there.

        LoRAs are written only where they are fused into the weights; a warning says which it is.

        Args:
            path: the folder.
            dtype: number format of the files, such as ``torch.float16``; None keeps the weights'.

        Raises:
            InputError: there is something else at `path`.
        """
        native.write(as_path(path), self._to_checkpoint(dtype), dtype)

    def export(
        self,
        path: str | Path,
        *,
        format: Literal["diffusers", "single-file"] = "diffusers",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Writes the model for other programs.

        ``StableDiffusionPipeline`` and single files hold models of CLIP and a KL autoencoder. Of others the
        diffusers form has the parts that fit, with a warning that says why. LoRAs are written only where they are
        fused into the weights; a warning says which it is.

        Args:
            path: a name that nothing has.
            format: ``diffusers`` for a folder, ``single-file`` for CompVis' layout in safetensors.
            dtype: number format of the files, such as ``torch.float16``; None keeps the weights'.

        Raises:
            InputError: there is something at `path`, or the format cannot hold the model, nor a part of it.
        """
        path = as_path(path)
        with files.writing(path):
            notes = checkpoints.export(path, self._to_checkpoint(dtype), format, dtype)
        for note in notes:
            warnings.warn(note, stacklevel=2)

    def load_lora(self, path: str | Path, weight: float = 1.0, name: str | None = None) -> str:
        """Lets a LoRA file of kohya's scripts or of diffusers/PEFT act on the U-Net and the CLIP text encoder.

        The model's own weights stay as they are (see `nn.adapters`). Several add up. Warns where only some of the
        file's modules are in this model.

        Args:
            path: a ``.safetensors``, ``.pt`` or ``.bin`` file.
            weight: how strongly it acts where a call says nothing; 0 not at all, negative numbers turn it round.
            name: what to call it; None takes the file's name without its ending.

        Returns:
            How many of the file's modules were applied, as a sentence.

        Raises:
            InputError: a damaged file, no LoRA, one for another model, or a name that is taken.
        """
        path = as_path(path)
        name = path.stem if name is None else typed(str, name, "name")
        loras, count = lora.read(path, self.unet, self.text_encoder, self.config, weight)
        self.adapters.add(name, loras, weight)
        return count

    def unload_lora(self, name: str) -> None:
        """Forgets a LoRA. Raises InputError for one that is fused, or not there."""
        self.adapters.remove(typed(str, name, "name"))

    def fuse_lora(self, weights: Mapping[str, float] | None = None, *, keep: bool = True) -> None:
        """Puts LoRAs into the weights, for speed and for saving (see `nn.adapters.Adapters.fuse`)."""
        self.adapters.fuse(weights, keep=keep)

    def unfuse_lora(self) -> None:
        """Gives the model the very weights back that it had before ``fuse_lora``."""
        self.adapters.unfuse()

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> list[str]:
        """Teaches prompts the words of a textual inversion, and returns them. They are not saved with the model.

        Args:
            path: a ``.safetensors``, ``.pt`` or ``.bin`` file.
            token: the word in prompts; None takes the one in the file, or else the file's name.

        Raises:
            InputError: a damaged file, one for another model, or a word that is there already.
        """
        words = embeddings.add(
            self.text_encoder, self.config, as_path(path), typed(str | None, token, "token")
        )
        added = str(path) if token is None else f"{path}:{token}"
        self.origin["embedding"] = (*self.origin.get("embedding", ()), added)
        return words

    def load_vae(self, path: str | Path, *, preview: bool = False) -> None:
        """Takes another autoencoder for the model's own: a better decoder, or TAESD, which is many times faster.

        Args:
            path: a diffusers folder, a file of Stable Diffusion's autoencoder, or one of TAESD's two files.
            preview: keeps the model's own, and takes this one for ``decode(latents, preview=True)`` alone, as in a
                callback that shows ``step.x0``.

        Raises:
            InputError: no such autoencoder there, or one of other latents; the model keeps its own then.
        """
        config, vae = taesd.load(as_path(path), self.config, self.unet)
        if preview:
            self._preview = (vae,)  # in a tuple: no part of the model's state
            return
        self.vae = vae.train(self.vae.training)
        self.origin["vae"] = str(path)
        self.config = config

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for vae in self._preview:  # which no state holds, but which moves along
            vae._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _check_weights(self) -> None:
        """Raises InputError on the meta device, where there are none."""
        if any(parameter.is_meta for parameter in self.parameters()):
            raise InputError(
                "the model is on the meta device, which holds shapes and no weights: load it with from_pretrained"
            )

    def _to_checkpoint(self, dtype: torch.dtype | None) -> Checkpoint:
        """The model as it is written. Warns where there are LoRAs."""
        self._check_weights()
        _check_dtype(torch.float32 if dtype is None else dtype)
        if note := self.adapters.note():
            warnings.warn(note, stacklevel=3)
        return Checkpoint.of(self.config, self.vae, self.unet, self.text_encoder)

    def forward(
        self,
        sample: Float[Tensor, "b c h w"],
        timesteps: Float[Tensor, " b"],
        encoder_hidden_states: Float[Tensor, "b n d"] | None = None,
        encoder_attention_mask: Bool[Tensor, "b n"] | None = None,
        class_labels: Tensor | None = None,
        timestep_cond: Float[Tensor, "b g"] | None = None,
    ) -> Float[Tensor, "b c2 h w"]:
        """The U-Net's prediction for noisy latents (see `nn.unet.UNet.forward`)."""
        text = (encoder_hidden_states, encoder_attention_mask)
        return self.unet(sample, timesteps, *text, class_labels, timestep_cond)

    def adapted(self, weights: Mapping[str, float]) -> AbstractContextManager[None]:
        """Within it, the networks compute with the LoRAs of these names, each at its weight, in this context alone."""
        return self.adapters.active(weights)

    @property
    def network(self) -> Network:
        """What generation takes for the U-Net."""
        return UNetNetwork(self.unet)

    def widened(self) -> Self:
        """A copy in float32."""
        return copy.deepcopy(self).float()


def _check_dtype(dtype: object) -> None:
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {shown(dtype)}")
