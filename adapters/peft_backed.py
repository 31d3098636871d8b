"""What every strategy built on PEFT shares: attach, save and load, in PEFT's own folder format.

A folder written here opens with plain ``peft.PeftModel.from_pretrained``, and one that PEFT wrote
elsewhere opens here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qft.errors import AdapterError, ModelError, RecipeError, first_line
from qft.lean.model_parts import writes_text
from qft.strategy import Context, Strategy

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from qft.shards import StoredTensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER = "default"  # the adapter name PEFT's own get_peft_model uses
_PREFIX = "base_model.model."
HEAD_TASK_TYPES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # PEFT's names for models with a head


class PeftStrategy(Strategy):
    """A strategy whose method PEFT implements; a subclass writes its settings and `peft_config`."""

    def peft_config(self, model: nn.Module, context: Context) -> PeftConfig:
        """The method's PEFT config for this model."""
        raise NotImplementedError

    def attach(self, model: nn.Module, context: Context) -> nn.Module:
        """Freezes the model and adds the adapter."""
        from peft import get_peft_model

        for parameter in model.parameters():
            parameter.requires_grad_(False)
        try:
            wrapped: nn.Module = get_peft_model(
                model,  # type: ignore[arg-type]
                self.peft_config(model, context),
                # PEFT would draw an adapter's numbers on the CPU before it moves them to nowhere
                low_cpu_mem_usage=all(p.is_meta for p in model.parameters()),
            )
        except ValueError as error:
            raise RecipeError(
                f"The strategy {self.name!r} does not fit this model.",
                where="strategy",
                found=first_line(error),
                fix="targets: all-linear",
            ) from error
        return wrapped

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes adapter_config.json and adapter_model.safetensors."""
        # PEFT would ask the hub whether the vocabulary has changed; nothing here changes it
        wrapped: Any = model
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # a model card template, all of it blanks

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads the tensors; a missing, surplus or misshapen one is an error."""
        from peft import set_peft_model_state_dict

        tensors = self.saved_tensors(model, folder)
        self.require_same(model, tensors, folder)
        set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER)

    def saved_tensors(self, model: nn.Module, folder: Path) -> dict[str, Tensor]:
        """The folder's tensors as this model holds them, under PEFT's names."""
        return read_tensors(folder)

    def require_same(self, model: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> None:
        """Raises AdapterError where the tensors are not those of the attached adapter."""
        from peft import get_peft_model_state_dict

        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        compare_tensors(tensors, expected, folder)


def peft_task_type(model: nn.Module) -> str:
    """PEFT's name for what the model is made for; it chooses PEFT's wrapper class by it."""
    if writes_text(model):
        halves = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        return "SEQ_2_SEQ_LM" if halves else "CAUSAL_LM"
    kind = type(model).__name__
    if kind.endswith("ForQuestionAnswering"):
        return "QUESTION_ANS"
    return "TOKEN_CLS" if kind.endswith("ForTokenClassification") else "SEQ_CLS"


def read_config(folder: Path, peft_type: str) -> dict[str, Any] | None:
    """PEFT's adapter config if it is of ``peft_type``, else None.

    Raises:
        AdapterError: the file is there and cannot be read.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(
            "The adapter's config cannot be read.", where=path, found=error
        ) from None
    if not isinstance(values, dict) or values.get("peft_type") != peft_type:
        return None
    return values


def change_config(folder: Path, changes: Mapping[str, Any]) -> None:
    """Sets values in an adapter_config.json that PEFT has written."""
    path = folder / CONFIG_FILE
    values = json.loads(path.read_text(encoding="utf-8")) | dict(changes)
    path.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")


def read_tensors(folder: Path, file: str = WEIGHTS_FILE) -> dict[str, Tensor]:
    """The adapter's tensors under PEFT's names.

    Raises:
        AdapterError: the file is missing, broken or a pickle.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(_weights(folder, file))
    except (SafetensorError, OSError, ModelError) as error:
        raise AdapterError("The adapter's weights are broken.", where=folder / file,
                           found=error) from None  # fmt: skip


def stored_tensors(folder: Path, file: str = WEIGHTS_FILE) -> dict[str, StoredTensor]:
    """The same, read only when they are asked for, and by rows.

    Raises:
        AdapterError: the file is missing, broken or a pickle.
    """
    from qft.shards import open_tensors

    try:
        return open_tensors(_weights(folder, file))
    except ModelError as error:
        raise AdapterError(
            "The adapter's weights are broken.", where=error.where,
            found=f"{error.what} {error.found}", fix=error.fix,
        ) from None  # fmt: skip


def _weights(folder: Path, file: str) -> Path:
    from qft.shards import inside

    path = folder / file
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise AdapterError(
            "The adapter's weights are a pickle, which can run any code when it is loaded."
            if pickled
            else "The adapter folder holds no weights.",
            where=folder,
            fix="save the adapter again as safetensors" if pickled else f"it needs {file}",
        )
    return inside(folder, file)


def compare_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], folder: Path
) -> None:
    """Raises AdapterError where names or shapes differ: the adapter is for another base."""
    missing = sorted(set(expected) - set(found))
    surplus = sorted(set(found) - set(expected))
    shapes = sorted(
        f"{name} {tuple(found[name].shape)}, here {tuple(expected[name].shape)}"
        for name in set(expected) & set(found)
        if found[name].shape != expected[name].shape
    )
    for problem, names in (
        ("has not", missing),
        ("has and this model has not", surplus),
        ("holds in another shape", shapes),
    ):
        if names:
            raise AdapterError(
                "The adapter was made for another base model.",
                where=folder,
                found=f"{len(names)} tensor(s) it {problem}, first {names[0]}",
                fix="name the base model it was trained on",
            )


def module_name(tensor_name: str) -> str:
    """PEFT's tensor name without its wrapper's prefix and its name for a module trained whole."""
    return tensor_name.removeprefix(_PREFIX).replace(".modules_to_save.", ".")
