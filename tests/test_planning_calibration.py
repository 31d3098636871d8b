"""What no meter sees, what was measured, how fast: stores, error bars, rounding, arithmetic."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qft.errors import QftError, WillNotFitError
from qft.lean import alike, gated_mlp, label_loss, norms, tiled_mlp
from qft.lean.meter import Reading, Snapshot
from qft.lean.products import Product
from qft.planning import calibration as store
from qft.planning import cuda_allocator, probe, resident, row_shapes, speed, unseen
from qft.planning.amounts import PhaseBytes, StepWork
from qft.planning.calibration import Calibration, Kind, Rate, Residual
from qft.planning.fake_training import FakeTraining
from qft.planning.job import PlannedJob, imagined_inputs, planned_job
from qft.recipe import build_recipe

MIB = 1 << 20
HERE = Kind("a processor", "bfloat16", "none", "lora", "torch 2")
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 320,
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    "dtype": "bfloat16", "eos_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shape")
    (made / "config.json").write_text(json.dumps(CONFIG))
    return made


def job_of(folder: Path, device: str = "cpu", **changed: Any) -> PlannedJob:
    recipe = build_recipe({
        "model": str(folder), "task": "text", "data": {"train": "rows.jsonl"},
        "strategy": "lora", "dtype": "bfloat16", "output": "out",
        "memory": {"checkpointing": "none", "micro_batch": 2},
        "train": {"max_length": 32, "batch_size": 4}, **changed,
    })  # fmt: skip
    return planned_job(recipe, imagined_inputs(recipe, folder, rows=10), device)


@pytest.fixture(scope="module")
def job(folder: Path) -> PlannedJob:
    return job_of(folder)


@pytest.fixture
def empty(tmp_path: Path) -> Calibration:
    return Calibration(tmp_path / "calibration.json")


def train_phase(**categories: int) -> PhaseBytes:
    sizes = {"weights": 900 * MIB, "activations": 300 * MIB, "temporary": 100 * MIB}
    made = {**sizes, **categories}
    after = StepWork(made["activations"], 3 * made["activations"])
    return PhaseBytes("train", made, after=after)


# --- the store


def test_what_one_wrote_another_reads_and_nothing_is_lost(tmp_path: Path):
    path = tmp_path / "deep" / "calibration.json"
    first, second = Calibration(path), Calibration(path)
    first.record(HERE, "resident", 100, 110)
    second.record(HERE, "resident", 100, 120)  # opened before the first wrote
    second.record_rate(HERE, "training", 5e9)
    found = Calibration(path)
    assert [residual.measured for residual in found.residuals] == [110, 120]
    assert found.rates[0].flops_per_second == 5e9
    assert found.residuals[0].kind == HERE
    assert not found.notes
    assert sorted(p.name for p in path.parent.iterdir()) == [
        "calibration.json", "calibration.json.lock",
    ]  # fmt: skip


def test_several_processes_write_at_once(tmp_path: Path):
    path = tmp_path / "calibration.json"
    forked = multiprocessing.get_context("fork")

    def write(name: str) -> None:
        own = Calibration(path)
        for number in range(10):
            own.record(replace(HERE, strategy=name), "live", 100, 100 + number)
        os._exit(len(own.notes))

    running = [forked.Process(target=write, args=(name,)) for name in "abc"]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout=300)
    assert [process.exitcode for process in running] == [0, 0, 0]
    found = Calibration(path).residuals
    assert len(found) == 30
    for name in "abc":
        own = [r.measured for r in found if r.kind.strategy == name]
        assert own == list(range(100, 110))


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"format": 1}', '{"format": 2, "residuals": [], "rates": []}',
        '{"format": 1, "residuals": [{}], "rates": []}',
        '{"format": 1, "residuals": [], "rates": [3]}',
        '{"format": 1, "residuals": [{"kind": {"device": "d", "dtype": "t"}, "figure": "live", '
        '"predicted": 0, "measured": 5, "day": ""}], "rates": []}',
        '{"format": 1, "residuals": [], "rates": [{"kind": {"device": "d", "dtype": "t"}, '
        '"source": "training", "flops_per_second": NaN, "day": ""}]}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_broken_file_is_set_aside_with_a_note(tmp_path: Path, text: str):
    path = tmp_path / "calibration.json"
    path.write_text(text)
    found = Calibration(path)
    assert not found.residuals
    assert len(found.notes) == 1
    assert "calibration.json.broken" in found.notes[0]
    assert (tmp_path / "calibration.json.broken").read_text() == text
    found.record(HERE, "live", 10, 11)
    again = Calibration(path)
    assert len(again.residuals) == 1
    assert not again.notes


def test_a_file_that_cannot_be_written_costs_a_note_and_no_training(tmp_path: Path):
    (tmp_path / "taken").write_text("a file where a folder should be")
    found = Calibration(tmp_path / "taken" / "calibration.json")
    found.record(HERE, "live", 100, 130)
    found.record(HERE, "live", 100, 130)
    assert len(found.residuals) == 2, "it still counts in this process"
    assert found.predict(100, HERE, "live").expected == 130
    assert len(found.notes) in (1, 2)
    assert any("not kept" in note for note in found.notes)


def test_where_the_store_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("QFT_CALIBRATION", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.default_path() == tmp_path / "qft" / "calibration.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert store.default_path() == tmp_path / "home" / ".cache" / "qft" / "calibration.json"
    monkeypatch.setenv("QFT_CALIBRATION", str(tmp_path / "mine.json"))
    assert Calibration().path == tmp_path / "mine.json"
    assert Calibration(tmp_path / "other.json").path == tmp_path / "other.json"


def test_the_store_stays_small(empty: Calibration, monkeypatch: pytest.MonkeyPatch):
    for number in range(store.MOST_OF_A_KEY + 4):
        empty.record(HERE, "live", 100, 100 + number)
    empty.record(HERE, "resident", 100, 7)
    mine = [r.measured for r in empty.residuals if r.figure == "live"]
    assert mine == list(range(104, 100 + store.MOST_OF_A_KEY + 4)), "the oldest went"
    assert len(empty.residuals) == store.MOST_OF_A_KEY + 1
    monkeypatch.setattr(store, "MOST", 5)
    empty.record(replace(HERE, strategy="full"), "live", 1, 2)
    assert len(empty.residuals) == 5
    assert empty.residuals[-1].kind.strategy == "full"


def test_what_is_no_measurement_is_not_kept(empty: Calibration):
    empty.record(HERE, "live", 0, 5)
    empty.record(HERE, "live", 5, 0)
    empty.record_rate(HERE, "training", float("nan"))
    assert not empty.residuals
    assert not empty.rates
    assert not empty.path.exists()


# --- expectations


@pytest.fixture
def shares_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars without their part in bytes, so that a test's small numbers will do."""
    monkeypatch.setattr(store, "LEAST_BAR", {})


