"""What a command line names as a side of a comparison: records of the ledger, runs, or files.

12              the record of this number           12-14   three of them
r3f9a0c1d       the record of this id
last            the newest record                   last:3  the three newest
runs/bot        a run folder, by its run.json       records.json, records.jsonl
12,13,runs/bot  several: their medians count
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qft.bench import facts
from qft.bench.ledger import ledger_path
from qft.bench.ledger_file import Record, is_record, read
from qft.errors import RecipeError, first_line

RUN = "run.json"
_WORDS = "a record's number or id, 12-14, last, last:3, a run folder, or a JSON file of records"
_FILE_LIMIT_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Side:
    """Records that are taken together.

    Attributes:
        name: as it was asked for.
        records: one or more.
    """

    name: str
    records: tuple[Record, ...]


class Shelf:
    """Finds records by what a command line calls them.

    Args:
        ledger: as `qft.bench.ledger.ledger_path` takes it.
    """

    def __init__(self, ledger: Path | str | None = None) -> None:
        self.path = ledger_path(ledger)
        self._all: list[Record] | None = None
        self.broken = 0

    def all(self) -> list[Record]:
        """The ledger's records, the oldest first.

        Raises:
            RecipeError: it is off, or cannot be read.
        """
        if self._all is None:
            if self.path is None:
                raise RecipeError("The ledger is switched off.", where="QFT_LEDGER, --ledger",
                                  fix="--ledger FILE")  # fmt: skip
            try:
                self._all, self.broken = read(self.path)
            except OSError as error:
                raise RecipeError("The ledger cannot be read.", where=self.path,
                                  found=error.strerror) from None  # fmt: skip
        return self._all

    def notes(self) -> list[str]:
        """What is to be said of the ledger itself."""
        if not self.broken:
            return []
        lines = "line is" if self.broken == 1 else "lines are"
        return [f"{self.broken} {lines} no record: left out"]

    def side(self, name: str) -> Side:
        """The records of a word, or of several with commas between them.

        Raises:
            RecipeError: it names none.
        """
        whole = Path(name).expanduser()
        words = [name] if whole.exists() else [w for w in name.split(",") if w]
        found = [record for word in words for record in self._named(word.strip())]
        if not found:
            raise RecipeError("No record is named.", found=repr(name), fix=_WORDS)
        return Side(name, tuple(found))

    def _named(self, word: str) -> list[Record]:
        place = Path(word).expanduser()
        if span := re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", word):
            return self._numbered(word, int(span[1]), int(span[2] or span[1]))
        if newest := re.fullmatch(r"last(?::(\d{1,9}))?", word):
            return self._newest(word, int(newest[1] or 1))
        if place.is_dir():
            return [record_of_run(place)]
        if place.is_file():
            return records_of_file(place)
        found = [r for r in self.all() if re.fullmatch(r"r[0-9a-f]{3,8}", word)
                 and str(r.get("id")).startswith(word)]  # fmt: skip
        if len(found) != 1:
            what = "There is no such record." if not found else "Several records begin like this."
            raise RecipeError(what, where=self.path, found=word, fix=_WORDS)
        return found

    def _numbered(self, word: str, first: int, last: int) -> list[Record]:
        found = [r for r in self.all() if isinstance(r.get("number"), int)
                 and first <= r["number"] <= last]  # fmt: skip
        if len(found) != last - first + 1:
            told = [r["number"] for r in self.all() if isinstance(r.get("number"), int)]
            there = f"there are {min(told)} to {max(told)}" if told else "it is empty"
            raise RecipeError(
                "The ledger has no such record, or has it twice.",
                where=self.path,
                found=f"{word}; {there}",
                fix="qft bench ledger lists them",
            )
        return found

    def _newest(self, word: str, count: int) -> list[Record]:
        found = self.all()[-count:] if count else []
        if len(found) != count or not count:
            raise RecipeError("The ledger has not so many records.", where=self.path,
                              found=f"{word}; it has {len(self.all())}")  # fmt: skip
        return found


def record_of_run(folder: Path) -> Record:
    """The record that a run's own report makes; see `qft.run_folder`.

    Raises:
        RecipeError: there is no report of a run.
    """
    path = folder / RUN
    report = _json(path)
    if not isinstance(report, dict) or not isinstance(report.get("training"), dict):
        raise RecipeError("This is no report of a run.", where=path,
                          fix="a folder that qft train has finished")  # fmt: skip
    record = {"verb": "train", "exit_status": 0, **facts.of_result("train", report)}
    size = sum(p.stat().st_size for p in (folder / "adapter").rglob("*") if p.is_file())
    return {**record, "name": folder.name, **({"file_bytes": size} if size else {})}


def records_of_file(path: Path) -> list[Record]:
    """The records of a JSON file (one, or a list) or of JSON lines; of run.json, that run's.

    Raises:
        RecipeError: it holds none, or something else.
    """
    if path.name == RUN:
        return [record_of_run(path.parent)]
    values = _json(path)
    values = values if isinstance(values, list) else [values]
    if not values or not all(map(is_record, values)):
        raise RecipeError("This file holds no records of the ledger, or not them alone.",
                          where=path, fix="qft bench ledger --json > FILE writes one")  # fmt: skip
    return values


def _json(path: Path) -> Any:
    """A file's JSON; of JSON lines, the list of them."""
    try:
        if path.stat().st_size > _FILE_LIMIT_BYTES:
            raise RecipeError("The file is too large to be records.", where=path)
        text = path.read_text(encoding="utf-8")
        try:
            return json.loads(text)
        except ValueError:
            lines = [line for line in text.splitlines() if line.strip()]
            if len(lines) < 2:
                raise
            return [json.loads(line) for line in lines]
    except OSError as error:
        raise RecipeError("There is no such record.", where=path, found=error.strerror,
                          fix=_WORDS) from None  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise RecipeError("The file is not JSON.", where=path,
                          found=first_line(error)) from None  # fmt: skip


def require_done(side: Side) -> None:
    """Refuses figures of a command that failed.

    Raises:
        RecipeError: one did.
    """
    failed = [r for r in side.records if r.get("exit_status", 0) != 0]
    if failed:
        raise RecipeError(
            "A command that failed has no figures to compare.",
            where=side.name,
            found=f"{failed[0].get('verb')}, record {failed[0].get('number', '?')}: exit status "
            f"{failed[0].get('exit_status')} {failed[0].get('error', '')}".rstrip(),
        )


def one_value(records: Sequence[Record], key: str) -> Any:
    """What all records say of something; None where they say nothing or differ."""
    told = [r[key] for r in records if r.get(key) is not None]
    return told[0] if told and all(value == told[0] for value in told) else None
