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
from transformers import TrainerCallback, set_seed

import qft
from qft import hardware, micro_batch, training
from qft.checkpoints import list_checkpoints
from qft.errors import WillNotFitError
from qft.evaluation import evaluate
from qft.generation import generate
from qft.lean.checkpointing import checkpointed_layers
from qft.lean.model_parts import layer_stacks
from qft.micro_batch import MicroBatch
from qft.out_of_memory import Shortage, asked_bytes, is_out_of_memory
from qft.phase_peaks import PhasePeaks
from qft.preparation import inner_model, prepared
from qft.progress import Reporter
from qft.recipe import build_recipe
from qft.run_watch import RunWatch
from qft.step import ALONE, Share, StepResult, accumulate_gradients
from qft.trainer import StepTrainer

ERRORS: list[Callable[[], BaseException]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    lambda: MemoryError(),
]


class Told(Reporter):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
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
    return [
        {"text": "good " * n + "x" * (n + 1), "label": "yes" if n % 3 else "no"}
        for n in range(count)
    ]


LORA = {"name": "lora", "rank": 4, "dropout": 0.2}
CASES: dict[str, dict[str, Any]] = {
    "padded": {"savers": {"attention": False}},
    "padded, kept": {"savers": {"attention": False}, "checkpointing": "none"},
    "flat": {},
    "flat, offloaded": {"offload": "host", "checkpointing": "full"},
    "packed": {"train": {"packing": True, "max_length": 80}, "savers": {"attention": False}},
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
    """The relative difference of the whole gradient."""
    assert found.keys() == wanted.keys()
    apart = sum(float((found[n] - wanted[n]).double().norm()) ** 2 for n in wanted)
    return float((apart / sum(float(g.double().norm()) ** 2 for g in wanted.values())) ** 0.5)


def hooked(model: nn.Module) -> nn.Module:
    """A module of a layer that is run in every forward pass and every recomputation."""
    layers = list(layer_stacks(inner_model(model)).values())[-1]
    names = ("mlp", "layer.2", "output")
    found = next(name for name in names if any(n == name for n, _ in layers[1].named_modules()))
    return layers[1].get_submodule(found)


def run_step(opened: Any, recipe: Any, step: int, at_once: MicroBatch, share: Share = ALONE) -> Any:
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
        share=share,
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


def test_a_teacher_that_runs_out_of_memory_is_asked_again(opened: Any):
    recipe, found = opened(CASES["distilled"])
    run_step(found, recipe, 1, MicroBatch(4))
    wanted = gradients(found.model)
    faults = Faults(hooked(found.loss.source.teacher.model), {1}, set())
    result = run_step(found, recipe, 1, MicroBatch(4))
    faults.remove()
    assert result.replays == faults.raised == 1
    assert error_of(gradients(found.model), wanted) < 1e-6


def test_with_several_processes_nothing_is_replayed(opened: Any):
    recipe, found = opened(CASES["padded"])
    faults = Faults(hooked(found.model), {0}, set())
    with pytest.raises(WillNotFitError):
        run_step(found, recipe, 1, MicroBatch(2), share=Share(0, 2))
    assert faults.calls == 1
    assert not gradients(found.model)


# --- what happens then


def test_a_micro_batch_shrinks_by_tokens_and_short_rows_go_on_together():
    told: list[str] = []
    at_once = MicroBatch(4, told=told.append)
    assert at_once.split([100] * 6) == [range(4), range(4, 6)]
    assert at_once.make_room([100, 10, 10, 10], Shortage("none left"))
    assert at_once.tokens == 200
    assert at_once.split([100, 10, 10, 10, 10]) == [range(2), range(2, 5)]
    assert at_once.split([50] * 5) == [range(4), range(4, 5)]
    assert "4 examples of up to 100 tokens" in told[0]
    assert "at most 200 tokens" in told[0]
    assert at_once.shrinks == 1
    flat = MicroBatch(4, padded=False)
    assert flat.make_room([100, 10, 10, 10], Shortage(""))
    assert flat.tokens == 110


def test_one_example_is_tried_again_then_relieved_then_given_up():
    relief = ["all layers recompute", None]
    told: list[str] = []
    at_once = MicroBatch(4, relieve=lambda: relief.pop(0), told=told.append)
    assert at_once.make_room([100], Shortage("none left"))
    assert at_once.make_room([90], Shortage("none left"))  # another one has its own second try
    assert at_once.make_room([100], Shortage("none left"))
    assert "all layers recompute" in told[-1]
    assert at_once.make_room([100], Shortage("none left"))
    assert not at_once.make_room([100], Shortage("none left"))
    assert (at_once.retries, at_once.shrinks, at_once.tokens) == (3, 0, None)


def test_fragmented_memory_is_freed_before_anything_becomes_smaller(
    monkeypatch: pytest.MonkeyPatch,
):
    freed: list[int] = []
    monkeypatch.setattr(micro_batch, "free_idle_memory", lambda: freed.append(1))
    at_once = MicroBatch(4)
    assert at_once.make_room([10, 10], Shortage("", fragmented=True))
    assert (at_once.tokens, at_once.retries, freed) == (None, 1, [1])
    assert at_once.make_room([10, 10], Shortage("", fragmented=True))
    assert (at_once.tokens, at_once.retries) == (10, 1)

    text = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of"
    assert asked_bytes(torch.OutOfMemoryError(text)) == 20 * 2**20
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10 * 2**20)
    for reserved, fragmented in ((29, False), (30, True)):
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda r=reserved: r * 2**20)
        assert Shortage.of(torch.OutOfMemoryError(text)).fragmented is fragmented


