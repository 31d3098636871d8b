"""The command line. Each verb is one call of the Python API; heavy imports wait until then."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qft.bench.commands import app as bench
from qft.bench.recorded import Ledger, RecordedCommand, follow, leave_no_record, made
from qft.errors import Interrupted, QftError, printable
from qft.planning.command import plan
from qft.quiet_libraries import quiet_libraries
from qft.report.command import report
from qft.terminal import Json, Quiet, print_lines, print_result, print_rows, print_table

if TYPE_CHECKING:
    from qft.progress import Reporter
    from qft.recipe import Recipe

app = typer.Typer(
    name="qft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune language models that almost do not fit, and prove that the result works.",
)
app.add_typer(bench, name="bench")

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]
Base = Annotated[
    str | None, typer.Option("--base", help="The base model, if it is not where it was.")
]
Bases = Annotated[
    list[str] | None,
    typer.Option(
        "--base",
        help="The base model, if it is not where it was; and, of an adapter trained on a quantized "
        "one, what to merge into: auto, dequantized or original. May be given twice.",
    ),
]
Named = Annotated[
    str | None,
    typer.Option("--strategy", help="A third party's strategy; its code is imported."),
]
HeldIn = Annotated[
    str | None, typer.Option(help="bfloat16, float16 or float32; an adapter knows its own.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Load .bin weights.")]
RemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python files of the model's own.")
]


def main() -> None:
    """The console script: deliberate errors become one message and their exit code."""
    quiet_libraries()
    try:
        app(standalone_mode=True)
    except QftError as error:
        _fail(error)
    except KeyboardInterrupt:
        _fail(Interrupted("Interrupted.", fix="for a training: the same command with --resume"))


def _fail(error: QftError) -> None:
    print(f"error: {printable(error.text())}", file=sys.stderr)
    raise SystemExit(error.exit_code) from None


@app.command(cls=RecordedCommand)
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("qft-demo"),
    seed: Annotated[int, typer.Option(help="Of the training.")] = 0,
    quiet: Quiet = False,
    as_json: Json = False,
    ledger: Ledger = None,
) -> None:
    """The whole main job, offline, in about two minutes on a CPU."""
    from qft.demo.job import run_demo

    result = run_demo(out, seed=seed, reporter=_reporter(quiet, as_json))
    print_result(result, as_json, lambda: print(out) if quiet else None)


@app.command(cls=RecordedCommand)
def train(
    recipe: Annotated[Path, typer.Argument(help="The recipe (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value, for example train.epochs=1.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")
    ] = False,
    resume_from: Annotated[
        str | None, typer.Option("--resume-from", help="Go on from this checkpoint.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a former run in the output folder.")
    ] = False,
    folds: Annotated[
        int | None,
        typer.Option("--folds", help="Train so often, with other rows held out."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the recipe, print it resolved, and stop.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    ledger: Ledger = None,
) -> None:
    """Fine-tune what a recipe says; `qft recipe` lists every knob."""
    loaded = _load(recipe, overrides)
    if dry_run:
        leave_no_record()
        print_result(loaded.to_dict(), as_json, lambda: print(loaded.to_yaml(), end=""))
        return
    if folds is not None:
        from qft.folds import train_folds

        reporter = _reporter(quiet, as_json)
        summary = train_folds(loaded, folds, overwrite=overwrite, reporter=reporter)
        print_result(summary, as_json, lambda: _show_folds(summary))
        return
    from qft.training import train as run

    result = run(
        loaded,
        resume=resume_from or resume,
        overwrite=overwrite,
        reporter=_reporter(quiet, as_json),
    )
    made(result.folder / "adapter")
    print_result(result.report, as_json, lambda: print(result.folder))


@app.command(cls=RecordedCommand)
def teach(
    recipe: Annotated[Path, typer.Argument(help="The recipe (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value, for example strategy.top_k=32.")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
    ledger: Ledger = None,
) -> None:
    """Run a recipe's teacher once and keep what its student needs."""
    from qft.distillation.teach import teach as run

    report = run(_load(recipe, overrides), reporter=_reporter(quiet, as_json))
    print_result(report, as_json, lambda: print(report["folder"]))


