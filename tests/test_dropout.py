"""A sample's dropout mask depends on nothing but seed, step, sample, module and token position."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qft.lean.dropout import DropoutClock, SeededDropout, draw_mask, install_dropout, remove_dropout

WIDTH = 24
DTYPES = (torch.float32, torch.bfloat16)


def layer(p: float = 0.5, seed: int = 0, name: str = "layer") -> SeededDropout:
    return SeededDropout(p, DropoutClock(seed), name).train()


def mask_of(
    dropout: SeededDropout,
    samples: list[int],
    lengths: list[int],
    *,
    padded_to: int | None = None,
    step: int = 1,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The mask each row draws, padding left out."""
    dropout.clock.set(step, samples, lengths)
    output = dropout(torch.ones(len(samples), padded_to or max(lengths), WIDTH, dtype=dtype))
    dropout.clock.clear()
    return [row[:length].clone() for row, length in zip(output, lengths, strict=True)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_neighbours_nor_order_nor_padding_change_a_mask(dtype):
    lengths = {3: 5, 8: 9, 1: 7}
    alone = {
        sample: mask_of(layer(), [sample], [length], dtype=dtype)[0]
        for sample, length in lengths.items()
    }
    for order in ([3, 8, 1], [1, 3, 8], [8, 1]):
        for padded_to in (9, 16, 33):
            together = mask_of(
                layer(), order, [lengths[s] for s in order], padded_to=padded_to, dtype=dtype
            )
            for sample, mask in zip(order, together, strict=True):
                assert torch.equal(mask, alone[sample])


def test_a_mask_keeps_some_and_drops_some():
    (mask,) = mask_of(layer(), [0], [16])
    assert set(mask.unique().tolist()) == {0.0, 2.0}


def test_both_number_formats_drop_the_same_places():
    (single,) = mask_of(layer(), [4], [11])
    (half,) = mask_of(layer(), [4], [11], dtype=torch.bfloat16)
    assert torch.equal(single > 0, half > 0)


def test_token_positions_draw_different_masks():
    (mask,) = mask_of(layer(), [0], [16])
    assert len({tuple(row.tolist()) for row in mask}) == 16


@pytest.mark.parametrize("changed", ["seed", "step", "sample", "module"])
def test_the_mask_differs_by(changed):
    first = mask_of(layer(), [5], [12])[0]
    assert torch.equal(first, mask_of(layer(), [5], [12])[0])
    other = {
        "seed": lambda: mask_of(layer(seed=1), [5], [12]),
        "step": lambda: mask_of(layer(), [5], [12], step=2),
        "sample": lambda: mask_of(layer(), [6], [12]),
        "module": lambda: mask_of(layer(name="other"), [5], [12]),
    }[changed]()[0]
    share = (first == other).float().mean().item()
    assert 0.3 < share < 0.7  # independent: half the places agree by chance


def test_numbers_that_read_alike_do_not_collide():
    """Seed 1, step 12 is another moment than seed 11, step 2."""
    first = mask_of(layer(seed=1), [3], [12], step=12)[0]
    other = mask_of(layer(seed=11), [3], [12], step=2)[0]
    assert not torch.equal(first, other)


def test_the_mask_is_the_same_in_every_process():
    import hashlib

    (mask,) = mask_of(layer(seed=7, name="model.layers.0.drop"), [3], [4])
    told = hashlib.sha256((mask > 0).to(torch.uint8).numpy().tobytes()).hexdigest()
    code = (
        "import hashlib, torch\n"
        "from qft.lean.dropout import *\n"
        "clock = DropoutClock(7)\n"
        "layer = SeededDropout(0.5, clock, 'model.layers.0.drop').train()\n"
        "clock.set(1, [3], [4])\n"
        f"mask = layer(torch.ones(1, 4, {WIDTH}))[0] > 0\n"
        "print(hashlib.sha256(mask.to(torch.uint8).numpy().tobytes()).hexdigest())\n"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == told


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_that_is_dropped_is_p_and_the_mean_stays(p):
    masks = mask_of(layer(p), list(range(64)), [40] * 64)
    values = torch.cat([mask.flatten() for mask in masks])
    count = values.numel()
    tolerance = 5 * (p * (1 - p) / count) ** 0.5
    assert abs((values == 0).float().mean().item() - p) < tolerance
    assert abs(values.mean().item() - 1) < tolerance / (1 - p)


def test_p_zero_and_p_one():
    rows = torch.randn(2, 3, WIDTH)
    for p, expected in ((0.0, rows), (1.0, torch.zeros_like(rows))):
        dropout = layer(p)
        dropout.clock.set(1, [0, 1], [3, 3])
        assert torch.equal(dropout(rows), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_uses_the_mask_of_the_forward_pass(dtype):
    dropout = layer()
    dropout.clock.set(3, [2, 9], [6, 4])
    rows = torch.randn(2, 6, WIDTH, dtype=dtype, requires_grad=True)
    output = dropout(rows)
    upstream = torch.randn_like(output)
    dropout.clock.set(4, [0, 1], [6, 6])  # the backward pass comes later
    output.backward(upstream)
    mask = torch.where(rows.detach() == 0, 0, output.detach() / rows.detach())
    assert torch.equal(rows.grad != 0, mask != 0)
    torch.testing.assert_close(rows.grad, upstream * mask, rtol=1e-2, atol=1e-3)
    assert torch.equal(rows.grad[1, 4:], torch.zeros(2, WIDTH, dtype=dtype))  # padding


def test_the_gradient_is_the_true_one():
    dropout = layer(0.3)
    dropout.clock.set(1, [0, 1], [3, 2])
    rows = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dropout, (rows,))


def test_a_gradient_that_is_not_contiguous_meets_the_same_mask():
    def gradient(make) -> Tensor:
        dropout = layer()
        dropout.clock.set(1, [0, 1], [5, 5])
        rows = torch.ones(2, 5, WIDTH, requires_grad=True)
        make(dropout(rows)).backward()
        return rows.grad

    weights = torch.randn(WIDTH, 5, 2)
    first = gradient(lambda out: (out * weights.permute(2, 1, 0)).sum())
    second = gradient(lambda out: (out.permute(2, 1, 0) * weights).sum())
    assert torch.equal(first, second)
    assert torch.equal(gradient(lambda out: out.sum()) > 0, first != 0)  # an expanded gradient


def test_no_mask_is_kept_for_the_backward_pass():
    kept: list[Tensor] = []
    dropout = layer()
    dropout.clock.set(1, [0, 1], [5, 5])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropout(torch.ones(2, 5, WIDTH, requires_grad=True))
    assert kept == []


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.4)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        return self.second(self.drop(torch.tanh(self.first(rows))))


def block() -> tuple[Block, DropoutClock]:
    torch.manual_seed(1)
    model, clock = Block().train(), DropoutClock(5)
    assert install_dropout(model, clock) == 1
    return model, clock


@pytest.mark.parametrize("keep_random_state", [True, False])
def test_a_recomputed_forward_pass_draws_the_same_masks(keep_random_state):
    def gradients(recompute: bool) -> list[Tensor]:
        model, clock = block()
        clock.set(2, [4, 6, 5], [7, 3, 5])
        rows = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(2))
        if recompute:
            output = checkpoint(
                model, rows, use_reentrant=False, preserve_rng_state=keep_random_state
            )
        else:
            output = model(rows)
        output.square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, again)


