"""Counts, shows and logs a training while it runs, and ends it in good order on Ctrl-C."""

from __future__ import annotations

import json
import math
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from qft import hardware
from qft.enforcement import context_bytes
from qft.errors import QftError
from qft.files import explain_write_errors, json_ready, write_text
from qft.phase_peaks import PhasePeaks
from qft.progress import Bar, Reporter, human_bytes
from qft.step import StepResult
from qft.trainer import StepTrainer

_COUNTS = ("seconds", "cpu_seconds", "tokens", "items", "replays", "shortages")
_COMPARED = 5  # steps after which the rate is compared with the one before a change
_FALLEN = 0.05  # share of the rate whose loss is worth a line


class RunWatch(TrainerCallback, ExportableState):
    """Counts, shows and logs; ends the run after the step at hand when asked to.

    Its counts go into every checkpoint, so that a resumed run reports all of its parts. The peaks
    are those of the run, which the lines of the log ask from one to the next.
    """

    def __init__(
        self,
        trainer: StepTrainer,
        log: Path,
        device: str,
        reporter: Reporter,
        peaks: PhasePeaks,
    ) -> None:
        self._trainer = trainer
        self._log = log
        self._device = device
        self._reporter = reporter
        self._peaks = peaks
        self._bar: Bar | None = None
        self._context: Any = None
        self._started = self._cpu_started = 0.0
        self.seconds = 0.0
        self.cpu_seconds = 0.0  # of all threads: what a busy machine cannot falsify
        self.tokens = 0
        self.items = 0
        self.replays = 0
        self._logged = (0.0, 0, 0)  # seconds, tokens and items at the line before
        self.shortages: list[dict[str, Any]] = []  # of memory: the step, and what was done
        self._rate_before = 0.0  # tokens a second before the last change
        self._since: list[float] = []  # of the clean steps since then
        self.stop_asked = False

    def state(self) -> dict[str, Any]:
        """The counts, for the checkpoint."""
        return {"args": {}, "attributes": {name: getattr(self, name) for name in _COUNTS}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar; drops log lines past the checkpoint."""
        keep_lines_up_to(self._log, state.global_step)
        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        for name in _COUNTS:
            setattr(self, name, saved.get(name, getattr(self, name)))
        self._logged = (self.seconds, self.tokens, self.items)
        self._peaks.since_asked()  # what loading took is not the first steps'
        self._context = self._reporter.bar("train", state.max_steps)
        self._bar = self._context.__enter__()
        self._started, self._cpu_started = time.monotonic(), time.process_time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock: evaluation and saving do not count as training time."""
        self._started, self._cpu_started = time.monotonic(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts and shows the step; stops here where Ctrl-C asked for it."""
        result = self._trainer.last_result
        assert result is not None
        assert self._bar is not None
        if not math.isfinite(result.loss.item()):
            raise QftError(
                "The loss is no longer a finite number; going on would train nothing.",
                where=f"step {state.global_step}",
                found=result.loss.item(),
                fix="a lower train.learning_rate, or dtype: float32; checkpoints before this step "
                "are kept",
            )
        self.seconds += time.monotonic() - self._started
        self.cpu_seconds += time.process_time() - self._cpu_started
        self.tokens += result.tokens
        self.items += result.items
        self._say_shortages(state.global_step, result, time.monotonic() - self._started)
        now, peak = hardware.device_memory(self._device)[0], self._peaks.process_peak_bytes()
        self._bar.update(
            state.global_step,
            f"loss {result.loss.item():.3f}  {self.tokens / max(self.seconds, 1e-9):.0f} tok/s  "
            f"memory {human_bytes(now)}, peak {human_bytes(peak)}",
        )
        if self.stop_asked:
            control.should_save = True
            control.should_training_stop = True

    def _say_shortages(self, step: int, result: StepResult, seconds: float) -> None:
        """What had to change for lack of memory, and some steps later what that costs."""
        for sentence in self._trainer.changes:
            self.shortages.append({"step": step, "what": sentence})
            self._reporter.say(f"step {step}: {sentence}; the same samples were replayed")
        self.replays += result.replays
        rate = result.tokens / max(seconds, 1e-9)
        if result.replays:
            if not self._since:
                self._rate_before = (self.tokens - result.tokens) / max(
                    self.seconds - seconds, 1e-9
                )
            self._since = [0.0]
            return
        if not self._since:
            return
        self._since.append(rate)
        if len(self._since) > _COMPARED:
            now = statistics.median(self._since[1:])
            self._since = []
            if now < (1 - _FALLEN) * self._rate_before:
                self._reporter.say(
                    f"step {step}: {now:.0f} tokens/s since the change, "
                    f"{self._rate_before:.0f} before: {1 - now / self._rate_before:.0%} slower"
                )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kw: Any
    ) -> None:
        """Appends a line to metrics.jsonl."""
        line = {"step": state.global_step, **(logs or {}), **self._so_far()}
        with explain_write_errors(self._log), self._log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(json_ready(line)) + "\n")
        if self._bar is not None and logs and "eval_loss" in logs:
            shown = "  ".join(f"{k[5:]} {v:.4f}" for k, v in logs.items() if k.startswith("eval_"))
            self._reporter.say(f"step {state.global_step}: held-out {shown}")

    def _so_far(self) -> dict[str, Any]:
        """What `qft report` draws over the steps, beside loss and learning rate.

        Counts are of all the parts of a run; rates are of the steps since the line before.
        """
        seconds, tokens, items = self._logged
        self._logged = (self.seconds, self.tokens, self.items)
        facts = {
            "time": round(time.time(), 3),
            "train_seconds": self.seconds,
            "tokens": self.tokens,
            "supervised_items": self.items,
            "replays": self.replays,
            **self._memory(),
        }
        if (result := self._trainer.last_result) is not None:
            facts["micro_batch"] = result.micro_batch
        if self.seconds > seconds:  # not for an evaluation, which follows the line of its step
            facts["tokens_per_second"] = (self.tokens - tokens) / (self.seconds - seconds)
            facts["supervised_per_second"] = (self.items - items) / (self.seconds - seconds)
        return facts

    def _memory(self) -> dict[str, int]:
        """Bytes in use now, and the most since the line before: allocated, or resident.

        The floor is no part of the run. On a GPU `memory_taken_bytes` is all that the process
        takes there: what the allocator had reserved, and the context.
        """
        now = hardware.device_memory(self._device)[0]
        since, floor = self._peaks.since_asked(), self._peaks.floor_bytes
        facts = {"memory_bytes": now, "memory_floor_bytes": floor}
        if self._device == "cuda":
            taken = since["reserved_bytes"] + context_bytes()
            return facts | {
                "memory_peak_bytes": since["allocated_bytes"],
                "memory_taken_bytes": taken,
            }
        if "resident_bytes" not in since:
            return facts | {"memory_peak_bytes": self._peaks.process_peak_bytes()}
        return facts | {"memory_peak_bytes": max(now, floor + since["resident_bytes"])}

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
def interruptible(watch: RunWatch) -> Iterator[None]:
    """The first Ctrl-C ends after the step at hand; a second one at once."""

    def ask(number: int, frame: Any) -> None:
        if watch.stop_asked:
            raise KeyboardInterrupt
        watch.stop_asked = True

    try:
        former = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