@app.command(cls=RecordedCommand)
def heal(
    recipe: Annotated[Path, typer.Argument(help="The recipe (YAML), with `prune`.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value, for example prune.ratio=0.5.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a former chain in the output folder.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    ledger: Ledger = None,
) -> None:
    """Prune a model, train what is left, merge and export it; the same command goes on."""
    from qft.healing import heal as run
    from qft.healing import table

    loaded = _load(recipe, overrides)
    result = run(loaded, overwrite=overwrite, reporter=_reporter(quiet, as_json))
    print_result(result, as_json, lambda: print("\n".join([*table(result), loaded.output])))


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="The recipe (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value, for example train.max_length=256.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which tokens a recipe would train on, and what is wrong with its data."""
    from rich.console import Console

    from qft.checking import check as run
    from qft.checking import lines
    from qft.recipe import load_recipe

    report = run(load_recipe(recipe, overrides or []), reporter=_reporter(False, as_json))

    def show() -> None:
        console = Console(highlight=False, soft_wrap=True)
        for line in lines(report):
            console.print(line)

    print_result(report, as_json, show)


app.command(cls=RecordedCommand)(plan)
app.command()(report)


@app.command("eval", cls=RecordedCommand)
def evaluate(
    source: Annotated[str, typer.Argument(help="A run, adapter, model, GGUF export or hub id.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Rows; a run knows its own held-out ones.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help="As in a recipe, where it is not known."),
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest sequence in tokens.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many rows.")] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="role=name, for example text=0.")
    ] = None,
    too_long: Annotated[
        str | None, typer.Option(help="error, truncate or drop; a run knows its own.")
    ] = None,
    dtype: HeldIn = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="Also let it write, and compare the texts.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Of each text it writes.")] = 128,
    micro_batch: Annotated[int, typer.Option(min=1, help="Texts written at once.")] = 8,
    execute_code: Annotated[
        bool, typer.Option("--execute-code", help="Run what it writes against the rows' tests.")
    ] = False,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="Keep the texts in this jsonl file.")
    ] = None,
    base: Base = None,
    strategy: Named = None,
    allow_pickle: Pickle = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: Json = False,
    ledger: Ledger = None,
) -> None:
    """Metrics of any model on held-out rows."""
    from qft.scoring import evaluate as run

    metrics = run(
        source,
        data=data,
        task=task,
        max_length=max_length,
        limit=limit,
        columns=_columns(column),
        too_long=too_long,
        dtype=dtype,
        generate=generate,
        max_new_tokens=max_new_tokens,
        micro_batch=micro_batch,
        execute_code=execute_code,
        predictions=predictions,
        base=base,
        strategy=strategy,
        trust=_trust(allow_pickle, trust_remote_code),
        reporter=_reporter(quiet, as_json),
    )
    print_result(metrics, as_json, lambda: print_table(metrics))


