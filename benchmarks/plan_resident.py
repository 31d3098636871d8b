"""Does the resident set of a training on a CPU grow as much as the planner says?

    python benchmarks/plan_resident.py ASSETS            # measures what has no row yet, then judges
    python benchmarks/plan_resident.py ASSETS --judge    # judges the rows that are there

Each training is probed as `qft plan --probe` does it: three real steps of its longest micro-batch
in a fresh process. Models are those of ASSETS, and random ones of 60 to 360 M parameters.

Every second training calibrates: its residual goes into a store that is empty at the beginning. The
others are then predicted by that store, and compared; then the halves change places. Errors are
shares of the growth since the imports, positive where too much was predicted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qft.errors import QftError
from qft.files import write_text

ROWS = Path(__file__).parent / "results" / "plan_resident.jsonl"
BOUND = 0.10
LORA: dict[str, Any] = {"name": "lora", "rank": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-135m": {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576,
                   "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                   "num_key_value_heads": 3, "tie_word_embeddings": True},
    "llama-362m": {"model_type": "llama", "vocab_size": 49152, "hidden_size": 960,
                   "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15,
                   "num_key_value_heads": 5, "tie_word_embeddings": True},
    "qwen2-110m": {"model_type": "qwen2", "vocab_size": 32000, "hidden_size": 768,
                   "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
                   "num_key_value_heads": 4, "tie_word_embeddings": True},
    "bert-110m": {"model_type": "bert", "vocab_size": 30522},
    "t5-60m": {"model_type": "t5", "vocab_size": 32128, "decoder_start_token_id": 0,
               "pad_token_id": 0},
}  # fmt: skip
TASKS = {"bert-110m": "classify", "t5-60m": "seq2seq"}


def trainings() -> Iterator[dict[str, Any]]:
    """What is probed: models, strategies, precisions, checkpointing, batches and lengths."""
    for model in ("mini-6m", "qwen2-110m"):
        for dtype in ("bfloat16", "float32"):
            for kept in ("none", "full"):
                for length, rows in ((128, 2), (256, 4)):
                    yield _one(model, length, rows, dtype=dtype, checkpointing=kept)
    for name in ("full", "prefix", "prompt", "ia3", "layers", "bitfit"):
        yield _one("mini-6m", 256, 2, strategy={"name": name})
        if name != "bitfit":
            yield _one("qwen2-110m", 256, 2, strategy={"name": name})
    for quantize in ("nf4", "int8"):
        for model in ("mini-6m", "qwen2-110m"):
            yield _one(model, 256, 2, quantize=quantize)
    for kept in ("none", "full"):
        yield _one("llama-135m", 256, 2, checkpointing=kept)
    yield _one("llama-362m", 256, 1)
    for model in ("bert-110m", "t5-60m"):
        yield _one(model, 128, 4)
        yield _one(model, 128, 4, dtype="float32")
        yield _one(model, 128, 4, dtype="float32", strategy={"name": "full"})
    yield _one("stories260K", 256, 8)
    yield _one("mini-6m", 1024, 2)


def _one(model: str, length: int, rows: int, **changes: Any) -> dict[str, Any]:
    plain = {"strategy": LORA, "dtype": "bfloat16", "quantize": "none", "checkpointing": "none"}
    return {"model": model, "length": length, "micro_batch": rows, **plain, **changes}


def name_of(training: dict[str, Any]) -> str:
    """Of its row."""
    return " ".join(
        str(value["name"] if isinstance(value, dict) else value) for value in training.values()
    )


def job_of(training: dict[str, Any], assets: Path, scratch: Path) -> Any:
    """The planned job; all of its rows are imagined, and as long as may be."""
    import qft
    from qft.planning.job import imagined_inputs, planned_job

    folder = assets / "models" / training["model"]
    if training["model"] in SHAPES:
        folder = scratch / training["model"]
        _make(training["model"], folder)
    task, rows = TASKS.get(training["model"], "text"), training["micro_batch"]
    labels = {"labels": ["no", "yes"]} if task == "classify" else {}
    recipe = qft.build_recipe({
        "model": str(folder), "task": task, "data": {"train": "imagined", **labels},
        "strategy": training["strategy"], "dtype": training["dtype"], "device": "cpu",
        "quantize": training["quantize"], "output": "nowhere",
        "memory": {"checkpointing": training["checkpointing"], "micro_batch": rows},
        "train": {"max_length": training["length"], "batch_size": rows},
    })  # fmt: skip
    return planned_job(recipe, imagined_inputs(recipe, folder), "cpu")


def _make(name: str, folder: Path) -> None:
    """A random model in bfloat16; once."""
    import torch
    import transformers

    if folder.is_dir():
        return
    values = dict(SHAPES[name])
    config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    kinds: dict[str, Any] = {
        "text": transformers.AutoModelForCausalLM, "classify": transformers.AutoModel,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }  # fmt: skip
    kind = kinds[TASKS.get(name, "text")]
    torch.manual_seed(0)
    kind.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def measured(training: dict[str, Any], assets: Path, scratch: Path) -> dict[str, Any]:
    """A row: live bytes and the resident set's growth, predicted and measured."""
    from qft import hardware
    from qft.planning.calibration import Kind
    from qft.planning.probe import probe

    job = job_of(training, assets, scratch)
    found = probe(job, predicted)
    return {
        "name": name_of(training), "training": training, "kind": vars(Kind.of(job)),
        "predicted_by_category": dict(found.predicted.device),
        "predicted_step": vars(found.predicted.after),
        "live_predicted": found.predicted.peak_bytes, "live_measured": found.measured.live_bytes,
        "resident_grown": found.measured.resident_bytes,
        "loading_grown": found.measured.loading_bytes, "versions": hardware.versions(),
    }  # fmt: skip


