"""Where the inputs of recomputed layers wait for the backward pass: the host's memory or a file.

They leave in the order of the forward pass and come back in reverse, so that the next one to be
asked for is known: while a layer recomputes, the input of the one below it is already on its way.
Two inputs are on the device at most, the one in use and the one that comes.

On a GPU the copies run on a stream of their own, beside the computation:

* A copy *out* begins before the layer runs and is waited for when the layer has been queued. The
  input is alive that long anyway, so nothing more is held.
* A copy *back* begins when the layer above begins to recompute.

A tensor's memory goes back to the allocator with the compute stream told to wait for the copy, so
``record_stream`` is not needed: with it memory comes back only when the GPU has caught up with the
CPU, and until then every layer would take fresh memory. The host's pages are pinned once, in pieces
of one size that go from step to step; only the side stream touches them, hence in order.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Place = Literal["host", "disk"]
PIECE_BYTES = 8 << 20


class Streams(Protocol):
    """The seam to the device: how copies run beside the computation."""

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Any:
        """Begins to copy, after all that is queued so far; returns what `wait` takes."""

    def wait(self, done: Any) -> None:
        """Nothing that is computed from here on begins before those copies are done."""


class InOrder:
    """Of a device without streams: each copy is done at once."""

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """See `Streams`."""
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def wait(self, done: None) -> None:
        """See `Streams`."""


class SideStream:
    """A CUDA stream of its own, for copies in both directions."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)

    def copy(
        self, targets: Sequence[Tensor], sources: Sequence[Tensor]
    ) -> tuple[torch.cuda.Event, torch.cuda.Stream]:
        """See `Streams`."""
        compute = torch.cuda.current_stream(self._device)
        self._side.wait_stream(compute)
        with torch.cuda.stream(self._side):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            return self._side.record_event(), compute

    def wait(self, done: tuple[torch.cuda.Event, torch.cuda.Stream]) -> None:
        """Both the stream whose memory it is and the one that will read it."""
        event, compute = done
        compute.wait_event(event)
        current = torch.cuda.current_stream(self._device)
        if current != compute:
            current.wait_event(event)


def streams_of(device: torch.device) -> Streams:
    """How copies run beside the computation on this device."""
    return SideStream(device) if device.type == "cuda" else InOrder()


class Copy:
    """Copies that may be under way; whoever lets go of one has the computation wait for it."""

    def __init__(
        self, streams: Streams, targets: Sequence[Tensor], sources: Sequence[Tensor]
    ) -> None:
        self._streams, self._held = streams, (targets, sources)
        self._waited = True  # nothing has begun, should beginning fail
        self._done = streams.copy(targets, sources)
        self._waited = False

    def finish(self) -> None:
        """What comes after this may read the targets and reuse the sources."""
        if not self._waited:
            self._waited = True
            self._streams.wait(self._done)

    def __del__(self) -> None:
        self.finish()


class Offload:
    """The inputs of one model's layers that have left, by device.

    A copy of the model gets an empty one of its own.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._lines: dict[torch.device, _Line] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled without what has left."""
        return Offload, (self._place,)

    def send(self, hidden: Tensor) -> Away:
        """Begins to move a layer's input away."""
        if hidden.device not in self._lines:
            self._lines[hidden.device] = _Line(_store(self._place, hidden.device))
        return Away(hidden, self._lines[hidden.device])


class Away:
    """A layer's input: at hand until `leave`, brought back by each `take` after it."""

    def __init__(self, hidden: Tensor, line: _Line) -> None:
        self._hidden: Tensor | None = hidden
        self._trains = hidden.requires_grad
        self._line = line
        self.kept = line.store.put(hidden.detach())
        self._before: weakref.ref[Away] | None = None

    def leave(self) -> None:
        """The layer has been queued; its input may go."""
        self.kept.left()
        self._hidden = None
        self._before, self._line.last = self._line.last, weakref.ref(self)

    def take(self) -> Tensor:
        """The input, on its device; the one that left before it begins to come."""
        if self._hidden is not None:
            return self._hidden
        tensor = self.kept.take()
        self._line.prefetch(self._before() if self._before is not None else None)
        return tensor.requires_grad_(self._trains)


class _Line:
    """What left one device, in order.

    Attributes:
        last: the one that left last.
    """

    def __init__(self, store: _Store) -> None:
        self.store = store
        self.last: weakref.ref[Away] | None = None
        self._coming: weakref.ref[Away] | None = None

    def prefetch(self, away: Away | None) -> None:
        """Only one comes at a time; what came and was not taken makes room."""
        coming = self._coming() if self._coming is not None else None
        if coming is not None and coming is not away:
            coming.kept.forget()
        self._coming = None
        if away is not None:
            away.kept.begin()
            self._coming = weakref.ref(away)


class _Kept(Protocol):
    """A tensor that is elsewhere, for as long as this object lives."""

    def left(self) -> None:
        """The tensor it was made from may be freed after this."""

    def begin(self) -> None:
        """It begins to come back, if it has not begun."""

    def take(self) -> Tensor:
        """It is back, and may come again."""

    def forget(self) -> None:
        """What began to come is not wanted now."""


