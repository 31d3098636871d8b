"""The lean engine against the plain path: losses and gradients, part by part, and its bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qft
from adapters.freed_tensors import free
from adapters.lora import LoRA
from qft.bench.step import PLAIN, StepSettings, meter_step
from qft.data.tasks import TASKS
from qft.lean.checkpointing import checkpointed_layers
from qft.lean.engine import Savers
from qft.lean.gated_mlp import is_gated_mlp
from qft.lean.lora_linear import Dense, Update, lora_linear
from qft.lean.meter import Meter, Reading
from qft.lean.norms import KINDS, norm_of, rms_norm
from qft.models import ModelSpec, open_model
from qft.preparation import inner_model, prepare, prepared, unprepare
from qft.registry import build_strategy

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "head_dim": 16, "max_position_embeddings": 128,
}  # fmt: skip
FAMILIES = ["llama", "tied", "gemma3", "qwen3", "cohere", "t5", "bart", "two-berts"]
ONE_BY_ONE = {
    "label_loss": Savers(True, False, False, False, False),
    "lora": Savers(False, True, False, False, False),
    "gated_mlp": Savers(False, False, True, False, False),
    "norms": Savers(False, False, False, True, False),
    "attention": Savers(False, False, False, False, True),
    "all": Savers(),
    "tiled": Savers(tiled_mlp=True),
}


def made(family: str) -> nn.Module:
    import transformers as t

    torch.manual_seed(0)
    if family == "two-berts":
        halves = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128,
                  "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout_prob": 0.0,
                  "attention_probs_dropout_prob": 0.0}  # fmt: skip
        config = t.EncoderDecoderConfig.from_encoder_decoder_configs(
            t.BertConfig(**halves), t.BertConfig(**halves)
        )
        config.decoder_start_token_id, config.pad_token_id = 1, 0
        return t.EncoderDecoderModel(config)
    makers: dict[str, Any] = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
        "tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=True)),
        "gemma3": lambda: t.Gemma3ForCausalLM(
            t.Gemma3TextConfig(**SIZES, final_logit_softcapping=0.5, sliding_window=8)
        ),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**SIZES)),
        "cohere": lambda: t.CohereForCausalLM(
            t.CohereConfig(
                **{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.25,
                pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        ),
        "t5": lambda: t.T5ForConditionalGeneration(
            t.T5Config(vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                       decoder_start_token_id=0, dropout_rate=0.0)
        ),
        "bart": lambda: t.BartForConditionalGeneration(
            t.BartConfig(vocab_size=300, d_model=64, encoder_layers=2, decoder_layers=2,
                         encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128,
                         decoder_ffn_dim=128, dropout=0.0, max_position_embeddings=128,
                         pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)
        ),
    }  # fmt: skip
    return makers[family]()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    labels = ids.clone()
    labels[:, :7] = -100
    labels[1, 20:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def stirred(model: nn.Module) -> nn.Module:
    """With adapters that are not at their neutral start."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape))
    return model


def run(model: nn.Module, **changes: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**{**batch(), **changes}).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert set(found) == set(wanted)
    return max(float((found[n] - w).norm() / (w.norm() + 1e-20)) for n, w in wanted.items())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("saver", ONE_BY_ONE)
def test_each_part_is_exact(family: str, saver: str):
    plain = stirred(prepare(made(family), LoRA(rank=4), checkpointing="none", savers=PLAIN))
    ours = stirred(
        prepare(made(family), LoRA(rank=4), checkpointing="none", savers=ONE_BY_ONE[saver])
    )
    wanted_loss, wanted = run(plain)
    loss, found = run(ours)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-6)
    assert difference(found, wanted) < 1e-5
    state = prepared(ours)
    assert state is not None
    if saver in ("label_loss", "all", "tiled"):
        assert state.engine.loss is not None, "the family keeps its own loss"


