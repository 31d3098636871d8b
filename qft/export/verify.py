"""Does the artefact still know what training taught? Its logits against the reference's, measured.

The artefact is opened by another program's reader (transformers' own GGUF loader, its own
quantized loading), so that a mistake of the writer cannot be undone by the same mistake in reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from qft import models, quantization
from qft.errors import ModelError, VerificationError
from qft.files import write_json
from qft.lean.model_parts import device_of, writes_text

FILE = "verification.json"
_ROWS = 4  # rows a forward pass: their logits are what is held
_POSITIONS = 512  # positions compared at a time: [512, vocabulary] in float32, a few times
_IGNORED = -100
_FAR_BELOW = -1e4  # a logit that softmax makes nothing of, and that differs from itself by 0


@dataclass(frozen=True)
class Thresholds:
    """What a format may lose at most.

    Attributes:
        mean_kl: mean Kullback-Leibler divergence from the reference, in nats a position.
        p99_kl: its 99th percentile.
        top1: the least share of positions where both find the same token (or class) likeliest.
        perplexity_ratio: artefact's over reference's perplexity, at most.
    """

    mean_kl: float
    p99_kl: float
    top1: float
    perplexity_ratio: float


# About ten times what the formats cost on small trained models (they suffer most from rounding);
# a transposed, swapped or missing tensor costs hundreds of times as much.
THRESHOLDS = {
    "gguf:f32": Thresholds(1e-5, 1e-4, 0.999, 1.001),
    "gguf:f16": Thresholds(1e-3, 1e-2, 0.98, 1.01),
    "gguf:bf16": Thresholds(5e-3, 5e-2, 0.95, 1.02),
    "gguf:q8_0": Thresholds(1e-2, 1e-1, 0.95, 1.02),
    "bnb:int8": Thresholds(3e-2, 3e-1, 0.90, 1.05),
    "bnb:nf4": Thresholds(0.15, 1.5, 0.75, 1.15),
    "safetensors:fp32": Thresholds(1e-5, 1e-4, 0.999, 1.001),
    "safetensors:fp16": Thresholds(1e-3, 1e-2, 0.98, 1.01),
    "safetensors:bf16": Thresholds(5e-3, 5e-2, 0.95, 1.02),
}


@dataclass(frozen=True)
class Verification:
    """How far an artefact is from its reference.

    Attributes:
        format: what was verified.
        positions: how many predictions were compared.
        mean_kl: nats a position, of the artefact from the reference.
        p99_kl: the 99th percentile of the same.
        top1: share of positions with the same likeliest token or class.
        perplexity_reference: over the labels; None without any.
        perplexity: the artefact's.
        max_difference: the largest absolute difference of two logits.
        thresholds: what was allowed.
    """

    format: str
    positions: int
    mean_kl: float
    p99_kl: float
    top1: float
    perplexity_reference: float | None
    perplexity: float | None
    max_difference: float
    thresholds: Thresholds

    def problems(self) -> list[str]:
        """Every figure past its threshold, a phrase each; NaN is past every one."""
        limits = self.thresholds
        found = []
        if not self.mean_kl <= limits.mean_kl:
            found.append(f"mean KL {self.mean_kl:.4g}, allowed {limits.mean_kl:g}")
        if not self.p99_kl <= limits.p99_kl:
            found.append(f"99th percentile of KL {self.p99_kl:.4g}, allowed {limits.p99_kl:g}")
        if not self.top1 >= limits.top1:
            found.append(f"same first choice in {self.top1:.2%}, wanted {limits.top1:.1%}")
        if self.perplexity is not None and self.perplexity_reference is not None:
            ratio = self.perplexity / self.perplexity_reference
            if not ratio <= limits.perplexity_ratio:
                found.append(f"perplexity {self.perplexity:.4g} against "
                             f"{self.perplexity_reference:.4g}")  # fmt: skip
        return found

    def check(self) -> None:
        """Raises VerificationError (exit code 5) where a figure is past its threshold."""
        found = self.problems()
        if found:
            raise VerificationError(
                f"The exported model ({self.format}) is too far from what was trained.",
                found="; ".join(found),
                fix=_ADVICE.get(self.format, "export again from the original base and adapter; "
                                "if it persists, choose a format with more bits"),
            )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the verdict."""
        return {**asdict(self), "passed": not self.problems()}

    def write(self, folder: Path) -> None:
        """Writes verification.json beside the artefact."""
        write_json(folder / FILE, self.to_dict())