def test_a_small_process_is_no_surer_than_its_libraries(empty: Calibration):
    least = store.LEAST_BAR["resident"]
    found = empty.predict(20 * MIB, HERE, "resident")
    assert found.high - found.expected == 2 * MIB + least
    for _ in range(16):
        empty.record(HERE, "resident", 20 * MIB, 20 * MIB)
    sure = empty.predict(20 * MIB, HERE, "resident")
    assert sure.high - sure.expected == pytest.approx(store.LEFT * (2 * MIB + least), rel=0.01)
    assert empty.predict(20 * MIB, HERE, "live").high < 21 * MIB


@pytest.mark.usefixtures("shares_alone")
def test_an_error_bar_falls_back_from_the_kind_to_the_device(empty: Calibration):
    def found(kind: Kind) -> store.Expected:
        return empty.predict(1000, kind, "resident")

    nothing = found(HERE)
    assert (nothing.low, nothing.expected, nothing.high) == (900, 1000, 1100)
    empty.record(replace(HERE, dtype="float32"), "resident", 1000, 1300)
    by_device = found(HERE)
    assert by_device.expected == 1300
    empty.record(replace(HERE, strategy="full"), "resident", 1000, 1200)
    by_dtype = found(HERE)
    assert by_dtype.expected == 1200
    empty.record(HERE, "resident", 1000, 1100)
    own = found(HERE)
    assert own.expected == 1100
    widths = [each.high - each.low for each in (own, by_dtype, by_device)]
    assert widths == sorted(widths)
    assert widths[0] < nothing.high - nothing.low < widths[2]
    assert found(replace(HERE, device="another")) == nothing
    assert empty.predict(1000, HERE, "live").expected == 1000, "another figure is another residual"
    assert [each.basis.split(" ", 1)[1] for each in (own, by_dtype, by_device)] == [
        "measurement of this kind", "measurement on this device in this dtype",
        "measurement on this device",
    ]  # fmt: skip


