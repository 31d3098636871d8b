"""Where a delivered model goes: apart from its sources, over a former one only when proven."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qft import models
from qft.errors import Interrupted
from qft.files import replace_folder, require_absent, require_apart, restore_former
from qft.verification.subject import Subject


def require_place(reference: Subject, out: Path, overwrite: bool) -> None:
    """Refuses an output that is taken, or not apart from what it is made from."""
    require_absent(out, overwrite=overwrite)
    found = reference.adapter
    if found is None:
        models.check_folder(reference.folder)
        require_apart(out, reference.folder)
    else:
        require_apart(out, found.base, found.folder, _run_of(found.folder))


@contextmanager
def proven_first(out: Path, wait: bool) -> Iterator[Path]:
    """Where to write: with ``wait`` beside a former artefact, which stays until the proof."""
    restore_former(out)
    target = out.with_name(f"{out.name}.unproven") if wait and out.exists() else out
    try:
        yield target
    except KeyboardInterrupt:
        raise Interrupted(
            "Stopped before the model was complete; what is written is kept.",
            where=out,
            fix="the same command goes on",
        ) from None
    if target != out:
        replace_folder(target, out)


def _run_of(adapter: Path) -> Path:
    """The run an adapter lies in, or the adapter itself."""
    return adapter.parent if (adapter.parent / "recipe.yaml").is_file() else adapter
