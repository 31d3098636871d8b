"""What is kept of a teacher's word: exact where it is promised, and without bias where drawn."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from qft.distillation.bit_packing import bits_for, pack, packed_bytes, unpack
from qft.distillation.drawing import drawn
from qft.distillation.lesson_coding import LessonCoding, coverage
from qft.distillation.likeliest import likeliest


def teacher_logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    """As peaked as a language model's on text."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocabulary, generator=generator) * scale


# --- numbers in few bits


@pytest.mark.parametrize("vocabulary", [
    1, 2, 3, 8, 129, 256, 257, 32_000, 50_257, 128_256, 151_936, 262_144, 2**24 - 1, 2**24,
])  # fmt: skip
@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 33])
def test_ids_come_back_from_their_bits(vocabulary: int, count: int) -> None:
    bits = bits_for(vocabulary)
    assert 2**bits >= vocabulary > 2 ** (bits - 1) or vocabulary <= 2
    numbers = torch.randint(vocabulary, (50, count), generator=torch.Generator().manual_seed(0))
    numbers[0], numbers[1] = 0, vocabulary - 1
    packed = pack(numbers, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (50, packed_bytes(count, bits)) == (50, math.ceil(count * bits / 8))
    assert torch.equal(unpack(packed, bits, count), numbers)


def test_every_count_of_bits_and_no_number_too_large() -> None:
    for bits in range(1, 25):
        numbers = torch.randint(1 << bits, (9, 21), generator=torch.Generator().manual_seed(bits))
        assert torch.equal(unpack(pack(numbers, bits), bits, 21), numbers)
        with pytest.raises(ValueError, match="does not fit"):
            pack(numbers + (1 << bits), bits)
    with pytest.raises(ValueError, match="does not fit"):
        pack(torch.tensor([[-1]]), 5)
    with pytest.raises(ValueError, match="1 to 24 bits"):
        pack(torch.tensor([[1]]), 25)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_is_packed_into_nothing(shape: tuple[int, int]) -> None:
    numbers = torch.zeros(shape, dtype=torch.int64)
    assert unpack(pack(numbers, 7), 7, shape[1]).shape == shape


# --- the likeliest tokens


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_the_likeliest_and_the_rest_are_the_distribution(temperature: float) -> None:
    logits = teacher_logits(20, 1000)
    exact = (logits.double() / temperature).log_softmax(dim=1)
    made = likeliest(logits.clone(), 16, temperature)
    wanted = exact.topk(16, dim=1)
    assert torch.equal(made["tokens"], wanted.indices)
    assert (made["log_probabilities"] - wanted.values).abs().max() < 1e-5
    rest = 1 - wanted.values.exp().sum(dim=1)
    assert ((made["rest"] - rest) / rest).abs().max() < 1e-4


def test_a_small_rest_is_not_lost_in_rounding() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 7] = 40.0  # the others have 999 exp(-40) = 4e-15, which 1 - p cannot show
    made = likeliest(logits, 1)
    assert float(made["rest"]) == pytest.approx(999 * math.exp(-40), rel=1e-3)


def test_no_second_tensor_of_the_logits_size() -> None:
    from qft.lean.meter import Meter

    logits = teacher_logits(64, 4096)
    model = torch.nn.Module()
    with Meter(model) as meter:
        likeliest(logits, 8)
    assert meter.reading().peak.total < 1.02 * logits.nbytes  # the argument itself counts


