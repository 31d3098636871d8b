"""Text to tokens: where each token stands in the text, and how many of its bytes it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qft.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

UNSUPERVISED = -100  # what torch's cross-entropy leaves out
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One sequence; the three lists have one entry a token.

    Attributes:
        input_ids: the tokens.
        labels: the token itself where it is supervised, else -100 (not shifted).
        sizes: UTF-8 bytes of the text that each token stands for; 0 for special tokens.
    """

    input_ids: list[int]
    labels: list[int]
    sizes: list[int]

    @property
    def supervised(self) -> int:
        """Labels that are predicted: the first token of a sequence never is."""
        return sum(label != UNSUPERVISED for label in self.labels[1:])

    @property
    def label_bytes(self) -> int:
        """UTF-8 bytes of the text that is predicted."""
        pairs = zip(self.labels[1:], self.sizes[1:], strict=True)
        return sum(size for label, size in pairs if label != UNSUPERVISED)

    def cut(self, start: int, stop: int) -> Encoded:
        """The tokens from ``start`` up to ``stop``."""
        return Encoded(self.input_ids[start:stop], self.labels[start:stop], self.sizes[start:stop])


def require_offsets(tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer that cannot tell which characters a token covers.

    Raises:
        ModelError: it is one.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            "This tokenizer cannot tell which characters a token covers, so labels cannot be put "
            "on the right tokens.",
            where=getattr(tokenizer, "name_or_path", None),
            found=type(tokenizer).__name__,
            fix="a model folder with a tokenizer.json",
        )


def tokenize(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[Span]]:
    """Tokens of ``text``, without added special ones, and the characters each covers.

    Raises:
        ModelError: see `require_offsets`.
    """
    require_offsets(tokenizer)
    encoded: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]


def bos_prefix(tokenizer: Tokenizer) -> list[int]:
    """``[bos]`` if the tokenizer itself begins sequences so, else nothing."""
    added: Any = tokenizer("", add_special_tokens=True, verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(added[:1]) == [bos] else []


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text that is to be continued: bos where it belongs, never an eos."""
    ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    prefix = bos_prefix(tokenizer)
    return list(ids) if ids[: len(prefix)] == prefix else [*prefix, *ids]


def supervise(
    tokenizer: Tokenizer,
    text: str,
    ids: Sequence[int],
    offsets: Sequence[Span],
    spans: Sequence[Span],
) -> Encoded:
    """Puts labels on the tokens that hold any character of ``spans``.

    A token across a span's border counts as inside: its words must not be lost. One of no width
    (a blank whose offsets the tokenizer trimmed) counts by its place.
    """
    labels = [UNSUPERVISED] * len(ids)
    remaining = iter(sorted(span for span in spans if span[0] < span[1]))
    span = next(remaining, None)
    for i, (start, end) in enumerate(offsets):
        while span is not None and start >= span[1]:
            span = next(remaining, None)
        if span is not None and max(start + 1, end) > span[0]:
            labels[i] = ids[i]
    return Encoded(list(ids), labels, token_bytes(tokenizer, text, ids, offsets))


def token_bytes(
    tokenizer: Tokenizer, text: str, ids: Sequence[int], offsets: Sequence[Span]
) -> list[int]:
    """How many UTF-8 bytes of ``text`` each token stands for.

    Characters that no token covers (trimmed blanks) belong to the token after them. Several tokens
    that share characters (bytes of one character) divide them by the bytes they are spelled with.
    A special token stands for none, although its name may be in the text.

    Returns:
        One count a token; but for special tokens and uncovered characters at the end, they add up
        to the bytes of ``text``.
    """
    special = set(tokenizer.all_special_ids)
    sizes = [0] * len(ids)
    cursor = 0  # characters counted so far
    first = 0
    while first < len(ids):
        last, end = first, max(cursor, offsets[first][1])
        while last + 1 < len(ids) and offsets[last + 1][0] < end:
            last += 1
            end = max(end, offsets[last][1])
        total = len(text[cursor:end].encode("utf-8"))
        if last > first:
            sizes[first : last + 1] = _divide(tokenizer, ids[first : last + 1], total)
        elif ids[first] not in special:
            sizes[first] = total
        cursor, first = end, last + 1
    return sizes


def shared_bytes(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> list[int]:
    """As `token_bytes`, where offsets are not to be had: all tokens stand for about as many.

    They add up to the bytes of ``text``, and are exact where each token is a byte (ByT5).
    """
    special = set(tokenizer.all_special_ids)
    places = [i for i, token in enumerate(ids) if token not in special]
    sizes = [0] * len(ids)
    total = len(text.encode("utf-8"))
    for nth, place in enumerate(places):
        sizes[place] = (nth + 1) * total // len(places) - nth * total // len(places)
    return sizes


def _divide(tokenizer: Tokenizer, ids: Sequence[int], total: int) -> list[int]:
    """Divides a group's bytes: byte-level tokens have one character a byte, `<0xE6>` is one."""
    names: list[str] = tokenizer.convert_ids_to_tokens(list(ids))  # type: ignore[assignment]
    for sizes in ([len(name) for name in names], [1] * len(names)):
        if sum(sizes) == total:
            return sizes
    return [total] + [0] * (len(names) - 1)


def pad_id(tokenizer: Tokenizer) -> int:
    """The token to fill up with.

    Without a pad token it is eos, or 0: labels and attention are masked by position, never by the
    token's number, so that a real eos stays supervised.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


def end_token(tokenizer: Tokenizer) -> int | None:
    """What ends a written text: eos, or sep where the family has only that (BERT's)."""
    for candidate in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        if isinstance(candidate, int):
            return candidate
    return None


def require_eos(tokenizer: Tokenizer) -> int:
    """The token that ends a text.

    Raises:
        DataError: there is none, so the model could never learn to stop.
    """
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError(
            "The tokenizer has no eos token, so the model would never learn where an answer ends.",
            where=getattr(tokenizer, "name_or_path", None),
            fix="set eos_token in the model's tokenizer_config.json",
        )
    return eos
