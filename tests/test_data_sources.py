from __future__ import annotations

import csv
import json
import sys
from types import SimpleNamespace

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from qft.data.sources import read_rows
from qft.errors import DataError
from qft.recipe import Columns

ROWS = [{"text": "one, two", "label": "a"}, {"text": 'thr"ee\n漢字', "label": "b"}]
NUMBERED = Columns(text=0, label=1)


def read(path, columns=None, **settings):
    return read_rows(str(path), columns=columns or Columns(), **settings)


def write(path, content):
    data = content if isinstance(content, bytes) else content.encode("utf-8")
    path.write_bytes(data)
    return path


def test_every_kind_gives_the_same_rows(tmp_path):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    write(tmp_path / "a.jsonl", lines + "\n")
    write(tmp_path / "lines.json", lines)
    write(tmp_path / "a.json", json.dumps(ROWS))
    write(tmp_path / "wrapped.json", json.dumps({"version": 1, "data": ROWS}))
    write(tmp_path / "by_id.json", json.dumps({"x": ROWS[0], "y": ROWS[1]}))
    parquet.write_table(arrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, ["text", "label"])
        writer.writeheader()
        writer.writerows(ROWS)
    for file in tmp_path.iterdir():
        assert read(file) == ROWS, file.name
        assert read(file, limit=1) == ROWS[:1], file.name


def test_numbered_columns_mean_no_header(tmp_path):
    path = write(tmp_path / "a.tsv", "a \"quoted word\t1\nb's\t0\n")
    assert read(path, NUMBERED) == [{"0": 'a "quoted word', "1": "1"}, {"0": "b's", "1": "0"}]
    assert read(path) == [{'a "quoted word': "b's", "1": "0"}]
    commas = write(tmp_path / "a.csv", '"one, two",1\n')
    assert read(commas, NUMBERED) == [{"0": "one, two", "1": "1"}]


def test_txt_is_one_row_and_a_folder_is_its_files_in_order(tmp_path):
    write(tmp_path / "b.txt", "second\n\nfile")
    write(tmp_path / "a.txt", "first")
    write(tmp_path / "c.jsonl", '{"text": "third"}\n')
    write(tmp_path / "notes.md", "not data")
    expected = ["first", "second\n\nfile", "third"]
    assert [row["text"] for row in read(tmp_path)] == expected
    assert [row["text"] for row in read(tmp_path, limit=2)] == expected[:2]


def test_a_list_of_texts(tmp_path):
    assert read(write(tmp_path / "a.json", '["x", "y"]')) == [{"text": "x"}, {"text": "y"}]


def test_a_cell_longer_than_csv_s_own_limit(tmp_path):
    before = csv.field_size_limit()
    path = write(tmp_path / "a.csv", "text,label\n" + "x" * 200_000 + ",1\n")
    assert len(read(path)[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_line_separators_inside_json_strings_do_not_end_a_line(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a\u2028b\u0085c"}\n')
    assert read(path) == [{"text": "a\u2028b\u0085c"}]


@pytest.mark.parametrize(
    "name, content, what, where",
    [
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "not valid JSON", "line 2"),
        ("a.jsonl", '{"text": "x"}\n[1]\n', "not an object", "line 2"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xff"}\n', "not UTF-8", "line 3"),
        ("a.jsonl", "[" * 100_000, "cannot be read", "line 1"),
        ("a.json", '[{"text": "x"},\n{"text" "y"}]', "not valid JSON", "line 2"),
        ("a.json", '[{"text": "x"}, 3]', "not an object", "row 2"),
        ("a.json", '{"a": [], "b": []}', "no list of rows", "a.json"),
        ("a.json", "3", "no list of rows", "a.json"),
        ("a.csv", "text,label\nx,1\ny\n", "another number of cells", "line 3"),
        ("a.csv", 'text,label\n"x\ny",1\nz\n', "another number of cells", "line 4"),
        ("a.csv", 'text,label\n"x,1\n', "cannot be read", "line 2"),
        ("a.csv", "text,text\nx,1\n", "same name", "line 1"),
        ("a.tsv", b"text\tlabel\nx\t1\n\xe4\t1\n", "not UTF-8", "line 3"),
        ("a.txt", b"fine\n\xff\xfe", "not UTF-8", "line 2"),
        ("a.parquet", b"PAR1nothing", "parquet file cannot be read", "a.parquet"),
        ("a.xyz", "x", "kind of this file", "a.xyz"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, content, what, where):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=what) as caught:
        read(path)
    assert caught.value.exit_code == 4
    assert str(path) in caught.value.where
    assert where in caught.value.where


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n\n"),
        ("a.json", "[]"),
        ("a.json", " \n"),
        ("a.csv", "text,label\n"),
        ("a.tsv", ""),
        ("a.txt", " \n"),
    ],
)
def test_empty_data(tmp_path, name, content):
    with pytest.raises(DataError, match="no rows"):
        read(write(tmp_path / name, content))


def test_empty_parquet(tmp_path):
    parquet.write_table(
        arrow.table({"text": arrow.array([], arrow.string())}), tmp_path / "a.parquet"
    )
    with pytest.raises(DataError, match="no rows"):
        read(tmp_path / "a.parquet")


def test_foreign_bytes_never_reach_the_terminal(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": \x1b[31mred}\n')
    with pytest.raises(DataError) as caught:
        read(path)
    assert "\x1b" not in caught.value.text()


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "train.jsonl", "{}")
    with pytest.raises(DataError, match="no such file") as caught:
        read(tmp_path / "trian.jsonl")
    assert "'train.jsonl'" in caught.value.found
    assert "did you mean 'train.jsonl'" in caught.value.fix
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "nowhere" / "train.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file of a known kind"):
        read(tmp_path / "empty")


def test_a_hub_id_goes_to_datasets(monkeypatch):
    asked = []

    def load_dataset(*args, **settings):
        asked.append((args, settings))
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read("someone/their-data", limit=1, split="validation") == ROWS[:1]
    assert asked == [(("someone/their-data",), {"split": "validation"})]


def test_a_hub_that_does_not_answer_is_one_clear_error(monkeypatch):
    def load_dataset(*args, **settings):
        raise ConnectionError("Couldn't reach the Hub\n" + "x" * 500)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="neither") as caught:
        read("someone/their-data")
    assert "Couldn't reach" in caught.value.found
    assert len(caught.value.found) < 200


@pytest.mark.parametrize(
    "source", ["train.jsonl", "data/train.csv", "../x", "/x/y", "a/b/c", "~x/y"]
)
def test_what_is_clearly_a_path_never_goes_to_the_hub(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would fail
    with pytest.raises(DataError, match="no such file"):
        read(source)


def test_real_files(assets):
    data = assets / "data"
    rows = read(data / "sentiment" / "sst2" / "train.tsv", NUMBERED)
    assert len(rows) == 6920
    assert {row["1"] for row in rows} == {"0", "1"}
    assert len(read(data / "instruct" / "alpaca_demo" / "alpaca_en_demo.json")) == 999
    assert len(read(data / "dialogue" / "topical_chat" / "valid_freq.json")) == 539
    assert len(read(data / "text" / "tinystories_1000" / "tinystories_1000.json")) == 1000
    text = read(data / "text" / "tinyshakespeare" / "input.txt")[0]["text"]
    assert len(text) == 1115394
