"""Llama and its kin: Mistral, Qwen 2 and 3, Phi-3, as llama.cpp runs them."""

from __future__ import annotations

from qft.gguf.contract import Architecture, Config, Mapped, unlike
from qft.gguf.file import Value
from qft.gguf.rotary import head_size, rope_of, rope_problems, rope_settings, rope_tensors, rotated
from qft.gguf.turned import reordered
from qft.merging.tensors import RowSource


def kv_heads(config: Config) -> int:
    """How many heads of keys and values there are."""
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def sliding_window(config: Config) -> int | None:
    """How many tokens a token sees where some layers see no more; None where all see all."""
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    slides = "sliding_attention" in kinds if kinds is not None else bool(window)
    return int(window) if slides and window else None


class Decoder(Architecture):
    """Settings that the families have in common.

    llama.cpp runs no sliding window for them. Within a context of the window's length there is none
    either, so the file says that this is how long the model's context is.
    """

    rope_kinds: tuple[str, ...] = ("linear", "yarn")
    activations: tuple[str, ...] = ("silu",)
    partial_rotary = False
    own_head_size = True  # may differ from hidden size / heads

    def settings(self, config: Config) -> dict[str, Value]:
        """See :class:`Architecture`."""
        size = head_size(config)
        return {
            "block_count": self.layers(config),
            "context_length": self.context(config),
            "embedding_length": int(config["hidden_size"]),
            "feed_forward_length": int(config["intermediate_size"]),
            "attention.head_count": int(config["num_attention_heads"]),
            "attention.head_count_kv": kv_heads(config),
            "attention.key_length": size,
            "attention.value_length": size,
            "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
            "vocab_size": int(config["vocab_size"]),
            **rope_settings(config),
        }

    def context(self, config: Config) -> int:
        """Tokens within which llama.cpp computes what the model does."""
        longest = int(config["max_position_embeddings"])
        return min(longest, sliding_window(config) or longest)

    def problems(self, config: Config) -> list[str]:
        """See :class:`Architecture`."""
        act = config.get("hidden_activation") or config["hidden_act"]
        found = [] if act in self.activations else [f"hidden_act: {act}"]
        found += rope_problems(config, self.rope_kinds, partial=self.partial_rotary)
        plain = int(config["hidden_size"]) // int(config["num_attention_heads"])
        if not self.own_head_size and head_size(config) != plain:
            found.append(f"head_dim: {head_size(config)}")
        return found

    def remarks(self, config: Config) -> list[str]:
        """See :class:`Architecture`."""
        notes = []
        if self.context(config) < int(config["max_position_embeddings"]):
            notes.append(
                f"llama.cpp has no sliding window for {self.name}: the file says a context of "
                f"{self.context(config)} tokens, within which there is none"
            )
        if rope_of(config).get("rope_type") == "longrope":
            original = rope_of(config)["original_max_position_embeddings"]
            notes.append(
                "llama.cpp takes the long rotary factors for every text once it is opened with a "
                f"context above {original} tokens; transformers takes them for longer texts only"
            )
        return notes

    def written(self, module: str, config: Config) -> str | None:
        """See :class:`Architecture`."""
        if module.endswith("rotary_emb.inv_freq"):
            return ""  # computed from the settings
        name = super().written(module, config)
        return "" if name == "output.weight" and config.get("tie_word_embeddings") else name

    def computed(self, config: Config) -> list[Mapped]:
        """See :class:`Architecture`."""
        return rope_tensors(config)


class Llama(Decoder):
    """Llama and Mistral: the rows of q and k are reordered for llama.cpp's rotary embedding."""

    name = "llama"
    interleaved = True
    rope_kinds = ("linear", "llama3", "yarn", "longrope")

    def tensor(self, source: RowSource, name: str, written: str, config: Config) -> Mapped:
        """See :class:`Architecture`."""
        heads = self.reordered_heads(written, config)
        if not heads:
            return super().tensor(source, name, written, config)
        return Mapped(written, source.shape(name), reordered(source, name, heads), name)

    def reordered_heads(self, written: str, config: Config) -> int:
        """Into how many heads the rows of a tensor are to be reordered; 0: not at all."""
        if ".attn_q." in written:
            return int(config["num_attention_heads"])
        return kv_heads(config) if ".attn_k." in written else 0


class Qwen2(Decoder):
    """Qwen 2 and 2.5: biases on q, k and v."""

    name = "qwen2"
    own_head_size = False


class Qwen3(Decoder):
    """Qwen 3: norms on q and k. Biases on the projections are not read."""

    name = "qwen3"

    def problems(self, config: Config) -> list[str]:
        """See :class:`Architecture`."""
        return [*super().problems(config), *unlike(config, attention_bias=False)]


class Phi3(Decoder):
    """Phi-3 and Phi-4-mini: q, k, v in one matrix, gate and up in another, as they are stored."""

    name = "phi3"
    rope_kinds = ("longrope",)
    partial_rotary = True
    own_head_size = False

    def problems(self, config: Config) -> list[str]:
        """See :class:`Architecture`."""
        odd = [f"partial_rotary_factor: {rope_of(config)['partial_rotary_factor']}"
               ] if rotated(config) % 2 else []  # fmt: skip
        return [*super().problems(config), *odd]
