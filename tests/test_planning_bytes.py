"""The planner's fake step holds what the training's own step holds, to the byte or nearly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import qft
from qft.inputs import open_inputs
from qft.lean import attention as by_hand
from qft.lean.attention import Visible, attention
from qft.lean.meter import meter
from qft.packing_check import keeps_apart
from qft.planning.fake_training import FakeTraining
from qft.planning.flat_rows import would_keep_apart
from qft.planning.job import PlannedJob, planned_job
from qft.planning.known_values import KnownValues
from qft.planning.measured_step import examples_of_step, measured_step
from qft.quantization import unquantized_modules
from qft.strategy import Context

LORA: dict[str, Any] = {"name": "lora", "rank": 4}
WORDS = ["the", "cat", "sat", "on", "a", "mat", "saw", "that", "it", "was"]
ENDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of four families, wide enough that what the meter itself makes is nothing."""
    import transformers as hub

    torch.manual_seed(0)
    grouped = {"vocab_size": 260, "hidden_size": 128, "intermediate_size": 256,
               "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
               "max_position_embeddings": 512}  # fmt: skip
    starts: dict[str, Any] = {"decoder_start_token_id": 0}
    makers: dict[str, Any] = {
        "llama": lambda: hub.LlamaForCausalLM(hub.LlamaConfig(**grouped, **ENDS)),
        "qwen2": lambda: hub.Qwen2ForCausalLM(
            hub.Qwen2Config(tie_word_embeddings=True, **grouped, **ENDS)),
        "gpt2": lambda: hub.GPT2LMHeadModel(hub.GPT2Config(
            vocab_size=260, n_embd=128, n_layer=2, n_head=4, n_positions=512, **ENDS)),
        "bert": lambda: hub.BertModel(hub.BertConfig(
            vocab_size=260, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, pad_token_id=0)),
        "t5": lambda: hub.T5ForConditionalGeneration(hub.T5Config(
            vocab_size=260, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_decoder_layers=2,
            num_heads=4, pad_token_id=0, eos_token_id=2, **starts)),
    }  # fmt: skip
    found = {}
    for name, make in makers.items():
        found[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(found[name])
        make_tokenizer(found[name])
    return found


def rows_of(task: str) -> list[dict[str, Any]]:
    """Eight rows of several lengths."""
    made = []
    for number in range(8):
        text = " ".join(WORDS[(number + k) % 10] for k in range(24 - 3 * (number % 4)))
        words = [*text.split(), str(number)]
        row: dict[str, Any] = {
            "text": {"text": f"{text} {number}"},
            "instruct": {"prompt": f"{text} {number}", "completion": text[:60]},
            "chat": {"messages": [{"role": "user", "content": f"{text} {number}"},
                                  {"role": "assistant", "content": text[:60]}]},
            "seq2seq": {"source": f"{text} {number}", "target": text[:60]},
            "classify": {"text": f"{text} {number}", "label": "abc"[number % 3]},
            "token": {"tokens": words, "tags": ["OBI"[k % 3] for k in range(len(words))]},
            "extract": {"question": "who sat", "context": f"{text} end {number}",
                        "answers": {"text": ["end"], "answer_start": [len(text) + 1]}},
        }[task]  # fmt: skip
        made.append(row)
    return made


def values_of(
    folder: Path, model: Path, task: str, strategy: dict[str, Any], **changes: Any
) -> dict[str, Any]:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(task)), encoding="utf-8")
    memory = {"checkpointing": "none", "micro_batch": 4, "feature_cache": "off"}
    train = {"batch_size": 8, "max_length": 256, "warmup": 0}
    return {
        "model": str(model), "task": task, "data": {"train": str(data)}, "strategy": strategy,
        "dtype": changes.get("dtype", "bfloat16"), "quantize": changes.get("quantize", "none"),
        "device": "cpu", "memory": {**memory, **changes.get("memory", {})},
        "train": {**train, **changes.get("train", {})}, "output": str(folder / "run"),
    }  # fmt: skip


