"""A thin transformers.Trainer: the loop is its own; the step, the order and the files are qft's."""

from __future__ import annotations

import contextlib
import functools
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback

from qft import checkpoints
from qft.data.tasks import Example, Task
from qft.enforcement import Limit
from qft.errors import WillNotFitError
from qft.first_step import FirstStepCheck
from qft.lean.model_parts import device_of
from qft.micro_batch import MicroBatch
from qft.out_of_memory import Shortage, free_idle_memory, tried
from qft.preparation import stock_dropouts
from qft.progress import QUIET, Reporter
from qft.recipe import Train
from qft.rehearsal import allocate_states, left_as_it_was
from qft.schedule import schedule_factor, training_arguments
from qft.step import SMALLER, Layout, StepLoss, StepResult, accumulate_gradients
from qft.strategy import Strategy
from qft.task_loss import TaskLoss

Evaluate = Callable[[nn.Module], dict[str, float]]
Suggest = Callable[[], Sequence[str]]


def usual_changes() -> Sequence[str]:
    """What usually helps, where nobody has looked for what would help this very training."""
    return (SMALLER,)


def resume_command(folder: Path) -> str:
    """Goes on with the run in a folder."""
    return f"qft train {shlex.quote(str(folder / 'recipe.yaml'))} --resume"


@dataclass(frozen=True)
class Job:
    """What a trainer needs beside the model.

    Attributes:
        strategy: attached to the model already.
        task: collates and counts.
        examples: the training examples.
        settings: the recipe's `train`.
        micro_batch: to begin with; becomes smaller where memory runs out.
        pad_token_id: fills the right of shorter rows.
        folder: where checkpoints go.
        evaluate: metrics of the model on held-out rows, or None.
        card: what `adapter/qft.json` holds.
        loss: what is minimised, where it is not the model's own loss alone.
        layout: how a step's examples are put into rows.
        reporter: where notes go.
        longest: the examples of the micro-batch that needs most, rehearsed before the first step;
            none is no rehearsal.
        limit: of memory, if any; sees the peaks of every phase.
        suggest: what would make a training fit that does not, the cheapest change first.
    """

    strategy: Strategy
    task: Task
    examples: list[Example]
    settings: Train
    micro_batch: MicroBatch
    pad_token_id: int
    folder: Path
    evaluate: Evaluate | None
    card: Mapping[str, Any]
    loss: StepLoss = field(default_factory=TaskLoss)
    layout: Layout = field(default_factory=Layout)
    reporter: Reporter = QUIET
    longest: Sequence[Example] = ()
    limit: Limit | None = None
    suggest: Suggest = usual_changes


