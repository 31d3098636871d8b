"""bitsandbytes 4 and 8 bits, in the very layout transformers saves and opens without requantizing.

Each linear layer is quantized from the source block by block of rows and written at once:
no model is built and no forward runs, so the CPU kernels that repack weights in place
(:func:`qft.quantization.guard_cpu_kernels`) are never near the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qft import models, quantization
from qft.errors import ModelError
from qft.export.delta_rounding import DeltaRounding, DeltaTally
from qft.export.layer_rows import Block, LayerRows
from qft.four_bit import BLOCK, unpack_rows
from qft.merging.bnb_rounding import (
    NESTED_BLOCK,
    Scales,
    empty_scales,
    groups,
    pack_rows,
    quantized_linears,
    round_int8,
    round_scales,
    scales_of,
    unround_int8,
)
from qft.merging.merge import Progress, write_config
from qft.merging.side_files import copy_files
from qft.merging.tensors import TensorSource
from qft.shard_writer import Spec, write_shards
from qft.shards import tensor_bytes

KINDS = ("nf4", "fp4", "int8")
_FLOAT_TEXT = 24  # the longest a float is in JSON


class BnbPlan:
    """What a quantized folder of a source will hold; refuses before anything is written.

    Args:
        source: the model, unquantized.
        kind: ``nf4``, ``fp4`` or ``int8``.

    Raises:
        ModelError: transformers does not know the architecture, or it has nothing to quantize.
    """

    def __init__(self, source: TensorSource, kind: str) -> None:
        quantization.require_bitsandbytes()
        self.source, self.kind = source, kind
        skeleton = models.build_skeleton(source.config)
        self._skip = quantization.unquantized_modules(skeleton)
        self._linears = quantized_linears(skeleton, self._skip)
        self._layers = LayerRows(source, self._linears, groups=kind != "int8")
        self._parents: dict[str, str] = {}  # written name → the source's name
        self._rest: dict[str, Tensor] = {}  # what lies beside the weights of the last layer
        self._tally = DeltaTally()
        self.notes: list[str] = []
        self.specs = [spec for name in source.names() for spec in self._specs(name)]
        if not any("." in written.removeprefix(source.module(parent))
                   for written, parent in self._parents.items()):  # fmt: skip
            raise ModelError("This model has no linear layer to quantize.",
                             found=type(skeleton).__name__)  # fmt: skip

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor_bytes(shape, dtype) for _, shape, dtype in self.specs)

    def quantization_config(self) -> dict[str, Any]:
        """What config.json must say, so that transformers opens the folder as it is."""
        dtypes = [self.source.dtype(name) for name in self.source.names()]
        floating = [dtype for dtype in dtypes if dtype.is_floating_point]
        config: Any = quantization.loading_config(self.kind, floating[0], self._skip)
        values: dict[str, Any] = config.to_dict()
        return values

    def _specs(self, name: str) -> list[Spec]:
        """Everything one tensor of the source becomes."""
        module = self.source.module(name)
        shape = self.source.shape(name)
        owner = module.removesuffix(".weight")
        if owner not in self._linears or owner == module:
            specs = [(module, shape, self.source.dtype(name))]
        elif self.kind == "int8":
            rows = shape[1] if self._linears[owner] else shape[0]
            full = shape[::-1] if self._linears[owner] else shape
            specs = [
                (module, full, torch.int8),
                (f"{owner}.SCB", (rows,), torch.float32),
                (f"{owner}.weight_format", (), torch.uint8),
            ]
        else:
            specs = self._four_bit_specs(module, shape, self.source.dtype(name))
        self._parents |= {written: name for written, _, _ in specs}
        return specs

    def _four_bit_specs(
        self, module: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> list[Spec]:
        count = math.prod(shape)
        blocks = -(-count // BLOCK)
        state = f"{module}.quant_state.bitsandbytes__{self.kind}"
        return [
            (module, (-(-count // 2), 1), torch.uint8),
            (f"{module}.absmax", (blocks,), torch.uint8),
            (f"{module}.nested_absmax", (-(-blocks // NESTED_BLOCK),), torch.float32),
            (f"{module}.nested_quant_map", (256,), torch.float32),
            (f"{module}.quant_map", (16,), torch.float32),
            (state, (_state_length(self.kind, shape[::-1], dtype),), torch.uint8),
        ]

    def produce(self, written: str) -> Iterable[Tensor]:
        """One tensor of the folder in blocks of rows; a layer's parts are wanted in their order."""
        name = self._parents[written]
        module = self.source.module(name)
        owner = module.removesuffix(".weight")
        if owner not in self._linears or owner == module:
            return self.source.blocks(name)
        if written == module:
            stream = self._int8 if self.kind == "int8" else self._four_bit
            return stream(name, module, owner)
        return [self._rest.pop(written)]

    def _int8(self, name: str, module: str, owner: str) -> Iterator[Tensor]:
        found = []
        for block in self._layers.blocks(name):
            values, scales = round_int8(block.rows, module)
            if block.changed:
                plain = unround_int8(*round_int8(block.plain, module))
                self._count(block, unround_int8(values, scales), plain)
            found.append(scales)
            yield values
        row_major = torch.tensor(0, dtype=torch.uint8)
        self._rest = {f"{owner}.SCB": torch.cat(found), f"{owner}.weight_format": row_major}

    def _four_bit(self, name: str, module: str, owner: str) -> Iterator[Tensor]:
        scales, plain_scales = self._scales(name)
        width = self._layers.size(name)[1]
        for block in self._layers.blocks(name):
            values = pack_rows(block.rows, self.kind)
            if plain_scales is not None and block.base is not None:
                own = pack_rows(block.plain, self.kind)
                self._count(
                    block,
                    self._unpack(values, scales, block, width),
                    self._unpack(own, plain_scales, block, width),
                )
            yield values
        dtype = self.source.dtype(name)
        self._rest = _state_parts(module, self.kind, scales, self._layers.size(name), dtype)

    def _scales(self, name: str) -> tuple[Scales, Scales | None]:
        """A layer's scales and, where the adapter changes it, those of the base alone."""
        size, changed = self._layers.size(name), False
        own, plain = empty_scales(size), empty_scales(size)
        for block in self._layers.blocks(name):
            part = groups(block.part, size[1])
            own[part] = scales_of(block.rows)
            plain[part] = scales_of(block.plain) if block.changed else own[part]
            changed |= block.changed
        return round_scales(own), round_scales(plain) if changed else None

    def _unpack(self, packed: Tensor, scales: Scales, block: Block, width: int) -> Tensor:
        shape = (len(block.part), width)
        values = scales.values[groups(block.part, width)]
        return unpack_rows(packed, values, self.kind, shape, block.rows.dtype)

    def _count(self, block: Block, stored: Tensor, plain: Tensor) -> None:
        assert block.base is not None
        self._tally.add(stored, plain, block.base, block.merged)

    def delta_rounding(self) -> DeltaRounding | None:
        """What became of the adapter's change, once all was produced."""
        return self._tally.result()


