"""Pruning one matrix: each method against a slow, direct implementation of its paper."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qft import input_hessian as hessians
from qft.errors import ModelError, RecipeError
from qft.input_hessian import Factor, add_inputs_, factorise_, new_hessian
from qft.lean.meter import meter
from qft.pruning import smallest as smallest_weights
from qft.pruning.smallest import prune_by_magnitude_, prune_by_wanda_
from qft.pruning.sparsegpt import prune_by_sparsegpt_
from qft.pruning.sparsity import Sparsity, parse_sparsity

HALF = Sparsity(0.5)
WANTED = [HALF, Sparsity(0.3), parse_sparsity(None, "2:4"), parse_sparsity(None, "3:8")]


def matrix(rows: int = 24, columns: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


def inputs(columns: int = 32, tokens: int = 200) -> Tensor:
    """Correlated ones, of very different sizes."""
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(tokens, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    return mixed * torch.logspace(1, -1, columns)


def goes_by(scores: Tensor, wanted: Sparsity, *, whole: bool) -> Tensor:
    """The mask, by Python's own sort (stable), one group at a time."""
    size = wanted.group or (scores.numel() if whole else scores.shape[1])
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    flat = scores.reshape(-1).tolist()
    for begin in range(0, len(flat), size):
        order = sorted(range(begin, begin + size), key=lambda i: flat[i])
        mask[order[: round(wanted.share * size)]] = True
    return mask.view(scores.shape)


# --- what is asked for


def test_a_pattern_says_its_share():
    found = parse_sparsity(None, " 1:4 ")
    assert (found.share, found.kept, found.group, str(found)) == (0.75, 1, 4, "1:4")
    assert str(parse_sparsity(0.5, None)) == "0.5"


@pytest.mark.parametrize(
    "ratio, pattern, said",
    [(None, None, "neither"), (0.5, "2:4", "one of the two"), (0.0, None, "between 0 and 1"),
     (1.0, None, "between 0 and 1"), (float("nan"), None, "between 0 and 1"),
     (None, "5:4", "n must be less than m"), (None, "4:4", "n must be less than m"),
     (None, "0:4", "n must be less than m"), (None, "half", "n must be less than m"),
     (None, "-2:4", "n must be less than m")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(ratio, pattern, said):
    with pytest.raises(RecipeError, match=said) as caught:
        parse_sparsity(ratio, pattern)
    assert caught.value.where
    assert caught.value.found
    assert caught.value.fix


def test_rows_that_cannot_be_cut_into_groups_are_refused():
    parse_sparsity(None, "2:4").require_fits("a.weight", (3, 8))
    HALF.require_fits("a.weight", (3, 7))
    with pytest.raises(ModelError, match="cut into the pattern's groups") as caught:
        parse_sparsity(None, "2:4").require_fits("a.weight", (3, 10))
    assert "a.weight" in caught.value.text()
    assert "10 inputs" in caught.value.text()


# --- magnitude and Wanda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_magnitude_is_what_sorting_gives(monkeypatch, dtype, wanted):
    monkeypatch.setattr(smallest_weights, "PIECE", 100)  # several pieces
    weight = matrix(dtype=dtype)
    weight[3, :5] = weight[20, 7]  # ties, over the borders of pieces
    expected = weight.masked_fill(goes_by(weight.float().abs(), wanted, whole=True), 0)
    prune_by_magnitude_(weight, wanted)
    assert torch.equal(weight, expected)


def test_of_equal_weights_exactly_as_many_go_as_were_asked_for():
    weight = torch.ones(8, 8)
    weight[0, 0] = -0.5
    prune_by_magnitude_(weight, HALF)
    assert int((weight == 0).sum()) == 32
    assert int((weight[:4] == 0).sum()) == 32, "the first of them"


def test_a_share_of_almost_nothing_or_almost_all():
    weight = matrix()
    prune_by_magnitude_(weight, Sparsity(1e-9))
    assert torch.equal(weight, matrix())
    prune_by_magnitude_(weight, Sparsity(1 - 1e-9))
    assert not weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_wanda_is_weight_times_length_of_the_input(monkeypatch, dtype, wanted):
    monkeypatch.setattr(smallest_weights, "PIECE", 100)
    weight, x = matrix(dtype=dtype), inputs()
    scores = weight.float().abs() * x.norm(dim=0)
    expected = weight.masked_fill(goes_by(scores, wanted, whole=False), 0)
    prune_by_wanda_(weight, x.norm(dim=0), wanted)
    assert torch.equal(weight, expected)
    by_size = matrix(dtype=dtype)
    prune_by_magnitude_(by_size, wanted)
    assert not torch.equal(weight == 0, by_size == 0), "the inputs count"


def test_neither_makes_a_copy_of_the_matrix():
    weight, norms = matrix(4096, 4096), torch.rand(4096)
    for prune in (lambda: prune_by_magnitude_(weight, HALF),
                  lambda: prune_by_wanda_(weight, norms, HALF)):  # fmt: skip
        reading = meter(prune)
        assert weight.nbytes < reading.peak_bytes < weight.nbytes + 32 * smallest_weights.PIECE


# --- SparseGPT


def by_surgeon(
    weight: Tensor, x: Tensor, wanted: Sparsity, mask_block: int, damping: float = 0.01
) -> Tensor:
    """The optimal brain surgeon, column by column, in float64: no factor, no blocks.

    Each column that is done is taken out of the inverse by Gaussian elimination.
    """
    weight = weight.double().clone()
    hessian = x.double().t() @ x.double()
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += torch.eye(len(hessian)) * damping * hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian)
    left = inverse.clone()
    pivots = []  # of the inverse, when all columns before have been taken out
    for j in range(len(left)):
        pivots.append(left[j, j].item())
        left = left - torch.outer(left[:, j], left[j]) / left[j, j]
    width = wanted.group or mask_block
    for j in range(weight.shape[1]):
        if j % width == 0:
            scores = weight[:, j : j + width] ** 2 / torch.tensor(pivots[j : j + width])
            mask = goes_by(scores, wanted, whole=True)
        error = torch.where(mask[:, j % width], weight[:, j], 0) / inverse[j, j]
        weight[:, j:] -= torch.outer(error, inverse[j, j:])
        weight[:, j].masked_fill_(mask[:, j % width], 0)
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return weight


def factor_of(x: Tensor) -> Factor:
    return factorise_(hessian_of(x))


def hessian_of(x: Tensor) -> Tensor:
    found = new_hessian(x.shape[1])
    for part in x.split(64):
        add_inputs_(found, part)
    return found


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_sparsegpt_is_the_optimal_brain_surgeon(monkeypatch, wanted):
    monkeypatch.setattr(hessians, "_BLOCK", 12)  # does not divide 32
    weight, x = matrix(), inputs()
    expected = by_surgeon(weight, x, wanted, mask_block=8)
    prune_by_sparsegpt_(weight, factor_of(x), wanted, mask_block=8, block=8)
    assert torch.equal(weight == 0, expected == 0)
    assert (weight - expected).abs().max() < 1e-3 * expected.abs().max()
    if wanted.group is not None:
        zeros = (weight == 0).view(-1, wanted.group).sum(1)
        assert (zeros == wanted.group - wanted.kept).all()
    loss, of_magnitude = ((x @ (w - matrix()).t()).norm() for w in (weight, pruned_by_size(wanted)))
    assert loss < of_magnitude


def pruned_by_size(wanted: Sparsity) -> Tensor:
    weight = matrix()
    prune_by_magnitude_(weight, wanted)
    return weight


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_the_block_changes_nothing(wanted):
    found = []
    for block in (8, 20, 1000):
        weight = matrix()
        prune_by_sparsegpt_(weight, factor_of(inputs()), wanted, mask_block=8, block=block)
        found.append(weight)
    for other in found[1:]:
        assert torch.equal(other == 0, found[0] == 0)
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)


