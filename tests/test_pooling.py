"""A classification head sees the hidden states it was meant to see, and padding changes nothing."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qft.errors import RecipeError
from qft.pooling import CONFIG_KEY, install_pooling, pool, resolve_pooling

KINDS = ("mean", "cls", "last")
LENGTHS = (5, 3, 1)


def by_hand(hidden: Tensor, lengths: tuple[int, ...], kind: str, left: bool) -> Tensor:
    rows = []
    for row, length in zip(hidden, lengths, strict=True):
        real = row[len(row) - length :] if left else row[:length]
        rows.append({"mean": real.mean(dim=0), "cls": real[0], "last": real[-1]}[kind])
    return torch.stack(rows)


def mask_for(lengths: tuple[int, ...], width: int, left: bool) -> Tensor:
    positions = torch.arange(width)[None, :]
    ends = torch.tensor(lengths)[:, None]
    return (positions >= width - ends if left else positions < ends).long()


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_left_out(kind, left):
    hidden = torch.randn(3, 5, 8)
    mask = mask_for(LENGTHS, 5, left)
    torch.testing.assert_close(pool(hidden, mask, kind), by_hand(hidden, LENGTHS, kind, left))


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_mask_every_position_counts(kind):
    hidden = torch.randn(3, 5, 8)
    torch.testing.assert_close(pool(hidden, None, kind), by_hand(hidden, (5, 5, 5), kind, False))


def test_the_mean_is_added_up_in_float32():
    hidden = torch.full((1, 4096, 1), 1.001, dtype=torch.bfloat16)
    pooled = pool(hidden, None, "mean")
    assert pooled.dtype == torch.bfloat16
    assert pooled.item() == hidden[0, 0, 0].item()


def test_a_row_of_padding_alone_is_no_nan():
    hidden = torch.randn(1, 3, 4)
    assert torch.equal(pool(hidden, torch.zeros(1, 3, dtype=torch.long), "mean"), torch.zeros(1, 4))


# --- what auto takes


class Config:
    """Any config."""


def sentence_folder(folder: Path, text: str) -> Path:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize("asked", [*KINDS, "model"])
def test_what_is_asked_for_wins(tmp_path, asked):
    config = Config()
    setattr(config, CONFIG_KEY, "last")
    folder = sentence_folder(tmp_path, json.dumps({"pooling_mode_mean_tokens": True}))
    assert resolve_pooling(asked, folder, config) == asked


@pytest.mark.parametrize("stored", [*KINDS, "model"])
def test_auto_takes_what_the_checkpoint_was_trained_with(tmp_path, stored):
    config = Config()
    setattr(config, CONFIG_KEY, stored)
    folder = sentence_folder(tmp_path, json.dumps({"pooling_mode_mean_tokens": True}))
    assert resolve_pooling("auto", folder, config) == stored


@pytest.mark.parametrize(
    "modes, kind",
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode_max_tokens": True}, "model"),
        ({}, "model"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "model"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "max"}, "model"),
    ],
)
def test_auto_reads_a_sentence_transformers_folder(tmp_path, modes, kind):
    folder = sentence_folder(tmp_path, json.dumps({"word_embedding_dimension": 8, **modes}))
    assert resolve_pooling("auto", folder, Config()) == kind


@pytest.mark.parametrize("text", ["{", "[]", "3", "null", '{"pooling_mode": ["mean"]}'])
def test_a_broken_pooling_file_means_the_familys_own_head(tmp_path, text):
    assert resolve_pooling("auto", sentence_folder(tmp_path, text), Config()) == "model"


def test_auto_otherwise_takes_the_familys_own_head(tmp_path):
    config = Config()
    setattr(config, CONFIG_KEY, "some other tool's")
    assert resolve_pooling("auto", tmp_path, config) == "model"


def test_the_real_sentence_encoder_says_mean(minilm):
    if not (minilm / "1_Pooling" / "config.json").is_file():
        pytest.skip("this package leaves its pooling file out")
    assert resolve_pooling("auto", minilm, Config()) == "mean"


# --- installed


def classifier(family: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 2, "pad_token_id": 0, "num_labels": 3}  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForSequenceClassification")(config)
    return model.eval()


BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0], [4, 0, 0, 0, 0]]),
    "attention_mask": mask_for(LENGTHS, 5, left=False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_the_head_sees_the_pooled_hidden_states(family, kind):
    model = classifier(family)
    base = getattr(model, model.base_model_prefix)
    hidden = base(**BATCH).last_hidden_state
    head = model.classifier if family == "Bert" else model.score
    install_pooling(model, kind)
    expected = head(by_hand(hidden, LENGTHS, kind, left=False))
    torch.testing.assert_close(model(**BATCH).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "model"])
@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_padding_changes_no_logits(family, kind):
    model = classifier(family)
    install_pooling(model, kind)
    together = model(**BATCH).logits
    assert together.shape == (3, 3)
    for row, length in enumerate(LENGTHS):
        alone = {name: value[row : row + 1, :length] for name, value in BATCH.items()}
        torch.testing.assert_close(model(**alone).logits[0], together[row], rtol=1e-4, atol=1e-5)


def test_the_familys_own_head_is_left_as_it_is():
    model = classifier("Bert")
    before = model(**BATCH).logits
    install_pooling(model, "model")
    assert torch.equal(model(**BATCH).logits, before)
    assert model.bert.pooler is not None
    assert "forward" not in vars(model)


def test_an_unused_pooler_is_dropped():
    model = classifier("Bert")
    install_pooling(model, "mean")
    assert model.bert.pooler is None
    assert not [name for name in model.state_dict() if "pooler" in name]
    model(**BATCH, labels=torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_only_this_instance_changes():
    changed, other = classifier("Bert"), classifier("Bert")
    before = other(**BATCH).logits
    install_pooling(changed, "mean")
    assert torch.equal(other(**BATCH).logits, before)
    assert other.bert.pooler is not None


def test_the_loss_is_the_cross_entropy_of_the_logits():
    model = classifier("Bert")
    install_pooling(model, "mean")
    labels = torch.tensor([0, 2, 1])
    output = model(**BATCH, labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    assert model(**BATCH).loss is None


def test_the_checkpoint_remembers_its_pooling(tmp_path):
    from transformers import AutoConfig

    model = classifier("Bert")
    install_pooling(model, "cls")
    model.config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert resolve_pooling("auto", tmp_path, again) == "cls"


def test_a_strategy_may_replace_head_and_dropout_afterwards():
    model = classifier("Bert")
    install_pooling(model, "mean")
    model.classifier = nn.Linear(32, 3)
    nn.init.zeros_(model.classifier.weight)
    nn.init.constant_(model.classifier.bias, 2.0)
    assert torch.equal(model(**BATCH).logits, torch.full((3, 3), 2.0))
    seen: list[Tensor] = []
    model.dropout = nn.Identity()
    model.dropout.register_forward_hook(lambda module, given, out: seen.append(out))
    model(**BATCH)
    assert len(seen) == 1


def test_the_pooled_forward_goes_through_peft():
    from peft import LoraConfig, get_peft_model

    model = classifier("Bert")
    install_pooling(model, "mean")
    before = model(**BATCH).logits
    wrapped = get_peft_model(
        model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    ).eval()
    torch.testing.assert_close(wrapped(**BATCH).logits, before)
    output = wrapped(**BATCH, labels=torch.tensor([0, 1, 2]))
    output.loss.backward()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_several_layers_is_refused(kind):
    with pytest.raises(RecipeError, match="one linear layer") as caught:
        install_pooling(classifier("Roberta"), kind)
    assert "RobertaForSequenceClassification" in str(caught.value)
    assert "pooling: model" in str(caught.value)


def test_a_head_of_several_layers_keeps_its_own_way():
    model = classifier("Roberta")
    before = model(**BATCH).logits
    install_pooling(model, "model")
    assert torch.equal(model(**BATCH).logits, before)


def test_it_works_on_the_meta_device():
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(num_hidden_layers=1))
    install_pooling(model, "mean")
    ids = torch.zeros(2, 4, dtype=torch.long, device="meta")
    assert model(input_ids=ids).logits.shape == (2, 2)


def test_a_decoder_finds_the_last_token_by_the_mask(tiny_llama, tmp_path):
    """Whatever id fills the padding, and where the config names no pad id at all."""
    import json
    import shutil

    from qft.models import ModelSpec, open_model

    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    spec = ModelSpec(str(folder), task="classify", labels=("a", "b"), dtype=torch.float32)
    model = open_model(folder, spec)
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([[5, 6, 7]])).logits
        padded = model(
            input_ids=torch.tensor([[5, 6, 7, 2, 2], [5, 6, 7, 8, 9]]),
            attention_mask=torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
        ).logits
    assert torch.allclose(alone[0], padded[0], atol=1e-6)
