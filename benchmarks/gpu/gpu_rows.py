"""One row a measurement, as JSON lines; a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "triton", "unsloth",
            "liger-kernel", "torchtune")  # fmt: skip
FIELDS = (
    "benchmark", "case", "side", "settings", "device", "driver", "versions", "commit", "date",
    "predicted", "p20", "p50", "p80", "allocated_peak_bytes", "reserved_peak_bytes", "final_loss",
    "reason",
)  # fmt: skip


def environment(device: str) -> dict[str, Any]:
    """Where a row was measured: device, driver, versions, commit."""
    versions = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cuda = device == "cuda"
    commit = os.environ.get("QFT_COMMIT") or _said("git", "-C", str(ROOT), "rev-parse", "HEAD")
    name = torch.cuda.get_device_name() if cuda else device
    return {
        "device": name,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if cuda
        else None,
        "versions": versions,
        "commit": commit,
        "date": date.today().isoformat(),
    }


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None


class Rows:
    """The rows of one benchmark, appended to ``<folder>/<benchmark>.jsonl``.

    Args:
        predicted: whether they are counted on fake tensors rather than measured.
    """

    def __init__(
        self, folder: Path, benchmark: str, device: str, *, predicted: bool = False
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{benchmark}.jsonl"
        self._benchmark, self._predicted = benchmark, predicted
        self._where = environment(device)
        self.known = self._whole_rows()

    def _whole_rows(self) -> list[dict[str, Any]]:
        """What is there; a row that was cut off is taken out, or the next would be added to it."""
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._path.write_text(whole, encoding="utf-8")
        return [json.loads(line) for line in whole.splitlines()]

    def has(self, case: str, side: str) -> bool:
        """Whether a row of this commit is there already."""
        return any(
            (row["case"], row["side"], row["commit"]) == (case, side, self._where["commit"])
            for row in self.known
        )

    def add(self, case: str, side: str, settings: dict[str, Any], **values: Any) -> dict[str, Any]:
        """Writes a row at once; what was not measured is None, with its ``reason``."""
        row: dict[str, Any] = dict.fromkeys(FIELDS)
        row |= {"benchmark": self._benchmark, "case": case, "side": side, "settings": settings}
        row |= {**self._where, "predicted": self._predicted, **values}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.known.append(row)
        said = {k: v for k, v in values.items() if k != "blocks" and v is not None}
        print(f"{self._benchmark} {case} {side}: {said}", flush=True)
        return row


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, by linear interpolation."""
    ordered = torch.tensor(sorted(values), dtype=torch.float64)
    wanted = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found = torch.quantile(ordered, wanted).tolist()
    return dict(zip(("p20", "p50", "p80"), found, strict=True))


def peaks(device: str) -> dict[str, int | None]:
    """The most bytes of tensors and of the allocator since `reset_peaks`; None without a GPU."""
    if device != "cuda":
        return {"allocated_peak_bytes": None, "reserved_peak_bytes": None}
    return {
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(),
    }


def reset_peaks(device: str, *, empty: bool = True) -> None:
    """Peaks count from here; with ``empty`` what nobody holds goes back to the device."""
    if device == "cuda":
        torch.cuda.synchronize()
        if empty:
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "out of memory" in str(error)


def reason_of(error: BaseException) -> str:
    """An exception in one line."""
    if is_out_of_memory(error):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def parser(text: str | None) -> argparse.ArgumentParser:
    """The arguments that every script takes."""
    made = argparse.ArgumentParser(description=text)
    made.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")),
                      help="folder of the rows; $OUT, else gpu-results")  # fmt: skip
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def around(fits: Callable[[int], bool], guess: int, high: int, grain: int) -> int:
    """The largest multiple of ``grain`` up to ``high`` that fits; 0 where none does.

    It tries the guess, goes on from there in steps that double, and halves what is left.
    """
    best, too_long = 0, (high // grain + 1) * grain
    reach = min(max(grain, guess // grain * grain), too_long - grain)
    step = max(grain, reach // 32 // grain * grain)
    found = upwards = fits(reach)
    while True:
        if found:
            best = reach
        else:
            too_long = reach
        if found != upwards or too_long - best <= grain:
            return _halved(fits, best, too_long, grain)
        reach = min(reach + step, too_long - grain) if upwards else max(reach - step, grain)
        found = fits(reach)
        step *= 2


def _halved(fits: Callable[[int], bool], best: int, too_long: int, grain: int) -> int:
    """What fits between a length that does (or 0) and one that does not."""
    while too_long - best > grain:
        middle = (best + too_long) // 2 // grain * grain
        if fits(middle):
            best = middle
        else:
            too_long = middle
    return best


def largest(fits: Callable[[int], bool], low: int, high: int, grain: int) -> int:
    """The largest multiple of ``grain`` in ``[low, high]`` that fits; 0 where none does.

    It doubles first, because a try that is far too long costs most.
    """
    best, reach = 0, max(grain, low // grain * grain)
    too_long = (high // grain + 1) * grain
    while reach < too_long and fits(reach):
        best, reach = reach, reach * 2
    return _halved(fits, best, min(too_long, reach), grain)
