"""Does this model really keep examples in one row apart? Asked of the model, before training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qft.data.examples import Example
from qft.data.packing import Row, borders_of, collate_packed, one_row
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
    rows: list[Row] = [tried, tried[::-1]]  # more than one, as in training
    if uses_flash_attention(model):
        rows = one_row(rows)
    found = _difference(model, tried, collate_packed(rows, pad), pad)
    if found is not None:
        raise RecipeError(
            "This model would let packed examples see one another.",
            where="train.packing",
            found=found,
            fix="train.packing: false",
        )


def keeps_apart(model: nn.Module, examples: Sequence[Example], pad: int) -> bool:
    """Whether examples in one long row, with their borders told, are as if each were alone.

    A family whose layers look beyond attention, or that does not hand the borders on, is found out.
    """
    tried = [_shortened(example) for example in examples[:2]]
    if len(tried) < 2:
        return False
    (row,) = one_row([tried, tried[::-1]])
    together = {**collate_packed([row], pad), **borders_of(row)}
    return _difference(model, tried, together, pad) is None


def _difference(
    model: nn.Module, tried: Sequence[Example], together: dict[str, Tensor], pad: int
) -> str | None:
    """What is wrong with a batch of both examples and then, in the other order, again."""
    try:
        with evaluating(model):
            first, second = (_logits(model, collate_packed([[e]], pad)) for e in tried)
            found = _logits(model, together)
    except TypeError as error:  # no such argument
        return str(error)[:200]
    wanted = torch.cat([first, second, second, first])
    difference = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
    if difference <= _tolerance(model):
        return None
    return f"their logits differ by {difference:.1%} from those alone"


def _tolerance(model: nn.Module) -> float:
    """By the type that the model computes in; weights that train are in float32 all the same."""
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    types.add(getattr(getattr(model, "config", None), "dtype", None) or torch.float32)
    return 1e-3 if types <= {torch.float32, torch.float64} else 5e-2


def _shortened(example: Example) -> Example:
    inputs = {name: values[:_TOKENS] for name, values in example.inputs.items()}
    return Example(example.index, inputs)


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    device = device_of(model)
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits.float().flatten(0, 1)
