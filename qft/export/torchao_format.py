"""torchao's int8 weights, in the safetensors layout that torchao 0.18 flattens its tensors to.

A layer becomes ``_weight_qdata`` int8 ``[out, in]``, ``_weight_scale`` ``[out, 1]`` and
``_weight_zero_point`` int8 ``[out, 1]``, all zeros. What kind of tensor these make together stands
in the header's free text, under the weight's own name; transformers puts them together with it.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qft.export.integer_rounding import IntegerGrid
from qft.shard_writer import Spec

_PARTS = ("qdata", "scale", "zero_point")
_KIND = "Int8WeightOnlyConfig"


def is_int8(values: Mapping[str, Any]) -> bool:
    """Whether a stored quantization config describes this format."""
    kinds = values.get("quant_type")
    default = kinds.get("default") if isinstance(kinds, dict) else None
    return isinstance(default, dict) and default.get("_type") == _KIND


class TorchaoLayout:
    """Int8WeightOnly with a scale a row (:class:`qft.export.integer_plan.Layout`)."""

    def grid(self, width: int) -> IntegerGrid:
        """8 bits, a scale a row."""
        return IntegerGrid(8)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32, as torchao has it."""
        return torch.float32

    def specs(self, owner: str, size: tuple[int, int], dtype: torch.dtype) -> list[Spec]:
        """What a layer becomes."""
        column = (size[0], 1)
        return [
            (f"{owner}._weight_qdata", size, torch.int8),
            (f"{owner}._weight_scale", column, self.scale_dtype(dtype)),
            (f"{owner}._weight_zero_point", column, torch.int8),
        ]

    def stored(self, integers: Tensor) -> Tensor:
        """As they are."""
        return integers

    def rest(self, spec: Spec, size: tuple[int, int]) -> Tensor:
        """Zero points."""
        return torch.zeros(spec[1], dtype=spec[2])

    def notes(self, widths: Mapping[str, int]) -> list[str]:
        """Nothing."""
        return []

    def quantization_config(
        self, widths: Mapping[str, int], ignored: Collection[str]
    ) -> dict[str, Any]:
        """As transformers writes a TorchAoConfig."""
        per_row = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
        settings = {"group_size": None, "granularity": per_row, "set_inductor_config": True}
        kind = {"_type": _KIND, "_version": 2, "_data": settings}
        return {
            "quant_method": "torchao",
            "quant_type": {"default": kind},
            "modules_to_not_convert": sorted(ignored),
            "include_input_output_embeddings": False,
            "untie_embedding_weights": False,
        }

    def metadata(
        self, layers: Mapping[str, tuple[int, torch.dtype]], others: Sequence[str]
    ) -> dict[str, str] | None:
        """What kind of tensor each name stands for."""
        found: dict[str, Any] = {name: {"_type": "Tensor"} for name in others}
        for name, (width, dtype) in layers.items():
            described = {
                "act_quant_kwargs": None,
                "reduce_range": False,
                "block_size": [1, width],
                "dtype": {"_type": "torch.dtype", "_data": str(dtype).removeprefix("torch.")},
            }
            found[name] = {
                "_type": "Int8Tensor", "_data": described, "_tensor_data_names": list(_PARTS)
            }  # fmt: skip
        found["tensor_names"] = [*others, *layers]
        return {"format": "pt"} | {key: json.dumps(value) for key, value in found.items()}
