"""`qft verify`: every planted fault is caught and named, good artefacts pass, in either way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import qft
from adapters.lora import LoRA
from qft import models
from qft.adapter_folder import locate_adapter
from qft.cli import app
from qft.errors import RecipeError, VerificationError
from qft.export.formats import FORMATS, write_format
from qft.layer_weights import LayerWeights
from qft.lean.model_parts import layer_stacks
from qft.merging.merge import open_source, write_model
from qft.strategy import Context
from qft.verification.adapter_file import APART
from qft.verification.stops import check_generation, taught_ids
from qft.verification.subject import locate, of_adapter
from qft.verification.tally import first_diverging
from qft.verification.thresholds import THRESHOLDS

torch.set_num_threads(1)
ROWS = 6
GENTLE = 0.02  # how far an adapter moves the model: KL 0.003 nats, of which bf16 may take 0.005


def make_adapter(base: Path, out: Path, strategy: LoRA, strength: float = 0.02) -> Path:
    """An adapter as if it were trained."""
    model: Any = models.open_model(base, models.ModelSpec(str(base), dtype=torch.float32))
    model = strategy.attach(model, Context())
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=strength)
    out.mkdir()
    strategy.save(model, out)
    return out


def merged(base: Path, adapter: Path, out: Path) -> Path:
    found = locate_adapter(adapter, base=str(base))
    skeleton = models.open_skeleton(base, models.ModelSpec(str(base)))
    source = open_source(base, skeleton, adapter=adapter, strategy=found.strategy)
    write_model(source, out)
    return out


@pytest.fixture(scope="module")
def mini(assets: Path) -> Path:
    return assets / "models" / "mini-6m"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


@pytest.fixture(scope="module")
def data(assets: Path, room: Path) -> str:
    text = (assets / "data/text/tinyshakespeare/input.txt").read_text(encoding="utf-8")
    rows = [{"text": text[at : at + 300]} for at in range(0, 3000, 300)]
    path = room / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def adapter(mini: Path, room: Path) -> Path:
    return make_adapter(mini, room / "adapter", LoRA(rank=4, alpha=8), GENTLE)


@pytest.fixture(scope="module")
def good(mini: Path, adapter: Path, room: Path) -> Path:
    return merged(mini, adapter, room / "merged")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def change(file: Path, **values: Any) -> None:
    found = json.loads(file.read_text(encoding="utf-8")) | values
    file.write_text(json.dumps(found), encoding="utf-8")


def refused(reference: Path, artefact: Path, data: str, **settings: Any) -> VerificationError:
    with pytest.raises(VerificationError) as caught:
        qft.verify(reference, artefact, data=data, limit=ROWS, **settings)
    assert caught.value.exit_code == 5
    folder = artefact.parent if artefact.is_file() else artefact
    assert json.loads((folder / "verification.json").read_text())["passed"] is False
    return caught.value


# --- good artefacts


OFTEN = ("gguf:q8_0", "gguf:q4_k_m", "bnb:nf4", "compressed-tensors:w8a16", "safetensors:bf16")


@pytest.mark.parametrize("format", [
    format if format in OFTEN else pytest.param(format, marks=pytest.mark.slow)
    for format in FORMATS if not format.startswith((APART, "onnx:"))
])  # fmt: skip
def test_every_format_passes_and_says_its_own_name(
    mini: Path, adapter: Path, data: str, tmp_path: Path, format: str
) -> None:
    if format.startswith("torchao:"):
        pytest.importorskip("torchao")
    written = qft.export(adapter, tmp_path / "out", format=format, data=data)
    report = written["verification"]
    assert locate(written["path"]).format() == format
    assert report["passed"]
    assert report["format"] == format
    assert report["first_diverging_layer"] is None
    assert len(report["layers"]) == 7
    assert not report["findings"]
    assert 0 < report["metrics"]["token_accuracy"] < 1
    stored = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert stored["passed"] is True
    assert stored["rows"] > 0


def test_merge_and_export_prove_the_very_same(
    mini: Path, adapter: Path, data: str, tmp_path: Path
) -> None:
    reports = [
        qft.merge(adapter, tmp_path / "a", data=data, verify=True)["verification"],
        qft.export(adapter, tmp_path / "b", format="safetensors:bf16", data=data)["verification"],
        qft.verify(adapter, tmp_path / "a", data=data),
    ]
    assert all(report.pop("base")["onto"] == "original" for report in reports[:2])
    assert reports[0] == reports[1] == reports[2]
    assert reports[0]["passed"]


# --- planted faults


def test_an_adapter_merged_twice(
    mini: Path, adapter: Path, good: Path, data: str, room: Path
) -> None:
    twice = merged(good, adapter, room / "twice")
    error = refused(adapter, twice, data)
    assert "hidden states diverge from model.layers.0 on" in str(error.found)
    assert "mean KL" not in str(error.found)  # too gentle an adapter for that
    assert "merged twice" in str(error.fix)


def test_a_wrong_scale(mini: Path, adapter: Path, data: str, room: Path) -> None:
    other = Path(shutil.copytree(adapter, room / "other"))
    change(other / "adapter_config.json", lora_alpha=16)
    error = refused(adapter, merged(mini, other, room / "scaled"), data)
    assert "diverge from model.layers.0 on" in str(error.found)
    assert "scale (alpha)" in str(error.fix)


def test_a_changed_template(adapter: Path, copy: Path, data: str) -> None:
    file = copy / "chat_template.jinja"
    file.write_text(file.read_text().replace("+ '<|im_end|>", "+ ' <|im_end|>"))
    error = refused(adapter, copy, data)
    assert "renders 6 of 6 conversations otherwise" in str(error.found)
    assert "chat_template.jinja" in str(error.fix)
    assert "mean KL" not in str(error.found)
    file.unlink()
    assert "no chat template" in str(refused(adapter, copy, data).found)


def test_a_template_within_a_gguf_file(mini: Path, data: str, tmp_path: Path) -> None:
    other = Path(shutil.copytree(mini, tmp_path / "other"))
    file = other / "chat_template.jinja"
    file.chmod(0o644)
    other.chmod(0o755)
    file.write_text(file.read_text().replace("assistant", "helper"))
    source = open_source(other, models.open_skeleton(other, models.ModelSpec(str(other))))
    path = write_format(source, "gguf:f16", tmp_path / "out").path
    error = refused(mini, path, data)
    assert "the GGUF file renders 3 of 6 conversations otherwise" in str(error.found)
    assert "generation prompt" in str(error.found)


def test_a_missing_stop_token(adapter: Path, copy: Path, data: str) -> None:
    change(copy / "generation_config.json", eos_token_id=0)
    error = refused(adapter, copy, data)
    assert "<|im_end|> (2) does not stop the artefact" in str(error.found)
    assert "a generation goes on after <|im_end|> (2)" in str(error.found)
    assert "add 2 to eos_token_id in the artefact's generation_config.json" in str(error.fix)


def test_a_token_outside_the_vocabulary(adapter: Path, copy: Path, data: str) -> None:
    change(copy / "generation_config.json", pad_token_id=6144)
    error = refused(adapter, copy, data)
    assert "pad_token_id 6144 is outside the vocabulary of 6144" in str(error.found)


def test_a_changed_tokenizer(adapter: Path, copy: Path, data: str) -> None:
    values = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    first, second = (list(vocabulary)[number] for number in (400, 401))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (copy / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    error = refused(adapter, copy, data)
    assert "gives other ids" in str(error.found)
    assert "tokenizer.json" in str(error.fix)


def transposed(folder: Path, layers: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, absmax in tensors.items():
        if name.endswith(".absmax") and "nested" not in name and layers in name:
            state = next(
                k for k in tensors if k.startswith(name.removesuffix("absmax") + "quant_s")
            )
            rows, _ = json.loads(bytes(tensors[state].tolist()))["shape"]
            tensors[name] = absmax.view(rows, -1).T.contiguous().flatten()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("layers", ["layers.", "layers.0."])
def test_transposed_scales(mini: Path, data: str, tmp_path: Path, layers: str) -> None:
    source = open_source(mini, models.open_skeleton(mini, models.ModelSpec(str(mini))))
    write_format(source, "bnb:nf4", tmp_path / "nf4")
    assert qft.verify(mini, tmp_path / "nf4", data=data, limit=ROWS)["passed"]
    transposed(tmp_path / "nf4", layers)
    error = refused(mini, tmp_path / "nf4", data)
    assert "scales" in str(error.fix)


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    model.save_pretrained(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    return tmp_path / "base"


def without_head(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_dropped_head(untied: Path, data: str, tmp_path: Path) -> None:
    lost = Path(shutil.copytree(untied, tmp_path / "lost"))
    without_head(lost)
    error = refused(untied, lost, data)
    assert "first lm_head.weight" in str(error.found)
    assert "tie_word_embeddings: false" in str(error.found)
    assert "the head was dropped" in str(error.fix)


def test_a_tie_that_is_not_one(untied: Path, data: str, tmp_path: Path) -> None:
    both = Path(shutil.copytree(untied, tmp_path / "both"))
    change(both / "config.json", tie_word_embeddings=True)
    error = refused(untied, both, data)
    assert "stored as two different tensors" in str(error.found)
    without_head(both)  # now the embeddings stand in for it
    error = refused(untied, both, data)
    assert "first diverging: the head" in str(error.found)
    assert "tie_word_embeddings" in str(error.fix)


def test_a_tied_model_that_says_it_is_not(adapter: Path, copy: Path, data: str) -> None:
    change(copy / "config.json", tie_word_embeddings=False)
    error = refused(adapter, copy, data)
    assert "lm_head.weight" in str(error.found)
    assert "tie_word_embeddings: true" in str(error.fix)


def test_embeddings_and_layers_are_told_apart() -> None:
    assert first_diverging([0.0, 0.1, 0.1], 0.2) is None
    assert first_diverging([0.0, 0.1, 0.25], 0.2) is None  # two roundings add up in squares
    assert first_diverging([0.0, 0.1, 0.3], 0.2) == 2
    assert first_diverging([float("inf"), 0.1, 0.3], 0.2) == 0


# --- stop tokens


def chat_subject(base: Path, strategy: LoRA, task: str) -> Any:
    from qft.adapter_folder import AdapterFolder

    return of_adapter(AdapterFolder(base, strategy, base, str(base), None, task))


def test_training_to_talk_teaches_the_end_of_a_turn(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    make_tokenizer(base, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|turn|>\n"
                         "{% endfor %}"
                         "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    tokenizer = models.open_tokenizer(base)
    assert taught_ids(chat_subject(base, LoRA(), "chat"), tokenizer) == [2, 3]
    assert taught_ids(chat_subject(base, LoRA(), "text"), tokenizer) == [2]
    assert taught_ids(locate(base), tokenizer) == [2]


def test_what_is_made_of_a_base_stops_where_training_ended_answers(
    tiny_llama: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    make_tokenizer(base, "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}<|turn|>"
                         "{% endfor %}"
                         "{% if add_generation_prompt %}<s>assistant: {% endif %}")  # fmt: skip
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = str(write_rows([{"messages": turns}] * 2))
    values: dict[str, Any] = {
        "model": str(base), "task": "chat", "data": {"train": data}, "device": "cpu",
        "strategy": {"name": "lora", "rank": 2}, "dtype": "float32",
        "train": {"max_steps": 1, "batch_size": 2, "max_length": 64},
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    run = qft.train(qft.build_recipe(values)).folder
    report = qft.merge(run, tmp_path / "out", verify=True, data=data)
    assert report["verification"]["passed"]
    file = tmp_path / "out" / "generation_config.json"
    assert json.loads(file.read_text())["eos_token_id"] == [2, 3]
    change(file, eos_token_id=2)
    assert "<|turn|> (3) does not stop" in str(refused(run, tmp_path / "out", data).found)


def test_a_generation_that_goes_on_is_seen(tiny_llama: Path, tiny_t5: Path) -> None:
    tokenizer = models.open_tokenizer(tiny_llama)
    for folder, task in ((tiny_llama, "text"), (tiny_t5, "seq2seq")):
        model: Any = models.open_model(folder, models.ModelSpec(str(folder), task))
        assert check_generation(model, [2], tokenizer) == []
        found = check_generation(model, [2, 7], tokenizer)
        assert len(found) == 1
        assert "(7)" in found[0].text
        model.generation_config.eos_token_id = [2, 7]
        assert check_generation(model, [2, 7], tokenizer) == []


# --- layer by layer


def both_ways(reference: Path, artefact: Path, data: str, **settings: Any) -> list[dict[str, Any]]:
    reports = []
    for layers in (False, True):
        file = Path(data).parent / f"{layers}.json"
        try:
            reports.append(qft.verify(reference, artefact, data=data, limit=ROWS, out=file,
                                      layer_by_layer=layers, **settings))  # fmt: skip
        except VerificationError:
            reports.append(json.loads(file.read_text()))
    return reports


def assert_agree(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert not one["layer_by_layer"]
    assert other["layer_by_layer"]
    assert not other["notes"] or "whole" not in other["notes"][0]
    for key in ("mean_kl", "p99_kl", "top1", "perplexity", "perplexity_reference"):
        assert other[key] == pytest.approx(one[key], abs=1e-4), key
    assert other["layers"] == pytest.approx(one["layers"], abs=1e-4)
    assert other["metrics"] == pytest.approx(one["metrics"], abs=1e-4)
    assert other["first_diverging_layer"] == one["first_diverging_layer"]


@pytest.mark.parametrize("format", ["safetensors:bf16", "gguf:q8_0", "bnb:nf4", "bnb:int8"])
def test_both_ways_agree_on_a_real_model(
    assets: Path, data: str, tmp_path: Path, format: str
) -> None:
    base = assets / "models" / "stories260K"
    adapter = make_adapter(base, tmp_path / "adapter", LoRA(rank=2, dora=True), 0.1)
    found = locate_adapter(adapter)
    skeleton = models.open_skeleton(base, models.ModelSpec(str(base)))
    source = open_source(base, skeleton, adapter=adapter, strategy=found.strategy)
    written = write_format(source, format, tmp_path / "out")
    one, other = both_ways(adapter, written.path, data)
    assert_agree(one, other)
    assert one["mean_kl"] > 0


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_base_that_was_quantized_in_training_is_quantized_layer_by_layer(
    assets: Path, data: str, tmp_path: Path, quantize: str
) -> None:
    base = assets / "models" / "stories260K"
    text = (assets / "data/text/tinyshakespeare/input.txt").read_text(encoding="utf-8")
    (tmp_path / "train.txt").write_text(text[50_000:56_000], encoding="utf-8")
    values: dict[str, Any] = {
        "model": str(base), "task": "text", "data": {"train": str(tmp_path / "train.txt")},
        "strategy": {"name": "lora", "rank": 2}, "quantize": quantize, "device": "cpu",
        "dtype": "float32", "train": {"max_steps": 1, "batch_size": 2, "max_length": 64},
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    run = qft.train(qft.build_recipe(values)).folder
    qft.merge(run, tmp_path / "merged", onto="original")
    one, other = both_ways(run, tmp_path / "merged", data)
    assert_agree(one, other)
    assert one["mean_kl"] > 1e-4  # the quantized base is not the one that was merged into


def test_a_model_of_fewer_words_is_one_clear_error(
    assets: Path, mini: Path, data: str, tmp_path: Path
) -> None:
    other, told = assets / "models" / "stories260K", tmp_path / "told.json"
    with pytest.raises(VerificationError, match="another vocabulary") as caught:
        qft.verify(mini, other, data=data, limit=2, out=told)
    assert "the reference has 6144" in str(caught.value.found)
    assert json.loads(told.read_text())["passed"] is False


def test_a_classifier_is_judged_in_its_own_measures(
    tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    from small_models import make_model

    folder = make_model("classifier", tmp_path / "base")
    rows = [{"text": f"word {n} is here", "label": ("bad", "good", "so-so")[n % 3]}
            for n in range(ROWS)]  # fmt: skip
    data = str(write_rows(rows))
    source = open_source(folder, models.open_skeleton(
        folder, models.ModelSpec(str(folder), "classify")))  # fmt: skip
    write_format(source, "safetensors:bf16", tmp_path / "out")
    one, other = both_ways(folder, tmp_path / "out", data)
    assert_agree(one, other)
    assert set(one["metrics"]) == {"loss", "accuracy", "macro_f1", "matthews"}
    assert one["positions"] == ROWS


def test_one_layer_of_one_model_is_loaded_at_a_time(
    good: Path, adapter: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeletons: list[Any] = []
    held: list[int] = []
    load, begin = LayerWeights.load, LayerWeights.__init__

    def watched_begin(self: Any, skeleton: Any, *rest: Any) -> None:
        skeletons.append(skeleton)
        begin(self, skeleton, *rest)

    def watched(self: Any, module: Any) -> None:
        load(self, module)
        stacks = [next(iter(layer_stacks(skeleton).values())) for skeleton in skeletons]
        held.append(sum(not next(p for n, p in layer.named_parameters() if "lora" not in n).is_meta
                        for stack in stacks for layer in stack))  # fmt: skip

    monkeypatch.setattr(LayerWeights, "__init__", watched_begin)
    monkeypatch.setattr(LayerWeights, "load", watched)
    report = qft.verify(adapter, good, data=data, limit=ROWS, layer_by_layer=True)
    assert report["passed"]
    assert len(skeletons) == 2
    assert held.count(1) == 12  # six layers of either side, one at a time
    assert max(held) == 1
    assert all(parameter.is_meta for parameter in skeletons[1].parameters())


def test_what_has_two_halves_is_opened_whole_and_says_so(
    tiny_t5: Path, tmp_path: Path, write_rows: Callable[..., Path]
) -> None:
    rows = [{"source": f"say {n}", "target": f"it is {n}"} for n in range(ROWS)]
    spec = models.ModelSpec(str(tiny_t5), "seq2seq")
    write_format(open_source(tiny_t5, models.open_skeleton(tiny_t5, spec)), "safetensors:bf16",
                 tmp_path / "out")  # fmt: skip
    report = qft.verify(tiny_t5, tmp_path / "out", data=str(write_rows(rows)), layer_by_layer=True)
    assert "opened whole" in report["notes"][0]
    assert report["passed"]


# --- the command


def test_the_command_shows_figures_and_ends_with_5(
    adapter: Path, copy: Path, data: str, tmp_path: Path
) -> None:
    runner = CliRunner()
    arguments = ["verify", str(adapter), str(copy), "--data", data, "--limit", str(ROWS)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for words in ("mean KL", "same first choice", "perplexity", "chat template", "stop tokens",
                  "hidden states", "verified"):  # fmt: skip
        assert words in result.output
    result = runner.invoke(app, [*arguments, "--json", "--out", str(tmp_path / "v.json")])
    assert json.loads(result.stdout)["passed"] is True
    assert (tmp_path / "v.json").is_file()
    change(copy / "generation_config.json", eos_token_id=None)
    result = runner.invoke(app, [*arguments, "--quiet"])
    assert isinstance(result.exception, VerificationError)


def test_without_rows_or_thresholds_it_says_what_to_add(mini: Path, good: Path, data: str) -> None:
    with pytest.raises(RecipeError, match="--data FILE"):
        qft.verify(mini, good)
    with pytest.raises(RecipeError, match="no thresholds"):
        qft.verify(mini, good, data=data, format="gguf:q1_0")


def test_a_text_is_cut_at_the_positions_the_model_has(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=40,
                        bos_token_id=1, eos_token_id=2)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "short")
    make_tokenizer(tmp_path / "short")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "many words " * 60}) + "\n", encoding="utf-8")
    report = qft.verify(tmp_path / "short", tmp_path / "short", data=str(rows), task="text")
    assert report["passed"]
    assert 0 < report["positions"] <= report["rows"] * 39


def test_the_page_shows_the_thresholds_of_the_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "verification.md").read_text(encoding="utf-8")
    for format, limit in THRESHOLDS.items():
        cells = (f"`{format}`", f"{limit.mean_kl:g}", f"{limit.p99_kl:g}", f"{limit.top1:g}",
                 f"{limit.perplexity_ratio:g}", f"{limit.layer:g}")  # fmt: skip
        assert f"| {' | '.join(cells)} |" in page
