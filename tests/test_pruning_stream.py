"""A model run layer by layer gives what it gives as a whole, and takes one layer's memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import FAMILIES, GROUPED, make_model
from torch import Tensor, nn

from qft.errors import ModelError
from qft.layer_stream import StreamedLayer
from qft.lean.meter import Meter, meter
from qft.models import ModelSpec
from qft.pruning.layer_stream import stream_layers


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


def padded_batches(count: int = 2, rows: int = 3, length: int = 12) -> list[dict[str, Tensor]]:
    torch.manual_seed(2)
    batches = []
    for _ in range(count):
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[0, 7:] = 0
        ids = torch.randint(1, 200, (rows, length)) * mask
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    return batches


def task_of(kind: str) -> str:
    return "text" if kind not in ("bert", "classifier") else "classify"


def whole(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_layer_sees_what_it_sees_in_the_whole_model(
    family: Any, kind: str, dtype: torch.dtype
) -> None:
    folder, batches = family(kind), padded_batches()
    plain = whole(folder, dtype)
    seen: list[list[tuple[Tensor, Tensor]]] = []
    spec = ModelSpec(str(folder), task_of(kind), dtype=dtype, device="cpu")
    for layer in stream_layers(folder, spec, batches):
        seen.append([])
        layer.run(lambda given, made, tokens: seen[-1].append((given, made)))
        with pytest.raises(AttributeError):
            layer.module.weight  # noqa: B018
    assert len(seen) == 4
    outputs: dict[int, Tensor] = {}  # before the final norm, which hidden_states[-1] is after
    layers = plain.encoder.layer if hasattr(plain, "encoder") else plain.layers
    for number, module in enumerate(layers):
        module.register_forward_hook(lambda m, a, made, n=number: outputs.update({n: made}))
    for number, batch in enumerate(batches):
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            states = plain(**inputs, output_hidden_states=True).hidden_states
        for index in range(4):
            text = batch["attention_mask"].bool()
            given, made = seen[index][number]
            assert torch.equal(given[text], states[index][text])
            expected = outputs[index]
            assert torch.equal(made[text], (expected[0] if isinstance(expected, tuple)
                                            else expected)[text])  # fmt: skip


def test_tokens_are_those_of_the_batch_that_runs(family: Any) -> None:
    folder, batches = family("llama"), padded_batches()
    masks: list[Tensor] = []
    layers = stream_layers(folder, ModelSpec(str(folder), device="cpu"), batches)
    layer = next(layers)
    hook = layer.module.mlp.register_forward_hook(lambda *_: masks.append(layer.tokens))  # type: ignore[union-attr,operator]
    layer.run()
    hook.remove()
    assert torch.equal(torch.stack(masks), torch.stack([b["attention_mask"].bool()
                                                        for b in batches]))  # fmt: skip


def last_outputs(
    folder: Path, how: Any, change: Callable[[StreamedLayer], None] | None
) -> list[Tensor]:
    outputs: list[Tensor] = []
    spec = ModelSpec(str(folder), device="cpu")
    for layer in stream_layers(folder, spec, padded_batches(), propagate=how):
        if change is not None:
            change(layer)
        if layer.index == 3:
            layer.run(lambda given, made, tokens: outputs.append(given))
    return outputs


def test_the_next_layer_sees_changed_or_original_outputs_as_asked(family: Any) -> None:
    folder = family("llama")

    def silence(layer: StreamedLayer) -> None:
        for name, parameter in layer.module.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()

    plain = last_outputs(folder, "changed", None)
    original = last_outputs(folder, "original", silence)
    changed = last_outputs(folder, "changed", silence)
    embedded = whole(folder, torch.float32).embed_tokens(padded_batches()[0]["input_ids"])
    assert torch.equal(original[0], plain[0])
    assert torch.equal(changed[0], embedded)  # silent layers add nothing
    assert not torch.equal(changed[0], plain[0])


def test_a_pass_that_observes_may_propagate_too(family: Any) -> None:
    folder = family("qwen2")
    runs = [0]

    def once(layer: StreamedLayer) -> None:
        layer.module.register_forward_hook(lambda *_: runs.__setitem__(0, runs[0] + 1))
        layer.run(propagate=layer.index < 3)

    assert torch.equal(last_outputs(folder, "changed", once)[1],
                       last_outputs(folder, "changed", None)[1])  # fmt: skip
    assert runs[0] == 3 * 2 + 2 * 3  # one pass a layer; the last runs three times


def test_one_layer_is_in_memory_and_no_more(tmp_path: Path) -> None:
    import transformers as hub

    sizes = {**GROUPED, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 8,
             "vocab_size": 8000}  # embeddings of eight layers' size  # fmt: skip
    hub.LlamaForCausalLM(hub.LlamaConfig(**sizes)).save_pretrained(tmp_path)
    batches = padded_batches(count=4, rows=2)
    layers: list[nn.Module] = []
    with Meter(device="cpu") as counting:
        for layer in stream_layers(tmp_path, ModelSpec(str(tmp_path), device="cpu"), batches):
            layer.run()
            if not layers:
                layer_bytes = sum(p.numel() * 4 for p in layer.module.parameters())
                layers.append(layer.module)
    hidden_bytes = 4 * 2 * 12 * 64 * 4
    alone = hub.LlamaModel(hub.LlamaConfig(**{**sizes, "num_hidden_layers": 1})).eval()
    batch = {k: batches[0][k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        one = meter(lambda: alone(**batch), model=alone)
    within = one.peak_bytes - one.most["weights"]
    peak = counting.reading().peak_bytes
    assert peak <= (layer_bytes + hidden_bytes + within) * 1.1
    assert peak < 2 * layer_bytes
    assert peak >= layer_bytes + hidden_bytes  # the meter sees what it should


def test_what_cannot_be_streamed_is_refused(tiny_t5: Path, family: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="one stack of layers"):
        next(stream_layers(tiny_t5, ModelSpec(str(tiny_t5), "seq2seq"), padded_batches()))
    import json
    import shutil

    shutil.copytree(family("llama"), tmp_path / "q")
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    config["quantization_config"] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"(?s)stored quantized.*nf4"):
        next(stream_layers(tmp_path / "q", ModelSpec("q"), padded_batches()))
