"""What evaluation and generation take: a forward pass without gradients, and keys and values.

The forward passes of the judges (`qft.judging`) run on fake tensors. What they do then depends on
values, which fake tensors do not have; it is done here on as many of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qft.bench.fake_model import DEVICE, Rows, fill_with_fakes, fused_attention
from qft.data.encoding import UNSUPERVISED
from qft.data.tasks import Example, Task, pad_id
from qft.evaluation import evaluating
from qft.judging.tokens import CHUNK_POSITIONS
from qft.lean.meter import Meter, Reading
from qft.planning.amounts import PhaseBytes, StepWork
from qft.planning.fake_training import prepared_skeleton
from qft.planning.job import PlannedJob
from qft.planning.loading import adapter_bytes
from qft.planning.short_training import shorten
from qft.preparation import prepared
from qft.step import announced, width_of

MICRO_BATCH = 8  # `qft.evaluation.evaluate`'s own


class FakeEvaluation:
    """A job's model on fake tensors, ready to be evaluated.

    Without gradients a layer leaves nothing behind, so that those that are like others need not
    run; but for a decoder's that answers with classes, which keep keys and values meanwhile.

    Attributes:
        trained_tensors: how many parameters train.
    """

    def __init__(self, job: PlannedJob) -> None:
        self.job = job
        self.device = "cpu" if job.device == "cpu" else DEVICE
        self.model = prepared_skeleton(job)
        self.trained_tensors = sum(p.requires_grad for p in self.model.parameters())
        if job.inputs.task.predicts == "tokens":
            shorten(self.model)
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self._mode:
            fill_with_fakes(self.model, self.device)

    def meter(self, examples: Sequence[Example]) -> Reading:
        """One batch of these examples, from its coming to the device to its scores."""
        task = self.job.inputs.task
        batch = task.collate(examples, pad_id(self.job.inputs.tokenizer))
        labels = _labels(batch, task, self.model)
        padded = not bool(batch["attention_mask"].all())
        with (
            evaluating(self.model),
            fused_attention(self.device != "cpu", Rows(padded=padded)),
            Meter(self.model, None, self.device) as counting,
            announced(self.model, examples, batch),
            self._mode,
        ):
            _score(self.model, task, {n: self._faked(v) for n, v in batch.items()}, labels)
        return counting.reading()

    def _faked(self, value: Tensor) -> Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device=self.device)


def fake_evaluation(job: PlannedJob) -> FakeEvaluation:
    """The same, made once for jobs whose models are the same; the last few are kept."""
    recipe, ready = job.recipe, job.ready
    config = (job.inputs.base / "config.json").read_bytes()
    key = repr((config, ready.spec, ready.held, ready.needs, recipe.strategy, recipe.memory.savers,
                job.device, job.inputs.task.name))  # fmt: skip
    found = _kept.pop(key, None) or FakeEvaluation(job)
    _kept[key] = found
    while len(_kept) > _MOST_KEPT:
        _kept.pop(next(iter(_kept)))
    return found


_MOST_KEPT = 3
_kept: dict[str, FakeEvaluation] = {}


def evaluate_phase(
    job: PlannedJob, reading: Reading, teacher_bytes: int = 0, micro_batch: int = MICRO_BATCH
) -> PhaseBytes | None:
    """The held-out rows' fullest batch while the training's states stay; None without such rows.

    Args:
        reading: of the training's step.
        teacher_bytes: of a teacher that stays in memory too.
        micro_batch: examples a forward pass; it halves where memory runs out.
    """
    examples = held_out_examples(job)
    if examples is None:
        return None
    ordered = sorted(examples, key=lambda e: -len(e.inputs["input_ids"]))  # as it is evaluated
    found = fake_evaluation(job).meter(ordered[:micro_batch])
    widths = {width_of([example]) for example in ordered[::micro_batch]}
    made = {k: v for k, v in found.peak.by_category.items() if k not in ("weights", "adapters")}
    lasting = {k: reading.most[k] for k in ("weights", "adapters", "optimizer")}
    lasting["weights"] -= teacher_bytes  # the reading counts them together
    lasting["adapters"] = adapter_bytes(job, reading)
    if job.recipe.train.optimizer.startswith("paged") and job.device != "cpu":
        lasting["optimizer"] = 0  # it leaves where something else needs the room
    device = {**lasting, "temporary": sum(made.values()), "teacher": teacher_bytes}
    host = {} if job.device == "cpu" else dict(reading.host_peak.by_category)
    kept = {k: v for k, v in host.items() if v and k in ("weights", "adapters", "optimizer")}
    after = StepWork(evaluated=len(found.products) * len(widths))
    return PhaseBytes("evaluate", {k: v for k, v in device.items() if v}, kept, after=after)


def held_out_examples(job: PlannedJob) -> Sequence[Example] | None:
    """The rows to judge by; where the recipe names some that are not read yet, rows like these."""
    if job.inputs.held_out is not None:
        return job.inputs.held_out.examples
    return job.inputs.train.examples if job.recipe.data.has_held_out else None


def _labels(batch: Mapping[str, Tensor], task: Task, model: nn.Module) -> int:
    """How many places of a real batch are judged."""
    if task.predicts not in ("tokens", "tags"):
        return len(batch["input_ids"])
    labels = batch["labels"]
    state = prepared(model)
    loss = state.engine.loss if state is not None else None
    shifted = task.predicts == "tokens" and labels.shape == batch["input_ids"].shape
    if loss is not None:
        shifted = loss.shifted
    return int((labels[:, 1 if shifted else 0 :] != UNSUPERVISED).sum())


def _score(model: nn.Module, task: Task, batch: dict[str, Tensor], labels: int) -> None:
    """What the task's judge does with a batch; `qft.judging` has the real one."""
    match task.predicts:
        case "tokens":
            _score_tokens(model, batch, labels)
        case "span":
            inputs = {k: v for k, v in batch.items() if not k.endswith("_positions")}
            output = model(**inputs)
            sides = [
                logits.float().masked_fill(inputs["attention_mask"] == 0, -torch.inf)
                for logits in (output.start_logits, output.end_logits)
            ]
            for side in sides:
                nn.functional.cross_entropy(side, batch["start_positions"], reduction="none")
        case _:
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            logits = model(**inputs).logits.float()
            chosen = logits.reshape(-1, logits.shape[-1])[:labels].clone()
            chosen.log_softmax(dim=-1)


def _score_tokens(model: nn.Module, batch: dict[str, Tensor], labels: int) -> None:
    state = prepared(model)
    loss: Any = state.engine.loss if state is not None else None
    if loss is not None and loss.usable():
        loss.fake_labels = labels
        found = loss.score(model, batch)
        (-found["log_probs"].reshape(-1)[:labels].clone()).double()
        return
    if batch["labels"].shape != batch["input_ids"].shape:
        logits = model(**batch).logits
    else:
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        logits = model(**inputs).logits[:, :-1]
    chosen = logits.reshape(-1, logits.shape[-1])[: min(labels, CHUNK_POSITIONS)].clone().float()
    chosen.log_softmax(dim=-1)
