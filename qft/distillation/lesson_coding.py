"""How a lesson is held on disk: token ids in as few bits as they need, numbers as asked.

- ``tokens`` and ``log_probabilities``: ids packed; float16 or float32. ``rest``, the mass of all
  others, float32.
- ``samples``, ``weights``, ``entropy``: the drawn tokens, each once, packed; how often each was
  drawn, packed too (float32 weights where they are no shares); how many a row has; float32.
- ``layer.N``: float16 where float32 is not asked for; what is in 16 bits stays as it is.
- anything else, such as ``logits``: as it is.

Float16 rounds a log-probability by 1 / 2048 of itself at most. What that does to the mass is taken
back when it is read: all are shifted by one number, so that they and the rest sum up to 1 again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qft.distillation.bit_packing import bits_for, pack, packed_bytes, unpack
from qft.distillation.lessons import Lesson

Precision = Literal["float16", "float32"]


@dataclass(frozen=True)
class LessonCoding:
    """From lessons to what is stored, and back.

    Attributes:
        vocabulary: tokens that there are.
        precision: of log-probabilities.
        draws: how many were made for each row; 0 where the likeliest are stored.
        shares: whether the weights of drawn tokens are how often they were drawn.
    """

    vocabulary: int
    precision: Precision = "float16"
    draws: int = 0
    shares: bool = True

    def encode(self, lesson: Lesson) -> dict[str, Tensor]:
        """What is stored of a lesson, on the CPU."""
        held = {name: self._held(name, tensor) for name, tensor in lesson.items()}
        if "tokens" in held:
            held |= self._likeliest(held)
        if "samples" in held:
            held |= self._drawn(held)
            del held["weights"]
        return held

    def decode(self, stored: Lesson) -> dict[str, Tensor]:
        """The lesson; log-probabilities and weights are float32, tokens int64."""
        lesson = dict(stored)
        if "tokens" in lesson:
            rest = lesson.pop("rest")
            values = lesson["log_probabilities"].float()
            lesson["tokens"] = unpack(lesson["tokens"], self._bits, values.shape[1])
            if self.precision == "float16":
                values = values + ((1 - rest) / values.exp().sum(dim=1)).log()[:, None]
            lesson["log_probabilities"] = values
        if "samples" in lesson:
            found = lesson.pop("found")
            lesson |= self._spread(found, lesson["samples"], lesson.pop("times"))
        return lesson

    def most_drawn_bytes(self) -> int:
        """Bytes of a row of drawn tokens where each draw found another one."""
        weights = packed_bytes(self.draws, self._draw_bits) if self.shares else 4 * self.draws
        return packed_bytes(self.draws, self._bits) + weights + 8

    def likeliest_bytes(self, count: int) -> int:
        """Bytes of a row of the ``count`` likeliest tokens."""
        width = 2 if self.precision == "float16" else 4
        return packed_bytes(count, self._bits) + count * width + 4

    @property
    def _bits(self) -> int:
        return bits_for(self.vocabulary)

    def _held(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        wide = name.startswith("layer.") and tensor.dtype == torch.float32
        if wide and self.precision == "float16":
            return tensor.clamp(-65504, 65504).half()
        return tensor

    def _likeliest(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = held["log_probabilities"].float()
        rest = held.get("rest")
        if rest is None:
            rest = (1 - values.double().exp().sum(dim=1)).clamp(min=0)
        half = self.precision == "float16"
        return {
            "tokens": pack(held["tokens"], self._bits),
            "log_probabilities": values.clamp(min=-6e4).half() if half else values,
            "rest": rest.float(),
        }

    def _drawn(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tokens that have a weight, of all rows, one after another."""
        weights = held["weights"].float()
        kept = weights > 0
        tokens = pack(held["samples"][kept][None], self._bits)[0]
        times = weights[kept]
        if self.shares:
            times = pack((times * self.draws).round().to(torch.int64)[None], self._draw_bits)[0]
        found = kept.sum(dim=1).to(torch.uint8 if self.draws < 256 else torch.int32)
        return {"samples": tokens, "times": times, "found": found, "entropy": held["entropy"]}

    def _spread(self, found: Tensor, packed: Tensor, times: Tensor) -> dict[str, Tensor]:
        found = found.to(torch.int64)
        total = int(found.sum())
        tokens = unpack(packed[None], self._bits, total)[0]
        if self.shares:
            times = unpack(times[None], self._draw_bits, total)[0] / self.draws
        places = torch.arange(self.draws)[None]
        kept = places < found[:, None]
        ends = found.cumsum(dim=0)[:, None]
        index = torch.minimum(ends - found[:, None] + places, ends - 1)
        weights = torch.zeros(kept.shape).masked_scatter(kept, times.float())
        return {"samples": tokens[index], "weights": weights}

    @property
    def _draw_bits(self) -> int:
        return bits_for(self.draws + 1)


def coverage(stored: Sequence[Lesson]) -> float | None:
    """The mean mass of the likeliest tokens over all rows; None where none are stored."""
    rests = [lesson["rest"] for lesson in stored if "rest" in lesson]
    count = sum(len(rest) for rest in rests)
    if not count:
        return None
    return 1 - sum(float(rest.double().sum()) for rest in rests) / count
