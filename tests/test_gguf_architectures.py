"""Every architecture and setting as GGUF: the same logits by readers that are not the writer's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from gguf_families import family_config, make_family
from typer.testing import CliRunner

import qft
from qft import models
from qft.cli import app
from qft.errors import ModelError, VerificationError
from qft.export.formats import write_format
from qft.gguf.architectures import architecture_of
from qft.gguf.contract import Architecture
from qft.gguf.naming import naming, size_label
from qft.merging.merge import open_source
from qft.merging.tensors import MergedTensors
from qft.pooling import CONFIG_KEY
from qft.verification.gguf_config import OpenedGGUF
from qft.verification.read_back import GGUFTensors, read_back
from qft.verification.subject import locate

torch.set_num_threads(1)


def rope(kind: str, **changes: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **changes}}


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)  # fmt: skip
LINEAR = rope("linear", factor=4.0)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
YARN_SCALED = rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=0.7)


def longrope(width: int, **changes: Any) -> dict[str, Any]:
    """Factors for heads of which ``width`` numbers are rotated; original context 256."""
    steps = range(width // 2)
    values = rope("longrope", short_factor=[1.0 + 0.1 * step for step in steps],
                  long_factor=[2.0 + 0.5 * step for step in steps],
                  original_max_position_embeddings=256, **changes)  # fmt: skip
    return {**values, "original_max_position_embeddings": 256}


PARTIAL = longrope(8, partial_rotary_factor=0.5)
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-heads": ("Llama", {"head_dim": 32}),
    "llama-llama3": ("Llama", LLAMA3),
    "llama-linear": ("Llama", LINEAR),
    "llama-yarn": ("Llama", YARN),
    "llama-yarn-scaled": ("Llama", YARN_SCALED),
    "llama-longrope": ("Llama", {k: v for k, v in longrope(16, factor=2.0).items()
                                 if k == "rope_parameters"}),
    "mistral": ("Mistral", {}),
    "mistral-heads": ("Mistral", {"head_dim": 32}),
    "mistral-window": ("Mistral", {"sliding_window": 256}),
    "qwen2": ("Qwen2", {}),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 256,
                               "max_window_layers": 1}),
    "qwen2-yarn": ("Qwen2", YARN),
    "qwen3": ("Qwen3", {}),
    "qwen3-yarn": ("Qwen3", {**YARN, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {}),
    "gemma2-pattern": ("Gemma2", {"layer_types": ["full_attention", "sliding_attention",
                                                  "sliding_attention"]}),
    "gemma3": ("Gemma3", {}),
    "gemma3-linear": ("Gemma3", {"rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}}}),
    "gemma3-untied-capped": ("Gemma3", {"tie_word_embeddings": False,
                                        "final_logit_softcapping": 4.0}),
    "phi3": ("Phi3", {}),
    "phi3-window": ("Phi3", {"sliding_window": 256}),
    "phi3-longrope": ("Phi3", longrope(16)),
    "phi3-partial": ("Phi3", PARTIAL),
    "gpt2": ("GPT2", {}),
    "gpt2-inner": ("GPT2", {"n_inner": 96, "tie_word_embeddings": False}),
}  # fmt: skip
# ggml's GELU goes through a table of float16 values
TOLERANCE = {"Gemma2": 2e-3, "Gemma3": 2e-3, "GPT2": 1e-3}


def config_of_family(family: str, **changes: Any) -> dict[str, Any]:
    described, model = family_config(family, **changes)
    return {**described.to_dict(), **changes, "architectures": [model]}


def source_of(folder: Path) -> MergedTensors:
    return open_source(folder, models.open_skeleton(folder, models.ModelSpec(source=str(folder))))


def written(tmp_path: Path, case: str, kind: str = "f32") -> tuple[Path, Path]:
    """The model's folder and its GGUF file."""
    family, changes = DECODERS[case]
    base = make_family(family, tmp_path / "base", **changes)
    return base, write_format(source_of(base), f"gguf:{kind}", tmp_path / "out").path


def prompt(length: int) -> torch.Tensor:
    return torch.randint(4, 260, (1, length), generator=torch.Generator().manual_seed(3))


