"""The task of an encoder without a head: a text becomes vectors. It is compared, never trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qft.data.columns import text_in
from qft.data.examples import EncodeSettings, Example, NumberedRow, Task, padded_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer


class EmbedTask(Task):
    """A text a row, between the tokenizer's special tokens; there are no labels."""

    name = "embed"
    predicts = "vectors"

    def encode(
        self,
        rows: Sequence[NumberedRow],
        tokenizer: Tokenizer,
        settings: EncodeSettings,
        notes: list[str],
    ) -> list[Example]:
        """One example a row, cut to ``max_length``; a text without tokens is none."""
        examples = []
        for place, (number, row) in enumerate(rows):
            encoded: Any = tokenizer(
                text_in(row, settings.columns["text"], number), add_special_tokens=True,
                truncation=True, max_length=settings.max_length, verbose=False,
            )  # fmt: skip
            ids = list(encoded["input_ids"])
            if ids:
                examples.append(Example(settings.index_offset + place, {"input_ids": ids}))
        return examples

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
        """See `Task.collate`; without labels."""
        return padded_inputs(examples, pad_token_id)

    def label_count(self, batch: Mapping[str, Tensor]) -> int:
        """None."""
        return 0
