"""Dropout whose mask is a function of (seed, step, sample, module, token position).

Neither the split into micro-batches nor padding changes an update: a sample draws the same mask
alone or among others, first or last, padded or not, in the forward pass, in a recomputed one, or
when the step is replayed after running out of memory. No mask is kept for the backward pass: it is
drawn again from its seed.

Without a clock that knows the samples (an own training loop) the layers use the ordinary generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Moment:
    """Which samples a forward pass holds.

    Attributes:
        step: the optimizer step.
        samples: the samples' own numbers, one a row.
        lengths: their true lengths in tokens, padding (on the right) left out.
        targets: in an encoder-decoder the true lengths on the decoder's side, else empty.
        target_width: the decoder's padded length, by which its activations are told from the
            encoder's; it must differ from the encoder's.
        width: the padded length; a longer activation begins with virtual tokens.
        packed: for rows of several samples, each row's ``(sample, length)`` in order, else empty.
    """

    step: int
    samples: tuple[int, ...]
    lengths: tuple[int, ...]
    targets: tuple[int, ...] = ()
    target_width: int = 0
    width: int = 0
    packed: tuple[tuple[tuple[int, int], ...], ...] = ()

    def segments_of(self, activation: Tensor) -> Sequence[Sequence[tuple[int, int]]]:
        """Each row's samples and their true lengths."""
        if self.packed:
            return self.packed
        lengths = self.lengths_of(activation)
        return [[pair] for pair in zip(self.samples, lengths, strict=True)]

    def lengths_of(self, activation: Tensor) -> tuple[int, ...]:
        """The true lengths of an activation's rows, by the side it belongs to."""
        if activation.dim() != 3:
            return self.lengths
        if self.targets and activation.shape[1] == self.target_width:
            return self.targets
        virtual = max(0, activation.shape[1] - self.width) if self.width else 0
        return tuple(length + virtual for length in self.lengths)


class DropoutClock:
    """Tells every seeded dropout of one model which moment it is."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.moment: Moment | None = None

    def set(
        self,
        step: int,
        samples: Sequence[int],
        lengths: Sequence[int],
        targets: Sequence[int] = (),
        target_width: int = 0,
        width: int = 0,
        packed: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> None:
        """Announces the micro-batch that comes next; see `Moment`."""
        self.moment = Moment(
            step,
            tuple(samples),
            tuple(lengths),
            tuple(targets),
            target_width,
            width,
            tuple(tuple(row) for row in packed),
        )

    def clear(self) -> None:
        """Back to the ordinary generator."""
        self.moment = None


class SeededDropout(nn.Dropout):
    """A drop-in for :class:`torch.nn.Dropout` that draws from the clock."""

    def __init__(self, p: float, clock: DropoutClock, module_name: str) -> None:
        super().__init__(p)
        self.clock = clock
        self.module_name = module_name

    def forward(self, input: Tensor) -> Tensor:
        """``[batch, length, …]`` or ``[batch, width]`` in, the same shape out."""
        if not self.training or self.p == 0.0:
            return input
        drawn = self._segments(input)
        if drawn is None:
            return nn.functional.dropout(input, self.p, True)
        output: Tensor = _Drop.apply(input, Replay(self.p, drawn))  # type: ignore[no-untyped-call]
        return output

    def replay(self, input: Tensor) -> Replay | None:
        """This moment's dropout of ``input`` as a function that can be called again."""
        if not self.training or self.p == 0.0:
            return None
        drawn = self._segments(input)
        if drawn is not None or input.is_meta:  # whose numbers nobody reads
            return Replay(self.p, drawn)
        return Replay(self.p, None, seed=int(torch.randint(2**62, ())))

    def _segments(self, input: Tensor) -> Segments | None:
        """Each sample's seed and length; None where the clock does not know the samples."""
        moment = self.clock.moment
        if moment is None or not _rows_are_samples(input, moment):
            return None
        return tuple(
            tuple(
                (segment_seeds(self.clock.seed, moment, self.module_name, sample), length)
                for sample, length in row
            )
            for row in moment.segments_of(input)
        )


def _rows_are_samples(input: Tensor, moment: Moment) -> bool:
    """``[batch, width]`` or ``[batch, length, width]``; attention weights, say, are neither."""
    rows = len(moment.packed or moment.samples)
    if input.dim() not in (2, 3) or input.shape[0] != rows:
        return False
    if moment.packed:
        return input.dim() == 3
    return input.dim() == 2 or input.shape[1] >= max(moment.lengths_of(input))


Segments = Sequence[Sequence[tuple[int, int]]]  # a row's (seed, length), one a sample


@dataclass(frozen=True)
class Replay:
    """One moment's dropout: for whatever it is given it draws the same mask.

    Attributes:
        p: the share that is dropped.
        segments: each row's samples; None where one seed draws all of it.
        seed: that one.
    """

    p: float
    segments: Segments | None
    seed: int = 0

    def __call__(self, values: Tensor) -> Tensor:
        """``values`` times the mask."""
        if self.segments is not None:
            return draw_mask(values, self.p, self.segments).mul_(values)
        flat = values.reshape(1, -1)
        mask = draw_mask(flat, self.p, [[(self.seed, flat.shape[1])]])
        return mask.mul_(flat).view(values.shape)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, replay: Replay) -> Tensor:  # type: ignore[override]
        ctx.replay = replay
        return replay(input)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.replay(gradient), None


def draw_mask(like: Tensor, p: float, segments: Segments) -> Tensor:
    """Zeros and ``1 / (1 - p)``, in the shape and dtype of ``like``; padding gets zeros.

    Each sample is drawn from its own seed, and only for its true length.
    """
    mask = torch.zeros_like(like, memory_format=torch.contiguous_format)
    if p >= 1.0 or like.is_meta:
        return mask
    generator = torch.Generator(device=like.device)
    for row, parts in zip(mask, segments, strict=True):
        start = 0
        for seed, length in parts:
            generator.manual_seed(seed)
            part = row[start : start + length] if row.dim() > 1 else row
            part.bernoulli_(1.0 - p, generator=generator)
            start += length
    return mask.div_(1.0 - p)


def segment_seeds(seed: int, moment: Moment, module_name: str, sample: int) -> int:
    """The seed of one sample's draw in one module at one step."""
    return _hash(f"{seed}/{moment.step}/{sample}/{module_name}")


def _hash(text: str) -> int:
    # blake2b, not hash(): Python's own is salted differently in every process
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def install_dropout(model: nn.Module, clock: DropoutClock) -> int:
    """Replaces every :class:`torch.nn.Dropout` with p > 0; returns how many."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Dropout and module.p > 0
    ]
    for name, module in found:
        seeded = SeededDropout(module.p, clock, name)
        seeded.train(module.training)
        _replace(model, name, seeded)
    return len(found)


def remove_dropout(model: nn.Module) -> None:
    """Undoes :func:`install_dropout`."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, SeededDropout)]
    for name, module in found:
        plain = nn.Dropout(module.p)
        plain.train(module.training)
        _replace(model, name, plain)


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if isinstance(parent, (nn.ModuleDict, nn.ModuleList, nn.Sequential)):
        parent._modules[child] = new
    else:
        setattr(parent, child, new)
