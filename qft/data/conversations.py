"""Short conversations that show what a chat template does: to compare two, or to describe one."""

from __future__ import annotations

_USER = {"role": "user", "content": "What is 2 + 2?"}
_ASSISTANT = {"role": "assistant", "content": "It is 4."}
# name, messages, whether the generation prompt is asked for
CONVERSATIONS: tuple[tuple[str, list[dict[str, str]], bool], ...] = (
    ("one turn", [_USER, _ASSISTANT], False),
    ("one question, with the generation prompt", [_USER], True),
    ("a system message", [{"role": "system", "content": "Be  brief."}, _USER, _ASSISTANT], False),
    ("a system message, with the generation prompt",
     [{"role": "system", "content": "Be brief.\n"}, _USER], True),
    ("three turns", [_USER, _ASSISTANT, {"role": "user", "content": " And 3?"}, _ASSISTANT,
                     _USER, _ASSISTANT], False),
    ("two turns, with the generation prompt", [_USER, _ASSISTANT, _USER], True),
)  # fmt: skip