def predicted(job: Any) -> Any:
    """The training's phase, by fakes."""
    from qft.planning.amounts import PhaseBytes, StepWork
    from qft.planning.fake_training import FakeTraining

    reading = FakeTraining(job).meter()
    return PhaseBytes("train", reading.peak.by_category, after=StepWork.of(reading))


def judged(rows: Sequence[dict[str, Any]], assets: Path, scratch: Path) -> list[dict[str, Any]]:
    """The rows with the shares by which their growth was missed: by the model, and calibrated.

    The rows of odd numbers calibrate a store that was empty, which foretells the others; and the
    other way round.
    """
    from qft.planning.amounts import PhaseBytes, StepWork
    from qft.planning.calibration import Calibration
    from qft.planning.unseen import expected, record_step

    jobs = [job_of(row["training"], assets, scratch) for row in rows]
    phases = [
        PhaseBytes("train", row["predicted_by_category"], after=StepWork(**row["predicted_step"]))
        for row in rows
    ]
    stores = [Calibration(persistent=False) for _ in range(3)]  # one that stays empty
    for number, row in enumerate(rows):
        seen = (row["live_measured"], row["resident_grown"])
        record_step(jobs[number], phases[number], *seen, stores[number % 2], longest_only=True)
    found = []
    for number, row in enumerate(rows):
        grown = row["resident_grown"]
        raw, told = (expected(phases[number], jobs[number], stores[n]) for n in (2, 1 - number % 2))
        errors = {"modelled": raw.expected / grown - 1, "calibrated": told.expected / grown - 1}
        found.append({**row, **errors, "within_bar": told.low <= grown <= told.high})
    return found


def summary(found: Sequence[dict[str, Any]]) -> str:
    """The worst and the median, before and after calibration."""
    lines = []
    for name in ("modelled", "calibrated"):
        errors = [abs(row[name]) for row in found]
        within = sum(error <= BOUND for error in errors)
        lines.append(
            f"{name}: {len(errors)} trainings, median {statistics.median(errors):.1%}, "
            f"worst {max(errors):.1%}, {within} within {BOUND:.0%}"
        )
    bars = sum(row["within_bar"] for row in found)
    lines.append(f"{bars} of {len(found)} within their error bars")
    return "\n".join(lines)


def known_rows() -> list[dict[str, Any]]:
    """Those that were measured, one a line, in the order of `trainings`."""
    if not ROWS.is_file():
        return []
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    order = [name_of(training) for training in trainings()]
    return sorted(rows, key=lambda row: order.index(row["name"]))


def main() -> None:
    """Measures what is missing, and judges."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--judge", action="store_true", help="nothing is measured")
    parser.add_argument("--part", default="1/1", help="2/3: the second of three runs side by side")
    asked = parser.parse_args()
    part, parts = map(int, asked.part.split("/"))
    with tempfile.TemporaryDirectory(prefix="qft-plan-") as scratch:
        for training in () if asked.judge else list(trainings())[part - 1 :: parts]:
            if name_of(training) in {row["name"] for row in known_rows()}:
                continue
            try:
                row = measured(training, asked.assets, Path(scratch))
            except QftError as error:
                print(f"{name_of(training)}: {error}", flush=True)
                continue
            with ROWS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        found = judged(known_rows(), asked.assets, Path(scratch))
    write_text(ROWS, "".join(json.dumps(row) + "\n" for row in found))
    for row in found:
        print(
            f"{row['name']}: {row['resident_grown'] / 2**20:.0f} MiB, modelled "
            f"{row['modelled']:+.1%}, calibrated {row['calibrated']:+.1%}"
        )
    print(summary(found))


if __name__ == "__main__":
    main()
