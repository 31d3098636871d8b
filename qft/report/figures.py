"""The charts of a run: loss, learning rate, throughput, memory, held-out metrics, the plan."""

from __future__ import annotations

from collections.abc import Mapping

from qft.report.bars import draw_bars
from qft.report.lines import Limit, LineChart, Point, Series, smoothed
from qft.report.numbers import ByteUnit, bytes_text, compact, duration_text, short
from qft.report.story import Story, mapping, number

_SMOOTHED_FROM = 40  # points of a noisy line
_ONE, _TWO, _INK = "var(--q-one)", "var(--q-two)", "var(--q-soft)"
_METRICS = 4  # drawn together; the table has them all
_PALETTE = (_ONE, _TWO, "var(--q-good)", _INK)
# what is told beside a metric, and needs no line of its own
_NO_METRIC = ("loss", "bits_per_byte", "runtime")


def training_charts(story: Story) -> list[str]:
    """Loss, held-out metrics, throughput, learning rate, gradient norm: those that were logged."""
    charts = [_loss(story), _metrics(story), _throughput(story), _rate(story), _norm(story)]
    return [chart.draw() for chart in charts if chart is not None]


def memory_chart(story: Story) -> str | None:
    """Memory over the steps, against plan and budget."""
    now = beyond_floor(story, "memory_bytes")
    if not now:
        return None
    taken = beyond_floor(story, "memory_taken_bytes")
    peaks = beyond_floor(story, "memory_peak_bytes")
    held = "allocated" if taken else "resident"
    series = [
        Series(f"{held}, most since the line before", peaks, _ONE),
        Series(f"{held}, between steps", now, _INK),
        Series("taken of the GPU in all", taken, _TWO),
    ]
    series = [one for one in series if one.finite]
    unit = ByteUnit.of(max((y for s in series for _, y in s.finite), default=1))
    return LineChart(
        "Memory", series, unit=unit.name, scale=unit.size, limits=_limits(story),
        marks=_shortages(story), text=bytes_text, from_zero=True,
    ).draw()  # fmt: skip


def plan_chart(story: Story) -> str | None:
    """The plan's bars, with what was measured."""
    if not any(p.device or p.host for p in story.phases):
        return None
    return draw_bars(story.phases, budget_bytes(story), measured_peaks(story))


def budget_bytes(story: Story) -> int | None:
    """What the training was allowed to take."""
    asked = mapping(story.recipe.get("memory")).get("budget")
    told = (story.plan.get("budget_bytes"), story.run.get("budget_bytes"), asked)
    found = next((n for n in map(number, told) if n and n > 0), None)
    return int(found) if found else None


def measured_peaks(story: Story) -> dict[str, int]:
    """The most bytes that each phase was seen to take, in the terms of the plan.

    On a CPU resident beyond the libraries; on a GPU what the allocator had reserved, and the
    context as planned, which nobody can measure by itself.
    """
    context = {p.phase: p.device.get("context", 0) for p in story.phases}
    peaks: dict[str, int] = {}
    for phase, found in story.measured.items():
        if "reserved_bytes" in found:
            peaks[phase] = int(found["reserved_bytes"]) + context.get(phase, 0)
        elif "resident_bytes" in found:
            peaks[phase] = int(found["resident_bytes"])
    return peaks


def beyond_floor(story: Story, key: str) -> list[Point]:
    """A logged amount, less what was there before the model; never less than nothing."""
    return [
        (line["step"] or 0, None if value is None else max(0, value - (line.get(_FLOOR) or 0)))
        for line in story.lines
        if key in line
        for value in [line[key]]
    ]


_FLOOR = "memory_floor_bytes"


