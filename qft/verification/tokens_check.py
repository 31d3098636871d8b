"""The same token ids for the same text, and the same words of a conversation's template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qft.data.conversations import CONVERSATIONS
from qft.data.template import has_template, render
from qft.errors import QftError
from qft.verification.diagnosis import Finding

AWKWARD = (
    "", " ", "  two  spaces ", "\n\n", "\t tab\r\n line", "end ", " begin",
    "na\u00efve caf\u00e9, Stra\u00dfe", "a\u0301 \u00e1", "zero\u200bwidth \u00a0 nbsp",
    "\u6f22\u5b57\u304b\u306a", "\U0001f642 \U0001f44d\U0001f3fd \U0001f469\u200d\U0001f467",
    "0", "0123456789", "3.14159 and 1,000,000", "007 1e-5 x1y2", "don't WON'T I'll",
    "<s>", "</s>", "<|im_start|>user\nhi<|im_end|>", "<0x41>", "[INST] x [/INST]",
    "def f(x):\n\treturn x**2  # ok", "https://example.org/?q=1&r=%20", "!!!???...",
)  # fmt: skip
_TOKENIZER_FIX = (
    "put the reference's tokenizer files (tokenizer.json, tokenizer_config.json and the others) "
    "beside the weights"
)


def check_tokens(reference: Any, artefact: Any, texts: Sequence[str], where: str) -> list[Finding]:
    """Whether two tokenizers give the same ids, with and without special tokens, and decode alike.

    Args:
        reference: a tokenizer.
        artefact: another.
        texts: beside the awkward ones.
        where: what the artefact's is called in a finding.
    """
    found = []
    differing = differing_texts(reference, artefact, [*AWKWARD, *texts])
    if differing:
        first = differing[0]
        ids = [_ids(tokenizer, first, True)[:8] for tokenizer in (reference, artefact)]
        found.append(
            f"{where} gives other ids for {len(differing)} of {len(AWKWARD) + len(texts)} texts, "
            f"first {first[:40]!r}: {ids[1]}, reference {ids[0]}"
        )
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    found += [
        f"{where} says {name} {getattr(artefact, name)}, reference {getattr(reference, name)}"
        for name in names
        if getattr(artefact, name) != getattr(reference, name)
    ]
    return [Finding("tokens", text, _TOKENIZER_FIX) for text in found]


def differing_texts(reference: Any, artefact: Any, texts: Sequence[str]) -> list[str]:
    """The texts whose ids, or whose text made from the ids again, are not the same."""
    return [
        text
        for text in texts
        if any(_ids(reference, text, special) != _ids(artefact, text, special)
               for special in (True, False))
        or _decoded(reference, text) != _decoded(artefact, text)
    ]  # fmt: skip


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _decoded(tokenizer: Any, text: str) -> str:
    return str(tokenizer.decode(_ids(tokenizer, text, True)))


def check_template(reference: Any, artefact: Any, where: str, file: str) -> list[Finding]:
    """Whether two tokenizers render the same conversations in the same words.

    Args:
        file: where the artefact's template is, for the advice.
    """
    if not has_template(reference) and not has_template(artefact):
        return []
    fix = f"put the reference's chat template into {file}"
    if has_template(reference) != has_template(artefact):
        which = "no chat template, the reference has one"
        if has_template(artefact):
            which = "a chat template, the reference has none"
        return [Finding("template", f"{where} has {which}", fix)]
    differing = [
        name
        for name, messages, prompt in CONVERSATIONS
        if _rendered(reference, messages, prompt) != _rendered(artefact, messages, prompt)
    ]
    if not differing:
        return []
    count = f"{len(differing)} of {len(CONVERSATIONS)}"
    text = f"{where} renders {count} conversations otherwise, first {differing[0]}"
    return [Finding("template", text, fix)]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], prompt: bool) -> str | None:
    """None where the template refuses the conversation: both must."""
    try:
        return render(tokenizer, messages, add_generation_prompt=prompt)
    except QftError:
        return None