def lengths(case: str) -> tuple[int, int]:
    """Of a text within, and one beyond, the original context; none beyond a window not run."""
    return 24, 120 if "gpt2" in case else 256 if "window" in case else 400


def expected_logits(base: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits[0]


@pytest.mark.parametrize("case", DECODERS)
def test_the_same_logits_through_the_reader(tmp_path, case):
    base, path = written(tmp_path, case)
    found = read_back(path)
    for length in lengths(case):
        tokens = prompt(length)
        with torch.no_grad():
            logits = found(tokens).logits[0]
        expected = expected_logits(base, tokens)
        assert expected.std() > 0.3
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max(), length


@pytest.mark.slow
@pytest.mark.parametrize("case", DECODERS)
def test_the_same_logits_in_llama_cpp(tmp_path, case):
    pytest.importorskip("llama_cpp")
    import llama_cpp_runs

    base, path = written(tmp_path, case)
    family = DECODERS[case][0]
    for length in lengths(case):
        tokens = prompt(length)
        logits = llama_cpp_runs.logits(path, tokens[0].tolist())
        expected = expected_logits(base, tokens)
        scale = expected.abs().max()
        assert (logits - expected).abs().max() < TOLERANCE.get(family, 2e-5) * scale, length
        assert (logits.argmax(-1) == expected.argmax(-1)).float().mean() > 0.99


@pytest.mark.parametrize(
    "case",
    [
        "llama-biases",
        "mistral",
        "qwen2-tied",
        "qwen3",
        "gemma2",
        "gemma3-untied-capped",
        "phi3-partial",
        "gpt2",
        "gpt2-inner",
    ],
)
def test_every_tensor_is_there_and_read_alone(tmp_path, case):
    base, path = written(tmp_path, case)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    found = read_back(path)
    expected = model.state_dict()
    assert found.state_dict().keys() == expected.keys()
    for name, value in found.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-6), name
    with torch.device("meta"):
        skeleton: Any = transformers.AutoModelForCausalLM.from_config(found.config)
    skeleton.tie_weights()
    tensors = GGUFTensors(OpenedGGUF(path), skeleton, skeleton.all_tied_weights_keys)
    for name, value in expected.items():
        assert torch.allclose(tensors.read(name), value, atol=1e-6), name


