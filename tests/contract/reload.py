"""Run as a program: opens saved adapters in this fresh process and writes what they answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))

from matrix import TASKS, base_of, outputs, spec_of

from qft import models
from qft.registry import strategy_from_folder
from qft.strategy import Context


def main(orders: Path, answers: Path) -> None:
    torch.set_num_threads(1)
    found = {}
    for order in json.loads(orders.read_text(encoding="utf-8")):
        folder, architecture = Path(order["base"]), order["architecture"]
        strategy = strategy_from_folder(Path(order["adapter"]))
        skeleton = models.open_skeleton(folder, spec_of(folder, architecture, order["precision"]))
        keep = strategy.needs(skeleton).full_precision
        model = base_of(folder, architecture, order["precision"], keep)
        model = strategy.attach(model, Context(task=TASKS[architecture]))
        strategy.load(model, Path(order["adapter"]))
        found[order["key"]] = outputs(model, architecture).contiguous()
    save_file(found, answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
