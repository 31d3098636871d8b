"""Which ids are special, what stands around a text, and every token that ends a generation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import gguf

from qft.gguf.file import Value
from qft.gguf.token_table import Vocabulary, refuse

# transformers' name → GGUF's; the misspelling is GGUF's own
_KEYS = {
    "bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator",
    "cls": "cls", "mask": "mask",
}  # fmt: skip
_IN_CONFIG = ("bos", "eos", "pad")
# llama.cpp ends a generation at tokens of these names, whatever the file says
ENDS_BY_NAME = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>",
    "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>",
    "<｜end▁of▁sentence｜>", "[e~[",
))  # fmt: skip


def special_tokens(
    tokenizer: Any,
    vocabulary: Vocabulary,
    config: Mapping[str, Any],
    stops: Iterable[int] = (),
) -> dict[str, Value]:
    """What ``tokenizer.ggml`` says of them, by key.

    Args:
        tokenizer: from ``AutoTokenizer``.
        config: the model's; its ids stand in where the tokenizer names none.
        stops: tokens that must end a generation, beside the tokenizer's own.

    Raises:
        ModelError: llama.cpp cannot put around a text what the tokenizer does, or has too few
            places for the stop tokens.
    """
    size = len(vocabulary.tokens)
    ids = {kind: _declared(kind, tokenizer, config, size) for kind in _KEYS}
    around = _around(tokenizer, vocabulary, ids)
    values: dict[str, Value] = {
        f"{_KEYS[kind]}_token_id": number for kind, number in ids.items() if number is not None
    }
    return {**values, **_ends(tokenizer, vocabulary, ids, stops), **around}


def _declared(kind: str, tokenizer: Any, config: Mapping[str, Any], size: int) -> int | None:
    number = getattr(tokenizer, f"{kind}_token_id", None)
    if number is None and kind in _IN_CONFIG:
        number = config.get(f"{kind}_token_id")
    if isinstance(number, list):
        number = number[0] if number else None
    return number if type(number) is int and 0 <= number < size else None


def _around(tokenizer: Any, vocabulary: Vocabulary, ids: dict[str, int | None]) -> dict[str, Value]:
    """What is put before and after a text, as the tokenizer really does it; completes ``ids``."""
    before, after = added_around(tokenizer)
    found = f"{before} before a text, {after} after it"
    if len(before) > 1 or len(after) > 1:
        raise refuse("llama.cpp puts one token at most before a text and one after it", found)
    if before and ids["bos"] is None:
        ids["bos"] = before[0]
    if vocabulary.model == "bert":
        if not before or not after:
            raise refuse("llama.cpp puts a token before and after WordPiece text", found)
        ids |= {"bos": before[0], "cls": before[0], "sep": after[0]}
        return {"add_bos_token": True, "add_eos_token": False, "add_sep_token": True}
    if after and ids["eos"] is None:
        ids["eos"] = after[0]
    if (before and before[0] != ids["bos"]) or (after and after[0] != ids["eos"]):
        raise refuse("llama.cpp can put only bos and eos around a text", found)
    return {"add_bos_token": bool(before), "add_eos_token": bool(after)}


def added_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    dressed = list(tokenizer("a")["input_ids"])
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start], dressed[start + len(bare) :]
    raise refuse("its special tokens change the text between them", dressed)


def _ends(
    tokenizer: Any,
    vocabulary: Vocabulary,
    ids: Mapping[str, int | None],
    stops: Iterable[int],
) -> dict[str, Value]:
    """Every token that ends a generation, each in a place where llama.cpp looks for one.

    The end of a text, of a turn (``eot``) and of a message (``eom``): three places; tokens that
    llama.cpp takes for an end by their name need none. Ollama's own engine reads a list.
    """
    if vocabulary.model == "bert":
        return {}
    turns = _turn_ends(tokenizer)
    wanted = [ids["eos"], *turns, *stops]
    every = list(
        dict.fromkeys(n for n in wanted if n is not None and 0 <= n < len(vocabulary.tokens))
    )
    if not every:  # without the key, llama.cpp would take a fixed id of some word's for it
        return {"eos_token_id": _never_written(vocabulary, ids)}
    eos, rest = every[0], every[1:]
    places = [number for number in rest if vocabulary.tokens[number] not in ENDS_BY_NAME]
    if len(places) < 2 and turns and turns[0] in rest and turns[0] not in places:
        places.insert(0, turns[0])  # known by its name, and said
    if len(places) > 2:
        texts = [vocabulary.tokens[number] for number in every]
        raise refuse("llama.cpp has three places for tokens that end a generation", texts)
    slots = dict(zip(("eot_token_id", "eom_token_id"), places, strict=False))
    for number in every:
        if vocabulary.types[number] != gguf.TokenType.NORMAL:
            vocabulary.retype(gguf.TokenType.CONTROL, number)
    return {"eos_token_id": eos, **slots, "eos_token_ids": every}


def _turn_ends(tokenizer: Any) -> Sequence[int]:
    from qft.data.chat import terminators

    return terminators(tokenizer)


def _never_written(vocabulary: Vocabulary, ids: Mapping[str, int | None]) -> int:
    """A token that stands for an end the tokenizer does not have."""
    unused = [n for n, kind in enumerate(vocabulary.types) if kind == gguf.TokenType.UNUSED]
    for number in (ids["pad"], ids["bos"], *unused[:1]):
        if number is not None:
            return number
    raise refuse("it has no token that ends a text, and llama.cpp needs one", "no eos, no pad")