ROPE = {"rope_theta": 10000.0}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("Llama", {"hidden_act": "gelu"}, "hidden_act: gelu"),
    "rope-dynamic": ("Llama", rope("dynamic", factor=2.0), "rope_type: dynamic"),
    "rope-not-read": ("Qwen2", LLAMA3, "rope_type: llama3"),
    "yarn-betas": ("Llama", rope("yarn", factor=2.0, beta_fast=16), "beta_fast: 16"),
    "yarn-truncate": ("Llama", rope("yarn", factor=2.0, truncate=False), "truncate: False"),
    "partial-rotary": ("Llama", rope("default", partial_rotary_factor=0.5), "partial_rotary"),
    "qwen2-heads": ("Qwen2", {"head_dim": 32}, "head_dim: 32"),
    "phi3-heads": ("Phi3", {"head_dim": 32}, "head_dim: 32"),
    "phi3-odd": ("Phi3", rope("default", partial_rotary_factor=0.45), "partial_rotary"),
    "qwen3-biases": ("Qwen3", {"attention_bias": True}, "attention_bias: True"),
    "gemma2-scale": ("Gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar: 100"),
    "gemma2-biases": ("Gemma2", {"attention_bias": True}, "attention_bias: True"),
    "gemma2-caps": ("Gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping: None"),
    "gemma2-untied": ("Gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings: False"),
    "gemma2-both-ways": ("Gemma2", {"use_bidirectional_attention": True}, "bidirectional"),
    "gemma2-relu": ("Gemma2", {"hidden_activation": "relu"}, "hidden_act: relu"),
    "gemma3-cap": ("Gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping: 30.0"),
    "gemma3-yarn": ("Gemma3", {"rope_parameters": {
        "full_attention": {**ROPE, "rope_type": "yarn", "factor": 2.0},
        "sliding_attention": {**ROPE, "rope_type": "default"}}}, "rope_type: yarn"),
    "gemma3-local": ("Gemma3", {"rope_parameters": {
        "full_attention": {**ROPE, "rope_type": "default"},
        "sliding_attention": {**ROPE, "rope_type": "linear", "factor": 2.0}}}, "sliding layers"),
    "gpt2-scale": ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx: True"),
    "gpt2-unscaled": ("GPT2", {"scale_attn_weights": False}, "scale_attn_weights: False"),
    "gpt2-relu": ("GPT2", {"activation_function": "relu"}, "activation_function: relu"),
    "bert-decoder": ("Bert", {"is_decoder": True}, "is_decoder: True"),
    "bert-relu": ("Bert", {"hidden_act": "relu"}, "hidden_act: relu"),
    "bert-last": ("BertClassifier", {CONFIG_KEY: "last"}, "qft_pooling: last"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_run_otherwise_is_refused(case):
    family, changes, message = REFUSED[case]
    with pytest.raises(ModelError) as caught:
        architecture_of(config_of_family(family, **changes))
    assert message in caught.value.text()


@pytest.mark.parametrize(
    "named", ["MixtralForCausalLM", "Qwen2ForSequenceClassification", "BertForTokenClassification",
              "BertForQuestionAnswering", "RobertaModel", "Gemma3ForConditionalGeneration"],
)  # fmt: skip
def test_what_gguf_has_no_architecture_for_is_refused(named):
    with pytest.raises(ModelError, match=f"cannot write {named}"):
        architecture_of({**config_of_family("Llama"), "architectures": [named]})


def test_a_refusal_leaves_nothing(tmp_path):
    source = source_of(make_family("Llama", tmp_path / "base", hidden_act="gelu"))
    with pytest.raises(ModelError):
        write_format(source, "gguf:f16", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="does not understand"):
        architecture_of({**config_of_family("Llama"), "hidden_size": "many"})


def test_a_window_that_is_not_run_limits_the_context(tmp_path):
    base = make_family("Mistral", tmp_path / "base", sliding_window=256)
    report = write_format(source_of(base), "gguf:f32", tmp_path / "out")
    assert OpenedGGUF(report.path).own("context_length") == 256
    assert "no sliding window" in report.notes[0]
    assert "256 tokens" in report.notes[0]
    wide = make_family("Mistral", tmp_path / "wide", sliding_window=4096)
    assert not write_format(source_of(wide), "gguf:f32", tmp_path / "wide-out").notes


@pytest.mark.parametrize(
    "case,lost",
    [
        ("llama-yarn", "rope.scaling.type"),
        ("llama-yarn-scaled", "rope.scaling.attn_factor"),
        ("llama-linear", "rope.scaling.factor"),
        ("qwen3", "attention.key_length"),
        ("gemma2", "attn_logit_softcapping"),
        ("gemma2-pattern", "attention.sliding_window_pattern"),
        ("gemma3", "rope.freq_base_swa"),
        ("gemma3", "attention.sliding_window"),
        ("phi3-partial", "rope.dimension_count"),
        ("gpt2", "attention.head_count"),
    ],
)
def test_a_lost_setting_shows(tmp_path, monkeypatch, case, lost):
    """The settings read back are the file's, not those of the config.json beside it."""
    whole = Architecture.metadata

    def without(self: Architecture, config: Any) -> Any:
        values = dict(whole(self, config))
        del values[f"{self.name}.{lost}"]
        return values

    monkeypatch.setattr(Architecture, "metadata", without)
    base, path = written(tmp_path, case)
    tokens = prompt(lengths(case)[1])
    try:
        with torch.no_grad():
            logits = read_back(path)(tokens).logits[0]
    except ModelError:
        return
    assert (logits - expected_logits(base, tokens)).abs().max() > 1e-2


ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "masked": ("BertMasked", {}),
    "one-type": ("Bert", {"type_vocab_size": 1, "hidden_act": "gelu_new"}),
}
THREE = {"id2label": {0: "bad", 1: "good", 2: "so-so"},
         "label2id": {"bad": 0, "good": 1, "so-so": 2}}  # fmt: skip
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "model": THREE,
    "cls": {**THREE, CONFIG_KEY: "cls"},
    "mean": {**THREE, CONFIG_KEY: "mean"},
    "number": {"num_labels": 1, "problem_type": "regression"},
}


