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
from stable_diffusion.checkpoints import Checkpoint, embeddings, lora, native, taesd
from stable_diffusion.checkpoints.checkpoint import packaged
from stable_diffusion.checkpoints.files import building
from stable_diffusion.config import Guidance, ModelConfig, SamplerConfig, preset
from stable_diffusion.diffusion.names import sampler_name
from stable_diffusion.diffusion.samplers import Step
from stable_diffusion.diffusion.schedule import Schedule
from stable_diffusion.errors import InputError
from stable_diffusion.generation import pipeline
from stable_diffusion.nn.adapters import Adapters
from stable_diffusion.nn.text import PromptEmbeds, PromptEncoder
from stable_diffusion.nn.tokenizer import Tokenizer
from stable_diffusion.nn.unet import UNet
from stable_diffusion.nn.vae import AutoencoderKL, AutoencoderTiny, autoencoder
from stable_diffusion.runtime import first_process, watched

if TYPE_CHECKING:
    from stable_diffusion.data.item import CaptionedImages
    from stable_diffusion.training.loop import TrainStep


class DiffusionModel(nn.Module):
    """A latent diffusion model: ``vae``, ``unet``, ``text_encoder`` and ``scheduler`` behind one door.

    Args:
        config: a configuration whose text encoders the package carries, or the name of such a preset (``mini``). The
            networks start from random weights, the text encoders from their own. The presets ``sd15`` and ``sd21``
            read a vocabulary from files: load those with ``from_pretrained``.

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
        with building(f"no network has the configuration of {model.config.name!r}"):
            model._build(checkpoint.tokenizers)
        checkpoint.fill(model.vae, model.unet, model.text_encoder, dtype)
        return model

    def save_pretrained(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes a model folder (see `checkpoints.native`), replacing one that is there.

        LoRAs are written only where they are fused into the weights; a warning says which it is.

        Args:
            path: the folder.
            dtype: number format of the files, such as ``torch.float16``; None keeps the weights'.

        Raises:
            InputError: there is something else at `path`.
        """
        native.write(Path(path), self._to_checkpoint(), dtype)

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
        for note in checkpoints.export(Path(path), self._to_checkpoint(), format, dtype):
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
        path = Path(path)
        loras, count = lora.read(path, self.unet, self.text_encoder, self.config, weight)
        self.adapters.add(path.stem if name is None else name, loras, weight)
        return count

    def unload_lora(self, name: str) -> None:
        """Forgets a LoRA. Raises InputError for one that is fused, or not there."""
        self.adapters.remove(name)

    def fuse_lora(self, weights: Mapping[str, float] | None = None) -> None:
        """Puts LoRAs into the weights, for speed and for saving (see `nn.adapters.Adapters.fuse`)."""
        self.adapters.fuse(weights)

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
        vae = taesd.load(Path(path), self.config, self.unet)
        if preview:
            self._preview = (vae,)  # in a tuple: no part of the model's state
            return
        self.vae = vae.train(self.vae.training)
        size = (
            self.config.sample_size // self.config.vae.factor * vae.config.factor
        )  # the U-Net keeps its size of latents
        self.config = dataclasses.replace(self.config, vae=vae.config, sample_size=size)

    def _to_checkpoint(self) -> Checkpoint:
        """The model as it is written. Warns where there are LoRAs."""
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
        data: CaptionedImages | bool = True,
        *,
        steps: int | None = None,
        minutes: float | None = None,
        output_dir: str | Path | None = None,
        resume: bool = True,
        return_state_dict: bool = False,
        autocast: bool = False,
        callback: Callable[[TrainStep], bool | None] | None = None,
        compiler: Callable[[nn.Module], nn.Module] | None = None,
    ) -> Any:
        """Trains the autoencoder, then the denoiser, on captioned pictures, by the configuration's recipe.

        With a bool instead of data it is `torch.nn.Module.train`: it sets training or evaluation mode.

        The same call again goes on where the last one stopped. The model holds the averaged (EMA) weights
        afterwards; after a stop by the callback, the weights as they were.

        Args:
            data: captioned pictures, such as a ``CocoImageLoader``.
            steps: optimizer steps of each stage. None: the recipe's passes over the data.
            minutes: time for all stages together, turned into steps by a measurement; not with `steps`.
            output_dir: folder of checkpoints, caches and the finished model; None: ``runs/`` and the
                configuration's name.
            resume: whether to go on from a checkpoint in `output_dir`; False begins anew.
            return_state_dict: whether to return the averaged weights.
            autocast: computes in 16 bits where the device is good at it: bfloat16 on GPUs since 2020 and CPUs with
                AVX512-BF16 or AMX, float16 on older GPUs; elsewhere float32, with a warning.
            callback: called after each step; stops by returning True, and the run can be resumed.
            compiler: compiles a stage; ``torch.compile(model).train`` sets it.

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
            output_dir=folder,
            steps=steps,
            minutes=minutes,
            resume=resume,
            autocast=autocast,
            compiler=compiler,
        )
        finished = show(progress, callback) is not None
        if finished and first_process():
            self.save_pretrained(folder / "model")
        if not return_state_dict:
            return None
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}

    def check(self, data: CaptionedImages, *, output_dir: str | Path, autocast: bool = False) -> bool:
        """Learns eight of the pictures by heart and draws them from their captions; prints and returns the verdict.

        The model must be made from ``training.check.check_config``. It is of no use afterwards.
        """
        from stable_diffusion.progress import show
        from stable_diffusion.training.check import Verdict, overfit

        verdict = show(overfit(self, data, Path(output_dir), autocast=autocast))
        return isinstance(verdict, Verdict) and verdict.learns


def _serve_compiled(wrapper: nn.Module, name: str, model: nn.Module | None) -> None:
    """Hands ``train`` and plain names through ``torch.compile``'s wrapper.

    The wrapper is an `nn.Module` of its own, whose methods would hide the model's: ``train(data)`` would be an
    error, and names of the state begin with ``_orig_mod.``.
    """
    if name != "_orig_mod" or not isinstance(model, DiffusionModel):
        return

    def train(data: CaptionedImages | bool = True, **settings: Any) -> Any:
        if isinstance(data, bool):
            model.train(data, **settings)
            return wrapper
        compiler: Any = wrapper.dynamo_ctx  # what the caller gave torch.compile
        return model.train(data, compiler=compiler, **settings)

    # Not setattr, which the wrapper passes on to the model.
    wrapper.__dict__.update(train=train, state_dict=model.state_dict, load_state_dict=model.load_state_dict)


register_module_module_registration_hook(_serve_compiled)


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
