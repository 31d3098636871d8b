"""A loaded model is made to fit: which layers keep their activations, how much goes at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from qft import hardware
from qft.budget import keep_if_roomy, keep_what_fits, require_within
from qft.data.packing import Row
from qft.data.tasks import Example, pad_id
from qft.errors import WillNotFitError
from qft.inputs import Inputs
from qft.lean.checkpointing import checkpointed_layers
from qft.lean.model_parts import device_of
from qft.micro_batch import MicroBatch
from qft.planning.job import longest_examples
from qft.preparation import inner_model, prepared, recompute_lowest
from qft.progress import Reporter, human_bytes
from qft.recipe import Recipe
from qft.step import Layout, StepLoss, accumulate_gradients, width_of
from qft.trainer import Suggest, usual_changes


@dataclass(frozen=True)
class Fitting:
    """A model, its data and what a micro-batch shall be.

    Attributes:
        micro_batch: told what was found; one that did not fit has become smaller.
        tensor_bytes: what tensors may take, or None.
        suggest: what would make it fit, the cheapest change first.
    """

    recipe: Recipe
    model: nn.Module
    inputs: Inputs
    layout: Layout
    loss: StepLoss
    micro_batch: MicroBatch
    tensor_bytes: int | None
    reporter: Reporter
    suggest: Suggest = usual_changes

    def decide(self) -> None:
        """Keeps to the budget, or to what is free, as far as the recipe leaves a choice.

        Raises:
            WillNotFitError: not even one example fits into the budget.
        """
        if self.tensor_bytes is not None:
            self._keep_within(self.tensor_bytes)
        elif self.recipe.memory.checkpointing == "auto" and self._recomputes:
            self._keep_if_roomy()

    def longest(self, rows: int | None = None) -> list[Example]:
        """The examples of the micro-batch that needs most."""
        count = rows or self.micro_batch.examples
        return longest_examples(self.inputs.train.examples, count, self.layout.pack_to)

    @property
    def rows_at_most(self) -> int:
        """How many of the longest rows go through the model together."""
        rows = self.layout.rows(self.longest())
        return self.micro_batch.count(sorted((width_of(row) for row in rows), reverse=True))

    def recompute_all(self) -> str | None:
        """Where `checkpointing: auto` lets layers keep their activations: they do no longer."""
        inner, state = inner_model(self.model), prepared(self.model)
        layers = checkpointed_layers(inner)
        keeping = [layer for layer in layers if not layer.gradient_checkpointing]
        if self.recipe.memory.checkpointing != "auto" or not keeping or state is None:
            return None
        recompute_lowest(inner, len(layers), state.offload)
        return f"all {len(layers)} layers recompute their activations from now on"

    @property
    def _recomputes(self) -> bool:
        """Whether its layers recompute, with their inputs on the device."""
        state = prepared(self.model)
        assert state is not None
        return state.offload == "none" and bool(checkpointed_layers(inner_model(self.model)))

    def _keep_within(self, allowed: int) -> None:
        """As many layers keep as there is room; where none may, fewer examples go at once."""
        rows = self.micro_batch.examples
        while True:
            try:
                taken, chosen = self._taken(rows, allowed)
            except WillNotFitError as error:
                if rows == 1:
                    fix = "; ".join(self.suggest())
                    raise WillNotFitError(
                        error.what, where=error.where, found=error.found, fix=fix
                    ) from error
                rows = (rows + 1) // 2
                continue
            break
        fewer = ""
        if rows < self.micro_batch.examples:
            self.micro_batch.tokens = self._tokens(rows)
            self.micro_batch.shrinks += 1
            fewer = f"at most {self.micro_batch.tokens:,} tokens at once, not all that "
            fewer += f"{self.micro_batch.examples} examples may have; "
        self.reporter.say(
            f"memory: {chosen}{fewer}the longest micro-batch holds {human_bytes(taken)} of "
            f"tensors, {human_bytes(allowed)} are allowed"
        )

    def _taken(self, rows: int, allowed: int) -> tuple[int, str]:
        step, optimizer = self._trial(self.longest(rows), rows), self.recipe.train.optimizer
        layers = len(checkpointed_layers(inner_model(self.model)))
        if self.recipe.memory.checkpointing == "auto" and layers:
            kept, taken = keep_what_fits(self.model, step, allowed, optimizer)
            return taken, f"{kept} of {layers} layers keep their activations; "
        return require_within(self.model, step, allowed, optimizer), ""

    def _tokens(self, rows: int) -> int:
        made: list[Row] = self.layout.rows(self.longest(rows))
        widths = sorted((width_of(row) for row in made), reverse=True)[:rows]
        return self.micro_batch.size(widths)

    def _keep_if_roomy(self) -> None:
        """Without a budget, layers recompute only where memory could become scarce."""
        ordered = sorted(self.inputs.train.examples, key=lambda e: len(e.inputs["input_ids"]))
        ordinary = ordered[len(ordered) // 2]
        longest = self.longest()
        most = max(len(e.inputs["input_ids"]) for e in longest) * self.micro_batch.examples
        if self.layout.shares_rows:
            most = sum(len(e.inputs["input_ids"]) for e in longest)
        taken = keep_if_roomy(
            self.model,
            self._trial([ordinary], 1),
            most / len(ordinary.inputs["input_ids"]),
            hardware.free_memory_bytes(device_of(self.model).type),
            self.recipe.train.optimizer,
        )
        if taken is None:
            self.reporter.say(
                "memory: activations are recomputed, since keeping them could take more than half "
                "of what is free; memory.budget sets another limit"
            )
        else:
            self.reporter.say(f"memory: activations are kept, for at most {human_bytes(taken)}")

    def _trial(self, examples: Sequence[Example], rows: int) -> Callable[[], object]:
        """A forward and a backward pass of these examples, all rows at once."""
        return lambda: accumulate_gradients(
            self.model,
            examples,
            self.inputs.task,
            step=0,
            micro_batch=MicroBatch(rows, fixed=True),
            pad_token_id=pad_id(self.inputs.tokenizer),
            loss=self.loss,
            layout=self.layout,
        )
