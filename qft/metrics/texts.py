"""Written texts against what a person wrote: BLEU, chrF, ROUGE, exact match and F1 of the words."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from qft.metrics.answers import answer_scores
from qft.scripts import UNSPACED

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


def text_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The usual measures, one reference a text.

    Returns:
        ``bleu`` and ``chrf`` (sacreBLEU's, 0 to 100; Chinese references are split as sacreBLEU's
        ``zh``), ``rouge_1``, ``rouge_2``, ``rouge_l`` (F-measures, no stemming),
        ``exact_match`` and ``f1`` (0 to 1).
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError("one prediction a reference, and at least one")
    import sacrebleu

    lists = [list(references)]
    tokenize = "zh" if _mostly_chinese(references) else "13a"
    rouge = [_rouge(_words(p), _words(r)) for p, r in zip(predictions, references, strict=True)]
    return {
        "bleu": sacrebleu.corpus_bleu(list(predictions), lists, tokenize=tokenize).score,
        "chrf": sacrebleu.corpus_chrf(list(predictions), lists).score,
        **{name: sum(row[name] for row in rouge) / len(rouge) for name in rouge[0]},
        **answer_scores(predictions, [[reference] for reference in references]),
    }


def _mostly_chinese(texts: Sequence[str]) -> bool:
    found = "".join(texts)
    return len(_HAN.findall(found)) * 3 > len(found)


def _words(text: str) -> list[str]:
    """Runs of letters and digits in lower case, as ROUGE's usual implementations have them.

    Those know a-z and 0-9 only; here other letters count too, each by itself where the script has
    no spaces.
    """
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower())
    return UNSPACED.sub(r" \g<0> ", kept).split()


def _rouge(found: list[str], wanted: list[str]) -> dict[str, float]:
    """F-measures of shared n-grams and of the longest common subsequence.

    Source: Lin 2004, https://aclanthology.org/W04-1013.
    """
    scores = {}
    for size in (1, 2):
        pair = [Counter(zip(*(side[i:] for i in range(size)), strict=False))
                for side in (found, wanted)]  # fmt: skip
        scores[f"rouge_{size}"] = _f1(
            sum((pair[0] & pair[1]).values()), *(sum(c.values()) for c in pair)
        )
    scores["rouge_l"] = _f1(_longest_common(found, wanted), len(found), len(wanted))
    return scores


def _f1(shared: int, found: int, wanted: int) -> float:
    return 2 * shared / (found + wanted) if shared else 0.0


def _longest_common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for place, other in enumerate(b):
            row.append(before[place] + 1 if word == other else max(row[place], before[place + 1]))
    return row[-1]
