"""Writes are atomic: whatever goes wrong, what was there before is whole, or the new thing is."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qft import files
from qft.errors import OutputExistsError, SaveError

Usage = namedtuple("Usage", "total used free")


class Killed(BaseException):
    """Stands for kill -9: code that handles it would be code that runs after death."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def old_folder(place: Path) -> Path:
    place.mkdir()
    (place / "weights").write_text("old")
    return place


# --- new_folder


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    target = tmp_path / "run"
    with files.new_folder(target) as unfinished:
        (unfinished / "deep").mkdir()
        (unfinished / "deep" / "weights").write_text("new")
        assert not target.exists()
        assert unfinished.name.startswith(".")
    assert (target / "deep" / "weights").read_text() == "new"
    assert names(tmp_path) == ["run"]


def test_parents_are_made(tmp_path):
    with files.new_folder(tmp_path / "a" / "b") as unfinished:
        (unfinished / "x").write_text("x")
    assert names(tmp_path / "a" / "b") == ["x"]


def write_half(target: Path, error: BaseException) -> None:
    """Begins to write a folder, and comes to grief."""
    with files.new_folder(target, overwrite=True) as unfinished:
        (unfinished / "weights").write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_an_exception_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)):
        write_half(tmp_path / "run", error)
    assert names(tmp_path) == []


def test_an_exception_leaves_the_old_folder_whole(tmp_path):
    target = old_folder(tmp_path / "run")
    with pytest.raises(ValueError, match="no"):
        write_half(target, ValueError("no"))
    assert names(tmp_path) == ["run"]
    assert (target / "weights").read_text() == "old"


def test_overwrite_replaces_and_mixes_nothing(tmp_path):
    target = old_folder(tmp_path / "run")
    (target / "only-old").write_text("old")
    with files.new_folder(target, overwrite=True) as unfinished:
        (unfinished / "weights").write_text("new")
        assert (target / "weights").read_text() == "old"
    assert names(target) == ["weights"]
    assert (target / "weights").read_text() == "new"
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("kind", ["file", "link"])
def test_overwrite_replaces_what_is_no_folder(tmp_path, kind):
    target = tmp_path / "run"
    aside = old_folder(tmp_path / "aside")
    target.write_text("old") if kind == "file" else target.symlink_to(aside)
    with files.new_folder(target, overwrite=True) as unfinished:
        (unfinished / "weights").write_text("new")
    assert (target / "weights").read_text() == "new"
    assert (aside / "weights").read_text() == "old"  # a link is replaced, not followed
    assert names(tmp_path) == ["aside", "run"]


def test_without_overwrite_a_taken_name_is_refused_before_anything_is_written(tmp_path):
    target = old_folder(tmp_path / "run")
    with pytest.raises(OutputExistsError) as caught, files.new_folder(target):
        pytest.fail("the body ran")
    assert caught.value.exit_code == 2
    assert str(target) in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert names(tmp_path) == ["run"]


def test_what_an_earlier_interruption_left_does_not_get_in(tmp_path):
    with files.new_folder(tmp_path / "run") as unfinished:
        name = unfinished.name
    stale = tmp_path / name
    stale.mkdir()
    (stale / "stale").write_text("half")
    with files.new_folder(tmp_path / "run", overwrite=True) as unfinished:
        (unfinished / "weights").write_text("new")
    assert names(tmp_path / "run") == ["weights"]
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize(
    "raised, says",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written"),
        (SafetensorError("I/O error: File too large (os error 27)"), "cannot be written"),
    ],
)
def test_a_full_or_locked_disk_is_one_clear_error(tmp_path, raised, says):
    target = old_folder(tmp_path / "run")
    with pytest.raises(SaveError, match=says) as caught:
        write_half(target, raised)
    assert str(target) in str(caught.value)
    assert caught.value.exit_code == 1
    assert (target / "weights").read_text() == "old"
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("raised", [OSError(errno.EBADF, "Bad"), SafetensorError("bad header")])
def test_other_errors_stay_what_they_are(tmp_path, raised):
    with pytest.raises(type(raised)) as caught, files.new_folder(tmp_path / "run"):
        raise raised
    assert caught.value is raised
    assert names(tmp_path) == []


