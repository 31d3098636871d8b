"""Random recipes with random budgets: what a plan says fits runs within it, and nothing else does.

    python benchmarks/plan_promises.py ASSETS [--count 20] [--seed 0] [--only 3 7]

`ASSETS` holds `models/mini-6m` and `models/stories260K`; beside them there are random models of a
few layers. Each recipe is drawn by the seed: strategy, task, precision, checkpointing, length,
batch; its budget is drawn from 0.6 to 1.5 of the planned peak, once for the live bytes of a step
and once for the resident set of a whole training. It is planned first, and then trained in a
process of its own without any budget: what is said to fit must take no more, what is said not to
fit must take more. Where the budget lies within the error bar of the resident set, the plan calls
it close and says neither. What is said to fit is then trained once more with `memory.budget` on,
and must come through with the micro-batch as it is. A line a recipe goes to
benchmarks/results/plan_promises.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan_promises.jsonl"
MARK = "plan-promises-row: "
WORDS = ("the", "cat", "sat", "on", "a", "mat", "while", "it", "rained", "and", "nobody", "came")
SIZES = {"small-llama": (256, 8), "small-bert": (192, 6), "small-t5": (128, 4)}
TASKS = {"small-bert": ("classify", "token"), "small-t5": ("seq2seq",)}
STRATEGIES: tuple[dict[str, Any], ...] = (
    {"name": "lora", "rank": 4}, {"name": "lora", "rank": 32}, {"name": "full"},
    {"name": "layers", "last": 2}, {"name": "bitfit"}, {"name": "ia3"},
    {"name": "prefix", "length": 8}, {"name": "prompt", "length": 8},
)  # fmt: skip


def drawn(seed: int, models: tuple[str, ...], longest: int = 384) -> dict[str, Any]:
    """A recipe's values, by the seed; `model` is a name of this file's own.

    Every step has all of the rows, so that it has the longest as well.
    """
    generator = random.Random(seed)
    pick = generator.choice
    model = pick(models)
    rows = pick((4, 6, 8, 12))
    longest = min(longest, 256) if model == "small-t5" else longest
    return {
        "model": model,
        "task": pick(TASKS.get(model, ("text", "instruct", "instruct", "classify"))),
        "strategy": pick(STRATEGIES),
        "quantize": pick(("none", "none", "none", "nf4", "int8")),
        "dtype": pick(("bfloat16", "float32")),
        "device": "cpu",
        "memory": {
            "checkpointing": pick(("none", "none", "full", 2)),
            "micro_batch": pick((1, 2, 4, rows)),
            "feature_cache": "off",
            "savers": {"tiled_mlp": pick((False, False, True))},
        },
        "train": {
            "max_length": generator.randrange(48, longest),
            "batch_size": rows,
            "optimizer": pick(("adamw", "adamw", "sgd", "adafactor")),
            "seed": seed,
        },
    }


def budget_shares(seed: int) -> tuple[float, float]:
    """Of the planned peak: what the live bytes may be, and what the resident set may."""
    generator = random.Random(f"budget {seed}")
    return generator.uniform(0.6, 1.5), generator.uniform(0.6, 1.5)


def rows_of(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of words, of many lengths, more than the model takes among them."""
    generator = random.Random(values["train"]["seed"])
    length, count = values["train"]["max_length"], values["train"]["batch_size"]

    def words(most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randrange(most // 4, most)))

    match values["task"]:
        case "text":
            return [{"text": words(4 * length * count) + " end" * 2 * length * count}]
        case "instruct":
            return [
                {"prompt": words(length // 2), "completion": words(length)} for _ in range(count)
            ]
        case "classify":
            return [{"text": words(length), "label": "ab"[n % 2]} for n in range(count)]
        case "seq2seq":
            return [{"source": words(length), "target": words(length)} for _ in range(count)]
    sentences = [words(length).split() for _ in range(count)]
    return [{"tokens": s, "tags": ["N" if len(w) > 3 else "O" for w in s]} for s in sentences]


# --- models


def model_folder(name: str, assets: Path, scratch: Path) -> Path:
    """A model by its name in this file; a random one is made in ``scratch``, once."""
    if (assets / "models" / name).is_dir():
        return assets / "models" / name
    folder = scratch / name
    if not folder.is_dir():
        import torch

        torch.manual_seed(0)
        _random_model(name).save_pretrained(folder)
        for file in (assets / "models/mini-6m").glob("*token*.json"):
            shutil.copy(file, folder)
    return folder


def _random_model(name: str) -> Any:
    import transformers as hub

    width, layers = SIZES[name]
    ends: dict[str, Any] = {"vocab_size": 6144, "pad_token_id": 3, "eos_token_id": 2}
    match name:
        case "small-llama":
            return hub.LlamaForCausalLM(
                hub.LlamaConfig(
                    hidden_size=width,
                    intermediate_size=3 * width,
                    num_hidden_layers=layers,
                    num_attention_heads=8,
                    num_key_value_heads=2,
                    max_position_embeddings=1024,
                    **ends,
                )
            )
        case "small-bert":
            return hub.BertModel(
                hub.BertConfig(
                    hidden_size=width,
                    intermediate_size=4 * width,
                    num_hidden_layers=layers,
                    num_attention_heads=6,
                    hidden_dropout_prob=0.1,
                    attention_probs_dropout_prob=0.0,
                    **ends,
                )
            )
        case "small-t5":
            return hub.T5ForConditionalGeneration(
                hub.T5Config(
                    d_model=width,
                    d_kv=32,
                    d_ff=4 * width,
                    num_layers=layers,
                    num_heads=4,
                    **{"decoder_start_token_id": 3, **ends},
                )
            )
    raise ValueError(name)  # fmt: skip


def recipe_of(values: Mapping[str, Any], assets: Path, scratch: Path, budget: int | None) -> Any:
    """The drawn values as a recipe, its rows written beside it.

    Raises:
        QftError: such a recipe is refused.
    """
    import qft

    rows = scratch / f"rows-{values['train']['seed']}.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(values)), encoding="utf-8")
    data: dict[str, Any] = {"train": str(rows), "limit": values["train"]["batch_size"]}
    if values["task"] != "text":
        data |= {"too_long": "truncate", "max_cut_share": 1}
    memory = {**values["memory"], **({"budget": budget} if budget else {})}
    return qft.build_recipe({
        **values, "model": str(model_folder(values["model"], assets, scratch)), "data": data,
        "memory": memory, "output": str(scratch / f"run-{values['train']['seed']}-{budget}"),
    })  # fmt: skip


# --- what is said, and what is so


def said(recipe: Any, shares: tuple[float, float]) -> dict[str, Any]:
    """What a plan says of a recipe, with budgets of these shares of its peaks.

    Raises:
        QftError: the training is refused.
    """
    from qft.inputs import open_inputs
    from qft.planning.calibration import Calibration
    from qft.planning.forecast import forecast
    from qft.planning.job import planned_job

    made = forecast(planned_job(recipe, open_inputs(recipe)), Calibration())
    live, resident = made.reading.peak_bytes, made.peak
    budget = int(shares[1] * resident.expected)
    return {
        "live": {
            "planned_bytes": live,
            "budget_bytes": int(shares[0] * live),
            "said_to_fit": live <= int(shares[0] * live),
        },
        "resident": {
            "planned_bytes": resident.expected,
            "low_bytes": resident.low,
            "high_bytes": resident.high,
            "budget_bytes": budget,
            "said_to_fit": resident.expected <= budget,
            "said_to_be_close": resident.low <= budget < resident.high,
            "phase": made.peak_phase,
        },
    }


def ran(recipe: Any) -> dict[str, Any]:
    """What a training took; its process must be a fresh one, and only its imports are made."""
    from qft.errors import WillNotFitError
    from qft.planning.measured_step import measured_step

    try:
        real = measured_step(recipe)
    except WillNotFitError as error:
        return {"refused": str(error)}
    run = json.loads((Path(recipe.output) / "run.json").read_text(encoding="utf-8"))
    return {
        "live_bytes": real.reading.peak_bytes,
        "resident_bytes": real.resident_peak_bytes - run["bytes_before_loading"],
        "micro_batch": run["training"]["micro_batch"],
        "replays": run["training"]["replays"],
    }


def judged(plan: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Whether each thing that was said is so."""
    row: dict[str, Any] = {}
    for figure in ("live", "resident"):
        measured, budget = found[f"{figure}_bytes"], plan[figure]["budget_bytes"]
        kept = plan[figure]["said_to_fit"] == (measured <= budget)
        row[figure] = {**plan[figure], "measured_bytes": measured, "kept": kept}
    return row


def came_through(found: Mapping[str, Any], micro_batch: int) -> bool:
    """Whether a training with its budget on had no need to shrink."""
    return "refused" not in found and found["replays"] == 0 and found["micro_batch"] == micro_batch


def run_apart(seed: int, assets: Path, scratch: Path, budget: int | None) -> dict[str, Any]:
    """What `ran` says in a process of its own."""
    command = [sys.executable, __file__, str(assets), "--inside", str(seed)]
    command += ["--scratch", str(scratch), "--budget", str(budget or 0)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [line for line in made.stdout.splitlines() if line.startswith(MARK)]
    if not rows:
        raise RuntimeError(f"{command}\n{made.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(rows[0].removeprefix(MARK))
    return found


def promised(
    seed: int,
    assets: Path,
    scratch: Path,
    models: tuple[str, ...],
    longest: int = 384,
    enforced: bool = True,
) -> dict[str, Any] | None:
    """Plans and trains the recipe of a seed; None where there is no such training."""
    from qft.errors import QftError

    values = drawn(seed, models, longest)
    try:
        plan = said(recipe_of(values, assets, scratch, None), budget_shares(seed))
    except QftError as error:  # nothing that is frozen to quantize, a task it cannot train
        print(f"{seed}: refused, {str(error).splitlines()[0]}", flush=True)
        return None
    path = scratch / f"values-{seed}.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    row: dict[str, Any] = {"seed": seed, "recipe": values}
    row |= judged(plan, run_apart(seed, assets, scratch, None))
    resident = row["resident"]
    if resident["said_to_fit"] and not resident["said_to_be_close"] and enforced:
        micro_batch = min(values["memory"]["micro_batch"], values["train"]["batch_size"])
        found = run_apart(seed, assets, scratch, resident["budget_bytes"])
        row["with_budget_on"] = {**found, "came_through": came_through(found, micro_batch)}
    return row


def _inside(asked: argparse.Namespace) -> None:
    import bitsandbytes  # noqa: F401  what a training imports, before the resident set is read
    import peft  # noqa: F401

    import qft.training  # noqa: F401

    values = json.loads((asked.scratch / f"values-{asked.inside}.json").read_text("utf-8"))
    recipe = recipe_of(values, asked.assets, asked.scratch, asked.budget or None)
    print(MARK + json.dumps(ran(recipe)), flush=True)


def _summary(rows: list[dict[str, Any]]) -> str:
    lines = []
    for figure in ("live", "resident"):
        said = [row[figure] for row in rows]
        sure = [one for one in said if not one.get("said_to_be_close")]
        for fits, name in ((True, "fit"), (False, "not fit")):
            of = [one for one in sure if one["said_to_fit"] == fits]
            kept = sum(one["kept"] for one in of)
            lines.append(f"{figure}: said to {name}: {len(of)}, so it is: {kept}")
        if len(sure) < len(said):
            close = [one["kept"] for one in said if one.get("said_to_be_close")]
            lines.append(f"{figure}: said to be close: {len(close)}, as expected: {sum(close)}")
    runs = [row["with_budget_on"] for row in rows if "with_budget_on" in row]
    through = sum(run["came_through"] for run in runs)
    lines.append(f"with the budget on: {len(runs)} were said to fit, {through} came through")
    return "\n".join(lines)  # fmt: skip


def main() -> None:
    """Draws recipes until there are as many as asked for that can be trained at all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="seeds of single recipes")
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--budget", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside is not None:
        _inside(asked)
        return
    from qft.hardware import environment

    models = ("mini-6m", "mini-6m", "stories260K", *SIZES)
    rows: list[dict[str, Any]] = []
    machine = {**environment(), "threads": os.environ.get("OMP_NUM_THREADS"),
               "date": date.today().isoformat()}  # fmt: skip
    machine.pop("free_memory_bytes", None)
    with tempfile.TemporaryDirectory(prefix="qft-promises-") as folder:
        # nothing is known at first; each training teaches the plans of those after it
        os.environ["QFT_CALIBRATION"] = str(Path(folder) / "calibration.json")
        seed = asked.seed
        seeds = iter(asked.only or range(seed, seed + 50 * asked.count))
        for seed in seeds:
            if len(rows) == asked.count:
                break
            row = promised(seed, asked.assets, Path(folder), models)
            if row is None:
                continue
            rows.append({**row, "machine": machine})
            if not asked.only:
                text = "".join(json.dumps(kept) + "\n" for kept in rows)
                RESULTS.write_text(text, encoding="utf-8")
            for figure in ("live", "resident"):
                one = row[figure]
                print(f"{seed} {figure}: planned {one['planned_bytes'] / 1e6:.2f} MB, budget "
                      f"{one['budget_bytes'] / 1e6:.2f}, said to fit: {one['said_to_fit']}, "
                      f"took {one['measured_bytes'] / 1e6:.2f}: "
                      f"{'kept' if one['kept'] else 'NOT KEPT'}", flush=True)  # fmt: skip
    print(_summary(rows))


if __name__ == "__main__":
    main()
