"""Encoders as ONNX: equal in onnxruntime, verified, and no file from elsewhere is trusted."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hub
from conftest import make_tokenizer
from typer.testing import CliRunner

import qft
from qft import models
from qft.adapter_folder import locate_adapter, open_adapter_model
from qft.cli import app
from qft.errors import ModelError, RecipeError, SaveError, VerificationError
from qft.export import onnx_graph
from qft.export.formats import write_format
from qft.export.writers import ExportReport
from qft.merging.merge import open_source
from qft.verification.read_back import read_back
from qft.verification.subject import locate

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
torch.set_num_threads(1)
Usage = namedtuple("Usage", "total used free")
ENDINGS = {
    "classify": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "extract": "ForQuestionAnswering",
    "embed": "Model",
}
SMALL = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
DISTIL = {
    "vocab_size": 260, "dim": 32, "hidden_dim": 48, "n_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "Bert": lambda **c: hub.BertConfig(**SMALL, **c),
    "Roberta": lambda **c: hub.RobertaConfig(**{**SMALL, "type_vocab_size": 1}, **c),
    "DistilBert": lambda **c: hub.DistilBertConfig(**DISTIL, **c),
}
LABELS = {"id2label": {0: "bad", 1: "good", 2: "so-so"}, "label2id": {"bad": 0, "good": 1,
                                                                      "so-so": 2}}  # fmt: skip
FAST = [("DistilBert", "extract"), ("Bert", "embed")]  # Bert to classify: see the run below
SHAPES = [(1, 2), (3, 20), (5, 7), (2, 40)]


def make(folder: Path, family: str, task: str, layers: int = 1) -> Path:
    """A random encoder with its head, larger than a fresh one's, so that errors show."""
    labelled = LABELS if task in ("classify", "token") else {}
    torch.manual_seed(1)
    depth = {"n_layers" if family == "DistilBert" else "num_hidden_layers": layers}
    model = getattr(hub, family + ENDINGS[task])(CONFIGS[family](**labelled, **depth))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8.0)
        elif name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def write(base: Path, out: Path, kind: str = "fp32", **settings: Any) -> ExportReport:
    spec = models.ModelSpec(str(base), task=models.task_to_run(models.read_config(base)))
    source = open_source(base, models.open_skeleton(base, spec))
    return write_format(source, f"onnx:{kind}", out, **settings)


def batch(rows: int, length: int) -> dict[str, torch.Tensor]:
    """Rows of lengths from one to ``length``, padded on the right."""
    generator = torch.Generator().manual_seed(rows * 100 + length)
    ids = torch.randint(4, 260, (rows, length), generator=generator)
    lengths = torch.linspace(length, 1 if rows > 1 else length, rows).long()
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def answers(output: Any, mask: torch.Tensor) -> list[torch.Tensor]:
    """What an output says where there is text."""
    fields = [output[name] for name in ("logits", "start_logits", "end_logits",
                                        "last_hidden_state") if name in output]  # fmt: skip
    return [field[mask.bool()] if field.shape[:2] == mask.shape else field for field in fields]


def differences(first: Any, second: Any, shapes: Any = SHAPES) -> float:
    worst, told = 0.0, 0.0
    for shape in shapes:
        rows = batch(*shape)
        with torch.no_grad():
            sides = [answers(model(**rows), rows["attention_mask"]) for model in (first, second)]
        assert len(sides[0]) == len(sides[1]) > 0
        for one, other in zip(*sides, strict=True):
            worst = max(worst, (one - other).abs().max().item())
            told = max(told, one.abs().max().item())
    assert told > 0.1  # not all zeros
    return worst


def largest(model: Any) -> float:
    """The largest number the model answers with."""
    found = 0.0
    for shape in SHAPES:
        rows = batch(*shape)
        with torch.no_grad():
            sides = answers(model(**rows), rows["attention_mask"])
        found = max([found, *(side.abs().max().item() for side in sides)])
    return found


def opened(folder: Path) -> Any:
    """The model as transformers alone opens it."""
    named = models.read_config(folder)["architectures"][0]
    return getattr(hub, named).from_pretrained(folder, dtype=torch.float32).eval()


