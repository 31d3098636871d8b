"""`prepare`: a model and a strategy become a model that trains; `unprepare` takes it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from qft import quantization
from qft.errors import RecipeError
from qft.lean.dropout import DropoutClock, install_dropout, remove_dropout
from qft.strategy import Context, Strategy

Checkpointing = Literal["auto", "none", "full"]
_ATTRIBUTE = "_qft_prepared"


@dataclass
class Prepared:
    """What `prepare` left on a model.

    Attributes:
        strategy: what was attached.
        clock: tells the model's dropout layers the moment.
        checkpointing: whether activations are recomputed.
        notes: what a user should know, a sentence each.
    """

    strategy: Strategy
    clock: DropoutClock
    checkpointing: bool
    notes: tuple[str, ...]


def prepare(
    model: nn.Module,
    strategy: Strategy,
    *,
    checkpointing: Checkpointing = "auto",
    context: Context | None = None,
) -> nn.Module:
    """Attaches ``strategy`` and makes the model ready for ``model(**batch).loss.backward()``.

    Works in your own loop, in a Trainer, in TRL, and on the meta device. Every module of the
    returned model is in training mode.

    Args:
        model: from ``from_pretrained``; it is changed in place.
        strategy: for example ``LoRA(rank=16)`` from :mod:`adapters.lora`.
        checkpointing: recompute the layers' activations in the backward pass; ``auto`` is ``full``.
        context: what a strategy may need: total steps, seed, calibration batches.

    Raises:
        RecipeError: nothing in this model matches the strategy, or it is prepared already.
    """
    if prepared(model) is not None:
        raise RecipeError("This model is prepared already.", fix="qft.unprepare(model) first")
    if checkpointing not in ("auto", "none", "full"):
        raise RecipeError("No such checkpointing.", where="checkpointing", found=checkpointing,
                          fix="auto, none or full")  # fmt: skip
    context = context or Context()
    quantization.guard_cpu_kernels(model)
    attached = strategy.attach(model, context)
    require_trained(attached, strategy)
    recompute = checkpointing != "none" and _enable_checkpointing(attached)
    clock = DropoutClock(context.seed)
    install_dropout(attached, clock)
    notes = tuple(_notes(attached, recompute, checkpointing))
    setattr(attached, _ATTRIBUTE, Prepared(strategy, clock, recompute, notes))
    attached.train()
    return attached


def require_trained(model: nn.Module, strategy: Strategy) -> None:
    """Refuses an attached strategy that has left nothing to train.

    Raises:
        RecipeError: every parameter is frozen.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise RecipeError(
            "Nothing would train: the strategy matches no parameter of this model.",
            where=f"strategy: {strategy.name}",
            found=type(_inner(model)).__name__,
        )


def unprepare(model: nn.Module) -> nn.Module:
    """Takes the engine out again; the adapters stay, as ``strategy.attach`` made them."""
    state = prepared(model)
    if state is None:
        raise RecipeError("This model is not prepared.", fix="qft.prepare(model, strategy) first")
    remove_dropout(model)
    if state.checkpointing:
        inner = _inner(model)
        name = (
            "activation_checkpointing_disable"
            if hasattr(inner, "activation_checkpointing_disable")
            else "gradient_checkpointing_disable"
        )
        getattr(inner, name)()
    delattr(model, _ATTRIBUTE)
    return model


def prepared(model: nn.Module) -> Prepared | None:
    """What `prepare` left on the model, looked for through DDP's wrapper as well."""
    inner = getattr(model, "module", model)
    found: Prepared | None = getattr(inner, "__dict__", {}).get(_ATTRIBUTE)
    return found


def _inner(model: nn.Module) -> Any:
    """The transformers model below PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _enable_checkpointing(model: nn.Module) -> bool:
    inner = _inner(model)
    if not getattr(inner, "supports_gradient_checkpointing", False):
        return False
    settings = {"use_reentrant": False}
    if hasattr(inner, "activation_checkpointing_enable"):  # transformers 5.18 and later
        inner.activation_checkpointing_enable(settings)
    else:
        inner.gradient_checkpointing_enable(settings)
    # transformers makes the embeddings' output require a gradient, which only reentrant
    # checkpointing needs; it would send the backward pass through every frozen layer
    inner.disable_input_require_grads()
    return True


def _notes(model: nn.Module, recompute: bool, asked: str) -> list[str]:
    notes = []
    if asked != "none" and not recompute:
        notes.append("This model cannot recompute its activations; checkpointing stays off.")
    config = getattr(_inner(model), "config", None)
    stock = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
    used = [name for name in stock if getattr(config, name, 0)]
    if used:
        notes.append(
            f"{used[0]} draws from the ordinary generator: another micro-batch gives "
            "statistically, not bitwise, the same training."
        )
    return notes
