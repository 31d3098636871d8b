"""Rows from files, folders and the hub: plain dictionaries, one a row.

| kind | rows |
|---|---|
| jsonl | one object a line |
| json | a list of objects or of texts; an object that holds one such list; one object an id |
| csv, tsv | one a line; the first line names the columns unless the user's columns are numbers |
| parquet | its records |
| txt | the whole file is one row, `{"text": …}` |
| folder | the files in it of these kinds, in the order of their names |
| hub id | what `datasets.load_dataset` returns |
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from qft.data.readers import READERS, Row, excerpt, short_list
from qft.errors import DataError
from qft.recipe import Columns

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def read_rows(
    source: str, *, columns: Columns, limit: int | None = None, split: str = "train"
) -> list[Row]:
    """Reads rows.

    Args:
        source: a file, a folder, or a hub id where no such path exists.
        columns: the user's own; numbers say that csv and tsv files have no header line, and
            their columns are then called "0", "1", ….
        limit: stop after this many rows.
        split: of a hub data set.

    Raises:
        DataError: nothing there, nothing in it, or a row that cannot be read (file and line).
    """
    path = Path(os.path.expanduser(source))  # pathlib's own fails on an unknown ~user
    if path.is_dir():
        rows = list(islice(_folder_rows(path, columns), limit))
    elif path.exists():
        rows = list(islice(_file_rows(path, columns), limit))
    elif _looks_like_hub_id(source):
        rows = list(islice(_hub_rows(source, split), limit))
    else:
        raise _missing(path)
    if not rows:
        raise DataError("There are no rows in the data.", where=source, found="nothing")
    return rows


def has_header(columns: Columns) -> bool:
    """Whether csv and tsv files begin with a line of column names."""
    return not any(isinstance(value, int) for value in columns.model_dump().values())


def _folder_rows(folder: Path, columns: Columns) -> Iterator[Row]:
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix.lower() in READERS]
    if not files:
        raise DataError(
            "The folder holds no file of a known kind.",
            where=folder,
            found=short_list([repr(p.name) for p in sorted(folder.iterdir())]) or "an empty folder",
            fix=f"put in files that end in {', '.join(READERS)}",
        )
    for file in files:
        yield from _file_rows(file, columns)


def _file_rows(path: Path, columns: Columns) -> Iterator[Row]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            "The kind of this file is not known.",
            where=path,
            found=path.suffix or "no ending",
            fix=f"a file that ends in {', '.join(READERS)}",
        )
    try:
        yield from reader(path, has_header(columns))
    except OSError as error:
        raise DataError("The data cannot be read.", where=path, found=error.strerror) from None


def _looks_like_hub_id(source: str) -> bool:
    known_ending = Path(source).suffix.lower() in READERS
    return not known_ending and _HUB_ID.fullmatch(source) is not None and not _parent_exists(source)


def _parent_exists(source: str) -> bool:
    parent = Path(source).parent
    return parent != Path() and parent.is_dir()


def _hub_rows(source: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_dataset(source, split=split)
    except Exception as error:  # the library raises its own, the hub's and the network's
        raise DataError(
            "This is neither a file or folder here nor a data set that the hub gave.",
            where=f"{source}, split {split!r}",
            found=f"{type(error).__name__}: {excerpt(error)}",
            fix="check the name and the connection, or name a local file",
        ) from None
    for row in loaded:
        yield dict(row)


def _missing(path: Path) -> DataError:
    folder = path.parent
    if not folder.is_dir():
        return DataError("There is no such file.", where=path, found=f"there is no folder {folder}")
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else None
    shown = short_list([repr(name) for name in names]) or "nothing"
    return DataError("There is no such file.", where=path, found=f"in {folder}: {shown}", fix=hint)
