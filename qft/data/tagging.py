"""The task whose label is a tag a word: named entities, parts of speech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qft.data.classify import label_name
from qft.data.encoding import UNSUPERVISED, require_offsets
from qft.data.examples import (
    EncodeSettings,
    Example,
    NumberedRow,
    Task,
    collate_language,
    fit_lengths,
)
from qft.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer


class TokenTask(Task):
    """Words and a tag for each; a word's first token carries its tag."""

    name = "token"
    predicts = "tags"

    def classes(self, rows: Sequence[NumberedRow], columns: Mapping[str, str]) -> tuple[str, ...]:
        """The tags in the rows: "O" first, then by type and prefix; numbers as numbers.

        Raises:
            DataError: fewer than two, or a row whose tags are no list.
        """
        found = {tag for number, row in rows for tag in _tags(row, columns, number)}
        if len(found) < 2:
            where = f"column {columns['tags']!r}"
            raise DataError(
                "The rows have fewer than two tags.", where=where, found=", ".join(found)
            )
        if all(tag.isdigit() for tag in found):
            return tuple(str(number) for number in range(max(map(int, found)) + 1))
        return tuple(sorted(found, key=lambda t: (t != "O", t.partition("-")[::-1])))

    def encode(
        self,
        rows: Sequence[NumberedRow],
        tokenizer: Tokenizer,
        settings: EncodeSettings,
        notes: list[str],
    ) -> list[Example]:
        """One example a row; `labels` are tags' places in ``settings.labels``, else -100."""
        assert settings.labels is not None
        require_offsets(tokenizer)
        place = {str(i): i for i in range(len(settings.labels))}  # numbers, named by data.labels
        place |= {name: i for i, name in enumerate(settings.labels)}
        encoded = [self._encode(number, row, tokenizer, settings, place) for number, row in rows]
        numbers = [number for number, _ in rows]
        dropped = fit_lengths([len(ids) for ids, _ in encoded], numbers, settings, notes)
        limit, examples, empty = settings.max_length, [], 0
        for position, (ids, labels) in enumerate(encoded):
            if position in dropped:
                continue
            lost = set(labels[:limit]) <= {UNSUPERVISED}
            if lost and set(labels) <= {UNSUPERVISED}:  # not by the cut: no words at all
                empty += 1
                continue
            cut = labels[limit:] != [UNSUPERVISED] * len(labels[limit:])
            inputs = {"input_ids": ids[:limit], "labels": labels[:limit]}
            index = settings.index_offset + position
            examples.append(Example(index, inputs, cut=cut, lost=lost))
        if empty:
            notes.append(f"{empty} of {len(rows)} rows dropped: no word that the tokenizer knows")
        return examples

    def _encode(
        self,
        number: int,
        row: Mapping[str, Any],
        tokenizer: Tokenizer,
        settings: EncodeSettings,
        place: Mapping[str, int],
    ) -> tuple[list[int], list[int]]:
        words = _list(row[settings.columns["tokens"]], f"row {number}, tokens")
        tags = _tags(row, settings.columns, number)
        if len(words) != len(tags) or not all(isinstance(w, str) and w.strip() for w in words):
            raise DataError("Words and tags must match, one tag a word.", where=f"row {number}",
                            found=f"{len(words)} words, {len(tags)} tags")  # fmt: skip
        unknown = sorted(set(tags) - set(place))
        if unknown:
            raise DataError("A tag is none of the known ones.", where=f"row {number}",
                            found=f"{unknown[0]!r}; known are {', '.join(place)}",
                            fix="name all tags in data.labels before training")  # fmt: skip
        # Words joined by spaces, so that every tokenizer sees them as it does in running text; the
        # offsets tell which token begins which word.
        starts, text = {}, ""
        for word, tag in zip(words, tags, strict=True):
            text += " " if text else ""
            starts[len(text)] = place[tag]
            text += word
        encoded: Any = tokenizer(text, return_offsets_mapping=True, verbose=False)
        labels = []
        for begin, end in encoded["offset_mapping"]:
            begin += text[begin:end].startswith(" ")  # byte-level tokens hold the space before
            labels.append(starts.pop(begin, UNSUPERVISED) if end > begin else UNSUPERVISED)
        return list(encoded["input_ids"]), labels

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
        """See `Task.collate`; `labels` ``[batch, longest]``."""
        return collate_language(examples, pad_token_id)

    def label_count(self, batch: Mapping[str, Tensor]) -> int:
        """The tagged words."""
        return int((batch["labels"] != UNSUPERVISED).sum())


def _tags(row: Mapping[str, Any], columns: Mapping[str, str], number: int) -> list[str]:
    return [label_name(tag, number) for tag in _list(row[columns["tags"]], f"row {number}, tags")]


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise DataError("A list is needed here, one entry a word.", where=where,
                        found=f"{type(value).__name__}: {value!r:.80}")  # fmt: skip
    return list(value)
