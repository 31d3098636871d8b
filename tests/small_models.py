"""Random models of several families, small enough to be made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_WINDOW = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2}
DECODERS = ("llama", "qwen2", "qwen3", "mistral")
ENCODERS = ("bert", "classifier")
FAMILIES = (*DECODERS, *ENCODERS)


def make_model(kind: str, folder: Path, **changes: Any) -> Path:
    """Saves a random model with larger weights than a fresh one's, so that errors show."""
    import torch
    import transformers as hub
    from conftest import make_tokenizer

    grouped, small = {**GROUPED, **changes}, {**SMALL, **changes}
    makers: dict[str, Callable[[], Any]] = {
        "llama": lambda: hub.LlamaForCausalLM(
            hub.LlamaConfig(**{"tie_word_embeddings": True, **grouped})),
        "qwen2": lambda: hub.Qwen2ForCausalLM(hub.Qwen2Config(**_WINDOW, **grouped)),
        "qwen3": lambda: hub.Qwen3ForCausalLM(hub.Qwen3Config(**{"head_dim": 16, **grouped})),
        "mistral": lambda: hub.MistralForCausalLM(hub.MistralConfig(sliding_window=6, **grouped)),
        "bert": lambda: hub.BertModel(hub.BertConfig(**small)),
        "classifier": lambda: hub.BertForSequenceClassification(hub.BertConfig(
            **small, id2label={0: "bad", 1: "good", 2: "so-so"}, label2id={
                "bad": 0, "good": 1, "so-so": 2})),
    }  # fmt: skip
    torch.manual_seed(1)
    model = makers[kind]()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(2.0)
        elif name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    # one of them in many shards
    model.save_pretrained(folder, max_shard_size="40KB" if kind == "qwen3" else "5GB")
    make_tokenizer(folder)
    return folder


def texts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of words drawn by the seed, none like another."""
    import random

    generator = random.Random(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", "saw", "that", "it", "was", "good", "time"]
    return [
        {"text": " ".join(generator.choices(words, k=6 + generator.randrange(12))) + f" {n}"}
        for n in range(count)
    ]
