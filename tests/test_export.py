"""Every export format, read back by a reader that is not the writer's."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from qft import models, quantization
from qft.errors import ModelError, OutputExistsError, RecipeError, SaveError
from qft.export.formats import FORMATS, write_format
from qft.gguf.turned import reorder_rows
from qft.merging.merge import open_source
from qft.merging.tensors import MergedTensors
from qft.verification.read_back import read_back

torch.set_num_threads(1)
Usage = namedtuple("Usage", "total used free")
SHAPE = {
    "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
PROMPT = torch.tensor([[5, 9, 80, 200, 31, 7]])


def make_model(folder: Path, kind: str = "llama", dtype=torch.float32, **changes) -> Path:
    config, cls = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    if kind == "mistral":
        changes.setdefault("sliding_window", None)
    if kind == "qwen2":  # transformers gives this family's tokenizers one more token
        changes.setdefault("vocab_size", 264)
    torch.manual_seed(0)
    model = cls(config(**{**SHAPE, "tie_word_embeddings": False, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):  # they start as zeros and ones
            torch.nn.init.normal_(parameter, 1.0, 0.3)
        else:
            parameter.data *= 5  # so that predictions are far from uniform
    model.to(dtype).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def source_of(folder: Path) -> MergedTensors:
    return open_source(folder, models.open_skeleton(folder, models.ModelSpec(source=str(folder))))


def greedy(model: torch.nn.Module, prompt: torch.Tensor, count: int = 24) -> list[int]:
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, pad_token_id=0, **options)[0].tolist()


@pytest.mark.parametrize(
    "kind,changes",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 32}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
)
def test_gguf_gives_the_same_logits_through_transformers(tmp_path, kind, changes):
    base = make_model(tmp_path / "base", kind, **changes)
    report = write_format(source_of(base), "gguf:f32", tmp_path / "out")
    assert report.path == tmp_path / "out" / "model-f32.gguf"
    expected = AutoModelForCausalLM.from_pretrained(base).eval()
    found = read_back(report.path)
    with torch.no_grad():
        difference = (found(PROMPT).logits - expected(PROMPT).logits).abs().max()
    assert difference < 1e-5
    tied = bool(changes.get("tie_word_embeddings"))
    names = {tensor.name for tensor in gguf.GGUFReader(report.path).tensors}
    assert ("output.weight" in names) == (not tied)


def test_gguf_f16_holds_every_tensor(tmp_path):
    base = make_model(tmp_path / "base")
    source = source_of(base)
    seen: list[int] = []
    report = write_format(source, "gguf:f16", tmp_path / "out", progress=seen.append)
    assert sum(seen) == source.total_bytes()
    check_every_tensor(source, report.path, heads=4, kv_heads=2)
    assert greedy(read_back(report.path), PROMPT) == greedy(
        AutoModelForCausalLM.from_pretrained(base), PROMPT
    )


def check_every_tensor(source: MergedTensors, path: Path, heads: int, kv_heads: int) -> None:
    """Compares by llama.cpp's own names, independently of the exporter's plan."""
    mapping = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH.LLAMA, int(source.config["num_hidden_layers"])
    )
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name in source.names():
        written = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        value = source.read(name).float()
        count = heads if ".attn_q." in written else kv_heads if ".attn_k." in written else 0
        if count:  # pair i of a head comes from its rows i and i + half
            half = value.shape[0] // count // 2
            order = [h * 2 * half + i + s * half
                     for h in range(count) for i in range(half) for s in (0, 1)]  # fmt: skip
            value = value[order]
        tensor = stored.pop(written)
        vector = value.dim() == 1
        assert tensor.tensor_type == (
            gguf.GGMLQuantizationType.F32 if vector else gguf.GGMLQuantizationType.F16
        )
        expected = value.numpy() if vector else value.half().numpy()
        assert np.array_equal(tensor.data.reshape(value.shape), expected), name
    assert not stored


def test_reordering_is_undone_by_its_inverse():
    weight = torch.arange(16.0)[:, None] * torch.ones(1, 3)
    rows = reorder_rows(weight, 2)[:, 0].tolist()
    assert rows == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_llama3_rope_factors_are_transformers_own(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    base = make_model(tmp_path / "base", rope_parameters=LLAMA3_ROPE, head_dim=64)
    report = write_format(source_of(base), "gguf:f16", tmp_path / "out")
    stored = {t.name: t.data for t in gguf.GGUFReader(report.path).tensors}["rope_freqs.weight"]
    config = LlamaConfig(**{**SHAPE, "rope_parameters": LLAMA3_ROPE, "head_dim": 64})
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    assert torch.allclose(plain / torch.tensor(stored), expected, rtol=1e-5)
    assert len(set(stored.tolist())) > 3  # some kept, some slowed, some in between


def test_gguf_metadata(tmp_path):
    base = make_model(tmp_path / "base", vocab_size=263)
    report = write_format(source_of(base), "gguf:q8_0", tmp_path / "out")
    fields = gguf.GGUFReader(report.path).fields
    expected = {
        "general.architecture": "llama", "general.file_type": 7, "llama.block_count": 2,
        "llama.context_length": 128, "llama.embedding_length": 64, "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0, "llama.vocab_size": 263,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {key: fields[key].contents() for key in expected} == expected
    assert "<|turn|>" in fields["tokenizer.chat_template"].contents()
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[:3] == ["<pad>", "<s>", "</s>"]
    assert tokens[260:] == ["[PAD260]", "[PAD261]", "[PAD262]"]
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[:5] == [3, 3, 3, 3, 1]
    assert types[260:] == [5, 5, 5]


def test_rows_q8_0_cannot_hold_stay_in_f16_and_are_named(tmp_path):
    base = make_model(tmp_path / "base", intermediate_size=100)
    report = write_format(source_of(base), "gguf:q8_0", tmp_path / "out")
    assert "2 tensor(s) are stored in f16, not q8_0" in report.notes[0]
    assert "rows of 100" in report.notes[0]
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(report.path).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"


def test_gguf_refuses_a_model_without_a_tokenizer(tmp_path):
    source = source_of(make_model(tmp_path / "base"))
    source.files = {}
    with pytest.raises(ModelError, match="holds a tokenizer"):
        write_format(source, "gguf:f16", tmp_path / "out")


@pytest.mark.parametrize("name", ["stories260K", "mini-6m"])
def test_a_real_model_as_gguf(tmp_path, assets, name):
    folder = assets / "models" / name
    source = source_of(folder)
    report = write_format(source, "gguf:f16", tmp_path / "out")
    config = source.config
    check_every_tensor(
        source, report.path, config["num_attention_heads"], config["num_key_value_heads"]
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    from_file = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=report.path.name)
    text = "Once upon a time, Lily's dog ran\n\n  away; 1234 naïve €. <s>"
    assert from_file(text)["input_ids"] == tokenizer(text)["input_ids"]
    prompt = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert greedy(read_back(report.path), prompt, 40) == greedy(expected, prompt, 40)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bnb_opens_as_if_quantized_at_load(tmp_path, kind, dtype):
    base = make_model(tmp_path / "base", dtype=dtype, intermediate_size=160)
    source = source_of(base)
    write_format(source, f"bnb:{kind}", tmp_path / "out", max_shard_bytes=40_000)
    skip = quantization.unquantized_modules(models.open_skeleton(base, models.ModelSpec("")))
    settings = quantization.loading_config(kind, dtype, skip)
    assert isinstance(settings, BitsAndBytesConfig)
    expected = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=settings, dtype=dtype, device_map={"": "cpu"}
    )
    found, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=dtype, device_map={"": "cpu"}, output_loading_info=True
    )
    assert not any(info.values())
    modules = dict(found.named_modules())
    quantized = 0
    for name, module in expected.named_modules():
        if getattr(module, "weight", None) is None:
            continue
        assert type(modules[name]) is type(module), name
        ours, theirs = quantization.dequantized(modules[name]), quantization.dequantized(module)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), name
        quantized += type(module).__name__.startswith(("Linear4", "Linear8"))
    assert quantized == 14
    assert type(modules["lm_head"]) is torch.nn.Linear


def test_bnb_layout_is_what_transformers_saves(tmp_path):
    base = make_model(tmp_path / "base")
    source = source_of(base)
    for kind in ("nf4", "int8"):
        write_format(source, f"bnb:{kind}", tmp_path / kind)
        settings = quantization.loading_config(kind, torch.float32, ["lm_head"])
        AutoModelForCausalLM.from_pretrained(
            base, quantization_config=settings, dtype=torch.float32, device_map={"": "cpu"}
        ).save_pretrained(tmp_path / f"{kind}-saved")
        ours = load_file(tmp_path / kind / "model.safetensors")
        theirs = load_file(tmp_path / f"{kind}-saved" / "model.safetensors")
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            if "quant_state" in name:  # padded JSON
                assert json.loads(bytes(ours[name].tolist())) == json.loads(bytes(tensor.tolist()))
            else:
                assert ours[name].dtype == tensor.dtype
                assert torch.equal(ours[name], tensor), name


def test_bnb_keeps_a_classifiers_head(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                        num_attention_heads=4, num_labels=3)  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    spec = models.ModelSpec(source="", task="classify", dtype=torch.float32)
    source = open_source(tmp_path / "base", models.open_skeleton(tmp_path / "base", spec))
    write_format(source, "bnb:nf4", tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", device_map={"": "cpu"}
    )
    assert type(model.classifier) is torch.nn.Linear
    assert type(model.bert.encoder.layer[0].attention.self.query).__name__ == "Linear4bit"
    assert torch.equal(model.classifier.weight, source.read("classifier.weight"))


@pytest.mark.parametrize("kind,dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_safetensors_in_another_dtype(tmp_path, kind, dtype):
    base = make_model(tmp_path / "base", tie_word_embeddings=True)
    source = source_of(base)
    write_format(source, f"safetensors:{kind}", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype
    for name in source.names():
        assert torch.equal(model.state_dict()[name], source.read(name).to(dtype))


def test_unknown_formats_and_taken_outputs_are_refused(tmp_path):
    source = source_of(make_model(tmp_path / "base"))
    with pytest.raises(RecipeError, match="no such export format"):
        write_format(source, "gguf:q2", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("1")
    for format in FORMATS:
        with pytest.raises(OutputExistsError):
            write_format(source, format, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["precious"]


@pytest.mark.parametrize("format", ["gguf:q8_0", "bnb:nf4", "safetensors:bf16"])
def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch, format):
    source = source_of(make_model(tmp_path / "base"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10, 10, 1000))
        with pytest.raises(SaveError, match="not enough room"):
            write_format(source, format, tmp_path / "out")
    blocks, last = source.blocks, source.names()[-1]

    def fail(name):
        if name == last:
            raise OSError(errno.ENOSPC, "No space left on device")
        return blocks(name)

    monkeypatch.setattr(source, "blocks", fail)
    with pytest.raises(SaveError, match="disk is full"):
        write_format(source, format, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
