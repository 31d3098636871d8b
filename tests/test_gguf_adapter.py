"""A low-rank adapter as a GGUF file: what llama.cpp adds to the base is what training learned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_families import make_family
from merge_bases import open_base, outputs, stir, wrapped
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from write_faults import contents

from qft import write_journal
from qft.errors import AdapterError, Interrupted, ModelError, RecipeError, VerificationError
from qft.export import delivery
from qft.verification.adapter_file import AdapterFile, add_updates
from qft.verification.subject import locate

torch.set_num_threads(1)
TOKENS = list(range(3, 27))


def make(folder: Path, family: str = "Llama", changes: dict[str, Any] | None = None,
         **settings: Any) -> Path:  # fmt: skip
    """A folder with a base and a PEFT adapter on it that has learned something."""
    base = make_family(family, folder / "base", **(changes or {}))
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear",
                           "init_lora_weights": False, "task_type": "CAUSAL_LM",
                           **settings})  # fmt: skip
    wrapped(base, config).save_pretrained(folder / "adapter")
    return folder


def export(made: Path, out: Path, **options: Any) -> dict[str, Any]:
    options = {"format": "gguf-lora:f32", "verify": False, **options}
    return delivery.export(made / "adapter", out, base=str(made / "base"), **options)


def expected(made: Path, tokens: list[int] = TOKENS) -> torch.Tensor:
    """PEFT's own answer."""
    model = PeftModel.from_pretrained(open_base(made / "base"), str(made / "adapter")).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def through_reader(made: Path, file: Path) -> torch.Tensor:
    model = open_base(made / "base")
    add_updates(model, file)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0]


