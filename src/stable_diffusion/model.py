"""DiffusionModel: the front door to generation and training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from stable_diffusion import images
from stable_diffusion.checkpoints import native
from stable_diffusion.compiled import keep_methods
from stable_diffusion.diffusion.samplers import Step
from stable_diffusion.errors import InputError, shown
from stable_diffusion.fields import typed
from stable_diffusion.files import as_path, slug
from stable_diffusion.generation import pipeline
from stable_diffusion.generation.prompt_weights import lora_weights
from stable_diffusion.generation.request import Request
from stable_diffusion.generation.sizes import check_size
from stable_diffusion.generation.text import encode_texts
from stable_diffusion.nn.text import PromptEmbeds
from stable_diffusion.parts import ModelParts
from stable_diffusion.runtime import first_process

if TYPE_CHECKING:
    from stable_diffusion.data.item import Source
    from stable_diffusion.training.events import Observer, TrainStep
    from stable_diffusion.training.stage import StageSettings


class DiffusionModel(ModelParts):
    """A latent diffusion model, which generates and trains.

    Building, reading, writing and LoRAs are those of ``ModelParts``: ``DiffusionModel("mini")``,
    ``DiffusionModel.from_pretrained(path)``, ``save_pretrained``, ``export``, ``load_lora``, ``load_vae``.
    """

    # The three blocks: pixel space, latent space, conditioning.

    @torch.no_grad()
    def encode(
        self, pictures: Image.Image | Sequence[Image.Image] | Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b c h w"]:
        """Latents of unit standard deviation for PIL images of one size, or for a tensor in [-1, 1].

        Raises:
            InputError: neither, or a size that is not a multiple of the autoencoder's factor.
        """
        self._check_weights()
        if isinstance(pictures, Image.Image):
            pictures = [pictures]
        pixels = pictures if isinstance(pictures, Tensor) else images.to_tensor(pictures)
        _check_batch("pictures", pixels, self.config.vae.in_channels)
        check_size(self.config, pixels.shape[-1], pixels.shape[-2])
        return self.vae.encode(pixels.to(self.vae.device, self.vae.dtype))

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "b c h w"], *, preview: bool = False) -> list[Image.Image]:
        """The pictures that latents stand for, such as a step's ``x0``: RGB, or RGBA where the decoder gives opacity.

        Args:
            latents: of unit standard deviation.
            preview: takes the autoencoder that was loaded for previews.

        Raises:
            InputError: no such tensor, NaN in the picture, or a preview before ``load_vae(path, preview=True)``.
        """
        self._check_weights()
        _check_batch("latents", latents, self.config.vae.latent_channels)
        if preview and not self._preview:
            raise InputError(
                "there is no autoencoder for previews: load one with load_vae(path, preview=True)"
            )
        vae = self._preview[0] if preview else self.vae
        return images.to_pil(vae.decode(latents.to(vae.device, vae.dtype)).float())

    @torch.no_grad()
    def encode_prompt(self, texts: str | Sequence[str]) -> PromptEmbeds:
        """The text tokens that the U-Net reads, with their mask and pooled vector.

        Warns, naming the words, where a text is longer than an encoder's context.
        """
        self._check_weights()
        notes: list[str] = []
        texts = [texts] if isinstance(texts, str) else list(typed(tuple[str, ...], texts, "texts"))
        if not texts:
            raise InputError("encode_prompt takes a text or a list of texts, got none")
        embeds = encode_texts(self.text_encoder, texts, notes)
        for note in notes:
            warnings.warn(note, stacklevel=3)  # of no_grad's wrapper the caller
        return embeds

    # Generation.

    def request(self, prompt: str | Sequence[str], **fields: Any) -> Request:
        """The request of this model's defaults and the given fields (see ``Request``).

        Raises:
            InputError: an unknown field, or a value that the field cannot have; ``stream`` says what the model cannot.
        """
        own = {"lora": self.adapters.weights | self.adapters.fused, **self.origin}
        given = {name: value for name, value in fields.items() if value is not None}
        return Request.of(self.config, prompt=prompt, **own | given)

    def stream(self, request: Request) -> pipeline.Steps:
        """The steps of a request; closing the generator cancels it. Its return value is the ``Result``.

        A step's ``x0`` can be decoded for a preview. Sent True after a step, the generator stops, and the pictures are
        of what the network then saw in the noise. Nothing of a call is seen by another thread's call.

        Raises:
            InputError: here, a request that this model cannot make; at a step, NaN or infinity in what its parts give.
        """
        if not isinstance(request, Request):
            raise InputError(f"stream takes a Request, such as model.request(prompt), got {request!r}")
        self._check_weights()
        request.check(self.config, self.origin)
        self.adapters.check(lora_weights(request))
        return pipeline.stream(self, request, pipeline.plan(self, request))

    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        callback: Callable[[Step], bool | None] | None = None,
        **fields: Any,
    ) -> list[Image.Image]:
        """Pictures from words; with `image` from a picture and words; with `mask_image` in a part of it.

        Every picture's ``info["settings"]`` has all that made it. What the user should know, such as words that were
        cut, is a warning.

        Args:
            prompt: what to generate; several prompts are one batch. An empty one is valid.
            negative_prompt: what to steer away from: one for all, or one for each prompt.
            callback: called after each step; stops by returning True, and what the network then sees in the noise is
                decoded.
            fields: of ``Request``: `image`, `mask_image`, `strength`, `width`, `height`, `num_inference_steps`,
                `guidance_scale`, `sampler`, `seed`, `num_images_per_prompt`, `latents` and the rest.

        Raises:
            InputError: an argument outside what ``Request`` says, or what this model cannot make.
        """
        from stable_diffusion.progress import show_steps

        request = self.request(prompt, negative_prompt=negative_prompt, **fields)
        result = show_steps(self.stream(request), request.num_inference_steps, callback)
        for note in result.notes:
            warnings.warn(note, stacklevel=2)
        return result.pictures

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
            minutes: time for the steps of all stages, measured as it runs; not with `steps`.
            output_dir: folder of checkpoints, caches and the finished model; None: ``runs/`` and the
                configuration's name.
            resume: whether to go on from a checkpoint in `output_dir`; False begins anew.
            return_state_dict: whether to return the averaged weights.
            autocast: computes in 16 bits where the device is good at it: bfloat16 on GPUs since 2020 and CPUs with
                AVX512-BF16 or AMX, float16 on older GPUs; elsewhere float32, with a warning.
            callback: called after each step; stops by returning True, and the run can be resumed.
            compiler: compiles a stage that takes long enough for it to pay, such as ``torch.compile``;
                ``torch.compile(model).train`` sets it.
            observers: called with every event (`training.events`), the plan included; True stops likewise.
            about: what else ``run.json`` is to keep beside the stages, such as the settings of the data.

        Returns:
            The averaged weights as ``load_state_dict`` takes them, or None.

        Raises:
            InputError: data that cannot be used, or an `output_dir` of another run, or one that is in use.
            KeyboardInterrupt: after the step, and saved; at once where Ctrl-C comes again. SIGTERM is as patient.
        """
        if isinstance(data, bool):
            return super().train(data)
        from stable_diffusion.progress import show
        from stable_diffusion.training.run import train_model

        self._check_own_weights()
        if not hasattr(data, "entries"):
            raise InputError(
                f"train takes captioned pictures, such as CocoImageLoader(images, captions), got {shown(data)}"
            )

        folder = Path("runs", slug(self.config.name)) if output_dir is None else as_path(output_dir)
        native.check_place(folder / "model", sum(tensor.nbytes for tensor in self.state_dict().values()))
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

        self._check_own_weights()

        verdict = show(overfit(self, data, stages, output_dir=as_path(output_dir), autocast=autocast))
        return isinstance(verdict, Verdict) and verdict.learns

    def _check_own_weights(self) -> None:
        self._check_weights()
        if self.adapters.weights:
            raise InputError(
                f"training needs the model's own weights: unload its LoRAs first ({', '.join(self.adapters.weights)})"
            )


def _check_batch(name: str, x: Tensor, channels: int) -> None:
    """Raises InputError for anything but a batch of floats with so many channels."""
    shape = tuple(x.shape) if isinstance(x, Tensor) else ()
    if len(shape) != 4 or shape[1] != channels or 0 in shape or not x.is_floating_point():
        raise InputError(
            f"{name} must be floats of the shape (b, {channels}, h, w), got {shape or shown(x)}"
            + (f" of {x.dtype}" if shape else "")
        )


keep_methods(DiffusionModel)
