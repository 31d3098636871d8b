"""A chat model on a card with 8 GB: QLoRA, merged into the original, exported for llama.cpp.

    python examples/qlora_8gb.py --model Qwen/Qwen2.5-1.5B-Instruct --train conversations.jsonl
    python examples/qlora_8gb.py --smoke

The base is held in 4 bits while it trains; the update is merged into the *original* weights, tensor
by tensor, and every step is proven on rows that were held out.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import qft
from qft.demo.job import BASE
from qft.export.delivery import export
from qft.progress import Reporter


def smoke_rows(folder: Path) -> str:
    """Conversations that need no download."""
    path = folder / "conversations.jsonl"
    colours = ("red", "green", "blue")
    rows = [
        {"messages": [{"role": "user", "content": f"What colour is door {number}?"},
                      {"role": "assistant", "content": f"Door {number} is {colours[number % 3]}."}]}
        for number in range(60)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def main() -> None:
    """Trains, merges, exports, and asks the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct")
    parser.add_argument("--train")
    parser.add_argument("--out", type=Path, default=Path("runs/8gb"))
    parser.add_argument("--smoke", action="store_true", help="the demo's model, made-up rows")
    arguments = parser.parse_args()
    if not arguments.smoke and not arguments.train:
        parser.error("--train, or --smoke")
    reporter = Reporter()
    with tempfile.TemporaryDirectory() as folder:
        smoke = arguments.smoke
        model = str(BASE) if smoke else arguments.model
        rows = smoke_rows(Path(folder)) if smoke else arguments.train
        out = Path(folder) / "out" if smoke else arguments.out
        recipe = qft.build_recipe(
            {
                "model": model,
                "task": "chat",
                "data": {"train": rows, "eval_share": 0.1, "too_long": "drop"},
                "strategy": {"name": "lora", "rank": 16},
                "quantize": "nf4",
                "memory": {"checkpointing": "full", "micro_batch": 1},
                "train": {"epochs": 3, "batch_size": 16, "max_length": 256 if smoke else 2048},
                "output": str(out / "run"),
            }
        )
        run = qft.train(recipe, reporter=reporter).folder
        qft.merge(run, out / "merged", verify=True, reporter=reporter)
        report = export(run, out / "gguf", format="gguf:q8_0", reporter=reporter)
        print(f"{out / 'gguf'}: {report['bytes'] / 2**20:.1f} MiB, proven against the adapter")


if __name__ == "__main__":
    main()
