"""A thin transformers.Trainer: the loop is its own; the step, the order and the files are qft's."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, PrinterCallback
from transformers.trainer_utils import SaveStrategy

from qft import checkpoints
from qft.data.tasks import Example, Task
from qft.first_step import FirstStepCheck
from qft.lean.model_parts import device_of
from qft.progress import QUIET, Reporter
from qft.recipe import Train
from qft.step import Layout, StepLoss, StepResult, accumulate_gradients
from qft.strategy import Strategy
from qft.task_loss import TaskLoss

Evaluate = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True)
class Job:
    """What a trainer needs beside the model.

    Attributes:
        strategy: attached to the model already.
        task: collates and counts.
        examples: the training examples.
        settings: the recipe's `train`.
        micro_batch: to begin with; halved where memory runs out.
        pad_token_id: fills the right of shorter rows.
        folder: where checkpoints go.
        evaluate: metrics of the model on held-out rows, or None.
        card: what `adapter/qft.json` holds.
        loss: what is minimised, where it is not the model's own loss alone.
        layout: how a step's examples are put into rows.
        reporter: where notes go.
    """

    strategy: Strategy
    task: Task
    examples: list[Example]
    settings: Train
    micro_batch: int
    pad_token_id: int
    folder: Path
    evaluate: Evaluate | None
    card: Mapping[str, Any]
    loss: StepLoss = field(default_factory=TaskLoss)
    layout: Layout = field(default_factory=Layout)
    reporter: Reporter = QUIET


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
        self.last_result: StepResult | None = None
        self._measured: tuple[int, dict[str, float]] = (-1, {})
        self._batches = StepBatches(len(job.examples), job.settings.batch_size, job.settings.seed)
        arguments = training_arguments(job, len(self._batches), device_of(model))
        own: list[TrainerCallback] = [
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
        result = accumulate_gradients(
            model,
            self.job.loss.examples(model, inputs, step),
            self.job.task,
            step=step,
            micro_batch=self.micro_batch,
            pad_token_id=self.job.pad_token_id,
            strategy=self.job.strategy,
            backward=self.accelerator.backward,
            loss=self.job.loss,
            layout=self.job.layout,
        )
        self.micro_batch = result.micro_batch if result.replays else self.micro_batch
        self.last_result = result
        return result.loss

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
        checkpoints.rotate(self.job.folder, self.job.settings.keep_checkpoints, best)

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


# the Trainer's name for each, and its settings where the Trainer's own are not the usual ones
OPTIMIZERS = {
    "adamw": ("adamw_torch", None),
    "sgd": ("sgd", "momentum=0.9"),
    "adafactor": ("adafactor", None),
    "adamw-8bit": ("adamw_bnb_8bit", None),
    "paged-adamw": ("paged_adamw_32bit", None),
    "paged-adamw-8bit": ("paged_adamw_8bit", None),
}


def _optimizer(settings: Train, device: torch.device) -> str:
    """The Trainer's name; on a CPU the fused AdamW takes a quarter of the other one's time."""
    if settings.optimizer == "adamw" and device.type == "cpu":
        return "adamw_torch_fused"
    return OPTIMIZERS[settings.optimizer][0]


def schedule_factor(step: int, settings: Train, total: int) -> float:
    """Learning rate at ``step`` (from 0) over its peak: warm-up, then the recipe's schedule."""
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * total
    warmup = math.ceil(warmup)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    match settings.schedule:
        case "constant":
            return 1.0
        case "linear":
            return max(0.0, 1.0 - done)
        case "polynomial":
            return max(0.0, 1.0 - done) ** 2
        case "cosine-restarts":
            part = min(done, 1.0) * settings.cycles
            within = part - math.floor(part) if done < 1 else 1.0
            return 0.5 * (1.0 + math.cos(math.pi * within))
        case "exponential":
            return float(0.01 ** min(done, 1.0))  # a hundredth of the peak at the end
        case _:
            return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def training_arguments(job: Job, steps_an_epoch: int, device: torch.device) -> TrainingArguments:
    """The Trainer's arguments for a job; only what the overrides above leave to it."""
    settings = job.settings
    every = {True: "steps", False: "epoch"}
    keep_best = bool(settings.early_stopping and job.evaluate)
    save_every = settings.eval_every if keep_best else settings.save_every
    arguments = TrainingArguments(
        output_dir=str(job.folder),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=_optimizer(settings, device),
        optim_args=OPTIMIZERS[settings.optimizer][1],
        eval_strategy=every[settings.eval_every is not None] if job.evaluate else "no",
        eval_steps=settings.eval_every,
        save_strategy=SaveStrategy(every[save_every is not None]),
        save_steps=save_every or steps_an_epoch,
        load_best_model_at_end=keep_best,
        metric_for_best_model="eval_loss" if keep_best else None,
        greater_is_better=False if keep_best else None,
        logging_strategy="steps",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        seed=settings.seed,
        use_cpu=device.type == "cpu",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        log_level="error",
    )
    # with several GPUs transformers would wrap in DataParallel, behind the step's back
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
