"""The loss of an output layer, over label positions only, in chunks of them.

Logits are the largest tensors of a language model's training: positions times vocabulary, in
float32, several times over. Here they exist for a few positions at a time. The hidden states'
gradient is made right there, in the forward pass, while a chunk's logits are at hand; the backward
pass only scales it. With the positions that have no label left out first, nothing is computed twice
and nothing of size ``positions x vocabulary`` ever exists.

A loss is anything that turns a chunk's logits into their gradient (`LogitLoss`): cross-entropy
here, a teacher's distribution in `qft.lean.divergence`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from qft.lean.alike import tiles

CHUNK_BYTES = 2**28  # of a chunk's logits, in float32 and in the model's own type
CPU_ROWS = 256  # positions a chunk; more make a CPU no faster
IGNORED = -100


class LogitLoss(Protocol):
    """What is minimised: a number for each position.

    Attributes:
        extra_tensors: of a chunk of logits' size in float32, that it makes beside the logits.
    """

    @property
    def extra_tensors(self) -> int:
        """See above."""

    def __call__(self, logits: Tensor, rows: slice) -> Tensor:
        """The losses of some positions, ``[positions]``, in float32.

        Args:
            logits: ``[positions, vocabulary]``, float32; **overwritten with its gradient**.
            rows: which positions these are.
        """


@dataclass(frozen=True)
class CrossEntropy:
    """Negative log-likelihood of one class a position.

    Attributes:
        targets: ``[positions]``, all of them classes.
        smoothing: share of a label that is spread over all classes (Szegedy et al. 2016).
        class_weights: ``[vocabulary]``; what a label of each class counts, or None.
        z_loss: factor of the squared log-normaliser, which keeps logits small (PaLM, 2022).
    """

    extra_tensors: ClassVar[int] = 0

    targets: Tensor
    smoothing: float = 0.0
    class_weights: Tensor | None = None
    z_loss: float = 0.0

    def __call__(self, logits: Tensor, rows: slice) -> Tensor:
        """See `LogitLoss`."""
        targets = self.targets[rows]
        picked = logits.gather(1, targets[:, None])[:, 0]
        mean = logits.mean(dim=1) if self.smoothing else 0.0
        log_normaliser = softmax_in_place(logits)
        nats = log_normaliser - (1 - self.smoothing) * picked - self.smoothing * mean
        kept = torch.full_like(picked, 1 - self.smoothing)
        if self.z_loss:
            nats = nats + self.z_loss * log_normaliser.square()
            logits.mul_((1 + 2 * self.z_loss * log_normaliser)[:, None])
        if self.smoothing:
            logits.sub_(self.smoothing / logits.shape[1])
        logits.scatter_add_(1, targets[:, None], -kept[:, None])
        if self.class_weights is None:
            return nats
        weights = self.class_weights[targets]
        logits.mul_(weights[:, None])
        return nats * weights


@dataclass(frozen=True)
class Mixed:
    """Two losses of the same logits, each with its weight."""

    first: LogitLoss
    second: LogitLoss
    weights: tuple[float, float]

    @property
    def extra_tensors(self) -> int:
        """See `LogitLoss`; the logits themselves are needed twice."""
        return 1 + max(self.first.extra_tensors, self.second.extra_tensors)

    def __call__(self, logits: Tensor, rows: slice) -> Tensor:
        """See `LogitLoss`."""
        first, second = self.weights
        again = logits.clone()
        nats = first * self.first(logits, rows) + second * self.second(again, rows)
        logits.mul_(first).add_(again, alpha=second)
        return nats


def softmax_in_place(logits: Tensor) -> Tensor:
    """Turns logits into probabilities, ``[positions, vocabulary]``; their log-normalisers."""
    largest = logits.amax(dim=1, keepdim=True)
    if logits.device.type == "cpu":  # one pass; the largest one's probability is 1 / total
        torch.softmax(logits, dim=1, out=logits)
        return largest[:, 0] - logits.amax(dim=1).log()
    total = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
    logits.div_(total)
    return largest[:, 0] + total[:, 0].log()


@dataclass(frozen=True)
class Head:
    """An output layer: ``hidden @ weight.T + bias``, and what a family does with its result.

    Attributes:
        weight: ``[vocabulary, width]``, or None where ``blocks`` gives it.
        bias: ``[vocabulary]`` or None.
        lora: ``A [rank, width]``, ``B [vocabulary, rank]`` and their scale, or None.
        scale: what logits are multiplied with (Cohere, Granite).
        softcap: logits are ``softcap * tanh(logits / softcap)`` (Gemma 2).
        blocks: for a weight that is stored otherwise: its rows, a block of them at a time, each
            with the number of its first one.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    lora: tuple[Tensor, Tensor, float] | None = None
    scale: float = 1.0
    softcap: float | None = None
    blocks: Callable[[], Iterator[tuple[int, Tensor]]] | None = None


