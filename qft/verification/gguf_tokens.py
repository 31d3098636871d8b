"""The tokenizer within a GGUF file: its tables, its template, and what llama.cpp makes of it.

Every table is held against the reference's tokenizer itself, asked by texts where it can be. What
the writer thought of that tokenizer plays no part, but that texts which llama.cpp is known to cut
otherwise are a note.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import gguf

from qft.errors import QftError
from qft.gguf.vocabulary import read_vocabulary
from qft.verification.cut_check import check_cuts
from qft.verification.diagnosis import Finding
from qft.verification.llama_tokens import installed, llama_tokens
from qft.verification.subject import Subject
from qft.verification.tokens_check import AWKWARD, check_template, differing_texts

_SPACE = "▁"
_FIX = "export the GGUF file again from the reference's tokenizer"
_PLACES = {
    "bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk", "seperator": "sep",
    "cls": "cls", "mask": "mask",
}  # fmt: skip
_NEEDED = ("bos", "eos", "pad")  # the others llama.cpp finds by itself, or needs for BERT alone
_TYPE = {int(kind): kind.name for kind in gguf.TokenType}


def check_inside(
    reference: Any, artefact: Subject, texts: Sequence[str]
) -> tuple[list[Finding], list[str]]:
    """What is wrong with the tokenizer in a GGUF file, and notes.

    transformers' converter cuts some texts otherwise than llama.cpp (blanks at the borders, names
    of special tokens within a text), so what only its reading shows is a note.

    Args:
        reference: the reference's tokenizer.
        texts: held-out ones; awkward ones are added.
    """
    assert artefact.gguf is not None
    tables = Tables(reference, artefact)
    notes: list[str] = []
    wrong = [*tables.names(), *tables.types(), *tables.order(), *tables.ids(), *tables.around()]
    wrong += tables.cuts(notes, [*AWKWARD, *texts])
    findings = [Finding("tokens", text, _FIX) for text in wrong]
    findings += _check_template(reference, tables)
    if not wrong:  # llama.cpp stops the process at some faults that the tables show
        findings += _ask_llama_cpp(reference, artefact, texts, notes)
    notes += _read_by_transformers(reference, artefact, [*AWKWARD, *texts])
    return findings, notes


def check_same_tables(reference: Subject, artefact: Subject) -> list[Finding]:
    """Two GGUF files: what transformers makes of the first one's tokenizer is no measure."""
    findings = []
    second = artefact.reader.fields
    for key, field in reference.reader.fields.items():
        if not key.startswith("tokenizer.") or key.endswith(".eos_token_ids"):  # not llama.cpp's
            continue
        kind = "template" if key.startswith("tokenizer.chat_template") else "tokens"
        if key not in second:
            findings.append(Finding(kind, f"the GGUF file has no {key}", _FIX))
        elif second[key].contents() != field.contents():
            findings.append(Finding(kind, f"the GGUF file has another {key}", _FIX))
    return findings


