"""Runs a GGUF file in llama.cpp on given token ids: the judge of what a file means."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

NONE, MEAN, CLS, RANK = 0, 1, 2, 4  # llama.cpp's pooling types
_ITS_OWN = -1
_SAID: list[bytes] = []  # by the library since the last file was opened


def logits(
    path: Path, tokens: Sequence[int], context: int = 0, adapter: Path | None = None
) -> torch.Tensor:
    """Logits after every token, ``[tokens, vocabulary]``.

    Args:
        context: what the model is opened with; 0 is the text's length.
        adapter: a file of low-rank updates to add.
    """
    with _opened(path, len(tokens), max(context, len(tokens))) as (library, model, run):
        if adapter is not None:
            _add(library, model, run, adapter)
        _decode(library, run, tokens)
        width = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        return torch.stack([_row(library.llama_get_logits_ith(run, place), width)
                            for place in range(len(tokens))])  # fmt: skip


def hidden(path: Path, tokens: Sequence[int]) -> torch.Tensor:
    """An encoder's last hidden states, ``[tokens, width]``."""
    with _opened(path, len(tokens), len(tokens), NONE) as (library, model, run):
        _decode(library, run, tokens)
        width = library.llama_model_n_embd(model)
        return torch.stack([_row(library.llama_get_embeddings_ith(run, place), width)
                            for place in range(len(tokens))])  # fmt: skip


def pooled(path: Path, tokens: Sequence[int], pooling: int = _ITS_OWN) -> torch.Tensor:
    """A text's one vector; of a classifier its scores. ``pooling``: -1 is what the file says."""
    with _opened(path, len(tokens), len(tokens), pooling) as (library, model, run):
        _decode(library, run, tokens)
        rank = library.llama_pooling_type(run) == RANK
        width = (library.llama_model_n_cls_out if rank else library.llama_model_n_embd)(model)
        return _row(library.llama_get_embeddings_seq(run, 0), width)


def labels(path: Path) -> list[str]:
    """The names of a classifier's classes."""
    with _opened(path, 8, 8, RANK) as (library, model, _):
        count = library.llama_model_n_cls_out(model)
        return [library.llama_model_cls_label(model, number).decode() for number in range(count)]


@contextmanager
def _opened(
    path: Path, tokens: int, context: int, pooling: int | None = None
) -> Iterator[tuple[Any, Any, Any]]:
    from llama_cpp import llama_cpp as library

    _SAID.clear()
    _silence()
    model = library.llama_model_load_from_file(
        str(path).encode(), library.llama_model_default_params()
    )
    assert model, b"".join(_SAID[-5:])
    settings = library.llama_context_default_params()
    settings.n_ctx = context
    settings.n_batch = settings.n_ubatch = tokens
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # float32
    settings.flash_attn_type = 0
    if pooling is not None:
        settings.embeddings = True
        settings.pooling_type = pooling
    run = library.llama_init_from_model(model, settings)
    assert run, b"".join(_SAID[-5:])
    try:
        yield library, model, run
    finally:
        library.llama_free(run)
        library.llama_model_free(model)


@cache
def _silence() -> Any:
    """The callback, kept for as long as the library may call it."""
    from llama_cpp import llama_cpp as library

    silent = library.llama_log_callback(lambda level, text, data: _SAID.append(text))
    library.llama_log_set(silent, ctypes.c_void_p(0))
    library.llama_backend_init()
    return silent


def _add(library: Any, model: Any, run: Any, adapter: Path) -> None:
    opened = library.llama_adapter_lora_init(model, str(adapter).encode())
    assert opened, b"".join(_SAID[-5:])
    pointers = (library.llama_adapter_lora_p_ctypes * 1)(
        ctypes.cast(opened, library.llama_adapter_lora_p_ctypes)
    )
    assert library.llama_set_adapters_lora(run, pointers, 1, (ctypes.c_float * 1)(1.0)) == 0


def _decode(library: Any, run: Any, tokens: Sequence[int]) -> None:
    batch = library.llama_batch_init(len(tokens), 0, 1)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        batch.logits[place] = 1
    batch.n_tokens = len(tokens)
    assert library.llama_decode(run, batch) == 0
    library.llama_batch_free(batch)


def _row(pointer: Any, width: int) -> torch.Tensor:
    return torch.tensor(pointer[:width])