def _limits(story: Story) -> list[Limit]:
    plan, found = story.plan, []
    peak = number(plan.get("peak_bytes"))
    if peak:
        low, high = number(plan.get("low_bytes")), number(plan.get("high_bytes"))
        found.append(Limit("planned peak", peak, _INK, low, high))
    if live := story.measured.get("train", {}).get("live_bytes"):
        found.append(Limit("tensors, by the meter", live, "var(--q-good)"))
    if (budget := budget_bytes(story)) is not None:
        found.append(Limit("budget", budget))
    return found


def _shortages(story: Story) -> list[tuple[float, str]]:
    return [(step, f"step {short(step)}: {what}") for step, what in story.shortages]


def _loss(story: Story) -> LineChart | None:
    training, held_out = story.series("loss"), story.held_out.get("loss", [])
    if not training and not held_out:
        return None
    series = []
    if len(training) >= _SMOOTHED_FROM:
        window = max(3, len(training) // 16)
        series = [Series("training, each logged step", training, _ONE, "faint"),
                  Series("training (smoothed)", smoothed(training, window), _ONE)]  # fmt: skip
    elif training:
        series = [Series("training", training, _ONE)]
    if held_out:
        series.append(Series("held-out", held_out, _TWO, "dots"))
    return LineChart("Loss", series, unit="nats", marks=_shortages(story))


def _metrics(story: Story) -> LineChart | None:
    told = {
        name: points
        for name, points in story.held_out.items()
        if name not in _NO_METRIC and all(y is None or 0 <= y <= 1 for _, y in points)
    }
    chosen = list(told.items())[:_METRICS]
    if not any(len(points) > 1 for _, points in chosen):
        return None
    series = [
        Series(name.replace("_", " "), points, colour, "dots")
        for (name, points), colour in zip(chosen, _PALETTE, strict=False)
    ]
    title = f"Held-out {series[0].name}" if len(series) == 1 else "Held-out metrics"
    return LineChart(title, series)


def _throughput(story: Story) -> LineChart | None:
    series = [
        Series(name, points, colour)
        for name, key, colour in (
            ("all tokens", "tokens_per_second", _ONE),
            ("supervised", "supervised_per_second", _TWO),
        )
        if (points := story.series(key))
    ]
    if not series:
        return None
    planned = number(mapping(story.plan.get("speed")).get("tokens_per_second"))
    limits = [Limit("planned, all tokens", planned, _INK)] if planned else []
    return LineChart("Throughput", series, unit="tokens/s", limits=limits,
                     marks=_shortages(story), from_zero=True)  # fmt: skip


def _rate(story: Story) -> LineChart | None:
    rates = story.series("learning_rate")
    if not rates:
        return None
    return LineChart("Learning rate", [Series("learning rate", rates)], from_zero=True)


def _norm(story: Story) -> LineChart | None:
    norms = story.series("grad_norm")
    if not norms:
        return None
    return LineChart("Gradient norm", [Series("gradient norm", norms)], from_zero=True)


def key_figures(story: Story) -> Mapping[str, str]:
    """The few numbers of a run that everyone asks for."""
    training, found = story.training, {}
    metrics = mapping(story.run.get("metrics"))
    loss = number(metrics.get("loss")) or story.last("eval_loss")
    if loss is not None:
        found["held-out loss"] = short(loss)
    if (own := story.last("loss")) is not None:
        found["last training loss"] = short(own)
    rate = number(training.get("tokens_per_second")) or story.last("tokens_per_second")
    if rate:
        found["tokens a second"] = short(rate)
    peak = max(measured_peaks(story).values(), default=None)
    if known := peak or number(training.get("measured_peak_bytes")):
        found["peak memory"] = bytes_text(known)
    seconds = number(training.get("train_seconds")) or story.last("train_seconds")
    if seconds:
        found["time training"] = duration_text(seconds)
    trained, all_of_them = (number(story.run.get(k)) for k in _PARAMETERS)
    if trained and all_of_them:
        found["trained parameters"] = f"{compact(trained)} ({100 * trained / all_of_them:.2g} %)"
    return found


_PARAMETERS = ("trained_parameters", "parameters")
