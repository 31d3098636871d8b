"""GGUF, the format of llama.cpp and Ollama: one file with weights, settings and tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from qft.errors import ModelError
from qft.gguf.architectures import architecture_of
from qft.gguf.file import StoredAs, Value, write_file
from qft.gguf.importance import Importance
from qft.gguf.mixes import MIXES, choose_types, fall_backs
from qft.gguf.rounding import encode
from qft.gguf.vocabulary import vocabulary_metadata
from qft.merging.merge import Progress, write_config
from qft.merging.side_files import copy_files
from qft.merging.tensors import RowSource
from qft.models import TASK_KEY, open_tokenizer

GGUF_TASK_KEY = "qft.task"  # what the model was trained for; other readers pass over it
_HEADER_SLACK_BYTES = 2**20
_QUANTIZATION_VERSION = 2  # of ggml's block layouts


class GGUFPlan:
    """What a GGUF file of a source will hold; refuses before anything is written.

    Args:
        source: the model.
        mix: a key of :data:`qft.gguf.mixes.MIXES`.
        importance: how much an error in each column weighs; tensors without one are rounded with
            all columns alike.

    Attributes:
        fall_backs: what is stored in another type than the mix says.
        notes: the same, a sentence each.

    Raises:
        ModelError: the architecture, a setting or a tensor cannot be expressed.
    """

    def __init__(self, source: RowSource, mix: str, importance: Importance | None = None) -> None:
        self.source, self.mix = source, mix
        self.importance: Mapping[str, Tensor] = importance.columns if importance else {}
        self._imatrix = importance.metadata() if importance else {}
        self.architecture = architecture_of(source.config)
        mapped = self.architecture.tensors(source)
        self._mapped = {tensor.name: tensor for tensor in mapped}
        facts = [(tensor.name, tensor.shape) for tensor in mapped]
        settings = self.architecture.metadata(source.config)
        self._choices = choose_types(mix, self.architecture.name, facts, settings,
                                     importance=bool(self.importance))  # fmt: skip
        self.tensors = [
            StoredAs(tensor.name, tensor.shape, self._choices[tensor.name].kind)
            for tensor in mapped
        ]
        self.fall_backs = fall_backs(self._choices, facts)
        self.notes = [fall_back.text() for fall_back in self.fall_backs]
        self.notes += [importance.text()] if importance else []

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
        task = self.source.config.get(TASK_KEY)
        return {
            "general.architecture": self.architecture.name,
            "general.type": "model",
            "general.file_type": MIXES[self.mix],
            "general.quantization_version": _QUANTIZATION_VERSION,
            **({GGUF_TASK_KEY: str(task)} if task else {}),
            **self._imatrix,
            **self.architecture.metadata(self.source.config),
        }

    def produce(self, name: str) -> Iterator[Tensor]:
        """The bytes of a tensor in blocks of rows.

        Raises:
            ModelError: a weight is not finite, or too large for its type.
        """
        kind, mapped = self._choices[name].kind, self._mapped[name]
        importance = self.importance.get(mapped.source or "")
        for block in mapped.blocks():
            try:
                yield encode(block if block.dim() > 1 else block[None], kind, importance)
            except ModelError as error:
                raise ModelError(error.what, where=mapped.source or name,
                                 found=error.found, fix=error.fix) from None  # fmt: skip


def write_gguf(plan: GGUFPlan, folder: Path, progress: Progress | None = None) -> Path:
    """Writes the file, and the tokenizer and config beside it; returns the file's path.

    Raises:
        ModelError: the tokenizer cannot be expressed.
    """
    if not plan.source.files:
        raise ModelError("GGUF holds a tokenizer, and this model folder has none.",
                         fix="add tokenizer.json and tokenizer_config.json")  # fmt: skip
    write_config(plan.source, folder)
    copy_files(plan.source.files, folder)
    vocabulary = vocabulary_metadata(open_tokenizer(folder), plan.source.config)
    path = folder / f"model-{plan.mix}.gguf"
    write_file(path, plan.metadata() | vocabulary, plan.tensors, plan.produce, progress)
    return path
