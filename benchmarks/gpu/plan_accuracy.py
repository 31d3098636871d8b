"""Is what the planner says of a GPU what a GPU does? Allocated within 3 %, reserved within 8 %.

    python benchmarks/gpu/plan_accuracy.py               # predicted and measured, on a GPU
    python benchmarks/gpu/plan_accuracy.py --predict     # the predictions alone, anywhere
    python benchmarks/gpu/plan_accuracy.py --residuals   # against rows that were measured before

A case is a shape, a precision, a strategy, a length and what is kept for the backward pass. It is
predicted on fake tensors from two depths, with what `qft.planning.cuda_allocator` adds; then three
real steps are taken, and the peaks of the last two compared.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_models import TINY, Case, batch_of, optimizer_of, random_model, with_lora
from gpu_rows import ROOT, Rows, parser, peaks, reason_of, reset_peaks
from torch import nn

from qft.bench.fake_model import DEVICE, fake_step
from qft.bench.shapes import SHAPES
from qft.lean.engine import Savers
from qft.lean.meter import CATEGORIES, Reading, meter
from qft.lean.standins import BitsAndBytesAdam, quantize_skeleton
from qft.planning.cuda_allocator import CudaUnseen, cuda_unseen
from qft.preparation import Checkpointing, Offload, prepare
from qft.quantization import Scratch

ALLOCATED_BOUND, RESERVED_BOUND = 0.03, 0.08
LAYERS = (2, 3)  # metered; bytes are affine in the depth
STEPS = 3
PAST = ROOT / "benchmarks/results/gpu.jsonl"


@dataclass(frozen=True)
class Plan:
    """One comparison.

    Attributes:
        strategy: a key of `STRATEGIES`.
    """

    case: Case
    strategy: str = "lora"
    checkpointing: Checkpointing = "full"

    @property
    def name(self) -> str:
        """Of its row."""
        kept = "" if self.checkpointing == "full" else f" checkpointing={self.checkpointing}"
        away = "" if self.case.offload == "none" else f" offload={self.case.offload}"
        rank = f" r={self.case.rank} of {len(self.case.targets)}" if self.strategy == "lora" else ""
        return f"{self.case.name} {self.strategy}{rank}{kept}{away} {self.case.optimizer}"


def lora(model: Any, case: Case) -> Any:
    """PEFT's, on the case's targets."""
    return with_lora(model, case)


def ia3(model: Any, case: Case) -> Any:
    """PEFT's, on keys, values and the way down."""
    from peft import IA3Config, get_peft_model

    config = IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)


def full(model: Any, case: Case) -> Any:
    """All parameters."""
    return model.requires_grad_(True)


def head(model: Any, case: Case) -> Any:
    """The last norm alone: hardly more than the weights."""
    model.requires_grad_(False)
    model.model.norm.requires_grad_(True)
    return model


STRATEGIES: dict[str, Callable[[Any, Case], Any]] = {
    "lora": lora, "ia3": ia3, "full": full, "last-norm": head,
}  # fmt: skip


def plans(device: str, dtype: str = "bfloat16") -> list[Plan]:
    """What is compared, the shortest first."""
    made: list[Plan] = []
    for shape, quantize, length, batch in (
        ("llama-3.2-1b", "none", 512, 4), ("llama-3.2-1b", "none", 4096, 1),
        ("qwen2.5-1.5b", "nf4", 2048, 1), ("llama-3.2-3b", "none", 2048, 1),
        ("llama-3.2-3b", "nf4", 1024, 4), ("llama-3.1-8b", "nf4", 2048, 1),
        ("llama-3.1-8b", "nf4", 6144, 1), ("llama-3.1-8b", "none", 2048, 1),
    ):  # fmt: skip
        case = Case(shape, quantize, length, batch, dtype=dtype, device=device)
        made.append(Plan(case))
    small, large = made[0].case, made[5].case
    made += [
        Plan(small, "full"),
        Plan(small, "ia3"),
        Plan(small, "last-norm"),
        Plan(small, checkpointing="none"),
        Plan(replace(small, rank=32, targets=("q_proj", "v_proj"))),
        Plan(large, "ia3"),
        Plan(replace(large, length=1024), checkpointing="none"),
        Plan(replace(large, offload="host")),
        Plan(replace(large, optimizer="adamw-8bit", rank=64)),
    ]
    return made


# --- predicted


@dataclass(frozen=True)
class Prediction:
    """Bytes of a step on a GPU."""

    by_category: dict[str, int]
    unseen: CudaUnseen

    @property
    def allocated(self) -> int:
        """What `max_memory_allocated` will say."""
        return sum(self.by_category.values()) + self.unseen.allocated

    @property
    def reserved(self) -> int:
        """What `max_memory_reserved` will say."""
        return self.allocated + self.unseen.between

    def fields(self) -> dict[str, Any]:
        """As they go into a row."""
        return {
            "predicted_allocated_bytes": self.allocated,
            "predicted_reserved_bytes": self.reserved,
            "predicted_by_category": self.by_category,
        }


def predict(plan: Plan) -> Prediction:
    """From steps of two depths on fake tensors."""
    values = TINY if plan.case.shape == "tiny" else SHAPES[plan.case.shape]
    first, second = (metered(plan, layers) for layers in LAYERS)
    further = (values["num_hidden_layers"] - LAYERS[0]) / (LAYERS[1] - LAYERS[0])

    def deep(name: str) -> int:
        low, high = (reading.peak.by_category[name] for reading in (first, second))
        return round(low + further * (high - low))

    by_category = {name: deep(name) for name in CATEGORIES}
    return Prediction(by_category, cuda_unseen(by_category))