def test_other_versions_are_another_kind(empty: Calibration):
    empty.record(replace(HERE, versions="torch 1"), "resident", 1000, 1500)
    assert "dtype" in empty.predict(1000, HERE, "resident").basis


@pytest.mark.usefixtures("shares_alone")
def test_a_smaller_job_has_its_share_and_a_larger_one_no_more(empty: Calibration):
    empty.record(HERE, "resident", 1000, 1400)
    assert empty.predict(500, HERE, "resident").expected == 700
    assert empty.predict(4000, HERE, "resident").expected == 4400
    near, far = (empty.predict(n, HERE, "resident") for n in (1000, 4000))
    assert (far.high - far.low) / 4000 > (near.high - near.low) / 1000


@pytest.mark.usefixtures("shares_alone")
def test_a_bar_is_narrow_where_measurements_agree_and_wide_where_not(empty: Calibration):
    scattered = replace(HERE, strategy="full")
    for number in range(9):
        empty.record(HERE, "resident", 1000, 1100 + number % 2)
        empty.record(scattered, "resident", 1000, 900 + 50 * number)
    agreed = empty.predict(1000, HERE, "resident")
    doubtful = empty.predict(1000, scattered, "resident")
    assert agreed.expected in (1100, 1101)
    assert doubtful.expected == 1100
    assert doubtful.high - doubtful.low > 3 * (agreed.high - agreed.low)
    assert doubtful.low <= 1000 < 1200 <= doubtful.high


def test_one_that_is_far_off_does_not_lead(empty: Calibration):
    for measured in (1100, 1101, 1102, 9000):
        empty.record(HERE, "resident", 1000, measured)
    assert empty.predict(1000, HERE, "resident").expected in (1101, 1102)


# --- what the meter cannot see


def test_unseen_bytes_grow_with_what_comes_and_goes(job: PlannedJob, empty: Calibration):
    small, large = (
        unseen.with_unseen(train_phase(activations=n * MIB), job, empty) for n in (100, 900)
    )
    assert set(small.device) >= {"allocator", "context"}
    assert small.device["allocator"] <= large.device["allocator"]
    assert small.device["context"] == large.device["context"] > 0
    assert small.peak_bytes < large.peak_bytes
    assert unseen.metered_bytes(small) == 1100 * MIB


def test_asking_twice_adds_nothing(job: PlannedJob, empty: Calibration):
    once = unseen.with_unseen(train_phase(), job, empty)
    assert unseen.with_unseen(once, job, empty) == once
    empty.record(Kind.of(job), "resident", 1000 * MIB, 1500 * MIB)
    shifted = unseen.with_unseen(once, job, empty)
    assert shifted.peak_bytes > once.peak_bytes
    assert unseen.with_unseen(shifted, job, empty) == shifted
    assert shifted.peak_bytes == unseen.expected(once, job, empty).expected


def test_a_recorded_step_is_what_the_next_plan_expects(job: PlannedJob, empty: Calibration):
    for measured in (2000 * MIB, 1310 * MIB):  # the second is below what the model adds
        kept = Calibration(empty.path.with_name(f"{measured}.json"))
        told = unseen.with_unseen(train_phase(), job, kept)
        unseen.record_step(job, told, 1301 * MIB, measured, kept)
        unseen.record_step(job, unseen.with_unseen(train_phase(), job, kept), None, measured, kept)
        again = unseen.with_unseen(train_phase(), job, kept)
        assert again.peak_bytes == measured
        assert min(again.device.values()) >= 0
        assert [r.figure for r in kept.residuals] == ["live", "resident", "resident"]
        assert kept.residuals[1].predicted == kept.residuals[2].predicted
        live = kept.residuals[0]
        assert (live.predicted, live.measured) == (1300 * MIB, 1301 * MIB)


