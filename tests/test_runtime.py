"""Laws: what the commands change in their own process."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from stable_diffusion import DiffusionModel
from stable_diffusion.cli.serve import loaded

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
import os, threading, torch
from stable_diffusion.runtime import one_thread

torch.set_num_threads(2)
compute = lambda: torch.ones(1 << 22).add(1).sum().item()
threads = lambda: len(os.listdir("/proc/self/task"))

before = threads()
with one_thread():
    assert compute() == 1 << 23
print(before, threads(), torch.get_num_threads(), end=" ")
found = []
other = threading.Thread(target=lambda: found.extend([compute(), torch.get_num_threads(), threads()]))
other.start()
other.join()
print(*found[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_one_thread_leaves_none_behind_and_is_no_limit_for_others() -> None:
    """Those of OpenMP stay, and while they are more than cores, all of them wait by sleeping."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", THREADS]
    ran = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    before, after, *others = map(int, ran.stdout.split())
    assert after == before
    assert others == [2, 2, before + 2]


def test_a_server_reads_its_models_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    read = DiffusionModel.from_pretrained

    def spied(*args: Any, **settings: Any) -> DiffusionModel:
        threads.append(torch.get_num_threads())
        return read(*args, **settings)

    monkeypatch.setattr(DiffusionModel, "from_pretrained", spied)
    before = torch.get_num_threads()
    (served,) = loaded((), (), (), None, "cpu")
    assert served.packaged
    assert (threads, torch.get_num_threads()) == ([1], before)
