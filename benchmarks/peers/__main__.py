"""Runs the cases; a line a side is appended to benchmarks/results/peers.jsonl.

QFT_ASSETS=ASSETS python -m benchmarks.peers --case alpaca-135m --sides plain unsloth qft
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.peers.cases import CASES, Case, make_job
from benchmarks.peers.driver import (
    REPOSITORY,
    Side,
    SideError,
    Turns,
    agree,
    require_same_work,
    row_of,
)
from benchmarks.peers.lineup import SIDES, UnavailableError, lineup

RESULTS = REPOSITORY / "benchmarks" / "results" / "peers.jsonl"
SCRATCH = Path(tempfile.gettempdir()) / "qft-peers"


def main() -> None:
    """Runs what the command line asks for."""
    arguments = parse()
    cases = list(CASES) if arguments.case == ["all"] else arguments.case
    commit = current_commit()
    failed = False
    for name in cases:
        case = CASES[name]
        if arguments.steps:
            case = replace(case, steps=arguments.steps)
        if arguments.missing and is_done(arguments.results, name, commit):
            print(f"{name}: measured at {commit} already")
            continue
        failed |= not run_case(name, case, arguments, commit)
    if failed:
        sys.exit(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", nargs="+", default=["all"], choices=["all", *CASES])
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--blocks", type=int, default=5, help="measured, after one to warm up")
    parser.add_argument("--steps", type=int, help="optimizer steps a block; else the case's own")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--missing", action="store_true",
                        help="leave out cases that have rows of this commit")  # fmt: skip
    parser.add_argument("--try", dest="tries", action="append", default=[], metavar="NAME=SIDE:{…}",
                        help="another side: one of the known ones with other options")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--scratch", type=Path, default=SCRATCH,
                        help="where models, logs and Unsloth's environment are")  # fmt: skip
    return parser.parse_args()


def run_case(name: str, case: Case, arguments: argparse.Namespace, commit: str) -> bool:
    """One run of one case; whether every side trained, and to the same loss."""
    assets = os.environ.get("QFT_ASSETS")
    if not assets:
        sys.exit("QFT_ASSETS must name the folder that holds the tokenizer and the instructions")
    folder = arguments.scratch / name
    folder.mkdir(parents=True, exist_ok=True)
    job = make_job(case, Path(assets), folder, arguments.blocks)
    facts = {
        "benchmark": "peers",
        "case": name,
        "run": uuid.uuid4().hex[:12],
        "date": date.today().isoformat(),
        "commit": commit,
        "environment": hardware(),
        "blocks": arguments.blocks,
        "steps": case.steps,
        "batch": case.batch,
        "learning_rate": case.learning_rate,
    }
    sides, rows = [], []
    for wanted in [*arguments.sides, *arguments.tries]:
        try:
            sides.append(lineup(wanted, name, arguments.scratch))
        except UnavailableError as error:
            rows.append({**facts, "side": wanted, "unavailable": str(error)})
    measured, problem = measure(sides, job, folder, arguments)
    rows += [{**facts, **row} for row in measured]
    if problem:
        print(f"{name}: {problem}", file=sys.stderr)
        return False
    same = agree(measured)
    with arguments.results.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps({**row, "losses_agree": same}) + "\n" for row in rows)
    if not same:
        finals = ", ".join(f"{row['side']} {row['final_loss']:.4f}" for row in measured)
        print(f"{name}: the final losses differ by more than 1 %: {finals}", file=sys.stderr)
    show(rows)
    return same


def measure(
    sides: Sequence[Side], job: dict[str, Any], folder: Path, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], str | None]:
    """The rows, or what went wrong."""
    try:
        with Turns(sides, job, folder, arguments.threads) as turns:
            turns.run(arguments.blocks, lambda text: print(text, flush=True))
        require_same_work(turns.sides)
        return [row_of(side) for side in turns.sides], None
    except SideError as error:
        return [], str(error)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A table for the one who waits."""
    for row in rows:
        if "unavailable" in row:
            print(f"{row['side']}: cannot run here: {row['unavailable']}")
            continue
        cpu, wall = row["tokens_per_cpu_second"], row["tokens_per_second"]
        print(
            f"{row['side']:16} {cpu['p50']:7.1f} tokens a CPU-second ({cpu['p20']:.1f}-"
            f"{cpu['p80']:.1f}), {wall['p50']:7.1f} a second, "
            f"{row['peak_bytes_above_imports'] / 2**20:6.0f} MiB, "
            f"{row['padding_share']:.0%} padding, "
            f"loss {row['first_loss']:.3f} to {row['final_loss']:.4f}"
        )


def is_done(results: Path, case: str, commit: str) -> bool:
    if not results.is_file():
        return False
    rows = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return any(row["case"] == case and row["commit"] == commit for row in rows)


def current_commit() -> str:
    """The last commit of the measured code, and a mark where it has been changed since."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True
        ).stdout.strip()

    code = ("--", "qft", "adapters", "benchmarks/peers")
    changed = git("status", "--porcelain", *code)
    return git("log", "-1", "--format=%h", *code) + ("+changes" if changed else "")


def hardware() -> dict[str, Any]:
    """Of this machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
    }


if __name__ == "__main__":
    main()
