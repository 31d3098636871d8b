"""A verification in a few lines for people: figure, what is allowed, verdict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qft.data.conversations import CONVERSATIONS
from qft.verification.tally import allowed_at
from qft.verification.verify import Verification


def summary(result: Verification, *, texts: int, stops: Sequence[int], tokenizer: Any) -> list[str]:
    """Aligned lines.

    Args:
        texts: how many held-out texts' tokens were compared.
        stops: the tokens that must stop a generation.
        tokenizer: the reference's.
    """
    rows = [*_figures(result), *_metrics(result), _layers(result),
            *_words(result, texts, stops, tokenizer)]  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{result.format}, {result.positions:,} predictions compared:"]
    lines += ["  " + "  ".join(f"{cell:<{width}}" for cell, width in
                               zip(row, widths, strict=False)).rstrip() + f"  {row[3]}".rstrip()
              for row in rows]  # fmt: skip
    lines += [f"  {finding.text}" for finding in result.findings]
    lines += [f"note: {note}" for note in result.notes]
    lines.append("verified" if not result.problems() else "NOT verified")
    return lines


_Row = tuple[str, str, str, str]


def _figures(result: Verification) -> list[_Row]:
    limit = result.thresholds
    rows: list[_Row] = [
        ("mean KL", f"{result.mean_kl:.3g} nats", f"allowed {limit.mean_kl:g}",
         _verdict(result.mean_kl <= limit.mean_kl)),
        ("99th percentile of KL", f"{result.p99_kl:.3g} nats", f"allowed {limit.p99_kl:g}",
         _verdict(result.p99_kl <= limit.p99_kl)),
    ]  # fmt: skip
    if limit.top1 > 0:
        rows.append(("same first choice", f"{result.top1:.2%}", f"wanted {limit.top1:.1%}",
                     _verdict(result.top1 >= limit.top1)))  # fmt: skip
    ratio = result.perplexity_ratio
    if ratio is not None:
        figure = f"{result.perplexity:.4g}, reference {result.perplexity_reference:.4g}"
        rows.append(("perplexity", figure, f"allowed × {limit.perplexity_ratio:g}",
                     _verdict(ratio <= limit.perplexity_ratio)))  # fmt: skip
    return rows


def _metrics(result: Verification) -> list[_Row]:
    return [
        (name, f"{value:.4g}, reference {result.metrics_reference[name]:.4g}", "", "")
        for name, value in result.metrics.items()
        if name != "loss"
    ]


def _layers(result: Verification) -> _Row:
    if not result.layers:
        return "hidden states", "not compared", "", ""
    place = result.first_diverging_layer
    numbers = list(result.layers.values())
    nearest = max(range(len(numbers)),
                  key=lambda n: numbers[n] / allowed_at(n, result.thresholds.layer))  # fmt: skip
    figure = f"{numbers[nearest]:.2g} after {list(result.layers)[nearest]}"
    if place is not None:
        figure = f"first diverging: {place}"
    allowed = f"allowed {allowed_at(nearest, result.thresholds.layer):.2g}"
    return "hidden states", figure, allowed, _verdict(place is None)


def _words(result: Verification, texts: int, stops: Sequence[int], tokenizer: Any) -> list[_Row]:
    kinds = {finding.kind for finding in result.findings}
    rows: list[_Row] = [
        ("token ids", f"{texts} held-out and awkward texts", "", _verdict("tokens" not in kinds))
    ]
    if getattr(tokenizer, "chat_template", None):
        rows.append(("chat template", f"{len(CONVERSATIONS)} conversations", "",
                     _verdict("template" not in kinds)))  # fmt: skip
    if stops:
        named = ", ".join(str(tokenizer.convert_ids_to_tokens(token)) for token in stops)
        rows.append(("stop tokens", named, "", _verdict("stops" not in kinds)))
    return rows


def _verdict(right: bool) -> str:
    return "ok" if right else "NOT ok"
