"""Laws: what the commands change in their own process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import Any

import pytest

from stable_diffusion import DiffusionModel
from stable_diffusion.cli.serve import loaded
from stable_diffusion.errors import InputError
from stable_diffusion.runtime import in_passing

FAULTS = """
import resource, torch
from stable_diffusion.runtime import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(4 << 20)  # 16 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
assert keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_kept() -> None:
    """In a process of its own, since it cannot be undone."""
    command = [sys.executable, "-c", FAULTS]
    before, after = map(
        int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    )
    assert after < before / 10


THREADS = """
import os, time, torch
from stable_diffusion.runtime import in_passing

torch.set_num_threads(2)
compute = lambda: torch.ones(1 << 22).add(1).sum().item()

def threads(least=0):
    for _ in range(100):
        if (found := len(os.listdir("/proc/self/task"))) <= least:
            break
        time.sleep(0.05)
    return found

before = threads()
assert in_passing(compute) == 1 << 23
print(before, threads(before), end=" ")
compute()
print(threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_what_is_done_in_passing_leaves_no_threads() -> None:
    """OpenMP's of another thread stay, and while they are more than cores, all of them wait by sleeping."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", THREADS]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    before, after, direct = map(int, ran.stdout.split())
    assert after == before < direct


def test_what_is_raised_in_passing_is_raised() -> None:
    def fail() -> None:
        raise InputError("no such file")

    with pytest.raises(InputError, match="no such file"):
        in_passing(fail)


def test_a_server_reads_its_models_in_passing(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    read = DiffusionModel.from_pretrained

    def spied(*args: Any, **settings: Any) -> DiffusionModel:
        threads.append(threading.current_thread())
        return read(*args, **settings)

    monkeypatch.setattr(DiffusionModel, "from_pretrained", spied)
    (served,) = loaded((), (), (), None, "cpu")
    assert served.packaged
    (thread,) = threads
    thread.join(10)
    assert not thread.is_alive()
