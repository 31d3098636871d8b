"""The lean engine where users bend it: dropout, copies, odd heads, mixtures, casts, generation."""

from __future__ import annotations

import copy
import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from test_engine import SIZES, batch, difference, made, run, stirred
from torch import Tensor, nn

from adapters.lora import LoRA
from qft.bench.step import PLAIN
from qft.data.examples import Example
from qft.data.tasks import TASKS
from qft.errors import RecipeError
from qft.lean.engine import Savers
from qft.lean.gated_mlp import is_gated_mlp
from qft.preparation import inner_model, prepare, prepared, unprepare
from qft.registry import build_strategy
from qft.step import accumulate_gradients


def dropping(family: str) -> nn.Module:
    """Models with dropouts of their own, as their configs have them by default."""
    import transformers as t

    torch.manual_seed(0)
    match family:
        case "t5":
            return t.T5ForConditionalGeneration(
                t.T5Config(vocab_size=300, d_model=64, d_kv=16, d_ff=128, num_layers=2,
                           num_heads=4, decoder_start_token_id=0)
            )  # fmt: skip
        case "bart":
            return t.BartForConditionalGeneration(
                t.BartConfig(vocab_size=300, d_model=64, encoder_layers=2, decoder_layers=2,
                             encoder_attention_heads=4, decoder_attention_heads=4,
                             encoder_ffn_dim=128, decoder_ffn_dim=128, pad_token_id=0,
                             bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)
            )  # fmt: skip
        case "opt":
            return t.OPTForCausalLM(
                t.OPTConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2, ffn_dim=128,
                            num_attention_heads=4, word_embed_proj_dim=64)
            )  # fmt: skip
        case _:
            return made("llama")


@pytest.mark.parametrize("family", ["t5", "bart", "opt", "llama"])
@pytest.mark.parametrize("clocked", [False, True])
@pytest.mark.parametrize("offload", ["none", "host"])
def test_a_recomputed_layer_drops_what_it_dropped_before(family: str, clocked: bool, offload: Any):
    rows = [
        Example(n, {"input_ids": batch()["input_ids"][n].tolist(),
                    "labels": batch()["input_ids"][n].tolist()}) for n in range(2)
    ]  # fmt: skip
    task = TASKS["seq2seq" if family in ("t5", "bart") else "text"]

    def gradients(checkpointing: Any, offload: Any) -> dict[str, Tensor]:
        dropout = 0.3 if family == "llama" else 0.0
        model = stirred(
            prepare(dropping(family), LoRA(rank=4, dropout=dropout), checkpointing=checkpointing,
                    offload=offload)
        )  # fmt: skip
        torch.manual_seed(5)
        if not clocked:
            return run(model)[1]
        accumulate_gradients(model, rows, task, step=1, micro_batch=2, pad_token_id=0)
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    wanted, found = gradients("none", "none"), gradients("full", offload)
    assert difference(found, wanted) < 1e-5


def test_an_offloaded_layer_tells_torch_its_device(monkeypatch: pytest.MonkeyPatch):
    """On a GPU the random state to restore is that of the tensors a layer is given."""
    import torch.utils.checkpoint as checkpointing

    seen = []
    plain = checkpointing._infer_device_type

    def infer(*inputs: Any) -> str:
        seen.append(sum(isinstance(value, Tensor) for value in inputs))
        return plain(*inputs)

    monkeypatch.setattr(checkpointing, "_infer_device_type", infer)
    model = prepare(made("llama"), LoRA(rank=4), checkpointing="full", offload="host")
    run(model)
    assert seen
    assert all(seen)