def text_ids(folder: Path) -> torch.Tensor:
    tokenizer = models.open_tokenizer(folder)
    text = "Hello there, how are you? The weather is fine, thank you."
    return torch.tensor([tokenizer(text)["input_ids"]])


def encoder(tmp_path: Path, case: str) -> tuple[torch.nn.Module, Path, torch.Tensor]:
    """The encoder as transformers opens it, its GGUF file, and a text."""
    family, changes = ENCODERS[case]
    base = make_family(family, tmp_path / "base", **changes)
    source = open_source(base, models.build_skeleton(models.read_config(base)))
    path = write_format(source, "gguf:f32", tmp_path / "out").path
    model = transformers.BertModel.from_pretrained(base, add_pooling_layer=False).eval()
    return model, path, text_ids(base)


def classifier(tmp_path: Path, case: str) -> tuple[torch.nn.Module, Path, torch.Tensor]:
    """The same of a classifier, as qft opens it."""
    base = make_family("BertClassifier", tmp_path / "base", **CLASSIFIERS[case])
    spec = models.ModelSpec(source=str(base), task="classify", dtype=torch.float32)
    source = open_source(base, models.open_skeleton(base, spec))
    path = write_format(source, "gguf:f32", tmp_path / "out").path
    return models.open_model(base, spec), path, text_ids(base)