class Tables:
    """What a file says of its tokenizer, beside the reference's tokenizer."""

    def __init__(self, reference: Any, artefact: Subject) -> None:
        self.reference = reference
        self._fields = artefact.reader.fields
        self.kind = str(self.value("model", "")) or "?"
        backend = getattr(reference, "backend_tokenizer", None)
        self.json: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}

    def value(self, key: str, default: Any = None) -> Any:
        """A setting under ``tokenizer.ggml``."""
        field = self._fields.get(f"tokenizer.ggml.{key}")
        return default if field is None else field.contents()

    @property
    def template(self) -> str | None:
        """The chat template in the file."""
        field = self._fields.get("tokenizer.chat_template")
        return None if field is None else str(field.contents())

    @cached_property
    def tokens(self) -> list[str]:
        """The names by id."""
        return list(self.value("tokens", []))

    def names(self) -> Iterator[str]:
        """Each id the same token, none twice."""
        by_id = {number: token for token, number in self.reference.get_vocab().items()}
        added = {entry["id"] for entry in self.json.get("added_tokens", [])}
        wrong = [
            (number, token) for number, token in sorted(by_id.items())
            if number >= len(self.tokens)
            or self.tokens[number] not in self._spellings(token, number in added)
        ]  # fmt: skip
        if wrong:
            number, token = wrong[0]
            there = self.tokens[number] if number < len(self.tokens) else None
            yield (f"the GGUF file names {len(wrong)} tokens otherwise, first id {number}: "
                   f"{there!r}, reference {token!r}")  # fmt: skip
        twice = len(self.tokens) - len(set(self.tokens))
        if twice:
            yield f"the GGUF file has {twice} token(s) twice, at which llama.cpp stops"

    def _spellings(self, token: str, added: bool) -> tuple[str, ...]:
        if self.kind != "bert" or added:
            return (token, token.replace(_SPACE, " ")) if added else (token,)
        if token.startswith("##"):
            return (token[2:],)
        return (_SPACE + token, *([token] if token.startswith("[") else []))

    def types(self) -> Iterator[str]:
        """Special tokens are not text, text is not special."""
        types = list(self.value("token_type", []))
        added = {entry["id"]: entry for entry in self.json.get("added_tokens", [])}
        bytes_too = bool(self.json.get("model", {}).get("byte_fallback"))
        wrong = []
        for token, number in self.reference.get_vocab().items():
            if number >= len(types):
                continue
            allowed = _allowed(token, added.get(number), bytes_too)
            if _TYPE.get(int(types[number]), "?") not in allowed:
                wrong.append((number, token, allowed))
        if wrong:
            number, token, allowed = min(wrong)
            there = _TYPE.get(int(types[number]), "?")
            yield (f"the GGUF file gives {len(wrong)} token(s) a wrong type, first {token!r} "
                   f"({number}): {there}, not {allowed[0]}")  # fmt: skip

    def order(self) -> Iterator[str]:
        """Merges, or scores that mean the same."""
        merges = self.json.get("model", {}).get("merges", [])
        pairs = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair)
                 for pair in merges]  # fmt: skip
        stored = self.value("merges")
        if pairs and self.kind == "gpt2" and stored != [" ".join(pair) for pair in pairs]:
            yield "the GGUF file merges tokens in another order"
        if pairs and self.kind == "llama":
            scores = dict(zip(self.tokens, self.value("scores", []), strict=False))
            made = list(dict.fromkeys(left + right for left, right in pairs))
            falling = [scores.get(token, float("-inf")) for token in made]
            if any(later > earlier for earlier, later in itertools.pairwise(falling)):
                yield "the GGUF file's scores merge tokens in another order"

    def ids(self) -> Iterator[str]:
        """Special ids: the reference's, and inside the vocabulary."""
        for key, kind in _PLACES.items():
            number = self.value(f"{key}_token_id")
            wished = getattr(self.reference, f"{kind}_token_id", None)
            if number is not None and not 0 <= int(number) < len(self.tokens):
                yield (f"the GGUF file says {kind} token {number}, outside its vocabulary of "
                       f"{len(self.tokens)}")  # fmt: skip
            elif (
                wished is not None and number != wished and (number is not None or kind in _NEEDED)
            ):
                yield f"the GGUF file says {kind} token {number}, reference {wished}"
        for key in ("eot", "eom"):
            number = self.value(f"{key}_token_id")
            if number is not None and not 0 <= int(number) < len(self.tokens):
                yield f"the GGUF file says {key} token {number}, outside its vocabulary"

    def around(self) -> Iterator[str]:
        """What is put before and after a text, the blank in front of it too."""
        bare = self.reference("a", add_special_tokens=False)["input_ids"]
        dressed = self.reference("a")["input_ids"]
        if self.kind != "bert":
            for key, extra in (
                ("bos", dressed[:1] != bare[:1]),
                ("eos", dressed[-1:] != bare[-1:]),
            ):
                said = self.value(f"add_{key}_token")
                if said is not None and bool(said) != extra:
                    yield f"the GGUF file says add_{key}_token {bool(said)}, the reference {extra}"
        if self.kind == "llama":
            first = str(self.reference.convert_ids_to_tokens(bare[0])).startswith(_SPACE)
            if bool(self.value("add_space_prefix", True)) != first:
                yield f"the GGUF file says add_space_prefix {not first}, the reference {first}"

    def cuts(self, notes: list[str], texts: Sequence[str]) -> list[str]:
        """The pre-tokenizer of byte-level text."""
        kind = {"BPE": "gpt2", "WordPiece": "bert"}.get(self.json.get("model", {}).get("type", ""))
        if kind == "gpt2" and self.json["model"].get("byte_fallback"):
            kind = "llama"
        if kind is not None and kind != self.kind:
            return [f"the GGUF file's vocabulary is {self.kind!r}, the reference needs {kind!r}"]
        if kind != "gpt2":
            return []
        wrong, note = check_cuts(self.reference, str(self.value("pre", "default")), texts)
        notes += [f"{note}."] if note else []
        return [wrong] if wrong else []