@pytest.mark.parametrize(("precision", "mass", "nats"), [
    # float16: a log-probability of -10 is rounded by up to 0.004, one of -0.1 by 3e-5
    ("float32", 1e-6, 1e-6), ("float16", 2.5e-4, 1e-5),
])  # fmt: skip
def test_with_all_tokens_it_is_the_full_distribution(
    precision: str, mass: float, nats: float
) -> None:
    logits = teacher_logits(40, 300)
    exact = logits.double().softmax(dim=1)
    coding = LessonCoding(300, precision)  # type: ignore[arg-type]
    stored = coding.encode(likeliest(logits.clone(), 300))
    back = coding.decode(stored)
    p = torch.zeros(40, 300, dtype=torch.float64)
    p.scatter_(1, back["tokens"], back["log_probabilities"].double().exp())
    assert (p - exact).abs().max() < mass
    assert (exact * (exact / p).log()).sum(dim=1).abs().max() < nats
    assert (p.sum(dim=1) - 1).abs().max() < 1e-6  # float16's rounding of the mass is taken back
    assert coverage([stored]) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_rest_is_what_the_likeliest_leave(precision: str) -> None:
    logits = teacher_logits(40, 3000)
    made = likeliest(logits.clone(), 8)
    coding = LessonCoding(3000, precision)  # type: ignore[arg-type]
    stored = coding.encode(made)
    back = coding.decode(stored)
    left = 1 - back["log_probabilities"].double().exp().sum(dim=1)
    assert (left - made["rest"]).abs().max() < 1e-6
    assert coverage([stored]) == pytest.approx(1 - float(made["rest"].mean()), abs=1e-6)
    del made["rest"]  # a lesson that does not say it
    assert torch.allclose(coding.encode(made)["rest"], stored["rest"], atol=1e-5)


def test_bytes_a_row_are_what_is_stored() -> None:
    for vocabulary, count, precision in ((32_000, 8, "float16"), (128_256, 33, "float32")):
        coding = LessonCoding(vocabulary, precision)  # type: ignore[arg-type]
        stored = coding.encode(likeliest(teacher_logits(5, vocabulary), count))
        assert sum(t.nbytes for t in stored.values()) == 5 * coding.likeliest_bytes(count)


def test_what_has_no_form_of_its_own_stays_as_it_is() -> None:
    lesson = {"logits": torch.randn(1, 3), "layer.2": torch.randn(5, 8),
              "layer.3": torch.randn(5, 8).bfloat16()}  # fmt: skip
    exact = LessonCoding(10, "float32")
    assert all(torch.equal(exact.decode(exact.encode(lesson))[n], t) for n, t in lesson.items())
    stored = LessonCoding(10).encode(lesson)
    assert {n: t.dtype for n, t in stored.items()} == {
        "logits": torch.float32, "layer.2": torch.float16, "layer.3": torch.bfloat16,
    }  # fmt: skip
    assert torch.isfinite(LessonCoding(10).encode({"layer.1": torch.tensor([[1e6]])})["layer.1"])


# --- drawn tokens


def dense(lesson: dict[str, Tensor], vocabulary: int) -> Tensor:
    weights = lesson["weights"].double()
    empty = torch.zeros(len(weights), vocabulary, dtype=torch.float64)
    return empty.scatter_add_(1, lesson["samples"], weights)


def many_draws(power: float, rows: int = 4000, vocabulary: int = 50) -> tuple[Tensor, Tensor]:
    """The weights of many draws of one distribution, and that distribution."""
    logits = teacher_logits(1, vocabulary, scale=1.5)
    keys = [(number, 3) for number in range(rows)]
    made = drawn(logits.repeat(rows, 1), 6, keys, seed=11, power=power)
    return dense(made, vocabulary), logits.double().softmax(dim=1)[0]


@pytest.mark.parametrize("power", [1.0, 0.7, 1.3])
def test_the_mean_of_the_draws_is_the_distribution(power: float) -> None:
    weights, exact = many_draws(power)
    seen = exact > 2e-3  # of each of these dozens of draws are to be expected
    assert seen.sum() > 25
    error = weights.std(dim=0)[seen] / len(weights) ** 0.5
    apart = (weights.mean(dim=0) - exact)[seen] / error
    assert apart.abs().max() < 4  # of 30 tokens, one in 500 trials is beyond
    assert (apart**2).mean() == pytest.approx(1, abs=0.6)
    wrong = (weights.mean(dim=0) - exact.flip(0))[seen] / error
    assert wrong.abs().max() > 20  # the test can fail


def test_strata_vary_less_than_independent_draws() -> None:
    weights, exact = many_draws(1.0)
    independent = exact * (1 - exact) / 6
    common = exact > 1e-2  # the others' variance is too noisy to be compared
    assert (weights.var(dim=0) < independent * 1.1)[common].all()
    assert weights.var(dim=0).sum() < 0.75 * independent.sum()


