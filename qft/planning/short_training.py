"""A job's training step on fake tensors, of which only layers that differ run.

The whole model is prepared once, without a byte, so that a strategy sees all of it. Then layers
that are like others are taken out (`qft.planning.likeness`), and what the rest does is repeated
for them (`qft.planning.repetition`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from qft.data.tasks import Example
from qft.lean.checkpointing import checkpointed_layers
from qft.lean.model_parts import layer_stacks
from qft.lean.timeline import Event, Reading, reading_of
from qft.planning.fake_training import FakeTraining, prepared_skeleton
from qft.planning.job import PlannedJob
from qft.planning.likeness import layer_lists, likenesses_of, names_of_shared, shortened
from qft.planning.repetition import OUTSIDE, Layer, balances, repeated
from qft.preparation import Checkpointing, Offload, inner_model, recompute_lowest


class ShortTraining:
    """A job's training step, of which only layers that differ run.

    Args:
        job: see `qft.planning.fake_training.FakeTraining`.
    """

    def __init__(self, job: PlannedJob) -> None:
        self.model = prepared_skeleton(job)
        self._chosen = _choice(job)
        self._layers_choose = bool(checkpointed_layers(inner_model(self.model)))
        self._stacks = [
            _Stack(name, stack, _configs_around(inner_model(self.model), name))
            for name, stack in layer_stacks(inner_model(self.model)).items()
        ]
        self._begin(job)

    def _begin(self, job: PlannedJob, reach: int = 1) -> None:
        self._reach = reach
        for stack in self._stacks:
            stack.shorten(reach)
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
        chosen = job.longest() if examples is None else examples
        while True:
            self._training.job = job
            seen = self._training.stretches(chosen, micro_batch or job.micro_batch)
            stands_for = {stack.name: stack.short.stands_for for stack in self._stacks}
            made = repeated(seen, stands_for, self._missing)
            if self.runs_whole or balances(seen, made, self._missing):
                return self._with_whole_optimizer(reading_of(made))
            self._restore()
            self._begin(job, self._reach + 1)

    def _with_whole_optimizer(self, reading: Reading) -> Reading:
        """What an optimizer makes for all parameters at once (``foreach``), it makes for all."""
        optimizer, trained = self._training.optimizer, reading.most["adapters"]
        if not optimizer.defaults.get("foreach"):
            return reading
        running = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
        seen = reading.phases["optimizer"]
        temporary = seen.by_category["temporary"] * trained // max(1, running)
        whole = replace(seen, by_category={**seen.by_category, "temporary": temporary})
        most = {**reading.most, "temporary": max(reading.most["temporary"], temporary)}
        peak = max(reading.peak, whole, key=lambda moment: moment.total)
        phases = {**reading.phases, "optimizer": whole}
        return replace(reading, peak=peak, phases=phases, most=most)

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """By stack how many layers run, of how many."""
        return {s.name: (len(s.short.kept), len(s.short.stands_for)) for s in self._stacks}

    @property
    def runs_whole(self) -> bool:
        """Whether no layer is like another."""
        return all(run == all_of_them for run, all_of_them in self.layers.values())

    def suits(self, job: PlannedJob) -> bool:
        """Whether a job of the same model may choose other layers to recompute."""
        return _choice(job) == self._chosen or self._layers_choose

    def _choose(self, job: PlannedJob) -> None:
        """Another choice of which layers recompute needs no other model."""
        if _choice(job) == self._chosen:
            return
        self._restore()
        inner = inner_model(self.model)
        layers = len(checkpointed_layers(inner))
        asked, offload = self._chosen = _choice(job)
        count = {"none": 0, "full": layers, "auto": layers}.get(str(asked), asked)
        recompute_lowest(inner, min(int(count), layers), offload)
        self._begin(job)

    def _restore(self) -> None:
        self._training.close()
        for stack in self._stacks:
            stack.restore()


class _Stack:
    """The layers of a model, or of one of its halves."""

    def __init__(self, name: str, modules: nn.ModuleList, configs: Sequence[Any]) -> None:
        self.name = name
        self._modules, self._configs = modules, configs
        self._all = list(modules)
        self._own_settings = [dict(vars(config)) for config in configs]
        self._shared = names_of_shared(self._all)
        self._hooks: list[RemovableHandle] = []

    def shorten(self, reach: int) -> None:
        """Leaves only the layers that differ in the model, and says so in its config."""
        self.short = shortened(likenesses_of(self._all, self._configs), reach)
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


def shorten(model: nn.Module) -> None:
    """Takes out of a prepared model, for good, the layers that are like others."""
    inner = inner_model(model)
    for name, stack in layer_stacks(inner).items():
        _Stack(name, stack, _configs_around(inner, name)).shorten(1)