def test_what_is_no_lack_of_memory_is_left_alone():
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert all(is_out_of_memory(make()) for make in ERRORS)


class _Strikes(TrainerCallback):
    """Lets a layer run out of memory while step ``step`` runs, so often as told."""

    def __init__(self, module: str, step: int, times: int) -> None:
        self.module, self.step, self.left = module, step, times
        self.now = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.now:
            found = next(m for n, m in kwargs["model"].named_modules() if n.endswith(self.module))
            found.register_forward_hook(self._hook)
        self.now = state.global_step + 1

    def _hook(self, *arguments: Any) -> None:
        if self.now == self.step and self.left and torch.is_grad_enabled():
            self.left -= 1
            raise torch.OutOfMemoryError("injected")


@pytest.fixture
def trained(tiny_llama: Path, tiny_t5: Path, tiny_bert: Path, tmp_path: Path) -> Callable[..., Any]:
    def run(
        case: dict[str, Any], *callbacks: TrainerCallback, told: Reporter | None = None, **how: Any
    ) -> Any:
        values = recipe_values(case, tmp_path, tiny_llama, tiny_t5, tiny_bert)
        return qft.train(build_recipe(values), callbacks=callbacks, reporter=told or Told(), **how)

    return run


def weights(result: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in result.model.named_parameters() if p.requires_grad}


def test_a_training_goes_on_and_says_so(trained: Any, record_property: Any):
    whole = trained({"output": "whole"})
    told = Told()
    found = trained({"output": "hit"}, _Strikes("layers.1.mlp", 2, 1), told=told)
    report = found.report["training"]
    assert report["replays"] == 1
    assert report["micro_batch_tokens"] is not None
    assert [entry["step"] for entry in report["out_of_memory"]] == [2]
    assert len([line for line in told.lines if line.startswith("step 2: out of memory")]) == 1
    apart = error_of(weights(found), weights(whole))
    record_property("final weights, relative difference", apart)
    assert apart < 1e-5
    assert whole.report["training"]["out_of_memory"] == []


