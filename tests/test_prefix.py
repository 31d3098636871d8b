"""Prefix tuning against PEFT's own: outputs, gradients, folders; and where PEFT's fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.prefix import Prefix
from qft.errors import AdapterError, RecipeError
from qft.lean.prefix_attention import PrefixEncoder, attention_modules, recorded
from qft.merging.merge import open_source
from qft.preparation import prepare
from qft.registry import strategy_from_folder
from qft.strategy import Context

LENGTH = 5
SIZES = {
    "vocab_size": 260, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **SIZES, **changes,
    ))  # fmt: skip


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0, **SIZES,
    ))  # fmt: skip


def bert_like(kind: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        **SIZES,
    )  # fmt: skip
    model: nn.Module = getattr(transformers, f"{kind}ForSequenceClassification")(config)
    return model


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(
        d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, vocab_size=260, pad_token_id=0, eos_token_id=2,
    ))  # fmt: skip


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    return BartForConditionalGeneration(BartConfig(
        d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, dropout=0.0,
        max_position_embeddings=128, decoder_start_token_id=2, **SIZES,
    ))  # fmt: skip


FAMILIES = {
    "llama": (llama, "CAUSAL_LM"),
    "gpt2": (gpt2, "CAUSAL_LM"),
    "bert": (lambda: bert_like("Bert"), "SEQ_CLS"),
    "roberta": (lambda: bert_like("Roberta"), "SEQ_CLS"),
    "t5": (t5, "SEQ_2_SEQ_LM"),
    "bart": (bart, "SEQ_2_SEQ_LM"),
}
OURS = [*FAMILIES]


def fresh(family: str) -> nn.Module:
    torch.manual_seed(0)
    return FAMILIES[family][0]()


def batch(task_type: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 260, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ids[1, 6:] = 0
    labels = {
        "CAUSAL_LM": ids.masked_fill(mask == 0, -100),
        "SEQ_CLS": torch.tensor([0, 1]),
        "SEQ_2_SEQ_LM": torch.randint(4, 260, (2, 7), generator=generator),
    }[task_type]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def with_peft(family: str, **settings: Any) -> Any:
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(
        task_type=FAMILIES[family][1], num_virtual_tokens=LENGTH, **settings
    )
    return get_peft_model(fresh(family), config)


def encoder_of(model: nn.Module) -> PrefixEncoder:
    return next(m for m in model.modules() if isinstance(m, PrefixEncoder))


def same_start(theirs: Any, ours: nn.Module) -> None:
    encoder = encoder_of(ours)
    parts = theirs.prompt_encoder["default"]
    with torch.no_grad():
        encoder.embedding.weight.copy_(parts.embedding.weight)
        if encoder.transform is not None:
            encoder.transform.load_state_dict(parts.transform.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reparametrise", [False, True])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_loss_and_gradients_are_pefts(family: str, reparametrise: bool, checkpointing: Any):
    theirs = with_peft(family, prefix_projection=reparametrise)
    strategy = Prefix(length=LENGTH, reparametrise=reparametrise)
    ours = prepare(fresh(family), strategy, checkpointing=checkpointing)
    same_start(theirs, ours)
    theirs.train()
    inputs = batch(FAMILIES[family][1])
    losses = [model(**inputs).loss for model in (theirs, ours)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    parts = theirs.prompt_encoder["default"]
    wanted, found = parts.embedding.weight.grad, encoder_of(ours).embedding.weight.grad
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    if FAMILIES[family][1] == "SEQ_CLS":
        heads = {n: p.grad for n, p in ours.named_parameters() if n.startswith("classifier")}
        assert heads
        for name, gradient in heads.items():
            part, _, last = name.rpartition(".")
            module = theirs.base_model.classifier.modules_to_save["default"]
            inner = module.get_submodule(part.removeprefix("classifier").lstrip("."))
            torch.testing.assert_close(gradient, getattr(inner, last).grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_folders_are_exchanged_with_peft(family: str, tmp_path: Path):
    from peft import PeftModel

    inputs = batch(FAMILIES[family][1])
    strategy = Prefix(length=LENGTH, reparametrise=True)
    ours = prepare(fresh(family), strategy)
    strategy.save(ours, tmp_path)
    theirs = PeftModel.from_pretrained(fresh(family), str(tmp_path))
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, ours(**inputs).logits)

    written = with_peft(family).eval()
    written.save_pretrained(str(tmp_path / "theirs"))
    found = strategy_from_folder(tmp_path / "theirs")
    assert found == Prefix(length=LENGTH)
    opened = found.attach(fresh(family), Context()).eval()
    found.load(opened, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(opened(**inputs).logits, written(**inputs).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_generation_with_a_cache_is_pefts(family: str, tmp_path: Path):
    theirs = with_peft(family).eval()
    ours = Prefix(length=LENGTH).attach(fresh(family), Context()).eval()
    same_start(theirs, ours)
    inputs = batch(FAMILIES[family][1])
    ids = inputs["input_ids"][:1]
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    wanted = theirs.generate(input_ids=ids, **settings)
    assert ours.generate(input_ids=ids, **settings).tolist() == wanted.tolist()  # type: ignore[operator]
    settings["use_cache"] = False
    assert ours.generate(input_ids=ids, **settings).tolist() == wanted.tolist()  # type: ignore[operator]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_prefix_from_a_text_acts_as_that_text(implementation: str, padded: bool):
    text = [7, 8, 9, 10, 11]
    torch.manual_seed(0)
    base = llama(attn_implementation=implementation).eval()
    torch.manual_seed(0)
    model = llama(attn_implementation=implementation)
    strategy = Prefix(length=LENGTH, init_text="a text")
    model = strategy.attach(model, Context(tokenize=lambda _: text)).eval()
    inputs = batch("CAUSAL_LM")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if not padded:
        ids, mask = ids[:1], mask[:1]
    before = torch.tensor([text]).expand(len(ids), -1)
    with torch.no_grad():
        wanted = base(
            input_ids=torch.cat([before, ids], dim=1),
            attention_mask=torch.cat([torch.ones_like(before), mask], dim=1),
        ).logits[:, LENGTH:]
        found = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # and with no mask at all
        torch.testing.assert_close(
            model(input_ids=ids[:1]).logits, wanted[:1], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_text_is_read_by_every_family(family: str):
    strategy = Prefix(length=3, init_text="x")
    model = strategy.attach(fresh(family), Context(tokenize=lambda _: [5, 6]))
    flat = encoder_of(model).flat().detach()
    again = recorded(attention_modules(model), lambda: model(
        input_ids=torch.tensor([[5, 6, 5]]), decoder_input_ids=torch.tensor([[5, 6, 5]]),
    ) if family == "t5" else model(input_ids=torch.tensor([[5, 6, 5]])))  # fmt: skip
    assert flat.shape == again.shape
    assert flat.abs().max() > 0


def test_a_training_with_the_small_network_goes_on_where_it_was(tmp_path: Path):
    strategy = Prefix(length=LENGTH, reparametrise=True, hidden=16)
    model = prepare(fresh("llama"), strategy)
    strategy.save(model, tmp_path)
    other = prepare(fresh("llama"), strategy)
    strategy.load(other, tmp_path)
    wanted = encoder_of(model).state_dict()
    assert len(wanted) == 5
    for name, value in encoder_of(other).state_dict().items():
        assert torch.equal(value, wanted[name]), name
    (tmp_path / "reparametrisation.safetensors").unlink()
    with pytest.raises(RecipeError, match="no reparametrisation"):
        strategy.load(other, tmp_path)


def test_it_trains_in_four_bits_and_bfloat16(tiny_llama: Path):
    from qft.models import ModelSpec, open_model

    spec = ModelSpec(str(tiny_llama), quantize="nf4", dtype=torch.bfloat16, device="cpu")
    model = prepare(open_model(tiny_llama, spec), Prefix(length=4))
    weight = encoder_of(model).embedding.weight
    assert weight.dtype == torch.float32
    model(**batch("CAUSAL_LM")).loss.backward()
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_merging_says_what_to_do_instead(tiny_llama: Path, tmp_path: Path):
    with pytest.raises(AdapterError, match="cannot be folded") as caught:
        open_source(tiny_llama, nn.Module(), adapter=tmp_path, strategy=Prefix())
    assert "lora" in str(caught.value.fix)


def test_settings_that_contradict_each_other():
    with pytest.raises(ValueError, match="init_text"):
        Prefix(reparametrise=True, init_text="a")
    with pytest.raises(RecipeError, match="tokenizer"):
        Prefix(init_text="a").attach(fresh("llama"), Context())
    with pytest.raises(RecipeError, match="empty"):
        Prefix(init_text="a").attach(fresh("llama"), Context(tokenize=lambda _: []))


def test_positions_that_the_model_does_not_have_are_refused(tiny_bert: Path, tmp_path: Path):
    import qft

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    recipe = qft.build_recipe({
        "model": str(tiny_bert), "task": "classify", "data": {"train": str(rows)},
        "strategy": {"name": "prefix", "length": 10}, "train": {"max_length": 128},
        "output": str(tmp_path / "run"),
    })  # fmt: skip
    with pytest.raises(RecipeError, match="longer than the model takes") as caught:
        qft.check(recipe)
    assert caught.value.fix == "train.max_length: 118"