def metered(plan: Plan, layers: int) -> Reading:
    """The second step of a model of so many layers, on fake tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    case = plan.case
    values = dict(TINY if case.shape == "tiny" else SHAPES[case.shape])
    values["num_hidden_layers"] = layers
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
        skeleton.tie_weights()
        if case.quantize != "none":
            quantize_skeleton(skeleton, case.quantize, ("lm_head",), Scratch())
        model = prepared(STRATEGIES[plan.strategy](skeleton, case), plan)
    with fake_step(model, on_cuda=True):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer = (
            torch.optim.AdamW(trained, foreach=False)
            if case.optimizer == "adamw"
            else BitsAndBytesAdam(trained)
        )
        ids = torch.zeros(case.batch, case.length, dtype=torch.long, device=DEVICE)

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return meter(step, model=model, optimizer=optimizer, device=DEVICE)


def prepared(model: nn.Module, plan: Plan) -> Any:
    """Under the engine."""
    offload: Offload = plan.case.offload  # type: ignore[assignment]
    savers = Savers(**dict.fromkeys(plan.case.savers, True))
    return prepare(model, checkpointing=plan.checkpointing, offload=offload, savers=savers)


# --- measured


def measure(plan: Plan) -> dict[str, Any]:
    """Peaks of real steps, the first of which makes the optimizer's states; or a ``reason``."""
    device = plan.case.device
    reset_peaks(device)
    found: dict[str, Any] = {}
    try:
        found = _steps(plan)
    except Exception as error:  # the row says why there is nothing in it
        found = {"reason": reason_of(error)}
    # outside the handler: the traceback holds what did not fit
    gc.collect()
    reset_peaks(device)
    return found


def _steps(plan: Plan) -> dict[str, Any]:
    case = plan.case
    model = prepared(STRATEGIES[plan.strategy](random_model(case), case), plan)
    optimizer = optimizer_of(model, case)
    reset_peaks(case.device)  # what making the weights left behind is given back
    loss = torch.zeros(())
    for number in range(STEPS):
        batch = batch_of(case, int(model.config.vocab_size), number)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if number == 0:  # it has made the optimizer's states, and its blocks stay
            reset_peaks(case.device, empty=False)
    return {**peaks(case.device), "final_loss": float(loss.detach())}


def compared(prediction: Prediction, found: dict[str, Any]) -> dict[str, Any]:
    """Relative errors, positive where too much was predicted; None where nothing was measured."""

    def error(predicted: int, measured: int | None) -> float | None:
        return None if not measured else predicted / measured - 1

    allocated = error(prediction.allocated, found.get("allocated_peak_bytes"))
    reserved = error(prediction.reserved, found.get("reserved_peak_bytes"))
    within = None
    if allocated is not None and reserved is not None:
        within = abs(allocated) <= ALLOCATED_BOUND and abs(reserved) <= RESERVED_BOUND
    return {"allocated_error": allocated, "reserved_error": reserved, "within": within}


# --- against rows of before


def past_plan(row: dict[str, Any]) -> Plan | None:
    """What a row of `throughput.py` or `peft_row.py` by the engine itself had run, measured."""
    sides = {"qft": "none", "qft-offload": "host"}
    ours = row["benchmark"] in ("throughput", "peft_row") and row["side"] in sides
    if not ours or row["predicted"] or not row["allocated_peak_bytes"]:
        return None
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in row["settings"].items()
    }
    return Plan(replace(Case(**values), offload=sides[row["side"]]))


def residuals(path: Path, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Predicts what was measured before, and says by how much it is off."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if (plan := past_plan(row)) is None:
            continue
        errors = compared(predict(plan), row)
        found.append({"name": plan.name, **errors})
        say(f"{plan.name}: allocated {errors['allocated_error']:+.2%}, "
            f"reserved {errors['reserved_error']:+.2%}")  # fmt: skip
    return found


def run(chosen: Sequence[Plan], rows: Rows, *, real: bool, until: float) -> int:
    """A row a plan; the number of those that are not within the bounds."""
    outside = 0
    for plan in chosen:
        if rows.has(plan.name, "qft") or time.monotonic() > until:
            continue
        prediction = predict(plan)
        found = measure(plan) if real else {}
        errors = compared(prediction, found)
        outside += errors["within"] is False
        settings = {**plan.case.settings(), "strategy": plan.strategy,
                    "checkpointing": plan.checkpointing}  # fmt: skip
        rows.add(plan.name, "qft", settings, **prediction.fields(), **found, **errors)
    return outside


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares; 1 where a prediction was further off than it may be, or there is no GPU."""
    options = parser(__doc__)
    options.add_argument("--predict", action="store_true", help="predictions alone")
    options.add_argument("--residuals", action="store_true", help="against rows of before")
    options.add_argument("--shapes", nargs="+", default=[*SHAPES], help="only these")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--limit-seconds", type=float, default=float("inf"))
    chosen = options.parse_args(arguments)
    if chosen.residuals:
        residuals(PAST)
        return 0
    if not chosen.predict and chosen.device != "cuda":
        print("There is no CUDA device here, so nothing can be compared; --predict shows what "
              "would be expected of one.", flush=True)  # fmt: skip
        return 1
    device = "none" if chosen.predict else chosen.device
    rows = Rows(chosen.out, "plan_accuracy", device, predicted=chosen.predict)
    wanted = [plan for plan in plans(device, chosen.dtype) if plan.case.shape in chosen.shapes]
    until = time.monotonic() + chosen.limit_seconds
    outside = run(wanted, rows, real=not chosen.predict, until=until)
    if outside:
        print(f"{outside} PREDICTIONS ARE OUTSIDE THE BOUNDS", flush=True)
    return int(outside > 0)


if __name__ == "__main__":
    sys.exit(main())