def _state_parts(
    module: str, kind: str, scales: Scales, size: tuple[int, int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """What lies beside a layer's packed weights, as bitsandbytes names it."""
    import bitsandbytes.functional as functional

    nested = functional.QuantState(
        absmax=scales.nested, code=scales.nested_map, blocksize=NESTED_BLOCK, dtype=torch.float32
    )
    state = functional.QuantState(
        absmax=scales.codes, shape=torch.Size(size), dtype=dtype, blocksize=BLOCK,
        code=functional.get_4bit_type(kind, device="cpu"), quant_type=kind,
        offset=scales.offset, state2=nested,
    )  # fmt: skip
    parts = {f"{module}.{key}": value for key, value in state.as_dict(packed=True).items()}
    key = f"{module}.quant_state.bitsandbytes__{kind}"
    text = bytes(parts[key].tolist()).ljust(_state_length(kind, size, dtype))  # JSON may end so
    return {**parts, key: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def _state_length(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes kept for a layer's quantization state.

    Its JSON holds a float known only after quantizing, while a safetensors header must be written
    before; so room is kept for the longest.
    """
    known = {
        "quant_type": kind, "blocksize": BLOCK, "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape), "nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32",
        "nested_offset": 0,
    }  # fmt: skip
    return len(json.dumps(known)) + _FLOAT_TEXT


def write_bnb(
    plan: BnbPlan, folder: Path, max_shard_bytes: int, progress: Progress | None = None
) -> None:
    """Writes the quantized model folder; its config says which model it was quantized from."""
    copy_files(plan.source.files, folder)
    write_shards(
        folder,
        plan.specs,
        plan.produce,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    changes = {
        "quantization_config": plan.quantization_config(),
        models.ORIGINAL_KEY: plan.source.fingerprint(),
    }
    write_config(plan.source, folder, **changes)
