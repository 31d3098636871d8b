"""LoRA: its settings, what it trains, PEFT's folder format both ways, and the merge."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qft
from adapters.lora import LoRA
from qft.card import make_card, write_card
from qft.errors import AdapterError, RecipeError
from qft.models import ModelSpec, fingerprint, open_model, open_skeleton
from qft.registry import settings_of
from qft.strategy import Context

LABELS = ("no", "yes", "unsure")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 0, 0]])
MASK = (IDS != 0).long()
PLAIN = {"dtype": torch.float32, "device": "cpu"}


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, attention_mask=MASK).logits
    return found


def randomise(model: nn.Module, seed: int = 7) -> None:
    """Gives all that trains a value of its own, as a training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def spec_of(base: Path, task: str, pooling: str = "auto") -> ModelSpec:
    return ModelSpec(
        str(base), task=task, labels=LABELS if task == "classify" else None, pooling=pooling,
        **PLAIN,
    )  # fmt: skip


def attached(base: Path, strategy: LoRA, task: str, pooling: str = "auto") -> nn.Module:
    """The base with a randomised adapter."""
    torch.manual_seed(0)  # a new head is random
    model = open_model(base, spec_of(base, task, pooling))
    model = strategy.attach(model, Context(task=task))
    randomise(model)
    return model


def save(model: nn.Module, strategy: LoRA, folder: Path, base: Path, task: str) -> Path:
    """An adapter folder with its card, as a run writes it."""
    folder.mkdir()
    strategy.save(model, folder)
    card = make_card(
        base=str(base), base_fingerprint=fingerprint(base), original_fingerprint=None, task=task,
        labels=LABELS if task == "classify" else None,
        pooling=model.get_base_model().config.qft_pooling if task == "classify" else "auto",  # type: ignore[operator,union-attr]
        quantize="none", dtype="float32", strategy=settings_of(strategy), max_length=64,
    )  # fmt: skip
    write_card(folder, card)
    return folder


@pytest.fixture
def classifier(tiny_bert: Path, tmp_path: Path) -> Path:
    """A whole BERT classifier, head included, so that plain PEFT opens the very same model."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "classifier"))
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def biased_llama(tiny_llama: Path, tmp_path: Path) -> Path:
    """A Llama whose linear layers have biases that are not zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(2)
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "biased"))
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.attention_bias = config.mlp_bias = True
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


# --- settings


def test_the_scale_is_two_unless_alpha_says_otherwise() -> None:
    assert LoRA().scale == 2.0
    assert LoRA(rank=3).scale == 2.0
    assert LoRA(rank=8, alpha=4).scale == 0.5


def test_a_rank_stabilised_scale_divides_by_the_root() -> None:
    assert LoRA(rank=16, rank_stabilised=True).scale == 8.0
    assert LoRA(rank=9, alpha=6, rank_stabilised=True).scale == 2.0


@pytest.mark.parametrize(
    "settings",
    [{}, {"rank": 3, "alpha": 5.5}, {"rank": 4, "rank_stabilised": True}, {"dropout": 0.25},
     {"targets": ("q_proj", "v_proj")}, {"targets": r".*\.1\.mlp\..*_proj"}],
)  # fmt: skip
def test_peft_gets_the_same_settings(tiny_llama: Path, settings: dict[str, Any]) -> None:
    strategy = LoRA(**settings)
    skeleton = open_skeleton(tiny_llama, spec_of(tiny_llama, "text"))
    model = strategy.attach(skeleton, Context())
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    assert all(math.isclose(layer.scaling["default"], strategy.scale) for layer in layers)  # type: ignore[index]
    assert all(layer.lora_A["default"].weight.shape[0] == strategy.rank for layer in layers)  # type: ignore[index]
    drops = {getattr(layer.lora_dropout["default"], "p", 0.0) for layer in layers}  # type: ignore[index]
    assert drops == {strategy.dropout}
    names = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    expected = {"all-linear": 14, ("q_proj", "v_proj"): 4}.get(strategy.targets, 3)
    assert len(names) == expected
    if isinstance(strategy.targets, tuple):
        assert all(name.endswith(strategy.targets) for name in names)


# --- what trains


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_only_the_factors_train(tiny_llama: Path) -> None:
    model = LoRA(rank=2).attach(open_model(tiny_llama, spec_of(tiny_llama, "text")), Context())
    names = trained_names(model)
    assert len(names) == 28
    assert all(".lora_A." in name or ".lora_B." in name for name in names)


@pytest.mark.parametrize("pooling", ["model", "mean"])
def test_a_new_head_trains_as_well(tiny_bert: Path, pooling: str) -> None:
    model = attached(tiny_bert, LoRA(rank=2), "classify", pooling)
    others = {n.removeprefix("base_model.model.") for n in trained_names(model) if "lora_" not in n}
    assert others == {f"classifier.modules_to_save.default.{k}" for k in ("weight", "bias")}


