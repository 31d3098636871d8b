"""`qft prune`: a smaller model out of a larger one, written as an ordinary folder, and judged.

A method (`qft.pruning.methods`) decides what stays; here the model and the rows are opened, the
result is streamed into a folder that gets its name when all of it is there, and both models are
compared on held-out rows. What is costly, the scores, is kept beside the output until then.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from qft import hardware, models
from qft.errors import Interrupted, ModelError, RecipeError
from qft.files import new_folder, require_absent, require_apart, write_json
from qft.merging.merge import fill_folder, require_room
from qft.merging.side_files import copy_files
from qft.progress import QUIET, Reporter
from qft.pruning.anatomy import Anatomy, open_anatomy
from qft.pruning.calibration import CalibrationRows, open_rows
from qft.pruning.comparison import Measured, mean_divergence, measure
from qft.pruning.methods import method_of
from qft.pruning.plan import Job, Plan, Settings
from qft.pruning.score_store import ScoreStore
from qft.pruning.targets import Scale
from qft.shards import inside

REPORT = "pruning.json"


@dataclass(frozen=True)
class Rows:
    """Where the rows are and how they are read.

    Attributes:
        data: rows to score by.
        held_out: rows to judge by; None holds out a part of ``data``.
        task: None is the model's own.
        columns: ``{role: name}`` overrides.
        judge: whether rows are wanted for a report too.
    """

    data: str | None = None
    held_out: str | None = None
    task: str | None = None
    columns: dict[str, str | int] | None = None
    judge: bool = True


def prune(
    source: str,
    out: Path | str | None = None,
    *,
    method: str = "depth",
    ratio: float | None = None,
    pattern: str | None = None,
    params: str | int | None = None,
    size: str | int | None = None,
    data: str | None = None,
    eval: str | None = None,
    task: str | None = None,
    columns: dict[str, str | int] | None = None,
    layers: str | None = None,
    width: str | None = None,
    importance: str | None = None,
    multiple_of: int = 8,
    keep_first: int = 1,
    keep_last: int = 1,
    calibration_rows: int = 128,
    max_length: int = 512,
    seed: int = 0,
    dtype: str = "auto",
    report: bool = True,
    dry_run: bool = False,
    overwrite: bool = False,
    reporter: Reporter = QUIET,
) -> dict[str, Any]:
    """Prunes a model, or says what each choice would cost.

    Args:
        source: folder or hub id of an unquantized model: one stack of layers, safetensors, and no
            Python code of its own.
        out: folder to write; not needed for a dry run, whose scores are kept beside it if named.
        method: a key of `qft.pruning.methods.METHODS`.
        ratio: the share of all parameters (embeddings count) that goes, at least; of the methods
            that set zeros, the share of each linear layer's weights that becomes zero.
        pattern: instead of it, ``n:m``: of every m weights of a row, n stay (zeros).
        params: instead of it, parameters that stay at most: ``1.0B``.
        size: instead of it, bytes of weights that stay at most: ``500MiB``.
        data: rows to score by, and, without ``eval``, to hold a part out of.
        eval: rows to judge by.
        task: where the model does not say.
        layers: the layers that go: ``10-15`` (depth).
        width: what shrinks: ``mlp``, ``heads``, ``hidden``, with or without ``=size`` (width).
        importance: depth: ``influence`` or ``angular``; width: ``activation``,
            ``activation-mean`` or ``taylor``.
        multiple_of: MLP and hidden sizes are multiples of it.
        keep_first: so many first layers stay (depth).
        keep_last: so many last layers stay (depth).
        calibration_rows: rows scored, drawn by ``seed``.
        max_length: of those rows, in tokens.
        dtype: computed in; what is written keeps each tensor's own.
        report: compare both models on held-out rows.
        dry_run: write nothing.

    Returns:
        What pruning.json holds, and under ``speed`` what it does not, since no two runs measure
        the same; of a dry run, ``choices``.

    Raises:
        Interrupted: Ctrl-C; the scores are kept.
        QftError: the model, the rows or the wishes cannot be served; says why.
    """
    settings = Settings(method, ratio, pattern, params, size, layers, width, importance,
                        multiple_of, keep_first, keep_last, calibration_rows, max_length,
                        seed)  # fmt: skip
    if min(multiple_of, calibration_rows, max_length) < 1 or min(keep_first, keep_last) < 0:
        raise RecipeError("A count is below what makes sense.",
                          where="--multiple-of, --calibration-rows, --max-length, "
                          "--keep-first, --keep-last")  # fmt: skip
    target = None if out is None else Path(out)
    if target is None and not dry_run:
        raise RecipeError("Where is the pruned model to go?", where="--out",
                          fix="--out DIR, or --dry-run")  # fmt: skip
    wanted = Rows(data, eval, task, columns, report)
    try:
        folder = _open_folder(source, target, dry_run, overwrite)
        spec = _spec_of(folder, task, dtype)
        job = _open_job(folder, spec, target, settings, wanted, dry_run, reporter)
        plan = method_of(settings).plan(job)
        if dry_run or target is None:
            return {"method": method, "whole": asdict(job.scale.whole()), "choices": plan.choices}
        return _write(job, plan, target, report, overwrite)
    except KeyboardInterrupt:
        raise Interrupted(
            "Stopped before the pruned model was complete; scores that were done are kept.",
            where=target,
            fix="the same command goes on",
        ) from None


def _open_folder(source: str, out: Path | None, dry_run: bool, overwrite: bool) -> Path:
    """The model's folder, once it is sure that it and the output may be used."""
    folder = models.resolve_folder(source)
    _refuse_adapter(folder)
    if out is not None:
        require_apart(out, folder)
        if not dry_run:
            require_absent(out, overwrite=overwrite)
    return folder


