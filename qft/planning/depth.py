"""A training step of a deep model from a few of its layers.

The whole model is prepared once, without a byte, so that a strategy sees all of it. Then only
layers that differ run (`qft.planning.likeness`), and what each of them was seen to do is repeated
for every layer that is like it, in the order of the whole model. Nothing is fitted: bytes are added
up moment by moment, so that the fullest moment is found wherever it lies in the whole model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from qft.data.tasks import Example
from qft.lean.checkpointing import checkpointed_layers
from qft.lean.model_parts import layer_stacks
from qft.lean.timeline import Event, Reading, Stretch, reading_of
from qft.planning.fake_training import FakeTraining, prepared_skeleton
from qft.planning.job import PlannedJob
from qft.planning.likeness import layer_lists, likenesses_of, names_of_shared, shortened
from qft.preparation import Checkpointing, Offload, inner_model, recompute_lowest


class ShortTraining:
    """A job's training step, of which only layers that differ run.

    Args:
        job: see `qft.planning.fake_training.FakeTraining`.
    """

    def __init__(self, job: PlannedJob) -> None:
        self.model = prepared_skeleton(job)
        self._chosen = _choice(job)
        self._stacks = [
            _Stack(name, stack, _configs_around(inner_model(self.model), name))
            for name, stack in layer_stacks(inner_model(self.model)).items()
        ]
        self._begin(job)

    def _begin(self, job: PlannedJob) -> None:
        for stack in self._stacks:
            stack.shorten()
        self._training = FakeTraining(job, self.model)
        for stack in self._stacks:
            stack.announce(self._training)
        self._training.warm_up([_cut(example) for example in job.longest()[:1]], 1)
        self._missing = [
            event
            for stack in self._stacks
            for event in stack.missing(self._training.optimizer, self._training.device)
        ]

    def meter(
        self, job: PlannedJob, examples: Sequence[Example] | None, micro_batch: int | None
    ) -> Reading:
        """The second step; see `qft.planning.fake_training.FakeTraining.meter`."""
        self._choose(job)
        self._training.job = job
        chosen = job.longest() if examples is None else examples
        seen = self._training.stretches(chosen, micro_batch or job.micro_batch)
        stands_for = {stack.name: stack.short.stands_for for stack in self._stacks}
        return reading_of(repeated(seen, stands_for, self._missing))

    def _choose(self, job: PlannedJob) -> None:
        """Another choice of which layers recompute needs no other model."""
        if _choice(job) == self._chosen:
            return
        self._training.close()
        for stack in self._stacks:
            stack.restore()
        inner = inner_model(self.model)
        layers = len(checkpointed_layers(inner))
        asked, offload = self._chosen = _choice(job)
        count = {"none": 0, "full": layers, "auto": layers}.get(str(asked), asked)
        recompute_lowest(inner, min(int(count), layers), offload)
        self._begin(job)


def step_reading(
    job: PlannedJob, examples: Sequence[Example] | None = None, micro_batch: int | None = None
) -> Reading:
    """The second training step on these examples, from a few layers of each kind.

    Args:
        job: what is trained.
        examples: of one optimizer step; None is the micro-batch that needs most.
        micro_batch: examples a forward pass; None is the job's.
    """
    return ShortTraining(job).meter(job, examples, micro_batch)


@dataclass(frozen=True)
class Layer:
    """A part of a step, as a label: a layer of a stack, in one of the two passes."""

    stack: str
    forward: bool
    number: int


OUTSIDE = "outside"  # labels what comes after the last layer of a stack


def repeated(
    seen: Sequence[Stretch],
    stands_for: Mapping[str, Sequence[int]],
    missing: Sequence[Event] = (),
) -> list[Stretch]:
    """A step of all layers, made of one of a few.

    What is freed outside of the layers is freed as often as it was made.

    Args:
        seen: labelled with a `Layer` where one begins, or `OUTSIDE`.
        stands_for: by stack: for each layer the number of the one that is like it.
        missing: what layers that do not run hold all the time.
    """
    counts = {name: Counter(numbers) for name, numbers in stands_for.items()}
    parts = _parts(seen)
    times: dict[int, int] = {}  # that a stretch is repeated, by its number
    for layer, numbers in parts:
        for number in numbers:
            times[number] = 1 if layer is None else counts[layer.stack][layer.number]
    outside = {number for layer, numbers in parts if layer is None for number in numbers}
    made = [Stretch("forward", None, missing)]
    for layer, part in _passes(parts):
        if layer is None:
            made += [_scaled(seen[number], times) for number in part[None]]
            continue
        numbers = stands_for[layer.stack]
        left = Counter(numbers)
        for which in numbers if layer.forward else reversed(numbers):
            left[which] -= 1
            own = (seen[number] for number in part.get(which, ()))
            made += own if left[which] == 0 else (_without(x, outside) for x in own)
    return made


def _without(stretch: Stretch, outside: set[int]) -> Stretch:
    """What was made outside of the layers is freed by the last that had a use for it."""
    if not any(event.nbytes < 0 and event.made_in in outside for event in stretch.events):
        return stretch
    kept = [e for e in stretch.events if e.nbytes >= 0 or e.made_in not in outside]
    return replace(stretch, events=kept)


def _scaled(stretch: Stretch, times: Mapping[int, int]) -> Stretch:
    events = [
        replace(event, nbytes=event.nbytes * times[event.made_in]) if event.nbytes < 0 else event
        for event in stretch.events
    ]
    return replace(stretch, events=events)


def _parts(seen: Sequence[Stretch]) -> list[tuple[Layer | None, list[int]]]:
    """Numbers of neighbouring stretches that belong to one layer, or to none."""
    found: list[tuple[Layer | None, list[int]]] = [(None, [])]
    phase = "forward"
    for number, stretch in enumerate(seen):
        if isinstance(stretch.label, Layer):
            found.append((stretch.label, []))
            phase = stretch.phase
        elif found[-1][0] is not None and (stretch.label == OUTSIDE or stretch.phase != phase):
            found.append((None, []))
        found[-1][1].append(number)
    return found


_Pass = dict[int | None, list[int]]  # numbers of stretches, by the number of their layer


def _passes(
    parts: Sequence[tuple[Layer | None, list[int]]],
) -> list[tuple[Layer | None, _Pass]]:
    """The parts of each pass through a stack together, in order; with one of its layers."""
    found: list[tuple[Layer | None, _Pass]] = []
    for layer, numbers in parts:
        key = None if layer is None else layer.number
        last = found[-1][0] if found else None
        if layer is None or last is None or key in found[-1][1] or (
            (layer.stack, layer.forward) != (last.stack, last.forward)
        ):  # fmt: skip
            found.append((layer, {}))
        found[-1][1][key] = numbers
    return found


class _Stack:
    """The layers of a model, or of one of its halves."""

    def __init__(self, name: str, modules: nn.ModuleList, configs: Sequence[Any]) -> None:
        self.name = name
        self._modules, self._configs = modules, configs
        self._all = list(modules)
        self._own_settings = [dict(vars(config)) for config in configs]
        self._shared = names_of_shared(self._all)
        self._hooks: list[RemovableHandle] = []

    def shorten(self) -> None:
        """Leaves only the layers that differ in the model, and says so in its config."""
        self.short = shortened(likenesses_of(self._all, self._configs))
        self._leave(self.short.kept)
        for config in self._configs:
            for name, values in layer_lists(config, len(self._all)).items():
                setattr(config, name, [values[number] for number in self.short.kept])
            if getattr(config, "num_hidden_layers", None) == len(self._all):
                config.num_hidden_layers = len(self.short.kept)

    def restore(self) -> None:
        """All layers are there again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._leave(range(len(self._all)))
        for config, settings in zip(self._configs, self._own_settings, strict=True):
            vars(config).update(settings)

    def _leave(self, numbers: Sequence[int]) -> None:
        del self._modules[:]
        self._modules.extend(self._all[number] for number in numbers)
        for place, layer in enumerate(self._modules):
            for module in layer.modules():
                if isinstance(vars(module).get("layer_idx"), int):  # its place in a cache
                    module.layer_idx = place  # type: ignore[assignment]

    def announce(self, training: FakeTraining) -> None:
        """Has each layer mark where its part of the two passes begins."""
        for number, layer in enumerate(self._modules):
            marks = _Marks(training, self.name, number, number == len(self._modules) - 1)
            self._hooks.append(layer.register_forward_pre_hook(marks.before))
            self._hooks.append(layer.register_forward_hook(marks.after))

    def missing(self, optimizer: torch.optim.Optimizer, device: str) -> Iterator[Event]:
        """What the layers that do not run would hold all the time."""
        for place, layer in enumerate(self._modules):
            more = self.short.stands_for.count(place) - 1
            for category, tensor in _held(layer, optimizer, self._shared[self.short.kept[place]]):
                size = more * tensor.untyped_storage().nbytes()
                yield Event(size, tensor.device.type == device, category, 0)


