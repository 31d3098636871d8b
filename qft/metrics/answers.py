"""Exact match and F1 of short answers, as SQuAD's evaluation defines them, for any language.

Source: Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250. Words of scripts without spaces
(Chinese, Japanese, Korean, Thai) are compared character by character, as CMRC 2018 does.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# CJK ideographs and their extensions, kana, hangul, Thai: scripts whose words have no spaces
_UNSPACED = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af\u0e00-\u0e7f"
    r"\U00020000-\U0003134f]"
)


def answer_scores(predictions: Sequence[str], truths: Sequence[Sequence[str]]) -> dict[str, float]:
    """The means over all questions, each in [0, 1].

    Args:
        predictions: one a question; empty for "no answer".
        truths: every accepted answer of each question; none for a question without an answer.

    Returns:
        ``exact_match`` and ``f1``; a question counts with its best accepted answer.
    """
    if len(predictions) != len(truths) or not predictions:
        raise ValueError("one prediction a question, and at least one question")
    exact = f1 = 0.0
    for prediction, accepted in zip(predictions, truths, strict=True):
        pairs = [(words(prediction), words(truth)) for truth in accepted or [""]]
        exact += max(float(found == wanted) for found, wanted in pairs)
        f1 += max(_f1(found, wanted) for found, wanted in pairs)
    return {"exact_match": exact / len(predictions), "f1": f1 / len(predictions)}


def words(text: str) -> list[str]:
    """An answer's words: lower case, without punctuation and English articles."""
    text = "".join(c for c in text.lower() if not unicodedata.category(c).startswith("P"))
    return _UNSPACED.sub(r" \g<0> ", _ARTICLES.sub(" ", text)).split()


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:  # no answer is right only where there is none
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))