def test_other_phases_are_not_shifted_by_a_trainings_residuals(job: PlannedJob, empty: Calibration):
    loading = PhaseBytes("load", {"weights": 900 * MIB})
    before = unseen.with_unseen(loading, job, empty)
    empty.record(Kind.of(job), "resident", 1000 * MIB, 3000 * MIB)
    assert unseen.with_unseen(loading, job, empty) == before


def test_on_a_gpu_allocated_reserved_and_the_context(folder: Path, empty: Calibration):
    job = job_of(folder, "cuda")
    phase = unseen.with_unseen(train_phase(), job, empty)
    allocated, reserved = unseen.allocated_bytes(phase), unseen.reserved_bytes(phase)
    assert 1300 * MIB < allocated < reserved < phase.peak_bytes
    assert phase.peak_bytes - reserved == cuda_allocator.CONTEXT_BYTES
    unseen.record_step(job, phase, allocated + 5, reserved + 50 * MIB, empty)
    figures = {r.figure: r for r in empty.residuals}
    assert set(figures) == {"allocated", "reserved"}
    assert figures["allocated"].absolute == 5
    again = unseen.with_unseen(train_phase(), job, empty)
    assert unseen.reserved_bytes(again) == reserved + 50 * MIB
    assert again.device["context"] == phase.device["context"]


# --- the allocator's rounding, against a small simulation


