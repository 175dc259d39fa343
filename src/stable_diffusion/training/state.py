"""All that a step changes, and the checkpoint that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stable_diffusion.checkpoints.files import write_tensors
from stable_diffusion.errors import InputError
from stable_diffusion.files import reading
from stable_diffusion.training.stage import Player


class TrainState:
    """Each player's weights, their average and its optimizer's moments, and the counts.

    Args:
        players: who is trained.
        autocast: number format of the forward pass; None is float32.
    """

    def __init__(self, players: Mapping[str, Player], autocast: torch.dtype | None) -> None:
        self.players = players
        self.parameters = {name: p for player in players.values() for name, p in player.parameters.items()}
        self.device = next(iter(self.parameters.values())).device
        averaged = [player for player in players.values() if player.ema_decay is not None]
        self.average = {name: p.detach().clone() for one in averaged for name, p in one.parameters.items()}
        self.optimizers = {name: _adamw(player, self.device) for name, player in players.items()}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=autocast == torch.float16)
        self.step = 0  # the next one
        self.skipped = 0

    def update(self, rates: Mapping[str, float]) -> bool:
        """Steps all players, each at its rate, unless a gradient is not finite. Returns whether it did."""
        finite = True
        for name, player in self.players.items():
            self.scaler.unscale_(self.optimizers[name])
            norm = torch.nn.utils.clip_grad_norm_(player.parameters.values(), player.settings.max_grad_norm)
            finite &= bool(torch.isfinite(norm))
        for name, player in self.players.items():
            optimizer = self.optimizers[name]
            if finite:
                for group in optimizer.param_groups:
                    group["lr"] = rates[name]
                self.scaler.step(optimizer)
                self._average(player)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.step += 1
        self.skipped += not finite
        return finite

    def _average(self, player: Player) -> None:
        if player.ema_decay is not None:
            decay = min(player.ema_decay, (1 + self.step) / (10 + self.step))
            means = [self.average[name] for name in player.parameters]
            torch._foreach_lerp_(means, [p.detach() for p in player.parameters.values()], 1 - decay)

    @torch.no_grad()
    def take_average(self) -> None:
        """Puts the averages in the place of the weights."""
        for name, mean in self.average.items():
            self.parameters[name].copy_(mean)

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """What the optimizers keep of each parameter; empty before their first step."""
        return {
            name: self.optimizers[key].state[parameter]
            for key, player in self.players.items()
            for name, parameter in player.parameters.items()
        }

    def save(self, path: Path) -> None:
        """Writes everything."""
        tensors: dict[str, Tensor] = {f"average.{name}": mean for name, mean in self.average.items()}
        tensors |= {f"weights.{name}": p.detach() for name, p in self.parameters.items()}
        for name, fields in self._moments().items():
            tensors |= {f"optimizer.{field}.{name}": value for field, value in fields.items()}
        counts = {"step": self.step, "skipped": self.skipped, "scale": self.scaler.get_scale()}
        write_tensors(path, tensors, metadata={key: str(value) for key, value in counts.items()})

    def load(self, path: Path) -> None:
        """Restores what ``save`` wrote. Raises InputError for a file that is cut, or of something else."""
        with reading(path), path.open("rb"):  # safetensors calls a file that may not be read missing
            pass
        try:
            self._load(path)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"the checkpoint {path} is damaged ({error}): delete it, and its stage begins anew"
            ) from None

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            for kind, tensors in (("weights", self.parameters), ("average", self.average)):
                for name, tensor in tensors.items():
                    value = file.get_tensor(f"{kind}.{name}")
                    if value.shape != tensor.shape:
                        raise ValueError(f"{kind}.{name} is {[*value.shape]} instead of {[*tensor.shape]}")
                    tensor.copy_(value)
            moments, counts = self._moments(), file.metadata()
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                kind, _, rest = key.partition(".")
                if kind == "optimizer":
                    field, _, name = rest.partition(".")
                    value, parameter = file.get_tensor(key).to(self.device), self.parameters[name]
                    if value.shape == parameter.shape:
                        value = torch.empty_like(parameter).copy_(value)  # in its memory format
                    moments[name][field] = value
        self.step, self.skipped = int(counts["step"]), int(counts["skipped"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": float(counts["scale"])})


def _adamw(player: Player, device: torch.device) -> torch.optim.AdamW:
    matrices = [p for p in player.parameters.values() if p.ndim > 1]
    others = [p for p in player.parameters.values() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    decay, fused = player.settings.weight_decay, device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, weight_decay=decay, betas=(0.9, 0.99), fused=fused)
