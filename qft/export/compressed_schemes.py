"""The compressed-tensors formats: how a matrix is rounded in each, and how config.json says it.

The words and the layout are those that the library compressed-tensors 0.20 writes and vLLM reads.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qft.export.integer_rounding import IntegerGrid, pack
from qft.shard_writer import Spec

VERSION = "0.20.0"  # of the library whose layout this is
_GROUPS = (128, 64, 32)  # weights a scale, the first that divides a row


@dataclass(frozen=True)
class Scheme:
    """One of the formats.

    Attributes:
        bits: of a weight.
        grouped: whether a scale belongs to a group of weights, or to a whole row.
        packed: whether integers lie side by side in 32-bit words, or are int8 tensors.
        activations: whether a layer's inputs are rounded to int8 as well, token by token, when it
            runs.
    """

    bits: int
    grouped: bool
    packed: bool
    activations: bool = False

    @property
    def format(self) -> str:
        """The library's name for how the weights are stored."""
        return "pack-quantized" if self.packed else "int-quantized"

    def grid(self, width: int) -> IntegerGrid:
        """How a matrix with rows of ``width`` weights is rounded."""
        fits = [group for group in _GROUPS if width % group == 0]
        return IntegerGrid(self.bits, fits[0] if self.grouped and fits else None)

    def fell_back(self, width: int) -> bool:
        """Whether rows of ``width`` weights do not fit the usual group."""
        return self.grouped and self.grid(width).group != _GROUPS[0]


SCHEMES = {
    "w4a16": Scheme(4, grouped=True, packed=True),
    "w8a16": Scheme(8, grouped=False, packed=True),
    "w8a8": Scheme(8, grouped=False, packed=False, activations=True),
}


def scheme_in(values: Mapping[str, Any]) -> str | None:
    """Which of SCHEMES a stored quantization config describes; None is another one."""
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return None
    found = {_named(group, values) for group in groups.values()}
    return found.pop() if len(found) == 1 else None


def _named(group: Any, values: Mapping[str, Any]) -> str | None:
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or weights.get("type") != "int":
        return None
    stored = group.get("format") or values.get("format")
    inputs = group.get("input_activations")
    for name, scheme in SCHEMES.items():
        same = (weights.get("num_bits"), stored, bool(inputs))
        if same == (scheme.bits, scheme.format, scheme.activations):
            return name
    return None


class CompressedLayout:
    """How one of the formats keeps rounded layers (:class:`qft.export.integer_plan.Layout`).

    - packed: ``weight_packed`` int32 ``[out, words]``, ``weight_scale`` ``[out, groups]``,
      ``weight_shape`` int64 ``[2]``;
    - else: ``weight`` int8 ``[out, in]``, ``weight_scale`` ``[out, 1]``.
    """

    def __init__(self, scheme: Scheme) -> None:
        self._scheme = scheme

    def grid(self, width: int) -> IntegerGrid:
        """As the scheme has it."""
        return self._scheme.grid(width)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The weights' own."""
        return dtype

    def specs(self, owner: str, size: tuple[int, int], dtype: torch.dtype) -> list[Spec]:
        """What a layer becomes."""
        height, width = size
        scales = (f"{owner}.weight_scale", (height, self.grid(width).groups(width)), dtype)
        if not self._scheme.packed:
            return [(f"{owner}.weight", size, torch.int8), scales]
        words = -(-width * self._scheme.bits // 32)
        packed = (f"{owner}.weight_packed", (height, words), torch.int32)
        return [packed, scales, (f"{owner}.weight_shape", (2,), torch.int64)]

    def stored(self, integers: Tensor) -> Tensor:
        """Packed or not."""
        return pack(integers, self._scheme.bits) if self._scheme.packed else integers

    def rest(self, spec: Spec, size: tuple[int, int]) -> Tensor:
        """The shape of the unpacked weight."""
        return torch.tensor(size)

    def notes(self, widths: Mapping[str, int]) -> list[str]:
        """Which layers have another group than most."""
        fell = Counter(width for width in widths.values() if self._scheme.fell_back(width))
        groups = {width: self.grid(width).group for width in fell}
        return [
            f"{count} layer(s) with rows of {width} weights have "
            + (f"a scale for {groups[width]} weights" if groups[width] else "one scale a row")
            + ", because groups of 128 do not fit"
            for width, count in sorted(fell.items())
        ]

    def quantization_config(
        self, widths: Mapping[str, int], ignored: Collection[str]
    ) -> dict[str, Any]:
        """See :func:`quantization_config`."""
        return quantization_config(self._scheme, widths, ignored)

    def metadata(
        self, layers: Mapping[str, tuple[int, torch.dtype]], others: Sequence[str]
    ) -> dict[str, str] | None:
        """The usual one."""
        return None


def quantization_config(
    scheme: Scheme, widths: Mapping[str, int], ignored: Collection[str]
) -> dict[str, Any]:
    """What config.json says of a folder.

    Most layers are meant by their class; those with another group than most are named one by one,
    and come first: the library warns of a name that stands behind the class it belongs to.

    Args:
        widths: names of the quantized layers → weights in a row.
        ignored: names of the linear layers that are not quantized.
    """
    layers: dict[int | None, list[str]] = defaultdict(list)
    for name, width in widths.items():
        layers[scheme.grid(width).group].append(name)
    groups = sorted(layers, key=lambda group: len(layers[group]))
    layers[groups[-1]] = ["Linear"]
    config_groups = {
        f"group_{number}": _group(scheme, group, layers[group])
        for number, group in enumerate(groups)
    }
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": config_groups,
        "ignore": sorted(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
    }


def _group(scheme: Scheme, group: int | None, targets: list[str]) -> dict[str, Any]:
    weights = _numbers(scheme.bits, "channel" if group is None else "group", group)
    inputs = {**_numbers(8, "token", None), "dynamic": True} if scheme.activations else None
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": scheme.format,
    }


def _numbers(bits: int, strategy: str, group: int | None) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "group_size": group,
        "dynamic": False,
    }
