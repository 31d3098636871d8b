"""What a model writes for held-out rows, and how it compares with what people wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from qft.data.examples import Written
from qft.errors import RecipeError
from qft.generation import generate
from qft.metrics.texts import text_scores

if TYPE_CHECKING:
    from qft.data.examples import Example

_AT_ONCE = 64  # prompts between two reports of progress


def write_and_score(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    max_new_tokens: int = 128,
    micro_batch: int = 8,
    execute_code: bool = False,
    progress: Callable[[int], object] | None = None,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Lets the model answer every row, taking the likeliest token each time.

    Args:
        examples: of a task that answers (instruct, chat, seq2seq).
        micro_batch: prompts at once; it need not be that of the evaluation.
        execute_code: also run what it writes against the rows' tests (`qft.code_execution`).

    Returns:
        The measures of `qft.metrics.texts.text_scores`, with `pass_at_1` where code was run; and a
        row each: `prompt`, `prediction`, `reference`.

    Raises:
        RecipeError: the task has no answers to write; the system cannot run code safely.
        DataError: there are no tests to run.
    """
    asked = [e.truth for e in examples if isinstance(e.truth, Written)]
    if not asked:
        raise RecipeError(
            "These rows have no answers that a model could write.",
            where="--generate",
            fix="a task with answers: instruct, chat, seq2seq",
        )
    texts: list[str] = []
    for start in range(0, len(asked), _AT_ONCE):
        part = asked[start : start + _AT_ONCE]
        prompts: Any = [written.prompt for written in part]
        texts += generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            micro_batch=micro_batch,
            tools=[written.tools for written in part],
        )
        if progress is not None:
            progress(len(part))
    stripped = [text.strip() for text in texts]
    scores = text_scores(stripped, [written.reference.strip() for written in asked])
    if execute_code:
        from qft.code_execution import pass_rate

        # as written: the first blanks of a function's body are its indent
        scores["pass_at_1"] = pass_rate([written.row for written in asked], texts)
    rows = [
        {"prompt": written.prompt, "prediction": text, "reference": written.reference}
        for written, text in zip(asked, stripped, strict=True)
    ]
    return scores, rows
