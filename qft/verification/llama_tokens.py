"""llama.cpp asked for token ids, in a process of its own: at some files it stops the process.

Run as a program it reads texts from its standard input and writes their ids; both are JSON.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from qft.errors import ModelError

_SECONDS = 300


def installed() -> bool:
    """Whether llama.cpp is there (extra ``gguf-test``)."""
    return importlib.util.find_spec("llama_cpp") is not None


def llama_tokens(file: Path, texts: Sequence[str]) -> list[list[int]]:
    """The ids that llama.cpp gives each text: with the special tokens, then without, in turn.

    Raises:
        ModelError: llama.cpp cannot read the file's vocabulary.
    """
    program = [sys.executable, "-m", __name__, str(file)]
    try:
        done = subprocess.run(
            program, input=json.dumps(list(texts)), capture_output=True, text=True,
            encoding="utf-8", timeout=_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModelError("llama.cpp took too long over the file's vocabulary.",
                         where=file, found=f"{_SECONDS} s") from None  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError("llama.cpp cannot read the file's vocabulary.", where=file,
                         found=f"exit {done.returncode}: {last[:200]}")  # fmt: skip
    found: list[list[int]] = json.loads(done.stdout)
    return found


def main() -> None:
    """Answers on the standard output."""
    import llama_cpp

    texts = json.load(sys.stdin)
    model = llama_cpp.Llama(model_path=sys.argv[1], vocab_only=True, verbose=False)
    ids = [
        model.tokenize(text.encode("utf-8"), add_bos=special, special=True)
        for text in texts
        for special in (True, False)
    ]
    json.dump(ids, sys.stdout)


if __name__ == "__main__":
    main()
