"""What a run's folder remembers: ``run.json``, with the plan by which the run goes on."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from stable_diffusion.data.cache import digest
from stable_diffusion.data.item import Entry
from stable_diffusion.errors import InputError
from stable_diffusion.files import read_json, write_json
from stable_diffusion.runtime import has_native_bf16
from stable_diffusion.training.pace import Clock

FORMAT = 2  # grows when runs of older versions can no longer go on


class RunRecord:
    """The content of ``run.json``, and the time that the run has taken, earlier calls included.

    Args:
        folder: the run's.
        identity: digest of what must be the same for a run to go on.
        facts: what else the file says of a new run.
        resume: whether to go on with the run in the folder.
        clock: gives seconds.

    Raises:
        InputError: another run is in the folder, or one of an older version.
    """

    def __init__(
        self, folder: Path, identity: str, facts: Mapping[str, object], resume: bool, clock: Clock
    ) -> None:
        self.path = folder / "run.json"
        self.content: dict[str, Any] = {"format": FORMAT, "identity": identity, **facts}
        self.content |= {"plan": {}, "figures": {}, "spent": 0.0}
        if resume and self.path.is_file():
            self.content = read_json(self.path)
        other = "another recipe or of other pictures" if self.content.get("identity") != identity else ""
        if self.content.get("format") != FORMAT:
            other = "another version, which cannot go on here"
        if other:
            raise InputError(
                f"{folder} holds a training of {other}: choose another output_dir, or resume=False to replace it"
            )
        self._clock, self._began = clock, clock() - self.content["spent"]

    def spent(self) -> float:
        """Seconds of work on the run."""
        return self._clock() - self._began

    def write(self) -> None:
        """Writes the file."""
        self.content["spent"] = round(self.spent(), 3)
        write_json(self.path, self.content)


def machine(device: torch.device, number_format: str) -> dict[str, object]:
    """Where it is computed, and with what."""
    try:
        ours = version("mini-stable-diffusion")
    except PackageNotFoundError:  # a folder of sources
        ours = "not installed"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text(encoding="utf-8").splitlines())
        name = next((value.strip() for key, _, value in lines if key.strip() == "model name"), name)
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "bf16": has_native_bf16(device),
        "number_format": number_format,
        "versions": {
            "mini-stable-diffusion": ours,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }


def fingerprint(entries: Sequence[Entry]) -> dict[str, object]:
    """What tells one set of data from another."""
    rows = [(entry.key, tuple(entry.captions), entry.weight) for entry in entries]
    return {"pictures": len(rows), "captions": sum(len(row[1]) for row in rows), "digest": digest(rows)}
