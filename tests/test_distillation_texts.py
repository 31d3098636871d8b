"""Answers that teacher or student write, and teachers with other tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qft
from qft.data.examples import Example
from qft.distillation import teacher_texts
from qft.distillation.objective import DistillSettings
from qft.distillation.own_texts import OwnTexts
from qft.distillation.teacher_texts import with_teacher_texts
from qft.errors import DataError, RecipeError
from qft.generation import continue_tokens, generate
from qft.inputs import open_inputs
from qft.models import ModelSpec, open_model, open_tokenizer
from qft.progress import QUIET

Rows = Callable[..., Path]


def recipe_of(
    folder: Path, model: Path, rows: Path, teacher: Path, task: str = "instruct", **distill: Any
) -> Any:
    train: dict[str, Any] = {"max_steps": 4, "batch_size": 4, "max_length": 64, "save_every": 2}
    return qft.build_recipe({
        "model": str(model), "task": task, "dtype": "float32", "device": "cpu",
        "data": {"train": str(rows)}, "train": train, "output": str(folder / "run"),
        "strategy": {"name": "distill", "teacher": str(teacher), "student": "lora", **distill},
    })  # fmt: skip


@pytest.fixture(scope="module")
def speaking(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A teacher that answers ``ok`` and ends: its output layer sees but the last token."""
    import shutil

    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("speaking") / "model"
    shutil.copytree(tiny_llama, folder)
    tokenizer = open_tokenizer(folder)
    model: Any = LlamaForCausalLM.from_pretrained(tiny_llama)
    first, second = tokenizer("ok", add_special_tokens=False)["input_ids"]
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(260, 64))
    with torch.no_grad():
        for layer in model.model.layers:  # nothing but the token itself is seen
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        table = torch.nn.functional.normalize(model.model.embed_tokens.weight.clone(), dim=1) * 8
        model.model.embed_tokens.weight.copy_(table)
        model.lm_head.weight[second] = table[first]
        model.lm_head.weight[2] = table[second]
        model.lm_head.weight[first] = (table.sum(dim=0) - table[first] - table[second]) / 8
    model.save_pretrained(folder)
    return folder


def questions(write_rows: Rows, count: int = 36) -> Path:
    return write_rows([
        {"instruction": f"say {number}", "output": f"human {number}"} for number in range(count)
    ])  # fmt: skip


def test_a_student_trains_on_its_teachers_answers(
    tmp_path: Path, tiny_llama: Path, speaking: Path, write_rows: Rows
):
    recipe = recipe_of(
        tmp_path, tiny_llama, questions(write_rows), speaking, texts="teacher", loss="none",
        max_new_tokens=8,
    )  # fmt: skip
    model = open_model(speaking, ModelSpec(str(speaking), dtype=torch.float32))
    tokenizer = open_tokenizer(speaking)
    inputs = open_inputs(recipe)
    taught = with_teacher_texts(recipe, inputs, QUIET)
    for example, human in zip(taught.train.examples, inputs.train.examples, strict=True):
        wanted = generate(model, tokenizer, [human.truth.prompt], max_new_tokens=8)[0]
        assert example.truth.reference == wanted.strip() != human.truth.reference
        assert example.truth.prompt == human.truth.prompt
        supervised = [label for label in example.inputs["labels"] if label != -100]
        assert tokenizer.decode(supervised, skip_special_tokens=True).strip() == wanted.strip()
    report = qft.teach(recipe)
    assert report["texts"] == len(inputs.train.examples)
    qft.train(recipe)


