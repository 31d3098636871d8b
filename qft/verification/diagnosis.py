"""What is wrong with an artefact, and what to do instead, by the kind of failure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HEAD = "head"
EMBEDDINGS = "embeddings"
VECTORS = "last_hidden_state"  # of an encoder that no layer of can be listened to

_FEWER_BITS = {
    "bnb:nf4": "export to bnb:int8 or gguf:q8_0, which round less",
    "bnb:int8": "export to gguf:q8_0 or safetensors:bf16, which round less",
    "gguf:q8_0": "export to gguf:f16, which rounds less",
    "gguf:f16": "export to gguf:bf16 or gguf:f32",
    "onnx:int8": "export to onnx:fp32, which rounds nothing",
}
_FROM_THE_START = (
    "it diverges from the first layer on, as after an adapter that was merged twice, with another "
    "scale (alpha), or into another base: merge it once, into the base it was trained on (--base)"
)
_TRAINED_QUANTIZED = (
    "the adapter was trained on a quantized base: merge it into that base (--base dequantized)"
)
_BAD_SCALES = "; or its quantized scales lie in another order: export it again with qft export"
_IN_GGUF = (
    "; or the file's q and k rows, its rotary settings or the scales of its blocks are not as "
    "llama.cpp reads them: export it again with qft export"
)


@dataclass(frozen=True)
class Finding:
    """Something beside the figures that is wrong.

    Attributes:
        kind: ``missing``, ``tensors``, ``settings``, ``tokens``, ``template`` or ``stops``.
        text: what differs.
        fix: what would work.
    """

    kind: str
    text: str
    fix: str


def advice(
    format: str,
    past_figures: bool,
    place: str | None,
    places: Sequence[str],
    findings: Sequence[Finding],
    quantized: bool = False,
) -> str:
    """What to do instead of using the artefact.

    Args:
        format: what was verified.
        past_figures: whether the models' answers are too far apart.
        place: where they first diverge; None where no layer does by itself.
        places: all there are, from the embeddings up.
        findings: what else is wrong; their fixes come first, since they may be the cause.
        quantized: whether the reference's base is held quantized.
    """
    parts = [finding.fix for finding in findings]
    if past_figures:
        if quantized and not format.startswith("bnb:"):
            parts.append(_TRAINED_QUANTIZED)
        parts.append(_by_place(format, place, places))
    return "; ".join(dict.fromkeys(parts))


def _by_place(format: str, place: str | None, places: Sequence[str]) -> str:
    again = "export again from the original base and adapter"
    if place == HEAD:
        return (
            "all layers agree, so the head is another: check lm_head.weight (or the task's head) "
            f"and tie_word_embeddings in config.json, and {again}"
        )
    if place == EMBEDDINGS:
        return f"the embeddings are other ones: check the vocabulary and the base, and {again}"
    if place == VECTORS:
        return _FEWER_BITS.get(format, again)
    if place is not None and place in places[:2]:
        family = format.partition(":")[0]
        return _FROM_THE_START + {"bnb": _BAD_SCALES, "gguf": _IN_GGUF}.get(family, "")
    if place is not None:
        rounded = format.startswith(("bnb:", "gguf:q"))
        scales = ", and of a quantized layer its scales" if rounded else ""
        return f"what lies below {place} is right: look at its tensors{scales}, and {again}"
    return _FEWER_BITS.get(format, f"{again}, and once only; if it persists, choose a format with "
                                   "more bits")  # fmt: skip