def label_loss(
    hidden: Tensor, head: Head, loss: LogitLoss, *, vocabulary: int, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """The summed loss of an output layer, with gradients for all of its inputs that train.

    Args:
        hidden: ``[positions, width]``: those with a label and no others.
        head: the output layer.
        loss: what is minimised.
        vocabulary: rows of the head's weight.
        chunk_bytes: the most that a chunk's logits may take, with what the loss makes of them.

    Returns:
        A float32 scalar.
    """
    return _losses(hidden, head, loss, vocabulary, chunk_bytes).sum()


def label_losses(
    hidden: Tensor, head: Head, loss: LogitLoss, *, vocabulary: int, chunk_bytes: int = CHUNK_BYTES
) -> Tensor:
    """The loss of each position, ``[positions]``, which may then be weighed one by one.

    The output layer must be frozen: its gradient is summed over the positions on the spot, before
    their weights are known. See `label_loss`.
    """
    trained = (head.weight, head.bias, *(head.lora[:2] if head.lora else ()))
    trains = any(value is not None and value.requires_grad for value in trained)
    if trains and torch.is_grad_enabled():
        raise ValueError("the losses of single positions are for an output layer that is frozen")
    return _losses(hidden, head, loss, vocabulary, chunk_bytes)


def _losses(
    hidden: Tensor, head: Head, loss: LogitLoss, vocabulary: int, chunk_bytes: int
) -> Tensor:
    per_row = vocabulary * (4 * (1 + loss.extra_tensors) + hidden.element_size())
    rows = max(1, chunk_bytes // per_row)
    rows = rows // 128 * 128 or rows  # matrix products like round numbers
    if hidden.device.type == "cpu":
        rows = min(rows, CPU_ROWS)
    down, up, factor = head.lora or (None, None, 0.0)
    plan = _Plan(head, loss, rows, vocabulary, factor, torch.is_grad_enabled())
    result: Tensor = _LabelLoss.apply(hidden, head.weight, head.bias, down, up, plan)  # type: ignore[no-untyped-call]
    return result


@dataclass(frozen=True)
class _Plan:
    head: Head
    loss: LogitLoss
    rows: int
    vocabulary: int
    factor: float
    gradients: bool


class _Room:
    """Memory for one chunk's logits after another, in the model's type and in float32.

    Asking the system for fresh pages costs a CPU more than the arithmetic on them.
    """

    def __init__(self, hidden: Tensor, rows: int, vocabulary: int) -> None:
        precise = torch.promote_types(hidden.dtype, torch.float32)
        self.own = hidden.new_empty(rows, vocabulary)
        same = precise == hidden.dtype
        self.wide = self.own if same else torch.empty_like(self.own, dtype=precise)


class _LabelLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        plan: _Plan,
    ) -> Tensor:
        inputs = (hidden, weight, bias, down, up)
        wanted = [plan.gradients and need for need in ctx.needs_input_grad[:5]]
        precise = torch.promote_types(hidden.dtype, torch.float32)
        # the weights' gradients are sums over chunks, so they are kept in float32
        grads = [
            torch.zeros_like(value, dtype=precise if number else None)
            if want and value is not None
            else None
            for number, (value, want) in enumerate(zip(inputs, wanted, strict=True))
        ]
        used = [v if v is None else v.to(hidden.dtype) for v in inputs]
        losses = torch.empty(hidden.shape[0], dtype=precise, device=hidden.device)
        room = _Room(hidden, min(plan.rows, hidden.shape[0]), plan.vocabulary)
        for rows in tiles(hidden, plan.rows):
            losses[rows] = _chunk(rows, used, grads, plan, room)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if value is None else value.dtype for value in inputs]
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        to_hidden, *to_layer = ctx.saved_tensors
        hidden_type, *types = ctx.dtypes
        # where the layer trains, the positions' losses were summed: they all have one weight
        summed = grad.stride(0) == 0 or not grad.numel()
        weight = grad[0] if grad.numel() else grad.sum()
        if to_hidden is not None:  # a single number is not rounded to the hidden states' type
            to_hidden = to_hidden * (weight if summed else grad[:, None].to(hidden_type))
        scaled = (
            None if made is None else (made * weight).to(dtype)
            for made, dtype in zip(to_layer, types, strict=True)
        )
        return (to_hidden, *scaled, None)


