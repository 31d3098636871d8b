from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qft.data.tasks import TASKS, Example
from qft.errors import ModelError, WillNotFitError
from qft.evaluation import evaluate, evaluating


def language_examples(count=11):
    generator = torch.Generator().manual_seed(5)
    examples = []
    for index in range(count):
        ids = torch.randint(4, 260, (4 + 5 * (index % 4) + index,), generator=generator).tolist()
        masked = index % 4
        labels = [-100] * masked + ids[masked:]
        examples.append(Example(index, {"input_ids": ids, "labels": labels}, label_bytes=len(ids)))
    return examples


@pytest.fixture(scope="module")
def llama(tiny_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform answers
    return model


def reference(model, examples, skip=0):
    """Loss, accuracy and bits per byte, one unpadded row after the other, in float64."""
    nats, right, count = 0.0, 0, 0
    for example in examples:
        ids, labels = (torch.tensor([example.inputs[k]]) for k in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, skip:-1].double()
        kept = labels[0, 1:] != -100
        log_probabilities = logits.log_softmax(dim=-1)[kept]
        target = labels[0, 1:][kept]
        nats -= log_probabilities.gather(1, target[:, None]).sum().item()
        right += (log_probabilities.argmax(dim=-1) == target).sum().item()
        count += len(target)
    total = sum(example.label_bytes for example in examples)
    return nats / count, right / count, nats / math.log(2) / total


def run(model, examples, task="text", **settings):
    return evaluate(model, examples, TASKS[task], pad_token_id=0, **settings)


def test_against_the_reference(llama):
    examples = language_examples()
    metrics = run(llama, examples, micro_batch=4)
    loss, accuracy, bits = reference(llama, examples)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert metrics["token_accuracy"] == pytest.approx(accuracy)
    assert metrics["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    # and it is not the mean of the rows' means
    means = [reference(llama, [example])[0] for example in examples]
    assert abs(sum(means) / len(means) - loss) > 1e-3


def test_neither_order_nor_micro_batch_nor_chunks_matter(llama, monkeypatch):
    examples = language_examples()
    expected = run(llama, examples, micro_batch=3)
    assert run(llama, examples[::-1], micro_batch=3) == expected
    for micro_batch in (1, 2, 64):
        assert run(llama, examples, micro_batch=micro_batch) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr("qft.judging.tokens.CHUNK_POSITIONS", 3)
    assert run(llama, examples, micro_batch=3) == pytest.approx(expected, rel=1e-6)


def test_only_the_logits_that_are_needed(llama):
    seen = []
    hook = llama.lm_head.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape)))
    labels = [-100] * 20 + [5, 6, 7]
    try:
        run(llama, [Example(0, {"input_ids": list(range(30, 53)), "labels": labels})])
    finally:
        hook.remove()
    assert seen == [(1, 4, 260)]  # of 23 positions: three predictions, and the last one


def test_soft_prompts_before_the_sequence(tiny_llama):
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = get_peft_model(base, config).eval()
    examples = language_examples(4)
    expected = reference(model, examples, skip=5)
    for micro_batch in (1, 3):
        metrics = run(model, examples, micro_batch=micro_batch)
        assert metrics["loss"] == pytest.approx(expected[0], rel=1e-4)


def test_a_peft_model(tiny_llama):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(base, config).train()
    metrics = run(model, language_examples())
    assert model.training
    expected = reference(model.eval(), language_examples())
    assert metrics["loss"] == pytest.approx(expected[0], rel=1e-5)
    seen = []
    model.base_model.model.lm_head.register_forward_hook(lambda _, __, o: seen.append(o.shape[1]))
    run(model, [Example(0, {"input_ids": [5] * 9, "labels": [-100] * 8 + [5]})])
    assert seen == [2]


