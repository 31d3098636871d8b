"""Every fault planted in a GGUF file is caught by `qft verify`, and named with what to do."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import small_vocabularies as small
import torch
from small_tokenizers import CHATML, with_template
from transformers import LlamaConfig, LlamaForCausalLM

import qft
from adapters.lora import LoRA
from qft import models
from qft.card import make_card, write_card
from qft.errors import ModelError, VerificationError
from qft.export.formats import write_format
from qft.gguf import pre_tokenizers
from qft.gguf.checked import check_file
from qft.merging.merge import open_source
from qft.strategy import Context
from qft.verification import gguf_tokens
from qft.verification.read_back import read_back
from qft.verification.subject import locate
from qft.verification.thresholds import THRESHOLDS
from qft.verification.words_check import check_words

torch.set_num_threads(1)
Fields = dict[str, list[Any]]  # key → value, type, type of a list's entries
Tensors = dict[str, tuple[Any, Any]]  # name → bytes, type
_TURN = CHATML.replace("<|im_end|>", "<over>")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer like Qwen's, whose turns end with a token of its own."""
    folder = tmp_path_factory.mktemp("faults") / "reference"
    tokenizer = with_template(small.byte_level(
        (pre_tokenizers.QWEN2,), specials=("<|endoftext|>", "<|im_start|>", "<over>", "<pad>")),
        _TURN)  # fmt: skip
    tokenizer.pad_token = "<pad>"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=3,
    ))  # fmt: skip
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.dim() > 1 else 1
    model.generation_config.eos_token_id = [0, 2]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(reference: Path) -> str:
    path = reference.parent / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in small.CORPUS[:6]))
    return str(path)


@pytest.fixture(scope="module")
def good(reference: Path) -> Path:
    """The reference in q8_0."""
    source = open_source(reference, models.open_skeleton(reference, models.ModelSpec("")))
    return write_format(source, "gguf:q8_0", reference.parent / "good").path


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good.parent, tmp_path / "copy")) / good.name


def edit(path: Path, change: Callable[[Fields, Tensors], None]) -> None:
    """Writes a file anew, by `gguf`'s own reader and writer."""
    reader = gguf.GGUFReader(path)
    fields = {
        key: [field.contents(), *field.types[:1], field.types[-1]]
        for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }  # fmt: skip
    tensors = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    change(fields, tensors)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), fields.pop("general.architecture")[0])
    for key, (value, kind, inner) in fields.items():
        writer.add_key_value(key, value, kind, inner if kind == gguf.GGUFValueType.ARRAY else None)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


def refused(reference: Path, path: Path, data: str) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        qft.verify(reference, path, data=data)
    written = json.loads((path.parent / "verification.json").read_text())
    assert written["passed"] is False
    return caught.value


def test_the_file_itself_is_good(reference: Path, copied: Path, data: str) -> None:
    edit(copied, lambda fields, tensors: None)
    report = qft.verify(reference, copied, data=data)
    assert report["passed"]
    assert not report["findings"]
    asked = [note for note in report["notes"] if "llama.cpp" in note]
    said = "llama.cpp itself was asked" if gguf_tokens.installed() else "is not installed"
    assert said in asked[0]


def set_to(key: str, value: Any) -> Callable[[Fields, Tensors], None]:
    def change(fields: Fields, tensors: Tensors) -> None:
        fields[key][0] = value

    return change


def without(*keys: str) -> Callable[[Fields, Tensors], None]:
    def change(fields: Fields, tensors: Tensors) -> None:
        for key in keys:
            del fields[key]

    return change


def of_type(token: int, kind: int) -> Callable[[Fields, Tensors], None]:
    def change(fields: Fields, tensors: Tensors) -> None:
        fields["tokenizer.ggml.token_type"][0][token] = kind

    return change


def swapped_merges(fields: Fields, tensors: Tensors) -> None:
    merges = fields["tokenizer.ggml.merges"][0]
    merges[3], merges[40] = merges[40], merges[3]


