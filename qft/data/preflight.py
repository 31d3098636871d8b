"""Before a training: are the labels on the right tokens, and is the held-out data held out?

What would train the wrong thing, or nothing, is refused with the reason; what is merely worth
knowing is a note. `shown_example` is what a person looks at to be sure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from qft.data.chat import terminators
from qft.data.encoding import UNSUPERVISED, end_token
from qft.data.examples import Example, ExampleSet, inputs_fingerprint
from qft.data.extract import Window
from qft.errors import DataError
from qft.recipe import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

# Tasks whose answers end somewhere; plain text goes on.
_ENDING = ("instruct", "chat", "seq2seq")
# Tasks whose label is of the row, not of its tokens.
_OF_ROWS = ("classify", "extract")


def preflight(
    task_name: str,
    training: ExampleSet,
    held_out: ExampleSet | None,
    tokenizer: Tokenizer,
    data: Data,
) -> list[str]:
    """Notes on encoded data.

    Raises:
        DataError: every reason why this data must not be trained on, in one error.
    """
    problems: list[DataError] = []
    for name, part in (("train", training), ("eval", held_out)):
        if part is None:
            continue
        labelled = part.examples if task_name not in _OF_ROWS else []
        problems += _unsupervised(name, labelled, task_name)
        problems += _cut(name, part, data)
        problems += _twice_begun(name, part.examples, tokenizer)
        if task_name in _ENDING:
            problems += _never_ended(name, labelled, task_name, tokenizer)
    repeated, notes = _repeated(training, held_out, data)
    problems += repeated
    if task_name == "token" and training.labels and all(map(str.isdigit, training.labels)):
        notes.append("the tags are numbers: entities are scored only where data.labels names them "
                     "in order (O, B-PER, I-PER, …)")  # fmt: skip
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = "\n".join(f"- {problem.text()}" for problem in problems)
        raise DataError(f"The data check found {len(problems)} problems.\n{lines}")
    return notes


def _unsupervised(name: str, examples: Sequence[Example], task_name: str) -> list[DataError]:
    # a causal model never predicts the first token
    first = 0 if task_name in ("seq2seq", "token") else 1
    empty = [e.index for e in examples if set(e.inputs["labels"][first:]) <= {UNSUPERVISED}]
    if not empty:
        return []
    return [DataError(
        f"{len(empty)} of {len(examples)} examples have no supervised token.",
        where=f"{name}, example {empty[0] + 1}" + (" is the first" if len(empty) > 1 else ""),
        fix="take these rows out; a conversation needs words of the assistant",
    )]  # fmt: skip


def _cut(name: str, part: ExampleSet, data: Data) -> list[DataError]:
    """Completions cut short or cut off entirely; the latter are no examples any more."""
    rows = len(part.examples) + part.lost
    cut = sum(example.cut for example in part.examples) + part.lost
    if cut <= data.max_cut_share * rows:
        return []
    entirely = f", {part.lost} of them entirely" if part.lost else ""
    return [DataError(
        "Truncation cuts off the completion of too many rows; they would never teach an ending.",
        where=name,
        found=f"{cut} of {rows} examples{entirely}, more than {data.max_cut_share:.0%}",
        fix="a larger train.max_length, data.too_long: drop, or a larger data.max_cut_share",
    )]  # fmt: skip


def _twice_begun(name: str, examples: Sequence[Example], tokenizer: Tokenizer) -> list[DataError]:
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id:
        return []
    twice = [e.index for e in examples if e.inputs["input_ids"][:2] == [bos, bos]]
    if not twice:
        return []
    return [DataError(
        f"{len(twice)} of {len(examples)} examples begin with two bos tokens.",
        where=f"{name}, example {twice[0] + 1}" + (" is the first" if len(twice) > 1 else ""),
        found=f"{tokenizer.bos_token!r} twice",
        fix="take it out of the rows' text, or out of the chat template",
    )]  # fmt: skip


def _never_ended(
    name: str, examples: Sequence[Example], task_name: str, tokenizer: Tokenizer
) -> list[DataError]:
    """Whether what ends an answer is ever a label."""
    end = end_token(tokenizer)
    ends = set() if end is None else {end}
    if task_name != "seq2seq" and tokenizer.chat_template:
        ends |= set(terminators(tokenizer))
    whole = [example for example in examples if not example.cut]
    taught = any(not ends.isdisjoint(example.inputs["labels"]) for example in whole)
    if not whole or taught:
        return []
    masked = any(_ends_unsupervised(example, ends) for example in whole)
    return [DataError(
        "The token that ends an answer is never supervised, so the model would never learn to "
        "stop.",
        where=name,
        found="the end is there, but masked away as if it were padding"
        if masked
        else f"none of {sorted(ends)} among the labels",
        fix="a pad token other than eos" if masked else "rows or a template that end in eos",
    )]  # fmt: skip


def _ends_unsupervised(example: Example, ends: set[int]) -> bool:
    ids, labels = example.inputs["input_ids"], example.inputs["labels"]
    return len(ids) == len(labels) and ids[-1] in ends and labels[-1] == UNSUPERVISED


def _repeated(
    training: ExampleSet, held_out: ExampleSet | None, data: Data
) -> tuple[list[DataError], list[str]]:
    """Held-out rows that are training rows: a metric on them measures memory.

    Compared is what the model is given, as another label makes no new row. Plain text is compared
    by documents as well: its blocks begin elsewhere in each part.
    """
    if held_out is None:
        return [], []
    notes: list[str] = []
    known, asked = ([inputs_fingerprint(e) for e in p.examples] for p in (training, held_out))
    own = [example.index for example in held_out.examples]
    documents = held_out.documents
    for what, before, after, numbers in (
        ("document", training.documents, documents, list(range(len(documents)))),
        ("example", tuple(known), tuple(asked), own),
    ):
        seen = set(before)
        twice = [n + 1 for n, digest in zip(numbers, after, strict=True) if digest in seen]
        if not twice:
            continue
        found = f"{len(twice)} of {len(after)} held-out {what}s are training {what}s too"
        if len(twice) > data.max_duplicate_share * len(after):
            return [DataError(
                "The held-out rows are not held out: what they measure would be memory.",
                where=f"eval, {what} {twice[0]}"
                + (" is the first" if len(twice) > 1 else ""),
                found=f"{found}, more than {data.max_duplicate_share:.1%}",
                fix="other rows in data.eval, or a larger data.max_duplicate_share",
            )], []  # fmt: skip
        notes.append(found)
    return [], notes


Piece = tuple[str, bool]  # text, and whether the loss is on it


def shown_example(example: Example, tokenizer: Tokenizer, length: int = 400) -> dict[str, Any]:
    """An example as a person reads it.

    Args:
        length: at most so many tokens; the rest is left out.

    Returns:
        `pieces`: the text in order, each piece with whether it is supervised; `labels`: the
        supervised tokens' ids, or the class; `tokens` and `supervised`: how many there are.
    """
    ids, labels = example.inputs["input_ids"], example.inputs["labels"]
    if isinstance(example.truth, Window):  # the answer's span, as if its tokens were the labels
        first, last = labels
        labels = [first <= place <= last for place in range(len(ids))]
        shown = shown_example(_with_labels(example, ids, labels), tokenizer, length)
        return {**shown, "labels": [first, last], "supervised": last - first + 1}
    if not isinstance(labels, list) or len(labels) != len(ids):
        pieces: list[Piece] = [(_decoded(tokenizer, ids[:length]), False)]
        targets = labels if isinstance(labels, list) else [labels]
        if isinstance(labels, list):
            kept = [label for label in labels[:length] if label != UNSUPERVISED]
            pieces.append((_decoded(tokenizer, kept), True))
    else:
        marked = list(zip(ids, (label != UNSUPERVISED for label in labels), strict=True))[:length]
        pieces = [
            (_decoded(tokenizer, [token for token, _ in group]), supervised)
            for supervised, group in groupby(marked, key=lambda pair: pair[1])
        ]
        targets = labels
    wanted = [label for label in targets if label != UNSUPERVISED]
    return {"pieces": pieces, "labels": wanted, "tokens": len(ids), "supervised": len(wanted)}


def _with_labels(example: Example, ids: list[int], kept: list[bool]) -> Example:
    labels = [i if keep else UNSUPERVISED for i, keep in zip(ids, kept, strict=True)]
    return Example(example.index, {"input_ids": ids, "labels": labels})


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def counts(part: ExampleSet) -> dict[str, int]:
    """Examples, tokens and supervised labels (or rows, where a label is the row's)."""
    total: Counter[str] = Counter(examples=len(part.examples))
    for example in part.examples:
        labels = example.inputs["labels"]
        total["tokens"] += len(example.inputs["input_ids"])
        whole = not isinstance(labels, list) or part.labels_are == "many"
        whole = whole or isinstance(example.truth, Window)
        values = [0] if whole else labels
        total["supervised"] += sum(label != UNSUPERVISED for label in values)
    return dict(total)
