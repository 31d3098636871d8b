"""safetensors in one floating dtype: the format every training and serving library opens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from qft.merging.tensors import TensorSource, rounded

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class InDtype:
    """A source whose floating tensors are read in another dtype, rounded once.

    Args:
        source: the model.
        dtype: of every floating tensor.
    """

    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype
        changed = {"dtype": str(dtype).removeprefix("torch.")}
        kept = {key: value for key, value in source.config.items() if key != "torch_dtype"}
        self.config = kept | changed
        self.files = source.files

    def names(self) -> list[str]:
        """As in the source."""
        return list(self._source.names())

    def module(self, name: str) -> str:
        """As in the source."""
        return self._source.module(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """As in the source."""
        return self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """The new dtype, where the tensor is floating."""
        own = self._source.dtype(name)
        return self._dtype if own.is_floating_point else own

    def read(self, name: str) -> torch.Tensor:
        """The tensor, converted.

        Raises:
            ModelError: a finite value is too large for float16.
        """
        return rounded(name, self._source.read(name), self.dtype(name))

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The same in blocks of rows."""
        for block in self._source.blocks(name):
            yield rounded(name, block, self.dtype(name))

    def made_from(self) -> list[tuple[str, int, int]]:
        """As in the source."""
        return list(self._source.made_from())

    def fingerprint(self) -> str:
        """Of the source, before the conversion."""
        return self._source.fingerprint()
