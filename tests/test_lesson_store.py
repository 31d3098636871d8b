"""Lessons on disk: killed at any moment they go on byte-equal, and nothing wrong is ever read."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qft import hardware
from qft.distillation.lesson_store import LessonStore
from qft.errors import SaveError
from qft.files import write_manifest
from qft.shard_store import differences

IDENTITY = {"data": "rows", "teacher": "weights", "kept": "top-k"}
SAMPLES = tuple(random.Random(0).sample(range(1000), 40))


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("qft.distillation.lesson_store.SHARD_BYTES", 1200)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows_of(sample: int) -> int:
    return sample % 17


def lesson(sample: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sample)
    return {
        "tokens": torch.randint(256, (rows_of(sample), 9), generator=generator).to(torch.uint8),
        "log_probabilities": torch.randn(rows_of(sample), 8, generator=generator).half(),
        "layer.2": torch.randn(sample % 5 + 1, 16, generator=generator).bfloat16(),
        "entropy": torch.rand(rows_of(sample), generator=generator),
    }


def store(root: Path, **changes: str) -> LessonStore:
    sizes = [sum(t.nbytes for t in lesson(sample).values()) for sample in SAMPLES]
    return LessonStore(root, {**IDENTITY, **changes}, SAMPLES, sizes)


def fill(one: LessonStore, numbers: list[int] | None = None) -> list[int]:
    assert one.lock() == "write"
    try:
        done = one.missing() if numbers is None else numbers
        for number in done:
            part = one.shards[number]
            one.write(number, [lesson(SAMPLES[position]) for position in part])
        return done
    finally:
        one.release()


def contents(root: Path) -> dict[str, bytes]:
    files = (p for p in root.rglob("*") if p.is_file() and p.name != "lock")
    return {str(p.relative_to(root)): p.read_bytes() for p in files}


def holds_all(one: LessonStore) -> bool:
    read = one.open()
    return all(
        read(sample).keys() == lesson(sample).keys()
        and all(torch.equal(tensor, lesson(sample)[n]) for n, tensor in read(sample).items())
        for sample in SAMPLES
    )


def test_lessons_come_back_by_example(tmp_path: Path) -> None:
    one = store(tmp_path)
    assert len(one.shards) > 7
    assert fill(one) == list(range(len(one.shards)))
    again = store(tmp_path)
    assert again.missing() == []
    assert again.bytes_missing() == 0
    assert holds_all(again)
    read = again.open()
    wanted = sum(t.nbytes for sample in SAMPLES for t in lesson(sample).values())
    assert read.bytes() == wanted
    assert sum(len(part) for part in read.whole("entropy")) == sum(map(rows_of, SAMPLES))
    assert read.whole("nothing") == []


def test_no_examples_are_a_store_too(tmp_path: Path) -> None:
    one = LessonStore(tmp_path, IDENTITY, [], [])
    assert one.lock() == "write"
    one.write(0, [])
    assert LessonStore(tmp_path, IDENTITY, [], []).missing() == []


def test_where_shards_end_depends_on_the_examples_alone(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fill(store(whole))
    for number in (3, 0, 5):  # whatever a former run had got to, and in whatever order
        fill(store(parts), [number])
    assert sorted(fill(store(parts))) == sorted(set(range(len(store(parts).shards))) - {0, 3, 5})
    assert contents(parts) == contents(whole)


@pytest.mark.parametrize("seed", range(8))
def test_killed_at_any_moment_it_goes_on_byte_equal(tmp_path: Path, seed: int) -> None:
    """SIGKILL in the middle of whatever it is at, three times over, then to the end."""
    whole = tmp_path / "whole"
    started = time.monotonic()
    fill(store(whole))
    seconds = time.monotonic() - started
    root, moments = tmp_path / "killed", random.Random(seed)
    killed = 0
    for _ in range(3):
        child = os.fork()
        if child == 0:
            try:
                fill(store(root))
            finally:
                os._exit(0)
        time.sleep(moments.uniform(0, 0.7 * seconds))
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert killed, "one of them was to be killed while it wrote"
    fill(store(root))
    assert contents(root) == contents(whole)
    assert holds_all(store(root))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 9, 13, 20, 31])
def test_killed_at_each_kind_of_file_operation(tmp_path: Path, count: int) -> None:
    import sys

    whole, root = tmp_path / "whole", tmp_path / "killed"
    fill(store(whole))
    child = os.fork()
    if child == 0:
        left = [count]

        def on_file(event: str, arguments: tuple[Any, ...]) -> None:
            if event in ("open", "os.rename", "os.mkdir") and "killed" in str(arguments[0]):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.addaudithook(on_file)
            fill(store(root))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    fill(store(root))
    assert contents(root) == contents(whole)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def of_another_shard(path: Path) -> None:
    other = path.parent.with_name("00002") / path.name
    path.write_bytes(other.read_bytes())
    write_manifest(path.parent)


def of_another_teacher(path: Path) -> None:
    other = store(path.parents[2], teacher="another")
    fill(other)
    path.write_bytes((other.folder / "00001" / path.name).read_bytes())
    write_manifest(path.parent)


def rows_moved(path: Path) -> None:
    """Of the right shard, and signed, but its rows are not its examples'."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["tokens/rows"] = tensors["tokens/rows"][:-1].clone()
    save_file(tensors, path, {"shard": f"{path.parents[1].name}/1"})
    write_manifest(path.parent)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def unsigned(path: Path) -> None:
    (path.parent / "manifest.json").unlink()


