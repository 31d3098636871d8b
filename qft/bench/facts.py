"""What of a verb's result belongs in the ledger: a reader a verb, from its report to flat facts.

What a report does not hold, or holds in another form, is left out: a record tells what is known.
Which words mean what stands in docs/planning.md.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from qft.bench.scrubbing import name_of

if TYPE_CHECKING:
    from qft.recipe import Recipe

Facts = dict[str, Any]
MEASURED = ("allocated", "reserved", "resident", "live", "disk")  # bytes at a phase's peak


def of_recipe(recipe: Recipe) -> Facts:
    """What a recipe asks for, and a hash of all of it but the place to write to.

    The hash is of every knob, defaults written out, with names in place of paths: the same recipe
    in another folder or on another machine has the same one. What the files behind the names hold
    is not in it; fingerprints of data and model stand beside it where a run knows them.
    """
    whole = _named({k: v for k, v in recipe.to_dict().items() if k != "output"})
    text = json.dumps(whole, sort_keys=True, ensure_ascii=False)
    changed = recipe.model_dump(mode="json", exclude={"strategy", "output"}, exclude_defaults=True)
    return {
        "model": name_of(recipe.model),
        "task": recipe.task,
        "quantize": recipe.quantize,
        "method": whole["strategy"].get("name"),
        "strategy": whole["strategy"],
        "recipe_hash": hashlib.sha256(text.encode()).hexdigest()[:16],
        "recipe": _named({k: v for k, v in changed.items() if v != {}}),
    }


def _named(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _named(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_named(inner) for inner in value]
    return name_of(value) if isinstance(value, str) and value else value


def of_result(verb: str, result: Any) -> Facts:
    """The facts of a verb's result; nothing of a verb that is not known."""
    read = READERS.get(verb)
    found = read(result) if read is not None and isinstance(result, Mapping) else {}
    return {key: value for key, value in found.items() if value is not None}


def of_run(report: Mapping[str, Any]) -> Facts:
    """Of a training's report, which is what run.json holds."""
    if "mean" in report and "folds" in report:
        return {"metrics": numbers(report["mean"])}
    training = mapping(report.get("training"))
    seconds, memory = training.get("train_seconds"), memory_by_phase(report)
    return {
        **{key: report.get(key) for key in (
            "task", "strategy", "base_fingerprint", "data_fingerprint", "device", "device_name",
            "dtype", "quantize", "parameters", "trained_parameters", "versions")},
        "model": report.get("base"),
        "method": mapping(report.get("strategy")).get("name"),
        "steps": training.get("steps"),
        "micro_batch": training.get("micro_batch"),
        "replays": training.get("replays"),
        "tokens": training.get("tokens"),
        "train_seconds": seconds,
        "train_cpu_seconds": training.get("train_cpu_seconds"),
        "tokens_per_second": _rate(training.get("tokens"), seconds),
        "supervised_items_per_second": _rate(training.get("supervised_items"), seconds),
        "tokens_per_cpu_second": _rate(training.get("tokens"), training.get("train_cpu_seconds")),
        **_peak(training, memory, report.get("device") == "cuda"),
        **_predicted_peak(report.get("plan") or training.get("plan")),
        "memory": memory or None,
        "metrics": numbers(report.get("metrics")) | numbers(
            {"train_loss": training.get("train_loss")}),
    }  # fmt: skip


def _peak(training: Mapping[str, Any], memory: Mapping[str, Any], cuda: bool) -> Facts:
    """The most of all phases, and of what kind: the resident set of a run without its libraries.

    A report that knows no phases tells what the whole process held.
    """
    kind = "allocated" if cuda else "resident"
    most = _most(memory, kind)
    if most is None:
        whole = _whole(training.get("measured_peak_bytes"))
        return {"peak_bytes": whole, "peak_kind": None if whole is None else kind}
    if not cuda:
        return {"peak_bytes": most, "peak_kind": "resident above the libraries"}
    return {"peak_bytes": most, "peak_kind": kind, "process_peak_allocated_bytes": most,
            "process_peak_reserved_bytes": _most(memory, "reserved")}  # fmt: skip


def _most(memory: Mapping[str, Any], kind: str) -> int | None:
    found = [sides["measured"].get(f"{kind}_bytes") for sides in memory.values()
             if "measured" in sides]  # fmt: skip
    return max((value for value in found if value is not None), default=None)


def memory_by_phase(report: Mapping[str, Any]) -> dict[str, dict[str, dict[str, int]]]:
    """Predicted and measured bytes of each phase, as far as a report knows them."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    training = mapping(report.get("training"))
    for phase, values in predicted_phases(report.get("plan") or training.get("plan")).items():
        found.setdefault(phase, {})["predicted"] = values
    measured = mapping(training.get("measured") or report.get("measured"))
    for phase, held in measured.items():
        values = _measured(mapping(held))
        if values:
            found.setdefault(str(phase), {})["measured"] = values
    return found


def predicted_phases(plan: Any) -> dict[str, dict[str, int]]:
    """A plan's bytes by phase: on the device, on the host, on the disk."""
    phases = mapping(plan).get("phases")
    if isinstance(phases, Mapping):
        phases = [{"phase": name, **mapping(held)} for name, held in phases.items()]
    found = {}
    for one in phases if isinstance(phases, list) else []:
        held = mapping(one)
        sums = {f"{place}_bytes": _total(held.get(place)) for place in ("device", "host", "disk")}
        sums |= {key: _whole(held.get(key)) for key in sums if sums[key] is None}
        sums["disk_peak_bytes"] = _whole(held.get("disk_peak", held.get("disk_peak_bytes")))
        values = {key: value for key, value in sums.items() if value is not None}
        if values and isinstance(held.get("phase"), str):
            found[held["phase"]] = values
    return found


