"""Encoder-decoders: the labels are the target's tokens, and everything after them works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from torch import nn

import qft
from adapters.lora import LoRA
from qft.data.columns import find_columns
from qft.data.encoding import UNSUPERVISED
from qft.data.examples import EncodeSettings
from qft.data.tasks import TASKS, load_examples
from qft.errors import DataError, ModelError
from qft.evaluation import evaluate
from qft.generation import generate
from qft.models import ModelSpec, longest_input, open_model, open_tokenizer
from qft.preparation import prepare
from qft.recipe import Columns, Data
from qft.scoring import evaluate as score
from qft.step import accumulate_gradients
from qft.strategy import Context

TASK = TASKS["seq2seq"]
ROWS = [
    {"source": "a dog runs", "target": "ein hund rennt"},
    {"source": "two cats", "target": "zwei katzen, und noch eine dazu"},
    {"source": "the red house by the sea", "target": "das rote haus"},
    {"source": "no", "target": "nein"},
]


@pytest.fixture(scope="module")
def two_berts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder-decoder made of two BERTs."""
    from transformers import BertConfig, EncoderDecoderConfig, EncoderDecoderModel

    half = BertConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0,
        attention_probs_dropout_prob=0.0,  # it draws from the ordinary generator
    )  # fmt: skip
    other = BertConfig(**half.to_dict())  # one for each: the decoder's gets attention of its own
    config = EncoderDecoderConfig.from_encoder_decoder_configs(half, other)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 1, 0, 2
    folder = tmp_path_factory.mktemp("two-berts")
    torch.manual_seed(0)
    EncoderDecoderModel(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(params=["tiny_t5", "two_berts"])
def base(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def opened(folder: Path) -> nn.Module:
    spec = ModelSpec(str(folder), "seq2seq", dtype=torch.float32, device="cpu")
    return open_model(folder, spec)


def encoded(folder: Path, **settings: Any) -> list:
    tokenizer = open_tokenizer(folder)
    columns = find_columns("seq2seq", ROWS, Columns())
    chosen = EncodeSettings(columns, **{"max_length": 64, **settings})
    return TASK.encode(list(enumerate(ROWS, start=1)), tokenizer, chosen, [])


def job(base: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    for name in ("train", "eval"):
        rows = [{k: v + (" !" if name == "eval" else "") for k, v in row.items()} for row in ROWS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {
        "model": str(base), "task": "seq2seq",
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
        "strategy": {"name": "lora", "rank": 8}, "dtype": "float32",
        "train": {"max_steps": 30, "batch_size": 4, "max_length": 64, "learning_rate": 0.01},
        "output": str(folder / "run"), **changes,
    }  # fmt: skip


def test_the_labels_are_the_target_and_its_end(tiny_t5):
    tokenizer = open_tokenizer(tiny_t5)
    for example, row in zip(encoded(tiny_t5), ROWS, strict=True):
        labels = example.inputs["labels"]
        assert labels[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(labels[:-1]) == row["target"]
        assert tokenizer.decode(example.inputs["input_ids"]) == row["source"]
        assert example.label_bytes == len(row["target"].encode())


def test_a_bert_tokenizer_ends_with_sep_and_does_not_begin_twice(minilm):
    tokenizer = open_tokenizer(minilm)
    columns = {"source": "source", "target": "target"}
    first = TASK.encode([(1, ROWS[0])], tokenizer, EncodeSettings(columns, 64), [])[0]
    labels = first.inputs["labels"]
    assert tokenizer.convert_ids_to_tokens(labels)[-1] == "[SEP]"
    assert tokenizer.cls_token_id not in labels
    assert first.inputs["input_ids"][0] == tokenizer.cls_token_id


def test_a_batch_tells_its_two_sides_apart(tiny_t5):
    examples = encoded(tiny_t5)
    for part in (examples, examples[:1], examples[2:3]):
        batch = TASK.collate(part, 0)
        assert batch["labels"].shape[1] != batch["input_ids"].shape[1]
        assert TASK.label_count(batch) == sum(len(e.inputs["labels"]) for e in part)
    same = {"source": "abc", "target": "ab"}  # with its end, as long as the source
    columns = {"source": "source", "target": "target"}
    row = TASK.encode([(1, same)], open_tokenizer(tiny_t5), EncodeSettings(columns, 64), [])
    batch = TASK.collate(row, 0)
    assert batch["labels"].shape[1] == batch["input_ids"].shape[1] + 1
    assert batch["labels"][0, -1] == UNSUPERVISED


def test_the_loss_is_the_one_written_out_by_hand(base):
    model = opened(base)
    batch = TASK.collate(encoded(base), 0)
    start = model.config.decoder_start_token_id
    labels = batch["labels"]
    shifted = torch.cat([torch.full((4, 1), start), labels[:, :-1]], dim=1).clamp(min=0)
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            decoder_input_ids=shifted,
        ).logits  # fmt: skip
        loss = model(**batch).loss
    by_hand = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert abs(by_hand - loss) < 1e-5
    measured = evaluate(model, encoded(base), TASK, pad_token_id=0, micro_batch=3)
    assert abs(measured["loss"] - float(loss)) < 1e-5


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_the_split_changes_no_gradient_with_dropout_on_both_sides(base, micro_batch):
    def gradients(size: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = prepare(
            opened(base), LoRA(rank=4, dropout=0.3), checkpointing="none", context=Context(seed=3)
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.01)
        accumulate_gradients(model, encoded(base), TASK, step=1, micro_batch=size, pad_token_id=0)
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    whole, split = gradients(4), gradients(micro_batch)
    assert whole
    largest = max(gradient.abs().max() for gradient in whole.values())
    for name, gradient in whole.items():
        scale = gradient.abs().max() + 1e-3 * largest
        assert (split[name] - gradient).abs().max() / scale < 1e-4, name


def test_the_whole_way(base, tmp_path):
    result = qft.train(qft.build_recipe(job(base, tmp_path)))
    lines = [json.loads(x) for x in (result.folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert {"loss", "perplexity", "bits_per_byte", "token_accuracy"} <= set(result.metrics)
    again = score(str(result.folder))
    assert again["loss"] == pytest.approx(result.metrics["loss"], abs=1e-6)
    qft.merge(result.folder, tmp_path / "merged")
    data = str(tmp_path / "eval.jsonl")
    merged = score(str(tmp_path / "merged"), data=data, dtype="float32")
    assert merged["loss"] == pytest.approx(again["loss"], abs=1e-4)

    run = qft.open_any(str(result.folder))
    assert run.task == "seq2seq"
    prompts = [row["source"] for row in ROWS]
    together = generate(run.model, run.tokenizer, prompts, max_new_tokens=12)
    alone = [generate(run.model, run.tokenizer, [p], max_new_tokens=12)[0] for p in prompts]
    assert together == alone
    assert any(text.strip() for text in together)


def test_on_four_bits(tiny_t5, tmp_path):
    values = job(tiny_t5, tmp_path, quantize="nf4")
    values["train"]["max_steps"] = 2
    result = qft.train(qft.build_recipe(values))
    assert score(str(result.folder))["loss"] == pytest.approx(result.metrics["loss"], abs=1e-6)


def test_the_shorter_half_limits_the_length(two_berts):
    assert longest_input(two_berts, ModelSpec(str(two_berts), "seq2seq")) == 128


def test_a_decoder_that_does_not_say_how_it_begins(two_berts, tmp_path):
    import shutil

    shutil.copytree(two_berts, tmp_path / "model")
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    del config["decoder_start_token_id"]
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match="how its decoder begins"):
        opened(tmp_path / "model")


def test_rows_that_cannot_be_used(tiny_t5):
    tokenizer = open_tokenizer(tiny_t5)
    settings = EncodeSettings({"source": "source", "target": "target"}, 8)
    with pytest.raises(DataError, match="need words"):
        TASK.encode([(1, {"source": " ", "target": "x"})], tokenizer, settings, [])
    with pytest.raises(DataError, match="longer than 8 tokens"):
        TASK.encode([(1, ROWS[0])], tokenizer, settings, [])
    cut = encoded(tiny_t5, max_length=8, too_long="truncate")
    assert [example.cut for example in cut] == [True, True, True, False]
    assert max(len(e.inputs["input_ids"]) for e in cut) == 8


@pytest.fixture(scope="module")
def byt5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random tiny ByT5; its tokenizer is written in Python and has no offsets."""
    from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny-byt5")
    config = T5Config(
        vocab_size=384, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1,
        num_heads=4, dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def test_a_tokenizer_without_offsets(byt5, tmp_path):
    rows = encoded(byt5)
    pairs = zip(rows, ROWS, strict=True)
    assert [e.label_bytes for e, _ in pairs] == [len(row["target"].encode()) for row in ROWS]
    cut = encoded(byt5, max_length=4, too_long="truncate")[0]
    assert (cut.label_bytes, cut.cut) == (4, True)
    run = qft.train(qft.build_recipe(job(byt5, tmp_path, train={"max_steps": 1, "max_length": 64})))
    assert run.metrics["bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("token", {"tokens": ["a", "b"], "tags": ["O", "B-X"]}),
        ("extract", {"question": "q", "context": "a b", "answers": "b"}),
        ("instruct", {"prompt": "q", "output": "b"}),
    ],
)
def test_a_task_that_needs_offsets_says_so(task, row, byt5, write_rows):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(byt5)
    with pytest.raises(ModelError, match="which characters a token covers"):
        load_examples(task, str(write_rows([row])), tokenizer, data=Data(train="x"), max_length=64)
