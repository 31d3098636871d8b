"""A GGUF file opened to be run here: whole, its weights dequantized.

llama.cpp computes with the weights as they are stored; transformers, which reads them here, with
plain ones. So a file that is 4 GB small may need 14 GB.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from qft import hardware
from qft.errors import ModelError, RecipeError, WillNotFitError, first_line
from qft.progress import human_bytes
from qft.verification.read_back import read_back
from qft.verification.subject import Subject

_ENDS = ("eos", "eot", "eom")  # of a text, of a turn, of a message
_NO_MODEL = {
    "adapter": ("an adapter", "run it with llama.cpp: -m BASE.gguf --lora FILE; or name the run "
                "it was made from"),
    "mmproj": ("the part of a model that sees or hears", "name the file of the language model"),
    "imatrix": ("an importance matrix", "name the file of the model"),
}  # fmt: skip


def open_gguf(
    subject: Subject,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    quantize: str = "none",
) -> tuple[nn.Module, str]:
    """Opens a GGUF file for running, in eval mode.

    Args:
        subject: with a GGUF file.
        dtype: to hold and compute in; None is what the machine does best.
        device: ``cpu`` or ``cuda``; None likewise.
        quantize: only ``none``: a file's own types are what it was made for.

    Returns:
        The model, and a sentence on how it is held.

    Raises:
        ModelError: it is broken, a part of a model, or of a kind transformers cannot read.
        RecipeError: it is to be quantized again.
        WillNotFitError: dequantized it would not fit into the memory that is free.
    """
    assert subject.gguf is not None
    if quantize != "none":
        raise RecipeError("A GGUF file is not quantized again.", where=subject.gguf,
                          found=quantize, fix="export the run to that format")  # fmt: skip
    fields = require_model(subject)
    chosen = hardware.choose(device or "auto")
    held = dtype or chosen.dtype
    _require_room(subject, held, chosen.device)
    model = read_back(subject.gguf, dtype=held).to(chosen.device)
    if "generation_config.json" not in subject.files():
        _stop_as_the_file_says(model, fields)
    stored = subject.gguf.stat().st_size
    name = str(held).removeprefix("torch.")
    note = (
        f"{subject.gguf.name}: {human_bytes(stored)}, dequantized and held as {name} in "
        f"{human_bytes(_numbers(subject) * held.itemsize)} (llama.cpp runs it as it is stored)"
    )
    return model, note


def require_model(subject: Subject) -> dict[str, Any]:
    """What the file says of itself.

    Raises:
        ModelError: it is broken, or no whole model.
    """
    assert subject.gguf is not None
    try:
        fields: dict[str, Any] = subject.reader.fields
        kind = str(fields["general.type"].contents()) if "general.type" in fields else "model"
        parts = int(fields["split.count"].contents()) if "split.count" in fields else 1
    except Exception as error:  # its reader raises anything at a broken file
        raise ModelError("The GGUF file is broken.", where=subject.gguf,
                         found=f"{type(error).__name__}: {first_line(error)}",
                         fix="export it again, or fetch it again") from error  # fmt: skip
    if kind in _NO_MODEL:
        what, fix = _NO_MODEL[kind]
        raise ModelError(f"This GGUF file is {what}, no model.", where=subject.gguf, fix=fix)
    if parts > 1:
        raise ModelError(
            "This GGUF file is one part of several.", where=subject.gguf, found=f"{parts} parts",
            fix="join them: llama-gguf-split --merge FIRST.gguf ALL.gguf",
        )  # fmt: skip
    return fields


def _numbers(subject: Subject) -> int:
    return sum(math.prod(int(size) for size in tensor.shape) for tensor in subject.reader.tensors)


def _require_room(subject: Subject, dtype: torch.dtype, device: str) -> None:
    needed, free = _numbers(subject) * dtype.itemsize, hardware.free_memory_bytes(device)
    if free is None or needed <= free:
        return
    smaller = "" if dtype.itemsize < 4 else "--dtype bfloat16, or "
    raise WillNotFitError(
        "Dequantized, this GGUF file does not fit into memory.",
        where=subject.gguf,
        found=f"{human_bytes(needed)} needed, {human_bytes(free)} free on {device}",
        fix=f"{smaller}run it with llama.cpp, or export to bnb:nf4, which stays small here",
    )


def _stop_as_the_file_says(model: nn.Module, fields: dict[str, Any]) -> None:
    """transformers reads one end of a text; the file may name those of a turn and a message too."""
    stops: list[int] = []
    for key in (*(f"{end}_token_id" for end in _ENDS), "eos_token_ids"):
        field = fields.get(f"tokenizer.ggml.{key}")
        value = field.contents() if field is not None else []
        stops += [int(token) for token in (value if isinstance(value, list) else [value])]
    settings: Any = model.generation_config
    if stops:
        settings.eos_token_id = list(dict.fromkeys(stops))
