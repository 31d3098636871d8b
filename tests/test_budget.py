"""memory.budget: what fits is kept, what does not is recomputed, and less than that is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer

import qft
from adapters.lora import LoRA
from qft import enforcement, hardware
from qft.budget import keep_what_fits
from qft.enforcement import Limit
from qft.errors import RecipeError, WillNotFitError
from qft.fitting import Fitting
from qft.lean.checkpointing import checkpointed_layers
from qft.lean.meter import Meter
from qft.out_of_memory import Shortage
from qft.planning.run import RunPlan
from qft.preparation import inner_model, prepare
from qft.progress import Reporter
from qft.trainer import StepTrainer


def big(layers: int = 6) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64, intermediate_size=160, num_hidden_layers=layers, vocab_size=300,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip


def test_more_budget_keeps_more_layers_and_is_kept_to():
    kept = []
    ids = torch.randint(3, 300, (2, 64))
    model = prepare(big(), LoRA(rank=4))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    _, least = keep_what_fits(model, step, 2**40, "adamw")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for budget in (2**40, least, least * 3 // 4):
        found, taken = keep_what_fits(model, step, budget, "adamw")
        kept.append(found)
        assert taken <= budget
        recomputed = [layer.gradient_checkpointing for layer in
                      checkpointed_layers(inner_model(model))]  # fmt: skip
        assert recomputed == [True] * (6 - found) + [False] * found
        with Meter(model) as counting:
            step()
        model.zero_grad(set_to_none=True)
        assert counting.reading().peak_bytes + 8 * trained == taken
    assert kept[0] == kept[1] == 6
    assert 0 <= kept[2] < 6
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(WillNotFitError) as refused:
        keep_what_fits(model, step, least // 4, "adamw")
    assert refused.value.exit_code == 3


def test_a_training_within_its_budget_learns_the_same(tiny_llama: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    texts = [{"text": f"line {n} says {n * n}"} for n in range(24)]
    rows.write_text("".join(json.dumps(r) + "\n" for r in texts), encoding="utf-8")

    def trained(name: str, memory: dict[str, Any]) -> float:
        recipe = qft.build_recipe({
            "model": str(tiny_llama), "task": "text", "strategy": {"name": "lora", "rank": 4},
            "data": {"train": str(rows), "eval": str(rows), "max_duplicate_share": 1},
            "train": {"max_steps": 3, "batch_size": 4, "max_length": 48}, "dtype": "float32",
            "device": "cpu", "memory": memory, "output": str(tmp_path / name),
        })  # fmt: skip
        return qft.train(recipe).metrics["loss"]

    assert trained("a", {"budget": "1GiB"}) == trained("b", {"checkpointing": "full"})
    with pytest.raises(WillNotFitError, match=r"memory\.budget"):
        trained("c", {"budget": "100KiB"})
    with pytest.raises(WillNotFitError, match="its weights alone"):
        trained("c", {"budget": "100KiB", "checkpointing": "none"})
    with pytest.raises(WillNotFitError, match="as it is"):
        trained("c", {"budget": "500KiB", "checkpointing": "none"})
    with pytest.raises(RecipeError, match="not a size"):
        trained("d", {"budget": "much"})


def test_a_packed_row_is_rehearsed_full(tiny_llama: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    texts = [{"text": f"line {n} says {n * n}"} for n in range(24)]
    rows.write_text("".join(json.dumps(r) + "\n" for r in texts), encoding="utf-8")

    def needed(packing: bool) -> float:
        recipe = qft.build_recipe({
            "model": str(tiny_llama), "task": "text", "strategy": {"name": "lora", "rank": 4},
            "data": {"train": str(rows), "eval": None},
            "train": {"max_steps": 1, "max_length": 128, "packing": packing}, "dtype": "float32",
            "device": "cpu", "output": str(tmp_path / str(packing)),
            "memory": {"checkpointing": "none", "micro_batch": 1},
        })  # fmt: skip
        return qft.train(recipe).report["measured"]["train"]["live_bytes"]

    # without packing, the texts run on in blocks of 128 tokens; packed, rows are as full as can be
    assert needed(True) == pytest.approx(needed(False), rel=0.25)


# --- the rehearsal


def rows_of(folder: Path) -> Path:
    rows = folder / "rows.jsonl"
    made = [{"prompt": f"say {n}", "completion": "it again " * (n % 6 + 1)} for n in range(16)]
    rows.write_text("".join(json.dumps(r) + "\n" for r in made), encoding="utf-8")
    return rows


def run(model: Path, folder: Path, name: str, **changes: Any) -> Any:
    memory = {"checkpointing": "full", "micro_batch": 4, **changes.pop("memory", {})}
    train = {"max_steps": 3, "batch_size": 8, "max_length": 96, **changes.pop("train", {})}
    told = changes.pop("told", None)
    how = {name: changes.pop(name) for name in ("resume",) if name in changes}
    suggest = changes.pop("suggest", None)
    values = {
        "model": str(model), "task": "instruct", "data": {"train": str(rows_of(folder))},
        "strategy": {"name": "lora", "rank": 4, "dropout": 0.2}, "dtype": "float32",
        "device": "cpu", "memory": memory, "train": train, "output": str(folder / name), **changes,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        if suggest is not None:
            patch.setattr(RunPlan, "suggestions", lambda *_: suggest())
        return qft.train(qft.build_recipe(values), reporter=told or Told(), **how)


class Told(Reporter):
    """Keeps what was said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def files_of(folder: Path) -> dict[str, bytes]:
    """Every byte of the last checkpoint but the run's own clock."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    files = [last / name for name in ("optimizer.safetensors", "state.json", "state.safetensors")]
    return {p.name: p.read_bytes() for p in [*files, *(last / "adapter").glob("*.safetensors")]}


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": {"name": "full"}, "train": {"optimizer": "sgd", "embedding_noise": 5.0}},
        {"strategy": {"name": "lora", "rank": 2, "dropout": 0.1}, "train": {"weight_decay": 0.1}},
        {"train": {"optimizer": "adafactor", "weight_decay": 0.1, "batch_size": 4}},
        {"strategy": {"name": "adalora", "rank": 2, "initial_rank": 4}, "train": {"max_steps": 4}},
    ],
)
def test_a_run_is_bit_for_bit_the_same_without_its_rehearsal(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The model drops attention weights, by the ordinary generator: its state counts."""
    model = tmp_path / "model"
    dropping = big(2)
    dropping.config.attention_dropout = 0.2
    dropping.config.pad_token_id = 0
    dropping.save_pretrained(model)
    make_tokenizer(model)
    rehearsed = []
    plain = StepTrainer.rehearse

    def seen(self: StepTrainer) -> None:
        before = {n: t.clone() for n, t in self.trained.state_dict().items()}
        plain(self)
        after = self.trained.state_dict()
        assert all(torch.equal(after[n], tensor) for n, tensor in before.items())
        assert all(p.grad is None for p in self.trained.parameters())
        assert not self.optimizer.state
        rehearsed.append(1)

    monkeypatch.setattr(StepTrainer, "rehearse", seen)
    with_it = files_of(run(model, tmp_path, "with", **copy.deepcopy(changes)).folder)
    monkeypatch.setattr(StepTrainer, "rehearse", lambda self: None)
    without = files_of(run(model, tmp_path, "without", **copy.deepcopy(changes)).folder)
    assert rehearsed == [1]
    assert with_it == without


