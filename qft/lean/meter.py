"""Live bytes of a training step, counted exactly, on real tensors or fake ones.

A storage counts from the operation that returns it to the moment nothing holds it any more. On fake
tensors a step of any size takes seconds and no memory, and its count equals a real run's. There the
planned device is called ``meta`` and the host ``cpu``, so that what is offloaded is seen to leave.

    reading = meter(lambda: model(**batch).loss.backward(), model=model)
    print(reading.peak_bytes, reading.peak.by_category)

What a kernel allocates and frees within itself is not seen, nor what an allocator rounds up.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from qft.lean.alike import times
from qft.lean.products import Product, product_of
from qft.lean.timeline import CATEGORIES as CATEGORIES
from qft.lean.timeline import PHASES as PHASES
from qft.lean.timeline import RESIDENT as RESIDENT
from qft.lean.timeline import Event, Stretch, reading_of
from qft.lean.timeline import Reading as Reading
from qft.lean.timeline import Snapshot as Snapshot


@dataclass(eq=False)
class _Storage:
    """One storage: its size, where it is, the phase it was made in, and what it is."""

    nbytes: int
    on_device: bool
    phase: str
    category: str | None = None


@dataclass
class _Log:
    """What happened, in order; kept apart from the meter, so that callbacks hold no mode alive."""

    events: list[tuple[_Storage, int]] = field(default_factory=list)  # and the change in bytes
    device_bytes: int = 0  # alive now

    def add(self, storage: _Storage, change: int) -> None:
        self.events.append((storage, change))
        if storage.on_device:
            self.device_bytes += change


@dataclass
class _Mark:
    """Where a stretch begins: the number of its first event; what was computed in it."""

    event: int
    phase: str
    label: Any = None
    flops: int = 0
    products: set[Product] = field(default_factory=set)
    standing_for: int = 0  # bytes that are not made, since one tile stands for several


class Meter(TorchDispatchMode):
    """A context manager that counts; `reading` afterwards says what it counted.

    Args:
        model: its parameters and buffers count from the beginning. Without one, parameters count
            once an operation uses them.
        optimizer: its states count from the beginning.
        device: which device is metered (a type, such as ``cuda``); all others are the host.
            None is the model's.
        ceiling: bytes on the device beyond which an operation raises ``torch.OutOfMemoryError``.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        device: str | None = None,
        ceiling: int | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ceiling = ceiling
        self._model, self._optimizer, self._device = model, optimizer, device
        if device is None and model is not None:
            self._device = _device_of(model)
        self._log = _Log()
        self._alive: dict[int, tuple[_Storage, Any]] = {}  # by address, with the weak reference
        self._trained: dict[int, nn.Parameter] = {}
        self._phase = "forward"
        self._in_optimizer = False
        self._marks = [_Mark(0, "forward")]
        self._coming: Any = None  # label of a mark that the next operation sets
        self._hooks: list[Any] = []

    def __enter__(self) -> Meter:
        """Counts what is there already."""
        if self._model is not None:
            for parameter in self._model.parameters():
                self._see_parameter(parameter)
            for tensor in self._model.buffers():
                self._see(tensor, "weights")
            for module in self._model.modules():
                for tensor in _held_beside(module):
                    self._see(tensor, "weights")
        if self._optimizer is not None:
            self._see_optimizer(self._optimizer)
        self._hooks = [
            register_optimizer_step_pre_hook(self._before_optimizer),
            register_optimizer_step_post_hook(self._after_optimizer),
        ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        """Counts no more."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()
        self._enter_phase("forward")

    def hold(self, tensors: Iterable[Tensor], category: str = "optimizer") -> None:
        """Counts what no model and no optimizer knows of, such as what a strategy remembers."""
        for tensor in tensors:
            self._see(tensor, category)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Every operation passes here, those of the backward pass too."""
        kwargs = kwargs or {}
        self._enter_phase(self._now())
        if self._coming is not None:
            self.mark(self._coming)
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, nn.Parameter):
                self._see_parameter(value)
            elif isinstance(value, Tensor):
                self._see(value, None, before=True)
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value, None)
        self._marks[-1].flops += times() * _flops(func, args, kwargs, result)
        if (product := product_of(func, args)) is not None:
            self._marks[-1].products.add(product)
        if self._ceiling is not None and self._log.device_bytes > self._ceiling:
            raise torch.OutOfMemoryError(
                f"{self._log.device_bytes:,} bytes of tensors, {self._ceiling:,} are allowed"
            )
        return result

    def mark(self, label: Any, *, later: bool = False) -> None:
        """A stretch of the step begins here; see `qft.lean.timeline`.

        Args:
            later: with the next operation, when what is out of use by then is gone.
        """
        self._coming = label if later else None
        if not later:
            self._enter_phase(self._now())
            self._marks.append(_Mark(len(self._log.events), self._phase, label))

    def reading(self) -> Reading:
        """What was counted so far."""
        return reading_of(self.stretches())

    def stretches(self) -> list[Stretch]:
        """What was counted so far, from mark to mark."""
        self._enter_phase("forward")
        ends = [*(mark.event for mark in self._marks[1:]), len(self._log.events)]
        made_in: dict[_Storage, int] = {}
        made = []
        for number, (mark, end) in enumerate(zip(self._marks, ends, strict=True)):
            events = [
                Event(change, storage.on_device, storage.category or "temporary",
                      made_in.setdefault(storage, number))
                for storage, change in self._log.events[mark.event : end]
            ]  # fmt: skip
            products = frozenset(mark.products)
            made.append(
                Stretch(mark.phase, mark.label, events, mark.flops, products, mark.standing_for)
            )
        return made

    def _see(self, tensor: Tensor, category: str | None, before: bool = False) -> _Storage | None:
        """Counts a tensor's storage, once; ``before``: it was there when the meter began."""
        for part in _inner_tensors(tensor):
            if part is not tensor:
                self._see(part, category, before)
        try:
            held = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, or a wrapper without one
            return None
        key = held._cdata
        known = self._alive.get(key)
        if known is not None:
            storage = known[0]
            if held.nbytes() != storage.nbytes:  # resized in place
                self._log.add(storage, held.nbytes() - storage.nbytes)
                storage.nbytes = held.nbytes()
            storage.category = storage.category or category
            return storage
        if self._device is None:
            self._device = tensor.device.type
        if category is None and before and self._phase == "forward":
            category = "activations"  # the step's inputs
        on_device = tensor.device.type == self._device
        storage = _Storage(held.nbytes(), on_device, self._phase, category)
        freed = _Freed(storage, key, self._alive, self._log)
        self._alive[key] = (storage, weakref.ref(held, freed))
        self._marks[-1].standing_for += (times() - 1) * on_device * storage.nbytes
        self._log.add(storage, storage.nbytes)
        return storage

    def _see_parameter(self, parameter: nn.Parameter) -> None:
        trains = parameter.requires_grad
        self._see(parameter, "adapters" if trains else "weights", before=True)
        if trains and id(parameter) not in self._trained:
            self._trained[id(parameter)] = parameter
            if parameter.grad is not None:
                self._see(parameter.grad, "gradients")
        for value in _quantization_state(parameter):
            self._see(value, "weights")

    def _see_optimizer(self, optimizer: Optimizer) -> None:
        for state in optimizer.state.values():
            for value in tree_leaves(state):
                if isinstance(value, Tensor) and id(value) not in self._trained:
                    storage = self._see(value, "optimizer")
                    if storage is not None:
                        storage.category = "optimizer"

    def _now(self) -> str:
        if self._in_optimizer:
            return "optimizer"
        # an autograd graph is being run: private, but what torch's own checkpointing asks as well
        return "backward" if torch._C._current_graph_task_id() != -1 else "forward"

    def _enter_phase(self, phase: str) -> None:
        if phase == self._phase:
            return
        if self._phase == "forward":
            self._mark_activations()
        if self._phase == "backward":
            self._mark_gradients()
        self._phase = phase
        self._marks.append(_Mark(len(self._log.events), phase))

    def _mark_activations(self) -> None:
        for storage, _ in self._alive.values():
            if storage.category is None and storage.phase == "forward":
                storage.category = "activations"

    def _mark_gradients(self) -> None:
        for parameter in self._trained.values():
            if parameter.grad is not None:
                storage = self._see(parameter.grad, "gradients")
                if storage is not None:
                    storage.category = "gradients"

    def _before_optimizer(self, optimizer: Optimizer, *_: Any) -> None:
        self._enter_phase("optimizer")
        self._in_optimizer = True

    def _after_optimizer(self, optimizer: Optimizer, *_: Any) -> None:
        self._see_optimizer(optimizer)
        self._in_optimizer = False


