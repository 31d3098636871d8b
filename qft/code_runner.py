"""Inside the cut-off process: the program, then its tests, then the proof that they ended.

`qft.code_execution` starts this file as a script of its own, in a folder with ``program.py`` and
``tests.py``. It needs nothing but the standard library.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

PROGRAM, TESTS = "program.py", "tests.py"
SECRET_BYTES = 32


def main(secret: int, proof: int) -> None:
    """Runs both files as one module, then copies the secret to the proof.

    The secret is still in its pipe while the program runs: no variable, no file and no argument
    holds it. What is used afterwards is taken before, as the program may replace any name.

    Args:
        secret: descriptor to read from, once the tests have ended.
        proof: descriptor to write to.
    """
    run, read, write, leave = exec, os.read, os.write, os._exit
    texts = [Path(name).read_text(encoding="utf-8") for name in (PROGRAM, TESTS)]
    parts = [compile(texts[0], PROGRAM, "exec", dont_inherit=True)]
    # by itself, so that no string, bracket or backslash left open in the program swallows it
    parts.append(compile(texts[1], TESTS, "exec", dont_inherit=True))
    module = types.ModuleType("__main__")
    module.__file__ = PROGRAM
    sys.modules["__main__"] = module
    sys.argv[:] = [PROGRAM]
    for part in parts:
        run(part, module.__dict__)
    write(proof, read(secret, SECRET_BYTES))
    leave(0)  # threads that still run have no say


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
