"""What was measured against what was predicted, and how fast: kept for the next plan.

A residual is kept with what it belongs to: device, dtype, quantization, strategy, versions. A later
prediction is shifted by the residuals of its own kind and carries an error bar; where there are
none of its kind, those of the device and dtype help, then the device's, then what was measured when
this was written. Rates (operations a second) are kept beside them.

The file is `qft/calibration.json` under XDG_CACHE_HOME or ~/.cache; QFT_CALIBRATION names another,
or says ``off``: nothing is read or kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypeVar

from qft import hardware
from qft.errors import QftError, first_line
from qft.files import write_text
from qft.planning.job import PlannedJob

FORMAT = 1
MOST_OF_A_KEY = 16  # residuals, or rates: the newest
MOST = 1000  # of all keys
MOST_BYTES = 4 << 20  # a longer file is not one of ours
Figure = Literal["live", "resident", "allocated", "reserved"]
# half an error bar as a share of the prediction, where nothing was measured; see `unseen`
DEFAULT_BAR: dict[str, float] = {
    "live": 0.01, "resident": 0.10, "allocated": 0.03, "reserved": 0.08
}  # fmt: skip
# and in bytes: a process's own libraries and small objects differ by as much from job to job
LEAST_BAR: dict[str, int] = {"resident": 12 << 20}
# of a bar that is left however much was measured: the same training twice is not quite the same
LEFT = 0.5
# how much wider a bar is that rests on residuals of another kind
_WIDER = {"kind": 1.0, "dtype": 1.5, "device": 2.0}
_Item = TypeVar("_Item")
_DECIDING = ("torch", "transformers", "peft", "bitsandbytes")
OFF = "off"


@dataclass(frozen=True)
class Kind:
    """What a residual or a rate belongs to.

    Attributes:
        device: the name of the card or the processor.
        dtype: of weights and arithmetic: ``bfloat16``.
        quantization: how the frozen weights are held: ``none``, ``nf4``.
        strategy: its name.
        versions: of the libraries that decide bytes and speed.
    """

    device: str
    dtype: str
    quantization: str = "none"
    strategy: str = ""
    versions: str = ""

    @classmethod
    def of(cls, job: PlannedJob) -> Kind:
        """Of a job; its device is this machine's, if this machine has such a one."""
        found = hardware.versions()
        return cls(
            device=hardware.device_name(job.device),
            dtype=str(job.dtype).removeprefix("torch."),
            quantization=job.ready.held,
            strategy=job.recipe.strategy.name,
            versions=" ".join(f"{name} {found[name]}" for name in _DECIDING),
        )

    def likeness(self, other: Kind) -> str | None:
        """How near another is: ``kind``, ``dtype``, ``device``, or None."""
        if self == other:
            return "kind"
        if self.device != other.device:
            return None
        return "dtype" if self.dtype == other.dtype else "device"


@dataclass(frozen=True)
class Residual:
    """One measurement beside its prediction, in bytes."""

    kind: Kind
    figure: str
    predicted: int
    measured: int
    day: str = ""

    @property
    def absolute(self) -> int:
        """Bytes that were not foreseen."""
        return self.measured - self.predicted

    @property
    def relative(self) -> float:
        """As a share of the prediction."""
        return self.absolute / self.predicted

    def at(self, predicted: int) -> float:
        """What it says of another prediction, in bytes.

        A smaller job has its share of it. A larger one has no more of it: what is unforeseen is
        mostly there once.
        """
        return self.absolute * min(1.0, predicted / self.predicted)


@dataclass(frozen=True)
class Rate:
    """Floating-point operations a second, and what they were measured by.

    Attributes:
        source: ``training`` (a whole step) or ``products`` (matrix products alone).
    """

    kind: Kind
    source: str
    flops_per_second: float
    day: str = ""


@dataclass(frozen=True)
class Expected:
    """A prediction with its error bar, in bytes.

    Attributes:
        basis: what the shift and the bar rest on, for people.
    """

    expected: int
    low: int
    high: int
    basis: str


@dataclass
class _Content:
    residuals: list[Residual] = field(default_factory=list)
    rates: list[Rate] = field(default_factory=list)


