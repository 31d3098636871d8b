"""`train`: from a recipe to a run folder (`qft.run_folder` says what it holds)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, set_seed

from qft import hardware, models
from qft.card import make_card, write_card
from qft.data.packing import PACKABLE
from qft.data.tasks import ExampleSet, pad_id
from qft.distillation.cached import CachedTeacher
from qft.distillation.distilled_loss import DistilledLoss
from qft.distillation.own_texts import WRITTEN_AT_ONCE, OwnTexts
from qft.distillation.supply import live_source, settings_in, teacher_layers
from qft.distillation.teach import TeacherCache
from qft.distillation.teacher_texts import with_teacher_texts
from qft.enforcement import Limit
from qft.errors import Interrupted, RecipeError, WillNotFitError, first_line
from qft.evaluation import evaluate
from qft.features import Features, cache_features
from qft.files import new_folder, require_apart, write_json
from qft.fitting import Fitting
from qft.inputs import Inputs, open_inputs, require_no_chain, require_possible
from qft.lean.engine import Savers
from qft.lean.model_parts import device_of
from qft.lean.noise import install_noise
from qft.micro_batch import MicroBatch
from qft.out_of_memory import Shortage, is_out_of_memory
from qft.packing_check import keeps_apart, require_exact_packing
from qft.phase_peaks import PhasePeaks
from qft.planning.job import first_micro_batch
from qft.planning.run import RunPlan
from qft.preparation import prepare, prepared
from qft.progress import QUIET, Reporter, human_bytes
from qft.readiness import make_ready
from qft.recipe import Recipe
from qft.registry import settings_of
from qft.report.page import write_report
from qft.report.samples import write_samples
from qft.run_folder import create_run_folder, find_start, require_same_start
from qft.run_watch import RunWatch, interruptible
from qft.step import Layout, StepLoss
from qft.task_loss import TaskLoss, balanced_weights
from qft.trainer import Job, StepTrainer, resume_command, usual_changes

EVALUATED_AT_ONCE = 8  # rows; fewer where memory runs out


@dataclass(frozen=True)
class RunResult:
    """What a finished training hands back.

    Attributes:
        folder: the run folder.
        metrics: of the held-out rows after training; empty without any.
        report: what run.json holds.
        model: the trained model, still in memory, in eval mode.
    """

    folder: Path
    metrics: dict[str, float]
    report: dict[str, Any]
    model: nn.Module


@dataclass
class _Opened:
    """A recipe's model and data, ready to train."""

    model: nn.Module
    inputs: Inputs
    card: dict[str, Any]
    parameters: int  # of the base, heads included
    layout: Layout
    features: Features | None
    loss: StepLoss
    lessons: CachedTeacher | None
    fitting: Fitting
    limit: Limit
    plan: RunPlan

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of the model, as the engine prepared it."""
        state = prepared(self.model)
        return state.notes if state is not None else ()


def train(
    recipe: Recipe,
    *,
    resume: bool | str = False,
    overwrite: bool = False,
    reporter: Reporter = QUIET,
    callbacks: Sequence[TrainerCallback] = (),
) -> RunResult:
    """Trains what the recipe says.

    Args:
        recipe: from :func:`qft.load_recipe` or :func:`qft.build_recipe`.
        resume: go on from the newest complete checkpoint, or from the one named.
        overwrite: replace a former run in the output folder.
        reporter: where progress goes.
        callbacks: transformers' own kind; called like a Trainer's.

    Raises:
        QftError: see :mod:`qft.errors`; the run folder keeps its checkpoints.
    """
    folder = Path(recipe.output)
    _require_one_process()
    require_possible(recipe)
    require_no_chain(recipe)
    local = [Path(p) for p in (recipe.model, recipe.data.train, recipe.data.eval) if p]
    require_apart(folder, *(path for path in local if path.exists()))
    start = find_start(folder, recipe, resume, overwrite, reporter)
    set_seed(recipe.train.seed)
    hardware_choice = hardware.choose(recipe.device, recipe.dtype)
    reporter.say(f"device: {hardware_choice.reason}")
    limit = Limit(recipe.memory.budget, hardware_choice.device)
    with limit.enforced():
        return _train(recipe, hardware_choice, limit, folder, start, resume, reporter, callbacks)


def _train(
    recipe: Recipe,
    chosen: hardware.Hardware,
    limit: Limit,
    folder: Path,
    start: Path | None,
    resume: bool | str,
    reporter: Reporter,
    callbacks: Sequence[TrainerCallback],
) -> RunResult:
    opened = _open(recipe, chosen, reporter, limit)
    identity = {
        "data": opened.inputs.train.fingerprint,
        "base": opened.card["base_fingerprint"],
        "dtype": opened.card["dtype"],
    }
    if resume:
        require_same_start(folder, identity)
    else:  # only now: bad data or a bad model must not cost a former run
        create_run_folder(folder, recipe, identity)
    write_samples(folder, opened.inputs, opened.notes)
    trainer = _make_trainer(recipe, opened, folder, reporter, callbacks)
    limit.peaks.enter("train")
    report = _run(trainer, limit.peaks, start, folder, reporter)
    limit.peaks.enter(None)
    return _finish(recipe, opened, trainer, report, folder, reporter)


def _require_one_process() -> None:
    """Several would write the same run folder."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise RecipeError(
            "A training from a recipe runs in one process.",
            found=f"WORLD_SIZE={os.environ['WORLD_SIZE']}, as accelerate launch and torchrun say",
            fix="start qft without them; docs/engine.md shows several processes in a loop of one's "
            "own",
        )


