"""The chunked loss in a language model's own ``forward``, whatever its family.

While training with labels, the model's decoder runs as ever, but its output layer, instead of
making logits, hands the positions that have a label to `label_loss`. Since all this happens inside
the model's ``forward``, it passes through the wrappers of DDP and FSDP. What a family does between
logits and loss is known from its config; `install_model_loss` tries a short text both ways and
keeps the family's own loss where the two do not agree.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qft.lean.checkpointing import checkpointed_layers, paused
from qft.lean.int8_head import Int8Head
from qft.lean.label_loss import IGNORED, CrossEntropy, Head, LogitLoss, label_loss
from qft.lean.model_parts import is_encoder_decoder, output_embeddings
from qft.lean.patching import PlainForward, plain_forward, replace_forward, restore_forward
from qft.lean.token_scores import token_scores

PROBE_TOKENS = 9
Scored = Literal["ranks", "with-entropy", "states"]
# of the labels' own loss, and how many labels there are, makes what is minimised instead
Teaching = Callable[[CrossEntropy, int], LogitLoss]


@dataclass
class _Order:
    """What the model's forward asks of its output layer."""

    targets: Tensor  # [batch, positions], shifted already; IGNORED where there is none
    head: Head
    smoothing: float
    scored: Scored | None = None  # each position's log-probability and more, instead of a sum
    teaching: Teaching | None = None
    loss: Tensor | None = None  # the answer: a sum
    scores: dict[str, Tensor] | None = None  # or these


