"""What is frozen runs once: the same numbers, never a wrong cache, the trunk out of memory."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qft
from qft import features, hardware, training
from qft.data.tasks import pad_id
from qft.errors import Interrupted, RecipeError
from qft.feature_store import FeatureStore, Rows
from qft.lean.meter import Meter
from qft.lean.model_parts import layer_stacks
from qft.lean.trunk import Unloaded
from qft.preparation import inner_model
from qft.progress import Reporter
from qft.recipe import build_recipe
from qft.shard_store import make_room
from qft.step import accumulate_gradients

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
         "num_hidden_layers": 3, "vocab_size": 260, "max_position_embeddings": 130,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
ROWS: dict[str, list[dict[str, Any]]] = {
    "classify": [{"text": "good " * (i % 5 + 1), "label": "abaa"[i % 4]} for i in range(12)],
    "instruct": [{"prompt": f"say {i} " * (i % 3 + 1), "completion": f"it is {i}"}
                 for i in range(12)],
    "extract": [{"question": "where", "context": "the cat sat on the mat " * (i % 3 + 1),
                 "answers": {"text": ["the mat"], "answer_start": [15]}} for i in range(9)],
    "token": [{"tokens": ["the", "cat"] * (i % 3 + 1), "tags": ["O", "B-X"] * (i % 3 + 1)}
              for i in range(9)],
    "seq2seq": [{"source": f"say {i} " * (i % 3 + 1), "target": f"it is {i}"} for i in range(12)],
}  # fmt: skip


class Told(Reporter):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def about(self) -> str:
        return "\n".join(line for line in self.lines if line.startswith("feature cache"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random models of three layers (T5: three a side), made when they are asked for."""
    import transformers as hub

    made: dict[str, Path] = {}
    grouped = {**SMALL, "num_key_value_heads": 2}
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: hub.LlamaForCausalLM(
            hub.LlamaConfig(**grouped, tie_word_embeddings=True)),
        "qwen2": lambda: hub.Qwen2ForCausalLM(hub.Qwen2Config(**grouped)),
        "gpt2": lambda: hub.GPT2LMHeadModel(hub.GPT2Config(
            vocab_size=260, n_embd=32, n_layer=3, n_head=4, n_positions=130, bos_token_id=1,
            eos_token_id=2, pad_token_id=0)),
        "bert": lambda: hub.BertModel(hub.BertConfig(**SMALL)),
        "dropping-head": lambda: hub.BertModel(hub.BertConfig(
            **SMALL, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
            classifier_dropout=0.2)),
        "roberta": lambda: hub.RobertaModel(hub.RobertaConfig(**SMALL)),
        "t5": lambda: hub.T5ForConditionalGeneration(hub.T5Config(
            vocab_size=260, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4,
            dropout_rate=0.0, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)),
    }  # fmt: skip

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            torch.manual_seed(0)
            model = makers[kind]()
            for parameter in model.parameters():  # sharper than a fresh one's, so that errors show
                parameter.data.mul_(1.5) if parameter.dim() > 1 else None
            model.save_pretrained(made[kind])
            make_tokenizer(made[kind])
        return made[kind]

    return make


def values(
    folder: Path, model: Path, task: str, strategy: dict[str, Any], **changes: Any
) -> dict[str, Any]:
    rows = folder / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]), encoding="utf-8")
    train = {"epochs": 2, "batch_size": 4, "learning_rate": 0.01, "max_length": 64, "dropout": 0,
             **changes.pop("train", {})}  # fmt: skip
    train = {name: value for name, value in train.items() if value is not None}
    return {
        "model": str(model), "task": task, "data": {"train": str(rows), **changes.pop("data", {})},
        "strategy": strategy, "dtype": "float32", "device": "cpu", "train": train,
        "output": str(folder / "run"), **changes,
    }  # fmt: skip


LAST = {"name": "layers", "last": 1}


def opened(job: dict[str, Any], cache: Any = "auto", told: Reporter | None = None) -> Any:
    """What `qft train` holds before its first step."""
    from transformers import set_seed

    memory = {**job.get("memory", {}), "feature_cache": cache}
    recipe = build_recipe({**job, "memory": memory})
    set_seed(0)
    return training._open(recipe, hardware.choose("cpu", recipe.dtype), told or Told())