PATTERNS = {"rank_pattern": {"q_proj": 8, "down_proj": 2}, "alpha_pattern": {"k_proj": 20},
            "use_rslora": True}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-patterns": ("Llama", PATTERNS),
    "llama-head": ("Llama", {"target_modules": ["q_proj", "lm_head"]}),
    "mistral": ("Mistral", {}),
    "qwen2": ("Qwen2", {"use_rslora": True}),
    "qwen3": ("Qwen3", {}),
    "gemma3": ("Gemma3", {}),
    "phi3": ("Phi3", {}),
    "gpt2": ("GPT2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_base_and_file_answer_as_base_and_adapter(tmp_path, case):
    family, settings = CASES[case]
    made = make(tmp_path, family, **settings)
    report = export(made, tmp_path / "out")
    file = tmp_path / "out" / "adapter-f32.gguf"
    assert report["path"] == str(file)
    wanted = expected(made)
    with torch.no_grad():
        plain = open_base(made / "base")(torch.tensor([TOKENS])).logits[0]
    assert (plain - wanted).abs().max() > 0.05  # the adapter does something
    assert (through_reader(made, file) - wanted).abs().max() < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_answers_as_base_and_adapter(tmp_path, case, kind):
    pytest.importorskip("llama_cpp")
    from llama_cpp_runs import logits

    family, settings = CASES[case]
    made = make(tmp_path, family, **settings)
    delivery.export(made / "base", tmp_path / "base-out", format="gguf:f32", verify=False)
    export(made, tmp_path / "out", format=f"gguf-lora:{kind}")
    wanted = expected(made)
    found = logits(tmp_path / "base-out" / "model-f32.gguf", TOKENS,
                   adapter=tmp_path / "out" / f"adapter-{kind}.gguf")  # fmt: skip
    found = found[:, : wanted.shape[1]]
    limit = 2e-3 if kind == "f32" else 5e-2
    assert (found - wanted).abs().max() < limit * wanted.abs().max()
    if kind == "f32":
        assert found.argmax(-1).tolist() == wanted.argmax(-1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_llama_cpp_writes_with_base_and_file_what_the_merged_model_writes(tmp_path, family):
    """Through llama-cpp-python's own door: its `lora_path`."""
    llama_cpp = pytest.importorskip("llama_cpp")
    made = make(tmp_path, family, use_rslora=True)
    delivery.export(made / "base", tmp_path / "base-out", format="gguf:f32", verify=False)
    export(made, tmp_path / "out")
    export(made, tmp_path / "whole", format="gguf:f32")
    options = {"n_ctx": 128, "n_threads": 1, "verbose": False, "logits_all": False}
    texts = []
    for path, adapter in (
        (tmp_path / "base-out" / "model-f32.gguf", str(tmp_path / "out" / "adapter-f32.gguf")),
        (tmp_path / "whole" / "model-f32.gguf", None),
        (tmp_path / "base-out" / "model-f32.gguf", None),
    ):
        model = llama_cpp.Llama(str(path), lora_path=adapter, **options)
        written = []
        for token in model.generate(TOKENS, temp=0.0, top_k=1, repeat_penalty=1.0):
            written.append(token)
            if len(written) == 48:
                break
        texts.append(written)
        model.close()
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


# --- the file


def test_the_file_says_what_llama_cpp_reads(tmp_path):
    made = make(tmp_path, r=4, lora_alpha=12, rank_pattern={"k_proj": 2})
    export(made, tmp_path / "out", format="gguf-lora:f16")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter-f16.gguf")
    wanted = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora",
              "adapter.lora.alpha": 12.0}  # fmt: skip
    assert {key: reader.fields[key].contents() for key in wanted} == wanted
    assert reader.fields["adapter.lora.alpha"].types[0].name == "FLOAT32"
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * 2 * 7  # two factors, two layers, seven matrices
    assert tensors["blk.0.ffn_down.weight.lora_a"].shape.tolist() == [96, 4]
    assert tensors["blk.0.ffn_down.weight.lora_b"].shape.tolist() == [4, 64]
    saved = load_file(made / "adapter" / "adapter_model.safetensors")
    start = "base_model.model.model.layers.1."
    down = saved[f"{start}mlp.up_proj.lora_A.weight"]
    assert np.array_equal(tensors["blk.1.ffn_up.weight.lora_a"].data, down.half().numpy())
    up = saved[f"{start}self_attn.q_proj.lora_B.weight"]
    order = [h * 16 + i + s * 8 for h in range(4) for i in range(8) for s in (0, 1)]
    found = tensors["blk.1.attn_q.weight.lora_b"].data
    assert np.array_equal(found, up[order].half().numpy())
    assert not np.array_equal(found, up.half().numpy())
    # of half the rank at the same alpha: twice the scale, which one alpha for all cannot say
    other = saved[f"{start}self_attn.k_proj.lora_B.weight"]
    order = [h * 16 + i + s * 8 for h in range(2) for i in range(8) for s in (0, 1)]
    found = tensors["blk.1.attn_k.weight.lora_b"].data
    assert found.shape == (32, 2)
    assert np.array_equal(found, other[order].half().numpy())


@pytest.mark.parametrize("settings,alpha,more", [
    ({"r": 16, "lora_alpha": 8, "use_rslora": True}, 8 * 16**0.5, 1),
    ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"k_proj": 20}}, 8.0, 20 / 8),
])  # fmt: skip
def test_a_scale_that_alpha_cannot_say_is_multiplied_into_b(tmp_path, settings, alpha, more):
    made = make(tmp_path, target_modules=["q_proj", "k_proj", "v_proj"], **settings)
    export(made, tmp_path / "out")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter-f32.gguf")
    assert reader.fields["adapter.lora.alpha"].contents() == pytest.approx(alpha)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    saved = load_file(made / "adapter" / "adapter_model.safetensors")
    up = saved["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"]
    found = torch.tensor(tensors["blk.0.attn_k.weight.lora_b"].data)
    assert found.norm() == pytest.approx(more * up.norm().item(), rel=1e-5)


