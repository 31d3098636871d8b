"""Scores kept beside the output until it is there, so that a pruning that was cut off goes on.

.pruning-NAME/           beside the folder NAME that is to be written
  identity.json          everything that decides the scores: model, rows, settings, versions
  <what>.json            one method's scores and their SHA-256: there and whole, or not there
  <what>/                what is too large for that; whoever fills it sees to it being whole
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qft.files import explain_write_errors, read_json, write_json

_IDENTITY = "identity.json"


class ScoreStore:
    """Scores under one identity; what was kept under another is removed.

    Args:
        folder: None keeps nothing.
        identity: plain values.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self._folder = folder
        self._identity = json.loads(json.dumps(identity, sort_keys=True))

    @classmethod
    def beside(cls, out: Path | None, identity: Mapping[str, Any]) -> ScoreStore:
        """The store of an output."""
        return cls(None if out is None else out.parent / f".pruning-{out.name}", identity)

    def once(self, name: str, compute: Callable[[], Any]) -> tuple[Any, bool]:
        """The kept value, or what ``compute`` gives, kept from now on; and whether it was kept.

        Args:
            compute: gives plain values that JSON tells exactly, such as lists of floats.

        Raises:
            SaveError: the disk is full.
        """
        if self._folder is None:
            return compute(), False
        self._require_identity()
        path = self._folder / f"{name}.json"
        found = _read(path)
        if isinstance(found, dict) and found.get("sha256") == _hash(found.get("scores")):
            return found["scores"], True
        made = compute()
        with explain_write_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / _IDENTITY, self._identity)
            write_json(path, {"sha256": _hash(made), "scores": made})
        return made, False

    def place(self, name: str) -> Path:
        """A folder of that name; what is in it was made under the same identity.

        Raises:
            SaveError: the disk is full.
        """
        if self._folder is None:
            raise ValueError("a store that keeps nothing has no place")
        self._require_identity()
        with explain_write_errors(self._folder):
            (self._folder / name).mkdir(parents=True, exist_ok=True)
            write_json(self._folder / _IDENTITY, self._identity)
        return self._folder / name

    def _require_identity(self) -> None:
        """Removes what was made under another."""
        if self._folder is not None and _read(self._folder / _IDENTITY) != self._identity:
            self.remove()

    def remove(self) -> None:
        """Forgets everything."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
