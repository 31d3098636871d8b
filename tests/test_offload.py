"""What waits elsewhere for the backward pass, with copies that are as late as streams allow."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import batch, difference, made, run, stirred
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adapters.lora import LoRA
from qft.data.examples import Example
from qft.data.tasks import TASKS
from qft.evaluation import evaluate
from qft.lean import offload
from qft.lean.checkpointing import checkpointed_layers, install_checkpointing
from qft.lean.offload import Copy, HostStore, SideStream, streams_of
from qft.preparation import inner_model, prepare
from qft.step import accumulate_gradients


class LateStream:
    """Copies only when it is waited for, in order; until then what comes back is not a number.

    So whatever is read too early, freed too early or overwritten too early shows in the gradients,
    or here.
    """

    def __init__(self) -> None:
        self.queue: list[tuple[object, list[tuple[weakref.ref[Tensor], weakref.ref[Tensor]]]]] = []
        self.arrived: list[weakref.ref[Any]] = []
        self.pieces: set[int] = set()
        self.most = 0

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> object:
        for part in (*targets, *sources):
            if part.untyped_storage().nbytes() == offload.PIECE_BYTES:
                self.pieces.add(part.untyped_storage().data_ptr())
        if targets[0].untyped_storage().data_ptr() not in self.pieces:
            for part in targets:
                part.fill_(255)
            self.arrived = [held for held in self.arrived if held() is not None]
            self.arrived.append(weakref.ref(targets[0].untyped_storage()))
            self.most = max(self.most, len(self.arrived))
        pairs = [(weakref.ref(t), weakref.ref(s)) for t, s in zip(targets, sources, strict=True)]
        self.queue.append((ticket := object(), pairs))
        return ticket

    def wait(self, done: object) -> None:
        while any(ticket is done for ticket, _ in self.queue):
            for pair in self.queue.pop(0)[1]:
                target, source = pair[0](), pair[1]()
                assert target is not None, "freed while it was being copied"
                assert source is not None, "freed while it was being copied"
                target.copy_(source)


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[HostStore]:
    """Every store that a model makes from here on, each with a late stream."""
    found: list[HostStore] = []

    def make(place: str, device: torch.device) -> HostStore:
        assert place == "host"
        found.append(HostStore(LateStream()))
        return found[-1]

    monkeypatch.setattr(offload, "_store", make)
    monkeypatch.setattr(offload, "PIECE_BYTES", 1000)  # so that an input is several
    return found


def stream_of(stores: list[HostStore]) -> LateStream:
    (store,) = stores
    assert isinstance(store.streams, LateStream)
    return store.streams


def all_are_back(stores: list[HostStore]) -> bool:
    gc.collect()
    (store,) = stores
    return len(store._free) == len(stream_of(stores).pieces)


def lora(family: str = "llama", **settings: Any) -> nn.Module:
    return stirred(prepare(made(family), LoRA(rank=4), **settings))


@pytest.mark.parametrize("family", ["llama", "t5", "bart"])
@pytest.mark.parametrize("checkpointing", ["full", 1])
def test_late_copies_change_nothing(family: str, checkpointing: Any, stores: list[HostStore]):
    wanted_loss, wanted = run(lora(family, checkpointing="none"))
    ours = lora(family, checkpointing=checkpointing, offload="host")
    pieces = []
    for _ in range(3):
        loss, found = run(ours)
        assert float(loss) == float(wanted_loss)
        assert difference(found, wanted) == 0
        pieces.append(len(stream_of(stores).pieces))
        assert all_are_back(stores)
        with torch.no_grad():
            ours.eval()
            ours(**batch())
            ours.train()
    assert pieces[0] == pieces[2], "pages are pinned once"
    assert stream_of(stores).most <= 2


def test_layers_that_keep_between_layers_that_offload(stores: list[HostStore]):
    _, wanted = run(lora(checkpointing="none"))
    ours = lora(checkpointing="full", offload="host")
    install_checkpointing(inner_model(ours), ["offload", "keep", "offload"])
    assert difference(run(ours)[1], wanted) == 0
    install_checkpointing(inner_model(ours), ["recompute", "offload", "offload"])
    assert difference(run(ours)[1], wanted) == 0
    assert len(stores) == 2


@pytest.mark.parametrize("reverse", [False, True])
def test_two_forward_passes_before_their_backward_passes(reverse: bool, stores: list[HostStore]):
    plain, ours = lora(checkpointing="none"), lora(checkpointing="full", offload="host")
    other = {**batch(), "input_ids": batch()["input_ids"].flip(1)}
    gradients = []
    for model in (plain, ours):
        losses = [model(**batch()).loss, model(**other).loss]
        for loss in reversed(losses) if reverse else losses:
            loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        del losses, loss
    assert difference(gradients[1], gradients[0]) == 0
    assert all_are_back(stores)
    assert stream_of(stores).most <= 2


def test_what_came_too_early_makes_room(stores: list[HostStore]):
    model = lora(checkpointing="full", offload="host")
    _, wanted = run(model)
    model.zero_grad(set_to_none=True)
    first, second = model(**batch()).loss, model(**batch()).loss
    second.backward()  # at its end the first one's uppermost input comes
    third = model(**batch()).loss
    third.backward()
    first.backward()
    found = {n: p.grad / 3 for n, p in model.named_parameters() if p.grad is not None}
    assert difference(found, wanted) < 1e-6
    assert stream_of(stores).most == 2
    del first, second, third
    assert all_are_back(stores)


def test_a_backward_pass_that_never_comes_and_one_that_comes_twice(stores: list[HostStore]):
    model = lora(checkpointing="full", offload="host")
    loss = model(**batch()).loss
    assert not all_are_back(stores)
    del loss
    assert all_are_back(stores)
    loss = model(**batch()).loss
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    twice = {n: p.grad / 2 for n, p in model.named_parameters() if p.grad is not None}
    assert difference(twice, once) < 1e-6
    del loss
    assert all_are_back(stores)


def test_recomputation_within_recomputation(stores: list[HostStore]):
    _, wanted = run(lora(checkpointing="none"))
    model = lora(checkpointing="full", offload="host")

    def loss_of(ids: Tensor) -> Tensor:
        return model(**{**batch(), "input_ids": ids}).loss  # type: ignore[no-any-return]

    checkpoint(loss_of, batch()["input_ids"], use_reentrant=False).backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert difference(found, wanted) == 0
    assert stream_of(stores).most <= 2
    assert all_are_back(stores)


class Fails(torch.autograd.Function):
    """The identity, until it is told to run out of memory."""

    armed: tuple[str, ...] = ()

    @classmethod
    def now(cls, where: str) -> None:
        if where in cls.armed:
            cls.armed = ()
            raise MemoryError("none left")

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        Fails.now("forward")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        Fails.now("backward")
        return gradient


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_step_that_runs_out_of_memory_is_replayed(
    where: str, layer: int, stores: list[HostStore]
):
    rows = [
        Example(n, {name: batch()[name][n].tolist() for name in ("input_ids", "labels")})
        for n in range(2)
    ]

    def gradients(model: nn.Module, replays: int) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        result = accumulate_gradients(
            model, rows, TASKS["text"], step=1, micro_batch=2, pad_token_id=0
        )
        assert result.replays == replays
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    wanted = gradients(lora(checkpointing="none"), 0)
    model = lora(checkpointing="full", offload="host")
    attention = checkpointed_layers(inner_model(model))[layer].self_attn
    attention.register_forward_hook(  # type: ignore[operator, union-attr]
        lambda _module, _inputs, output: (Fails.apply(output[0]), *output[1:])
    )
    Fails.armed = (where,)
    try:
        found = gradients(model, 1)
    finally:
        Fails.armed = ()
    assert difference(found, wanted) < 1e-5
    assert all_are_back(stores)
    evaluate(model, rows, TASKS["text"], pad_token_id=0)
    assert difference(gradients(model, 0), wanted) < 1e-5
    assert all_are_back(stores)
    assert stream_of(stores).most <= 2


def test_a_copied_or_saved_model_waits_for_nothing_of_the_first(stores: list[HostStore]):
    model = lora(checkpointing="full", offload="host")
    loss, _ = run(model)
    other = copy.deepcopy(model)
    assert float(run(other)[0]) == float(loss)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert float(run(torch.load(buffer, weights_only=False))[0]) == float(loss)
    assert len(stores) == 3
    assert len({id(store) for store in stores}) == 3


def test_whoever_lets_go_of_a_copy_waits_for_it():
    stream = LateStream()
    source, target = torch.ones(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    under_way = Copy(stream, [target], [source])
    assert stream.queue
    del under_way
    assert not stream.queue
    assert int(target.sum()) == 8

    class Broken(LateStream):
        def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> object:
            raise MemoryError

    with pytest.raises(MemoryError):
        Copy(Broken(), [target], [source])


def test_a_side_stream_comes_after_what_is_queued_and_before_what_reads_it(
    monkeypatch: pytest.MonkeyPatch,
):
    told: list[str] = []

    class Stream:
        def __init__(self, name: Any) -> None:
            self.name = name if isinstance(name, str) else "side"

        def wait_stream(self, other: Stream) -> None:
            told.append(f"{self.name} waits for {other.name}")

        def record_event(self) -> str:
            told.append(f"event on {self.name}")
            return "event"

        def wait_event(self, event: str) -> None:
            told.append(f"{self.name} waits for {event}")

    @contextlib.contextmanager
    def within(stream: Stream) -> Iterator[None]:
        told.append(f"into {stream.name}")
        yield
        told.append(f"out of {stream.name}")

    current = Stream("compute")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    side = streams_of(torch.device("cuda", 0))
    assert isinstance(side, SideStream)
    target = torch.zeros(4)
    done = side.copy([target], [torch.ones(4)])
    assert told == ["side waits for compute", "into side", "event on side", "out of side"]
    assert target.sum() == 4
    side.wait(done)
    assert told[4:] == ["compute waits for event"]
    current = Stream("another")
    side.wait(done)
    assert told[5:] == ["compute waits for event", "another waits for event"]


# --- the disk


def test_the_next_file_is_read_while_a_layer_recomputes(monkeypatch: pytest.MonkeyPatch):
    plain = offload._OnDisk._read
    readers: list[threading.Thread] = []
    asked: list[str] = []

    def read(self: Any, room: Tensor) -> Tensor:
        readers.append(threading.current_thread())
        return plain(self, room)

    def begin(self: Any, plain: Any = offload._OnDisk.begin) -> None:
        asked.append(self._path.name)
        plain(self)

    monkeypatch.setattr(offload._OnDisk, "_read", read)
    monkeypatch.setattr(offload._OnDisk, "begin", begin)
    model = lora(checkpointing="full", offload="disk")
    _, wanted = run(lora(checkpointing="none"))
    for _ in range(2):
        readers.clear()
        _, found = run(model)
        assert difference(found, wanted) == 0
        assert len(readers) == 3, "each is read once"
    assert threading.main_thread() not in readers
    # the uppermost, the one below it ahead of time, that one itself, …
    assert asked == ["3", "2", "2", "1", "1", "6", "5", "5", "4", "4"]
    thread = readers[0]
    del model, readers[:]
    gc.collect()
    thread.join(timeout=10)
    assert not thread.is_alive(), "the reader goes with its model"


def test_a_file_that_was_cut_short_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = lora(checkpointing="full", offload="disk")
    loss = model(**batch()).loss
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match="cut short"):
        loss.backward()