class Calibration:
    """The store. It is read when it is made; each record is written at once.

    Args:
        path: None is where `default_path` says.
        persistent: False keeps what is recorded in this object only, and reads nothing.

    Attributes:
        notes: what went wrong with the file, a sentence each; a plan is made all the same.
    """

    def __init__(self, path: Path | str | None = None, *, persistent: bool = True) -> None:
        self.path = Path(path) if path is not None else default_path()
        self.notes: list[str] = []
        self._persistent = persistent and self.path.name != OFF
        self._content = self._read() if self._persistent else _Content()

    @property
    def residuals(self) -> Sequence[Residual]:
        """All that are kept, the oldest first."""
        return self._content.residuals

    @property
    def rates(self) -> Sequence[Rate]:
        """All that are kept, the oldest first."""
        return self._content.rates

    def record(self, kind: Kind, figure: Figure, predicted: int, measured: int) -> None:
        """Keeps a residual; what cannot be one (nothing predicted or measured) is left out."""
        if predicted > 0 and measured > 0:
            added = Residual(kind, figure, int(predicted), int(measured), date.today().isoformat())
            self._add(lambda content: content.residuals.append(added))

    def record_rate(self, kind: Kind, source: str, flops_per_second: float) -> None:
        """Keeps a rate."""
        if math.isfinite(flops_per_second) and flops_per_second > 0:
            added = Rate(kind, source, float(flops_per_second), date.today().isoformat())
            self._add(lambda content: content.rates.append(added))

    def predict(self, predicted: int, kind: Kind, figure: Figure) -> Expected:
        """Shifts a prediction by the residuals of its kind, and says how sure it is."""
        bar = DEFAULT_BAR[figure] * predicted + LEAST_BAR.get(figure, 0)
        near, likeness = self._near(kind, figure)
        if not near:
            return _expected(predicted, 0.0, bar, "nothing measured here yet")
        shifts = [residual.at(predicted) for residual in near]
        shift = statistics.median(shifts)
        spread = 1.5 * statistics.median(abs(each - shift) for each in shifts)
        distance = min(abs(math.log(predicted / residual.predicted)) for residual in near)
        # the more measurements, and the nearer in size, the less of the built-in bar is left
        left = min(1.0, max(LEFT, math.sqrt(1 / (1 + len(near))) + 0.1 * distance))
        half = _WIDER[likeness] * math.hypot(left * bar, spread)
        what = {"kind": "of this kind", "dtype": "on this device in this dtype",
                "device": "on this device"}[likeness]  # fmt: skip
        count = len(near)
        basis = f"{count} measurement{'s' * (count != 1)} {what}"
        return _expected(predicted, shift, half, basis)

    def rate(self, kind: Kind, source: str) -> tuple[float, int] | None:
        """The median rate of the nearest kind there is, and of how many; None without any."""
        ranked: dict[str, list[float]] = {}
        for each in self._content.rates:
            likeness = kind.likeness(each.kind)
            if each.source == source and likeness is not None and likeness != "device":
                ranked.setdefault(likeness, []).append(each.flops_per_second)
        for likeness in ("kind", "dtype"):
            if found := ranked.get(likeness):
                return statistics.median(found), len(found)
        return None

    def _near(self, kind: Kind, figure: str) -> tuple[list[Residual], str]:
        for wanted in ("kind", "dtype", "device"):
            found = [
                residual
                for residual in self._content.residuals
                if residual.figure == figure and kind.likeness(residual.kind) == wanted
            ]
            if found:
                return found, wanted
        return [], ""

    def _add(self, change: Callable[[_Content], None]) -> None:
        """Other processes may have written since: their records are read anew and kept."""
        if not self._persistent:
            change(self._content)
            _bound(self._content)
            return
        try:
            with _locked(self.path):
                self._content = self._read()
                change(self._content)
                _bound(self._content)
                write_text(self.path, _to_json(self._content))
        except (OSError, QftError) as error:  # a training must not die of this
            change(self._content)
            self._note(f"the calibration is not kept: {first_line(error)}")

    def _read(self) -> _Content:
        try:
            if self.path.stat().st_size > MOST_BYTES:
                raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
            return _from_json(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return _Content()
        except OSError as error:
            self._note(f"the calibration cannot be read: {error.strerror}")
            return _Content()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            aside = self.path.with_name(f"{self.path.name}.broken")
            with contextlib.suppress(OSError):
                os.replace(self.path, aside)
            self._note(
                f"the calibration was broken ({first_line(error)}) and is now {aside.name}; "
                "it begins anew"
            )
            return _Content()

    def _note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)


def default_path() -> Path:
    """Where the store is, by the environment."""
    if named := os.environ.get("QFT_CALIBRATION"):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "qft" / "calibration.json"


def _expected(predicted: int, shift: float, half: float, basis: str) -> Expected:
    middle = max(0.0, predicted + shift)
    return Expected(round(middle), max(0, round(middle - half)), round(middle + half), basis)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock is a file of its own, since the store is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _bound(content: _Content) -> None:
    content.residuals = _newest(content.residuals, lambda each: (each.kind, each.figure))
    content.rates = _newest(content.rates, lambda each: (each.kind, each.source))


def _newest(items: list[_Item], key: Callable[[_Item], Any]) -> list[_Item]:
    """The last ones of each key, and of all."""
    counts: dict[Any, int] = {}
    kept: list[_Item] = []
    for item in reversed(items):
        counts[key(item)] = counts.get(key(item), 0) + 1
        if counts[key(item)] <= MOST_OF_A_KEY:
            kept.append(item)
    return kept[:MOST][::-1]


def _to_json(content: _Content) -> str:
    values = {
        "format": FORMAT,
        "residuals": [asdict(item) for item in content.residuals],
        "rates": [asdict(item) for item in content.rates],
    }
    return json.dumps(values, indent=1) + "\n"


def _from_json(text: str) -> _Content:
    values = json.loads(text)
    if values["format"] != FORMAT:
        raise ValueError(f"its format is {str(values['format'])[:40]}, not {FORMAT}")
    residuals = [
        Residual(_kind(item["kind"]), str(item["figure"]), _count(item["predicted"]),
                 _count(item["measured"]), str(item["day"]))
        for item in values["residuals"]
    ]  # fmt: skip
    rates = [
        Rate(_kind(item["kind"]), str(item["source"]), _positive(item["flops_per_second"]),
             str(item["day"]))
        for item in values["rates"]
    ]  # fmt: skip
    return _Content(residuals, rates)


def _kind(values: dict[str, Any]) -> Kind:
    return Kind(**{str(name): str(value) for name, value in values.items()})


def _count(value: Any) -> int:
    if type(value) is not int or value <= 0:
        raise ValueError("it holds bytes that are no positive number")
    return value


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not 0 < float(value) < math.inf:
        raise ValueError("it holds a rate that is no positive number")
    return float(value)
