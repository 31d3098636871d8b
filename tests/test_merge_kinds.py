"""What can be merged: each kind of adapter, bit for bit as PEFT merges it, and with its logits."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_bases import PEFT_TASKS, make_base, open_base, outputs, stir, wrapped
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qft import models
from qft.adapter_folder import locate_adapter, open_adapter_model
from qft.errors import AdapterError, QftError
from qft.merging.merge import open_source, write_model
from qft.registry import build_strategy, strategy_from_folder
from qft.strategy import Context

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Makes each base once."""
    made: dict[Any, Path] = {}

    def base(kind: str, dtype: torch.dtype = torch.float32) -> Path:
        if (kind, dtype) not in made:
            made[kind, dtype] = make_base(kind, tmp_path_factory.mktemp("base") / "model", dtype)
        return made[kind, dtype]

    return base


@dataclass(frozen=True)
class Case:
    """One adapter that PEFT trains.

    Attributes:
        settings: of the config, LoRA's unless it says otherwise.
        apart: the merged model is untied; PEFT's own merge writes into both tensors.
        twice: PEFT's own merge adds to the one tensor of two names twice.
    """

    base: str
    settings: dict[str, Any] = field(default_factory=dict)
    task: str = "text"
    config: Any = LoraConfig
    apart: bool = False
    twice: bool = False

    def make(self) -> Any:
        plain = {} if self.config is IA3Config else {"init_lora_weights": False}
        if self.config is LoraConfig:
            plain |= {"r": 4, "lora_alpha": 6}
        return self.config(**{**plain, "task_type": PEFT_TASKS[self.task], **self.settings})


