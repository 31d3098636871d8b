"""The tasks whose labels are tokens: text, instruct, chat."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from qft.data.chat import encode_chat, encode_turns, prompted_beyond
from qft.data.columns import text_in
from qft.data.encoding import (
    UNSUPERVISED,
    Encoded,
    bos_prefix,
    require_eos,
    supervise,
    token_bytes,
    tokenize,
)
from qft.data.examples import (
    EncodeSettings,
    Example,
    NumberedRow,
    Task,
    Written,
    collate_language,
    example_of,
    language_examples,
)
from qft.data.messages import REASONING, Message, read_messages, read_tools
from qft.data.template import has_template, require_template
from qft.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase as Tokenizer

_Result = TypeVar("_Result")


class LanguageTask(Task):
    """What the causal tasks share: the batch, and how its labels count."""

    predicts = "tokens"

    def collate(self, examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
        """See `Task.collate`; `labels` are ``[batch, length]``."""
        return collate_language(examples, pad_token_id)

    def label_count(self, batch: Mapping[str, Tensor]) -> int:
        """Labels that are predicted; the first of a sequence never is."""
        return int((batch["labels"][:, 1:] != UNSUPERVISED).sum())


class TextTask(LanguageTask):
    """Plain text, every token supervised: in blocks that run on, or packed document by document.

    A block holds the end of one document and the beginning of the next, which sees the former.
    With `train.packing` a document is an example of its own and sees nothing but itself.
    """

    name = "text"

    def encode(
        self,
        rows: Sequence[NumberedRow],
        tokenizer: Tokenizer,
        settings: EncodeSettings,
        notes: list[str],
    ) -> list[Example]:
        """Blocks of ``max_length`` tokens, or documents in pieces no longer than that.

        A document begins with bos where the tokenizer gives it one; eos stands between documents
        in blocks, and after each of several that are packed. The last block or piece may be
        shorter; a single token is none.
        """
        documents = [
            document
            for number, row in rows
            if (document := _document(tokenizer, text_in(row, settings.columns["text"], number)))
        ]
        several = len(documents) > 1
        if settings.packed:
            wholes = [_ended(tokenizer, d) for d in documents] if several else documents
        else:
            ended = [_ended(tokenizer, document) for document in documents[:-1]]
            wholes = [_joined([*ended, *documents[-1:]])]
        length = settings.max_length
        pieces = [
            whole.cut(start, start + length)
            for whole in wholes
            for start in range(0, len(whole.input_ids), length)
            if len(whole.input_ids) - start >= 2
        ]
        if pieces:
            tokens = sum(len(whole.input_ids) for whole in wholes)
            kind = (
                f"examples, none across {len(wholes)} documents," if settings.packed else "blocks"
            )
            notes.append(f"{tokens} tokens in {len(pieces)} {kind} of up to {length}")
        if several and not settings.packed:
            notes.append("blocks run on from one document to the next, which sees the former; "
                         "train.packing: true keeps documents apart")  # fmt: skip
        return [example_of(piece, settings.index_offset + i) for i, piece in enumerate(pieces)]


def _document(tokenizer: Tokenizer, text: str) -> Encoded | None:
    """A text as the tokenizer begins it; None without a token."""
    tokens, offsets = tokenize(tokenizer, text)
    if not tokens:
        return None
    prefix = bos_prefix(tokenizer)
    prefix = [] if tokens[:1] == prefix else prefix  # the text may bring its own
    ids = prefix + tokens
    sizes = [0] * len(prefix) + token_bytes(tokenizer, text, tokens, offsets)
    return Encoded(ids, ids, sizes)


def _ended(tokenizer: Tokenizer, document: Encoded) -> Encoded:
    """The same with eos behind it, where there is one and the text does not bring it."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int) or document.input_ids[-1] == eos:
        return document
    ids = [*document.input_ids, eos]
    return Encoded(ids, ids, [*document.sizes, 0])


def _joined(documents: Sequence[Encoded]) -> Encoded:
    ids = [token for document in documents for token in document.input_ids]
    return Encoded(ids, ids, [size for document in documents for size in document.sizes])


class InstructTask(LanguageTask):
    """An instruction and its answer; supervised are the answer and what ends it.

    With a chat template the instruction is the user's turn and the answer the assistant's. Without
    one the text is the instruction, a line break, the answer, eos.
    """

    name = "instruct"

    def encode(
        self,
        rows: Sequence[NumberedRow],
        tokenizer: Tokenizer,
        settings: EncodeSettings,
        notes: list[str],
    ) -> list[Example]:
        """One example a row."""
        templated = has_template(tokenizer)
        encoded = []
        for number, row in rows:
            prompt, completion = self._read(row, settings.columns, number)
            if templated:
                turns = prompt_messages(prompt, completion)
                sequence = _naming_the_row(number, partial(encode_chat, tokenizer, turns))
            else:
                sequence = encode_plain(tokenizer, prompt, completion)
            asked = prompt_messages(prompt) if templated else plain_prompt(prompt)
            encoded.append((number, sequence, Written(asked, completion, row)))
        if not templated:
            notes.append("no chat template: rows are instruction, line break, answer, eos")
        return language_examples(encoded, settings, notes)

    def _read(
        self, row: Mapping[str, Any], columns: Mapping[str, str], number: int
    ) -> tuple[str, str]:
        prompt = text_in(row, columns["prompt"], number)
        if "input" in columns and row.get(columns["input"]) is not None:
            about = text_in(row, columns["input"], number)
            prompt = join_prompt(prompt, about)
        return prompt, text_in(row, columns["completion"], number)


