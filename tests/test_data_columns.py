from __future__ import annotations

import json

import pytest

from qft.data.columns import USUAL_NAMES, find_columns
from qft.data.messages import read_messages, read_tools
from qft.errors import DataError
from qft.recipe import Columns

USER, ASSISTANT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}


def find(task, *rows, **overrides):
    return find_columns(task, rows, Columns(**overrides))


@pytest.mark.parametrize(
    "task, row, expected",
    [
        ("text", {"id": 1, "content": "x"}, {"text": "content"}),
        ("text", {"story": "x", "text": "y"}, {"text": "text"}),
        ("classify", {"Sentence": "x", "Label": 1}, {"text": "Sentence", "label": "Label"}),
        ("classify", {"review": "x", "sentiment": "p"}, {"text": "review", "label": "sentiment"}),
        (
            "instruct",
            {"instruction": "x", "input": "", "output": "y"},
            {"prompt": "instruction", "input": "input", "completion": "output"},
        ),
        (
            "instruct",
            {"question": "x", "answer": "y"},
            {"prompt": "question", "completion": "answer"},
        ),
        (
            "instruct",
            {"prompt": "x", "response": "y"},
            {"prompt": "prompt", "completion": "response"},
        ),
        ("chat", {"conversations": [], "id": 1}, {"messages": "conversations"}),
        ("chat", {"messages": []}, {"messages": "messages"}),
    ],
)
def test_usual_names(task, row, expected):
    assert find(task, row) == expected


def test_a_name_that_every_row_has_goes_before_a_surer_one():
    assert find("text", {"text": "x", "story": "x"}, {"story": "y"}) == {"text": "story"}


def test_overrides_win():
    row = {"text": "x", "0": "y", "mine": "z"}
    assert find("text", row, text="mine") == {"text": "mine"}
    assert find("text", row, text=0) == {"text": "0"}
    row = {"a": "x", "b": "y", "input": "z"}
    found = find("instruct", row, prompt="a", completion="b")
    assert found == {"prompt": "a", "input": "input", "completion": "b"}


def test_missing_columns_are_listed_once_and_together():
    with pytest.raises(DataError, match="text and label") as caught:
        find("classify", {"words": "x", "mark\x1b": 1})
    text = caught.value.text()
    assert caught.value.exit_code == 4
    assert "'words'" in text
    assert "data.columns.text=NAME data.columns.label=NAME" in text
    assert "data.columns.text=0 data.columns.label=1" in text  # without a header line
    assert "\x1b" not in text


def test_an_override_that_is_not_there():
    with pytest.raises(DataError, match="no column for input") as caught:
        find("instruct", {"prompt": "x", "output": "y"}, input="about")
    assert "'about'" in caught.value.where


@pytest.mark.parametrize("bad", [{}, {"text": None}, {"other": "x"}])
def test_the_first_row_that_lacks_a_column_is_named(bad):
    with pytest.raises(DataError, match="2 of 4 rows") as caught:
        find("text", {"text": "x"}, {"text": "x"}, bad, bad)
    assert "row 3" in caught.value.where


def test_the_optional_input_may_be_missing_in_a_row():
    rows = ({"prompt": "x", "input": "y", "output": "z"}, {"prompt": "x", "output": "z"})
    assert find("instruct", *rows)["input"] == "input"


def test_every_role_has_an_override():
    for roles in USUAL_NAMES.values():
        assert set(roles) <= set(Columns.model_fields)


@pytest.mark.parametrize(
    "value",
    [
        [USER, ASSISTANT],
        [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}],
        [{"speaker": "User", "text": "u"}, {"speaker": "bot", "text": "a"}],
        [{"agent": "agent_1", "message": "u"}, {"agent": "agent_2", "message": "a"}],
        [USER | {"from": None, "weight": 1}, ASSISTANT],
        [{"role": "user", "content": [{"type": "text", "text": "u", "image": None}]}, ASSISTANT],
    ],
)
def test_forms_of_conversations(value):
    assert read_messages(value, 1) == [USER, ASSISTANT]


@pytest.mark.parametrize(
    "value, what",
    [
        ("hello", "list of messages"),
        ([], "list of messages"),
        (["hello"], "needs a role"),
        ([{"content": "x"}], "needs a role"),
        ([{"role": "user"}], "needs a role"),
        ([{"role": "user", "content": None}], "needs a role"),
        ([USER, {"role": "wizard", "content": "x"}], "role of a message is not known"),
        ([USER, {"role": "user", "content": [{"type": "text"}]}], "text is needed"),
        ([USER, {"role": "user", "content": [{"type": "image_url"}]}], "a part that is no text"),
        ([USER, ASSISTANT | {"reasoning_content": 3}], "text is needed"),
        ([USER, {"role": "user", "content": "\ud800"}], "surrogate"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [1]}], "call of a tool"),
        ([USER, {"role": "assistant", "tool_calls": 1}], "tool_calls is no list"),
        (
            [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}],
            "no JSON",
        ),
    ],
)
def test_bad_conversations(value, what):
    with pytest.raises(DataError, match=what) as caught:
        read_messages(value, 7)
    assert "row 7" in caught.value.where
    if isinstance(value, list) and len(value) == 2:
        assert "message 2" in caught.value.where


def test_text_parts_are_one_text_and_thoughts_stay_beside_it():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    message = {"role": "assistant", "content": parts, "reasoning_content": "because"}
    assert read_messages([message], 1) == [message | {"content": "one two"}]
    assert read_messages([ASSISTANT | {"reasoning_content": None}], 1) == [ASSISTANT]


def test_tools_may_be_json_text():
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert read_tools(json.dumps(tools), 1) == read_tools(tools, 1) == tools
    assert all(read_tools(empty, 1) is None for empty in (None, "", " ", [], "[]", "null"))
    for bad, what in (("[{", "no JSON"), ({"name": "add"}, "no list"), (["add"], "no list")):
        with pytest.raises(DataError, match=what) as caught:
            read_tools(bad, 7)
        assert caught.value.where == "row 7, tools"
