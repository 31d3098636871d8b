"""Opens an artefact with a reader that is not its writer's, so that no mistake undoes itself.

transformers' own loading for model folders, its GGUF loader for GGUF files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qft import models
from qft.errors import ModelError, first_line


def read_back(
    path: Path | str, *, dtype: torch.dtype | None = None, task: str | None = None
) -> nn.Module:
    """Opens an exported model with a reader that is not qft's own writer's, in eval mode.

    Args:
        path: a ``.gguf`` file, a folder that holds one, or a model folder.
        dtype: of the arithmetic; None is float32 for GGUF and what config.json says otherwise.
        task: where the model does not say it.

    Raises:
        ModelError: it cannot be opened.
    """
    path = Path(path)
    file = gguf_file(path)
    if file is not None:
        return _read_gguf(file, dtype or torch.float32)
    config = models.read_config(path)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    chosen = dtype or getattr(torch, stored, torch.float32)
    spec = models.ModelSpec(source=str(path), task=task or models.task_of(config), dtype=chosen)
    return models.open_model(path, spec)


def gguf_file(path: Path) -> Path | None:
    """The GGUF file a path names or, as a folder without other weights, holds; or None."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    return files[0] if files and not any(path.glob("*.safetensors")) else None


def _read_gguf(file: Path, dtype: torch.dtype) -> nn.Module:
    """Through transformers' GGUF loader, settings included: they are part of what is verified.

    Where the file says what that loader does not read (a rotary scaling, biases), the settings come
    from the config.json beside it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {}
    if _needs_config(file.parent):
        options["config"] = AutoConfig.from_pretrained(file.parent)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype, **options
        )
    except Exception as error:  # broken files make that loader raise anything
        raise ModelError(
            "The GGUF file cannot be opened by transformers.",
            where=file,
            found=f"{type(error).__name__}: {first_line(error)}",
            fix="run it with llama.cpp",
        ) from error
    return model.eval().requires_grad_(False)


def _needs_config(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    values = models.read_config(folder)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    return bool(scaled or values.get("attention_bias") or values.get("mlp_bias"))
