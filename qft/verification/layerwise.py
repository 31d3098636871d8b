"""The same verification with one layer of one model in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from qft.data.tasks import Example
from qft.errors import VerificationError
from qft.layer_stream import Stream
from qft.layer_weights import LayerWeights
from qft.lean.model_parts import writes_text
from qft.verification.answers import comparable, predicting
from qft.verification.diagnosis import EMBEDDINGS
from qft.verification.tally import POSITIONS
from qft.verification.thresholds import Thresholds
from qft.verification.verify import Comparison, Rows, Verification


def verify_by_layers(
    reference: LayerWeights,
    artefact: LayerWeights,
    rows: Rows,
    *,
    format: str,
    thresholds: Thresholds,
    progress: Callable[[int], object] | None = None,
) -> Verification:
    """As :func:`qft.verification.verify.verify`: hidden states after each layer, then the answers.

    In memory: one layer of one model, the hidden states of all rows twice, and at the end both
    models' heads with the logits of a few hundred positions.

    Raises:
        VerificationError: there is nothing to compare, or the two have other layers.
    """
    held = list(rows.batches())
    batches = [batch for batch, _ in held]
    first, second = (Stream(side, batches, side.skeleton.name_or_path)
                     for side in (reference, artefact))  # fmt: skip
    if len(first.stack) != len(second.stack):
        raise VerificationError(
            "The artefact has another number of layers.",
            found=f"{len(second.stack)}, reference {len(first.stack)}",
        )
    comparison = Comparison(rows)
    comparison.places = [EMBEDDINGS]
    _compare_hidden(comparison, 0, first, second, len(batches))
    sides = (first.layers(), second.layers())
    for index in range(len(first.stack)):
        for side in sides:
            layer = next(side)
            layer.run(propagate=True)
            layer.finish()
        comparison.places.append(f"{first.stack_name}.{index}")
        _compare_hidden(comparison, index + 1, first, second, len(batches))
    first.open_top()
    second.open_top()
    try:
        for number, (batch, examples) in enumerate(held):
            _compare_answers(comparison, number, batch, examples, first, second)
            if progress is not None:
                progress(len(examples))
    finally:
        first.close_top()
        second.close_top()
    return comparison.result(format, thresholds)


def _compare_hidden(
    comparison: Comparison, place: int, first: Stream, second: Stream, batches: int
) -> None:
    for number in range(batches):
        comparison.layers.add(
            place, first.hidden(number), second.hidden(number), first.tokens(number)
        )


def _compare_answers(
    comparison: Comparison,
    number: int,
    batch: Mapping[str, Tensor],
    examples: Sequence[Example],
    first: Stream,
    second: Stream,
) -> None:
    if not writes_text(first.model):
        outputs = [side.output(number) for side in (first, second)]
        comparison.logits.add(*comparable(first.model, batch, outputs))
        comparison.judge(outputs, batch, examples)
        return
    kept, targets = predicting(batch)
    places = kept.nonzero()
    wanted = targets[kept]
    for begin in range(0, len(places), POSITIONS):
        part = slice(begin, begin + POSITIONS)
        one, other = (side.logits(number, places[part]) for side in (first, second))
        if one.shape != other.shape:
            raise VerificationError(
                "The artefact's predictions have another shape than the reference's.",
                found=f"{tuple(other.shape)}, reference {tuple(one.shape)}",
            )
        comparison.logits.add(one.cpu(), other.cpu(), wanted[part])