@pytest.mark.parametrize(("bias", "count"), [("all", 14), ("lora_only", 4), ("none", 0)])
def test_biases_train_where_asked(biased_llama: Path, bias: Any, count: int) -> None:
    strategy = LoRA(rank=2, bias=bias, targets=("q_proj", "v_proj"))
    names = trained_names(attached(biased_llama, strategy, "text"))
    biases = {name for name in names if name.endswith(".bias")}
    assert len(biases) == count
    if bias == "lora_only":
        assert all(re.search(r"[qv]_proj\.base_layer\.bias$", name) for name in biases)
    assert all("lora_" in name for name in names - biases)


@pytest.mark.parametrize("targets", [("query_key_value",), "no.*such", ()])
def test_no_match_is_an_error(tiny_llama: Path, targets: Any) -> None:
    model = open_skeleton(tiny_llama, spec_of(tiny_llama, "text"))
    with pytest.raises(RecipeError):
        qft.prepare(model, LoRA(targets=targets))


# --- PEFT's folder format


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("kind", ["decoder", "classifier"])
def test_plain_peft_opens_what_qft_wrote(
    biased_llama: Path, classifier: Path, tmp_path: Path, kind: str, bias: Any
) -> None:
    import transformers
    from peft import PeftModel

    base, task, name = {
        "decoder": (biased_llama, "text", "AutoModelForCausalLM"),
        "classifier": (classifier, "classify", "AutoModelForSequenceClassification"),
    }[kind]
    strategy = LoRA(rank=3, bias=bias)
    model = attached(base, strategy, task)
    folder = save(model, strategy, tmp_path / "adapter", base, task)
    plain = getattr(transformers, name).from_pretrained(base, dtype=torch.float32)
    before = logits(plain)
    opened = PeftModel.from_pretrained(plain, folder)
    assert torch.equal(logits(opened), logits(model))
    assert not torch.allclose(before, logits(model), atol=1e-2)
    assert {p.name for p in folder.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "qft.json",
    }  # fmt: skip


