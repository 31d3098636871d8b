"""How fast a training learns: the optimizer, the learning rate's way, the Trainer's knobs."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from qft.recipe import Train

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


def training_arguments(
    settings: Train, folder: Path, evaluates: bool, steps_an_epoch: int, device: torch.device
) -> TrainingArguments:
    """The Trainer's arguments; only what `qft.trainer` leaves to it.

    Args:
        folder: where checkpoints go.
        evaluates: whether there are held-out rows.
    """
    every = {True: "steps", False: "epoch"}
    keep_best = bool(settings.early_stopping and evaluates)
    save_every = settings.eval_every if keep_best else settings.save_every
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=_optimizer(settings, device),
        optim_args=OPTIMIZERS[settings.optimizer][1],
        eval_strategy=every[settings.eval_every is not None] if evaluates else "no",
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