class StepBatches(Sampler[list[int]]):
    """The order of training: the examples of each optimizer step, a function of (seed, epoch)."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self._count = count
        self._batch_size = batch_size
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return math.ceil(self._count / self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        order = torch.randperm(self._count, generator=generator).tolist()
        for start in range(0, self._count, self._batch_size):
            yield order[start : start + self._batch_size]


class StepTrainer(Trainer):
    """Overrides: batches of whole steps, the step itself, the schedule, evaluation, checkpoints."""

    def __init__(
        self, model: nn.Module, job: Job, callbacks: list[TrainerCallback] | None = None
    ) -> None:
        self.job = job
        self.micro_batch = job.micro_batch
        self.changes: list[str] = []  # of the step at hand, for lack of memory
        self.micro_batch.told = self._hear_of_a_change
        self.last_result: StepResult | None = None
        self._measured: tuple[int, dict[str, float]] = (-1, {})
        self._batches = StepBatches(len(job.examples), job.settings.batch_size, job.settings.seed)
        arguments = training_arguments(
            job.settings,
            job.folder,
            job.evaluate is not None,
            len(self._batches),
            device_of(model),
        )
        own: list[TrainerCallback] = [
            _Rehearsal(self),
            _Epochs(self._batches),
            FirstStepCheck(model, job.reporter),  # before the strategy may change what trains
            _AfterStep(self),
        ]
        if job.settings.early_stopping and job.evaluate:
            own.append(_EarlyStopping(job.settings.early_stopping))
        # transformers refuses to train a quantized model without PEFT; head-only is just that
        claimed: Any = getattr(model, "_hf_peft_config_loaded", None)
        if claimed is not None:
            model._hf_peft_config_loaded = True  # type: ignore[assignment]
        super().__init__(
            model=model,
            args=arguments,
            data_collator=_uncollated,
            train_dataset=job.examples,  # type: ignore[arg-type]
            eval_dataset=[],  # type: ignore[arg-type]
            callbacks=own + (callbacks or []),
        )
        if claimed is not None:
            model._hf_peft_config_loaded = claimed
        self.remove_callback(PrinterCallback)

    @property
    def trained(self) -> nn.Module:
        """The model; the Trainer's own attribute may be None before it is made."""
        model = self.model
        assert model is not None
        return model

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The examples of one whole optimizer step at a time, uncollated."""
        return DataLoader(
            self.job.examples,  # type: ignore[arg-type]
            batch_sampler=self._batches,
            collate_fn=_uncollated,
            generator=torch.Generator(),  # its own: iterating must not draw from the global one
        )

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Forward and backward of one whole optimizer step."""
        model.train()
        step = self.state.global_step + 1
        self.changes.clear()
        with self._saved_before_the_end():
            result = self._gradients(self.job.loss.examples(model, inputs, step), step)
        self.last_result = result
        return result.loss

    def _gradients(self, examples: Sequence[Example], step: int) -> StepResult:
        return accumulate_gradients(
            self.trained,
            examples,
            self.job.task,
            step=step,
            micro_batch=self.micro_batch,
            pad_token_id=self.job.pad_token_id,
            strategy=self.job.strategy,
            backward=self.accelerator.backward,
            loss=self.job.loss,
            layout=self.job.layout,
        )

    def _hear_of_a_change(self, sentence: str) -> None:
        if used := stock_dropouts(self.trained):
            sentence += (
                f"; {used[0]} draws from the ordinary generator: statistically, not bitwise, the "
                "same update"
            )
        self.changes.append(sentence)

    def rehearse(self) -> None:
        """Runs the micro-batch that needs most, and leaves no trace; see `qft.rehearsal`.

        Raises:
            WillNotFitError: not even one example fits.
        """
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        self.changes.clear()
        with left_as_it_was(self.trained, optimizer, self.job.strategy):
            made = tried(lambda: allocate_states(optimizer))
            if isinstance(made, Shortage):
                raise WillNotFitError(
                    "The optimizer's states do not fit into the memory.",
                    where="train.optimizer",
                    found=made.message,
                    fix="; ".join(self.job.suggest()),
                )
            if self.job.settings.batch_size <= self.micro_batch.examples:
                self.trained.zero_grad(set_to_none=True)  # a step is one micro-batch
            limit = self.job.limit
            metered = limit.rehearsed() if limit is not None else contextlib.nullcontext()
            with self._suggesting("in a rehearsal of the longest rows, before a step"), metered:
                self._gradients(self.job.longest, self.state.global_step + 1)
        for sentence in self.changes:
            self.job.reporter.say(f"memory: before the first step: {sentence}")

    @contextlib.contextmanager
    def _suggesting(self, where: str, ending: str = "") -> Iterator[None]:
        """An error for lack of memory says where it was and what would help."""
        try:
            yield
        except WillNotFitError as error:
            raise WillNotFitError(
                error.what,
                where=where,
                found=error.found,
                fix="; ".join([*filter(None, [ending]), *self.job.suggest()]),
            ) from error

    @contextlib.contextmanager
    def _saved_before_the_end(self) -> Iterator[None]:
        """What memory ends here can be gone on with from the last complete step."""
        step, ending = self.state.global_step, ""
        try:
            yield
        except WillNotFitError as error:
            if step > 0:
                self.trained.zero_grad(set_to_none=True)
                free_idle_memory()
                if not (self.job.folder / f"checkpoint-{step}").is_dir():
                    self._save_checkpoint(self.trained, None)
                ending = f"a checkpoint of step {step} is saved; memory.* may change: "
                ending += f"{resume_command(self.job.folder.parent)} memory.micro_batch=1"
            with self._suggesting(f"step {step + 1}", ending):
                raise error

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: the Trainer's formula knows neither frozen layers nor padding."""
        return 0

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The recipe's schedule as a factor of the peak learning rate."""
        if self.lr_scheduler is None:
            chosen: Any = optimizer or self.optimizer
            factor = functools.partial(
                schedule_factor, settings=self.job.settings, total=num_training_steps
            )
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(chosen, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler  # type: ignore[no-any-return]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """qft's own evaluation; names carry the prefix ``eval_``."""
        assert self.job.evaluate is not None
        with self._saved_before_the_end():
            measured = self.job.evaluate(self.trained)
        self._measured = (self.state.global_step, measured)
        metrics = {f"eval_{k}": v for k, v in measured.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def final_metrics(self) -> dict[str, float]:
        """Of the model as it is now; an evaluation at the last step is not done twice."""
        if self.job.evaluate is None:
            return {}
        step, measured = self._measured
        swapped = self.args.load_best_model_at_end  # the best model is not the last one
        if step == self.state.global_step and not swapped:
            return measured
        return self.job.evaluate(self.trained)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        best = None
        if self.state.best_global_step:
            best = self.job.folder / f"checkpoint-{self.state.best_global_step}"
            here = self.state.best_global_step == self.state.global_step
            if here or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        self._collect_callback_states()
        limit = self.job.limit
        with limit.peaks.phase("save") if limit is not None else contextlib.nullcontext():
            if tried(self._write_checkpoint) is not None:  # gradients can be had again
                self.trained.zero_grad(set_to_none=True)
                free_idle_memory()
                self._write_checkpoint()
        checkpoints.rotate(self.job.folder, self.job.settings.keep_checkpoints, best)

    def _write_checkpoint(self) -> None:
        checkpoints.save_checkpoint(
            self.job.folder,
            self.state.global_step,
            model=self.trained,
            strategy=self.job.strategy,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            trainer_state=self.state,
            card=self.job.card,
        )

    def _collect_callback_states(self) -> None:
        states: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states[type(callback).__name__] = callback.state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoints.load_model_state(Path(resume_from_checkpoint), self.trained, self.job.strategy)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_optimizer_state(Path(checkpoint), self.optimizer, self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoints.load_random_state(Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: nothing here trains in float16 with a scaler."""


def _uncollated(examples: list[Example]) -> Any:
    """The step collates; until then examples stay as they are."""
    return examples


class _EarlyStopping(EarlyStoppingCallback):
    """Also counts on where a resumed run's checkpoint left off."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restores the count of evaluations without gain."""
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        name = "early_stopping_patience_counter"
        setattr(self, name, saved.get(name, 0))
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]


class _Rehearsal(TrainerCallback):
    """Before the first step, of a resumed run as well; the optimizer is there by now."""

    def __init__(self, trainer: StepTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        job, optimizer = self._trainer.job, self._trainer.optimizer
        if job.limit is not None:
            job.limit.watch(self._trainer.trained, optimizer, job.settings.optimizer)
        if job.longest:
            self._trainer.rehearse()


class _Epochs(TrainerCallback):
    """Tells the batches which epoch it is; on resume too."""

    def __init__(self, batches: StepBatches) -> None:
        self._batches = batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._batches.epoch = state.global_step // len(self._batches)


class _AfterStep(TrainerCallback):
    """Calls the strategy after the optimizer's step, gradients still in place."""

    def __init__(self, trainer: StepTrainer) -> None:
        self._trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.job.strategy.after_step(self._trainer.trained, state.global_step + 1)