def test_weights_sum_up_and_entropy_is_the_teachers() -> None:
    logits = teacher_logits(30, 500)
    made = drawn(logits.clone(), 20, [(n, 0) for n in range(30)])
    assert torch.allclose(made["weights"].sum(dim=1), torch.ones(30), atol=1e-6)
    p = logits.double().softmax(dim=1)
    assert torch.allclose(made["entropy"].double(), -(p * p.log()).sum(dim=1), atol=1e-5)
    for row, weights in zip(made["samples"], made["weights"], strict=True):
        real = row[weights > 0].tolist()
        assert real == sorted(set(real))


def test_the_mean_of_the_gradients_is_the_full_one() -> None:
    teacher, student = teacher_logits(1, 40, scale=2.0), teacher_logits(1, 40, seed=5)
    q = student.double().softmax(dim=1)[0]
    full = q - teacher.double().softmax(dim=1)[0]  # d KL / d student's logits

    def apart(count: int) -> float:
        made = drawn(teacher.repeat(count, 1), 4, [(n, 1) for n in range(count)], seed=2)
        return float((q - dense(made, 40).mean(dim=0) - full).norm() / full.norm())

    errors = [apart(count) for count in (30, 3000)]
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 4  # ten times closer with a hundred times as many
    # what the likeliest alone would teach stays away, however many rows there are
    top = likeliest(teacher.clone(), 4)
    kept = torch.zeros(40, dtype=torch.float64)
    kept[top["tokens"][0]] = top["log_probabilities"][0].double().softmax(dim=0)
    assert float((q - kept - full).norm() / full.norm()) > 0.1


def test_draws_depend_on_seed_example_and_position_alone() -> None:
    logits = teacher_logits(70, 300)
    keys = [(n // 7, n % 7) for n in range(70)]
    whole = drawn(logits.clone(), 12, keys, seed=4)
    for start, stop in ((0, 1), (5, 40), (69, 70)):
        part = drawn(logits[start:stop].clone(), 12, keys[start:stop], seed=4)
        assert all(torch.equal(part[name], whole[name][start:stop]) for name in whole)
    other = drawn(logits.clone(), 12, keys, seed=5)
    assert not torch.equal(other["samples"], whole["samples"])
    same = teacher_logits(1, 300, scale=1.0).repeat(70, 1)
    rows = {tuple(row.tolist()) for row in drawn(same, 12, keys, seed=4)["samples"]}
    assert len(rows) == 70  # neither examples nor positions share their draws


def test_a_token_without_mass_is_never_drawn() -> None:
    logits = torch.full((200, 64), float("-inf"))
    logits[:, [3, 40]] = 0.0
    made = drawn(logits, 9, [(n, n) for n in range(200)])
    assert set(made["samples"].unique().tolist()) == {3, 40}


@pytest.mark.parametrize(("draws", "power"), [(5, 1.0), (64, 1.0), (300, 1.0), (20, 0.8)])
def test_drawn_tokens_come_back(draws: int, power: float) -> None:
    made = drawn(teacher_logits(25, 700), draws, [(n, 0) for n in range(25)], power=power)
    coding = LessonCoding(700, draws=draws, shares=power == 1.0)
    stored = coding.encode(made)
    back = coding.decode(stored)
    assert back.keys() == made.keys()
    assert (dense(back, 700) - dense(made, 700)).abs().max() < 1e-7
    assert torch.equal(back["entropy"], made["entropy"])
    taken = sum(t.nbytes for t in stored.values())
    assert taken <= 25 * coding.most_drawn_bytes()


def test_merged_draws_take_little_room() -> None:
    sharp = teacher_logits(200, 32_000, scale=5.0)
    coding = LessonCoding(32_000, draws=50)
    stored = coding.encode(drawn(sharp, 50, [(n, 0) for n in range(200)]))
    assert sum(t.nbytes for t in stored.values()) < 0.7 * 200 * coding.most_drawn_bytes()
