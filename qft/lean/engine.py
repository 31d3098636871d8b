"""Puts the engine's parts into a model and takes them out again; each can be switched off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qft.lean.gated_mlp import LeanGatedMLP, is_gated_mlp, slope_of
from qft.lean.host_embeddings import HostLookup, move_back, move_to_host
from qft.lean.int8_head import Int8Head
from qft.lean.kept_zeros import KeptZerosForward, keeps_zeros
from qft.lean.lora_linear import LeanForward, MakeFrozen, is_lora_layer
from qft.lean.model_loss import ModelLoss, install_model_loss, remove_model_loss
from qft.lean.model_parts import CROSS_ATTENTION, output_embeddings
from qft.lean.norms import LeanNorm, norm_of
from qft.lean.patching import is_replaced, replace_forward, restore_forward
from qft.lean.shared_input import FAMILIES, Siblings


@dataclass(frozen=True)
class Savers:
    """Which parts of the engine are used.

    Attributes:
        label_loss: the loss over label positions only, in chunks.
        lora: LoRA layers by hand-written autograd.
        gated_mlp: gated MLPs that keep gate and up alone.
        norms: normalisations that keep their input alone.
        attention: on a CPU, attention by batched products, without padding between examples.
        tiled_mlp: gated MLPs run over a few tokens at a time; slower by one more run of them.
        host_embeddings: the table of token embeddings stays on the host.
        int8_head: the frozen output layer is held in 8 bits, which rounds the logits.
    """

    label_loss: bool = True
    lora: bool = True
    gated_mlp: bool = True
    norms: bool = True
    attention: bool = True
    tiled_mlp: bool = False
    host_embeddings: bool = False
    int8_head: bool = False


@dataclass
class Engine:
    """What was installed in a model.

    Attributes:
        loss: the model's loss, or None where it keeps its own.
        modules: those whose forward was replaced, by saver.
        notes: what was asked for and could not be done, a sentence each.
        hooks: to be removed with the rest.
        plain_head: the output layer that an 8-bit one took the place of.
        device: of the model.
        attention: the configs that name the engine's attention.
    """

    model: nn.Module
    loss: ModelLoss | None = None
    modules: dict[str, list[nn.Module]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)
    plain_head: nn.Module | None = None
    device: torch.device | None = None
    attention: list[Any] = field(default_factory=list)

    @property
    def flat(self) -> bool:
        """Whether the attention can be told the borders of examples in one row."""
        return bool(self.attention) and self.device is not None and self.device.type == "cpu"

    def remove(self) -> None:
        """Every module computes as before."""
        for hook in self.hooks:
            hook.remove()
        for module in self.modules.get("host_embeddings", []):
            assert self.device is not None
            move_back(module, self.device)
        for modules in self.modules.values():
            for module in modules:
                restore_forward(module)
        for config in self.attention:
            config._attn_implementation = "sdpa"
        if self.loss is not None:
            remove_model_loss(self.model)
        if self.plain_head is not None:
            assert self.device is not None
            model: Any = self.model
            model.set_output_embeddings(self.plain_head.to(self.device))
            model.tie_weights()
        self.modules, self.loss, self.plain_head, self.attention = {}, None, None, []


def install_engine(
    model: nn.Module,
    make_frozen: MakeFrozen,
    savers: Savers,
    dense_weight: Callable[[nn.Module], Tensor],
    route_attention: Callable[[nn.Module], list[Any]],
) -> Engine:
    """Installs what fits the model; what does not fit keeps computing as it did.

    Args:
        model: a transformers model, below PEFT's wrapper, with its adapters on.
        make_frozen: how to compute with a frozen linear layer; None where it is of no known kind.
        savers: the parts to use.
        dense_weight: the full weight of a quantized output layer.
        route_attention: sends a model's attention through the engine's own; the configs that say
            so now.
    """
    engine = Engine(model, device=next(model.parameters()).device)
    if savers.int8_head:
        _install_int8_head(engine)
    if savers.host_embeddings:
        _install_host_embeddings(engine)
    if savers.label_loss and output_embeddings(model) is not None:
        engine.loss = install_model_loss(model, dense_weight)
    if savers.attention:
        engine.attention = route_attention(model)
    kinds, siblings = _Kinds(), _Families(model)
    for module in list(model.modules()):
        if is_replaced(module):
            continue
        if savers.lora and (frozen := _frozen_base(module, make_frozen)) is not None:
            if keeps_zeros(module):
                _install(engine, "lora", module, KeptZerosForward, frozen)
                continue
            _install(engine, "lora", module, LeanForward, frozen, siblings.of(module, frozen))
        elif savers.norms and (kind := kinds.norm(module)) is not None:
            _install(engine, "norms", module, LeanNorm, *kind)
        elif savers.gated_mlp and kinds.is_gated_mlp(module):
            down: Any = module.down_proj
            base = down.get_base_layer() if hasattr(down, "get_base_layer") else down
            if (frozen := make_frozen(base)) is not None:
                slope = slope_of(module.act_fn)  # type: ignore[arg-type]
                _install(engine, "gated_mlp", module, LeanGatedMLP, frozen, savers.tiled_mlp, slope)
    return engine


def _install_int8_head(engine: Engine) -> None:
    """The plain output layer waits on the host, or in the token embeddings that it is tied to."""
    model: Any = engine.model
    plain = output_embeddings(model)
    if type(plain) is not nn.Linear or plain.weight.requires_grad:
        engine.notes.append("int8_head: the output layer trains or is no plain linear layer.")
        return
    engine.plain_head = plain
    model.set_output_embeddings(Int8Head(plain))
    tied = plain.weight is getattr(model.get_input_embeddings(), "weight", None)
    if not tied and not plain.weight.is_meta:
        plain.to("cpu")


def _install_host_embeddings(engine: Engine) -> None:
    model: Any = engine.model
    table, head = model.get_input_embeddings(), output_embeddings(model)
    assert engine.device is not None
    if any(p.requires_grad for p in table.parameters()):
        engine.notes.append("host_embeddings: the embeddings train, so they stay on the device.")
    elif getattr(head, "weight", None) is table.weight:
        engine.notes.append(
            "host_embeddings: the output layer is the same matrix and needs it on the device; "
            "with int8_head it has its own."
        )
    else:
        move_to_host(table)
        _install(engine, "host_embeddings", table, HostLookup, engine.device)


def _install(
    engine: Engine, saver: str, module: nn.Module, forward: Callable[..., Any], *settings: Any
) -> None:
    replace_forward(module, lambda plain: forward(module, *settings, plain))
    engine.modules.setdefault(saver, []).append(module)


def _frozen_base(module: Any, make_frozen: MakeFrozen) -> Any:
    """The frozen half of one of PEFT's LoRA layers; None for anything else."""
    return make_frozen(module.get_base_layer()) if is_lora_layer(module) else None


