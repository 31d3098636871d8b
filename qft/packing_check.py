"""Does this model really keep packed examples apart? Asked of the model itself, before training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qft.data.examples import Example
from qft.data.packing import Row, collate_packed, one_row
from qft.errors import RecipeError
from qft.evaluation import evaluating
from qft.lean.model_parts import device_of, uses_flash_attention

_TOKENS = 24  # of each of the two examples that are tried


def require_exact_packing(model: nn.Module, examples: Sequence[Example], pad: int) -> None:
    """Compares two examples in each row of a batch with each of them alone.

    Raises:
        RecipeError: the model lets one example see the other (its attention does not go by
            positions), or takes no positions at all.
    """
    tried = [_shortened(example) for example in examples[:2]]
    if len(tried) < 2:
        return
    device = device_of(model)
    rows: list[Row] = [tried, tried[::-1]]  # more than one, as in training
    if uses_flash_attention(model):
        rows = one_row(rows)
    try:
        with evaluating(model):
            first, second = (_logits(model, collate_packed([[e]], pad), device) for e in tried)
            together = _logits(model, collate_packed(rows, pad), device)
    except TypeError as error:  # no such argument
        raise _refusal(model, str(error)[:200]) from None
    wanted = torch.cat([first, second, second, first])
    difference = float((together - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    if not difference <= _tolerance(model):
        raise _refusal(model, f"their logits differ by {difference:.1%} from those alone")


def _tolerance(model: nn.Module) -> float:
    """By the type that the model computes in; weights that train are in float32 all the same."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    types.add(getattr(getattr(model, "config", None), "dtype", None) or torch.float32)
    return 1e-3 if types <= {torch.float32, torch.float64} else 5e-2


def _shortened(example: Example) -> Example:
    inputs = {name: values[:_TOKENS] for name, values in example.inputs.items()}
    return Example(example.index, inputs)


def _logits(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float().flatten(0, 1)


def _refusal(model: nn.Module, found: str) -> RecipeError:
    return RecipeError(
        "This model would let packed examples see one another.",
        where="train.packing",
        found=found,
        fix="train.packing: false",
    )