def test_modes_and_randomness_are_left_as_they_were(llama):
    llama.train()
    llama.model.layers[0].eval()
    before = [module.training for module in llama.modules()]
    state = torch.get_rng_state()
    run(llama, language_examples())
    assert [module.training for module in llama.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)

    def fail():
        with evaluating(llama):
            assert not any(module.training for module in llama.modules())
            assert not torch.is_grad_enabled()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in llama.modules()] == before
    assert torch.is_grad_enabled()
    llama.eval()


class Fussy(nn.Module):
    """Runs out of memory when a batch is larger than it likes."""

    def __init__(self, inner, most, error):
        super().__init__()
        self.inner, self.most, self.error, self.batches = inner, most, error, []

    def forward(self, input_ids, attention_mask):
        self.batches.append(len(input_ids))
        if len(input_ids) > self.most:
            raise self.error
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_micro_batch(llama, error):
    model = Fussy(llama, 2, error)
    done = []
    metrics = run(model, language_examples(), micro_batch=8, progress=done.append)
    assert model.batches[:3] == [8, 4, 2]
    assert sum(batch for batch in model.batches if batch <= 2) == 11
    assert sum(batch > 2 for batch in model.batches) <= 4
    assert sum(done) == 11
    assert metrics == pytest.approx(run(llama, language_examples()), rel=1e-5)


def test_when_not_even_one_example_fits(llama):
    with pytest.raises(WillNotFitError) as caught:
        run(Fussy(llama, 0, OUT_OF_MEMORY[0]), language_examples())
    assert caught.value.exit_code == 3
    with pytest.raises(RuntimeError, match="something else"):
        run(Fussy(llama, 0, RuntimeError("something else")), language_examples())


@pytest.fixture(scope="module")
def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, num_labels=3, initializer_range=0.5,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def class_examples():
    return [
        Example(e.index, {"input_ids": e.inputs["input_ids"], "labels": e.index * 7 % 3})
        for e in language_examples(14)
    ]


def test_classes_against_the_reference(bert):
    examples = class_examples()
    bert.eval()
    with torch.no_grad():
        rows = [bert(torch.tensor([e.inputs["input_ids"]])).logits[0].double() for e in examples]
    truth = [example.inputs["labels"] for example in examples]
    nats = [-row.log_softmax(-1)[label].item() for row, label in zip(rows, truth, strict=True)]
    answers = [row.argmax().item() for row in rows]
    scores = []
    for name in range(3):
        hits = sum(a == t == name for a, t in zip(answers, truth, strict=True))
        scores.append(2 * hits / max(answers.count(name) + truth.count(name), 1))
    bert.train()  # its dropout must not matter
    metrics = run(bert, examples, "classify", micro_batch=4, labels=("a", "b", "c"))
    assert metrics["loss"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    right = sum(a == t for a, t in zip(answers, truth, strict=True))
    assert metrics["accuracy"] == pytest.approx(right / len(truth))
    assert metrics["macro_f1"] == pytest.approx(sum(scores) / 3)
    assert run(bert, examples[::-1], "classify", micro_batch=4) == metrics


@pytest.mark.parametrize("labels, label", [(("a", "b"), 0), (None, 3)])
def test_other_classes_than_the_models(bert, labels, label):
    examples = [Example(0, {"input_ids": [5, 6], "labels": label})]
    with pytest.raises(ModelError, match="different classes"):
        run(bert, examples, "classify", labels=labels)


def test_rows_of_one_length_are_batched_by_their_numbers(llama):
    examples = [
        Example(i, {"input_ids": [5 + i, 9, 9 + i], "labels": [-100, -100, 9 + i]})
        for i in range(6)
    ]
    seen = []
    hook = llama.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"][:, 0].tolist()), with_kwargs=True
    )
    try:
        run(llama, [examples[i] for i in (3, 0, 5, 1, 4, 2)], micro_batch=2)
    finally:
        hook.remove()
    assert seen == [[5, 6], [7, 8], [9, 10]]
