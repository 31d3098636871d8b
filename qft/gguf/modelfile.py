"""Ollama's Modelfile beside a GGUF file: where it is, how a chat is written, what ends an answer.

The format has no escapes: a value ends where its quotes do. Text of a model from elsewhere is
written only where it cannot end its quotes, and what a template's own text would mean to Go's
templates is written as a string of theirs. What cannot be written is left out, and said.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from qft.errors import ModelError
from qft.gguf.special_tokens import added_around
from qft.gguf.turns import Turns, turns_of

_LONGEST_CONTEXT = 8192  # Ollama sets memory aside for all of it
_PLAIN_PATH = re.compile(r"\./[A-Za-z0-9][A-Za-z0-9._-]*")
_SAMPLING = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # fmt: skip
_WHOLE = ("top_k",)
# what a Go template or the quotes around it would read otherwise; a brace may stand before others
_LITERAL = re.compile(r"\{+|\}\}|\"\"+|[^\n\t -~\u00a0-\U0010ffff]|[\u2028\u2029\ufeff]")


def modelfile(
    from_: str,
    tokenizer: Any,
    settings: Mapping[str, Any] | None = None,
    *,
    stops: Iterable[int] = (),
    context: int | None = None,
    adapter: str | None = None,
    notes: list[str] | None = None,
) -> str:
    """The text of a Modelfile.

    Args:
        from_: the model's file beside it, ``./NAME.gguf``.
        tokenizer: from ``AutoTokenizer``.
        settings: what generation_config.json holds.
        stops: tokens that end an answer.
        context: tokens the model can see; more than 8192 must be asked for.
        adapter: a LoRA's file beside it, ``./NAME.gguf``.
        notes: gets a sentence for each thing that is left out.

    Raises:
        ModelError: a path is not of that form.
    """
    said: list[str] = []
    lines = [f"FROM {_path(from_)}"]
    if adapter is not None:
        lines.append(f"ADAPTER {_path(adapter)}")
    lines += _template(tokenizer, said)
    for token in dict.fromkeys(stops):
        text = str(tokenizer.convert_ids_to_tokens(int(token)))
        quoted = _quoted(text)
        if quoted is None:
            said.append(f"The stop token {text!r} cannot be quoted in a Modelfile and is left out "
                        "of it; the GGUF file holds it.")  # fmt: skip
        else:
            lines.append(f"PARAMETER stop {quoted}")
    if context:
        lines.append(f"PARAMETER num_ctx {min(int(context), _LONGEST_CONTEXT)}")
    lines += _sampling(settings or {})
    if notes is not None:
        notes += said
    return "\n".join([*(f"# {' '.join(note.split())}" for note in said), *lines]) + "\n"


def _path(path: str) -> str:
    if not _PLAIN_PATH.fullmatch(path):
        raise ModelError("A Modelfile names files beside it, by plain names.", where="FROM",
                         found=path, fix="./NAME.gguf, of letters, digits, ., _ and -")  # fmt: skip
    return path


def _quoted(text: str) -> str | None:
    """A value in quotes; None where it would end them."""
    if not text or not text.isprintable():
        return None
    if '"' not in text:
        return f'"{text}"'
    return None if '"""' in text or '"' in (text[0], text[-1]) else f'"""{text}"""'


def _sampling(settings: Mapping[str, Any]) -> list[str]:
    """How tokens are drawn, where the model says so."""
    if settings.get("do_sample") is False:
        return ["PARAMETER temperature 0"]
    lines = []
    for key, name in _SAMPLING.items():
        value = settings.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            continue
        lines.append(f"PARAMETER {name} {int(value) if key in _WHOLE else value}")
    return lines


def _template(tokenizer: Any, said: list[str]) -> list[str]:
    if not isinstance(getattr(tokenizer, "chat_template", None), str):
        return []
    before, _ = added_around(tokenizer)
    begin = str(tokenizer.convert_ids_to_tokens(before[0])) if before else ""
    turns = turns_of(tokenizer, begin)
    if turns is None:
        said.append("The chat template does more than to put text around messages, so there is no "
                    "TEMPLATE: Ollama reads the one in the GGUF file.")  # fmt: skip
        return []
    if turns.system is None:
        said.append("The chat template takes no system message; a SYSTEM is left out.")
    if turns.trims:
        said.append("The chat template strips blanks around messages; Ollama keeps them.")
    return [f'TEMPLATE """{go_template(turns)}"""']


def go_template(turns: Turns) -> str:
    """The turns in the language of Ollama's templates.

    A conversation that ends in an answer is left open there, for the model to go on with it.
    """
    opening = literal(turns.opening)
    if turns.system is not None:
        before, after = (literal(part) for part in turns.system)
        told = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}"
        opening = f"{told}{{{{ else }}}}{opening}{{{{ end }}}}"
    last = "eq (len (slice $.Messages $i)) 1"
    return (
        f"{opening}{{{{ range $i, $m := .Messages }}}}"
        f'{{{{ if eq $m.Role "user" }}}}{{{{ $m.Content }}}}'
        f"{{{{ if {last} }}}}{literal(turns.prompt)}{{{{ else }}}}{literal(turns.answer)}"
        "{{ end }}"
        f'{{{{ else if eq $m.Role "assistant" }}}}{{{{ $m.Content }}}}'
        f"{{{{ if {last} }}}}{{{{ else }}}}{literal(turns.next)}{{{{ end }}}}"
        "{{ end }}{{ end }}"
    )


def literal(text: str) -> str:
    """Text that means itself in a Go template, and holds no three quotes."""
    made, at = "", 0
    for found in _LITERAL.finditer(text):
        made += text[at : found.start()] + "{{ " + _go_string(found.group()) + " }}"
        at = found.end()
    made += text[at:]
    if made.startswith('"'):  # beside the quotes of the Modelfile
        made = '{{ "\\"" }}' + made[1:]
    return made


def _go_string(text: str) -> str:
    """A Go string: JSON's escapes are Go's too, but for what lies beyond 16 bits."""
    return json.dumps(text, ensure_ascii=all(ord(c) < 0x10000 for c in text))
