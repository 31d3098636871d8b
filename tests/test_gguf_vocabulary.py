"""What a GGUF file says of a tokenizer, against what the tokenizer itself does."""

from __future__ import annotations

import json
from typing import Any

import gguf
import pytest
import small_vocabularies as small
from small_tokenizers import CHATML, GEMMA, LLAMA3, with_template

from qft.errors import ModelError
from qft.gguf import pre_tokenizers
from qft.gguf.special_tokens import ENDS_BY_NAME
from qft.gguf.vocabulary import read_vocabulary, vocabulary_metadata

CONTROL, NORMAL, UNUSED, USER, BYTE, UNKNOWN = (
    int(getattr(gguf.TokenType, name))
    for name in ("CONTROL", "NORMAL", "UNUSED", "USER_DEFINED", "BYTE", "UNKNOWN")
)
LLAMA3_SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>")


class FakeTokenizer:
    """Only what `read_vocabulary` asks for."""

    def __init__(self, **changes: Any) -> None:
        self.values = {
            "normalizer": None, "pre_tokenizer": {"type": "ByteLevel", "use_regex": True},
            "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
            **changes,
        }  # fmt: skip
        self.backend_tokenizer = self

    def to_str(self) -> str:
        return json.dumps(self.values)


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, object]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
    return {"type": "Sequence", "pretokenizers": [step, {"type": "ByteLevel", "use_regex": False}]}


def metadata(tokenizer: Any, extra: int = 0, **options: Any) -> dict[str, Any]:
    """Of the tokenizer, without the prefix of the keys."""
    found = vocabulary_metadata(tokenizer, {"vocab_size": len(tokenizer) + extra}, **options)
    return {key.removeprefix("tokenizer.ggml."): value for key, value in found.items()}


def test_pre_tokenizers_are_recognised_by_what_they_do() -> None:
    qwen2, llama3 = pre_tokenizers.QWEN2, pre_tokenizers.LLAMA3
    assert read_vocabulary(FakeTokenizer(), 3).pre == "gpt-2"
    assert read_vocabulary(FakeTokenizer(pre_tokenizer=split(qwen2)), 3).pre == "qwen2"
    spelled = qwen2.replace(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])",
    )
    assert spelled != qwen2
    assert read_vocabulary(FakeTokenizer(pre_tokenizer=split(spelled)), 3).pre == "qwen2"
    kept = split(llama3, "Removed", True)  # only what matches is kept: all of it
    assert read_vocabulary(FakeTokenizer(pre_tokenizer=kept), 3).pre == "dbrx"


def test_whole_words_decide_between_two_names() -> None:
    """llama.cpp knows by the name alone whether a word that is a token goes past the merges."""
    cuts = (pre_tokenizers.LLAMA3,)
    assert metadata(small.byte_level(cuts, whole_words=True))["pre"] == "llama-bpe"
    assert metadata(small.byte_level(cuts))["pre"] == "dbrx"
    with pytest.raises(ModelError, match="whole words bypass its merges"):
        metadata(small.byte_level((pre_tokenizers.QWEN2,), whole_words=True))
    same = json.loads(small.byte_level((pre_tokenizers.QWEN2,)).backend_tokenizer.to_str())
    same["model"]["ignore_merges"] = True  # of words that merges give anyway: no difference
    assert read_vocabulary(FakeTokenizer(**same), 700).pre == "qwen2"


@pytest.mark.parametrize(
    "changes,size",
    [
        ({"pre_tokenizer": split(r"\w+")}, 3),
        ({"pre_tokenizer": split(pre_tokenizers.QWEN2, "Removed", False)}, 3),
        ({"pre_tokenizer": {"type": "Whitespace"}}, 3),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, 3),
        ({"normalizer": {"type": "Lowercase"}}, 3),
        ({"model": {"type": "WordPiece", "vocab": {}}}, 3),
        ({"model": {"type": "Unigram", "vocab": []}}, 3),
        ({}, 2),
        ({"added_tokens": [{"id": 3, "content": "x", "special": True}]}, 3),
        ({"added_tokens": [{"id": 3, "content": "ab", "special": True}]}, 4),
        ({"model": {"type": "BPE", "byte_fallback": True, "merges": [],
                    "vocab": {"a": 0, "b": 1, "ab": 2}}}, 3),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [],
                    "end_of_word_suffix": "</w>"}}, 3),
        ({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "a"}}, 3),
    ],
)  # fmt: skip
def test_a_tokenizer_llama_cpp_cannot_run_is_refused(changes: dict[str, Any], size: int) -> None:
    with pytest.raises(ModelError):
        read_vocabulary(FakeTokenizer(**changes), size)


