"""AdaLoRA, (IA)³, prompt tuning and p-tuning: plain PEFT is the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.adalora import AdaLoRA
from adapters.ia3 import IA3, usual_targets
from adapters.soft_prompt import Prompt, PTuning
from qft.errors import AdapterError, RecipeError
from qft.models import ModelSpec, open_model, open_skeleton
from qft.preparation import prepare
from qft.registry import strategy_from_folder
from qft.strategy import Context, Strategy

TASKS = {"tiny_llama": "text", "tiny_bert": "classify", "tiny_t5": "seq2seq"}
PEFT_TASKS = {"tiny_llama": "CAUSAL_LM", "tiny_bert": "SEQ_CLS", "tiny_t5": "SEQ_2_SEQ_LM"}
STEPS = 10


def opened(folder: Path, kind: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    labels = ("a", "b") if kind == "tiny_bert" else None
    settings = {"dtype": torch.float32, "device": "cpu", **changes}
    return open_model(folder, ModelSpec(str(folder), TASKS[kind], labels, **settings))


def batch(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, 260, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = {
        "tiny_llama": ids.masked_fill(mask == 0, -100),
        "tiny_bert": torch.tensor([0, 1]),
        "tiny_t5": torch.randint(4, 260, (2, 7), generator=generator),
    }[kind]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def ours_and_theirs(method: str, kind: str, folder: Path) -> tuple[Strategy, nn.Module, Any]:
    import peft

    common: dict[str, Any] = {"task_type": PEFT_TASKS[kind]}
    strategy: Strategy
    match method:
        case "adalora":
            strategy = AdaLoRA(rank=2, initial_rank=4, warmup=0.1, settled=0.2)
            config = peft.AdaLoraConfig(
                target_r=2, init_r=4, lora_alpha=32, target_modules="all-linear", tinit=1,
                tfinal=2, total_step=STEPS, **common,
            )  # fmt: skip
        case "ia3":
            strategy = IA3()
            config = peft.IA3Config(**common)
        case "prompt":
            strategy = Prompt(length=4)
            config = peft.PromptTuningConfig(
                num_virtual_tokens=4, num_transformer_submodules=1, **common
            )
        case _:
            strategy = PTuning(length=4, hidden=16)
            config = peft.PromptEncoderConfig(
                num_virtual_tokens=4, encoder_hidden_size=16, num_transformer_submodules=1, **common
            )
    ours = prepare(opened(folder, kind), strategy, context=Context(total_steps=STEPS))
    theirs = peft.get_peft_model(opened(folder, kind), config)  # type: ignore[arg-type]
    return strategy, ours, theirs.train()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def same_start(ours: nn.Module, theirs: nn.Module) -> None:
    own, their = trained(ours), trained(theirs)
    assert set(own) == set(their)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.add_(0.02 * torch.randn(parameter.shape))
            their[name].copy_(parameter)


METHODS = ["adalora", "ia3", "prompt", "p-tuning"]


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_pefts(method: str, kind: str, request: Any):
    _, ours, theirs = ours_and_theirs(method, kind, request.getfixturevalue(kind))
    same_start(ours, theirs)
    ours.eval()  # the encoder's own dropout would draw differently
    theirs.eval()
    losses = [model(**batch(kind)).loss for model in (theirs, ours)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    their = trained(theirs)
    for name, parameter in trained(ours).items():
        torch.testing.assert_close(parameter.grad, their[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_folders_are_exchanged_with_peft(method: str, kind: str, tmp_path: Path, request: Any):
    from peft import PeftModel

    folder = request.getfixturevalue(kind)
    strategy, ours, theirs = ours_and_theirs(method, kind, folder)
    same_start(ours, theirs)
    inputs = batch(kind)
    labels = inputs.pop("labels")
    if kind == "tiny_t5":
        inputs["decoder_input_ids"] = labels
    (tmp_path / "ours").mkdir()
    strategy.save(ours, tmp_path / "ours")
    reopened = PeftModel.from_pretrained(opened(folder, kind), str(tmp_path / "ours"))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    found = strategy_from_folder(tmp_path / "theirs")
    loaded = found.attach(opened(folder, kind), Context())
    found.load(loaded, tmp_path / "theirs")
    wanted = theirs.eval()(**inputs).logits
    for model in (reopened, loaded):
        torch.testing.assert_close(model.eval()(**inputs).logits, wanted, rtol=1e-4, atol=1e-5)


def test_adalora_takes_ranks_as_peft_does_and_goes_on_where_it_was(
    tiny_llama: Path, tmp_path: Path
):
    strategy, ours, theirs = ours_and_theirs("adalora", "tiny_llama", tiny_llama)
    same_start(ours, theirs)
    inputs = batch("tiny_llama")

    def steps(model: nn.Module, first: int, last: int, after: Any) -> None:
        optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)  # has no state of its own
        for step in range(first, last + 1):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
            after(step)

    steps(theirs, 1, STEPS, theirs.base_model.update_and_allocate)
    steps(ours, 1, 5, lambda step: strategy.after_step(ours, step))
    strategy.save(ours, tmp_path)
    tensors, values = strategy.state(ours)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = prepare(
        opened(tiny_llama, "tiny_llama"), strategy, context=Context(total_steps=STEPS)
    )
    strategy.load(resumed, tmp_path)
    ids = inputs["input_ids"]
    torch.testing.assert_close(resumed(input_ids=ids).logits, ours(input_ids=ids).logits)
    strategy.load_state(resumed, kept, values)
    for model in (ours, resumed):
        steps(model, 6, STEPS, lambda step, model=model: strategy.after_step(model, step))
    wanted = trained(theirs)
    emptied = 0
    for model in (ours, resumed):
        for name, parameter in trained(model).items():
            torch.testing.assert_close(parameter, wanted[name], rtol=1e-4, atol=1e-6)
            emptied += int((parameter == 0).sum()) if "lora_E" in name else 0
    assert emptied == 2 * 14 * 2  # half of the ranks, in both


def narrow_or_oddly_named(family: str, folder: Path) -> Path:
    """A two-layer encoder whose embeddings are narrower, or whose config has names of its own."""
    import transformers

    sizes = {"vocab_size": 260, "pad_token_id": 0, "max_position_embeddings": 64}
    usual = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "embedding_size": 32}  # fmt: skip
    made: Any
    match family:
        case "albert":
            made = transformers.AlbertModel(transformers.AlbertConfig(**sizes, **usual))
        case "electra":
            made = transformers.ElectraModel(transformers.ElectraConfig(**sizes, **usual))
        case _:
            own = {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}
            made = transformers.DistilBertModel(transformers.DistilBertConfig(**sizes, **own))
    made.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("strategy", [Prompt(length=3), PTuning(length=3, hidden=16)],
                         ids=["prompt", "p-tuning"])  # fmt: skip
@pytest.mark.parametrize("family", ["albert", "electra", "distilbert"])
def test_a_prompt_is_as_wide_as_the_embeddings(family: str, strategy: Strategy, tmp_path: Path):
    base = narrow_or_oddly_named(family, tmp_path / "base")
    model = prepare(opened(base, "tiny_bert"), strategy, context=Context(task="classify"))
    inputs = batch("tiny_bert")
    model(**inputs).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in trained(model).values())
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(0.1)
    saved = tmp_path / "adapter"
    saved.mkdir()
    strategy.save(model, saved)
    again = strategy_from_folder(saved)
    other = again.attach(opened(base, "tiny_bert"), Context())
    again.load(other, saved)
    torch.testing.assert_close(other.eval()(**inputs).logits, model.eval()(**inputs).logits)


def test_ia3_on_a_family_whose_names_tell_nothing(tmp_path: Path):
    base = narrow_or_oddly_named("albert", tmp_path)
    with pytest.raises(RecipeError, match="cannot be told by this family's names"):
        IA3().attach(opened(base, "tiny_bert"), Context())
    named = IA3(targets=("key", "value", "ffn_output"), feedforward=("ffn_output",))
    assert trained(named.attach(opened(base, "tiny_bert"), Context()))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_adalora_refuses_trainings_too_short_to_score_a_rank(steps: int, tiny_llama: Path):
    strategy, context = AdaLoRA(), Context(total_steps=steps)
    if steps < 3:
        with pytest.raises(RecipeError, match="too short to take ranks away"):
            strategy.attach(opened(tiny_llama, "tiny_llama"), context)
        return
    model = prepare(opened(tiny_llama, "tiny_llama"), strategy, context=context)
    for step in range(1, steps + 1):
        model.zero_grad()
        model(**batch("tiny_llama")).loss.backward()
        strategy.after_step(model, step)
    kept = sum(sum(ranks) for ranks in model.peft_config["default"].rank_pattern.values())
    assert kept == 8 * len(model.peft_config["default"].rank_pattern)


def test_adalora_needs_steps_to_take_ranks_in(tiny_llama: Path):
    with pytest.raises(RecipeError, match="too short"):
        AdaLoRA(settled=0.85).attach(opened(tiny_llama, "tiny_llama"), Context(total_steps=1))
    with pytest.raises(ValueError, match="larger than rank"):
        AdaLoRA(rank=12)
    with pytest.raises(ValueError, match="no step between"):
        AdaLoRA(warmup=0.5, settled=0.5)


def test_ia3_finds_keys_values_and_mlps(tiny_llama: Path, tiny_bert: Path, tiny_t5: Path):
    skeleton = open_skeleton(tiny_llama, ModelSpec(str(tiny_llama)))
    scaled, ends = usual_targets(skeleton)
    assert {name.split(".")[-1] for name in scaled} == {"k_proj", "v_proj"}
    assert {name.split(".")[-1] for name in ends} == {"down_proj"}
    with pytest.raises(RecipeError, match="cannot be told"):
        usual_targets(nn.Sequential(nn.Linear(2, 2)))


def test_a_text_begins_a_prompt(tiny_llama: Path):
    strategy = Prompt(length=5, init_text="x")
    model = prepare(
        opened(tiny_llama, "tiny_llama"), strategy, context=Context(tokenize=lambda _: [7, 8])
    )
    base = opened(tiny_llama, "tiny_llama")
    ids = batch("tiny_llama")["input_ids"][:1]
    text = torch.tensor([[7, 8, 7, 8, 7]])
    model.eval()
    with torch.no_grad():
        found = model(input_ids=ids).logits[:, -ids.shape[1] :]
        wanted = base(input_ids=torch.cat([text, ids], dim=1)).logits[:, 5:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(RecipeError, match="tokenizer"):
        prepare(opened(tiny_llama, "tiny_llama"), strategy)


def test_a_folded_network_does_not_go_on(tiny_llama: Path, tmp_path: Path):
    strategy = PTuning(length=4, hidden=16)
    model = prepare(opened(tiny_llama, "tiny_llama"), strategy)
    strategy.save(model, tmp_path)
    other = prepare(opened(tiny_llama, "tiny_llama"), strategy)
    strategy.load(other, tmp_path)
    for name, parameter in trained(other).items():
        assert torch.equal(parameter, trained(model)[name])
    (tmp_path / "reparametrisation.safetensors").unlink()
    with pytest.raises(AdapterError, match="no small network"):
        strategy.load(other, tmp_path)
