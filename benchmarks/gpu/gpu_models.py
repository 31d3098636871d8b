"""Models of well-known shapes with random weights, made on the device layer by layer.

Nothing is downloaded, and a quantized model never exists in 16 bits.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from qft.bench.shapes import SHAPES

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TINY: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is trained: the same for every side.

    Attributes:
        shape: of `qft.bench.shapes`, or ``tiny``.
        quantize: ``none`` or ``nf4`` (double quantization).
        length: tokens a sequence.
        batch: sequences a step.
        targets: layers that get a LoRA.
        dtype: of what is not quantized, and of the arithmetic.
        optimizer: ``adamw`` (32-bit states), ``adamw-8bit`` or ``paged-adamw-8bit``.
        offload: of the engine's recomputed inputs, like ``savers``.
        savers: those of the engine that are off by default and are switched on.
    """

    shape: str
    quantize: str = "none"
    length: int = 2048
    batch: int = 1
    rank: int = 16
    targets: tuple[str, ...] = ALL_LINEAR
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    offload: str = "none"
    savers: tuple[str, ...] = ()
    device: str = "cuda"

    @property
    def name(self) -> str:
        """Shape, precision and length."""
        base = self.quantize if self.quantize != "none" else self.dtype
        return f"{self.shape} {base} {self.batch}x{self.length}"

    def settings(self) -> dict[str, Any]:
        """As it goes into a row."""
        return asdict(self)


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def random_model(case: Case, seed: int = 0) -> Any:
    """A transformers model on its device, with the same weights each time.

    Raises:
        ModuleNotFoundError: 4 bits without bitsandbytes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if case.quantize == "nf4" and not is_installed("bitsandbytes"):
        raise ModuleNotFoundError("bitsandbytes is not installed")
    values = dict(TINY if case.shape == "tiny" else SHAPES[case.shape])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    dtype = getattr(torch, case.dtype)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(case.device).manual_seed(seed)
    for name, module in list(model.named_modules()):
        if "rotary" in type(module).__name__.lower():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, type(module)(config).to(case.device))
        elif case.quantize == "nf4" and type(module) is nn.Linear and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, _four_bit(module, case.device, generator))
        else:
            _fill(module, case.device, generator)
    model.tie_weights()
    model.config.use_cache = False
    if case.quantize == "nf4":
        model.is_loaded_in_4bit = (
            True  # as from_pretrained says it, so that PEFT takes its own layer
        )
    return model


def _fill(module: nn.Module, device: str, generator: torch.Generator) -> None:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            made = _random(parameter, device, generator)
            module._parameters[name] = nn.Parameter(made, requires_grad=False)


def _random(like: torch.Tensor, device: str, generator: torch.Generator) -> torch.Tensor:
    """Matrices are random, norms are ones."""
    made = torch.ones(like.shape, dtype=like.dtype, device=device)
    return made.normal_(0, 0.02, generator=generator) if like.dim() > 1 else made


def _four_bit(plain: nn.Linear, device: str, generator: torch.Generator) -> nn.Module:
    import bitsandbytes as bnb

    weight = _random(plain.weight, device, generator)
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    layer = bnb.nn.Linear4bit(
        plain.in_features, plain.out_features, bias=False, compute_dtype=weight.dtype,
        compress_statistics=True, quant_type="nf4", device="meta",
    )  # fmt: skip
    layer.weight = bnb.nn.Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4",
        compress_statistics=True, blocksize=state.blocksize, bnb_quantized=True, module=layer,
    )  # fmt: skip
    layer.quant_state = state
    return layer  # type: ignore[no-any-return]


def with_lora(model: Any, case: Case, dropout: float = 0.0) -> Any:
    """PEFT's own LoRA, with the same start each time."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(
        r=case.rank, lora_alpha=2 * case.rank, lora_dropout=dropout,
        target_modules=list(case.targets), task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, config)


def optimizer_of(model: nn.Module, case: Case) -> torch.optim.Optimizer:
    """The same for every side.

    Raises:
        ModuleNotFoundError: 8 bits without bitsandbytes.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if case.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=1e-4, fused=case.device == "cuda")
    import bitsandbytes as bnb

    kinds = {"adamw-8bit": "AdamW8bit", "paged-adamw-8bit": "PagedAdamW8bit"}
    made: torch.optim.Optimizer = getattr(bnb.optim, kinds[case.optimizer])(trained, lr=1e-4)
    return made


def batch_of(case: Case, vocabulary: int, number: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, every one of them a label, the same for every side."""
    generator = torch.Generator().manual_seed(100 + number)
    ids = torch.randint(vocabulary, (case.batch, case.length), generator=generator)
    ids = ids.to(case.device)
    return {"input_ids": ids, "labels": ids}
