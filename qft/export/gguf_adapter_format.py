"""A low-rank adapter as a GGUF file of its own, which llama.cpp adds to its base while it runs.

``llama-cli -m base.gguf --lora adapter-f16.gguf``. Facts of llama.cpp's loader
(``src/llama-adapter.cpp``): a matrix ``x`` has two tensors, ``x.lora_a`` ``[rank, in]`` and
``x.lora_b`` ``[out, rank]``, whose product is multiplied with ``adapter.lora.alpha`` / rank. There
is one alpha a file: what another scale asks for is multiplied into ``lora_b``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from qft.errors import ModelError
from qft.export.gguf_format import QUANTIZATION_VERSION, file_name, stored_blocks, words_of
from qft.gguf.architectures import architecture_of
from qft.gguf.contract import Mapped
from qft.gguf.file import StoredAs, Value, data_bytes, header, write_file
from qft.gguf.mixes import MIXES
from qft.gguf.types import holds
from qft.merging.merge import Progress, identity
from qft.merging.tensors import MergedTensors
from qft.shards import row_blocks
from qft.strategy import LowRank
from qft.write_journal import WriteJournal

FAMILY = "gguf-lora"
_SLACK_BYTES = 2**16
_BASE = "q8_0"  # the base's file that the Modelfile names
_HOW_TO = (
    "# Put the base's own file beside this one (qft export BASE --format gguf:q8_0), or name "
    "another in the next line.\n"
)
_MULTIPLIED = (  # the matrices llama.cpp adds an update to
    ".attn_q.weight", ".attn_k.weight", ".attn_v.weight", ".attn_qkv.weight",
    ".attn_output.weight", ".ffn_gate.weight", ".ffn_up.weight", ".ffn_down.weight",
)  # fmt: skip
_HEAD = "output.weight"
_WAY_OUT = "export base and adapter as one model: --format gguf:q8_0"


class _Ups:
    """The left factors in the place of their weights: what is done to a weight's rows is done here.

    A weight that the base stores ``[in, out]`` has its factor as ``[rank, out]``.
    """

    def __init__(self, source: MergedTensors, updates: Mapping[str, LowRank]) -> None:
        self._source, self._updates = source, updates
        self.config = source.config
        self.files = source.files

    def names(self) -> Sequence[str]:
        return [n for n in self._source.names() if self.module(n) in self._updates]

    def module(self, name: str) -> str:
        return self._source.module(name)

    def shape(self, name: str) -> tuple[int, ...]:
        update = self.update(name)
        shape = (update.shape[0], update.rank)
        return shape[::-1] if update.transposed else shape

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str) -> Tensor:
        return self.rows(name, slice(0, self.shape(name)[0]))

    def blocks(self, name: str) -> Iterator[Tensor]:
        return (self.rows(name, part) for part in row_blocks(self.shape(name)))

    def rows(self, name: str, part: slice) -> Tensor:
        update = self.update(name)
        return update.up(slice(None)).T[part] if update.transposed else update.up(part)

    def update(self, name: str) -> LowRank:
        return self._updates[self.module(name)]

    def made_from(self) -> Sequence[tuple[str, int, int]]:
        return self._source.made_from()

    def fingerprint(self) -> str:
        return self._source.fingerprint()


class AdapterPlan:
    """What a file of an adapter will hold; refuses before anything is written.

    Args:
        source: base and adapter.
        kind: ``f32``, ``f16`` or ``q8_0``; rows that do not fill its blocks stay in f16.
        stops: tokens that must end a generation, beside those the source's own files name.

    Attributes:
        modelfile: what Ollama is told, where the base's file is put beside the adapter's.

    Raises:
        AdapterError: the adapter is more than low-rank updates.
        ModelError: llama.cpp has no place for one of them.
    """

    def __init__(self, source: MergedTensors, kind: str, stops: Sequence[int] = ()) -> None:
        self.source, self.kind = source, kind
        self.architecture = architecture_of(source.config)
        updates = source.factors()
        self._ups = _Ups(source, updates)
        # computed tensors of the model are none of the adapter's
        mapped = [m for m in self.architecture.tensors(self._ups) if m.source is not None]
        self._require_places(mapped, updates)
        self._mapped = {tensor.name: tensor for tensor in mapped}
        scales = Counter(update.scale * update.rank for update in updates.values())
        self.alpha = scales.most_common(1)[0][0]
        self.tensors = [stored for tensor in mapped for stored in self._pair(tensor)]
        self.notes = self._fallen_back()
        self.modelfile = self._modelfile(stops)
        self.header = header(self.metadata(), self.tensors)

    def _require_places(self, mapped: Sequence[Mapped], updates: Mapping[str, LowRank]) -> None:
        if not updates:
            raise ModelError("The adapter changes nothing.", fix="train it first")
        kind = str((self.source.config.get("architectures") or ["unknown"])[0])
        if not kind.endswith(("ForCausalLM", "LMHeadModel")):
            raise ModelError("qft writes adapter files for language models alone.", found=kind,
                             fix=_WAY_OUT)  # fmt: skip
        placed = {self.source.module(str(m.source)) for m in mapped
                  if m.name.endswith(_MULTIPLIED)
                  or (m.name == _HEAD and m.source not in self.source.untied)}  # fmt: skip
        lost = sorted(set(updates) - placed)
        if lost:
            raise ModelError(
                "llama.cpp adds no update to a tensor of this adapter.",
                where=lost[0],
                found="it is tied to the embeddings"
                if self.source.untied else f"{len(lost)} such tensor(s)",
                fix=_WAY_OUT,
            )  # fmt: skip

    def _pair(self, tensor: Mapped) -> list[StoredAs]:
        down = self._update(tensor.name).shape[1]
        shapes = {"a": (tensor.shape[1], down), "b": tensor.shape}
        return [StoredAs(f"{tensor.name}.lora_{part}", shape, self._kind(shape[1]))
                for part, shape in shapes.items()]  # fmt: skip

    def _kind(self, width: int) -> str:
        return self.kind if holds(self.kind, width) else "f16"

    def _update(self, name: str) -> LowRank:
        return self._ups.update(str(self._mapped[name].source))

    def _fallen_back(self) -> list[str]:
        fell = [tensor.name for tensor in self.tensors if tensor.kind != self.kind]
        return [f"{len(fell)} of {len(self.tensors)} factors stay in f16: {self.kind} needs rows "
                "in multiples of 32"] if fell else []  # fmt: skip

    def _modelfile(self, stops: Sequence[int]) -> str | None:
        """None where the base's tokenizer fits no GGUF file: then neither does the base."""
        said: list[str] = []
        try:
            return words_of(self.source, f"./{file_name(_BASE)}", stops, said,
                            adapter=f"./{self.file_name}").modelfile  # fmt: skip
        except ModelError as error:
            self.notes.append(f"No Modelfile is written: {error.what}")
            return None

    @property
    def file_name(self) -> str:
        """Of the file in its folder."""
        return f"adapter-{self.kind}.gguf"

    @property
    def bytes(self) -> int:
        """Bytes of the folder: of the file exactly, and of what lies beside it at most."""
        return len(self.header) + data_bytes(self.tensors) + _SLACK_BYTES

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def identity(self) -> str:
        """Of everything that decides the file's bytes."""
        described = hashlib.sha256(self.header).hexdigest()
        return identity(self.source, format=f"{FAMILY}:{self.kind}", header=described)

    def metadata(self) -> dict[str, Value]:
        """What the file says of the adapter."""
        return {
            "general.architecture": self.architecture.name,
            "general.type": "adapter",
            "general.file_type": MIXES[self.kind],
            "general.quantization_version": QUANTIZATION_VERSION,
            "adapter.type": "lora",
            "adapter.lora.alpha": float(self.alpha),
        }

    def produce(self, name: str, start: int = 0) -> Iterator[Tensor]:
        """The bytes of one factor in blocks of rows, from byte ``start`` on.

        Raises:
            ModelError: a number is not finite, or too large for its type.
        """
        weight, _, part = name.rpartition(".lora_")
        stored = next(tensor for tensor in self.tensors if tensor.name == name)
        update = self._update(weight)
        if part == "a":
            return stored_blocks([update.down()], stored.kind, start, name)
        more = update.scale * update.rank / self.alpha  # exactly 1 where the scale is the file's
        blocks = (block * more for block in self._mapped[weight].blocks())
        return stored_blocks(blocks, stored.kind, start, name)


def write_adapter(plan: AdapterPlan, folder: Path, progress: Progress | None = None) -> Path:
    """Writes the file, or what is missing of it; returns its path."""
    journal = WriteJournal(folder, plan.identity)
    path = folder / plan.file_name
    if plan.modelfile is not None:
        (folder / "Modelfile").write_text(_HOW_TO + plan.modelfile, encoding="utf-8")
    write_file(path, plan.header, plan.tensors, plan.produce, journal, progress)
    journal.close()
    return path
