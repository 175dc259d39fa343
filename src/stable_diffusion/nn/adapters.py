"""LoRA (Hu et al. 2021) and DoRA (Liu et al. 2024) as adapters, which leave a network's weights as they are.

A forward hook on each adapted layer adds the change. The weights that adapters act with belong to the call, not to
the network, so threads that share a network do not see each other's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stable_diffusion.errors import InputError, unknown_name

Layer = nn.Linear | nn.Conv2d

# What `active` was given in this context (a thread, or a task of asyncio's), by the identity of the adapters.
_ACTIVE: ContextVar[dict[int, dict[str, float]] | None] = ContextVar("active", default=None)


class LoRA(nn.Module):
    """One layer's low-rank change: scale · up · down, with DoRA's magnitudes where there are some.

    Args:
        up: (out, rank), with or without the axes of a 1x1 kernel.
        down: (rank, in), with the layer's kernel.
        mid: (rank, rank) with the layer's kernel, in a Tucker decomposition; `down` is 1x1 then.
        scale: alpha over rank.
        magnitude: DoRA's norms: a column for norms over each output's weights, a row for each input's.
    """

    up: Tensor
    down: Tensor
    mid: Tensor | None
    magnitude: Tensor | None

    def __init__(
        self,
        up: Tensor,
        down: Tensor,
        *,
        mid: Tensor | None = None,
        scale: float = 1.0,
        magnitude: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        for name, tensor in (("up", up.flatten(1)), ("down", down), ("mid", mid), ("magnitude", magnitude)):
            self.register_buffer(name, tensor, persistent=False)  # a saved model holds no adapters

    def forward(self, layer: Layer, x: Tensor, weight: float) -> Tensor:
        """What a plain change, times `weight`, adds to the layer's output for `x`."""
        down = self.down.to(x.dtype)
        if self.mid is None:
            hidden = _run(layer, x, down)
        else:
            hidden = _run(layer, _pointwise(x, down, layer), self.mid.to(x.dtype))
        return _pointwise(weight * self.scale * hidden, self.up.to(x.dtype), layer)

    @torch.no_grad()
    def merged(self, original: Tensor, weight: float) -> Tensor:
        """W + weight · ΔW; with magnitudes the part `weight` of the way to magnitude · (W + ΔW) / norm(W + ΔW).

        Raises ValueError or RuntimeError where the shapes do not fit.
        """
        up, down = self.up.to(original), self.down.to(original)
        if self.mid is None:
            change = (up @ down.flatten(1)).unflatten(1, down.shape[1:])
        else:  # Tucker decomposition: both are 1x1, the kernel is in the middle
            change = torch.einsum("oa,abkl,bi->oikl", up, self.mid.to(original), down.flatten(1))
        if _kernel(change).shape != _kernel(original).shape:
            raise ValueError(f"{tuple(_kernel(change).shape)} for {tuple(_kernel(original).shape)}")
        change = change.reshape(original.shape)
        if self.magnitude is None:
            return original + weight * self.scale * change
        full = original + self.scale * change
        axis = int(self.magnitude.shape[0] == 1)
        norm = torch.linalg.vector_norm(full, dim=[d for d in range(full.ndim) if d != axis], keepdim=True)
        magnitude = self.magnitude.to(full).reshape(norm.shape)
        full = magnitude * full / norm.clamp_min(torch.finfo(full.dtype).tiny)
        return torch.lerp(original, full, weight)


def _kernel(weight: Tensor) -> Tensor:
    """A weight as a convolution's; a linear layer's is that of a 1x1 convolution."""
    return weight.reshape((*weight.shape, 1, 1)[:4])


