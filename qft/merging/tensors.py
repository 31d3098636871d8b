"""A model read block by block: a base, or a base with an adapter on it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qft.errors import AdapterError, ModelError
from qft.merging.rounded_base import BaseCheckpoint
from qft.shards import Fingerprint, row_blocks, tensor_bytes
from qft.strategy import Factored, LowRank, Merge, Rows


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


class RowSource(TensorSource, Protocol):
    """A source whose rows can be asked for in any order: what the export formats write from."""

    def rows(self, name: str, part: slice) -> Tensor:
        """Some rows of a tensor, ``part`` with both ends named."""


class ModuleTensors:
    """A checkpoint under module names, as strategies see it (:class:`qft.strategy.BaseTensors`).

    Args:
        checkpoint: the open base.
        names: checkpoint name → module name, from :func:`qft.models.module_names`.
        tied: module name that is not stored → the module name whose tensor it shares.
        transposed: names of weights that are stored ``[in, out]``.
    """

    def __init__(
        self,
        checkpoint: BaseCheckpoint,
        names: Mapping[str, str],
        tied: Mapping[str, str] | None = None,
        transposed: Collection[str] = (),
    ) -> None:
        self._checkpoint = checkpoint
        self._stored = {module: name for name, module in names.items()}
        self._tied, self._transposed = dict(tied or {}), frozenset(transposed)
        for absent, present in self._tied.items():
            if present in self._stored:
                self._stored.setdefault(absent, self._stored[present])

    @property
    def rounded(self) -> bool:
        """See :class:`qft.strategy.BaseTensors`."""
        return bool(self._checkpoint.rounded)

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

    def transposed(self, name: str) -> bool:
        """Whether a layer's weight is stored ``[in, out]``."""
        return name in self._transposed

    def shared(self, name: str) -> list[str]:
        """The other names of a tensor that the base ties to them."""
        first = self._tied.get(name, name)
        group = [first, *(absent for absent, present in self._tied.items() if present == first)]
        return [other for other in group if other != name]

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
        tied: module name that stays tied → the one that is stored; see :func:`tied_names`.
        twins: module name that was tied in the base and is no longer → the one that is stored.
        dtype: of every floating tensor; None keeps each one's own.
        config: the result's config.json.
        files: the result's tokenizer and generation files.
        sources: the adapter's files.
        settings: what else decides the result, as text.
    """

    def __init__(
        self,
        base: BaseCheckpoint,
        names: Mapping[str, str],
        merge: Merge | None = None,
        *,
        tied: Mapping[str, str] | None = None,
        twins: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
        config: Mapping[str, Any] | None = None,
        files: Mapping[str, Path] | None = None,
        sources: Sequence[Path] = (),
        settings: str = "",
    ) -> None:
        self._base, self._merge, self._dtype = base, merge, dtype
        self._sources, self._settings = list(sources), settings
        # not copied: they lie in a file
        self._added: Mapping[str, Rows] = merge.added() if merge is not None else {}
        once = set(tied or {})  # these are written under one name alone
        self._modules = {n: m for n, m in names.items() if m not in once}
        self.untied: set[str] = set()  # names that the base has no tensor of their own for
        self._stored = {name: name for name in names}  # a name → where its base tensor lies
        places = {module: name for name, module in names.items()}
        for absent, present in (twins or {}).items():
            if absent not in places:
                self._modules[absent] = absent
                self._stored[absent] = places[present]
                self.untied.add(absent)
        known = {*self._modules.values(), *once}
        self._modules |= {name: name for name in self._added if name not in known}
        self.config: Mapping[str, Any] = dict(config or {})
        self.files: Mapping[str, Path] = dict(files or {})
        self.changed: set[str] = set()  # names whose value was read and is not the base's
        self._fingerprint = Fingerprint()

    def names(self) -> list[str]:
        """The base's names in their order, then what the adapter adds."""
        return list(self._modules)

    def module(self, name: str) -> str:
        """The module name of a checkpoint name."""
        return self._modules[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the merged tensor."""
        if self._merge is None:
            return self._base.shape(self._stored[name])
        return tuple(self._merge.shape(self._modules[name]))

    def dtype(self, name: str) -> torch.dtype:
        """What :meth:`read` gives."""
        stored = self._stored.get(name)
        own = self._base.dtype(stored) if stored else self._added[self._modules[name]].dtype
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
            yield self.rows(name, part)

    def rows(self, name: str, part: slice) -> Tensor:
        """Some rows of the merged value; see :meth:`read`."""
        return self.as_stored(name, self.pair(name, part)[1], part)

    def as_stored(self, name: str, block: Tensor, part: slice) -> Tensor:
        """Rows from :meth:`pair` as they are to be stored."""
        result = rounded(name, block, self.dtype(name))
        if part.start == 0:
            self._fingerprint.add_tensor(name, result, self.shape(name))
        return result

    def pair(self, name: str, part: slice) -> tuple[Tensor | None, Tensor]:
        """Some rows of the base, and what becomes of them before rounding: the same object or not.

        The base's are None where the adapter adds or replaces the tensor.
        """
        module = self._modules[name]
        if module in self._added:
            self.changed.add(name)
            added = self._added[module]
            return None, added if isinstance(added, Tensor) and not added.shape else added[part]
        place = self._stored[name]
        if self._base.shape(place):
            stored = self._base.read_rows(place, range(part.start, part.stop))
        else:
            stored = self._base.read(place)
        if self._merge is None:
            return stored, stored
        merged = self._merge.edit(module, stored, part.start)
        if merged is not stored:
            self.changed.add(name)
        return stored, merged

    def made_from(self) -> list[tuple[str, int, int]]:
        """See :class:`TensorSource`; how the base is rounded decides the bytes as well."""
        words = [(word, 0, 0) for word in (self._settings, self._base.rounded) if word]
        return [*described([*self._base.files(), *self._sources]), *words]

    def factors(self) -> Mapping[str, LowRank]:
        """The adapter's whole change as low-rank updates, by module name.

        Raises:
            AdapterError: it is more than that, or there is no adapter.
        """
        if not isinstance(self._merge, Factored):
            raise AdapterError(
                "There are no low-rank updates to be written apart from the base.",
                found="no adapter" if self._merge is None else self._settings,
                fix="export it as one model: --format gguf:q8_0",
            )
        return self._merge.factors()

    def fingerprint(self) -> str:
        """Of the base as it is, or of the folder a merge would write, once all of it was read."""
        if self._merge is None and self._dtype is None and not self._base.rounded:
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
