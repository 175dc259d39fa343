"""DiffusionModel: the front door to generation and training."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from stable_diffusion import checkpoints, images
from stable_diffusion.checkpoints import (
    Checkpoint,
    compvis,
    diffusers_export,
    embeddings,
    lora,
    native,
    taesd,
)
from stable_diffusion.checkpoints.checkpoint import packaged
from stable_diffusion.config import Guidance, ModelConfig, SamplerConfig, preset
from stable_diffusion.diffusion.names import sampler_name
from stable_diffusion.diffusion.samplers import Step
from stable_diffusion.diffusion.schedule import Schedule
from stable_diffusion.errors import InputError, unknown_name
from stable_diffusion.generation import pipeline
from stable_diffusion.nn.text import PromptEmbeds, PromptEncoder
from stable_diffusion.nn.tokenizer import Tokenizer
from stable_diffusion.nn.unet import UNet
from stable_diffusion.nn.vae import AutoencoderKL, AutoencoderTiny, autoencoder
from stable_diffusion.runtime import first_process, watched

if TYPE_CHECKING:
    from stable_diffusion.data.item import Source
    from stable_diffusion.training.events import Observer, TrainStep
    from stable_diffusion.training.stage import StageSettings


class DiffusionModel(nn.Module):
    """A latent diffusion model: ``vae``, ``unet``, ``text_encoder`` and ``scheduler`` behind one door.

    Args:
        config: a preset's name (``mini``, ``sd15``, ``sd21``) or a configuration. The networks start from
            random weights, but text encoders that the package carries from their own.

    Attributes:
        notes: what reading the files found out or left aside, in sentences.
    """

    def __init__(self, config: str | ModelConfig = "mini") -> None:
        super().__init__()
        self.config = preset(config) if isinstance(config, str) else config
        for text in self.config.text_encoders:
            if text.packaged is None:
                raise InputError(
                    f"the preset {self.config.name!r} reads its text encoder's vocabulary from files: load a folder"
                    " with DiffusionModel.from_pretrained(path)"
                )
        folders = [packaged(str(text.packaged)) for text in self.config.text_encoders]
        self.notes: tuple[str, ...] = ()
        self.scheduler = Schedule(self.config.schedule)
        self._build(folders)
        for encoder, text in zip(self.text_encoder.encoders, self.config.text_encoders, strict=True):
            if state := native.packaged_text_encoder(text):
                encoder.load_state_dict({name: tensor.float() for name, tensor in state.items()})

    _preview: tuple[AutoencoderKL | AutoencoderTiny, ...] = ()

    def _build(self, tokenizer_folders: list[Path]) -> None:
        config = self.config
        self.vae = autoencoder(config.vae)
        self.unet = UNet(config.unet)
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
    ) -> DiffusionModel:
        """The model in a folder, ours or diffusers', in a single file, or under a name of the Hugging Face hub.

        Diffusers folders and single files are those of Stable Diffusion 1.x and 2.x.

        Args:
            path: the folder, file or name; None for the model that the package carries.
            dtype: number format to compute in. float32 unless the device is good at another.
            prediction_type: what the U-Net predicts (``epsilon``, ``v_prediction`` …), whatever the files say.
            variant: diffusers folders: the files to prefer, such as ``fp16`` or ``non_ema``.
            ema: single files: whether to take the averaged weights where there are both.

        Raises:
            InputError: nothing there, not a model, or files that are damaged or do not fit together.
        """
        source = packaged("model") if path is None else path
        checkpoint = checkpoints.read(source, prediction_type=prediction_type, variant=variant, ema=ema)
        return cls._from_checkpoint(checkpoint, dtype)

    @classmethod
    def _from_checkpoint(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> DiffusionModel:
        """The model of a checkpoint, whose tensors are taken out of it."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.config = checkpoint.config
        model.notes = checkpoint.notes
        model.scheduler = Schedule(model.config.schedule)
        try:
            with torch.device(
                "meta"
            ):  # no memory, no random numbers for weights that are about to be replaced
                model._build(checkpoint.tokenizers)
        except InputError:
            raise
        except (ValueError, TypeError, RuntimeError, ArithmeticError) as error:
            raise InputError(f"no network has the configuration of {model.config.name!r} ({error})") from None
        parts: list[tuple[str, nn.Module, dict[str, Tensor]]] = [
            ("vae", model.vae, checkpoint.vae),
            ("unet", model.unet, checkpoint.unet),
            ("text_projection", model.text_encoder.projections, checkpoint.projections),
        ]
        for i, state in enumerate(checkpoint.text_encoders):
            parts.append((f"text_encoder_{i + 1}", model.text_encoder.encoders[i], state))
        for name, module, state in parts:
            _assign(name, module, state, dtype)
        return model

    def save_pretrained(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes a model folder (see `checkpoints.native`), replacing one that is there.

        Args:
            path: the folder.
            dtype: number format of the files, such as ``torch.float16``; None keeps the weights'.

        Raises:
            InputError: there is something else at `path`.
        """
        native.write(Path(path), *self._to_checkpoint(), dtype)

    def export(
        self,
        path: str | Path,
        *,
        format: Literal["diffusers", "single-file"] = "diffusers",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Writes the model for other programs.

        ``StableDiffusionPipeline`` and single files hold models of CLIP and a KL autoencoder. Of others the
        diffusers form has the parts that fit, with a warning that says why.

        Args:
            path: a name that nothing has.
            format: ``diffusers`` for a folder, ``single-file`` for CompVis' layout in safetensors.
            dtype: number format of the files, such as ``torch.float16``; None keeps the weights'.

        Raises:
            InputError: there is something at `path`, or the format cannot hold the model, nor a part of it.
        """
        if format not in ("diffusers", "single-file"):
            raise unknown_name("format", format, ("diffusers", "single-file"))
        checkpoint, tokenizer_files = self._to_checkpoint()
        if format == "diffusers":
            for note in diffusers_export.write(Path(path), checkpoint, tokenizer_files, dtype):
                warnings.warn(note, stacklevel=2)
        elif Path(path).exists():
            raise InputError(f"{path} exists: choose another name")
        elif (reason := diffusers_export.misfit(self.config)) is not None:
            raise InputError(f"a single file cannot hold the model {self.config.name!r}: {reason}")
        else:
            compvis.write(Path(path), checkpoint, dtype)

    def load_lora(self, path: str | Path, weight: float = 1.0) -> str:
        """Merges a LoRA file of kohya's scripts or of diffusers/PEFT into the U-Net and the CLIP text encoder.

        Several add up. Warns where only some of the file's modules are in this model.

        Args:
            path: a ``.safetensors``, ``.pt`` or ``.bin`` file.
            weight: how strongly it acts; 0 not at all, negative numbers turn it round.

        Returns:
            How many of the file's modules were applied, as a sentence.

        Raises:
            InputError: a damaged file, no LoRA, or one for another model; the weights are as before then.
        """
        return lora.merge(self.unet, self.text_encoder, self.config, Path(path), _number("weight", weight))

    def load_textual_inversion(self, path: str | Path, token: str | None = None) -> list[str]:
        """Teaches prompts the words of a textual inversion, and returns them. They are not saved with the model.

        Args:
            path: a ``.safetensors``, ``.pt`` or ``.bin`` file.
            token: the word in prompts; None takes the one in the file, or else the file's name.

        Raises:
            InputError: a damaged file, one for another model, or a word that is there already.
        """
        return embeddings.add(self.text_encoder, self.config, Path(path), token)

    def load_vae(self, path: str | Path, *, preview: bool = False) -> None:
        """Takes another autoencoder for the model's own: a better decoder, or TAESD, which is many times faster.

        Args:
            path: a diffusers folder, a file of Stable Diffusion's autoencoder, or one of TAESD's two files.
            preview: keeps the model's own, and takes this one for ``decode(latents, preview=True)`` alone, as in a
                callback that shows ``step.x0``.

        Raises:
            InputError: no such autoencoder there, or one of other latents; the model keeps its own then.
        """
        config, state = taesd.read_vae(Path(path))
        own, weight = self.config.vae, self.unet.conv_out.weight
        if config.latent_channels != own.latent_channels:
            raise InputError(
                f"the autoencoder {path} has {config.latent_channels} latent channels,"
                f" the model {self.config.name!r} {own.latent_channels}"
            )
        with torch.device("meta"):
            vae = autoencoder(config)
        _assign("vae", vae, state, weight.dtype)
        vae = vae.to(weight.device).train(self.vae.training)
        if preview:
            self._preview = (vae,)  # in a tuple: no part of the model's state
            return
        self.vae = vae
        size = self.config.sample_size // own.factor * config.factor  # the U-Net keeps its size of latents
        self.config = dataclasses.replace(self.config, vae=config, sample_size=size)

    def _to_checkpoint(self) -> tuple[Checkpoint, list[list[Path]]]:
        """The model as it is written, and the files of its tokenizers."""
        checkpoint = Checkpoint(
            config=self.config,
            vae=self.vae.state_dict(),
            unet=self.unet.state_dict(),
            text_encoders=[encoder.state_dict() for encoder in self.text_encoder.encoders],
            tokenizers=[tokenizer.folder for tokenizer in self.text_encoder.tokenizers],
            projections=self.text_encoder.projections.state_dict(),
        )
        return checkpoint, [tokenizer.files for tokenizer in self.text_encoder.tokenizers]

    def forward(
        self,
        sample: Float[Tensor, "b c h w"],
        timesteps: Float[Tensor, " b"],
        encoder_hidden_states: Float[Tensor, "b n d"] | None = None,
        encoder_attention_mask: Bool[Tensor, "b n"] | None = None,
        class_labels: Tensor | None = None,
    ) -> Float[Tensor, "b c2 h w"]:
        """The U-Net's prediction for noisy latents (see `nn.unet.UNet.forward`)."""
        return self.unet(sample, timesteps, encoder_hidden_states, encoder_attention_mask, class_labels)

    # The three blocks: pixel space, latent space, conditioning.

    @torch.no_grad()
    def encode(
        self, pictures: Image.Image | Sequence[Image.Image] | Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b c h w"]:
        """Latents of unit deviation for PIL images of one size, or for a tensor in [-1, 1].

        Raises:
            InputError: a size that is no multiple of the autoencoder's factor.
        """
        if isinstance(pictures, Image.Image):
            pictures = [pictures]
        pixels = pictures if isinstance(pictures, Tensor) else images.to_tensor(pictures)
        self._check_size(pixels.shape[-1], pixels.shape[-2])
        return self.vae.encode(pixels.to(self.unet.conv_out.weight))

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c h w"], *, preview: bool = False) -> list[Image.Image]:
        """The pictures that latents of unit deviation stand for, by the preview's autoencoder where it is asked for.

        Raises:
            InputError: NaN in the picture, or a preview before ``load_vae(path, preview=True)``.
        """
        if preview and not self._preview:
            raise InputError(
                "there is no autoencoder for previews: load one with load_vae(path, preview=True)"
            )
        vae = self._preview[0].to(latents.device) if preview else self.vae
        return images.to_pil(vae.decode(latents.to(self.unet.conv_out.weight)).float())

    @torch.no_grad()
    def encode_prompt(self, texts: str | Sequence[str]) -> PromptEmbeds:
        """The text tokens that the U-Net reads, with their mask and pooled vector.

        Warns, naming the words, where a text is longer than an encoder's context.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        self._warn_of_cut(texts)
        return self.text_encoder(texts)

    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        image: Image.Image | str | Path | None = None,
        mask_image: Image.Image | str | Path | None = None,
        strength: float = 0.8,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | Guidance | None = None,
        sampler: str | SamplerConfig | None = None,
        seed: int | None = None,
        num_images_per_prompt: int = 1,
        latents: Float[Tensor, "b c h w"] | None = None,
        callback: Callable[[Step], bool | None] | None = None,
    ) -> list[Image.Image]:
        """Pictures from words; with `image` from a picture and words; with `mask_image` in a part of it.

        Every picture's ``info["settings"]`` has all that made it.

        Args:
            prompt: what to draw; several prompts are drawn as one batch. An empty one is valid. One that names none
                of the model's styles is drawn in its default style, if it has one (``config.Styles``).
            negative_prompt: what to steer away from: one for all, or one for each prompt.
            image: the picture to begin with, a PIL image or a file.
            mask_image: white where `image` is repainted; elsewhere its bytes stay.
            strength: how much of `image` is given up, from just above 0 to 1, which keeps nothing of it.
            height: in pixels, a multiple of the model's factor. None: the image's, or the model's own size.
            width: likewise.
            num_inference_steps: steps of a whole walk, at least 1. None: the model's own number.
            guidance_scale: how strongly to follow the prompt; 1 is no guidance. None: the model's own.
            sampler: its name, or with spacing and eta. None: the model's own.
            seed: of the first picture, 0 to 2**63 - 1; the next one's is one more. None draws one.
            num_images_per_prompt: pictures of each prompt.
            latents: standard normal latents to begin with, one for each picture.
            callback: called after each step; stops the walk by returning True, and what the network then sees
                in the noise is decoded.

        Raises:
            InputError: an argument outside what is said here.
        """
        request = self._request(
            prompt, negative_prompt, image, mask_image, strength, height, width, num_inference_steps,
            guidance_scale, sampler, seed, num_images_per_prompt, latents,
        )  # fmt: skip
        weight = self.unet.conv_out.weight
        if weight.dtype == torch.float16 and weight.device.type == "cpu":
            warnings.warn("float16 is no format to compute in on a CPU: going on in float32", stacklevel=2)
            self.float()
        try:
            pictures = self._run(request, callback)
        except pipeline.NonFinite:
            if self.unet.conv_out.weight.dtype not in (torch.float16, torch.bfloat16):
                raise
            warnings.warn(
                "NaN or infinity in a 16-bit number format: computing again in float32", stacklevel=2
            )
            narrow = self.unet.conv_out.weight.dtype
            self.float()
            try:
                pictures = self._run(request, callback)
            finally:
                self.to(narrow)
        for i, picture in enumerate(pictures):
            picture.info["settings"] = self._settings(request, i)
        return pictures

    def _run(
        self, request: pipeline.Request, callback: Callable[[Step], bool | None] | None
    ) -> list[Image.Image]:
        from tqdm.auto import tqdm

        total = len(pipeline.plan(self, request)) - 1
        whole = request.num_inference_steps
        steps = pipeline.generate(self, request)
        label = "steps" if total == whole else f"{total} of {whole} steps"
        latents = None
        for step in tqdm(steps, desc=label, total=total, unit="step", disable=not watched(), leave=False):
            latents = step.x
            if callback is not None and callback(step) is True:
                latents = step.x0
                break
        assert latents is not None, "every walk has a step"
        return pipeline.decode(self, request, latents)

    def _request(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None,
        image: Image.Image | str | Path | None,
        mask_image: Image.Image | str | Path | None,
        strength: float,
        height: int | None,
        width: int | None,
        num_inference_steps: int | None,
        guidance_scale: float | Guidance | None,
        sampler: str | SamplerConfig | None,
        seed: int | None,
        num_images_per_prompt: int,
        latents: Float[Tensor, "b c h w"] | None,
    ) -> pipeline.Request:
        """The arguments of ``generate``, checked and with every default filled in."""
        config = self.config
        prompts = _texts("prompt", prompt)
        negatives = _texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
        if len(negatives) not in (1, len(prompts)):
            raise InputError(
                f"negative_prompt must be one text or one for each of the {len(prompts)} prompts, got {len(negatives)}"
            )
        negatives = negatives * (len(prompts) // len(negatives))
        if not config.text_encoders and any(prompts):
            raise InputError(
                f"the model {config.name!r} has no text encoder: only an empty prompt can be given"
            )
        styled = [pipeline.with_style(text, config.styles) for text in prompts]
        self._warn_of_cut([*styled, *negatives])
        count = _integer("num_images_per_prompt", num_images_per_prompt, 1)
        steps = _integer(
            "num_inference_steps",
            config.num_inference_steps if num_inference_steps is None else num_inference_steps,
            1,
        )
        seed = _integer("seed", int.from_bytes(os.urandom(4), "big") if seed is None else seed, 0, 2**63 - 1)
        if sampler is None or isinstance(sampler, str):
            sampler = config.sampler if sampler is None else SamplerConfig(name=sampler)
        if not isinstance(sampler, SamplerConfig):
            raise InputError(f"sampler must be a name or a SamplerConfig, got {sampler!r}")
        sampler_name(sampler.name)
        if guidance_scale is None:
            guidance = config.guidance
        elif isinstance(guidance_scale, Guidance):
            guidance = guidance_scale
            _number("guidance_scale", guidance.scale)
        else:
            guidance = dataclasses.replace(config.guidance, scale=_number("guidance_scale", guidance_scale))
        low, high = guidance.interval
        if not 0 <= low <= high <= 1:
            raise InputError(
                f"the guidance interval must be two numbers from 0 to 1, in order, got {low} and {high}"
            )
        if not 0 <= guidance.rescale <= 1:
            raise InputError(f"the guidance rescale must be from 0 to 1, got {guidance.rescale}")
        if mask_image is not None and image is None:
            raise InputError("mask_image needs the image that it masks: give image as well")
        if not 0 < _number("strength", strength) <= 1:
            raise InputError(f"strength must be above 0 and at most 1, got {strength}")
        picture, mask = _picture("image", image), _picture("mask_image", mask_image)
        width, height = self._size(picture, width, height)
        number = len(prompts) * count
        shape = (number, config.vae.latent_channels, height // config.vae.factor, width // config.vae.factor)
        if latents is not None and (not isinstance(latents, Tensor) or latents.shape != shape):
            found = tuple(latents.shape) if isinstance(latents, Tensor) else repr(latents)
            raise InputError(f"latents must be a tensor of the shape {shape}, got {found}")
        request = pipeline.Request(
            prompts=tuple(text for text in prompts for _ in range(count)),
            negative_prompts=tuple(text for text in negatives for _ in range(count)),
            seeds=tuple((seed + i) % 2**63 for i in range(number)),
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance=guidance,
            sampler=sampler,
            styles=config.styles,
            strength=strength if picture is not None else 1.0,
            image=None if picture is None else images.cover(picture, width, height),
            mask=None if mask is None else images.cover(mask, width, height),
            latents=latents,
        )
        if pipeline.reads_mask(self) and request.mask is None:
            raise InputError(
                f"the model {config.name!r} repaints parts of pictures: give image and mask_image"
            )
        pipeline.plan(self, request)  # refuses steps and spacings that the schedule does not have
        return request

    def _size(self, picture: Image.Image | None, width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height of the pictures to make."""
        factor, own = self.config.vae.factor, self.config.sample_size
        default_width = default_height = own
        if picture is not None:
            default_width, default_height = picture.size
            area = default_width * default_height
            if area > 4 * own**2:  # the model knows no such size, and it is slow: the same shape at its own
                scale = own / math.sqrt(area)
                default_width, default_height = (max(factor, round(side * scale)) for side in picture.size)
            default_width, default_height = (
                max(factor, side // factor * factor) for side in (default_width, default_height)
            )
        width = _integer("width", default_width if width is None else width, 1)
        height = _integer("height", default_height if height is None else height, 1)
        self._check_size(width, height)
        return width, height

    def _check_size(self, width: int, height: int) -> None:
        factor = self.config.vae.factor
        for name, value in (("width", width), ("height", height)):
            if value % factor:
                below, above = value // factor * factor, (value // factor + 1) * factor
                nearest = f"nearest are {below} and {above}" if below else f"the smallest is {above}"
                raise InputError(f"{name} must be a multiple of {factor}, got {value}; {nearest}")

    def _warn_of_cut(self, texts: Sequence[str]) -> None:
        for tokenizer in self.text_encoder.tokenizers:
            for text, cut in zip(texts, tokenizer(list(texts)).cut, strict=True):
                if cut:
                    warnings.warn(
                        f"the prompt {text[:40]!r}… is longer than the {tokenizer.context_length} tokens that the"
                        f" model reads; these words are left out: {cut!r}",
                        stacklevel=4,
                    )

    def _settings(self, request: pipeline.Request, index: int) -> dict[str, Any]:
        """All that made one picture of a request, as plain values."""
        settings: dict[str, Any] = {
            "model": self.config.name,
            "prompt": request.prompts[index],
            "negative_prompt": request.negative_prompts[index],
            "seed": request.seeds[index],
            "num_inference_steps": request.num_inference_steps,
            "guidance_scale": request.guidance.scale,
            "guidance_interval": list(request.guidance.interval),
            "guidance_rescale": request.guidance.rescale,
            "sampler": request.sampler.name,
            "spacing": request.sampler.spacing,
            "eta": request.sampler.eta,
            "variance": request.sampler.variance,
            "width": request.width,
            "height": request.height,
        }
        if request.image is not None:
            settings["strength"] = request.strength
        return settings

    def train(
        self,
        data: Source | bool = True,
        stages: Sequence[StageSettings] | None = None,
        *,
        seed: int = 0,
        steps: int | None = None,
        minutes: float | None = None,
        output_dir: str | Path | None = None,
        resume: bool = True,
        return_state_dict: bool = False,
        autocast: bool = False,
        callback: Callable[[TrainStep], bool | None] | None = None,
        compiler: Callable[[nn.Module], Any] | None = None,
        observers: Sequence[Observer] = (),
        about: Mapping[str, object] | None = None,
    ) -> Any:
        """Trains the stages of a list on captioned pictures: the autoencoder, then the denoiser, unless one is given.

        With a bool instead of data it is `torch.nn.Module.train`: it sets training or evaluation mode.

        The same call again goes on where the last one stopped. The model holds the averaged (EMA) weights
        afterwards; after a stop by the callback, the weights as they were.

        Args:
            data: captioned pictures, such as a ``CocoImageLoader``.
            stages: settings of what is trained, in order (`training.stages`), such as a recipe's.
            seed: of order, noise and choice of captions.
            steps: optimizer steps of each stage. None: the stages' epochs.
            minutes: time for everything, turned into steps by measuring as it runs; not with `steps`.
            output_dir: folder of checkpoints, caches and the finished model; None: ``runs/`` and the
                configuration's name.
            resume: whether to go on from a checkpoint in `output_dir`; False begins anew.
            return_state_dict: whether to return the averaged weights.
            autocast: computes in 16 bits where the device is good at it: bfloat16 on GPUs since 2020 and CPUs with
                AVX512-BF16 or AMX, float16 on older GPUs; elsewhere float32, with a warning.
            callback: called after each step; stops by returning True, and the run can be resumed.
            compiler: compiles a stage, such as ``torch.compile``; ``torch.compile(model).train`` sets it.
            observers: called with every event (`training.events`), the plan included; True stops likewise.
            about: what else ``run.json`` is to keep beside the stages, such as the settings of the data.

        Returns:
            The averaged weights as ``load_state_dict`` takes them, or None.

        Raises:
            InputError: data that cannot be used, or an `output_dir` of another run.
        """
        if isinstance(data, bool):
            return super().train(data)
        from stable_diffusion.progress import show
        from stable_diffusion.training.run import train_model

        folder = Path("runs") / self.config.name if output_dir is None else Path(output_dir)
        progress = train_model(
            self,
            data,
            stages,
            output_dir=folder,
            seed=seed,
            steps=steps,
            minutes=minutes,
            resume=resume,
            autocast=autocast,
            compiler=compiler,
            about=about,
        )
        finished = show(progress, callback, observers) is not None
        if finished and first_process():
            self.save_pretrained(folder / "model")
        if not return_state_dict:
            return None
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    def check(
        self,
        data: Source,
        stages: Sequence[StageSettings] | None = None,
        *,
        output_dir: str | Path,
        autocast: bool = False,
    ) -> bool:
        """Learns eight of the pictures by heart and generates them from their captions; prints and returns the verdict.

        The model is of no use afterwards. Of `stages`, as in ``train``, their number of steps is not read.
        """
        from stable_diffusion.progress import show
        from stable_diffusion.training.check import Verdict, overfit

        verdict = show(overfit(self, data, stages, output_dir=Path(output_dir), autocast=autocast))
        return isinstance(verdict, Verdict) and verdict.learns


def _serve_compiled(wrapper: nn.Module, name: str, model: nn.Module | None) -> None:
    """Hands ``train`` and plain names through ``torch.compile``'s wrapper.

    The wrapper is an `nn.Module` of its own, whose methods would hide the model's: ``train(data)`` would be an
    error, and names of the state begin with ``_orig_mod.``.
    """
    if name != "_orig_mod" or not isinstance(model, DiffusionModel):
        return

    def train(data: Source | bool = True, *stages: Any, **settings: Any) -> Any:
        if isinstance(data, bool):
            model.train(data, **settings)
            return wrapper
        compiler: Any = wrapper.dynamo_ctx  # what the caller gave torch.compile
        return model.train(data, *stages, compiler=compiler, **settings)

    # Not setattr, which the wrapper passes on to the model.
    wrapper.__dict__.update(train=train, state_dict=model.state_dict, load_state_dict=model.load_state_dict)


register_module_module_registration_hook(_serve_compiled)


def _assign(name: str, module: nn.Module, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Makes `state` the module's weights, and empties it. Raises InputError where names or shapes do not fit."""
    wanted = module.state_dict()
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    wrong = [key for key in sorted(wanted.keys() & state.keys()) if wanted[key].shape != state[key].shape]
    for problem, keys in (("missing", missing), ("not expected", extra), ("of another shape", wrong)):
        if keys:
            raise InputError(
                f"the weights of {name} do not fit its configuration: {len(keys)} of {len(wanted)} tensors are"
                f" {problem} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            )
    trainable = {key: parameter.requires_grad for key, parameter in module.named_parameters()}
    # One by one, each taken from `state`: both formats of all weights are never in memory.
    module.load_state_dict({key: state.pop(key).to(dtype) for key in list(state)}, assign=True)
    for key, parameter in module.named_parameters():
        parameter.requires_grad_(trainable[key])


def _texts(name: str, value: str | Sequence[str]) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name} must be a text or a list of texts, got {value!r}")
    return list(texts)


def _integer(name: str, value: object, least: int, most: int | None = None) -> int:
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < least
        or (most is not None and value > most)
    ):
        limits = f"at least {least}" if most is None else f"from {least} to {most}"
        raise InputError(f"{name} must be a whole number, {limits}, got {value!r}")
    return value


def _number(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise InputError(f"{name} must be a number, got {value!r}")
    return float(value)


def _picture(name: str, image: Image.Image | str | Path | None) -> Image.Image | None:
    if image is None:
        return None
    if not isinstance(image, (Image.Image, str, Path)):
        raise InputError(f"{name} must be a picture or the path of one, got {image!r}")
    return images.to_rgb(image) if isinstance(image, Image.Image) else images.open_image(image)
