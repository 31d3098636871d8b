"""Prefix tuning: trained keys and values before every layer's own.

Its folders are PEFT's. Unlike PEFT's, the prefix enters inside the attention function, so that it
works with recomputed activations, and with padding, grouped queries, BERT's and T5's attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from adapters.freed_tensors import free, head_parameters, own_parameters
from adapters.peft_backed import WEIGHTS_FILE as PEFT_WEIGHTS
from adapters.peft_backed import compare_tensors, peft_task_type, read_config, read_tensors
from qft.errors import RecipeError
from qft.lean.model_parts import head_names
from qft.strategy import Context, Needs, Strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from qft.lean.prefix_attention import PrefixEncoder

_MLP_FILE = "reparametrisation.safetensors"  # what a training goes on with; PEFT needs it not


class Prefix(Strategy):
    """Trained keys and values before every layer's own: as if a text nobody wrote came first."""

    name: ClassVar[str] = "prefix"
    paper: ClassVar[str] = "Li & Liang 2021, https://arxiv.org/abs/2101.00190"

    length: int = Field(20, ge=1, description="virtual tokens")
    reparametrise: bool = Field(
        False, description="train through a small network, which is folded away when saving"
    )
    hidden: int | None = Field(None, ge=1, description="that network's width; None is the model's")
    init_text: str | None = Field(None, description="begin with this text's keys and values")

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if self.reparametrise and self.init_text is not None:
            raise ValueError("init_text sets keys and values, which reparametrise would compute")
        return self

    @property
    def advice(self) -> str:
        """What to do instead of merging."""
        return "keep it as an adapter (plain PEFT opens it too), or train {name: lora}"

    def needs(self, skeleton: nn.Module) -> Needs:
        """A new head trains beside the prefix; the prefix takes the first positions."""
        return Needs(full_precision=tuple(head_names(skeleton)), extra_positions=self.length)

    def attach(self, model: nn.Module, context: Context) -> nn.Module:
        """Freezes the model, frees its head, and puts a prefix into its attention."""
        import torch

        from qft.lean import prefix_attention as engine

        modules = engine.attention_modules(model)
        _require_interface(model, modules)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        free(model, head_parameters(model))
        heads, width = _key_value_shape(modules[0])
        hidden = (self.hidden or heads * width) if self.reparametrise else None
        with torch.device(next(model.parameters()).device):
            encoder = engine.PrefixEncoder(self.length, len(modules), heads, width, hidden)
        two_halves = bool(model.config.is_encoder_decoder)  # type: ignore[union-attr]
        engine.install_slots(modules, encoder, two_halves=two_halves)
        root = engine.prefix_root(model)
        _route_attention(root)
        if self.init_text is not None and not encoder.embedding.weight.is_meta:
            ids = _text_ids(self.init_text, self.length, context)
            read = _reader(model, ids)
            with torch.no_grad():
                encoder.embedding.weight.copy_(engine.recorded(modules, read))
        engine.shift_positions(root, self.length)
        # within the base model: what hangs beside it is a head
        base = getattr(model, str(getattr(model, "base_model_prefix", "")), None)
        (base if isinstance(base, torch.nn.Module) else model).add_module("prefix_encoder", encoder)
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes PEFT's two files; a reparametrisation also leaves what its training goes on with.

        What PEFT reads are the keys and values themselves.
        """
        from peft import PrefixTuningConfig
        from safetensors.torch import save_file

        encoder = _encoder(model)
        width = encoder.heads * encoder.head_dim
        config: Any = model.config
        PrefixTuningConfig(
            task_type=peft_task_type(model),
            num_virtual_tokens=self.length,
            num_layers=encoder.layers,
            num_attention_heads=encoder.heads,
            token_dim=width,
            encoder_hidden_size=width,
            num_transformer_submodules=2 if config.is_encoder_decoder else 1,
            modules_to_save=head_names(model) if head_parameters(model) else None,
            base_model_name_or_path=config._name_or_path or None,
            inference_mode=True,
        ).save_pretrained(str(folder))
        save_file(_saved(model), folder / PEFT_WEIGHTS, metadata={"format": "pt"})
        if encoder.transform is not None:
            state = {name: t.detach().cpu() for name, t in encoder.state_dict().items()}
            save_file(state, folder / _MLP_FILE)

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads the prefix and the head, exactly."""
        import torch
        from safetensors.torch import load_file

        encoder, found = _encoder(model), read_tensors(folder)
        compare_tensors(found, _saved(model), folder)
        parameters = own_parameters(model)
        with torch.no_grad():
            for name in head_parameters(model):
                parameters[name].copy_(found[f"base_model.{name}"])
            if encoder.transform is None:
                encoder.embedding.weight.copy_(found["prompt_embeddings"])
                return
        if not (folder / _MLP_FILE).is_file():
            raise RecipeError(
                "The saved prefix has no reparametrisation to go on with.",
                where=folder,
                fix="reparametrise: false",
            )
        encoder.load_state_dict(load_file(folder / _MLP_FILE))

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """A PEFT folder of prefix tuning, by whomever."""
        values = read_config(folder, "PREFIX_TUNING")
        return None if values is None else cls(length=values["num_virtual_tokens"])