@dataclass(eq=False)
class _Freed:
    """Called when nothing holds a storage any more."""

    storage: _Storage
    key: int
    alive: dict[int, tuple[_Storage, Any]]
    log: _Log

    def __call__(self, reference: Any) -> None:
        self.alive.pop(self.key, None)
        self.log.add(self.storage, -self.storage.nbytes)


def meter(
    step: Callable[[], object],
    *,
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    device: str | None = None,
    warm_up: int | None = None,
) -> Reading:
    """Counts one call of ``step``, which may be anyone's: nothing in it need know the meter.

    Args:
        step: forward, backward and, if it likes, the optimizer's step.
        model: see `Meter`.
        optimizer: see `Meter`.
        device: see `Meter`.
        warm_up: calls before the metered one, so that optimizer states are there; None is one
            where there is an optimizer, else none.
    """
    for _ in range((optimizer is not None) if warm_up is None else warm_up):
        step()
    with Meter(model, optimizer, device) as counting:
        step()
    return counting.reading()


# torch counts the products that make a tensor, not those that add to one
_IN_PLACE = {
    torch.ops.aten.addmm_: torch.ops.aten.addmm,
    torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm,
}


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    packet = getattr(func, "_overloadpacket", None)
    aten = torch.ops.aten
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:  # torch counts CUDA's only
        return int(sdpa_flop_count(*(tensor.shape for tensor in args[:3])))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    packet = packet and _IN_PLACE.get(packet, packet)
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    return 0


