"""What decides the numbers in a feature cache: the store of a data set is named by it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qft import hardware
from qft.data.examples import Example, fingerprint
from qft.data.tasks import pad_id
from qft.feature_store import FeatureStore, Rows
from qft.lean.feature_cache import Cut
from qft.lean.trunk import tensors_hash

_FORMAT = "1"


def identity_of(inner: Any, cut: Cut, tokenizer: Any, quantize: str) -> dict[str, str]:
    """Everything but the data, by name.

    The trunk's weights count with every byte, as they are held: whatever quantized, converted or
    initialised them is in it.

    Args:
        inner: the transformers model.
        quantize: as the recipe says.
    """
    config = {k: v for k, v in inner.config.to_dict().items() if k not in OF_NO_ACCOUNT}
    versions = hardware.versions()
    software = {name: versions.get(name) for name in ("torch", "transformers", "bitsandbytes")}
    return {
        "format": _FORMAT,
        "model": tensors_hash(cut.trunk),
        "config": value_hash([type(inner).__name__, config]),
        "attention": str(getattr(inner.config, "_attn_implementation", None)),
        "tokenizer": tokenizer_hash(tokenizer),
        "padding": str(pad_id(tokenizer)),
        "place": cut.name,
        "dtype": str(cut.dtype),
        "quantization": quantize,
        "device": next(inner.parameters()).device.type,
        "software": value_hash(software),
    }


OF_NO_ACCOUNT = ("_name_or_path", "transformers_version")


def store_of(
    root: Path, cut: Cut, identity: Mapping[str, str], examples: Sequence[Example]
) -> FeatureStore | None:
    """The store of these examples; None where two of them have the same number.

    What the model should answer is of no account: relabelled rows are the same rows.
    """
    ordered = stored_order(examples)
    samples = tuple(example.index for example in ordered)
    if len(set(samples)) < len(samples):
        return None
    lengths = tuple(1 if cut.pooled else len(e.inputs["input_ids"]) for e in ordered)
    digest = hashlib.sha256()
    for example in ordered:
        inputs = {name: value for name, value in example.inputs.items() if name != "labels"}
        digest.update(f"{example.index}:{fingerprint([Example(0, inputs)])}".encode())
    whole = {**identity, "data": digest.hexdigest()}
    return FeatureStore(root, whole, Rows(samples, lengths, cut.width, cut.dtype))


def stored_order(examples: Sequence[Example]) -> list[Example]:
    """Like lengths together, for little padding; the longest first, where memory would run out."""
    return sorted(examples, key=lambda e: (-len(e.inputs["input_ids"]), e.index))


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of what turns texts into tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    return value_hash([text, str(tokenizer.special_tokens_map)])


def value_hash(value: Any) -> str:
    """SHA-256 of plain values."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
