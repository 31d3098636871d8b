"""Every example runs offline, from beginning to end, in each of the ways to fine-tune."""

from __future__ import annotations

import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from qft.errors import QftError
from qft.recipe import load_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted(path.name for path in EXAMPLES.glob("*.yaml"))
APPLICATIONS = (
    "text generation", "machine translation", "question answering", "sentiment analysis",
    "dialogue", "code generation",
)  # fmt: skip
WAYS = ("last layer", "everything")
CPU_SECONDS = 120.0
QUICK = ("translation.yaml",)  # the others are for `make test-slow`
QUICK_WAYS = (("dialogue", "last layer"),)
HEADER = re.compile(
    r"^# (The last layer alone|只训练最后一层|Everything retrained|全部重训): (.+)$"
)


def table() -> dict[tuple[str, str], list[str]]:
    """The README's commands without `python`: (application, way) → words."""
    found = {}
    for line in (EXAMPLES / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[1].startswith("`python "):
            for way, cell in zip(WAYS, cells[1:], strict=True):
                found[cells[0], way] = shlex.split(cell.strip("`"))[1:]
    return found


def header_ways(name: str) -> dict[str, list[str]]:
    """The overrides that a recipe's first lines tell: way → words."""
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    told = [match for line in lines if (match := HEADER.match(line))]
    last = ("The last layer alone", "只训练最后一层")
    return {WAYS[m[1] not in last]: shlex.split(m[2]) for m in told}


def run(*arguments: str) -> str:
    before = cpu_seconds_of_children()
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=EXAMPLES.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(EXAMPLES.parent)},
        timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert cpu_seconds_of_children() - before < CPU_SECONDS
    return done.stdout


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RECIPES]
)
def test_a_recipe_runs(name: str, minilm: Path):
    assert "\nloss: " in run("examples/run.py", f"examples/{name}", "--smoke")


@pytest.mark.parametrize(
    "cell",
    [c if c in QUICK_WAYS else pytest.param(c, marks=pytest.mark.slow) for c in sorted(table())],
    ids=" · ".join,
)
def test_an_application_runs_in_a_way(cell: tuple[str, str], minilm: Path):
    assert "\nloss: " in run(*table()[cell], "--smoke")


def test_the_table_has_every_application_in_every_way():
    assert set(table()) == {(a, way) for a in APPLICATIONS for way in WAYS}
    for (_, way), (script, recipe, *overrides) in table().items():
        assert (script, Path(recipe).parent.name) == ("examples/run.py", "examples")
        named = Path(recipe).name
        if overrides:  # the sentiment recipes are the ways themselves
            assert header_ways(named)[way] == overrides, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_tells_the_other_ways_and_they_validate(name: str):
    own = load_recipe(EXAMPLES / name).strategy.handed_over.name
    told = header_ways(name)
    assert set(told) | {{"head": WAYS[0], "full": WAYS[1]}.get(own)} - {None} == set(WAYS)
    for way, overrides in told.items():
        recipe = load_recipe(EXAMPLES / name, overrides)
        assert recipe.task in recipe.strategy.tasks
        expected = ("full",) if way == "everything" else ("head", "layers")
        assert recipe.strategy.handed_over.name in expected
        if way == "everything":  # what trains cannot be quantized
            assert recipe.quantize == "none"
        if way == "last layer":
            has_head = recipe.task in ("classify", "extract", "token")
            assert (recipe.strategy.handed_over.name == "head") == has_head


def test_a_wrong_override_is_told_without_a_traceback():
    done = subprocess.run(
        [sys.executable, "examples/run.py", "examples/dialogue.yaml", "--smoke", "train.epoch=1"],
        capture_output=True, text=True, cwd=EXAMPLES.parent,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )  # fmt: skip
    with pytest.raises(QftError) as caught:
        load_recipe(EXAMPLES / "dialogue.yaml", ["train.epoch=1"])
    assert done.returncode == caught.value.exit_code
    assert "did you mean 'epochs'" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_classic_walk_through(minilm: Path):
    printed = run("examples/bert_classifier.py", "--smoke")
    assert "the same predictions" in printed
    accuracy = float(printed.splitlines()[-1].split(" ")[1])
    assert accuracy > 0.6


@pytest.mark.slow
def test_the_small_card(tmp_path: Path):
    assert "proven against the adapter" in run("examples/qlora_8gb.py", "--smoke")
