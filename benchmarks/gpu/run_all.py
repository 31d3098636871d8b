"""Everything in one call of at most ten minutes, the most valuable part first.

    python benchmarks/gpu/run_all.py --out gpu-results [--minutes 9.5]

Rows are written as they come; the same call again goes on where this one stopped. If a check fails,
nothing is measured. Join the rows with: cat gpu-results/*.jsonl >> benchmarks/results/gpu.jsonl
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_rows import parser

HERE = Path(__file__).resolve().parent
# a script, its arguments, and the most seconds it may take
PARTS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("checks.py", (), 120),
    ("throughput.py",
     ("--shapes", "llama-3.1-8b", "--quantize", "nf4", "--lengths", "2048", "8192",
      "--block-seconds", "1"), 200),
    ("peft_row.py", (), 90),
    ("plan_accuracy.py", (), 240),
    ("largest_context.py", ("--settings", "leanest", "--caps", "8", "12"), 200),
    ("largest_context.py", ("--settings", "leanest", "--caps", "16", "24"), 300),
    ("throughput.py", ("--shapes", "llama-3.1-8b"), 300),
    ("largest_context.py", ("--settings", "leanest-unrounded", "defaults"), 200),
    ("throughput.py", (), 500),
)  # fmt: skip
LIMITED = (
    "throughput.py",
    "largest_context.py",
    "plan_accuracy.py",
)  # stop by themselves between two measurements


def run_parts(
    parts: Sequence[tuple[str, tuple[str, ...], int]], out: Path, device: str, seconds: float
) -> int:
    """Runs one after another while there is time.

    Returns:
        0, or 1 where the checks failed.
    """
    end = time.monotonic() + seconds
    variables = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **os.environ}
    for script, arguments, most in parts:
        left = min(most, end - time.monotonic())
        if left < 5:
            print(f"no time left for {script} {' '.join(arguments)}", flush=True)
            continue
        command = [sys.executable, str(HERE / script), *arguments, "--out", str(out)]
        command += ["--device", device]
        if script in LIMITED:
            command += ["--limit-seconds", str(0.9 * left)]
        try:
            done = subprocess.run(command, timeout=left, check=False, env=variables)
        except subprocess.TimeoutExpired:
            print(f"{script} was stopped after {left:.0f} s; its rows so far stand", flush=True)
            if script == "checks.py":
                return 1
            continue
        if done.returncode and script == "checks.py":
            print("a check failed: nothing is measured", flush=True)
            return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs everything."""
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=9.5)
    chosen = options.parse_args(arguments)
    return run_parts(PARTS, chosen.out, chosen.device, 60 * chosen.minutes)


if __name__ == "__main__":
    sys.exit(main())
