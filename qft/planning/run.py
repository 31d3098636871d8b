"""A run beside its plan: predicted before the first step, measured until the last, both kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from qft.errors import QftError, WillNotFitError, first_line
from qft.inputs import Inputs
from qft.lean.checkpointing import checkpointed_layers
from qft.planning.calibration import Calibration, Kind
from qft.planning.depth import forget
from qft.planning.forecast import Forecast, forecast, safe_peak, speed, train_phase
from qft.planning.job import PlannedJob
from qft.planning.loading import opened
from qft.planning.solver import solve
from qft.planning.speed import flops_a_step, record_speed
from qft.planning.unseen import record_step
from qft.preparation import inner_model
from qft.progress import QUIET, Reporter, human_bytes
from qft.readiness import Ready
from qft.recipe import Recipe


@dataclass
class RunPlan:
    """What was said of a run before it began.

    Attributes:
        budget_bytes: what it may take, or None.
        made: None until the model is loaded and what is left to choose is chosen.
    """

    recipe: Recipe
    inputs: Inputs
    ready: Ready
    device: str
    budget_bytes: int | None
    reporter: Reporter = QUIET
    calibration: Calibration = field(default_factory=Calibration)
    made: Forecast | None = None
    failed: str | None = None  # why there is no forecast

    @property
    def _job(self) -> PlannedJob:
        return PlannedJob(self.recipe, self.inputs, self.ready, self.device)

    def require_loadable(self, free_bytes: int | None) -> None:
        """Refuses what would not even load, before the first weight is read.

        Args:
            free_bytes: of the device; None where nobody knows.

        Raises:
            WillNotFitError: with what would fit.
        """
        allowed = self.budget_bytes if self.budget_bytes is not None else free_bytes
        found = opened(self._job)
        needed = found.weights + found.device
        if allowed is None or needed <= allowed:
            return
        raise WillNotFitError(
            "The model does not fit, its weights alone.",
            where="memory.budget" if self.budget_bytes is not None else self.device,
            found=f"{human_bytes(needed)} needed to load it, {human_bytes(allowed)} "
            + ("allowed" if self.budget_bytes is not None else "free"),
            fix=" or ".join(self.suggestions(allowed)) or "a smaller model",
        )

    def predict(self, model: nn.Module, micro_batch: int) -> None:
        """Foretells the run as it was set up: a plan that fails costs the run nothing.

        Args:
            model: prepared; its layers know by now whether they recompute.
            micro_batch: examples a forward pass at most.
        """
        changes: dict[str, Any] = {"micro_batch": micro_batch}
        if layers := checkpointed_layers(inner_model(model)):
            changes["checkpointing"] = sum(bool(x.gradient_checkpointing) for x in layers)
        memory = self.recipe.memory.model_copy(update=changes)
        recipe = self.recipe.model_copy(update={"memory": memory})
        job = PlannedJob(recipe, self.inputs, self.ready, self.device)
        try:
            self.made = forecast(job, self.calibration)
        except (QftError, RuntimeError, NotImplementedError, TypeError) as error:
            self.failed = first_line(error)  # a family or a strategy whose code fakes cannot run
            self.reporter.say(f"note: this job could not be planned ({self.failed})")
            return
        finally:
            forget()  # the prepared fakes
        peak = self.made.peak
        self.reporter.say(
            f"plan: peak {human_bytes(peak.expected)} ({human_bytes(peak.low)} to "
            f"{human_bytes(peak.high)}; {peak.basis}), in the phase {self.made.peak_phase}"
        )

    def suggestions(self, allowed: int | None = None) -> Sequence[str]:
        """The cheapest changes that would make it fit, in words for the command line."""
        budget = self.budget_bytes if allowed is None else allowed
        if budget is None:
            return ()
        try:
            return solve(self._job, budget, safe_peak(self.calibration)).cheapest_changes
        except (QftError, RuntimeError, NotImplementedError, TypeError):
            return ()  # an error is at hand already, and this is but its advice

    def as_dict(self) -> dict[str, Any]:
        """For `run.json`."""
        if self.made is None:
            return {"failed": self.failed, "budget_bytes": self.budget_bytes}
        found = speed(self.made, self.calibration)
        return {
            **self.made.as_dict(),
            "budget_bytes": self.budget_bytes,
            "speed": None if found is None else asdict(found),
        }

    def keep(self, measured: Mapping[str, Mapping[str, Any]], steps: int, seconds: float) -> None:
        """Keeps how far the plan was off, for plans to come.

        Args:
            measured: what `qft.phase_peaks.PhasePeaks.report` says.
            steps: that were timed.
            seconds: they took.
        """
        if self.made is None:
            return
        seen = measured.get("train", {})
        live = seen.get("allocated_bytes", seen.get("live_bytes"))
        whole = seen.get("reserved_bytes", seen.get("resident_bytes"))
        record_step(self.made.job, train_phase(self.made), live, whole, self.calibration)
        flops = steps * flops_a_step(self.made.job, self.made.reading)
        record_speed(Kind.of(self.made.job), flops, seconds, self.calibration)
