"""The jobs: a model of random weights, rows for qft's recipe, and the same tokens for the others.

The rows are encoded once, by qft; the others are given these tokens and labels in the order in
which qft's trainer will take the rows, and every side's samples are compared step by step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

ALPACA = "data/instruct/alpaca_demo/alpaca_en_demo.json"
TOKENIZER = "models/mini-6m"

SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "max_position_embeddings": 8192, "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896,
        "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 6144, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 1024, "tie_word_embeddings": True,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One job, the same for all sides.

    Attributes:
        shape: a key of `SHAPES`.
        length: sequences have exactly so many tokens; None for rows as they come.
        label_share: of the tokens, where the length is fixed.
        batch: samples an optimizer step.
        steps: optimizer steps a block.
    """

    shape: str
    length: int | None
    batch: int
    steps: int
    quantize: str = "none"
    label_share: float = 0.25
    learning_rate: float = 1e-3
    max_length: int = 512
    rank: int = 16
    alpha: int = 32
    seed: int = 0


_ALPACA = Case("smollm2-135m", None, batch=4, steps=2)
_FIXED = Case("qwen2.5-0.5b", 512, batch=1, steps=1, learning_rate=3e-3)
CASES = {
    "alpaca-135m": _ALPACA,
    "qwen-0.5b-512": _FIXED,
    "alpaca-135m-nf4": replace(_ALPACA, quantize="nf4"),
    "qwen-0.5b-512-nf4": replace(_FIXED, quantize="nf4"),
}
TINY = Case("tiny", None, batch=2, steps=2, max_length=128)


def make_job(case: Case, assets: Path, folder: Path, blocks: int) -> dict[str, Any]:
    """Writes model, rows and tokens into ``folder``; what a side must know.

    Args:
        assets: holds the tokenizer and the instructions.
        blocks: measured; one more is run to warm up.
    """
    model = make_model(case, assets, folder / f"model-{case.shape}")
    steps = (blocks + 1) * case.steps
    rows, tokens = folder / "rows.jsonl", folder / "tokens.jsonl"
    write_data(case, model, assets, steps * case.batch, rows, tokens)
    return {
        **asdict(case),
        "model": str(model),
        "rows": str(rows),
        "tokens": str(tokens),
        "steps": steps,
        "steps_a_block": case.steps,
    }


def make_model(case: Case, assets: Path, folder: Path) -> Path:
    """Random bf16 weights and a real tokenizer, made once."""
    if (folder / "config.json").is_file():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(SHAPES[case.shape])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    source = assets / TOKENIZER
    torch.manual_seed(case.seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for path in source.glob("*token*"):
        shutil.copy(path, folder)
    shutil.copy(source / "chat_template.jinja", folder)
    return folder


def write_data(
    case: Case, model: Path, assets: Path, count: int, rows_path: Path, tokens_path: Path
) -> None:
    """The first ``count`` rows that fit, and their tokens in the order of training."""
    from qft.data.tasks import load_examples
    from qft.models import open_tokenizer
    from qft.recipe import Data
    from qft.trainer import StepBatches

    tokenizer = open_tokenizer(model)
    source = json.loads((assets / ALPACA).read_text(encoding="utf-8"))
    texts = source if case.length is None else _of_length(case, tokenizer, source, count)
    data = Data(train=str(rows_path), too_long="drop")
    _write(rows_path, texts)
    found = load_examples("instruct", str(rows_path), tokenizer, data=data,
                          max_length=case.max_length)  # fmt: skip
    kept = found.examples[:count]
    if len(kept) < count:
        raise SystemExit(f"{count} rows are needed, {len(kept)} fit into {case.max_length} tokens")
    _write(rows_path, [texts[example.index] for example in kept])
    # what each step takes is qft's choice; within a step the longest come first, so that a side
    # that splits the step into micro-batches has as little padding as can be
    steps = list(StepBatches(count, case.batch, case.seed))
    ordered = [
        sorted((kept[i].inputs for i in step), key=lambda inputs: -len(inputs["input_ids"]))
        for step in steps
    ]
    _write(tokens_path, [
        {"input_ids": one["input_ids"], "labels": one["labels"]} for step in ordered for one in step
    ])  # fmt: skip


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _of_length(
    case: Case, tokenizer: Tokenizer, source: list[dict[str, str]], count: int
) -> list[dict[str, str]]:
    """Instructions of running text that come to exactly the length, with the share of labels."""
    words = " ".join(row["output"] for row in source).split()
    found: list[dict[str, str]] = []
    for row in _tries(case, tokenizer, words):
        found.append(row)
        if len(found) == count:
            return found
    raise SystemExit(f"only {len(found)} of {count} texts came to {case.length} tokens")


def _tries(case: Case, tokenizer: Tokenizer, words: list[str]) -> Iterator[dict[str, str]]:
    """Goes on word by word; a text that jumps over the length is left."""
    from qft.data.chat import encode_chat
    from qft.data.language import prompt_messages

    assert case.length is not None
    at, wanted = 0, round(case.length * case.label_share)
    while at < len(words):
        prompt, at = _grow(tokenizer, words, at, case.length - wanted - 16)
        answer, at = _grow(tokenizer, words, at, wanted - 2)
        for extra in range(40):
            completion = " ".join([*answer, *words[at : at + extra]])
            encoded = encode_chat(tokenizer, prompt_messages(" ".join(prompt), completion))
            if len(encoded.input_ids) == case.length:
                yield {"instruction": " ".join(prompt), "output": completion}
            if len(encoded.input_ids) >= case.length:
                break
        at += 40


def _grow(tokenizer: Tokenizer, words: list[str], at: int, tokens: int) -> tuple[list[str], int]:
    """Words from ``at`` on that come to about so many tokens."""
    total, first = 0, at
    while at < len(words) and total < tokens:
        total += len(tokenizer(" " + words[at], add_special_tokens=False)["input_ids"])
        at += 1
    return words[first:at], at
