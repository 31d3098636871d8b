"""Makes the environment that Unsloth's side runs in: its versions are not qft's.

    python -m benchmarks.peers.unsloth_environment FOLDER

Unsloth itself is installed without its dependencies, which would bring CUDA and torchvision.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.peers.lineup import UnavailableError

NAME = "unsloth-venv"
TORCH = ["torch==2.13.0"]
STACK = [
    "transformers==5.17.0", "trl==1.15.0", "datasets==4.8.5", "peft==0.21.2",
    "accelerate==1.15.0", "bitsandbytes==0.50.2", "psutil", "pydantic", "nest_asyncio", "tyro",
    "packaging", "pillow", "protobuf", "sentencepiece", "hf_transfer", "wheel", "setuptools",
    "cut_cross_entropy",
]  # fmt: skip
UNSLOTH = ["--no-deps", "unsloth==2026.10.9", "unsloth_zoo==2026.10.9"]


def interpreter(scratch: Path) -> Path:
    """The environment's Python; made on first use.

    Raises:
        UnavailableError: it cannot be made here.
    """
    folder = scratch / NAME
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if done.is_file():
        return python
    print(f"installing Unsloth into {folder}", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    for packages in (TORCH, [*TORCH, *STACK], UNSLOTH):
        command = [str(python), "-m", "pip", "install", "-q", *packages]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            lines = result.stderr.strip().splitlines() or ["pip said nothing"]
            raise UnavailableError(f"pip cannot install {packages[-1]}: {lines[-1]}")
    tried = subprocess.run(
        [str(python), "-c", "import unsloth"], capture_output=True, text=True, cwd=folder
    )
    if tried.returncode:
        raise UnavailableError(f"it cannot be imported: {tried.stderr.strip().splitlines()[-1]}")
    done.touch()
    return python


if __name__ == "__main__":
    print(interpreter(Path(sys.argv[1])))