def _open(
    recipe: Recipe,
    chosen: hardware.Hardware,
    reporter: Reporter,
    limit: Limit | None = None,
) -> _Opened:
    limit = limit or Limit(None, chosen.device)
    inputs = with_teacher_texts(recipe, open_inputs(recipe, reporter), reporter)
    ready = make_ready(recipe, inputs)
    plan = RunPlan(recipe, inputs, ready, chosen.device, limit.budget_bytes, reporter)
    plan.require_loadable(hardware.free_memory_bytes(chosen.device))
    limit.peaks.rebase()
    limit.peaks.enter("load")
    base, skeleton, held = inputs.base, ready.skeleton, ready.held
    lessons = _cached_lessons(recipe, inputs, reporter)  # while the teacher has the memory alone
    if not recipe.strategy.mergeable:
        reporter.say(f"note: {recipe.strategy.name} cannot be merged; {recipe.strategy.advice}")
    started = time.monotonic()
    model = models.open_model(base, ready.spec, keep=ready.needs.full_precision)
    reporter.say(
        f"model: {sum(p.numel() for p in skeleton.parameters()) / 1e6:.1f} M parameters, "
        f"{held if held != 'none' else str(chosen.dtype)[6:]}, "
        f"loaded in {time.monotonic() - started:.1f} s"
    )
    model = prepare(
        model,
        recipe.strategy,
        checkpointing=recipe.memory.checkpointing,
        offload=recipe.memory.offload,
        savers=Savers(**recipe.memory.savers.model_dump()),
        context=ready.context,
    )
    layout = _layout(recipe, model, inputs, ready.needs.extends_sequence)
    if recipe.train.embedding_noise:
        _install_noise(model, recipe.train.embedding_noise)
    _say_trainable(model, reporter, chosen=recipe.memory.checkpointing != "auto")
    card = _card(recipe, base, inputs.train, skeleton, chosen)
    parameters = sum(p.numel() for p in skeleton.parameters())
    features = cache_features(recipe, model, inputs, ready.needs, reporter)
    loss = _loss(recipe, model, inputs, lessons, reporter)
    micro_batch = MicroBatch(
        first_micro_batch(recipe, features is not None and features.pooled),
        padded=not layout.flat,
    )
    fitting = Fitting(
        recipe, model, inputs, layout, loss, micro_batch, limit.tensor_bytes, reporter,
        lambda: plan.suggestions() or usual_changes(),
    )  # fmt: skip
    fitting.decide()
    with limit.peaks.aside():  # what planning leaves behind is no part of the run
        plan.predict(model, fitting.rows_at_most)
    return _Opened(
        model, inputs, card, parameters, layout, features, loss, lessons, fitting, limit, plan
    )


def _layout(recipe: Recipe, model: nn.Module, inputs: Inputs, extends_sequence: bool) -> Layout:
    """How a step's examples are put into rows: without padding where this model can do so."""
    examples, pad = inputs.train.examples, pad_id(inputs.tokenizer)
    state = prepared(model)
    assert state is not None
    if recipe.train.packing:
        require_exact_packing(model, examples, pad)
    can = recipe.task in PACKABLE and state.engine.flat and not extends_sequence
    return Layout(
        pack_to=recipe.train.max_length if recipe.train.packing else None,
        grouped=recipe.train.group_by_length,
        flat=can and keeps_apart(model, examples, pad),
    )


def _install_noise(model: Any, alpha: float) -> None:
    state = prepared(model)
    assert state is not None
    install_noise(model.get_input_embeddings(), state.clock, alpha)


