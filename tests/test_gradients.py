"""LoRA gradients are plain PEFT's, on plain, nf4 and int8 bases, also after an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adapters.lora import LoRA
from qft.data.tasks import TASKS, Example
from qft.models import ModelSpec, open_model
from qft.preparation import prepare
from qft.step import accumulate_gradients


def examples(count: int = 5) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(count):
        ids = torch.randint(4, 260, (6 + 3 * index,), generator=generator).tolist()
        labels = [-100] * (index + 2) + ids[index + 2 :]
        rows.append(Example(index, {"input_ids": ids, "labels": labels}))
    return rows


def set_factors(model: nn.Module) -> None:
    """The same, non-zero A and B everywhere, so that both get a gradient."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def plain_peft_gradients(folder: Path, quantize: str) -> dict[str, Tensor]:
    """transformers + PEFT + bitsandbytes with no qft in between, one padded batch."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = {
        "none": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    }[quantize]  # fmt: skip
    device_map = {"device_map": {"": "cpu"}} if config else {}
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, **device_map
    )
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    set_factors(model)
    model.train()
    batch = TASKS["text"].collate(examples(), 0)
    model(**batch).loss.backward()
    return gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert found
    assert all(g.abs().max() > 0 for g in found.values())
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / gradient.norm()
        assert error < tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_gradients_equal_plain_peft(tiny_llama: Path, quantize: str, checkpointing: str) -> None:
    expected = plain_peft_gradients(tiny_llama, quantize)
    spec = ModelSpec(str(tiny_llama), quantize=quantize, dtype=torch.float32, device="cpu")
    model = prepare(open_model(tiny_llama, spec), LoRA(rank=4), checkpointing=checkpointing)
    set_factors(model)
    # int8 quantizes each layer's input by its own rows, so the batch's split does not matter either
    tolerance = 1e-5 if quantize != "int8" else 2e-3
    for micro_batch in (5, 2):
        model.zero_grad()
        accumulate_gradients(
            model, examples(), TASKS["text"], step=1, micro_batch=micro_batch, pad_token_id=0
        )
        assert_equal(gradients(model), expected, tolerance)


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_an_evaluation_in_between_changes_no_gradient(tiny_llama: Path, quantize: str) -> None:
    """The trap of bitsandbytes' CPU kernels: train, evaluate, train."""
    from qft.evaluation import evaluate

    spec = ModelSpec(str(tiny_llama), quantize=quantize, dtype=torch.float32, device="cpu")
    model = prepare(open_model(tiny_llama, spec), LoRA(rank=4))
    set_factors(model)
    found = []
    for _ in range(2):
        model.zero_grad()
        accumulate_gradients(
            model, examples(), TASKS["text"], step=1, micro_batch=5, pad_token_id=0
        )
        found.append(gradients(model))
        evaluate(model, examples(), TASKS["text"], pad_token_id=0)
        model.eval()
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]]))
        model.train()
    assert_equal(found[1], found[0], 1e-7)


def test_out_of_memory_halves_and_replays_to_the_same_gradients(tiny_llama: Path) -> None:
    spec = ModelSpec(str(tiny_llama), dtype=torch.float32, device="cpu")
    model = prepare(open_model(tiny_llama, spec), LoRA(rank=4, dropout=0.2))
    set_factors(model)
    whole = accumulate_gradients(
        model, examples(), TASKS["text"], step=1, micro_batch=5, pad_token_id=0
    )
    expected = gradients(model)
    model.zero_grad()
    failures = [3]

    def backward(loss: Tensor) -> None:
        failures[0] -= 1
        if failures[0] == 0:
            raise torch.OutOfMemoryError("injected")
        loss.backward()

    again = accumulate_gradients(
        model, examples(), TASKS["text"], step=1, micro_batch=2, pad_token_id=0, backward=backward
    )
    assert (again.replays, again.micro_batch) == (1, 2)  # the last example was alone: tried again
    assert_equal(gradients(model), expected, 1e-5)
    assert torch.isclose(again.loss, whole.loss)


def test_not_even_one_example_fits(tiny_llama: Path) -> None:
    from qft.errors import WillNotFitError

    spec = ModelSpec(str(tiny_llama), dtype=torch.float32, device="cpu")
    model = prepare(open_model(tiny_llama, spec), LoRA(rank=4))

    def backward(loss: Tensor) -> None:
        raise torch.OutOfMemoryError("injected")

    with pytest.raises(WillNotFitError, match="Not even one example") as caught:
        accumulate_gradients(
            model, examples(), TASKS["text"], step=1, micro_batch=4, pad_token_id=0,
            backward=backward,
        )  # fmt: skip
    assert caught.value.exit_code == 3
