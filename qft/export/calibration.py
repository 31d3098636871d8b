"""The user's own rows, by which an export rounds where it matters to the model."""

from __future__ import annotations

from pathlib import Path

from qft.calibration import Calibration, collated, drawn
from qft.data.examples import fingerprint
from qft.data.tasks import TASKS, ExampleSet, load_examples, load_train_eval, pad_id
from qft.errors import RecipeError
from qft.export.formats import FORMATS, fits_to_rows, fitted_unasked
from qft.hardware import choose
from qft.held_out import recipe_of
from qft.progress import Reporter
from qft.recipe import Data
from qft.verification.subject import Subject

_LONGEST = 512  # tokens, where no recipe says


def calibration_for(
    reference: Subject,
    format: str,
    asked: bool | None,
    data: str | None,
    rows: int,
    reporter: Reporter,
) -> Calibration | None:
    """The rows for an export, or None where it rounds each number by itself.

    Args:
        asked: whether to fit; None: where the format gains much by it and there are rows.

    Raises:
        RecipeError: rows are asked for, and the format has no use for them, or there are none.
    """
    wanted = asked is True or (asked is None and data is not None)
    if not fits_to_rows(format):
        if wanted:
            fitted = [name for name in FORMATS if fits_to_rows(name)]
            raise RecipeError("This format rounds each number by itself; rows change nothing.",
                              where="--calibrate", found=format,
                              fix=f"leave it out, or one of {', '.join(fitted)}")  # fmt: skip
        return None
    if asked is False or not (wanted or fitted_unasked(format)):
        return None
    try:
        return calibrate_on(reference, data, rows=rows)
    except RecipeError as error:
        if wanted:
            raise
        reporter.say(f"note: rounded to nearest, not fitted to rows: {error.what} ({error.fix})")
        return None


def calibrate_on(
    reference: Subject, data: str | None = None, *, rows: int = 128, seed: int = 0
) -> Calibration:
    """Draws the rows: those a run was trained on, or those of a file.

    Args:
        data: a file of rows as the model's task has them; None takes the run's own training rows.
        rows: at most so many, drawn by ``seed``.

    Raises:
        RecipeError: there are none: the reference is no run, and no ``data``.
        DataError: they do not fit the task.
    """
    spec = reference.spec
    if spec.task not in TASKS or spec.task == "seq2seq":
        raise RecipeError("Rounding cannot be fitted to rows of this task.", where="--task",
                          found=spec.task, fix="--no-calibrate")  # fmt: skip
    tokenizer = reference.tokenizer()
    found, name = _training_rows(reference, tokenizer, data)
    chosen = drawn(found.examples, rows, seed)
    if not chosen:
        raise RecipeError("There are no rows to fit the rounding to.", where=name)
    batches = collated(TASKS[spec.task], chosen, pad_id(tokenizer))
    return Calibration(tuple(batches), len(chosen), name, fingerprint(chosen), choose().device)


def _training_rows(
    reference: Subject, tokenizer: object, data: str | None
) -> tuple[ExampleSet, str]:
    recipe = recipe_of(Path(reference.source))
    if data is None:
        if recipe is None:
            raise RecipeError("There are no rows to fit the rounding to.", where=reference.source,
                              fix="add --calibration-data FILE")  # fmt: skip
        return load_train_eval(recipe, tokenizer)[0], Path(str(recipe.data.train)).name  # type: ignore[arg-type]
    known = recipe.data if recipe is not None else Data(train=data)
    shortest = min(_LONGEST, reference.longest() or _LONGEST)
    length = recipe.train.max_length if recipe is not None else shortest
    known = known.model_copy(update={"too_long": "truncate"})
    found = load_examples(reference.spec.task, data, tokenizer, data=known,  # type: ignore[arg-type]
                          max_length=length, labels=reference.spec.labels)  # fmt: skip
    return found, Path(data).name