def test_a_disk_that_fills_while_syncing_leaves_the_old_folder(tmp_path, monkeypatch):
    target = old_folder(tmp_path / "run")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(SaveError, match="disk is full"),
        files.new_folder(target, overwrite=True) as unfinished,
    ):
        (unfinished / "weights").write_text("new")
    assert (target / "weights").read_text() == "old"
    assert names(tmp_path) == ["run"]


def test_a_read_only_place_is_a_clear_error(tmp_path, monkeypatch):
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SaveError, match="cannot be written"), files.new_folder(tmp_path / "run"):
        pytest.fail("the body ran")


def cut_off(monkeypatch: pytest.MonkeyPatch, target: Path, dies_at: int) -> None:
    """Replaces `target`, and dies at the given rename; no line of qft runs after that."""
    real = os.rename
    calls = 0

    def rename(source, destination):
        nonlocal calls
        calls += 1
        if calls >= dies_at:
            raise Killed
        real(source, destination)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        # a dead process cleans nothing up
        patch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(Killed), files.new_folder(target, overwrite=True) as unfinished:
            (unfinished / "weights").write_text("new")


@pytest.mark.parametrize("dies_at", [1, 2])
def test_killed_at_a_rename_nothing_carries_the_name_half_written(tmp_path, monkeypatch, dies_at):
    target = old_folder(tmp_path / "run")
    cut_off(monkeypatch, target, dies_at)
    if dies_at == 1:
        assert (target / "weights").read_text() == "old"
    else:  # between the two: the old folder has made way, the new one has not come yet
        assert not target.exists()
    hidden = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    whole = {(path / "weights").read_text() for path in hidden}
    assert "new" in whole


def test_killed_between_the_renames_the_old_folder_comes_back(tmp_path, monkeypatch):
    target = old_folder(tmp_path / "run")
    cut_off(monkeypatch, target, 2)
    files.remove_unfinished(tmp_path)
    assert names(tmp_path) == ["run"]
    assert (target / "weights").read_text() == "old"


