"""A GGUF file's settings as llama.cpp takes them, defaults included, as a transformers config.

Nothing but the file is asked. It is written from llama.cpp's side, apart from the writer: where
the file leaves a setting out, the config says what llama.cpp then does, so that a setting that was
lost makes the two models differ. Facts of llama.cpp's ``src/llama-model.cpp`` and ``src/models``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf

from qft.errors import ModelError
from qft.gguf.checked import check_file

RANK = 4  # llama.cpp's pooling type of a classifier
_POOLING = {0: "none", 1: "mean", 2: "cls", 3: "last", RANK: "rank"}
_LARGEST_GEMMA = {
    "gemma2": 46,
    "gemma3": 62,
}  # layers of the size whose queries it scales otherwise
_SPECIAL = {"bos": "bos", "eos": "eos", "padding": "pad"}


class OpenedGGUF:
    """A GGUF file's keys and tensors, read by the ``gguf`` package.

    Raises:
        ModelError: it is no GGUF file, or a broken one.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        check_file(file)
        try:
            self._reader = gguf.GGUFReader(file)
        except Exception as error:  # broken files make it raise anything
            raise ModelError("This is no GGUF file, or a broken one.", where=file,
                             found=f"{type(error).__name__}: {error}"[:200]) from error  # fmt: skip
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = str(self.general("architecture", ""))

    def key(self, name: str, default: Any = None) -> Any:
        """Any key's value."""
        field = self._reader.fields.get(name)
        return default if field is None else field.contents()

    def general(self, key: str, default: Any = None) -> Any:
        """A key that begins with ``general.``."""
        return self.key(f"general.{key}", default)

    def tokenizer(self, key: str, default: Any = None) -> Any:
        """A key that begins with ``tokenizer.ggml.``."""
        return self.key(f"tokenizer.ggml.{key}", default)

    def own(self, key: str, default: Any = None) -> Any:
        """A key of its architecture."""
        return self.key(f"{self.architecture}.{key}", default)

    def need(self, key: str) -> Any:
        """A key of its architecture that llama.cpp cannot do without."""
        value = self.own(key)
        if value is None:
            raise ModelError("llama.cpp cannot open this file: a key is missing.", where=self.file,
                             found=f"no {self.architecture}.{key}")  # fmt: skip
        return value

    def values(self, name: str) -> list[float]:
        """A small tensor's numbers."""
        tensor = self.tensors[name]
        return [float(value) for value in gguf.dequantize(tensor.data, tensor.tensor_type).flat]

    def vocabulary(self) -> int:
        """Rows of the embedding, as many as there are tokens.

        Raises:
            ModelError: they are not; llama.cpp opens no such file.
        """
        rows = int(self.tensors["token_embd.weight"].shape[1])
        tokens = len(self.tokenizer("tokens", ()))
        if rows != tokens:
            raise ModelError("llama.cpp cannot open this file: its embedding is not its tokens'.",
                             where=self.file, found=f"{rows} rows, {tokens} tokens")  # fmt: skip
        return rows


def config_of(opened: OpenedGGUF) -> Any:
    """The transformers config of what llama.cpp runs when it opens the file.

    Raises:
        ModelError: the architecture is none of those qft reads, or the file is broken.
    """
    from transformers import CONFIG_MAPPING

    if opened.architecture not in _READERS:
        raise ModelError("qft cannot read back a GGUF file of this architecture.",
                         where=opened.file, found=opened.architecture or "none",
                         fix="run it with llama.cpp")  # fmt: skip
    kind, read = _READERS[opened.architecture]
    ids = {f"{ours}_token_id": opened.tokenizer(f"{theirs}_token_id")
           for theirs, ours in _SPECIAL.items()}  # fmt: skip
    described: Any = CONFIG_MAPPING[kind]
    return described(
        **read(opened), **ids, vocab_size=opened.vocabulary(), name_or_path=str(opened.file),
        tie_word_embeddings="output.weight" not in opened.tensors,
    )  # fmt: skip