def gradients(found: Any, job: dict[str, Any], micro_batch: int) -> tuple[float, dict[str, Tensor]]:
    result = accumulate_gradients(
        found.model, found.inputs.train.examples[:8], found.inputs.task, step=1,
        micro_batch=micro_batch, pad_token_id=pad_id(found.inputs.tokenizer), layout=found.layout,
    )  # fmt: skip
    grads = {n: p.grad.clone() for n, p in found.model.named_parameters() if p.grad is not None}
    found.model.zero_grad(set_to_none=True)
    return result.loss.item(), grads


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    total = sum(float(g.square().sum()) for g in first.values()) ** 0.5
    apart = sum(float((g - second[n]).square().sum()) for n, g in first.items()) ** 0.5
    assert total > 0
    return apart / total


CASES: list[tuple[str, str, dict[str, Any], dict[str, Any], str]] = [
    ("llama", "instruct", LAST, {}, "behind model.layers.1"),
    ("llama", "instruct", LAST, {"packing": True}, "behind model.layers.1"),
    ("llama", "instruct", {"name": "lora", "layers": [2], "dropout": 0.1}, {},
     "behind model.layers.1"),
    ("llama", "classify", {"name": "head"}, {}, "before score"),
    ("qwen2", "instruct", LAST, {}, "behind model.layers.1"),
    ("gpt2", "instruct", LAST, {}, "behind transformer.h.1"),
    ("bert", "classify", {"name": "head"}, {}, "before classifier"),
    ("bert", "classify", LAST, {}, "behind bert.encoder.layer.1"),
    ("bert", "token", {"name": "head"}, {}, "before classifier"),
    ("dropping-head", "classify", {"name": "head"}, {"dropout": None},
     "behind bert.encoder.layer.2"),
    ("roberta", "classify", {"name": "head"}, {}, "before classifier"),
    ("roberta", "classify", LAST, {}, "behind roberta.encoder.layer.1"),
    ("t5", "seq2seq", LAST, {}, "behind encoder.block.2"),
]  # fmt: skip


# --- the same numbers


@pytest.mark.parametrize(("kind", "task", "strategy", "train", "place"), CASES)
def test_the_same_losses_and_gradients(
    base: Any, tmp_path: Path, kind: str, task: str, strategy: Any, train: Any, place: str
) -> None:
    job = values(tmp_path, base(kind), task, strategy, train=train)
    live, told = opened(job, "off"), Told()
    cached = opened(job, "auto", told)
    assert live.features is None
    assert cached.features is not None, told.lines
    assert place in told.about()
    for micro_batch in (1, 3, 8):
        loss, grads = gradients(live, job, micro_batch)
        again, same = gradients(cached, job, micro_batch)
        assert abs(loss - again) <= 1e-6 * abs(loss)
        assert distance(grads, same) < 1e-5
    cached.features.close()
    there, back = live.model.state_dict(), cached.model.state_dict()
    assert all(torch.equal(there[name], back[name]) for name in there)
    assert gradients(live, job, 3)[0] == gradients(cached, job, 3)[0]  # computed itself again


@pytest.mark.parametrize(("kind", "task", "strategy"), [
    ("llama", "instruct", LAST), ("bert", "classify", {"name": "head"}),
])  # fmt: skip
def test_bfloat16_is_bit_equal_without_padding_and_close_with_it(
    base: Any, tmp_path: Path, kind: str, task: str, strategy: Any
) -> None:
    rows = tmp_path / "rows.jsonl"
    same_length = [
        {
            "prompt": f"say {i}",
            "completion": f"it is {i}",
            "text": f"good {i}",
            "label": "ab"[i % 2],
        }
        for i in range(8)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in same_length), encoding="utf-8")
    # in training the engine's own attention rounds otherwise than SDPA, which computes the cache
    plain = {"memory": {"savers": {"attention": False}}}
    job = {**values(tmp_path, base(kind), task, strategy, dtype="bfloat16"), **plain}
    live, cached = opened(job, "off"), opened(job)
    assert cached.features is not None
    for _ in range(2):
        loss, grads = gradients(live, job, 8)  # the rows that the cache was filled with
        again, same = gradients(cached, job, 8)
        assert loss == again
        assert all(torch.equal(grads[name], same[name]) for name in grads)
    rows.unlink()
    job = values(tmp_path, base(kind), task, strategy, dtype="bfloat16")
    live, cached = opened(job, "off"), opened(job)
    noise = distance(gradients(live, job, 8)[1], gradients(live, job, 1)[1])
    assert distance(gradients(live, job, 8)[1], gradients(cached, job, 8)[1]) < max(4 * noise, 0.01)