def elsewhere(base: Path, folder: Path, **settings: Any) -> tuple[Tensor, nn.Module]:
    """A folder that plain PEFT wrote: the adapter model's logits, and PEFT's own merge."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **settings}
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    randomise(wrapped)
    wrapped.save_pretrained(folder)
    return logits(wrapped), wrapped.merge_and_unload()


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"bias": "all"}, {"bias": "lora_only", "target_modules": ["q_proj"]},
     {"target_modules": r".*\.self_attn\.(q|o)_proj", "lora_dropout": 0.3}],
)  # fmt: skip
def test_qft_opens_and_merges_what_peft_wrote(
    biased_llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    expected, merged = elsewhere(biased_llama, tmp_path / "peft", **settings)
    opened = qft.open_any(str(tmp_path / "peft"), **PLAIN)
    assert opened.task == "text"
    assert torch.equal(logits(opened.model), expected)

    qft.merge(tmp_path / "peft", tmp_path / "merged")
    found = qft.open_any(str(tmp_path / "merged"), **PLAIN).model.state_dict()
    wanted = merged.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name] - tensor).abs().max() <= 1e-6, name


def test_a_classifier_that_peft_wrote(classifier: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(classifier, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    wrapped = get_peft_model(base, config)
    randomise(wrapped)
    wrapped.save_pretrained(tmp_path / "peft")
    opened = qft.open_any(str(tmp_path / "peft"), **PLAIN)
    assert opened.task == "classify"
    assert torch.equal(logits(opened.model), logits(wrapped))
    qft.merge(tmp_path / "peft", tmp_path / "merged")
    merged = qft.open_any(str(tmp_path / "merged"), **PLAIN)
    assert (logits(merged.model) - logits(wrapped)).abs().max() < 1e-5


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
        {"lora_bias": True, "target_modules": ["q_proj"]},
        {"exclude_modules": ["o_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
)
def test_what_lora_has_no_setting_for_is_opened_and_merged_all_the_same(
    biased_llama: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    expected, _ = elsewhere(biased_llama, tmp_path / "peft", **settings)
    opened = qft.open_any(str(tmp_path / "peft"), **PLAIN)
    assert (logits(opened.model) - expected).abs().max() < 1e-5
    qft.merge(tmp_path / "peft", tmp_path / "merged")
    merged = qft.open_any(str(tmp_path / "merged"), **PLAIN)
    assert (logits(merged.model) - expected).abs().max() < 1e-5


def test_a_start_that_cannot_be_made_again_is_refused(biased_llama: Path, tmp_path: Path) -> None:
    elsewhere(biased_llama, tmp_path / "peft", init_lora_weights="pissa_niter_4")
    for attempt in (
        lambda: qft.open_any(str(tmp_path / "peft"), **PLAIN),
        lambda: qft.merge(tmp_path / "peft", tmp_path / "merged"),
    ):
        with pytest.raises(AdapterError, match="init_lora_weights"):
            attempt()
    assert not (tmp_path / "merged").exists()


def test_a_pickled_adapter_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    elsewhere(tiny_llama, tmp_path / "peft")
    (tmp_path / "peft/adapter_model.safetensors").unlink()
    (tmp_path / "peft/adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for attempt in (
        lambda: qft.open_any(str(tmp_path / "peft"), **PLAIN),
        lambda: qft.merge(tmp_path / "peft", tmp_path / "merged"),
    ):
        with pytest.raises(AdapterError, match="pickle"):
            attempt()
    assert not (tmp_path / "merged").exists()


def test_an_adapter_with_tensors_missing_or_broken(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    elsewhere(tiny_llama, tmp_path / "peft")
    path = tmp_path / "peft/adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    for attempt in (
        lambda: qft.open_any(str(tmp_path / "peft"), **PLAIN),
        lambda: qft.merge(tmp_path / "peft", tmp_path / "merged"),
    ):
        with pytest.raises(AdapterError):
            attempt()
    tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)
    save_file(tensors, path)
    with pytest.raises(AdapterError, match="rank"):
        qft.merge(tmp_path / "peft", tmp_path / "merged")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="broken"):
        qft.merge(tmp_path / "peft", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_for_another_base_of_the_same_shape(
    tiny_llama: Path, biased_llama: Path, tmp_path: Path
) -> None:
    """Its card tells them apart; without one, the names and shapes do where they can."""
    strategy = LoRA(rank=2, bias="all")
    adapter = save(
        attached(biased_llama, strategy, "text"), strategy, tmp_path / "adapter", biased_llama,
        "text",
    )  # fmt: skip
    attempts = (
        lambda: qft.open_any(str(adapter), base=str(tiny_llama), **PLAIN),
        lambda: qft.merge(adapter, tmp_path / "merged", base=str(tiny_llama)),
    )
    for attempt in attempts:
        with pytest.raises(AdapterError, match="another base"):
            attempt()
    (adapter / "qft.json").unlink()
    for attempt in attempts:
        with pytest.raises(AdapterError, match="another base"):
            attempt()
    assert not (tmp_path / "merged").exists()


# --- the merge of qft's own folders


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases_are_merged(biased_llama: Path, tmp_path: Path, bias: Any) -> None:
    strategy = LoRA(rank=3, bias=bias, targets=("q_proj", "down_proj"))
    model = attached(biased_llama, strategy, "text")
    adapter = save(model, strategy, tmp_path / "adapter", biased_llama, "text")
    opened = qft.open_any(str(adapter), **PLAIN)
    assert torch.equal(logits(opened.model), logits(model))
    report = qft.merge(adapter, tmp_path / "merged")
    assert report["changed"] == 4 + {"none": 0, "lora_only": 4, "all": 14}[bias]
    merged = qft.open_any(str(tmp_path / "merged"), **PLAIN).model
    expected = model.merge_and_unload().state_dict()  # type: ignore[operator]
    found = merged.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 1e-6, name


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("pooling", ["model", "mean", "cls"])
def test_a_trained_head_is_merged_into_a_bare_encoder(
    tiny_bert: Path, tmp_path: Path, pooling: str, bias: Any
) -> None:
    from transformers import AutoModelForSequenceClassification

    strategy = LoRA(rank=3, bias=bias)
    model = attached(tiny_bert, strategy, "classify", pooling)
    adapter = save(model, strategy, tmp_path / "adapter", tiny_bert, "classify")
    opened = qft.open_any(str(adapter), **PLAIN)
    assert opened.labels == LABELS
    assert torch.equal(logits(opened.model), logits(model))

    qft.merge(adapter, tmp_path / "merged")
    merged = qft.open_any(str(tmp_path / "merged"), **PLAIN)
    assert merged.task == "classify"
    assert merged.labels == LABELS
    assert (logits(merged.model) - logits(model)).abs().max() < 1e-5

    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    assert plain.config.id2label == dict(enumerate(LABELS))
    same = bool((logits(plain) - logits(model)).abs().max() < 1e-5)
    assert same == (pooling == "model")  # another pooling is qft's, and config.json names it
    config = json.loads((tmp_path / "merged/config.json").read_text(encoding="utf-8"))
    assert config["qft_pooling"] == pooling
