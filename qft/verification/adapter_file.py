"""A GGUF file of an adapter, read by ``gguf`` and transformers and put beside its base.

Names and the order of rows are undone by transformers' own GGUF loader; the updates are added to
what each layer gives, as llama.cpp does, not to its weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qft import models
from qft.errors import ModelError, RecipeError
from qft.gguf.checked import check_file
from qft.merging.side_files import side_files
from qft.verification.subject import Subject

APART = "gguf-lora:"  # how the formats of adapters without their base begin


def require_adapter(reference: Subject, onto: str) -> None:
    """Raises RecipeError where there is no adapter to be written apart from its base."""
    if reference.adapter is None:
        raise RecipeError("This format holds an adapter, and this is a model.",
                          where=reference.source,
                          fix="name a run or an adapter, or --format gguf:q8_0")  # fmt: skip
    if onto != "auto":
        raise RecipeError("An adapter of its own is made onto no base.", where="--base",
                          found=onto, fix="leave it out")  # fmt: skip


@dataclass(frozen=True)
class AdapterFile(Subject):
    """A base model with an adapter file beside it.

    Attributes:
        file: the adapter's.
    """

    file: Path = field(default=Path())

    @classmethod
    def of(cls, reference: Subject, file: Path) -> AdapterFile:
        """The file that was made of ``reference``, on the same base, unquantized."""
        spec = replace(reference.spec, quantize="none")
        return cls(str(file), reference.folder, spec, file=file)

    @property
    def home(self) -> Path:
        """The folder its own files lie in."""
        return self.file.parent

    def files(self) -> dict[str, Path]:
        """The base's, and the generation settings beside the file."""
        return side_files(self.folder, self.home)

    def open(self, dtype: torch.dtype) -> nn.Module:
        """The base with the updates beside its layers, in eval mode.

        Raises:
            ModelError: the file cannot be read, or does not fit the base.
        """
        model = models.open_model(self.folder, replace(self.spec, dtype=dtype))
        add_updates(model, self.file)
        return model.eval().requires_grad_(False)


def add_updates(model: nn.Module, file: Path) -> None:
    """Adds every update of an adapter file to what its layer gives.

    Raises:
        ModelError: it is no adapter for this model.
    """
    import gguf

    check_file(file)
    opened = gguf.GGUFReader(file)
    alpha = float(opened.fields["adapter.lora.alpha"].contents())
    stored = {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
              for tensor in opened.tensors}  # fmt: skip
    mapping, processor = _reader_of(model, str(opened.fields["general.architecture"].contents()))
    weights = {name.removesuffix(".lora_a") for name in stored if name.endswith(".lora_a")}
    for name in sorted(weights):
        if name not in mapping or f"{name}.lora_b" not in stored:
            raise ModelError("The adapter file does not fit the model.", where=file, found=name)
        down, up = stored[f"{name}.lora_a"], stored[f"{name}.lora_b"]
        up = _rows_back(up, name, mapping, processor)
        layer = model.get_submodule(mapping[name].removesuffix(".weight"))
        _put_beside(layer, up, down, alpha / down.shape[0])


def _reader_of(model: nn.Module, architecture: str) -> tuple[dict[str, str], Any]:
    """transformers' names for GGUF's, and what undoes its order of rows."""
    from transformers import modeling_gguf_pytorch_utils as reader

    described: Any = model.config
    kind = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)
    processor: Any = kind(config=described.to_dict())  # type: ignore[no-untyped-call]
    try:
        return dict(reader.get_gguf_hf_weights_map(model, processor, architecture)), processor
    except NotImplementedError as error:
        raise ModelError("transformers knows no GGUF of this architecture.", found=architecture,
                         fix="add --no-verify") from error  # fmt: skip


def _rows_back(up: Tensor, name: str, mapping: dict[str, str], processor: Any) -> Tensor:
    """``[out, rank]`` in the order of the model's own rows.

    What transformers turns to ``[in, out]`` (GPT-2's weights) is turned back.
    """
    made = processor.process(weights=up.numpy(), name=name, tensor_key_mapping=mapping,
                             parsed_parameters={"tensors": {}})  # fmt: skip
    values = torch.from_numpy(made.weights.copy())
    return values if values.shape == up.shape else values.T


def _put_beside(layer: nn.Module, up: Tensor, down: Tensor, scale: float) -> None:
    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        held = inputs[0]
        update: Tensor = (held @ down.T.to(held)) @ up.T.to(held) * scale
        return output + update

    layer.register_forward_hook(add)
