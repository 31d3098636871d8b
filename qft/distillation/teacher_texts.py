"""Sequence-level distillation: the student trains on answers that its teacher has written.

Kim and Rush 2016 (https://arxiv.org/abs/1606.07947). The teacher answers each training row once,
taking the likeliest token each time; the answers are kept in the teacher cache, a few rows a shard.
An answer that is empty, or that was not finished within `max_new_tokens`, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qft.data.columns import find_columns
from qft.data.examples import Example, Written, inputs_fingerprint
from qft.data.tasks import encode_rows
from qft.distillation.lesson_identity import teacher_parts
from qft.distillation.objective import WRITING_TASKS, DistillSettings
from qft.distillation.supply import cache_root, settings_in
from qft.distillation.teachers import OpenTeacher, open_teacher
from qft.errors import DataError, Interrupted, QftError, RecipeError
from qft.feature_identity import value_hash
from qft.files import explain_write_errors
from qft.generation import generate
from qft.inputs import Inputs
from qft.progress import Reporter
from qft.recipe import Recipe
from qft.shard_store import ShardStore

ROWS = 16  # a shard: what a kill can cost at most
_BYTES, _LENGTHS = "texts", "lengths"
_ANSWER = {"instruct": "completion", "seq2seq": "target"}


class TextStore(ShardStore):
    """Texts in UTF-8, one after another; an empty one is of no use."""

    file = "texts.safetensors"

    def write(self, number: int, texts: Sequence[str]) -> None:
        """Writes a shard; see `ShardStore.write_tensors`."""
        encoded = [text.encode() for text in texts]
        joined = torch.tensor(list(b"".join(encoded)), dtype=torch.uint8)
        lengths = torch.tensor([len(part) for part in encoded], dtype=torch.int64)
        self.write_tensors(number, {_BYTES: joined, _LENGTHS: lengths})

    def texts(self) -> list[str]:
        """All of them; every shard must be there."""
        found: list[str] = []
        for number in range(len(self.shards)):
            held = self.tensors(number)
            parts = held[_BYTES].split(held[_LENGTHS].tolist())
            found += [bytes(part.tolist()).decode() for part in parts]
        return found

    def fits(self, number: int, tensors: Mapping[str, Tensor]) -> bool:
        """See `ShardStore`."""
        lengths = tensors.get(_LENGTHS)
        return (
            set(tensors) == {_BYTES, _LENGTHS}
            and lengths is not None
            and lengths.shape == (len(self.shards[number]),)
            and int(lengths.sum()) == len(tensors[_BYTES])
        )


def with_teacher_texts(recipe: Recipe, inputs: Inputs, reporter: Reporter) -> Inputs:
    """The inputs with the teacher's answers to the training rows, where the recipe asks for them.

    Held-out rows keep the data's own.

    Raises:
        Interrupted: Ctrl-C; answers that are done are kept.
        RecipeError: the task's rows ask for nothing.
        DataError: no answer is of use.
    """
    settings = settings_in(recipe)
    if settings is None or settings.texts == "data":
        return inputs
    asked = [e for e in inputs.train.examples if isinstance(e.truth, Written)]
    if recipe.task not in WRITING_TASKS or not asked:
        raise RecipeError("These rows ask for nothing that a teacher could answer.",
                          where="strategy.texts", found=f"task: {recipe.task}",
                          fix=f"a task with answers: {', '.join(WRITING_TASKS)}")  # fmt: skip
    root = cache_root(recipe, settings)
    try:
        with explain_write_errors(root):
            texts = _answers(recipe, settings, inputs, asked, root, reporter)
    except KeyboardInterrupt:
        raise Interrupted("Stopped while the teacher wrote; what is done is kept.", where=root,
                          fix="the same command goes on") from None  # fmt: skip
    pairs = [(e.truth, text) for e, text in zip(asked, texts, strict=True) if text]
    reporter.say(f"teacher's texts: {len(pairs)} of {len(asked)} rows answered")
    if not pairs:
        raise DataError("The teacher finished no answer.", where="strategy.max_new_tokens",
                        found=settings.max_new_tokens, fix="more of them")  # fmt: skip
    rows = [_answered(recipe, written, text) for written, text in pairs]
    numbered = list(enumerate(rows, start=1))
    return replace(inputs, train=encode_rows(recipe, numbered, inputs.tokenizer, "teacher's texts"))


def _answers(
    recipe: Recipe,
    settings: DistillSettings,
    inputs: Inputs,
    asked: Sequence[Example],
    root: Path,
    reporter: Reporter,
) -> list[str]:
    identity = {
        **teacher_parts(recipe, settings, inputs),
        "kind": "texts",
        "quantization": settings.teacher_quantize,
        "max_new_tokens": str(settings.max_new_tokens),
        "data": value_hash([inputs_fingerprint(example) for example in asked]),
    }
    shards = [range(at, min(at + ROWS, len(asked))) for at in range(0, len(asked), ROWS)]
    store = TextStore(root, identity, shards)
    allowed = store.lock()
    if allowed == "no" or (allowed == "read" and store.missing()):
        store.release()
        raise QftError("Another run is at these texts.", where=store.folder,
                       fix="wait until it is done; then this one reads what it wrote")  # fmt: skip
    try:
        missing = store.missing()
        if missing:
            teacher = open_teacher(recipe, settings, inputs)
            with reporter.bar("teacher writes", sum(len(shards[n]) for n in missing)) as bar:
                for number in missing:
                    part = asked[shards[number].start : shards[number].stop]
                    store.write(number, _finished(teacher, part, settings))
                    bar.advance(len(part))
        return store.texts()
    finally:
        store.release()


def _finished(
    teacher: OpenTeacher, examples: Sequence[Example], settings: DistillSettings
) -> list[str]:
    """The teacher's answers; empty where it was cut off."""
    prompts: Any = [example.truth.prompt for example in examples]
    texts = generate(
        teacher.model,
        teacher.tokenizer,
        prompts,
        max_new_tokens=settings.max_new_tokens,
        tools=[example.truth.tools for example in examples],
    )
    sizes = [len(teacher.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts]
    return [
        text if size < settings.max_new_tokens - 1 else ""
        for text, size in zip(texts, sizes, strict=True)
    ]


def _answered(recipe: Recipe, written: Written, text: str) -> Mapping[str, Any]:
    """The row with the teacher's answer in the place of the data's."""
    columns = find_columns(recipe.task, [written.row], recipe.data.columns)
    if recipe.task == "chat":
        answer = {"role": "assistant", "content": text.strip()}
        return {**written.row, columns["messages"]: [*written.prompt, answer]}
    return {**written.row, columns[_ANSWER[recipe.task]]: text.strip()}
