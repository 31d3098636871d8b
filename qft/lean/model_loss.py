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

from qft.lean.int8_head import Int8Head
from qft.lean.label_loss import IGNORED, CrossEntropy, Head, label_loss
from qft.lean.model_parts import is_encoder_decoder, output_embeddings
from qft.lean.patching import replace_forward, restore_forward
from qft.lean.token_scores import token_scores

PROBE_TOKENS = 9
Scored = Literal["ranks", "with-entropy"]


@dataclass
class _Order:
    """What the model's forward asks of its output layer."""

    targets: Tensor  # [batch, positions], shifted already; IGNORED where there is none
    smoothing: float
    scored: Scored | None = None  # each position's log-probability and more, instead of a sum
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
        self.scale, self.softcap = _after_logits(getattr(model, "config", None))
        self.signature = inspect.signature(type(model).forward)
        self.plain: Callable[..., Any] = model.forward
        self.plain_head: Callable[..., Tensor] = head.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own arguments; with labels, in training mode, ``logits`` is None.

        ``num_items_in_batch`` is what the sum is divided by (else the number of labels),
        ``shift_labels`` are labels that stand at the position that predicts them, and
        ``label_smoothing`` spreads a share of each label over the vocabulary.
        """
        names = [name for name in self.signature.parameters if name != "self"]
        kwargs |= dict(zip(names, args, strict=False))
        smoothing = float(kwargs.pop("label_smoothing", 0.0))
        scored, self.scored = self.scored, None
        lean = (self.model.training or scored is not None) and any(
            kwargs.get(name) is not None for name in ("labels", "shift_labels")
        )
        if not lean or kwargs.get("return_dict") is False:
            return self.plain(**kwargs)
        items = kwargs.pop("num_items_in_batch", None)
        labels, targets = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
        if targets is None:
            targets = (
                functional.pad(labels[:, 1:], (0, 1), value=IGNORED) if self.shifted else labels
            )
        if labels is not None and is_encoder_decoder(self.model):
            self._feed_decoder(kwargs, labels)
        if "use_cache" in self.signature.parameters and kwargs.get("past_key_values") is None:
            kwargs["use_cache"] = False
        order = self.order = _Order(targets, smoothing, scored)
        try:
            output = self.plain(**kwargs)
        finally:
            self.order = None
        loss = order.loss
        if order.scores is not None:
            loss = -order.scores["log_probs"].sum()
            for name, value in order.scores.items():
                output[name] = value
        assert loss is not None
        count = (targets != IGNORED).sum() if items is None else items
        output["loss"] = loss / (count.to(loss.device) if isinstance(count, Tensor) else count)
        output["logits"] = None
        return output

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

    def answers_for_trl(self) -> bool:
        """Whether each position's loss may be weighed by the caller: the output layer is frozen."""
        return self.shifted and not any(p.requires_grad for p in self.head.parameters())

    def head_forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits as ever; where the model's forward has left an order, the loss and no logits."""
        order = self.order
        if order is None:
            return self.plain_head(hidden, *args, **kwargs)
        targets = order.targets.to(hidden.device)[:, -hidden.shape[1] :]
        if _is_fake(hidden):  # nobody can count the labels of such a batch
            chosen = hidden.reshape(-1, hidden.shape[-1])[: self.fake_labels].clone()
            wanted = targets.reshape(-1)[: self.fake_labels]
        else:
            kept = targets != IGNORED
            chosen, wanted = hidden[kept], targets[kept]
        nats = CrossEntropy(wanted, order.smoothing)
        vocabulary = _vocabulary(self.head)
        if order.scored is not None:
            order.scores = token_scores(
                chosen, self._head(), nats, kept, vocabulary=vocabulary, shifted=self.shifted,
                entropies=order.scored == "with-entropy",
            )  # fmt: skip
        else:
            order.loss = label_loss(chosen, self._head(), nats, vocabulary=vocabulary)
        return hidden.new_zeros(hidden.shape[0], 0, _vocabulary(self.head))

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

    def _head(self) -> Head:
        """The output layer as it is now; a strategy may have put an adapter on it."""
        layer: Any = self.head
        lora = None
        if hasattr(layer, "lora_A"):
            (name,) = layer.active_adapters
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            lora = (down, up, float(layer.scaling[name]))
            layer = layer.get_base_layer()
        weight, blocks = layer.weight, None
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


def install_model_loss(
    model: nn.Module, dense_weight: Callable[[nn.Module], Tensor] | None = None
) -> ModelLoss | None:
    """Puts the chunked loss into a transformers model; None, and no change, where it cannot.

    Args:
        model: below PEFT's wrapper.
        dense_weight: see `ModelLoss`.
    """
    head = output_embeddings(model)
    if head is None or not _can_be_chunked(head):
        return None
    installed = ModelLoss(model, dense_weight)
    replace_forward(model, lambda plain: _keep(installed, "plain", plain, installed.forward))
    replace_forward(
        head, lambda plain: _keep(installed, "plain_head", plain, installed.head_forward)
    )
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


def _keep(installed: ModelLoss, name: str, plain: Any, replacement: Any) -> Any:
    setattr(installed, name, plain)

    @functools.wraps(plain)  # trainers read the arguments' names off a model's forward
    def forward(*args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs)

    return forward


def _can_be_chunked(head: nn.Module) -> bool:
    layer: Any = head
    if hasattr(layer, "lora_A"):
        names = layer.active_adapters
        plain = len(names) == 1 and not layer.lora_variant and not layer.merged
        dropout = [
            module for module in layer.lora_dropout.values() if isinstance(module, nn.Dropout)
        ]
        if not plain or dropout or names[0] not in layer.lora_A:
            return False
        layer = layer.get_base_layer()
    return hasattr(layer, "weight") and layer.weight.dim() == 2


def _agrees(model: nn.Module, installed: ModelLoss) -> bool:
    """Whether a short text has the same loss both ways; on a meta model nothing can be tried."""
    first = next(model.parameters())
    if first.is_meta:
        return True
    training = {module: module.training for module in model.modules()}
    ids = torch.arange(PROBE_TOKENS, device=first.device)[None] % _vocabulary(installed.head)
    try:
        model.eval()
        with torch.no_grad():
            wanted = installed.plain(input_ids=ids, labels=ids).loss
            model.training = True  # of this module alone: dropout stays off
            found = model(input_ids=ids, labels=ids).loss
    except (TypeError, ValueError, AttributeError, RuntimeError):
        return False
    finally:
        for module, was in training.items():
            module.training = was
    rough = first.dtype in (torch.bfloat16, torch.float16)
    return bool(torch.isclose(found.float(), wanted.float(), rtol=2e-2 if rough else 1e-4))


def _is_fake(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _vocabulary(head: nn.Module) -> int:
    layer: Any = head
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    return int(getattr(layer, "out_features", None) or layer.weight.shape[0])


def _after_logits(config: Any) -> tuple[float, float | None]:
    """What a family multiplies its logits with, and the softcap it bends them by."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = float(getattr(text, "logit_scale", None) or 1.0)
    scale /= float(getattr(text, "logits_scaling", None) or 1.0)
    softcap = getattr(text, "final_logit_softcapping", None)
    return scale, None if softcap is None else float(softcap)


def _reads_both_ways(model: nn.Module) -> bool:
    """A masked language model predicts each position's own token."""
    return type(model).__name__.endswith("ForMaskedLM")
