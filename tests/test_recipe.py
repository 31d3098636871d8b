"""A recipe says all that is wrong with it at once, with the line; every knob is read somewhere."""

import ast
from pathlib import Path

import pytest
import yaml

from qft import recipe as recipe_module
from qft.errors import RecipeError
from qft.recipe import (
    Augment,
    Columns,
    Data,
    Memory,
    Recipe,
    SaverSwitches,
    Settings,
    Train,
    build_recipe,
    load_recipe,
)
from qft.recipe_reference import json_schema, reference
from qft.registry import strategy_class, strategy_names

GROUPS = (Recipe, Data, Columns, Augment, Memory, SaverSwitches, Train)

GOOD = """\
model: some/model
task: chat
data: {train: train.jsonl, eval: dev.jsonl}
strategy:
  name: lora
  rank: 4
quantize: nf4
train:
  epochs: 3
  learning_rate: 2e-4
output: runs/x
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(folder, text), overrides)
    assert caught.value.exit_code == 2
    assert caught.value.where == str(folder / "recipe.yaml")
    return caught.value.what.splitlines()


def values(**changes: object) -> dict[str, object]:
    return {
        "model": "m", "task": "text", "data": {"train": "t.txt"}, "strategy": "lora",
        "output": "o", **changes,
    }  # fmt: skip


# --- reading


def test_a_recipe_is_read(tmp_path):
    recipe = load_recipe(written(tmp_path, GOOD))
    assert recipe.model == "some/model"
    assert recipe.data == Data(train="train.jsonl", eval="dev.jsonl")
    assert recipe.strategy == strategy_class("lora")(rank=4)
    assert recipe.quantize == "nf4"
    assert recipe.memory == Memory()


@pytest.mark.parametrize(
    "written_as, number",
    [("2e-4", 2e-4), ("2E-4", 2e-4), ("1e+0", 1.0), ("1e0", 1.0), ("5.e-5", 5e-5), (".5e-3", 5e-4),
     ("3", 3.0), ("0.001", 0.001)],
)  # fmt: skip
def test_exponents_are_numbers(tmp_path, written_as, number):
    path = written(tmp_path, GOOD.replace("2e-4", written_as))
    assert load_recipe(path).train.learning_rate == number
    assert load_recipe(path, [f"train.learning_rate={written_as}"]).train.learning_rate == number


def test_what_only_looks_like_an_exponent_stays_text(tmp_path):
    assert load_recipe(written(tmp_path, GOOD), ["model=model-2e-4"]).model == "model-2e-4"


def test_the_short_form_of_a_strategy_is_its_name():
    assert build_recipe(values(strategy="lora")).strategy == strategy_class("lora")()


def test_a_strategy_object_is_taken_as_it_is():
    strategy = strategy_class("lora")(rank=3)
    assert build_recipe(values(strategy=strategy)).strategy is strategy


# --- problems


def test_an_unknown_key_is_an_error_with_its_line_and_a_suggestion(tmp_path):
    lines = problems_of(tmp_path, GOOD.replace("epochs", "epoch"))
    assert lines[0] == "The recipe has 1 problem."
    assert lines[1] == "  line 9: train.epoch: no such key; did you mean 'epochs'?"


def test_an_unknown_key_far_from_all_lists_what_there_is(tmp_path):
    (line,) = problems_of(tmp_path, GOOD + "zzz: 1\n")[1:]
    assert line.startswith("  line 12: zzz: no such key; there are: model, task")


def test_every_problem_is_reported_at_once(tmp_path):
    text = (
        GOOD.replace("chat", "chta")
        .replace("epochs: 3", "epochs: -1\n  batchsize: 4")
        .replace("output: runs/x", "")
        .replace("nf4", "nf5")
    )
    lines = problems_of(tmp_path, text)
    assert lines[0] == "The recipe has 5 problems."
    for key, line in {"task": 2, "quantize": 7, "train.epochs": 9, "train.batchsize": 10}.items():
        assert any(found.startswith(f"  line {line}: {key}: ") for found in lines), key
    assert "  output: is missing (the run folder to write)" in lines
    assert any("'chta'" in line for line in lines)
    assert any("-1" in line for line in lines)


def test_a_bad_strategy_hides_no_other_problem(tmp_path):
    text = GOOD.replace("rank: 4", "rnak: 4\n  dropout: 2").replace("epochs", "epoch")
    joined = "\n".join(problems_of(tmp_path, text))
    assert "rnak: no such setting; did you mean 'rank'?" in joined
    assert "dropout:" in joined
    assert "train.epoch: no such key" in joined


def test_the_count_says_how_many_problems_follow(tmp_path):
    text = GOOD.replace("rank: 4", "rnak: 4\n  dropout: 2").replace("epochs", "epoch")
    lines = problems_of(tmp_path, text)
    assert lines[0] == "The recipe has 3 problems."
    assert len(lines) == 4


def test_a_strategy_setting_has_its_own_line(tmp_path):
    lines = problems_of(tmp_path, GOOD.replace("rank: 4", "rnak: 4"))
    assert lines[1].startswith("  line 6: strategy.rnak: ")


def test_an_unknown_strategy_hides_no_other_problem(tmp_path):
    joined = "\n".join(problems_of(tmp_path, GOOD.replace("name: lora", "name: lroa") + "zzz: 1\n"))
    assert "there is no strategy 'lroa'" in joined
    assert "did you mean 'lora'?" in joined
    assert "zzz: no such key" in joined


@pytest.mark.parametrize("bad", [3, [1], None, {}, {"rank": 2}])
def test_a_strategy_that_is_none_is_an_error(bad):
    with pytest.raises(RecipeError, match="strategy"):
        build_recipe(values(strategy=bad))


def test_a_group_that_is_no_mapping(tmp_path):
    joined = "\n".join(
        problems_of(tmp_path, GOOD.replace("{train: train.jsonl, eval: dev.jsonl}", "x"))
    )
    assert "line 3: data: " in joined


def test_a_wrong_type_tells_what_was_found(tmp_path):
    (line,) = problems_of(tmp_path, GOOD.replace("epochs: 3", "epochs: many"))[1:]
    assert line.startswith("  line 9: train.epochs: ")
    assert line.endswith("found 'many'")


@pytest.mark.parametrize(
    "key, bad",
    [("epochs", 0), ("max_steps", 0), ("batch_size", 0), ("learning_rate", 0), ("warmup", -0.1),
     ("weight_decay", -1), ("max_grad_norm", -1), ("max_length", 1), ("eval_every", 0),
     ("save_every", 0), ("keep_checkpoints", 0), ("early_stopping", 0), ("log_every", 0),
     ("seed", -1), ("schedule", "cosin")],
)  # fmt: skip
def test_values_out_of_range_are_refused(key, bad):
    with pytest.raises(RecipeError, match=rf"train\.{key}"):
        build_recipe(values(train={key: bad}))


def test_nan_is_no_learning_rate():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(RecipeError, match=r"train\.learning_rate"):
            build_recipe(values(train={"learning_rate": bad}))


def test_a_missing_file(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read") as caught:
        load_recipe(tmp_path / "nowhere.yaml")
    assert "nowhere.yaml" in str(caught.value)


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)


def test_what_is_not_utf8(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes("model: ä".encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["", "- model\n- task\n", "model", "3"])
def test_what_is_no_mapping(tmp_path, text):
    with pytest.raises(RecipeError, match="not a mapping"):
        load_recipe(written(tmp_path, text))


@pytest.mark.parametrize(
    "text", ["model: [", "a: b: c", "model: \t\tx\n\t- y", "x: !!python/object:os.x 1"]
)
def test_invalid_yaml(tmp_path, text):
    with pytest.raises(RecipeError, match="not valid YAML") as caught:
        load_recipe(written(tmp_path, text))
    assert "line 1" in str(caught.value) or "line 2" in str(caught.value)


def test_keys_that_are_no_text_are_problems_not_crashes(tmp_path):
    with pytest.raises(RecipeError):
        load_recipe(written(tmp_path, GOOD + "3: x\n"))


def test_a_key_written_twice_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match="quantize is written twice, in line 7 and in line 12"):
        load_recipe(written(tmp_path, GOOD + "quantize: none\n"))


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "model: &x {y: *x}\n",
        LAUGHS + "data: {train: *l, labels: *l}\nstrategy: {name: lora, rank: *l}\n",
        LAUGHS.replace("[", "{p: ").replace(", ", ", p: ").replace("]", "}") + "data: *l\n",
        "[" * 2000,
        "output: 2024-13-45\n",
    ],
    ids=["self", "laughs", "repeated", "deep", "date"],
)
def test_a_hostile_recipe_is_refused_at_once(tmp_path, text):
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path, text))
    assert len(str(caught.value)) < 20_000


# --- overrides


def test_overrides_reach_into_groups(tmp_path):
    recipe = load_recipe(
        written(tmp_path, GOOD),
        ["train.epochs=1", "strategy.rank=2", "data.columns.text=body", "memory.micro_batch=3",
         "data.labels=['no', 'yes']", "quantize=none", "output=runs/a=b"],
    )  # fmt: skip
    assert recipe.train.epochs == 1
    assert recipe.train.learning_rate == 2e-4
    assert recipe.strategy == strategy_class("lora")(rank=2)
    assert recipe.data.columns.text == "body"
    assert recipe.data.train == "train.jsonl"
    assert recipe.data.labels == ("no", "yes")
    assert recipe.memory.micro_batch == 3
    assert recipe.quantize == "none"
    assert recipe.output == "runs/a=b"


def test_an_override_can_name_another_strategy(tmp_path):
    path = written(tmp_path, GOOD.replace("task: chat", "task: classify"))
    assert load_recipe(path, ["strategy=head"]).strategy == strategy_class("head")()
    named = load_recipe(path, ["strategy=lora", "strategy.rank=2"]).strategy
    assert named == strategy_class("lora")(rank=2)


def test_an_override_can_empty_a_value(tmp_path):
    assert load_recipe(written(tmp_path, GOOD), ["data.eval=null"]).data.eval is None


@pytest.mark.parametrize("bad", ["train.epochs", "=1", ""])
def test_an_override_of_another_form(tmp_path, bad):
    with pytest.raises(RecipeError, match=r"key\.sub=value"):
        load_recipe(written(tmp_path, GOOD), [bad])


def test_an_override_that_is_no_yaml(tmp_path):
    with pytest.raises(RecipeError, match="not valid YAML") as caught:
        load_recipe(written(tmp_path, GOOD), ["train.epochs=[1"])
    assert caught.value.where == "train.epochs"


def test_a_bad_override_is_a_problem_like_any_other(tmp_path):
    lines = problems_of(tmp_path, GOOD, "train.epoch=1", "quantize=x")
    assert lines[0] == "The recipe has 2 problems."


# --- round trip


def test_the_resolved_recipe_reads_back_equal(tmp_path):
    first = load_recipe(
        written(tmp_path, GOOD),
        ["data.labels=['no', 'yes']", "data.columns.text=0", "output='ünïcode'"],
    )
    text = first.to_yaml()
    again = load_recipe(written(tmp_path, text))
    assert again == first
    assert again.to_yaml() == text
    assert "ünïcode" in text


def test_the_resolved_recipe_writes_out_every_default():
    def keys(cls: type[Settings]) -> set[str]:
        return set(cls.model_fields)

    told = build_recipe(values()).to_dict()
    assert set(told) == keys(Recipe)
    assert set(told["data"]) == keys(Data)
    assert set(told["data"]["columns"]) == keys(Columns)
    assert set(told["memory"]) == keys(Memory)
    assert set(told["train"]) == keys(Train)
    assert set(told["strategy"]) == {"name", *strategy_class("lora").model_fields}


def test_a_recipe_cannot_be_changed():
    with pytest.raises(Exception, match="frozen"):
        build_recipe(values()).train.epochs = 1  # type: ignore[misc]


# --- every knob once


def names_read_in(folder: Path) -> set[str]:
    """Attribute names that are read, and strings given to getattr, outside the recipe itself."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        if path.name in ("recipe.py", "recipe_reference.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "getattr"
                and isinstance(node.args[1], ast.Constant)
            ):
                found.add(str(node.args[1].value))
    return found


