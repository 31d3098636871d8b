"""The optimizer a training would have, on fake parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from qft.lean.standins import BitsAndBytesAdam
from qft.recipe import Train
from qft.schedule import OPTIMIZERS


def fake_optimizer(model: Any, settings: Train, device: str) -> torch.optim.Optimizer:
    """As transformers' Trainer makes it for `qft.trainer.StepTrainer`.

    Args:
        model: on fake tensors.
        device: ``cpu`` or ``cuda``, where the training would run. On a GPU torch computes all
            parameters of a group at once, which takes temporaries of their size.
    """
    groups = _groups(model, settings.weight_decay)
    name = settings.optimizer
    if "8bit" in name or name.startswith("paged"):
        bits = 8 if "8bit" in name else 32
        tables: list[Any] = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
        wide = tables if bits == 8 else []
        paged = name.startswith("paged") and device == "cuda"  # on a CPU there are no pages
        return BitsAndBytesAdam(groups, bits, wide=wide, paged=paged)
    arguments = TrainingArguments(optim=OPTIMIZERS[name][0], optim_args=OPTIMIZERS[name][1],
                                  use_cpu=True, report_to=[])  # fmt: skip
    kind, its_own = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    how: dict[str, Any] = {"foreach": device == "cuda"} if name in ("adamw", "sgd") else {}
    if name == "adamw" and device == "cpu":
        how = {"fused": True}
    made: torch.optim.Optimizer = kind(groups, **{**its_own, **how})
    return made


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """With and without weight decay: each is computed by itself."""
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in trained if n in decayed], "weight_decay": weight_decay},
        {"params": [p for n, p in trained if n not in decayed], "weight_decay": 0.0},
    ]