def test_a_run_that_cannot_go_on_is_saved_first_and_resumed_bit_for_bit(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(WillNotFitError, match="Not even one") as refused:
        trained({"output": "run"}, _Strikes("layers.1.mlp", 3, 99))
    assert "step 3" in str(refused.value.where)
    assert "checkpoint of step 2" in str(refused.value.fix)
    assert "--resume" in str(refused.value.fix)
    saved = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == ["checkpoint-2"]
    rehearsed = []
    plain = StepTrainer.rehearse
    monkeypatch.setattr(StepTrainer, "rehearse", lambda self: (rehearsed.append(1), plain(self)))
    resumed = trained({"output": "run"}, resume=True)
    assert rehearsed == [1], "on what the optimizer holds already"
    whole = trained({"output": "whole"})
    assert error_of(weights(resumed), weights(whole)) == 0


def test_kept_activations_are_given_up_before_the_run_is(trained: Any):
    told = Told()
    result = trained(
        {"output": "run", "checkpointing": "auto", "train": {"batch_size": 1}},
        _Strikes("layers.1.mlp", 2, 2),
        told=told,
    )
    assert result.report["training"]["replays"] == 2
    assert any("all 2 layers recompute" in line for line in told.lines)
    layers = checkpointed_layers(inner_model(result.model))
    assert all(layer.gradient_checkpointing for layer in layers)


def test_dropout_that_knows_no_samples_is_said_to_be_another(trained: Any):
    told = Told()
    case = {"task": "classify", "rows": classes, "output": "run"}
    trained(case, _Strikes("layer.1.output", 1, 1), told=told)
    hit = next(line for line in told.lines if line.startswith("step 1: out of memory"))
    assert "statistically" in hit


def test_an_evaluation_that_cannot_go_on_is_saved_first(
    trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from qft.judging.tokens import TokenJudge

    def fails(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(TokenJudge, "score", fails)
    with pytest.raises(WillNotFitError, match="for evaluation") as refused:
        trained({"output": "run", "data": {"eval_share": 0.3}, "train": {"eval_every": 2}})
    assert "checkpoint of step 2" in str(refused.value.fix)
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "checkpoint-2"


def test_what_a_change_costs_is_said_some_steps_later(tmp_path: Path):
    told = Told()
    trainer: Any = type("Trainer", (), {"changes": []})()
    watch = RunWatch(trainer, tmp_path / "log", "cpu", told, peaks=PhasePeaks("cpu"))

    def step(number: int, seconds: float, replays: int = 0) -> None:
        result = StepResult(torch.zeros(()), 1, 100, 4, replays)
        watch.tokens, watch.seconds = watch.tokens + 100, watch.seconds + seconds
        trainer.changes = ["out of memory"] * replays
        watch._say_shortages(number, result, seconds)

    for number in range(1, 4):
        step(number, 1.0)
    step(4, 3.0, replays=1)
    for number in range(5, 11):
        step(number, 2.0)
    slower = [line for line in told.lines if "slower" in line]
    assert slower == ["step 9: 50 tokens/s since the change, 100 before: 50% slower"]
    assert watch.replays == 1


# --- evaluation and generation


class _Limited:
    """Lets a module take no more rows than it likes."""

    def __init__(self, module: nn.Module, rows: int) -> None:
        self.rows, self.seen = rows, [0]
        self.handle = module.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.seen.append(len(inputs[0]))
        if len(inputs[0]) > self.rows:
            raise torch.OutOfMemoryError("injected")


@pytest.fixture
def llama(tiny_llama: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(tiny_llama)


def test_generation_shrinks_and_remembers_and_writes_the_same(llama: Any):
    model, tokenizer = llama
    prompts = [f"a text {'that goes on ' * n}" for n in range(6)]
    wanted = generate(model, tokenizer, prompts, max_new_tokens=6)
    state = torch.get_rng_state()
    limited = _Limited(model.model.layers[1].mlp, 3)
    at_once = MicroBatch(6)
    assert generate(model, tokenizer, prompts, max_new_tokens=6, micro_batch=at_once) == wanted
    assert at_once.shrinks > 0
    first, limited.seen = at_once.shrinks, []
    assert generate(model, tokenizer, prompts, max_new_tokens=6, micro_batch=at_once) == wanted
    assert at_once.shrinks == first, "what did not fit is not tried again"
    assert torch.equal(torch.get_rng_state(), state)
    limited.rows = 0
    with pytest.raises(WillNotFitError, match="Not even one text") as refused:
        generate(model, tokenizer, prompts, max_new_tokens=6)
    assert refused.value.exit_code == 3


def test_an_evaluation_remembers_what_did_not_fit(llama: Any):
    from qft.data.tasks import TASKS, Example

    model, _ = llama
    rows = [Example(n, {"input_ids": [5] * (9 + n), "labels": [5] * (9 + n)}) for n in range(8)]
    wanted = evaluate(model, rows, TASKS["text"], pad_token_id=0)
    _Limited(model.model.layers[1].mlp, 4)
    at_once = MicroBatch(8)
    for _ in range(2):
        found = evaluate(model, rows, TASKS["text"], pad_token_id=0, micro_batch=at_once)
        assert found == pytest.approx(wanted, rel=1e-5)
        assert at_once.shrinks == 1