def job_of(values: dict[str, Any], device: str = "cpu") -> PlannedJob:
    recipe = qft.build_recipe(values)
    return planned_job(recipe, open_inputs(recipe), device)


def savers(**which: bool) -> dict[str, Any]:
    return {"memory": {"savers": which}}


def train(**which: Any) -> dict[str, Any]:
    return {"train": which}


DISTILL: dict[str, Any] = {"name": "distill", "student": LORA}
# model, task, strategy, changes
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "lora-text": ("llama", "text", LORA, {}),
    "lora-dropout-nf4": ("llama", "instruct", {**LORA, "dropout": 0.1}, {"quantize": "nf4"}),
    "dora-fp32": ("llama", "instruct", {**LORA, "dora": True}, {"dtype": "float32"}),
    "int8-recomputed": (
        "llama", "chat", LORA, {"quantize": "int8", "memory": {"checkpointing": "full"}}),
    "offload-disk": (
        "llama", "text", LORA, {"memory": {"checkpointing": 1, "offload": "disk"}}),
    "packed-smoothed": ("llama", "instruct", LORA, train(packing=True, label_smoothing=0.1)),
    "ungrouped-noise": (
        "llama", "instruct", LORA, train(group_by_length=False, embedding_noise=5)),
    "without-engine": (
        "llama", "instruct", LORA,
        {**savers(label_loss=False, attention=False, lora=False), **train(label_smoothing=0.1)}),
    "tiled-int8-head-host": (
        "llama", "text", LORA, savers(tiled_mlp=True, int8_head=True, host_embeddings=True)),
    "pissa": ("qwen2", "text", {**LORA, "initialisation": "pissa"}, {}),
    "prefix": ("llama", "instruct", {"name": "prefix", "length": 8}, {}),
    "prompt": ("llama", "instruct", {"name": "prompt", "length": 8}, {}),
    # bitsandbytes' own 8-bit product keeps its inputs
    "prompt-int8": ("llama", "instruct", {"name": "prompt", "length": 8}, {"quantize": "int8"}),
    "ia3": ("llama", "text", {"name": "ia3"}, {}),
    "adalora": ("llama", "text", {"name": "adalora", "rank": 2, "initial_rank": 4, "warmup": 0,
                                  "settled": 0.1}, {}),
    "layers-adafactor": (
        "llama", "text", {"name": "layers", "last": 1}, train(optimizer="adafactor")),
    "full-sgd": ("llama", "text", {"name": "full"}, train(optimizer="sgd")),
    "full-8-bit": ("llama", "text", {"name": "full"}, train(optimizer="adamw-8bit")),
    "stack": ("qwen2", "text", {"name": "stack", "of": [{"name": "bitfit"}, LORA]},
              train(optimizer="paged-adamw")),
    "gpt2": ("gpt2", "text", LORA, train(dropout=0.1)),
    "bert-balanced": ("bert", "classify", LORA,
                      {"quantize": "nf4", **train(class_weights="balanced")}),
    "bert-tags": ("bert", "token", {"name": "full"}, train(label_smoothing=0.1)),
    "bert-spans": ("bert", "extract", LORA, {"dtype": "float32"}),
    "decoder-classify": ("llama", "classify", LORA, {}),
    "t5-nf4": ("t5", "seq2seq", LORA, {"quantize": "nf4"}),
    "taught-live": ("llama", "instruct", {**DISTILL, "cache": "off", "hidden": {}}, {}),
    "taught-samples": ("llama", "instruct", DISTILL, {}),
}  # fmt: skip


