"""The ways from a trained adapter to a model others run, and what each leaves of the training.

Every way is written by qft, read back from the disk by transformers, and its weights, dequantized,
are put into one plain model in float32: so what differs between two ways is what they store, and
no kernel's arithmetic. The reference is the adapter on the weights that training saw.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qft import quantization
from qft.card import CARD, read_card
from qft.data.tasks import TASKS
from qft.errors import VerificationError
from qft.export.delivery import export, merge
from qft.held_out import held_out_examples

BLOCKS = 64  # held-out blocks that are compared on
_BATCH = 16
Weights = dict[str, Tensor]  # float32, by module name


def write_way(way: str, run: Path, quantized: Path, data: Path, out: Path) -> dict[str, Any]:
    """Writes one way's folder; qft's report.

    A run that knows no quantized base (or whose base is to stay as it is stored) goes upon
    ``quantized`` as a plain PEFT folder: its card would insist on the very files it was trained on.

    Args:
        quantized: the base stored as nf4.
        data: held-out rows, for the verification that `nf4-fused` insists on.
    """
    if way == "bf16-original":
        return merge(run, out, onto="original")
    if way == "nf4-original":
        return export(run, out, format="bnb:nf4", verify=False)
    source, base = run, None
    if way == "nf4-beside" or (read_card(run / "adapter") or {})["quantize"] == "none":
        source, base = out.with_name("adapter"), str(quantized)
        shutil.copytree(run / "adapter", source, ignore=shutil.ignore_patterns(CARD))
    if way == "bf16-dequantized":
        return merge(source, out, base=base, onto="dequantized", dtype="bfloat16")
    fuse = way == "nf4-fused"
    with contextlib.suppress(VerificationError):  # the folder is there to look at
        return export(source, out, base=base, format="bnb:nf4", fuse=fuse, verify=fuse,
                      data=str(data) if fuse else None)  # fmt: skip
    return {}


def stored_weights(folder: Path) -> Weights:
    """What a model folder stands for, as transformers opens it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    found = {name: value.detach().float() for name, value in model.named_parameters()}
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            found[f"{name}.weight"] = quantization.dequantized(module).float()
    return found


def read_way(way: str, folder: Path) -> Weights:
    """The weights that a way's folder computes with."""
    if way != "nf4-beside":
        return stored_weights(folder)
    weights = stored_weights(folder / "base")
    return added(weights, changes_of(folder / "adapter"))


def changes_of(adapter: Path) -> Weights:
    """Δ of every weight that a PEFT LoRA folder changes."""
    from safetensors.torch import load_file

    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    scale = config["lora_alpha"] / config["r"]
    return {
        name.removeprefix("base_model.model.").replace(".lora_A", ""): scale
        * tensors[name.replace(".lora_A", ".lora_B")].float()
        @ value.float()
        for name, value in tensors.items()
        if ".lora_A" in name
    }


def added(weights: Weights, changes: Weights) -> Weights:
    """W + Δ, not rounded."""
    return {n: w + changes[n] if n in changes else w for n, w in weights.items()}


def requantized(weights: Weights, names: Weights) -> Weights:
    """The base alone, rounded to nf4 (once more) with doubly quantized scales."""
    import bitsandbytes.functional as functional

    found = {}
    for name in names:
        flat = weights[name].to(torch.bfloat16).reshape(1, -1)
        values, state = functional.quantize_4bit(flat, compress_statistics=True, quant_type="nf4")
        full = functional.dequantize_4bit(values, state)
        found[name] = full.reshape(weights[name].shape).float()
    return found


def rounding(base: Weights, changes: Weights, plain: Weights, stored: Weights) -> dict[str, float]:
    """What storing leaves of Δ; see :mod:`qft.export.delta_rounding` for both figures.

    Args:
        base: W, that Δ is added to.
        plain: what the same way stores without an adapter.
        stored: what it stores.
    """
    error = change = along = 0.0
    for name, delta in changes.items():
        error += float((stored[name] - base[name] - delta).double().square().sum())
        change += float(delta.double().square().sum())
        along += float(((stored[name] - plain[name]).double() * delta.double()).sum())
    return {"rounding": math.sqrt(error / change), "kept": along / change}


class Judge:
    """One plain float32 model that takes any weights, and the held-out rows of a run."""

    def __init__(self, original: Path, run: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(original)
        self._model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
        rows = held_out_examples(run, tokenizer, task="text", labels=None).examples[:BLOCKS]
        self._batches = [TASKS["text"].collate(rows[start : start + _BATCH], 0)
                         for start in range(0, len(rows), _BATCH)]  # fmt: skip
        self._reference: list[Tensor] = []

    def refer_to(self, weights: Weights) -> float:
        """Makes a model the reference; its loss."""
        self._reference = []
        losses = []
        for batch in self._batches:
            logs, labels = self._predict(weights, batch)
            self._reference.append(logs)
            losses.append(_nll(logs, labels))
        return float(torch.cat(losses).mean())

    def judge(self, weights: Weights) -> dict[str, float]:
        """Loss, mean KL from the reference in nats, share of positions with its first choice."""
        losses, divergences, same = [], [], []
        for batch, reference in zip(self._batches, self._reference, strict=True):
            logs, labels = self._predict(weights, batch)
            losses.append(_nll(logs, labels))
            divergences.append((reference.exp() * (reference - logs)).sum(-1))
            same.append((reference.argmax(-1) == logs.argmax(-1)).float())
        return {"loss": float(torch.cat(losses).mean()), "kl": float(torch.cat(divergences).mean()),
                "top1": float(torch.cat(same).mean())}  # fmt: skip

    @torch.no_grad()
    def _predict(self, weights: Weights, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[positions, vocabulary]`` and what came, where labels ask."""
        parameters = {n: weights[n] for n, _ in self._model.named_parameters()}
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
        output = torch.func.functional_call(
            self._model, parameters, (), {**inputs, "use_cache": False}, tie_weights=True
        )
        labels = batch["labels"][:, 1:]
        kept = labels != -100
        return output.logits[:, :-1][kept].log_softmax(-1), labels[kept]


def _nll(logs: Tensor, labels: Tensor) -> Tensor:
    return -logs.gather(-1, labels[:, None])[:, 0].double()
