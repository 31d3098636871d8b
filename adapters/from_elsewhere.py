"""A folder that PEFT wrote with settings qft has no word for: opened as PEFT itself opens it.

What such an adapter computes, PEFT's own layers know; what it merges to, its tensors say. So it is
merged, verified and evaluated, and only a training of qft's cannot begin with its settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.peft_backed import ADAPTER, PeftStrategy, read_tensors
from qft.errors import AdapterError, first_line
from qft.strategy import Context, Needs

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn


class FromElsewhere(PeftStrategy):
    """Beside the strategy of the same method: that one's `peft_config` and `load`, as saved.

    Attributes:
        saved: the folder's adapter_config.json.
    """

    saved: Mapping[str, Any]

    def needs(self, skeleton: nn.Module) -> Needs:
        """What was trained whole must not be quantized."""
        named = tuple(self.saved.get("modules_to_save") or ())
        whole = [n for n, _ in skeleton.named_modules() if n.endswith(named)] if named else []
        return Needs(full_precision=tuple(whole))

    def peft_config(self, model: nn.Module, context: Context) -> PeftConfig:
        """The folder's own."""
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING

        cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[self.saved["peft_type"]]
        config: PeftConfig = cls.from_peft_type(**{**self.saved, "inference_mode": False})
        return config

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads the tensors; a missing or surplus one is an error."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        tensors = read_tensors(folder)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        missing = sorted(set(expected) - set(tensors))
        try:
            result = set_peft_model_state_dict(model, tensors, adapter_name=ADAPTER)
        except RuntimeError as error:
            raise _another_base(folder, first_line(error)) from None
        if missing or result.unexpected_keys:
            raise _another_base(folder, (missing or result.unexpected_keys)[0])


def _another_base(folder: Path, found: str) -> AdapterError:
    return AdapterError("The adapter was made for another base model.", where=folder, found=found,
                        fix="name the base model it was trained on")  # fmt: skip