def test_a_copy_is_a_model_of_its_own():
    model = stirred(prepare(made("llama"), LoRA(rank=4)))
    loss, _ = run(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.mul_(100)
    model.zero_grad(set_to_none=True)
    changed, gradients = run(other)
    assert float(changed) != float(loss)
    assert gradients
    assert all(p.grad is None for p in model.parameters())
    again, _ = run(model)
    assert float(again) == float(loss)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert float(run(loaded)[0]) == float(loss)


def test_an_adapter_on_the_head_off_merged_or_one_of_two():
    strategy = LoRA(rank=4, targets=("q_proj", "lm_head"))
    plain, ours = (
        stirred(prepare(made("llama"), strategy, savers=savers)) for savers in (PLAIN, Savers())
    )
    pair: list[Any] = [plain, ours]
    assert float(run(ours)[0]) == pytest.approx(float(run(plain)[0]), rel=1e-6)
    losses = []
    for model in pair:
        with model.disable_adapter():
            losses.append(float(model(**batch()).loss))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    losses = []
    for model in pair:
        torch.manual_seed(3)
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter(["default", "second"])
        losses.append(float(model(**batch()).loss))
        model.base_model.set_adapter("default")
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    losses = []
    for model in pair:
        model.merge_adapter()
        losses.append(float(model(**batch()).loss))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("way", ["config", "argument"])
def test_a_mixtures_own_loss_is_kept(way: str):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {k: v for k, v in SIZES.items() if k != "head_dim"}
    losses = []
    for savers in (PLAIN, Savers()):
        torch.manual_seed(0)
        model = MixtralForCausalLM(
            MixtralConfig(**sizes, num_local_experts=4, router_aux_loss_coef=0.02,
                          output_router_logits=way == "config")
        )  # fmt: skip
        model = stirred(prepare(model, LoRA(rank=4, targets="attention"), savers=savers))
        extra = {"output_router_logits": True} if way == "argument" else {}
        losses.append(float(run(model, **extra)[0]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("settings", [
    {"name": "full"}, {"name": "lora", "rank": 4, "targets": ["lm_head"]},
    {"name": "lora", "rank": 4},
])  # fmt: skip
def test_a_batch_without_labels_has_zero_gradients(settings: dict[str, Any]):
    model = stirred(prepare(made("llama"), build_strategy(settings)))
    labels = torch.full_like(batch()["labels"], -100)
    loss = model(**{**batch(), "labels": labels}, num_items_in_batch=torch.tensor(7)).loss
    loss.backward()
    assert float(loss) == 0
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.grad is not None)


def test_autocast_is_left_to_peft():
    plain, ours = (
        stirred(prepare(made("llama"), LoRA(rank=4), savers=savers)) for savers in (PLAIN, Savers())
    )
    losses = []
    for model in (plain, ours):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch()).loss
        loss.backward()
        losses.append(float(loss))
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_the_loss_comes_first_as_in_transformers():
    model = prepare(made("llama"), LoRA(rank=4))
    output = model(**batch())
    assert output[0] is output.loss
    assert next(iter(output.keys())) == "loss"


@pytest.mark.parametrize("family", ["llama", "gemma3", "t5"])
def test_text_is_generated_right_after_preparing(family: str):
    model: Any = stirred(prepare(made(family), LoRA(rank=4), checkpointing="full"))
    ids = batch()["input_ids"][:1, :6]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    in_training = model.generate(input_ids=ids, **settings)
    model.eval()
    assert torch.equal(in_training, model.generate(input_ids=ids, **settings))


def test_offloaded_files_can_be_read_twice_and_go_with_their_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = stirred(prepare(made("llama"), LoRA(rank=4), offload="disk"))
    loss = model(**batch()).loss
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3
    loss.backward(retain_graph=True)
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    twice = {n: p.grad / 2 for n, p in model.named_parameters() if p.grad is not None}
    assert difference(twice, once) < 1e-6
    del loss
    for _ in range(3):
        model(**batch())  # never differentiated
    gc.collect()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_preparing_draws_nothing_from_the_generator():
    states = []
    for savers in (PLAIN, Savers()):
        model = made("llama")
        torch.manual_seed(9)
        prepare(model, LoRA(rank=4), savers=savers)
        states.append(torch.rand(1))
    assert torch.equal(*states)


def test_a_model_of_few_positions_and_one_whose_head_is_replaced():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = GPT2LMHeadModel(
        GPT2Config(n_positions=8, n_embd=64, n_layer=2, n_head=4, vocab_size=300)
    )
    model = prepare(small, build_strategy({"name": "bitfit"}))
    ids = batch()["input_ids"][:, :6]
    assert model(input_ids=ids, labels=ids).loss.requires_grad
    other: Any = prepare(made("llama"), LoRA(rank=4))
    other.resize_token_embeddings(310)
    assert other(**batch()).loss.requires_grad


def test_an_activation_that_changes_nothing_is_left_alone():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="linear"))
    assert not is_gated_mlp(model.model.layers[0].mlp)


