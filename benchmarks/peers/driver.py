"""The driver: starts the sides, gives them their turns, and makes a row of what each reports."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

REPOSITORY = Path(__file__).parents[2]
AGREE = 0.01  # final losses differ by no more, relatively


class SideError(Exception):
    """A side could not go on; the text says which, and what it last printed."""


@dataclass(frozen=True)
class Side:
    """How a side is run.

    Attributes:
        name: of the row.
        script: a module of `benchmarks.peers.sides`.
        options: as the script describes them.
        environment: variables of its process.
        python: the interpreter of its environment.
    """

    name: str
    script: str
    options: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    python: str = sys.executable


class SideProcess:
    """A side's process, on the other end of two pipes."""

    def __init__(self, side: Side, job: Mapping[str, Any], folder: Path, threads: int) -> None:
        self.side = side
        self.reports: list[dict[str, Any]] = []
        self._log = folder / f"{side.name}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [side.python, "-m", f"benchmarks.peers.sides.{side.script}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder,
                env=side_environment(side, threads),
            )  # fmt: skip
        output = str(folder / f"{side.name}-run")
        self._send({**job, "options": dict(side.options), "output": output})
        self.ready: dict[str, Any] = {}

    def wait_until_ready(self) -> None:
        """Until the model is loaded and the first step could begin."""
        self.ready = self._receive("ready")

    def run_block(self) -> dict[str, Any]:
        """One block; what the side measured."""
        self._send({"go": True})
        report = self._receive("block")
        self.reports.append(report)
        return report

    def finish(self) -> None:
        """Lets the side end by itself."""
        self._send({"go": True})
        try:
            self._process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def stop(self) -> None:
        """Ends the side at once, if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._dead() from None

    def _receive(self, kind: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._dead()
        message: dict[str, Any] = json.loads(line)
        if message["kind"] != kind:
            raise SideError(f"{self.side.name}: said {message['kind']!r} where {kind!r} was due")
        return message

    def _dead(self) -> SideError:
        code = self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = "\n".join(lines[-8:]) or "(it printed nothing)"
        return SideError(
            f"{self.side.name}: its process ended with code {code}. Its last lines:\n{last}"
        )


def side_environment(side: Side, threads: int) -> dict[str, str]:
    """The variables of a side's process: all sides the same threads, none a model hub."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **side.environment,
    }


class Turns:
    """All sides of a run, alive at once, taking turns."""

    def __init__(
        self, sides: Sequence[Side], job: Mapping[str, Any], folder: Path, threads: int
    ) -> None:
        self.sides: list[SideProcess] = []
        self._start = [(side, job, folder, int(side.options.get("threads", threads)))
                       for side in sides]  # fmt: skip

    def __enter__(self) -> Self:
        """Starts them one after another: two that load at once disturb each other's memory."""
        try:
            for arguments in self._start:
                self.sides.append(SideProcess(*arguments))
                self.sides[-1].wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        for side in self.sides:
            side.stop()

    def run(self, blocks: int, say: Any = print) -> None:
        """One block to warm up and ``blocks`` more a side, in alternating order."""
        for number in range(blocks + 1):
            for side in self.sides if number % 2 == 0 else reversed(self.sides):
                report = side.run_block()
                say(
                    f"block {number} {side.side.name}: "
                    f"{report['tokens'] / report['cpu_seconds']:.1f} tokens a CPU-second, "
                    f"{report['tokens'] / report['seconds']:.1f} a second, "
                    f"loss {report['losses'][-1]:.4f}"
                )
        for side in self.sides:
            side.finish()


def require_same_work(sides: Sequence[SideProcess]) -> None:
    """Every step of every side had the same samples with the same labels.

    Raises:
        SideError: one had not.
    """
    first, *others = sides
    for other in others:
        for number, (a, b) in enumerate(zip(first.reports, other.reports, strict=True)):
            if a["steps"] != b["steps"]:
                raise SideError(
                    f"{other.side.name} and {first.side.name} did not train on the same samples "
                    f"and labels in block {number}: {b['tokens']} and {a['tokens']} tokens, "
                    f"{b['labels']} and {a['labels']} labels"
                )


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and the two fifths beside it."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"p20": fifths[0], "p50": statistics.median(values), "p80": fifths[3]}


def row_of(side: SideProcess) -> dict[str, Any]:
    """What the results say of a side: the first block only warms up.

    Raises:
        SideError: it did not train: a loss that does not fall, or no gradient.
    """
    _, *blocks = side.reports
    last = blocks[-1]["losses"]
    losses = [loss for report in side.reports for loss in report["losses"]]
    first_loss, final_loss = losses[0], statistics.fmean(last)
    name = side.side.name
    if not final_loss < first_loss:
        raise SideError(f"{name}: the loss does not fall: {first_loss:.4f} to {final_loss:.4f}")
    trained, moving = (
        max(report[key] for report in side.reports)
        for key in ("trained_tensors", "tensors_with_gradient")
    )
    if not moving or moving < trained:
        raise SideError(f"{name}: {moving} of {trained} trained tensors have a gradient")
    peak = max(report["peak_bytes"] for report in side.reports)
    tokens = sum(report["tokens"] for report in side.reports)
    positions = sum(report["positions"] for report in side.reports)
    return {
        "side": name,
        "settings": {
            "options": dict(side.side.options),
            "environment": dict(side.side.environment),
        },
        "versions": side.ready["versions"],
        "threads": side.ready["threads"],
        "tokens_per_cpu_second": spread([r["tokens"] / r["cpu_seconds"] for r in blocks]),
        "tokens_per_second": spread([r["tokens"] / r["seconds"] for r in blocks]),
        "peak_bytes_above_imports": peak - side.ready["imports_bytes"],
        "loaded_bytes_above_imports": side.ready["loaded_bytes"] - side.ready["imports_bytes"],
        "peak_is": side.ready["peak_is"],
        "first_loss": first_loss,
        "final_loss": final_loss,
        "losses": losses,
        "smallest_gradient_norm": min(n for r in blocks for n in r["gradient_norms"]),
        "padding_share": 1 - tokens / positions,
        "tokens": sum(report["tokens"] for report in blocks),
        "label_share": sum(r["labels"] for r in side.reports) / tokens,
    }  # fmt: skip


def agree(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the final losses are within one per cent of each other."""
    finals = [float(row["final_loss"]) for row in rows]
    return max(finals) <= min(finals) * (1 + AGREE)