def test_dead_inputs_lose_their_weights_and_disturb_nobody():
    x = inputs()
    x[:, [0, 5, 31]] = 0
    weight = matrix()
    expected = by_surgeon(weight, x, HALF, mask_block=32)
    prune_by_sparsegpt_(weight, factor_of(x), HALF)
    assert not weight[:, [0, 5, 31]].any()
    assert torch.equal(weight == 0, expected == 0)
    assert (weight - expected).abs().max() < 1e-3 * expected.abs().max()


def test_fewer_tokens_than_inputs_need_only_the_damping():
    weight = matrix()
    prune_by_sparsegpt_(weight, factor_of(inputs(tokens=5)), HALF)
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_the_damping_is_raised_where_it_does_not_do():
    """Rounding made this matrix indefinite by more than one per cent of its diagonal."""
    broken = torch.eye(32)
    broken[0, 1] = broken[1, 0] = 1.05
    found = [matrix(), matrix()]
    prune_by_sparsegpt_(found[0], factorise_(broken.clone()), HALF)
    prune_by_sparsegpt_(found[1], factorise_(broken.clone(), damping=0.1), HALF)
    assert torch.equal(found[0], found[1]), "nothing of the first attempt is left"


def test_what_cannot_be_inverted_is_one_clear_error():
    hopeless = torch.eye(32)
    hopeless[0, 1] = hopeless[1, 0] = 1e6
    with pytest.raises(ModelError, match="cannot be inverted") as caught:
        factorise_(hopeless, "layers.3.q_proj.weight")
    assert "layers.3.q_proj.weight" in caught.value.text()
    x = inputs()
    x[3, 4] = float("inf")
    with pytest.raises(ModelError, match="not finite"):
        factorise_(hessian_of(x))


def test_sparsegpt_works_within_the_hessian():
    """Beside H and one copy of the weight there are strips of 128 rows, and no second H."""
    size = 2048
    weight = matrix(256, size, torch.bfloat16)
    held = new_hessian(size)
    add_inputs_(held, inputs(size, 300))
    reading = meter(lambda: prune_by_sparsegpt_(weight, factorise_(held), HALF))
    strips = 6 * 128 * size * 4
    assert reading.peak_bytes < held.nbytes + 3 * weight.nbytes + strips
    assert strips < 0.4 * held.nbytes, "a second H would not go unseen"