def _spec_of(folder: Path, task: str | None, dtype: str) -> models.ModelSpec:
    config = models.read_config(folder)
    named = task or models.task_to_train(config)
    if named not in models.AUTO_CLASSES:
        raise RecipeError("No such task.", where="--task", found=named,
                          fix=", ".join(models.AUTO_CLASSES))  # fmt: skip
    labels, kind = models.labels_in(config) if named in ("classify", "token") else (None, "one")
    chosen = hardware.choose(dtype=dtype)
    return models.ModelSpec(str(folder), named, labels, kind, dtype=chosen.dtype,
                            device=chosen.device)  # fmt: skip


def _open_job(
    folder: Path,
    spec: models.ModelSpec,
    out: Path | None,
    settings: Settings,
    wanted: Rows,
    dry_run: bool,
    reporter: Reporter,
) -> Job:
    """Opens everything but weights, and refuses what cannot work before anything is computed."""
    scored = method_of(settings).needs_rows(settings)
    anatomy = open_anatomy(folder, spec)
    scale = Scale(anatomy)
    job = Job(anatomy, scale, settings, None, ScoreStore(None, {}), reporter, dry_run)
    job.target()
    if scored and wanted.data is None and not dry_run:
        job.require_rows()
    rows = None
    if (wanted.data or wanted.held_out) and (scored or wanted.judge):
        rows = open_rows(
            folder, spec.task, wanted.data, held_out=wanted.held_out,
            rows=settings.calibration_rows, max_length=settings.max_length,
            columns=wanted.columns, seed=settings.seed,
        )  # fmt: skip
        reporter.say(f"rows: {len(rows.scored)} to score by, {len(rows.held_out)} held out")
        for note in rows.notes:
            reporter.say(note)
    store = ScoreStore.beside(out, _identity(anatomy, rows))
    usable = rows if wanted.data is not None else None
    return replace(job, rows=usable, store=store, judged=rows)