def test_a_split_into_micro_batches_gives_the_same_gradients():
    lengths = [7, 3, 5]
    rows = torch.randn(3, 7, WIDTH, generator=torch.Generator().manual_seed(2))
    keep = torch.arange(7)[None, :] < torch.tensor(lengths)[:, None]

    def gradients(parts: list[list[int]]) -> list[Tensor]:
        model, clock = block()
        for part in parts:
            clock.set(2, part, [lengths[i] for i in part])
            longest = max(lengths[i] for i in part)
            output = model(rows[part, :longest])
            (output.square() * keep[part, :longest, None]).sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    whole = gradients([[0, 1, 2]])
    for parts in ([[0], [1], [2]], [[2, 0], [1]], [[1], [0, 2]]):
        for a, b in zip(whole, gradients(parts), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# --- the ordinary generator


def ordinary(dropout: SeededDropout, rows: Tensor) -> bool:
    """Whether the layer drew from torch's own generator."""
    torch.manual_seed(11)
    expected = nn.functional.dropout(rows, dropout.p, True)
    torch.manual_seed(11)
    return torch.equal(dropout(rows), expected)


def test_without_a_moment_the_ordinary_generator_is_used():
    dropout, rows = layer(), torch.ones(2, 5, WIDTH)
    assert ordinary(dropout, rows)
    dropout.clock.set(1, [0, 1], [5, 5])
    assert not ordinary(dropout, rows)
    dropout.clock.clear()
    assert ordinary(dropout, rows)


def test_a_batch_the_clock_does_not_know_uses_the_ordinary_generator():
    dropout = layer()
    dropout.clock.set(1, [0, 1], [5, 5])
    assert ordinary(dropout, torch.ones(3, 5, WIDTH))


def test_evaluation_drops_nothing():
    dropout = layer().eval()
    dropout.clock.set(1, [0, 1], [5, 5])
    rows = torch.randn(2, 5, WIDTH)
    assert dropout(rows) is rows


def test_a_meta_tensor_is_only_a_shape():
    dropout = layer()
    dropout.clock.set(1, [0, 1], [5, 5])
    assert dropout(torch.ones(2, 5, WIDTH, device="meta")).shape == (2, 5, WIDTH)


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    dropout = layer()
    dropout.clock.set(1, [0, 1], [5, 5])
    dropout(torch.ones(2, 5, WIDTH, requires_grad=True)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pooled_vector_is_dropped_over_its_whole_width():
    dropout = layer()
    dropout.clock.set(1, [3, 4], [2, 5])  # lengths are tokens, not features
    together = dropout(torch.ones(2, 64))
    assert (together > 0).any(dim=1).all()
    assert together[0, 5:].count_nonzero() > 0
    dropout.clock.set(1, [4], [5])
    assert torch.equal(dropout(torch.ones(1, 64))[0], together[1])


def test_padding_is_zero_in_the_mask():
    mask = draw_mask(torch.ones(2, 6, WIDTH), 0.5, [[(1, 6)], [(2, 2)]])
    assert mask[1, 2:].count_nonzero() == 0
    assert mask[1, :2].count_nonzero() > 0


# --- installing it


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(type(module) is kind for module in model.modules())


def test_a_tiny_bert_gets_seeded_dropout_and_gets_its_own_back(tiny_bert):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert, attn_implementation="eager"
    )
    model.eval()
    before = {
        name: module.p for name, module in model.named_modules() if type(module) is nn.Dropout
    }
    assert before
    clock = DropoutClock(0)
    assert install_dropout(model, clock) == len(before)
    assert count(model, nn.Dropout) == 0
    seeded = {n: m for n, m in model.named_modules() if isinstance(m, SeededDropout)}
    assert {name: module.p for name, module in seeded.items()} == before
    assert all(module.module_name == name for name, module in seeded.items())
    assert not any(module.training for module in seeded.values())
    assert install_dropout(model, clock) == 0

    model.train()
    ids = torch.randint(4, 260, (2, 9))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert any(not torch.equal(model(**batch).logits, model(**batch).logits) for _ in range(3))

    remove_dropout(model)
    after = {name: module.p for name, module in model.named_modules() if type(module) is nn.Dropout}
    assert after == before
    assert count(model, SeededDropout) == 0
    assert all(m.training for m in model.modules())


def test_a_layer_without_dropout_is_left_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0), nn.Dropout1d(0.5))
    assert install_dropout(model, DropoutClock(0)) == 0
    assert count(model, nn.Dropout) == 1


