"""Small tokenizers of every kind that GGUF can hold, built on the spot as their families' are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE, WordPiece
from tokenizers.trainers import BpeTrainer, WordPieceTrainer
from transformers import PreTrainedTokenizerFast

from qft.gguf.file import Value, header
from qft.gguf.pre_tokenizers import GPT2

CORPUS = [
    "Hello there, how are you today? I am fine, thank you. What is the weather like? Don't!",
    "The weather is fine today. The answer is forty two, and the question is not known. I'll go.",
    "def f(x):\n\treturn x**2  # ok\n\n    for i in range(1234): print(i + 5678)\n",
    "naïve café Straße élan Ünder ŒUVRE Ωmega ΑΒΓ αβγ Привет мир МИР",
    "漢字かな交じり文 中文字符 한국어 🙂 👍🏽  two  blanks   three    four\r\n",
    "https://example.org/?q=1&r=%20 3.14159 1,000,000 !!!??? ... ((())) ===>",
] * 3


def byte_level(
    cuts: tuple[str, ...] = (GPT2,),
    *,
    specials: tuple[str, ...] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos: str = "<|endoftext|>",
    bos: str | None = None,
    nfc: bool = False,
    whole_words: bool = False,
    plain_added: tuple[str, ...] = (),
    size: int = 700,
) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3, Qwen and others have them: cut by ``cuts``, then bytes."""
    inner = Tokenizer(BPE())
    if nfc:
        inner.normalizer = normalizers.NFC()
    steps: list[Any] = []
    for cut in cuts:
        if cut == GPT2:
            continue
        steps.append(pre_tokenizers.Digits(individual_digits=True) if cut == r"\p{N}"
                     else pre_tokenizers.Split(Regex(cut), "isolated"))  # fmt: skip
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in cuts))
    inner.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=size, show_progress=False, special_tokens=list(specials),
                         initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    inner.train_from_iterator(CORPUS, trainer)
    if whole_words:
        inner = _with_whole_words(inner)
    inner.add_tokens(list(plain_added))
    if bos is not None:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
        )
    others = [token for token in specials if token not in (bos, eos)]
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos,
                                   additional_special_tokens=others,
                                   clean_up_tokenization_spaces=False)  # fmt: skip


def _with_whole_words(inner: Tokenizer) -> Tokenizer:
    """Some words that the merges do not give, as Llama 3 has them."""
    values = json.loads(inner.to_str())
    for word in ("Ġtomorrow", "qqq", "Ġzzz"):
        values["model"]["vocab"].setdefault(word, len(values["model"]["vocab"]))
    values["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(values))


def sentencepiece(
    kind: str = "llama", *, plain_added: tuple[str, ...] = (), size: int = 700
) -> PreTrainedTokenizerFast:
    """A SentencePiece BPE with byte fallback.

    Args:
        kind: ``llama`` (a blank before every text), ``metaspace`` (before the first), ``gemma``
            (none), ``phi3`` (``llama``, and its special tokens swallow the blanks after them).
    """
    specials = ["<unk>", "<s>", "</s>"]
    if kind == "phi3":
        specials += ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
    if kind == "gemma":
        specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    trained = Tokenizer(BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("(?<=[^▁])(?=▁)"), "isolated")
    trained.train_from_iterator(CORPUS, BpeTrainer(vocab_size=size - 256, show_progress=False))
    order = json.loads(trained.to_str())["model"]["vocab"]
    names = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)),
             *sorted(order, key=order.__getitem__)]  # fmt: skip
    if kind == "gemma":
        names += ["\n", "\n\n", "▁▁", "▁▁▁▁", "▁▁▁"]
    vocab = {name: number for number, name in enumerate(dict.fromkeys(names))}
    inner = Tokenizer(BPE(vocab=vocab, merges=_closed_merges(vocab, set(specials)),
                          unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # fmt: skip
    blanks = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind == "gemma":
        inner.normalizer = blanks
        inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif kind == "metaspace":
        inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blanks])
    if kind != "gemma":
        steps.append(decoders.Strip(" ", 1, 0))
    inner.decoder = decoders.Sequence(steps)
    greedy = set(specials) - {"<unk>", "<s>", "<|endoftext|>"} if kind == "phi3" else set()
    inner.add_special_tokens([
        AddedToken(s, normalized=False, special=True, rstrip=s in greedy) for s in specials
    ])  # fmt: skip
    inner.add_tokens([AddedToken(text, normalized=False) for text in plain_added])
    bos = "<bos>" if kind == "gemma" else "<s>"
    inner.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, inner.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, unk_token="<unk>",
        eos_token="<eos>" if kind == "gemma" else "</s>",
        pad_token="<pad>" if kind == "gemma" else None, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _closed_merges(vocab: dict[str, int], specials: set[str]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, by the third's id: what SentencePiece means."""
    merges = []
    for token in sorted(vocab, key=vocab.__getitem__):
        if token in specials or (token.startswith("<0x") and token.endswith(">")):
            continue
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


def wordpiece(*, lowercase: bool = True, size: int = 400) -> PreTrainedTokenizerFast:
    """As BERT has it."""
    inner = Tokenizer(WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    specials = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = WordPieceTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, inner.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]",
                                   cls_token="[CLS]", sep_token="[SEP]",
                                   mask_token="[MASK]")  # fmt: skip


def write_vocabulary(path: Path, metadata: dict[str, Value], architecture: str = "llama") -> Path:
    """A GGUF file that holds a vocabulary and no tensor."""
    sizes = {"context_length": 128, "embedding_length": 32, "block_count": 1,
             "feed_forward_length": 64, "attention.head_count": 4}  # fmt: skip
    written: dict[str, Value] = {"general.architecture": architecture}
    written |= {f"{architecture}.{key}": value for key, value in sizes.items()}
    path.write_bytes(header(written | metadata, []))
    return path