def test_q8_0_holds_what_fits_and_says_the_rest(tmp_path):
    made = make(tmp_path, r=32, target_modules=["q_proj", "down_proj"],
                rank_pattern={"down_proj": 4})  # fmt: skip
    report = export(made, tmp_path / "out", format="gguf-lora:q8_0")
    assert report["notes"][0] == "2 of 8 factors stay in f16: q8_0 needs rows in multiples of 32"
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter-q8_0.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight.lora_b"] == types["blk.0.ffn_down.weight.lora_a"] == "Q8_0"
    assert types["blk.0.ffn_down.weight.lora_b"] == "F16"
    found, wanted = through_reader(made, Path(report["path"])), expected(made)
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_an_update_of_adalora_is_written_too(tmp_path):
    from peft import AdaLoraConfig, get_peft_model

    base = make_family("Llama", tmp_path / "base")
    config = AdaLoraConfig(init_r=6, target_r=4, lora_alpha=8, total_step=100, tinit=1, tfinal=1,
                           target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(open_base(base), config)
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    export(tmp_path, tmp_path / "out")
    wanted = expected(tmp_path)
    found = through_reader(tmp_path, tmp_path / "out" / "adapter-f32.gguf")
    assert (found - wanted).abs().max() < 2e-4


def test_ollama_is_told_of_base_and_adapter(tmp_path):
    made = make(tmp_path, target_modules=["q_proj"])
    export(made, tmp_path / "out", format="gguf-lora:f16")
    lines = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    told = [line for line in lines if not line.startswith("#")]
    assert told[:2] == ["FROM ./model-q8_0.gguf", "ADAPTER ./adapter-f16.gguf"]
    assert any(line.startswith("PARAMETER stop ") for line in told)
    assert any("--format gguf:q8_0" in line for line in lines if line.startswith("#"))


# --- what is refused


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "DoRA"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "update of embeddings"),
    "rows": ({"trainable_token_indices": [5, 6]}, "token rows"),
    "whole": ({"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}, "lm_head.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_more_than_low_rank_is_refused_with_what_to_do(tmp_path, case):
    settings, word = REFUSED[case]
    made = make(tmp_path, **settings)
    with pytest.raises(AdapterError, match="more than low-rank updates") as error:
        export(made, tmp_path / "out")
    assert word in str(error.value)
    assert "--format gguf:q8_0" in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_biases_that_train_are_refused(tmp_path):
    made = make(tmp_path, "Qwen2", target_modules=["q_proj"], bias="all")
    with pytest.raises(AdapterError, match=r"bias") as error:
        export(made, tmp_path / "out")
    assert "trained whole" in str(error.value)


def test_a_head_tied_to_the_embeddings_is_refused(tmp_path):
    made = make(tmp_path, changes={"tie_word_embeddings": True},
                target_modules=["q_proj", "lm_head"])  # fmt: skip
    with pytest.raises(ModelError, match="adds no update") as error:
        export(made, tmp_path / "out")
    assert "tied to the embeddings" in str(error.value)


def test_another_kind_of_adapter_and_a_model_are_refused(tmp_path):
    from peft import IA3Config

    base = make_family("Llama", tmp_path / "base")
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
                       task_type="CAUSAL_LM")  # fmt: skip
    wrapped(base, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="no low-rank updates"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(RecipeError, match="holds an adapter"):
        delivery.export(base, tmp_path / "out", format="gguf-lora:f16", verify=False)
    with pytest.raises(RecipeError, match="made onto no base"):
        export(tmp_path, tmp_path / "out", onto="original")
    assert not (tmp_path / "out").exists()


def test_a_factor_too_large_for_f16_is_named(tmp_path):
    made = make(tmp_path, target_modules=["q_proj"])
    path = made / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "layers.1" in name and "lora_A" in name)
    tensors[name][0, 0] = 1e6
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="too large for float16") as error:
        export(made, tmp_path / "out", format="gguf-lora:f16")
    assert "blk.1.attn_q.weight.lora_a" in str(error.value)
    assert not (tmp_path / "out").exists()


