"""What two models say about the same rows, made comparable: logits a position, and the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qft.data.encoding import UNSUPERVISED
from qft.data.tasks import Example
from qft.errors import VerificationError
from qft.judging.judge import Judge
from qft.lean.model_parts import is_encoder_decoder, writes_text

_FAR_BELOW = -1e4  # a logit that softmax makes nothing of, and that differs from itself by 0
_PLACES = ("start_positions", "end_positions")


def inputs_of(model: nn.Module, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch a model is given; labels only where its decoder's inputs are made of them."""
    two_halves = is_encoder_decoder(model) and writes_text(model)
    left_out = _PLACES if two_halves else (*_PLACES, "labels")
    return {key: value for key, value in rows.items() if key not in left_out}


def comparable(
    model: nn.Module, rows: Mapping[str, Tensor], outputs: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both models' logits ``[positions, choices]`` and the labels ``[positions]``, on the CPU.

    Args:
        model: the reference; what it is decides what its logits are.
        rows: ``input_ids``, ``attention_mask`` and labels.
        outputs: the reference's and the artefact's.

    Raises:
        VerificationError: they differ in shape.
    """
    first, second = (_logits(output, rows) for output in outputs)
    if first.shape != second.shape:
        raise VerificationError(
            "The artefact's predictions have another shape than the reference's.",
            found=f"{tuple(second.shape)}, reference {tuple(first.shape)}",
            fix="name the model that was made from this reference, for the same task",
        )
    labels = rows.get("labels")
    if not hasattr(outputs[0], "logits") and _PLACES[0] not in rows:  # vectors, one a token
        kept = rows["attention_mask"].bool().cpu()
        return first[kept], second[kept], None
    if _PLACES[0] in rows:  # two predictions a row
        return first, second, torch.cat([rows[name] for name in _PLACES])
    if first.dim() == 2 and labels is not None and labels.is_floating_point():
        return (*_as_choices(first, second), None)
    if first.dim() == 2:  # a classifier: one prediction a row
        return first, second, labels
    two_halves = is_encoder_decoder(model) and writes_text(model)
    if labels is not None and (two_halves or hasattr(model, "num_labels")):  # unshifted
        kept = labels != UNSUPERVISED
        return first[kept], second[kept], labels[kept]
    kept, targets = predicting(rows)
    return first[:, :-1][kept], second[:, :-1][kept], targets[kept]


def predicting(rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Where a decoder's predictions are compared, and what is right there.

    Returns:
        Bool ``[batch, length - 1]``, and the tokens that position ``t`` should predict.
    """
    labels = rows.get("labels")
    if labels is not None:
        targets = labels[:, 1:]
        return targets != UNSUPERVISED, targets
    targets = rows["input_ids"][:, 1:]
    mask = rows.get("attention_mask")
    kept = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask[:, 1:].bool()
    return kept, targets


def _logits(output: Any, rows: Mapping[str, Tensor]) -> Tensor:
    """What a model answers, on the CPU; a reader of spans: starts above ends, padding left out.

    An encoder without a head answers with hidden states, whose dimensions count as choices.
    """
    if not hasattr(output, "start_logits"):
        answer: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
        return answer.cpu()
    hidden = rows["attention_mask"].cpu() == 0
    sides = [side.float().cpu() for side in (output.start_logits, output.end_logits)]
    return torch.cat([side.masked_fill(hidden, _FAR_BELOW) for side in sides])


def _as_choices(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Several classes a row are as many yes-or-no choices; a number is above or below the mean."""
    if first.shape[1] == 1:
        first, second = first.float(), second.float()
        spread = first.std() if len(first) > 1 and first.std() > 0 else torch.tensor(1.0)
        mean = first.mean()
        first, second = (first - mean) / spread, (second - mean) / spread
    pairs = [side.reshape(-1, 1) for side in (first, second)]
    a, b = (torch.cat([torch.zeros_like(side), side], dim=1) for side in pairs)
    return a, b


def judge_output(
    judge: Judge, output: Any, rows: Mapping[str, Tensor], examples: Sequence[Example]
) -> None:
    """Lets a judge score an answer that was given already."""
    judge.add(judge.score(_Answered(output), dict(rows), examples))


class _Answered(nn.Module):
    """A model that gives one answer, whatever it is asked."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, **inputs: Tensor) -> Any:
        return self._output
