"""GGUF, the format of llama.cpp and Ollama: one file with weights, settings and tokenizer."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qft.errors import ModelError
from qft.files import explain_write_errors, read_json
from qft.gguf.architectures import architecture_of
from qft.gguf.file import StoredAs, Value, data_bytes, header, write_file
from qft.gguf.importance import Importance
from qft.gguf.mixes import MIXES, choose_types, fall_backs
from qft.gguf.modelfile import modelfile
from qft.gguf.naming import naming
from qft.gguf.rounding import encode
from qft.gguf.types import stored_bytes
from qft.gguf.vocabulary import vocabulary_metadata
from qft.merging.merge import Progress, identity, write_config
from qft.merging.side_files import copy_files, files_bytes
from qft.merging.tensors import RowSource
from qft.models import TASK_KEY, open_tokenizer
from qft.write_journal import WriteJournal

GGUF_TASK_KEY = "qft.task"  # what the model was trained for; other readers pass over it
QUANTIZATION_VERSION = 2  # of ggml's block layouts
_SLACK_BYTES = 2**18  # config.json, the journal


class GGUFPlan:
    """What a GGUF file of a source will hold; refuses before anything is written.

    Args:
        source: the model.
        mix: a key of :data:`qft.gguf.mixes.MIXES`.
        importance: how much an error in each column weighs; tensors without one are rounded with
            all columns alike.
        stops: tokens that must end a generation, beside those the source's own files name.

    Attributes:
        fall_backs: what is stored in another type than the mix says.
        notes: the same, and what else a user should know, a sentence each.
        header: all of the file before its tensors: settings, tokenizer, names.
        modelfile: what Ollama is told of the file.

    Raises:
        ModelError: the architecture, a setting, a tensor or the tokenizer cannot be expressed.
    """

    def __init__(
        self,
        source: RowSource,
        mix: str,
        importance: Importance | None = None,
        stops: Sequence[int] = (),
    ) -> None:
        self.source, self.mix = source, mix
        self.architecture = architecture_of(source.config)
        self._mapped = {tensor.name: tensor for tensor in self.architecture.tensors(source)}
        self._said: list[str] = []  # of the tokenizer
        self._words = words_of(source, f"./{file_name(mix)}", stops, self._said)
        self.modelfile = self._words.modelfile
        self.weigh(importance)

    def weigh(self, importance: Importance | None) -> None:
        """Chooses the types, which depend on whether columns weigh differently, and all else said.

        Args:
            importance: in the place of the former one; before anything is written.
        """
        self.importance: Mapping[str, Tensor] = importance.columns if importance else {}
        self._imatrix = importance.metadata() if importance else {}
        facts = [(tensor.name, tensor.shape) for tensor in self._mapped.values()]
        settings = self.architecture.metadata(self.source.config)
        self._choices = choose_types(self.mix, self.architecture.name, facts, settings,
                                     importance=bool(self.importance))  # fmt: skip
        self.tensors = [
            StoredAs(tensor.name, tensor.shape, self._choices[tensor.name].kind)
            for tensor in self._mapped.values()
        ]
        self.fall_backs = fall_backs(self._choices, facts)
        fell = [fall_back.text() for fall_back in self.fall_backs]
        fitted = [importance.text()] if importance else []
        self.notes = [*self.architecture.notes(self.source.config), *fell, *fitted, *self._said]
        self.header = header(self.metadata() | self._words.vocabulary, self.tensors)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Bytes of the folder: of the file exactly, and of what lies beside it at most."""
        files = files_bytes(self.source.files) + _SLACK_BYTES
        return len(self.header) + data_bytes(self.tensors) + files

    @property
    def identity(self) -> str:
        """Of everything that decides the file's bytes; its header tells names, types, settings."""
        described = hashlib.sha256(self.header).hexdigest()
        weighed = hashlib.sha256()
        for name, weights in sorted(self.importance.items()):
            weighed.update(name.encode("utf-8"))
            weighed.update(weights.float().contiguous().numpy().tobytes())
        return identity(self.source, format=f"gguf:{self.mix}", header=described,
                        importance=weighed.hexdigest())  # fmt: skip

    @property
    def file_name(self) -> str:
        """Of the file in its folder."""
        return file_name(self.mix)

    def metadata(self) -> dict[str, Value]:
        """What the file says of the model itself."""
        task = self.source.config.get(TASK_KEY)
        return {
            "general.architecture": self.architecture.name,
            "general.type": "model",
            **naming(self.source.config, (tensor.shape for tensor in self.tensors)),
            "general.file_type": MIXES[self.mix],
            "general.quantization_version": QUANTIZATION_VERSION,
            **({GGUF_TASK_KEY: str(task)} if task else {}),
            **self._imatrix,
            **self.architecture.metadata(self.source.config),
        }

    def produce(self, name: str, start: int = 0) -> Iterator[Tensor]:
        """The bytes of a tensor in blocks of rows.

        Args:
            name: in the file.
            start: the byte to begin with; blocks before it are read, but not rounded again.

        Raises:
            ModelError: a weight is not finite, or too large for its type.
        """
        kind, mapped = self._choices[name].kind, self._mapped[name]
        importance = self.importance.get(mapped.source or "")
        return stored_blocks(mapped.blocks(), kind, start, mapped.source or name, importance)