def _say_trainable(model: nn.Module, reporter: Reporter, chosen: bool) -> None:
    trained = _count_trained(model)
    state = prepared(model)
    assert state is not None
    reporter.say(
        f"trains: {trained:,} parameters"
        + (", activations are recomputed" if state.checkpointing and chosen else "")
    )
    for note in state.notes:
        reporter.say(f"note: {note}")


def _count_trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _card(
    recipe: Recipe,
    base: Path,
    training: ExampleSet,
    skeleton: nn.Module,
    chosen: hardware.Hardware,
) -> dict[str, Any]:
    local = Path(recipe.model).expanduser()
    config: Any = skeleton.config
    stored = models.read_config(base)
    return make_card(
        base=str(local.resolve()) if local.is_dir() else recipe.model,
        base_fingerprint=models.fingerprint(base),
        original_fingerprint=models.original_fingerprint(stored),
        task=recipe.task,
        labels=training.labels,
        labels_are=training.labels_are,
        pooling=getattr(config, "qft_pooling", "auto"),
        quantize=models.held_as(stored, recipe.quantize),
        dtype=str(chosen.dtype).removeprefix("torch."),
        strategy=settings_of(recipe.strategy.handed_over),
        max_length=recipe.train.max_length,
    )


def _make_trainer(
    recipe: Recipe,
    opened: _Opened,
    folder: Path,
    reporter: Reporter,
    callbacks: Sequence[TrainerCallback] = (),
) -> StepTrainer:
    pad = pad_id(opened.inputs.tokenizer)
    held_out = opened.inputs.held_out
    at_once = MicroBatch(EVALUATED_AT_ONCE, told=lambda what: reporter.say(f"evaluation: {what}"))

    def held_out_metrics(model: nn.Module) -> dict[str, float]:
        assert held_out is not None
        features = opened.features
        cached = features.of_held_out() if features else contextlib.nullcontext()
        phase = opened.limit.peaks.phase("evaluate")
        with cached, phase, reporter.bar("evaluate", len(held_out.examples)) as bar:
            return evaluate(
                model,
                held_out.examples,
                opened.inputs.task,
                pad_token_id=pad,
                micro_batch=at_once,
                labels=held_out.labels,
                progress=bar.advance,
            )

    job = Job(
        strategy=recipe.strategy,
        task=opened.inputs.task,
        examples=opened.inputs.train.examples,
        settings=recipe.train,
        micro_batch=replace(opened.fitting.micro_batch, relieve=opened.fitting.recompute_all),
        pad_token_id=pad,
        folder=folder / "checkpoints",
        evaluate=held_out_metrics if held_out is not None else None,
        card=opened.card,
        loss=opened.loss,
        layout=opened.layout,
        reporter=reporter,
        longest=opened.fitting.longest(),
        limit=opened.limit,
        suggest=opened.fitting.suggest,
    )
    return StepTrainer(opened.model, job, list(callbacks))


def _cached_lessons(recipe: Recipe, inputs: Inputs, reporter: Reporter) -> CachedTeacher | None:
    """What a teacher says, where the recipe has it kept; it is asked now if it was not before."""
    settings = settings_in(recipe)
    if settings is None or not settings.has_lessons or not settings.caches:
        return None
    return TeacherCache(recipe, settings, inputs, reporter).ready()


def _loss(
    recipe: Recipe,
    model: nn.Module,
    inputs: Inputs,
    lessons: CachedTeacher | None,
    reporter: Reporter,
) -> StepLoss:
    """What is minimised; a teacher that must be in memory is loaded here."""
    own = _task_loss(recipe, inputs.train)
    settings = settings_in(recipe)
    if settings is None or not settings.has_lessons:
        return own
    pairs = teacher_layers(recipe, settings, inputs)
    source = lessons or live_source(recipe, settings, inputs, reporter, list(pairs.values()))
    own_texts = None
    if settings.on_policy:
        train = recipe.train
        own_texts = OwnTexts(
            settings,
            inputs.tokenizer,
            train.max_length,
            train.seed,
            MicroBatch(WRITTEN_AT_ONCE, told=lambda what: reporter.say(f"own texts: {what}")),
        )
    return DistilledLoss(
        own, settings, source, inputs.task, model, pairs, inputs.train.labels_are, own_texts
    )


def _task_loss(recipe: Recipe, training: ExampleSet) -> TaskLoss:
    train = recipe.train
    weights = None
    if train.class_weights == "balanced" and training.labels is not None:
        weights = balanced_weights(training.examples, len(training.labels))
    return TaskLoss(train.label_smoothing, weights)