@pytest.mark.parametrize("family", ["llama", "t5"])
@pytest.mark.parametrize("checkpointing", ["full", 1])
@pytest.mark.parametrize("offload", ["none", "host", "disk"])
def test_recomputed_and_offloaded_layers_are_exact(family: str, checkpointing: Any, offload: Any):
    plain = stirred(prepare(made(family), LoRA(rank=4), checkpointing="none"))
    ours = stirred(
        prepare(made(family), LoRA(rank=4), checkpointing=checkpointing, offload=offload)
    )
    wanted_loss, wanted = run(plain)
    for _ in range(2):
        loss, found = run(ours)
        assert float(loss) == float(wanted_loss)
        assert difference(found, wanted) == 0


def test_bfloat16_is_no_further_from_the_truth_than_plain_peft():
    exact = stirred(prepare(made("llama").double(), LoRA(rank=4), savers=PLAIN))
    _, truth = run(exact)
    errors = {}
    for name, savers in (("plain", PLAIN), ("lean", Savers())):
        model = stirred(prepare(made("llama").bfloat16(), LoRA(rank=4), savers=savers))
        _, found = run(model)
        distances = [float((found[n] - t).norm() / t.norm()) for n, t in truth.items()]
        errors[name] = sum(distances) / len(distances)
    assert errors["lean"] < 1.25 * errors["plain"]
    assert errors["lean"] < 0.05


def test_the_sum_is_divided_by_what_the_trainer_says():
    model = stirred(prepare(made("llama"), LoRA(rank=4)))
    loss, gradients = run(model)
    labels = int((batch()["labels"][:, 1:] != -100).sum())
    again, halved = run(model, num_items_in_batch=2 * labels)
    assert float(again) == pytest.approx(float(loss) / 2)
    assert difference({n: 2 * g for n, g in halved.items()}, gradients) < 1e-6


def test_label_smoothing_is_torchs():
    model = stirred(prepare(made("llama"), LoRA(rank=4)))
    loss, _ = run(model, label_smoothing=0.2)
    model.eval()
    inputs = batch()
    labels = inputs.pop("labels")
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    wanted = functional.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=0.2)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)


def test_in_training_there_are_no_logits_and_in_evaluation_there_are():
    model = prepare(made("llama"), LoRA(rank=4))
    output = model(**batch())
    assert output.logits is None
    assert output.loss.requires_grad
    unlabelled = {k: v for k, v in batch().items() if k != "labels"}
    assert model(**unlabelled).logits.shape == (2, 24, 300)
    model.eval()
    with torch.no_grad():
        output = model(**batch())
    assert output.logits.shape == (2, 24, 300)
    assert output.loss is not None


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_unprepare_brings_everything_back(family: str):
    model = made(family)
    forwards = {n: m.__dict__.get("forward") for n, m in model.named_modules()}
    prepared_model = prepare(model, LoRA(rank=4), savers=Savers(tiled_mlp=True))
    unprepare(prepared_model)
    inner = inner_model(prepared_model)
    for name, module in inner.named_modules():
        assert "_qft_plain_forward" not in module.__dict__, name
        if name in forwards:
            assert module.__dict__.get("forward") is forwards[name], name
    assert not any(layer.gradient_checkpointing for layer in checkpointed_layers(inner))
    assert prepared_model(**batch()).logits is not None


def test_an_already_wrapped_peft_model_gains_as_well():
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = stirred(peft.get_peft_model(made("llama"), config))
    wrapped.train()
    wanted_loss, wanted = run(wrapped)
    qft.prepare(wrapped, checkpointing="none")
    loss, found = run(wrapped)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-6)
    assert difference(found, wanted) < 1e-5
    state = prepared(wrapped)
    assert state is not None
    assert len(state.engine.modules["lora"]) == 21
    unprepare(wrapped)
    again, _ = run(wrapped)
    assert float(again) == float(wanted_loss)


@pytest.mark.parametrize("settings", [{"dora": True}, {"bias": "all"}, {"targets": "attention"}])
def test_what_the_engine_does_not_know_keeps_pefts_forward(settings: dict[str, Any]):
    plain = stirred(prepare(made("llama"), LoRA(rank=4, **settings), savers=PLAIN))
    ours = stirred(prepare(made("llama"), LoRA(rank=4, **settings)))
    wanted_loss, wanted = run(plain)
    loss, found = run(ours)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-6)
    assert difference(found, wanted) < 1e-5


