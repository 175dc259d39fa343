"""What loading costs: seconds and anonymous memory, from a full-size Stable Diffusion 1.5 folder in fp16 to fp32.

    python -m benchmarks.loading [--runs 5] [--quick]

Beside it, in processes of their own that take turns: reading the files from a warm cache with the cast to float32
alone, and diffusers. Memory is the peak of RssAnon (Linux) above what the process had before, over the weights' size
in float32. The folder holds random weights, takes 2.1 GB of temporary disk, and loading takes 4.3 GB of memory.
`--quick` loads a small model once each, in one process: it shows that all three load, not what loading costs.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stable_diffusion.checkpoints import Checkpoint, diffusers
from stable_diffusion.checkpoints.checkpoint import packaged
from stable_diffusion.config import SD15, ModelConfig
from stable_diffusion.nn.text import TextEncoder
from stable_diffusion.nn.tokenizer import Tokenizer
from stable_diffusion.nn.unet import UNet
from stable_diffusion.nn.vae import AutoencoderKL

TIME_LIMIT = 1.5
"""Times reading and cast."""
MEMORY_LIMIT = 1.15
"""Times the weights in memory."""

SMALL = replace(
    SD15,
    vae=replace(SD15.vae, block_out_channels=(32, 32, 32, 32)),
    unet=replace(SD15.unet, block_out_channels=(32, 32, 32, 32), cross_attention_dim=64),
    text_encoders=(
        replace(
            SD15.text_encoders[0],
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
        ),
    ),
)
"""Stable Diffusion 1.5 in all but widths."""


def write_folder(folder: Path, config: ModelConfig) -> None:
    """A diffusers folder of that model, with random fp16 weights."""
    generator = torch.Generator().manual_seed(0)

    def random(module: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {
            name: torch.empty(tensor.shape, dtype=torch.float16).normal_(generator=generator).mul_(0.02)
            for name, tensor in module.state_dict().items()
        }

    text = config.text_encoders[0]
    with torch.device("meta"):
        modules = (AutoencoderKL(config.vae), UNet(config.unet), TextEncoder(text))  # type: ignore[arg-type]
    vae, unet, encoder = map(random, modules)
    tokenizer = Tokenizer(packaged("clip-tokenizer"), "clip", 77)
    checkpoint = Checkpoint(
        config, vae, unet, [encoder], [tokenizer.folder], tokenizer_files=[tokenizer.files]
    )
    diffusers.write(folder, checkpoint)


def ours(folder: Path) -> Any:
    from stable_diffusion import DiffusionModel

    return DiffusionModel.from_pretrained(folder)


def theirs(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)


def read_and_cast(folder: Path) -> Any:
    """The least that any loader does: all bytes read, 8 MB at a time, all numbers cast and kept."""
    kept, buffer = [], np.empty(1 << 22, dtype=np.float16)
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
            numbers = torch.empty((path.stat().st_size - file.tell()) // 2)
            done = 0
            while size := file.readinto(buffer.data.cast("B")):
                numbers[done : done + size // 2] = torch.from_numpy(buffer[: size // 2])
                done += size // 2
        kept.append(numbers)
    return kept


LOADERS: dict[str, Callable[[Path], Any]] = {
    "reading and cast alone": read_and_cast,
    "stable_diffusion": ours,
    "diffusers": theirs,
}


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def measure(name: str, folder: Path) -> dict[str, float]:
    import stable_diffusion.model  # noqa: F401 # imports are not part of loading

    if name == "diffusers":
        from diffusers import StableDiffusionPipeline  # noqa: F401
    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    kept = LOADERS[name](folder)
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    peak = max(peak, anonymous())
    assert kept is not None
    return {"seconds": seconds, "bytes": peak - before}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("LOADER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in LOADERS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "sd15"
        write_folder(folder, SMALL if options.quick else SD15)
        weights = 2 * sum(path.stat().st_size for path in folder.rglob("*.safetensors"))  # in float32
        if options.quick:
            results = {name: [measure(name, folder)] for name in LOADERS}
        for run in range(0 if options.quick else options.runs + 1):
            for name in LOADERS:
                command = [sys.executable, "-m", "benchmarks.loading", "--measure", name, str(folder)]
                found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                if run > 0:  # the first round fills the file cache
                    results[name].append(json.loads(found.splitlines()[-1]))
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {len(results['diffusers'])} runs"
    )
    print(f"weights in float32: {weights / 1e9:.2f} GB")
    seconds, memory = {}, {}
    for name, rows in results.items():
        times = [row["seconds"] for row in rows]
        seconds[name] = statistics.median(times)
        memory[name] = max(row["bytes"] for row in rows) / weights
        print(
            f"{name:24} {seconds[name]:6.2f} s  ({min(times):.2f} to {max(times):.2f}), memory {memory[name]:.3f}"
        )
    if options.quick:
        return
    ratio = seconds["stable_diffusion"] / seconds["reading and cast alone"]
    print(f"time over reading and cast: {ratio:.2f}, limit {TIME_LIMIT}: {verdict(ratio <= TIME_LIMIT)}")
    share = memory["stable_diffusion"]
    print(f"memory over the weights: {share:.3f}, limit {MEMORY_LIMIT}: {verdict(share <= MEMORY_LIMIT)}")


def verdict(good: bool) -> str:
    return "ok" if good else "TOO MUCH"


if __name__ == "__main__":
    main()