# of each kind one in every run; all of them take a minute
QUICK = ("lora-dropout-nf4", "packed-smoothed", "prefix", "layers-adafactor", "full-8-bit",
         "bert-tags", "taught-live")  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]
)
def test_the_fake_step_holds_what_the_trainings_own_holds(
    name: str, folders: dict[str, Path], tmp_path: Path
):
    model, task, strategy, changes = CASES[name]
    if strategy["name"] == "distill":
        strategy = {**strategy, "teacher": str(folders[model])}
    values = values_of(tmp_path, folders[model], task, strategy, **changes)
    job = job_of(values)
    fake = FakeTraining(job).meter(examples_of_step(job.recipe, job.inputs.train.examples))
    real = measured_step(job.recipe).reading
    assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=0.01)
    # trained parameters, their gradients and the optimizer's states are the same to the byte
    for category in ("adapters", "gradients", "optimizer"):
        assert abs(fake.most[category] - real.most[category]) <= 16, category
    flops = sum(fake.flops.values()) / sum(real.flops.values())
    # a real mask lets attention leave out what it hides
    assert abs(flops - 1) < 1e-3 if job.flat else 0.999 < flops < 1.1


@pytest.mark.slow
def test_a_real_model_in_true_size(assets: Path, tmp_path: Path):
    values = values_of(tmp_path, assets / "models/mini-6m", "chat", LORA, quantize="nf4")
    job = job_of(values)
    fake = FakeTraining(job).meter(examples_of_step(job.recipe, job.inputs.train.examples))
    real = measured_step(job.recipe).reading
    assert fake.peak_bytes == pytest.approx(real.peak_bytes, rel=1e-3)


@pytest.mark.parametrize("name", ["lora-dropout-nf4", "bert-tags", "taught-live", "full-sgd"])
def test_a_gpu_is_planned_without_one(name: str, folders: dict[str, Path], tmp_path: Path):
    model, task, strategy, changes = CASES[name]
    if strategy["name"] == "distill":
        strategy = {**strategy, "teacher": str(folders[model])}
    job = job_of(values_of(tmp_path, folders[model], task, strategy, **changes), "cuda")
    training = FakeTraining(job)
    reading = training.meter(job.inputs.train.examples)
    assert reading.host_peak.total < 0.1 * reading.peak_bytes
    if "teacher" in strategy:  # the student's own model, unquantized, beside its adapters
        skeleton = job.ready.skeleton
        assert training.teacher_bytes >= sum(p.nbytes for p in skeleton.parameters())
    else:
        assert training.teacher_bytes == 0


def test_paged_states_lie_on_the_host(folders: dict[str, Path], tmp_path: Path):
    def reading(optimizer: str) -> Any:
        values = values_of(tmp_path, folders["llama"], "text", {"name": "full"},
                           train={"optimizer": optimizer})  # fmt: skip
        return FakeTraining(job_of(values, "cuda")).meter()

    # no tensor here has the hundred thousand numbers from which bitsandbytes pages
    small, plain = reading("paged-adamw"), reading("adamw")
    assert small.most["optimizer"] == pytest.approx(plain.most["optimizer"], rel=0.01)
    assert small.host_peak.total == pytest.approx(plain.host_peak.total, abs=1000)


def test_padding_costs_a_gpu_its_mask(folders: dict[str, Path], tmp_path: Path):
    values = values_of(tmp_path, folders["llama"], "instruct", LORA)
    job = job_of(values, "cuda")
    ordered = sorted(job.inputs.train.examples, key=lambda e: -len(e.inputs["input_ids"]))
    longest = ordered[0]
    width = len(longest.inputs["input_ids"])
    alike = FakeTraining(job).meter([longest] * 4)
    padded = FakeTraining(job).meter([longest, longest, longest, ordered[-1]])
    more = padded.activation_bytes - alike.activation_bytes
    labels = 4 * 3 * width * 4  # a row with fewer labels keeps fewer hidden states
    assert more > 4 * width * width - 128 * labels  # a byte a row, query and key, at least


