"""Untrusted safetensors files are refused before anything is allocated; good ones round-trip."""

import errno
import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qft.errors import ModelError, SaveError
from qft.files import new_folder
from qft.shard_writer import write_shards
from qft.shards import INDEX, SINGLE, ShardedCheckpoint, inside, read_header

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(5, dtype=torch.float32).to(torch.bfloat16),
    "half": torch.randn(2, 3).half(),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False]),
    "empty": torch.zeros(0, 3),
}


def raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def specs() -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    return [(name, tuple(t.shape), t.dtype) for name, t in TENSORS.items()]


def test_some_rows_are_read_and_no_others(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    with ShardedCheckpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint.read_rows("a", [2, 0, 2]), TENSORS["a"][[2, 0, 2]])
        assert torch.equal(checkpoint.read_rows("b", [4]), TENSORS["b"][[4]])
        for row in (3, -1):
            with pytest.raises(IndexError, match="a has no row"):
                checkpoint.read_rows("a", [row])


def test_reads_what_the_reference_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    with ShardedCheckpoint(tmp_path) as checkpoint:
        assert set(checkpoint.names()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            found = checkpoint.read(name)
            assert found.dtype == checkpoint.dtype(name) == tensor.dtype
            assert checkpoint.shape(name) == tuple(tensor.shape)
            assert torch.equal(found, tensor)
        found = checkpoint.read("a")
        found += 1  # memory of its own: the file must not change
        assert torch.equal(checkpoint.read("a"), TENSORS["a"])
        assert checkpoint.head("a", 4) == bytes(4)
        assert checkpoint.total_bytes() == sum(t.nbytes for t in TENSORS.values())


def whole(name: str) -> list[torch.Tensor]:
    return [TENSORS[name]]


@pytest.mark.parametrize("limit,files", [(10**9, 1), (40, 2), (1, 6)])
def test_the_reference_library_reads_what_is_written(tmp_path, limit, files):
    seen: list[int] = []
    total = write_shards(tmp_path, specs(), whole, max_shard_bytes=limit, progress=seen.append)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == files
    assert total == sum(seen) == sum(t.nbytes for t in TENSORS.values())
    loaded = {name: t for path in shards for name, t in load_file(path).items()}
    assert all(torch.equal(loaded[name], t) for name, t in TENSORS.items())
    for path in shards:
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    assert (tmp_path / INDEX).exists() == (files > 1)
    with ShardedCheckpoint(tmp_path) as checkpoint:
        assert checkpoint.names() == list(TENSORS)
        assert all(torch.equal(checkpoint.read(name), t) for name, t in TENSORS.items())


GOOD = {"a": entry(0, 8, [2])}


@pytest.mark.parametrize(
    "header,data,length,message",
    [
        (GOOD, bytes(8), 2**62, "header cannot be as long"),
        (GOOD, bytes(8), 10_000, "header cannot be as long"),
        (b"{no json", b"", None, "no JSON"),
        (b"[1]", b"", None, "no JSON object"),
        (b"[" * 100_000, b"", None, "no JSON"),
        (b'{"a": 1, "a": 2}', b"", None, "appears twice"),
        ({"a": 3}, b"", None, "no description"),
        ({"a": entry(0, 8, [2], "F33")}, bytes(8), None, "dtype 'F33'"),
        ({"a": {**entry(0, 8, [2]), "dtype": ["F32"]}}, bytes(8), None, "dtype"),
        ({"a": entry(0, 8, [-2])}, bytes(8), None, "shape"),
        ({"a": entry(0, 8, [True, 2])}, bytes(8), None, "shape"),
        ({"a": entry(0, 8, [3])}, bytes(8), None, "not its size"),
        ({"a": entry(8, 0, [2])}, bytes(8), None, "not its size"),
        ({"a": entry(0, 8, [2], "F64")}, bytes(8), None, "not its size"),
        ({"a": entry(0, 2**40, [2**38])}, bytes(8), None, "bytes are missing"),
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12), None, "overlaps"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, bytes(20), None, "hole"),
        ({"a": entry(0, 8, [2])}, bytes(9), None, "belong to no tensor"),
    ],
)
def test_a_lying_header_is_refused(tmp_path, header, data, length, message):
    path = raw(tmp_path / SINGLE, header, data, length)
    with pytest.raises(ModelError) as caught:
        read_header(path)
    assert message in caught.value.text()
    assert str(path) in caught.value.text()


def test_a_short_shard_says_how_much_is_missing(tmp_path):
    save_file(TENSORS, tmp_path / SINGLE)
    whole = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(whole[:-10])
    with pytest.raises(ModelError, match="cut short") as caught:
        ShardedCheckpoint(tmp_path)
    assert "10 of" in str(caught.value.found)
    (tmp_path / SINGLE).write_bytes(whole[:4])
    with pytest.raises(ModelError, match="no whole safetensors file"):
        ShardedCheckpoint(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "..", "", "a\\b", 3])
def test_an_index_that_points_outside_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError):
        ShardedCheckpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}'])
def test_a_broken_index_is_refused(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ModelError):
        ShardedCheckpoint(tmp_path)


def test_missing_shards_and_tensors_are_named(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(ModelError, match="missing") as caught:
        ShardedCheckpoint(tmp_path)
    assert "one.safetensors" in str(caught.value.found)
    save_file({"b": torch.zeros(2)}, tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match="does not hold") as caught:
        ShardedCheckpoint(tmp_path)
    assert caught.value.found == "a"
    with pytest.raises(ModelError, match="no safetensors weights"):
        ShardedCheckpoint(tmp_path / "nothing")


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "elsewhere.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / SINGLE).symlink_to("../elsewhere.safetensors")
    with pytest.raises(ModelError, match="link that leads out"):
        ShardedCheckpoint(folder)


def test_the_hub_caches_own_links_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file(TENSORS, blobs / "0123")
    (snapshot / SINGLE).symlink_to("../../blobs/0123")
    with ShardedCheckpoint(snapshot) as checkpoint:
        assert torch.equal(checkpoint.read("a"), TENSORS["a"])
    (tmp_path / "secret").write_text("x")
    (blobs / "4567").symlink_to("../../secret")
    (snapshot / "config.json").symlink_to("../../blobs/4567")
    with pytest.raises(ModelError, match="link that leads out"):
        inside(snapshot, "config.json")


def test_another_shape_or_dtype_than_planned_is_an_error(tmp_path):
    for wrong in (torch.zeros(2), torch.zeros(3, dtype=torch.float16)):
        with pytest.raises(SaveError, match="not what was announced"):
            write_shards(tmp_path, [("a", (3,), torch.float32)], lambda _, t=wrong: [t])


def test_a_full_disk_half_way_leaves_nothing(tmp_path):
    def produce(name: str) -> list[torch.Tensor]:
        if name == "half":
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(name)

    out = tmp_path / "out"
    with pytest.raises(SaveError, match="disk is full"), new_folder(out) as folder:
        write_shards(folder, specs(), produce)
    assert list(tmp_path.iterdir()) == []