class _Store(Protocol):
    def put(self, tensor: Tensor) -> _Kept:
        """Moves a tensor away; it must not change before `_Kept.left`."""


def _store(place: Place, device: torch.device) -> _Store:
    if place == "disk":
        return _DiskStore()
    return _SameMemory() if device.type == "cpu" else HostStore(streams_of(device))


class HostStore:
    """Tensors in the host's memory, in pieces that are used again and again."""

    def __init__(self, streams: Streams) -> None:
        self.streams = streams
        self._free: list[Tensor] = []

    def put(self, tensor: Tensor) -> _Kept:
        """See `_Store`."""
        return _OnHost(tensor, self)

    def pieces(self, tensor: Tensor) -> list[Tensor]:
        """Room on the host for a tensor's bytes; `give_back` takes it."""
        count = -(-tensor.nbytes // PIECE_BYTES)
        pinned = tensor.is_cuda
        return [
            self._free.pop() if self._free
            else torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=pinned)
            for _ in range(count)
        ]  # fmt: skip

    def give_back(self, pieces: list[Tensor]) -> None:
        """The next copy into them is queued behind those that still read them."""
        self._free += pieces


class _OnHost:
    """See `_Kept`."""

    def __init__(self, tensor: Tensor, store: HostStore) -> None:
        self._streams = store.streams
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        pieces = store.pieces(tensor)
        weakref.finalize(self, store.give_back, pieces).atexit = False
        parts = _parts(tensor.contiguous())
        self._host = [piece[: len(part)] for piece, part in zip(pieces, parts, strict=True)]
        self._out: Copy | None = Copy(self._streams, self._host, parts)
        self._back: tuple[Tensor, Copy] | None = None

    def left(self) -> None:
        if self._out is not None:
            self._out.finish()
            self._out = None

    def begin(self) -> None:
        if self._back is None:
            tensor = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._back = tensor, Copy(self._streams, _parts(tensor), self._host)

    def take(self) -> Tensor:
        self.begin()
        assert self._back is not None
        (tensor, copy), self._back = self._back, None
        copy.finish()
        return tensor

    def forget(self) -> None:
        self._back = None


def _parts(tensor: Tensor) -> list[Tensor]:
    """The bytes of a contiguous tensor, in pieces."""
    return list(tensor.view(-1).view(torch.uint8).split(PIECE_BYTES))


class _SameMemory:
    """For a model that is on the host already: nothing moves."""

    def put(self, tensor: Tensor) -> _Kept:
        return _Here(tensor)


class _Here:
    """See `_Kept`; each time a tensor of its own, over the same memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def left(self) -> None:
        pass

    def begin(self) -> None:
        pass

    def take(self) -> Tensor:
        return self._tensor.detach()

    def forget(self) -> None:
        pass


class _DiskStore:
    """Tensors in files of a scratch folder, which goes with the process; one thread reads ahead."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="qft-offload-")
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="qft-offload")
        self._count = 0

    def put(self, tensor: Tensor) -> _Kept:
        """Writes a tensor; its file goes with what is returned."""
        if isinstance(tensor, FakeTensor):  # which has nothing to write
            return _Nowhere(tensor)
        self._count += 1
        return _OnDisk(Path(self._folder.name) / str(self._count), tensor, self._reader)


class _OnDisk:
    """See `_Kept`; a file that exists as long as this object."""

    def __init__(self, path: Path, tensor: Tensor, reader: ThreadPoolExecutor) -> None:
        self._path, self._reader = path, reader
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._bytes = tensor.nbytes
        self._coming: Future[Tensor] | None = None
        weakref.finalize(self, path.unlink, missing_ok=True)
        tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().tofile(path)

    def left(self) -> None:
        pass

    def begin(self) -> None:
        if self._coming is None:
            pinned = self._device.type == "cuda"
            room = torch.empty(self._bytes, dtype=torch.uint8, pin_memory=pinned)
            self._coming = self._reader.submit(self._read, room)

    def take(self) -> Tensor:
        self.begin()
        assert self._coming is not None
        coming, self._coming = self._coming, None
        return coming.result().to(self._device, non_blocking=True)

    def forget(self) -> None:
        self._coming = None

    def _read(self, data: Tensor) -> Tensor:
        with self._path.open("rb") as file:
            if file.readinto(data.numpy().data) != self._bytes:
                raise OSError(f"{self._path} was cut short")
        return data.view(self._dtype).view(self._shape)


class _Nowhere:
    """See `_Kept`; of a fake tensor, with the memory that a file is read into."""

    def __init__(self, tensor: Tensor) -> None:
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._bytes = tensor.nbytes
        self._coming: Tensor | None = None

    def left(self) -> None:
        pass

    def begin(self) -> None:
        if self._coming is None:
            self._coming = torch.empty(self._bytes, dtype=torch.uint8)

    def take(self) -> Tensor:
        self.begin()
        assert self._coming is not None
        coming, self._coming = self._coming, None
        return coming.view(self._dtype).view(self._shape).to(self._device)

    def forget(self) -> None:
        self._coming = None
