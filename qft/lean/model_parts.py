"""The parts of a transformers model: its stacks of layers, its output embeddings, its heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

# What hangs beside a base model and is none of its heads: T5 and encoder-decoder models keep their
# halves and the shared embeddings at the top.
_HALVES = ("encoder", "decoder", "shared")

# what families call the attention of one text to another
CROSS_ATTENTION = (
    "cross_attn", "crossattention", "cross_attention", "encoder_attn", "EncDecAttention",
)  # fmt: skip

ON_HOST = "_qft_on_host"  # set on a module whose weights are not on the model's device


def on_host(module: nn.Module) -> bool:
    """Whether a module's weights wait on the host (`qft.lean.host_embeddings`)."""
    return bool(module.__dict__.get(ON_HOST))


def device_of(model: nn.Module) -> torch.device:
    """The device a model computes on; embeddings that wait on the host do not count."""
    for module in model.modules():
        if not on_host(module):
            for parameter in module._parameters.values():
                if parameter is not None:
                    return parameter.device
    raise ValueError("a model without parameters is on no device")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """What turns hidden states into words; None where the model writes no text."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    found: nn.Module | None = getter() if getter is not None else None
    return found


def writes_text(model: nn.Module) -> bool:
    """Whether the model predicts tokens of a vocabulary (else it has a head of its task)."""
    return output_embeddings(model) is not None


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model has two halves, the second of which writes."""
    inner = getattr(model, "module", model)  # below DDP's wrapper
    return bool(getattr(getattr(inner, "config", None), "is_encoder_decoder", False))


def uses_flash_attention(model: nn.Module) -> bool:
    """Whether its attention is some kind of FlashAttention, which takes no mask of two sides."""
    inner = getattr(model, "module", model)  # below DDP's wrapper
    config = getattr(inner, "config", None)
    return "flash" in (getattr(config, "_attn_implementation", None) or "")


def head_names(model: nn.Module) -> list[str]:
    """The task's own modules: what hangs beside the base model and has parameters.

    A classifier's ``classifier`` or ``score``, a reader's ``qa_outputs``; a language model has
    none, since its output embeddings came with it.
    """
    if writes_text(model):
        return []
    beside = {getattr(model, "base_model_prefix", ""), *_HALVES}
    return [
        name
        for name, child in model.named_children()
        if name not in beside and any(True for _ in child.parameters())
    ]


def transposed_weights(model: nn.Module) -> list[str]:
    """Names of the weights that are stored ``[in, out]``: those of GPT-2's Conv1D."""
    modules = model.named_modules()
    return [f"{name}.weight" for name, module in modules if type(module).__name__ == "Conv1D"]


def hidden_width(model: Any) -> int:
    """Of a model's hidden states."""
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = getattr(config, "hidden_size", None) or config.d_model
    return int(width)


def layer_stacks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The stacks of layers by module name, in the order data passes them.

    One for a decoder or an encoder, two for an encoder-decoder (encoder first).
    """
    from torch import nn

    stacks: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in stacks)
        if isinstance(module, nn.ModuleList) and not inside and _are_layers(module):
            stacks[name] = module
    return dict(sorted(stacks.items(), key=lambda stack: "decoder" in stack[0].split(".")))


def encoder_layers(model: nn.Module) -> int:
    """Layers of the first of two halves; 0 of a model with one stack."""
    stacks = list(layer_stacks(model).values())
    return len(stacks[0]) if len(stacks) > 1 else 0


def _are_layers(stack: nn.ModuleList) -> bool:
    """A layer mixes and transforms: several matrices, within modules of their own."""
    return len(stack) > 0 and all(
        sum(child.weight is not None for child in layer.modules() if hasattr(child, "weight")) >= 3
        for layer in stack
    )
