"""What stays unquantized, what a quantized weight is worth, and bitsandbytes' traps."""

import copy
import importlib.util
import shutil
import warnings
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from qft import models, quantization
from qft.errors import ModelError, RecipeError
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


# --- widths that bitsandbytes' CPU kernels misread: multiples of 16 that are none of 64


WIDTHS = (*range(16, 329, 16), 20, 33, 100, 172)


def layer_of(
    kind: str, width: int, *, double: bool = True, dtype: torch.dtype = torch.float32,
    bias: bool = False, rows: int = 32,
) -> bnb.nn.Linear4bit:  # fmt: skip
    torch.manual_seed(width)
    module = bnb.nn.Linear4bit(
        width, rows, bias=bias, quant_type=kind, compress_statistics=double, compute_dtype=dtype
    )
    module.weight = bnb.nn.Params4bit(
        torch.randn(rows, width, dtype=dtype), requires_grad=False, quant_type=kind,
        compress_statistics=double, module=module,
    )  # fmt: skip
    return module.to("cpu")


def from_bytes(module: bnb.nn.Linear4bit) -> Tensor:
    """What the stored bytes stand for, weight by weight, in float32."""
    state = module.weight.quant_state
    packed = module.weight.data.reshape(-1)
    codes = torch.stack([packed >> 4, packed & 15], 1).reshape(-1).int()[: state.shape.numel()]
    scales = state.absmax
    if state.nested:
        nested = state.state2
        coarse = nested.absmax.repeat_interleave(nested.blocksize)[: scales.numel()]
        scales = nested.code[scales.int()] * coarse + state.offset
    values = bnb.functional.get_4bit_type(state.quant_type, device="cpu")[codes]
    each = scales.repeat_interleave(state.blocksize)[: codes.numel()]
    return (values * each).view(state.shape)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_every_width_is_read_from_its_own_scales(kind, double):
    for width in WIDTHS:
        module = layer_of(kind, width, double=double)
        expected = from_bytes(module)
        torch.testing.assert_close(dequantized(module), expected, rtol=1e-5, atol=1e-6)
        frozen = quantization.FourBit(module, quantization.Scratch())
        x, gradient = torch.randn(3, width), torch.randn(3, module.out_features)
        torch.testing.assert_close(frozen.product(x), x @ expected.T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(frozen.transposed(gradient), gradient @ expected,
                                   rtol=1e-4, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("width", [64, 128, 320])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_harmless_widths_are_bit_for_bit_what_they_were(kind, width):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        module = layer_of(kind, width, dtype=dtype)
        direct = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(dequantized(module), direct)
        guard_cpu_kernels(module)
        assert "forward" not in vars(module)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_guarded_layers_of_every_width_compute_with_the_stored_weight(kind, double, training):
    for width in WIDTHS:
        module = layer_of(kind, width, double=double, bias=True).train(training)
        guard_cpu_kernels(module)
        weight, x = from_bytes(module), torch.randn(2, 3, width)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        module.bias.requires_grad_(True)
        bias = module.bias.detach().clone().requires_grad_(True)
        expected = nn.functional.linear(theirs, weight, bias)
        torch.testing.assert_close(module(ours), expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
        pull = torch.randn_like(expected)
        module(ours).backward(pull)
        expected.backward(pull)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(module.bias.grad, bias.grad, rtol=1e-4, atol=1e-4)


def test_a_guarded_layer_keeps_bitsandbytes_types():
    """The product is in the layer's own type, the result in that of the input."""
    module = layer_of("nf4", 96, dtype=torch.bfloat16, bias=True)
    guard_cpu_kernels(module)
    x = torch.randn(3, 96)
    found = module(x)
    assert found.dtype == torch.float32
    assert torch.equal(found, found.bfloat16().float())
    expected = nn.functional.linear(x, from_bytes(module), module.bias.float())
    assert 0 < (found - expected).norm() / expected.norm() < 0.01
    assert module(x.half()).dtype == torch.float16


def test_a_guarded_layer_can_be_copied_and_saved(tmp_path):
    module = layer_of("nf4", 96)
    before = module.state_dict()
    guard_cpu_kernels(module)
    after = module.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    twin = copy.deepcopy(module)
    module.weight.data.zero_()  # so that a twin that asks its original is found out
    x = torch.randn(3, 96)
    torch.testing.assert_close(twin(x), x @ from_bytes(twin).T, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(module(x), twin(x))
    torch.save(twin, tmp_path / "layer.pt")
    again = torch.load(tmp_path / "layer.pt", weights_only=False)
    assert torch.equal(again(x), twin(x))


def test_a_layer_that_accelerate_has_wrapped_keeps_its_hook():
    from accelerate.hooks import ModelHook, add_hook_to_module

    calls = []

    class Listens(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(module)
            return args, kwargs

    module = layer_of("nf4", 96)
    add_hook_to_module(module, Listens())
    guard_cpu_kernels(module)
    x = torch.randn(3, 96)
    torch.testing.assert_close(module(x), x @ from_bytes(module).T, rtol=1e-4, atol=1e-4)
    assert calls == [module]


def test_a_layer_filled_after_it_was_guarded_is_right():
    """As a model that streams through memory does it, layer by layer."""
    full = layer_of("fp4", 96)
    with torch.device("meta"):
        empty = bnb.nn.Linear4bit(96, 32, bias=False, quant_type="fp4")
    guard_cpu_kernels(empty)
    empty._parameters["weight"] = full.weight
    x = torch.randn(3, 96)
    torch.testing.assert_close(empty(x), x @ from_bytes(full).T, rtol=1e-4, atol=1e-4)


def test_a_repacked_weight_is_refused():
    module = layer_of("nf4", 64)
    module.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="repacked"):
        dequantized(module)


def odd_llama(folder: Path) -> nn.Module:
    """A model whose layers are 96 and 208 wide, loaded by plain transformers in nf4."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=96, intermediate_size=208, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=loading_config("nf4", torch.float32, [])
    )


def in_full(model: nn.Module) -> nn.Module:
    """The same model with every 4-bit layer as the plain one that its bytes stand for."""
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(from_bytes(module), requires_grad=False)
            model.set_submodule(name, plain)
    for flag in ("is_loaded_in_4bit", "is_quantized", "quantization_method", "hf_quantizer"):
        if hasattr(model, flag):
            delattr(model, flag)
    return model


@pytest.mark.parametrize("dora", [False, True])
def test_peft_on_odd_widths_trains_and_evaluates_the_stored_model(tmp_path, dora):
    """Prepared, taken back, and in eval(): loss and gradients of the same model in full."""
    import qft
    from adapters.lora import LoRA

    strategy = LoRA(rank=4, dropout=0.0, dora=dora)
    four, full = odd_llama(tmp_path), in_full(odd_llama(tmp_path))
    rows = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": rows, "labels": rows}
    models = []
    for model in (four, full):
        torch.manual_seed(0)
        model = qft.prepare(model, strategy, checkpointing="none")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn_like(parameter) / 10)
        models.append(model)
    compare(models, batch)
    models = [qft.unprepare(model) for model in models]
    compare(models, batch)
    with torch.no_grad():
        ours, theirs = (model.eval()(**batch).logits for model in models)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def compare(models: list[nn.Module], batch: dict[str, Tensor]) -> None:
    found = []
    for model in models:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    (ours, mine), (theirs, its) = found
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert mine.keys() == its.keys()
    assert mine
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, its[name], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the kernel does not tell")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_model_lets_go_of_its_files(kind: str, tiny_llama: Path, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))  # nobody else has opened it
    spec = models.ModelSpec(str(folder), quantize=kind, dtype=torch.float32, device="cpu")
    model = models.open_model(folder, spec)
    assert any(p.is_floating_point() for p in model.parameters())  # as they are stored
    held = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert str(folder / "model.safetensors") not in held