def trained(run: Path) -> Any:
    """The adapter on its base, as training had it."""
    found = locate_adapter(run)
    return open_adapter_model(found, found.spec(dtype=torch.float32))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("onnx")
    found = {}
    for family, task in FAST:
        base = make(folder / f"{family}-{task}", family, task)
        write(base, folder / f"{family}-{task}-onnx")
        found[family, task] = (base, folder / f"{family}-{task}-onnx")
    return found


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    words = ["bad", "good", "so-so"]
    lines = [{"text": f"{words[n % 3]} film number {'x' * (n % 7)} {n}", "label": words[n % 3]}
             for n in range(48)]  # fmt: skip
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, rows: str) -> Path:
    """A trained LoRA run with a classification head that pools by the mean."""
    folder = tmp_path_factory.mktemp("run")
    values = {
        "model": str(make(folder / "base", "Bert", "embed")), "task": "classify",
        "output": str(folder / "run"),
        "data": {"train": rows, "eval_share": 0.5}, "pooling": "mean",
        "strategy": {"name": "lora", "rank": 4},
        "train": {"max_steps": 30, "batch_size": 8, "learning_rate": 0.02, "max_length": 64},
        "memory": {"checkpointing": "none"},
    }  # fmt: skip
    return Path(qft.train(qft.build_recipe(values)).folder)


@pytest.fixture(scope="module")
def fp32(tmp_path_factory: pytest.TempPathFactory, run: Path) -> tuple[Path, dict[str, Any]]:
    """The run exported in 32 bits, verified, and the report."""
    out = tmp_path_factory.mktemp("fp32") / "out"
    return out, qft.export(run, out, format="onnx:fp32")


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory, run: Path) -> tuple[Path, dict[str, Any]]:
    """The run exported to 8 bits, verified, and the report."""
    out = tmp_path_factory.mktemp("int8") / "out"
    return out, qft.export(run, out, format="onnx:int8")


# --- equal in onnxruntime


@pytest.mark.parametrize("family,task", FAST)
def test_same_answers_as_transformers(written: Any, family: str, task: str) -> None:
    base, out = written[family, task]
    assert differences(opened(base), read_back(out)) < 1e-4
    session = onnxruntime.InferenceSession(out / "model.onnx")  # without anything of qft
    types = ["token_type_ids"] if family == "Bert" else []
    assert [i.name for i in session.get_inputs()] == ["input_ids", "attention_mask", *types]
    assert {tuple(i.shape) for i in session.get_inputs()} == {("batch", "sequence")}
    names = {"extract": ["start_logits", "end_logits"], "embed": ["last_hidden_state"]}
    assert [o.name for o in session.get_outputs()] == names.get(task, ["logits"])


def test_token_types_count(run: Path, fp32: Any) -> None:
    out = fp32[0]
    given = batch(3, 12) | {"token_type_ids": (torch.arange(12) > 5).long().expand(3, 12)}
    with torch.no_grad():
        first, second = trained(run)(**given).logits, read_back(out)(**given).logits
    assert (first - second).abs().max() < 1e-4
    assert (second - read_back(out)(**batch(3, 12)).logits).abs().max() > 1e-2


