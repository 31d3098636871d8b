"""The GGUF writer: headers by gguf's own reader, resuming, full disks, kills, Ctrl-C, memory."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from merge_bases import wrapped
from write_faults import (
    Moments,
    Usage,
    contents,
    counted_in_a_child,
    in_a_child,
    kill,
    on_a_small_disk,
    refused,
    where_files_may_not_grow,
)

from qft import cli, shards, write_journal
from qft.errors import Interrupted, ModelError, SaveError
from qft.export import delivery
from qft.files import file_hash, restore_former, unfinished
from qft.gguf.file import StoredAs, data_bytes, header, write_file
from qft.write_journal import WriteJournal

torch.set_num_threads(1)
FILE = "model-q8_0.gguf"


# --- the header, as gguf's reader sees it


def read(path: Path, head: bytes, tensors: list[StoredAs] | None = None) -> gguf.GGUFReader:
    """A file of the header and zeros, opened by the reference; a hole takes no disk."""
    path.write_bytes(head)
    os.truncate(path, len(head) + data_bytes(tensors or []))
    return gguf.GGUFReader(path)


VALUES: dict[str, tuple[Any, list[str]]] = {
    "a.small": (7, ["UINT32"]),
    "a.large": (2**32 - 1, ["UINT32"]),
    "a.huge": (2**40, ["UINT64"]),
    "a.negative": (-5, ["INT32"]),
    "a.deep": (-(2**40), ["INT64"]),
    "a.yes": (True, ["BOOL"]),
    "a.no": (False, ["BOOL"]),
    "a.float": (0.5, ["FLOAT32"]),
    "a.text": ("naïve 猫 \0 \n", ["STRING"]),
    "a.nothing": ("", ["STRING"]),
    "l.ints": ([1, -2, 3], ["ARRAY", "INT32"]),
    "l.large": ([0, 2**32 - 1], ["ARRAY", "UINT64"]),
    "l.deep": ([0, -(2**40)], ["ARRAY", "INT64"]),
    "l.floats": ([0.5, -1.0], ["ARRAY", "FLOAT32"]),
    "l.mixed": ([1, 0.5], ["ARRAY", "FLOAT32"]),
    "l.texts": (["a", "", "猫"], ["ARRAY", "STRING"]),
    "l.bools": ([True, False, True], ["ARRAY", "BOOL"]),
    "l.tuple": ((4, 5), ["ARRAY", "INT32"]),
}


def test_every_kind_of_value_is_what_the_reference_reads(tmp_path):
    values = {"general.architecture": "llama", **{key: value for key, (value, _) in VALUES.items()}}
    fields = read(tmp_path / "x.gguf", header(values, [])).fields
    for key, (value, kinds) in VALUES.items():
        found = fields[key].contents()
        assert found == (list(value) if isinstance(value, tuple) else value), key
        assert [kind.name for kind in fields[key].types] == kinds, key


def test_an_empty_list_can_be_read(tmp_path):
    head = header({"l.empty": [], "a.after": 3}, [])
    fields = read(tmp_path / "x.gguf", head).fields
    assert fields["a.after"].contents() == 3


@pytest.mark.parametrize("value", [
    None, {}, b"bytes", object(), [1, "a"], [None], [[1]], 2**64, -(2**63) - 1, [2**64], 1e39,
    "\ud800", ["a", "\ud800"], [True, 2],
])  # fmt: skip
def test_a_value_that_gguf_cannot_hold_is_refused_by_its_key(value):
    with pytest.raises(ModelError, match="cannot hold a setting") as error:
        header({"general.strange": value}, [])
    assert "general.strange" in str(error.value)


TENSORS = [
    StoredAs("one", (7,), "f32"),
    StoredAs("two", (3, 5), "f16"),
    StoredAs("three", (2, 64), "q8_0"),
    StoredAs("four", (2, 3, 4, 5), "f32"),
    StoredAs("five", (3, 256), "q4_k"),
]


def test_shapes_types_and_offsets_are_what_the_reference_reads(tmp_path):
    head = header({"general.architecture": "llama"}, TENSORS)
    assert len(head) % gguf.GGUF_DEFAULT_ALIGNMENT == 0
    reader = read(tmp_path / "x.gguf", head, TENSORS)
    position = len(head)
    for wanted, found in zip(TENSORS, reader.tensors, strict=True):
        assert found.name == wanted.name
        assert found.shape.tolist() == list(wanted.shape[::-1])
        assert found.tensor_type.name.lower() == wanted.kind
        assert (found.n_bytes, found.data_offset) == (wanted.bytes, position)
        assert position % gguf.GGUF_DEFAULT_ALIGNMENT == 0
        position += -(-wanted.bytes // 32) * 32


@pytest.mark.parametrize("tensors,problem", [
    ([StoredAs("a", (2, 3), "f32"), StoredAs("a", (2,), "f32")], "two tensors"),
    ([StoredAs("x" * 64, (2,), "f32")], "63 bytes"),
    ([StoredAs("猫" * 22, (2,), "f32")], "63 bytes"),
    ([StoredAs("a", (1, 1, 1, 1, 1), "f32")], "1 to 4 axes"),
    ([StoredAs("a", (), "f32")], "1 to 4 axes"),
    ([StoredAs("a", (0, 32), "f32")], "at least one number"),
    ([StoredAs("a", (4, 40), "q8_0")], "blocks of q8_0"),
])  # fmt: skip
def test_a_tensor_that_ggml_would_not_read_is_refused(tensors, problem):
    with pytest.raises(ModelError, match=problem):
        header({}, tensors)


def test_a_name_of_63_bytes_is_written(tmp_path):
    tensors = [StoredAs("x" * 63, (2,), "f32")]
    assert read(tmp_path / "x.gguf", header({}, tensors), tensors).tensors[0].name == "x" * 63


def test_tensors_far_beyond_four_gibibytes(tmp_path):
    """The file is a hole but for its header and the last tensor."""
    tensors = [
        StoredAs("first", (70_000, 65_536), "f16"),
        StoredAs("odd", (3,), "f16"),
        StoredAs("q", (131_072, 65_536), "q8_0"),
        StoredAs("last", (8,), "f32"),
    ]
    head = header({"general.architecture": "llama"}, tensors)
    path = tmp_path / "x.gguf"
    path.write_bytes(head)
    os.truncate(path, len(head) + data_bytes(tensors))
    begins = len(head) + 2 * 70_000 * 65_536 + 32 + 34 * 131_072 * 2048
    with path.open("r+b") as stream:
        stream.seek(begins)
        stream.write(np.arange(8, dtype=np.float32).tobytes())
    found = gguf.GGUFReader(path).tensors[-1]
    assert found.data_offset == begins > 2**34
    assert found.data.tolist() == list(range(8))


def test_the_header_of_a_large_vocabulary_takes_little_memory():
    tokens = [f"token{number}" for number in range(256_000)]
    values = {
        "general.architecture": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * len(tokens),
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.merges": [f"{token} x" for token in tokens],
    }
    tracemalloc.start()
    head = header(values, [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(head) > 10**7
    assert peak < 3 * len(head), (peak, len(head))


# --- going on


def pattern(tensors: list[StoredAs]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {t.name: torch.randint(256, (t.bytes,), dtype=torch.uint8, generator=generator)
            for t in tensors}  # fmt: skip


def test_a_file_goes_on_at_any_byte_within_a_tensor_too(tmp_path, monkeypatch):
    """Blocks of 29 bytes: a note may lie before, in, and right after a tensor's padding."""
    monkeypatch.setattr(write_journal, "_EVERY_BYTES", 1)
    data, asked = pattern(TENSORS), []
    head = header({"general.architecture": "llama"}, TENSORS)
    whole = tmp_path / "whole"
    whole.mkdir()

    def produce(name: str, start: int):
        asked.append((name, start))
        for begin in range(start, len(data[name]), 29):
            yield data[name][begin : begin + 29]

    size = write_file(whole / FILE, head, TENSORS, produce, WriteJournal(whole, "a"))
    expected = (whole / FILE).read_bytes()
    assert len(expected) == size == len(head) + data_bytes(TENSORS)
    for tensor, found in zip(TENSORS, gguf.GGUFReader(whole / FILE).tensors, strict=True):
        assert found.data.tobytes() == data[tensor.name].numpy().tobytes()
    lines = (whole / write_journal.FILE).read_text().splitlines(keepends=True)
    assert len(lines) > 30
    part = tmp_path / "part"
    for kept in [1, *range(2, len(lines), 7), len(lines)]:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        (part / write_journal.FILE).write_text("".join(lines[:kept]) + '{"file": "cut')
        (part / FILE).write_bytes(expected)
        asked.clear()
        seen: list[int] = []
        write_file(part / FILE, head, TENSORS, produce, WriteJournal(part, "a"), seen.append)
        assert (part / FILE).read_bytes() == expected
        assert sum(seen) == sum(tensor.bytes for tensor in TENSORS)
        assert len(asked) < len(TENSORS) or kept < 4
    assert not asked  # with every line there, nothing is made again