@app.command(cls=RecordedCommand)
def generate(
    source: Annotated[str, typer.Argument(help="A run, adapter, model, GGUF export or hub id.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="May be repeated.")],
    max_new_tokens: Annotated[int, typer.Option(help="At most this many.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Without the chat template.")] = False,
    task: Annotated[
        str | None, typer.Option("--task", help="As in a recipe, where it is not known.")
    ] = None,
    dtype: HeldIn = None,
    base: Base = None,
    strategy: Named = None,
    allow_pickle: Pickle = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
    as_json: Json = False,
    ledger: Ledger = None,
) -> None:
    """Text from any model."""
    from qft.data.language import plain_prompt
    from qft.data.template import has_template
    from qft.generation import generate as run

    trust = _trust(allow_pickle, trust_remote_code)
    opened = _open_writer(source, quiet, task, dtype, base, strategy, trust)
    turns = not raw and opened.task in ("chat", "instruct")
    chat = turns and has_template(opened.tokenizer)
    texts = run(
        opened.model,
        opened.tokenizer,
        [plain_prompt(text) for text in prompt] if turns and not chat else prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=chat,
    )
    rows = [{"prompt": p, "text": t} for p, t in zip(prompt, texts, strict=True)]
    print_result(rows, as_json, lambda: print_lines(texts))


@app.command()
def chat(
    source: Annotated[str, typer.Argument(help="A run, adapter, model, GGUF export or hub id.")],
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most this many a turn.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: HeldIn = None,
    base: Base = None,
    strategy: Named = None,
    allow_pickle: Pickle = False,
    trust_remote_code: RemoteCode = False,
    quiet: Quiet = False,
) -> None:
    """Talk to any model; an empty line or Ctrl-D ends it."""
    from qft.generation import stream_chat

    trust = _trust(allow_pickle, trust_remote_code)
    opened = _open_writer(source, quiet, None, dtype, base, strategy, trust)
    messages = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            said = input("you: ").strip()
        except EOFError:
            print()
            break
        if not said:
            break
        messages.append({"role": "user", "content": said})
        print("model: ", end="", flush=True)
        parts = []
        for part in stream_chat(
            opened.model,
            opened.tokenizer,
            messages,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        ):
            parts.append(part)
            print(printable(part), end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": "".join(parts)})


_COMBINING = (
    "linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune; "
    "with --space factors the last four also with _svd."
)


def _numbers(text: str | None) -> list[float] | None:
    """The numbers of a list with commas.

    Raises:
        RecipeError: one is none.
    """
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        from qft.errors import RecipeError

        raise RecipeError("This is no list of numbers.", where="--weights", found=text,
                          fix="1,-0.5") from None  # fmt: skip


@app.command(cls=RecordedCommand)
def merge(
    sources: Annotated[
        list[str], typer.Argument(help="Runs, checkpoints or adapter folders; several become one.")
    ],
    out: Out,
    base: Bases = None,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; else the base's own.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare with the adapter on held-out rows.")
    ] = False,
    data: Annotated[
        str | None, typer.Option("--data", help="Rows to compare on; a run knows its own.")
    ] = None,
    strategy: Named = None,
    method: Annotated[str | None, typer.Option(help=_COMBINING)] = None,
    weights: Annotated[
        str | None, typer.Option(help="One an adapter, for example 1,-0.5; else 1 each.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of values that ties, dare and magnitude_prune keep.")
    ] = None,
    majority_sign: Annotated[
        str | None, typer.Option(help="ties: elect the sign by total or frequency.")
    ] = None,
    svd_rank: Annotated[int | None, typer.Option(help="Of what svd makes.")] = None,
    space: Annotated[
        str | None, typer.Option(help="Combine the weights' updates, or the adapters' factors.")
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the combined adapter, no model.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Of dare's draws.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
    ledger: Ledger = None,
) -> None:
    """Fold an adapter, or several together, into the base, streamed by blocks of rows."""
    from qft.export.delivery import merge as run
    from qft.export.right_base import place_and_word

    place, onto = place_and_word(base or [])
    combine = {
        "method": method, "weights": _numbers(weights), "density": density,
        "majority_sign": majority_sign, "svd_rank": svd_rank, "space": space,
        "adapter_only": adapter_only or None, "seed": seed,
    }  # fmt: skip
    report = run(
        sources,
        out,
        combine={key: value for key, value in combine.items() if value is not None},
        base=place,
        onto=onto,
        dtype=dtype,
        verify=verify,
        data=data,
        strategy=strategy,
        overwrite=overwrite,
        reporter=_reporter(quiet, as_json),
    )
    print_result(report, as_json, lambda: print(out))


@app.command("export", cls=RecordedCommand)
def export_model(
    source: Annotated[str, typer.Argument(help="A run, an adapter or a model folder.")],
    out: Out,
    format: Annotated[str, typer.Option("--format", "-f", help="One of `qft formats`.")],
    base: Bases = None,
    fuse: Annotated[
        bool,
        typer.Option(
            "--fuse", help="bnb: quantize the dequantized base again; says what it costs."
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Open the result and compare it.")
    ] = True,
    data: Annotated[
        str | None, typer.Option("--data", help="Rows to compare on; a run knows its own.")
    ] = None,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Fit the rounding to rows; else where the format gains much by it.",
        ),
    ] = None,
    calibration_data: Annotated[
        str | None,
        typer.Option("--calibration-data", help="Those rows; a run takes its training rows."),
    ] = None,
    calibration_rows: Annotated[
        int, typer.Option("--calibration-rows", min=1, help="At most so many of them.")
    ] = 128,
    strategy: Named = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
    ledger: Ledger = None,
) -> None:
    """Write a small model for another runtime, and check that it still works."""
    from qft.export.delivery import export as run
    from qft.export.right_base import place_and_word

    place, onto = place_and_word(base or [])
    report = run(
        source,
        out,
        format=format,
        base=place,
        onto=onto,
        fuse=fuse,
        verify=verify,
        data=data,
        calibrate=calibrate,
        calibration_data=calibration_data,
        calibration_rows=calibration_rows,
        strategy=strategy,
        overwrite=overwrite,
        reporter=_reporter(quiet, as_json),
    )
    print_result(report, as_json, lambda: print(out))


@app.command()
def formats(as_json: Json = False) -> None:
    """The formats that a model can be exported to."""
    from qft.export.format_table import format_table

    rows = format_table()
    print_result(rows, as_json, lambda: _show_formats(rows))


@app.command("verify", cls=RecordedCommand)
def verify_model(
    reference: Annotated[str, typer.Argument(help="What was trained: a run, adapter or model.")],
    artefact: Annotated[str, typer.Argument(help="What was made of it: a model or GGUF export.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Rows to compare on; a run knows its own.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="As in a recipe, where it is not known.")
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", "-f", help="Whose thresholds count; else its own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only this many rows.")] = None,
    layer_by_layer: Annotated[
        bool | None,
        typer.Option("--layer-by-layer/--whole", help="Else whole, where both models fit."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Else verification.json beside the artefact."),
    ] = None,
    base: Base = None,
    strategy: Named = None,
    quiet: Quiet = False,
    as_json: Json = False,
    ledger: Ledger = None,
) -> None:
    """Check that an artefact still is the model that was trained; exit 5 where it is not."""
    from qft.verification.proof import verify as run

    report = run(
        reference,
        artefact,
        data=data,
        task=task,
        format=format,
        base=base,
        strategy=strategy,
        limit=limit,
        layer_by_layer=layer_by_layer,
        out=out,
        reporter=_reporter(quiet, as_json),
    )
    print_result(report, as_json, lambda: None)


_METHODS = "depth, width; magnitude, wanda, sparsegpt set weights to zero."


@app.command(cls=RecordedCommand)
def prune(
    source: Annotated[str, typer.Argument(help="A model folder or hub id, not quantized.")],
    method: Annotated[str, typer.Option("--method", "-m", help=_METHODS)] = "depth",
    ratio: Annotated[
        float | None,
        typer.Option("--ratio", help="Share of all parameters that goes, or becomes zero: 0.25."),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="Of every m weights n stay, n:m: 2:4.")
    ] = None,
    params: Annotated[
        str | None, typer.Option("--params", help="Parameters that stay at most: 1.0B.")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", help="Bytes of weights that stay at most: 500MiB.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Rows to score the model on.")] = None,
    held_out: Annotated[
        str | None, typer.Option("--eval", help="Rows to judge on; else a part of --data.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Where the model does not say.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option("--column", help="role=name, for example text=0.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="depth: the layers that go: 10-15 or 3,7.")
    ] = None,
    width: Annotated[
        str | None, typer.Option("--width", help="width: mlp, heads, hidden; with =size or not.")
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(
            "--importance",
            help="depth: influence, angular; width: activation, activation-mean, taylor.",
        ),
    ] = None,
    multiple_of: Annotated[
        int, typer.Option("--multiple-of", min=1, help="Of MLP and hidden sizes; GGUF: 32 or 256.")
    ] = 8,
    keep_first: Annotated[int, typer.Option(min=0, help="First layers that stay.")] = 1,
    keep_last: Annotated[int, typer.Option(min=0, help="Last layers that stay.")] = 1,
    calibration_rows: Annotated[int, typer.Option(min=1, help="Rows scored at most.")] = 128,
    max_length: Annotated[int, typer.Option(min=1, help="Of those rows, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(help="Of the rows drawn.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="To compute in; weights are written as they were.")
    ] = "auto",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write.")] = None,
    no_report: Annotated[
        bool, typer.Option("--no-report", help="Do not compare the two models.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what each choice would cost.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
    ledger: Ledger = None,
) -> None:
    """Make a model smaller: fewer layers, or narrower ones; or set weights to zero."""
    from qft.pruning.prune import prune as run

    result = run(
        source,
        out,
        method=method,
        ratio=ratio,
        pattern=pattern,
        params=params,
        size=size,
        data=data,
        eval=held_out,
        task=task,
        columns=_columns(column),
        layers=layers,
        width=width,
        importance=importance,
        multiple_of=multiple_of,
        keep_first=keep_first,
        keep_last=keep_last,
        calibration_rows=calibration_rows,
        max_length=max_length,
        seed=seed,
        dtype=dtype,
        report=not no_report,
        dry_run=dry_run,
        overwrite=overwrite,
        reporter=_reporter(quiet, as_json),
    )
    print_result(result, as_json, lambda: _show_pruned(result, out, quiet))


@app.command()
def strategies(
    model: Annotated[
        str | None, typer.Argument(help="A model: also print what share of it each would train.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="What the model is to do, if not its own task.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The strategies there are, with their settings."""
    from qft.strategy_table import strategy_table

    rows = strategy_table(model, task)
    print_result(rows, as_json, lambda: _show_strategies(rows))


@app.command()
def env(as_json: Json = False) -> None:
    """This machine and the installed versions, for a bug report."""
    from qft.hardware import environment

    values = environment()
    print_result(values, as_json, lambda: print_table(values))


@app.command()
def recipe(
    schema: Annotated[bool, typer.Option("--schema", help="The JSON schema instead.")] = False,
) -> None:
    """Every knob of a recipe, with its default and its sentence."""
    from qft.recipe_reference import json_schema, reference

    print(json.dumps(json_schema(), indent=2) if schema else reference())


def _show_pruned(result: dict[str, Any], out: Path | None, quiet: bool) -> None:
    from qft.pruning.tables import choices, summary

    if "choices" in result:
        print_rows(choices(result))
        return
    if not quiet:
        print_rows(summary(result))
    print(out)


def _load(recipe: Path, overrides: list[str] | None) -> Recipe:
    """A recipe to follow, which the record of the command names."""
    from qft.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    follow(loaded)
    return loaded


def _reporter(quiet: bool, as_json: bool) -> Reporter:
    from qft.progress import Reporter

    return Reporter(quiet=quiet, stream="stderr" if as_json else "stdout")


def _trust(allow_pickle: bool, remote_code: bool) -> Any:
    from qft.models import Trust

    return Trust(allow_pickle, remote_code)


def _open_writer(
    source: str,
    quiet: bool,
    task: str | None,
    dtype: str | None,
    base: str | None,
    strategy: str | None,
    trust: Any,
) -> Any:
    """Opens a model that writes; on standard error how it is held, where that may surprise."""
    from qft.hardware import choose
    from qft.opening import open_any

    held = {} if dtype is None else {"dtype": choose(dtype=dtype).dtype}
    opened = open_any(source, base=base, strategy=strategy, task=task, trust=trust, to_write=True,
                      **held)  # fmt: skip
    if opened.note is not None and not quiet:
        print(f"note: {printable(opened.note)}", file=sys.stderr)
    return opened


def _columns(pairs: list[str] | None) -> dict[str, str | int]:
    columns: dict[str, str | int] = {}
    for pair in pairs or []:
        role, equals, name = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"{pair!r} is not role=name")
        columns[role] = int(name) if name.isdigit() else name
    return columns


def _show_folds(summary: dict[str, Any]) -> None:
    for name, mean in summary["mean"].items():
        print(f"{name}: {mean:.4f} ± {summary['deviation'][name]:.4f}")


def _show_formats(rows: list[dict[str, Any]]) -> None:
    width = max(len(row["name"]) for row in rows)
    fitted = {"never": "", "asked": "; --calibrate fits it to rows", "always": "; fitted to rows"}
    for row in rows:
        lost = f"may lose {row['mean_kl']:g} nats"
        print(f"{row['name']:<{width}}  {row['runs_in']}; {lost}{fitted[row['fitted']]}")


def _show_strategies(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(f"{row['name']}: {row['summary']}")
        if "paper" not in row:
            continue
        if "depends_on" in row:
            print(f"  tasks, mergeable, trains: as {', '.join(row['depends_on'])} says")
        else:
            mergeable = "yes" if row["mergeable"] else f"no ({row['instead_of_merging']})"
            print(f"  tasks: {', '.join(row['tasks'])}; mergeable: {mergeable}")
        if row["paper"]:
            print(f"  paper: {row['paper']}")
        if "trained_share" in row:
            share = f"{row['trained_parameters']:,} parameters, {row['trained_share']:.3%}"
            print(f"  trains for {row['task']}: {share}")
        if "refused" in row:
            print(f"  refused here: {row['refused']}")
        for key, field in row["settings"].items():
            print(f"  {key} = {field['default']!r}: {field['description']}")


if __name__ == "__main__":
    main()