def test_a_switched_off_and_a_merged_adapter_are_left_to_peft():
    model: Any = stirred(prepare(made("llama"), LoRA(rank=4)))
    base = made("llama")
    with model.disable_adapter():
        loss = model(**batch()).loss
    base.train()
    assert float(loss) == pytest.approx(float(base(**batch()).loss), rel=1e-6)
    on = model(**batch()).loss
    model.merge_adapter()
    assert float(model(**batch()).loss) == pytest.approx(float(on), rel=1e-5)


def test_a_head_that_trains_and_one_with_an_adapter():
    for settings in ({"name": "full"}, {"name": "lora", "rank": 4, "targets": ["lm_head"]}):
        plain, ours = (
            stirred(prepare(made("llama"), build_strategy(settings), savers=savers))
            for savers in (PLAIN, Savers())
        )
        wanted_loss, wanted = run(plain)
        loss, found = run(ours)
        assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-6)
        assert any("lm_head" in name for name in found)
        assert difference(found, wanted) < 1e-5


def test_a_tied_head_that_trains_with_its_embeddings_in_float32():
    plain, ours = (
        prepare(made("tied").bfloat16(), build_strategy({"name": "full"}), savers=savers)
        for savers in (PLAIN, Savers())
    )
    wanted_loss, wanted = run(plain)
    loss, found = run(ours)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=2e-3)
    assert difference(found, wanted) < 0.05
    assert all(gradient.dtype == torch.float32 for gradient in found.values())


def test_nothing_below_the_lowest_trained_layer_is_kept_or_recomputed():
    strategy = LoRA(rank=4, layers=(2,))
    model = prepare(made("llama"), strategy, checkpointing="full")
    calls = []
    for number, layer in enumerate(checkpointed_layers(inner_model(model))):
        attention: Any = layer.self_attn
        attention.register_forward_hook(lambda *_, number=number: calls.append(number))
    model(**batch()).loss.backward()
    assert calls.count(0) == calls.count(1) == 1
    assert calls.count(2) == 2


# --- the parts by themselves


def test_lora_linear_saves_its_input_once_and_no_more():
    layer = nn.Linear(64, 48, bias=False).requires_grad_(False).bfloat16()
    updates = [
        Update(nn.Parameter(torch.randn(4, 64)), nn.Parameter(torch.randn(48, 4)), 2.0, None)
        for _ in range(3)
    ]
    x = torch.randn(32, 64, dtype=torch.bfloat16, requires_grad=True)
    with Meter() as counting:
        outputs = [lora_linear(x, Dense(layer), update) for update in updates]
        kept = sum(output.sum() for output in outputs)
        kept.backward()
    reading = counting.reading()
    inner = 3 * 32 * 4 * 2  # A x, for each
    given = x.nbytes + layer.weight.nbytes
    made_here = 3 * 32 * 48 * 2  # the outputs themselves, held by the list
    assert reading.activation_bytes <= given + inner + made_here + 64  # and scalars


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_the_plain_ones(kind: Any, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, generator=generator).to(dtype)
    x = (2 * torch.randn(6, 7, 40, generator=generator)).to(dtype)
    direction = torch.randn(6, 7, 40, generator=generator).to(dtype)

    def plain(x: Tensor) -> Tensor:
        wide = x.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        if kind.early:
            return weight * normal.to(x.dtype)
        return (normal * (kind.offset + weight.float())).to(x.dtype)

    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted, found = plain(theirs), rms_norm(ours, weight, 1e-5, kind)
    assert torch.equal(found, wanted)
    wanted.backward(direction)
    found.backward(direction)
    assert theirs.grad is not None
    assert ours.grad is not None
    rough = 1e-5 if dtype == torch.float32 else 1e-2
    assert float((ours.grad - theirs.grad).norm() / theirs.grad.norm()) < rough


