"""Memory that runs out anywhere in a step changes nothing of the update, and is never silent.

Every case is opened as `qft train` opens it, and runs its steps twice: untouched, and with errors
injected into forward passes, recomputations and backward passes, some steps several times.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import set_seed

from qft import hardware, micro_batch, training
from qft.lean.model_parts import layer_stacks
from qft.micro_batch import MicroBatch
from qft.preparation import inner_model, prepared
from qft.progress import Reporter
from qft.recipe import build_recipe
from qft.step import accumulate_gradients

ERRORS: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    lambda: MemoryError(),
]


class Told(Reporter):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collecting a test process's garbage takes half a second, every time."""
    monkeypatch.setattr(micro_batch, "free_idle_memory", lambda: None)


class Faults:
    """Makes chosen calls of one layer's module run out of memory; each but once.

    Args:
        at: numbers of calls, counted from 0 over forward passes and recomputations.
        backward: those of them whose error comes in the backward pass.
    """

    def __init__(self, module: nn.Module, at: set[int], backward: set[int]) -> None:
        self.calls, self.raised = 0, 0
        self._at, self._backward = set(at), set(backward)
        self._handle = module.register_forward_hook(self._hook)

    def remove(self) -> None:
        self._handle.remove()

    def _raise(self) -> None:
        self.raised += 1
        raise ERRORS[self.raised % len(ERRORS)]()

    def _hook(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        number, self.calls = self.calls, self.calls + 1
        if number not in self._at:
            return output
        if number not in self._backward:
            self._raise()
        first = output[0] if isinstance(output, tuple) else output
        changed = _Fails.apply(first, self)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


class _Fails(torch.autograd.Function):
    """The identity, whose backward pass runs out of memory once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, faults: Faults) -> Tensor:  # type: ignore[override]
        ctx.faults = faults
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.faults._raise()
        return gradient, None


def texts(count: int = 12) -> list[dict[str, Any]]:
    """No two of a length."""
    return [
        {"prompt": f"say {n}", "completion": "it again " * (n % 5) + "x" * (n + 1)}
        for n in range(count)
    ]


def pairs(count: int = 12) -> list[dict[str, Any]]:
    return [{"source": "ab " * (n + 1), "target": "c" * (2 * n + 1)} for n in range(count)]


def classes(count: int = 12) -> list[dict[str, Any]]:
    return [{"text": "good " * n + "x" * n, "label": "yes" if n % 3 else "no"} for n in range(count)]


LORA = {"name": "lora", "rank": 4, "dropout": 0.2}
CASES: dict[str, dict[str, Any]] = {
    "padded": {"savers": {"attention": False}},
    "padded, kept": {"savers": {"attention": False}, "checkpointing": "none"},
    "flat": {},
    "flat, offloaded": {"offload": "host", "checkpointing": "full"},
    "packed": {"train": {"packing": True, "max_length": 64}, "savers": {"attention": False}},
    "seq2seq": {"task": "seq2seq", "rows": pairs},
    "classify": {
        "task": "classify", "rows": classes, "train": {"dropout": 0.1},
        "attention_dropout": False,
    },
    "adalora": {
        "strategy": {"name": "adalora", "rank": 2, "initial_rank": 4, "dropout": 0.2},
        "train": {"max_steps": 4},
    },
    "distilled": {"strategy": {"name": "distill", "student": LORA, "cache": "off"}},
    "full": {"strategy": {"name": "full"}, "train": {"embedding_noise": 5.0}},
    "prefix": {"strategy": {"name": "prefix", "length": 4}},
}  # fmt: skip


@pytest.fixture
def opened(
    tiny_llama: Path, tiny_t5: Path, tiny_bert: Path, tmp_path: Path
) -> Callable[..., tuple[Any, Any]]:
    """Opens a case: its recipe, and what `qft train` holds before the first step."""

    def make(case: dict[str, Any], told: Reporter | None = None) -> tuple[Any, Any]:
        recipe = build_recipe(recipe_values(case, tmp_path, tiny_llama, tiny_t5, tiny_bert))
        set_seed(0)
        chosen = hardware.choose("cpu", "float32")
        found = training._open(recipe, chosen, told or Told())
        if case.get("attention_dropout") is False:
            _without_attention_dropout(found.model)
        return recipe, found

    return make


def _without_attention_dropout(model: nn.Module) -> None:
    """Attention weights are dropped by the ordinary generator, which knows no samples."""
    for name, module in model.named_modules():
        if name.endswith("attention.self"):
            module.dropout = nn.Dropout(0.0)


def recipe_values(
    case: dict[str, Any], folder: Path, llama: Path, t5: Path, bert: Path
) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    made = case.get("rows", texts)()
    rows.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    strategy = case.get("strategy", LORA)
    if strategy["name"] == "distill":
        strategy = {**strategy, "teacher": str(llama)}
    task = case.get("task", "instruct")
    memory = {k: case[k] for k in ("savers", "checkpointing", "offload", "budget") if k in case}
    return {
        "model": str({"seq2seq": t5, "classify": bert}.get(task, llama)),
        "task": task,
        "data": {"train": str(rows), "max_duplicate_share": 1, **case.get("data", {})},
        "strategy": strategy, "dtype": "float32", "device": "cpu",
        "memory": {"checkpointing": "full", "micro_batch": 4, "feature_cache": "off", **memory},
        "train": {"batch_size": 8, "max_length": 96, "max_steps": 3, **case.get("train", {})},
        "output": str(folder / case.get("output", "run")),
    }  # fmt: skip


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def error_of(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative difference of a tensor."""
    assert found.keys() == wanted.keys()
    return max(
        float((found[n] - wanted[n]).norm() / wanted[n].norm().clamp(min=1e-30)) for n in wanted
    )


def hooked(model: nn.Module) -> nn.Module:
    """A module of a layer that is run in every forward pass and every recomputation."""
    layers = list(layer_stacks(inner_model(model)).values())[-1]
    names = ("mlp", "layer.2", "output")
    found = next(name for name in names if any(n == name for n, _ in layers[1].named_modules()))
    return layers[1].get_submodule(found)


def run_step(opened: Any, recipe: Any, step: int, at_once: MicroBatch) -> Any:
    model = opened.model
    model.zero_grad(set_to_none=True)
    torch.manual_seed(step)
    examples = opened.inputs.train.examples[(step % 2) * 4 :][:8]
    return accumulate_gradients(
        model,
        opened.loss.examples(model, examples, step),
        opened.inputs.task,
        step=step,
        micro_batch=at_once,
        pad_token_id=0,
        strategy=recipe.strategy,
        loss=opened.loss,
        layout=opened.layout,
    )


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", CASES)
def test_each_steps_gradients_are_those_of_an_untouched_run(
    name: str, dtype: torch.dtype, most: float, opened: Any, record_property: Any
):
    recipe, found = opened(CASES[name])
    found.model.to(dtype)
    if (teacher := getattr(found.loss, "source", None)) is not None:
        teacher.teacher.model.to(dtype)
    flat = found.layout.flat
    drawn = random.Random(name)
    worst, shrinks, replays = 0.0, 0, 0
    for step in (1, 2, 3):
        counting = Faults(hooked(found.model), set(), set())
        run_step(found, recipe, step, MicroBatch(4, padded=not flat))
        counting.remove()
        wanted = gradients(found.model)
        at = set(drawn.sample(range(counting.calls), min(1 + step % 2, counting.calls)))
        faults = Faults(hooked(found.model), at, {n for n in at if drawn.random() < 0.5})
        at_once = MicroBatch(4, padded=not flat)
        result = run_step(found, recipe, step, at_once)
        faults.remove()
        assert result.replays == faults.raised > 0
        assert result.replays == at_once.shrinks + at_once.retries
        worst = max(worst, error_of(gradients(found.model), wanted))
        shrinks, replays = shrinks + at_once.shrinks, replays + result.replays
        assert prepared(found.model).clock.moment is None  # type: ignore[union-attr]
    record_property("worst relative difference", worst)
    assert shrinks > 0
    assert replays >= 3
    assert worst < most
