"""`prepare`: a model and a strategy become a model that trains; `unprepare` takes it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from qft import quantization
from qft.attention_interface import route_attention
from qft.errors import RecipeError
from qft.lean.checkpointing import (
    Choice,
    checkpointed_layers,
    install_checkpointing,
    remove_checkpointing,
)
from qft.lean.dropout import DropoutClock, install_dropout, remove_dropout
from qft.lean.engine import Engine, Savers, install_engine
from qft.lean.kept_zeros import keeps_zeros
from qft.lean.lora_linear import is_lora_layer
from qft.lean.model_parts import device_of
from qft.lean.offload import Place
from qft.lean.token_scores import answer_trl

if TYPE_CHECKING:  # it brings pydantic, which a model that PEFT has wrapped can do without
    from qft.strategy import Context, Strategy

Checkpointing = Literal["auto", "none", "full"] | int
Offload = Literal["none"] | Place
_ATTRIBUTE = "_qft_prepared"


@dataclass
class Prepared:
    """What `prepare` left on a model.

    Attributes:
        strategy: what was attached, if it was attached here.
        clock: tells the model's dropout layers the moment.
        checkpointing: whether activations are recomputed.
        offload: where the inputs of recomputed layers wait.
        engine: the lean engine's parts in the model.
        notes: what a user should know, a sentence each.
    """

    strategy: Strategy | None
    clock: DropoutClock
    checkpointing: bool
    offload: Offload
    engine: Engine
    notes: tuple[str, ...]


def prepare(
    model: nn.Module,
    strategy: Strategy | None = None,
    *,
    checkpointing: Checkpointing = "auto",
    offload: Offload = "none",
    savers: Savers | None = None,
    context: Context | None = None,
) -> nn.Module:
    """Attaches ``strategy`` and makes the model ready for ``model(**batch).loss.backward()``.

    Works in your own loop, in a Trainer, in TRL, and on the meta device. Every module of the
    returned model is in training mode. In that mode a language model that is given labels returns
    its loss and no logits.

    Args:
        model: from ``from_pretrained``; it is changed in place.
        strategy: for example ``LoRA(rank=16)`` from :mod:`adapters.lora`; None for a model that
            PEFT has wrapped already, or whose trained parameters are chosen.
        checkpointing: recompute the layers' activations in the backward pass; ``auto`` is ``full``,
            a number is how many of the layers do.
        offload: where the inputs of recomputed layers wait: on the device, the host or the disk.
        savers: which parts of the lean engine to use; None is all.
        context: what a strategy may need: total steps, seed, calibration batches.

    Raises:
        RecipeError: nothing in this model matches the strategy, or it is prepared already.
    """
    if prepared(model) is not None:
        raise RecipeError("This model is prepared already.", fix="qft.unprepare(model) first")
    layers = isinstance(checkpointing, int) and not isinstance(checkpointing, bool)
    known = checkpointing in ("auto", "none", "full") or (layers and int(checkpointing) >= 0)
    if not known:
        raise RecipeError("No such checkpointing.", where="checkpointing", found=checkpointing,
                          fix="auto, none, full or a number of layers")  # fmt: skip
    if offload not in ("none", "host", "disk"):
        raise RecipeError("No such place.", where="offload", found=offload,
                          fix="none, host or disk")  # fmt: skip
    quantization.guard_cpu_kernels(model)
    attached = model if strategy is None else strategy.attach(model, context or _no_context())
    require_trained(attached, strategy)
    inner = inner_model(attached)
    recompute = checkpointing not in ("none", 0) and _enable_checkpointing(
        inner, checkpointing, offload
    )
    clock = DropoutClock(context.seed if context is not None else 0)
    install_dropout(attached, clock)
    engine = install_engine(
        inner,
        quantization.frozen_maker(),
        savers or Savers(),
        quantization.dequantized,
        route_attention,
    )
    if engine.loss is not None:
        engine.hooks.append(answer_trl(attached, engine.loss))
    notes = (
        *_left_to_peft(inner),
        *_notes(inner, recompute, checkpointing, offload),
        *engine.notes,
    )
    setattr(attached, _ATTRIBUTE, Prepared(strategy, clock, recompute, offload, engine, notes))
    attached.train()
    return attached


def _no_context() -> Context:
    from qft.strategy import Context

    return Context()


def require_trained(model: nn.Module, strategy: Strategy | None) -> None:
    """Refuses an attached strategy that has left nothing to train.

    Raises:
        RecipeError: every parameter is frozen.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise RecipeError(
            "Nothing would train: the strategy matches no parameter of this model.",
            where=f"strategy: {strategy.name if strategy else None}",
            found=type(inner_model(model)).__name__,
        )