def badly_signed(path: Path) -> None:
    (path.parent / "manifest.json").write_text("[]", encoding="utf-8")


DAMAGES = [flip, cut_off, Path.unlink, unsigned, badly_signed, of_another_shard,
           of_another_teacher, rows_moved]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_made_anew_and_no_other(tmp_path: Path, damage: Any) -> None:
    fill(store(tmp_path))
    before = contents(store(tmp_path).folder)
    damage(store(tmp_path).folder / "00001" / "lessons.safetensors")
    assert store(tmp_path).missing() == [1]
    assert fill(store(tmp_path)) == [1]
    assert contents(store(tmp_path).folder) == before


def test_another_identity_is_never_read_and_what_differs_is_named(tmp_path: Path) -> None:
    fill(store(tmp_path))
    other = store(tmp_path, teacher="other weights", kept="samples")
    assert len(other.missing()) == len(other.shards)
    assert differences(tmp_path, other.identity) == ["teacher", "kept"]
    fill(other)
    third = {**other.identity, "data": "other rows"}
    assert differences(tmp_path, third) == ["data"]  # than the most alike of the two
    assert differences(tmp_path, IDENTITY) == []
    assert differences(tmp_path, {**IDENTITY, "data": "other", "place": "of another sort"}) == []


def test_one_writes_and_several_read(tmp_path: Path) -> None:
    first, second, third = (store(tmp_path) for _ in range(3))
    assert first.lock() == "write"
    assert second.lock() == "no"
    first.share()
    assert second.lock() == "read"
    assert third.lock() == "read"
    for one in (first, second):
        one.release()
    assert store(tmp_path).lock() == "read"  # the third still reads
    third.release()
    assert third.lock() == "write"


def test_a_killed_writer_holds_no_lock(tmp_path: Path) -> None:
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        one = store(tmp_path)
        one.lock()
        os.write(tell, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    assert store(tmp_path).lock() == "no"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert store(tmp_path).lock() == "write"


def test_a_full_disk_leaves_what_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    whole, root = tmp_path / "whole", tmp_path / "full"
    fill(store(whole))
    plain, left = safetensors.torch.save_file, [3]

    def full(*arguments: Any, **named: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(*arguments, **named)

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(SaveError, match="disk is full"):
        fill(store(root))
    monkeypatch.undo()
    monkeypatch.setattr("qft.distillation.lesson_store.SHARD_BYTES", 1200)
    assert store(root).missing()[0] == 3
    assert not list(root.rglob(".unfinished*"))
    fill(store(root))
    assert contents(root) == contents(whole)


@pytest.mark.parametrize("lessons", [
    [], [lesson(SAMPLES[0])] * 2, "one says less",
])  # fmt: skip
def test_lessons_that_are_not_the_shards_are_refused(tmp_path: Path, lessons: Any) -> None:
    one = store(tmp_path)
    if isinstance(lessons, str):
        lessons = [lesson(SAMPLES[position]) for position in one.shards[0]]
        del lessons[-1]["entropy"]
    assert one.lock() == "write"
    with pytest.raises(ValueError, match="one lesson an example"):
        one.write(0, lessons)


def test_reading_takes_no_memory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are mapped: opening 64 MB of lessons takes next to none of it."""
    monkeypatch.setattr("qft.distillation.lesson_store.SHARD_BYTES", 4 * 2**20)
    made = [{"logits": torch.zeros(1000, 500)} for _ in range(2)]
    one = LessonStore(tmp_path, IDENTITY, range(32), [2_000_000] * 32)
    assert one.lock() == "write"
    for number in one.missing():
        one.write(number, made)
    before = hardware.resident_bytes()
    read = one.open()
    assert hardware.resident_bytes() - before < 8 * 2**20
    assert read(31)["logits"].shape == (1000, 500)
