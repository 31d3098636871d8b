"""BERT, as llama.cpp runs it: an encoder for embeddings, or one with a classifier on top."""

from __future__ import annotations

from qft.gguf.contract import Architecture, Config, unlike, whole_config
from qft.gguf.file import Value
from qft.pooling import CONFIG_KEY

_POOLING = {"mean": 1, "cls": 2, "last": 3}
_RANK = 4  # llama.cpp's numbers for what becomes of a text's hidden states
_UNUSED = ("pooler.", "cls.predictions.", "cls.seq_relationship.")
_POOLER = {
    "pooler.dense.weight": "cls.weight",
    "pooler.dense.bias": "cls.bias",
}
_CLASSIFIER = {
    "classifier.weight": "cls.output.weight",
    "classifier.bias": "cls.output.bias",
}


class Bert(Architecture):
    """The encoder; what a language model's head or a pooler adds is left out."""

    name = "bert"

    def pooling(self, config: Config) -> int:
        """What becomes of a text's hidden states; the mean where nothing says otherwise."""
        return _POOLING.get(_pooled_by(config), _POOLING["mean"])

    def settings(self, config: Config) -> dict[str, Value]:
        """See :class:`Architecture`."""
        return {
            "block_count": self.layers(config),
            "context_length": int(config["max_position_embeddings"]),
            "embedding_length": int(config["hidden_size"]),
            "feed_forward_length": int(config["intermediate_size"]),
            "attention.head_count": int(config["num_attention_heads"]),
            "attention.layer_norm_epsilon": float(config["layer_norm_eps"]),
            "attention.causal": False,
            "pooling_type": self.pooling(config),
            "vocab_size": int(config["vocab_size"]),
        }

    def problems(self, config: Config) -> list[str]:
        """See :class:`Architecture`."""
        act = config["hidden_act"]
        found = [] if act in ("gelu", "gelu_new", "gelu_pytorch_tanh") else [f"hidden_act: {act}"]
        found += unlike(config, is_decoder=False, add_cross_attention=False)
        kind = config.get("position_embedding_type", "absolute")
        return found if kind == "absolute" else [*found, f"position_embedding_type: {kind}"]

    def remarks(self, config: Config) -> list[str]:
        """See :class:`Architecture`."""
        kinds = {number: name for name, number in _POOLING.items()}
        return [
            f"the file is an encoder for embeddings (pooling: {kinds[self.pooling(config)]}); a "
            "language model's head and the pooler are left out"
        ]

    def metadata(self, config: Config) -> dict[str, Value]:
        """See :class:`Architecture`; llama.cpp opens no encoder that does not count its types."""
        types = int(whole_config(config)["type_vocab_size"])
        return {**super().metadata(config), "tokenizer.ggml.token_type_count": types}

    def written(self, module: str, config: Config) -> str | None:
        """See :class:`Architecture`."""
        own = module.removeprefix("bert.")
        if own.startswith(_UNUSED) or own.endswith(".position_ids"):
            return ""
        return super().written(own, config)


class BertClassifier(Bert):
    """With the head of a sequence classification, which llama.cpp runs as a reranker's.

    BERT's own head is pooler, tanh and classifier; one that pools by itself (:mod:`qft.pooling`)
    is the classifier alone.
    """

    def pooling(self, config: Config) -> int:
        """See :class:`Bert`."""
        return _RANK

    def settings(self, config: Config) -> dict[str, Value]:
        """See :class:`Architecture`."""
        names = config["id2label"]
        values = super().settings(config)
        values["classifier.output_labels"] = [str(names[key]) for key in sorted(names, key=int)]
        if _pooled_by(config) == "mean":
            values["classifier.pooling_type"] = _POOLING["mean"]
        return values

    def problems(self, config: Config) -> list[str]:
        """See :class:`Architecture`."""
        kind = _pooled_by(config)
        other = [] if kind in ("model", "cls", "mean") else [f"{CONFIG_KEY}: {kind}"]
        return [*super().problems(config), *other]

    def remarks(self, config: Config) -> list[str]:
        """See :class:`Architecture`."""
        return [
            "the file is a classifier, which llama.cpp runs as a reranker: its answers are the "
            "embeddings of pooling type rank"
        ]

    def written(self, module: str, config: Config) -> str | None:
        """See :class:`Architecture`."""
        if module in _CLASSIFIER:
            return _CLASSIFIER[module]
        own = module.removeprefix("bert.")
        if own in _POOLER and _pooled_by(config) == "model":
            return _POOLER[own]
        return super().written(module, config)


def _pooled_by(config: Config) -> str:
    return str(config.get(CONFIG_KEY) or "model")
