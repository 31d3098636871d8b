"""Stop tokens that stop: what an artefact's settings say, and what a generation does."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qft.data.chat import terminators
from qft.errors import ModelError, QftError
from qft.files import read_json, write_json
from qft.gguf.special_tokens import ENDS_BY_NAME
from qft.lean.model_parts import device_of, is_encoder_decoder
from qft.verification.diagnosis import Finding
from qft.verification.subject import Subject

_TALKS = ("chat", "instruct")
_WRITES = ("text", "chat", "instruct", "seq2seq")
_FORCED_AT = 2  # which new token is forced to be the stop token
_FILE = "generation_config.json"


def stop_ids(subject: Subject) -> list[int]:
    """The tokens that end a generation by the subject's own files, as transformers reads them."""
    return _as_ids(_settings(subject).get("eos_token_id"))


def taught_ids(reference: Subject, tokenizer: Any) -> list[int]:
    """The tokens that must stop the artefact.

    Those that stop the reference, and what its training ended each answer with: the template's end
    of a turn for an adapter that was trained to talk, else the tokenizer's end of a text.
    """
    ids = set(stop_ids(reference))
    if reference.adapter is not None and reference.spec.task in _WRITES:
        ends = terminators(tokenizer) if reference.spec.task in _TALKS else []
        ends = ends or _as_ids(tokenizer.eos_token_id)
        ids |= set(ends)
    return sorted(ids)


def needed_stops(reference: Subject) -> list[int]:
    """What training ended answers with; nothing of a model that was taught none by qft."""
    if reference.adapter is None or reference.spec.task not in _WRITES:
        return []
    try:
        return taught_ids(reference, reference.tokenizer())
    except ModelError:  # a model without a tokenizer was not taught to end anything
        return []


def complete_stops(reference: Subject, folder: Path) -> list[int]:
    """Adds to a model folder's generation settings what training ended answers with.

    A base that was never made to talk often stops at the end of a text only, and its template's
    turns end with another token: what is made of it would go on for ever.

    Returns:
        The tokens that were added.
    """
    needed = needed_stops(reference)
    if not needed:
        return []
    settings = generation_config(reference)
    stops = _as_ids(settings.eos_token_id)
    lacking = [token for token in needed if token not in stops]
    if lacking:
        path = folder / _FILE
        values = read_json(path) if path.is_file() else settings.to_diff_dict()
        write_json(path, {**values, "eos_token_id": [*stops, *lacking]})
    return lacking


def check_stops(reference: Subject, artefact: Subject, tokenizer: Any, rows: int) -> list[Finding]:
    """What of the artefact's generation settings is wrong.

    Args:
        tokenizer: the reference's.
        rows: of the vocabulary, as the artefact's embeddings have them.
    """
    if reference.spec.task not in _WRITES:
        return []
    stops, needed = stop_ids(artefact), taught_ids(reference, tokenizer)
    findings = [
        Finding("stops", f"{_named(tokenizer, token)} does not stop the artefact",
                f"add {token} to eos_token_id in the artefact's {_FILE}")
        for token in needed if token not in stops
    ]  # fmt: skip
    settings = _settings(artefact)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        outside = [token for token in _as_ids(settings.get(key)) if not 0 <= token < rows]
        if outside:
            findings.append(Finding(
                "stops", f"{key} {outside[0]} is outside the vocabulary of {rows}",
                f"set {key} in config.json and {_FILE} to an id below {rows}",
            ))  # fmt: skip
    return findings


def check_inside_gguf(reference: Subject, artefact: Subject, tokenizer: Any) -> list[Finding]:
    """Whether llama.cpp, which has a place for one end of text, turn and message, stops there."""
    fields = artefact.reader.fields
    keys = [f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")]
    stops = {int(fields[key].contents()) for key in keys if key in fields}
    return [
        Finding("stops", f"{_named(tokenizer, token)} does not end a text in the GGUF file",
                "export it again with qft, which gives every stop token of generation_config.json "
                "and of the chat template a place")
        for token in taught_ids(reference, tokenizer)
        if token not in stops
        and str(tokenizer.convert_ids_to_tokens(token)) not in ENDS_BY_NAME
    ]  # fmt: skip


def check_generation(model: nn.Module, ids: Collection[int], tokenizer: Any) -> list[Finding]:
    """Lets a model write, forces each stop token, and looks whether it stops there.

    Args:
        model: the artefact, with its own generation settings.
        ids: the tokens that must stop it.
    """
    return [
        Finding("stops", f"a generation goes on after {_named(tokenizer, token)}",
                f"add {token} to eos_token_id in the artefact's {_FILE}")
        for token in ids if not _stops(model, token, tokenizer)
    ]  # fmt: skip


def stand_in(artefact: Subject, rows: int) -> nn.Module:
    """A tiny model with the artefact's vocabulary and generation settings, to write in its place.

    Where a generation stops is a matter of the settings alone.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM(LlamaConfig(
        vocab_size=rows, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    model.generation_config = generation_config(artefact)
    return model.eval()  # type: ignore[no-any-return]


def _stops(model: nn.Module, token: int, tokenizer: Any) -> bool:
    halves = is_encoder_decoder(model)
    prompt = list(tokenizer("a b c", verbose=False)["input_ids"]) or [token]
    ids = torch.tensor([prompt], device=device_of(model))
    begin = 1 if halves else len(prompt)
    other = next(i for i in range(4, 10_000) if i != token)

    def force(seen: Tensor, scores: Tensor) -> Tensor:
        wanted = token if seen.shape[1] - begin == _FORCED_AT - 1 else other
        return torch.full_like(scores, -1e9).index_fill_(1, torch.tensor(
            [wanted], device=scores.device), 0.0)  # fmt: skip

    generate: Any = model.generate
    with torch.no_grad():
        written = generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), logits_processor=[force],
            max_new_tokens=2 * _FORCED_AT, do_sample=False, num_beams=1, min_new_tokens=None,
        )  # fmt: skip
    return int(written.shape[1]) == begin + _FORCED_AT


def _settings(subject: Subject) -> dict[str, Any]:
    found: dict[str, Any] = generation_config(subject).to_dict()
    return found


def generation_config(subject: Subject) -> Any:
    """A subject's generation settings: generation_config.json, else what config.json says."""
    from transformers import GenerationConfig

    file = subject.files().get(_FILE)
    if file is not None:
        return GenerationConfig.from_pretrained(file.parent)
    config = subject.config()
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return GenerationConfig(**{key: config[key] for key in keys if key in config})


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(token) for token in (value if isinstance(value, (list, tuple)) else [value])]


def _named(tokenizer: Any, token: int) -> str:
    """``<|im_end|> (2)``."""
    try:
        return f"{tokenizer.convert_ids_to_tokens(token)} ({token})"
    except (IndexError, QftError, OverflowError):
        return f"token {token}"