class ChatTask(LanguageTask):
    """Conversations in the tokenizer's own template; supervised are the assistant's turns."""

    name: ClassVar[str] = "chat"

    def encode(
        self,
        rows: Sequence[NumberedRow],
        tokenizer: Tokenizer,
        settings: EncodeSettings,
        notes: list[str],
    ) -> list[Example]:
        """One example a conversation, or one a turn where the template asks for it."""
        require_template(tokenizer)
        encoded = [
            (number, sequence, written)
            for number, row in rows
            for sequence, written in self._sequences(tokenizer, row, number, settings)
        ]
        if len(encoded) > len(rows):
            notes.append(
                f"{len(rows)} conversations became {len(encoded)} examples, one for each turn of "
                "the assistant: the template renders a turn otherwise once others follow"
            )
        notes += self._silences(tokenizer, rows, settings)
        return language_examples(encoded, settings, notes)

    def _silences(
        self, tokenizer: Tokenizer, rows: Sequence[NumberedRow], settings: EncodeSettings
    ) -> list[str]:
        """What the template keeps from the model."""
        notes = []
        column = settings.columns["messages"]
        thoughts = sum(REASONING in m for number, row in rows
                       for m in read_messages(row[column], number))  # fmt: skip
        if thoughts and REASONING not in tokenizer.get_chat_template():
            notes.append(f"{thoughts} messages have {REASONING}, which this template does not "
                         "write: it is not trained on")  # fmt: skip
        beyond = prompted_beyond(tokenizer)
        if beyond:
            notes.append(f"the generation prompt ends in {beyond!r}, which the template's finished "
                         "turns do not hold: answers are trained without it")  # fmt: skip
        return notes

    def _sequences(
        self, tokenizer: Tokenizer, row: Mapping[str, Any], number: int, settings: EncodeSettings
    ) -> list[tuple[Encoded, Written | None]]:
        """The last one asks for the last answer; a model that writes is judged by that."""
        messages = read_messages(row[settings.columns["messages"]], number)
        tools = read_tools(row.get(settings.columns.get("tools", "")), number)
        last_only = settings.supervise == "last"
        sequences = _naming_the_row(
            number, lambda: encode_turns(tokenizer, messages, last_only=last_only, tools=tools)
        )
        written = None
        if messages[-1]["role"] == "assistant" and len(messages) > 1:
            written = Written(messages[:-1], messages[-1]["content"], row, tools)
        return [(s, written if s is sequences[-1] else None) for s in sequences]


def _naming_the_row(number: int, encode: Callable[[], _Result]) -> _Result:
    """The row's number in what goes wrong."""
    try:
        return encode()
    except DataError as error:
        where = f"row {number}" + (f" ({error.where})" if error.where else "")
        raise DataError(error.what, where=where, found=error.found, fix=error.fix) from None


def join_prompt(prompt: str, about: str) -> str:
    """An instruction and what it is about, as one text."""
    return f"{prompt}\n{about}" if about.strip() else prompt


def prompt_messages(prompt: str, completion: str | None = None) -> list[Message]:
    """An instruction, and its answer if there is one, as a conversation."""
    messages = [{"role": "user", "content": prompt}]
    if completion is not None:
        messages.append({"role": "assistant", "content": completion})
    return messages


def plain_prompt(prompt: str) -> str:
    """What a model without a chat template is given: `encode_plain` continues exactly this."""
    return f"{prompt}\n"


def encode_plain(tokenizer: Tokenizer, prompt: str, completion: str) -> Encoded:
    """Instruction, line break, answer, eos; the answer and eos are supervised.

    Raises:
        DataError: the tokenizer has no eos token.
    """
    eos = require_eos(tokenizer)
    head = plain_prompt(prompt)
    text = head + completion
    ids, offsets = tokenize(tokenizer, text)
    body = supervise(tokenizer, text, ids, offsets, [(len(head), len(text))])
    prefix = bos_prefix(tokenizer)
    if ids[: len(prefix)] == prefix:
        prefix = []
    end = [] if ids and ids[-1] == eos and body.labels[-1] == eos else [eos]
    return Encoded(
        prefix + body.input_ids + end,
        [UNSUPERVISED] * len(prefix) + body.labels + end,
        [0] * len(prefix) + body.sizes + [0] * len(end),
    )