ALL = {"target_modules": "all-linear"}
HEADS = {"target_modules": ["query", "value"]}
CASES = {
    "lora": Case("llama", ALL),
    "patterns": Case("llama", {
        **ALL, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"layers.0.self_attn.v_proj": 3, "down_proj": 11}}),
    "rank one": Case("llama", {**ALL, "r": 1, "lora_alpha": 1}),
    "rslora": Case("llama", {**ALL, "use_rslora": True, "rank_pattern": {"k_proj": 3}}),
    "dora": Case("llama", {**ALL, "use_dora": True}),
    "dora, patterns, rslora": Case("qwen2", {
        **ALL, "use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"up_proj": 9}}),
    "bias all": Case("qwen2", {**ALL, "bias": "all"}),
    "bias lora_only": Case("qwen2", {**ALL, "bias": "lora_only"}),
    "lora_bias": Case("qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "excluded modules": Case("llama", {**ALL, "exclude_modules": ["down_proj"]}),
    "target parameters": Case("llama", {
        "target_modules": [], "target_parameters": ["q_proj.weight", "mlp.up_proj.weight"]}),
    "some layers": Case("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "norms and embeddings saved": Case("llama", {
        **ALL, "modules_to_save": ["embed_tokens", "lm_head", "norm", "input_layernorm"]}),
    "lm_head": Case("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "token rows": Case("llama", {**ALL, "trainable_token_indices": [7, 2, 119]}),
    "token rows of both": Case("llama", {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [9]}}),
    "token rows, tied": Case("tied", {**ALL, "trainable_token_indices": [7, 2, 119]}),
    "token rows by name, tied": Case("tied", {
        **ALL, "trainable_token_indices": {"embed_tokens": [4, 0], "lm_head": [4, 0]}}),
    "tied": Case("tied", ALL),
    "scaled embeddings": Case("gemma", {**ALL, "use_dora": True}),
    "embedding": Case("llama", {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True}),
    "embedding, dora": Case("llama", {
        "target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "conv1d": Case("gpt2", ALL),
    "conv1d, said so": Case("gpt2", {"target_modules": ["c_attn", "c_proj"],
                                     "fan_in_fan_out": True}),
    "conv1d, dora": Case("gpt2", {**ALL, "use_dora": True}),
    "conv1d, bias": Case("gpt2", {**ALL, "bias": "all"}),
    "conv1d, lora_bias": Case("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "conv1d in a bare checkpoint": Case("bare gpt2", ALL),
    "bert": Case("bert", HEADS, "classify"),
    "bert, dora, bias": Case("bert", {**HEADS, "use_dora": True, "bias": "all"}, "classify"),
    "bert, tags": Case("bert", HEADS, "token"),
    "bert, spans": Case("masked bert", HEADS, "extract"),
    "bert, pooler saved": Case("bert", {**HEADS, "modules_to_save": ["classifier", "pooler"]},
                               "classify"),
    "bert, embedding": Case("bert", {"target_modules": ["query", "word_embeddings"]},
                            "classify"),
    "roberta": Case("roberta", HEADS, "classify"),
    "distilbert": Case("distilbert", {
        "target_modules": ["q_lin", "v_lin"],
        "modules_to_save": ["pre_classifier", "classifier"]}, "classify"),
    "llama, classifier": Case("llama", ALL, "classify"),
    "t5": Case("t5", {"target_modules": ["q", "v", "wi", "wo"]}, "seq2seq"),
    "t5, token rows": Case("t5", {"target_modules": ["q"], "trainable_token_indices": [5, 9]},
                           "seq2seq"),
    "bart": Case("bart", {"target_modules": ["q_proj", "v_proj"], "bias": "all"}, "seq2seq"),
    "ia3": Case("llama", {"target_modules": ["k_proj", "v_proj", "down_proj"],
                          "feedforward_modules": ["down_proj"]}, config=IA3Config),
    "ia3, biases": Case("qwen2", {"target_modules": ["k_proj", "v_proj", "down_proj"],
                                  "feedforward_modules": ["down_proj"]}, config=IA3Config),
    "ia3, regular expression": Case("llama", {
        "target_modules": r".*\.(k_proj|down_proj)", "feedforward_modules": r".*\.down_proj"},
        config=IA3Config),
    "ia3, conv1d": Case("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"],
                                 "feedforward_modules": ["mlp.c_proj"]}, config=IA3Config),
    "ia3, conv1d, square": Case("gpt2", {"target_modules": ["attn.c_proj"],
                                         "feedforward_modules": ["attn.c_proj"]},
                                config=IA3Config),
    "ia3, t5": Case("t5", {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]},
                    "seq2seq", IA3Config),
    "ia3, bert": Case("bert", {"target_modules": ["key", "value", "output.dense"],
                               "feedforward_modules": ["output.dense"]}, "classify", IA3Config),
    "adalora": Case("llama", {**ALL, "total_step": 10, "init_r": 5, "lora_alpha": 3},
                    config=AdaLoraConfig),
    "adalora, conv1d": Case("gpt2", {"target_modules": ["c_attn", "c_proj"], "total_step": 10},
                            config=AdaLoraConfig),
    # one of two tied tensors
    "tied head": Case("tied", {"target_modules": ["q_proj", "lm_head"]}, apart=True),
    "tied head, dora": Case("tied", {"target_modules": ["lm_head"], "use_dora": True}, apart=True),
    "tied embedding": Case("tied", {"target_modules": ["embed_tokens"]}, apart=True),
    "tied embedding, dora": Case("tied", {"target_modules": ["embed_tokens"], "use_dora": True},
                                 apart=True),
    "tied head saved": Case("tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
                            apart=True),
    "tied embedding saved": Case("tied", {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, apart=True),
    "tied head, conv1d beside": Case("gpt2", {"target_modules": ["c_attn", "c_proj", "lm_head"]},
                                     apart=True),
    "tied embedding of gpt2": Case("gpt2", {"target_modules": ["wte", "c_attn"]}, apart=True),
    "tied, other rows each": Case("tied", {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [3, 5], "lm_head": [9]}}, apart=True),
    "tied head of bart": Case("bart", {"target_modules": ["q_proj", "lm_head"]}, "seq2seq",
                              apart=True),
    "kept tied": Case("tied", {"target_modules": ["q_proj", "embed_tokens"],
                               "ensure_weight_tying": True}, twice=True),
    "kept tied, saved": Case("tied", {
        "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True}),
}  # fmt: skip


def opened(base: Path, adapter: Path, task: str = "text", dtype: torch.dtype | None = None):
    skeleton = models.open_skeleton(base, models.ModelSpec(source=str(base), task=task))
    strategy = strategy_from_folder(adapter)
    return open_source(base, skeleton, adapter=adapter, strategy=strategy, dtype=dtype)


def reloaded(base: Path, adapter: Path, task: str = "text") -> torch.nn.Module:
    """The adapter model as PEFT opens it from its folder."""
    return PeftModel.from_pretrained(open_base(base, task), adapter).eval()


def check_written(source, out: Path, task: str, expected: torch.Tensor) -> Any:
    """The written folder opens with no key missing or left over, and computes the same."""
    write_model(source, out)
    model, info = open_base(out, task, output_loading_info=True)
    assert not any(info.values()), info
    room = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(outputs(model, task), expected, rtol=1e-5, atol=room)
    return model


@pytest.mark.parametrize("name", CASES)
def test_every_kind_merges_as_peft_merges_it(tmp_path, bases, name):
    case = CASES[name]
    base, adapter = bases(case.base), tmp_path / "adapter"
    model = wrapped(base, case.make(), case.task)
    model.save_pretrained(adapter)
    source = opened(base, adapter, case.task)
    computed = outputs(reloaded(base, adapter, case.task), case.task)
    torch.testing.assert_close(outputs(model, case.task), computed)
    expected = model.merge_and_unload().state_dict()
    if not (case.apart or case.twice):
        for tensor in source.names():
            found = source.read(tensor)
            assert torch.equal(found, expected[source.module(tensor)]), tensor
    merged = check_written(source, tmp_path / "out", case.task, computed)
    assert source.changed
    tied = merged.config.tie_word_embeddings and case.task in ("text", "seq2seq")
    assert bool(tied) == (case.base not in ("llama",) and not case.apart and case.task in
                          ("text", "seq2seq"))  # fmt: skip


DISTURBED = {
    "lora": ("llama", ALL), "dora": ("llama", {**ALL, "use_dora": True}),
    "conv1d, dora": ("gpt2", {**ALL, "use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", DISTURBED)
def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once(tmp_path, bases, name):
    kind, settings = DISTURBED[name]
    base = bases(kind, torch.bfloat16)
    model = wrapped(base, Case(kind, settings).make())  # opened in float32
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    source = opened(base, tmp_path / "adapter")
    for tensor in source.names():
        assert source.dtype(tensor) == torch.bfloat16
        assert torch.equal(source.read(tensor), expected[source.module(tensor)].bfloat16()), tensor


@pytest.mark.parametrize(("start", "rslora"), [("pissa", False), ("pissa", True), ("olora", False)])
@pytest.mark.parametrize("dora", [False, True])
def test_a_start_that_changed_the_base_is_made_again(tmp_path, bases, start, rslora, dora):
    """A folder saved without conversion belongs to what PEFT left of the base."""
    base = bases("llama")
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=rslora,
                        use_dora=dora, init_lora_weights=start, rank_pattern={"k_proj": 3},
                        task_type="CAUSAL_LM")  # fmt: skip
    model = wrapped(base, config)
    model.save_pretrained(tmp_path / "adapter")
    computed = outputs(model)
    expected = model.merge_and_unload().state_dict()
    source = opened(base, tmp_path / "adapter")
    for tensor in source.names():
        assert torch.equal(source.read(tensor), expected[source.module(tensor)]), tensor
    check_written(source, tmp_path / "out", "text", computed)


def test_pissa_on_transposed_weights(tmp_path, bases):
    base = bases("gpt2")
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], init_lora_weights="pissa",
                        fan_in_fan_out=True, task_type="CAUSAL_LM")  # fmt: skip
    model = wrapped(base, config)
    model.save_pretrained(tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    source = opened(base, tmp_path / "adapter")
    assert all(torch.equal(source.read(t), expected[source.module(t)]) for t in source.names())


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_converted_start_fits_the_original_base(tmp_path, bases, start):
    base = bases("llama")
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=start,
                        task_type="CAUSAL_LM")  # fmt: skip
    model = get_peft_model(open_base(base), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "first")
    model.peft_config["default"].init_lora_weights = start
    stir(model)
    model.eval()
    computed = outputs(model)
    model.save_pretrained(tmp_path / "adapter",
                          path_initial_model_for_weight_conversion=tmp_path / "first")  # fmt: skip
    again = reloaded(base, tmp_path / "adapter").merge_and_unload().state_dict()
    source = opened(base, tmp_path / "adapter")
    for tensor in source.names():
        assert torch.equal(source.read(tensor), again[source.module(tensor)]), tensor
    check_written(source, tmp_path / "out", "text", computed)


FROM_ELSEWHERE = {
    "llama": {"exclude_modules": ["down_proj"], "modules_to_save": ["norm", "lm_head"]},
    "qwen2": {"lora_bias": True, "target_modules": ["q_proj"]},
    "tied": {"trainable_token_indices": {"embed_tokens": [3]}},
    "bart": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("kind", FROM_ELSEWHERE)
def test_what_qft_has_no_word_for_is_run_as_peft_runs_it(tmp_path, bases, kind):
    """So that a merge of it can be verified."""
    base = bases(kind)
    task = "seq2seq" if kind == "bart" else "text"
    model = wrapped(base, Case(kind, {**ALL, **FROM_ELSEWHERE[kind]}, task).make(), task)
    model.save_pretrained(tmp_path / "adapter")
    found = locate_adapter(tmp_path / "adapter", base=str(base))
    assert found.strategy.name == "lora"
    opened = open_adapter_model(found, found.spec(dtype=torch.float32))
    torch.testing.assert_close(outputs(opened, task), outputs(model, task))
    other = bases("gpt2")
    wrong = locate_adapter(tmp_path / "adapter", base=str(other))
    with pytest.raises(QftError):
        open_adapter_model(wrong, wrong.spec(dtype=torch.float32, task="text"))


REFUSED = {
    "niter": ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    "corda": ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
    "loftq": ({"init_lora_weights": "loftq"}, "PEFT does not save what LoftQ began with"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "cannot be folded"),
    "invocation": ({"alora_invocation_tokens": [1]}, "cannot be folded"),
    "groups": ({"use_qalora": True}, "cannot be folded"),
    "experts": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "cannot be folded"),
    "both": ({"use_dora": True, "lora_bias": True}, "cannot be folded"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_tensor_can_say_is_refused(tmp_path, bases, name):
    changes, words = REFUSED[name]
    model = wrapped(bases("llama"), Case("llama", ALL).make())
    model.save_pretrained(tmp_path / "adapter")
    say(tmp_path / "adapter", **changes)
    with pytest.raises(AdapterError, match=words):
        opened(bases("llama"), tmp_path / "adapter")


def say(folder: Path, **changes: Any) -> None:
    """Changes what an adapter_config.json says."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_bias_that_the_layer_has_not_is_refused(tmp_path, bases):
    settings = {"target_modules": ["o_proj"], "lora_bias": True}
    wrapped(bases("llama"), Case("llama", settings).make()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="bias that the layer has not"):
        opened(bases("llama"), tmp_path / "adapter")


@pytest.mark.parametrize("settings", [
    {"target_modules": ["q", "lm_head"]}, {"target_modules": ["q"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["shared", "q"]},
])  # fmt: skip
def test_a_family_that_cannot_be_untied_is_refused(tmp_path, bases, settings):
    base = bases("t5")
    model = wrapped(base, Case("t5", settings, "seq2seq").make(), "seq2seq")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match="config cannot say"):
        opened(base, tmp_path / "adapter", "seq2seq")


def test_a_head_that_was_never_tied_is_kept(tmp_path, bases):
    """A T5 of the 1.1 kind: its config says that it is tied, and its checkpoint stores both."""
    base = tmp_path / "base"
    make_base("t5", base)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"])
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    model = wrapped(base, Case("t5", {"target_modules": ["q", "lm_head"]}, "seq2seq").make(),
                    "seq2seq")  # fmt: skip
    model.save_pretrained(tmp_path / "adapter")
    computed = outputs(model, "seq2seq")
    expected = model.merge_and_unload().state_dict()
    source = opened(base, tmp_path / "adapter", "seq2seq")
    assert torch.equal(source.read("lm_head.weight"), expected["lm_head.weight"])
    check_written(source, tmp_path / "out", "seq2seq", computed)


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
@pytest.mark.parametrize("how", ["saved beside", "trained whole", "low rank"])
def test_a_vocabulary_with_more_words(tmp_path, bases, kind, how):
    base = bases(kind)
    plain = open_base(base)
    plain.resize_token_embeddings(133)
    word = "wte" if kind == "gpt2" else "embed_tokens"
    settings: dict[str, Any] = {"target_modules": ["c_attn"] if kind == "gpt2" else ["q_proj"]}
    if how == "trained whole":
        settings["modules_to_save"] = [word, "lm_head"]
    elif how == "low rank":
        settings["target_modules"] += [word]
    model = get_peft_model(plain, Case(kind, settings).make())
    stir(model)
    model.eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=how != "trained whole")
    if how == "low rank" and kind != "gpt2":  # PEFT does not save the head's new rows
        with pytest.raises(AdapterError, match=r"no config of this model|another base"):
            opened(base, tmp_path / "adapter")
        return
    source = opened(base, tmp_path / "adapter")
    merged = check_written(source, tmp_path / "out", "text", outputs(model))
    assert merged.config.vocab_size == 133


def test_labels_that_only_the_head_tells(tmp_path, bases):
    base = bases("bert")
    model = get_peft_model(open_base(base, "classify", num_labels=5),
                           Case("bert", HEADS, "classify").make())  # fmt: skip
    stir(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    source = opened(base, tmp_path / "adapter", "classify")
    merged = check_written(source, tmp_path / "out", "classify", outputs(model))
    assert merged.config.num_labels == 5


def test_a_head_that_was_not_saved_is_missed(tmp_path, bases):
    """PEFT alone saves one of DistilBERT's two new layers."""
    base = bases("distilbert")
    model = wrapped(base, Case("distilbert", {"target_modules": ["q_lin"]}, "classify").make(),
                    "classify")  # fmt: skip
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"pre_classifier"):
        opened(base, tmp_path / "adapter", "classify")


def test_old_names_and_files(tmp_path, bases):
    """Names that former releases of PEFT gave, and the pickle that they wrote."""
    base = bases("llama")
    model = wrapped(base, Case("llama", {**ALL, "use_dora": True}).make())
    model.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    ending = ".lora_magnitude_vector"
    save_file({n + ".weight" * n.endswith(ending): t for n, t in tensors.items()}, file)
    source = opened(base, tmp_path / "adapter")
    expected = model.merge_and_unload().state_dict()
    assert all(torch.equal(source.read(t), expected[source.module(t)]) for t in source.names())
    file.rename(file.with_name("adapter_model.bin"))
    with pytest.raises(AdapterError, match="pickle"):
        opened(base, tmp_path / "adapter")


def test_an_adapter_in_a_folder_of_its_own_name(tmp_path, bases):
    base = bases("llama")
    model = wrapped(base, Case("llama", ALL).make())
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "several").mkdir()
    (tmp_path / "saved").rename(tmp_path / "several" / "polite")
    found = locate_adapter(tmp_path / "several", base=str(base))
    assert found.folder == tmp_path / "several" / "polite"
    shutil.copytree(found.folder, tmp_path / "several" / "rude")
    with pytest.raises(AdapterError, match="several adapters") as error:
        locate_adapter(tmp_path / "several", base=str(base))
    assert "polite, rude" in str(error.value)


OWN = {
    "head": ("bert", {"name": "head"}, "classify"),
    "bitfit": ("qwen2", {"name": "bitfit"}, "text"),
    "bitfit, bert": ("bert", {"name": "bitfit"}, "token"),
    "layers": ("gpt2", {"name": "layers", "last": 1}, "text"),
    "layers, tied output": ("tied", {"name": "layers", "last": 1, "output_embeddings": True},
                            "text"),
    "full": ("tied", {"name": "full"}, "text"),
    "full, t5": ("t5", {"name": "full"}, "seq2seq"),
    "full, bart": ("bart", {"name": "full"}, "seq2seq"),
    "stack": ("qwen2", {"name": "stack", "of": [{"name": "lora", "rank": 4},
                                                {"name": "bitfit"}]}, "text"),
    "stack, tied": ("tied", {"name": "stack", "of": [
        {"name": "lora", "rank": 4, "targets": ["q_proj"]},
        {"name": "layers", "last": 1, "output_embeddings": True}]}, "text"),
    "lora": ("bert", {"name": "lora", "rank": 4}, "extract"),
    "lora, pissa": ("tied", {"name": "lora", "rank": 4, "initialisation": "pissa"}, "text"),
    "lora, head alone": ("tied", {"name": "lora", "rank": 4, "targets": ["lm_head"]}, "text"),
    "ia3": ("t5", {"name": "ia3"}, "seq2seq"),
    "keep_zeros": ("pruned", {"name": "lora", "rank": 4, "keep_zeros": True}, "text"),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_qfts_own_strategies_merge_to_what_they_compute(tmp_path, bases, name):
    kind, settings, task = OWN[name]
    base = bases("llama" if kind == "pruned" else kind)
    if kind == "pruned":
        base = pruned(base, tmp_path / "pruned")
    strategy = build_strategy(settings)
    model = strategy.attach(open_base(base, task), Context(task=task, seed=3))
    stir(model)
    (tmp_path / "adapter").mkdir()
    strategy.save(model, tmp_path / "adapter")
    source = opened(base, tmp_path / "adapter", task)
    merged = check_written(source, tmp_path / "out", task, outputs(model.eval(), task))
    if kind == "pruned":
        weight = merged.model.layers[0].mlp.up_proj.weight
        assert (weight == 0).float().mean() > 0.4


def pruned(base: Path, folder: Path) -> Path:
    """A copy in which every second weight of the layers is zero."""
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            tensor[:, ::2] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_pooler_that_qfts_pooling_does_without_is_kept(tmp_path, bases):
    """Plain transformers makes a BERT classifier with one."""
    spec = models.ModelSpec(source="", task="classify", labels=("no", "yes"), pooling="mean")
    base = bases("bert")
    skeleton = models.open_skeleton(base, spec)
    strategy = build_strategy({"name": "head"})
    (tmp_path / "adapter").mkdir()
    strategy.save(strategy.attach(models.open_model(base, spec), Context("classify")),
                  tmp_path / "adapter")  # fmt: skip
    source = open_source(base, skeleton, adapter=tmp_path / "adapter", strategy=strategy)
    write_model(source, tmp_path / "out")
    _, info = open_base(tmp_path / "out", "classify", output_loading_info=True)
    assert not any(info.values()), info
