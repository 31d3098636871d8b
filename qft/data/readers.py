"""One reader a kind of file: a path to rows, with file and line in what goes wrong."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qft.errors import DataError

Row = dict[str, Any]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1; decoded one by one so that a bad one can be named.

    Only line feeds part lines: JSON may hold U+2028 and the like inside its strings.
    """
    with path.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    "The file is not UTF-8 text.",
                    where=f"{path}, line {number}",
                    found=f"byte 0x{raw[error.start]:02x} at byte {error.start} of the line",
                    fix="save it as UTF-8",
                ) from None


def _text(path: Path) -> str:
    return "".join(line for _, line in _lines(path))


def _read_jsonl(path: Path, header: bool) -> Iterator[Row]:
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield _as_row(_parse(line, where), where)


def _parse(text: str, where: object) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{where}, line {error.lineno}" if error.lineno > 1 else str(where)
        raise DataError(
            "This is not valid JSON.",
            where=f"{place}, column {error.colno}",
            found=f"{error.msg}: {excerpt(text[error.pos :] or 'the end')}",
        ) from None
    except (RecursionError, ValueError) as error:  # nested too deeply; an absurdly long number
        raise DataError("This JSON cannot be read.", where=where, found=excerpt(error)) from None


def _as_row(value: Any, where: object) -> Row:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise DataError(
            "A row is not an object with named values.",
            where=where,
            found=f"{type(value).__name__}: {excerpt(json.dumps(value))}",
            fix='rows of the form {"column": value, …}',
        )
    return value


def _read_json(path: Path, header: bool) -> Iterator[Row]:
    text = _text(path)
    if not text.strip():
        return
    try:
        value = _parse(text, path)
    except DataError:
        first = text.lstrip().splitlines()[0]
        try:  # many files called .json hold one object a line
            json.loads(first)
        except ValueError:
            pass
        else:
            yield from _read_jsonl(path, header)
            return
        raise
    for number, row in enumerate(_list_in(value, path), start=1):
        yield _as_row(row, f"{path}, row {number}")


def _list_in(value: Any, path: Path) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        if len(lists) == 1:
            return lists[0]
        if value and all(isinstance(inner, dict) for inner in value.values()):
            return list(value.values())
        found = f"an object with {len(lists)} lists; keys: {short_list([repr(k) for k in value])}"
    else:
        found = type(value).__name__
    raise DataError(
        "The JSON file holds no list of rows.",
        where=path,
        found=found,
        fix='[{…}, {…}], or {"data": [{…}, {…}]}',
    )


def _read_csv(path: Path, header: bool) -> Iterator[Row]:
    return _cells(path, header, delimiter=",")


def _read_tsv(path: Path, header: bool) -> Iterator[Row]:
    # The usual .tsv writes its cells as they are, so a quotation mark in one is only that.
    return _cells(path, header, delimiter="\t", quoting=csv.QUOTE_NONE)


def _cells(path: Path, header: bool, **form: Any) -> Iterator[Row]:
    before = csv.field_size_limit(sys.maxsize)  # whole documents are longer than its default
    try:
        reader = csv.reader((line for _, line in _lines(path)), strict=True, **form)
        names: list[str] | None = None
        while True:
            first_line = reader.line_num + 1  # a quoted cell may span lines
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(
                    "The line cannot be read.", where=f"{path}, line {first_line}", found=error
                ) from None
            if not cells:
                continue
            if names is None:
                names = cells if header else [str(i) for i in range(len(cells))]
                _require_distinct(names, path)
                if header:
                    continue
            if len(cells) != len(names):
                raise DataError(
                    "A line has another number of cells than the first.",
                    where=f"{path}, line {first_line}",
                    found=f"{len(cells)}, the first line has {len(names)}: "
                    f"{excerpt(' | '.join(cells))}",
                )
            yield dict(zip(names, cells, strict=True))
    finally:
        csv.field_size_limit(before)


def _require_distinct(names: list[str], path: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            "Two columns have the same name.", where=f"{path}, line 1", found=short_list(twice)
        )


def _read_parquet(path: Path, header: bool) -> Iterator[Row]:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            "The parquet file cannot be read.", where=path, found=excerpt(error)
        ) from None


def _read_txt(path: Path, header: bool) -> Iterator[Row]:
    text = _text(path)
    if text.strip():
        yield {"text": text}


READERS: dict[str, Callable[[Path, bool], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}


def short_list(names: list[str]) -> str:
    """The first few names, and how many there are."""
    shown = ", ".join(name[:60] for name in names[:8])
    return f"{shown}, … ({len(names)} in all)" if len(names) > 8 else shown


def excerpt(text: object, length: int = 80) -> str:
    """The beginning of foreign text, on one line and with its control characters escaped."""
    line = " ".join(str(text).split())
    return repr(line if len(line) <= length else line[: length - 1] + "…")
