"""Chinese from file to measure: spans of XQuAD by characters, written text by sacreBLEU."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sacrebleu
import torch
from conftest import make_tokenizer
from torch import Tensor, nn

from qft.data.examples import ExampleSet
from qft.data.tasks import TASKS, load_examples
from qft.evaluation import evaluate
from qft.metrics.texts import text_scores
from qft.recipe import Data, load_recipe

REPOSITORY = Path(__file__).parents[1]
HAN = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of bytes: each Chinese character is three tokens of the same place."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


class Oracle(nn.Module):
    """Knows each window's answer, or all of it but the last ``short`` tokens."""

    def __init__(self, examples: ExampleSet, short: int = 0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.short = short
        self.answers = {tuple(e.inputs["input_ids"]): e.inputs["labels"] for e in examples.examples}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Any:
        starts, ends = torch.zeros(2, *input_ids.shape)
        for row, (ids, size) in enumerate(zip(input_ids, attention_mask.sum(1), strict=True)):
            first, last = self.answers[tuple(ids[:size].tolist())]
            if first == last:  # "no answer here": less sure, so that another window wins
                starts[row, first] = ends[row, last] = 1.0
            else:
                starts[row, first] = ends[row, last - self.short] = self.scale
        return SimpleNamespace(start_logits=starts, end_logits=ends)


def judged(examples: ExampleSet, short: int = 0) -> dict[str, float]:
    return evaluate(Oracle(examples, short), examples.examples, TASKS["extract"], pad_token_id=0)


def test_xquad_is_read_cut_and_answered(assets: Path, tokenizer: Any, tmp_path: Path):
    """In SQuAD's own nesting; of the questions those whose answers are short enough in bytes."""
    stored = json.loads((assets / "data/qa/xquad/xquad.zh.json").read_text(encoding="utf-8"))
    articles = stored["data"][:2]
    for paragraph in (p for article in articles for p in article["paragraphs"]):
        paragraph["qas"] = [q for q in paragraph["qas"] if 1 < len(q["answers"][0]["text"]) <= 8]
    path = tmp_path / "xquad.json"
    path.write_text(json.dumps({"data": articles}), encoding="utf-8")
    examples = load_examples(
        "extract", str(path), tokenizer, data=Data(train="unused", stride=64), max_length=384
    )
    questions = {example.truth.row for example in examples.examples}
    assert 20 < len(questions) < len(examples.examples)  # long texts are read in windows
    found = judged(examples)
    assert (found["exact_match"], found["f1"]) == (1.0, 1.0)


def test_a_part_of_an_answer_counts_by_its_characters(tokenizer: Any, write_rows: Any):
    context = "他在北京大学学习。"
    rows = [{"question": "在哪里？", "context": context,
             "answers": {"text": ["北京大学"], "answer_start": [2]}}]  # fmt: skip
    examples = load_examples(
        "extract", str(write_rows(rows)), tokenizer, data=Data(train="unused", stride=8),
        max_length=128,
    )  # fmt: skip
    assert judged(examples)["exact_match"] == 1.0
    found = judged(examples, short=6)  # two characters less: "北京"
    assert found["exact_match"] == 0.0
    assert found["f1"] == pytest.approx(2 * 2 / (2 + 4))


def test_what_is_written_is_measured_by_sacrebleus_chinese():
    written, wanted = ["房子的门是红色的，很漂亮"], ["房子的门是绿色的，很漂亮"]
    by_characters = sacrebleu.corpus_bleu(written, [wanted], tokenize="zh").score
    by_words = sacrebleu.corpus_bleu(written, [wanted], tokenize="13a").score
    found = text_scores(written, wanted)
    assert found["bleu"] == pytest.approx(by_characters)
    assert by_characters > by_words + 10
    assert found["f1"] == pytest.approx(10 / 11)  # eleven characters without the comma


def test_the_chinese_recipe_is_tried_on_chinese_rows(tmp_path: Path):
    spec = importlib.util.spec_from_file_location("run", REPOSITORY / "examples" / "run.py")
    assert spec is not None
    assert spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    recipe = load_recipe(REPOSITORY / "examples" / "instruct_zh.yaml")
    small = runner.smoke(recipe, tmp_path, chinese=True)
    lines = Path(small.data.train).read_text(encoding="utf-8").splitlines()
    assert lines
    assert all(len(HAN.findall(line)) > 8 for line in lines)