_ADVICE = {
    "bnb:nf4": "export to bnb:int8 or gguf:q8_0, which round less",
    "bnb:int8": "export to gguf:q8_0 or safetensors:bf16, which round less",
    "gguf:q8_0": "export to gguf:f16, which rounds less",
    "gguf:f16": "export to gguf:bf16 or gguf:f32",
}


def verify(
    reference: nn.Module,
    artefact: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    format: str,
    thresholds: Thresholds | None = None,
) -> Verification:
    """Compares two models' predictions over held-out rows; both are put in eval mode.

    Args:
        reference: what was trained (base and adapter, or the merged model).
        artefact: what :func:`read_back` opened.
        batches: ``input_ids`` [batch, length], ``attention_mask``, and ``labels`` where there are
            any: a language model is then compared only where the labels ask for a token.
        format: a key of THRESHOLDS.
        thresholds: instead of the format's own.

    Raises:
        VerificationError: there is nothing to compare, or the two models' outputs differ in shape.
    """
    for model in (reference, artefact):
        quantization.guard_cpu_kernels(model)
        model.eval()
    tally = _Tally()
    for batch in batches:
        for rows in _split_rows(batch):
            tally.add(*_predictions(reference, artefact, rows))
    return tally.result(format, thresholds or THRESHOLDS[format])


