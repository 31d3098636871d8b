"""`qft generate`, `qft eval` and `qft chat` on an exported model of every format alike.

The model is a chain: after the colon that opens its turn it says "ok" and ends the turn, and after
that it would say "!" for ever. So what each format must write, and where it must stop, is known.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import make_model
from small_tokenizers import bpe, with_template

import qft
from qft import cli, hardware
from qft.export.formats import FORMATS


@dataclass(frozen=True)
class Case:
    """What a format is to be tried with.

    Attributes:
        loss: how far the loss may be from the trained model's, in nats.
        writes: whether it holds decoders, which write.
        reads: whether it holds encoders with a head, which answer.
        alike: opened by the very code of another format; the long checks are for `make test-slow`.
        library: without which it is not opened, and not tried.
    """

    loss: float
    writes: bool = True
    reads: bool = True
    alike: bool = False
    library: str | None = None


CASES = {
    "gguf:f32": Case(1e-4, reads=False, alike=True),
    "gguf:f16": Case(1e-3, alike=True),
    "gguf:bf16": Case(5e-3, reads=False, alike=True),
    "gguf:q8_0": Case(5e-3),
    "gguf:q6_k": Case(1e-2, reads=False, alike=True),
    "gguf:q5_k_m": Case(3e-2, reads=False, alike=True),
    "gguf:q5_k_s": Case(3e-2, reads=False, alike=True),
    "gguf:q4_k_m": Case(0.1, reads=False),
    "gguf:q4_k_s": Case(0.1, reads=False, alike=True),
    "gguf:q3_k_l": Case(0.2, reads=False, alike=True),
    "gguf:q3_k_m": Case(0.2, reads=False, alike=True),
    "gguf:q3_k_s": Case(0.2, reads=False, alike=True),
    "gguf:q2_k": Case(0.5, reads=False, alike=True),
    "gguf:iq4_nl": Case(0.1, reads=False, alike=True),
    "gguf:q4_0": Case(0.1, reads=False, alike=True),
    "gguf:q4_1": Case(0.1, reads=False, alike=True),
    "gguf:q5_0": Case(5e-2, reads=False, alike=True),
    "gguf:q5_1": Case(5e-2, reads=False, alike=True),
    "gguf-lora:f16": Case(math.inf, writes=False, reads=False),
    "gguf-lora:q8_0": Case(math.inf, writes=False, reads=False),
    "gguf-lora:f32": Case(math.inf, writes=False, reads=False),
    "bnb:nf4": Case(0.2),
    "bnb:int8": Case(2e-2),
    "safetensors:bf16": Case(5e-3),
    "safetensors:fp16": Case(1e-3),
    "safetensors:fp32": Case(1e-4),
    "compressed-tensors:w4a16": Case(0.2, library="compressed_tensors"),
    "compressed-tensors:w8a16": Case(2e-2, alike=True, library="compressed_tensors"),
    "compressed-tensors:w8a8": Case(2e-2, library="compressed_tensors"),
    "torchao:int8": Case(2e-2, library="torchao"),
    "onnx:fp32": Case(1e-4, writes=False, library="onnxruntime"),
    "onnx:int8": Case(5e-2, writes=False, library="onnxruntime"),
}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
END = "<|turn|>"
Run = Callable[..., tuple[int, str, str]]


def formats(kind: str, *, long: bool = False) -> list[Any]:
    """Those of a kind; what is alike is marked slow where the check is a long one."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] if long and case.alike else [])
        for name, case in CASES.items() if getattr(case, kind)
    ]  # fmt: skip


def require_library(format: str) -> None:
    """Skips where it is not installed."""
    if CASES[format].library is not None:
        pytest.importorskip(str(CASES[format].library))


