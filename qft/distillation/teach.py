"""`teach`: runs a teacher once over the training rows, and keeps what its student needs.

The teacher is alone in memory while it does so, and gone when the student comes. What is kept has
the teacher's, the data's and the settings' names on it (`qft.distillation.lesson_identity`); where
the teacher is not there any more, a whole cache of it is enough.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qft import models
from qft.distillation.cached import CachedTeacher
from qft.distillation.kept import kept_of
from qft.distillation.lesson_identity import asked_parts, teacher_name, teacher_parts
from qft.distillation.lesson_making import LessonMaker
from qft.distillation.lesson_report import foreseen, measured, probe_of, sentence
from qft.distillation.lesson_store import LessonStore
from qft.distillation.objective import DistillSettings
from qft.distillation.supply import cache_root, live_source, settings_in, teacher_layers
from qft.distillation.teacher_texts import with_teacher_texts
from qft.distillation.teachers import teacher_folder, teacher_shape
from qft.errors import Interrupted, ModelError, QftError, RecipeError, WillNotFitError
from qft.feature_identity import stored_order
from qft.files import explain_write_errors, read_json, require_disk, write_json
from qft.inputs import Inputs, open_inputs
from qft.out_of_memory import is_out_of_memory
from qft.progress import QUIET, Reporter
from qft.recipe import Recipe
from qft.shard_store import differences, identities
from qft.token_batches import few_at_once

_REPORT = "report.json"


def teach(recipe: Recipe, *, reporter: Reporter = QUIET) -> dict[str, Any]:
    """Makes what is missing of the teacher cache that a recipe's training reads.

    Args:
        recipe: from :func:`qft.load_recipe` or :func:`qft.build_recipe`.
        reporter: where progress goes.

    Returns:
        The cache's report: `rows`, `bytes`, `bytes_per_row`, `coverage` (the mean mass of the
        likeliest tokens), where it is and how much of it was made now.

    Raises:
        QftError: see :mod:`qft.errors`; what is done is kept.
    """
    settings = settings_in(recipe)
    if settings is None:
        raise RecipeError("This recipe has nothing to keep of a teacher's.", where="strategy",
                          fix="strategy: {name: distill, teacher: …, student: …}")  # fmt: skip
    if not settings.has_lessons:  # the texts alone
        inputs = with_teacher_texts(recipe, open_inputs(recipe, reporter), reporter)
        return {"texts": len(inputs.train.examples), "folder": str(cache_root(recipe, settings))}
    if not settings.caches:
        raise RecipeError("This recipe's teacher stays in memory.", where="strategy.cache",
                          found=settings.cache, fix="cache: top-k, or cache: samples")  # fmt: skip
    inputs = with_teacher_texts(recipe, open_inputs(recipe, reporter), reporter)
    cache = TeacherCache(recipe, settings, inputs, reporter)
    cache.ready().close()
    return cache.report


class TeacherCache:
    """One recipe's teacher cache.

    Args:
        recipe: with `settings` in it.
        settings: what is learned.
        inputs: the recipe's data.
        reporter: where progress goes.

    Attributes:
        report: see `teach`; there when the cache is ready.
    """

    def __init__(
        self, recipe: Recipe, settings: DistillSettings, inputs: Inputs, reporter: Reporter
    ) -> None:
        self.recipe, self.settings, self.inputs = recipe, settings, inputs
        self.reporter = reporter
        self.ordered = stored_order(inputs.train.examples)
        if len({example.index for example in self.ordered}) < len(self.ordered):
            raise RecipeError("Two samples of the data have the same number.",
                              where="strategy.cache", fix="cache: off")  # fmt: skip
        self.root = cache_root(recipe, settings)
        self.name = teacher_name(settings)
        self.report: dict[str, Any] = {}

    def ready(self) -> CachedTeacher:
        """The lessons, made first as far as they are missing.

        Raises:
            Interrupted: Ctrl-C; the shards that are done are kept.
            ModelError: there is neither the teacher nor a whole cache of it.
            SaveError: the disk is full or not writable.
            WillNotFitError: not even one example fits beside the teacher.
            QftError: another run is writing the same cache.
        """
        try:
            with explain_write_errors(self.root):
                return self._ready()
        except KeyboardInterrupt:
            raise Interrupted(
                "Stopped while the teacher was asked; what is done is kept.",
                where=self.root,
                fix="the same command goes on",
            ) from None

    def _ready(self) -> CachedTeacher:
        reason = ""
        if not models.is_here(self.settings.teacher):  # a cache spares fetching it
            found = self._without_teacher()
            if isinstance(found, CachedTeacher):
                return found
            reason = found
        try:
            trust = models.Trust(self.recipe.allow_pickle, self.recipe.trust_remote_code)
            teacher_folder(self.settings.teacher, trust)
        except ModelError as error:
            raise ModelError(
                "The teacher is not there, and neither is a whole cache of what it would say.",
                where=self.settings.teacher,
                found=reason or error.found,
                fix="name the teacher's folder or hub id; or strategy.cache_folder with a cache "
                "that was made for this recipe",
            ) from error
        self._describe()
        teacher = teacher_parts(self.recipe, self.settings, self.inputs)
        store = self._store({**self.asked, **teacher})
        changed = [] if store.folder.is_dir() else differences(self.root, store.identity)
        if changed and not {"teacher", "data"} <= set(changed):  # else it is simply another job's
            self._say(f"made anew, another {' and '.join(changed)} than what is there "
                      "was made with")  # fmt: skip
        _take(store, alone=False)
        try:
            if store.missing() or _about(store.folder) is None:
                _take(store, alone=True)
                self._fill(store)
            return self._opened(store)
        except BaseException:
            store.release()
            raise

    def _describe(self) -> None:
        """What is asked for; layers are known only where the teacher's config is."""
        pairs = teacher_layers(self.recipe, self.settings, self.inputs)
        width = teacher_shape(self.settings.teacher, self.recipe.task).width if pairs else 0
        self.kept = kept_of(self.recipe, self.settings, self.inputs.task, pairs)
        self.sizes = self.kept.sizes(self.ordered, len(self.inputs.train.labels or "1"), width)
        self.asked = asked_parts(self.recipe, self.settings, self.inputs, self.kept, self.ordered)

    def _store(self, identity: Mapping[str, str]) -> LessonStore:
        return LessonStore(self.root, identity, [e.index for e in self.ordered], self.sizes)

    def _fill(self, store: LessonStore) -> None:
        """Asks the teacher about what is missing."""
        live = live_source(self.recipe, self.settings, self.inputs, self.reporter, self.kept.layers)
        maker = LessonMaker(live, self.kept)
        try:
            self._write_missing(store, maker)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise WillNotFitError(
                "Not even one example fits beside the teacher.",
                found=f"{len(self.ordered[0].inputs['input_ids'])} tokens in the longest",
                fix="strategy.teacher_quantize: nf4, a smaller train.max_length, or a smaller "
                "teacher",
            ) from error
        vocabulary, shared = maker.vocabulary(), live.shared
        del live, maker
        _collect()
        write_json(
            store.folder / _REPORT,
            {
                "teacher": self.name,
                "task": self.recipe.task,
                **{name: value for name, value in self.kept.parts().items() if value},
                "examples": len(self.ordered),
                "vocabulary": vocabulary,
                "shared": shared,
                **measured(self.kept, self.ordered, store.open()),
            },
        )

    def _write_missing(self, store: LessonStore, maker: LessonMaker) -> None:
        missing = store.missing()
        probe = probe_of(self.ordered)
        made = [lesson for part in few_at_once(probe, maker) for lesson in part]
        expected = foreseen(self.kept, self.ordered, probe, made)
        self._say(f"{sentence(self.kept, expected)} (from {len(probe)} examples)")
        share = sum(sum(self.sizes[p] for p in store.shards[number]) for number in missing)
        needed = expected["bytes"] * share / max(1, sum(self.sizes))
        require_disk(self.root, int(needed))
        if len(missing) < len(store.shards):
            there = len(store.shards) - len(missing)
            self._say(f"{there} of {len(store.shards)} parts are there already")
        total = sum(len(store.shards[number]) for number in missing)
        with self.reporter.bar("teach", total) as bar:
            for number in missing:
                part = store.shards[number]
                examples = self.ordered[part.start : part.stop]
                batches = few_at_once(examples, maker, bar.advance)
                store.write(number, [lesson for batch in batches for lesson in batch])
        self.report["parts_made"] = len(missing)

    def _opened(self, store: LessonStore) -> CachedTeacher:
        store.share()
        about = _about(store.folder)
        assert about is not None
        self.report = {"parts_made": 0, **self.report, **about, "folder": str(store.folder)}
        self._say(f"{sentence(self.kept, about)}, in {store.folder}")
        return CachedTeacher(store, self.kept.coding(about["vocabulary"]), about["shared"])

    def _without_teacher(self) -> CachedTeacher | str:
        """From a whole cache of a teacher of this name, made for just this; or why not."""
        candidates = [
            identity
            for folder, identity in identities(self.root).items()
            if (about := _about(folder)) is not None and about["teacher"] == self.name
        ]
        reason = f"no whole cache of {self.name} in {self.root}"
        if candidates and self.settings.hidden is not None:
            return "hidden states are learned, which needs the teacher's config"
        if candidates:
            self._describe()
        for identity in candidates:
            wrong = [name for name, value in self.asked.items() if identity.get(name) != value]
            store = self._store(identity)
            if not wrong and _usable(store):
                made = [str(identity.get(name)) for name in ("dtype", "device", "software")]
                self._say(f"the teacher is not there; its cache was made in {made[0]} on "
                          f"{made[1]}, with {made[2]}")  # fmt: skip
                return self._opened(store)
            reason = f"a cache with another {' and '.join(wrong)}" if wrong else (
                "a cache that is not whole, or that another run is writing"
            )  # fmt: skip
        return reason

    def _say(self, text: str) -> None:
        self.reporter.say(f"teacher cache: {text}")


def _take(store: LessonStore, *, alone: bool) -> None:
    """Holds the cache's folder.

    Raises:
        QftError: another run holds it.
    """
    store.release()
    allowed = store.lock()
    if allowed == "no" or (alone and allowed != "write"):
        store.release()
        raise QftError(
            "Another run is at this teacher cache.",
            where=store.folder,
            fix="wait until it is done; then this one reads what it made",
        )
    if not alone:  # checking every byte takes a while, in which others may read as well
        store.share()


def _usable(store: LessonStore) -> bool:
    """Whether a cache is whole and nobody writes it; then it is held for reading."""
    if not store.folder.is_dir() or store.lock() == "no":
        return False
    if store.missing():
        store.release()
        return False
    return True


def _about(folder: Path) -> dict[str, Any] | None:
    """What a cache says of itself when it is whole; None where it does not."""
    try:
        about = read_json(folder / _REPORT)
        whole = (
            isinstance(about["teacher"], str)
            and 0 < int(about["vocabulary"]) <= 2**24
            and (about["shared"] is None or 0 < int(about["shared"]) <= 2**24)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return about if whole else None


def _collect() -> None:
    """A model is held by rings of its own parts; the student needs its memory now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
