"""LoRA on a pruned model that stays pruned: the update leaves every zero weight at zero.

It comes in as one of PEFT's LoRA variants, which is how PEFT's own layers are told to compute
something else; the engine has its own code for it (`qft.lean.kept_zeros`). PEFT's folder has no
word for it, so the folder carries one of qft's: plain PEFT warns that it ignores it, and computes
the unmasked update, which is another model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from adapters.lora_start import lora_layers
from qft.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn

MARK = "qft_keep_zeros"  # in adapter_config.json
_WHERE = "strategy.keep_zeros"


class ZeroKeeping:
    """What PEFT's LoRA layers ask a variant for (its `LoraVariant`)."""

    keeps_zeros: ClassVar[bool] = True

    def supports_lora_conversion(self) -> bool:
        """The masked update is of full rank."""
        return False

    def forward(
        self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """``result + ((W ≠ 0) ⊙ s B A) drop(x)``."""
        from qft.lean.kept_zeros import kept_zeros_linear
        from qft.lean.lora_linear import Update

        down, up = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        update = Update(down, up, float(module.scaling[active_adapter]), None)
        dropped = module.lora_dropout[active_adapter](x)
        return result + kept_zeros_linear(dropped, module.get_base_layer().weight, None, update)

    def merge_safe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The merged weight."""
        return orig_weight + self._delta(module, active_adapter, orig_weight)

    def merge_unsafe(self, module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        """Merges in place."""
        orig_weight.data += self._delta(module, active_adapter, orig_weight)

    def unmerge(self, module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """The weight without the update."""
        return orig_weight - self._delta(module, active_adapter, orig_weight)

    def _delta(self, module: Any, adapter: str, weight: Tensor) -> Tensor:
        delta: Tensor = module.get_delta_weight(adapter).to(weight.dtype)
        return delta.masked_fill_(weight == 0, 0)


def keep_zeros(model: nn.Module) -> None:
    """Tells every LoRA layer of a model to leave its weight's zeros alone.

    Raises:
        RecipeError: a layer's weights cannot say which of them are zero, or none is.
    """
    from torch import nn

    weights = []
    for name, layer in lora_layers(model):
        base = layer.get_base_layer()
        if type(base) is not nn.Linear:
            raise _refused(name, base)
        layer.lora_variant["default"] = ZeroKeeping()
        weights.append(base.weight)
    if not any(weight.is_meta or bool((weight == 0).any()) for weight in weights):
        raise RecipeError(
            "There are no zeros to keep: this model is not pruned.",
            where=_WHERE,
            found="no weight among the targets is zero",
            fix="qft prune MODEL --method wanda --ratio 0.5 first, or keep_zeros: false",
        )


def _refused(name: str, base: nn.Module) -> RecipeError:
    kind = type(base).__name__
    if kind in ("Linear4bit", "Linear8bitLt", "QuantizedLinear"):
        return RecipeError(
            "A quantized base cannot say which weights are zero: rounding has made more of them, "
            "and what is trained would not be what is merged.",
            where=_WHERE,
            found=f"{name}: {kind}",
            fix="quantize: none, or keep_zeros: false",
        )
    return RecipeError(
        "Zeros can be kept in ordinary linear layers only.",
        where=_WHERE,
        found=f"{name}: {kind}",
        fix="name other targets, or keep_zeros: false",
    )
