"""Which column holds what, by the field's usual names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qft.errors import DataError
from qft.recipe import Columns

# For each task: role → the names that columns with it usually have, the surest first.
USUAL_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {"text": ("text", "content", "story", "document", "passage", "sentence", "code")},
    "embed": {"text": ("text", "sentence", "content", "document", "passage", "query", "title")},
    "classify": {
        "text": (
            "text",
            "sentence",
            "sentence1",
            "premise",
            "question1",
            "text1",
            "review",
            "content",
            "comment",
            "tweet",
            "title",
            "input",
        ),
        "label": ("label", "labels", "sentiment", "class", "category", "target", "stars", "score"),
        "text_pair": ("text_pair", "sentence2", "hypothesis", "question2", "text2"),
    },
    "instruct": {
        "prompt": ("instruction", "prompt", "question", "query"),
        "input": ("input", "context"),
        "completion": ("output", "completion", "response", "answer", "target"),
    },
    "seq2seq": {
        "source": ("source", "src", "input", "text", "article", "document", "question", "en"),
        "target": ("target", "tgt", "output", "summary", "highlights", "answer", "de", "zh"),
    },
    "extract": {
        "question": ("question", "query"),
        "context": ("context", "passage", "paragraph", "text"),
        "answers": ("answers", "answer"),
    },
    "token": {
        "tokens": ("tokens", "words"),
        "tags": ("ner_tags", "tags", "labels", "pos_tags", "entities"),
    },
    "chat": {
        "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "content"),
        "tools": ("tools", "functions"),
    },
}
OPTIONAL = {("instruct", "input"), ("chat", "tools"), ("classify", "text_pair")}


def find_columns(
    task: str, rows: Sequence[Mapping[str, Any]], overrides: Columns
) -> dict[str, str]:
    """Finds the column of every role a task needs.

    Args:
        task: a key of ``USUAL_NAMES``.
        rows: all rows; each must have the columns.
        overrides: the user's own choice, which wins.

    Returns:
        ``{role: column}``; an optional role that is not there is left out.

    Raises:
        DataError: a column is missing, in all rows or in one.
    """
    present = list(dict.fromkeys(name for row in rows for name in row))
    asked = overrides.model_dump()
    found: dict[str, str] = {}
    missing: list[str] = []
    for role, names in USUAL_NAMES[task].items():
        override = asked.get(role)
        if override is not None:
            if str(override) in present:
                found[role] = str(override)
            else:
                missing.append(f"{role} (data.columns.{role} names {override!r})")
            continue
        column = _by_usual_name(names, present, rows)
        if column is not None:
            found[role] = column
        elif (task, role) not in OPTIONAL:
            missing.append(f"{role} (usual names: {', '.join(names)})")
    if missing:
        raise _not_found(task, missing, present)
    for role, column in found.items():
        if (task, role) not in OPTIONAL:
            _require_in_all(role, column, rows)
    return found


def _by_usual_name(
    names: Sequence[str], present: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> str | None:
    """The surest name that every row has, else the surest that any row has."""
    lower = {name.lower(): name for name in reversed(present)}
    candidates = [lower[name] for name in names if name in lower]
    complete = (c for c in candidates if all(row.get(c) is not None for row in rows))
    return next(complete, candidates[0] if candidates else None)


def _not_found(task: str, missing: list[str], present: list[str]) -> DataError:
    first = missing[0].split(" ")[0]
    roles = [entry.split(" ")[0] for entry in missing]
    example = " ".join(f"data.columns.{role}=NAME" for role in roles)
    numbers = " ".join(f"data.columns.{role}={i}" for i, role in enumerate(USUAL_NAMES[task]))
    return DataError(
        f"The data has no column for {' and '.join(roles)}.",
        where=f"task {task} needs {', '.join(missing)}",
        found="columns: " + (", ".join(repr(name)[:60] for name in present[:20]) or "none"),
        fix=f"name the column of {first}: {example}"
        + (f"; a csv or tsv file without a header line: {numbers}" if task != "chat" else ""),
    )


def _require_in_all(role: str, column: str, rows: Sequence[Mapping[str, Any]]) -> None:
    lacking = [number for number, row in enumerate(rows, start=1) if row.get(column) is None]
    if lacking:
        raise DataError(
            f"{len(lacking)} of {len(rows)} rows have nothing in the column {column!r}.",
            where=f"row {lacking[0]}" + (" is the first" if len(lacking) > 1 else ""),
            found=f"its columns: {', '.join(repr(n)[:60] for n in rows[lacking[0] - 1])}",
            fix=f"take these rows out, or name another column: data.columns.{role}=NAME",
        )


def text_in(row: Mapping[str, Any], column: str, number: int) -> str:
    """The text of a cell.

    Raises:
        DataError: it is no text, or text that UTF-8 cannot write.
    """
    return require_text(row[column], f"row {number}, column {column!r}")


def require_text(value: Any, where: str) -> str:
    """The value, if it is a text that UTF-8 can write; else a DataError."""
    if not isinstance(value, str):
        raise DataError(
            "A text is needed here.", where=where, found=f"{type(value).__name__}: {value!r:.80}"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            "The text holds half a character (a lone surrogate), which no tokenizer can read.",
            where=where,
            found=f"{value[error.start : error.end]!r} at character {error.start}",
        ) from None
    return value