@pytest.mark.parametrize("size", [13, 15])
def test_more_or_fewer_bytes_than_announced_are_refused(tmp_path, size):
    tensors = [StoredAs("a", (7,), "f16")]
    journal = WriteJournal(tmp_path, "x")
    with pytest.raises(SaveError, match="not what was announced"):
        write_file(tmp_path / FILE, header({}, tensors), tensors,
                   lambda *_: [torch.zeros(size, dtype=torch.uint8)], journal)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_llama) -> Path:
    """A folder with a base, an adapter on it and their export."""
    from peft import LoraConfig

    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(tiny_llama, folder / "base")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False,
                        task_type="CAUSAL_LM")  # fmt: skip
    wrapped(folder / "base", config).save_pretrained(folder / "adapter")
    export(folder, folder / "exported")
    return folder


def export(made: Path, out: Path, **options: Any) -> dict[str, Any]:
    options = {"format": "gguf:q8_0", "verify": False, **options}
    return delivery.export(made / "adapter", out, base=str(made / "base"), **options)


def command(made: Path, out: Path, *flags: str) -> int:
    """`qft export`, as its entry point runs it."""
    sys.argv = ["qft", "export", str(made / "adapter"), "--out", str(out), "--format",
                "gguf:q8_0", "--no-verify", "--base", str(made / "base"), "--quiet",
                *flags]  # fmt: skip
    try:
        cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