@pytest.mark.parametrize("group", [g for g in GROUPS if g is not Columns])
def test_every_knob_is_read_by_the_engine(group):
    unread = set(group.model_fields) - names_read_in(Path(recipe_module.__file__).parent)
    assert not unread


def test_every_column_is_a_role_of_the_tasks_its_sentence_names():
    from qft.data.columns import USUAL_NAMES

    roles = {role: {t for t, named in USUAL_NAMES.items() if role in named}
             for names in USUAL_NAMES.values() for role in names}  # fmt: skip
    told = {
        name: set(str(field.description).rpartition("(")[2].rstrip(")").split(", "))
        for name, field in Columns.model_fields.items()
    }
    assert told == roles


def test_the_groups_above_are_all_there_are():
    nested = {
        field.annotation
        for group in GROUPS
        for field in group.model_fields.values()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
    }
    assert nested | {Recipe} == set(GROUPS)


@pytest.mark.parametrize("group", GROUPS)
def test_every_knob_has_a_sentence(group):
    assert group.__doc__
    for name, field in group.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize("name", strategy_names())
def test_every_knob_of_a_strategy_has_a_sentence(name):
    for key, field in strategy_class(name).model_fields.items():
        assert field.description, key


def paths(cls: type, prefix: str = "") -> list[str]:
    found = []
    for name, field in cls.model_fields.items():
        found.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            found += paths(field.annotation, f"{prefix}{name}.")
    return found


