"""How good a model is on held-out examples: loss, perplexity, bits per byte; accuracy, F1."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from qft.data.encoding import UNSUPERVISED
from qft.errors import ModelError, WillNotFitError

if TYPE_CHECKING:
    from qft.data.examples import Example, Task

CHUNK_POSITIONS = 512  # label positions whose float32 log-probabilities exist at once


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without gradients; each module gets its own former mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    task: Task,
    *,
    pad_token_id: int,
    micro_batch: int = 8,
    labels: Sequence[str] | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Metrics of ``model`` on ``examples``; the order of the examples does not matter.

    Out of memory halves the micro-batch and goes on. No random number is drawn.

    Args:
        model: plain or wrapped by PEFT, on any device.
        examples: of ``task``, not empty.
        task: says whether labels are tokens or a class.
        pad_token_id: see `qft.data.encoding.pad_id`.
        micro_batch: examples a forward pass.
        labels: the classes, to check against the width of the model's answer.
        progress: called with the number of examples just done.

    Returns:
        Labels that are tokens: `loss` (nats a supervised token, the mean over all of them),
        `perplexity`, `bits_per_byte` (of the supervised text), `token_accuracy`. Classes: `loss`
        (nats a row), `accuracy`, `macro_f1`.

    Raises:
        ModelError: there are other classes in the data than in the model.
        WillNotFitError: not even one example fits.
    """
    if not examples:
        raise ValueError("no examples to evaluate")
    # Like lengths together, for little padding. The batches depend on the examples alone.
    ordered = sorted(examples, key=lambda e: (-len(e.inputs["input_ids"]), e.index))
    measure: _Scores = _TokenScores() if task.predicts == "tokens" else _ClassScores(labels)
    device = next(model.parameters()).device
    start = 0
    with evaluating(model):
        while start < len(ordered):
            part = ordered[start : start + micro_batch]
            try:
                batch = task.collate(part, pad_token_id)
                scores = measure.score(model, {k: v.to(device) for k, v in batch.items()})
            except (MemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise _does_not_fit(part[0], error) from error
                scores = None
            if scores is None:  # outside the handler, whose traceback holds the activations
                micro_batch = len(part) // 2
                if device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            measure.add(scores)
            start += len(part)
            if progress is not None:
                progress(len(part))
    return measure.result(ordered)


class _Scores(Protocol):
    """What is summed up over batches; `add` takes what `score` gave once it is complete."""

    def score(self, model: nn.Module, batch: dict[str, Tensor]) -> Any: ...
    def add(self, scores: Any) -> None: ...
    def result(self, examples: Sequence[Example]) -> dict[str, float]: ...


class _TokenScores:
    """Sums over supervised tokens."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._right = 0
        self._count = 0

    def score(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[list[float], int, int]:
        labels = batch["labels"]
        if labels.shape != batch["input_ids"].shape:  # a decoder of its own; nothing is shifted
            rows, columns = (labels != UNSUPERVISED).nonzero(as_tuple=True)
            return _nats(model(**batch).logits, rows, columns, labels[rows, columns])
        wanted = labels[:, 1:] != UNSUPERVISED  # position t predicts label t + 1
        if not bool(wanted.any()):
            return [], 0, 0
        first = int(wanted.any(dim=0).nonzero()[0])
        # The last positions only, counted from the end: soft prompts make the model's own
        # sequence longer at its beginning.
        keep = labels.shape[1] - first
        extra = {"logits_to_keep": keep} if _takes_logits_to_keep(model) else {}
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **extra
        ).logits[:, -keep:]
        rows, columns = wanted[:, first:].nonzero(as_tuple=True)
        targets = labels[:, 1:][rows, columns + first]
        return _nats(logits, rows, columns, targets)

    def add(self, scores: tuple[list[float], int, int]) -> None:
        self._losses += scores[0]
        self._right += scores[1]
        self._count += scores[2]

    def result(self, examples: Sequence[Example]) -> dict[str, float]:
        if not self._count:
            raise ValueError("no supervised token in the examples")
        nats = math.fsum(self._losses)  # exact, and so the same in any order
        loss = nats / self._count
        metrics = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}
        total_bytes = sum(example.label_bytes for example in examples)
        if total_bytes:
            metrics["bits_per_byte"] = nats / math.log(2) / total_bytes
        metrics["token_accuracy"] = self._right / self._count
        return metrics


def _nats(
    logits: Tensor, rows: Tensor, columns: Tensor, targets: Tensor
) -> tuple[list[float], int, int]:
    """Each target's loss, how many were the likeliest, and how many there are."""
    losses: list[float] = []
    right = 0
    for at in range(0, len(rows), CHUNK_POSITIONS):
        part = slice(at, at + CHUNK_POSITIONS)
        chosen = logits[rows[part], columns[part].to(logits.device)].float()
        target = targets[part].to(chosen.device)
        nats = nn.functional.cross_entropy(chosen, target, reduction="none")
        losses += nats.double().tolist()
        right += int((chosen.argmax(dim=-1) == target).sum())
    return losses, right, len(losses)


class _ClassScores:
    """What was answered and what is right, row by row."""

    def __init__(self, labels: Sequence[str] | None) -> None:
        self._labels = labels
        self._losses: list[float] = []
        self._answers: list[int] = []
        self._truths: list[int] = []

    def score(
        self, model: nn.Module, batch: dict[str, Tensor]
    ) -> tuple[list[float], list[int], list[int]]:
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits.float()
        labels = batch["labels"].to(logits.device)
        classes = logits.shape[-1] if self._labels is None else len(self._labels)
        if classes != logits.shape[-1] or int(labels.max()) >= classes:
            raise ModelError(
                "The model and the data have different classes.",
                found=f"the model tells {logits.shape[-1]} apart, the data has "
                f"{max(classes, int(labels.max()) + 1)}",
                fix="evaluate with the classes the model was trained on",
            )
        nats = nn.functional.cross_entropy(logits, labels, reduction="none")
        return nats.double().tolist(), logits.argmax(dim=-1).tolist(), labels.tolist()

    def add(self, scores: tuple[list[float], list[int], list[int]]) -> None:
        self._losses += scores[0]
        self._answers += scores[1]
        self._truths += scores[2]

    def result(self, examples: Sequence[Example]) -> dict[str, float]:
        from sklearn.metrics import f1_score

        pairs = list(zip(self._answers, self._truths, strict=True))
        f1 = f1_score(self._truths, self._answers, average="macro", zero_division=0)
        return {
            "loss": math.fsum(self._losses) / len(pairs),
            "accuracy": sum(answer == truth for answer, truth in pairs) / len(pairs),
            "macro_f1": float(f1),
        }


def _takes_logits_to_keep(model: nn.Module) -> bool:
    """Whether the transformers model computes only the logits of the last positions when asked."""
    inner: Any = getattr(model, "module", model)
    if hasattr(inner, "get_base_model"):  # PEFT hands unknown arguments through
        inner = inner.get_base_model()
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters


def _is_out_of_memory(error: BaseException) -> bool:
    """A GPU's error has a class of its own; the CPU allocator's only its words."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or "can't allocate memory" in str(error)


def _does_not_fit(example: Example, error: BaseException) -> WillNotFitError:
    return WillNotFitError(
        "Not even one example fits into the memory for evaluation.",
        found=f"{len(example.inputs['input_ids'])} tokens; {(str(error) or 'out of memory'):.200}",
        fix="a smaller train.max_length, quantize: nf4, or a smaller model",
    )
