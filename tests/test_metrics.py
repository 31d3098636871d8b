"""The field's measures against values worked out by hand and against known libraries."""

from __future__ import annotations

import pytest
import torch

from qft.judging.classes import ClassJudge
from qft.judging.tags import TagJudge
from qft.metrics.answers import answer_scores, words
from qft.metrics.entities import entities, entity_scores, mark_entities


def test_answers_are_compared_as_squad_does():
    assert words("The  Cat, sat.") == ["cat", "sat"]
    found = answer_scores(["the cat", "dog", "", "a b c"], [["Cat!"], ["cat"], [], ["b c d"]])
    assert found["exact_match"] == 0.5
    assert found["f1"] == pytest.approx((1 + 0 + 1 + 0.8) / 4)  # "a" is an article


def test_chinese_answers_are_compared_character_by_character():
    assert words("308分,") == ["308", "分"]
    found = answer_scores(["北京大学"], [["北京"]])
    assert found == {"exact_match": 0.0, "f1": pytest.approx(2 * 2 / 6)}


def test_the_best_of_several_accepted_answers_counts():
    assert answer_scores(["b"], [["x", "b"]]) == {"exact_match": 1.0, "f1": 1.0}


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O B-LOC", {(0, 2, "PER"), (3, 4, "LOC")}),
        ("I-PER I-PER I-LOC", {(0, 2, "PER"), (2, 3, "LOC")}),  # IOB1
        ("B-PER B-PER", {(0, 1, "PER"), (1, 2, "PER")}),
        ("S-PER B-LOC I-LOC E-LOC", {(0, 1, "PER"), (1, 4, "LOC")}),
        ("U-PER B-LOC L-LOC O", {(0, 1, "PER"), (1, 3, "LOC")}),
        ("O O", set()),
        ("B-PER E-PER I-PER", {(0, 2, "PER"), (2, 3, "PER")}),
    ],
)
def test_entities_of_every_usual_scheme(tags: str, expected: set[tuple[int, int, str]]):
    assert entities(tags.split()) == expected


def test_an_entity_counts_whole_or_not_at_all():
    truth = [["B-PER", "I-PER", "O", "B-LOC"]]
    answer = [["B-PER", "O", "O", "B-LOC"]]
    scores = entity_scores(answer, truth)
    assert scores == {"entity_precision": 0.5, "entity_recall": 0.5, "entity_f1": 0.5}
    assert entity_scores([["O"]], [["O"]])["entity_f1"] == 0.0


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (("O", "B-PER", "I-PER"), True),
        (("S-人名", "O"), True),
        (("0", "1", "2", "3"), False),
        (("DET", "NOUN"), False),
        (("O", "B-PER", "X"), False),
        (("O",), False),
    ],
)
def test_entities_are_scored_only_where_tags_mark_them(labels: tuple[str, ...], expected: bool):
    assert mark_entities(labels) is expected
    judge = TagJudge(labels)
    width = len(labels)
    judge.add(([0.5] * 2, [[0, width - 1]], [[0, 0]]))
    assert ("entity_f1" in judge.result([])) is expected
    assert judge.result([])["accuracy"] == (0.5 if width > 1 else 1.0)


def judged(logits: list[list[float]], labels: torch.Tensor) -> dict[str, float]:
    class Fixed(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> object:
            return type("Output", (), {"logits": torch.tensor(logits)})

    judge = ClassJudge()
    judge.add(judge.score(Fixed(), {"input_ids": labels, "labels": labels}, []))
    return judge.result([])


def test_one_class_a_row():
    found = judged([[2.0, 0], [2.0, 0], [0, 2.0], [2.0, 0]], torch.tensor([0, 0, 1, 1]))
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["matthews"] == pytest.approx(2 / (3 * 1 * 2 * 2) ** 0.5)


def test_several_classes_a_row():
    found = judged([[1.0, 1, -1], [1.0, -1, -1]], torch.tensor([[1.0, 0, 0], [1.0, 0, 0]]))
    assert found["accuracy"] == 0.5
    assert found["micro_f1"] == pytest.approx(0.8)
    assert found["macro_f1"] == pytest.approx(1 / 3)


def test_numbers():
    found = judged([[1.0], [2.0], [4.0]], torch.tensor([1.0, 2.0, 3.0]))
    assert found["rmse"] == pytest.approx((1 / 3) ** 0.5)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(0.98198, abs=1e-4)
    assert judged([[1.0], [1.0]], torch.tensor([1.0, 2.0]))["pearson"] == 0.0
