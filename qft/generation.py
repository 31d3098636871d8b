"""Text from a model: for many prompts at once, or word by word for a conversation."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qft.data.chat import terminators
from qft.data.encoding import encode_prompt, pad_id
from qft.data.language import prompt_messages
from qft.data.messages import Message
from qft.data.seq2seq import encode_source
from qft.data.template import Tools, render
from qft.enforcement import within_budget
from qft.errors import RecipeError, WillNotFitError
from qft.evaluation import evaluating
from qft.lean.model_parts import device_of
from qft.micro_batch import MicroBatch
from qft.out_of_memory import Shortage, is_out_of_memory, tried
from qft.random_state import RandomState

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[Sequence[Message]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    micro_batch: int | MicroBatch = 8,
    tools: Sequence[Tools] | None = None,
) -> list[str]:
    """Continues each prompt; the prompt itself is not in what comes back.

    Args:
        model: plain or wrapped by PEFT.
        prompts: texts, or conversations (these always go through the chat template).
        max_new_tokens: at most so many tokens for each.
        temperature: 0 takes the likeliest token.
        top_p: the share of the probability to sample from; with a temperature only.
        seed: of the sampling; the ordinary generators are left as they were.
        chat: render a text as the user's turn in the tokenizer's template.
        micro_batch: prompts at once; where memory runs out, fewer from then on: greedy texts stay
            the same, drawn ones become others. A `MicroBatch` remembers what did not fit.
        tools: for each prompt the functions that its template shall show, or None.

    Returns:
        One text a prompt, in their order, without special tokens.

    Raises:
        RecipeError: an empty prompt, or a setting out of its range.
        DataError: ``chat`` without a usable template.
    """
    chat = chat or any(not isinstance(prompt, str) for prompt in prompts)
    shown: Sequence[Tools] = tools or [None] * len(prompts)
    asked: Sequence[Any] = prompts
    encoded = [
        encode_source(tokenizer, str(prompt))
        if _has_decoder(model)
        else _encode(tokenizer, prompt, chat, functions)
        for prompt, functions in zip(asked, shown, strict=True)
    ]
    written = continue_tokens(
        model, tokenizer, encoded, max_new_tokens=max_new_tokens, temperature=temperature,
        top_p=top_p, seed=seed, chat=chat, micro_batch=micro_batch,
    )  # fmt: skip
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in written]


def continue_tokens(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    micro_batch: int | MicroBatch = 8,
) -> list[list[int]]:
    """Continues tokens with tokens, up to and with the one that ends a text.

    Args:
        prompts: what a decoder continues, or an encoder reads.
        chat: the template's own turns end a text too.

    Returns:
        The new tokens of each prompt, in their order.

    Raises:
        WillNotFitError: not even one text fits.
    """
    settings = _settings(model, tokenizer, max_new_tokens, temperature, top_p, chat)
    stops = set(settings.get("eos_token_id", ()))
    written: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    widths = [len(prompts[i]) + max_new_tokens for i in order]
    at_once = micro_batch if isinstance(micro_batch, MicroBatch) else MicroBatch(micro_batch)
    start = 0
    with evaluating(model), _own_randomness(model, seed):
        while start < len(order):
            random = RandomState.now()
            places = order[start : start + at_once.count(widths, start)]
            asked = [prompts[i] for i in places]
            found = tried(functools.partial(_write, model, tokenizer, asked, settings))
            if isinstance(found, Shortage):
                random.restore()
                if not at_once.make_room(widths[start : start + len(places)], found):
                    raise _does_not_fit(asked[0], max_new_tokens, found)
                continue
            for place, ids in zip(places, found, strict=True):
                end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
                written[place] = ids[:end]
            start += len(places)
    at_once.went_well()
    return written


def _write(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    settings: dict[str, Any],
) -> list[list[int]]:
    """The new tokens of each prompt, up to the longest answer's end."""
    batch = _padded(prompts, pad_id(tokenizer), model)
    rows, longest = batch["input_ids"].shape
    tokens = rows * (longest + settings["max_new_tokens"])
    with within_budget("generate", rows, tokens, rows):
        out = _generate(model, batch, settings)
    # an encoder-decoder's answer holds no prompt, but the token its decoder begins with
    written: list[list[int]] = out[:, 1 if _has_decoder(model) else longest :].tolist()
    return written


def _does_not_fit(
    prompt: Sequence[int], max_new_tokens: int, shortage: Shortage
) -> WillNotFitError:
    return WillNotFitError(
        "Not even one text fits into the memory for writing.",
        found=f"{len(prompt)} tokens and {max_new_tokens} to be written; {shortage.message}",
        fix="fewer new tokens, a shorter prompt, quantize: nf4, or a smaller model",
    )


