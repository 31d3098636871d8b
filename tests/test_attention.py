"""The engine's attention on a CPU: SDPA's answer and gradients, with and without borders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qft.attention_interface import NAME, attend
from qft.data.examples import Example
from qft.lean.attention import TILE, Visible, attention
from qft.lean.meter import meter
from qft.packing_check import keeps_apart
from qft.preparation import prepare, prepared, unprepare

HEADS = {"equal": (4, 4), "grouped": (6, 2), "single": (4, 1)}


def inputs(heads: tuple[int, int], tokens: int, dtype: torch.dtype, rows: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((heads[0], 16), (heads[1], 16), (heads[1], 24))
    return [
        torch.randn(rows, tokens, *shape, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)  # as a projection's output comes
        .requires_grad_()
        for shape in shapes
    ]


def sdpa(tensors: list[Tensor], visible: Tensor, scale: float) -> Tensor:
    found = functional.scaled_dot_product_attention(
        *tensors, attn_mask=visible, scale=scale, enable_gqa=True
    )
    return found.transpose(1, 2)


def gradients(result: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    arriving = torch.randn(result.shape, generator=generator, dtype=torch.float64)
    return [result.detach(), *torch.autograd.grad(result, tensors, arriving.to(result.dtype))]


def blocks(borders: list[int], causal: bool) -> Tensor:
    """Who sees whom, ``[1, 1, tokens, tokens]``."""
    place = torch.arange(borders[-1])
    which = torch.bucketize(place, torch.tensor(borders[1:]), right=True)
    seen = which[:, None] == which[None]
    return (seen & (place[:, None] >= place[None]) if causal else seen)[None, None]


@pytest.mark.parametrize("heads", HEADS.values(), ids=list(HEADS))
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "borders", [[0, 5], [0, 1, 40, 41], [0, TILE, 3 * TILE + 7], [0, TILE - 1, TILE, 2 * TILE]]
)
def test_it_is_sdpa_within_the_borders(heads: tuple[int, int], causal: bool, borders: list[int]):
    tensors = inputs(heads, borders[-1], torch.float64)
    wanted = gradients(sdpa(tensors, blocks(borders, causal), 0.3), tensors)
    found = gradients(attention(*tensors, 0.3, Visible(borders, causal)), tensors)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_says_what_is_seen_row_by_row(side: str):
    tokens, lengths = TILE + 30, [TILE + 30, 9, 0]
    tensors = inputs((4, 2), tokens, torch.float64, rows=3)
    place = torch.arange(tokens)
    real = torch.stack([place < n if side == "right" else place >= tokens - n for n in lengths])
    mask = real[:, None, None, :] & (place[:, None] >= place[None])[None, None]
    wanted = gradients(sdpa(tensors, mask, 0.25), tensors)
    found = gradients(attention(*tensors, 0.25, Visible([0, tokens], False, mask)), tensors)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, torch.nan_to_num(theirs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tokens", [37, 300])
def test_bfloat16_is_about_as_near_the_truth_as_sdpa(tokens: int):
    rough = inputs((6, 2), tokens, torch.bfloat16)
    precise = [x.detach().double().requires_grad_() for x in rough]
    seen = blocks([0, tokens], True)
    truth = gradients(sdpa(precise, seen, 0.25), precise)
    theirs = gradients(
        functional.scaled_dot_product_attention(
            *rough, is_causal=True, scale=0.25, enable_gqa=True
        ).transpose(1, 2),
        rough,
    )
    ours = gradients(attention(*rough, 0.25, Visible([0, tokens], True)), rough)
    for own, other, exact in zip(ours, theirs, truth, strict=True):
        off, allowed = ((x.double() - exact).norm() / exact.norm() for x in (own, other))
        assert off <= 2.2 * allowed  # scores are rounded once, as eager attention rounds them
        assert off <= 0.01


def test_no_scores_are_kept_and_a_tile_is_all_that_exists():
    tokens, heads, width = 4 * TILE, 4, 16
    tensors = [torch.randn(1, heads, tokens, width).bfloat16().requires_grad_() for _ in range(3)]
    visible = Visible([0, tokens], True)

    def step() -> None:
        attention(*tensors, 0.25, visible).float().sum().backward()
        for tensor in tensors:
            tensor.grad = None

    reading = meter(step, device="cpu")
    scores = heads * TILE * tokens * 2
    whole = heads * tokens * width * 2  # queries, or keys, or values, or an output
    # scores, chances and their gradient for one tile; a dozen tensors as large as the queries
    assert reading.peak_bytes <= 3 * scores + 12 * whole + TILE * TILE * 2
    assert 3 * scores < heads * tokens * tokens * 2  # so it is less than all scores alone


class Module(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def test_what_is_no_business_of_its_own_goes_to_sdpa(monkeypatch):
    asked: list[dict[str, Any]] = []

    def plain(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        asked.append(kwargs)
        return args[1].transpose(1, 2), None

    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", plain)
    module = Module().train()
    query, key, value = (x.detach() for x in inputs((4, 2), 8, torch.bfloat16))
    attend(module, query, key, value, None)
    assert not asked
    attend(module, query, key, value, None, dropout=0.1)
    attend(module, query, key, value, torch.zeros(1, 1, 8, 8))  # adds to the scores
    attend(module, query[:, :, :1], key, value, None)  # a token after those in a cache
    attend(module, query.float(), key.float(), value.float(), None)
    attend(module.eval(), query, key, value, None)
    assert len(asked) == 5
    assert asked[0]["dropout"] == 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_borders_are_heeded_whoever_computes(dtype: torch.dtype):
    module = Module().eval()
    query, key, value = inputs((4, 2), 20, dtype)
    borders = torch.tensor([0, 7, 20])
    found, _ = attend(module, query, key, value, None, cu_seq_lens_q=borders)
    for start, end in ((0, 7), (7, 20)):
        part = [x[:, :, start:end] for x in (query, key, value)]
        alone, _ = attend(module, *part, None)
        torch.testing.assert_close(found[:, start:end], alone, rtol=2e-2, atol=1e-2)


def tiny(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
             "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 90}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def examples() -> list[Example]:
    made = []
    for index, size in enumerate((11, 6)):
        ids = [(7 * index + 3 * at) % 90 for at in range(size)]
        made.append(Example(index, {"input_ids": ids, "labels": ids}))
    return made


def test_a_model_that_keeps_examples_apart_is_told_from_one_that_does_not():
    model = prepare(tiny())
    assert prepared(model).engine.flat  # type: ignore[union-attr]
    assert keeps_apart(model, examples(), 0)
    layer = model.model.layers[0].self_attn  # type: ignore[union-attr]
    plain = layer.forward
    layer.forward = lambda *a, cu_seq_lens_q=None, **k: plain(*a, **k)  # hands no borders on
    assert not keeps_apart(model, examples(), 0)
    assert not keeps_apart(model, examples()[:1], 0)  # nothing to tell it by


def test_it_is_taken_out_again_and_an_own_choice_is_left():
    model = tiny()
    prepare(model)
    assert model.config._attn_implementation == NAME
    assert NAME not in model.config.to_json_string()
    unprepare(model)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    prepare(model)
    assert model.config._attn_implementation == "eager"
    assert not prepared(model).engine.flat  # type: ignore[union-attr]


def test_under_autocast_it_computes_as_without():
    tensors = inputs((4, 2), 40, torch.bfloat16)
    visible = Visible([0, 25, 40], True)
    wanted = gradients(attention(*tensors, 0.3, visible), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(attention(*tensors, 0.3, visible), tensors)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))