def test_a_module_that_only_looks_like_one_is_left_alone():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.eps = 1e-6
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + x

    class OddNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.eps = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * (x - x.mean(-1, keepdim=True))

    assert not is_gated_mlp(Odd())
    assert norm_of(OddNorm()) is None
    assert is_gated_mlp(inner_model(made("llama")).model.layers[0].mlp)
    assert norm_of(inner_model(made("gemma3")).model.norm) == (1e-6, KINDS[1])


# --- quantized bases, the smallest cards


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_train_evaluate_train_on_every_precision(quantize: str, tiny_llama: Path):
    from test_gradients import examples, set_factors

    from qft.evaluation import evaluate
    from qft.step import accumulate_gradients

    spec = ModelSpec(str(tiny_llama), quantize=quantize, dtype=torch.bfloat16, device="cpu")
    model = prepare(open_model(tiny_llama, spec), LoRA(rank=4), checkpointing="full")
    set_factors(model)
    found = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        accumulate_gradients(
            model, examples(), TASKS["text"], step=1, micro_batch=5, pad_token_id=0
        )
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        evaluate(model, examples(), TASKS["text"], pad_token_id=0)
    assert difference(found[1], found[0]) == 0


@pytest.mark.parametrize("family", ["llama", "tied"])
def test_an_8_bit_head_rounds_and_is_taken_out_again(family: str):
    plain = stirred(prepare(made(family), LoRA(rank=4)))
    savers = Savers(int8_head=True, host_embeddings=True)
    model = stirred(prepare(made(family), LoRA(rank=4), savers=savers))
    before = copy.deepcopy(inner_model(plain).lm_head.weight)
    wanted_loss, wanted = run(plain)
    loss, found = run(model)
    assert float(loss) != float(wanted_loss)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-3)
    assert difference(found, wanted) < 0.05
    model.eval()
    with torch.no_grad():
        assert model(**batch()).logits.shape == (2, 24, 300)
    unprepare(model)
    inner = inner_model(model)
    assert torch.equal(inner.lm_head.weight, before)
    assert (inner.lm_head.weight is inner.model.embed_tokens.weight) == (family == "tied")


def test_embeddings_that_train_or_are_tied_stay_where_they_are():
    tied = prepare(made("tied"), LoRA(rank=4), savers=Savers(host_embeddings=True))
    full = prepare(made("llama"), build_strategy({"name": "full"}),
                   savers=Savers(host_embeddings=True, int8_head=True))  # fmt: skip
    for model, words in ((tied, "same matrix"), (full, "train")):
        state = prepared(model)
        assert state is not None
        assert any(words in note for note in state.notes)
        assert "host_embeddings" not in state.engine.modules


# --- bytes at true scale, exact


def metered(shape: str, length: int, **changes: Any) -> Reading:
    strategy = changes.pop("strategy", LoRA(rank=16))
    return meter_step(StepSettings(shape, length=length, **changes), strategy)


def test_a_kept_layer_of_the_1b_holds_15_units(tmp_path: Path):
    """Saved for the backward pass, a layer, in units of T · d · 2 bytes."""
    shape = two_layers("llama-3.2-1b", tmp_path)
    length, unit = 1024, 1024 * 2048 * 2
    kept = {}
    for name, savers in (("lean", Savers()), ("plain", PLAIN)):
        one, two = (
            metered(shape[n], length, checkpointing="none", savers=savers).activation_bytes
            for n in (1, 2)
        )
        kept[name] = (two - one) / unit
    assert kept["lean"] <= 14.6
    assert kept["plain"] >= 38


def test_each_part_saves_what_it_says(tmp_path: Path):
    """Switched off one by one, each costs more bytes: none of them is idle."""
    shape = two_layers("llama-3.2-1b", tmp_path)[2]
    full = metered(shape, 1024, checkpointing="none")
    for name in ("lora", "gated_mlp", "norms"):
        without = metered(shape, 1024, checkpointing="none", savers=Savers(**{name: False}))
        assert without.activation_bytes > 1.05 * full.activation_bytes, name
    without = metered(shape, 1024, checkpointing="none", savers=Savers(label_loss=False))
    assert without.peak_bytes > full.peak_bytes + 1024 * 128256 * 4


