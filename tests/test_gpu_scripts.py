"""The scripts of benchmarks/gpu, as far as a machine without a GPU can run them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "gpu"
sys.path.insert(0, str(FOLDER))

import checks  # noqa: E402
import distillation  # noqa: E402
import gpu_rows  # noqa: E402
import gpu_sides  # noqa: E402
import largest_context  # noqa: E402
import peft_row  # noqa: E402
import plan_accuracy  # noqa: E402
import run_all  # noqa: E402
import throughput  # noqa: E402
from gpu_models import Case, random_model  # noqa: E402

SCRIPTS = sorted(FOLDER.glob("*.py"))
MAY = {"torch", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes", "tokenizers"}
PEERS = {"unsloth", "liger_kernel", "torchtune"}
ENGINE = ("qft.lean", "qft.preparation", "qft.quantization", "qft.bench.shapes",
          "qft.bench.fake_model", "qft.planning.cuda_allocator")  # fmt: skip
TINY = ["--device", "cpu", "--dtype", "float32", "--in-process"]


def rows_of(folder: Path, benchmark: str) -> list[dict[str, Any]]:
    lines = (folder / f"{benchmark}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# --- what they import


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_names_the_engine_and_few_others(path: Path):
    own = {script.stem for script in SCRIPTS}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.split(".")[0]
            known = own | MAY | PEERS | set(sys.stdlib_module_names)
            assert top in known or name.startswith(ENGINE), name


def test_they_can_be_imported_where_only_torch_transformers_and_peft_are():
    """What else this environment has is hidden; the engine is used once, on a real step."""
    program = f"""
import importlib.util, sys
HIDDEN = {{"pydantic", "bitsandbytes", "datasets", "typer", "gguf", "sklearn", "adapters"}}
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
plain = importlib.util.find_spec
def find(name, package=None):
    return None if name.split(".")[0] in HIDDEN else plain(name, package)
importlib.util.find_spec = find
sys.path[:0] = [{str(FOLDER)!r}, {str(FOLDER.parents[1])!r}]
for name in {[path.stem for path in SCRIPTS]!r}:
    __import__(name)
import gpu_sides
from gpu_models import Case
side = gpu_sides.Side("qft")
print(side.open(Case("tiny", length=32, dtype="float32", device="cpu")))
print("qft:", sorted(name for name in sys.modules if name.startswith(("qft", "adapters"))))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    opened, loaded = done.stdout.strip().splitlines()
    assert "reason" not in opened
    allowed = {"qft", "qft.attention_interface", "qft.bench", "qft.errors", "qft.planning"}
    found = set(ast.literal_eval(loaded.removeprefix("qft: ")))
    assert {name for name in found - allowed if not name.startswith(ENGINE)} == set()


# --- rows


