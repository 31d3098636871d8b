"""Every strategy on every family of models in every precision: the cases and what holds of them."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qft import models
from qft.preparation import prepare
from qft.registry import build_strategy
from qft.strategy import Context, Strategy

_LOADED: dict[Any, nn.Module] = {}
PRECISIONS = ("none", "int8", "nf4")
TASKS = {"decoder": "text", "encoder": "classify", "encoder-decoder": "seq2seq"}


@dataclass(frozen=True)
class Case:
    """A strategy with small settings, and what it declares.

    Attributes:
        settings: the recipe entry.
        trains: one regular expression that every trained parameter's name matches, and no other.
        neutral: attaching changes no output.
    """

    settings: dict[str, Any]
    trains: str
    neutral: bool = True
    context: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.settings["name"])

    def strategy(self) -> Strategy:
        return build_strategy(self.settings)


# the last layer of each family, and the normalisation behind it
LAST = (
    r"(?<!encoder\.)layers\.1\.|encoder\.layer\.1\.|decoder\.block\.1\."
    r"|model\.norm\.|decoder\.final"
)
HEADS = r"classifier\."
CASES = [
    Case({"name": "lora", "rank": 4}, rf"lora_[AB]\.|{HEADS}"),
    Case(
        {"name": "adalora", "rank": 2, "initial_rank": 4, "warmup": 0, "settled": 0.1},
        rf"lora_[ABE]\.|{HEADS}",
    ),
    Case({"name": "ia3"}, rf"ia3_l|{HEADS}"),
    Case({"name": "prompt", "length": 4}, rf"prompt_encoder\.|{HEADS}", neutral=False),
    Case(
        {"name": "p-tuning", "length": 4, "hidden": 16},
        rf"prompt_encoder\.|{HEADS}",
        neutral=False,
    ),
    Case({"name": "prefix", "length": 4}, rf"prefix_encoder\.|{HEADS}", neutral=False),
    Case({"name": "bitfit"}, rf"bias$|(?i:norm)|{HEADS}"),
    Case({"name": "layers", "last": 1}, rf"{LAST}|{HEADS}"),
    Case({"name": "head"}, HEADS),
    Case({"name": "full"}, "."),
    Case(
        {"name": "stack", "of": [{"name": "bitfit"}, {"name": "lora", "rank": 4}]},
        rf"lora_[AB]\.|bias$|(?i:norm)|{HEADS}",
    ),
    Case(  # the teacher is asked by the training alone
        {"name": "distill", "teacher": "none", "student": {"name": "lora", "rank": 4}},
        rf"lora_[AB]\.|{HEADS}",
    ),
]


def base_of(folder: Path, architecture: str, precision: str, keep: tuple[str, ...]) -> nn.Module:
    """A fresh copy; each kind is loaded once."""
    key = (folder, architecture, precision, keep)
    if key not in _LOADED:
        torch.manual_seed(0)  # a classifier's head is new each time
        _LOADED[key] = models.open_model(folder, spec_of(folder, architecture, precision), keep)
    return copy.deepcopy(_LOADED[key])


def spec_of(folder: Path, architecture: str, precision: str) -> models.ModelSpec:
    classify = architecture == "encoder"
    return models.ModelSpec(
        source=str(folder), task=TASKS[architecture], labels=("no", "yes") if classify else None,
        quantize=precision, dtype=torch.float32, device="cpu",
    )  # fmt: skip


def attached(
    case: Case, folder: Path, architecture: str, precision: str, checkpointing: Any = None
) -> tuple[nn.Module, nn.Module]:
    """The base as it was (another object), and the model with the strategy on it."""
    strategy = case.strategy()
    spec = spec_of(folder, architecture, precision)
    keep = strategy.needs(models.open_skeleton(folder, spec)).full_precision
    context = Context(task=TASKS[architecture], total_steps=20, **case.context)
    torch.manual_seed(1)
    base, model = (base_of(folder, architecture, precision, keep) for _ in range(2))
    torch.manual_seed(2)
    if checkpointing is None:
        return base, strategy.attach(model, context)
    return base, prepare(model, strategy, checkpointing=checkpointing, context=context)


def batch_for(architecture: str) -> dict[str, Tensor]:
    """Two rows of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 260, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    ids[1, 8:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    match architecture:
        case "decoder":
            batch["labels"] = ids.masked_fill(mask == 0, -100)
        case "encoder":
            batch["labels"] = torch.tensor([0, 1])
        case _:
            labels = torch.randint(4, 260, (2, 7), generator=generator)
            labels[1, 5:] = -100
            batch["labels"] = labels
    return batch


def outputs(model: nn.Module, architecture: str) -> Tensor:
    """Logits at the positions that are not padding, in eval mode."""
    batch = batch_for(architecture)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        labels = {"labels": batch["labels"]} if architecture == "encoder-decoder" else {}
        logits: Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **labels
        ).logits
    model.train(was_training)
    if architecture == "decoder":
        logits = logits[:, -batch["input_ids"].shape[1] :][batch["attention_mask"].bool()]
    if architecture == "encoder-decoder":
        logits = logits[batch["labels"] != -100]
    return logits.float()


def gradients(model: nn.Module, architecture: str) -> dict[str, Tensor]:
    """Of one batch, by parameter name."""
    model.zero_grad(set_to_none=True)
    model(**batch_for(architecture)).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def train_a_little(model: nn.Module, strategy: Strategy, architecture: str) -> None:
    """Three steps, large enough to see."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for step in range(1, 4):
        optimizer.zero_grad(set_to_none=True)
        model(**batch_for(architecture)).loss.backward()
        optimizer.step()
        strategy.after_step(model, step)


def wrongly_trained(model: nn.Module, pattern: str) -> list[str]:
    """Parameters that train and should not, or should and do not."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        != (bool(re.search(pattern, name)) and "original_module" not in name)
    ]