@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_has_the_same_hidden_states(tmp_path, case):
    model, path, tokens = encoder(tmp_path, case)
    with torch.no_grad():
        expected = model(tokens).last_hidden_state
        found = read_back(path)(tokens).last_hidden_state
    tolerance = 1e-5 if case != "one-type" else 2e-2  # the file knows one GELU
    assert (found - expected).abs().max() < tolerance
    names = {tensor.name for tensor in gguf.GGUFReader(path).tensors}
    assert not any(name.startswith("cls") for name in names)


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_a_classifier_gives_the_same_answers(tmp_path, case):
    model, path, tokens = classifier(tmp_path, case)
    found = read_back(path)
    with torch.no_grad():
        expected = model(tokens).logits
        assert (found(tokens).logits - expected).abs().max() < 1e-5
    assert expected.shape[1] == found.config.num_labels
    assert case == "number" or list(found.config.id2label.values()) == ["bad", "good", "so-so"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_in_llama_cpp(tmp_path, case):
    pytest.importorskip("llama_cpp")
    import llama_cpp_runs

    model, path, tokens = encoder(tmp_path, case)
    with torch.no_grad():
        expected = model(tokens).last_hidden_state[0]
    ids = tokens[0].tolist()
    close = {"atol": 5e-3, "rtol": 0}  # llama.cpp's GELU is the tanh one, from a table
    assert torch.allclose(llama_cpp_runs.hidden(path, ids), expected, **close)
    assert torch.allclose(llama_cpp_runs.pooled(path, ids), expected.mean(0), **close)
    first = llama_cpp_runs.pooled(path, ids, llama_cpp_runs.CLS)
    assert torch.allclose(first, expected[0], **close)


@pytest.mark.slow
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_a_classifier_in_llama_cpp(tmp_path, case):
    pytest.importorskip("llama_cpp")
    import llama_cpp_runs

    model, path, tokens = classifier(tmp_path, case)
    with torch.no_grad():
        expected = model(tokens).logits[0]
    found = llama_cpp_runs.pooled(path, tokens[0].tolist())
    assert torch.allclose(found, expected, atol=1e-2, rtol=0)
    assert case == "number" or llama_cpp_runs.labels(path) == ["bad", "good", "so-so"]


FAMILIES = {"Llama": {}, "Mistral": {}, "Qwen2": {}, "Qwen3": {}, "Gemma2": {}, "Gemma3": {},
            "Phi3": PARTIAL, "GPT2": {}}  # fmt: skip


@pytest.mark.parametrize(
    "family",
    [family if family in ("Gemma2", "GPT2") else pytest.param(family, marks=pytest.mark.slow)
     for family in FAMILIES],
)  # fmt: skip
def test_the_commands_run_on_every_family(tmp_path, write_rows, family):
    base = make_family(family, tmp_path / "base", **FAMILIES[family])
    data = str(write_rows([{"text": f"the cat in a hat {n}"} for n in range(4)]))
    report = qft.export(base, tmp_path / "out", format="gguf:f16", data=data)
    assert report["verification"]["passed"]
    for layers in (False, True):
        if layers and family == "Gemma3":
            continue  # two kinds of layers: this one is opened whole
        result = qft.verify(base, report["path"], data=data, layer_by_layer=layers)
        assert result["passed"]
        assert result["layer_by_layer"] is layers
    lost = qft.evaluate(str(base), data=data)["loss"]  # in bf16, where the machine has it
    assert abs(qft.evaluate(str(tmp_path / "out"), data=data)["loss"] - lost) < 3e-2
    result = CliRunner().invoke(
        app, ["generate", report["path"], "-p", "the cat", "--max-new-tokens", "4"]
    )
    assert result.exit_code == 0, result.output


def test_a_classifier_through_the_commands(tmp_path, write_rows):
    base = make_family("BertClassifier", tmp_path / "base", **THREE)
    rows = [{"text": f"the weather is fine {n}", "label": ["bad", "good", "so-so"][n % 3]}
            for n in range(6)]  # fmt: skip
    data = str(write_rows(rows))
    report = qft.export(base, tmp_path / "out", format="gguf:f16", data=data)
    assert report["verification"]["passed"]
    assert any("pooling type rank" in note for note in report["notes"])
    lost = qft.evaluate(str(base), data=data)
    found = qft.evaluate(str(tmp_path / "out"), data=data)
    assert found["accuracy"] == lost["accuracy"]
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(Path(report["path"]).read_bytes())
    spec = locate(alone).spec  # nothing lies beside it
    assert (spec.task, spec.labels) == ("classify", ("bad", "good", "so-so"))


def test_an_encoder_through_the_commands(tmp_path, write_rows):
    base = make_family("Bert", tmp_path / "base")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    data = str(write_rows([{"text": f"the weather is fine {n}"} for n in range(4)]))
    report = qft.export(base, tmp_path / "out", format="gguf:f16", data=data)
    assert report["verification"]["passed"]
    assert "pooling: cls" in report["notes"][0]
    assert OpenedGGUF(Path(report["path"])).own("pooling_type") == 2
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(Path(report["path"]).read_bytes())
    assert locate(alone).spec.task == "embed"
    other = make_family("Bert", tmp_path / "other", hidden_act="gelu_new", type_vocab_size=3)
    with pytest.raises(VerificationError):
        qft.verify(other, report["path"], data=data)


@pytest.mark.slow
def test_a_real_sentence_encoder_in_llama_cpp(tmp_path, minilm):
    pytest.importorskip("llama_cpp")
    import llama_cpp_runs

    report = qft.export(minilm, tmp_path / "out", format="gguf:f32", verify=False)
    model = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    tokens = text_ids(minilm)
    with torch.no_grad():
        expected = model(tokens).last_hidden_state[0].mean(0)
        read = read_back(report["path"])(tokens).last_hidden_state[0].mean(0)
    found = llama_cpp_runs.pooled(Path(report["path"]), tokens[0].tolist())
    assert torch.allclose(read, expected, atol=1e-5)
    assert torch.cosine_similarity(found, expected, dim=0) > 0.9999


def test_a_file_has_a_name_and_a_size():
    shapes = [(151936, 896), (24, 1_000_000)]
    named = naming({"_name_or_path": "/home/me/Qwen2.5-0.5B", "model_type": "qwen2"}, shapes)
    assert named == {"general.name": "Qwen2.5-0.5B", "general.size_label": "160M"}
    assert naming({"_name_or_path": "Phi-3-mini"}, shapes)["general.name"] == "Phi 3-mini"
    assert naming({"model_type": "phi3"}, shapes)["general.name"] == "phi 3 160M"
    assert naming({"model_type": "qwen2"}, shapes)["general.name"] == "qwen2 160M"
    assert [size_label(count) for count in (7, 1500, 1_240_000_000)] == ["7", "1.5K", "1.2B"]