def test_a_row_has_every_field_and_a_cut_one_is_taken_out(tmp_path: Path):
    rows = gpu_rows.Rows(tmp_path, "some", "cpu")
    rows.add("case", "qft", {"length": 3}, **gpu_rows.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    (row,) = rows_of(tmp_path, "some")
    assert set(gpu_rows.FIELDS) <= set(row)
    assert (row["p20"], row["p50"], row["p80"]) == (2.0, 3.5, 5.0)
    assert row["predicted"] is False
    assert row["device"] == "cpu"
    assert row["commit"]
    path = tmp_path / "some.jsonl"
    path.write_text(path.read_text() + '{"benchmark": "so')
    again = gpu_rows.Rows(tmp_path, "some", "cpu")
    assert again.has("case", "qft")
    assert not again.has("case", "peft")
    again.add("other", "qft", {})
    assert [row["case"] for row in rows_of(tmp_path, "some")] == ["case", "other"]


@pytest.mark.parametrize("limit", [0, 1, 63, 64, 65, 1000, 4095, 4096, 9999])
def test_the_longest_that_fits_is_found(limit: int):
    tried: list[int] = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= limit

    assert gpu_rows.largest(fits, 64, 4096, 64) == min(limit, 4096) // 64 * 64
    assert len(tried) <= 14
    assert max(tried) <= 4096
    assert max(tried) <= max(64, 2 * limit)


@pytest.mark.parametrize("guess", [0, 64, 900, 1000, 4096, 99999])
@pytest.mark.parametrize("limit", [0, 63, 64, 1000, 1023, 4096, 9999])
def test_the_longest_is_found_from_any_guess(limit: int, guess: int):
    tried: list[int] = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= limit

    assert gpu_rows.around(fits, guess, 4096, 64) == min(limit, 4096) // 64 * 64
    assert len(set(tried)) == len(tried) <= 14
    assert all(64 <= length <= 4096 for length in tried)


def test_a_good_guess_costs_few_tries():
    tried: list[int] = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= 85000

    assert gpu_rows.around(fits, 87154, 196608, 1024) == 83 * 1024
    assert tried[0] == 85 * 1024
    assert len(tried) <= 4
    name = "llama-3.1-8b nf4 r=32 12 GiB, leanest"
    assert largest_context.predicted_tokens(name) is not None
    assert largest_context.predicted_tokens("another") is None


def test_what_is_published_is_tried_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Simulated:
        def __init__(self, bytes_: int) -> None:
            self.bytes, self.tried = bytes_, {}  # type: ignore[var-annotated]
            self.reasons: list[str] = []
            self.peaks: dict[int, dict[str, Any]] = {}
            self.seconds: dict[int, float] = {}
            self.order: list[int] = []

        def fit(self, length: int) -> bool:
            self.order.append(length)
            self.seconds[length] = 2.0
            self.tried[length] = 5.2e9 + 8e4 * length <= self.bytes
            return self.tried[length]

        def again(self, length: int) -> bool:
            return length < 29000  # a hole of the allocator, say

    rows = gpu_rows.Rows(tmp_path, "largest_context", "cpu")
    case = largest_context.case_of("llama-3.1-8b", "leanest", "cpu")
    for cap, reached in ((8, True), (24, False)):
        steps: Any = Simulated(int(7.25 * 2**30))
        largest_context.measure(rows, steps, case, "leanest", cap, 0.75, 196608, 1024)
        row = rows_of(tmp_path, "largest_context")[-1]
        assert int((7.25 * 2**30 - 5.2e9) / 8e4) > 29000 > row["tokens"] > 23000
        assert row["target_reached"] is reached
        assert steps.order[0] >= 2 * row["published_unsloth"]
        assert row["tokens_per_second"] == row["tokens"] / 2


# --- steps


def test_throughput_and_peers_that_are_missing(tmp_path: Path):
    asked = ["--shapes", "tiny", "--quantize", "none", "nf4", "--lengths", "32", "--blocks", "2",
             "--block-seconds", "0.01", "--out", str(tmp_path), *TINY]  # fmt: skip
    throughput.main([*asked, "--sides", "qft", "peft", "unsloth", "torchtune", "liger"])
    rows = rows_of(tmp_path, "throughput")
    assert len(rows) == 10
    for row in rows:
        if row["side"] in ("qft", "peft"):
            assert row["reason"] is None
            assert 0 < row["p20"] <= row["p50"] <= row["p80"]
            assert row["allocated_peak_bytes"] is None
        else:
            assert row["reason"].endswith("is not installed")
            assert row["p50"] is None
    by = {(row["settings"]["quantize"], row["side"]): row for row in rows}
    for quantize in ("none", "nf4"):
        ours, theirs = by[quantize, "qft"], by[quantize, "peft"]
        assert ours["steps"] == theirs["steps"]
        assert ours["final_loss"] == pytest.approx(theirs["final_loss"], rel=1e-4)
    throughput.main([*asked, "--sides", "qft", "peft"])
    assert len(rows_of(tmp_path, "throughput")) == 10, "what is there is not run again"


def test_sides_in_processes_take_turns_and_one_that_fails_says_why(tmp_path: Path):
    rows = gpu_rows.Rows(tmp_path, "throughput", "cpu")
    far = gpu_sides.FarSide("qft")
    order: list[str] = []

    class Broken(gpu_sides.Side):
        def block(self, steps: int) -> dict[str, Any]:
            order.append("peft")
            return {"reason": "out of memory"} if len(order) > 2 else super().block(steps)

    class Far:
        open, close = far.open, far.close

        def block(self, steps: int) -> dict[str, Any]:
            order.append("qft")
            return far.block(steps)

    case = Case("tiny", length=16, dtype="float32", device="cpu")
    try:
        medians = throughput.compare(
            case, {"qft": Far(), "peft": Broken("peft")}, rows, blocks=3, seconds=0.01
        )
        assert "mistake" in far.open(Case("mistake", device="cpu"))["reason"]
    finally:
        far.end()
    assert order == ["qft", "peft", "qft", "peft", "qft"]
    assert set(medians) == {"qft"}
    found = {row["side"]: row["reason"] for row in rows_of(tmp_path, "throughput")}
    assert found == {"qft": None, "peft": "out of memory"}
    assert "ended" in far.block(1)["reason"]


def test_targets_are_told_of_the_8b_alone():
    told = throughput.against_targets(
        "llama-3.1-8b nf4 1x2048", {"qft": 22.0, "unsloth": 20.0, "peft": 12.0}
    )
    assert [line.split(", ")[-1] for line in told] == [
        "target 1.1 x: reached", "target 2.0 x: not reached",
    ]  # fmt: skip
    assert not throughput.against_targets("llama-3.2-1b nf4 1x2048", {"qft": 1.0, "peft": 1.0})


def test_the_row_of_peft(tmp_path: Path):
    peft_row.main(["--shape", "tiny", "--length", "32", "--blocks", "1", "--block-seconds",
                   "0.01", "--out", str(tmp_path), *TINY])  # fmt: skip
    rows = rows_of(tmp_path, "peft_row")
    assert {row["side"] for row in rows} == {"qft", "peft", "peft-autocast"}
    assert all(row["settings"]["targets"] == ["q_proj", "v_proj"] for row in rows)


def test_a_student_and_its_teacher(tmp_path: Path):
    tiny = ["--student", "tiny", "--teacher", "tiny", "--length", "48", "--steps", "2"]
    device = ["--device", "cpu", "--dtype", "float32"]
    assert distillation.main([*device, *tiny, "--out", str(tmp_path)]) == 0
    rows = {row["side"]: row for row in rows_of(tmp_path, "distillation")}
    assert list(rows) == [side for side, _, _ in distillation.SIDES]
    assert all(row["reason"] is None and row["p50"] > 0 for row in rows.values())
    losses = {side: row["final_loss"] for side, row in rows.items()}
    live, full = losses["teacher in bf16"], losses["teacher in bf16, full logits"]
    assert live == pytest.approx(full, rel=1e-4)
    assert live != pytest.approx(losses["student alone"], rel=1e-2)


def test_a_wrong_divergence_is_loud(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distillation, "formula", lambda kind, student, teacher: student.sum())
    with pytest.raises(distillation.CheckError, match="forward-kl"):
        distillation.check_losses("cpu")


def test_the_largest_context_by_real_steps(tmp_path: Path):
    largest_context.main(["--device", "cpu", "--shape", "tiny", "--quantize", "none", "--dtype",
                          "float32", "--caps", "1", "--settings", "defaults", "--grain", "32",
                          "--longest", "64", "--out", str(tmp_path)])  # fmt: skip
    (row,) = rows_of(tmp_path, "largest_context")
    assert row["tokens"] == 64
    assert row["predicted"] is False


def test_a_step_that_does_not_fit_is_freed(monkeypatch: pytest.MonkeyPatch):
    case = largest_context.case_of("tiny", "defaults", "cpu", "float32", "none")
    steps = largest_context.Steps(case)
    plain = type(steps)._step

    def step(self: Any, length: int) -> None:
        if length > 48:
            raise torch.OutOfMemoryError("CUDA out of memory")
        plain(self, length)

    monkeypatch.setattr(largest_context.Steps, "_step", step)
    assert gpu_rows.largest(steps.fit, 16, 128, 16) == 48
    late = largest_context.Steps(case, until=time.monotonic() - 1)
    assert not late.fit(16)
    assert "lower bound" in late.reasons[0]
    assert not late.tried, "what there was no time for was not tried"
    soon = largest_context.Steps(case, until=time.monotonic() + 100)
    soon.seconds[16] = 60.0
    assert soon.fit(16)
    soon.seconds[16] = 60.0
    assert not soon.fit(32), "twice the length takes more than twice the time"


@pytest.mark.slow
def test_the_largest_context_by_the_meter(tmp_path: Path):
    case = largest_context.case_of("tiny", "leanest", "none")
    found = largest_context.predict(case, (1024, 2048))
    reading = largest_context.metered(replace(case, length=4096), 2)  # it has two layers
    assert found.peak_bytes(4096) == pytest.approx(reading.peak_bytes, rel=0.02)
    rows = gpu_rows.Rows(tmp_path, "largest_context", "none", predicted=True)
    largest_context.add_predictions(rows, case, "leanest", [8], 0.75, (1024, 2048))
    (row,) = rows_of(tmp_path, "largest_context")
    assert row["predicted"] is True
    assert row["device"] == "none"
    room = 7.25 * 2**30 - largest_context.WORKSPACE_BYTES
    assert room - row["bytes_per_token"] <= found.peak_bytes(row["tokens"]) <= room
    assert sum(row["peak_by_category"].values()) == pytest.approx(room, rel=0.01)


def test_peaks_of_the_engines_sides_can_be_predicted(tmp_path: Path):
    throughput.main(["--predict", "--shapes", "tiny", "--quantize", "nf4", "--lengths", "2048",
                     "--out", str(tmp_path)])  # fmt: skip
    plain, offloaded = rows_of(tmp_path, "throughput")
    assert (plain["side"], offloaded["side"]) == ("qft", "qft-offload")
    assert plain["predicted"]
    assert offloaded["predicted"]
    assert plain["p50"] is None
    workspace = largest_context.WORKSPACE_BYTES
    assert workspace < offloaded["allocated_peak_bytes"] <= plain["allocated_peak_bytes"]


def test_what_the_planner_says_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny = Case("tiny", quantize="nf4", length=64, device="none")
    plans = [plan_accuracy.Plan(tiny), plan_accuracy.Plan(tiny, "full", "none")]
    plans[1] = replace(plans[1], case=replace(tiny, quantize="none"))
    monkeypatch.setattr(plan_accuracy, "plans", lambda *_: plans)
    asked = ["--predict", "--shapes", "tiny", "--out", str(tmp_path)]
    assert plan_accuracy.main(asked) == 0
    lora, full = rows_of(tmp_path, "plan_accuracy")
    assert set(gpu_rows.FIELDS) <= set(lora)
    assert lora["predicted"]
    assert lora["settings"]["strategy"] == "lora"
    assert full["predicted_by_category"]["optimizer"] > lora["predicted_by_category"]["optimizer"]
    workspace = largest_context.WORKSPACE_BYTES
    for row in (lora, full):
        tensors = sum(row["predicted_by_category"].values())
        assert tensors + workspace <= row["predicted_allocated_bytes"]
        assert row["predicted_allocated_bytes"] < row["predicted_reserved_bytes"]
        assert row["within"] is None
    plan_accuracy.main(asked)
    assert len(rows_of(tmp_path, "plan_accuracy")) == 2, "what is there is not run again"


def test_real_steps_are_compared_with_what_was_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    case = Case("tiny", length=48, dtype="float32", device="cpu")
    plans = [plan_accuracy.Plan(case, name) for name in plan_accuracy.STRATEGIES]
    said = plan_accuracy.predict(plans[0])
    peaks = {"allocated_peak_bytes": round(said.allocated / 1.029),
             "reserved_peak_bytes": round(said.reserved / 1.079)}  # fmt: skip
    monkeypatch.setattr(plan_accuracy, "peaks", lambda device: dict(peaks))
    rows = gpu_rows.Rows(tmp_path, "plan_accuracy", "cpu")
    assert plan_accuracy.run(plans[:1], rows, real=True, until=float("inf")) == 0
    peaks["reserved_peak_bytes"] = round(said.reserved / 1.081)
    again = gpu_rows.Rows(tmp_path / "again", "plan_accuracy", "cpu")
    assert plan_accuracy.run(plans[:1], again, real=True, until=float("inf")) == 1
    good, bad = good_and_bad = rows.known[0], again.known[0]
    assert (good["within"], bad["within"]) == (True, False)
    assert good["allocated_error"] == pytest.approx(0.029, abs=1e-4)
    assert all(row["final_loss"] > 0 for row in good_and_bad)
    for plan in plans[1:]:  # every strategy takes real steps, and is predicted
        assert plan_accuracy.measure(plan).get("reason") is None
        assert plan_accuracy.predict(plan).allocated > 0
    broken = replace(plans[0], case=replace(case, optimizer="no such"))
    assert "KeyError" in plan_accuracy.measure(broken)["reason"]
    assert plan_accuracy.main(["--device", "cpu", "--out", str(tmp_path / "none")]) == 1
    assert "no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_the_planners_cases_and_rows_of_before():
    cases = plan_accuracy.plans("none")
    assert len({plan.name for plan in cases}) == len(cases)
    assert {plan.case.quantize for plan in cases} == {"none", "nf4"}
    assert {plan.strategy for plan in cases} == set(plan_accuracy.STRATEGIES)
    lines = plan_accuracy.PAST.read_text(encoding="utf-8").splitlines()
    past = [plan for line in lines if (plan := plan_accuracy.past_plan(json.loads(line)))]
    assert len(past) >= 5
    assert {plan.case.offload for plan in past} == {"none", "host"}


def test_a_random_model_is_the_same_each_time_and_on_its_device():
    case = Case("tiny", quantize="nf4", device="cpu")
    first, second = random_model(case), random_model(case)
    for (name, one), two in zip(first.named_parameters(), second.parameters(), strict=True):
        assert not one.is_meta, name
        assert torch.equal(one, two), name
    assert not any(buffer.is_meta for buffer in first.buffers())
    kinds = {type(module).__name__ for module in first.modules()}
    assert "Linear4bit" in kinds
    assert type(first.lm_head).__name__ == "Linear"


# --- checks


def test_the_checks_pass_here_and_one_that_fails_is_loud(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    where = ["--device", "cpu", "--out", str(tmp_path)]
    for word in ("nf4", "dropout", "state", "buffer", "lora,"):
        assert checks.main([*where, "--only", word]) == 0
    rows = rows_of(tmp_path, "checks")
    assert all(row["passed"] for row in rows)
    assert len(rows) > 15

    def wrong(update: Any, *_: Any) -> Any:
        return update[0] * 1.001, update[1]

    import qft.lean.lora_linear as lora_linear

    plain = lora_linear.update_backward
    monkeypatch.setattr(lora_linear, "update_backward", lambda *a: wrong(plain(*a)))
    assert checks.main([*where, "--only", "lora,", "float32"]) == 1
    assert "1 CHECKS FAILED" in capsys.readouterr().out
    assert rows_of(tmp_path, "checks")[-1]["passed"] is False


def test_one_call_runs_the_checks_first_and_nothing_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ran: list[list[str]] = []
    code = {"checks.py": 0}

    def run(command: list[str], **_: Any) -> Any:
        ran.append([Path(command[1]).name, *command[2:]])
        if command[1].endswith("peft_row.py"):
            raise subprocess.TimeoutExpired(command, 1)
        return subprocess.CompletedProcess(command, code.get(ran[-1][0], 0))

    monkeypatch.setattr(subprocess, "run", run)
    assert run_all.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    assert [order[0] for order in ran] == [script for script, _, _ in run_all.PARTS]
    assert ran[0][0] == "checks.py"
    assert all(("--limit-seconds" in order) == (order[0] in run_all.LIMITED) for order in ran)
    ran.clear()
    code["checks.py"] = 1
    assert run_all.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    assert len(ran) == 1
    ran.clear()
    assert run_all.main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "0"]) == 0
    assert not ran
