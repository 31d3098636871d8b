"""What `qft prune` prints: the two models side by side, or what each choice would cost."""

from __future__ import annotations

from typing import Any


def summary(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The report as a table: what, before, after, and the after as a share of the before."""
    rows = [_row(name, result["before"][name], result["after"][name])
            for name in ("parameters", "bytes")]  # fmt: skip
    if "sparsity" in result:
        zeros, weights = result["layers"]["zeros"], result["layers"]["weights"]
        rows.append(("zeros in the layers", "", f"{zeros:,}", f"{zeros / weights:.1%}"))
    speed = result.get("speed") or {}
    if speed:
        rows.append(_row("tokens/s read", round(speed["before"]), round(speed["after"])))
    quality = result.get("quality") or {}
    for name, value in (quality.get("before") or {}).items():
        rows.append(_row(name, value, quality["after"][name]))
    if "mean_kl" in quality:
        rows.append(("mean KL, nats", "", f"{quality['mean_kl']:.4f}", ""))
    return [("", "before", "after", "share"), *rows]


def _row(name: str, before: float, after: float) -> tuple[str, str, str, str]:
    share = f"{after / before:.1%}" if before else ""
    shown = [f"{v:,}" if isinstance(v, int) else f"{v:.4f}" for v in (before, after)]
    return name, shown[0], shown[1], share


def choices(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """A dry run's choices, a row each."""
    rows = result["choices"]
    sizes = [n for n in ("layers", "neurons", "heads", "hidden") if any(n in row for row in rows)]
    names = [*sizes, "parameters", "bytes", "share"]
    scored = any("removed_layers" in row for row in rows)
    table: list[tuple[str, ...]] = [(*names, "layers that go (score)") if scored else tuple(names)]
    for row in rows:
        cells = [f"{row[n]:,}" if n in row else "" for n in names[:-1]] + [f"{row['share']:.1%}"]
        table.append((*cells, _removed(row)) if scored else tuple(cells))
    return table


def _removed(row: dict[str, Any]) -> str:
    removed, scores = row.get("removed_layers", ()), row.get("scores", ())
    if len(scores) == len(removed):
        return ", ".join(f"{n} ({s:.4f})" for n, s in zip(removed, scores, strict=True))
    told = f"{removed[0]}-{removed[-1]}" if removed else ""
    return f"{told} ({scores[0]:.4f})" if scores else ", ".join(map(str, removed))
