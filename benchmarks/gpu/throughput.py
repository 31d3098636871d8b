"""Tokens a second and peak memory of real steps, side by side.

    python benchmarks/gpu/throughput.py [--shapes llama-3.1-8b] [--quantize nf4] [--lengths 2048]

With ``--predict`` the engine's peaks are counted on fake tensors instead, without a GPU.

One case after another; within one, the sides take turns, block by block, so that a clock that
changes changes for all. A row says the 20th, 50th and 80th percentile of the blocks' tokens/s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gpu_models import Case
from gpu_rows import Rows, parser, quantiles
from gpu_sides import SIDES, FarSide, Runs, Side, missing
from largest_context import predicted_peak

SHAPES = ("llama-3.1-8b", "llama-3.2-3b", "llama-3.2-1b")
LENGTHS = (2048, 8192, 512, 16384)
# of the 8B in nf4 at 2,048 and 8,192 tokens; nothing is claimed before it is measured
TARGETS = {"unsloth": 1.1, "peft": 2.0, "peft-autocast": 2.0}
TARGET_CASES = ("llama-3.1-8b nf4 1x2048", "llama-3.1-8b nf4 1x8192")


def compare(
    case: Case, sides: dict[str, Runs], rows: Rows, *, blocks: int, seconds: float
) -> dict[str, float]:
    """Adds a row a side; the medians of those that ran."""
    found: dict[str, list[dict[str, Any]]] = {}
    pace = 1e-4
    for name, side in sides.items():
        opened = side.open(case)
        if "reason" in opened:
            rows.add(case.name, name, case.settings(), reason=opened["reason"])
        else:
            found[name] = []
            pace = max(pace, opened["seconds"])
    steps = max(2, round(seconds / pace))  # the same for all, so that their losses compare
    for _ in range(blocks):
        for name in list(found):
            block = sides[name].block(steps)
            if "reason" in block:
                rows.add(case.name, name, case.settings(), reason=block["reason"])
                del found[name]
            else:
                found[name].append(block)
    medians = {}
    for name, made in found.items():
        sides[name].close()
        paces = [block["tokens"] / block["seconds"] for block in made]
        values = quantiles(paces)
        medians[name] = values["p50"]
        peaks = {
            key: max((block[key] for block in made if block[key] is not None), default=None)
            for key in ("allocated_peak_bytes", "reserved_peak_bytes")
        }
        rows.add(case.name, name, case.settings(), **values, **peaks, unit="tokens/s",
                 final_loss=made[-1]["loss"], steps=made[-1]["steps"], blocks=paces)  # fmt: skip
    return medians


def against_targets(case: str, medians: dict[str, float]) -> list[str]:
    """A sentence for each target that this case has."""
    if case not in TARGET_CASES or "qft" not in medians:
        return []
    return [
        f"{case}: {medians['qft'] / medians[name]:.2f} x {name}, target {target} x: "
        + ("reached" if medians["qft"] >= target * medians[name] else "not reached")
        for name, target in TARGETS.items()
        if name in medians
    ]


def run(
    cases: Sequence[Case],
    names: Sequence[str],
    rows: Rows,
    make: Callable[[str], Runs],
    *,
    blocks: int,
    seconds: float,
    until: float = float("inf"),
) -> None:
    """All cases whose rows are not there yet, while there is time (``time.monotonic``)."""
    sides: dict[str, Runs] = {}
    try:
        for case in cases:
            wanted = [name for name in names if not rows.has(case.name, name)]
            for name in [n for n in wanted if missing(n)]:
                rows.add(case.name, name, case.settings(), reason=missing(name))
                wanted.remove(name)
            if not wanted or time.monotonic() > until:
                continue
            sides |= {name: make(name) for name in wanted if name not in sides}
            medians = compare(
                case, {n: sides[n] for n in wanted}, rows, blocks=blocks, seconds=seconds
            )
            for sentence in against_targets(case.name, medians):
                print(sentence, flush=True)
    finally:
        for side in sides.values():
            if isinstance(side, FarSide):
                side.end()


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs what is asked for."""
    options = parser(__doc__)
    options.add_argument("--shapes", nargs="+", default=list(SHAPES))
    options.add_argument("--quantize", nargs="+", default=["nf4", "none"])
    options.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    options.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    options.add_argument("--blocks", type=int, default=5)
    options.add_argument("--block-seconds", type=float, default=2.0)
    options.add_argument("--limit-seconds", type=float, default=float("inf"))
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--predict", action="store_true", help="the engine's peaks, metered")
    options.add_argument("--in-process", action="store_true", help="all sides in this process")
    chosen = options.parse_args(arguments)
    device = "none" if chosen.predict else chosen.device
    cases = [
        Case(shape, quantize=quantize, length=length, dtype=chosen.dtype, device=device)
        for shape in chosen.shapes
        for quantize in chosen.quantize
        for length in chosen.lengths
    ]
    if chosen.predict:
        rows = Rows(chosen.out, "throughput", device, predicted=True)
        for case in cases:
            for side, offload in (("qft", "none"), ("qft-offload", "host")):
                peak = predicted_peak(replace(case, offload=offload))
                rows.add(case.name, side, case.settings(), allocated_peak_bytes=peak)
        return
    make: Callable[[str], Runs] = Side if chosen.in_process else FarSide
    run(cases, chosen.sides, Rows(chosen.out, "throughput", chosen.device), make,
        blocks=chosen.blocks, seconds=chosen.block_seconds,
        until=time.monotonic() + chosen.limit_seconds)  # fmt: skip


if __name__ == "__main__":
    main()
