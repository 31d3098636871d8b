"""Tiny bases of many families, and what PEFT makes of them: what the tests of merging share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as hub
from torch import nn

hub.logging.set_verbosity_error()
hub.logging.disable_progress_bar()

_DECODER = {
    "vocab_size": 120, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_ENCODER = {
    "vocab_size": 120, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_T5 = {"vocab_size": 120, "d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4,
       "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}  # fmt: skip
_BART = {
    "vocab_size": 120, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80, "max_position_embeddings": 64,
}  # fmt: skip
_GPT2 = {"vocab_size": 120, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
_DISTIL = {"vocab_size": 120, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 80,
           "max_position_embeddings": 64}  # fmt: skip

BASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hub.LlamaForCausalLM(hub.LlamaConfig(**_DECODER, tie_word_embeddings=False)),
    "tied": lambda: hub.LlamaForCausalLM(hub.LlamaConfig(**_DECODER, tie_word_embeddings=True)),
    "qwen2": lambda: hub.Qwen2ForCausalLM(hub.Qwen2Config(**_DECODER, tie_word_embeddings=True)),
    "gemma": lambda: hub.GemmaForCausalLM(hub.GemmaConfig(**_DECODER, head_dim=12)),
    "gpt2": lambda: hub.GPT2LMHeadModel(hub.GPT2Config(**_GPT2)),
    "bare gpt2": lambda: hub.GPT2Model(hub.GPT2Config(**_GPT2)),
    "t5": lambda: hub.T5ForConditionalGeneration(hub.T5Config(**_T5)),
    "bart": lambda: hub.BartForConditionalGeneration(hub.BartConfig(**_BART)),
    "bert": lambda: hub.BertModel(hub.BertConfig(**_ENCODER)),
    "masked bert": lambda: hub.BertForMaskedLM(hub.BertConfig(**_ENCODER)),
    "roberta": lambda: hub.RobertaForMaskedLM(hub.RobertaConfig(**_ENCODER)),
    "distilbert": lambda: hub.DistilBertForMaskedLM(hub.DistilBertConfig(**_DISTIL)),
}
CLASSES = {
    "text": hub.AutoModelForCausalLM,
    "seq2seq": hub.AutoModelForSeq2SeqLM,
    "classify": hub.AutoModelForSequenceClassification,
    "extract": hub.AutoModelForQuestionAnswering,
    "token": hub.AutoModelForTokenClassification,
}
PEFT_TASKS = {"text": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "classify": "SEQ_CLS",
              "extract": "QUESTION_ANS", "token": "TOKEN_CLS"}  # fmt: skip


def make_base(kind: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Saves a random model whose biases and norms are no zeros and ones."""
    torch.manual_seed(0)
    model = BASES[kind]()
    stir(model)
    model.to(dtype).save_pretrained(folder)
    if kind == "bert":
        rename(folder, {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"})
    return folder


def rename(folder: Path, endings: Mapping[str, str]) -> None:
    """Gives tensors of a checkpoint the names that old ones have."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    for new, old in endings.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def stir(model: nn.Module, size: float = 0.05) -> None:
    """Adds noise to every parameter that trains, so that nothing is zero, one or alike."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += size * noise.to(parameter.dtype)


def open_base(folder: Path, task: str = "text", **options: Any) -> Any:
    """The base in float32, in eval mode, by plain transformers."""
    opened = CLASSES[task].from_pretrained(folder, dtype=torch.float32, **options)
    model = opened[0] if options.get("output_loading_info") else opened
    model.eval()
    return opened


def wrapped(base: Path, config: Any, task: str = "text") -> Any:
    """PEFT's model with an adapter that has learned something."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(open_base(base, task), config)
    stir(model)
    return model.eval()


def outputs(model: nn.Module, task: str = "text") -> torch.Tensor:
    """What a model computes of a few tokens."""
    tokens = torch.arange(3, 19).reshape(2, 8)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if task == "seq2seq":
        inputs["decoder_input_ids"] = torch.arange(30, 40).reshape(2, 5)
    with torch.no_grad():
        found = model(**inputs)
    return torch.cat([found.start_logits, found.end_logits]) if task == "extract" else found.logits
