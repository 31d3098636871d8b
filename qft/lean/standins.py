"""What takes a foreign tensor's or kernel's place while a step is metered on fake tensors.

Attention on the fake device
``meta`` would be computed by its formula, with scores of length squared; here it is the CPU's fused
kernel, whose bytes are those of any flash attention: queries, keys, values, outputs, and a float32
number a query and head. Quantized layers hold as many bytes as bitsandbytes' own.

Each is proven equal to a real step in the tests; what CUDA's kernel takes for itself (`OnCuda`) was
read off its source and agrees with peaks that were measured on a GPU (`benchmarks/gpu`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_BLOCK, _SECOND_BLOCK = 64, 256  # weights a scale, and scales a scale of theirs (QLoRA)


class FusedKernel(TorchFunctionMode):
    """Within it ``scaled_dot_product_attention`` on fake tensors is the CPU's fused kernel.

    It is entered around each call: a layer that is run again in the backward pass is run outside
    of the modes that surround the whole step.

    Args:
        on_cuda: what CUDA's kernel takes for itself in the backward pass counts as well.
    """

    def __init__(self, on_cuda: bool = False) -> None:
        super().__init__()
        self._on_cuda = on_cuda

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention and args[0].is_meta:
            return _attention(*args, **{**(kwargs or {}), "on_cuda": self._on_cuda})
        return func(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False, on_cuda: bool = False,
) -> Tensor:  # fmt: skip
    """Keys and values of grouped queries are not repeated; the kernel takes them as they are."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(
            attn_mask.logical_not(), float("-inf")
        )
    if on_cuda:
        made: Tensor = OnCuda.apply(query, key, value, is_causal, attn_mask, scale)  # type: ignore[no-untyped-call]
        return made
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: Tensor = kernel(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return result


class OnCuda(torch.autograd.Function):
    """The fused kernel with the memory that CUDA's takes for itself in the backward pass.

    That is the queries' gradient and a sum a row in float32, and, where several heads share keys
    and values, those heads' own gradients of them (FlashAttention 2 as torch has it).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool, mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:  # fmt: skip
        """As the CPU's kernel."""
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        result, normalisers = kernel(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(query, key, value, result, normalisers, mask)
        ctx.settings = causal, scale
        return result  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """As the CPU's kernel, with that memory held."""
        query, key, value, result, normalisers, mask = ctx.saved_tensors
        causal, scale = ctx.settings
        room = [torch.empty_like(query, dtype=torch.float32), torch.empty_like(normalisers)]
        if key.shape[1] != query.shape[1]:
            room += [torch.empty_like(query), torch.empty_like(query)]
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        made = kernel(gradient, query, key, value, result, normalisers, 0.0, causal,
                      attn_mask=mask, scale=scale)  # fmt: skip
        del room
        return (*made, None, None, None)


@dataclass(frozen=True)
class QuantizedBytes:
    """Bytes of a quantized weight.

    Attributes:
        packed: the numbers themselves.
        scales: 8-bit scales (4 bits, double quantization), or float32 ones a row (int8).
        scale_scales: float32 scales of the scales, and their offset.
        codes: the float32 numbers that 4 bits and those scales stand for; each layer has its own.
    """

    packed: int
    scales: int
    scale_scales: int
    codes: int


def quantized_bytes(kind: str, rows: int, columns: int) -> QuantizedBytes:
    """Of a ``[rows, columns]`` weight in ``nf4``, ``fp4`` (double quantization) or ``int8``."""
    count = rows * columns
    if kind == "int8":
        return QuantizedBytes(count, 4 * rows, 0, 0)
    blocks = math.ceil(count / _BLOCK)
    second = 4 * math.ceil(blocks / _SECOND_BLOCK) + 4
    return QuantizedBytes(math.ceil(count / 2), blocks, second, 4 * (16 + 256))


class Room(Protocol):
    """Memory that several weights are dequantized into (`qft.quantization.Scratch`)."""

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor to write into."""


class QuantizedLinear(nn.Linear):
    """A linear layer that holds a quantized weight's bytes; on meta and fake tensors only.

    Args:
        plain: whose shape it has.
        kind: see `quantized_bytes`.
        room: what its weight is dequantized into; None is a new tensor each time.
    """

    def __init__(self, plain: nn.Linear, kind: str, room: Room | None = None) -> None:
        nn.Module.__init__(self)  # not a linear layer's own: it would make a dense weight
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.kind, self.dtype, self.room = kind, plain.weight.dtype, room
        size = quantized_bytes(kind, plain.out_features, plain.in_features)
        device = plain.weight.device
        self.weight = nn.Parameter(
            torch.empty(size.packed, dtype=torch.uint8, device=device), requires_grad=False
        )
        scales = torch.uint8 if kind != "int8" else torch.float32
        self.register_buffer(
            "scales", torch.empty(size.scales // scales.itemsize, dtype=scales, device=device)
        )
        self.register_buffer("scale_scales", torch.empty(size.scale_scales // 4, device=device))
        self.register_buffer("codes", torch.empty(size.codes // 4, device=device))
        self.bias = plain.bias  # type: ignore[assignment]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """As many bytes as dequantizing takes in the engine's own layers."""
        if self.room is None:
            return self.fresh(dtype)
        return self.room.take((self.out_features, self.in_features), dtype, self.weight.device)

    def fresh(self, dtype: torch.dtype) -> Tensor:
        """As many bytes as bitsandbytes' own layers take, which share no room."""
        shape = (self.out_features, self.in_features)
        return torch.empty(shape, dtype=dtype, device=self.weight.device)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """As bitsandbytes: the weight is dequantized, and not kept for the backward pass.

        Its 8-bit product keeps the layer's input, which its 4-bit one does not.
        """
        result: Tensor = _Product.apply(x, self)  # type: ignore[no-untyped-call]
        return result if self.bias is None else result + self.bias

    # what `qft.lean.lora_linear.Frozen` asks for

    def product(self, x: Tensor) -> Tensor:
        """See `qft.lean.lora_linear.Frozen`."""
        return functional.linear(x, self.dense(x.dtype), self.bias)

    def transposed(self, gradient: Tensor) -> Tensor:
        """See `qft.lean.lora_linear.Frozen`."""
        return gradient @ self.dense(gradient.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        if layer.kind == "int8" and ctx.needs_input_grad[0]:
            ctx.kept = x  # bitsandbytes needs it no more, and yet keeps it with the graph
        return x @ layer.fresh(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return gradient @ ctx.layer.fresh(gradient.dtype), None


def quantize_skeleton(
    model: nn.Module, kind: str, keep: tuple[str, ...] = (), room: Room | None = None
) -> None:
    """Replaces a meta model's linear layers, but for those named, by `QuantizedLinear`."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name not in keep:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, QuantizedLinear(module, kind, room))


class BitsAndBytesAdam(torch.optim.Optimizer):
    """An optimizer that holds the bytes of bitsandbytes' AdamW and changes nothing.

    Args:
        parameters: or groups of them.
        bits: of the states; what is small, or ``wide``, has 32 all the same.
        wide: parameters whose states are in 32 bits (those of embeddings, in a Trainer).
        paged: the large states lie where a GPU fetches them page by page: on the host.
    """

    def __init__(
        self,
        parameters: Iterable[Any],
        bits: int = 8,
        *,
        wide: Collection[nn.Parameter] = (),
        paged: bool = False,
    ) -> None:
        super().__init__(list(parameters), {"lr": 0.0})
        self._bits, self._paged = bits, paged
        self._wide = {id(parameter) for parameter in wide}
        self._codes: dict[torch.device, list[Tensor]] = {}  # all states share them

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Makes the states, the first time."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if parameter.grad is None or self.state[parameter]:
                continue
            for number in ("1", "2"):
                self.state[parameter] |= self._state(parameter, number)

    def _state(self, parameter: nn.Parameter, number: str) -> dict[str, Tensor]:
        size, device = parameter.numel(), parameter.device
        place = torch.device("cpu") if self._paged and size >= _PAGED_FROM else device
        if self._bits == 32 or size < _SMALL or id(parameter) in self._wide:
            return {f"state{number}": torch.empty(size, device=place)}
        if device not in self._codes:
            self._codes[device] = [torch.empty(256, device=device) for _ in range(2)]
        return {
            f"state{number}": torch.empty(size, dtype=torch.uint8, device=place),
            f"absmax{number}": torch.empty(math.ceil(size / 256), device=device),
            f"qmap{number}": self._codes[device][int(number) - 1],
        }


_SMALL = 4096  # numbers; with fewer the states have 32 bits
_PAGED_FROM = 10**5  # numbers
