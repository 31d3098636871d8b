"""Which column holds what, by the field's usual names, and the conversations' usual forms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qft.errors import DataError
from qft.recipe import Columns

Message = dict[str, Any]  # role and content; a call of tools or its answer has more

# For each task: role → the names that columns with it usually have, the surest first.
USUAL_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "text": {"text": ("text", "content", "story", "document", "passage", "sentence", "code")},
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

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "agent_1": "user",  # Topical-Chat: two people, named by who speaks first
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "agent_2": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_ROLE_KEYS = ("role", "from", "speaker", "agent")
_CONTENT_KEYS = ("content", "value", "text", "message")


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
    return _require_text(row[column], f"row {number}, column {column!r}")


def _require_text(value: Any, where: str) -> str:
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


def read_messages(value: Any, number: int) -> list[Message]:
    """A conversation as ``[{"role": …, "content": …}, …]``.

    Known are OpenAI's form (role, content) and ShareGPT's (from, value; human, gpt), and the names
    dialogue corpora use; of Topical-Chat's two people, agent_2 is the assistant.

    Raises:
        DataError: not a conversation, or one with content that is no text.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(
            "A conversation is a list of messages.",
            where=f"row {number}",
            found=f"{type(value).__name__}: {value!r:.80}",
            fix='[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]',
        )
    return [_read_message(m, f"row {number}, message {i}") for i, m in enumerate(value, start=1)]


def _read_message(message: Any, where: str) -> Message:
    keys: Mapping[str, Any] = message if isinstance(message, Mapping) else {}
    role_key = next((key for key in _ROLE_KEYS if keys.get(key) is not None), None)
    content_key = next((key for key in _CONTENT_KEYS if keys.get(key) is not None), None)
    calls = keys.get("tool_calls")
    if role_key is None or (content_key is None and not calls):
        raise DataError(
            "A message needs a role and its words.",
            where=where,
            found=f"{message!r:.80}",
            fix='{"role": "user", "content": "…"} or {"from": "human", "value": "…"}',
        )
    role = _ROLES.get(str(message[role_key]).lower())
    if role is None:
        raise DataError(
            "The role of a message is not known.",
            where=where,
            found=f"{message[role_key]!r:.80}",
            fix=f"one of {', '.join(_ROLES)}",
        )
    words = _require_text(message[content_key], where) if content_key is not None else ""
    extra = {key: keys[key] for key in ("name", "tool_call_id") if keys.get(key) is not None}
    if calls:
        extra["tool_calls"] = [_read_call(call, where) for call in _as_list(calls, where)]
    return {"role": role, "content": words, **extra}


def _as_list(calls: Any, where: str) -> list[Any]:
    if not isinstance(calls, (list, tuple)):
        raise DataError("tool_calls is no list.", where=where, found=f"{calls!r:.80}")
    return list(calls)


def _read_call(call: Any, where: str) -> dict[str, Any]:
    """A call in OpenAI's form; templates want its arguments as values, files hold them as text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            "A call of a tool needs the function's name.",
            where=where,
            found=f"{call!r:.80}",
            fix='{"type": "function", "function": {"name": "…", "arguments": {…}}}',
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise DataError(
                "The arguments of a tool's call are no JSON.", where=where,
                found=f"{arguments!r:.80}",
            ) from None  # fmt: skip
    named = {"name": function["name"], "arguments": arguments}
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": named}