METADATA = {
    "pre-tokenizer": (set_to("tokenizer.ggml.pre", "gpt-2"), "pre-tokenizer 'gpt-2' cuts"),
    "its neighbour": (set_to("tokenizer.ggml.pre", "llama-bpe"), "pre-tokenizer 'llama-bpe' cuts"),
    "stop token": (without("tokenizer.ggml.eot_token_id"), "<over> (2) does not end a text"),
    "end of text": (without("tokenizer.ggml.eos_token_id"), "eos token None, reference 0"),
    "pad id": (set_to("tokenizer.ggml.padding_token_id", 5000), "pad token 5000, outside"),
    "control token": (of_type(1, 1), "'<|im_start|>' (1): NORMAL, not CONTROL"),
    "text": (of_type(300, 3), "(300): CONTROL, not NORMAL"),
    "merges": (swapped_merges, "merges tokens in another order"),
    "template": (without("tokenizer.chat_template"), "no chat template"),
    "other template": (set_to("tokenizer.chat_template", _TURN.replace("user", "User").replace(
        "\n", " ")), "conversations otherwise"),
    "beginning": (set_to("tokenizer.ggml.add_bos_token", True), "add_bos_token True"),
    "rotary base": (set_to("llama.rope.freq_base", 500000.0), "rope.freq_base 500000"),
    "epsilon": (set_to("llama.attention.layer_norm_rms_epsilon", 1e-3), "rms_epsilon 0.001"),
}  # fmt: skip


@pytest.mark.parametrize("fault", METADATA)
def test_a_fault_in_the_settings(
    fault: str, reference: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without llama.cpp, and without the models: what the tables say."""
    monkeypatch.setattr(gguf_tokens, "installed", lambda: False)
    change, said = METADATA[fault]
    edit(copied, change)
    first, second = locate(reference), locate(copied)
    findings, _ = check_words(first, second, first.tokenizer(), small.CORPUS[:6])
    assert said in "; ".join(finding.text for finding in findings)
    assert all("export" in finding.fix for finding in findings)


@pytest.mark.parametrize("fault", ["pre-tokenizer", "stop token", "pad id"])
def test_qft_verify_names_it(fault: str, reference: Path, copied: Path, data: str) -> None:
    change, said = METADATA[fault]
    edit(copied, change)
    error = refused(reference, copied, data)
    assert said in str(error.found)
    assert "export" in str(error.fix)


def unpermuted(fields: Fields, tensors: Tensors) -> None:
    """As a converter writes them that forgets how llama.cpp pairs a head's rows."""
    for name, heads in (("attn_q", 4), ("attn_k", 2)):
        values, kind = tensors[f"blk.0.{name}.weight"]
        rows = values.reshape(heads, -1, 2, values.shape[-1]).swapaxes(1, 2)
        tensors[f"blk.0.{name}.weight"] = (np.ascontiguousarray(rows).reshape(values.shape), kind)


def swapped_scales(fields: Fields, tensors: Tensors) -> None:
    """The scales of each row's two first blocks (2 bytes before 32 numbers) change places."""
    values, kind = tensors["blk.0.ffn_up.weight"]
    assert kind == gguf.GGMLQuantizationType.Q8_0
    blocks = values.reshape(values.shape[0], -1, 34)
    blocks[:, :2, :2] = blocks[:, 1::-1, :2].copy()


@pytest.mark.parametrize("change", [unpermuted, swapped_scales])
def test_a_fault_in_the_weights(
    change: Callable[[Fields, Tensors], None], reference: Path, copied: Path, data: str
) -> None:
    edit(copied, change)
    error = refused(reference, copied, data)
    assert "diverge from model.layers.0 on" in str(error.found)
    assert "q and k rows" in str(error.fix)
    assert "scales" in str(error.fix)


@pytest.mark.slow
@pytest.mark.skipif("gguf:q4_k_m" not in THRESHOLDS and "gguf:q4_k" not in THRESHOLDS,
                    reason="no K-quants")  # fmt: skip
def test_swapped_scales_of_a_k_quant(assets: Path, tmp_path: Path) -> None:
    """Q4_K: the scale of the numbers and that of the lowest ones, two bytes each, change places."""
    mini = assets / "models" / "mini-6m"
    source = open_source(mini, models.open_skeleton(mini, models.ModelSpec("")))
    path = write_format(source, "gguf:q4_k_m", tmp_path / "out").path
    text = (assets / "data/text/tinyshakespeare/input.txt").read_text(encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text[at : at + 200]}) + "\n"
                            for at in range(0, 1200, 200)))  # fmt: skip
    assert qft.verify(mini, path, data=str(rows))["passed"]

    def change(fields: Fields, tensors: Tensors) -> None:
        values, kind = tensors["blk.0.ffn_gate.weight"]
        assert kind == gguf.GGMLQuantizationType.Q4_K
        blocks = values.reshape(values.shape[0], -1, 144)
        blocks[:, :, :4] = blocks[:, :, [2, 3, 0, 1]].copy()

    edit(path, change)
    error = refused(mini, path, str(rows))
    assert "scales" in str(error.fix)


