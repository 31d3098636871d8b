"""Keeps other libraries' notices and bars out of what qft shows; errors still come through."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """For command lines only; a Python caller's logging is left alone."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "peft", "accelerate", "datasets", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
