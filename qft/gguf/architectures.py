"""Which of llama.cpp's architectures a model of transformers is written as."""

from __future__ import annotations

from qft.errors import ModelError
from qft.gguf.bert import Bert, BertClassifier
from qft.gguf.contract import WAY_OUT, Architecture, Config
from qft.gguf.decoders import Llama, Phi3, Qwen2, Qwen3
from qft.gguf.gemma import Gemma2, Gemma3
from qft.gguf.gpt2 import GPT2

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Llama(),
    "MistralForCausalLM": Llama(),
    "Qwen2ForCausalLM": Qwen2(),
    "Qwen3ForCausalLM": Qwen3(),
    "Gemma2ForCausalLM": Gemma2(),
    "Gemma3ForCausalLM": Gemma3(),
    "Phi3ForCausalLM": Phi3(),
    "GPT2LMHeadModel": GPT2(),
    "BertModel": Bert(),
    "BertForMaskedLM": Bert(),
    "BertForSequenceClassification": BertClassifier(),
}


def architecture_of(config: Config) -> Architecture:
    """The architecture of a model.

    Raises:
        ModelError: llama.cpp has none for it, or would silently run it with other arithmetic.
    """
    named = str((config.get("architectures") or ["unknown"])[0])
    if named not in ARCHITECTURES:
        raise ModelError(
            f"qft cannot write {named} as GGUF.",
            found=f"it can write {', '.join(ARCHITECTURES)}",
            fix=WAY_OUT,
        )
    found = ARCHITECTURES[named]
    found.require(config)
    return found