def test_a_zero_keeps_its_sign_and_every_generator_its_place():
    import random

    import numpy
    from torch import nn

    from qft.rehearsal import allocate_states, left_as_it_was
    from qft.strategy import Strategy

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([-0.0, 0.0, 1.0]))
            self.register_buffer("seen", torch.zeros(2))
            self.longest = 3

    for make in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor):
        model = Counts()
        optimizer = make(model.parameters(), lr=1.0, weight_decay=0.5)
        bits = model.weight.detach().view(torch.int32).clone()
        with left_as_it_was(model, optimizer, Strategy()):
            drawn = random.random(), numpy.random.rand(), float(torch.rand(()))
            allocate_states(optimizer)
            if make is not torch.optim.SGD:
                assert optimizer.state
            model.seen += 1
            model.longest = 9
            model.seen = torch.ones(3)
        again = random.random(), numpy.random.rand(), float(torch.rand(()))
        assert drawn == again
        assert torch.equal(model.weight.detach().view(torch.int32), bits)
        assert model.seen.tolist() == [0, 0]
        assert model.longest == 3
        assert model.weight.grad is None
        assert not optimizer.state
        assert optimizer.param_groups[0]["lr"] == 1.0
        assert optimizer.param_groups[0]["weight_decay"] == 0.5


# --- the budget, enforced


def live_bytes(result: Any) -> int:
    return int(result.report["measured"]["train"]["live_bytes"])


