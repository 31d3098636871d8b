"""Every deliberate error of qft, and the exit code each one ends a command with.

    QftError                      1   something went wrong that qft can explain
    ├── RecipeError               2   the recipe, a flag or a setting is wrong
    ├── ModelError                2   a model folder is missing, broken or not to be trusted
    ├── AdapterError              2   an adapter does not belong to this base, or is broken
    ├── OutputExistsError         2   the place to write to is taken
    ├── WillNotFitError           3   not enough memory, at the smallest settings there are
    ├── DataError                 4   the data cannot train what was asked
    ├── VerificationError         5   an exported model lost too much
    ├── SaveError                 1   writing failed; what was there before is untouched
    └── Interrupted             130   Ctrl-C; says how to go on

A deliberate error prints no traceback. It says *what* is wrong, *where*, what was *found* and what
would *work*; the last three are optional, the first is not.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """Without control characters: what a file or a model says must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or c.isprintable())


def first_line(error: BaseException, length: int = 200) -> str:
    """An exception's first line, for a message; some have none."""
    lines = str(error).strip().splitlines()
    return lines[0][:length] if lines else type(error).__name__


class QftError(Exception):
    """An error qft can explain.

    Args:
        what: one sentence: what is wrong.
        where: the file, line, key or tensor it is about.
        found: what was found there.
        fix: what would work.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        fix: str | None = None,
    ) -> None:
        self.what = what
        self.where = None if where is None else str(where)
        self.found = None if found is None else str(found)
        self.fix = fix
        super().__init__(self.text())

    def text(self) -> str:
        """The message as a user reads it: one line a part."""
        lines = [self.what]
        parts = (("where", self.where), ("found", self.found), ("fix", self.fix))
        lines += [f"  {label}: {value}" for label, value in parts if value]
        return "\n".join(lines)


class RecipeError(QftError):
    """The recipe, a flag or a setting is wrong."""

    exit_code = 2


class ModelError(QftError):
    """A model folder is missing, broken, or asks to be trusted without the user's word."""

    exit_code = 2


class AdapterError(QftError):
    """An adapter does not belong to this base, or is broken."""

    exit_code = 2


class OutputExistsError(QftError):
    """The output folder is there already, and nothing is overwritten unasked."""

    exit_code = 2


class WillNotFitError(QftError):
    """The job exceeds the memory even at the smallest settings."""

    exit_code = 3


class DataError(QftError):
    """The data cannot train what was asked."""

    exit_code = 4


class VerificationError(QftError):
    """A merged or exported model lost more than its format may lose."""

    exit_code = 5


class SaveError(QftError):
    """Writing failed; what existed before is untouched."""

    exit_code = 1


class Interrupted(QftError):
    """The user pressed Ctrl-C (or the process was told to stop)."""

    exit_code = 130
