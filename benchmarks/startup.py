"""What starting costs: seconds of whole processes, beside an empty Python and `import torch` in the same run.

    python benchmarks/startup.py [--runs 7] [--quick]

The rows alternate, so that a busy moment of the machine meets all of them; medians, with the smallest and the largest.
`--quick` runs every row once and judges nothing: it shows that the commands work, not what they cost.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

ROWS = {
    "python": [sys.executable, "-c", "pass"],
    "import stable_diffusion": [sys.executable, "-c", "import stable_diffusion"],
    "minisd --help": [sys.executable, "-m", "stable_diffusion", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
    "minisd generate": [sys.executable, "-m", "stable_diffusion", "generate", "a fox", "--seed", "1"],
}
LIMITS = (
    ("import stable_diffusion", "python", 0.2),
    ("minisd --help", None, 0.5),
    ("minisd generate", "import torch", 1.3),
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    runs, warm_up = (1, 0) if options.quick else (options.runs, 1)
    seconds: dict[str, list[float]] = {row: [] for row in ROWS}
    with tempfile.TemporaryDirectory() as folder:
        for run in range(warm_up + runs):
            for row, command in ROWS.items():
                began = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True, cwd=folder)
                if run >= warm_up:  # the first round fills the file cache
                    seconds[row].append(time.perf_counter() - began)
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, {runs} runs")
    for row, values in seconds.items():
        print(f"{row:26} {statistics.median(values):6.2f} s  ({min(values):.2f} to {max(values):.2f})")
    for row, base, limit in () if options.quick else LIMITS:
        over = statistics.median(seconds[row]) - (statistics.median(seconds[base]) if base else 0)
        print(
            f"{row} over {base or 'nothing'}: {over:.2f} s, limit {limit} s: {'ok' if over <= limit else 'TOO SLOW'}"
        )


if __name__ == "__main__":
    main()