@dataclass(frozen=True)
class _Marks:
    """The hooks of one layer; a layer that is run again in the backward pass marks nothing."""

    training: FakeTraining
    stack: str
    number: int
    last: bool

    def before(self, layer: nn.Module, inputs: Any) -> None:
        """Its forward pass begins."""
        if not _in_backward():
            self.training.mark(Layer(self.stack, True, self.number))

    def after(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        """Its backward pass begins once the gradient of its output is there."""
        if _in_backward():
            return
        hidden = next(value for value in tree_leaves(output) if isinstance(value, Tensor))
        if hidden.requires_grad:
            hidden.register_hook(self._backward)
        if self.last:
            self.training.mark(OUTSIDE, later=True)

    def _backward(self, gradient: Tensor) -> None:
        self.training.mark(Layer(self.stack, False, self.number))


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)  # as `qft.lean.meter` tells it


def _held(
    layer: nn.Module, optimizer: torch.optim.Optimizer, shared: set[str]
) -> Iterator[tuple[str, Tensor]]:
    """What a layer alone holds from step to step, by category."""
    for name, parameter in layer.named_parameters():
        if name not in shared:
            yield "adapters" if parameter.requires_grad else "weights", parameter
            for value in tree_leaves(optimizer.state.get(parameter, {})):
                if isinstance(value, Tensor):
                    yield "optimizer", value
    for name, buffer in layer.named_buffers():
        if name not in shared:
            yield "weights", buffer


def _configs_around(model: nn.Module, stack: str) -> list[Any]:
    """The configs of the modules that a stack lies in; only they know of its layers."""
    parts = stack.split(".")
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts))]
    found = {id(m.config): m.config for m in around if hasattr(m, "config")}
    return list(found.values())[-1:]


def _choice(job: PlannedJob) -> tuple[Checkpointing, Offload]:
    return job.recipe.memory.checkpointing, job.recipe.memory.offload


def _cut(example: Example, tokens: int = 8) -> Example:
    """The beginning of a row, which is enough to have every part of a model run once."""
    return replace(
        example,
        inputs={
            name: value[-tokens:] if isinstance(value, list) else value
            for name, value in example.inputs.items()
        },
    )
