"""`qft demo`: the whole main job on an embedded model, offline, in about two minutes on a CPU.

It trains a small Llama to write the first sentence of a docstring from a function's signature, and
walks the way every user of qft walks: measure, train in 4 bits, measure, merge, export, verify.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from qft.demo.docstrings import TEST_MODULES, TRAIN_MODULES, rows
from qft.errors import OutputExistsError
from qft.files import read_json, write_json, write_text
from qft.progress import QUIET, Reporter, human_bytes
from qft.recipe import Recipe, build_recipe

BASE = Path(__file__).parent / "base"
COMMITTED = Path(__file__).parent / "result.json"  # the three-seed figures
RESULT = "demo.json"
MARK = ".qft-demo"  # nothing but a former demo is ever replaced
EXPORTS = ("gguf:f16", "gguf:q8_0", "bnb:nf4")
_PROMPTS = 3


def run_demo(out: Path, *, seed: int = 0, reporter: Reporter = QUIET) -> dict[str, Any]:
    """Runs the demo and writes everything below ``out``; a former demo there is replaced.

    Args:
        out: folder to write; must be empty, missing, or a former demo's.
        seed: of the training.

    Returns:
        The figures of the closing table, as in ``out/demo.json``.

    Raises:
        OutputExistsError: ``out`` holds something else.
        VerificationError: an exported model lost too much.
    """
    started = time.monotonic()
    _make_room(out)
    recipe = _prepare_rows(out, seed, reporter)
    before = _measure_base(recipe, reporter)
    trained = _train(recipe, reporter)
    delivered = _deliver(out, recipe, reporter)
    samples = _generate(out, recipe, reporter)
    result = {
        "seed": seed,
        "python": platform.python_version(),
        "before": before,
        "after": trained["metrics"],
        "gain_nats": before["loss"] - trained["metrics"]["loss"],
        "training": trained["training"],
        "delivered": delivered,
        "samples": samples,
        "seconds": time.monotonic() - started,
    }
    write_json(out / RESULT, result)
    _closing_table(result, reporter)
    return result


def demo_recipe(out: Path, seed: int) -> Recipe:
    """The demo's recipe; nothing in it is special to the demo."""
    return build_recipe(
        {
            "model": str(BASE),
            "task": "instruct",
            "data": {
                "train": str(out / "train.jsonl"),
                "eval": str(out / "test.jsonl"),
                "too_long": "drop",
            },
            "strategy": {"name": "lora", "rank": 16, "targets": "all-linear"},
            "quantize": "nf4",
            "memory": {"checkpointing": "full", "micro_batch": 16},
            "train": {
                "epochs": 2,
                "batch_size": 16,
                "learning_rate": 1e-3,
                "max_length": 256,
                "eval_every": 10_000,  # once, at the end
                "seed": seed,
            },
            "output": str(out / "run"),
        }
    )


def _make_room(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARK).is_file():
            raise OutputExistsError(
                "The folder is not empty and holds no former demo.",
                where=out,
                fix="qft demo --out ANOTHER",
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / MARK, "`qft demo` made this folder, and replaces it when it runs again.\n")


def _prepare_rows(out: Path, seed: int, reporter: Reporter) -> Recipe:
    reporter.title("1. Rows: from a function's signature to its docstring's first sentence")
    for name, modules in (("train", TRAIN_MODULES), ("test", TEST_MODULES)):
        found, missing = rows(modules)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        write_text(out / f"{name}.jsonl", text)
        reporter.say(f"{name}: {len(found)} rows of {len(modules) - len(missing)} modules of "
                     f"Python {platform.python_version()}'s own library")  # fmt: skip
        if missing:
            reporter.say(f"{name}: this Python lacks {', '.join(missing)}")
    recipe = demo_recipe(out, seed)
    write_text(out / "recipe.yaml", recipe.to_yaml())
    return recipe


def _measure_base(recipe: Recipe, reporter: Reporter) -> dict[str, float]:
    from qft.scoring import evaluate

    training = read_json(BASE / "training.json")
    reporter.title("2. The base model before")
    reporter.say(
        f"{training['parameters'] / 1e6:.1f} M parameters, trained from the library's other "
        f"modules; held-out bits per byte {training['bits_per_byte']['model']:.2f} "
        f"(gzip {training['bits_per_byte']['gzip']:.2f}, "
        f"unigram {training['bits_per_byte']['unigram']:.2f})"
    )
    metrics = evaluate(
        recipe.model, data=recipe.data.eval, task=recipe.task, too_long=recipe.data.too_long,
        max_length=recipe.train.max_length, reporter=reporter,
    )  # fmt: skip
    reporter.say(f"perplexity of the held-out answers: {metrics['perplexity']:.1f}")
    return metrics


