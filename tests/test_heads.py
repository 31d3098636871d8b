"""Tasks with a head of their own, beside one class a row: spans, tags, several classes, numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer

from qft.data.columns import find_columns
from qft.data.examples import EncodeSettings
from qft.data.extract import ExtractTask, read_answers
from qft.data.tagging import TokenTask
from qft.data.tasks import TASKS, load_examples
from qft.errors import DataError, ModelError
from qft.export.delivery import merge
from qft.judging.spans import best_span
from qft.models import ModelSpec, open_model
from qft.recipe import Columns, Data, build_recipe
from qft.scoring import evaluate as score
from qft.training import train

Writer = Callable[..., Path]
CONTEXT = "Ada was born in London. She died in 1852, aged 36. " * 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def squad(question: str, text: str, start: int, context: str = CONTEXT) -> dict[str, Any]:
    return {
        "question": question, "context": context,
        "answers": {"text": [text], "answer_start": [start]},
    }  # fmt: skip


def settings(task: str, rows: list[dict[str, Any]], **changes: Any) -> EncodeSettings:
    columns = find_columns(task, rows, Columns())
    return EncodeSettings(columns, **{"max_length": 64, "stride": 8, **changes})


# --- spans


def test_every_window_that_holds_the_answer_points_at_it(tokenizer: Any):
    start = CONTEXT.index("1852")
    rows = [squad("When?", "1852", start)]
    examples = ExtractTask().encode([(1, rows[0])], tokenizer, settings("extract", rows), [])
    assert len(examples) > 1
    found = []
    for example in examples:
        first, last = example.inputs["labels"]
        window = example.truth
        if (first, last) != (window.none_at, window.none_at):
            found.append(CONTEXT[window.offsets[first][0] : window.offsets[last][1]])
        else:  # the answer is not whole in this window
            inside = [span for span in window.offsets if span]
            assert not (inside[0][0] <= start and inside[-1][1] >= start + 4)
    assert set(found) == {"1852"}


def test_windows_cover_the_whole_context_and_overlap(tokenizer: Any):
    rows = [squad("When?", "1852", CONTEXT.index("1852"))]
    examples = ExtractTask().encode([(1, rows[0])], tokenizer, settings("extract", rows), [])
    seen = [span for e in examples for span in e.truth.offsets if span]
    assert {i for a, b in seen for i in range(a, b)} == set(range(len(CONTEXT)))
    assert len(seen) > len(CONTEXT)
    assert all(len(e.inputs["input_ids"]) <= 64 for e in examples)


def test_squads_nesting_becomes_one_row_a_question():
    nested = {"title": "t", "paragraphs": [{"context": "abc", "qas": [
        {"id": "1", "question": "q", "answers": [{"text": "b", "answer_start": 1}]},
        {"id": "2", "question": "r", "answers": [], "is_impossible": True},
    ]}]}  # fmt: skip
    rows = ExtractTask().flatten([nested])
    assert [row["context"] for row in rows] == ["abc", "abc"]
    assert read_answers(rows[0], "answers", "abc", 1) == [(1, 2)]
    assert read_answers(rows[1], "answers", "abc", 1) == []
    assert read_answers({"answers": "b"}, "answers", "abc", 1) == [(1, 2)]


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"text": ["x"], "answer_start": [0]}, "not in the context where it says"),
        ({"text": ["b"], "answer_start": [-2]}, "not in the context"),
        ("a b", "exactly once"),
        ("c", "exactly once"),
        (7, "a text and where it begins"),
        ([{"text": "b"}], "a text and where it begins"),
    ],
)
def test_an_answer_that_is_not_there_is_refused(answers: Any, words: str):
    with pytest.raises(DataError, match=words):
        read_answers({"answers": answers}, "answers", "abcc", 3)


def test_a_question_that_fills_the_window_is_refused(tokenizer: Any):
    rows = [squad("why " * 30, "1852", CONTEXT.index("1852"))]
    with pytest.raises(DataError, match="no room"):
        ExtractTask().encode([(1, rows[0])], tokenizer, settings("extract", rows), [])


def test_the_best_span_is_found_as_trying_every_pair_finds_it(tokenizer: Any):
    rows = [squad("Who?", "Ada", 0)]
    example = ExtractTask().encode([(1, rows[0])], tokenizer, settings("extract", rows), [])[0]
    window = example.truth
    torch.manual_seed(0)
    start, end = torch.randn(2, 64)
    pairs = {
        (a, b): float(start[a] + end[b])
        for a, first in enumerate(window.offsets) if first
        for b, last in enumerate(window.offsets) if last and 0 <= b - a < 30
    }  # fmt: skip
    a, b = max(pairs, key=lambda pair: pairs[pair])
    found = best_span(window, start, end)
    assert found.text == CONTEXT[window.offsets[a][0] : window.offsets[b][1]]
    assert found.score == pytest.approx(pairs[a, b])


# --- tags


def test_a_words_first_token_carries_its_tag(tokenizer: Any):
    rows = [{"tokens": ["Ada", "lived", "in", "München"], "ner_tags": ["B-PER", "O", "O", "B-LOC"]}]
    columns = find_columns("token", rows, Columns())
    labels = TokenTask().classes([(1, rows[0])], columns)
    assert labels == ("O", "B-LOC", "B-PER")
    example = TokenTask().encode(
        [(1, rows[0])], tokenizer, settings("token", rows, labels=labels), []
    )[0]
    tags = [labels[i] for i in example.inputs["labels"] if i >= 0]
    assert tags == rows[0]["ner_tags"]
    first = example.inputs["labels"].index(2)
    assert tokenizer.decode(example.inputs["input_ids"][first]).strip() == "A"


def test_words_and_tags_must_match(tokenizer: Any):
    rows = [{"tokens": ["a", "b"], "tags": ["O"]}]
    with pytest.raises(DataError, match="one tag a word"):
        TokenTask().encode([(1, rows[0])], tokenizer, settings("token", rows, labels=("O",)), [])


def test_numbered_tags_take_their_names_from_the_recipe(tokenizer: Any):
    rows = [{"tokens": ["a", "b"], "tags": [0, 1]}]
    made = settings("token", rows, labels=("O", "B-X"))
    example = TokenTask().encode([(1, rows[0])], tokenizer, made, [])[0]
    assert [i for i in example.inputs["labels"] if i >= 0] == [0, 1]


# --- classes and numbers


@pytest.mark.parametrize(
    ("labels", "kind", "expected"),
    [
        ([["a"], ["a", "b"], []], "many", [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]),
        ([0.5, 1, -2.25], "number", [0.5, 1.0, -2.25]),
        (["1", "2", "1"], "one", [0, 1, 0]),
        ([1.0, 2.0, 1.0], "one", [0, 1, 0]),
    ],
)
def test_what_a_label_is_shows_in_the_rows(
    labels: list[Any], kind: str, expected: list[Any], write_rows: Writer, tokenizer: Any
):
    path = write_rows([{"text": f"t{i}", "label": label} for i, label in enumerate(labels)])
    found = load_examples(
        "classify", str(path), tokenizer, data=Data(train=str(path)), max_length=16
    )
    assert found.labels_are == kind
    assert [example.inputs["labels"] for example in found.examples] == expected


def test_a_second_text_follows_the_first(write_rows: Writer, minilm: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    rows = [{"premise": "a b", "hypothesis": "c", "label": i % 2} for i in range(2)]
    path = write_rows(rows)
    found = load_examples(
        "classify", str(path), tokenizer, data=Data(train=str(path)), max_length=16
    )
    batch = TASKS["classify"].collate(found.examples, 0)
    expected = tokenizer("a b", "c")
    assert batch["input_ids"][0].tolist() == expected["input_ids"]
    assert batch["token_type_ids"][0].tolist() == expected["token_type_ids"]


# --- end to end: train, evaluate in a fresh process, merge with proof


def rows_for(kind: str) -> tuple[str, list[dict[str, Any]]]:
    words = ["red", "green", "blue", "seven"]
    match kind:
        case "span":
            rows = []
            for i in range(24):
                context = f"{words[i % 3]} number {i} is here"
                rows.append(squad("Which number?", str(i), context.index(str(i)), context))
            return "extract", rows
        case "tags":
            return "token", [
                {"tokens": ["see", words[i % 3], str(i)], "tags": ["O", "B-COL", "O"]}
                for i in range(24)
            ]
        case "many":
            return "classify", [
                {"text": f"{words[i % 3]} {i}", "label": [words[i % 3], *["odd"] * (i % 2)]}
                for i in range(24)
            ]
        case _:
            return "classify", [{"text": "x" * (1 + i), "label": i / 8} for i in range(24)]


@pytest.mark.parametrize(
    ("kind", "measures"),
    [
        ("span", {"exact_match", "f1"}),
        ("tags", {"entity_f1", "entity_precision", "entity_recall", "accuracy"}),
        pytest.param("many", {"micro_f1", "macro_f1", "accuracy"}, marks=pytest.mark.slow),
        pytest.param("number", {"rmse", "pearson", "spearman"}, marks=pytest.mark.slow),
    ],
)
def test_each_head_trains_and_answers_the_same_in_a_fresh_process(
    kind: str, measures: set[str], tiny_bert: Path, tmp_path: Path, write_rows: Writer
):
    task, rows = rows_for(kind)
    path = write_rows(rows)
    recipe = build_recipe({
        "model": str(tiny_bert), "task": task, "strategy": {"name": "lora", "rank": 4},
        "data": {"train": str(path), "eval": str(path), "max_duplicate_share": 1},
        "train": {"epochs": 6, "batch_size": 8, "learning_rate": 5e-3, "max_length": 64},
        "device": "cpu", "dtype": "float32", "output": str(tmp_path / "run"),
    })  # fmt: skip
    result = train(recipe)
    assert set(result.metrics) == {"loss", *measures}
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert result.metrics["loss"] < first["eval_loss"]
    code = (
        "import json, sys; from qft.scoring import evaluate as score;"
        "print(json.dumps(score(sys.argv[1], data=sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), str(path)],
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    fresh = json.loads(done.stdout.splitlines()[-1])
    assert fresh == pytest.approx(result.metrics, rel=1e-6)
    report = merge(tmp_path / "run", tmp_path / "merged", verify=True, data=str(path))
    assert report["verification"]["passed"]
    merged = score(str(tmp_path / "merged"), data=str(path), dtype="float32")
    assert merged == pytest.approx(fresh, rel=1e-4)


def test_a_model_that_would_be_random_is_refused(tiny_llama: Path):
    """transformers makes new weights where names do not fit, and only warns."""
    with pytest.raises(ModelError, match="does not hold all"):
        open_model(tiny_llama, ModelSpec(source=str(tiny_llama), task="extract"))
