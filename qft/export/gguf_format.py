"""GGUF, the format of llama.cpp and Ollama: one file with weights, settings and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qft.errors import ModelError
from qft.files import read_json
from qft.gguf.architectures import architecture_of
from qft.gguf.file import StoredAs, Value, write_file
from qft.gguf.mixes import MIXES, choose_types
from qft.gguf.naming import naming
from qft.gguf.rounding import encode
from qft.gguf.types import TYPES
from qft.gguf.vocabulary import vocabulary_metadata
from qft.merging.merge import Progress, write_config
from qft.merging.side_files import copy_files
from qft.merging.tensors import RowSource
from qft.models import open_tokenizer

_HEADER_SLACK_BYTES = 2**20
_QUANTIZATION_VERSION = 2  # of ggml's block layouts


class GGUFPlan:
    """What a GGUF file of a source will hold; refuses before anything is written.

    Args:
        source: the model.
        mix: a key of :data:`qft.gguf.mixes.MIXES`.

    Raises:
        ModelError: the architecture, a setting or a tensor cannot be expressed.
    """

    def __init__(self, source: RowSource, mix: str) -> None:
        self.source, self.mix = source, mix
        self.architecture = architecture_of(source.config)
        mapped = self.architecture.tensors(source)
        self._mapped = {tensor.name: tensor for tensor in mapped}
        facts = [(tensor.name, tensor.shape) for tensor in mapped]
        self._choices = choose_types(mix, self.architecture.name, facts)
        self.tensors = [
            StoredAs(tensor.name, tensor.shape, self._choices[tensor.name].kind)
            for tensor in mapped
        ]
        self.notes = [*self.architecture.notes(source.config), *self._fallen_back()]

    def _fallen_back(self) -> list[str]:
        fell = [name for name, choice in self._choices.items() if choice.kind != choice.wanted]
        if not fell:
            return []
        first = self._choices[fell[0]]
        return [
            f"{len(fell)} tensor(s) stay in {first.kind}, because {first.wanted} needs rows in "
            f"multiples of {TYPES[first.wanted].block}: {', '.join(fell[:3])}"
            f"{' …' * (len(fell) > 3)}"
        ]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of the tensors, plus room for the header and the vocabulary."""
        vocabulary = 64 * int(self.source.config["vocab_size"])
        return self.tensor_bytes + 1024 * len(self.tensors) + _HEADER_SLACK_BYTES + vocabulary

    def metadata(self) -> dict[str, Value]:
        """What the file says of the model itself."""
        return {
            "general.architecture": self.architecture.name,
            "general.type": "model",
            **naming(self.source.config, (tensor.shape for tensor in self.tensors)),
            "general.file_type": MIXES[self.mix],
            "general.quantization_version": _QUANTIZATION_VERSION,
            **self.architecture.metadata(self.source.config),
        }

    def produce(self, name: str) -> Iterator[Tensor]:
        """The bytes of a tensor in blocks of rows.

        Raises:
            ModelError: a weight is not finite, or too large for its type.
        """
        kind = self._choices[name].kind
        for block in self._mapped[name].blocks():
            try:
                yield encode(block if block.dim() > 1 else block[None], kind)
            except ModelError as error:
                raise ModelError(error.what, where=self._mapped[name].source or name,
                                 found=error.found, fix=error.fix) from None  # fmt: skip


def write_gguf(
    plan: GGUFPlan, folder: Path, progress: Progress | None = None, stops: Sequence[int] = ()
) -> Path:
    """Writes the file, the tokenizer and config beside it; returns the file's path.

    Args:
        stops: tokens that must end a generation, beside those the source's own files name.

    Raises:
        ModelError: the tokenizer cannot be expressed.
    """
    if not plan.source.files:
        raise ModelError("GGUF holds a tokenizer, and this model folder has none.",
                         fix="add tokenizer.json and tokenizer_config.json")  # fmt: skip
    write_config(plan.source, folder)
    copy_files(plan.source.files, folder)
    ends = [*_named_stops(folder, plan.source.config), *stops]
    vocabulary = vocabulary_metadata(open_tokenizer(folder), plan.source.config, ends, plan.notes)
    path = folder / f"model-{plan.mix}.gguf"
    write_file(path, plan.metadata() | vocabulary, plan.tensors, plan.produce, progress)
    return path


def _named_stops(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """What generation_config.json, or else config.json, names as the end of a generation."""
    path = folder / "generation_config.json"
    named = (read_json(path) if path.is_file() else config).get("eos_token_id")
    ends = named if isinstance(named, list) else [named]
    return [token for token in ends if type(token) is int]