def test_wrong_words_and_wrappers():
    with pytest.raises(RecipeError, match="No such place"):
        prepare(made("llama"), LoRA(rank=4), offload="hots")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="No such checkpointing"):
        prepare(made("llama"), LoRA(rank=4), checkpointing=True)
    model = prepare(made("llama"), LoRA(rank=4))

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

    unprepare(Wrapper())
    assert prepared(model) is None
    assert model(**batch()).logits is not None
    assert not hasattr(inner_model(model).lm_head, "_qft_plain_forward")


@pytest.mark.parametrize(("settings", "words"), [({"dora": True}, "21 of 21"), ({}, None)])
def test_adapters_that_are_left_to_peft_are_told(settings: dict[str, Any], words: str | None):
    state = prepared(prepare(made("llama"), LoRA(rank=4, **settings)))
    assert state is not None
    told = [note for note in state.notes if "PEFT's own code" in note]
    assert bool(told) == bool(words)
    assert not words or words in told[0]


def test_projections_of_one_input_are_computed_together_and_no_others():
    from qft.lean.shared_input import Siblings

    def lora_layers(model: Any) -> list[Any]:
        return [m for m in model.modules() if hasattr(m, "lora_A") and "forward" in m.__dict__]

    def families(model: Any) -> list[Siblings]:
        found = [m.forward.siblings for m in lora_layers(model)]
        return list({id(s): s for s in found if s is not None}.values())

    torch.manual_seed(0)
    x = torch.randn(2, 5, 64)
    model: Any = prepare(made("llama"), LoRA(rank=4), checkpointing="none")
    assert sorted(len(f.layers) for f in families(model)) == [2] * 3 + [3] * 3  # three layers
    attention = model.get_base_model().model.layers[0].self_attn
    family = attention.q_proj.forward.siblings
    key_apart = attention.k_proj(x.clone())
    attention.q_proj(x)
    assert torch.equal(attention.k_proj(x), key_apart)  # not what was made of the clone
    attention.v_proj(x)
    assert not family.waiting  # all were fetched: nothing is held
    attention.q_proj(x)
    x.mul_(2)  # the same tensor, and yet another
    assert not torch.allclose(attention.k_proj(x), key_apart)
    model = prepare(made("t5"), LoRA(rank=4), checkpointing="none")
    cross = model.get_base_model().decoder.block[0].layer[1].EncDecAttention
    assert cross.q.forward.siblings is None  # it reads the decoder, key and value the encoder
    own = model.get_base_model().decoder.block[0].layer[0].SelfAttention
    assert len(own.q.forward.siblings.layers) == 3


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "relu", "gelu_new"])
def test_an_activations_slope_is_its_own(name: str):
    from transformers.activations import ACT2FN

    from qft.lean.gated_mlp import slope_of, turn_gradient_

    activation = ACT2FN[name]
    slope = slope_of(activation)
    assert (slope is None) == (name in ("relu", "gelu_new"))
    x = torch.linspace(-8, 8, 33).view(3, 11).requires_grad_()
    arriving = torch.randn(3, 11)
    (wanted,) = torch.autograd.grad(activation(x), x, arriving)
    found = arriving.clone()
    turn_gradient_(activation, slope, x.detach(), found)
    torch.testing.assert_close(found, wanted)