def _run(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What the layer does, with other weights. A 1x1 convolution may be given tokens (``blocks.PerPixel``)."""
    if isinstance(layer, nn.Linear) or x.ndim == 3:
        return F.linear(x, weight.flatten(1), bias)
    return F.conv2d(x, _kernel(weight), bias, layer.stride, layer.padding, layer.dilation)


def _pointwise(x: Tensor, matrix: Tensor, layer: Layer) -> Tensor:
    """A 1x1 convolution of what the layer reads."""
    tokens = isinstance(layer, nn.Linear) or x.ndim == 3
    return F.linear(x, matrix.flatten(1)) if tokens else F.conv2d(x, _kernel(matrix.flatten(1)))


class _Place(nn.Module):
    """The adapters of one layer in the order of loading, and its own weight while some are fused into it."""

    own: Tensor | None

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layers = (layer,)  # in a tuple: no part of this module
        self.names: list[str] = []
        self.loras = nn.ModuleList()
        self.register_buffer("own", None, persistent=False)

    def among(self, weights: Mapping[str, float]) -> list[tuple[LoRA, float]]:
        """The adapters that act, with their weights."""
        return [
            (lora, weight)
            for name, lora in zip(self.names, self.loras, strict=True)
            if isinstance(lora, LoRA) and (weight := weights.get(name, 0.0)) != 0
        ]

    def merged(self, weights: Mapping[str, float]) -> Tensor:
        """The layer's weight with the adapters' changes, computed in float32 or wider."""
        weight = self.layers[0].weight.detach()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for lora, amount in self.among(weights):
            wide = lora.merged(wide, amount)
        return wide.to(weight.dtype)

    def forward(self, x: Tensor, output: Tensor, weights: Mapping[str, float]) -> Tensor | None:
        """The layer's output with the adapters' changes; None where none acts."""
        acting, (layer,) = self.among(weights), self.layers
        if any(lora.magnitude is not None for lora, _ in acting):  # the norm needs the whole weight
            bias = None if layer.bias is None else layer.bias.to(x.dtype)
            return _run(layer, x, self.merged(weights).to(x.dtype), bias)
        for lora, weight in acting:
            output = output + lora(layer, x, weight)
        return output if acting else None


class Adapters(nn.Module):
    """A model's adapters under their names.

    Plain ones add up in any order; one with magnitudes sees what was loaded before it. Adding, removing, fusing and
    unfusing are not for while another thread's call runs; ``active`` is.

    Attributes:
        weights: what each adapter acts with where a call says nothing, in the order of loading; can be changed.
        fused: the adapters that are in the layers' weights, and how strongly.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, float] = {}
        self.fused: dict[str, float] = {}
        self.places = nn.ModuleList()
        self._hooks: list[RemovableHandle] = []
        self._guards: list[RemovableHandle] = []

    def add(self, name: str, loras: Mapping[Layer, LoRA], weight: float = 1.0) -> None:
        """Adds an adapter: what acts on each layer. Raises InputError where there is one of that name."""
        if name in self.weights:
            raise InputError(f"there is a LoRA named {name!r} already: give another name, or unload that one")
        self.weights[name] = checked(name, weight)
        places = {place.layers[0]: place for place in self._places()}
        for layer, lora in loras.items():
            if (place := places.get(layer)) is None:
                place = _Place(layer)
                self.places.append(place)
                self._hooks.append(layer.register_forward_hook(partial(self._act, place)))
            place.names.append(name)
            place.loras.append(lora)

    def remove(self, name: str) -> None:
        """Takes an adapter away. Raises InputError for one that is fused, or not there."""
        self._known({name: 0.0})
        if name in self.fused:
            raise InputError(f"the LoRA {name!r} is fused: unfuse before you unload it")
        del self.weights[name]
        for i, place in reversed(list(enumerate(self._places()))):
            if name in place.names:
                index = place.names.index(name)
                del place.names[index], place.loras[index]
            if not place.names:
                self._hooks.pop(i).remove()
                del self.places[i]

    def check(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The weights, as ``active`` takes them.

        Raises:
            InputError: an unknown name, not a number, or another weight than a fused adapter was fused with.
        """
        weights = self._known(weights)
        for name, weight in self.fused.items():
            if weights.get(name, 0.0) != weight:
                raise InputError(f"the LoRA {name!r} is fused with the weight {weight}: unfuse for another")
        return weights

    @contextmanager
    def active(self, weights: Mapping[str, float]) -> Iterator[None]:
        """Lets adapters act with these weights in the calls inside, of this context alone; those not named rest.

        Not to be held across the yield of a generator, whose caller would be inside, too. Raises InputError as
        ``check`` does.
        """
        token = _ACTIVE.set({**(_ACTIVE.get() or {}), id(self): self.check(weights)})
        try:
            yield
        finally:
            _ACTIVE.reset(token)

    def fuse(self, weights: Mapping[str, float] | None = None, *, keep: bool = True) -> None:
        """Puts changes into the layers' weights, which costs memory for those instead of time; ``unfuse`` undoes it.

        Args:
            weights: which adapters, and how strongly; None for all, each with its own weight.
            keep: whether to keep the layers' own weights, without which nothing is undone.

        Raises:
            InputError: a name that is not there, not a number, or weights that would become infinite. Nothing is fused.
        """
        chosen = self._known(self.weights if weights is None else weights)
        self.unfuse()
        merged = {place: place.merged(chosen) for place in self._places() if place.among(chosen)}
        if not all(torch.isfinite(tensor).all() for tensor in merged.values()):
            raise InputError(f"the LoRAs {', '.join(chosen)} would make the weights infinite: lower theirs")
        for place, tensor in merged.items():
            weight = place.layers[0].weight
            place.own = weight.detach() if keep else None
            weight.data = tensor  # not written in place: the old one may be a file's pages
            guard = place.layers[0].register_load_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]
            self._guards.append(guard)
        self.fused = {name: weight for name, weight in chosen.items() if weight != 0}

    def unfuse(self) -> None:
        """Gives the layers the very weights back that they had before ``fuse``.

        They are kept, and follow the model to other devices and number formats: after ``fuse``, ``to`` and
        ``unfuse`` a layer has what ``to`` alone would have given it. Raises InputError where they were not kept.
        """
        kept = [place for place in self._places() if place.own is not None]
        if self.fused and not kept:
            raise InputError("the LoRAs were fused for good (keep=False): load the model again")
        for place in kept:
            assert place.own is not None
            place.layers[0].weight.data, place.own = place.own, None
        while self._guards:
            self._guards.pop().remove()
        self.fused = {}

    def note(self) -> str | None:
        """What a saved model has of the adapters, in a sentence for the user; None where there are none."""
        if self.fused:
            parts = ", ".join(f"{name!r} ({weight})" for name, weight in self.fused.items())
            return f"The weights are written with the fused LoRAs {parts}."
        return "The LoRAs are not written: fuse them to have them in the weights." if self.weights else None

    def _act(
        self, place: _Place, _layer: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        weights = (_ACTIVE.get() or {}).get(id(self), self.weights)
        if self.fused:
            weights = {name: weight for name, weight in weights.items() if name not in self.fused}
        return place(args[0], output, weights)

    def _places(self) -> list[_Place]:
        return [place for place in self.places if isinstance(place, _Place)]

    def _known(self, weights: Mapping[str, float]) -> dict[str, float]:
        for name in weights:
            if name not in self.weights:
                raise unknown_name("LoRA", name, self.weights)
        return {name: checked(name, weight) for name, weight in weights.items()}


def _refuse(*_: object) -> None:
    """Keeps other weights out of a layer, whose LoRAs they would end and whose own ones would come back over them."""
    raise InputError("there are LoRAs fused into the weights: unfuse them before you load others")


def checked(name: str, weight: object) -> float:
    """An adapter's weight. Raises InputError where it is not a finite number."""
    if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not math.isfinite(weight):
        raise InputError(f"a LoRA's weight must be a number, got {weight!r} for {name!r}")
    return float(weight)
