"""Packing where attention is FlashAttention: borders instead of a mask, in a batch of one row.

flash-attn needs a GPU. Here its two functions are plain attention on the CPU, called as it is by
transformers' own code, which derives the borders; what is replaced is the kernel alone.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_packing import close, examples, gradients, opened, ready
from torch import Tensor, nn
from torch.nn import functional

from qft.data.packing import collate_packed, one_row, pack
from qft.errors import RecipeError
from qft.packing_check import require_exact_packing
from qft.step import Layout

NAME = "flash_stand_in"
calls: list[list[int]] = []  # the borders of every call, empty for one without any


def flash(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False,
) -> Tensor:  # fmt: skip
    """`flash_attn_func`: ``[batch, length, heads, width]``, fewer key-value heads."""
    calls.append([])
    return attention(q, k, v, softmax_scale, causal)


def flash_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False,
) -> Tensor:  # fmt: skip
    """`flash_attn_varlen_func`: ``[tokens, heads, width]``, each between two borders alone."""
    borders = cu_seqlens_q.tolist()
    calls.append(borders)
    assert borders == cu_seqlens_k.tolist()
    pairs = list(pairwise(borders))
    assert max(b - a for a, b in pairs) == int(max_seqlen_q) == int(max_seqlen_k)
    parts = [
        attention(*(t[None, a:b] for t in (q, k, v)), softmax_scale, causal)[0] for a, b in pairs
    ]
    return torch.cat(parts)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, enable_gqa=True
    )
    return out.transpose(1, 2)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface
    from transformers import modeling_flash_attention_utils as library
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

    AttentionInterface.register(NAME, flash_attention_forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    functions = (flash, flash_varlen, None, library._pad_input, library._unpad_input)
    process = library._lazy_define_process_function(flash_varlen)
    monkeypatch.setattr(
        library, "lazy_import_flash_attention", lambda *_, **__: (functions, (process, dict))
    )
    calls.clear()


def flashing(model: nn.Module) -> nn.Module:
    model.config._attn_implementation = NAME  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("strategy", ["lora", "lora-dropout", "full"])
def test_packed_gradients_are_the_unpacked_ones(strategy: str, tiny_llama: Path):
    wanted, _ = gradients(ready(tiny_llama, strategy), Layout())  # by the ordinary attention
    assert not calls
    model = flashing(ready(tiny_llama, strategy))
    close(gradients(model, Layout())[0], wanted)
    calls.clear()
    close(gradients(model, Layout(pack_to=32), micro_batch=3)[0], wanted)
    lengths = [len(e.inputs["input_ids"]) for row in pack(examples(), 32)[:3] for e in row]
    borders = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert calls[0] == borders  # every example's, and nothing that fills up
    close(gradients(model, Layout(pack_to=64), micro_batch=1)[0], wanted)


def test_the_check_sees_what_training_would_do(tiny_llama: Path, monkeypatch):
    model = flashing(opened(tiny_llama))
    require_exact_packing(model, examples(), 0)
    assert calls[-1] == [0, 17, 22, 27, 44]  # two rows of two examples
    # several rows, whose borders transformers does not look for
    monkeypatch.setattr("qft.packing_check.one_row", lambda rows: rows)
    with pytest.raises(RecipeError, match="see one another"):
        require_exact_packing(model, examples(), 0)


def test_one_row_holds_all_and_is_not_filled_up():
    rows = pack(examples(), 32)
    batch = collate_packed(one_row(rows), 0)
    assert batch["input_ids"].shape == (1, sum(len(e.inputs["input_ids"]) for e in examples()))
    assert int((batch["position_ids"] == 0).sum()) == len(examples())
    assert "attention_mask" not in batch