def test_no_module_below_the_cut_runs(base: Any, tmp_path: Path) -> None:
    job = values(tmp_path, base("llama"), "instruct", LAST)
    found = opened(job)
    inner = inner_model(found.model)
    ran: list[str] = []
    for name, module in inner.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
    gradients(found, job, 4)
    assert "model.layers.2.mlp" in ran
    below = [name for name in ran if name.startswith(("model.layers.0.", "model.layers.1."))]
    assert not below


def test_rows_nobody_announced_are_refused(base: Any, tmp_path: Path) -> None:
    found = opened(values(tmp_path, base("llama"), "instruct", LAST))
    with pytest.raises(RuntimeError, match="cached features"):
        found.model(input_ids=torch.tensor([[5, 6, 7]]))


# --- the trunk out of memory


def live_weights(model: nn.Module) -> int:
    with Meter(model) as meter:
        torch.ones(1) + 1
    return meter.reading().peak.by_category["weights"]


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_the_trunk_leaves_memory_and_comes_back(base: Any, tmp_path: Path, quantize: str) -> None:
    job = values(tmp_path, base("llama"), "instruct", LAST, quantize=quantize)
    live, cached = opened(job, "off"), opened(job)
    inner = inner_model(live.model)
    layers = next(iter(layer_stacks(inner).values()))
    trunk = live_weights(nn.ModuleList(layers[:2]))
    assert trunk > 8000
    left = live_weights(cached.model)
    # what stays: one number a tensor; the embeddings are the output layer too
    assert left <= live_weights(live.model) - trunk + 16 * len(list(layers[:2].parameters())) * 6
    assert torch.equal(inner.lm_head.weight, inner_model(cached.model).lm_head.weight)
    loss = gradients(live, job, 8)[0]
    # 8-bit layers round what comes in, too
    assert abs(gradients(cached, job, 8)[0] - loss) < (1e-4 if quantize == "int8" else 1e-5) * loss
    cached.features.close()
    assert live_weights(cached.model) == live_weights(live.model)
    assert gradients(cached, job, 8)[0] == gradients(live, job, 8)[0]
    there, back = live.model.state_dict(), cached.model.state_dict()
    assert all(torch.equal(there[name], back[name]) for name in there)


def test_the_engine_comes_out_as_it_went_in(base: Any, tmp_path: Path) -> None:
    """Embeddings on the host have a forward of their own below the cut's."""
    job = values(tmp_path, base("qwen2"), "instruct", LAST)
    job["memory"] = {"savers": {"host_embeddings": True}}
    live, cached = opened(job, "off"), opened(job)
    loss = gradients(live, job, 4)[0]
    assert abs(gradients(cached, job, 4)[0] - loss) < 1e-6 * loss
    cached.features.close()
    assert gradients(cached, job, 4)[0] == loss
    qft.unprepare(cached.model)
    for name, module in cached.model.named_modules():
        assert "_qft_plain_forward" not in module.__dict__, name
        assert not module._forward_pre_hooks or "head" in name, name


# --- whole trainings


def run(job: dict[str, Any], cache: Any = "auto", told: Reporter | None = None, **how: Any) -> Any:
    memory = {**job.get("memory", {}), "feature_cache": cache}
    return qft.train(build_recipe({**job, "memory": memory}), reporter=told or Told(), **how)


