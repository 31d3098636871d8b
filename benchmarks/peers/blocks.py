"""The instrument inside a side: a callback that waits at block borders and reports each block.

An untouched `transformers.Trainer` calls it, whoever built that Trainer. What the model is given
is read off its forward's inputs, so that padding, label positions and samples are seen alike on
all sides, and compared.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from benchmarks.peers.channel import Channel, peak_bytes, reset_peak, resident_bytes, versions

UNSUPERVISED = -100


@dataclass
class Block:
    """What one block did, as far as it is known."""

    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    steps: list[list[dict[str, Tensor]]] = field(default_factory=list)  # inputs of each forward
    trained: int = 0
    with_gradient: int = 0
    wall: float = field(default_factory=time.perf_counter)
    cpu: float = field(default_factory=time.process_time)


class Blocks(TrainerCallback):
    """Reports every ``steps_a_block`` optimizer steps, and waits to be told to go on."""

    def __init__(self, channel: Channel, steps_a_block: int) -> None:
        self._channel = channel
        self._size = steps_a_block
        self._block: Block | None = None
        self._inputs: list[dict[str, Tensor]] = []
        self._resettable = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says that the side is loaded; begins when told."""
        kwargs["model"].register_forward_pre_hook(self._note_inputs, with_kwargs=True)
        self._resettable = reset_peak()
        self._channel.send(
            kind="ready",
            imports_bytes=self._channel.imports_bytes,
            loaded_bytes=resident_bytes(),
            peak_is="of each block" if self._resettable else "since the start",
            threads=torch.get_num_threads(),
            versions=versions(),
        )
        self._wait()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Here, not at the end of a step: only then has the last step's loss been logged."""
        if self._block is not None and len(self._block.steps) == self._size:
            self._report()
            self._wait()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts gradients, once: in the first step LoRA's A has none, since B is nought."""
        if self._block is None or state.global_step + 1 != 2:
            return
        trained = [p for p in kwargs["model"].parameters() if p.requires_grad]
        self._block.trained = len(trained)
        self._block.with_gradient = sum(p.grad is not None and bool(p.grad.any()) for p in trained)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step more."""
        if self._block is not None:
            self._block.steps.append(self._inputs)
        self._inputs = []

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Loss and gradient norm of one step."""
        logs = kwargs.get("logs") or {}
        if self._block is not None and "loss" in logs:
            self._block.losses.append(float(logs["loss"]))
            self._block.gradient_norms.append(float(logs.get("grad_norm", 0.0)))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last block ends before anything is saved."""
        self._finish()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As above, where the steps end before the epoch does."""
        self._finish()

    def _finish(self) -> None:
        if self._block is not None and self._block.losses:
            self._report()
            self._block = None
            self._channel.receive()

    def _note_inputs(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._inputs.append({n: v for n, v in kwargs.items() if isinstance(v, Tensor)})

    def _wait(self) -> None:
        self._channel.receive()
        reset_peak()
        self._block = Block()

    def _report(self) -> None:
        block = self._block
        assert block is not None
        cpu, wall = time.process_time() - block.cpu, time.perf_counter() - block.wall
        samples = [[s for batch in step for s in samples_of(batch)] for step in block.steps]
        positions = sum(batch["input_ids"].numel() for step in block.steps for batch in step)
        self._channel.send(
            kind="block",
            cpu_seconds=cpu,
            seconds=wall,
            losses=block.losses,
            gradient_norms=block.gradient_norms,
            trained_tensors=block.trained,
            tensors_with_gradient=block.with_gradient,
            tokens=sum(len(ids) for step in samples for ids, _ in step),
            labels=sum(sum(one != UNSUPERVISED for one in labels)
                       for step in samples for _, labels in step),
            positions=positions,
            steps=[digest(step) for step in samples],
            peak_bytes=peak_bytes(),
        )  # fmt: skip


Sample = tuple[list[int], list[int]]


def samples_of(batch: dict[str, Tensor]) -> Iterator[Sample]:
    """The samples of one forward pass without padding: their tokens, and what each is to predict.

    Padded rows are told by the attention mask, samples that share a row by positions that begin
    anew. The first token of a sample is never predicted, whatever its label says.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    mask, places = batch.get("attention_mask"), batch.get("position_ids")
    for row in range(ids.shape[0]):
        kept = torch.ones_like(ids[row], dtype=torch.bool)
        if mask is not None and mask.dim() == 2:
            kept = mask[row].bool()
        starts = [0]
        if places is not None and kept.all():
            starts = (places[row] == 0).nonzero().flatten().tolist()
        tokens, wanted = ids[row][kept].tolist(), labels[row][kept].tolist()
        for start, stop in zip(starts, [*starts[1:], len(tokens)], strict=True):
            yield tokens[start:stop], [UNSUPERVISED, *wanted[start + 1 : stop]]


def digest(samples: list[Sample]) -> str:
    """Of one optimizer step's samples, in whatever order they were computed."""
    texts = sorted(hashlib.sha256(repr(sample).encode()).hexdigest() for sample in samples)
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]