def test_the_dropout_of_a_peft_lora_is_replaced(tiny_llama):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def prepared_lora() -> tuple[nn.Module, DropoutClock]:
        base = AutoModelForCausalLM.from_pretrained(tiny_llama)
        torch.manual_seed(0)
        config = LoraConfig(
            r=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"], init_lora_weights=False
        )
        model = get_peft_model(base, config).train()
        clock = DropoutClock(9)
        assert install_dropout(model, clock) == 4  # two layers, two targets
        return model, clock

    model, clock = prepared_lora()
    ids = torch.randint(4, 260, (3, 8), generator=torch.Generator().manual_seed(0))

    def gradients(model: nn.Module, step: int, rows: list[int]) -> dict[str, Tensor]:
        model.zero_grad()
        clock.set(step, rows, [8] * len(rows))
        model(input_ids=ids[rows], labels=ids[rows]).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    whole = gradients(model, 1, [0, 1, 2])
    assert whole
    parts = [gradients(model, 1, [row]) for row in (2, 0, 1)]
    for name, gradient in whole.items():
        summed = torch.stack([part[name] for part in parts]).mean(dim=0)
        torch.testing.assert_close(summed, gradient, rtol=1e-4, atol=1e-7)
    other = gradients(model, 2, [0, 1, 2])
    assert any(not torch.allclose(other[name], whole[name], rtol=1e-2) for name in whole)

    names = set(model.state_dict())
    remove_dropout(model)
    assert set(model.state_dict()) == names
    assert count(model, SeededDropout) == 0
    model(input_ids=ids).logits.sum().backward()


def test_attention_weights_are_dropped_by_the_ordinary_generator():
    """Dimension 1 of [batch, heads, T, T] is no token position: no head may be zeroed."""
    clock = DropoutClock(0)
    clock.set(1, [0, 1], [3, 3])
    dropped = SeededDropout(0.5, clock, "attention")(torch.ones(2, 12, 3, 3))
    assert (dropped != 0).float().mean(dim=(0, 2, 3)).min() > 0
