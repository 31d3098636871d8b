"""The chunked loss against the one written out, for every kind of head and of loss; its bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from qft.lean.divergence import Divergence, Kind, LiveRows, Sampled, TopK
from qft.lean.label_loss import CrossEntropy, Head, LogitLoss, Mixed, label_loss
from qft.lean.meter import Meter
from qft.lean.sorted_gap import SortedGap

POSITIONS, WIDTH, VOCABULARY, RANK = 37, 16, 50, 3


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    made = {
        "hidden": drawn(POSITIONS, WIDTH, dtype=dtype),
        "weight": drawn(VOCABULARY, WIDTH, dtype=dtype),
        "bias": drawn(VOCABULARY, dtype=dtype),
        "down": drawn(RANK, WIDTH, dtype=dtype),
        "up": drawn(VOCABULARY, RANK, dtype=dtype),
    }
    return {name: value.requires_grad_() for name, value in made.items()}


def written_out(given: dict[str, Tensor], parts: tuple[str, ...], scale: float, cap: Any) -> Tensor:
    logits = given["hidden"] @ given["weight"].T
    if "bias" in parts:
        logits = logits + given["bias"]
    if "down" in parts:
        logits = logits + 0.7 * (given["hidden"] @ given["down"].T @ given["up"].T)
    logits = logits * scale
    return logits if cap is None else cap * (logits / cap).tanh()


def head_of(given: dict[str, Tensor], parts: tuple[str, ...], scale: float, cap: Any) -> Head:
    lora = (given["down"], given["up"], 0.7) if "down" in parts else None
    return Head(given["weight"], given["bias"] if "bias" in parts else None, lora, scale, cap)


TARGETS = torch.arange(POSITIONS) * 7 % VOCABULARY
CHUNK = VOCABULARY * 16 * 5  # a few positions at a time, the last chunk a short one


@pytest.mark.parametrize("parts", [(), ("bias",), ("down", "up"), ("bias", "down", "up")])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 2.0)])
@pytest.mark.parametrize(
    "options", [{}, {"smoothing": 0.1}, {"weighted": True}, {"z_loss": 0.01},
                {"smoothing": 0.2, "weighted": True, "z_loss": 0.1}],
)  # fmt: skip
def test_loss_and_gradients_are_those_written_out(
    parts: tuple[str, ...], scale: float, cap: Any, options: dict[str, Any]
):
    smoothing, z_loss = options.get("smoothing", 0.0), options.get("z_loss", 0.0)
    weights = drawn(VOCABULARY).abs() if "weighted" in options else None
    plain, ours = inputs(), inputs()
    logits = written_out(plain, parts, scale, cap)
    nats = functional.cross_entropy(logits, TARGETS, reduction="none", label_smoothing=smoothing)
    nats = nats + z_loss * logits.logsumexp(dim=1).square()
    wanted = (nats * (1 if weights is None else weights[TARGETS])).sum()
    found = label_loss(
        ours["hidden"], head_of(ours, parts, scale, cap),
        CrossEntropy(TARGETS, smoothing, weights, z_loss), vocabulary=VOCABULARY, chunk_bytes=CHUNK,
    )  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    (wanted / 11).backward()
    (found / 11).backward()
    for name in ("hidden", "weight", *parts):
        torch.testing.assert_close(ours[name].grad, plain[name].grad, rtol=1e-8, atol=1e-10)


def test_only_what_trains_gets_a_gradient():
    given = inputs()
    given["weight"].requires_grad_(False)
    loss = label_loss(
        given["hidden"], Head(given["weight"]), CrossEntropy(TARGETS), vocabulary=VOCABULARY
    )
    loss.backward()
    assert given["hidden"].grad is not None
    assert given["weight"].grad is None
    with torch.no_grad():
        silent = label_loss(
            given["hidden"], Head(given["weight"]), CrossEntropy(TARGETS), vocabulary=VOCABULARY
        )
    assert not silent.requires_grad
    assert float(silent) == float(loss)


def test_a_weight_that_comes_in_blocks():
    plain, ours = inputs(), inputs()
    frozen = plain["weight"].detach()

    def blocks() -> Any:
        return ((at, frozen[at : at + 13]) for at in range(0, VOCABULARY, 13))

    head = Head(None, plain["bias"], None, blocks=blocks)
    whole = Head(frozen, ours["bias"])
    for given, chosen in ((plain, head), (ours, whole)):
        label_loss(
            given["hidden"], chosen, CrossEntropy(TARGETS), vocabulary=VOCABULARY, chunk_bytes=CHUNK
        ).backward()
    for name in ("hidden", "bias"):
        torch.testing.assert_close(plain[name].grad, ours[name].grad)


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
@pytest.mark.parametrize("support", [4, VOCABULARY])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_from_a_teacher(kind: Any, support: int, temperature: float):
    teacher = (drawn(POSITIONS, VOCABULARY) / temperature).log_softmax(dim=1)
    best = teacher.topk(support, dim=1)
    given, ours = inputs(), inputs()
    student = (given["hidden"] @ given["weight"].T / temperature).softmax(dim=1)
    s, t = student.gather(1, best.indices), best.values.exp()
    if support < VOCABULARY:
        s, t = (torch.cat([v, 1 - v.sum(dim=1, keepdim=True)], dim=1) for v in (s, t))
    mixture = 0.3 * t + 0.7 * s
    nats = {
        "forward-kl": t * (t / s).log(),
        "reverse-kl": s * (s / t).log(),
        "jsd": 0.3 * t * (t / mixture).log() + 0.7 * s * (s / mixture).log(),
    }[kind]
    wanted = nats.sum() * temperature**2
    loss = Divergence(TopK(best.indices, best.values), kind, temperature, beta=0.3)
    found = label_loss(
        ours["hidden"], Head(ours["weight"]), loss, vocabulary=VOCABULARY, chunk_bytes=CHUNK
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
    wanted.backward()
    found.backward()
    for name in ("hidden", "weight"):
        torch.testing.assert_close(ours[name].grad, given[name].grad, rtol=1e-6, atol=1e-7)


def teacher_head() -> tuple[Tensor, Tensor]:
    return drawn(POSITIONS, 9), drawn(VOCABULARY + 4, 9)


def reference(kind: str, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Of logits, each position's, in five lines."""
    s, t = (x.div(temperature).log_softmax(dim=1) for x in (student, teacher))
    m = (0.3 * t.exp() + 0.7 * s.exp()).log()
    forward, reverse = t.exp() * (t - s), s.exp() * (s - t)
    mixed = 0.3 * t.exp() * (t - m) + 0.7 * s.exp() * (s - m)
    chosen = {"forward-kl": forward, "reverse-kl": reverse, "jsd": mixed}[kind]
    return chosen.sum(dim=1) * temperature**2