def file_name(mix: str) -> str:
    """Of a model's file in its folder."""
    return f"model-{mix}.gguf"


@dataclass(frozen=True)
class Words:
    """What a source's tokenizer becomes.

    Attributes:
        vocabulary: what a GGUF file says of it.
        modelfile: what Ollama is told.
    """

    vocabulary: dict[str, Value]
    modelfile: str


def words_of(
    source: RowSource,
    from_: str,
    stops: Sequence[int],
    notes: list[str],
    adapter: str | None = None,
) -> Words:
    """The tokenizer, opened from a folder of its own: its files may lie in several.

    Args:
        source: the model.
        from_: the model's file as a Modelfile names it.
        stops: tokens that must end a generation, beside those the source's own files name.
        notes: gets what a user should know, a sentence each.
        adapter: an adapter's file, likewise.

    Raises:
        ModelError: there is no tokenizer, or it cannot be expressed.
    """
    if not source.files:
        raise ModelError("GGUF holds a tokenizer, and this model folder has none.",
                         fix="add tokenizer.json and tokenizer_config.json")  # fmt: skip
    scratch = Path(tempfile.gettempdir())
    with explain_write_errors(scratch), tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        write_config(source, folder)
        for file, path in source.files.items():
            (folder / file).symlink_to(path.resolve())
        config, tokenizer = source.config, open_tokenizer(folder)
        ends = [*_named_stops(folder, config), *stops]
        vocabulary = vocabulary_metadata(tokenizer, config, ends, notes)
        every: Any = vocabulary.get("tokenizer.ggml.eos_token_ids", ())
        text = modelfile(
            from_, tokenizer, _generation(folder), stops=every, adapter=adapter,
            context=config.get("max_position_embeddings"), notes=notes,
        )  # fmt: skip
    return Words(vocabulary, text)


def stored_blocks(
    blocks: Iterable[Tensor], kind: str, start: int, name: str, importance: Tensor | None = None
) -> Iterator[Tensor]:
    """A tensor's bytes from byte ``start`` on; what lies before is not rounded.

    Raises:
        ModelError: a weight of tensor ``name`` is not finite, or too large for its type.
    """
    for block in blocks:
        size = stored_bytes(kind, block.shape)
        if size <= start:
            start -= size
            continue
        try:
            stored = encode(block if block.dim() > 1 else block[None], kind, importance)
        except ModelError as error:
            raise ModelError(error.what, where=name, found=error.found,
                             fix=error.fix) from None  # fmt: skip
        yield stored.flatten()[start:]
        start = 0


def write_gguf(plan: GGUFPlan, folder: Path, progress: Progress | None = None) -> Path:
    """Writes the file, the tokenizer and config beside it; returns the file's path.

    In a folder that was begun with the same plan it goes on, to the same bytes.
    """
    journal = WriteJournal(folder, plan.identity)
    write_config(plan.source, folder)
    copy_files(plan.source.files, folder)
    path = folder / plan.file_name
    (folder / "Modelfile").write_text(plan.modelfile, encoding="utf-8")
    write_file(path, plan.header, plan.tensors, plan.produce, journal, progress)
    journal.close()
    return path


def _named_stops(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """What generation_config.json, or else config.json, names as the end of a generation."""
    named = (_generation(folder) or config).get("eos_token_id")
    ends = named if isinstance(named, list) else [named]
    return [token for token in ends if type(token) is int]


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.is_file() else {}