def _train(recipe: Recipe, reporter: Reporter) -> dict[str, Any]:
    from qft.training import train

    reporter.title("3. Fine-tune: LoRA on a 4-bit (nf4) base, activations recomputed")
    return train(recipe, reporter=reporter).report


def _deliver(out: Path, recipe: Recipe, reporter: Reporter) -> dict[str, Any]:
    """Merges and exports, each opened again and compared with the adapter model."""
    from qft.export.delivery import export, merge

    run = recipe.output
    reporter.title("4. Merge, streamed by blocks of rows, and verify")
    delivered = {
        "merged": _with_size(out / "merged", lambda: merge(
            run, out / "merged", verify=True, reporter=reporter)),
    }  # fmt: skip
    reporter.title("5. Export, from base and adapter, and verify")
    for format in EXPORTS:
        folder = out / format.replace(":", "-")
        # bnb formats quantize the original with the change; the others go as the merge has measured
        onto = "auto" if format.startswith("bnb:") else delivered["merged"]["base"]["onto"]
        delivered[format] = _with_size(
            folder, _exporter(export, run, folder, format, onto, reporter)
        )
    return delivered


def _exporter(
    export: Any, run: str, folder: Path, format: str, onto: str, reporter: Reporter
) -> Callable[[], dict[str, Any]]:
    return lambda: export(run, folder, format=format, onto=onto, reporter=reporter)


def _with_size(folder: Path, write: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    report = write()
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.gguf")]
    return {**report, "weight_bytes": sum(path.stat().st_size for path in weights)}


def _generate(out: Path, recipe: Recipe, reporter: Reporter) -> list[dict[str, str]]:
    from qft.generation import generate
    from qft.opening import open_any

    reporter.title("6. The merged model writes")
    lines = Path(str(recipe.data.eval)).read_text(encoding="utf-8").splitlines()
    chosen = [json.loads(line) for line in lines[:: max(1, len(lines) // _PROMPTS)][:_PROMPTS]]
    opened = open_any(str(out / "merged"))
    texts = generate(
        opened.model, opened.tokenizer, [row["prompt"] for row in chosen],
        max_new_tokens=48, chat=True,
    )  # fmt: skip
    samples = []
    for row, text in zip(chosen, texts, strict=True):
        samples.append({**row, "generated": text})
        reporter.say(
            f"  {row['prompt']}\n    wrote:     {text}\n    docstring: {row['completion']}"
        )
    return samples


def _closing_table(result: dict[str, Any], reporter: Reporter) -> None:
    table = Table(title="qft demo", title_justify="left")
    for name in ("model", "size", "perplexity", "mean KL", "top-1 agreement"):
        table.add_column(name, justify="left" if name == "model" else "right")
    base_bytes = (BASE / "model.safetensors").stat().st_size
    before, after = result["before"], result["after"]
    table.add_row("base", human_bytes(base_bytes), f"{before['perplexity']:.2f}", "", "")
    table.add_row("nf4 + adapter (reference)", "", f"{after['perplexity']:.2f}", "", "")
    for name, report in result["delivered"].items():
        checked = report["verification"]
        table.add_row(
            name,
            human_bytes(report["weight_bytes"]),
            f"{checked['perplexity']:.2f}",
            f"{checked['mean_kl']:.4f}",
            f"{checked['top1']:.1%}",
        )
    reporter.console.print(table)
    training = result["training"]
    reporter.say(
        f"trained {training['steps']} steps at {training['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {human_bytes(training['measured_peak_bytes'])}; "
        f"{result['seconds']:.0f} s in all"
    )
    reporter.say(f"gain on held-out modules: {result['gain_nats']:.3f} nats a token (one seed)")
    if COMMITTED.is_file():
        known = read_json(COMMITTED)
        reporter.say(
            f"committed result: {known['mean_gain_nats']:.3f} ± {known['pooled_sd_nats']:.3f} "
            f"over {len(known['gains_nats'])} seeds, Python {known['python']}"
        )
