"""The meter counts what is there to the byte, and fake tensors count as real ones do."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adapters.lora import LoRA
from qft import models
from qft.bench.fake_model import fake_step
from qft.bench.shapes import SHAPES, shape_config
from qft.bench.step import PLAIN, StepSettings, meter_step
from qft.lean.engine import Savers
from qft.lean.meter import Meter, Reading, meter
from qft.lean.standins import (
    BitsAndBytesAdam,
    FusedKernel,
    OnCuda,
    quantize_skeleton,
    quantized_bytes,
)
from qft.preparation import prepare, prepared
from qft.quantization import Scratch

SMALL: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip


def test_a_step_written_out_by_hand():
    layer = nn.Linear(10, 20, bias=False)  # 800 bytes
    frozen = nn.Linear(20, 20, bias=False).requires_grad_(False)  # 1600 bytes
    model = nn.Sequential(layer, frozen)
    optimizer = torch.optim.SGD(layer.parameters(), momentum=0.9, lr=0.1, foreach=False)
    x = torch.ones(5, 10)  # 200 bytes

    def step() -> None:
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    reading = meter(step, model=model, optimizer=optimizer)
    assert reading.static_bytes == 800 + 1600
    assert reading.most["gradients"] == 800
    assert reading.most["optimizer"] == 800
    assert reading.resident_bytes == 2400 + 800 + 800
    assert reading.end_bytes == 2400 + 800 + 200  # the gradient is gone, the input is still there
    # kept for the backward pass: the input (the frozen layer needs none); the loss and the 1 that
    # its gradient is are there as well
    assert reading.activation_bytes == 200 + 4 + 4
    # the two layers' rows, 400 bytes each, and no more
    assert reading.phases["forward"].by_category["temporary"] == 800
    # products: 5·10·20 and 5·20·20, twice each; the frozen one's weight gets no gradient,
    # the first one's input none
    assert reading.flops["forward"] == 2 * (5 * 10 * 20 + 5 * 20 * 20)
    assert reading.flops["backward"] == 2 * (5 * 20 * 20 + 5 * 10 * 20)


def test_anybodys_step_can_be_metered():
    model = nn.Linear(8, 8)
    reading = meter(lambda: model(torch.ones(4, 8)).sum().backward())
    assert reading.most["adapters"] == 8 * 8 * 4 + 8 * 4
    assert reading.most["gradients"] == reading.most["adapters"]
    assert reading.peak_bytes >= 2 * reading.most["adapters"]


def test_what_is_freed_is_gone_at_once():
    with Meter() as counting:
        for _ in range(5):
            big = torch.empty(1000)
            del big
        kept = torch.empty(10)
    reading = counting.reading()
    assert reading.peak_bytes == 4000
    assert reading.end_bytes == kept.nbytes


def test_views_count_once_and_a_storage_that_grows_counts_its_growth():
    with Meter() as counting:
        tensor = torch.empty(100)
        view = tensor[10:].view(9, 10)
        tensor.resize_(200)
        other = view.t()
    assert counting.reading().end_bytes == 800
    assert other.shape == (10, 9)


def small_config(kind: str) -> Any:
    import transformers

    match kind:
        case "llama":
            return transformers.LlamaConfig(**SMALL, tie_word_embeddings=True)
        case "gemma3":
            return transformers.Gemma3TextConfig(**SMALL, head_dim=16, sliding_window=16)
        case "bert":
            sizes = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
            return transformers.BertConfig(
                **sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
            )
        case _:
            return transformers.T5Config(
                vocab_size=512, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
                dropout_rate=0.0, decoder_start_token_id=0,
            )  # fmt: skip


CLASSES = {
    "llama": "AutoModelForCausalLM", "gemma3": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification", "t5": "AutoModelForSeq2SeqLM",
}  # fmt: skip


def stepped(kind: str, device: str, checkpointing: Any, savers: Savers) -> Reading:
    import transformers

    auto = getattr(transformers, CLASSES[kind])
    torch.manual_seed(0)
    with torch.device("cpu" if device == "real" else "meta"):
        model = auto.from_config(small_config(kind), dtype=torch.bfloat16)
    model = prepare(model, LoRA(rank=4), checkpointing=checkpointing, savers=savers)

    state = prepared(model)
    if state is not None and state.engine.loss is not None and kind in ("llama", "gemma3"):
        state.engine.loss.fake_labels = 2 * 47  # a row's first token is nobody's label

    def run() -> Reading:
        place = "cpu" if device == "real" else device
        ids = torch.ones(2, 48, dtype=torch.long, device=place)
        labels = ids if kind != "bert" else torch.zeros(2, dtype=torch.long, device=place)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], foreach=False
        )

        def step() -> None:
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return meter(step, model=model, optimizer=optimizer)

    if device == "real":
        return run()
    with fake_step(model, device=device):
        return run()


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("savers", [Savers(), PLAIN], ids=["lean", "plain"])
def test_a_fake_step_counts_as_a_real_one(kind: str, checkpointing: str, savers: Savers):
    for device in ("cpu", "meta"):
        if device == "meta":  # stands for a device where attention is SDPA's
            savers = replace(savers, attention=False)
        real = stepped(kind, "real", checkpointing, savers)
        gc.collect()
        fake = stepped(kind, device, checkpointing, savers)
        # AdamW counts its steps in a number a tensor, which on fake tensors is on the host
        assert 0 <= real.resident_bytes - fake.resident_bytes <= 4 * 64
        assert fake.static_bytes == real.static_bytes
        for phase, snapshot in real.phases.items():
            # a real batch also has its labels looked for: a mask, and a position each
            total = pytest.approx(snapshot.total, rel=1e-3, abs=2048)
            assert fake.phases[phase].total == total, phase
        assert fake.flops["backward"] == pytest.approx(real.flops["backward"], rel=0.02)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_stand_in_holds_what_bitsandbytes_holds(kind: str, tiny_llama: Path):
    spec = models.ModelSpec(str(tiny_llama), quantize=kind, dtype=torch.bfloat16, device="cpu")
    real = models.open_model(tiny_llama, spec)
    skeleton = models.open_skeleton(tiny_llama, spec)
    quantize_skeleton(skeleton, kind, ("lm_head",))
    with Meter(real) as counting:
        pass
    held = counting.reading().static_bytes
    with fake_step(skeleton), Meter(skeleton) as counting:
        pass
    wanted = counting.reading().static_bytes
    assert held == wanted
    linear = next(m for m in real.modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt"))
    size = quantized_bytes(kind, linear.out_features, linear.in_features)
    assert linear.weight.data.nbytes == size.packed


@pytest.mark.parametrize("kind", ["none", "nf4"])
def test_a_quantized_step_counts_as_a_real_one(kind: str, tiny_llama: Path):
    spec = models.ModelSpec(str(tiny_llama), quantize=kind, dtype=torch.bfloat16, device="cpu")
    real = prepare(models.open_model(tiny_llama, spec), LoRA(rank=4), checkpointing="full")
    skeleton = models.open_skeleton(tiny_llama, spec)
    if kind != "none":
        quantize_skeleton(skeleton, kind, ("lm_head",))
    fake = prepare(skeleton, LoRA(rank=4), checkpointing="full")

    def reading(model: nn.Module, device: str) -> Reading:
        ids = torch.ones(2, 64, dtype=torch.long, device=device)
        return meter(lambda: model(input_ids=ids, labels=ids).loss.backward(), model=model)

    real_reading = reading(real, "cpu")
    with fake_step(fake, device="cpu"):
        fake_reading = reading(fake, "cpu")
    above = [r.peak_bytes - r.static_bytes for r in (real_reading, fake_reading)]
    assert above[1] == pytest.approx(above[0], rel=0.02)


@pytest.mark.parametrize("heads", [4, 2])
def test_what_cudas_attention_takes_for_itself_can_count(heads: int):
    torch.manual_seed(0)
    shapes = [(1, 4, 64, 16), (1, heads, 64, 16), (1, heads, 64, 16)]
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *inputs, is_causal=True, enable_gqa=True
    )
    wanted = torch.autograd.grad(wanted.square().sum(), inputs)
    found = OnCuda.apply(*inputs, True, None, None)
    for one, other in zip(torch.autograd.grad(found.square().sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(one, other)

    def peak(on_cuda: bool) -> int:
        with FakeTensorMode(), FusedKernel(on_cuda):
            fakes = [torch.empty(s, device="meta", requires_grad=True) for s in shapes]

            def step() -> None:
                attend = torch.nn.functional.scaled_dot_product_attention
                attend(*fakes, is_causal=True, enable_gqa=True).sum().backward()

            return meter(step, device="meta").peak_bytes

    queries, sums = 4 * 4 * 64 * 16, 4 * 4 * 64  # bytes, in float32
    assert peak(True) - peak(False) == queries + sums + (2 * queries if heads == 2 else 0)


def test_layers_share_the_room_they_are_dequantized_into():
    room = Scratch()
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Linear(64, 4))
    quantize_skeleton(model, "nf4", room=room)
    first, second = (layer.dense(torch.float32) for layer in model)
    assert (first.shape, second.shape) == ((64, 8), (4, 64))
    assert first.untyped_storage()._cdata == second.untyped_storage()._cdata


def test_the_8_bit_optimizers_stand_in_holds_what_bitsandbytes_holds():
    import bitsandbytes as bnb

    def held(make: Any) -> dict[str, int]:
        parameters = [nn.Parameter(torch.ones(64, 100)), nn.Parameter(torch.ones(100))]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer = make(parameters)
        optimizer.step()
        tensors = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
        once = {t.untyped_storage().data_ptr(): t.nbytes for t in tensors}
        return {"bytes": sum(once.values())}

    ours = held(BitsAndBytesAdam)["bytes"]
    # it knows parameters by their address, and another test's may have had the same
    bnb.optim.GlobalOptimManager.get_instance().initialize()
    theirs = held(lambda p: bnb.optim.AdamW8bit(p, lr=1e-3))["bytes"]
    assert ours == theirs


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_a_config_transformers_knows(shape: str):
    config = shape_config(shape)
    assert config.vocab_size > 30000
    sizes = {"llama-3.1-8b": 8.03e9, "llama-3.1-70b": 70.55e9, "llama-3.2-1b": 1.236e9,
             "llama-3.2-3b": 3.213e9, "qwen2.5-0.5b": 0.494e9, "qwen2.5-1.5b": 1.544e9,
             "qwen2.5-3b": 3.086e9, "qwen2.5-7b": 7.616e9, "qwen2.5-14b": 14.77e9,
             "qwen2.5-32b": 32.76e9, "gemma-3-1b": 1.0e9, "gemma-3-4b": 3.88e9,
             "mistral-7b": 7.248e9, "bert-base": 0.1095e9, "t5-base": 0.2229e9}  # fmt: skip
    import transformers

    from qft.bench.shapes import TASKS

    auto = getattr(transformers, models.AUTO_CLASSES[TASKS.get(config.model_type, "text")])
    with torch.device("meta"):
        model = auto.from_config(config)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(sizes[shape], rel=2e-3)


def test_plain_peft_needs_what_it_is_known_to_need():
    """One point of the baselines that every comparison rests on: Llama-3.2-1B, T=2048."""
    settings = StepSettings("llama-3.2-1b", checkpointing="full", savers=PLAIN)
    reading = meter_step(settings, LoRA(rank=16))
    assert reading.static_bytes / 2**30 == pytest.approx(2.34, abs=0.01)
    # a loop that holds on to the logits has another copy of them, 0.49 GiB
    assert reading.peak_bytes / 2**30 == pytest.approx(6.00 - 0.49, abs=0.01)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shape", "qwen2.5-0.5"], "did you mean 'qwen2.5-0.5b'"),
        (["--shape", "bert-base", "--seq", "64", "--checkpointing", "some"], "a number of layers"),
        (["--shape", "bert-base", "--offload", "disk"], "none, host"),
        (["--shape", "bert-base", "--with", "magic"], "tiled_mlp, host_embeddings, int8_head"),
        (["--shape", "bert-base", "--seq", "64", "--labels", "0.5"], "leave --plain out"),
        (["--shape", "bert-base", "--seq", "1024"], "at most 512"),
        (["--shape", "llama-3.2-1b", "--plain", "--with", "int8_head"], "leave out one"),
        (["--shape", "llama-3.2-1b", "--checkpointing", "none", "--offload", "host"], "recomputed"),
    ],
)
def test_a_wrong_word_is_one_error(
    options: list[str], words: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    from qft import cli

    monkeypatch.setattr("sys.argv", ["qft", "bench", "step", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "no model's config"),
        ('{"model_type": "nothing"}', "does not take"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "does not take"),
        ('{"model_type": "vit"}', "no model for the task"),
    ],
)
def test_a_config_that_is_none_is_one_error(text: str, words: str, tmp_path: Path):
    from qft.errors import RecipeError

    (tmp_path / "config.json").write_text(text)
    with pytest.raises(RecipeError, match=words):
        meter_step(StepSettings(str(tmp_path)), LoRA(rank=2))