def test_recomputing_offloading_and_tiling_at_the_8bs_width(tmp_path: Path):
    """What is affine in depth, from two and three layers of the 8B, at T=4096."""
    shapes = two_layers("llama-3.1-8b", tmp_path)
    length = 4096
    bounds = {
        "recompute": ({}, 480), "offload": ({"offload": "host"}, 190),
        "tiled": ({"offload": "host", "savers": Savers(tiled_mlp=True)}, 118),
    }  # fmt: skip
    for name, (changes, bound) in bounds.items():
        two, three = (metered(shapes[n], length, checkpointing="full", **changes) for n in (2, 3))
        above = [r.peak_bytes - r.resident_bytes for r in (two, three)]
        at_32 = above[0] + 30 * (above[1] - above[0])
        assert at_32 / length / 1000 <= bound, name


def test_flops_are_those_the_mathematics_asks_for(tmp_path: Path):
    """25 % label tokens, recomputation: 6 N a token, attention, adapters, 4 V d a label token."""
    shape = two_layers("llama-3.2-1b", tmp_path)[2]
    length, layers, width, heads, rank = 1024, 2, 2048, 32, 16
    reading = metered(shape, length, checkpointing="full", label_share=0.25)
    linear = {"q": (2048, 2048), "k": (2048, 512), "v": (2048, 512), "o": (2048, 2048),
              "gate": (2048, 8192), "up": (2048, 8192), "down": (8192, 2048)}  # fmt: skip
    parameters = layers * sum(a * b for a, b in linear.values())
    adapters = layers * sum(rank * (a + b) for a, b in linear.values())
    # forward, recomputed: two products of T² each; backward: five
    attention = layers * heads * 64 * 2 * length * length * (2 + 2 + 5)
    allowed = (
        6 * parameters * length
        + attention
        + (2 + 2 + 4) * adapters * length
        + 4 * 128256 * width * length // 4
    )
    assert sum(reading.flops.values()) <= 1.02 * allowed
    assert sum(reading.flops.values()) >= 0.85 * allowed


def test_encoders_and_encoder_decoders_gain_too():
    for shape, least in (("bert-base", 1.5), ("t5-base", 1.4)):
        lean, plain = (
            metered(shape, 512, checkpointing="none", savers=savers) for savers in (Savers(), PLAIN)
        )
        above = [r.peak_bytes - r.resident_bytes for r in (lean, plain)]
        assert above[1] / above[0] > least, shape


def two_layers(shape: str, folder: Path) -> dict[int, str]:
    """The shape with one, two and three layers, as config files."""
    import json

    from qft.bench.shapes import SHAPES

    found = {}
    for layers in (1, 2, 3):
        path = folder / f"{shape}-{layers}.json"
        path.write_text(json.dumps({**SHAPES[shape], "num_hidden_layers": layers}))
        found[layers] = str(path)
    return found


def test_free_is_the_strategys_own(tiny_llama: Path):
    """A base whose biases train beside adapters keeps PEFT's forward and its gradients."""
    model = prepare(made("llama"), LoRA(rank=4))
    free(inner_model(model), ["model.layers.0.self_attn.q_proj.weight"])
    _, found = run(model)
    assert any(name.endswith("layers.0.self_attn.q_proj.base_layer.weight") for name in found)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_makes_no_logits_and_measures_the_same(family: str):
    from qft.data.examples import Example
    from qft.evaluation import evaluate

    ids, labels = batch()["input_ids"], batch()["labels"]
    task = TASKS["seq2seq" if family in ("t5", "bart", "two-berts") else "text"]
    rows = [
        Example(n, {"input_ids": ids[n].tolist(), "labels": labels[n].tolist()}) for n in range(2)
    ]
    model = stirred(prepare(made(family), LoRA(rank=4)))
    state = prepared(model)
    assert state is not None
    assert state.engine.loss is not None
    found = evaluate(model, rows, task, pad_token_id=0)
    unprepare(model)
    wanted = evaluate(model, rows, task, pad_token_id=0)
    assert found == pytest.approx(wanted, rel=1e-6)
