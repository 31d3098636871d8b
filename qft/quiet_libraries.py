"""Keeps other libraries' notices and bars out of what qft shows; errors still come through."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

_SETTINGS = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_LOGGERS = ("bitsandbytes", "peft", "accelerate", "datasets", "torch")


def quiet_libraries() -> None:
    """For command lines only, before any of them is imported; it imports none itself."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Keeps bars off the terminal that do not heed TQDM_DISABLE, where that is set."""
    if os.environ.get("TQDM_DISABLE") != "1":
        yield
        return
    with contextlib.redirect_stderr(io.StringIO()):
        yield