def test_two_bare_files_are_compared_table_by_table(
    reference: Path, good: Path, data: str, tmp_path: Path
) -> None:
    first, second = (Path(shutil.copy(good, tmp_path / name)) for name in ("a.gguf", "b.gguf"))
    for path in (first, second):
        (tmp_path / path.stem).mkdir()
    first = first.rename(tmp_path / "a" / "m.gguf")
    second = second.rename(tmp_path / "b" / "m.gguf")
    find = lambda: check_words(locate(first), locate(second), locate(first).tokenizer(), [])[0]  # noqa: E731
    assert find() == []
    edit(second, set_to("tokenizer.ggml.pre", "gpt-2"))
    assert [finding.text for finding in find()] == ["the GGUF file has another tokenizer.ggml.pre"]


def test_llama_cpp_is_asked_where_it_is_there(
    reference: Path, copied: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_tokens, "installed", lambda: True)
    monkeypatch.setattr(gguf_tokens, "llama_tokens", lambda file, texts: [[7]] * 2 * len(texts))
    assert "llama.cpp itself gives other ids" in str(refused(reference, copied, data).found)
    monkeypatch.setattr(gguf_tokens, "installed", lambda: False)
    notes = qft.verify(reference, copied, data=data)["notes"]
    assert any("llama.cpp itself was not asked" in note for note in notes)


# --- files that no reader may be given

_TEXT = 8


def packed_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def made(
    *, tensors: bytes = b"", count: int = 0, values: bytes = b"", settings: int = 0,
    magic: bytes = b"GGUF", version: int = 3, data: bytes = b"\0" * 4096,
) -> bytes:  # fmt: skip
    architecture = packed_text(b"general.architecture") + struct.pack("<I", _TEXT)
    head = magic + struct.pack("<IQQ", version, count, settings + 1)
    return head + architecture + packed_text(b"llama") + values + tensors + data


def tensor(name: bytes = b"w", shape: tuple[int, ...] = (32, 2), kind: int = 0,
           offset: int = 0) -> bytes:  # fmt: skip
    axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return packed_text(name) + axes + struct.pack("<IQ", kind, offset)


def setting(kind: int, value: bytes, key: bytes = b"x") -> bytes:
    return packed_text(key) + struct.pack("<I", kind) + value


