"""What the machine can do: the device to use, and the number formats that are fast on it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stable_diffusion.errors import InputError

if TYPE_CHECKING:
    import torch


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them; the second is at most 32 MB


class Config:
    """The runtime settings.

    Attributes:
        DEVICE: the torch device to work on, ``"cuda"``, ``"mps"`` or ``"cpu"``: the first of these that
            the machine has, unless one is given. Raises InputError for one that it does not have.
    """

    def __init__(self, device: str | None = None) -> None:
        self.DEVICE: str = devices()[-1] if device is None else _present(device)

    def __repr__(self) -> str:
        return f"Config(DEVICE={self.DEVICE!r})"


def _present(device: str) -> str:
    """`device`, if the machine has it. Raises InputError where it does not."""
    kind, _, number = device.partition(":")
    if kind not in devices() or (number and not number.isdecimal()):
        raise InputError(f"there is no device {device!r} here: choose one of {', '.join(devices())}")
    return device


def devices() -> list[str]:
    """Those of ``"cpu"``, ``"mps"`` and ``"cuda"`` that the machine has, the best last."""
    import torch

    present = {"cpu": True, "mps": torch.backends.mps.is_available(), "cuda": torch.cuda.is_available()}
    return [name for name, there in present.items() if there]


def version() -> str:
    """The package's version."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("mini-stable-diffusion")
    except PackageNotFoundError:  # a folder of sources
        return "not installed"


def first_process() -> bool:
    """Whether this is the only process, or the first of those that `accelerate launch` or `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


def watched() -> bool:
    """Whether a person is watching this process, in a terminal or a notebook."""
    isatty = getattr(sys.stderr, "isatty", bool)  # without a console there is no stream
    return first_process() and (isatty() or "ipykernel" in sys.modules)


def has_native_bf16(device: torch.device | str) -> bool:
    """Whether bfloat16 is computed in hardware, and so faster than float32 (elsewhere it is up to 20 times slower)."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if torch.device(device).type == "cpu":
        features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees for its next tensors, where the C library is glibc.

    For a command's own process alone. By default glibc gives large blocks back to the kernel, which clears their pages
    each time they are taken again: 5 % of a training step on a CPU (benchmarks/LOG.md). Returns whether it does.
    """
    if sys.platform != "linux":
        return False
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return bool(mallopt and mallopt(M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(M_MMAP_THRESHOLD, 32 << 20))


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch compute without threads of its own: for the parts of a process that lives on to do other things.

    OpenMP keeps threads for every thread that has computed with several, as long as that one lives, and where all of
    them are more than the cores, they wait by sleeping: another thread then computes a quarter slower.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def stop_signals(handler: Callable[[int, Any], Any]) -> Iterator[Callable[[], None]]:
    """Sends what asks the process to stop to `handler`: Ctrl-C, SIGTERM, and a terminal that is closed.

    Signals that are ignored stay so. Only the main thread may do this; in another one nothing changes. Yields the
    function that gives the signals back before the end.
    """
    before: dict[int, Any] = {}

    def give_back() -> None:
        while before:
            signal.signal(*before.popitem())

    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):  # no system has all of them
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (None, signal.SIG_IGN):
                before[number] = signal.signal(number, handler)
    try:
        yield give_back
    finally:
        give_back()