def test_a_padded_vocabulary_has_unused_names_that_are_no_ones() -> None:
    tokenizer = small.byte_level(plain_added=("[PAD704]",))
    size = len(tokenizer)
    found = metadata(tokenizer, extra=10)
    assert len(found["tokens"]) == len(set(found["tokens"])) == size + 10
    assert found["token_type"][size:] == [UNUSED] * 10
    assert found["token_type"][tokenizer.convert_tokens_to_ids("[PAD704]")] == USER


def test_sentencepiece_scores_fall_with_the_rank_of_the_merge() -> None:
    tokenizer = small.sentencepiece("gemma", plain_added=("\n\n", "▁▁", "<table>"))
    found = metadata(tokenizer)
    assert (found["model"], found["add_space_prefix"]) == ("llama", False)
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(values["model"]["merges"]):
        first.setdefault(left + right, rank)
    scores = dict(zip(found["tokens"], found["scores"], strict=True))
    ranked = sorted(first, key=first.__getitem__)
    assert sorted(first, key=lambda token: -scores[token]) == ranked
    types = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert (types["<0x41>"], types["<unk>"], types["<bos>"]) == (BYTE, UNKNOWN, CONTROL)
    # llama.cpp prints an added token as it is written: runs of blanks are none
    assert (types["▁▁"], types["\n\n"], types["<table>"]) == (NORMAL, USER, USER)
    assert metadata(small.sentencepiece("llama"))["add_space_prefix"] is True


def test_merges_llama_cpp_would_do_otherwise_are_refused() -> None:
    values = json.loads(small.sentencepiece("llama").backend_tokenizer.to_str())
    values["model"]["merges"] = values["model"]["merges"][:-1]
    with pytest.raises(ModelError, match="not those of a SentencePiece"):
        read_vocabulary(FakeTokenizer(**values), 2000)
    values = json.loads(small.sentencepiece("llama").backend_tokenizer.to_str())
    del values["model"]["vocab"]["<0x41>"]
    with pytest.raises(ModelError, match="every byte"):
        read_vocabulary(FakeTokenizer(**values), 2000)