def _chunk(rows: slice, used: list[Any], grads: list[Any], plan: _Plan, room: _Room) -> Tensor:
    """One chunk's losses; its part of every gradient is added to ``grads``."""
    hidden, weight, bias, down, up = used
    head = plan.head
    part = hidden[rows]
    own, logits = room.own[: part.shape[0]], room.wide[: part.shape[0]]
    _product_into(own, part, weight, bias, head)
    inner = _add_lora(own, part, down, up, plan.factor)
    if room.own is not room.wide:
        logits.copy_(own)
    if head.scale != 1.0:
        logits.mul_(head.scale)
    bent = None
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_()
        bent = logits.square() if any(g is not None for g in grads) else None
        logits.mul_(head.softcap)
    loss = plan.loss(logits, rows)
    if all(grad is None for grad in grads):
        return loss
    if bent is not None:
        logits.addcmul_(logits, bent, value=-1)  # d tanh = 1 - tanh²
    if head.scale != 1.0:
        logits.mul_(head.scale)
    del bent
    if room.own is not room.wide:
        own.copy_(logits)
    _backward(rows, part, inner, own, used, grads, plan)
    return loss


def _backward(
    rows: slice, part: Tensor, inner: Any, gradient: Tensor, used: list[Any], grads: list[Any],
    plan: _Plan,
) -> None:  # fmt: skip
    _, weight, _, down, up = used
    to_hidden, to_weight, to_bias, to_down, to_up = grads
    if to_hidden is not None:
        to_hidden[rows] = _transposed_product(gradient, weight, plan.head)
    if to_weight is not None:
        to_weight.add_(gradient.t() @ part)
    if to_bias is not None:
        to_bias.add_(gradient.sum(dim=0, dtype=to_bias.dtype))
    if down is not None:
        back = (gradient @ up).mul_(plan.factor)
        if to_hidden is not None:
            to_hidden[rows].addmm_(back, down)
        if to_down is not None:
            to_down.add_(back.t() @ part)
        if to_up is not None:
            to_up.add_(gradient.t() @ inner, alpha=plan.factor)


def _product_into(
    logits: Tensor, part: Tensor, weight: Tensor | None, bias: Tensor | None, head: Head
) -> None:
    if weight is not None:
        torch.mm(part, weight.t(), out=logits)
    else:
        assert head.blocks is not None
        for start, block in head.blocks():
            place = logits[:, start : start + block.shape[0]]
            place.copy_(part @ block.to(part.dtype).t())
    if bias is not None:
        logits.add_(bias)


def _add_lora(own: Tensor, part: Tensor, down: Any, up: Any, factor: float) -> Tensor | None:
    if down is None:
        return None
    inner = functional.linear(part, down)
    own.addmm_(inner, up.t(), alpha=factor)
    return inner


def head_logits(hidden: Tensor, head: Head, vocabulary: int) -> Tensor:
    """The logits of a few positions, ``[positions, vocabulary]``, in the hidden states' type."""
    down, up, factor = head.lora or (None, None, 0.0)
    weight, bias, down, up = (
        value if value is None else value.to(hidden.dtype)
        for value in (head.weight, head.bias, down, up)
    )
    logits = hidden.new_empty(hidden.shape[0], vocabulary)
    _product_into(logits, hidden, weight, bias, head)
    _add_lora(logits, hidden, down, up, factor)
    if head.scale != 1.0:
        logits.mul_(head.scale)
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits


def _transposed_product(gradient: Tensor, weight: Tensor | None, head: Head) -> Tensor:
    if weight is not None:
        return gradient @ weight
    assert head.blocks is not None
    total: Tensor | None = None
    for start, block in head.blocks():
        piece = gradient[:, start : start + block.shape[0]]
        if total is None:
            total = piece @ block.to(gradient.dtype)
        else:
            total.addmm_(piece, block.to(gradient.dtype))
    assert total is not None
    return total
