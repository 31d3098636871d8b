"""bitsandbytes 4 and 8 bits, in the very layout transformers saves and opens without requantizing.

Each linear layer is quantized from the source by bitsandbytes' functional API and written at once:
no model is built and no forward runs, so the CPU kernels that repack weights in place
(:func:`qft.quantization.guard_cpu_kernels`) are never near the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bitsandbytes.functional as functional
import torch
from torch import Tensor, nn

from qft import quantization
from qft.errors import ModelError
from qft.merging.merge import Progress, write_config
from qft.merging.side_files import copy_files
from qft.merging.tensors import TensorSource
from qft.models import ORIGINAL_KEY
from qft.shard_writer import Spec, write_shards
from qft.shards import tensor_bytes

KINDS = ("nf4", "fp4", "int8")
_BLOCK = 64  # weights a scale (QLoRA, https://arxiv.org/abs/2305.14314)
_NESTED_BLOCK = 256  # scales a second scale
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
        skeleton = build_skeleton(source.config)
        self._skip = quantization.unquantized_modules(skeleton)
        self._linears = _linears(skeleton, self._skip)
        self._parents: dict[str, str] = {}  # written name → the source's name
        self._cache: tuple[str, dict[str, Tensor]] = ("", {})
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
        blocks = -(-count // _BLOCK)
        state = f"{module}.quant_state.bitsandbytes__{self.kind}"
        return [
            (module, (-(-count // 2), 1), torch.uint8),
            (f"{module}.absmax", (blocks,), torch.uint8),
            (f"{module}.nested_absmax", (-(-blocks // _NESTED_BLOCK),), torch.float32),
            (f"{module}.nested_quant_map", (256,), torch.float32),
            (f"{module}.quant_map", (16,), torch.float32),
            (state, (_state_length(self.kind, shape[::-1], dtype),), torch.uint8),
        ]

    def produce(self, written: str) -> Tensor:
        """One tensor of the folder; a layer is quantized once for all of its parts."""
        name = self._parents[written]
        module = self.source.module(name)
        owner = module.removesuffix(".weight")
        if owner not in self._linears or owner == module:
            return self.source.read(name)
        if self._cache[0] != name:
            self._cache = ("", {})  # frees the layer before
            self._cache = (name, self._quantize(name, module, owner))
        return self._cache[1].pop(written)

    def _quantize(self, name: str, module: str, owner: str) -> dict[str, Tensor]:
        weight = self.source.read(name)
        if self._linears[owner]:  # GPT-2's Conv1D holds its weight transposed
            weight = weight.T
        weight = weight.contiguous()
        if self.kind == "int8":
            return _quantize_int8(weight, module, owner)
        return _quantize_four_bit(weight, module, self.kind)


def _quantize_int8(weight: Tensor, module: str, owner: str) -> dict[str, Tensor]:
    """Row-wise absmax, from float16 as transformers does it (LLM.int8, arXiv 2208.07339)."""
    half = weight.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ModelError("A weight is too large for int8 quantization, which passes float16.",
                         where=module, fix="export to bnb:nf4 or safetensors:bf16")  # fmt: skip
    values, scales, _ = functional.int8_vectorwise_quant(half)
    return {
        module: values,
        f"{owner}.SCB": scales,
        f"{owner}.weight_format": torch.tensor(0, dtype=torch.uint8),  # 0 is row-major
    }


def _quantize_four_bit(weight: Tensor, module: str, kind: str) -> dict[str, Tensor]:
    values, state = functional.quantize_4bit(
        weight, blocksize=_BLOCK, compress_statistics=True, quant_type=kind
    )
    parts = {f"{module}.{key}": value for key, value in state.as_dict(packed=True).items()}
    key = f"{module}.quant_state.bitsandbytes__{kind}"
    length = _state_length(kind, tuple(weight.shape), weight.dtype)
    text = bytes(parts[key].tolist()).ljust(length)  # JSON may end in spaces
    return {**parts, module: values, key: torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def _state_length(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes kept for a layer's quantization state.

    Its JSON holds a float known only after quantizing, while a safetensors header must be written
    before; so room is kept for the longest.
    """
    known = {
        "quant_type": kind, "blocksize": _BLOCK, "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape), "nested_blocksize": _NESTED_BLOCK, "nested_dtype": "float32",
        "nested_offset": 0,
    }  # fmt: skip
    return len(json.dumps(known)) + _FLOAT_TEXT


def build_skeleton(config: Mapping[str, Any]) -> nn.Module:
    """The architecture a config names, on the meta device.

    Raises:
        ModelError: transformers does not know it.
    """
    import transformers

    named = str((config.get("architectures") or ["unknown"])[0])
    cls = getattr(transformers, named, None)
    if cls is None or not hasattr(cls, "config_class"):
        raise ModelError("transformers does not know this architecture.", where="config.json",
                         found=named)  # fmt: skip
    with torch.device("meta"):
        model: nn.Module = cls(cls.config_class.from_dict(dict(config)))
    return model


def _linears(skeleton: nn.Module, skip: list[str]) -> dict[str, bool]:
    """Names of the layers transformers would quantize → whether their weight lies transposed."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*skip, *(getattr(skeleton, "_keep_in_fp32_modules", None) or [])]
    return {
        name: isinstance(module, Conv1D)
        for name, module in skeleton.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D))
        and should_convert_module(name, kept)
    }


def write_bnb(
    plan: BnbPlan, folder: Path, max_shard_bytes: int, progress: Progress | None = None
) -> None:
    """Writes the quantized model folder; its config says which model it was quantized from."""
    copy_files(plan.source.files, folder)
    write_shards(
        folder,
        plan.specs,
        lambda name: [plan.produce(name)],
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    changes = {
        "quantization_config": plan.quantization_config(),
        ORIGINAL_KEY: plan.source.fingerprint(),
    }
    write_config(plan.source, folder, **changes)