def _split_rows(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    for begin in range(0, batch["input_ids"].shape[0], _ROWS):
        yield {key: value[begin : begin + _ROWS] for key, value in batch.items()}


@torch.no_grad()
def _predictions(
    reference: nn.Module, artefact: nn.Module, rows: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both models' logits ``[positions, choices]`` and the labels ``[positions]``, on the CPU."""
    labels = rows.get("labels")
    two_halves = _has_decoder(reference) and writes_text(reference)
    places = ("start_positions", "end_positions")
    left_out = places if two_halves else (*places, "labels")
    inputs = {key: value for key, value in rows.items() if key not in left_out}
    first, second = (
        _logits(model(**{k: v.to(_device(model)) for k, v in inputs.items()}), inputs)
        for model in (reference, artefact)
    )
    if first.shape != second.shape:
        raise VerificationError(
            "The artefact's predictions have another shape than the reference's.",
            found=f"{tuple(second.shape)}, reference {tuple(first.shape)}",
        )
    if places[0] in rows:  # two predictions a row
        return first, second, torch.cat([rows[name] for name in places])
    if first.dim() == 2 and labels is not None and labels.is_floating_point():
        return (*_as_choices(first, second), None)
    if first.dim() == 2:  # a classifier: one prediction a row
        return first, second, labels
    if labels is not None and (two_halves or hasattr(reference, "num_labels")):  # unshifted
        kept = labels != _IGNORED
        return first[kept], second[kept], labels[kept]
    if labels is not None:
        targets = labels[:, 1:]
        kept = targets != _IGNORED
    else:
        targets = rows["input_ids"][:, 1:]
        mask = rows.get("attention_mask")
        kept = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask[:, 1:].bool()
    return first[:, :-1][kept], second[:, :-1][kept], targets[kept]


def _logits(output: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a model answers, on the CPU; a reader of spans: starts above ends, padding left out."""
    if not hasattr(output, "start_logits"):
        return cast(Tensor, output.logits.cpu())
    hidden = inputs["attention_mask"].cpu() == 0
    sides = [side.float().cpu() for side in (output.start_logits, output.end_logits)]
    return torch.cat([side.masked_fill(hidden, _FAR_BELOW) for side in sides])


def _as_choices(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Several classes a row are as many yes-or-no choices; a number is above or below the mean."""
    if first.shape[1] == 1:
        first, second = first.float(), second.float()
        spread = first.std() if len(first) > 1 and first.std() > 0 else torch.tensor(1.0)
        mean = first.mean()
        first, second = (first - mean) / spread, (second - mean) / spread
    pairs = [side.reshape(-1, 1) for side in (first, second)]
    a, b = (torch.cat([torch.zeros_like(side), side], dim=1) for side in pairs)
    return a, b


def _has_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _device(model: nn.Module) -> torch.device:
    return device_of(model)


class _Tally:
    """Sums over positions; a float a position is all that is kept."""

    def __init__(self) -> None:
        self.kl: list[Tensor] = []
        self.same = 0
        self.losses = [0.0, 0.0]
        self.labelled = 0
        self.largest = 0.0

    def add(self, first: Tensor, second: Tensor, labels: Tensor | None) -> None:
        for begin in range(0, first.shape[0], _POSITIONS):
            part = slice(begin, begin + _POSITIONS)
            self._add(first[part].float(), second[part].float(),
                      None if labels is None else labels[part])  # fmt: skip

    def _add(self, first: Tensor, second: Tensor, labels: Tensor | None) -> None:
        difference = (first - second).abs().max().item()
        # max() would drop a NaN that comes second; a NaN must stay
        self.largest = difference if difference != difference else max(self.largest, difference)
        self.same += int((first.argmax(-1) == second.argmax(-1)).sum())
        logs = [logits.log_softmax(-1) for logits in (first, second)]
        self.kl.append((logs[0].exp() * (logs[0] - logs[1])).sum(-1).clamp(min=0))
        if labels is not None:
            self.labelled += labels.numel()
            for side, log in enumerate(logs):
                self.losses[side] -= log.gather(-1, labels[:, None].long()).double().sum().item()

    def result(self, format: str, thresholds: Thresholds) -> Verification:
        divergence = torch.cat(self.kl).double() if self.kl else torch.empty(0)
        count = divergence.numel()
        if count == 0:
            raise VerificationError(
                "There is no position to compare.", fix="give held-out rows with labels"
            )
        perplexities = [_exp(loss / self.labelled) if self.labelled else None
                        for loss in self.losses]  # fmt: skip
        rank = max(0, math.ceil(0.99 * count) - 1)
        ordered = divergence.nan_to_num(nan=math.inf).sort().values
        return Verification(
            format=format,
            positions=count,
            mean_kl=divergence.mean().item(),
            p99_kl=ordered[rank].item(),
            top1=self.same / count,
            perplexity_reference=perplexities[0],
            perplexity=perplexities[1],
            max_difference=self.largest,
            thresholds=thresholds,
        )


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def read_back(path: Path | str, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Opens an exported model with a reader that is not qft's own writer's, in eval mode.

    Args:
        path: a ``.gguf`` file, a folder that holds one, or a model folder.
        dtype: of the arithmetic; None is float32 for GGUF and what config.json says otherwise.

    Raises:
        ModelError: it cannot be opened.
    """
    path = Path(path)
    file = gguf_file(path)
    if file is not None:
        return _read_gguf(file, dtype or torch.float32)
    config = models.read_config(path)
    task = models.task_of(config)
    stored = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    chosen = dtype or getattr(torch, stored, torch.float32)
    spec = models.ModelSpec(source=str(path), task=task, dtype=chosen)
    return models.open_model(path, spec)


def gguf_file(path: Path) -> Path | None:
    """The GGUF file a path names or, as a folder without other weights, holds; or None."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    return files[0] if files and not any(path.glob("*.safetensors")) else None


def _read_gguf(file: Path, dtype: torch.dtype) -> nn.Module:
    """Through transformers' GGUF loader, settings included: they are part of what is verified.

    Where the file says what that loader does not read (a rotary scaling, biases), the settings come
    from the config.json beside it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {}
    if _needs_config(file.parent):
        options["config"] = AutoConfig.from_pretrained(file.parent)
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=dtype, **options
        )
    except Exception as error:  # broken files make that loader raise anything
        raise ModelError(
            "The GGUF file cannot be opened by transformers.",
            where=file,
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}",
            fix="run it with llama.cpp",
        ) from error
    return model.eval().requires_grad_(False)


def _needs_config(folder: Path) -> bool:
    if not (folder / "config.json").is_file():
        return False
    values = models.read_config(folder)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    scaled = rope.get("rope_type", rope.get("type", "default")) != "default"
    return bool(scaled or values.get("attention_bias") or values.get("mlp_bias"))
