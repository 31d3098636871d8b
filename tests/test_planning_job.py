"""What of a job's rows is planned for: the optimizer step that needs most."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import qft
from qft.planning.fake_training import FakeTraining
from qft.planning.job import PlannedJob, imagined_inputs, planned_job


@pytest.fixture
def job_of(tmp_path: Path):
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    ).save_pretrained(tmp_path)  # fmt: skip

    def make(lengths: list[int], micro_batch: int, **train: Any) -> PlannedJob:
        recipe = qft.build_recipe({
            "model": str(tmp_path), "task": "text", "data": {"train": "rows"}, "strategy": "full",
            "output": "run", "dtype": "float32", "device": "cpu",
            "memory": {"micro_batch": micro_batch, "checkpointing": "none"},
            "train": {"max_length": 64, "batch_size": len(lengths), **train},
        })  # fmt: skip
        job = planned_job(recipe, imagined_inputs(recipe, tmp_path, rows=len(lengths)))
        for example, length in zip(job.inputs.train.examples, lengths, strict=True):
            for name in ("input_ids", "labels"):
                example.inputs[name] = example.inputs[name][:length]
        return job

    return make


def lengths_of(job: PlannedJob) -> list[int]:
    return [len(example.inputs["input_ids"]) for example in job.longest()]


def test_the_two_longest_micro_batches_where_a_step_has_several(job_of):
    lengths = [10, 50, 20, 60, 30, 40]
    assert lengths_of(job_of(lengths, 2)) == [60, 50, 40, 30]
    assert lengths_of(job_of(lengths, 2, group_by_length=False)) == [40, 30, 60, 50]
    assert lengths_of(job_of(lengths, 4)) == [60, 50, 40, 30, 20, 10]
    assert lengths_of(job_of(lengths, 6)) == [60, 50, 40, 30, 20, 10]
    assert lengths_of(job_of(lengths, 2, batch_size=2)) == [60, 50]
    assert len(job_of(lengths, 2).longest_micro_batch()) == 2


def test_gradients_of_one_micro_batch_are_there_while_the_next_one_runs(job_of):
    job = job_of([16, 16, 16], 1)
    whole = FakeTraining(job).meter(job.inputs.train.examples)
    planned = FakeTraining(job).meter()
    assert planned.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.005)
    alone = FakeTraining(job).meter(job.longest_micro_batch())
    assert planned.peak_bytes > 1.05 * alone.peak_bytes