class SimulatedAllocator:
    """PyTorch's caching allocator by its rules, block by block, with freeing."""

    def __init__(self) -> None:
        self.segments: list[list[list[Any]]] = []  # of [size, taken] each
        self.kinds: list[bool] = []
        self.reserved = self.allocated = 0

    def take(self, nbytes: int) -> int:
        size = -(-nbytes // 512) * 512
        small = size <= 2**20
        best: tuple[int, int, int] | None = None
        for number, blocks in enumerate(self.segments):
            for place, (block, taken) in enumerate(blocks):
                if not taken and block >= size and self.kinds[number] == small:
                    best = min(best or (block, number, place), (block, number, place))
        if best is None:
            whole = 2 * 2**20 if small else 20 * 2**20 if size < 10 * 2**20 else size
            whole = -(-whole // 2**21) * 2**21
            self.segments.append([[whole, False]])
            self.kinds.append(small)
            self.reserved += whole
            best = (whole, len(self.segments) - 1, 0)
        block, number, place = best
        rest = block - size
        if rest >= 512 if small else rest > 2**20:
            self.segments[number][place : place + 1] = [[size, True], [rest, False]]
        else:
            size = block
            self.segments[number][place][1] = True
        self.allocated += size
        return self.reserved


@pytest.mark.parametrize("seed", range(6))
def test_what_is_reserved_for_tensors_that_stay(seed: int):
    generator = torch.Generator().manual_seed(seed)
    powers = torch.rand(200, generator=generator) * (24 if seed % 2 else 18)
    sizes = [int(2 ** float(power)) for power in powers]
    simulated = SimulatedAllocator()
    for size in sizes:
        simulated.take(size)
    assert cuda_allocator.reserved_by(sizes) == simulated.reserved
    assert simulated.reserved >= sum(cuda_allocator.rounded_bytes(size) for size in sizes)


@pytest.mark.parametrize(
    ("nbytes", "rounded", "segment"),
    [
        (0, 0, 0), (1, 512, 2 * MIB), (512, 512, 2 * MIB), (513, 1024, 2 * MIB),
        (MIB, MIB, 2 * MIB), (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 11 * MIB, 12 * MIB),
    ],
)  # fmt: skip
def test_rounding_and_segments(nbytes: int, rounded: int, segment: int):
    assert cuda_allocator.rounded_bytes(nbytes) == rounded
    assert cuda_allocator.segment_bytes(nbytes) == segment


# --- speed


def reading_of(flops: int) -> Reading:
    snapshot = Snapshot("forward", {})
    return Reading(snapshot, snapshot, {}, {}, 0, {"forward": flops, "backward": 2 * flops}, 0)


def test_seconds_are_operations_over_a_rate(job: PlannedJob, empty: Calibration):
    kind = Kind.of(job)
    plain = Kind(kind.device, kind.dtype, versions=kind.versions)
    empty.record_rate(plain, "products", 1e9)
    reading = reading_of(10**6)
    # 4 examples of 32 tokens a step, and the reading is of two micro-batches of 2
    assert speed.flops_a_step(job, reading) == 3e6
    seconds, basis = speed.seconds_a_step(job, reading, empty)  # type: ignore[misc]
    assert seconds == pytest.approx(3e6 / (1e9 * speed.EFFICIENCY["cpu"][2]))
    assert "estimated" in basis
    for rate in (2e8, 3e8, 9e8):
        empty.record_rate(kind, "training", rate)
    seconds, basis = speed.seconds_a_step(job, reading, empty)  # type: ignore[misc]
    assert seconds == pytest.approx(3e6 / 3e8)
    assert basis == "measured here: 3 trainings"
    found = speed.speed_of(job, reading, empty)
    assert found is not None
    assert found.tokens_per_second == pytest.approx(4 * 32 / seconds)
    assert found.supervised_per_second == pytest.approx(4 * 32 / seconds)
    assert found.seconds_an_epoch == pytest.approx(seconds * 10 / 4)


def test_no_time_at_all_for_a_device_that_is_not_here(
    folder: Path, empty: Calibration, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job = job_of(folder, "cuda")
    reading = reading_of(10**6)
    assert speed.seconds_a_step(job, reading, empty) is None
    assert speed.speed_of(job, reading, empty) is None
    empty.record_rate(Kind.of(job_of(folder)), "training", 1e9)
    assert speed.seconds_a_step(job, reading, empty) is None, "a processor's rate is no GPU's"
    empty.record_rate(Kind.of(job), "training", 1e12)
    assert speed.seconds_a_step(job, reading, empty) is not None


def test_products_are_measured_once(job: PlannedJob, empty: Calibration):
    kind = Kind.of(job)
    calls: list[float] = []

    def clock() -> float:
        calls.append(len(calls) * 0.001)
        return calls[-1]

    rate = speed.measure_products("cpu", torch.float32, clock)
    best = max(2 * rows * inner * columns for rows, inner, columns in speed.SIZES)
    assert rate == pytest.approx(best / 0.001)
    empty.record_rate(Kind(kind.device, kind.dtype, versions=kind.versions), "products", rate)
    assert speed.products_rate(kind, "cpu", torch.bfloat16, empty) == rate
    assert Rate in {type(each) for each in empty.rates}


def test_a_rate_of_another_dtype_is_no_rate(empty: Calibration):
    empty.record_rate(HERE, "training", 1e9)
    assert empty.rate(replace(HERE, strategy="full"), "training") == (1e9, 1)
    assert empty.rate(replace(HERE, dtype="float32"), "training") is None
    assert empty.rate(HERE, "products") is None


# --- the probe


def test_a_probe_without_weights_takes_few_layers_of_random_ones(folder: Path, empty: Calibration):
    job = job_of(folder)
    readings: list[Reading] = []

    def predict(probed: PlannedJob) -> PhaseBytes:
        readings.append(FakeTraining(probed).meter())
        after = StepWork.of(readings[0])
        return PhaseBytes("train", readings[0].peak.by_category, after=after)

    found = probe.probe(job, predict)
    assert found.random_weights
    layers = found.probed.ready.skeleton.config.num_hidden_layers  # type: ignore[union-attr]
    assert layers == probe.FEW_LAYERS < CONFIG["num_hidden_layers"]
    reading, measured = readings[0], found.measured
    assert measured.live_bytes == pytest.approx(reading.peak_bytes, rel=0.05)
    assert measured.flops == sum(reading.flops.values())
    assert measured.seconds > 0
    assert measured.resident_bytes is not None
    assert measured.resident_bytes > measured.live_bytes
    phase = found.predicted
    unseen.record_step(found.probed, phase, measured.live_bytes, measured.resident_bytes, empty)
    again = unseen.expected(phase, found.probed, empty)
    assert again.expected == measured.resident_bytes


def test_a_probe_says_why_it_failed(job: PlannedJob, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "has_weights", lambda folder: True)  # and there are none
    with pytest.raises(QftError, match="The probe did not finish") as caught:
        probe.probe(job, lambda _: PhaseBytes("train"))
    assert caught.value.found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(QftError, match="no CUDA device"):
        probe.probe(replace(job, device="cuda"), lambda _: PhaseBytes("train"))


def test_layers_that_do_not_fit_are_not_made(job: PlannedJob, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe.hardware, "free_memory_bytes", lambda device: 1000)
    with pytest.raises(WillNotFitError), probe.shallow_job(job):
        pass


def test_a_gauge_counts_from_its_beginning():
    gauge = probe.Gauge("cpu")
    before = gauge.peak_bytes()
    held = torch.ones(64 * MIB // 4)
    after = gauge.peak_bytes()
    assert before is not None
    assert after is not None
    assert after - before == pytest.approx(held.nbytes, rel=0.2)
    del held
    assert gauge.peak_bytes() == pytest.approx(after, rel=0.2)


def test_a_residual_in_bytes_and_as_a_share():
    residual = Residual(HERE, "live", 200, 250)
    assert (residual.absolute, residual.relative) == (50, 0.25)
    assert (residual.at(100), residual.at(400)) == (25, 50)


def test_a_process_has_more_than_its_tensors():
    half = resident.Work(half=True)
    loaded = resident.resident_unseen(half, 0)
    assert (loaded.once, loaded.kept) == (resident.LOADED_BYTES, 0)
    step = StepWork(kept_bytes=100 * MIB, made_bytes=1000 * MIB)
    some = resident.resident_unseen(replace(half, step=step), 0)
    assert some.once == resident.ONCE_BYTES
    more = resident.resident_unseen(replace(half, step=replace(step, kept_bytes=200 * MIB)), 0)
    again = resident.resident_unseen(replace(half, step=replace(step, made_bytes=2000 * MIB)), 0)
    assert 0 < some.kept < min(more.kept, again.kept)
    many = replace(half, step=step, kernels=40)
    kernels = resident.resident_unseen(many, 0).once - some.once
    assert kernels == 40 * resident.KERNEL_BYTES
    assert resident.resident_unseen(replace(many, half=False), 0).once == some.once
    most = [resident.resident_unseen(replace(many, kernels=n), 0).once for n in (1024, 10**6)]
    assert most[0] == most[1]
    unread = resident.resident_unseen(replace(many, unread_bytes=3 * MIB), 0)
    assert unread.once == some.once + kernels - 3 * MIB
    large = replace(half, step=replace(step, apart_bytes=700 * MIB))
    assert resident.resident_unseen(large, 100 * MIB).kept == 600 * MIB
    assert resident.resident_unseen(large, 690 * MIB) == some


def of_lengths(folder: Path, lengths: Sequence[int], **changed: Any) -> PlannedJob:
    """A job whose rows are so long."""
    made = job_of(folder, **changed)
    train = made.inputs.train
    rows = [
        replace(example, index=number, inputs={k: v[:length] for k, v in example.inputs.items()})
        for number, (example, length) in enumerate(
            zip(itertools.cycle(train.examples), lengths, strict=False)
        )
    ]
    return replace(made, inputs=replace(made.inputs, train=replace(train, examples=rows)))


def test_rows_of_many_lengths_are_many_shapes_of_products(folder: Path):
    train = {"max_length": 300, "batch_size": 4, "epochs": 1}
    alike = of_lengths(folder, [300] * 8, train=train)
    assert alike.flat
    run = row_shapes.shapes_of_run(alike)
    assert (run.count, run.lengths) == (1, {300})
    assert (run.tiles, run.fake_tiles) == (3, 2)
    ragged = of_lengths(folder, range(200, 232), train=train)
    run = row_shapes.shapes_of_run(ragged)
    assert 8 < run.count <= 16  # two rows a pass; some sums are equal
    assert run.lengths == set(range(200, 232))
    assert run.tiles == 1 + 32  # the whole tile is one and the same
    longer = of_lengths(folder, range(200, 232), train={**train, "epochs": 3})
    assert row_shapes.shapes_of_run(longer).count > run.count
    few = of_lengths(folder, range(200, 232), train={**train, "max_steps": 1})
    assert row_shapes.shapes_of_run(few).count <= 2
    step = row_shapes.shapes_of_step(ragged)
    assert step.widths == ({(1, 231 + 230), (1, 229 + 228)},)


def test_what_runs_meets_the_shapes_that_were_foretold(folder: Path):
    """Every product of a whole training, on fakes, against the longest step's and its rows."""
    train = {"max_length": 300, "batch_size": 4, "max_steps": 2}
    job = of_lengths(folder, [290, 150, 280, 160, 270, 90, 260, 290], train=train)
    training = FakeTraining(job)
    step = StepWork.of(training.meter())
    foretold = unseen.work_of(job, step).kernels
    met: set[Product] = set()
    for examples in row_shapes.steps_of(job):
        met |= training.meter(examples).products
    # attention's fakes leave whole tiles out, which are few kinds
    assert foretold == pytest.approx(len(met), rel=0.1)
    assert unseen.work_of(job, step, row_shapes.shapes_of_step(job)).kernels < foretold


def test_the_work_of_a_job(folder: Path):
    assert unseen.work_of(job_of(folder), None) == resident.Work(half=True)
    step = StepWork(linear=30, attention=7)
    found = unseen.work_of(job_of(folder), step)
    assert found == resident.Work(half=True, step=step, kernels=37)
    other = unseen.work_of(job_of(folder, dtype="float32"), step)
    assert other == resident.Work(half=False, step=step)


# the second has no slope of its own
@pytest.mark.parametrize("activation", ["silu", pytest.param("relu2", marks=pytest.mark.slow)])
def test_few_tiles_stand_for_all(
    folder: Path, tmp_path: Path, activation: str, monkeypatch: pytest.MonkeyPatch
):
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "hidden_act": activation}))
    memory = {"checkpointing": "full", "micro_batch": 1, "savers": {"tiled_mlp": True}}
    train = {"max_length": 1100, "batch_size": 1}

    def reading() -> Reading:
        return FakeTraining(job_of(tmp_path, memory=memory, train=train)).meter()

    for module in (gated_mlp, norms):
        monkeypatch.setattr(module, "PIECE", 2**14)
    few = reading()
    runs: list[slice] = []

    def all_of_them(tensor: Tensor, size: int) -> Iterator[slice]:
        for start in range(0, tensor.shape[0], size):
            runs.append(slice(start, start + size))
            yield runs[-1]

    for module in (gated_mlp, label_loss, norms, tiled_mlp):
        monkeypatch.setattr(module, "tiles", all_of_them)
    every = reading()
    assert len(runs) > 40
    assert few == every


def test_tiles_of_real_tensors_are_all_there():
    real = torch.zeros(1000, 2)
    assert list(alike.tiles(real, 300)) == [
        slice(0, 300), slice(300, 600), slice(600, 900), slice(900, 1000)
    ]  # fmt: skip
    assert list(alike.tiles(real[:0], 300)) == []
    with FakeTensorMode():
        fake = torch.zeros(1000, 2)
    seen = [(part, alike.times()) for part in alike.tiles(fake, 300)]
    assert seen == [(slice(0, 300), 1), (slice(300, 600), 2), (slice(900, 1000), 1)]
    assert alike.times() == 1
    assert len(list(alike.tiles(fake, 400))) == 3
    for _ in alike.tiles(fake, 10):  # one that is left in the middle
        break
    assert alike.times() == 1