def _encoder(model: nn.Module) -> PrefixEncoder:
    from qft.lean.prefix_attention import PrefixEncoder

    return next(module for module in model.modules() if isinstance(module, PrefixEncoder))


def _saved(model: nn.Module) -> dict[str, Tensor]:
    """What PEFT's file holds, under its names."""
    parameters = own_parameters(model)
    heads = {f"base_model.{name}": parameters[name] for name in head_parameters(model)}
    tensors = {"prompt_embeddings": _encoder(model).flat(), **heads}
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _require_interface(model: nn.Module, modules: list[nn.Module]) -> None:
    """Attention that does not go through transformers' interface would ignore the prefix."""
    reachable = [
        hasattr(sys.modules[type(module).__module__], "ALL_ATTENTION_FUNCTIONS")
        for module in modules
    ]
    if not modules or not all(reachable):
        raise RecipeError(
            "A prefix cannot enter this model's attention.",
            where="strategy: prefix",
            found=type(model).__name__,
            fix="another strategy, such as lora or prompt",
        )


def _key_value_shape(module: Any) -> tuple[int, int]:
    """Key-value heads, and the width of each."""
    config = module.config
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return shared, width or config.hidden_size // heads


def _route_attention(root: nn.Module) -> None:
    """Sends the attention of ``root`` through the prefix, to the function that had it before.

    The masks are registered under the same name: without one, padding would silently be seen.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask

    from qft.lean.prefix_attention import attend

    def whole_sdpa_mask(*args: Any, **kwargs: Any) -> Any:
        return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})

    for kind, mask in (("sdpa", whole_sdpa_mask), ("eager", eager_mask)):
        inner = AttentionInterface()["sdpa"] if kind == "sdpa" else _eager

        def routed(module: nn.Module, *args: Any, inner: Any = inner, **kwargs: Any) -> Any:
            return attend(inner, module, *args, **kwargs)

        AttentionInterface.register(f"qft_prefix_{kind}", routed)
        AttentionMaskInterface.register(f"qft_prefix_{kind}", mask)
    configs: list[Any] = [module.config for module in root.modules() if hasattr(module, "config")]
    for config in configs:
        before = getattr(config, "_attn_implementation", None)
        if before is not None and not before.startswith("qft_prefix"):
            kind = "eager" if before == "eager" else "sdpa"
            config._attn_implementation = f"qft_prefix_{kind}"


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Each family has its own, in the file of its attention."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)  # type: ignore[attr-defined]


def _text_ids(text: str, length: int, context: Context) -> list[int]:
    """Exactly ``length`` tokens of the text: repeated or cut."""
    if context.tokenize is None:
        raise RecipeError(
            "A text to begin with needs the model's tokenizer.",
            where="strategy.init_text",
            fix="pass Context(tokenize=…) to prepare",
        )
    ids = context.tokenize(text)
    if not ids:
        raise RecipeError("The text to begin with is empty.", where="strategy.init_text")
    return (ids * (length // len(ids) + 1))[:length]


def _reader(model: Any, ids: list[int]) -> Callable[[], object]:
    """Runs the model on one text; an encoder-decoder reads it on both sides."""
    import torch

    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens

    def read() -> object:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                return model(**inputs)
        finally:
            model.train(training)

    return read