def _allowed(token: str, entry: Any, bytes_too: bool) -> tuple[str, ...]:
    """The types a token may have, the best first."""
    if entry is not None and entry.get("special"):
        return ("CONTROL", "UNKNOWN", "UNUSED")
    if entry is not None:  # one that ends turns is no text
        return ("USER_DEFINED", "CONTROL", *(("NORMAL",) if _SPACE in token else ()))
    if bytes_too and len(token) == 6 and token.startswith("<0x"):
        return ("BYTE",)
    return ("NORMAL", "UNUSED", "UNKNOWN")


def _check_template(reference: Any, tables: Tables) -> list[Finding]:
    """The file's template, rendered by transformers; one of several is the reference's default."""
    wanted = getattr(reference, "chat_template", None)
    if not isinstance(wanted, str) or wanted == tables.template:
        return []
    inside = copy.copy(reference)
    inside.chat_template = tables.template
    return check_template(reference, inside, "the GGUF file",
                          "the GGUF file (qft export writes it)")  # fmt: skip


def _ask_llama_cpp(
    reference: Any, artefact: Subject, texts: Sequence[str], notes: list[str]
) -> list[Finding]:
    assert artefact.gguf is not None
    if not installed():
        notes.append("llama.cpp is not installed (extra gguf-test): the tokenizer's tables were "
                     "compared, llama.cpp itself was not asked.")  # fmt: skip
        return []
    every = list(dict.fromkeys([*AWKWARD, *texts]))
    try:
        found = llama_tokens(artefact.gguf, every)
    except QftError as error:
        return [Finding("tokens", f"{error.what} ({error.found})", _FIX)]
    differing = [
        text for number, text in enumerate(every)
        if any(found[2 * number + at] != list(
            reference(text, add_special_tokens=special, verbose=False)["input_ids"])
            for at, special in enumerate((True, False)))
    ]  # fmt: skip
    if not differing:
        notes.append(f"llama.cpp itself was asked: the same ids for {len(every)} texts.")
        return []
    said = (f"llama.cpp itself gives other ids for {len(differing)} of {len(every)} texts, first "
            f"{differing[0][:40]!r}")  # fmt: skip
    known = _known_limits(reference, len(artefact.reader.fields["tokenizer.ggml.tokens"].data))
    if known and len(differing) < len(every) / 2:
        notes.append(f"{said}: {' '.join(known)}")
        return []
    return [Finding("tokens", said, _FIX)]


def _known_limits(reference: Any, size: int) -> list[str]:
    """Where llama.cpp is known to differ from a tokenizer of this kind."""
    try:
        return read_vocabulary(reference, size).notes
    except QftError:
        return []


def _read_by_transformers(reference: Any, artefact: Subject, every: Sequence[str]) -> list[str]:
    try:
        inside = artefact.tokenizer_inside()
    except QftError as error:
        return [f"{error.what} ({error.found}); only its tables were compared."]
    differing = differing_texts(reference, inside, every)
    if not differing:
        return []
    return [
        f"transformers reads the GGUF file's tokenizer otherwise in {len(differing)} of "
        f"{len(every)} texts, first {differing[0][:40]!r}; its tables are the same."
    ]