def _device_of(model: nn.Module) -> str | None:
    """The device most of the model's bytes are on."""
    sizes: dict[str, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        kind = tensor.device.type
        sizes[kind] = sizes.get(kind, 0) + tensor.numel() * tensor.element_size()
    return max(sizes, key=lambda kind: sizes[kind]) if sizes else None


def _inner_tensors(tensor: Tensor) -> Iterable[Tensor]:
    """Of a tensor that is made of others (a wrapper subclass), those others."""
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None or type(tensor).__module__.startswith("torch._subclasses"):
        return ()
    names, _ = flatten(tensor)
    return [getattr(tensor, name) for name in names]


def _quantization_state(parameter: nn.Parameter) -> list[Tensor]:
    """bitsandbytes keeps the scales of a quantized weight in an object beside it."""
    found = []
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        held = (getattr(state, name, None) for name in ("absmax", "code", "offset"))
        found += [value for value in held if isinstance(value, Tensor)]
        state = getattr(state, "state2", None)
    scales = getattr(parameter, "SCB", None)
    return [*found, scales] if isinstance(scales, Tensor) else found


def _held_beside(module: nn.Module) -> list[Tensor]:
    """Tensors that a module holds as plain attributes, such as int8 scales."""
    state = module.__dict__.get("state")
    values = (getattr(state, name, None) for name in ("CB", "SCB")) if state is not None else ()
    return [value for value in values if isinstance(value, Tensor)]
