"""LoRA: a low-rank update beside each frozen linear layer."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from adapters.peft_backed import (
    HEAD_TASK_TYPES,
    PeftStrategy,
    module_name,
    peft_task_type,
    read_config,
    read_tensors,
)
from qft.errors import AdapterError
from qft.lean.model_parts import head_names
from qft.strategy import BaseTensors, Context, Merge, Needs

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

# What a PEFT LoRA folder may say that this strategy has no setting for; set, it must not be lost.
_UNKNOWN_FEATURES = (
    "use_dora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layer_replication",
    "lora_bias", "trainable_token_indices", "target_parameters", "use_qalora",
    "alora_invocation_tokens", "exclude_modules", "megatron_config", "arrow_config", "corda_config",
)  # fmt: skip


class LoRA(PeftStrategy):
    """A low-rank update beside each frozen linear layer: W x + scale · B A x."""

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Hu et al. 2021, https://arxiv.org/abs/2106.09685"

    rank: int = Field(16, ge=1, description="width of the update")
    alpha: float | None = Field(None, gt=0, description="scale is alpha / rank; None is 2 · rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="all-linear, module names, or one regular expression"
    )
    rank_stabilised: bool = Field(False, description="scale is alpha / sqrt(rank) (rsLoRA)")
    bias: Literal["none", "all", "lora_only"] = Field("none", description="biases that train too")

    @field_validator("targets")
    @classmethod
    def _is_a_pattern(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return targets

    @property
    def mergeable(self) -> bool:
        """Always: the update is a matrix of the weight's own shape."""
        return True

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(self.rank) if self.rank_stabilised else alpha / self.rank

    def needs(self, skeleton: nn.Module) -> Needs:
        """A classification head trains beside the adapters, so it must not be quantized."""
        return Needs(full_precision=tuple(head_names(skeleton)))

    def peft_config(self, model: nn.Module, context: Context) -> PeftConfig:
        """PEFT's LoraConfig for this model."""
        from peft import LoraConfig

        targets: Any = self.targets if isinstance(self.targets, str) else list(self.targets)
        alpha: Any = 2 * self.rank if self.alpha is None else self.alpha
        return LoraConfig(
            r=self.rank,
            lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            use_rslora=self.rank_stabilised,
            bias=self.bias,
            modules_to_save=head_names(model) or None,
            task_type=peft_task_type(model),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """Rebuilds the settings from a LoRA folder of qft's or PEFT's."""
        values = read_config(folder, "LORA")
        if values is None:
            return None
        unknown = [key for key in _UNKNOWN_FEATURES if values.get(key)]
        if values.get("init_lora_weights") not in (True, False, None, "gaussian"):
            unknown.append("init_lora_weights")
        if values.get("modules_to_save") and values.get("task_type") not in HEAD_TASK_TYPES:
            unknown.append("modules_to_save")
        if unknown:
            raise AdapterError(
                "This LoRA folder uses what qft's lora cannot express.",
                where=folder,
                found=", ".join(f"{key}={values[key]!r}" for key in unknown),
                fix="open it with PEFT itself",
            )
        targets = values.get("target_modules") or ()
        return cls(
            rank=values["r"],
            alpha=values["lora_alpha"],
            dropout=values.get("lora_dropout", 0.0),
            targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
            rank_stabilised=values.get("use_rslora", False),
            bias=values.get("bias", "none"),
        )

    def open_merge(self, folder: Path, base: BaseTensors) -> Merge:
        """Opens the folder for the streamed merge."""
        values = read_config(folder, "LORA") or {}
        return LoRAMerge(read_tensors(folder), base, self.scale, values, folder)


class LoRAMerge:
    """Adds ``scale · B A`` to each weight; replaces biases and heads that were trained."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        base: BaseTensors,
        scale: float,
        values: Mapping[str, Any],
        folder: Path,
    ) -> None:
        self._scale = scale
        self._transposed = bool(values.get("fan_in_fan_out"))
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._replaced: dict[str, Tensor] = {}
        self._shapes = {name: base.shape(name) for name in base.names()}
        named = {module_name(name): tensor for name, tensor in tensors.items()}
        for name, tensor in named.items():
            target = re.sub(r"\.lora_[AB]\.weight$", "", name)
            up, down = f"{target}.lora_B.weight", f"{target}.lora_A.weight"
            if target == name:
                self._replaced[name.replace(".base_layer.", ".")] = tensor
            elif up in named and down in named:
                self._factors[f"{target}.weight"] = (named[up], named[down])
            else:
                raise AdapterError("The adapter holds half an update.", where=folder, found=name)
        self._check(values, folder)

    def _check(self, values: Mapping[str, Any], folder: Path) -> None:
        for name, (up, down) in self._factors.items():
            shape = (up.shape[0], down.shape[1])
            shape = shape[::-1] if self._transposed else shape
            if not up.shape[1] == down.shape[0] == values.get("r"):
                raise AdapterError(
                    "The adapter's weights are not of the rank that its config says.",
                    where=f"{folder}: {name}",
                    found=f"{up.shape[1]} and {down.shape[0]}, config {values.get('r')}",
                )
            if self._shapes.get(name) != shape:
                raise _another_base(folder, name, shape, self._shapes.get(name))
        heads = set(values.get("modules_to_save") or ())
        for name, tensor in self._replaced.items():
            if "lora_" in name:
                raise AdapterError(
                    "This LoRA folder uses what qft's lora cannot express.",
                    where=folder,
                    found=name,
                    fix="merge it with PEFT itself",
                )
            if heads & set(name.split(".")):
                continue  # a new head, or one in the place of a former
            if self._shapes.get(name) != tuple(tensor.shape):
                raise _another_base(folder, name, tuple(tensor.shape), self._shapes.get(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a merged tensor."""
        if name in self._replaced:
            return tuple(self._replaced[name].shape)
        return self._shapes[name]

    def edit(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor`` itself, or the merged one in float32."""
        if name in self._replaced:
            return self._replaced[name]
        if name not in self._factors:
            return tensor
        up, down = self._factors[name]
        delta = (up.float() @ down.float()) * self._scale
        return tensor.float() + (delta.T if self._transposed else delta)

    def added(self) -> Mapping[str, Tensor]:
        """A trained head, trained biases."""
        return self._replaced

    def config_changes(self) -> Mapping[str, Any]:
        """None: the model keeps its shape."""
        return {}


def _another_base(
    folder: Path, name: str, shape: tuple[int, ...], found: tuple[int, ...] | None
) -> AdapterError:
    return AdapterError(
        "The adapter was made for another base model.",
        where=f"{folder}: {name}",
        found=f"adapter {shape}, base {found or 'has no such tensor'}",
        fix="name the base model it was trained on",
    )
