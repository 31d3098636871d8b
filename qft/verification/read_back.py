"""Opens an artefact with a reader that is not its writer's, so that no mistake undoes itself.

transformers' own loading for model folders, its GGUF loader for the tensors of GGUF files,
onnxruntime for ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qft import models
from qft.errors import ModelError, first_line
from qft.onnx_files import onnx_file
from qft.verification.gguf_config import OpenedGGUF, config_of
from qft.verification.gguf_encoder import read_encoder
from qft.verification.onnx_model import open_onnx

_FIRST_BYTES = 4096  # of a file; its kind is told there


def read_back(
    path: Path | str, *, dtype: torch.dtype | None = None, task: str | None = None
) -> nn.Module:
    """Opens an exported model with a reader that is not qft's own writer's, in eval mode.

    Args:
        path: a ``.gguf`` or ``.onnx`` file, a folder that holds one, or a model folder.
        dtype: of the arithmetic; None is float32 for GGUF and what config.json says otherwise. An
            ONNX file says it itself.
        task: where the model does not say it.

    Raises:
        ModelError: it cannot be opened.
    """
    path = Path(path)
    file = gguf_file(path)
    if file is not None:
        return _read_gguf(file, dtype or torch.float32)
    graph = onnx_file(path)
    if graph is not None:
        return open_onnx(graph, task)
    config = models.read_config(path)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    chosen = dtype or getattr(torch, stored, torch.float32)
    spec = models.ModelSpec(source=str(path), task=task or models.task_to_run(config), dtype=chosen)
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


def is_adapter_file(file: Path) -> bool:
    """Whether a GGUF file holds an adapter alone: it says so in its first settings."""
    with file.open("rb") as stream:
        return b"adapter.type" in stream.read(_FIRST_BYTES)


def _read_gguf(file: Path, dtype: torch.dtype) -> nn.Module:
    """Through transformers' GGUF loader, an encoder through a reader of its own.

    Settings are part of what is verified, and that loader leaves many out: they are those that
    llama.cpp takes from the file.
    """
    from transformers import AutoModelForCausalLM

    opened = OpenedGGUF(file)
    model: nn.Module
    try:
        if opened.architecture == "bert":
            model = read_encoder(opened, dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                file.parent, gguf_file=file.name, dtype=dtype, config=config_of(opened)
            )
    except ModelError:
        raise
    except Exception as error:  # broken files make that loader raise anything
        raise ModelError(
            "The GGUF file cannot be opened by transformers.",
            where=file,
            found=f"{type(error).__name__}: {first_line(error)}",
            fix="run it with llama.cpp",
        ) from error
    return model.eval().requires_grad_(False)


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
        opened: the file.
        skeleton: the model that transformers makes of the file, on the meta device.
        tied: as above.

    Raises:
        ModelError: transformers puts several tensors of this architecture into one.
    """

    def __init__(self, opened: OpenedGGUF, skeleton: nn.Module, tied: Mapping[str, str]) -> None:
        from transformers import modeling_gguf_pytorch_utils as reader

        described: Any = skeleton.config
        kind = reader.TENSOR_PROCESSORS.get(opened.architecture, reader.TensorProcessor)
        if any("expert" in name or "_exps" in name for name in opened.tensors):
            raise ModelError("A mixture's GGUF file cannot be read layer by layer.",
                             where=opened.file)  # fmt: skip
        self._processor: Any = kind(config=described.to_dict())  # type: ignore[no-untyped-call]
        self._mapping = reader.get_gguf_hf_weights_map(skeleton, self._processor)
        self._stored = {
            self._mapping[name]: tensor
            for name, tensor in opened.tensors.items() if name in self._mapping
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
