"""On-policy steps: the student writes the answers, and learns from what its teacher makes of them.

Agarwal et al. 2023 (https://arxiv.org/abs/2306.13649): a student that only ever reads good text is
never corrected where its own goes wrong.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from qft.data.chat import terminators
from qft.data.encoding import UNSUPERVISED
from qft.data.examples import Example
from qft.distillation.objective import DistillSettings
from qft.generation import continue_tokens
from qft.lean.model_parts import is_encoder_decoder
from qft.micro_batch import MicroBatch

WRITTEN_AT_ONCE = 8  # fewer where memory runs out


@dataclass(frozen=True)
class OwnTexts:
    """Puts the student's own answers in the place of the data's.

    Attributes:
        max_length: tokens of a sequence at most.
        seed: decides which steps, and what is drawn in them: a resumed run draws the same.
        at_once: how many texts are written together.
    """

    settings: DistillSettings
    tokenizer: Any
    max_length: int
    seed: int
    at_once: MicroBatch = field(default_factory=lambda: MicroBatch(WRITTEN_AT_ONCE))

    def is_for(self, step: int) -> bool:
        """Whether the student writes in this step."""
        return random.Random(f"{self.seed}/{step}").random() < self.settings.on_policy

    def written(self, model: nn.Module, examples: Sequence[Example], step: int) -> list[Example]:
        """The same questions with the student's answers, drawn at temperature 1.

        One that leaves no room for an answer, or whose answer is empty, stays as it is.
        """
        two_halves = is_encoder_decoder(model)
        prompts = [_prompt(example, two_halves) for example in examples]
        longest = self.max_length if two_halves else (
            self.max_length - min(len(prompt) for prompt in prompts)
        )  # fmt: skip
        answers = continue_tokens(
            model,
            self.tokenizer,
            prompts,
            max_new_tokens=max(1, min(self.settings.max_new_tokens, longest)),
            temperature=1.0,
            seed=hash((self.seed, step)) % 2**31,
            chat=bool(terminators(self.tokenizer)) if self.tokenizer.chat_template else False,
            micro_batch=self.at_once,
        )
        return [
            self._with_answer(example, prompt, answer, two_halves)
            for example, prompt, answer in zip(examples, prompts, answers, strict=True)
        ]

    def _with_answer(
        self, example: Example, prompt: list[int], answer: list[int], two_halves: bool
    ) -> Example:
        room = self.max_length if two_halves else self.max_length - len(prompt)
        answer = answer[: max(0, room)]
        if not answer:
            return example
        if two_halves:
            return replace(example, inputs={**example.inputs, "labels": answer})
        labels = [UNSUPERVISED] * len(prompt) + answer
        return replace(example, inputs={"input_ids": [*prompt, *answer], "labels": labels})


def _prompt(example: Example, two_halves: bool) -> list[int]:
    """What stands before the first supervised token; all that an encoder reads."""
    ids: list[int] = example.inputs["input_ids"]
    if two_halves:
        return ids
    labels = example.inputs["labels"]
    first = next(place for place, label in enumerate(labels) if label != UNSUPERVISED)
    return ids[: max(1, first)]
