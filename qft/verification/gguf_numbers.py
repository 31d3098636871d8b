"""A GGUF file's numbers that change every answer, beside the reference's config."""

from __future__ import annotations

import math
from typing import Any

from qft.verification.diagnosis import Finding
from qft.verification.subject import Subject

_CLOSE = 1e-5  # relative; the file holds float32


def check_settings(reference: Subject, artefact: Subject) -> list[Finding]:
    """The base of the rotary angles and the norms' epsilon, where both sides say them."""
    config = reference.config()
    config = config.get("text_config") or config
    architecture = _value(artefact, "general.architecture")
    pairs = {
        "rope.freq_base": _rotary_base(config),
        "attention.layer_norm_rms_epsilon": config.get("rms_norm_eps"),
        "attention.layer_norm_epsilon": config.get("layer_norm_eps"),
    }
    findings = []
    for key, wished in pairs.items():
        found = _value(artefact, f"{architecture}.{key}")
        if wished is None or found is None or math.isclose(found, wished, rel_tol=_CLOSE):
            continue
        findings.append(Finding(
            "settings", f"the GGUF file says {architecture}.{key} {found:g}, the reference's "
            f"config {wished:g}", "export the GGUF file again from the reference",
        ))  # fmt: skip
    return findings


def _rotary_base(config: dict[str, Any]) -> float | None:
    parameters = config.get("rope_parameters") or {}
    parameters = parameters.get("full_attention") or parameters
    base = parameters.get("rope_theta", config.get("rope_theta"))
    return None if base is None else float(base)


def _value(artefact: Subject, key: str) -> Any:
    field = artefact.reader.fields.get(key)
    return None if field is None else field.contents()
