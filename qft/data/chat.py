"""Chat templates, and which tokens of a conversation are the assistant's.

The template itself says where the assistant's words are: what it renders for `messages[:i]` with
the generation prompt is what the model will be given, what it adds for `messages[:i + 1]` is what
the model must write. Both are prefixes of the whole conversation's text, so their lengths are the
borders, and the tokens are found by their offsets. Nothing is searched for: a user may write
`<|im_start|>assistant` and is not taken for one.

A template that renders earlier turns otherwise once later ones follow (it drops their thoughts)
has no such prefixes. Then its `{% generation %}` marks are used, if it has them; else each turn of
the assistant becomes a sequence of its own that ends there, which is what generation will see.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qft.data.encoding import UNSUPERVISED, Encoded, Span, supervise, tokenize
from qft.data.messages import Message
from qft.data.template import Tools, apply_template, render
from qft.errors import DataError, QftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_PROBE = "qftwherewordsbegin"
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def mask_assistant(
    tokenizer: Tokenizer, messages: Sequence[Message]
) -> tuple[list[int], list[int]]:
    """Tokens and labels of a conversation.

    Supervised are exactly the assistant's words and the token that ends each of its turns.

    Returns:
        ``input_ids`` and ``labels``, one entry a token, not shifted; -100 is not supervised.

    Raises:
        DataError: the template does not show where the assistant's words are, or ends them with
            no token of its own.
        ModelError: the template or the tokenizer cannot be used.
    """
    encoded = encode_chat(tokenizer, messages)
    return encoded.input_ids, encoded.labels


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Message], *, tools: Tools = None
) -> Encoded:
    """As `mask_assistant`, with the bytes each token stands for."""
    sequences = encode_turns(tokenizer, messages, tools=tools)
    if len(sequences) > 1:
        raise _no_places(tokenizer, "it renders earlier turns otherwise once others follow")
    return sequences[0]


def encode_turns(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    last_only: bool = False,
    tools: Tools = None,
) -> list[Encoded]:
    """A conversation as sequences that together supervise each of the assistant's turns once.

    One sequence, where the template lets one hold them all; else one for each turn, with the
    conversation up to there.

    Args:
        last_only: supervise the assistant's last turn alone.

    Raises:
        DataError: see `mask_assistant`.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = turns[-1:] if last_only else turns
    text = render(tokenizer, messages, tools=tools)
    spans, reason = _spans_by_prefix(tokenizer, messages, text, wanted, tools)
    if spans is None:
        spans = _spans_by_marks(tokenizer, messages, text, tools)
        spans = spans[-1:] if spans and last_only else spans
    if spans is not None:
        return [_encode_spans(tokenizer, text, spans)]
    if last_only:
        raise _no_places(tokenizer, reason)
    return [
        sequence
        for turn in wanted
        for sequence in encode_turns(tokenizer, messages[: turn + 1], last_only=True, tools=tools)
    ]


def _no_places(tokenizer: Tokenizer, reason: str) -> DataError:
    return DataError(
        "The chat template does not show where the assistant's words are.",
        where=getattr(tokenizer, "name_or_path", None),
        found=reason,
        fix="a template with {% generation %} marks around the assistant's words; or rows with "
        "one assistant message each, at the end",
    )


