"""The tokenizer's chat template, rendered by transformers' sandbox, and what goes wrong in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qft.data.messages import Message
from qft.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Tools = Sequence[Mapping[str, Any]] | None


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(tokenizer.chat_template)


def require_template(tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer without a chat template.

    Raises:
        DataError: it has none.
    """
    if not has_template(tokenizer):
        raise DataError(
            "This model's tokenizer has no chat template, so conversations cannot be rendered.",
            where=getattr(tokenizer, "name_or_path", None),
            fix="take the instruct or chat version of the model, put a chat_template.jinja into "
            "its folder, or train with task: instruct",
        )


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Tools = None,
) -> str:
    """The conversation as the template writes it, by transformers' sandboxed renderer.

    Args:
        tools: descriptions of the functions the model may call, for templates that show them.

    Raises:
        DataError: no template, or one that does not accept these messages.
        ModelError: the template is broken, or reaches for what the sandbox forbids.
    """
    require_template(tokenizer)
    # As a batch of one: transformers refuses a bare empty list, which is the prefix of a
    # conversation that the assistant opens.
    return str(
        apply_template(
            tokenizer,
            [list(messages)],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            tools=list(tools) if tools else None,
        )[0]
    )


def apply_template(
    tokenizer: Tokenizer, conversations: list[list[Message]], **settings: Any
) -> Any:
    """`apply_chat_template`, with what goes wrong in it as one clear error; see `render`."""
    from jinja2.exceptions import SecurityError, TemplateSyntaxError

    where = getattr(tokenizer, "name_or_path", None)
    try:
        return tokenizer.apply_chat_template(conversations, **settings)
    except SecurityError as error:
        raise ModelError(
            "The model's chat template reaches for what a template must not touch.",
            where=where,
            found=_excerpt(error),
            fix="do not use this model; its template tries to run code",
        ) from None
    except TemplateSyntaxError as error:
        raise ModelError(
            "The model's chat template is broken.",
            where=f"{where}, line {error.lineno} of the template",
            found=_excerpt(error),
        ) from None
    except Exception as error:  # the template is a foreign program and may fail in any way
        raise DataError(
            "The model's chat template does not accept a conversation.",
            where=where,
            found=_excerpt(error),
            fix="bring the messages into the order it asks for (many want user and assistant in "
            "turn, and some know no system message)",
        ) from None


def _excerpt(error: BaseException) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]!r:.200}"
