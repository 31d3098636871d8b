"""What stays unquantized, what a quantized weight is worth, and bitsandbytes' traps."""

import importlib.util
import warnings

import pytest
import torch
from torch import Tensor, nn

from qft import quantization
from qft.errors import RecipeError
from qft.quantization import (
    KINDS,
    dequantized,
    guard_cpu_kernels,
    loading_config,
    require_bitsandbytes,
    unquantized_modules,
)

OUT, IN = 96, 128
# the widest gap between two values of the format, halved, plus the rounding of the block's maximum
WORST = {"nf4": 0.152 + 0.02, "fp4": 0.167 + 0.02}


def weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))


def four_bit(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    import bitsandbytes as bnb

    module = bnb.nn.Linear4bit(
        IN, OUT, bias=False, quant_type=kind, compress_statistics=True, compute_dtype=dtype
    )
    module.weight = bnb.nn.Params4bit(
        weight().to(dtype), requires_grad=False, quant_type=kind, compress_statistics=True,
        module=module,
    )  # fmt: skip
    return module.to("cpu")


def eight_bit() -> nn.Module:
    import bitsandbytes as bnb

    module = bnb.nn.Linear8bitLt(IN, OUT, bias=False, has_fp16_weights=False)
    module.load_state_dict({"weight": weight()})
    return module.to("cpu")


# --- what stays unquantized


def skeleton(auto: str, config: object) -> nn.Module:
    import transformers

    with torch.device("meta"):
        return getattr(transformers, auto).from_config(config)


def llama_config() -> object:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip


def bert_config() -> object:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip


def roberta_config() -> object:
    from transformers import RobertaConfig

    return RobertaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "auto, config, kept",
    [
        ("AutoModelForCausalLM", llama_config, ["lm_head"]),
        ("AutoModelForSequenceClassification", llama_config, ["score"]),
        ("AutoModelForSequenceClassification", bert_config, ["classifier"]),
        ("AutoModelForSequenceClassification", roberta_config, ["classifier"]),
    ],
)
def test_heads_stay_unquantized(auto, config, kept):
    assert unquantized_modules(skeleton(auto, config())) == kept


def test_what_a_strategy_names_stays_as_well():
    model = skeleton("AutoModelForCausalLM", llama_config())
    extra = "model.layers.0.mlp.down_proj"
    assert unquantized_modules(model, [extra, "lm_head"]) == ["lm_head", extra]


def test_a_head_without_a_usual_name_stays():
    class Odd(nn.Module):
        base_model_prefix = "trunk"

        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(4, 4))
            self.drop = nn.Dropout(0.1)
            self.verdict = nn.Sequential(nn.Tanh(), nn.Linear(4, 2))

    assert unquantized_modules(Odd()) == ["verdict"]


# --- the loading config


def test_no_quantization_needs_no_config():
    assert loading_config("none", torch.float32, ["lm_head"]) is None


def test_eight_bits():
    config = loading_config("int8", torch.bfloat16, ["b", "a"])
    assert config.load_in_8bit
    assert not config.load_in_4bit
    assert config.llm_int8_skip_modules == ["a", "b"]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits(kind):
    config = loading_config(kind, torch.bfloat16, ["lm_head"])
    assert config.load_in_4bit
    assert not config.load_in_8bit
    assert config.bnb_4bit_quant_type == kind
    assert config.bnb_4bit_use_double_quant
    assert config.bnb_4bit_compute_dtype == torch.bfloat16
    assert config.llm_int8_skip_modules == ["lm_head"]


def test_the_kinds_are_those_of_the_recipe():
    from typing import get_args

    from qft.recipe import Quantize

    assert get_args(Quantize) == KINDS


def test_a_missing_bitsandbytes_is_one_clear_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="not installed") as caught:
        require_bitsandbytes()
    assert "quantize: none" in str(caught.value)
    with pytest.raises(RecipeError, match="not installed"):
        loading_config("nf4", torch.float32, [])
    assert quantization.loading_config("none", torch.float32, []) is None


# --- bitsandbytes' CPU repacking


