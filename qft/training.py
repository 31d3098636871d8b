"""`train`: from a recipe to a run folder.

runs/support-bot/
  recipe.yaml      the resolved recipe, every default written out
  run.json         versions, device, times, memory, throughput, metrics
  metrics.jsonl    one line a logged step or evaluation
  adapter/         the result, in PEFT's format where it has one
  checkpoints/     what --resume continues from
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, set_seed

from qft import checkpoints, hardware, models
from qft.card import make_card, write_card
from qft.data.tasks import TASKS, ExampleSet, Task, load_train_eval, pad_id
from qft.errors import Interrupted, OutputExistsError, RecipeError
from qft.evaluation import evaluate
from qft.files import new_folder, read_json, require_absent, write_json, write_text
from qft.merging.merge import ModuleTensors
from qft.preparation import prepare, prepared
from qft.progress import QUIET, Bar, Reporter, human_bytes
from qft.recipe import Recipe, build_recipe
from qft.registry import settings_of
from qft.shards import ShardedCheckpoint
from qft.strategy import Context, Needs
from qft.trainer import Job, StepTrainer

DEFAULT_MICRO_BATCH = 4


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
    tokenizer: Any
    task: Task
    train: ExampleSet
    held_out: ExampleSet | None
    card: dict[str, Any]


def train(
    recipe: Recipe,
    *,
    resume: bool | str = False,
    overwrite: bool = False,
    reporter: Reporter = QUIET,
) -> RunResult:
    """Trains what the recipe says.

    Args:
        recipe: from :func:`qft.load_recipe` or :func:`qft.build_recipe`.
        resume: go on from the newest complete checkpoint, or from the one named.
        overwrite: replace a former run in the output folder.
        reporter: where progress goes.

    Raises:
        QftError: see :mod:`qft.errors`; the run folder keeps its checkpoints.
    """
    folder = Path(recipe.output)
    _check_task(recipe)
    start = _find_start(folder, recipe, resume, overwrite, reporter)
    set_seed(recipe.train.seed)
    hardware_choice = hardware.choose(recipe.device, recipe.dtype)
    reporter.say(f"device: {hardware_choice.reason}")
    opened = _open(recipe, hardware_choice, reporter)
    if not resume:  # only now: bad data or a bad model must not cost a former run
        _create_run_folder(folder, recipe)
    trainer = _make_trainer(recipe, opened, folder, reporter)
    report = _run(trainer, recipe, start, folder, reporter)
    return _finish(recipe, opened, trainer, report, folder, reporter)


def spec_of(recipe: Recipe, labels: tuple[str, ...] | None = None) -> models.ModelSpec:
    """How a recipe wants its model opened."""
    chosen = hardware.choose(recipe.device, recipe.dtype)
    return models.ModelSpec(
        source=recipe.model,
        task=recipe.task,
        labels=labels,
        pooling=recipe.pooling,
        quantize=recipe.quantize,
        dtype=chosen.dtype,
        device=chosen.device,
        trust=models.Trust(recipe.allow_pickle, recipe.trust_remote_code),
    )


def _check_task(recipe: Recipe) -> None:
    strategy = recipe.strategy
    if recipe.task not in strategy.tasks:
        raise RecipeError(
            f"The strategy {strategy.name!r} cannot train the task {recipe.task!r}.",
            where="task",
            fix=f"it can: {', '.join(sorted(strategy.tasks))}",
        )
    if strategy.objective.kind != "task":
        raise RecipeError(
            f"The objective {strategy.objective.kind!r} is not available in this version.",
            where="strategy",
        )


def _find_start(
    folder: Path, recipe: Recipe, resume: bool | str, overwrite: bool, reporter: Reporter
) -> Path | None:
    """The checkpoint to go on from, or None for a new run, whose place must be free."""
    if not resume:
        if not overwrite and (folder / "checkpoints").is_dir():
            raise OutputExistsError(
                "The output folder holds a former run.",
                where=folder,
                fix="--resume to go on with it, --overwrite to replace it, or another output",
            )
        require_absent(folder, overwrite=overwrite)
        return None
    _check_same_recipe(folder, recipe)
    if isinstance(resume, str):
        named = Path(resume)
        checkpoints.require_complete(named)
        return named
    found, skipped = checkpoints.newest_complete(folder / "checkpoints")
    for line in skipped:
        reporter.say(f"skipped {line}")
    reporter.say(f"resuming from {found.name}" if found else "no checkpoint yet: from the start")
    return found


def _create_run_folder(folder: Path, recipe: Recipe) -> None:
    with new_folder(folder, overwrite=True) as temporary:
        write_text(temporary / "recipe.yaml", recipe.to_yaml())
        (temporary / "checkpoints").mkdir()


# What may change between the parts of one run, since it changes no update.
_MAY_CHANGE = {"memory", "device"}


def _check_same_recipe(folder: Path, recipe: Recipe) -> None:
    import yaml

    path = folder / "recipe.yaml"
    if not path.is_file():
        raise RecipeError("There is no run to resume.", where=folder,
                          fix="leave out --resume")  # fmt: skip
    before = build_recipe(yaml.safe_load(path.read_text(encoding="utf-8")), where=str(path))
    then, now = before.to_dict(), recipe.to_dict()
    changed = [k for k in now if k not in _MAY_CHANGE | {"output"} and then.get(k) != now[k]]
    if changed:
        raise RecipeError(
            "The recipe is not the one this run began with.",
            where=path,
            found=f"changed: {', '.join(changed)}",
            fix="resume with the run's own recipe.yaml, or train into another output",
        )


def _open(recipe: Recipe, chosen: hardware.Hardware, reporter: Reporter) -> _Opened:
    trust = models.Trust(recipe.allow_pickle, recipe.trust_remote_code)
    base = models.resolve_folder(recipe.model, trust)
    models.check_folder(base, trust)
    tokenizer = models.open_tokenizer(base, trust)
    task = TASKS[recipe.task]
    _check_length(recipe, base)
    training, held_out = load_train_eval(recipe, tokenizer)
    for part, name in ((training, "train"), (held_out, "eval")):
        if part is not None:
            reporter.say(f"{name}: {len(part.examples)} examples")
            for note in part.notes:
                reporter.say(f"{name}: {note}")
    spec = spec_of(recipe, training.labels)
    skeleton = models.open_skeleton(base, spec)
    needs = recipe.strategy.needs(skeleton)
    held = models.held_as(models.read_config(base), recipe.quantize)
    started = time.monotonic()
    model = models.open_model(base, spec, keep=needs.full_precision)
    reporter.say(
        f"model: {sum(p.numel() for p in skeleton.parameters()) / 1e6:.1f} M parameters, "
        f"{held if held != 'none' else str(chosen.dtype)[6:]}, "
        f"loaded in {time.monotonic() - started:.1f} s"
    )
    context = _context(recipe, needs, base, skeleton, training, task, tokenizer)
    model = prepare(
        model, recipe.strategy, checkpointing=recipe.memory.checkpointing, context=context
    )
    _say_trainable(model, reporter)
    card = _card(recipe, base, training, skeleton, chosen)
    return _Opened(model, tokenizer, task, training, held_out, card)


def _check_length(recipe: Recipe, base: Path) -> None:
    limit = models.read_config(base).get("max_position_embeddings")
    if isinstance(limit, int) and recipe.train.max_length > limit:
        raise RecipeError(
            "Sequences would be longer than the model takes.",
            where="train.max_length",
            found=f"{recipe.train.max_length}; the model takes {limit} tokens",
            fix=f"train.max_length: {limit}",
        )


def _context(
    recipe: Recipe,
    needs: Needs,
    base: Path,
    skeleton: nn.Module,
    training: ExampleSet,
    task: Task,
    tokenizer: Any,
) -> Context:
    """What the strategy asked for: calibration batches, the way to an unquantized weight."""
    size = min(recipe.train.batch_size, DEFAULT_MICRO_BATCH)
    starts = range(0, needs.calibration_batches * size, size)
    parts = [training.examples[i : i + size] for i in starts]
    steps = -(-len(training.examples) // recipe.train.batch_size)
    total = recipe.train.max_steps or -int(-steps * recipe.train.epochs // 1)
    original: Callable[[str], torch.Tensor] | None = None
    if needs.original_weights:
        if models.held_as(models.read_config(base), "none") != "none":
            raise RecipeError(
                f"The strategy {recipe.strategy.name!r} needs the unquantized weights.",
                where="model",
                found="a model that is stored quantized",
                fix="name the original model; `quantize` holds it in 4 or 8 bits",
            )
        tensors = ModuleTensors(ShardedCheckpoint(base), models.module_names(base, skeleton))
        original = tensors.read
    return Context(
        task=recipe.task,
        total_steps=total,
        seed=recipe.train.seed,
        calibration=tuple(task.collate(part, pad_id(tokenizer)) for part in parts if part),
        original_weight=original,
    )


def _say_trainable(model: nn.Module, reporter: Reporter) -> None:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = prepared(model)
    assert state is not None
    reporter.say(
        f"trains: {trained:,} parameters"
        + (", activations are recomputed" if state.checkpointing else "")
    )
    for note in state.notes:
        reporter.say(f"note: {note}")


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
        pooling=getattr(config, "qft_pooling", "auto"),
        quantize=models.held_as(stored, recipe.quantize),
        dtype=str(chosen.dtype).removeprefix("torch."),
        strategy=settings_of(recipe.strategy),
        max_length=recipe.train.max_length,
    )


def _make_trainer(recipe: Recipe, opened: _Opened, folder: Path, reporter: Reporter) -> StepTrainer:
    pad = pad_id(opened.tokenizer)
    held_out = opened.held_out

    def held_out_metrics(model: nn.Module) -> dict[str, float]:
        assert held_out is not None
        with reporter.bar("evaluate", len(held_out.examples)) as bar:
            return evaluate(
                model, held_out.examples, opened.task, pad_token_id=pad, progress=bar.advance
            )

    size = recipe.train.batch_size
    job = Job(
        strategy=recipe.strategy,
        task=opened.task,
        examples=opened.train.examples,
        settings=recipe.train,
        micro_batch=recipe.memory.micro_batch or min(size, DEFAULT_MICRO_BATCH),
        pad_token_id=pad,
        folder=folder / "checkpoints",
        evaluate=held_out_metrics if held_out is not None else None,
        card=opened.card,
    )
    return StepTrainer(opened.model, job)


def _run(
    trainer: StepTrainer, recipe: Recipe, start: Path | None, folder: Path, reporter: Reporter
) -> dict[str, Any]:
    """Runs the loop under a progress bar; Ctrl-C ends the step, saves, and says how to go on."""
    device = next(trainer.trained.parameters()).device.type
    watcher = _Watcher(trainer, folder / "metrics.jsonl", device, reporter)
    trainer.add_callback(watcher)
    before = _begin_measuring(device)
    with _interruptible(watcher):
        result = trainer.train(resume_from_checkpoint=str(start) if start else None)
    watcher.close()
    if watcher.stop_asked:
        raise Interrupted(
            f"Stopped after step {trainer.state.global_step}; a checkpoint is saved.",
            where=folder,
            fix=f"qft train {folder / 'recipe.yaml'} --resume",
        )
    return {
        "steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        "train_seconds": watcher.seconds,
        "tokens": watcher.tokens,
        "tokens_per_second": watcher.tokens / max(watcher.seconds, 1e-9),
        "supervised_items": watcher.items,
        "micro_batch": trainer.micro_batch,
        "replays": watcher.replays,
        "measured_peak_bytes": hardware.device_memory(device)[1],
        "bytes_before_training": before,
    }


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
    with new_folder(folder / "adapter", overwrite=True) as temporary:
        recipe.strategy.save(trainer.trained, temporary)
        write_card(temporary, opened.card)
    metrics = trainer.final_metrics()
    trainer.trained.eval()
    chosen = hardware.choose(recipe.device, recipe.dtype)
    full = {
        "task": recipe.task,
        "strategy": settings_of(recipe.strategy),
        "base": Path(recipe.model).name,
        "base_fingerprint": opened.card["base_fingerprint"],
        "data_fingerprint": opened.train.fingerprint,
        "device": chosen.device,
        "dtype": str(chosen.dtype).removeprefix("torch."),
        "quantize": opened.card["quantize"],
        "versions": hardware.versions(),
        "training": report,
        "metrics": metrics,
    }
    write_json(folder / "run.json", full)
    reporter.say(
        f"done: {report['steps']} steps, {report['tokens_per_second']:.0f} tokens/s, "
        f"peak memory {human_bytes(report['measured_peak_bytes'])}"
    )
    for name, value in metrics.items():
        reporter.say(f"eval {name}: {value:.4f}")
    return RunResult(folder, metrics, full, trainer.trained)


class _Watcher(TrainerCallback):
    """Counts, shows and logs; ends the run after the step at hand when asked to."""

    def __init__(self, trainer: StepTrainer, log: Path, device: str, reporter: Reporter) -> None:
        self._trainer = trainer
        self._log = log
        self._device = device
        self._reporter = reporter
        self._bar: Bar | None = None
        self._context: Any = None
        self._started = 0.0
        self.seconds = 0.0
        self.tokens = 0
        self.items = 0
        self.replays = 0
        self.stop_asked = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        keep_lines_up_to(self._log, state.global_step)
        self._context = self._reporter.bar("train", state.max_steps)
        self._bar = self._context.__enter__()
        self._started = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()  # evaluation and saving do not count as training time

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        result = self._trainer.last_result
        assert result is not None
        assert self._bar is not None
        self.seconds += time.monotonic() - self._started
        self.tokens += result.tokens
        self.items += result.items
        if result.replays:
            self.replays += result.replays
            self._reporter.say(
                f"step {state.global_step}: out of memory, micro-batch is now "
                f"{result.micro_batch}; the same samples were replayed"
            )
        now, peak = hardware.device_memory(self._device)
        self._bar.update(
            state.global_step,
            f"loss {result.loss.item():.3f}  {self.tokens / max(self.seconds, 1e-9):.0f} tok/s  "
            f"memory {human_bytes(now)}, peak {human_bytes(peak)}",
        )
        if self.stop_asked:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any
    ) -> None:
        line = {"step": state.global_step, **(logs or {})}
        with self._log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if self._bar is not None and logs and "eval_loss" in logs:
            shown = "  ".join(f"{k[5:]} {v:.4f}" for k, v in logs.items() if k.startswith("eval_"))
            self._reporter.say(f"step {state.global_step}: held-out {shown}")

    def close(self) -> None:
        """Ends the bar."""
        if self._context is not None:
            self._context.__exit__(None, None, None)


def keep_lines_up_to(log: Path, step: int) -> None:
    """Drops what a run that was killed had logged past the checkpoint it goes on from."""
    if not log.is_file():
        return
    kept = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError):
            break  # half a line: the process died writing it
        kept.append(line)
    write_text(log, "".join(line + "\n" for line in kept))


@contextmanager
def _interruptible(watcher: _Watcher) -> Iterator[None]:
    """The first Ctrl-C ends after the step at hand; a second one at once."""

    def ask(number: int, frame: Any) -> None:
        if watcher.stop_asked:
            raise KeyboardInterrupt
        watcher.stop_asked = True

    try:
        former = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json says of a finished run."""
    return dict(read_json(folder / "run.json"))
