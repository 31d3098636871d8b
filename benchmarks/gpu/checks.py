"""Before any figure: does the engine compute what plain PEFT computes, on this device?

    python benchmarks/gpu/checks.py

A line a check; the script fails if one of them does. The models are small, the gradients real.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_models import Case, batch_of, is_installed, random_model, with_lora
from gpu_rows import Rows, parser, reason_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from qft.lean.checkpointing import checkpointed_layers
from qft.lean.engine import Savers
from qft.lean.int8_head import Int8Head
from qft.preparation import inner_model, prepare, prepared
from qft.quantization import FourBit, Scratch, dequantized

Gradients = dict[str, Tensor]
OFF = Savers(label_loss=False, lora=False, gated_mlp=False, norms=False)
# relative distance of all gradients; bfloat16 is judged by its distance from float32, see `rounded`
EXACT, QUANTIZED = 1e-5, 1e-4


PARTS = ("label_loss", "lora", "gated_mlp", "norms", "host_embeddings", "int8_head")
TILED = 400  # tokens of two sequences that make several tiles of an MLP


class CheckError(AssertionError):
    """A check found something else than it should."""


def model_of(case: Case, dropout: float = 0.0) -> Any:
    """A small model whose adapters are not at their neutral start."""
    model = with_lora(random_model(case), case, dropout)
    generator = torch.Generator(case.device).manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.02, generator=generator)
    return model.train()


def lean(case: Case, dropout: float = 0.0, **settings: Any) -> Any:
    """The same under the engine, with all that was asked for: what does not fit stays away."""
    savers = settings.get("savers", Savers())
    model = prepare(model_of(case, dropout), **settings)
    state = prepared(model)
    assert state is not None
    engine = state.engine
    there = {name for name, modules in engine.modules.items() if modules}
    there |= {"label_loss"} if engine.loss is not None else set()
    there |= {"int8_head"} if engine.plain_head is not None else set()
    wanted = {name for name in PARTS if getattr(savers, name)}
    if wanted - there or engine.notes:
        raise CheckError(f"not installed: {sorted(wanted - there)} {engine.notes}")
    return model


def gradients(model: Any, case: Case) -> Gradients:
    """Of one step, in float32."""
    model.zero_grad(set_to_none=True)
    batch = batch_of(case, 300)
    labels = batch["labels"].clone()
    labels[:, : case.length // 4] = -100
    model(input_ids=batch["input_ids"], labels=labels).loss.backward()
    found = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    if not found or not all(bool(g.isfinite().all()) for g in found.values()):
        raise CheckError("gradients are missing or not finite")
    if not any(bool(g.any()) for g in found.values()):
        raise CheckError("all gradients are zero")
    return {name.replace("_orig_mod.", ""): gradient for name, gradient in found.items()}


def distance(found: Gradients, wanted: Gradients) -> float:
    """Relative, of all gradients together."""
    if set(found) != set(wanted):
        raise CheckError("other parameters have gradients")
    apart = {n: float((found[n].cpu() - wanted[n].cpu()).square().sum()) for n in wanted}
    size = sum(float(gradient.square().sum()) for gradient in wanted.values())
    whole = float((sum(apart.values()) / size) ** 0.5)
    if whole > EXACT:  # where to look, if it is too much
        furthest = max(apart, key=lambda name: apart[name])
        print(f"  {whole:.1e} apart, {furthest} most", flush=True)
    return whole


def within(found: float, bound: float) -> str:
    """The distance as text.

    Raises:
        CheckError: it is more than the bound.
    """
    if not found <= bound:
        raise CheckError(f"gradients are {found:.1e} apart, allowed are {bound:.0e}")
    return f"{found:.1e} apart"


def saver(case: Case, **settings: Any) -> str:
    """One saver against plain PEFT."""
    wanted = gradients(model_of(case), case)
    found = gradients(lean(case, **settings), case)
    bound = QUANTIZED if case.quantize != "none" else EXACT
    return within(distance(found, wanted), bound)


def rounded(case: Case, **settings: Any) -> str:
    """In bfloat16 the engine is no further from float32 than plain PEFT is, but for a quarter."""
    model = model_of(case)
    plain = gradients(model, case)
    truth = gradients(model.float(), case)
    engine = gradients(lean(case, **settings), case)
    found, allowed = distance(engine, truth), 1.25 * distance(plain, truth)
    return within(found, allowed) + f", plain PEFT {allowed / 1.25:.1e}"


def offload(case: Case, place: str) -> str:
    """Copies beside the computation change nothing, in step after step, to the last bit.

    With attention by its formula: a fused kernel's backward pass adds in no fixed order on a GPU.
    """
    with sdpa_kernel(SDPBackend.MATH):
        wanted = gradients(lean(case), case)
        if (found := distance(gradients(lean(case), case), wanted)) != 0:
            raise CheckError(f"without any copies gradients are {found:.1e} apart")
        model = lean(case, offload=place)
        for _ in range(5):
            if (found := distance(gradients(model, case), wanted)) != 0:
                raise CheckError(f"gradients are {found:.1e} apart, must be equal")
    return "equal in 5 steps"


def memory_of_steps(case: Case) -> str:
    """Steps leave nothing behind, offloaded ones included."""
    if case.device != "cuda":
        return "skipped: counted on a GPU only"
    model = lean(case, offload="host")
    held = []
    for _ in range(4):
        gradients(model, case)
        model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    if held[-1] > held[1]:
        raise CheckError(f"allocated after each step: {held}")
    return f"{held[-1]} bytes after each step"


def dropout(case: Case) -> str:
    """A recomputed layer drops what it dropped in the forward pass; so does an offloaded one."""
    found = []
    for checkpointing, place in (("none", "none"), ("full", "none"), ("full", "host")):
        settings: dict[str, Any] = {"checkpointing": checkpointing, "offload": place}
        model = lean(case, dropout=0.3, **settings)
        torch.manual_seed(3)
        found.append(gradients(model, case))
    without = gradients(lean(case), case)
    if distance(found[0], without) < 1e-3:
        raise CheckError("nothing was dropped")
    return within(max(distance(other, found[0]) for other in found[1:]), EXACT)


def random_state(case: Case) -> str:
    """A step with recomputation leaves the generators as one without."""
    states = []
    for checkpointing in ("none", "full"):
        model: Any = lean(case, checkpointing=checkpointing)  # type: ignore[arg-type]
        for layer in checkpointed_layers(inner_model(model)):
            layer.register_forward_pre_hook(_draw)
        torch.manual_seed(3)
        gradients(model, case)
        states.append(torch.rand(4, device=case.device))
    if not torch.equal(states[0], states[1]):
        raise CheckError("the generators are elsewhere")
    return "the same"


def _draw(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    torch.rand(3, device=inputs[0].device)


def int8_head(case: Case) -> str:
    """Gradients are those of plain PEFT with an output layer of the rounded weights."""
    model = model_of(case)
    head = inner_model(model).lm_head
    for start, block in Int8Head(head).blocks():
        head.weight.data[start : start + len(block)] = block
    wanted = gradients(model, case)
    found = gradients(lean(case, savers=Savers(int8_head=True)), case)
    return within(distance(found, wanted), EXACT)


def one_buffer(case: Case) -> str:
    """Weights dequantized into one buffer, over and over, are those that bitsandbytes makes."""
    if not is_installed("bitsandbytes"):
        return "skipped: bitsandbytes is not installed"
    model = random_model(replace(case, quantize="nf4"))
    scratch = Scratch()
    layers = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    for layer in (*layers, *reversed(layers)):
        x = torch.randn(5, layer.in_features, device=case.device, dtype=getattr(torch, case.dtype))
        wanted = nn.functional.linear(x, dequantized(layer).to(x.dtype))
        if not torch.equal(FourBit(layer, scratch).product(x), wanted):
            raise CheckError("another product")
    return f"{2 * len(layers)} products equal"


def all_checks(device: str) -> dict[str, Callable[[], str]]:
    """By name."""
    exact = Case("tiny", length=96, batch=2, rank=8, dtype="float32", device=device)
    rough = replace(exact, dtype="bfloat16")
    nf4 = replace(exact, quantize="nf4")
    parts = {
        "label_loss": replace(OFF, label_loss=True), "lora": replace(OFF, lora=True),
        "gated_mlp": replace(OFF, gated_mlp=True), "norms": replace(OFF, norms=True),
        "all": Savers(), "tiled_mlp": Savers(tiled_mlp=True),
        "host_embeddings": Savers(host_embeddings=True),
    }  # fmt: skip
    checks: dict[str, Callable[[], str]] = {}
    for name, savers in parts.items():
        kept: dict[str, Any] = {"savers": savers, "checkpointing": "none"}
        length = TILED if savers.tiled_mlp else exact.length
        of = partial(replace, length=length)
        checks[f"{name}, float32"] = partial(saver, of(exact), **kept)
        checks[f"{name}, bfloat16"] = partial(rounded, of(rough), **kept)
        checks[f"{name}, nf4"] = partial(saver, of(nf4), **kept)
    checks["int8_head, float32"] = partial(int8_head, exact)
    for place in ("none", "host", "disk"):
        checks[f"recomputed, offload {place}, float32"] = partial(saver, exact, offload=place)
        checks[f"recomputed, offload {place}, nf4"] = partial(saver, nf4, offload=place)
    long = replace(rough, length=2048)
    checks["offload host beside none"] = partial(offload, long, "host")
    checks["offload disk beside none"] = partial(offload, rough, "disk")
    checks["memory after steps"] = partial(memory_of_steps, long)
    checks["dropout is replayed"] = partial(dropout, exact)
    checks["random state"] = partial(random_state, exact)
    checks["one buffer for weights"] = partial(one_buffer, rough)
    return checks


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs them all; how many failed."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", help="words that a check's name holds")
    chosen = options.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = Rows(Path(chosen.out), "checks", chosen.device)
    failed = 0
    for name, check in all_checks(chosen.device).items():
        if chosen.only and not all(word in name for word in chosen.only):
            continue
        if "nf4" in name and not is_installed("bitsandbytes"):
            rows.add(name, "qft", {}, reason="bitsandbytes is not installed")
            continue
        try:
            rows.add(name, "qft", {}, passed=True, found=check())
        except Exception as error:
            failed += 1
            traceback.print_exc()
            rows.add(name, "qft", {}, passed=False, reason=reason_of(error))
    print("all checks passed" if not failed else f"{failed} CHECKS FAILED", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))
