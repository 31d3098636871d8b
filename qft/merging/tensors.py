"""A model read block by block: a base, or a base with an adapter on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qft.errors import AdapterError, ModelError
from qft.shards import Fingerprint, ShardedCheckpoint, row_blocks, tensor_bytes
from qft.strategy import Merge, Rows


class TensorSource(Protocol):
    """A whole model, read piece by piece: what merge and every export format write from."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config.json."""

    @property
    def files(self) -> Mapping[str, Path]:
        """Tokenizer and generation files: name → path."""

    def names(self) -> Sequence[str]:
        """Names as they are in a checkpoint."""

    def module(self, name: str) -> str:
        """The module name (as in ``state_dict``) of a checkpoint name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor as it will be written."""

    def dtype(self, name: str) -> torch.dtype:
        """What :meth:`read` gives."""

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The same tensor in blocks of rows."""

    def made_from(self) -> Sequence[tuple[str, int, int]]:
        """The files it reads: name, bytes, and when they were changed (ns)."""

    def fingerprint(self) -> str:
        """Of the model (see :class:`qft.shards.Fingerprint`), once all of it was read."""


class ModuleTensors:
    """A checkpoint under module names, as strategies see it (:class:`qft.strategy.BaseTensors`).

    Args:
        checkpoint: the open base.
        names: checkpoint name → module name, from :func:`qft.models.module_names`.
        tied: module name that is not stored → the module name whose tensor it shares.
    """

    def __init__(
        self,
        checkpoint: ShardedCheckpoint,
        names: Mapping[str, str],
        tied: Mapping[str, str] | None = None,
    ) -> None:
        self._checkpoint = checkpoint
        self._stored = {module: name for name, module in names.items()}
        for absent, present in (tied or {}).items():
            if present in self._stored:
                self._stored.setdefault(absent, self._stored[present])

    def names(self) -> list[str]:
        """Every module name, tied ones included."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a base tensor."""
        return self._checkpoint.shape(self._name(name))

    def read(self, name: str) -> Tensor:
        """A base tensor as it is stored, on the CPU."""
        return self._checkpoint.read(self._name(name))

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some of its rows."""
        return self._checkpoint.read_rows(self._name(name), rows)

    def read_columns(self, name: str, columns: range) -> Tensor:
        """Some neighbouring columns of a matrix, ``[rows, len(columns)]``."""
        return self._checkpoint.read_columns(self._name(name), columns)

    def _name(self, name: str) -> str:
        try:
            return self._stored[name]
        except KeyError:
            raise ModelError(
                "The base has no such tensor.", where=self._checkpoint.folder, found=name
            ) from None


class MergedTensors:
    """Base ⊕ adapter as a :class:`TensorSource`; without an adapter, the base itself.

    Args:
        base: the open base checkpoint.
        names: checkpoint name → module name.
        merge: the open adapter, or None.
        tied: tied module name → the one that is stored; see :func:`tied_names`.
        dtype: of every floating tensor; None keeps each one's own.
        config: the result's config.json.
        files: the result's tokenizer and generation files.
        sources: the adapter's files.
        settings: what else decides the result, as text.
    """

    def __init__(
        self,
        base: ShardedCheckpoint,
        names: Mapping[str, str],
        merge: Merge | None = None,
        *,
        tied: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, Path] | None = None,
        sources: Sequence[Path] = (),
        settings: str = "",
    ) -> None:
        self._base, self._merge, self._dtype = base, merge, dtype
        self._sources, self._settings = list(sources), settings
        self._tied = dict(tied or {})
        # not copied: they lie in a file
        self._added: Mapping[str, Rows] = merge.added() if merge is not None else {}
        self._modules = {n: m for n, m in names.items() if m not in self._tied}
        known = set(self._modules.values())
        self._modules |= {name: name for name in self._added if name not in known}
        self.config: Mapping[str, Any] = dict(config or {})
        self.files: Mapping[str, Path] = dict(files or {})
        self.changed: set[str] = set()  # names whose value was read and is not the base's
        self._stored = set(base.names())
        self._fingerprint = Fingerprint()
        self._check_tied()

    def _check_tied(self) -> None:
        """Refuses an adapter that changes a tied head alone; merging would change both."""
        if self._merge is None:
            return
        for head, twin in self._tied.items():
            stored = next((n for n, m in self._modules.items() if m == twin), None)
            if stored is None:
                continue
            if head in self._added or self._edits(head, stored):
                raise AdapterError(
                    "The adapter changes one of two tied tensors, and the merged model has only "
                    "one for both.",
                    where=head,
                    found=f"the base ties it to {twin}",
                    fix="use base and adapter unmerged, or train without this target",
                )

    def _edits(self, module: str, stored: str) -> bool:
        """Whether the adapter would make something else of a base tensor under a module's name."""
        assert self._merge is not None
        for block in row_blocks(self._base.shape(stored)):
            rows = self._base.read_rows(stored, range(block.start, block.stop))
            if self._merge.edit(module, rows, block.start) is not rows:
                return True
        return False

    def names(self) -> list[str]:
        """The base's names in their order, then what the adapter adds."""
        return list(self._modules)

    def module(self, name: str) -> str:
        """The module name of a checkpoint name."""
        return self._modules[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the merged tensor."""
        if self._merge is None:
            return self._base.shape(name)
        return tuple(self._merge.shape(self._modules[name]))

    def dtype(self, name: str) -> torch.dtype:
        """What :meth:`read` gives."""
        stored = name in self._stored
        own = self._base.dtype(name) if stored else self._added[self._modules[name]].dtype
        return self._dtype if self._dtype is not None and own.is_floating_point else own

    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor_bytes(self.shape(name), self.dtype(name)) for name in self.names())

    def read(self, name: str) -> Tensor:
        """The merged value, rounded once to :meth:`dtype`.

        Raises:
            ModelError: a finite value is too large for the dtype asked for.
        """
        shape = self.shape(name)
        whole = torch.empty(shape, dtype=self.dtype(name))
        for part, block in zip(row_blocks(shape), self.blocks(name), strict=True):
            whole[part if shape else ...] = block
        return whole

    def blocks(self, name: str) -> Iterator[Tensor]:
        """The merged value in blocks of rows; see :meth:`read`."""
        shape = self.shape(name)
        for part in row_blocks(shape):
            block = rounded(name, self._block(name, part), self.dtype(name))
            if part.start == 0:
                self._fingerprint.add_tensor(name, block, shape)
            yield block

    def _block(self, name: str, part: slice) -> Tensor:
        """Some rows as they are computed; a tensor without rows is its own one block."""
        module = self._modules[name]
        if module in self._added:
            self.changed.add(name)
            added = self._added[module]
            return added if isinstance(added, Tensor) and not added.shape else added[part]
        if self._base.shape(name):
            stored = self._base.read_rows(name, range(part.start, part.stop))
        else:
            stored = self._base.read(name)
        if self._merge is None:
            return stored
        merged = self._merge.edit(module, stored, part.start)
        if merged is not stored:
            self.changed.add(name)
        return merged

    def made_from(self) -> list[tuple[str, int, int]]:
        """See :class:`TensorSource`."""
        return [*described([*self._base.files(), *self._sources]), (self._settings, 0, 0)]

    def fingerprint(self) -> str:
        """Of the base as it is, or of the folder a merge would write, once all of it was read."""
        if self._merge is None and self._dtype is None:
            return self._base.fingerprint()
        return self._fingerprint.text()

    def close(self) -> None:
        """Closes the base's files."""
        self._base.close()


def described(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Name, bytes and time of change (ns) of files: enough to see that one is another now."""
    states = [(path.name, path.stat()) for path in files]
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in another dtype.

    Raises:
        ModelError: a finite value is too large for float16.
    """
    result = tensor.to(dtype)
    overflows = dtype == torch.float16 and bool(torch.isinf(result).any())
    if overflows and not torch.isinf(tensor).any():
        raise ModelError(
            "A weight is too large for float16.",
            where=name,
            found=f"{tensor.abs().max().item():g}; float16 ends at 65504",
            fix="use bfloat16 or float32",
        )
    return result


def tied_names(skeleton: nn.Module, names: Mapping[str, str]) -> dict[str, str]:
    """Tied module name → the one of its pair that the checkpoint stores.

    Where a checkpoint stores both, the second is a copy, and the first stands for both.
    """
    pairs: Mapping[str, str] = getattr(skeleton, "all_tied_weights_keys", None) or {}
    stored = set(names.values())
    return {
        (target if source in stored else source): (source if source in stored else target)
        for target, source in pairs.items()
        if stored & {source, target}
    }
