"""The longest sequence that trains under a card's memory: by real steps, or predicted by the meter.

    python benchmarks/gpu/largest_context.py [--caps 8 12 16 24]   # real steps, on a GPU
    python benchmarks/gpu/largest_context.py --predict              # fake tensors, anywhere

Llama-3.1-8B in nf4, LoRA r=32 on all linear layers, one sequence, every token a label: the setting
for which Unsloth publishes the context lengths below. A cap is a card's memory; what lies outside
of the allocator (CUDA's context, libraries, rounding) is taken off it first.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_models import TINY, Case, batch_of, optimizer_of, random_model, with_lora
from gpu_rows import (
    ROOT,
    Rows,
    around,
    is_out_of_memory,
    largest,
    parser,
    peaks,
    reason_of,
    reset_peaks,
)
from torch import nn

from qft.bench.fake_model import DEVICE, fake_step
from qft.bench.shapes import SHAPES
from qft.lean.engine import Savers
from qft.lean.meter import Reading, meter
from qft.lean.standins import BitsAndBytesAdam, quantize_skeleton
from qft.preparation import Offload, prepare
from qft.quantization import Scratch

GIB = 2**30
PUBLISHED = {8: 2972, 12: 21848, 16: 40724, 24: 78475}  # Unsloth's blog and README, tokens
TARGET = 2.0  # times these
LEANEST = {
    "offload": "host", "savers": ("tiled_mlp", "host_embeddings", "int8_head"),
    "optimizer": "adamw-8bit",
}  # fmt: skip
# the same without the one part that rounds
UNROUNDED = {**LEANEST, "savers": ("tiled_mlp", "host_embeddings")}
SETTINGS: dict[str, dict[str, Any]] = {
    "leanest": LEANEST, "leanest-unrounded": UNROUNDED, "defaults": {},
}  # fmt: skip
LAYERS = (2, 3)  # metered; bytes are affine in the depth
LENGTHS = (16384, 32768)  # and, from about ten thousand tokens on, in the length
WORKSPACE_BYTES = 64 << 20  # that cuBLAS holds through the allocator, as measured


def case_of(shape: str, settings: str, device: str = "cuda", dtype: str = "bfloat16",
            quantize: str = "nf4") -> Case:  # fmt: skip
    """One sequence; its length is what is looked for."""
    return Case(shape, quantize=quantize, rank=32, dtype=dtype, device=device, **SETTINGS[settings])


# --- predicted


@dataclass(frozen=True)
class Prediction:
    """The bytes of a step as a function of its length.

    Attributes:
        fixed: bytes at length zero.
        per_token: bytes a token.
        resident: weights, adapters, gradients, optimizer states.
        parts: at the fullest moment, bytes by category: of zero tokens, and of each.
        phase: of that moment.
    """

    fixed: float
    per_token: float
    resident: float
    parts: dict[str, tuple[float, float]]
    phase: str

    def peak_bytes(self, length: int) -> float:
        """Of a step; even a short one holds what is resident."""
        return max(self.resident, self.fixed + self.per_token * length)

    def largest(self, room: float) -> int:
        """The longest sequence in so many bytes."""
        return max(0, int((room - self.fixed) / self.per_token)) if room >= self.resident else 0


def predict(case: Case, lengths: tuple[int, int] = LENGTHS) -> Prediction:
    """From steps of two depths and two lengths on fake tensors."""
    values = dict(TINY if case.shape == "tiny" else SHAPES[case.shape])
    depth: int = values["num_hidden_layers"]
    at = {length: _shallow(replace(case, length=length)) for length in lengths}

    def deep(readings: list[Reading], of: Callable[[Reading], float]) -> float:
        return _deep(readings, depth, of)

    def line(of: Callable[[Reading], float]) -> tuple[float, float]:
        low, high = (deep(at[length], of) for length in lengths)
        slope = (high - low) / (lengths[1] - lengths[0])
        return low - slope * lengths[0], slope

    def part(name: str) -> Callable[[Reading], float]:
        return lambda reading: reading.peak.by_category[name]

    fixed, slope = line(lambda reading: reading.peak_bytes)
    last = at[lengths[1]]
    parts = {name: line(part(name)) for name in last[0].peak.by_category}
    resident = deep(last, lambda reading: reading.resident_bytes)
    return Prediction(fixed, slope, resident, parts, last[0].peak.phase)


def _shallow(case: Case) -> list[Reading]:
    return [metered(case, layers) for layers in LAYERS]


def _deep(readings: list[Reading], depth: int, of: Callable[[Reading], float]) -> float:
    """Of a model of so many layers."""
    first, second = of(readings[0]), of(readings[1])
    return first + (depth - LAYERS[0]) * (second - first) / (LAYERS[1] - LAYERS[0])


def predicted_peak(case: Case) -> int:
    """The peak of a step of this very length on a GPU; only the depth is drawn out."""
    values = TINY if case.shape == "tiny" else SHAPES[case.shape]
    readings = _shallow(case)
    peak = _deep(readings, values["num_hidden_layers"], lambda reading: reading.peak_bytes)
    return round(peak) + WORKSPACE_BYTES


def metered(case: Case, layers: int) -> Reading:
    """The second step of a model of so many layers, on fake tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(TINY if case.shape == "tiny" else SHAPES[case.shape])
    values["num_hidden_layers"] = layers
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
        skeleton.tie_weights()
        if case.quantize != "none":
            quantize_skeleton(skeleton, case.quantize, ("lm_head",), Scratch())
        model = prepared(with_lora(skeleton, case), case)
    with fake_step(model, on_cuda=True):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = (
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


def prepared(model: nn.Module, case: Case) -> Any:
    """With the engine's savers of this case."""
    offload: Offload = case.offload  # type: ignore[assignment]
    return prepare(model, offload=offload, savers=Savers(**dict.fromkeys(case.savers, True)))


def add_predictions(
    rows: Rows, case: Case, settings: str, caps: Sequence[int], outside: float,
    lengths: tuple[int, int] = LENGTHS,
) -> None:  # fmt: skip
    """A row a cap."""
    found = predict(case, lengths)
    for cap in caps:
        tokens = found.largest((cap - outside) * GIB - WORKSPACE_BYTES)
        rows.add(
            name_of(case, cap, settings), "qft", settings_of(case, cap, outside), tokens=tokens,
            **beside_published(cap, tokens), bytes_per_token=found.per_token,
            fixed_bytes=round(found.fixed), workspace_bytes=WORKSPACE_BYTES,
            resident_bytes=round(found.resident),
            peak_phase=found.phase,
            peak_by_category={
                name: round(zero + slope * tokens) for name, (zero, slope) in found.parts.items()
            },
        )  # fmt: skip


def name_of(case: Case, cap: int, settings: str) -> str:
    """Of a row."""
    return f"{case.shape} {case.quantize} r={case.rank} {cap} GiB, {settings}"


def settings_of(case: Case, cap: int, outside: float) -> dict[str, Any]:
    """Of a row; its length is what was looked for."""
    settings = case.settings()
    del settings["length"]
    allocator = os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
    return {**settings, "cap_gib": cap, "outside_gib": outside, "allocator": allocator}


def beside_published(cap: int, tokens: int) -> dict[str, Any]:
    """What Unsloth publishes for this memory, and whether twice that is reached."""
    if cap not in PUBLISHED:
        return {}
    return {"published_unsloth": PUBLISHED[cap], "ratio": round(tokens / PUBLISHED[cap], 2),
            "target_reached": tokens >= TARGET * PUBLISHED[cap]}  # fmt: skip


def predicted_tokens(name: str, path: Path = ROOT / "benchmarks/results/gpu.jsonl") -> int | None:
    """What the meter said of a row's case, if it was asked."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    found = [row["tokens"] for row in rows if row["predicted"] and row["case"] == name]
    return found[-1] if found else None


# --- measured

SHORT = 16  # tokens of the step that makes the optimizer's states
GROWTH = 1.7  # of a long step's time with its length, between linear and quadratic


class Steps:
    """Real steps of one model, of whatever length."""

    def __init__(self, case: Case, until: float = float("inf")) -> None:
        self._case, self._until = case, until
        self.model = prepared(with_lora(random_model(case), case), case)
        self._optimizer = optimizer_of(self.model, case)
        self.reasons: list[str] = []
        self.tried: dict[int, bool] = {}  # under this cap
        self.seconds: dict[int, float] = {}  # of the last step, by length
        self.peaks: dict[int, dict[str, Any]] = {}
        self._step(SHORT)

    def fit(self, length: int) -> bool:
        """Whether a step fits, with the optimizer's states there before it."""
        if length not in self.tried:
            if self._is_late(length):
                self.reasons.append("the time was over: a lower bound")
                return False
            self.tried[length] = self._try(length)
        return self.tried[length]

    def again(self, length: int) -> bool:
        """Whether it fits once more; this step is timed with all host memory there."""
        if self._is_late(length):
            self.reasons.append("timed by its first step")
            return True
        self.tried[length] = self._try(length, empty=False)
        return self.tried[length]

    def _is_late(self, length: int) -> bool:
        """Whether a step would end too late, judged by the last one that fit."""
        expected = 0.0
        if self.seconds:
            known, seconds = list(self.seconds.items())[-1]
            expected = seconds * max(1.0, length / known) ** GROWTH
        return time.monotonic() + expected > self._until

    def _try(self, length: int, *, empty: bool = True) -> bool:
        """What does not fit is freed."""
        reset_peaks(self._case.device, empty=empty)
        try:
            start = time.perf_counter()
            self._step(length)
            self.seconds[length] = time.perf_counter() - start
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = reason_of(error)
        else:
            self.peaks[length] = peaks(self._case.device)
            print(f"{length}: {self.seconds[length]:.2f} s, {self.peaks[length]}", flush=True)
            return True
        # outside the handler: the traceback holds what did not fit
        print(f"{length}: {reason}", flush=True)
        self._optimizer.zero_grad(set_to_none=True)
        gc.collect()
        reset_peaks(self._case.device)
        return False

    def _step(self, length: int) -> None:
        batch = batch_of(replace(self._case, length=length), self.model.config.vocab_size)
        loss = self.model(**batch).loss
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if not bool(torch.isfinite(loss)):
            raise AssertionError(f"the loss of {length} tokens is {float(loss)}")


def set_cap(device: str, gib: float) -> None:
    """What the allocator may reserve from here on."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))


def measure(
    rows: Rows, steps: Steps, case: Case, settings: str, cap: int, outside: float,
    longest: int, grain: int, guess: int | None = None,
) -> None:  # fmt: skip
    """A row; a guess is tried first, or else twice the published length."""
    set_cap(case.device, cap - outside)
    target = int(TARGET * PUBLISHED.get(cap, grain))
    steps.reasons.clear()
    steps.tried.clear()
    if guess is not None:
        tokens = around(steps.fit, guess, longest, grain)
    else:
        start = target if target <= longest and steps.fit(-(-target // grain) * grain) else grain
        tokens = largest(steps.fit, start + grain - 1, longest, grain)
    while tokens and not steps.again(tokens):
        tokens = max((n for n, fits in steps.tried.items() if fits and n < tokens), default=0)
    rows.add(
        name_of(case, cap, settings), "qft", settings_of(case, cap, outside), tokens=tokens,
        **beside_published(cap, tokens), **steps.peaks.get(tokens, {}),
        tokens_per_second=tokens / steps.seconds[tokens] if tokens else None,
        tried_first=guess,
        tried=[{"tokens": n, "fits": fits, **(steps.peaks.get(n, {}) if fits else {})}
               for n, fits in steps.tried.items()],
        reason="; ".join(dict.fromkeys(steps.reasons)) or None,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Predicts or measures."""
    options = parser(__doc__)
    options.add_argument("--predict", action="store_true")
    options.add_argument("--shape", default="llama-3.1-8b")
    options.add_argument("--quantize", default="nf4")
    options.add_argument("--dtype", default="bfloat16")
    options.add_argument("--caps", nargs="+", type=int, default=list(PUBLISHED))
    options.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    options.add_argument("--outside-gib", type=float, default=0.75)
    options.add_argument("--longest", type=int, default=196608, help="not tried beyond")
    options.add_argument("--grain", type=int, default=1024)
    options.add_argument("--guess", type=int, help="tokens; tried first, instead of the meter's")
    options.add_argument("--limit-seconds", type=float, default=float("inf"))
    chosen = options.parse_args(arguments)
    device = "none" if chosen.predict else chosen.device
    rows = Rows(chosen.out, "largest_context", device, predicted=chosen.predict)
    until = time.monotonic() + chosen.limit_seconds
    for name in chosen.settings:
        case = case_of(chosen.shape, name, device, chosen.dtype, chosen.quantize)
        caps = [cap for cap in chosen.caps if not rows.has(name_of(case, cap, name), "qft")]
        if not caps:
            continue
        if chosen.predict:
            add_predictions(rows, case, name, caps, chosen.outside_gib)
            continue
        try:
            steps = Steps(case, until)
        except (ModuleNotFoundError, RuntimeError) as error:
            for cap in caps:
                settings = settings_of(case, cap, chosen.outside_gib)
                rows.add(name_of(case, cap, name), "qft", settings, reason=reason_of(error))
            continue
        for cap in caps:
            if time.monotonic() < until:
                measure(rows, steps, case, name, cap, chosen.outside_gib, chosen.longest,
                        chosen.grain, chosen.guess or predicted_tokens(name_of(case, cap, name)),
                        )  # fmt: skip
        del steps
        gc.collect()
        reset_peaks(device)


if __name__ == "__main__":
    main()
