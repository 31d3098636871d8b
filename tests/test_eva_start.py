"""EVA begins with the main directions of what each layer reads, whatever the task's labels are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.lora import LoRA
from adapters.lora_start import lora_layers
from qft.errors import RecipeError
from qft.models import ModelSpec, open_model, open_skeleton
from qft.strategy import Context

RANK = 6


def opened(folder: Path, task: str) -> nn.Module:
    labels = ("no", "yes") if task == "classify" else None
    spec = ModelSpec(str(folder), task, labels, dtype=torch.float32, device="cpu")
    torch.manual_seed(0)  # of a new head
    return open_model(folder, spec)


def batch(seed: int, task: str, length: int = 12) -> dict[str, Tensor]:
    """Two rows of different lengths."""
    ids = torch.randint(4, 260, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, length - 4 :] = 0
    labels = ids.clone()
    match task:
        case "classify":
            labels = torch.tensor([0, 1])
        case "seq2seq":  # as long as the inputs
            labels[0, 8:] = -100
        case _:  # one token of an answer
            labels[:, :-1] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def started(folder: Path, task: str, batches: Any, **changes: Any) -> nn.Module:
    strategy = LoRA(**{"rank": RANK, "initialisation": "eva", **changes})
    return strategy.attach(opened(folder, task), Context(task=task, calibration=batches))


def read_by(model: nn.Module, layer: str, batches: Any, key: str) -> Tensor:
    """What a layer of the plain model reads at the places of tokens."""
    seen: list[Tensor] = []
    model.get_submodule(layer).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model.eval()
    rows = []
    for one in batches:
        with torch.no_grad():
            model(**one)
        places = one[key] != (-100 if key == "labels" else 0)
        rows.append(seen.pop()[places])
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("task", "layer", "key"),
    [
        ("text", "model.layers.1.mlp.down_proj", "attention_mask"),
        ("classify", "bert.encoder.layer.1.attention.self.query", "attention_mask"),
        ("seq2seq", "encoder.block.1.layer.0.SelfAttention.q", "attention_mask"),
        ("seq2seq", "decoder.block.1.layer.0.SelfAttention.q", "labels"),
        ("seq2seq", "decoder.block.1.layer.1.EncDecAttention.k", "attention_mask"),
    ],
)
def test_a_layer_begins_with_its_inputs_main_directions(
    task: str, layer: str, key: str, tiny_llama: Path, tiny_bert: Path, tiny_t5: Path
):
    folder = {"text": tiny_llama, "classify": tiny_bert, "seq2seq": tiny_t5}[task]
    batches = [batch(seed, task) for seed in range(2)]
    model = started(folder, task, batches)
    inputs = read_by(opened(folder, task), layer, batches, key)
    rows = dict(lora_layers(model))[layer].lora_A["default"].weight
    torch.testing.assert_close(rows @ rows.T, torch.eye(RANK), rtol=0, atol=1e-4)
    centred = inputs - inputs.mean(dim=0)
    best = torch.linalg.svdvals(centred)[:RANK].square().sum()
    assert (centred @ rows.T).square().sum() > 0.97 * best


def test_it_finds_as_much_as_peft(tiny_llama: Path):
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    batches = [batch(0, "text")]
    config = LoraConfig(
        r=RANK, target_modules="all-linear", init_lora_weights="eva", task_type="CAUSAL_LM",
        eva_config=EvaConfig(rho=1.0, use_label_mask=False),
    )  # fmt: skip
    theirs = get_peft_model(opened(tiny_llama, "text"), config)
    initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    ours = started(tiny_llama, "text", batches)
    kept = []
    layer = "model.layers.1.mlp.up_proj"
    inputs = read_by(opened(tiny_llama, "text"), layer, batches, "attention_mask")
    for model in (ours, theirs):
        rows = dict(lora_layers(model))[layer].lora_A["default"].weight
        kept.append(float(((inputs - inputs.mean(dim=0)) @ rows.T).square().sum()))
    assert kept[0] == pytest.approx(kept[1], rel=0.01)


def test_a_pooler_that_reads_once_a_row_keeps_the_usual_start(tiny_bert: Path):
    model = started(tiny_bert, "classify", [batch(0, "classify")])
    layers = dict(lora_layers(model))
    rows = layers["bert.pooler.dense"].lora_A["default"].weight
    assert rows.shape == (RANK, 64)
    assert (rows @ rows.T - torch.eye(RANK)).abs().max() > 0.01
    assert rows.requires_grad
    model(**batch(1, "classify")).loss.backward()


@pytest.mark.parametrize("on_meta", [False, True])
def test_fewer_tokens_than_directions_are_refused(on_meta: bool, tiny_llama: Path):
    few = [{name: t[:1, :3] for name, t in batch(0, "text").items()}]
    model = (
        open_skeleton(tiny_llama, ModelSpec(str(tiny_llama)))
        if on_meta
        else opened(tiny_llama, "text")
    )
    strategy = LoRA(rank=RANK, initialisation="eva")
    with pytest.raises(RecipeError, match="no more directions than there are tokens") as caught:
        strategy.attach(model, Context(calibration=few))
    assert "3 tokens" in str(caught.value)


def test_short_batches_are_put_together(tiny_llama: Path):
    ids = torch.arange(4, 12)[:, None]
    short = [{"input_ids": row[None], "attention_mask": torch.ones(1, 1, dtype=torch.long)}
             for row in ids]  # fmt: skip
    model = started(tiny_llama, "text", short)
    rows = next(lora_layers(model))[1].lora_A["default"].weight
    torch.testing.assert_close(rows @ rows.T, torch.eye(RANK), rtol=0, atol=1e-4)


def test_repeated_words_end_too(tiny_llama: Path):
    same = {"input_ids": torch.full((2, 12), 7), "attention_mask": torch.ones(2, 12)}
    model = started(tiny_llama, "text", [same] * 3)
    for name, layer in lora_layers(model):
        assert layer.lora_A["default"].weight.isfinite().all(), name
