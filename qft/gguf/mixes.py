"""Which type each tensor of a file gets, by the mix that was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qft.gguf.types import holds


@dataclass(frozen=True)
class Choice:
    """The type of one tensor.

    Attributes:
        kind: what it is stored in.
        wanted: what the mix says; another where its rows do not fill that type's blocks.
    """

    kind: str
    wanted: str


# A mix → what ``general.file_type`` says of it (``llama_ftype`` in llama.h).
MIXES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}


def choose_types(
    mix: str, architecture: str, tensors: Sequence[tuple[str, tuple[int, ...]]]
) -> dict[str, Choice]:
    """The type of every tensor.

    Args:
        mix: a key of MIXES.
        architecture: llama.cpp's name for it.
        tensors: name in the file and shape (the last axis is a row) of each, in their order.
    """
    chosen = {}
    for name, shape in tensors:
        wanted = "f32" if len(shape) == 1 else mix
        chosen[name] = Choice(wanted if holds(wanted, shape[-1]) else "f16", wanted)
    return chosen
