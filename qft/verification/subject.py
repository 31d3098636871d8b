"""One side of a verification: a run, an adapter, a checkpoint, a model folder, GGUF or ONNX."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qft import models
from qft.adapter_folder import AdapterFolder, adapter_in, locate_adapter, open_adapter_model
from qft.errors import ModelError, RecipeError
from qft.export.gguf_format import GGUF_TASK_KEY
from qft.gguf.checked import check_file
from qft.merging.side_files import side_files
from qft.onnx_files import onnx_file
from qft.verification.gguf_config import OpenedGGUF, encoder_facts
from qft.verification.read_back import gguf_file, is_adapter_file, read_back
from qft.verification.thresholds import stored_format

_DTYPES = {
    torch.float32: "safetensors:fp32",
    torch.float16: "safetensors:fp16",
    torch.bfloat16: "safetensors:bf16",
}


@dataclass(frozen=True)
class Subject:
    """What a user named, located; no model is open yet.

    Attributes:
        source: as it was named.
        folder: the model's; of an adapter its base's.
        spec: how to open it.
        adapter: where it is one.
        gguf: where it is a GGUF file.
        onnx: where it is an ONNX file.
    """

    source: str
    folder: Path
    spec: models.ModelSpec
    adapter: AdapterFolder | None = None
    gguf: Path | None = None
    onnx: Path | None = None

    @property
    def home(self) -> Path:
        """The folder its own files lie in."""
        return self.adapter.folder if self.adapter is not None else self.folder

    def open(self, dtype: torch.dtype) -> nn.Module:
        """The model, read from the disk by transformers or onnxruntime, in eval mode.

        Raises:
            QftError: it cannot be opened.
        """
        if self.adapter is not None:
            return open_adapter_model(self.adapter, self.adapter.spec(dtype=dtype))
        return read_back(self.gguf or self.onnx or self.folder, dtype=dtype, task=self.spec.task)

    def format(self) -> str:
        """How its weights are stored; of an adapter, how its base's are held."""
        if self.adapter is None:
            return stored_format(self.folder, self.gguf, self.onnx)
        held = self.held_as()
        if held != "none":
            return f"bnb:{held}"
        return _DTYPES.get(self.spec.dtype or torch.float32, stored_format(self.folder))

    def held_as(self) -> str:
        """How the weights are quantized in memory: ``none``, ``int8``, ``nf4``, ….

        Of a stored model ``none``: what its rounding may cost is its own format's threshold.
        """
        if self.adapter is None:
            return "none"
        return models.held_as(models.read_config(self.folder), self.spec.quantize)

    def config(self) -> dict[str, Any]:
        """Its config.json; empty beside a GGUF file that has none."""
        if (self.folder / "config.json").is_file():
            return models.read_config(self.folder)
        return {}

    def files(self) -> dict[str, Path]:
        """Tokenizer and generation files, an adapter's own ones before its base's."""
        return side_files(self.folder, self.adapter.folder if self.adapter is not None else None)

    @cached_property
    def reader(self) -> Any:
        """The GGUF file's own reader; to parse its tables takes a second."""
        import gguf

        return gguf.GGUFReader(self.gguf)

    def tokenizer(self) -> Any:
        """The tokenizer its users get: of files, or of a GGUF file that has none beside it.

        Raises:
            ModelError: it cannot be opened.
        """
        files = self.files()
        named = files.get("tokenizer.json") or files.get("tokenizer_config.json")
        if named is None and self.gguf is not None:
            return self.tokenizer_inside()
        return models.open_tokenizer(named.parent if named is not None else self.folder)

    def tokenizer_inside(self) -> Any:
        """The tokenizer within the GGUF file, as transformers reads it.

        Through a link in a folder of its own: beside a tokenizer.json it would read that.

        Raises:
            ModelError: transformers cannot read it.
        """
        from transformers import AutoTokenizer

        assert self.gguf is not None
        with tempfile.TemporaryDirectory() as apart:
            (Path(apart) / "model.gguf").symlink_to(self.gguf.absolute())
            try:
                return AutoTokenizer.from_pretrained(apart, gguf_file="model.gguf")
            except Exception as error:  # its converters raise anything
                raise ModelError(
                    "transformers cannot read this file's tokenizer.",
                    where=self.gguf,
                    found=f"{type(error).__name__}: {error}"[:200],
                ) from error


def locate(
    source: str | Path,
    *,
    base: str | None = None,
    strategy: str | None = None,
    task: str | None = None,
    trust: models.Trust | None = None,
) -> Subject:
    """Finds out what ``source`` is.

    Args:
        source: folder of a run, checkpoint, adapter, model, GGUF or ONNX export; a .gguf or .onnx
            file; a hub id.
        base: for an adapter, where its base is.
        strategy: a third party's, by name.
        task: where the model does not say it.

    Raises:
        QftError: it is nothing of these, or the adapter was trained for another task.
    """
    path = Path(source).expanduser()
    if (path.is_dir() and adapter_in(path) is not None) or (path / "checkpoints").is_dir():
        found = locate_adapter(path, base=base, strategy=strategy, trust=trust)
        if task not in (None, found.task):
            raise RecipeError("The adapter was trained for another task.", where="--task",
                              found=f"{task}; it was trained for {found.task}")  # fmt: skip
        return of_adapter(found, str(source))
    file = gguf_file(path)
    if file is not None:
        check_file(file)
    if file is not None and is_adapter_file(file):
        raise ModelError("This is an adapter without its base.", where=file,
                         fix="llama.cpp runs it: llama-cli -m BASE.gguf --lora FILE; here, name "
                         "the adapter's own folder")  # fmt: skip
    graph = onnx_file(path) if file is None else None
    held = file or graph
    folder = held.parent if held is not None else models.resolve_folder(str(source), trust)
    if (folder / "config.json").is_file():
        config = models.read_config(folder)
    else:
        config = _config_inside(file) if file is not None else {}
    return of_model(folder, config, task, str(source), gguf=file, onnx=graph, trust=trust)


def _config_inside(file: Path) -> dict[str, Any]:
    """What a GGUF file without a config.json says of what its model does."""
    try:
        opened = OpenedGGUF(file)
    except ModelError:  # whoever opens it says so
        return {}
    task = opened.key(GGUF_TASK_KEY)
    described: dict[str, Any] = {models.TASK_KEY: task} if task is not None else {}
    return described | (encoder_facts(opened) if opened.architecture == "bert" else {})


def of_adapter(found: AdapterFolder, source: str | None = None) -> Subject:
    """An adapter that is located already."""
    return Subject(source or str(found.folder), found.base, found.spec(), found)


def of_model(
    folder: Path,
    config: dict[str, Any],
    task: str | None = None,
    source: str | None = None,
    *,
    gguf: Path | None = None,
    onnx: Path | None = None,
    trust: models.Trust | None = None,
) -> Subject:
    """A model folder, GGUF or ONNX file.

    Raises:
        RecipeError: there is no such task.
    """
    named = task or models.task_to_run(config)
    if named not in models.AUTO_CLASSES:
        raise RecipeError("No such task.", where="--task", found=named,
                          fix=", ".join(models.AUTO_CLASSES))  # fmt: skip
    labels, kind = (None, "one")
    if named in ("classify", "token"):
        labels, kind = models.labels_in(config)
    spec = models.ModelSpec(source or str(folder), named, labels, kind,
                            trust=trust or models.Trust())  # fmt: skip
    return Subject(source or str(folder), folder, spec, gguf=gguf, onnx=onnx)