def test_killed_between_the_renames_the_next_write_finds_the_old_folder(tmp_path, monkeypatch):
    target = old_folder(tmp_path / "run")
    cut_off(monkeypatch, target, 2)
    with pytest.raises(OutputExistsError), files.new_folder(target):
        pytest.fail("the body ran")
    assert (target / "weights").read_text() == "old"
    with files.new_folder(target, overwrite=True) as unfinished:
        (unfinished / "weights").write_text("newer")
    assert (target / "weights").read_text() == "newer"
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("raised", [OSError(errno.EBADF, "Bad file"), KeyboardInterrupt()])
def test_a_second_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch, raised):
    target = old_folder(tmp_path / "run")
    real = os.rename

    def rename(source, destination):
        if Path(destination) == target and "former" not in Path(source).name:
            raise raised
        real(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    with (
        pytest.raises(type(raised)),
        files.new_folder(target, overwrite=True) as unfinished,
    ):
        (unfinished / "weights").write_text("new")
    assert (target / "weights").read_text() == "old"
    assert names(tmp_path) == ["run"]


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    synced: list[str] = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def rename(source, destination):
        assert {"deep", "weights"} <= set(synced)
        synced.append("RENAMED")
        real_rename(source, destination)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    with files.new_folder(tmp_path / "run") as unfinished:
        (unfinished / "deep").mkdir()
        (unfinished / "deep" / "weights").write_text("new")
    assert synced[-1] == tmp_path.name  # the new name itself is on the disk too
    assert "RENAMED" in synced


# --- require_absent, require_disk


def test_an_empty_folder_counts_as_absent(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    files.require_absent(empty)
    with files.new_folder(empty) as unfinished:
        (unfinished / "x").write_text("x")
    assert names(empty) == ["x"]


def test_what_exists_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    for taken in (file, dangling, old_folder(tmp_path / "full")):
        with pytest.raises(OutputExistsError):
            files.require_absent(taken)
        files.require_absent(taken, overwrite=True)
    files.require_absent(tmp_path / "free")


def test_a_disk_too_small_is_refused_before_the_write(tmp_path, monkeypatch):
    asked: list[Path] = []

    def usage(path):
        asked.append(Path(path))
        return Usage(100 << 20, 90 << 20, 10 << 20)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    files.require_disk(tmp_path / "not" / "yet", 10 << 20)
    with pytest.raises(SaveError) as caught:
        files.require_disk(tmp_path / "not" / "yet", (10 << 20) + 1)
    assert "10 MiB free" in str(caught.value)
    assert asked[0] == tmp_path  # the nearest folder that exists


# --- manifests


@pytest.fixture
def listed(tmp_path):
    folder = tmp_path / "checkpoint-3"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(b"0123456789")
    (folder / "state.json").write_text("{}")
    files.write_manifest(folder)
    return folder


def test_a_manifest_names_every_file_but_itself(listed):
    assert files.manifest_problem(listed) is None
    entries = json.loads((listed / files.MANIFEST).read_text())["files"]
    assert sorted(entries) == ["adapter/weights", "state.json"]
    assert entries["adapter/weights"]["bytes"] == 10
    files.write_manifest(listed)  # writing it again does not list the manifest either
    assert sorted(json.loads((listed / files.MANIFEST).read_text())["files"]) == sorted(entries)


def test_a_missing_file_is_named(listed):
    (listed / "state.json").unlink()
    assert files.manifest_problem(listed) == "state.json is missing"


def test_a_truncated_file_is_named_with_both_sizes(listed):
    (listed / "adapter" / "weights").write_bytes(b"01234")
    problem = files.manifest_problem(listed)
    assert "adapter/weights has 5 bytes" in problem
    assert "10 were written" in problem


def test_a_changed_file_of_the_same_size_is_named(listed):
    (listed / "adapter" / "weights").write_bytes(b"0123456780")
    assert files.manifest_problem(listed) == "adapter/weights has changed since it was written"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"files": 3}', '{"files": {"state.json": 3}}',
             '{"files": {"state.json": {"bytes": 2}}}', "null", '"files"', b"\xff\xfe"],
)  # fmt: skip
def test_a_broken_manifest_is_a_problem_not_an_exception(listed, text):
    (listed / files.MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert files.manifest_problem(listed) == "its manifest cannot be read"


def test_no_manifest_no_folder(listed, tmp_path):
    (listed / files.MANIFEST).unlink()
    assert files.manifest_problem(listed) == "it has no manifest"
    assert files.manifest_problem(tmp_path / "nowhere") == "it has no manifest"


# --- single files


def test_a_text_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    files.write_json(path, {"a": "ä"})
    assert files.read_json(path) == {"a": "ä"}
    before = path.read_bytes()
    assert before.endswith(b"\n")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SaveError, match="disk is full"):
            files.write_json(path, {"b": 1})
    assert path.read_bytes() == before
    assert names(tmp_path) == ["run.json"]
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["run.json"]


def test_a_text_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    order: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (order.append("sync"), real_fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("name"), real_replace(a, b)))
    files.write_text(tmp_path / "x", "x")
    assert order[:2] == ["sync", "name"]


def test_a_value_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": {1, 2}})
    assert files.read_json(path) == {"a": 1}
    assert names(tmp_path) == ["run.json"]


def test_remove_unfinished_takes_only_what_was_interrupted(tmp_path):
    old_folder(tmp_path / "checkpoint-1")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".unfinished-checkpoint-2").mkdir()
    (tmp_path / ".unfinished-checkpoint-2" / "weights").write_text("half")
    assert files.remove_unfinished(tmp_path) == [".unfinished-checkpoint-2"]
    assert names(tmp_path) == [".hidden", "checkpoint-1"]
    assert files.remove_unfinished(tmp_path) == []
    assert files.remove_unfinished(tmp_path / "nowhere") == []


def test_the_hash_is_sha256_over_all_blocks(tmp_path):
    import hashlib

    path = tmp_path / "big"
    content = os.urandom((1 << 20) + 17)
    path.write_bytes(content)
    assert files.file_hash(path) == hashlib.sha256(content).hexdigest()
