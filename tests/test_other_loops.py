"""A prepared model in loops that are not qft's: ten lines, a plain Trainer, TRL's SFTTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qft
from adapters.lora import LoRA
from qft.bench.step import PLAIN
from qft.lean import label_loss
from qft.lean.engine import Savers
from qft.models import ModelSpec, open_model, open_tokenizer

TEXTS = [f"{word} and then the {word} went on, again and again" for word in
         ("sea", "dog", "red house", "boat", "cat", "hill", "tree", "bird")]  # fmt: skip


def prepared_model(folder: Path, savers: Savers) -> nn.Module:
    torch.manual_seed(0)
    model = open_model(folder, ModelSpec(str(folder), dtype=torch.float32, device="cpu"))
    torch.manual_seed(1)
    return qft.prepare(model, LoRA(rank=4), savers=savers)


def test_ten_lines(tiny_llama: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model = qft.prepare(model, LoRA(rank=4))
    tokenizer = open_tokenizer(tiny_llama)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for text in TEXTS * 2:
        tokens = tokenizer(text, return_tensors="pt").input_ids
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.2


def trained_by_trainer(folder: Path, out: Path, savers: Savers) -> list[float]:
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

    tokenizer = open_tokenizer(folder)
    model = prepared_model(folder, savers)
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2,
        gradient_accumulation_steps=2, logging_steps=1, use_cpu=True, report_to=[],
        save_strategy="no", seed=3, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[dict(tokenizer(text)) for text in TEXTS],  # type: ignore[arg-type]
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_plain_trainer(tiny_llama: Path, tmp_path: Path):
    """Its accumulation counts the labels of all micro-batches, and the prepared model heeds it."""
    wanted = trained_by_trainer(tiny_llama, tmp_path, PLAIN)
    found = trained_by_trainer(tiny_llama, tmp_path, Savers())
    assert found == pytest.approx(wanted, rel=1e-3)
    assert found[-1] < found[0]


def trained_by_trl(folder: Path, out: Path, model: Any) -> list[dict[str, float]]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(out), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2,
        logging_steps=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no", seed=3,
        disable_tqdm=True, dataset_text_field="text", max_length=64, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=open_tokenizer(folder),
    )  # fmt: skip
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_trls_trainer_gets_its_fields_from_the_chunked_loss(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("trl")
    from qft.lean import token_scores

    wanted = trained_by_trl(tiny_llama, tmp_path, prepared_model(tiny_llama, PLAIN))
    calls = []
    ours = label_loss.label_losses

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return ours(*args, **kwargs)

    monkeypatch.setattr(token_scores, "label_losses", counted)
    found = trained_by_trl(tiny_llama, tmp_path, prepared_model(tiny_llama, Savers()))
    assert len(calls) == 4, "TRL's own code ran instead"
    for theirs, mine in zip(wanted, found, strict=True):
        for name in ("loss", "entropy", "mean_token_accuracy", "num_tokens"):
            assert mine[name] == pytest.approx(theirs[name], rel=2e-3), name
