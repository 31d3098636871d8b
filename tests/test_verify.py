"""Verification: right figures, a small loss passes, a planted fault does not."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qft import models
from qft.errors import ModelError, VerificationError
from qft.export.formats import FORMATS, write_format
from qft.merging.merge import open_source
from qft.verification.read_back import read_back
from qft.verification.thresholds import THRESHOLDS, Thresholds
from qft.verification.verify import FILE, verify

torch.set_num_threads(1)
ANY = Thresholds(math.inf, math.inf, 0.0, math.inf)


class Fixed(nn.Module):
    """Says the same logits whatever it is asked, row by row."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, attention_mask=None):
        assert input_ids.shape[0] <= 4  # bounded, whatever the batch
        return SimpleNamespace(logits=self.logits[input_ids[:, 0]])


def rows(count: int, length: int = 6) -> dict[str, torch.Tensor]:
    ids = torch.arange(count)[:, None].expand(count, length).clone()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_the_figures_are_what_they_say():
    torch.manual_seed(0)
    first, second = torch.randn(9, 6, 11), torch.randn(9, 6, 11)
    batch = rows(9)
    labels = torch.randint(0, 11, (9, 6))
    labels[:, :3] = -100
    batch["labels"] = labels
    found = verify(Fixed(first), Fixed(second), [batch], format="gguf:f16")
    p, q = first[:, 2:5].log_softmax(-1), second[:, 2:5].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).flatten()
    target = labels[:, 3:].flatten()
    assert found.positions == 27
    assert found.mean_kl == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found.p99_kl == pytest.approx(kl.sort().values[26].item(), rel=1e-5)
    assert found.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    loss = nn.functional.nll_loss(q.reshape(27, 11), target).item()
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.max_difference == (first[:, 2:5] - second[:, 2:5]).abs().max().item()


def test_without_labels_padding_is_left_out():
    logits = torch.randn(2, 6, 11)
    batch = rows(2)
    batch["attention_mask"][0, 4:] = 0
    found = verify(Fixed(logits), Fixed(logits), [batch], format="gguf:f32")
    assert found.positions == 3 + 5
    assert found.mean_kl == 0
    assert found.top1 == 1
    found.check()


def test_a_classifier_is_compared_by_row():
    logits = torch.randn(5, 3)
    batch = {**rows(5), "labels": logits.argmax(-1)}
    found = verify(Fixed(logits), Fixed(logits + 1), [batch], format="bnb:nf4")
    assert found.positions == 5
    assert found.mean_kl == pytest.approx(0, abs=1e-6)
    assert found.max_difference == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_a_broken_number_never_passes(fault):
    logits = torch.randn(2, 6, 11)
    broken = logits.clone()
    broken[1, 2, 3] = fault
    for pair in ((logits, broken), (broken, broken)):
        found = verify(Fixed(pair[0]), Fixed(pair[1]), [rows(2)], format="bnb:nf4")
        with pytest.raises(VerificationError):
            found.check()


def test_nothing_to_compare_and_other_shapes_are_errors():
    model = Fixed(torch.randn(2, 6, 11))
    batch = {**rows(2), "labels": torch.full((2, 6), -100)}
    with pytest.raises(VerificationError, match="no position"):
        verify(model, model, [batch], format="gguf:f16")
    with pytest.raises(VerificationError, match="another shape"):
        verify(model, Fixed(torch.randn(2, 6, 12)), [rows(2)], format="gguf:f16")


def test_past_a_threshold_it_names_figure_threshold_and_advice(tmp_path):
    logits = torch.randn(2, 6, 11)
    found = verify(Fixed(logits), Fixed(-logits), [rows(2)], format="bnb:nf4")
    with pytest.raises(VerificationError) as caught:
        found.check()
    assert caught.value.exit_code == 5
    text = caught.value.text()
    assert "mean KL" in text
    assert "allowed 0.15" in text
    assert "bnb:int8 or gguf:q8_0" in text
    found.write(tmp_path)
    stored = json.loads((tmp_path / FILE).read_text())
    assert stored["passed"] is False
    assert stored["mean_kl"] == found.mean_kl
    assert stored["thresholds"]["mean_kl"] == 0.15
    verify(Fixed(logits), Fixed(-logits), [rows(2)], format="bnb:nf4", thresholds=ANY).check()


def test_every_format_has_thresholds():
    assert THRESHOLDS.keys() == FORMATS.keys()


@pytest.mark.parametrize("format", ["gguf:q8_0", "bnb:nf4"])
def test_a_real_model_passes_and_with_a_planted_fault_does_not(tmp_path, assets, format):
    folder = assets / "models" / "mini-6m"
    tokenizer = models.open_tokenizer(folder)
    text = (assets / "data/text/tinyshakespeare").rglob("*.txt")
    ids = torch.tensor(tokenizer(next(text).read_text()[:6000])["input_ids"][: 6 * 128]).view(
        6, 128
    )
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    spec = models.ModelSpec(source=str(folder))
    source = open_source(folder, models.open_skeleton(folder, spec))
    report = write_format(source, format, tmp_path / "good")
    batches = [{"input_ids": ids}]
    verify(reference, read_back(report.path, dtype=torch.float32), batches, format=format).check()
    pair = source.pair

    def faulty(name: str, part: slice) -> Any:  # what an exporter with a mixed-up tensor would do
        return pair(name.replace("layers.2.mlp.up_proj", "layers.3.mlp.up_proj"), part)

    source.pair = faulty
    report = write_format(source, format, tmp_path / "bad")
    found = verify(reference, read_back(report.path, dtype=torch.float32), batches, format=format)
    with pytest.raises(VerificationError):
        found.check()


def test_a_broken_artefact_is_an_error(tmp_path, tiny_llama):
    spec = models.ModelSpec(source=str(tiny_llama))
    source = open_source(tiny_llama, models.open_skeleton(tiny_llama, spec))
    report = write_format(source, "gguf:f16", tmp_path / "out")
    whole = report.path.read_bytes()
    report.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="The GGUF file is broken"):
        read_back(report.path)
    (tmp_path / "out" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError):
        read_back(tmp_path / "out")