def test_attention_of_fake_tensors_takes_what_all_tiles_take():
    borders = (0, 300, 420, 700)

    def reading(batch: int, visible: Visible) -> tuple[int, int]:
        shape, keys = (batch, 4, 700, 16), (batch, 2, 700, 16)
        tensors = [torch.zeros(s, dtype=torch.bfloat16) for s in (shape, keys, keys)]
        tensors = [tensor.requires_grad_() for tensor in tensors]

        def step() -> None:
            attention(*tensors, 0.25, visible).sum().backward()

        found = meter(step, device="cpu")
        return found.peak_bytes, sum(found.flops.values())

    mask = torch.ones(1, 1, 700, 700, dtype=torch.bool).tril()
    for batch, visible in (
        (1, Visible(borders, True)),
        (3, Visible((0, 700), True)),
        (3, Visible((0, 700), False)),
    ):
        real = reading(batch, visible)
        with FakeTensorMode():
            fake = reading(batch, visible)
        assert abs(fake[0] - real[0]) <= 64
        assert fake[1] == pytest.approx(real[1], rel=1e-6)
    real = reading(2, Visible((0, 700), False, mask))
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = reading(2, Visible((0, 700), False, torch.ones(1, 1, 700, 700, dtype=torch.bool)))
    assert fake[0] == pytest.approx(real[0], rel=0.02)


def test_attention_of_fake_tensors_runs_few_tiles(monkeypatch: pytest.MonkeyPatch):
    run: list[int] = []
    plain = by_hand._chances

    def counting(*args: Any) -> Tensor:
        run.append(1)
        return plain(*args)

    monkeypatch.setattr(by_hand, "_chances", counting)
    with FakeTensorMode():
        tensors = [torch.zeros(4, 2, 4096, 8, requires_grad=True) for _ in range(3)]
        attention(*tensors, 0.3, Visible((0, 4096), True)).sum().backward()
    assert len(run) == 4, "one tile of two rows, in each direction"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_small_model_of_the_family_knows_whether_rows_may_be_flat(
    family: str, folders: dict[str, Path], tmp_path: Path
):
    job = job_of(values_of(tmp_path, folders[family], "text", LORA))
    from qft import models
    from qft.preparation import prepare

    real = prepare(models.open_model(folders[family], job.ready.spec), job.recipe.strategy,
                   checkpointing="none", context=Context(task="text"))  # fmt: skip
    wanted = keeps_apart(real, job.inputs.train.examples, 0)
    found = would_keep_apart(job.ready.skeleton, job.recipe.strategy, job.ready.context)
    assert found == wanted


def test_a_strategy_may_speak_against_flat_rows(folders: dict[str, Path], tmp_path: Path):
    prefix = {"name": "prefix", "length": 8}
    job = job_of(values_of(tmp_path, folders["llama"], "text", prefix))
    assert not job.flat
    job = job_of(values_of(tmp_path, folders["llama"], "text", LORA))
    assert job.flat


def test_what_is_known_of_a_batch_stays_known():
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        logits = torch.empty(2, 3, 7, device="meta", requires_grad=True)
    labels = torch.tensor([[1, -100, 2], [-100, -100, 3]])
    with KnownValues(mode, "meta"):
        here = labels.to(logits.device)
        assert here.device.type == "cpu"
        kept = here != -100
        chosen = logits[kept]
        assert chosen.shape == (3, 7)
        loss = nn.functional.cross_entropy(chosen, here[kept])
        assert loss.device.type == "meta"
    with mode:
        loss.backward()
    assert logits.grad is not None


def test_what_a_family_wants_in_float32_is_not_quantized(folders: dict[str, Path], tmp_path: Path):
    job = job_of(values_of(tmp_path, folders["t5"], "seq2seq", LORA))
    kept = unquantized_modules(job.ready.skeleton)
    assert "encoder.block.0.layer.1.DenseReluDense.wo" in kept
    assert "encoder.block.0.layer.1.DenseReluDense.wi" not in kept
