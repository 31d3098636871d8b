"""GPT-2, as llama.cpp runs it."""

from __future__ import annotations

from qft.gguf.contract import Architecture, Config, Mapped, unlike
from qft.gguf.file import Value
from qft.gguf.turned import transposed
from qft.merging.tensors import RowSource

_TRANSPOSED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")


class GPT2(Architecture):
    """GPT-2: learned positions, biases everywhere, and matrices stored ``[in, out]``."""

    name = "gpt2"

    def layers(self, config: Config) -> int:
        """See :class:`Architecture`."""
        return int(config["n_layer"])

    def settings(self, config: Config) -> dict[str, Value]:
        """See :class:`Architecture`."""
        return {
            "block_count": self.layers(config),
            "context_length": int(config["n_positions"]),
            "embedding_length": int(config["n_embd"]),
            "feed_forward_length": int(config.get("n_inner") or 4 * int(config["n_embd"])),
            "attention.head_count": int(config["n_head"]),
            "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
            "vocab_size": int(config["vocab_size"]),
        }

    def problems(self, config: Config) -> list[str]:
        """See :class:`Architecture`."""
        act = config["activation_function"]
        found = [] if act in ("gelu_new", "gelu_pytorch_tanh") else [f"activation_function: {act}"]
        return found + unlike(config, scale_attn_weights=True, add_cross_attention=False,
                              scale_attn_by_inverse_layer_idx=False)  # fmt: skip

    def written(self, module: str, config: Config) -> str | None:
        """See :class:`Architecture`."""
        if module.endswith((".attn.bias", ".attn.masked_bias")):
            return ""  # the causal mask, in old checkpoints
        name = super().written(module, config)
        return "" if name == "output.weight" and config.get("tie_word_embeddings") else name

    def tensor(self, source: RowSource, name: str, written: str, config: Config) -> Mapped:
        """See :class:`Architecture`."""
        if not written.endswith(_TRANSPOSED):
            return super().tensor(source, name, written, config)
        return Mapped(written, source.shape(name)[::-1], transposed(source, name), name)
