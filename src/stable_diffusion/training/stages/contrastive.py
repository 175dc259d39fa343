"""The contrastive stage: a CLIP text encoder learns which of a batch's pictures a caption is of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from stable_diffusion.data.cache import Array
from stable_diffusion.data.swaps import swapped
from stable_diffusion.diffusion.schedule import FLOAT64
from stable_diffusion.errors import InputError
from stable_diffusion.nn.blocks import UNET_NORM_EPS, Downsample, ResnetBlock
from stable_diffusion.nn.norms import GroupNorm
from stable_diffusion.nn.text import PromptEncoder
from stable_diffusion.training.compute import gathered
from stable_diffusion.training.draw import FLOAT32, Draw, Samples
from stable_diffusion.training.events import TrainStep
from stable_diffusion.training.stage import Batch, Stage, StageSettings
from stable_diffusion.training.workspace import TrainableParts, Workspace, latent_shape

WIDTH = 256  # of the space in which pictures and captions meet
SCALE = 1 / 0.07  # of the logits at first; it is learned (Radford et al. 2021, section 2.5)
MOST = 100.0  # that it grows to (likewise)


@dataclass(frozen=True, kw_only=True)
class ContrastiveSettings(StageSettings):
    """Settings of the stage ``contrastive``."""

    kind: str = "contrastive"
    learning_rate: float = 1e-3
    batch_size: int = 128
    epochs: float = 4.0
    """Over the pictures, each time with one of their captions, unless steps or minutes are given."""
    weight_decay: float = 0.1


class ImageTower(nn.Sequential):
    """Latents to a vector. What is where stays apart to the last layer, since captions say it."""

    def __init__(self, channels: int, widths: Sequence[int] = (64, 128, 256), side: int = 4) -> None:
        blocks: list[nn.Module] = []
        for c_in, c_out in pairwise(widths):
            blocks += [ResnetBlock(c_in, c_out, groups=8, eps=UNET_NORM_EPS), Downsample(c_out)]
        super().__init__(
            nn.Conv2d(channels, widths[0], 3, padding=1),
            *blocks[:-1],
            GroupNorm(8, widths[-1], UNET_NORM_EPS),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(side),
            nn.Flatten(),
            nn.Linear(widths[-1] * side**2, WIDTH, bias=False),
        )


class ContrastiveStage(Stage):
    """Symmetric cross-entropy of captions and pictures (Radford et al. 2021, figure 3), the latter as latents.

    Captions with two colours bring one more negative, the same with its colours swapped (Yuksekgonul et al. 2023,
    section 4): in a batch of other things it is the only one that asks which thing has which colour.

    The text encoder alone is kept. It is trained as a copy, and may be frozen in all other stages.
    """

    share = 0.4
    latents: Array  # b c h w, float16
    captions_of: Sequence[Sequence[int]]  # numbers of each picture's captions
    said: Array  # the same as a table, with -1 behind the last one

    def __init__(self, parts: TrainableParts, settings: ContrastiveSettings) -> None:
        super().__init__(settings)
        prompts = parts.text_encoder
        clips = [i for i, config in enumerate(prompts.configs) if config.architecture == "clip"]
        if len(clips) != 1:
            raise InputError(
                f"the stage {settings.name!r} trains a model's one CLIP text encoder, but {parts.config.name!r} has"
                f" {len(clips) or 'none'}"
            )
        ((i,), self.latent_shape) = clips, latent_shape(parts.config)
        self.trained = (prompts.encoders[i],)  # in a tuple, since the copy is trained
        config, self.tokenizer = replace(prompts.configs[i], trainable=True), prompts.tokenizers[i]
        with torch.random.fork_rng(devices=[]):  # the same start, whatever was sampled before
            torch.manual_seed(0)
            self.text_encoder = PromptEncoder((config,), [self.tokenizer], config.hidden_size)
            self.text_projection = nn.Linear(config.hidden_size, WIDTH, bias=False)
            self.image_tower = ImageTower(self.latent_shape[0])
        self.logit_scale = nn.Parameter(torch.tensor(math.log(SCALE)))
        self.to(parts.unet.device, torch.float32)

    def prepare(self, workspace: Workspace) -> Iterator[TrainStep]:
        """Encodes the pictures; the copy is the text encoder as it is now."""
        self.text_encoder.encoders[0].load_state_dict(self.trained[0].state_dict())
        self.latents = yield from workspace.latents()
        self.captions, self.captions_of = workspace.captions, workspace.captions_of
        self.samples = Samples(len(self.latents), [entry.weight for entry in workspace.kept])
        self.number = {caption: i for i, caption in enumerate(self.captions)}
        most = max(map(len, self.captions_of))
        self.said = np.array([[*own, *[-1] * (most - len(own))] for own in self.captions_of])

    def batch(self, draw: Draw) -> Batch:
        """Latents, the numbers of all of each picture's captions, and the captions: one of each, then swapped ones."""
        indices = draw.indices(self.samples)
        lots = draw.share(torch.rand(draw.batch_size, generator=draw.generator(), **FLOAT64)).tolist()
        own = [self.captions_of[index] for index in indices]
        numbers = [some[int(lot * len(some))] for some, lot in zip(own, lots, strict=True)]
        texts = [self.captions[number] for number in numbers]
        swaps = [*filter(None, map(swapped, texts))]
        numbers += [self.number.get(swap, 0) for swap in swaps]  # the empty caption is no picture's
        latents = torch.from_numpy(self.latents[indices]).to(self.device).float()
        return self._tensors(latents, self.said[indices], numbers, texts + swaps)

    def example(self, count: int) -> Batch:
        """Random latents with the empty caption."""
        latents = torch.randn(count, *self.latent_shape, **FLOAT32)
        return self._tensors(latents, np.arange(count)[:, None], [*range(count)], [""] * count)

    def _tensors(self, latents: Tensor, said: Array, numbers: list[int], texts: list[str]) -> Batch:
        tokens = self.tokenizer(texts)
        # The state at the end token has read nothing behind it.
        length = int(tokens.attention_mask.sum(dim=1).max())
        text = tokens.input_ids[:, :length], tokens.attention_mask[:, :length]
        rest = torch.from_numpy(said), torch.tensor(numbers, device="cpu"), *text
        return (*self.placed(latents), *(value.to(self.device) for value in rest))

    def forward(
        self,
        latents: Float[Tensor, "b c h w"],
        said: Int[Tensor, "b m"],
        captions: Int[Tensor, " n"],
        input_ids: Int[Tensor, "n t"],
        attention_mask: Bool[Tensor, "n t"],
    ) -> dict[str, Tensor]:
        count = len(latents)
        images = gathered(unit(self.image_tower(latents)))
        embeds = self.text_encoder.read(0, input_ids, attention_mask)
        texts, captions = (
            torch.cat([gathered(rows[:count]), gathered(rows[count:])])  # pairs first, of all processes
            for rows in (unit(self.text_projection(embeds.pooled)), captions)
        )
        true = (gathered(said)[:, :, None] == captions).any(dim=1)
        with torch.no_grad():
            self.logit_scale.clamp_(max=math.log(MOST))
        return {"contrastive": contrast(images, texts, true, self.logit_scale.exp())}

    def finish(self, done: bool) -> None:
        """Gives the model its text encoder."""
        self.trained[0].load_state_dict(self.text_encoder.encoders[0].state_dict())


def unit(x: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
    """Of length 1, in float32 or better."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)


def contrast(
    images: Float[Tensor, "b d"],
    texts: Float[Tensor, "n d"],
    true: Bool[Tensor, "b n"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Cross-entropy of each picture's text among all, and of each text's picture (Radford et al. 2021, figure 3).

    Args:
        images: of length 1.
        texts: likewise: text i is of picture i, and those behind the last picture are of none.
        true: which texts are true of which pictures; such a pair, if not of one number, is left out of both sums.
        scale: of the cosines.
    """
    with torch.autocast(images.device.type, enabled=False):
        logits = scale * images @ texts.T
        others = true & ~torch.eye(*true.shape, dtype=torch.bool, device=true.device)
        logits = logits.masked_fill(others, -torch.inf)
        pairs = torch.arange(len(images), device=images.device)
        by_image = F.cross_entropy(logits, pairs)
        return (by_image + F.cross_entropy(logits[:, : len(images)].T, pairs)) / 2
