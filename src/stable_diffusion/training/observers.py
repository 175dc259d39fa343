"""Who is told of a training as it goes, beside the bar: a file of one line a step, and TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stable_diffusion.errors import InputError
from stable_diffusion.files import is_file, replacing, writing
from stable_diffusion.training.events import TrainStep

LINE = {"stage": str, "step": int, "losses": dict, "skipped": int, "elapsed": float}  # what is read of one
LAST = 100  # steps whose losses are averaged into a stage's figures


class JsonLines:
    """Writes a line of JSON for each step of a stage; one that is taken again replaces its line.

    Args:
        path: the file, which grows.
        elapsed: gives the seconds that the run has taken.
    """

    def __init__(self, path: Path, elapsed: Callable[[], float]) -> None:
        self.path, self.elapsed = path, elapsed
        self.stage = ""

    def __call__(self, event: object) -> None:
        if not isinstance(event, TrainStep) or event.loss is None:
            return
        if event.stage != self.stage:
            self.stage = event.stage
            self._forget(event)
        line = asdict(event)
        line |= {"images_per_second": round(event.images_per_second, 2), "elapsed": round(self.elapsed(), 3)}
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": line.pop("stage"), "step": line.pop("index"), **line}) + "\n")

    def _forget(self, event: TrainStep) -> None:
        """Leaves out what was written of this step and later ones, after the checkpoint that it goes on from."""
        with replacing(self.path) as building, building.open("w", encoding="utf-8") as file:
            for line in self.lines():
                if line["stage"] != event.stage or line["step"] < event.index:
                    file.write(json.dumps(line) + "\n")

    def lines(self) -> Iterator[dict[str, Any]]:
        """The steps so far; what is no such line, as where the run was killed within one, is left out."""
        if is_file(self.path):
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    step = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(step, dict) and all(
                    isinstance(step.get(key), kind) for key, kind in LINE.items()
                ):
                    yield step

    def figures(self, stage: str, batch_size: int) -> dict[str, object]:
        """How a stage went: steps, seconds, images/s and mean losses of the last steps."""
        lines = [line for line in self.lines() if line["stage"] == stage]
        if not lines:  # somebody removed the log
            return {"steps": 0}
        last = lines[-LAST:]
        seconds = lines[-1]["elapsed"] - lines[0]["elapsed"]
        speed = (len(lines) - 1) * batch_size / max(seconds, 1e-9)
        means = {name: sum(line["losses"][name] for line in last) / len(last) for name in last[-1]["losses"]}
        return {
            "steps": len(lines),
            "skipped": lines[-1]["skipped"],
            "seconds": round(seconds, 3),
            "images_per_second": round(speed, 2),
            "losses": means,
        }


class TensorBoard:
    """Writes losses, rates and speed for TensorBoard. Raises InputError where it is not installed."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "TensorBoard is not installed: pip install 'mini-stable-diffusion[tensorboard]'"
            ) from None
        with writing(folder):
            self.writer = SummaryWriter(str(folder))

    def __call__(self, event: object) -> None:
        if not isinstance(event, TrainStep) or event.loss is None:
            return
        values = {"loss": event.loss, "images_per_second": event.images_per_second}
        values |= {f"loss/{name}": value for name, value in event.losses.items()}
        values |= {f"learning_rate/{name}": value for name, value in event.learning_rates.items()}
        for name, value in values.items():
            self.writer.add_scalar(f"{event.stage}/{name}", value, event.index)
        if event.index + 1 == event.total:
            self.writer.flush()
