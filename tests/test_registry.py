"""Strategies come by name; a third party's code runs only when a recipe or a flag names it."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from adapters.head import Head
from adapters.lora import LoRA
from qft import registry
from qft.errors import AdapterError, QftError, RecipeError
from qft.registry import (
    BUILT_IN,
    build_strategy,
    settings_of,
    strategy_class,
    strategy_from_folder,
    strategy_names,
)


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """A package with an entry point, as an installer leaves it; importing it leaves a mark."""
    module = tmp_path / "loud_package.py"
    module.write_text(
        "import pathlib\n"
        f"pathlib.Path({str(tmp_path / 'imported')!r}).touch()\n"
        "from typing import ClassVar\n"
        "from qft.strategy import Strategy\n"
        "class Loud(Strategy):\n"
        "    '''Loud.'''\n"
        "    name: ClassVar[str] = 'loud'\n"
        "    volume: int = 3\n"
        "    @classmethod\n"
        "    def from_folder(cls, folder):\n"
        "        return cls(volume=9) if (folder / 'loud.json').is_file() else None\n"
        "NotOne = dict\n"
    )
    information = tmp_path / "loud_package-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: loud-package\nVersion: 1.0\n"
    )
    (information / "entry_points.txt").write_text(
        "[qft.strategies]\n"
        "loud = loud_package:Loud\n"
        "broken = no_such_package_anywhere:X\n"
        "absent = loud_package:Missing\n"
        "dict = loud_package:NotOne\n"
        "lora = loud_package:Loud\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "loud_package", raising=False)
    yield tmp_path
    sys.modules.pop("loud_package", None)


def imported(folder: Path) -> bool:
    return (folder / "imported").exists()


def test_the_built_in_table_is_what_the_distribution_registers():
    import tomllib

    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    declared = tomllib.loads(text)["project"]["entry-points"]["qft.strategies"]
    assert declared == BUILT_IN


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_every_built_in_name_is_the_class_own(name):
    assert strategy_class(name).name == name
    assert strategy_class(name).__doc__


def test_an_unknown_name_gets_a_suggestion():
    with pytest.raises(RecipeError) as caught:
        strategy_class("lroa")
    assert "There is no strategy 'lroa'." in str(caught.value)
    assert "did you mean 'lora'?" in str(caught.value)
    assert "head" in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_strategy_is_built_from_its_entry():
    assert build_strategy({"name": "lora", "rank": 3}) == LoRA(rank=3)
    assert build_strategy({"name": "head"}) == Head()


def test_the_entry_itself_is_not_changed():
    entry = {"name": "lora", "rank": 3}
    build_strategy(entry)
    assert entry == {"name": "lora", "rank": 3}


@pytest.mark.parametrize(
    "entry", [{}, {"rank": 3}, {"name": 3}, {"name": None}, {"name": ["lora"]}]
)
def test_without_a_name_the_names_are_listed(entry):
    with pytest.raises(RecipeError, match="name one of: lora, "):
        build_strategy(entry)


def test_every_problem_of_the_settings_is_listed():
    with pytest.raises(RecipeError) as caught:
        build_strategy({"name": "lora", "rank": 0, "rnak": 4, "bias": "some", 3: "x"})
    lines = str(caught.value).splitlines()
    assert lines[0] == "The strategy has 4 problems."
    assert any(line.startswith("  rank: ") and line.endswith("found 0") for line in lines)
    assert any(line.startswith("  rnak: ") and "did you mean 'rank'?" in line for line in lines)
    assert any(line.startswith("  bias: ") and "'some'" in line for line in lines)
    assert any(line.startswith("  3: no such setting") for line in lines)
    assert "strategy: lora" in lines[-1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_setting_that_is_no_number_is_refused(value):
    with pytest.raises(RecipeError, match="alpha"):
        build_strategy({"name": "lora", "alpha": value})


@pytest.mark.parametrize(
    "strategy",
    [
        LoRA(),
        LoRA(rank=3, alpha=1.5, dropout=0.1, targets=("q_proj", "v_proj"), rank_stabilised=True,
             bias="lora_only"),
        Head(),
    ],
)  # fmt: skip
def test_settings_make_the_round_trip_through_json(strategy):
    entry = json.loads(json.dumps(settings_of(strategy)))
    assert build_strategy(entry) == strategy
    assert settings_of(build_strategy(entry)) == settings_of(strategy)


def test_settings_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        LoRA().rank = 3  # type: ignore[misc]


# --- third parties


def test_a_third_party_is_listed_but_not_imported(third_party):
    names = strategy_names()
    assert names[: len(BUILT_IN)] == list(BUILT_IN)
    assert "loud" in names
    assert names.count("lora") == 1
    assert not imported(third_party)


def test_nothing_but_its_name_imports_it(third_party, tmp_path):
    build_strategy({"name": "lora"})
    with pytest.raises(RecipeError):
        build_strategy({"name": "lroa"})
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "loud.json").write_text("{}")
    with pytest.raises(AdapterError):
        strategy_from_folder(folder)
    assert not imported(third_party)
    assert build_strategy({"name": "loud", "volume": 4}).volume == 4  # type: ignore[attr-defined]
    assert imported(third_party)


def test_the_listing_command_imports_no_third_party(third_party):
    code = "from qft.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "strategies", "--json"],
        capture_output=True, text=True, check=True,
        env={"PYTHONPATH": f"{third_party}:{Path(registry.__file__).parents[1]}", "PATH": ""},
    )  # fmt: skip
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert {"lora", "head", "loud"} <= set(rows)
    assert rows["lora"]["settings"]["rank"]["default"] == 16
    assert not imported(third_party)


def test_a_third_party_cannot_take_a_built_in_name(third_party):
    assert strategy_class("lora") is LoRA
    assert not imported(third_party)


@pytest.mark.parametrize(
    "name, says",
    [("broken", "ModuleNotFoundError"), ("absent", "AttributeError"), ("dict", "not a subclass")],
)
def test_a_broken_third_party_is_one_clear_error(third_party, name, says):
    with pytest.raises(QftError, match=f"The strategy {name!r}") as caught:
        build_strategy({"name": name})
    assert says in str(caught.value)
    assert "AdapterHub" not in str(caught.value)


def test_a_third_partys_folder_is_its_own_only_when_named(third_party, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "loud.json").write_text("{}")
    assert strategy_from_folder(folder, named="loud") == strategy_class("loud")(volume=9)
    with pytest.raises(AdapterError, match="--strategy NAME"):
        strategy_from_folder(folder)


def test_another_package_called_adapters_is_explained(tmp_path):
    shadow = tmp_path / "adapters"
    shadow.mkdir()
    (shadow / "__init__.py").write_text("")
    code = (
        "import sys\n"  # an editable installation is found before any path
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in f.__module__]\n"
        "from qft.registry import strategy_class\n"
        "from qft.errors import QftError\n"
        "try:\n    strategy_class('lora')\nexcept QftError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{Path(registry.__file__).parents[1]}", "PATH": ""},
    )  # fmt: skip
    assert "The strategy 'lora' could not be imported." in done.stdout
    assert "AdapterHub" in done.stdout


# --- folders


def test_no_folder(tmp_path):
    with pytest.raises(AdapterError, match="does not exist"):
        strategy_from_folder(tmp_path / "nowhere")


def test_a_folder_of_nobody_tells_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(AdapterError, match="No strategy recognises") as caught:
        strategy_from_folder(tmp_path)
    assert "notes.txt" in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_empty_folder_says_so(tmp_path):
    with pytest.raises(AdapterError, match="found: nothing"):
        strategy_from_folder(tmp_path)


def test_a_peft_folder_of_another_kind_is_nobodys(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "VERA"}))
    with pytest.raises(AdapterError, match="No strategy recognises"):
        strategy_from_folder(tmp_path)


def test_a_broken_config_is_told(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="cannot be read"):
        strategy_from_folder(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"peft_type": "LORA"},
        {"peft_type": "LORA", "r": "many", "lora_alpha": 1, "target_modules": ["q_proj"]},
        {"peft_type": "LORA", "r": 4, "lora_alpha": 0, "target_modules": ["q_proj"]},
        {"peft_type": "LORA", "r": 4, "lora_alpha": 1, "target_modules": 7},
        {"peft_type": "LORA", "r": 4, "lora_alpha": 1, "init_lora_weights": [1]},
    ],
)
def test_a_lora_config_with_impossible_values_is_an_adapter_error(tmp_path, values):
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(AdapterError) as caught:
        strategy_from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_lora_folder_that_uses_more_than_lora_is_refused_by_name(tmp_path):
    values = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q"],
        "use_qalora": True,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(AdapterError, match="use_qalora=True"):
        strategy_from_folder(tmp_path)


def test_a_peft_lora_folder_gives_its_settings(tmp_path):
    from peft import LoraConfig

    LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.25, target_modules=["v_proj", "q_proj"], use_rslora=True
    ).save_pretrained(tmp_path)
    assert strategy_from_folder(tmp_path) == LoRA(
        rank=4, alpha=8, dropout=0.25, targets=("q_proj", "v_proj"), rank_stabilised=True
    )


def test_a_named_strategy_that_does_not_know_the_folder(tmp_path):
    values = {"strategy": "head", "settings": {}, "tensors": []}
    (tmp_path / "trained_tensors.json").write_text(json.dumps(values))
    assert strategy_from_folder(tmp_path) == Head()
    with pytest.raises(AdapterError, match="No strategy recognises"):
        strategy_from_folder(tmp_path, named="lora")


def test_entry_points_are_looked_up_anew_every_time(monkeypatch):
    point = metadata.EntryPoint("later", "adapters.lora:LoRA", registry.ENTRY_POINT_GROUP)
    assert "later" not in strategy_names()
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
    assert "later" in strategy_names()
