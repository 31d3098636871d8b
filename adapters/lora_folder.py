"""What the config of a LoRA folder says: what can be merged, and what qft has a setting for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.lora_start import CHANGES_BASE
from adapters.peft_backed import HEAD_TASK_TYPES, WEIGHTS_FILE, stored_tensors
from qft.errors import AdapterError

# What a PEFT LoRA folder may say that `LoRA` has no setting for, and that its tensors express.
_UNKNOWN = (
    "lora_bias", "target_parameters", "exclude_modules", "velora_config", "ensure_weight_tying",
)  # fmt: skip
# What depends on the input, on other layers or on what is not saved: no tensor of the base says it.
_BEYOND_A_MERGE = (
    "layer_replication", "use_qalora", "alora_invocation_tokens", "megatron_config", "arrow_config",
    "use_bdlora", "kasa_config", "monteclora_config",
)  # fmt: skip
# Starts that leave the base as it is, and those that can be made again from it.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", *CHANGES_BASE)


def refuse_unmergeable(values: Mapping[str, Any], folder: Path) -> None:
    """Refuses a folder whose tensors do not say what its model computes.

    Raises:
        AdapterError: with what would work.
    """
    start = values.get("init_lora_weights")
    if start == "loftq":
        raise AdapterError(
            "PEFT does not save what LoftQ began with, and without it the adapter fits no base "
            "but the one that was quantized in memory.",
            where=folder,
            found="init_lora_weights='loftq'",
            fix="train it with qft: {name: lora, initialisation: loftq}",
        )
    if start not in _STARTS:
        raise AdapterError(
            "This LoRA began by changing its base in a way that cannot be made again, and belongs "
            "to that changed base.",
            where=folder,
            found=f"init_lora_weights={start!r}",
            fix="save it again with PEFT's path_initial_model_for_weight_conversion, which makes "
            "it fit the original base",
        )
    beyond = [key for key in _BEYOND_A_MERGE if values.get(key)]
    parameters = values.get("target_parameters") or ()
    if any(not str(name).endswith(".weight") for name in parameters):
        beyond.append("target_parameters")
    if values.get("lora_bias") and values.get("use_dora"):
        beyond.append("lora_bias with use_dora")
    if beyond:
        raise AdapterError(
            "This LoRA folder uses what cannot be folded into the base's own tensors.",
            where=folder,
            found=", ".join(f"{key}={values.get(key, True)!r}" for key in beyond),
            fix="use base and adapter unmerged, with PEFT itself",
        )


def says_more(values: Mapping[str, Any], folder: Path) -> bool:
    """Whether a folder says what `adapters.lora.LoRA` has no setting for."""
    heads = values.get("task_type") in HEAD_TASK_TYPES
    return (
        any(values.get(key) for key in _UNKNOWN)
        or values.get("init_lora_weights") in CHANGES_BASE
        or bool(values.get("modules_to_save") and not heads)
        or isinstance(values.get("trainable_token_indices"), dict)
        or _holds_embeddings(folder)
    )


def _holds_embeddings(folder: Path) -> bool:
    """Whether PEFT has saved the base's embeddings beside an update of them."""
    if not (folder / WEIGHTS_FILE).is_file():
        return False
    return any(name.endswith(".base_layer.weight") for name in stored_tensors(folder))


def plain_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Of those that decide a merge: what `LoRA` has a word for."""
    return {
        "rank": values["r"],
        "alpha": values["lora_alpha"],
        "rank_stabilised": values.get("use_rslora", False),
        "dora": values.get("use_dora", False),
        "bias": values.get("bias", "none"),
    }
