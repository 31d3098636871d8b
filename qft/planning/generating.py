"""What writing text takes: the prompt's pass, then keys and values that grow by a token a step."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qft.bench.fake_model import fused_attention
from qft.data.encoding import UNSUPERVISED
from qft.distillation.own_texts import WRITTEN_AT_ONCE
from qft.distillation.supply import settings_in
from qft.evaluation import evaluating
from qft.lean.meter import Meter, Reading
from qft.planning.amounts import PhaseBytes
from qft.planning.evaluating import fake_evaluation
from qft.planning.job import PlannedJob
from qft.planning.key_values import cross_bytes, key_value_bytes, layer_bytes, prompt_bytes
from qft.preparation import inner_model

ROWS = 8  # texts at once, as `qft.generation.generate`
_LOGITS_BYTES = 8  # a choice of the next token: in float32, and as they come, or a sorted copy


def generate_phase(
    job: PlannedJob, reading: Reading, *, prompt: int, new_tokens: int, rows: int = ROWS
) -> PhaseBytes:
    """The fullest moment of writing: at the end of the prompt's pass, or at the last token.

    Args:
        reading: of the training's step: weights, adapters and optimizer states stay.
        prompt: tokens of the longest prompt; of an encoder-decoder, of the longest source.
        new_tokens: at most so many are written.
        rows: texts at once.
    """
    whole: Any = job.ready.skeleton
    config, dtype = whole.config, job.dtype
    choice = rows * int(config.get_text_config(decoder=True).vocab_size) * _LOGITS_BYTES
    halves = bool(config.is_encoder_decoder)
    crossed = cross_bytes(config, rows, prompt, dtype)
    first = {
        "key-value cache": crossed + (0 if halves else prompt_bytes(config, rows, prompt, dtype)),
        "temporary": _prompt_pass(job, prompt, rows) + choice,
    }
    positions = new_tokens if halves else prompt + new_tokens - 1
    last = {
        "key-value cache": crossed + key_value_bytes(config, rows, positions, dtype),
        "temporary": max(layer_bytes(config, rows, positions, dtype)) // 2 + choice,
    }
    lasting = {name: reading.most[name] for name in ("weights", "adapters", "optimizer")}
    fullest = max((first, last), key=lambda moment: sum(moment.values()))
    return PhaseBytes("write", {k: v for k, v in {**lasting, **fullest}.items() if v})


def writing_phase(job: PlannedJob, reading: Reading) -> PhaseBytes | None:
    """A student that writes its own texts in some steps (`qft.distillation.own_texts`).

    None where it does not.
    """
    settings = settings_in(job.recipe)
    if settings is None or not settings.on_policy:
        return None
    longest = job.longest()[0].inputs
    answer = len(longest["labels"]) - longest["labels"].count(UNSUPERVISED)
    prompt, most = len(longest["input_ids"]), settings.max_new_tokens
    if not job.ready.skeleton.config.is_encoder_decoder:  # type: ignore[union-attr]
        prompt = max(1, prompt - answer)
        most = min(most, job.recipe.train.max_length - prompt)
    rows = min(WRITTEN_AT_ONCE, job.recipe.train.batch_size)
    return generate_phase(job, reading, prompt=prompt, new_tokens=max(1, most), rows=rows)


def _prompt_pass(job: PlannedJob, prompt: int, rows: int) -> int:
    """What a prompt's forward pass holds beside the weights; the last position alone has logits."""
    fake = fake_evaluation(job)
    model: Any = fake.model
    inner = inner_model(model)
    body = inner.get_encoder() if inner.config.is_encoder_decoder else inner.base_model
    with (
        evaluating(model),
        fused_attention(fake.device != "cpu"),
        Meter(model, None, fake.device) as counting,
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        ids = torch.empty(rows, prompt, dtype=torch.int64, device=fake.device)
        body(input_ids=ids, use_cache=False) if inner is not body else body(input_ids=ids)
    peak = counting.reading().peak.by_category
    return sum(size for name, size in peak.items() if name not in ("weights", "adapters"))
