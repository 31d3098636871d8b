"""Gemma 2 and the text model of Gemma 3, as llama.cpp runs them."""

from __future__ import annotations

from qft.gguf.contract import Config, Mapped, unlike
from qft.gguf.decoders import Decoder
from qft.gguf.file import Value
from qft.gguf.rotary import head_size, rope_of
from qft.gguf.turned import plus_one
from qft.merging.tensors import RowSource

_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


class Gemma2(Decoder):
    """Gemma 2: norms of 1 + weight, capped logits, every other layer with a sliding window.

    llama.cpp scales queries by the head size, or by hidden size / heads in the one size of the
    family that was made so, which it knows by its number of layers.
    """

    name = "gemma2"
    rope_kinds = ("linear",)
    activations = ("gelu_pytorch_tanh", "gelu_new")
    largest = 46  # layers of the 27B
    pattern = 2

    def settings(self, config: Config) -> dict[str, Value]:
        """See :class:`Architecture`."""
        values = {**super().settings(config),
                  "attention.sliding_window": int(config["sliding_window"])}  # fmt: skip
        for key in _CAPS:
            if config.get(key) is not None:
                values[key] = float(config[key])
        slides = [kind == "sliding_attention" for kind in config["layer_types"]]
        if slides != [bool((layer + 1) % self.pattern) for layer in range(self.layers(config))]:
            values["attention.sliding_window_pattern"] = slides
        return values

    def context(self, config: Config) -> int:
        """See :class:`Decoder`; these windows llama.cpp runs."""
        return int(config["max_position_embeddings"])

    def problems(self, config: Config) -> list[str]:
        """See :class:`Architecture`."""
        plain = int(config["hidden_size"]) // int(config["num_attention_heads"])
        scale = plain if self.layers(config) == self.largest else head_size(config)
        found = super().problems(config)
        found += unlike(config, query_pre_attn_scalar=scale, attention_bias=False)
        if config.get("use_bidirectional_attention"):
            found.append(f"use_bidirectional_attention: {config['use_bidirectional_attention']}")
        return [*found, *self._unread(config)]

    def _unread(self, config: Config) -> list[str]:
        """What llama.cpp takes as given: both caps, and one matrix for both embeddings."""
        caps = [f"{key}: None" for key in _CAPS if config.get(key) is None]
        return [*caps, *unlike(config, tie_word_embeddings=True)]

    def tensor(self, source: RowSource, name: str, written: str, config: Config) -> Mapped:
        """See :class:`Architecture`."""
        if not written.endswith("norm.weight"):
            return super().tensor(source, name, written, config)
        return Mapped(written, source.shape(name), plus_one(source, name), name)


class Gemma3(Gemma2):
    """Gemma 3: norms on q and k; most layers have a window and a rotary base of their own."""

    name = "gemma3"
    largest = 62
    pattern = 6

    def settings(self, config: Config) -> dict[str, Value]:
        """See :class:`Architecture`."""
        local = rope_of(config, "sliding_attention")
        return {**super().settings(config), "rope.freq_base_swa": float(local["rope_theta"])}

    def _unread(self, config: Config) -> list[str]:
        local = rope_of(config, "sliding_attention").get("rope_type", "default")
        scaled = [] if local == "default" else [f"rope_type of the sliding layers: {local}"]
        return [*scaled, *unlike(config, attn_logit_softcapping=None)]