def test_every_format_has_a_case() -> None:
    assert set(CASES) == set(FORMATS)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: exit code, standard output, standard error."""

    def run(*arguments: object, said: tuple[str, ...] = ()) -> tuple[int, str, str]:
        lines = iter(said)
        monkeypatch.setattr("builtins.input", lambda prompt: _next(lines))
        monkeypatch.setattr("sys.argv", ["qft", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def _next(lines: Iterator[str]) -> str:
    try:
        return next(lines)
    except StopIteration:
        raise EOFError from None


def chain(folder: Path) -> Path:
    """A Llama that says one token after another, whatever came before."""
    from transformers import LlamaConfig, LlamaForCausalLM

    specials = ("<pad>", "<s>", "</s>", END)
    tokenizer = with_template(bpe(specials, bos="<s>", pad="<pad>"), TEMPLATE)
    tokenizer.save_pretrained(folder)
    size = len(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size, hidden_size=256, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    places = torch.nn.functional.normalize(torch.randn(size, 256), dim=1)
    steps = ((":", "o"), ("o", "k"), ("k", END), (END, "!"), ("!", "!"))
    now, then = (tokenizer.convert_tokens_to_ids(list(side)) for side in zip(*steps, strict=True))
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.1)
        model.model.embed_tokens.weight.copy_(places)
        model.lm_head.weight.zero_().index_add_(0, torch.tensor(then), places[now])
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("room")


@pytest.fixture(scope="module")
def rows(room: Path) -> Path:
    path = room / "rows.jsonl"
    said = [{"prompt": f"say {i}", "completion": "ok"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in said), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(room: Path, rows: Path) -> Path:
    """A run upon the chain that has learned next to nothing."""
    recipe = qft.build_recipe({
        "model": str(chain(room / "base")), "task": "instruct", "output": str(room / "run"),
        "data": {"train": str(rows), "max_duplicate_share": 1.0}, "device": "cpu",
        "dtype": "float32", "strategy": {"name": "lora", "rank": 2},
        "train": {"max_steps": 1, "batch_size": 2, "max_length": 64, "learning_rate": 1e-5},
    })  # fmt: skip
    qft.train(recipe)
    return room / "run"


@pytest.fixture(scope="module")
def exported(room: Path, run: Path) -> Callable[[str], Path]:
    """The run in a format, exported once."""

    def export(format: str) -> Path:
        require_library(format)
        out = room / format.replace(":", "-")
        if not out.exists():
            qft.export(run, out, format=format, verify=False)
        return out

    return export


@pytest.fixture(scope="module")
def loss(run: Path, rows: Path) -> float:
    return qft.evaluate(str(run), data=str(rows), dtype="float32")["loss"]


@pytest.mark.parametrize("format", formats("writes"))
def test_it_writes_and_stops(command: Run, exported: Any, format: str) -> None:
    code, out, err = command("generate", exported(format), "-p", "hi", "-p", "well")
    assert (code, out) == (0, "ok\nok\n"), err
    assert ("dequantized" in err) == format.startswith("gguf")


@pytest.mark.parametrize("format", formats("writes", long=True))
def test_it_talks_and_stops(command: Run, exported: Any, format: str) -> None:
    said = ("hi", "well")
    code, out, _ = command("chat", exported(format), "--temperature", "0", said=said)
    assert (code, out) == (0, "model: ok\nmodel: ok\n\n")


@pytest.mark.parametrize("format", formats("writes", long=True))
def test_it_is_judged(command: Run, exported: Any, rows: Path, loss: float, format: str) -> None:
    code, out, err = command(
        "eval", exported(format), "--data", rows, "--dtype", "float32", "--json", "--generate",
        "--max-new-tokens", "4",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert ("dequantized" in err) == format.startswith("gguf")
    assert found["loss"] == pytest.approx(loss, abs=CASES[format].loss)
    assert found["exact_match"] == 1.0


# --- encoders


@pytest.fixture(scope="module")
def encoder(room: Path) -> Path:
    return make_model("classifier", room / "encoder")


@pytest.fixture(scope="module")
def labelled(room: Path) -> Path:
    path = room / "labelled.jsonl"
    lines = [{"text": f"it was {i}", "label": ("good", "bad")[i % 2]} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("format", formats("reads", long=True))
def test_an_encoder_is_judged_and_writes_nothing(
    command: Run, encoder: Path, labelled: Path, tmp_path: Path, format: str
) -> None:
    require_library(format)
    expected = qft.evaluate(str(encoder), data=str(labelled), dtype="float32")["loss"]
    out = tmp_path / "out"
    qft.export(encoder, out, format=format, verify=False)
    code, shown, err = command("eval", out, "--data", labelled, "--dtype", "float32", "--json")
    assert code == 0, err
    assert json.loads(shown)["loss"] == pytest.approx(expected, abs=5 * CASES[format].loss)
    for verb in (("generate", out, "-p", "hi"), ("chat", out)):
        code, shown, err = command(*verb)
        assert (code, shown) == (2, "")
        assert "reads text and writes none" in err


# --- an adapter alone


@pytest.mark.parametrize("format", [name for name in CASES if name.startswith("gguf-lora")])
def test_an_adapter_alone_is_told_from_a_model(
    command: Run, exported: Any, rows: Path, format: str
) -> None:
    out = exported(format)
    for verb in (("generate", out, "-p", "hi"), ("chat", out), ("eval", out, "--data", rows)):
        code, shown, err = command(*verb)
        assert (code, shown) == (2, "")
        assert "an adapter" in err
        assert "--lora" in err


def test_a_bare_encoder_writes_nothing(command: Run, tiny_bert: Path) -> None:
    code, out, err = command("generate", tiny_bert, "-p", "hi")
    assert (code, out) == (2, "")
    assert "found: BertModel for the task" in err


# --- where a GGUF file may lie


@pytest.fixture
def file(exported: Any) -> Path:
    """A GGUF file of the run, with tokenizer and settings beside it."""
    found: Path = exported("gguf:q8_0") / "model-q8_0.gguf"
    return found


def test_a_file_without_files_beside_it(command: Run, file: Path, tmp_path: Path) -> None:
    """Tokenizer, template, task and stop tokens are within it."""
    lone = Path(shutil.copy(file, tmp_path / "downloaded.gguf"))
    for place in (lone, tmp_path):
        assert command("generate", place, "-p", "hi")[:2] == (0, "ok\n")
        out = command("chat", place, "--temperature", "0", said=("hi",))[1]
        assert out == "model: ok\n\n"
    ends = qft.open_any(str(lone)).model.generation_config.eos_token_id  # type: ignore[union-attr]
    assert 2 in (ends if isinstance(ends, list) else [ends])  # type: ignore[operator]


def test_a_file_beside_an_ollama_modelfile(command: Run, file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path / "model.gguf")
    (tmp_path / "Modelfile").write_text("FROM ./model.gguf\n", encoding="utf-8")
    assert command("generate", tmp_path, "-p", "hi")[:2] == (0, "ok\n")
    code, _, err = command("generate", tmp_path / "Modelfile", "-p", "hi")
    assert code == 2
    assert "name the folder it lies in" in err


def test_several_files_in_a_folder(command: Run, file: Path, tmp_path: Path) -> None:
    for name in ("one.gguf", "two.gguf"):
        shutil.copy(file, tmp_path / name)
    for verb in (("generate", "-p", "hi"), ("chat",), ("eval", "--data", "rows.jsonl")):
        code, out, err = command(verb[0], tmp_path, *verb[1:])
        assert (code, out) == (2, "")
        assert "several GGUF files" in err
        assert "one.gguf, two.gguf" in err
    assert command("generate", tmp_path / "two.gguf", "-p", "hi")[:2] == (0, "ok\n")


def test_a_file_that_is_not_there(command: Run, file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path / "model.gguf")
    code, _, err = command("generate", tmp_path / "modell.gguf", "-p", "hi")
    assert code == 2
    assert "no such GGUF file" in err
    assert "found: model.gguf" in err


@pytest.mark.parametrize("bytes_left", [10, 2_000, 100_000])
def test_a_broken_file(command: Run, file: Path, tmp_path: Path, bytes_left: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:bytes_left])
    code, out, err = command("generate", tmp_path / "cut.gguf", "-p", "hi")
    assert (code, out) == (2, "")
    assert "The GGUF file is broken" in err


def test_what_is_no_whole_model(command: Run, tmp_path: Path) -> None:
    import gguf

    for name, change, message in (
        ("lora", lambda w: w.add_type("adapter"), "an adapter, no model"),
        ("part", lambda w: w.add_uint16("split.count", 3), "one part of several"),
    ):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "llama")
        change(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        code, _, err = command("generate", tmp_path / f"{name}.gguf", "-p", "hi")
        assert code == 2
        assert message in err


# --- how a GGUF file is held


def test_a_file_is_held_as_the_machine_does_best(
    command: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fast in (True, False):
        monkeypatch.setattr(hardware, "_fast_bfloat16", lambda device, fast=fast: (fast, "so"))
        held = "bfloat16" if fast else "float32"
        _, _, err = command("generate", file, "-p", "hi")
        assert re.search(rf"model-q8_0.gguf: .* dequantized and held as {held} in .*MiB", err)
    _, out, err = command("generate", file, "-p", "hi", "--dtype", "float16", "--quiet")
    assert out == "ok\n"
    assert "held as" not in err
    assert qft.open_any(str(file), dtype=torch.float16).model.dtype == torch.float16


def test_a_file_too_large_for_the_memory(
    command: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "free_memory_bytes", lambda device: 1000)
    code, _, err = command("generate", file, "-p", "hi", "--dtype", "float32")
    assert code == 3
    assert "does not fit into memory" in err
    assert "--dtype bfloat16" in err


def test_a_file_is_not_quantized_again(file: Path) -> None:
    with pytest.raises(qft.QftError, match="not quantized again"):
        qft.open_any(str(file), quantize="nf4")