class ModelLoss:
    """The ``forward`` of a model with an output layer, and that of the output layer.

    Args:
        model: a transformers model that writes text.
        dense_weight: the full weight of an output layer that is stored quantized.
    """

    def __init__(
        self, model: nn.Module, dense_weight: Callable[[nn.Module], Tensor] | None = None
    ) -> None:
        self.model = model
        self.dense_weight = dense_weight
        head = output_embeddings(model)
        assert head is not None
        self.head: nn.Module = head
        self.shifted = not is_encoder_decoder(model) and not _reads_both_ways(model)
        self.order: _Order | None = None
        self.scored: Scored | None = None  # how the next call is to score each position
        self.fake_labels: int | None = None  # how many a batch of fake tensors has; None is all
        self.scale, self.softcap = after_logits(getattr(model, "config", None))
        self.signature = inspect.signature(type(model).forward)
        self.plain = plain_forward(model)
        self.plain_head = plain_forward(head)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own arguments; with labels, in training mode, ``logits`` is None.

        ``num_items_in_batch`` is what the sum is divided by (else the number of labels),
        ``shift_labels`` are labels that stand at the position that predicts them, and
        ``label_smoothing`` spreads a share of each label over the vocabulary. ``teaching`` puts
        another loss of the same logits in the labels' place, or mixes it in (`Teaching`).
        """
        names = [name for name in self.signature.parameters if name != "self"]
        kwargs |= dict(zip(names, args, strict=False))
        smoothing = float(kwargs.pop("label_smoothing", 0.0))
        teaching: Teaching | None = kwargs.pop("teaching", None)
        scored, self.scored = self.scored, None
        head = self._head() if self._is_asked(kwargs, scored) else None
        if head is None:
            if teaching is not None:
                raise ValueError("a loss of a teacher's is for training with labels")
            return self._plainly(kwargs)
        items = kwargs.pop("num_items_in_batch", None)
        labels, targets = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        if targets is None:
            targets = labels
            if self.shifted:
                targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if labels is not None and is_encoder_decoder(self.model):
            self._feed_decoder(kwargs, labels)
        if "use_cache" in self.signature.parameters and kwargs.get("past_key_values") is None:
            kwargs["use_cache"] = False
        order = self.order = _Order(targets, head, smoothing, scored, teaching)
        try:
            output = self.plain(**kwargs)
        finally:
            self.order = None
        return _answer(order, output, (targets != IGNORED).sum() if items is None else items)

    def usable(self) -> bool:
        """Whether the output layer is still the one that was looked at, and in a known state."""
        return output_embeddings(self.model) is self.head and self._head() is not None

    def _is_asked(self, kwargs: dict[str, Any], scored: Scored | None) -> bool:
        """Whether this call wants a loss, and nothing that only the family's own code gives."""
        config = getattr(self.model, "config", None)
        router = kwargs.get("output_router_logits", getattr(config, "output_router_logits", False))
        return (
            (self.model.training or scored is not None)
            and any(kwargs.get(name) is not None for name in ("labels", "shift_labels"))
            and kwargs.get("return_dict") is not False
            and not kwargs.get("logits_to_keep")
            and not router  # a mixture's own loss is added by its own code
            and output_embeddings(self.model) is self.head
        )

    def _plainly(self, kwargs: dict[str, Any]) -> Any:
        if torch.is_grad_enabled() or not self.model.training:
            return self.plain(**kwargs)
        # text is generated, perhaps; in training mode a recomputing layer would drop the cache
        with paused(checkpointed_layers(self.model)):
            return self.plain(**kwargs)

    def score(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each label's log-probability and rank, in training mode or not; no logits are made.

        Args:
            model: as users hold it, with this loss in it.
            batch: with labels.

        Returns:
            ``log_probs``, ``is_top1`` and ``label_mask``, ``[batch, positions]``.
        """
        self.scored = "ranks"
        try:
            output: dict[str, Tensor] = model(**batch)
        finally:
            self.scored = None
        return output

    def label_states(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Head]:
        """What the output layer is given at each label, and the layer; no logits are made.

        Args:
            model: as users hold it, with this loss in it.
            batch: with labels.

        Returns:
            ``[labels, width]``, row by row of the batch.
        """
        self.scored = "states"
        try:
            states: Tensor = model(**batch)["states"]
        finally:
            self.scored = None
        head = self._head()
        assert head is not None
        return states, head

    def answers_for_trl(self) -> bool:
        """Whether each position's loss may be weighed by the caller: the output layer is frozen."""
        frozen = not any(p.requires_grad for p in self.head.parameters())
        return self.shifted and frozen and self.usable()

    def head_forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits as ever; where the model's forward has left an order, the loss and no logits."""
        order = self.order
        if order is None:
            logits: Tensor = self.plain_head(hidden, *args, **kwargs)
            return logits
        targets = order.targets.to(hidden.device)[:, -hidden.shape[1] :]
        kept = targets != IGNORED
        if _is_fake(hidden):  # nobody can count the labels of such a batch
            chosen = hidden.reshape(-1, hidden.shape[-1])[: self.fake_labels].clone()
            wanted = targets.reshape(-1)[: self.fake_labels]
        else:
            chosen, wanted = hidden[kept], targets[kept]
        nats = CrossEntropy(wanted, order.smoothing)
        vocabulary = vocabulary_of(self.head)
        if order.scored == "states":
            order.scores = {"states": chosen}
        elif order.scored is not None:
            order.scores = token_scores(
                chosen, order.head, nats, kept, vocabulary=vocabulary, shifted=self.shifted,
                entropies=order.scored == "with-entropy",
            )  # fmt: skip
        else:
            loss: LogitLoss = nats
            if order.teaching is not None:
                loss = order.teaching(nats, len(chosen))
            order.loss = label_loss(chosen, order.head, loss, vocabulary=vocabulary)
        return hidden.new_zeros(hidden.shape[0], 0, vocabulary_of(self.head))

    def _feed_decoder(self, kwargs: dict[str, Any], labels: Tensor) -> None:
        """An encoder-decoder makes its decoder's inputs of the labels, as its own forward does."""
        if any(kwargs.get(n) is not None for n in ("decoder_input_ids", "decoder_inputs_embeds")):
            return
        config: Any = self.model.config
        names = self.signature.parameters
        ids = labels.new_full(labels.shape, config.decoder_start_token_id)
        ids[:, 1:] = labels[:, :-1]
        ids = ids.masked_fill(ids == IGNORED, config.pad_token_id)
        kwargs["decoder_input_ids"] = ids
        two_models = hasattr(config, "decoder") and "decoder_attention_mask" in names
        if two_models and kwargs.get("decoder_attention_mask") is None:
            kwargs["decoder_attention_mask"] = ids != config.pad_token_id

    def _head(self) -> Head | None:
        """The output layer as it is now, with the adapter that is on it; None where it is odd."""
        layer: Any = self.head
        lora = None
        if hasattr(layer, "lora_A"):
            on = not (layer.disable_adapters or layer.merged)
            if on and (lora := _adapter(layer)) is None:
                return None
            layer = layer.get_base_layer()
        weight, blocks = getattr(layer, "weight", None), None
        if weight is None or weight.dim() != 2:
            return None
        if isinstance(layer, Int8Head):
            weight, blocks = None, layer.blocks
        elif not weight.is_floating_point():
            assert self.dense_weight is not None
            dense = functools.partial(self.dense_weight, layer)
            weight, blocks = None, lambda: iter([(0, dense())])
        extra = getattr(self.model, "final_logits_bias", None)  # BART's
        bias = getattr(layer, "bias", None)
        if isinstance(extra, Tensor):
            bias = extra[0] if bias is None else bias + extra[0]
        return Head(weight, bias, lora, self.scale, self.softcap, blocks)


def _adapter(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """PEFT's adapter on an output layer, if it is a single one without a speciality."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or layer.lora_variant:
        return None
    (name,) = names
    down, up = layer.lora_A[name], layer.lora_B[name]
    if isinstance(layer.lora_dropout[name], nn.Dropout) or up.bias is not None:
        return None
    return down.weight, up.weight, float(layer.scaling[name])


def _answer(order: _Order, output: Any, count: Tensor | float) -> Any:
    """The family's output with the loss first and no logits."""
    loss = order.loss
    if order.scored == "states":
        return order.scores
    if order.scores is not None:
        loss = -order.scores["log_probs"].sum()
    assert loss is not None
    loss = loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
    rest = {name: value for name, value in output.items() if name not in ("loss", "logits")}
    answer = type(output)(loss=loss, **rest)
    for name, value in (order.scores or {}).items():
        answer[name] = value
    return answer


@dataclass
class _Forward:
    """A replaced ``forward``: it can be copied and pickled with its model, which a closure cannot.

    Trainers read the arguments' names off a model's forward, so it shows those of the plain one.
    """

    installed: ModelLoss
    name: str

    def __post_init__(self) -> None:
        installed = self.installed
        plain = installed.plain if self.name == "forward" else installed.plain_head
        own = plain.signature if isinstance(plain, PlainForward) else inspect.signature(plain)
        self.__signature__ = own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.installed, self.name)(*args, **kwargs)


def install_model_loss(
    model: nn.Module, dense_weight: Callable[[nn.Module], Tensor] | None = None
) -> ModelLoss | None:
    """Puts the chunked loss into a transformers model; None, and no change, where it cannot.

    Args:
        model: below PEFT's wrapper.
        dense_weight: see `ModelLoss`.
    """
    head = output_embeddings(model)
    if head is None:
        return None
    installed = ModelLoss(model, dense_weight)
    if not installed.usable():
        return None
    replace_forward(model, lambda plain: _Forward(installed, "forward"))
    replace_forward(head, lambda plain: _Forward(installed, "head_forward"))
    if not _agrees(model, installed):
        remove_model_loss(model)
        return None
    return installed


def remove_model_loss(model: nn.Module) -> None:
    """Undoes `install_model_loss`."""
    restore_forward(model)
    head = output_embeddings(model)
    if head is not None:
        restore_forward(head)


def _agrees(model: nn.Module, installed: ModelLoss) -> bool:
    """Whether a short text has the same loss both ways; on a meta model nothing can be tried."""
    first = next(model.parameters())
    if first.is_meta:
        return True
    training = {module: module.training for module in model.modules()}
    tokens = min(PROBE_TOKENS, getattr(model.config, "max_position_embeddings", None) or 2**30)  # type: ignore[union-attr]
    ids = torch.arange(tokens, device=first.device)[None] % vocabulary_of(installed.head)
    try:
        model.eval()
        with torch.no_grad():
            wanted = installed.plain(input_ids=ids, labels=ids).loss
            model.training = True  # of this module alone: dropout stays off
            found = model(input_ids=ids, labels=ids).loss
    except Exception:  # whatever a family does not take, it is left alone
        return False
    finally:
        for module, was in training.items():
            module.training = was
    rough = first.dtype in (torch.bfloat16, torch.float16)
    return bool(torch.isclose(found.float(), wanted.float(), rtol=2e-2 if rough else 1e-4))


def _is_fake(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.is_meta or isinstance(tensor, FakeTensor)


def vocabulary_of(head: nn.Module) -> int:
    """Rows of an output layer's weight."""
    layer: Any = head
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return int(getattr(layer, "out_features", None) or layer.weight.shape[0])


def after_logits(config: Any) -> tuple[float, float | None]:
    """What a family multiplies its logits with, and the softcap it bends them by."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    softcap = getattr(text, "final_logit_softcapping", None)
    return scale, None if softcap is None else float(softcap)


def _reads_both_ways(model: nn.Module) -> bool:
    """A masked language model predicts each position's own token."""
    return type(model).__name__.endswith("ForMaskedLM")