def compare(loss: LogitLoss, written: Any, chunk: int = CHUNK) -> None:
    """Value and gradients of the chunked loss against those written out, in float64."""
    given, ours = inputs(), inputs()
    wanted = written(given["hidden"] @ given["weight"].T)
    found = label_loss(
        ours["hidden"], Head(ours["weight"]), loss, vocabulary=VOCABULARY, chunk_bytes=chunk
    )
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    wanted.backward()
    found.backward()
    for name in ("hidden", "weight"):
        torch.testing.assert_close(ours[name].grad, given[name].grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("shared", [VOCABULARY, VOCABULARY - 7])
def test_divergences_from_a_teacher_in_memory(kind: Kind, temperature: float, shared: int):
    states, weight = teacher_head()
    rows = LiveRows(states, Head(weight), VOCABULARY + 4, shared, temperature)
    loss = Divergence(rows, kind, temperature, beta=0.3, shared=shared)
    teacher = (states @ weight.T)[:, :shared]
    compare(loss, lambda logits: reference(kind, logits[:, :shared], teacher, temperature).sum())


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
def test_all_tokens_of_a_cache_say_what_the_teacher_in_memory_says(kind: Kind):
    states, weight = teacher_head()
    weight = weight[:VOCABULARY]
    best = (states @ weight.T / 1.5).log_softmax(dim=1).topk(VOCABULARY, dim=1)
    cached = Divergence(TopK(best.indices, best.values), kind, 1.5, beta=0.3)
    teacher = states @ weight.T
    compare(cached, lambda logits: reference(kind, logits, teacher, 1.5).sum())


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_labels_and_teacher_mixed(share: float):
    states, weight = teacher_head()
    live = Divergence(LiveRows(states, Head(weight), VOCABULARY + 4, VOCABULARY), "reverse-kl")
    teacher = (states @ weight.T)[:, :VOCABULARY]
    compare(
        Mixed(CrossEntropy(TARGETS, 0.1), live, (1 - share, share)),
        lambda logits: (
            (1 - share)
            * functional.cross_entropy(logits, TARGETS, reduction="sum", label_smoothing=0.1)
            + share * reference("reverse-kl", logits, teacher, 1.0).sum()
        ),
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_teacher_known_by_draws(temperature: float):
    states, weight = teacher_head()
    teacher = (states @ weight.T)[:, : VOCABULARY - 3].div(temperature).log_softmax(dim=1)
    samples = torch.stack([TARGETS % 40, TARGETS % 40, (TARGETS + 1) % 47], dim=1)  # one twice
    weights = drawn(POSITIONS, 3).abs()
    entropy = -(teacher.exp() * teacher).sum(dim=1)

    def written(logits: Tensor) -> Tensor:
        s = logits[:, : VOCABULARY - 3].div(temperature).log_softmax(dim=1)
        return temperature**2 * (-(weights * s.gather(1, samples)).sum() - entropy.sum())

    compare(Sampled(samples, weights, entropy, temperature, shared=VOCABULARY - 3), written)


@pytest.mark.parametrize("theirs", [VOCABULARY - 11, VOCABULARY, VOCABULARY + 4])
@pytest.mark.parametrize("k", [None, 6])
def test_distributions_compared_by_rank(theirs: int, k: int | None):
    states, weight = teacher_head()
    probabilities = (states @ weight[:theirs].T).softmax(dim=1)
    paired = (torch.arange(POSITIONS) % 5 != 0).double()

    def written(logits: Tensor) -> Tensor:
        both = [x.sort(dim=1, descending=True).values for x in (logits.softmax(1), probabilities)]
        if k is not None:
            both = [torch.cat([x[:, :k], x[:, k:].sum(dim=1, keepdim=True)], dim=1) for x in both]
        most = max(x.shape[1] for x in both)
        s, t = (functional.pad(x, (0, most - x.shape[1])) for x in both)
        return ((s - t).abs().sum(dim=1) * paired).sum()

    if k is None:
        loss = SortedGap(LiveRows(states, Head(weight[:theirs]), theirs, theirs), paired)
    else:
        best = probabilities.log().topk(k, dim=1)
        loss = SortedGap(TopK(best.indices, best.values), paired)
    compare(loss, written)


def test_an_outermost_teacher_makes_no_infinite_loss():
    """In float32, with a token that one side is sure of and the other sure not to see."""
    weight = torch.zeros(VOCABULARY, WIDTH)
    weight[0, 0], weight[1, 0] = 200.0, -200.0
    sure = torch.zeros(2, WIDTH)
    sure[:, 0] = torch.tensor([1.0, -1.0])
    kinds: tuple[Kind, ...] = ("forward-kl", "reverse-kl", "jsd")
    for kind in kinds:
        hidden = sure.flip(0).clone().requires_grad_()
        loss = Divergence(LiveRows(sure, Head(weight), VOCABULARY, VOCABULARY), kind)
        found = label_loss(hidden, Head(weight), loss, vocabulary=VOCABULARY)
        found.backward()
        assert found.isfinite()
        assert hidden.grad is not None
        assert hidden.grad.isfinite().all()
        assert kind == "jsd" or float(found) == pytest.approx(800, rel=1e-5)


def test_in_bfloat16_it_is_the_plain_loss_but_for_rounding():
    plain, ours = inputs(torch.bfloat16), inputs(torch.bfloat16)
    exact = inputs()
    logits = (plain["hidden"] @ plain["weight"].T).float()
    functional.cross_entropy(logits, TARGETS).backward()
    (
        label_loss(
            ours["hidden"], Head(ours["weight"]), CrossEntropy(TARGETS), vocabulary=VOCABULARY,
            chunk_bytes=CHUNK,
        ) / POSITIONS
    ).backward()  # fmt: skip
    functional.cross_entropy(exact["hidden"] @ exact["weight"].T, TARGETS).backward()
    for name in ("hidden", "weight"):
        wanted = exact[name].grad
        assert wanted is not None
        theirs, mine = (
            float((given[name].grad.double() - wanted).norm() / wanted.norm())  # type: ignore[union-attr]
            for given in (plain, ours)
        )
        assert mine < 1.5 * theirs  # no further from the truth than the plain path


@pytest.mark.parametrize("labels", [64, 256])
def test_no_more_than_a_chunk_of_logits_is_ever_there(labels: int):
    vocabulary, width, chunk = 4096, 32, 8 * 4096 * 8
    hidden = torch.randn(labels, width, requires_grad=True)
    weight = torch.randn(vocabulary, width)
    targets = torch.zeros(labels, dtype=torch.long)
    with Meter() as meter:
        label_loss(
            hidden, Head(weight), CrossEntropy(targets), vocabulary=vocabulary, chunk_bytes=chunk
        ).backward()
    held = weight.nbytes + hidden.nbytes + targets.nbytes
    gradient = hidden.nbytes
    # a chunk of the gradient, some numbers a position
    small = 8 * width * 4 + 8 * 8 * 8 + 8 * labels
    logits = 8 * vocabulary * 4
    assert meter.reading().phases["forward"].total <= held + gradient + logits + small
    assert meter.reading().peak_bytes <= held + 2 * gradient + logits + small


@pytest.mark.parametrize("case", ["live", "top-k", "mixed", "draws", "uld"])
def test_a_teacher_costs_no_more_than_the_chunk_may(case: str):
    """Neither side's logits exist for more positions than the chunk's bytes allow."""
    vocabulary, width, labels, chunk = 4096, 32, 256, 64 * 4096 * 8
    hidden = torch.randn(labels, width, requires_grad=True)
    weight, states = torch.randn(vocabulary, width), torch.randn(labels, width)
    live = LiveRows(states, Head(weight), vocabulary, vocabulary)
    ids = torch.arange(8).expand(labels, 8).contiguous()
    known = TopK(ids, torch.full((labels, 8), -4.0))
    loss: LogitLoss = {
        "live": Divergence(live, "jsd"),
        "top-k": Divergence(known),
        "mixed": Mixed(CrossEntropy(ids[:, 0]), Divergence(live), (0.5, 0.5)),
        "draws": Sampled(ids, torch.full((labels, 8), 0.125), torch.zeros(labels)),
        "uld": SortedGap(live, torch.ones(labels)),
    }[case]
    with Meter() as meter:
        label_loss(hidden, Head(weight), loss, vocabulary=vocabulary, chunk_bytes=chunk).backward()
    held = weight.nbytes + hidden.nbytes + states.nbytes + ids.nbytes * 3
    small = 3 * hidden.nbytes + 64 * 1024
    assert meter.reading().peak_bytes <= held + chunk + small
