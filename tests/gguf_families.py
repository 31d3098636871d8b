"""A small random model of every architecture that can be written as GGUF, and of each setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_SHAPE = {
    "vocab_size": 272, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
_GPT2 = {
    "vocab_size": 272, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_BERT = {
    "vocab_size": 408, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": None},
    "Qwen3": {"head_dim": 32},
    "Gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8,
               "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0,
               "tie_word_embeddings": True, "num_hidden_layers": 3},
    "Gemma3": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8,
               "num_hidden_layers": 7, "tie_word_embeddings": True,
               "rope_parameters": {
                   "full_attention": {"rope_type": "default", "rope_theta": 1e5},
                   "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}},
}  # fmt: skip
_CLASSES = {
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
    "Bert": ("BertConfig", "BertModel"),
    "BertClassifier": ("BertConfig", "BertForSequenceClassification"),
    "BertMasked": ("BertConfig", "BertForMaskedLM"),
}


def family_config(family: str, **changes: Any) -> tuple[Any, str]:
    """A small config, and the name of its model's class.

    Args:
        family: as transformers spells it before ``Config``.
        changes: to its config.
    """
    import transformers

    config_name, model_name = _CLASSES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    shape = _GPT2 if family == "GPT2" else _BERT if family.startswith("Bert") else _SHAPE
    values = {**shape, **_OWN.get(family, {}), **changes}
    return getattr(transformers, config_name)(**values), model_name


def make_family(family: str, folder: Path, **changes: Any) -> Path:
    """Saves a model whose every tensor matters, with a tokenizer of its kind."""
    import torch
    import transformers
    from small_vocabularies import wordpiece

    config, model_name = family_config(family, **changes)
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(config)
    centre = 0.0 if family.startswith("Gemma") else 1.0  # of a norm's weight
    for name, parameter in model.named_parameters():
        if "norm" in name.lower() and name.endswith("weight"):
            torch.nn.init.normal_(parameter, centre, 0.3)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, 0.0, 0.3)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.15)  # so that predictions are not uniform
    model.save_pretrained(folder)
    if family.startswith("Bert"):
        wordpiece().save_pretrained(folder)
    else:
        save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 264 entries; llama.cpp opens no vocabulary without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("t", "h"), ("th", "e"), ("i", "n"), ("Ġ", "a")]
    specials = ["<pad>", "<s>", "</s>", "<|turn|>"]
    entries = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {token: index for index, token in enumerate(entries)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(specials)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
