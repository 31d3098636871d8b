"""llama.cpp itself gives the token ids that transformers gives, for every kind of vocabulary."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_vocabularies as small
from small_tokenizers import CHATML, with_template
from transformers import AutoTokenizer

from qft.gguf import pre_tokenizers
from qft.gguf.vocabulary import vocabulary_metadata
from qft.verification.tokens_check import AWKWARD

llama_cpp = pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.slow

_RANGES = ((32, 126), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x4FF), (0x600, 0x6FF),
           (0x900, 0x97F), (0x2000, 0x206F), (0x3040, 0x30FF), (0x4E00, 0x4FFF), (0xAC00, 0xAD00),
           (0x1F600, 0x1F64F))  # fmt: skip
_KOREAN, _MARKS = (0xAC00, 0xD7A4), ("Mc", "Me", "Cn")


def texts() -> list[str]:
    """Awkward ones, and random characters of many scripts."""
    draw = random.Random(3)

    def piece() -> str:
        low, high = draw.choice(_RANGES) if draw.random() < 0.5 else _RANGES[0]
        letters = "".join(chr(draw.randint(low, high)) for _ in range(draw.randint(1, 5)))
        return letters + draw.choice(("", " ", "  ", "\n", " \n", "\t", "\n\n"))

    rows = ["".join(piece() for _ in range(draw.randint(1, 12))) for _ in range(400)]
    return [*AWKWARD, *rows]


TEXTS = [*texts(), "<|user|>\nHello<|end|>\n<|assistant|>\n", "a <|end|> \t b</s>  c<s> d"]


def composed(text: str) -> bool:
    return unicodedata.normalize("NFC", text) == text


def european(text: str) -> bool:
    """Without Korean syllables and marks that take room: llama.cpp strips accents otherwise."""
    return not any(
        _KOREAN[0] <= ord(c) < _KOREAN[1] or unicodedata.category(c) in _MARKS
        or ord(c) == 0x61D  # a sign younger than llama.cpp's tables
        for c in text
    )  # fmt: skip


def any_text(text: str) -> bool:
    return True


def from_start(text: str) -> bool:
    return not text.startswith(" ") and "<s>" not in text and "</s>" not in text


KINDS: dict[str, tuple[Callable[[], Any], Callable[[str], bool]]] = {
    **{f"cut as {known.name}": (
        lambda known=known: small.byte_level(known.cuts, whole_words=known.whole_words), any_text)
       for known in pre_tokenizers.KNOWN},
    "NFC": (lambda: small.byte_level((pre_tokenizers.QWEN2,), nfc=True), composed),
    "added": (lambda: small.byte_level((pre_tokenizers.QWEN2,), plain_added=(
        "<tool_call>", "<think>", "[INST]")), any_text),
    "bos": (lambda: small.byte_level((pre_tokenizers.LLAMA3,), whole_words=True, specials=(
        "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"), bos="<|begin_of_text|>",
        eos="<|end_of_text|>"), any_text),
    "sentencepiece": (lambda: small.sentencepiece("llama"), any_text),
    "metaspace": (lambda: small.sentencepiece("metaspace"), from_start),
    "phi3": (lambda: small.sentencepiece("phi3"), any_text),
    "gemma": (lambda: small.sentencepiece("gemma", plain_added=(
        "\n", "\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<table>")), any_text),
    "wordpiece": (lambda: small.wordpiece(), european),
    "cased wordpiece": (lambda: small.wordpiece(lowercase=False), european),
}  # fmt: skip


def opened(tokenizer: Any, folder: Path, extra: int = 0, **options: Any) -> Any:
    """The vocabulary as llama.cpp reads it."""
    config = {"vocab_size": len(tokenizer) + extra}
    path = small.write_vocabulary(folder / "v.gguf", vocabulary_metadata(tokenizer, config,
                                                                         **options))  # fmt: skip
    return llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)


def differing(tokenizer: Any, model: Any, rows: list[str]) -> list[str]:
    return [
        text
        for text in rows
        for special in (True, False)
        if tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        != model.tokenize(text.encode(), add_bos=special, special=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_ids(kind: str, tmp_path: Path) -> None:
    make, expressible = KINDS[kind]
    tokenizer = make()
    model = opened(tokenizer, tmp_path, extra=5)
    rows = [text for text in TEXTS if expressible(text)]
    assert len(rows) > 100
    assert differing(tokenizer, model, rows) == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (
    "wordpiece", "cased wordpiece", "phi3")])  # fmt: skip
def test_the_text_comes_back(kind: str, tmp_path: Path) -> None:
    make, expressible = KINDS[kind]
    tokenizer = make()
    model = opened(tokenizer, tmp_path)
    for text in filter(expressible, TEXTS):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        back = model.detokenize(ids, special=True)
        if kind in ("sentencepiece", "metaspace"):
            back = back.removeprefix(b" ")
        if not text.startswith(" ") and "<" not in text:  # a blank in front is one of two there
            assert back == text.encode()


@pytest.mark.parametrize("kind", ["NFC", "metaspace", "wordpiece", "cut as tekken"])
def test_what_a_note_says_is_so(kind: str, tmp_path: Path) -> None:
    """Where nothing differed any more, the note would have to go."""
    make, expressible = KINDS[kind]
    tokenizer = make()
    rows = [text for text in TEXTS if not expressible(text)]
    if "tekken" in kind:
        rows = ["ёлкаЁлка aÉcoleÉcole ÜBERüber"]
    assert differing(tokenizer, opened(tokenizer, tmp_path), rows)


@pytest.mark.parametrize("name", ["mini-6m", "stories260K"])
def test_real_tokenizers(name: str, assets: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / name)
    lines = (assets / "data/math/gsm8k/test.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["question"] for line in lines[:300]]
    chinese = json.loads((assets / "data/instruct/alpaca_demo/alpaca_zh_demo.json").read_text(
        encoding="utf-8"))  # fmt: skip
    rows += [str(row["output"]) for row in chinese[:100]]
    assert differing(tokenizer, opened(tokenizer, tmp_path), [*TEXTS, *rows]) == []


def test_a_real_encoder(minilm: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    rows = [text for text in TEXTS if european(text)]
    assert differing(tokenizer, opened(tokenizer, tmp_path), rows) == []


def test_every_stop_token_stops(tmp_path: Path) -> None:
    base = small.byte_level(specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<a>", "<b>"))
    named = base.convert_tokens_to_ids(["<a>", "<b>"])
    model = opened(with_template(base, CHATML), tmp_path, stops=named)
    ends = {*named, *base.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])}
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    found = {number for number in range(len(base)) if llama_cpp.llama_vocab_is_eog(vocab, number)}
    assert found == ends


def test_without_an_end_no_word_ends_a_text(tmp_path: Path) -> None:
    tokenizer = small.byte_level(specials=("<x>",), eos="<x>")
    tokenizer.eos_token = None
    model = opened(tokenizer, tmp_path, extra=1)
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    assert not any(llama_cpp.llama_vocab_is_eog(vocab, n) for n in range(len(tokenizer)))
