"""`train.dropout`: the model's own rates, whatever they are called, and only while training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import qft
from qft.errors import RecipeError
from qft.lean.dropout import SeededDropout
from qft.model_dropout import set_dropout
from qft.models import ModelSpec, open_model
from qft.preparation import prepare, prepared
from qft.registry import build_strategy


def made(name: str, **changes: Any) -> Any:
    import transformers

    return getattr(transformers, name)(**changes)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("BertConfig", {"attention_probs_dropout_prob", "hidden_dropout_prob"}),
        ("LlamaConfig", {"attention_dropout"}),
        ("T5Config", {"dropout_rate", "classifier_dropout"}),
        ("GPT2Config", {"attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"}),
        ("BartConfig", {"dropout", "attention_dropout", "activation_dropout",
                        "classifier_dropout"}),
    ],
)  # fmt: skip
def test_every_family_has_its_own_names(name: str, fields: set[str]):
    config = made(name)
    before = config.to_dict()
    assert set(set_dropout(config, 0.25)) == fields
    after = config.to_dict()
    changed = {key for key in after if after[key] != before[key]}
    assert changed == fields
    assert {after[key] for key in fields} == {0.25}


def test_a_config_inside_a_config():
    halves = [made("BertConfig").to_dict() for _ in range(2)]
    config = made("EncoderDecoderConfig", encoder=halves[0], decoder=halves[1])
    assert "decoder.hidden_dropout_prob" in set_dropout(config, 0.25)
    assert config.encoder.hidden_dropout_prob == config.decoder.hidden_dropout_prob == 0.25


def test_no_dropout_to_set():
    with pytest.raises(RecipeError, match="no dropout") as caught:
        set_dropout(made("MambaConfig"), 0.1)
    assert caught.value.where == "train.dropout"


def rates(model: nn.Module) -> set[float]:
    return {module.p for module in model.modules() if isinstance(module, nn.Dropout)}


def test_a_model_is_opened_with_it(tiny_bert: Path, tiny_llama: Path):
    spec = {"task": "classify", "labels": ("a", "b"), "device": "cpu"}
    own = open_model(tiny_bert, ModelSpec(str(tiny_bert), **spec))
    assert rates(own) == {0.1}
    model = open_model(tiny_bert, ModelSpec(str(tiny_bert), dropout=0.3, **spec))
    assert rates(model) == {0.3}  # the classifier's as well, which follows the hidden states'
    ready = prepare(model, build_strategy({"name": "head"}))
    seeded = [m for m in ready.modules() if isinstance(m, SeededDropout)]
    assert seeded
    assert {m.p for m in seeded} == {0.3}
    llama = open_model(tiny_llama, ModelSpec(str(tiny_llama), device="cpu", dropout=0.3))
    layers: Any = llama.model.layers
    assert layers[0].self_attn.attention_dropout == 0.3


@pytest.fixture
def recipe(tiny_bert: Path, tmp_path: Path, write_rows: Callable[..., Path]) -> Callable[..., Any]:
    rows = write_rows([{"text": f"text {i}", "label": i % 2} for i in range(16)])

    def build(**train: Any) -> Any:
        return qft.build_recipe({
            "model": str(tiny_bert), "task": "classify", "strategy": "full", "device": "cpu",
            "dtype": "float32", "data": {"train": str(rows)},
            "train": {"max_steps": 1, "batch_size": 8, "max_length": 32, **train},
            "output": str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}"),
        })  # fmt: skip

    return build


def test_a_run_trains_with_it_and_delivers_the_models_own(recipe, tiny_bert, tmp_path):
    def train_loss(**train: Any) -> float:
        return qft.train(recipe(**train)).report["training"]["train_loss"]

    own, none, much = train_loss(), train_loss(dropout=0.0), train_loss(dropout=0.7)
    assert len({own, none, much}) == 3
    assert train_loss(dropout=0.1) == own  # BERT's own rate
    qft.merge(qft.train(recipe(dropout=0.7)).folder, tmp_path / "merged")
    stored, delivered = (
        json.loads((folder / "config.json").read_text())
        for folder in (tiny_bert, tmp_path / "merged")
    )
    assert delivered["hidden_dropout_prob"] == stored["hidden_dropout_prob"] == 0.1


@pytest.mark.parametrize("rate", [-0.1, 1.0, "many"])
def test_what_is_no_rate(recipe, rate):
    with pytest.raises(RecipeError, match=r"train\.dropout"):
        recipe(dropout=rate)


def test_at_zero_nothing_depends_on_the_micro_batch(tiny_bert: Path):
    """BERT drops attention weights by the ordinary generator; at zero no note says so any more."""
    for rate, told in ((None, True), (0.2, True), (0.0, False)):
        spec = ModelSpec(str(tiny_bert), "classify", ("a", "b"), device="cpu", dropout=rate)
        ready = prepare(open_model(tiny_bert, spec), build_strategy({"name": "head"}))
        state = prepared(ready)
        assert state is not None
        assert any("ordinary generator" in note for note in state.notes) == told
