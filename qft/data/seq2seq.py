"""The task of encoder-decoders: one text becomes another (translation, summaries)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qft.data.columns import text_in
from qft.data.encoding import UNSUPERVISED, end_token, shared_bytes, token_bytes
from qft.data.examples import (
    EncodeSettings,
    Example,
    NumberedRow,
    Task,
    Written,
    fit_lengths,
    pad,
    padded_inputs,
)
from qft.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Seq2SeqTask(Task):
    """The encoder reads the source, the decoder writes the target; the target is supervised."""

    name = "seq2seq"
    predicts = "tokens"

    def encode(
        self,
        rows: Sequence[NumberedRow],
        tokenizer: Tokenizer,
        settings: EncodeSettings,
        notes: list[str],
    ) -> list[Example]:
        """One example a row; its `labels` are the target's tokens and what ends it."""
        pairs = []
        for number, row in rows:
            source = text_in(row, settings.columns["source"], number)
            target = text_in(row, settings.columns["target"], number)
            if not source.strip() or not target.strip():
                raise DataError("A source and a target need words.", where=f"row {number}",
                                found=f"{source!r:.60} → {target!r:.60}")  # fmt: skip
            pairs.append((source, *encode_target(tokenizer, target)))
        numbers = [number for number, _ in rows]
        sources = [encode_source(tokenizer, source) for source, _, _ in pairs]
        lengths = [max(len(s), len(t)) for s, (_, t, _) in zip(sources, pairs, strict=True)]
        dropped = fit_lengths(lengths, numbers, settings, notes)
        examples = []
        limit = settings.max_length
        for position, (source, labels, sizes) in enumerate(pairs):
            if position in dropped:
                continue
            ids = sources[position]
            if len(ids) > limit:
                ids = encode_source(tokenizer, source, truncation=True, max_length=limit)
            inputs = {"input_ids": ids, "labels": labels[:limit]}
            index = settings.index_offset + position
            row = rows[position][1]
            written = Written(source, text_in(row, settings.columns["target"], 0), row)
            cut = len(labels) > limit
            examples.append(Example(index, inputs, sum(sizes[:limit]), cut, written))
        return examples

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
        """See `Task.collate`; `labels` are ``[batch, target length]``.

        The two lengths always differ (the labels get a column more where they would not), so
        that an activation's shape says which side it belongs to.
        """
        from torch.nn import functional

        batch = padded_inputs(examples, pad_token_id)
        labels = pad(examples, "labels", UNSUPERVISED)
        if labels.shape == batch["input_ids"].shape:
            labels = functional.pad(labels, (0, 1), value=UNSUPERVISED)
        batch["labels"] = labels
        return batch

    def label_count(self, batch: Mapping[str, Tensor]) -> int:
        """Every label: the decoder's inputs are shifted, not the labels."""
        return int((batch["labels"] != UNSUPERVISED).sum())


def encode_source(tokenizer: Tokenizer, text: str, **cut: Any) -> list[int]:
    """What the encoder reads, with the tokenizer's own special tokens."""
    encoded: Any = tokenizer(text, add_special_tokens=True, verbose=False, **cut)
    return list(encoded["input_ids"])


def encode_target(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """What the decoder writes, its end included, and the bytes each token stands for.

    Raises:
        DataError: the tokenizer has no token that ends a text.
    """
    end = end_token(tokenizer)
    if end is None:
        raise DataError(
            "The tokenizer has no token that ends a text, so the model would never learn to stop.",
            where=getattr(tokenizer, "name_or_path", None),
            fix="set eos_token in the model's tokenizer_config.json",
        )
    fast = tokenizer.is_fast
    encoded: Any = tokenizer(
        text_target=text, add_special_tokens=True, return_offsets_mapping=fast, verbose=False
    )
    ids = list(encoded["input_ids"])
    # the offsets are for counting bytes alone, so that a tokenizer without them will do
    sizes = (
        token_bytes(tokenizer, text, ids, encoded["offset_mapping"])
        if fast
        else shared_bytes(tokenizer, text, ids)
    )
    if tokenizer.eos_token_id is None and ids[:1] == [tokenizer.cls_token_id]:
        ids, sizes = ids[1:], sizes[1:]  # BERT's first token is what the decoder begins with
    return (ids, sizes) if ids[-1:] == [end] else ([*ids, end], [*sizes, 0])


def target_lengths(batch: Mapping[str, Tensor]) -> tuple[list[int], int]:
    """The true lengths on the decoder's side and its padded one; nothing for other tasks."""
    labels = batch.get("labels")
    two_halves = labels is not None and labels.dim() == 2 and not labels.is_floating_point()
    if labels is None or not two_halves or labels.shape == batch["input_ids"].shape:
        return [], 0
    return (labels != UNSUPERVISED).sum(dim=1).tolist(), int(labels.shape[1])