def test_a_teacher_that_was_stopped_goes_on(
    tmp_path: Path, tiny_llama: Path, speaking: Path, write_rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    rows = questions(write_rows)
    settings = {"texts": "teacher", "loss": "none", "max_new_tokens": 8}
    whole = recipe_of(tmp_path / "whole", tiny_llama, rows, speaking, **settings)
    wanted = with_teacher_texts(whole, open_inputs(whole), QUIET).train
    plain, called = teacher_texts._finished, []

    def stopped(*arguments: Any) -> Any:
        called.append(len(arguments[1]))
        if len(called) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    broken = recipe_of(tmp_path / "broken", tiny_llama, rows, speaking, **settings)
    monkeypatch.setattr(teacher_texts, "_finished", stopped)
    with pytest.raises(qft.QftError, match="what is done is kept"):
        with_teacher_texts(broken, open_inputs(broken), QUIET)
    found = with_teacher_texts(broken, open_inputs(broken), QUIET).train
    assert called == [16, 16, 16, 4]  # the first was not written again
    assert found.fingerprint == wanted.fingerprint
    with_teacher_texts(broken, open_inputs(broken), QUIET)
    assert len(called) == 4


def test_unfinished_answers_are_left_out(
    tmp_path: Path, tiny_llama: Path, speaking: Path, write_rows: Rows
):
    recipe = recipe_of(
        tmp_path, tiny_llama, questions(write_rows), speaking, texts="teacher", loss="none",
        max_new_tokens=1,
    )  # fmt: skip
    with pytest.raises(DataError, match="finished no answer"):
        with_teacher_texts(recipe, open_inputs(recipe), QUIET)


def test_texts_of_other_tasks_ask_for_nothing(tmp_path: Path, tiny_llama: Path, write_rows: Rows):
    rows = write_rows([{"text": "hello"}] * 8)
    for more in ({"texts": "teacher"}, {"on_policy": 0.5}):
        with pytest.raises(RecipeError, match="cannot train the task"):
            qft.train(recipe_of(tmp_path, tiny_llama, rows, tiny_llama, "text", **more))


# --- the student's own words


def test_the_students_own_answers(tiny_llama: Path):
    model = open_model(tiny_llama, ModelSpec(str(tiny_llama), dtype=torch.float32))
    tokenizer = open_tokenizer(tiny_llama)
    settings = DistillSettings(teacher="x", on_policy=0.5, max_new_tokens=6)
    own = OwnTexts(settings, tokenizer, max_length=16, seed=3)
    examples = [
        Example(0, {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]}),
        Example(1, {"input_ids": list(range(20, 36)), "labels": [-100] * 14 + [34, 35]}),
    ]
    first, again, other = (own.written(model, examples, step) for step in (1, 1, 2))
    assert first == again != other
    for example, given, start in zip(first, examples, (2, 14), strict=True):
        ids, labels = example.inputs["input_ids"], example.inputs["labels"]
        assert ids[:start] == given.inputs["input_ids"][:start]
        assert labels == [-100] * start + ids[start:]
        assert start < len(ids) <= 16
        assert example.index == given.index
    shares = [sum(own.is_for(step) for step in range(400)) / 400]
    assert 0.4 < shares[0] < 0.6


def test_greedy_continuation_is_transformers(tiny_llama: Path):
    """Tokens of prompts of several lengths, cut after the token that ends a text."""
    model: Any = open_model(tiny_llama, ModelSpec(str(tiny_llama), dtype=torch.float32))
    tokenizer = open_tokenizer(tiny_llama)
    prompts = [[5, 6, 7], [9], [30, 31, 32, 33, 34]]
    found = continue_tokens(model, tokenizer, prompts, max_new_tokens=5)
    for prompt, tokens in zip(prompts, found, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False)
        wanted = alone[0, len(prompt) :].tolist()
        end = wanted.index(2) + 1 if 2 in wanted else len(wanted)
        assert tokens == wanted[:end]


@pytest.mark.parametrize(
    "settings",
    [
        {"on_policy": 0.7, "loss": "reverse-kl", "max_new_tokens": 5},
        {"on_policy": 0.7, "loss": "jsd", "max_new_tokens": 5},
        {"hidden": {"projection": "learned"}},  # the projections train on, too
    ],
    ids=["reverse-kl", "jsd", "hidden"],
)
def test_a_student_goes_on_as_if_never_stopped(
    settings: dict[str, Any], tmp_path: Path, tiny_llama: Path, speaking: Path, write_rows: Rows
):
    rows = questions(write_rows)
    whole = qft.train(recipe_of(tmp_path / "a", tiny_llama, rows, speaking, **settings))
    recipe = recipe_of(tmp_path / "b", tiny_llama, rows, speaking, **settings)
    qft.train(recipe)
    import shutil

    shutil.rmtree(tmp_path / "b" / "run" / "checkpoints" / "checkpoint-4")
    resumed = qft.train(recipe, resume=True)
    states = [
        {n: p for n, p in run.model.named_parameters() if p.requires_grad}
        for run in (whole, resumed)
    ]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


# --- another tokenizer


def test_a_teacher_with_other_tokens(
    tmp_path: Path, tiny_llama: Path, write_rows: Rows, tmp_path_factory: pytest.TempPathFactory
):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    teacher = tmp_path_factory.mktemp("words")
    words = ["<pad>", "<s>", "</s>", "<unk>", "say", "human", *map(str, range(40))]
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    ).save_pretrained(teacher)  # fmt: skip
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=46, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(teacher)
    rows = questions(write_rows)
    with pytest.raises(RecipeError, match="same tokens"):
        qft.train(recipe_of(tmp_path, tiny_llama, rows, teacher, cache="off"))
    losses = []
    for cache in ("off", "top-k"):
        recipe = recipe_of(
            tmp_path / cache, tiny_llama, rows, teacher, loss="uld", cache=cache, top_k=46,
            cache_precision="float32",
        )  # fmt: skip
        losses.append(qft.train(recipe).report["training"]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    text = write_rows([{"text": "say human 1 2 3"}] * 8, "text.jsonl")
    with pytest.raises(RecipeError, match="other examples"):
        qft.train(recipe_of(tmp_path / "t", tiny_llama, text, teacher, "text", loss="uld"))