def test_the_reference_names_every_knob_once_with_its_default():
    lines = reference().splitlines()
    for path in paths(Recipe):
        if path == "strategy":  # its settings follow, a block a strategy
            continue
        matching = [line for line in lines if line.startswith((f"{path} (", f"{path}: "))]
        assert len(matching) == 1, path
    assert any(line.startswith("train.learning_rate (default 0.0002)") for line in lines)
    assert any("model (required)" in line for line in lines)
    assert any("quantize (default 'none'; none | int8 | nf4 | fp4)" in line for line in lines)
    for name in ("lora", "head"):
        start = lines.index(f"strategy: {{name: {name}}}")
        block = "\n".join(lines[start:]).split("\n\n")[0]
        for key in strategy_class(name).model_fields:
            assert f"strategy.{key} (" in block


def test_the_reference_says_how_a_strategy_is_named():
    assert any(
        line.startswith("strategy") and "name: lora" in line for line in reference().splitlines()
    )


def resolved(schema: dict, node: dict) -> dict:
    if "$ref" in node:
        place = node["$ref"]
        assert place.startswith("#/$defs/")
        return schema["$defs"][place.removeprefix("#/$defs/")]
    return node


def references(node: object) -> list[str]:
    if isinstance(node, dict):
        here = [node["$ref"]] if "$ref" in node else []
        return here + [ref for value in node.values() for ref in references(value)]
    return [ref for value in node for ref in references(value)] if isinstance(node, list) else []


