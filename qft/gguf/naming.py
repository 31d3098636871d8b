"""What a GGUF file says of itself for people: a name and a size."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from qft.gguf.file import Value

_WORDS_THAT_STRIP = re.compile(r"(?<=phi)-?(?=3)|(?<=modern)-(?=bert)", re.IGNORECASE)
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def naming(config: Mapping[str, Any], shapes: Iterable[tuple[int, ...]]) -> dict[str, Value]:
    """Keys for people; none of them changes what is run.

    llama.cpp strips blanks around special tokens where it finds certain words in the name
    (``src/llama-vocab.cpp``). Where the tokenizer does so, the vocabulary gives the name.

    Args:
        config: the model's config.json; of a path in it only the last part is taken.
        shapes: of every tensor of the file.
    """
    size = size_label(sum(math.prod(shape) for shape in shapes))
    path = str(config.get("_name_or_path") or "").replace("\\", "/")
    name = PurePosixPath(path).name or f"{config.get('model_type')} {size}"
    name = _WORDS_THAT_STRIP.sub(" ", name)
    return {"general.name": name, "general.size_label": size}


def size_label(count: int) -> str:
    """A number of parameters as model names have it: 494M, 1.2B."""
    for unit, letter in _UNITS:
        if count >= unit:
            value = count / unit
            digits = f"{value:.1f}".removesuffix(".0") if value < 10 else f"{value:.0f}"
            return digits + letter
    return str(count)