def _encode_spans(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> Encoded:
    # The template writes bos itself where the model wants one; the tokenizer must add no second.
    ids, offsets = tokenize(tokenizer, text)
    spans = [(start, start + len(text[start:end].rstrip())) for start, end in spans]
    encoded = supervise(tokenizer, text, ids, offsets, spans)
    _require_terminators(tokenizer, encoded, offsets, spans)
    return encoded


def _spans_by_prefix(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    text: str,
    wanted: Sequence[int],
    tools: Tools,
) -> tuple[list[Span] | None, str]:
    """Where the wanted turns are, in characters of ``text``; else None and why not."""
    spans: list[Span] = []
    for i in wanted:
        try:
            head = render(tokenizer, messages[:i], add_generation_prompt=True, tools=tools)
            turn = text
            if i + 1 < len(messages):
                turn = render(tokenizer, messages[: i + 1], tools=tools)
        except QftError as error:
            return None, f"it cannot render the first messages alone: {error.found}"
        end = len(turn) if text.startswith(turn) else _common_end(tokenizer, turn, text)
        if not turn.startswith(head):
            prompt = head
            head = _head_of_turn(tokenizer, messages[:i], turn, prompt, tools)
            if not head:
                return None, f"message {i + 1} does not begin as the generation prompt, which "\
                    f"ends in {prompt[-40:]!r}"  # fmt: skip
        if not text.startswith(head) or end <= len(head):
            return None, f"it renders message {i + 1} otherwise once others follow"
        spans.append((len(head), end))
    return spans, ""


def _head_of_turn(
    tokenizer: Tokenizer, before: Sequence[Message], turn: str, prompt: str, tools: Tools
) -> str:
    """What stands before an answer where the generation prompt goes on beyond it; "" if unclear.

    Some thinking models' prompts open the thoughts (`<think>`) that their templates take out of
    finished turns. Words that no template knows show where the answer itself begins.
    """
    try:
        probe = render(tokenizer, [*before, {"role": "assistant", "content": _PROBE}], tools=tools)
    except QftError:
        return ""
    head = probe[: probe.find(_PROBE)] if probe.count(_PROBE) == 1 else ""
    return head if head and turn.startswith(head) and prompt.startswith(head) else ""


def prompted_beyond(tokenizer: Tokenizer) -> str:
    """What the generation prompt writes that no finished turn holds; "" for most templates."""
    asked = [{"role": "user", "content": "a"}]
    try:
        prompt = render(tokenizer, asked, add_generation_prompt=True)
        turn = render(tokenizer, [*asked, {"role": "assistant", "content": _PROBE}])
    except QftError:
        return ""
    head = _head_of_turn(tokenizer, asked, turn, prompt, None)
    return prompt[len(head) :] if head else ""


def _common_end(tokenizer: Tokenizer, turn: str, text: str) -> int:
    """Where two texts part, in characters, if a turn is complete by then; else 0.

    Some templates close the last turn, and with it the conversation, by one token more. The
    comparison is by tokens: as texts, `<|end|>` and `<|user|>` begin alike.
    """
    ends = _own_tokens(tokenizer)
    common = last = 0
    pairs = zip(zip(*tokenize(tokenizer, turn), strict=True),
                zip(*tokenize(tokenizer, text), strict=True), strict=False)  # fmt: skip
    for (token, (start, end)), other in pairs:
        if (token, (start, end)) != other:
            break
        common = end
        if turn[start:end].strip():
            last = token
    return common if last in ends else 0


def _own_tokens(tokenizer: Tokenizer) -> set[int]:
    """The special and added tokens, at which generation can stop."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def _spans_by_marks(
    tokenizer: Tokenizer, messages: Sequence[Message], text: str, tools: Tools
) -> list[Span] | None:
    """The same from the template's `{% generation %}` marks; None where it has none."""
    if not _MARKS.search(tokenizer.get_chat_template()):
        return None
    out = apply_template(
        tokenizer,
        [list(messages)],
        return_dict=True,
        return_assistant_tokens_mask=True,
        tools=list(tools) if tools else None,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    spans: list[Span] = []
    before = 0
    offsets, marks = out["offset_mapping"][0], out["assistant_masks"][0]
    for (start, end), mark in zip(offsets, marks, strict=True):
        if mark and before:
            spans[-1] = (spans[-1][0], end)
        elif mark:
            spans.append((start, end))
        before = mark
    return spans or None


def _require_terminators(
    tokenizer: Tokenizer, encoded: Encoded, offsets: Sequence[Span], spans: Sequence[Span]
) -> None:
    """Each turn must end with a token of the tokenizer's own: only at such does generation stop."""
    ends = _own_tokens(tokenizer)
    borders = iter(spans)
    border = next(borders, None)
    last: int | None = None
    for i, (start, _) in enumerate([*offsets, (10**18, 10**18)]):
        while border is not None and start >= border[1]:
            if last is None or encoded.input_ids[last] not in ends:
                written = "" if last is None else tokenizer.decode(encoded.input_ids[last])
                raise DataError(
                    "The chat template ends the assistant's turns with no token of its own, so the "
                    "model would never learn to stop.",
                    where=getattr(tokenizer, "name_or_path", None),
                    found=f"the last supervised token is {written!r}",
                    fix="a template that writes eos_token after the assistant's words (inside its "
                    "{% generation %} marks, if it has them)",
                )
            border, last = next(borders, None), None
        if i < len(encoded.labels) and encoded.labels[i] != UNSUPERVISED:
            last = i


def terminators(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an assistant's turn in this template; nothing if it does not tell."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        encoded = encode_chat(tokenizer, probe)
    except QftError:
        return []
    return [label for label in encoded.labels if label != UNSUPERVISED][-1:]
