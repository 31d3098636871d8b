"""Which base an adapter is folded into: the original one, or the quantized one that training saw.

A quantized base is the original and the error of its rounding. An adapter trained on it has learned
on top of that error, and may have learned to make up for it; which of the two bases suits it better
is measured, with the adapter beside each, on held-out rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qft import hardware, models, quantization
from qft.adapter_folder import AdapterFolder, open_adapter_model
from qft.data.tasks import TASKS, ExampleSet, pad_id
from qft.errors import ModelError, RecipeError
from qft.evaluation import evaluate
from qft.merging.rounded_base import Rounding, layers_of
from qft.progress import QUIET, Reporter
from qft.shards import ShardedCheckpoint

WORDS = ("auto", "dequantized", "original")
BESIDE = "beside"  # not merged at all: see qft.export.beside
_UNMEASURED = "dequantized"  # what training saw: it cannot surprise (docs/merging.md)
_JUDGED_ROWS = 128  # held-out rows that the two bases are compared on at most


@dataclass(frozen=True)
class BaseChoice:
    """The base that was taken.

    Attributes:
        onto: ``original``, ``dequantized`` or ``beside``.
        why: a sentence.
        loss: of the unmerged adapter on each base, where it was measured.
        rows: how many held-out rows that was measured on.
    """

    onto: str
    why: str
    loss: dict[str, float] | None = None
    rows: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return asdict(self)

    def say(self, reporter: Reporter) -> None:
        """Prints it in a line."""
        reporter.say(f"base: {self.onto} ({self.why})")


def require_word(onto: str) -> None:
    """Raises RecipeError where there is no such choice of a base."""
    if onto not in WORDS:
        raise RecipeError("There is no such base to merge into.", where="--base", found=onto,
                          fix=", ".join(WORDS))  # fmt: skip


def is_stored_quantized(folder: Path) -> bool:
    """Whether a model folder holds quantized weights."""
    return bool(models.read_config(folder).get("quantization_config"))


def may_measure(found: AdapterFolder, onto: str) -> bool:
    """Whether `auto` has two bases to choose from."""
    return (
        onto == "auto" and trained_on(found) != "none" and not is_stored_quantized(found.base)
        and found.strategy.mergeable
    )  # fmt: skip


def trained_on(found: AdapterFolder) -> str:
    """How the base was quantized in training: ``none``, ``nf4``, ``fp4`` or ``int8``."""
    if is_stored_quantized(found.base):
        return models.held_as(models.read_config(found.base), "none")
    return str((found.card or {}).get("quantize", "none"))


def choose_base(
    found: AdapterFolder, onto: str, rows: ExampleSet | None, reporter: Reporter
) -> BaseChoice:
    """The base to merge into.

    Args:
        onto: one of WORDS.
        rows: held-out rows for `auto`; None where there are none.

    Raises:
        ModelError: the original base is asked for, and only a quantized one is at hand.
        RecipeError: the dequantized base is asked for, and training saw no quantized one.
    """
    require_word(onto)
    kind = trained_on(found)
    if is_stored_quantized(found.base):
        if onto == "original":
            raise ModelError(
                "The base is stored quantized, and the original one is not at hand.",
                where=found.base,
                found=f"quantization_config: {kind}",
                fix="name the unquantized model: --base ORIGINAL; or take what training saw: "
                "--base dequantized",
            )
        return BaseChoice("dequantized", "the base is stored quantized; its original is not here")
    if kind == "none":
        if onto == "dequantized":
            raise RecipeError(
                "The adapter was not trained on a quantized base, as far as its card says.",
                where="--base dequantized",
                found=found.folder,
                fix="--base original",
            )
        return BaseChoice("original", "it is what the adapter was trained on")
    if onto != "auto":
        return BaseChoice(onto, "asked for")
    return _measure(found, rows, reporter)


def choose_for_bnb(found: AdapterFolder, kind: str, onto: str, fuse: bool) -> BaseChoice:
    """The base of an export to ``bnb:<kind>``.

    A change that is quantized together with the original weights survives; put upon dequantized
    ones, which sit on the grid already, it snaps back. So the original is quantized with the change
    where it is at hand; else the quantized base stays as it is, with the adapter beside it.

    Args:
        fuse: quantize the dequantized base with the change in it all the same.

    Raises:
        ModelError: the base is stored quantized in another way than ``kind``.
        RecipeError: what is asked for contradicts itself.
    """
    require_word(onto)
    if fuse:
        if onto == "original":
            raise RecipeError("--fuse puts the adapter upon the dequantized base.",
                              where="--fuse", found="--base original",
                              fix="leave one of them out")  # fmt: skip
        choice = choose_base(found, "dequantized", None, QUIET)
        return replace(choice, why="--fuse: the dequantized base is quantized again")
    if not is_stored_quantized(found.base):
        if onto == "dequantized":
            raise RecipeError(
                "Quantizing what was dequantized rounds the adapter away.",
                where="--base dequantized",
                fix="--base original; or --fuse, which does it and says what it costs",
            )
        return BaseChoice("original", "original and change are quantized together")
    held = trained_on(found)
    if onto == "original":
        return choose_base(found, onto, None, QUIET)  # says what is missing
    if held != kind:
        raise ModelError(
            "The base is stored quantized in another way, and the original one is not at hand.",
            where=found.base,
            found=f"stored {held}, asked for {kind}",
            fix=f"--format bnb:{held} keeps it, with the adapter beside it; or name the "
            "unquantized model: --base ORIGINAL; or --fuse, which rounds twice",
        )
    return BaseChoice(BESIDE, "only the quantized base is here: it stays byte for byte as it is, "
                      "with the adapter beside it")  # fmt: skip


def choose_plain(folder: Path, format: str, onto: str, fuse: bool) -> BaseChoice | None:
    """How a model without an adapter is exported; None is as it is stored.

    Raises:
        ModelError: the model is stored quantized, and what is asked for needs its original.
        RecipeError: there is no adapter that a dequantized base could be for.
    """
    if not is_stored_quantized(folder):
        if onto == "dequantized" or fuse:
            raise RecipeError("The model is not quantized, and there is no adapter.",
                              where="--fuse" if fuse else "--base dequantized", found=folder,
                              fix="leave it out")  # fmt: skip
        return None
    if onto == "original" or format.startswith("bnb:"):
        raise ModelError(
            "The model is stored quantized; quantizing it again would round it twice.",
            where=folder,
            found=f"quantization_config: {models.held_as(models.read_config(folder), 'none')}",
            fix="export the unquantized model",
        )
    return BaseChoice("dequantized", "the model is stored quantized")


def _measure(found: AdapterFolder, rows: ExampleSet | None, reporter: Reporter) -> BaseChoice:
    if rows is None:
        return BaseChoice(_UNMEASURED, "not measured: no held-out rows; --data FILE gives some")
    dtype = comparison_dtype(found.base)
    if not _fits(found.base, dtype):
        return BaseChoice(_UNMEASURED, "not measured: the model does not fit into memory whole")
    part = rows.first(_JUDGED_ROWS)
    spec = found.spec(dtype=dtype)
    loss = {
        "original": _loss(found, replace(spec, quantize="none"), part, reporter),
        "dequantized": _loss(found, spec, part, reporter),
    }
    taken = "dequantized" if loss["dequantized"] < loss["original"] else "original"
    why = " against ".join(f"{loss[name]:.4f} on the {name}" for name in sorted(loss, key=loss.get))  # type: ignore[arg-type]
    return BaseChoice(taken, f"loss of the unmerged adapter: {why} base", loss, len(part.examples))


def _loss(
    found: AdapterFolder, spec: models.ModelSpec, rows: ExampleSet, reporter: Reporter
) -> float:
    model = open_adapter_model(found, spec)
    on = "original" if spec.quantize == "none" else "quantized"
    with reporter.bar(f"adapter on the {on} base", len(rows.examples)) as bar:
        metrics = evaluate(
            model, rows.examples, TASKS[spec.task],
            pad_token_id=pad_id(models.open_tokenizer(found.base)),
            labels=rows.labels, progress=bar.advance,
        )  # fmt: skip
    return metrics["loss"]


def rounding_of(found: AdapterFolder, skeleton: nn.Module) -> Rounding:
    """How training had quantized the original base at hand.

    A base that was stored quantized when the adapter was trained was made of the original in its
    own dtype, with the layers of its own architecture; one that was quantized on loading was
    brought to the run's dtype before.
    """
    card = found.card or {}
    if card.get("base_fingerprint") != models.fingerprint(found.base):
        stored = models.build_skeleton(models.read_config(found.base))
        kept = quantization.unquantized_modules(stored)
        return Rounding(card["quantize"], layers_of(found.base, stored, kept))
    needs = found.strategy.needs(skeleton)
    kept = quantization.unquantized_modules(skeleton, needs.full_precision)
    dtype = models.DTYPES[card["dtype"]]
    return Rounding(card["quantize"], layers_of(found.base, skeleton, kept), dtype)


def comparison_dtype(base: Path) -> torch.dtype:
    """float32 where two such models fit, so that only what is compared is measured."""
    free = hardware.free_memory_bytes(hardware.choose().device)
    fits = free is None or 2 * 4 * _weights(base) < free / 2
    return torch.float32 if fits else torch.bfloat16


def _fits(base: Path, dtype: torch.dtype) -> bool:
    """Whether the unquantized base can be opened whole, with as much again for running it."""
    free = hardware.free_memory_bytes(hardware.choose().device)
    return free is None or dtype.itemsize * _weights(base) < free / 2


def _weights(base: Path) -> int:
    with ShardedCheckpoint(base) as checkpoint:
        return sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())


def place_and_word(values: Sequence[str]) -> tuple[str | None, str]:
    """What ``--base`` says, once or twice: a place (or None) and one of WORDS.

    Raises:
        RecipeError: two places, or two words.
    """
    words = [value for value in values if value in WORDS]
    places = [value for value in values if value not in WORDS]
    if len(words) > 1 or len(places) > 1:
        raise RecipeError(
            "--base takes one place and one word.",
            where="--base",
            found=", ".join(values),
            fix=f"FOLDER_OR_HUB_ID, {', '.join(WORDS)}",
        )
    return (places[0] if places else None), (words[0] if words else "auto")
