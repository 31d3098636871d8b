"""Conversations in their usual forms, and the tools that they may call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qft.data.columns import require_text
from qft.errors import DataError

Message = dict[str, Any]  # role and content; thoughts, a call of tools or its answer beside them
REASONING = "reasoning_content"

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


def read_messages(value: Any, number: int) -> list[Message]:
    """A conversation as ``[{"role": …, "content": …}, …]``.

    Known are OpenAI's form (role, content) and ShareGPT's (from, value; human, gpt), and the names
    dialogue corpora use; of Topical-Chat's two people, agent_2 is the assistant.

    Content may be OpenAI's list of text parts. An assistant's `reasoning_content` stays beside it,
    for templates that write it.

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
    words = _read_words(message[content_key], where) if content_key is not None else ""
    extra = {key: keys[key] for key in ("name", "tool_call_id") if keys.get(key) is not None}
    if keys.get(REASONING):
        extra[REASONING] = require_text(keys[REASONING], where)
    if calls:
        extra["tool_calls"] = [_read_call(call, where) for call in _as_list(calls, where)]
    return {"role": role, "content": words, **extra}


def _read_words(content: Any, where: str) -> str:
    """A text, or OpenAI's list of parts as one."""
    if not isinstance(content, (list, tuple)):
        return require_text(content, where)
    words = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text":
            raise DataError(
                "A message has a part that is no text; only text is trained on.",
                where=where,
                found=f"{part!r:.80}",
                fix='{"type": "text", "text": "…"}, or take the row out',
            )
        words.append(require_text(part.get("text"), where))
    return "".join(words)


def read_tools(value: Any, number: int) -> list[Any] | None:
    """The functions a model may call, as templates want them; files also hold them as JSON text.

    Raises:
        DataError: no JSON, or no list of descriptions.
    """
    where = f"row {number}, tools"
    if isinstance(value, str):
        value = _from_json(value, "The tools are no JSON.", where) if value.strip() else None
    if not value:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(t, Mapping) for t in value):
        raise DataError(
            "The tools are no list of descriptions.",
            where=where,
            found=f"{value!r:.80}",
            fix='[{"type": "function", "function": {"name": "…", "parameters": {…}}}]',
        )
    return list(value)


def _from_json(text: str, problem: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise DataError(problem, where=where, found=f"{text!r:.80}") from None


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
        arguments = _from_json(arguments, "The arguments of a tool's call are no JSON.", where)
    named = {"name": function["name"], "arguments": arguments}
    identity = {"id": call["id"]} if call.get("id") is not None else {}
    return {**identity, "type": "function", "function": named}