def test_the_guard_reaches_every_four_bit_layer():
    model = nn.Sequential(four_bit("nf4"), nn.Sequential(four_bit("fp4")), nn.Linear(2, 2))
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    assert guard_cpu_kernels(model) == 2
    assert model[0].support_avx512bf16_for_cpu is False
    assert model[1][0].support_avx512bf16_for_cpu is False
    assert guard_cpu_kernels(nn.Linear(2, 2)) == 0


def test_guarded_weights_outlive_an_evaluation():
    """The trap: a forward in eval() repacks the weight, and the next training step is wrong."""
    module = four_bit("nf4", torch.bfloat16)
    guard_cpu_kernels(module)
    packed = module.weight.data.clone()
    value = dequantized(module).clone()
    rows = torch.randn(3, IN, dtype=torch.bfloat16)
    with torch.no_grad():
        module.eval()(rows)
    module.train()
    assert torch.equal(module.weight.data, packed)
    assert torch.equal(dequantized(module), value)
    rows.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the only sign of the trap is a warning
        module(rows).float().sum().backward()
    expected = value.float().sum(dim=0).expand(3, IN)
    torch.testing.assert_close(rows.grad.float(), expected, rtol=0.05, atol=0.2)


# --- the value of a quantized weight


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_weights_are_what_bitsandbytes_says(kind):
    import bitsandbytes.functional as F

    module = four_bit(kind)
    value = dequantized(module)
    assert value.shape == (OUT, IN)
    direct = F.dequantize_4bit(module.weight.data, module.weight.quant_state)
    assert torch.equal(value, direct)
    torch.testing.assert_close(module(torch.eye(IN)).T, value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bit_rounding_is_bounded(kind):
    value, original = dequantized(four_bit(kind)), weight()
    block_maximum = original.view(-1, 64).abs().amax(dim=1, keepdim=True)
    error = ((value - original).view(-1, 64).abs() / block_maximum).max().item()
    assert 0.01 < error < WORST[kind]
    relative = ((value - original).norm() / original.norm()).item()
    assert relative < {"nf4": 0.11, "fp4": 0.16}[kind]


def test_four_bit_weights_keep_the_dtype_they_came_in():
    assert dequantized(four_bit("nf4", torch.bfloat16)).dtype == torch.bfloat16


def test_eight_bit_weights_are_what_bitsandbytes_says():
    import bitsandbytes.functional as F

    module = eight_bit()
    value = dequantized(module)
    direct = F.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
    torch.testing.assert_close(value, direct, rtol=1e-6, atol=0)
    assert value.shape == (OUT, IN)


def test_eight_bit_rounding_is_half_a_step():
    value, original = dequantized(eight_bit()), weight()
    step = original.abs().amax(dim=1, keepdim=True) / 127
    error = ((value - original).abs() / step).max().item()
    assert 0.4 < error < 0.55  # bitsandbytes rounds to float16 first


def test_an_eight_bit_weight_reads_the_same_after_a_forward_pass():
    """bitsandbytes moves the scales from the weight to the module's state when it is first used."""
    module = eight_bit()
    before = dequantized(module)
    rows = torch.randn(2, IN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = module(rows)
    assert torch.equal(dequantized(module), before)
    error = (output - rows @ before.T).norm() / output.norm()
    assert error < 0.03  # the activations were rounded to 8 bits as well


def test_a_plain_weight_is_itself():
    module = nn.Linear(4, 3)
    assert dequantized(module).data_ptr() == module.weight.data_ptr()
    assert not dequantized(module).requires_grad


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_a_loaded_model_quantizes_all_but_its_head(tiny_bert, kind):
    from qft.models import ModelSpec, open_model

    spec = ModelSpec(str(tiny_bert), task="classify", labels=("no", "yes"), quantize=kind,
                     dtype=torch.float32, device="cpu")  # fmt: skip
    keep = "bert.encoder.layer.1.output.dense"
    model = open_model(tiny_bert, spec, keep=[keep])
    quantized = {
        name for name, module in model.named_modules()
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt")
    }  # fmt: skip
    assert type(model.classifier) is nn.Linear
    assert type(model.get_submodule(keep)) is nn.Linear
    assert "bert.encoder.layer.0.output.dense" in quantized
    assert len(quantized) == 12  # two layers of six and the pooler, less the one that was named
    for name in quantized:
        assert dequantized(model.get_submodule(name)).shape in {(64, 64), (128, 64), (64, 128)}