def _run(
    trainer: StepTrainer, peaks: PhasePeaks, start: Path | None, folder: Path, reporter: Reporter
) -> dict[str, Any]:
    """Runs the loop under a progress bar; Ctrl-C ends the step, saves, and says how to go on."""
    device = device_of(trainer.trained).type
    watcher = RunWatch(trainer, folder / "metrics.jsonl", device, reporter, peaks)
    trainer.add_callback(watcher)
    before = _begin_measuring(device)
    try:
        with interruptible(watcher), out_of_memory_explained(folder):
            result = trainer.train(resume_from_checkpoint=str(start) if start else None)
    finally:
        watcher.close()
    if watcher.stop_asked:
        raise Interrupted(
            f"Stopped after step {trainer.state.global_step}; a checkpoint is saved.",
            where=folder,
            fix=resume_command(folder),
        )
    return {
        "steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        "train_seconds": watcher.seconds,
        "train_cpu_seconds": watcher.cpu_seconds,
        "tokens": watcher.tokens,
        "tokens_per_second": watcher.tokens / max(watcher.seconds, 1e-9),
        "supervised_items": watcher.items,
        "micro_batch": trainer.micro_batch.examples,
        "micro_batch_tokens": trainer.micro_batch.tokens,
        "replays": watcher.replays,
        "out_of_memory": watcher.shortages,
        "measured_peak_bytes": max(before, peaks.process_peak_bytes()),
        "bytes_before_training": before,
    }


@contextlib.contextmanager
def out_of_memory_explained(folder: Path) -> Iterator[None]:
    """Outside of forward and backward passes nothing can be replayed.

    Raises:
        WillNotFitError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise WillNotFitError(
            "Memory ran out between a step's passes, where nothing can be replayed.",
            where=folder,
            found=Shortage.of(error).message,
            fix=f"a smaller memory.budget or memory.micro_batch leaves more room; the newest "
            f"checkpoint is as it was: {resume_command(folder)}",
        ) from error


def _begin_measuring(device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    return hardware.device_memory(device)[0]


def _finish(
    recipe: Recipe,
    opened: _Opened,
    trainer: StepTrainer,
    report: dict[str, Any],
    folder: Path,
    reporter: Reporter,
) -> RunResult:
    peaks = opened.limit.peaks
    with peaks.phase("save"), new_folder(folder / "adapter", overwrite=True) as temporary:
        recipe.strategy.save(trainer.trained, temporary)
        write_card(temporary, opened.card)
    metrics = trainer.final_metrics()
    trainer.trained.eval()
    measured = peaks.report()
    planned = opened.plan.as_dict()  # as it was foretold, before this run teaches its lesson
    opened.plan.keep(measured, report["steps"], report["train_seconds"])
    chosen = hardware.choose(recipe.device, recipe.dtype)
    full = {
        "task": recipe.task,
        "strategy": settings_of(recipe.strategy.handed_over),
        "distillation": settings.described() if (settings := settings_in(recipe)) else None,
        "base": Path(recipe.model).name,
        "base_fingerprint": opened.card["base_fingerprint"],
        "data_fingerprint": opened.inputs.train.fingerprint,
        "device": chosen.device,
        "dtype": str(chosen.dtype).removeprefix("torch."),
        "quantize": opened.card["quantize"],
        "parameters": opened.parameters,
        "trained_parameters": _count_trained(trainer.trained),
        "mergeable": recipe.strategy.mergeable,
        "versions": hardware.versions(),
        "feature_cache": opened.features.place if opened.features else None,
        "training": report,
        "budget_bytes": opened.limit.budget_bytes,
        "bytes_before_loading": peaks.baseline_bytes,
        "measured": measured,
        "plan": planned,
        "metrics": metrics,
    }
    write_json(folder / "run.json", full)
    _write_page(folder, reporter)
    reporter.say(
        f"done: {report['steps']} steps, {report['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {human_bytes(report['measured_peak_bytes'])}"
    )
    for name, value in metrics.items():
        reporter.say(f"eval {name}: {value:.4f}")
    if opened.features is not None:  # last, when all that must not be lost is written
        opened.features.close()
    if opened.lessons is not None:
        opened.lessons.close()
    return RunResult(folder, metrics, full, trainer.trained)


def _write_page(folder: Path, reporter: Reporter) -> None:
    try:
        write_report(folder)
    except Exception as error:  # the training is done, and must not fail for its picture
        reporter.say(f"note: no report.html was written: {first_line(error)}")
