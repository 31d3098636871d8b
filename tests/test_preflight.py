"""What would train the wrong tokens is refused before a weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_tokenizers import CHATML, bpe, with_template
from typer.testing import CliRunner

import qft
from qft.checking import lines
from qft.cli import app
from qft.data.examples import Example, ExampleSet
from qft.data.preflight import preflight, shown_example
from qft.errors import DataError
from qft.recipe import Data

TOKENIZER = with_template(
    bpe(("<s>", "<|im_start|>", "<|im_end|>"), bos="<s>", eos="<|im_end|>"), CHATML
)
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


def examples(*rows, cut=False):
    made = [
        Example(i, {"input_ids": list(ids), "labels": list(labels)}, cut=cut)
        for i, (ids, labels) in enumerate(rows)
    ]
    return ExampleSet(made)


GOOD = ([5, 6, 7, EOS], [-100, -100, 7, EOS])


def refusal(training, held_out=None, task="chat", **data) -> DataError:
    with pytest.raises(DataError) as caught:
        preflight(task, training, held_out, TOKENIZER, Data(train="x", **data))
    assert caught.value.exit_code == 4
    return caught.value


def test_good_data_passes_without_a_word():
    other = examples(([5, 6, 8, EOS], [-100, -100, 8, EOS]))
    assert preflight("chat", examples(GOOD), other, TOKENIZER, Data(train="x")) == []


def test_no_supervised_token():
    error = refusal(examples(GOOD, ([5, 6], [5, -100])))  # the first token is never predicted
    assert "1 of 2 examples have no supervised token" in error.what
    assert "example 2" in error.where


def test_a_terminator_that_is_never_supervised():
    error = refusal(examples(([5, 6, 7], [-100, 6, 7])))
    assert "never learn to stop" in error.what


def test_a_terminator_masked_away_as_padding():
    error = refusal(examples(([5, 6, EOS], [-100, 6, -100])))
    assert "masked away" in error.found


def test_plain_text_needs_no_terminator():
    training = examples(([5, 6, 7], [5, 6, 7]))
    assert preflight("text", training, None, TOKENIZER, Data(train="x")) == []


def test_two_bos_tokens():
    error = refusal(examples(([BOS, BOS, 7, EOS], [-100, -100, 7, EOS])))
    assert "two bos tokens" in error.what


def test_completions_cut_off():
    cut = examples(([5, 6, 7], [-100, 6, 7]), cut=True)
    whole = examples(*[GOOD] * 9)
    mixed = ExampleSet([*whole.examples, *cut.examples, *cut.examples])
    assert "2 of 11" in refusal(mixed).found
    assert preflight("chat", mixed, None, TOKENIZER, Data(train="x", max_cut_share=0.5)) == []


def test_completions_cut_off_entirely_count_too():
    whole = examples(*[GOOD] * 9)
    assert "1 of 10 examples, 1 of them" in refusal(ExampleSet(whole.examples, lost=1),
                                                    max_cut_share=0.05).found  # fmt: skip
    assert preflight("chat", ExampleSet(whole.examples, lost=1), None, TOKENIZER,
                     Data(train="x")) == []  # fmt: skip


def test_held_out_rows_that_are_trained_on():
    error = refusal(examples(GOOD), examples(GOOD))
    assert "not held out" in error.what
    notes = preflight(
        "chat", examples(GOOD), examples(GOOD), TOKENIZER, Data(train="x", max_duplicate_share=1)
    )
    assert "1 of 1 held-out examples" in notes[0]


@pytest.mark.parametrize("labels", [(0, 1), ([0.0, 1.0], [1.0, 1.0]), ([1, 2], [0, 0])])
def test_another_label_makes_no_other_row(labels):
    parts = [ExampleSet([Example(0, {"input_ids": [5, 6], "labels": label})]) for label in labels]
    assert "1 of 1 held-out examples" in refusal(*parts, task="classify").found
    other = ExampleSet([Example(0, {"input_ids": [5, 7], "labels": labels[0]})])
    assert preflight("classify", parts[0], other, TOKENIZER, Data(train="x")) == []


@pytest.mark.parametrize("packing", [False, True])
def test_documents_are_compared_before_they_are_cut(packing, tiny_llama, tmp_path):
    texts = [f"document {i} of some length" for i in range(6)]
    values = recipe_values(tiny_llama, tmp_path, [{"text": text} for text in texts])
    dev = tmp_path / "dev.jsonl"
    values |= {"task": "text", "data": {**values["data"], "eval": str(dev)}}
    values["train"]["packing"] = packing
    dev.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[3:]))
    with pytest.raises(DataError, match="not held out") as caught:
        qft.check(qft.build_recipe(values))
    assert "3 of 3 held-out documents" in caught.value.found
    dev.write_text(json.dumps({"text": "another one"}))
    assert qft.check(qft.build_recipe(values))["data"]["eval"]["examples"] == 1


def test_tags_without_names_get_a_hint():
    rows = examples(([5, 6], [0, 1])).examples
    for labels, hints in ((("0", "1"), 1), (("O", "B-X"), 0)):
        notes = preflight("token", ExampleSet(rows, labels), None, TOKENIZER, Data(train="x"))
        assert sum("data.labels" in note for note in notes) == hints


def test_all_problems_at_once():
    error = refusal(examples(([BOS, BOS, 7], [-100, -100, 7])))
    assert "2 problems" in error.what
    assert "two bos tokens" in error.what
    assert "never learn to stop" in error.what


def test_a_shown_row_says_where_the_loss_is():
    ids, labels = GOOD
    shown = shown_example(Example(0, {"input_ids": ids, "labels": labels}), TOKENIZER)
    assert [supervised for _, supervised in shown["pieces"]] == [False, True]
    assert shown["pieces"][1][0] == TOKENIZER.decode([7, EOS])
    assert shown["labels"] == [7, EOS]
    assert (shown["tokens"], shown["supervised"]) == (4, 2)


# --- the whole way


def recipe_values(base: Path, folder: Path, rows: list[dict], **data) -> dict:
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {
        "model": str(base),
        "task": "chat",
        "data": {"train": str(folder / "rows.jsonl"), **data},
        "strategy": {"name": "lora", "rank": 2},
        "train": {"max_steps": 1, "max_length": 64},
        "output": str(folder / "run"),
    }


def talk(answer: str) -> dict:
    return {"messages": [{"role": "user", "content": "Hi \x1b[31m"},
                         {"role": "assistant", "content": answer}]}  # fmt: skip


def test_check_shows_the_tokens_and_loads_no_weight(tiny_llama, tmp_path, monkeypatch):
    from qft import models

    monkeypatch.setattr(models, "open_model", lambda *a, **k: pytest.fail("a weight was loaded"))
    recipe = qft.build_recipe(recipe_values(tiny_llama, tmp_path, [talk("yes"), talk("no")]))
    report = qft.check(recipe)
    assert report["rows"][0]["pieces"][-1][0].strip() == ""  # the line break after the terminator
    assert report["rows"][0]["pieces"][-2] == ("yes</s>", True)
    assert report["data"]["train"]["examples"] == 2
    assert report["model"]["trained_parameters"] > 0
    text = "\n".join(line.plain for line in lines(report))
    assert "⟦yes</s>⟧" in text
    assert "\x1b" not in text, "what a row holds must not steer the terminal"
    assert not (tmp_path / "run").exists()


def test_check_and_train_refuse_alike_with_exit_code_4(tiny_llama, tmp_path):
    rows = [talk("yes"), talk("no")]
    values = recipe_values(tiny_llama, tmp_path, rows, eval=str(tmp_path / "rows.jsonl"))
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(values))
    for verb in ("check", "train"):
        result = CliRunner().invoke(app, [verb, str(path)])
        assert isinstance(result.exception, DataError)
        assert result.exception.exit_code == 4
        assert "not held out" in result.exception.what
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["instruct", "token"])
def test_too_many_cut_rows_are_refused(task, tiny_llama, tiny_bert, tmp_path):
    if task == "instruct":
        rows = [{"prompt": "why " * (40 if i else 1), "output": "so"} for i in range(10)]
        wanted = "9 of 10 examples, 9 of them entirely"
    else:  # the first word keeps its tag, the last loses it
        rows = [{"tokens": ["x", "a" * (1 + 90 * (i > 0)), "b"], "tags": ["O", "B-X", "O"]}
                for i in range(10)]  # fmt: skip
        wanted = "9 of 10 examples, more"
    base = tiny_llama if task == "instruct" else tiny_bert
    values = recipe_values(base, tmp_path, rows, too_long="truncate")
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({**values, "task": task}))
    result = CliRunner().invoke(app, ["check", str(path)])
    assert isinstance(result.exception, DataError)
    assert result.exception.exit_code == 4
    assert wanted in result.exception.found


def test_check_on_the_command_line(tiny_llama, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe_values(tiny_llama, tmp_path, [talk("yes")])))
    shown = CliRunner().invoke(app, ["check", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "⟦yes</s>⟧" in shown.output
    assert "can be trained on" in shown.output
    as_json = CliRunner().invoke(app, ["check", str(path), "--json"])
    assert json.loads(as_json.stdout)["data"]["train"]["examples"] == 1


def test_the_training_on_all_turns_or_the_last(tiny_llama, tmp_path):
    row = {"messages": [*talk("first")["messages"], *talk("second")["messages"]]}
    supervised = {}
    for choice in ("all", "last"):
        values = recipe_values(tiny_llama, tmp_path, [row], supervise=choice)
        values["train"]["max_length"] = 256
        report = qft.check(qft.build_recipe(values))
        supervised[choice] = [t for t, marked in report["rows"][0]["pieces"] if marked]
    assert supervised == {"all": ["first</s>", "second</s>"], "last": ["second</s>"]}