def stream_chat(
    model: nn.Module,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.7,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """The assistant's next turn, piece by piece as it is written.

    Closing the iterator early stops the model after the token at hand. The model must not be used
    elsewhere meanwhile.

    Args:
        messages: the conversation so far, the user's words last. Without a chat template the last
            message's words are the prompt.

    Raises:
        RecipeError: an empty prompt, or a setting out of its range.
        DataError: the template does not accept the conversation.
    """
    from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

    chat = bool(tokenizer.chat_template)
    prompt = messages[-1]["content"]
    if _has_decoder(model):
        ids = encode_source(tokenizer, prompt)
    else:
        ids = _encode(tokenizer, messages if chat else prompt, chat)
    settings = _settings(model, tokenizer, max_new_tokens, temperature, top_p, chat)
    streamer: Any = TextIteratorStreamer(
        tokenizer,  # type: ignore[arg-type]
        skip_prompt=True,
        skip_special_tokens=True,
    )
    stop = threading.Event()
    failed: list[BaseException] = []

    class Asked(StoppingCriteria):  # type: ignore[misc]
        """Ends the generation once the reader has gone."""

        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
            return torch.full((input_ids.shape[0],), stop.is_set(), device=input_ids.device)

    def write() -> None:
        try:
            with evaluating(model), _own_randomness(model, seed):
                batch = _padded([ids], pad_id(tokenizer), model)
                _generate(
                    model,
                    batch,
                    settings,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([Asked()]),
                )
        except BaseException as error:  # carried over to the reader's thread
            short = is_out_of_memory(error)
            failed.append(
                _does_not_fit(ids, max_new_tokens, Shortage.of(error)) if short else error
            )
            streamer.on_finalized_text("", stream_end=True)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.set()
        writer.join()
    if failed:
        raise failed[0]


def _encode(
    tokenizer: Tokenizer, prompt: str | Sequence[Message], chat: bool, tools: Tools = None
) -> list[int]:
    if chat:
        messages = prompt_messages(prompt) if isinstance(prompt, str) else prompt
        text = render(tokenizer, messages, add_generation_prompt=True, tools=tools)
        ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        assert isinstance(prompt, str)
        ids = encode_prompt(tokenizer, prompt)
    if not ids:
        raise RecipeError("The prompt is empty.", fix="give the model at least one word")
    return list(ids)


def _settings(
    model: nn.Module,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    chat: bool,
) -> dict[str, Any]:
    for name, value, right in (
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1),
        ("temperature", temperature, temperature >= 0),
        ("top_p", top_p, 0 < top_p <= 1),
    ):
        if not right:
            raise RecipeError("A setting is out of its range.", where=name, found=value)
    sample = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    # Greedy: what the checkpoint says about sampling is set back, or transformers warns of it.
    greedy = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    stops = _stop_tokens(model, tokenizer, chat)
    return {
        "max_new_tokens": max_new_tokens,
        "pad_token_id": pad_id(tokenizer),
        **({"eos_token_id": stops} if stops else {}),
        **(sample if temperature > 0 else greedy),
    }


def _stop_tokens(model: nn.Module, tokenizer: Tokenizer, chat: bool) -> list[int]:
    """What ends a text: by the model's settings, the tokenizer, and the template's own turns."""
    config = getattr(model, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    stops = {listed} if isinstance(listed, int) else set(listed or ())
    if isinstance(tokenizer.eos_token_id, int):
        stops.add(tokenizer.eos_token_id)
    if chat:
        stops.update(terminators(tokenizer))
    return sorted(stops)


def _padded(prompts: Sequence[list[int]], pad_token_id: int, model: nn.Module) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, ``[batch, longest]``.

    On the left, since new tokens join on at the right; an encoder is padded as in training.
    """
    longest = max(len(ids) for ids in prompts)
    ids, mask = [], []
    for prompt in prompts:
        gap = longest - len(prompt)
        left, right = (0, gap) if _has_decoder(model) else (gap, 0)
        ids.append([pad_token_id] * left + prompt + [pad_token_id] * right)
        mask.append([0] * left + [1] * len(prompt) + [0] * right)
    device = device_of(model)
    return {
        "input_ids": torch.tensor(ids, dtype=torch.int64, device=device),
        "attention_mask": torch.tensor(mask, dtype=torch.int64, device=device),
    }


def _has_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _generate(
    model: nn.Module, batch: dict[str, Tensor], settings: dict[str, Any], **extra: Any
) -> Tensor:
    method: Any = model.generate
    out: Tensor = method(**batch, **settings, **extra)
    return out


@contextlib.contextmanager
def _own_randomness(model: nn.Module, seed: int) -> Iterator[None]:
    """Seeds the generators, and puts them back afterwards."""
    parameter = next(model.parameters())
    with torch.random.fork_rng(devices=[parameter.device] if parameter.is_cuda else []):
        torch.manual_seed(seed)
        yield
