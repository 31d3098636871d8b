"""A base that lies on the disk quantized by bitsandbytes, dequantized while it is read.

The layout is what transformers' ``save_pretrained`` writes. All of it comes from a file and is
checked before it is used: what a kernel is told to read must be there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qft import models
from qft.errors import ModelError
from qft.four_bit import unpack_rows
from qft.merging.bnb_rounding import (
    groups,
    quantized_linears,
    rows_together,
    unround_int8,
)
from qft.merging.rounded_base import DequantizedBase
from qft.shards import ShardedCheckpoint

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_STATE = ".quant_state.bitsandbytes__"
_FOUR_BIT_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_INT8_PARTS = ("SCB", "weight_format")
_MAX_STATE_BYTES = 1 << 16


@dataclass(frozen=True)
class _FourBit:
    """What a file says of one 4-bit layer, checked.

    Attributes:
        size: outputs and inputs.
        dtype: of the dequantized weights.
        block: weights a scale.
        nested: scales a second scale, and the mean that is added; None without double quantization.
    """

    kind: str
    size: tuple[int, int]
    dtype: torch.dtype
    block: int
    nested: tuple[int, float] | None


class StoredQuantizedBase(DequantizedBase):
    """A bitsandbytes folder, read as the unquantized model it stands for.

    Args:
        checkpoint: the open files.
        config: the folder's config.json.
        transposed: checkpoint names of weights that their module holds transposed.

    Raises:
        ModelError: what the files say of a quantized layer cannot be.
    """

    def __init__(
        self, checkpoint: ShardedCheckpoint, config: Mapping[str, Any], transposed: frozenset[str]
    ) -> None:
        names = self._held = set(checkpoint.names())
        states = dict(n.rsplit(_STATE, 1) for n in names if _STATE in n)
        int8 = {
            name
            for name in names
            if name.endswith(".weight") and checkpoint.dtype(name) == torch.int8
            and f"{name.removesuffix('weight')}SCB" in names
        }  # fmt: skip
        parts = {f"{name}{_STATE}{kind}" for name, kind in states.items()}
        parts |= {name + part for name in states for part in _FOUR_BIT_PARTS}
        parts |= {name.removesuffix("weight") + part for name in int8 for part in _INT8_PARTS}
        layers = {*states, *int8}
        super().__init__(checkpoint, {name: name in transposed for name in layers})
        self._names = [name for name in checkpoint.names() if name not in parts]
        self._four_bit = {name: self._read_state(name, kind) for name, kind in states.items()}
        for name in int8:
            self._require_part(name, name.removesuffix("weight") + "SCB",
                               checkpoint.shape(name)[:1], torch.float32)  # fmt: skip
        stored = str(config.get("dtype") or config.get("torch_dtype"))
        self._dtype = models.DTYPES.get(stored, torch.bfloat16)
        self._scales: tuple[str, Tensor] | None = None  # of the layer that was read last

    @property
    def rounded(self) -> str:
        """See :class:`qft.merging.rounded_base.BaseCheckpoint`."""
        return "stored"

    def names(self) -> list[str]:
        """The model's tensors, without what quantization has put beside them."""
        return list(self._names)

    def dtype(self, name: str) -> torch.dtype:
        """Of a 4-bit layer what was quantized; of an 8-bit one, which does not say, the model's."""
        if name in self._four_bit:
            return self._four_bit[name].dtype
        return self._dtype if name in self._layers else self._checkpoint.dtype(name)

    def _read_state(self, name: str, kind: str) -> _FourBit:
        state = f"{name}{_STATE}{kind}"
        shape = self._checkpoint.shape(state)
        if len(shape) != 1 or shape[0] > _MAX_STATE_BYTES:
            raise self._broken(state, f"shape {shape}")
        try:
            values = json.loads(bytes(self._checkpoint.read(state).tolist()))
            height, width = (int(n) for n in values["shape"])
            found = _FourBit(
                kind=str(values["quant_type"]),
                size=(height, width),
                dtype=models.DTYPES[values["dtype"]],
                block=int(values["blocksize"]),
                nested=(int(values["nested_blocksize"]), float(values["nested_offset"]))
                if "nested_offset" in values
                else None,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise self._broken(state, f"{type(error).__name__}: {error}") from None
        possible = (
            found.kind == kind in ("nf4", "fp4")
            and min(found.size) > 0
            and found.block in _BLOCKS
            and (found.nested is None or (found.nested[0] in _BLOCKS and
                                          math.isfinite(found.nested[1])))
        )  # fmt: skip
        if not possible:
            raise self._broken(state, str(values)[:200])
        self._require_parts(name, found)
        return found

    def _require_parts(self, name: str, found: _FourBit) -> None:
        """Every tensor of a 4-bit layer is as long as its shape wants it."""
        count = math.prod(found.size)
        blocks = -(-count // found.block)
        packed, dtype = self._checkpoint.shape(name), self._checkpoint.dtype(name)
        if len(packed) != 2 or packed[1] != 1 or packed[0] * dtype.itemsize != -(-count // 2):
            raise self._broken(name, f"{packed} {dtype} for {found.size}")
        if found.nested is None:
            self._require_part(name, f"{name}.absmax", (blocks,), torch.float32)
            return
        self._require_part(name, f"{name}.absmax", (blocks,), torch.uint8)
        nested = (-(-blocks // found.nested[0]),)
        self._require_part(name, f"{name}.nested_absmax", nested, torch.float32)
        self._require_part(name, f"{name}.nested_quant_map", (256,), torch.float32)

    def _require_part(
        self, name: str, part: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        if part not in self._held:
            raise self._broken(name, f"no {part}")
        found = self._checkpoint.shape(part), self._checkpoint.dtype(part)
        if found != (shape, dtype):
            raise self._broken(part, f"{found[0]} {found[1]}, wanted {shape} {dtype}")

    def _broken(self, name: str, found: str) -> ModelError:
        return ModelError(
            "A quantized layer is broken or not to be trusted.",
            where=f"{self.folder}: {name}",
            found=found,
            fix="get the model again from a source you trust",
        )

    def _size(self, name: str) -> tuple[int, int]:
        if name in self._four_bit:
            return self._four_bit[name].size
        height, width = self._checkpoint.shape(name)
        return height, width

    def _together(self, name: str) -> int:
        four_bit = self._four_bit.get(name)
        return rows_together(four_bit.size[1], four_bit.block) if four_bit else 1

    def _block(self, name: str, part: range) -> Tensor:
        four_bit = self._four_bit.get(name)
        if four_bit is None:
            scales = self._checkpoint.read_rows(name.removesuffix("weight") + "SCB", part)
            return unround_int8(self._checkpoint.read_rows(name, part), scales)
        if self._scales is None or self._scales[0] != name:
            self._scales = (name, self._read_scales(name, four_bit))
        width = four_bit.size[1]
        per_item = 2 * self._checkpoint.dtype(name).itemsize  # weights in one stored number
        items = range(part.start * width // per_item, -(-part.stop * width // per_item))
        packed = self._checkpoint.read_rows(name, items).view(torch.uint8)
        scales = self._scales[1][groups(part, width, four_bit.block)]
        shape = (len(part), width)
        return unpack_rows(packed, scales, four_bit.kind, shape, four_bit.dtype, four_bit.block)

    def _read_scales(self, name: str, four_bit: _FourBit) -> Tensor:
        """The float32 scales of a layer, as loading makes them of what is stored."""
        scales = self._checkpoint.read(f"{name}.absmax")
        if four_bit.nested is None:
            return scales
        import bitsandbytes.functional as functional

        block, offset = four_bit.nested
        nested = functional.QuantState(
            absmax=self._checkpoint.read(f"{name}.nested_absmax"),
            code=self._checkpoint.read(f"{name}.nested_quant_map"),
            blocksize=block,
            dtype=torch.float32,
        )
        values: Tensor = functional.dequantize_blockwise(scales, nested)
        values += torch.tensor(offset)
        return values


def open_stored(
    folder: Path, config: Mapping[str, Any], skeleton: nn.Module, names: Mapping[str, str]
) -> StoredQuantizedBase:
    """Opens a folder that bitsandbytes has quantized.

    Args:
        names: checkpoint name → module name, from :func:`qft.models.module_names`.

    Raises:
        ModelError: it is quantized in another way, or broken.
    """
    require_readable(folder, config)
    turned = {f"{n}.weight" for n, turned in quantized_linears(skeleton, ()).items() if turned}
    transposed = frozenset(name for name, module in names.items() if module in turned)
    return StoredQuantizedBase(ShardedCheckpoint(folder), config, transposed)


def require_readable(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ModelError where a folder is quantized by another than bitsandbytes."""
    kind = models.stored_kind(config["quantization_config"])
    if kind not in ("nf4", "fp4", "int8"):
        raise ModelError(
            "The base is stored quantized in a way that cannot be undone here.",
            where=folder,
            found=f"quantization_config: {kind}",
            fix="name the unquantized model: --base ORIGINAL",
        )