def test_the_schema_holds_every_knob():
    schema = json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert set(schema["required"]) == {
        name for name, field in Recipe.model_fields.items() if field.is_required()
    }
    for key, group in (("data", Data), ("memory", Memory), ("train", Train)):
        node = resolved(schema, schema["properties"][key])
        assert set(node["properties"]) == set(group.model_fields)
        assert node["additionalProperties"] is False
    columns = resolved(schema, schema["$defs"]["Data"]["properties"]["columns"])
    assert set(columns["properties"]) == set(Columns.model_fields)
    for reference_ in references(schema):
        assert reference_.removeprefix("#/$defs/") in schema["$defs"], reference_


def test_the_schema_describes_every_strategy():
    alternatives = json_schema()["properties"]["strategy"]["anyOf"]
    told = {a["properties"]["name"]["const"]: set(a["properties"]) for a in alternatives
            if "properties" in a}  # fmt: skip
    for name in ("lora", "head"):
        assert told[name] == {"name", *strategy_class(name).model_fields}


def test_the_schema_is_json(tmp_path):
    import json

    assert yaml.safe_load(json.dumps(json_schema())) == json_schema()


def test_the_engines_switches_are_the_recipes():
    from dataclasses import fields

    from qft.lean.engine import Savers

    told = {name: field.default for name, field in SaverSwitches.model_fields.items()}
    assert told == {field.name: field.default for field in fields(Savers)}
