"""Opens an artefact with a reader that is not its writer's, so that no mistake undoes itself.

transformers' own loading for model folders, its GGUF loader for GGUF files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    """The GGUF file a path names or, as a folder without other weights, holds; or None.

    Raises:
        ModelError: there is no such file, or the folder holds several.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        if path.is_file():
            return path
        raise ModelError("There is no such GGUF file.", where=path, found=_beside(path))
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not files or any(path.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise ModelError("The folder holds several GGUF files.", where=path,
                         found=", ".join(file.name for file in files[:8]),
                         fix=f"name one of them: {files[0]}")  # fmt: skip
    return files[0]


def _beside(path: Path) -> str:
    """What lies where a file was looked for."""
    if not path.parent.is_dir():
        return "its folder does not exist"
    return ", ".join(sorted(p.name for p in path.parent.iterdir())[:8]) or "an empty folder"


def _read_gguf(file: Path, dtype: torch.dtype) -> nn.Module:
    """Through transformers' GGUF loader, settings included: they are part of what is verified.

    Where the file says what that loader does not read (a rotary scaling, biases), the settings come
    from the config.json beside it.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if _needs_config(file.parent):
        options["config"] = gguf_config(file)
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


def gguf_config(file: Path) -> Any:
    """The settings transformers opens a GGUF file with."""
    from transformers import AutoConfig

    if _needs_config(file.parent):
        return AutoConfig.from_pretrained(file.parent)
    return AutoConfig.from_pretrained(file.parent, gguf_file=file.name)


def _needs_config(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    values = models.read_config(folder)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    return bool(scaled or values.get("attention_bias") or values.get("mlp_bias"))


class SafetensorsFolder:
    """A model folder's tensors under module names, read by safetensors itself.

    Args:
        names: name in the files → module name.
        tied: module name that is not stored → the one whose tensor it shares.
    """

    def __init__(self, folder: Path, names: Mapping[str, str], tied: Mapping[str, str]) -> None:
        from safetensors import safe_open

        self._slices: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            opened: Any = safe_open(file, framework="pt")
            for name in opened.keys():  # noqa: SIM118
                self._slices[names.get(name, name)] = opened.get_slice(name)
        for absent, present in tied.items():
            if present in self._slices:
                self._slices.setdefault(absent, self._slices[present])

    def names(self) -> list[str]:
        """Every tensor's name, tied ones included."""
        return list(self._slices)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        value: Tensor = self._slices[name][...]
        return value

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some of its rows."""
        return torch.cat([self._slices[name][row : row + 1] for row in rows])


class GGUFTensors:
    """A GGUF file's tensors under module names, each dequantized and turned as transformers does.

    Args:
        skeleton: the model that transformers makes of the file, on the meta device.
        tied: as above.

    Raises:
        ModelError: transformers puts several tensors of this architecture into one.
    """

    def __init__(self, file: Path, skeleton: nn.Module, tied: Mapping[str, str]) -> None:
        import gguf
        from transformers import modeling_gguf_pytorch_utils as reader

        described: Any = skeleton.config
        opened = gguf.GGUFReader(file)
        architecture = str(opened.fields["general.architecture"].contents())
        kind = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)
        if any("expert" in tensor.name or "_exps" in tensor.name for tensor in opened.tensors):
            raise ModelError("A mixture's GGUF file cannot be read layer by layer.", where=file)
        self._processor: Any = kind(config=described.to_dict())  # type: ignore[no-untyped-call]
        self._mapping = reader.get_gguf_hf_weights_map(skeleton, self._processor)
        self._stored = {
            self._mapping[tensor.name]: tensor
            for tensor in opened.tensors if tensor.name in self._mapping
        }  # fmt: skip
        for absent, present in tied.items():
            if present in self._stored:
                self._stored.setdefault(absent, self._stored[present])

    def names(self) -> list[str]:
        """Every tensor's name, tied ones included."""
        return list(self._stored)

    def read(self, name: str) -> Tensor:
        """One tensor, in float32."""
        import gguf

        tensor = self._stored[name]
        return self._turned(gguf.dequantize(tensor.data, tensor.tensor_type), tensor.name)

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of an embedding."""
        import gguf

        tensor = self._stored[name]
        return self._turned(gguf.dequantize(tensor.data[list(rows)], tensor.tensor_type),
                            tensor.name)  # fmt: skip

    def _turned(self, values: Any, name: str) -> Tensor:
        made = self._processor.process(
            weights=values, name=name, tensor_key_mapping=self._mapping,
            parsed_parameters={"tensors": {}},
        )  # fmt: skip
        return torch.from_numpy(made.weights.copy())
