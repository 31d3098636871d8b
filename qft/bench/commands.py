"""`qft bench …`: what a step takes, and the ledger: list, compare, gate, table, plot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qft.bench.recorded import Ledger, RecordedCommand
from qft.errors import printable
from qft.terminal import Json, Quiet, print_json, print_result, print_rows, print_table

if TYPE_CHECKING:
    from qft.bench.ledger_file import Record

app = typer.Typer(no_args_is_help=True, help="Memory and throughput, measured and kept.")

_SIDE = "A number, id, 12-14, last, last:3, run folder or JSON file; several with commas."
Book = Annotated[Path | None, typer.Option("--ledger", help="Another ledger than the usual one.")]
Sides = Annotated[list[str] | None, typer.Argument(help=f"{_SIDE} Else the whole ledger.")]
Verb = Annotated[str | None, typer.Option(help="Only records of this command.")]
Model = Annotated[str | None, typer.Option(help="Only records whose model's name has this in it.")]
Metric = Annotated[str | None, typer.Option(help="The metric to show; else the best known one.")]
Higher = Annotated[
    bool | None, typer.Option("--higher/--lower", help="Which is better; else by its name.")
]


@app.command(cls=RecordedCommand)
def step(
    shape: Annotated[str, typer.Option(help="A built-in shape, or a config.json.")],
    length: Annotated[int, typer.Option("--seq", min=1, help="Tokens a sequence.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in one forward pass.")] = 1,
    rank: Annotated[int, typer.Option(min=1, help="Of LoRA on all linear layers.")] = 16,
    quantize: Annotated[str, typer.Option(help="none, nf4, fp4 or int8.")] = "none",
    checkpointing: Annotated[str, typer.Option(help="none, full, or a number of layers.")] = "full",
    offload: Annotated[str, typer.Option(help="none or host.")] = "none",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw-8bit or sgd.")] = "adamw",
    labels: Annotated[float, typer.Option(min=0, max=1, help="Share that has a label.")] = 1.0,
    option: Annotated[
        list[str] | None,
        typer.Option("--with", help="tiled_mlp, host_embeddings, int8_head; may be repeated."),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="PEFT's way, without the engine.")] = False,
    as_json: Json = False,
    ledger: Ledger = None,
) -> None:
    """The bytes and FLOPs of a training step at true scale: no weights, no GPU, seconds."""
    from qft.bench.step_words import meter_and_describe

    row = meter_and_describe(
        shape=shape, length=length, batch=batch, rank=rank, quantize=quantize,
        checkpointing=checkpointing, offload=offload, optimizer=optimizer, label_share=labels,
        options=option or [], plain=plain,
    )  # fmt: skip
    print_result(row, as_json, lambda: _show_step(row))


@app.command("train")
def train_repeatedly(
    recipe: Annotated[Path, typer.Argument(help="The recipe (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value, for example quantize=nf4.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each.")] = 20,
    repeat: Annotated[int, typer.Option(min=1, help="How many trainings.")] = 3,
    quiet: Quiet = False,
    as_json: Json = False,
    ledger: Book = None,
) -> None:
    """Train a few steps several times, in fresh processes: numbers for the gate."""
    from qft.bench.repeat import train_repeatedly as run
    from qft.progress import Reporter

    reporter = Reporter(quiet=quiet, stream="stderr" if as_json else "stdout")
    records = run(recipe, overrides or [], steps=steps, repeat=repeat, ledger=ledger,
                  reporter=reporter)  # fmt: skip
    if as_json:
        print_json(records)
    else:
        _show_medians(records)


@app.command("ledger")
def list_records(
    records: Sides = None,
    verb: Verb = None,
    model: Model = None,
    limit: Annotated[int, typer.Option(min=1, help="The newest so many.")] = 20,
    as_json: Json = False,
    ledger: Book = None,
) -> None:
    """What commands have left in the ledger, the newest last."""
    from qft.bench.listing import rows_of

    found = _records(records, verb, model, ledger)[-limit:]
    if as_json:
        print_json(found)
    elif found:
        print_rows(_printable(rows_of(found)))
    else:
        _note("no records")


@app.command("compare")
def compare_sides(
    a: Annotated[str, typer.Argument(help=_SIDE)],
    b: Annotated[str, typer.Argument(help="The same.")],
    as_json: Json = False,
    ledger: Book = None,
) -> None:
    """Two records, runs or groups of them, figure by figure."""
    from qft.bench.compare import compare, rows_of, to_dict, warnings
    from qft.bench.sides import Shelf

    shelf = Shelf(ledger)
    one, two = shelf.side(a), shelf.side(b)
    compared = compare(one, two)
    _say(shelf.notes())
    if as_json:
        print_json(to_dict(compared, one, two))
        return
    print_rows(_printable(rows_of(compared, one, two)))
    for warning in warnings(one, two):
        print(f"note: {printable(warning)}")


@app.command("gate")
def hold_gate(
    baseline: Annotated[str, typer.Argument(help=_SIDE)],
    candidate: Annotated[str, typer.Argument(help="The same.")],
    memory: Annotated[
        str | None, typer.Option(help="The peak may change by at most: +2%, +64MiB.")
    ] = None,
    throughput: Annotated[
        str | None, typer.Option(help="Tokens a second may change by at least: -5%.")
    ] = None,
    cpu_throughput: Annotated[
        str | None, typer.Option(help="The same of tokens a CPU-second, steadier on a busy CPU.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="loss=+0.02, accuracy=-1%, f1=±0.5%; may be repeated."),
    ] = None,
    any_device: Annotated[
        bool, typer.Option("--any-device", help="Though the devices are different.")
    ] = False,
    as_json: Json = False,
    ledger: Book = None,
) -> None:
    """Fail, with exit status 5, where a candidate is too much worse than a baseline."""
    from qft.bench.compare import warnings
    from qft.bench.gate import bounds_of, gate, require_passed, rows_of, to_dict
    from qft.bench.sides import Shelf

    bounds = bounds_of(memory, throughput, cpu_throughput, metric or [])
    shelf = Shelf(ledger)
    before, after = shelf.side(baseline), shelf.side(candidate)
    checks = gate(before, after, bounds, any_device=any_device)
    _say(shelf.notes())
    if as_json:
        print_json(to_dict(checks, before, after))
    else:
        print_rows(_printable(rows_of(checks)))
        for warning in warnings(before, after):
            print(f"note: {printable(warning)}")
    require_passed(checks)


@app.command("table")
def draw_table(
    records: Sides = None,
    verb: Verb = None,
    model: Model = None,
    metric: Metric = None,
    higher: Higher = None,
    pareto: Annotated[
        str, typer.Option(help="What counts for the mark: of memory, time, metric, size, speed.")
    ] = "memory,time,metric",
    sort: Annotated[str, typer.Option(help="One of the same.")] = "metric",
    markdown: Annotated[bool, typer.Option("--markdown", help="As a Markdown table.")] = False,
    as_json: Json = False,
    ledger: Book = None,
) -> None:
    """Method by peak memory, time, metric and file size; what nothing beats is marked."""
    from qft.bench import table as tables

    found = _records(records, verb, model, ledger)
    drawn = tables.table_of(found, metric=metric, higher=higher, axes=_words(pareto), sort=sort)
    rows = tables.rows_of(drawn)
    if as_json:
        print_json(tables.to_dict(drawn))
    elif markdown:
        print("\n".join([*tables.markdown(rows), "", tables.below(drawn).replace("*", "\\*")]))
    else:
        print_rows(_printable(rows))
        print(tables.below(drawn))


@app.command("plot")
def plot(
    records: Sides = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG or SVG.")] = Path("bench.png"),
    history: Annotated[
        bool, typer.Option("--history", help="Over time; else memory against the metric.")
    ] = False,
    verb: Verb = None,
    model: Model = None,
    metric: Metric = None,
    higher: Higher = None,
    ledger: Book = None,
) -> None:
    """Memory against a metric, or a kind of command over time, as a picture."""
    from qft.bench import plots
    from qft.bench.table import table_of

    plots.require_drawable(out)
    found = _records(records, verb, model, ledger)
    if history:
        plots.plot_history(found, out, metric)
    else:
        plots.plot_scatter(table_of(found, metric=metric, higher=higher), out)
    print(out)


def _records(
    words: Sequence[str] | None, verb: str | None, model: str | None, ledger: Path | None
) -> list[Record]:
    """The records that are named, or the whole ledger, as far as they are of this kind."""
    from qft.bench.sides import Shelf

    shelf = Shelf(ledger)
    found = [r for word in words for r in shelf.side(word).records] if words else shelf.all()
    _say(shelf.notes())
    return [
        record
        for record in found
        if verb in (None, record.get("verb"))
        and (model is None or model.lower() in str(record.get("model", "")).lower())
    ]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        _note(note)


def _note(text: str) -> None:
    print(f"note: {printable(text)}", file=sys.stderr)


def _printable(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Cells that cannot steer a terminal: they may come from another's file."""
    return [[" ".join(printable(cell).split()) for cell in row] for row in rows]


def _show_medians(records: Sequence[Record]) -> None:
    from qft.bench.compare import cell
    from qft.bench.figures import medians, title

    numbers = [str(record["number"]) for record in records]
    print(f"records {', '.join(numbers)}")
    found = medians(records)
    print_table({title(name): cell(name, figure) for name, figure in found.items()})


def _show_step(row: dict[str, Any]) -> None:
    from qft.progress import human_bytes

    print_table({
        "static": f"{human_bytes(row['static_bytes'])}: weights and adapters",
        "resident": f"{human_bytes(row['resident_bytes'])}: with gradients and optimizer states",
        "peak": f"{human_bytes(row['peak_bytes'])}, in the {row['peak_phase']} pass",
        **{f"  {k}": human_bytes(v) for k, v in row["peak_by_category"].items() if v},
        "a token": f"{row['bytes_per_token_above_resident'] / 1000:,.1f} kB above resident",
        "on the host": human_bytes(row["host_peak_bytes"]),
        "FLOPs": f"{row['flops'] / 1e12:,.2f} T",
    })  # fmt: skip