def _decoder(opened: OpenedGGUF) -> dict[str, Any]:
    heads = int(opened.need("attention.head_count"))
    width = int(opened.need("embedding_length"))
    return {
        "max_position_embeddings": int(opened.need("context_length")),
        "num_hidden_layers": int(opened.need("block_count")),
        "hidden_size": width,
        "intermediate_size": int(opened.need("feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(opened.own("attention.head_count_kv", heads)),
        "head_dim": int(opened.own("attention.key_length", width // heads)),
        "rms_norm_eps": float(opened.need("attention.layer_norm_rms_epsilon")),
        "rope_parameters": _rope(opened),
    }


def _rope(opened: OpenedGGUF) -> dict[str, Any]:
    """Rotary settings; divisors that are the same for every length stand for themselves."""
    values: dict[str, Any] = {"rope_theta": float(opened.own("rope.freq_base", 10000.0))}
    kind = opened.own("rope.scaling.type", "linear")
    factor = float(opened.own("rope.scaling.factor", 0.0)) or 1.0
    scale = float(opened.own("rope.scaling.attn_factor", 1.0))
    context = int(opened.need("context_length"))
    original = int(opened.own("rope.scaling.original_context_length", context))
    if "rope_freqs.weight" in opened.tensors and kind != "longrope":
        same = opened.values("rope_freqs.weight")
        if factor != 1.0:
            raise ModelError("qft cannot read back a file that scales its rotary embedding twice.",
                             where=opened.file)  # fmt: skip
        return values | {"rope_type": "longrope", "short_factor": same, "long_factor": same,
                         "attention_factor": scale,
                         "original_max_position_embeddings": original}  # fmt: skip
    if kind == "longrope":
        return values | {
            "rope_type": "longrope", "attention_factor": scale,
            "original_max_position_embeddings": original,
            **{f"{length}_factor": opened.values(f"rope_factors_{length}.weight")
               for length in ("short", "long")},
        }  # fmt: skip
    if kind == "yarn" and factor != 1.0:
        return values | {"rope_type": "yarn", "factor": factor,
                         "original_max_position_embeddings": original,
                         "attention_factor": scale * (1 + 0.1 * math.log(factor))}  # fmt: skip
    if kind == "linear" and factor != 1.0:
        return values | {"rope_type": "linear", "factor": factor}
    return values | {"rope_type": "default"}


def _llama(opened: OpenedGGUF) -> dict[str, Any]:
    return _decoder(opened) | {
        "attention_bias": "blk.0.attn_q.bias" in opened.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in opened.tensors,
    }


def _phi3(opened: OpenedGGUF) -> dict[str, Any]:
    values = _decoder(opened)
    part = int(opened.own("rope.dimension_count", values["head_dim"])) / values["head_dim"]
    rope = {**values["rope_parameters"], "partial_rotary_factor": part}
    original = rope.get("original_max_position_embeddings", values["max_position_embeddings"])
    return {**values, "rope_parameters": rope, "sliding_window": None,
            "original_max_position_embeddings": original}  # fmt: skip


def _gemma2(opened: OpenedGGUF) -> dict[str, Any]:
    return _gemma(opened, window=4096, period=2) | {
        "attn_logit_softcapping": float(opened.own("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": float(opened.own("final_logit_softcapping", 30.0)),
    }


def _gemma3(opened: OpenedGGUF) -> dict[str, Any]:
    values = _gemma(opened, window=0, period=6)
    local = {"rope_type": "default", "rope_theta": float(opened.own("rope.freq_base_swa", 10000.0))}
    cap = opened.own("final_logit_softcapping")
    return {**values, "final_logit_softcapping": float(cap) if cap else None,
            "rope_parameters": {"full_attention": values["rope_parameters"],
                                "sliding_attention": local}}  # fmt: skip


def _gemma(opened: OpenedGGUF, window: int, period: int) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common; ``window`` and ``period`` where the file says none."""
    values = _decoder(opened)
    layers = values["num_hidden_layers"]
    window = int(opened.own("attention.sliding_window", window))
    slides = opened.own("attention.sliding_window_pattern", period)
    if isinstance(slides, int):
        slides = [layer % slides < slides - 1 for layer in range(layers)]
    kinds = ["sliding_attention" if each and window else "full_attention" for each in slides]
    largest = layers == _LARGEST_GEMMA[opened.architecture]
    by_heads = values["hidden_size"] // values["num_attention_heads"]
    return {**values, "layer_types": kinds,
            "sliding_window": window or values["max_position_embeddings"],
            "query_pre_attn_scalar": by_heads if largest else values["head_dim"]}  # fmt: skip


def _gpt2(opened: OpenedGGUF) -> dict[str, Any]:
    return {
        "n_positions": int(opened.need("context_length")),
        "n_embd": int(opened.need("embedding_length")),
        "n_layer": int(opened.need("block_count")),
        "n_head": int(opened.need("attention.head_count")),
        "n_inner": int(opened.need("feed_forward_length")),
        "layer_norm_epsilon": float(opened.need("attention.layer_norm_epsilon")),
    }


def _bert(opened: OpenedGGUF) -> dict[str, Any]:
    values: dict[str, Any] = {
        "max_position_embeddings": int(opened.need("context_length")),
        "num_hidden_layers": int(opened.need("block_count")),
        "hidden_size": int(opened.need("embedding_length")),
        "intermediate_size": int(opened.need("feed_forward_length")),
        "num_attention_heads": int(opened.need("attention.head_count")),
        "layer_norm_eps": float(opened.need("attention.layer_norm_epsilon")),
        "type_vocab_size": int(opened.tensors["token_types.weight"].shape[1]),
    }
    if opened.own("attention.causal", True):
        raise ModelError("llama.cpp would run this encoder as a decoder.", where=opened.file,
                         found="no bert.attention.causal: false")  # fmt: skip
    if not opened.tokenizer("token_type_count", 0):
        raise ModelError("llama.cpp cannot open this file: a key is missing.", where=opened.file,
                         found="no tokenizer.ggml.token_type_count")  # fmt: skip
    if pooling_of(opened) == "rank":
        values["id2label"] = dict(enumerate(_labels(opened)))
    return values


def _labels(opened: OpenedGGUF) -> list[str]:
    return list(opened.own("classifier.output_labels", ["LABEL_0"]))


def encoder_facts(opened: OpenedGGUF) -> dict[str, Any]:
    """What a config.json would say of what an encoder's file is for."""
    if pooling_of(opened) != "rank":
        return {"model_type": "bert", "architectures": ["BertModel"]}
    names = {str(number): name for number, name in enumerate(_labels(opened))}
    return {"model_type": "bert", "architectures": ["BertForSequenceClassification"],
            "id2label": names}  # fmt: skip


def pooling_of(opened: OpenedGGUF) -> str:
    """What becomes of a text's hidden states: ``none``, ``mean``, ``cls``, ``last``, ``rank``."""
    return _POOLING.get(int(opened.own("pooling_type", 0)), "unknown")


_READERS: Mapping[str, tuple[str, Callable[[OpenedGGUF], dict[str, Any]]]] = {
    "llama": ("llama", _llama),
    "qwen2": ("qwen2", _decoder),
    "qwen3": ("qwen3", _decoder),
    "gemma2": ("gemma2", _gemma2),
    "gemma3": ("gemma3_text", _gemma3),
    "phi3": ("phi3", _phi3),
    "gpt2": ("gpt2", _gpt2),
    "bert": ("bert", _bert),
}