@pytest.fixture
def many_writes(monkeypatch):
    """Small blocks, each of them noted, so that there are many moments."""
    plain = shards.row_blocks

    def small(shape, numbers=1500):
        return plain(shape, numbers)

    monkeypatch.setattr("qft.merging.tensors.row_blocks", small)
    monkeypatch.setattr("qft.gguf.turned.row_blocks", small)
    monkeypatch.setattr(write_journal, "_EVERY_BYTES", 1)


@pytest.fixture
def sources_stay(made):
    """Neither base nor adapter may change, whatever happens."""
    files = [p for name in ("base", "adapter") for p in (made / name).rglob("*") if p.is_file()]
    before = {path: file_hash(path) for path in files}
    yield
    assert {path: file_hash(path) for path in files} == before


def test_killed_at_any_moment_the_same_command_ends_byte_equal(
    tmp_path, made, monkeypatch, many_writes, sources_stay
):
    out = tmp_path / "work" / "out"
    out.parent.mkdir()
    count = counted_in_a_child(out.parent, tmp_path / "told", monkeypatch,
                               lambda: command(made, out))  # fmt: skip
    assert contents(out) == contents(made / "exported")
    shutil.rmtree(out)
    assert count > 60
    resumed = 0
    for at in [*range(1, count, count // 8), count - 2, count - 1]:

        def work(at: int = at) -> int:
            Moments(monkeypatch, out.parent, at, kill)
            return command(made, out)

        assert in_a_child(work) == -signal.SIGKILL
        assert not out.exists() or contents(out) == contents(made / "exported")
        held = unfinished(out) / FILE
        resumed += held.exists() and held.stat().st_size > 50_000
        assert command(made, out, "--overwrite") == 0
        assert contents(out) == contents(made / "exported"), at
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        shutil.rmtree(out)
    assert resumed > 2


def test_what_was_written_is_not_rounded_again(tmp_path, made, monkeypatch, many_writes):
    from qft.export import gguf_format

    plain, rounded = gguf_format.encode, [0]

    def encode(rows, kind, *more):
        rounded[0] += rows.numel()
        if rounded[0] == stop:
            raise KeyboardInterrupt
        return plain(rows, kind, *more)

    monkeypatch.setattr(gguf_format, "encode", encode)
    stop = -1
    export(made, tmp_path / "whole")
    total, rounded[0] = rounded[0], 0
    blocks: list[int] = []
    stops = [total]  # the last block of all

    def noted(rows, kind, *more):
        blocks.append(rows.numel())
        if sum(blocks) == stops[0]:
            raise KeyboardInterrupt
        return plain(rows, kind, *more)

    monkeypatch.setattr(gguf_format, "encode", noted)
    with pytest.raises(Interrupted):
        export(made, tmp_path / "out")
    last = blocks[-1]
    stops[0] = -1
    blocks.clear()
    export(made, tmp_path / "out")
    assert blocks == [last]
    assert contents(tmp_path / "out") == contents(made / "exported")


def test_a_tensor_is_produced_from_any_byte_on(made, many_writes):
    from qft import models
    from qft.export.gguf_format import GGUFPlan
    from qft.merging.merge import open_source

    spec = models.ModelSpec(source="")
    source = open_source(made / "base", models.open_skeleton(made / "base", spec))
    plan = GGUFPlan(source, "q8_0")
    for name in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output_norm.weight"):
        blocks = [block.flatten() for block in plan.produce(name)]
        whole = torch.cat(blocks)
        assert len(blocks) > 2 or whole.numel() < 300
        for start in (0, 1, len(blocks[0]) - 1, len(blocks[0]), len(blocks[0]) + 5, len(whole) - 1):
            if start < len(whole):
                assert torch.equal(torch.cat([*plan.produce(name, start)]), whole[start:])


@pytest.mark.parametrize("change", ["mix", "adapter", "tokenizer"])
def test_what_is_made_otherwise_does_not_go_on(tmp_path, made, monkeypatch, many_writes, change):
    """Not with the rest of another export."""
    copy, out = tmp_path / "copy", tmp_path / "out"
    shutil.copytree(made, copy)
    _interrupt(copy, out, monkeypatch)
    options = {}
    if change == "mix":
        options = {"format": "gguf:f16"}
    elif change == "adapter":
        os.utime(copy / "adapter" / "adapter_model.safetensors", (1, 1))
    else:
        path = copy / "base" / "tokenizer_config.json"
        path.write_text(path.read_text().replace("assistant: ", "model: "))
        (copy / "base" / "chat_template.jinja").unlink(missing_ok=True)
    asked: list[int] = []
    plain = WriteJournal.file

    def opened(journal, path):
        asked.append(len(journal._done))
        return plain(journal, path)

    monkeypatch.setattr(WriteJournal, "file", opened)
    export(copy, out, **options)
    assert asked == [0]
    export(copy, tmp_path / "fresh", **options)
    assert contents(out) == contents(tmp_path / "fresh")


def _interrupt(made: Path, out: Path, monkeypatch) -> None:
    plain, left = write_journal.JournalledFile.write, [20]

    def stop(file, data):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        plain(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(write_journal.JournalledFile, "write", stop)
        with pytest.raises(Interrupted) as error:
            export(made, out)
    assert error.value.exit_code == 130
    assert "the same command goes on" in str(error.value)


def test_ctrl_c_says_that_the_same_command_goes_on(
    tmp_path, made, monkeypatch, many_writes, sources_stay
):
    out = tmp_path / "work" / "out"
    out.parent.mkdir()

    def work() -> int:
        Moments(monkeypatch, out.parent, 40, lambda: os.kill(os.getpid(), signal.SIGINT))
        return command(made, out)

    assert in_a_child(work) == 130
    assert not out.exists()
    shutil.rmtree(unfinished(out))
    _interrupt(made, out, monkeypatch)
    assert not out.exists()
    assert (unfinished(out) / FILE).stat().st_size > 0
    export(made, out)
    assert contents(out) == contents(made / "exported")
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_overwriting_keeps_the_former_until_the_new_one_is_there(
    tmp_path, made, monkeypatch, many_writes, sources_stay
):
    out = tmp_path / "work" / "out"

    def begin() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        out.mkdir(parents=True)
        (out / "former").write_text("precious")

    begin()
    count = counted_in_a_child(out.parent, tmp_path / "told", monkeypatch,
                               lambda: command(made, out, "--overwrite"))  # fmt: skip
    for at in [3, *range(5, count, count // 4), count - 4, count - 3, count - 2, count - 1]:
        begin()

        def work(at: int = at) -> int:
            Moments(monkeypatch, out.parent, at, kill)
            return command(made, out, "--overwrite")

        assert in_a_child(work) == -signal.SIGKILL
        restore_former(out)
        assert contents(out) in ({"former": b"precious"}, contents(made / "exported"))
        assert command(made, out, "--overwrite") == 0
        assert contents(out) == contents(made / "exported"), at
        assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("number,text", [
    (errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"),
    (errno.EIO, "cannot be written"), (errno.EROFS, "cannot be written"),
])  # fmt: skip
def test_a_disk_that_refuses_any_write(
    tmp_path, made, monkeypatch, many_writes, sources_stay, number, text
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "former").write_text("precious")
    plain, left = write_journal.JournalledFile.write, [0]

    def write(file, data):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(number, os.strerror(number))
        plain(file, data)

    monkeypatch.setattr(write_journal.JournalledFile, "write", write)
    for at in (1, 2, 9) if number == errno.ENOSPC else (5,):
        left[0] = at
        with pytest.raises(SaveError, match=text):
            export(made, out, overwrite=True)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert contents(out) == {"former": b"precious"}


@pytest.mark.parametrize("place", [
    "qft.write_journal.write_text", "qft.export.gguf_format.copy_files",
    "qft.write_journal.os.fsync", "qft.files.os.rename", "qft.files.sync_tree",
])  # fmt: skip
def test_a_disk_that_is_full_elsewhere(tmp_path, made, monkeypatch, many_writes, place):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(SaveError, match="disk is full"):
            export(made, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("limit", [3_000, 60_000])
def test_a_file_that_may_not_grow(tmp_path, made, sources_stay, limit):
    """The operating system's own refusal, in the midst of a write."""
    assert where_files_may_not_grow(limit, lambda: export(made, tmp_path / "out")) == 7
    assert not list(tmp_path.iterdir())


def test_a_real_disk_that_is_full(tmp_path, made, monkeypatch, sources_stay):
    """A file system of 100 kB, mounted where nobody else sees it."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, 2**40))
    place = tmp_path / "disk"
    place.mkdir()

    def work() -> int:
        code = refused(lambda: export(made, place / "out"), "disk is full")
        return 8 if list(place.iterdir()) else code

    code = on_a_small_disk(place, 100, work)
    if code == 77:
        pytest.skip("no file system may be mounted here")
    assert code == 7


def test_the_room_that_is_asked_for_is_what_is_missing(tmp_path, made, monkeypatch, many_writes):
    out, free = tmp_path / "out", [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 0, free[0]))
    whole = sum(len(data) for data in contents(made / "exported").values())
    slack = 2**18
    free[0] = whole - 1
    with pytest.raises(SaveError, match="not enough room"):
        export(made, out)
    free[0] = whole + slack
    export(made, out)
    shutil.rmtree(out)
    _interrupt(made, out, monkeypatch)
    there = sum(len(data) for data in contents(unfinished(out)).values())
    assert there > 20_000
    free[0] = whole + slack - there
    export(made, out)
    assert contents(out) == contents(made / "exported")


def test_a_name_gguf_cannot_hold_leaves_nothing(tmp_path, made, monkeypatch):
    def refuse(*_: Any) -> bytes:
        return header({"x": "\ud800"}, [])

    monkeypatch.setattr("qft.export.gguf_format.header", refuse)
    with pytest.raises(ModelError, match="cannot hold a setting"):
        export(made, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_others_may_read_the_file(made):
    assert (made / "exported" / FILE).stat().st_mode & 0o777 == 0o644


# --- memory

_MEASURE = """
import re, sys, torch
from pathlib import Path
import gguf, transformers.models.auto.tokenization_auto
from qft import models
from qft.export import gguf_format
from qft.export.formats import write_format
from qft.merging.merge import open_source
from qft.registry import strategy_from_folder
torch.set_num_threads(1)
base, adapter, out = map(Path, sys.argv[1:])
models.open_skeleton(base, models.ModelSpec(source=str(base)))
models.open_tokenizer(base)
strategy_from_folder(adapter)
def kb(what):
    return int(re.search(what + r":\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1))
Path("/proc/self/clear_refs").write_text("5")
before = kb("VmRSS")
skeleton = models.open_skeleton(base, models.ModelSpec(source=str(base)))
source = open_source(base, skeleton, adapter=adapter, strategy=strategy_from_folder(adapter),
                     dtype=torch.float32)
write_format(source, "gguf:q4_k_m", out)
print((kb("VmHWM") - before) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_largest_tensor(tmp_path):
    """An embedding of 61 M numbers: 123 MB as it is stored, 246 MB in float32."""
    from conftest import make_tokenizer
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from qft.shard_writer import write_shards

    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    config = LlamaConfig(vocab_size=60_000, hidden_size=1024, intermediate_size=2048,
                         num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8,
                         tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)  # fmt: skip
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in LlamaForCausalLM(config).state_dict().items()
                  if n != "lm_head.weight"}  # fmt: skip
    torch.manual_seed(0)
    specs = [(name, shape, torch.bfloat16) for name, shape in shapes.items()]
    write_shards(base, specs, lambda name: [torch.rand(shapes[name]).bfloat16() - 0.5])
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(base)
    make_tokenizer(base)
    values = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"],
              "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    start = "base_model.model.model.layers.0.self_attn.q_proj"
    save_file({f"{start}.lora_A.weight": torch.randn(8, 1024),
               f"{start}.lora_B.weight": torch.randn(1024, 8)},
              adapter / "adapter_model.safetensors")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(base), str(adapter), str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    held = int(done.stdout.split()[-1])
    assert held < 180 * 2**20, held