def test_the_folder_holds_all_that_is_needed_and_no_paths(fp32: Any) -> None:
    out = fp32[0]
    held = {path.name for path in out.iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"} <= held
    assert models.read_config(out)["id2label"]["2"] == "so-so"
    model = onnx.load(out / "model.onnx")
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    for secret in (b"site-packages", str(Path(qft.__file__).parent).encode(), b"stack_trace"):
        assert secret not in (out / "model.onnx").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("task", ENDINGS)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_and_task(tmp_path: Path, family: str, task: str) -> None:
    base = make(tmp_path / "base", family, task, layers=2)
    report = write(base, tmp_path / "out")
    assert report.bytes == (tmp_path / "out" / "model.onnx").stat().st_size
    assert differences(opened(base), read_back(tmp_path / "out")) < 1e-4
    write(base, tmp_path / "int8", "int8")
    assert locate(tmp_path / "int8").format() == "onnx:int8"
    rounded = differences(opened(base), read_back(tmp_path / "int8"))
    assert 0 < rounded < largest(opened(base))  # random weights magnify what rounding does


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_the_same_model_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    base = make(tmp_path / "base", "Bert", "classify")
    for name in ("one", "two"):
        write(base, tmp_path / name, kind)
    files = [tmp_path / name / "model.onnx" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [
    "MobileBertConfig", "MPNetConfig", "ElectraConfig", "AlbertConfig", "DebertaV2Config",
    "ModernBertConfig",
])  # fmt: skip
def test_other_encoders(tmp_path: Path, kind: str) -> None:
    shape = {**SMALL, "embedding_size": 32} if kind != "DebertaV2Config" else SMALL
    if kind == "MobileBertConfig":
        shape |= {"true_hidden_size": 16, "intra_bottleneck_size": 16}
    torch.manual_seed(0)
    config = getattr(hub, kind)(**shape, num_hidden_layers=2)
    getattr(hub, kind.replace("Config", "ForSequenceClassification"))(config).save_pretrained(
        tmp_path / "base")  # fmt: skip
    make_tokenizer(tmp_path / "base")
    write(tmp_path / "base", tmp_path / "out")
    first, second = opened(tmp_path / "base"), read_back(tmp_path / "out")
    for shape in SHAPES:
        with torch.no_grad():
            pair = [model(**batch(*shape)).logits for model in (first, second)]
        assert (pair[0] - pair[1]).abs().max() < 1e-4


# --- straight from base and adapter, verified


def test_a_run_is_exported_with_its_pooling_and_proven(run: Path, fp32: Any) -> None:
    before = sorted(run.rglob("*"))
    out, report = fp32
    found = report["verification"]
    assert found["passed"]
    assert found["max_difference"] < 1e-4
    assert found["positions"] == 24
    assert found["metrics"] == pytest.approx(found["metrics_reference"], abs=1e-4)
    assert found["metrics"]["accuracy"] > 0.8  # it has learned something that could be lost
    assert any("not compared" in note for note in found["notes"])  # it says that layers are not
    assert differences(trained(run), read_back(out)) < 1e-4
    assert models.read_config(out)["qft_pooling"] == "mean"
    assert qft.verify(run, out, layer_by_layer=True)["passed"]
    assert sorted(run.rglob("*")) == before


def test_int8_is_int8_and_smaller(int8: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, report = int8
    assert report["verification"]["passed"]
    assert report["verification"]["format"] == "onnx:int8" == locate(out).format()
    assert [path.name for path in out.glob("*.onnx*")] == ["model.onnx"]
    graph = onnx.load(out / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulInteger") == 6  # the linear layers of one layer
    assert kinds.count("Gemm") + kinds.count("MatMul") == 1 + 2  # the head; attention's own
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    matrices = [t for t in stored.values() if t.dtype == np.int8 and t.ndim == 2]
    assert len(matrices) == 6
    assert all(np.abs(matrix).max() <= 64 for matrix in matrices)  # 7 bits: sums cannot saturate
    scales = [t for name, t in stored.items() if name.endswith("_scale") and t.ndim == 1]
    assert len(scales) == 6  # a scale a column
    assert stored["bert.embeddings.word_embeddings.weight_quantized"].dtype == np.uint8


@pytest.mark.parametrize("task", ["embed", "extract"])
def test_the_other_tasks_are_proven_too(written: Any, task: str, tmp_path: Path) -> None:
    base, out = next(pair for key, pair in written.items() if key[1] == task)
    lines = [{"text": f"a text of {'many ' * (n % 5)}words {n}", "question": "how many?",
              "context": f"a text of {n} words",
              "answers": {"text": [str(n)], "answer_start": [10]}}
             for n in range(6)]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    copy = shutil.copytree(out, tmp_path / "copy")
    report = qft.verify(base, copy, data=str(file))
    assert report["passed"]
    assert report["format"] == "onnx:fp32"
    assert report["positions"] > 6
    spoil(copy / "model.onnx", swap)
    with pytest.raises(VerificationError, match="not the model that was trained"):
        qft.verify(base, copy, data=str(file))


def test_eval_runs_on_it_as_on_the_run(int8: Any, run: Path, rows: str) -> None:
    sides = [qft.evaluate(str(source), data=rows) for source in (run, int8[0])]
    assert sides[0].keys() == sides[1].keys() >= {"accuracy", "loss"}
    assert sides[1]["loss"] == pytest.approx(sides[0]["loss"], abs=0.1)


@pytest.mark.parametrize("command", [["generate", "-p", "hello"], ["chat"]])
def test_it_writes_no_text(int8: Any, written: Any, command: list[str]) -> None:
    for folder in (int8[0], written["Bert", "embed"][1]):
        done = CliRunner().invoke(app, [command[0], str(folder), *command[1:]])
        assert isinstance(done.exception, RecipeError)
        assert "reads text and writes none" in str(done.exception)
    with pytest.raises(RecipeError, match="does not write"):
        read_back(int8[0]).generate(input_ids=torch.tensor([[5]]))


def test_vectors_have_no_measure(written: Any, rows: str) -> None:
    with pytest.raises(RecipeError, match="nothing judges"):
        qft.evaluate(str(written["Bert", "embed"][1]), data=rows)


# --- planted faults


def spoil(file: Path, change: Any) -> None:
    model = onnx.load(file)
    change({tensor.name: tensor for tensor in model.graph.initializer})
    onnx.save(model, file)


def swap(stored: dict[str, Any]) -> None:
    """Swaps the first two matrices of one shape and type."""
    seen: dict[Any, Any] = {}
    for tensor in stored.values():
        key = (tuple(tensor.dims), tensor.data_type)
        if len(tensor.dims) == 2 and min(tensor.dims) > 8 and key in seen:
            other = seen[key]
            other.raw_data, tensor.raw_data = tensor.raw_data, other.raw_data
            return
        seen[key] = tensor
    raise AssertionError("no two alike")


def wrong_scale(stored: dict[str, Any]) -> None:
    scale = next(
        t for name, t in stored.items() if name.endswith("_scale") and list(t.dims) == [48]
    )
    scale.CopyFrom(onnx.numpy_helper.from_array(3 * onnx.numpy_helper.to_array(scale), scale.name))


@pytest.mark.parametrize("fault", [swap, wrong_scale])
def test_a_planted_fault_is_caught(int8: Any, run: Path, tmp_path: Path, fault: Any) -> None:
    copy = shutil.copytree(int8[0], tmp_path / "copy")
    spoil(copy / "model.onnx", fault)
    with pytest.raises(VerificationError, match="onnx:int8") as caught:
        qft.verify(run, copy)
    assert "onnx:fp32" in str(caught.value.fix)
    assert json.loads((copy / "verification.json").read_text())["passed"] is False


# --- a file from elsewhere


def refused(file: Path, words: str) -> ModelError:
    with pytest.raises(ModelError, match=words) as caught:
        read_back(file.parent)
    return caught.value


def outside(file: Path, name: str, kind: str) -> None:
    """Lets a tensor's numbers lie in a file of another name."""
    model = onnx.load(file)
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
    if kind == "constant":  # within an operator, not among the weights
        node = onnx.helper.make_node("Constant", [], ["unused"])
        node.attribute.append(onnx.helper.make_attribute("value", tensor))
        model.graph.node.insert(0, node)
        tensor = model.graph.node[0].attribute[0].t
    if kind == "inner graph":
        inner = onnx.helper.make_graph([], "inner", [], [], [tensor])
        node = onnx.helper.make_node("If", ["missing"], ["unused"])
        node.attribute.append(onnx.helper.make_attribute("then_branch", inner))
        model.graph.node.append(node)
        tensor = model.graph.node[-1].attribute[0].g.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    tensor.external_data.add(key="location", value=name)
    file.write_bytes(model.SerializeToString())


@pytest.fixture
def copy(fp32: Any, tmp_path: Path) -> Path:
    return shutil.copytree(fp32[0], tmp_path / "copy") / "model.onnx"


@pytest.mark.parametrize("kind", ["weight", "constant", "inner graph"])
@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", "C:x"])
def test_weights_outside_the_folder_are_refused(copy: Path, name: str, kind: str) -> None:
    (copy.parent.parent / "secret").write_bytes(b"x" * 100_000)
    outside(copy, name, kind)
    assert "plain names" in str(refused(copy, "named by a path"))
    with pytest.raises(ModelError, match="named by a path"):
        locate(copy.parent).format()  # nor is it read to tell its format


def test_links_missing_weights_and_strange_operators_are_refused(copy: Path) -> None:
    kept = copy.read_bytes()
    outside(copy, "data", "weight")
    refused(copy, "weights are missing")
    (copy.parent / "data").symlink_to("/etc/passwd")
    refused(copy, "link that leads out")
    copy.write_bytes(kept)
    model = onnx.load(copy)
    model.opset_import.append(onnx.helper.make_opsetid("evil.ops", 1))
    onnx.save(model, copy)
    refused(copy, "operators of another library")
    copy.write_bytes(kept[: len(kept) // 2])
    refused(copy, "cannot be read")
    copy.write_bytes(b"")
    refused(copy, "holds no model")
    copy.unlink()
    copy.symlink_to("/etc/passwd")
    refused(copy, "link that leads out")


def test_another_graph_is_one_clear_error(copy: Path) -> None:
    tensor = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, [1])
    made = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["pixels"], ["out"])], "g", [tensor], [made]
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)],
                                     ir_version=10), copy)  # fmt: skip
    refused(copy, "not an encoder that qft knows")