def _measured(held: Mapping[str, Any]) -> dict[str, int]:
    values = {}
    for kind in MEASURED:
        value = _whole(held.get(f"{kind}_bytes", held.get(kind)))
        if value is not None:
            values[f"{kind}_bytes"] = value
    return values


def _of_metrics(result: Mapping[str, Any]) -> Facts:
    return {"metrics": numbers(result)}


def _of_delivery(report: Mapping[str, Any]) -> Facts:
    base = mapping(report.get("base"))
    return {
        "file_bytes": _whole(report.get("bytes")),
        "onto": base.get("onto"),
        **_of_verification(mapping(report.get("verification"))),
    }


def _of_verification(report: Mapping[str, Any]) -> Facts:
    kept = ("mean_kl", "p99_kl", "top1", "perplexity", "perplexity_reference")
    figures = numbers({key: report.get(key) for key in kept})
    figures |= numbers(report.get("metrics"))
    return {"metrics": figures or None, "verified": report.get("passed")}


def _of_pruning(result: Mapping[str, Any]) -> Facts:
    source, after = mapping(result.get("source")), mapping(result.get("after"))
    quality = mapping(result.get("quality"))
    before = {f"unpruned_{k}": v for k, v in numbers(quality.get("before")).items()}
    figures = numbers(quality.get("after")) | numbers({"mean_kl": quality.get("mean_kl")}) | before
    return {
        "method": result.get("method"),
        "model": source.get("name"),
        "base_fingerprint": source.get("fingerprint"),
        "parameters": _whole(after.get("parameters")),
        "file_bytes": _whole(after.get("bytes")),
        "metrics": figures or None,
    }


def _of_teaching(report: Mapping[str, Any]) -> Facts:
    return {"file_bytes": _whole(report.get("bytes")), "rows": _whole(report.get("rows")),
            "metrics": numbers({"coverage": report.get("coverage")}) or None}  # fmt: skip


def _of_healing(result: Mapping[str, Any]) -> Facts:
    healed = mapping(result.get("healed"))
    figures = numbers(healed.get("metrics"))
    for name in ("unpruned", "pruned"):
        told = numbers(mapping(result.get(name)).get("metrics"))
        figures |= {f"{name}_{key}": value for key, value in told.items()}
    return {"parameters": _whole(healed.get("parameters")),
            "file_bytes": _whole(healed.get("bytes")), "metrics": figures or None}  # fmt: skip


def _of_demo(result: Mapping[str, Any]) -> Facts:
    report = {"training": result.get("training"), "metrics": result.get("after")}
    return of_run(report) | {"metrics": numbers(result.get("after"))}


def _of_step(row: Mapping[str, Any]) -> Facts:
    taken = {"device_bytes": row.get("peak_bytes"), "host_bytes": row.get("host_peak_bytes")}
    return {"method": row.get("strategy"), "flops": row.get("flops"),
            "memory": {"train": {"predicted": taken}}}  # fmt: skip


def _of_plan(plan: Mapping[str, Any]) -> Facts:
    phases = {phase: {"predicted": held} for phase, held in predicted_phases(plan).items()}
    kept = ("device", "device_name", "dtype", "quantize", "task", "fits", "budget_bytes",
            "parameters", "trained_parameters", "micro_batch", "flops")  # fmt: skip
    return {**{key: plan.get(key) for key in kept}, **_predicted_peak(plan),
            "memory": phases or None}  # fmt: skip


def _predicted_peak(plan: Any) -> Facts:
    """What a plan expects the largest phase to take of the device, and between which bounds."""
    held = mapping(plan)
    return {f"predicted_{key}": _whole(held.get(key))
            for key in ("peak_bytes", "low_bytes", "high_bytes")}  # fmt: skip


READERS: dict[str, Callable[[Mapping[str, Any]], Facts]] = {
    "train": of_run,
    "eval": _of_metrics,
    "merge": _of_delivery,
    "export": _of_delivery,
    "verify": _of_verification,
    "prune": _of_pruning,
    "teach": _of_teaching,
    "heal": _of_healing,
    "demo": _of_demo,
    "bench step": _of_step,
    "plan": _of_plan,
}


def numbers(values: Any) -> dict[str, float]:
    """The finite numbers among a mapping's values."""
    found = {}
    for key, value in mapping(values).items():
        number = number_in(value)
        if number is not None:
            found[str(key)] = number
    return found


def number_in(value: Any) -> float | None:
    """The value as a number, if it is a finite one; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def _whole(value: Any) -> int | None:
    number = number_in(value)
    return None if number is None else int(number)


def _total(value: Any) -> int | None:
    """The sum of a mapping's bytes, or the number itself."""
    if isinstance(value, Mapping):
        return int(sum(numbers(value).values()))
    return _whole(value)


def _rate(count: Any, seconds: Any) -> float | None:
    amount, time = number_in(count), number_in(seconds)
    return amount / time if amount is not None and time else None