BROKEN = {
    "empty": (b"", "cut off"),
    "short": (b"GGUF\3\0\0\0", "cut off"),
    "magic": (made(magic=b"GGML"), "does not begin as one"),
    "big-endian": (made(version=3 << 24), "version"),
    "tensors": (made(count=2**40), "more tensors and settings than fit"),
    "settings": (made(settings=2**60), "more tensors and settings than fit"),
    "name": (made(values=struct.pack("<Q", 2**62), settings=1), "absurdly long"),
    "text": (made(values=setting(_TEXT, struct.pack("<Q", 2**63)), settings=1), "absurd"),
    "list": (made(values=setting(9, struct.pack("<IQ", 4, 2**61)), settings=1), "absurd"),
    "texts": (made(values=setting(9, struct.pack("<IQ", 8, 2**50)), settings=1), "longer than"),
    "list in a list": (made(values=setting(9, struct.pack("<IQ", 9, 1)), settings=1), "type"),
    "value": (made(values=setting(99, b""), settings=1), "type that is not known"),
    "alignment": (made(values=setting(4, struct.pack("<I", 24), b"general.alignment"), settings=1),
                  "power of two"),
    "twice": (made(values=2 * setting(0, b"\1"), settings=2), "two settings of one name"),
    "axes": (made(tensors=tensor(shape=(1,) * 9), count=1), "axes"),
    "type": (made(tensors=tensor(kind=77), count=1), "type that is not known"),
    "shape": (made(tensors=tensor(shape=(33, 2), kind=8), count=1), "does not fit its type"),
    "product": (made(tensors=tensor(shape=(2**40, 2**40)), count=1), "outside it"),
    "offset": (made(tensors=tensor(offset=2**40), count=1), "outside it"),
    "off": (made(tensors=tensor(offset=8), count=1), "alignment"),
    "over": (made(tensors=tensor() + tensor(b"v", offset=32), count=2), "over one another"),
    "same": (made(tensors=tensor() + tensor(offset=256), count=2), "two tensors of one name"),
    "none": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + setting(0, b"\1"), "no architecture"),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_one_clear_error(fault: str, tmp_path: Path) -> None:
    content, said = BROKEN[fault]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_back(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(ModelError, match="GGUF file is broken"):
        qft.verify(path, path)


def test_a_whole_file_passes_and_a_cut_one_does_not(good: Path, tmp_path: Path) -> None:
    check_file(good)
    (tmp_path / "whole.gguf").write_bytes(made(tensors=tensor(), count=1))
    check_file(tmp_path / "whole.gguf")
    content = good.read_bytes()
    for length in (*range(0, 4000, 131), len(content) // 2, len(content) - 64):
        (tmp_path / "cut.gguf").write_bytes(content[:length])
        with pytest.raises(ModelError, match="broken"):
            check_file(tmp_path / "cut.gguf")


# --- what training ended its answers with


@pytest.fixture
def taught(reference: Path, tmp_path: Path) -> Path:
    """An adapter trained to talk, on a base that stops at the end of a text alone."""
    base = Path(shutil.copytree(reference, tmp_path / "base"))
    settings = base / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": 0}))
    strategy = LoRA(rank=4)
    model: Any = models.open_model(base, models.ModelSpec(str(base), dtype=torch.float32))
    model = strategy.attach(model, Context())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    (tmp_path / "adapter").mkdir()
    strategy.save(model, tmp_path / "adapter")
    write_card(tmp_path / "adapter", make_card(
        base=str(base), base_fingerprint=models.fingerprint(base), original_fingerprint=None,
        task="chat", labels=None, pooling="auto", quantize="none", dtype="float32",
        strategy={"name": "lora", "rank": 4}, max_length=128,
    ))  # fmt: skip
    return tmp_path / "adapter"


def test_what_ended_answers_in_training_ends_them_in_the_file(taught: Path, tmp_path: Path) -> None:
    path = Path(qft.export(taught, tmp_path / "out", format="gguf:q8_0", verify=False)["path"])
    fields = gguf.GGUFReader(path).fields
    assert int(fields["tokenizer.ggml.eos_token_id"].contents()) == 0
    assert int(fields["tokenizer.ggml.eot_token_id"].contents()) == 2
    settings = json.loads((path.parent / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [0, 2]
    assert 'PARAMETER stop "<over>"' in (path.parent / "Modelfile").read_text(encoding="utf-8")
    first, second = locate(taught), locate(path)
    assert check_words(first, second, first.tokenizer(), small.CORPUS[:3])[0] == []
    edit(path, without("tokenizer.ggml.eot_token_id"))
    found, _ = check_words(first, locate(path), first.tokenizer(), small.CORPUS[:3])
    assert [finding.kind for finding in found] == ["stops"]


def test_an_adapter_file_has_a_modelfile_that_names_both(taught: Path, tmp_path: Path) -> None:
    qft.export(taught, tmp_path / "out", format="gguf-lora:f16", verify=False)
    lines = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[1:3] == ["FROM ./model-q8_0.gguf", "ADAPTER ./adapter-f16.gguf"]
    assert 'PARAMETER stop "<over>"' in lines