# --- the proof, and going on


def rows(folder: Path) -> str:
    path = folder / "rows.jsonl"
    texts = ["some words to compare the answers on", "and a few more of them 123"] * 4
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_an_export_is_compared_with_what_was_trained(tmp_path, kind):
    made = make(tmp_path, r=32)
    report = export(made, tmp_path / "out", format=f"gguf-lora:{kind}", verify=True,
                    data=rows(tmp_path))  # fmt: skip
    assert report["verification"]["passed"]
    assert not report["verification"]["layer_by_layer"]
    assert report["verification"]["format"] == f"gguf-lora:{kind}"
    assert report["verification"]["mean_kl"] >= 0
    assert (tmp_path / "out" / "verification.json").is_file()


@pytest.mark.parametrize("fault", ["order", "scale", "names"])
def test_a_wrong_file_does_not_pass(tmp_path, monkeypatch, fault):
    """The reader does not undo the writer's own mistakes."""
    from qft.export import gguf_adapter_format

    if fault == "order":
        monkeypatch.setattr("qft.gguf.turned.reorder_rows", lambda weight, heads: weight)
    elif fault == "scale":
        plain = gguf_adapter_format.AdapterPlan.metadata
        monkeypatch.setattr(gguf_adapter_format.AdapterPlan, "metadata", lambda plan: {
            **plain(plan), "adapter.lora.alpha": 0.5 * plan.alpha})  # fmt: skip
    else:
        swapped = {"k": "v", "v": "k"}
        plain_produce = gguf_adapter_format.AdapterPlan.produce

        def produce(plan, name, start=0):
            part = name.split(".")[2][-1]
            other = name.replace(f"attn_{part}", f"attn_{swapped.get(part, part)}")
            return plain_produce(plan, other, start)

        monkeypatch.setattr(gguf_adapter_format.AdapterPlan, "produce", produce)
    made = make(tmp_path)
    with pytest.raises(VerificationError):
        export(made, tmp_path / "out", verify=True, data=rows(tmp_path))


def test_the_file_beside_a_quantized_base_is_compared_too(tmp_path):
    """The artefact is the adapter on the original base."""
    made = make(tmp_path)
    export(made, tmp_path / "out")
    reference = locate(made / "adapter", base=str(made / "base"))
    subject = AdapterFile.of(reference, tmp_path / "out" / "adapter-f32.gguf")
    assert subject.home == tmp_path / "out"
    assert torch.allclose(outputs(subject.open(torch.float32)),
                          outputs(reference.open(torch.float32)), atol=2e-4)  # fmt: skip


def test_it_is_never_compared_layer_by_layer_without_the_adapter(tmp_path):
    from qft.verification.streams import CannotStreamError, open_weights

    made = make(tmp_path, target_modules=["q_proj"])
    reference = locate(made / "adapter", base=str(made / "base"))
    subject = AdapterFile.of(reference, tmp_path / "out" / "adapter-f32.gguf")
    with pytest.raises(CannotStreamError), open_weights(subject, torch.float32):
        pass


def test_an_adapter_file_alone_is_one_clear_error(tmp_path):
    made = make(tmp_path, target_modules=["q_proj"])
    export(made, tmp_path / "out")
    for named in (tmp_path / "out", tmp_path / "out" / "adapter-f32.gguf"):
        with pytest.raises(ModelError, match="adapter without its base"):
            locate(named)


def test_interrupted_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(write_journal, "_EVERY_BYTES", 1)
    made = make(tmp_path)
    export(made, tmp_path / "whole")
    plain, left = write_journal.JournalledFile.write, [20]

    def stop(file, data):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        plain(file, data)

    monkeypatch.setattr(write_journal.JournalledFile, "write", stop)
    with pytest.raises(Interrupted):
        export(made, tmp_path / "out")
    left[0] = -1
    export(made, tmp_path / "out")
    assert -60 < left[0] < -30  # not all of it again
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
