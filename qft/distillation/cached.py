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
            QftError: an example that the teacher was not asked about.
        """
        try:
            return [self._coding.decode(self._read(example.index)) for example in examples]
        except KeyError as error:
            raise QftError(
                "The teacher cache has no lesson of this example.",
                where=self._store.folder,
                found=f"example {error}",
            ) from None

    def close(self) -> None:
        """Lets others write or remove the cache."""
        self._store.release()