@pytest.mark.parametrize(("kind", "task", "strategy", "train"), [
    ("llama", "instruct", LAST, {"batch_size": 5}),
    ("bert", "classify", {"name": "head"}, {"batch_size": 5}),
])  # fmt: skip
def test_a_training_ends_where_it_ends_without(
    base: Any, tmp_path: Path, kind: str, task: str, strategy: Any, train: Any
) -> None:
    held_out = tmp_path / "held.jsonl"
    rows = [{**row, "prompt": "tell", "text": "fine " * n} for n, row in
            enumerate(ROWS[task][:5], 2)]  # fmt: skip
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    job = values(tmp_path, base(kind), task, strategy, train=train, data={"eval": str(held_out)})
    without = run({**job, "output": str(tmp_path / "without")}, "off")
    told = Told()
    result = run(job, "auto", told)
    assert "weights left memory" in told.about()
    assert result.report["feature_cache"]
    assert without.report["feature_cache"] is None
    assert result.metrics.keys() == without.metrics.keys()
    assert all(abs(v - without.metrics[k]) < 1e-4 * abs(v) + 1e-6
               for k, v in result.metrics.items())  # fmt: skip
    ours, theirs = (
        load_file(r.folder / "adapter" / "trained_tensors.safetensors") for r in (result, without)
    )
    assert all((ours[n] - theirs[n]).abs().max() < 1e-4 for n in theirs)
    # the model in hand is whole: it answers as the folder does in another process
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        again = qft.open_any(str(result.folder), dtype=torch.float32, device="cpu").model
        assert torch.equal(result.model(input_ids=ids).logits, again(input_ids=ids).logits)
    assert qft.evaluate(str(result.folder))["loss"] == pytest.approx(result.metrics["loss"], 1e-4)