def test_a_batch_too_long_is_one_clear_error(fp32: Any) -> None:
    with pytest.raises(ModelError, match="cannot run this batch"):
        read_back(fp32[0])(**batch(1, 80))  # it has 64 positions


# --- refusals, and nothing left behind


@pytest.mark.parametrize(
    "fixture,words", [("tiny_llama", "decoder"), ("tiny_t5", "encoder-decoder")]
)
def test_what_writes_is_refused(
    fixture: str, words: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(fixture)
    with pytest.raises(ModelError, match=f"this {words} would") as caught:
        qft.export(folder, tmp_path / "out", format="onnx:int8", verify=False)
    assert "gguf" in str(caught.value.fix)
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named(
    run: Path, int8: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec

    def find(name: str, *rest: Any) -> Any:
        return None if name == "onnxscript" else found(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    for ask in (lambda: qft.export(run, tmp_path / "out", format="onnx:fp32"),
                lambda: read_back(int8[0])):  # fmt: skip
        with pytest.raises(ModelError, match="not installed") as caught:
            ask()
        assert caught.value.fix == "pip install 'qft-toolkit[onnx]'"
        assert "onnxscript" in str(caught.value.found)
    assert not list(tmp_path.iterdir())


def test_weights_that_one_file_cannot_hold(
    written: Any,
    rows: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(onnx_graph, "_ONE_FILE_BYTES", 1000)
    base, _ = written["Bert", "embed"]
    report = write(base, tmp_path / "out", "int8")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.onnx*")) == [
        "model.onnx", "model.onnx.data"]  # fmt: skip
    assert report.bytes == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.onnx*"))
    assert locate(tmp_path / "out").format() == "onnx:int8"
    assert "".join(capfd.readouterr()) == ""  # the exporters' own words stay out
    assert 0 < differences(opened(base), read_back(tmp_path / "out")) < 3
    found = qft.verify(base, tmp_path / "out", data=rows)
    assert 0 < found["layers"]["last_hidden_state"] < found["thresholds"]["layer"]


def test_a_full_disk_or_a_stop_leaves_nothing(
    written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = written["Bert", "embed"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage(10, 10, 1000))
        with pytest.raises(SaveError, match="not enough room"):
            write(base, tmp_path / "out")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "precious").write_text("1")
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):

        def fail(*_: Any, error: Any = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(onnx_graph, "_forget_traces", lambda _: None)
            patch.setattr(torch.onnx, "export", fail)
            with pytest.raises((KeyboardInterrupt, SaveError)):
                write(base, tmp_path / "kept", overwrite=True)
    assert os.listdir(tmp_path) == ["kept"]
    assert os.listdir(tmp_path / "kept") == ["precious"]


def test_a_broken_weight_is_named(tmp_path: Path) -> None:
    base = make(tmp_path / "base", "Bert", "classify")
    model = opened(base)
    model.classifier.weight.data[0, 0] = float("nan")
    model.save_pretrained(base)
    with pytest.raises(ModelError, match="not a finite number") as caught:
        write(base, tmp_path / "out")
    assert caught.value.where == "classifier.weight"
    assert not (tmp_path / "out").exists()
