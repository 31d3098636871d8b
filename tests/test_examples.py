"""Every example runs offline, from beginning to end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
QUICK = ("translation.yaml", "question_answering.yaml")  # the others are for `make test-slow`


def run(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=EXAMPLES.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES.parent)},
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES]
)
def test_a_recipe_runs(name: str, minilm: Path):
    printed = run("examples/run.py", f"examples/{name}", "--smoke")
    assert "loss: " in printed.splitlines()[-1] or "loss: " in printed


def test_the_classic_walk_through(minilm: Path):
    printed = run("examples/bert_classifier.py", "--smoke")
    assert "the same predictions" in printed
    accuracy = float(printed.splitlines()[-1].split(" ")[1])
    assert accuracy > 0.6


@pytest.mark.slow
def test_the_small_card(tmp_path: Path):
    assert "proven against the adapter" in run("examples/qlora_8gb.py", "--smoke")


def test_there_is_an_example_for_every_application():
    tasks = {"text_generation", "translation", "question_answering", "dialogue", "code_generation"}
    assert {f"{task}.yaml" for task in tasks} < set(RECIPES)
    assert {f"sentiment_{way}.yaml" for way in ("head", "lora", "full")} < set(RECIPES)