def test_a_resumed_run_ends_byte_equal_and_reads_the_same_cache(base: Any, tmp_path: Path) -> None:
    job = values(tmp_path, base("llama"), "instruct", LAST, train={"save_every": 2, "epochs": 3})
    whole = run({**job, "output": str(tmp_path / "whole")})
    result = run(job)
    for left in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
        if left.name != "checkpoint-8":
            import shutil

            shutil.rmtree(left)
    told = Told()
    result = run(job, told=told, resume=True)
    assert "resuming from checkpoint-8" in told.lines
    files = [r.folder / "adapter" / "trained_tensors.safetensors" for r in (whole, result)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not any("features" in line.split()[:1] for line in told.lines)  # none was computed
    told = Told()  # without it, it goes on all the same
    run(job, "off", told, resume=True)
    assert not told.about()


def test_another_run_reads_what_the_first_one_stored(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = values(tmp_path, base("llama"), "instruct", LAST)
    run(job)
    monkeypatch.setattr(FeatureStore, "write", None)  # nothing is written any more
    other = {**job, "output": str(tmp_path / "other"), "strategy": {"name": "lora", "layers": [2]}}
    other["train"] = {**job["train"], "learning_rate": 0.5, "epochs": 1}
    told = Told()
    run(other, told=told)
    assert "weights left memory" in told.about()
    assert len(list((tmp_path / "feature-cache").iterdir())) == 1


def test_augmented_copies_are_drawn_once_and_cached(base: Any, tmp_path: Path) -> None:
    job = values(tmp_path, base("bert"), "classify", {"name": "head"},
                 data={"augment": {"copies": 2}})  # fmt: skip
    told = Told()
    run(job, told=told)
    assert "36 rows" in told.about()


# --- never a wrong cache


def shards(folder: Path) -> dict[str, bytes]:
    root = folder / "feature-cache"
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*.safetensors")}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qft.feature_store.SHARD_BYTES", 20_000)


def change_model(job: dict[str, Any], folder: Path) -> None:
    import shutil

    copy = shutil.copytree(job["model"], folder / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][-1, -1] += 1e-3  # one number, far inside
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    job["model"] = str(copy)


def change_tokenizer(job: dict[str, Any], folder: Path) -> None:
    import shutil

    copy = shutil.copytree(job["model"], folder / "copy")
    path = copy / "tokenizer.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = stored["model"]["vocab"]  # two letters that are in no row
    vocabulary["X"], vocabulary["Y"] = vocabulary["Y"], vocabulary["X"]
    path.write_text(json.dumps(stored), encoding="utf-8")
    job["model"] = str(copy)


def change_data(job: dict[str, Any], folder: Path) -> None:
    path = Path(job["data"]["train"])
    path.write_text(path.read_text().replace("say 3", "say 7"), encoding="utf-8")


def change_labels(job: dict[str, Any], folder: Path) -> None:
    path = folder / "relabelled.jsonl"
    rows = [{**row, "label": "babb"[i % 4]} for i, row in enumerate(ROWS["classify"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    job["data"]["train"] = str(path)


CHANGES: dict[str, Any] = {
    "model": change_model,
    "tokenizer": change_tokenizer,
    "data": change_data,
    "dtype": lambda job, folder: job.update(dtype="bfloat16"),
    "quantization": lambda job, folder: job.update(quantize="nf4"),
    "place": lambda job, folder: job.update(strategy={"name": "layers", "last": 2}),
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_what_has_changed_is_made_anew(base: Any, tmp_path: Path, what: str) -> None:
    job = values(tmp_path, base("llama"), "instruct", LAST)
    opened(job).features.close()
    before = shards(tmp_path)
    CHANGES[what](job, tmp_path)
    told = Told()
    found = opened(job, "auto", told)
    assert "made anew, another" in told.about()
    assert what in told.about().split("made anew, another")[1]
    loss = gradients(opened(job, "off"), job, 4)[0]
    assert abs(gradients(found, job, 4)[0] - loss) < 1e-3 * loss
    assert set(before) < set(shards(tmp_path))


def test_pooling_changes_it_and_labels_do_not(base: Any, tmp_path: Path) -> None:
    job = values(tmp_path, base("bert"), "classify", {"name": "head"}, train={"dropout": 0},
                 pooling="mean")  # fmt: skip
    opened(job).features.close()
    told = Told()
    opened({**job, "pooling": "cls"}, "auto", told).features.close()
    assert "made anew, another" in told.about()
    change_labels(job, tmp_path)
    told = Told()
    opened(job, "auto", told).features.close()
    assert "made anew" not in told.about()
    assert len(shards(tmp_path)) == 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def of_another(path: Path) -> None:
    """A whole shard, manifest and all, of the next place."""
    from qft.files import write_manifest

    other = path.parent.with_name("00002") / path.name
    path.write_bytes(other.read_bytes())
    write_manifest(path.parent)


@pytest.mark.parametrize("damage", [
    flip, lambda path: path.write_bytes(path.read_bytes()[:-100]), lambda path: path.unlink(),
    lambda path: (path.parent / "manifest.json").unlink(),
    lambda path: (path.parent / "manifest.json").write_text("{"), of_another,
])  # fmt: skip
def test_a_damaged_part_is_made_anew(
    base: Any, tmp_path: Path, small_shards: None, damage: Any
) -> None:
    job = values(tmp_path, base("llama"), "instruct", LAST)
    opened(job).features.close()
    before = shards(tmp_path)
    assert len(before) >= 3
    damage(next((tmp_path / "feature-cache").glob("*/00001")) / "features.safetensors")
    told = Told()
    opened(job, "auto", told).features.close()
    assert f"{len(before) - 1} of {len(before)} parts are there already" in told.about()
    assert shards(tmp_path) == before


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8, 11, 14, 19, 24])
def test_killed_while_it_is_written(
    base: Any, tmp_path: Path, small_shards: None, count: int
) -> None:
    """In a process of its own, which ends at the k-th file operation in the cache's folder."""
    job = values(tmp_path, base("llama"), "instruct", LAST)
    child = os.fork()
    if child == 0:
        left = [count]

        def on_file(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename", "os.mkdir") and "feature-cache" in str(arguments[0]):
                left[0] -= 1
                if left[0] == 0:
                    os._exit(9)

        try:
            sys.addaudithook(on_file)
            opened(job)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, "it was to be killed"
    found = opened(job)
    loss = gradients(opened(job, "off"), job, 4)[0]
    assert abs(gradients(found, job, 4)[0] - loss) < 1e-6 * loss
    apart = values(tmp_path, base("llama"), "instruct", LAST)
    apart["output"] = str(tmp_path / "apart" / "run")
    opened(apart)
    assert shards(tmp_path) == shards(tmp_path / "apart")
    assert not list((tmp_path / "feature-cache").rglob(".unfinished*"))


def test_ctrl_c_keeps_what_is_done(
    base: Any, tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = values(tmp_path, base("llama"), "instruct", LAST)
    plain = FeatureStore.write

    def stop(self: FeatureStore, number: int, rows: Tensor) -> None:
        if number == 2:
            raise KeyboardInterrupt
        plain(self, number, rows)

    monkeypatch.setattr(FeatureStore, "write", stop)
    with pytest.raises(Interrupted, match="what is done is kept"):
        run(job)
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    monkeypatch.setattr("qft.feature_store.SHARD_BYTES", 20_000)
    told = Told()
    run(job, told=told)
    assert "2 of " in told.about()


def test_a_cache_that_is_not_the_models_is_refused(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where every hash is right: the rows are compared with the model's own."""
    job = values(tmp_path, base("llama"), "instruct", LAST)
    plain = FeatureStore.write
    monkeypatch.setattr(FeatureStore, "write", lambda s, n, rows: plain(s, n, rows + 1))
    with pytest.raises(qft.QftError, match="does not hold what the model computes"):
        opened(job)


# --- switched off, and why


def off(job: dict[str, Any], cache: Any = "auto") -> str:
    told = Told()
    assert opened(job, cache, told).features is None
    return told.about()


@pytest.mark.parametrize(("kind", "task", "strategy", "changes", "cache", "reason"), [
    ("bert", "classify", LAST, {"train": {"dropout": None}}, "auto", r"drop values.*train.dropout"),
    ("gpt2", "instruct", LAST, {"train": {"dropout": None}}, "auto", r"drop values.*train.dropout"),
    ("llama", "instruct", LAST, {"train": {"embedding_noise": 5.0}}, "auto", "embedding_noise"),
    ("llama", "instruct", LAST, {"train": {"epochs": 1}}, "auto", "only once"),
    ("llama", "instruct", LAST, {"train": {"max_steps": 3}}, "auto", "only once"),
    ("llama", "instruct", LAST, {}, "16KiB", r"would be .* KiB, and 16.0 KiB are allowed"),
    ("llama", "instruct", {"name": "lora"}, {}, "1GiB", "lowest layer trains"),
    ("llama", "instruct", {"name": "layers", "last": 1, "output_embeddings": True}, {}, "auto",
     "embed_tokens trains"),
    ("llama", "instruct", {"name": "prompt", "length": 4}, {}, "1GiB", "enters below"),
    ("llama", "instruct", {"name": "prefix", "length": 4}, {}, "1GiB", "below|lowest"),
    ("llama", "instruct", {"name": "adalora"}, {}, "1GiB", "lowest layer trains"),
    # its loss is over every position, padding too
    ("bert", "extract", {"name": "head"}, {"train": {"max_length": 128}}, "auto", "padding"),
    ("t5", "seq2seq", {"name": "lora", "layers": [1, 2]}, {}, "auto", "needs more"),
    ("llama", "instruct", {"name": "lora"}, {}, "auto", "^$"),  # no news
    ("llama", "instruct", LAST, {}, "off", "^$"),
])  # fmt: skip
def test_it_stays_off_and_says_why(
    base: Any, tmp_path: Path, kind: str, task: str, strategy: Any, changes: Any, cache: Any,
    reason: str,
) -> None:  # fmt: skip
    import re

    job = values(tmp_path, base(kind), task, strategy, train=changes.get("train", {}))
    said = off(job, cache)
    assert re.search(reason, said.splitlines()[-1] if said else ""), said
    assert not shards(tmp_path)


def test_a_full_disk_is_seen_before_anything_is_computed(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = values(tmp_path, base("llama"), "instruct", LAST)
    monkeypatch.setattr(features, "free_disk_bytes", lambda path: 1000)
    assert "1000 B are free" in off(job)
    assert not shards(tmp_path)


def test_a_disk_that_fills_up_meanwhile_stops_no_training(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    job = values(tmp_path, base("llama"), "instruct", LAST)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert "disk is full" in off(job)
    monkeypatch.undo()
    told = Told()
    run(job, told=told)
    assert "weights left memory" in told.about()


def test_a_folder_that_cannot_be_written_stops_no_training(base: Any, tmp_path: Path) -> None:
    (tmp_path / "feature-cache").write_text("a file", encoding="utf-8")
    job = values(tmp_path, base("llama"), "instruct", LAST)
    assert "cannot be written" in off(job)


def test_without_room_for_it_the_trunk_stays_in_memory(
    base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    job = values(tmp_path, base("llama"), "instruct", LAST)
    monkeypatch.setattr("qft.lean.trunk._write", full)
    told = Told()
    found = opened(job, "auto", told)
    assert any("stay in memory" in line for line in told.lines)
    loss = gradients(opened(job, "off"), job, 4)[0]
    assert abs(gradients(found, job, 4)[0] - loss) < 1e-6 * loss
    found.features.close()


# --- the store alone


def store(root: Path, number: int, size: int = 4) -> FeatureStore:
    return FeatureStore(root, {"data": str(number)}, Rows((7, 3), (size, 1), 2, torch.float32))


def fill(one: FeatureStore) -> None:
    assert one.lock() == "write"
    for number in one.missing():
        part = one.shards[number]
        tokens = sum(one.rows.lengths[part.start : part.stop])
        one.write(number, torch.arange(tokens * 2.0).view(tokens, 2))


def test_rows_come_back_by_sample(tmp_path: Path) -> None:
    one = store(tmp_path, 1)
    fill(one)
    read = one.open()
    assert read([3]).tolist() == [[8.0, 9.0]]
    assert read([3, 7]).shape == (5, 2)
    assert read([7])[0].tolist() == [0.0, 1.0]
    one.release()


def test_one_writes_several_read(tmp_path: Path) -> None:
    first, second, third = (store(tmp_path, 1) for _ in range(3))
    assert first.lock() == "write"
    assert second.lock() == "no"
    fill_rows = torch.zeros(5, 2)
    first.write(0, fill_rows)
    first.share()
    assert second.lock() == "read"
    assert third.lock() == "read"
    for one in (first, second, third):
        one.release()
    assert third.lock() == "write"
    third.release()


def test_the_longest_unused_makes_room_and_one_in_use_stays(tmp_path: Path) -> None:
    made = [store(tmp_path, number, size=1000) for number in range(3)]
    for age, one in enumerate(made):
        fill(one)
        os.utime(one.folder / "identity.json", (1e9 + age, 1e9 + age))
    made[1].release()
    made[2].release()  # the oldest, 0, is still held
    size = made[0].rows.bytes
    left = make_room(tmp_path, size, int(3.7 * size), [])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([made[0].key, made[2].key])
    assert size < left < 3 * size
    made[0].release()


# --- the knob


@pytest.mark.parametrize(("given", "found"), [
    ("auto", "auto"), ("off", "off"), (False, "off"), ("2GiB", 2 * 2**30), (5000, 5000),
])  # fmt: skip
def test_the_knob_is_read(given: Any, found: Any) -> None:
    recipe = build_recipe({
        "model": "m", "task": "text", "data": {"train": "t"}, "strategy": "lora", "output": "o",
        "memory": {"feature_cache": given},
    })  # fmt: skip
    assert recipe.memory.feature_cache == found
    again = build_recipe(recipe.to_dict())
    assert again == recipe


@pytest.mark.parametrize("given", ["much", True, -3, 0])
def test_a_knob_that_says_nothing_is_refused(given: Any) -> None:
    with pytest.raises(RecipeError, match="auto, off or a size"):
        build_recipe({
            "model": "m", "task": "text", "data": {"train": "t"}, "strategy": "lora",
            "output": "o", "memory": {"feature_cache": given},
        })  # fmt: skip


def test_the_folder_of_ones_own_choice(base: Any, tmp_path: Path) -> None:
    job = values(tmp_path, base("llama"), "instruct", LAST)
    job["memory"] = {"feature_folder": str(tmp_path / "elsewhere")}
    opened(job).features.close()
    assert (tmp_path / "elsewhere").is_dir()
    assert not (tmp_path / "feature-cache").exists()


def test_the_system_gets_the_memory_back(tmp_path: Path) -> None:
    model = nn.ModuleList([nn.Linear(1024, 1024) for _ in range(12)])
    wanted = [layer.weight.clone() for layer in model[:10]]
    before = hardware.resident_bytes()
    unloaded = Unloaded(model, list(model[:10]), tmp_path)
    assert unloaded.bytes == 10 * 4 * (1024 * 1024 + 1024)
    assert before - hardware.resident_bytes() > 0.9 * unloaded.bytes
    assert not any(tmp_path.iterdir())  # what waits has no name that a kill could leave behind
    assert model[0].weight.shape == (1024, 1024)
    unloaded.restore()
    assert all(torch.equal(a, b.weight) for a, b in zip(wanted, model[:10], strict=True))
