"""A student and its teacher on one card: do the losses agree, what do they hold, how fast are they?

    python benchmarks/gpu/distillation.py

First every divergence in chunks, on this device, against its formula with all logits. Then steps
of a Llama-3.2-1B student (LoRA r=16, activations recomputed, 2,048 tokens, all with a label) whose
Llama-3.1-8B teacher is in memory in bf16 or nf4, or known by its 64 likeliest tokens; beside them
the plain student and, with the teacher in memory, the loss of full logits. Weights are random.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from gpu_models import Case, batch_of, optimizer_of, random_model, with_lora
from gpu_rows import Rows, parser, peaks, quantiles, reason_of, reset_peaks
from torch import Tensor
from torch.nn import functional

from qft.lean.divergence import Divergence, Kind, LiveRows, Sampled, TopK
from qft.lean.label_loss import CrossEntropy, Head, LogitLoss, Mixed, label_loss
from qft.lean.model_loss import ModelLoss, install_model_loss, vocabulary_of
from qft.lean.sorted_gap import SortedGap
from qft.preparation import prepare
from qft.quantization import dequantized

How = Literal["none", "cached", "live", "full-logits"]
SIDES: tuple[tuple[str, How, str], ...] = (
    ("student alone", "none", "none"),
    ("cached, 64 likeliest", "cached", "none"),
    ("teacher in nf4", "live", "nf4"),
    ("teacher in nf4, full logits", "full-logits", "nf4"),
    ("teacher in bf16", "live", "none"),
    ("teacher in bf16, full logits", "full-logits", "none"),
)
KINDS: tuple[Kind, ...] = ("forward-kl", "reverse-kl", "jsd")


class CheckError(AssertionError):
    """A loss is another than its formula says."""


def formula(kind: str, student: Tensor, teacher: Tensor) -> Tensor:
    """With all logits, ``[positions, vocabulary]`` each, summed; beta is a half."""
    s, t = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
    m = torch.logaddexp(s, t) - torch.tensor(2.0, device=s.device).log()
    if kind == "forward-kl":
        return (t.exp() * (t - s)).sum()
    if kind == "reverse-kl":
        return (s.exp() * (s - t)).sum()
    return 0.5 * (t.exp() * (t - m)).sum() + 0.5 * (s.exp() * (s - m)).sum()


def check_losses(device: str) -> None:
    """Losses and gradients of every kind, chunk by chunk, in float32.

    Raises:
        CheckError: one is wrong.
    """
    torch.manual_seed(0)
    vocabulary, positions = 1000, 300
    hidden, states = (torch.randn(positions, 64, device=device) for _ in range(2))
    weight, theirs = (torch.randn(vocabulary, 64, device=device) / 4 for _ in range(2))
    teacher = states @ theirs.T
    known = teacher.log_softmax(dim=1).topk(vocabulary, dim=1)
    live = LiveRows(states, Head(theirs), vocabulary, vocabulary)
    draws = torch.multinomial(teacher.softmax(dim=1), 8, replacement=True)
    share = torch.full(draws.shape, 1 / 8, device=device)
    zeros = torch.zeros(positions, device=device)
    targets = draws[:, 0]
    cases: dict[str, tuple[LogitLoss, Callable[[Tensor], Tensor]]] = {}
    for kind in KINDS:
        written = partial(formula, kind, teacher=teacher)
        cases[kind] = Divergence(live, kind), written
        cases[f"{kind} of all tokens"] = (
            Divergence(TopK(known.indices, known.values), kind),
            written,
        )
    cases["draws"] = (
        Sampled(draws, share, zeros),
        lambda s: -(share * s.log_softmax(dim=1).gather(1, draws)).sum(),
    )
    cases["uld"] = (
        SortedGap(live, zeros + 1),
        lambda s: (s.softmax(1).sort(1).values - teacher.softmax(1).sort(1).values).abs().sum(),
    )
    cases["mixed"] = (
        Mixed(CrossEntropy(targets), Divergence(live), (0.5, 0.5)),
        lambda s: (
            0.5 * functional.cross_entropy(s, targets, reduction="sum")
            + 0.5 * formula("forward-kl", s, teacher)
        ),
    )
    for name, (loss, plain) in cases.items():
        mine, other = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
        found = label_loss(
            mine, Head(weight), loss, vocabulary=vocabulary, chunk_bytes=64 * vocabulary * 30
        )
        wanted = plain(other @ weight.T)
        found.backward()
        wanted.backward()
        assert mine.grad is not None
        assert other.grad is not None
        apart = float((mine.grad - other.grad).norm() / other.grad.norm())
        off = abs(float(found.detach() / wanted.detach()) - 1)
        if not (apart < 1e-4 and off < 1e-4):
            raise CheckError(f"{name}: loss {off:.1e} off, gradients {apart:.1e} apart")
        print(f"ok: {name}, gradients {apart:.1e} apart", flush=True)


class Pair:
    """A student in training with its teacher."""

    def __init__(self, student: Case, teacher: Case, how: How) -> None:
        self.case, self.how = student, how
        plain = how == "full-logits"
        model = with_lora(random_model(student), student)
        if plain:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
            self.model: Any = model.train()
        else:
            self.model = prepare(model, checkpointing="full")
        self.optimizer = optimizer_of(self.model, student)
        self.vocabulary = model.config.vocab_size
        self.beside: Any = None
        self.lessons: ModelLoss | None = None
        if how in ("live", "full-logits"):
            self.beside = random_model(teacher, seed=5).eval()
            if how == "live":
                self.lessons = install_model_loss(self.beside, dequantized)
                assert self.lessons is not None

    def step(self, number: int) -> float:
        """One step; its loss."""
        batch = batch_of(self.case, self.vocabulary, number)
        if self.how == "full-logits":
            loss = self._full(batch)
        else:
            extra = {} if self.how == "none" else {"teaching": self._teaching(batch)}
            loss = self.model(**batch, **extra).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _full(self, batch: dict[str, Tensor]) -> Tensor:
        labels = batch.pop("labels")[:, 1:]
        logits = self.model(**batch).logits[:, :-1].float()
        with torch.no_grad():
            theirs = self.beside(**batch).logits[:, :-1].float()
        own = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        s, t = logits.log_softmax(dim=-1), theirs.log_softmax(dim=-1)
        towards = functional.kl_div(s, t, reduction="sum", log_target=True) / labels.numel()
        return 0.5 * own + 0.5 * towards

    def _teaching(self, batch: dict[str, Tensor]) -> Any:
        if self.lessons is None:
            count = batch["labels"].numel() - len(batch["labels"])
            ids = torch.arange(64, device=self.case.device).expand(count, 64)
            teacher: Any = TopK(ids, torch.full((count, 64), -5.0, device=self.case.device))
        else:
            with torch.no_grad():
                states, head = self.lessons.label_states(self.beside, dict(batch))
            rows = vocabulary_of(self.lessons.head)
            teacher = LiveRows(states, head, rows, rows)
        return lambda labels, count: Mixed(labels, Divergence(teacher), (0.5, 0.5))


def measure(pair: Pair, device: str, steps: int) -> dict[str, Any]:
    """Peaks of the second step and later, and tokens a second of each."""
    pair.step(0)
    reset_peaks(device)
    rates, loss = [], 0.0
    for number in range(1, steps + 1):
        start = time.perf_counter()
        loss = pair.step(number)  # reading the loss waits for the device
        rates.append(pair.case.length * pair.case.batch / (time.perf_counter() - start))
    return {**quantiles(rates), **peaks(device), "final_loss": loss}


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, then measures."""
    options = parser(__doc__)
    options.add_argument("--student", default="llama-3.2-1b")
    options.add_argument("--teacher", default="llama-3.1-8b")
    options.add_argument("--length", type=int, default=2048)
    options.add_argument("--steps", type=int, default=8)
    options.add_argument("--dtype", default="bfloat16")
    chosen = options.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    check_losses(chosen.device)
    rows = Rows(chosen.out, "distillation", chosen.device)
    student = Case(chosen.student, length=chosen.length, dtype=chosen.dtype, device=chosen.device)
    name = f"{student.name}, taught by {chosen.teacher}"
    for side, how, quantize in SIDES:
        if rows.has(name, side):
            continue
        teacher = replace(student, shape=chosen.teacher, quantize=quantize)
        settings = {**student.settings(), "teacher": teacher.settings(), "how": how}
        try:
            pair = Pair(student, teacher, how)
            found = measure(pair, chosen.device, chosen.steps)
        except (RuntimeError, ModuleNotFoundError) as error:
            found = {"reason": reason_of(error)}
        rows.add(name, side, settings, **found)
        pair = None  # type: ignore[assignment]
        gc.collect()
        reset_peaks(chosen.device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
