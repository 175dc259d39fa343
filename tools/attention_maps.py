"""Makes a figure of where a model looks for each word of a prompt: the picture, then a map for every word.

    python tools/attention_maps.py docs/attention.png "a red drum and a blue fox, noto style"
    python tools/attention_maps.py OUT.png PROMPT --model MODEL --seed 1 --side 8

The U-Net's cross-attention at one resolution, by default the finest that it has: the mean over heads, layers and steps
of what each place reads of a word's tokens (Tang et al. 2022, "What the DAAM"), each map from its least (dark) to its
most (as the picture is). One row for each text encoder.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stable_diffusion import DiffusionModel
from stable_diffusion.errors import InputError
from stable_diffusion.generation.text import with_style
from stable_diffusion.nn.blocks import Attention, TransformerBlock
from stable_diffusion.nn.tokenizer import Tokenizer

SIDE, TEXT, GAP, DARK = 128, 18, 8, 0.12
Maps = dict[int, list[Tensor]]
"""By the side of the feature maps: what each place reads of each token, ``places tokens``."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="picture to write")
    parser.add_argument("prompt")
    parser.add_argument("--model", help="a model folder; by default the model that the package carries")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, help="of the feature maps, such as 8")
    options = parser.parse_args(arguments)
    try:
        draw(DiffusionModel.from_pretrained(options.model), options.prompt, options.seed, options.side).save(
            options.out
        )
    except InputError as error:
        parser.error(str(error))
    print(options.out)


@contextmanager
def watched(model: DiffusionModel) -> Iterator[Maps]:
    """Fills the maps, at every call of the U-Net within it, with the last picture's of each cross-attention."""
    maps: Maps = defaultdict(list)

    def look(attention: Any, inputs: tuple[Any, ...]) -> None:
        assert isinstance(attention, Attention)
        x, (key, _), mask = inputs
        query, key = (
            rows[-1].unflatten(-1, (attention.num_heads, -1)).transpose(0, 1).float()  # head places width
            for rows in (attention.to_q(x), key)
        )
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[-1], -torch.inf)
        maps[isqrt(len(x[0]))].append(scores.softmax(dim=-1).mean(dim=0).cpu())

    blocks = [block for block in model.unet.modules() if isinstance(block, TransformerBlock)]
    hooks = [block.attn2.register_forward_pre_hook(look) for block in blocks if block.attn2 is not None]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def spans(tokenizer: Tokenizer, words: Sequence[str]) -> list[slice]:
    """The tokens of each word of a prompt, behind the one that begins it."""
    lengths = tokenizer(list(words)).attention_mask.sum(dim=1) - 2
    return [slice(*ends) for ends in pairwise(accumulate(lengths.tolist(), initial=1))]


def draw(model: DiffusionModel, prompt: str, seed: int, side: int | None = None) -> Image.Image:
    """The figure. Raises InputError for a model without cross-attention, or without any at that side."""
    size = model.config.sample_size
    with watched(model) as found:
        (picture,) = model.generate(prompt, seed=seed, width=size, height=size)
    if not found:
        raise InputError(f"{model.config.name!r} has no cross-attention: its U-Net reads no tokens")
    if side not in (None, *found):
        sides = ", ".join(map(str, sorted(found)))
        raise InputError(
            f"{model.config.name!r} has cross-attention at the sides {sides}: choose one of them"
        )
    side = max(found) if side is None else side
    weights = torch.stack(found[side]).mean(dim=0).unflatten(0, (side, side))  # y x tokens
    words = with_style(prompt, model.config.styles).split()
    tokenizers = model.text_encoder.tokenizers
    figure = Image.new(
        "RGB", ((SIDE + GAP) * (len(words) + 1), (SIDE + TEXT + GAP) * len(tokenizers)), "white"
    )
    pen, font, first = ImageDraw.Draw(figure), ImageFont.load_default(12), 0
    large = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    for row, tokenizer in enumerate(tokenizers):
        top = row * (SIDE + TEXT + GAP)
        figure.paste(large, (0, top))
        for place, (word, tokens) in enumerate(zip(words, spans(tokenizer, words), strict=True), 1):
            own = weights[..., first : first + tokenizer.context_length][..., tokens].sum(dim=-1)
            left = place * (SIDE + GAP)
            figure.paste(shaded(large, own), (left, top))
            pen.text((left, top + SIDE + 2), word, "black", font)
        first += tokenizer.context_length
    return figure


def shaded(picture: Image.Image, weights: Tensor) -> Image.Image:
    """The picture, dark where the weights are small."""
    light = (weights - weights.min()) / (weights.max() - weights.min()).clamp(min=1e-9)
    grey = Image.fromarray(np.uint8(255 * (DARK + (1 - DARK) * light.numpy())))
    mask = grey.resize(picture.size, Image.Resampling.BICUBIC)
    return Image.composite(picture, Image.new("RGB", picture.size), mask)


if __name__ == "__main__":
    main()
