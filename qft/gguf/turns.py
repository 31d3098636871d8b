"""A chat template as what stands between the words of a conversation, found by rendering.

Ollama does not run the tokenizer's template (Jinja) but one of its own (Go's). Most templates only
put fixed text before, between and after the messages: probes show that text, and conversations
that the probes do not hold show whether it was all. What a template does beyond that (it drops
earlier thoughts, writes the date, shows tools) is not expressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qft.data.conversations import CONVERSATIONS
from qft.data.template import has_template, render
from qft.errors import QftError

_SYSTEM, _FIRST, _SECOND = "qftsystemwords", "qftfirstwords", "qftsecondwords"
_ANSWER = "qftanswerwords"
_TALKERS = ("user", "assistant")
Messages = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Turns:
    """The text around the messages.

    Attributes:
        opening: before the first question, where there is no system message.
        system: before and after a system message, to the first question; None where the template
            takes none.
        answer: between a question and its answer, within the conversation.
        next: between an answer and the next question.
        prompt: after the last question, for the answer to follow.
        trims: whose messages the template strips of blanks around them, which Ollama's cannot.
    """

    opening: str
    system: tuple[str, str] | None
    answer: str
    next: str
    prompt: str
    trims: tuple[str, ...] = ()

    def render(self, messages: Messages) -> str:
        """A conversation that ends in a question, and the prompt for its answer."""
        first, *rest = messages
        if first["role"] != "system":
            text, rest = self.opening, list(messages)
        elif self.system is None:
            raise ValueError("the template takes no system message")
        else:
            text = self.system[0] + first["content"] + self.system[1]
        for number, message in enumerate(rest):
            last = number == len(rest) - 1
            after = self.prompt if last else self.answer
            text += message["content"] + (after if message["role"] == "user" else self.next)
        return text


def turns_of(tokenizer: Any, begin: str = "") -> Turns | None:
    """What the tokenizer's template puts around messages; None where that is not all it does.

    Args:
        begin: text of the token that a runtime puts before every text by itself; a template that
            writes it too must not write it twice.
    """
    if not has_template(tokenizer):
        return None
    try:
        found = _probed(tokenizer, begin)
        if found is None:
            return None
        for trims in ((), _TALKERS, ("system", *_TALKERS)):
            if all(_same(tokenizer, found, messages, begin, trims) for messages in _asked(found)):
                return replace(found, trims=trims)
    except QftError:
        pass
    return None


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _written(tokenizer: Any, messages: Messages, begin: str) -> str:
    text = render(tokenizer, list(messages), add_generation_prompt=True)
    return text.removeprefix(begin) if begin else text


def _probed(tokenizer: Any, begin: str) -> Turns | None:
    question, more = _message("user", _FIRST), _message("user", _SECOND)
    answer, system = _message("assistant", _ANSWER), _message("system", _SYSTEM)
    two = _between(_written(tokenizer, [question, answer, more], begin), _FIRST, _ANSWER, _SECOND)
    if two is None:
        return None
    opening, between, following, prompt = two
    try:
        told = _between(_written(tokenizer, [system, question], begin), _SYSTEM, _FIRST)
    except QftError:
        told = []  # it takes no system message
    if told is None:
        return None
    return Turns(opening, (told[0], told[1]) if told else None, between, following, prompt)


def _between(text: str, *words: str) -> list[str] | None:
    """What stands before, between and after the words; None unless each is there once, in order."""
    parts = []
    for word in words:
        if text.count(word) != 1:
            return None
        before, text = text.split(word)
        parts.append(before)
    return [*parts, text]


def _asked(found: Turns) -> list[list[dict[str, str]]]:
    """The probe conversations up to their last question: what a runtime renders."""
    asked = []
    for _, messages, _ in CONVERSATIONS:
        last = max(n for n, message in enumerate(messages) if message["role"] == "user")
        if messages[0]["role"] != "system" or found.system is not None:
            asked.append(messages[: last + 1])
    return asked


def _same(
    tokenizer: Any, found: Turns, messages: Messages, begin: str, trims: Sequence[str]
) -> bool:
    shown = [
        _message(m["role"], m["content"].strip() if m["role"] in trims else m["content"])
        for m in messages
    ]
    return _written(tokenizer, messages, begin) == found.render(shown)