def _identity(anatomy: Anatomy, rows: CalibrationRows | None) -> dict[str, Any]:
    """What decides scores, beside what they are called."""
    return {
        "model": models.fingerprint(anatomy.folder),
        "config": dict(anatomy.config),
        "rows": rows.fingerprints()["scored"] if rows is not None else None,
        "task": anatomy.spec.task,
        "dtype": str(anatomy.spec.dtype),
        "device": anatomy.spec.device,
        "software": _software(),
    }


def _refuse_adapter(folder: Path) -> None:
    for name in ("adapter_config.json", "adapter", "recipe.yaml"):
        if (folder / name).exists() and not (folder / "config.json").exists():
            raise ModelError(
                "An adapter or a run has no weights of its own to prune.",
                where=folder,
                found=name,
                fix="qft merge it first: qft merge RUN --out DIR",
            )


def _software() -> dict[str, str]:
    versions = hardware.versions()
    return {name: versions[name] for name in ("qft-toolkit", "torch", "transformers")}


def _write(job: Job, plan: Plan, out: Path, report: bool, overwrite: bool) -> dict[str, Any]:
    """Writes the folder, compares it with the whole model, and gives it its name."""
    assert plan.source is not None
    assert plan.cost is not None
    require_room(plan.source, out)
    whole = job.scale.whole()
    facts: dict[str, Any] = {
        "method": job.settings.method,
        "settings": {k: v for k, v in asdict(job.settings).items() if k != "method"},
        "source": {"name": job.anatomy.folder.name,
                   "fingerprint": models.fingerprint(job.anatomy.folder)},
        "rows": job.judged.fingerprints() if job.judged is not None else None,
        "versions": _software(),
        "before": asdict(whole),
        "after": asdict(plan.cost),
        **plan.facts,
    }  # fmt: skip
    speed: dict[str, float] = {}
    before = _measured_before(job) if report else None
    try:
        with new_folder(out, overwrite=overwrite) as folder:
            with job.reporter.bar("write", plan.cost.bytes) as bar:
                fill_folder(plan.source, folder, progress=bar.advance)
            _copy_pooling(job.anatomy.folder, folder)
            if before is not None and job.judged is not None:
                after = measure(folder, job.anatomy.spec, job.judged, "the pruned", job.reporter)
                facts["quality"] = _quality(before, after)
                speed = {"before": before.tokens_per_second, "after": after.tokens_per_second}
            write_json(folder / REPORT, facts)
    finally:
        plan.source.close()
    job.store.remove()
    return {**facts, "speed": speed}


def _copy_pooling(source: Path, folder: Path) -> None:
    """Copies how a sentence encoder pools, which sentence-transformers keeps beside the model."""
    for place, names in (
        (".", ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")),
        ("1_Pooling", ("config.json",)),
    ):
        found = {name: inside(source / place, name) for name in names
                 if (source / place / name).is_file()}  # fmt: skip
        if found:
            (folder / place).mkdir(exist_ok=True)
            copy_files(found, folder / place)


def _measured_before(job: Job) -> Measured | None:
    """The whole model on the held-out rows; None, and the reason said, where it has nothing to say.

    It is measured before anything is written, so that what is wrong with the rows shows early.
    """
    rows = job.judged
    if rows is None or not rows.held_out:
        job.reporter.say("no report: no held-out rows (--data or --eval)")
        return None
    lost = job.anatomy.untrained_heads()
    if lost:
        job.reporter.say(f"no report: the model holds no weights of its {', '.join(lost)}")
        return None
    return measure(job.anatomy.folder, job.anatomy.spec, rows, "the whole", job.reporter)


def _quality(before: Measured, after: Measured) -> dict[str, Any]:
    found: dict[str, Any] = {"before": before.metrics, "after": after.metrics}
    if before.answers is not None and after.answers is not None:
        found["mean_kl"] = mean_divergence(before.answers, after.answers)
        found["positions"] = len(before.answers.values)
    return found
