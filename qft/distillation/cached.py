"""A teacher that is not there: its lessons are read from a cache."""

from __future__ import annotations

from collections.abc import Sequence

from qft.data.examples import Example
from qft.distillation.lesson_coding import LessonCoding
from qft.distillation.lesson_store import LessonStore
from qft.distillation.lessons import Lesson
from qft.errors import QftError
from qft.lean.label_loss import Head


class CachedTeacher:
    """Lessons out of a store; see `qft.distillation.lessons.Source`.

    Args:
        store: whole, and held for reading.
        coding: how its lessons are stored.
        shared: tokens that teacher and student both have; None without tokens.
    """

    head: tuple[Head, int] | None = None

    def __init__(self, store: LessonStore, coding: LessonCoding, shared: int | None) -> None:
        self.shared = shared
        self._store, self._coding, self._read = store, coding, store.open()

    def lessons(self, examples: Sequence[Example]) -> list[Lesson]:
        """One an example.

        Raises:
            QftError: an example that the teacher was not asked about; a cache that says what
                cannot be.
        """
        try:
            found = [self._coding.decode(self._read(example.index)) for example in examples]
        except KeyError as error:
            raise QftError(
                "The teacher cache has no lesson of this example.",
                where=self._store.folder,
                found=f"example {error}",
            ) from None
        for lesson in found:
            self._require_known_tokens(lesson)
        return list(found)

    def _require_known_tokens(self, lesson: Lesson) -> None:
        """A cache may come from elsewhere, and a number may fit into the bits all the same."""
        for name in ("tokens", "samples"):
            if name in lesson and (lesson[name] >= self._coding.vocabulary).any():
                raise QftError(
                    "The teacher cache names tokens that there are not.",
                    where=self._store.folder,
                    found=f"{int(lesson[name].max())} of {self._coding.vocabulary}",
                    fix="remove that folder; `qft teach` makes it anew",
                )

    def close(self) -> None:
        """Lets others write or remove the cache."""
        self._store.release()