def unprepare(model: nn.Module) -> nn.Module:
    """Takes the engine out again; the adapters stay, as ``strategy.attach`` made them."""
    state = prepared(model)
    if state is None:
        raise RecipeError("This model is not prepared.", fix="qft.prepare(model, strategy) first")
    if _ATTRIBUTE not in model.__dict__:  # a wrapper's, such as DDP
        unprepare(model.module)  # type: ignore[arg-type]
        return model
    state.engine.remove()
    remove_dropout(model)
    if state.checkpointing:
        inner = inner_model(model)
        remove_checkpointing(inner)
        if not checkpointed_layers(inner):
            inner.gradient_checkpointing_disable()
    delattr(model, _ATTRIBUTE)
    return model


def prepared(model: nn.Module) -> Prepared | None:
    """What `prepare` left on the model, looked for through DDP's wrapper as well."""
    inner = getattr(model, "module", model)
    found: Prepared | None = getattr(inner, "__dict__", {}).get(_ATTRIBUTE)
    return found


def inner_model(model: nn.Module) -> Any:
    """The transformers model below PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _enable_checkpointing(inner: Any, asked: Checkpointing, offload: Offload) -> bool:
    layers = len(checkpointed_layers(inner))
    if layers:
        recompute_lowest(inner, layers if isinstance(asked, str) else min(asked, layers), offload)
        return True
    if not getattr(inner, "supports_gradient_checkpointing", False):
        return False
    inner.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers makes the embeddings' output require a gradient, which only reentrant
    # checkpointing needs; it would send the backward pass through every frozen layer
    inner.disable_input_require_grads()
    return True


def recompute_lowest(inner: nn.Module, count: int, offload: Offload) -> None:
    """Lets the ``count`` lowest layers recompute their activations and the others keep them.

    The lowest: what the upper ones keep is gone by the time these are recomputed.
    """
    choice: Choice = "recompute" if offload == "none" else "offload"
    others = len(checkpointed_layers(inner)) - count
    choices: list[Choice] = [choice] * count + ["keep"] * others
    install_checkpointing(inner, choices, place="disk" if offload == "disk" else "host")


def stock_dropouts(model: nn.Module) -> list[str]:
    """The settings by which a model drops attention weights, from the ordinary generator."""
    inner = inner_model(model)
    config = getattr(inner, "config", None)
    parts = (config, getattr(config, "encoder", None), getattr(config, "decoder", None))
    names = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop",
             "dropout_rate")  # fmt: skip
    return [name for name in names if any(getattr(part, name, 0) for part in parts)]


def _left_to_peft(inner: Any) -> list[str]:
    """LoRA layers of a kind the engine does not know, which cost what they cost in PEFT."""
    layers = [module for module in inner.modules() if getattr(module, "lora_A", None)]
    others = [m for m in layers if not (is_lora_layer(m) and _is_known(m))]
    if not others:
        return []
    return [
        f"{len(others)} of {len(layers)} adapters keep PEFT's own code (AdaLoRA, DoRA, Conv1D)."
    ]


def _is_known(layer: Any) -> bool:
    return keeps_zeros(layer) or not getattr(layer, "lora_variant", None)


def _notes(inner: Any, recompute: bool, asked: Checkpointing, offload: Offload) -> list[str]:
    notes = []
    if asked not in ("none", 0) and not recompute:
        notes.append("This model cannot recompute its activations; checkpointing stays off.")
    if offload == "host" and device_of(inner).type == "cpu":
        notes.append("The model is on the host already; memory.offload: host saves nothing.")
    if used := stock_dropouts(inner):
        notes.append(
            f"{used[0]} draws from the ordinary generator: another micro-batch gives "
            "statistically, not bitwise, the same training."
        )
    return notes