def test_a_little_less_than_needed_makes_less_go_at_once(tiny_llama: Path, tmp_path: Path):
    memory = {"checkpointing": "none"}
    whole = run(tiny_llama, tmp_path, "whole", memory=memory)
    need = live_bytes(whole)
    told = Told()
    budget = need * 9 // 10
    less = run(tiny_llama, tmp_path, "less", memory={**memory, "budget": budget}, told=told)
    assert less.report["training"]["micro_batch_tokens"]
    assert live_bytes(less) <= budget
    assert any("tokens at once" in line for line in told.lines)
    wanted = dict(whole.model.named_parameters())
    for name, parameter in less.model.named_parameters():
        assert torch.allclose(parameter, wanted[name], rtol=1e-4, atol=1e-6), name
    with pytest.raises(WillNotFitError) as refused:
        run(tiny_llama, tmp_path, "no", memory={**memory, "budget": need // 8},
            suggest=lambda: ["quantize: nf4", "a shorter row"])  # fmt: skip
    assert refused.value.fix == "quantize: nf4; a shorter row"
    assert refused.value.exit_code == 3
    assert "weights" in str(refused.value.found)


def test_what_passes_the_budget_in_a_step_takes_the_path_of_a_gpu(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same, where no trial before the training has found it out."""
    need = live_bytes(run(tiny_llama, tmp_path, "whole"))
    monkeypatch.setattr(Fitting, "decide", lambda self: None)
    told = Told()
    less = run(tiny_llama, tmp_path, "less", memory={"budget": need * 95 // 100}, told=told)
    assert live_bytes(less) <= need * 95 // 100
    assert any("before the first step: out of memory with 4 ex" in line for line in told.lines)
    with pytest.raises(WillNotFitError, match="Not even one") as refused:
        run(tiny_llama, tmp_path, "no", memory={"budget": need // 4},
            suggest=lambda: ["quantize: nf4"])  # fmt: skip
    assert refused.value.fix == "quantize: nf4"
    assert "rehearsal" in str(refused.value.where)
    assert "weights" in str(refused.value.found)


def limit_of(model: Any, budget: int) -> Limit:
    limit = Limit(budget, "cpu")
    limit.watch(model, None, "sgd")
    return limit


def test_only_larger_micro_batches_are_metered(monkeypatch: pytest.MonkeyPatch):
    model, metered = big(1), []
    limit = limit_of(model, 2**40)
    plain = enforcement.Meter
    monkeypatch.setattr(
        enforcement, "Meter", lambda *a, **k: (metered.append(size), plain(*a, **k))[1]
    )
    with limit.enforced():
        for size in ((2, 50, 40), (2, 50, 40), (1, 50, 40), (2, 60, 30), (2, 60, 40), (2, 55, 35)):
            with enforcement.within_budget("train", *size):
                pass
        size = (1, 1, 1)
        with enforcement.within_budget("evaluate", *size):
            pass
    assert metered == [(2, 50, 40), (2, 60, 30), (2, 60, 40), (1, 1, 1)]
    with enforcement.within_budget("train", 9, 9, 9):  # no longer enforced
        pass
    assert len(metered) == 4


def test_a_resident_set_beyond_the_budget_is_lack_of_memory(monkeypatch: pytest.MonkeyPatch):
    limit = limit_of(big(1), 100 * 2**20)
    monkeypatch.setattr(hardware, "resident_bytes_since", lambda: grown[0])
    limit.peaks.baseline_bytes = 10 * 2**20
    with limit.enforced():
        grown = [105 * 2**20]
        with enforcement.within_budget("train", 1, 1, 1):
            pass
        grown = [111 * 2**20]
        with (
            pytest.raises(torch.OutOfMemoryError, match="resident set grew by 101") as short,
            enforcement.within_budget("train", 1, 1, 1),
        ):
            pass
    assert Shortage.of(short.value).fragmented, "idle memory is freed before anything else"


def test_a_budget_of_what_is_free(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hardware, "free_memory_bytes", lambda device: 10 * 2**30)
    assert Limit("auto", "cpu").budget_bytes == int(9.5 * 2**30)
    monkeypatch.setattr(hardware, "free_memory_bytes", lambda device: None)
    assert Limit("auto", "cpu").budget_bytes is None
    assert Limit(None, "cpu").budget_bytes is None


def test_the_allocator_of_a_gpu_is_held_to_the_budget(monkeypatch: pytest.MonkeyPatch):
    set_to: list[float] = []
    gib = 2**30
    for name, value in {
        "mem_get_info": (15 * gib, 16 * gib), "memory_reserved": gib // 2,
        "get_per_process_memory_fraction": 0.9, "max_memory_allocated": 0,
        "max_memory_reserved": 0, "reset_peak_memory_stats": None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, v=value: v)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", set_to.append)
    limit = Limit(8 * gib, "cuda")
    assert limit.tensor_bytes == 8 * gib - gib // 2  # of the GiB in use, half is the context
    with limit.enforced():
        assert set_to == [7.5 / 16]
    assert set_to == [7.5 / 16, 0.9]
    assert Limit("auto", "cuda").budget_bytes == int(15 * gib * 0.95) + gib


def test_peaks_are_told_by_phase(tiny_llama: Path, tmp_path: Path):
    result = run(tiny_llama, tmp_path, "run", data={"train": str(rows_of(tmp_path)),
                                                    "eval_share": 0.25})  # fmt: skip
    measured = result.report["measured"]
    assert set(measured) == {"load", "train", "evaluate", "save"}
    assert measured["train"]["live_bytes"] > 100_000
    assert all(phase["resident_bytes"] is None or phase["resident_bytes"] >= 0
               for phase in measured.values())  # fmt: skip


def test_a_containers_limit_is_known(tmp_path: Path):
    (tmp_path / "memory.max").write_text("1000\n", encoding="ascii")
    (tmp_path / "memory.current").write_text("700\n", encoding="ascii")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100\n", encoding="ascii")
    assert hardware._free_in_group_bytes(tmp_path) == 400
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert hardware._free_in_group_bytes(tmp_path) is None