def test_wordpiece_is_written_with_blanks_for_beginnings() -> None:
    tokenizer = small.wordpiece()
    found = metadata(tokenizer)
    assert (found["model"], found["normalizer.lowercase"]) == ("bert", True)
    vocab = tokenizer.get_vocab()
    for token, number in vocab.items():
        if token.startswith("[") and token.endswith("]"):
            assert found["tokens"][number] == token
        elif token.startswith("##"):
            assert found["tokens"][number] == token[2:]
        else:
            assert found["tokens"][number] == "▁" + token
    ids = {name: found[f"{name}_token_id"]
           for name in ("bos", "cls", "seperator", "mask", "unknown", "padding")}  # fmt: skip
    names = ("[CLS]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "[PAD]")
    assert list(ids.values()) == [vocab[name] for name in names]
    assert found["token_type"][vocab["[UNK]"]] == UNKNOWN
    assert found["add_bos_token"]
    assert found["add_sep_token"]
    cased = metadata(small.wordpiece(lowercase=False))
    assert not cased["normalizer.lowercase"]
    assert not cased["normalizer.strip_accents"]


def test_what_stands_around_a_text_is_found_by_asking() -> None:
    plain = metadata(small.byte_level())
    assert (plain["add_bos_token"], plain["add_eos_token"]) == (False, False)
    tokenizer = small.byte_level(specials=LLAMA3_SPECIALS, bos="<|begin_of_text|>",
                                 eos="<|end_of_text|>")  # fmt: skip
    found = metadata(tokenizer)
    assert found["add_bos_token"]
    assert found["bos_token_id"] == tokenizer.bos_token_id


def test_every_stop_token_has_a_place() -> None:
    base = small.byte_level(specials=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<a>", "<b>"))
    ids = {name: base.convert_tokens_to_ids(name) for name in ("<|endoftext|>", "<|im_end|>",
                                                              "<a>", "<b>")}  # fmt: skip
    found = metadata(with_template(base, CHATML))
    assert found["eos_token_id"] == ids["<|endoftext|>"]
    assert found["eot_token_id"] == ids["<|im_end|>"]  # what ends a turn of the template
    assert found["eos_token_ids"] == [ids["<|endoftext|>"], ids["<|im_end|>"]]
    found = metadata(base, stops=[ids["<a>"], ids["<|endoftext|>"], 10**6, -1])
    assert (found["eot_token_id"], "eom_token_id" in found) == (ids["<a>"], False)
    found = metadata(with_template(base, CHATML), stops=[ids["<a>"], ids["<b>"]])
    assert {found["eot_token_id"], found["eom_token_id"]} == {ids["<a>"], ids["<b>"]}
    assert "<|im_end|>" in ENDS_BY_NAME  # the third is known to llama.cpp by its name
    crowded = small.byte_level(specials=("<|endoftext|>", "<a>", "<b>", "<c>"))
    with pytest.raises(ModelError, match="three places"):
        metadata(crowded, stops=crowded.convert_tokens_to_ids(["<a>", "<b>", "<c>"]))


def test_a_stop_token_is_never_printed() -> None:
    """An added token that ends turns is a control token, whatever the tokenizer calls it."""
    tokenizer = small.byte_level(specials=("<|endoftext|>",), plain_added=("<over>",))
    over = tokenizer.convert_tokens_to_ids("<over>")
    assert metadata(tokenizer)["token_type"][over] == USER
    assert metadata(tokenizer, stops=[over])["token_type"][over] == CONTROL


def test_ids_outside_the_vocabulary_are_not_written() -> None:
    tokenizer = small.byte_level()
    size = len(tokenizer)
    config = {"vocab_size": size, "pad_token_id": size, "bos_token_id": -1}
    found = vocabulary_metadata(tokenizer, config)
    assert "tokenizer.ggml.padding_token_id" not in found
    assert "tokenizer.ggml.bos_token_id" not in found
    found = vocabulary_metadata(tokenizer, {**config, "pad_token_id": 5, "bos_token_id": [2, 3]})
    assert found["tokenizer.ggml.padding_token_id"] == 5
    assert found["tokenizer.ggml.bos_token_id"] == 2


def test_without_an_end_llama_cpp_gets_one_that_is_never_written() -> None:
    """Else it takes token 11, some word, for the end of a text."""
    tokenizer = small.byte_level(specials=("<x>",), eos="<x>")
    tokenizer.eos_token = None
    assert metadata(tokenizer, extra=1)["eos_token_id"] == len(tokenizer)  # a row of no token
    with pytest.raises(ModelError, match="no token that ends a text"):
        metadata(tokenizer)


def test_templates_by_name() -> None:
    tokenizer = with_template(small.sentencepiece("gemma"), GEMMA)
    found = vocabulary_metadata(tokenizer, {"vocab_size": len(tokenizer)})
    assert found["tokenizer.chat_template"] == GEMMA
    tokenizer.chat_template = {"default": CHATML, "tool_use": LLAMA3}
    found = vocabulary_metadata(tokenizer, {"vocab_size": len(tokenizer)})
    assert found["tokenizer.chat_template"] == CHATML
    assert found["tokenizer.chat_template.tool_use"] == LLAMA3
    assert found["tokenizer.chat_templates"] == ["tool_use"]


def test_tokens_that_swallow_blanks_are_said_as_llama_cpp_knows_them() -> None:
    phi3 = small.sentencepiece("phi3")
    found = vocabulary_metadata(phi3, {"vocab_size": len(phi3)})
    assert found["general.name"] == "phi-3"
    assert read_vocabulary(phi3, len(phi3)).notes == []
    values = json.loads(phi3.backend_tokenizer.to_str())
    values["added_tokens"][1]["rstrip"] = True  # <s>, which swallows none there
    read = read_vocabulary(FakeTokenizer(**values), len(phi3))
    assert read.name == ""
    assert "swallow" in read.notes[0]


def test_what_llama_cpp_does_otherwise_is_said() -> None:
    def notes(tokenizer: Any) -> list[str]:
        said: list[str] = []
        metadata(tokenizer, notes=said)
        return said

    assert notes(small.byte_level()) == notes(small.sentencepiece("gemma")) == []
    assert "NFC" in notes(small.byte_level((pre_tokenizers.QWEN2,), nfc=True))[0]
    assert "before every text" in notes(small.sentencepiece("metaspace"))[0]
    assert "Korean" in notes(small.wordpiece())[0]
    assert notes(small.wordpiece(lowercase=False)) == []
    tekken = next(known for known in pre_tokenizers.KNOWN if known.name == "tekken")
    assert "capitals" in notes(small.byte_level(tekken.cuts, whole_words=True))[0]