class _Families:
    """Which LoRA layers stand beside one another under names of one family."""

    def __init__(self, model: nn.Module) -> None:
        self._of: dict[nn.Module, Siblings] = {}
        for path, parent in model.named_modules():
            if set(path.split(".")) & set(CROSS_ATTENTION):
                continue  # its queries read another text than its keys and values
            for names in FAMILIES:
                layers = [child for name, child in parent.named_children() if name in names]
                layers = [layer for layer in layers if is_lora_layer(layer)]
                if len(layers) > 1:
                    self._of |= dict.fromkeys(layers, Siblings())

    def of(self, layer: nn.Module, frozen: Any) -> Siblings | None:
        """Those of a layer, itself now one of them."""
        found = self._of.get(layer)
        if found is not None:
            found.add(layer, frozen)
        return found


class _Kinds:
    """What a family's modules are: tried once a class, since a model has hundreds of them."""

    def __init__(self) -> None:
        self._norms: dict[tuple[type, Any], Any] = {}
        self._gated: dict[type, bool] = {}

    def norm(self, module: nn.Module) -> Any:
        """Epsilon and kind of a root-mean-square normalisation, else None."""
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        key = (type(module), epsilon)
        if key not in self._norms:
            self._norms[key] = norm_of(module)
        return self._norms[key]

    def is_gated_mlp(self, module: nn.Module) -> bool:
        """See `qft.lean.gated_mlp.is_gated_mlp`."""
        if not hasattr(module, "gate_proj"):
            return False
        if type(module) not in self._gated:
            self._gated[type(module)] = is_gated_mlp(module)
        return self._gated[type(module)]
