"""`qft plan`: words of the command line to a plan, and a plan to a terminal, a picture or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qft.bench.recorded import follow
from qft.errors import RecipeError, WillNotFitError, printable
from qft.terminal import Json, print_lines, print_result, print_rows


def plan(
    source: Annotated[str, typer.Argument(help="A recipe (YAML), or a model: folder, id, shape.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key.sub=value, for example quantize=nf4.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", help="What the job may take: 12GiB; else what is free"),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu or cuda, here or not; auto: this machine's own.")
    ] = "auto",
    max_length: Annotated[int | None, typer.Option(min=2, help="Tokens a row.")] = None,
    task: Annotated[str | None, typer.Option(help="As in a recipe.")] = None,
    strategy: Annotated[str | None, typer.Option(help="As in a recipe: a name.")] = None,
    quantize: Annotated[str | None, typer.Option(help="none, int8, nf4 or fp4.")] = None,
    maximize: Annotated[
        str | None, typer.Option(help="max_length, batch_size or model: the largest that fits.")
    ] = None,
    export: Annotated[
        list[str] | None, typer.Option("--export", help="Plan this format too; may be repeated.")
    ] = None,
    labels: Annotated[
        float, typer.Option(min=0, max=1, help="Share of imagined rows' tokens with a label.")
    ] = 1.0,
    probe: Annotated[
        bool, typer.Option("--probe", help="Run a few real steps; keep how far the plan was off.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Also draw stacked bars: plan.svg.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the verdict alone.")] = False,
    as_json: Json = False,
) -> None:
    """Will it fit? Bytes by phase and category, time, disk, and what would make it fit.

    No weight is loaded, and none need be here. Exit code 3: it does not fit as it is written.
    """
    from qft.planning.opening import recipe_of
    from qft.planning.plan import plan as run

    flags = {"train.max_length": max_length, "task": task, "quantize": quantize}
    given = {key: value for key, value in flags.items() if value is not None}
    recipe = recipe_of(source, [*_strategy(strategy), *(overrides or [])], given)
    follow(recipe)
    result = run(
        recipe,
        device=_device(device),
        budget_bytes=_size(memory),
        maximize=maximize,
        exports=export or (),
        probe=probe,
        label_share=labels,
    )
    if picture is not None:
        _draw(result, picture)
    print_result(result, as_json, lambda: _show(result, quiet))
    if result["fits"] is False and not result["close"]:
        raise typer.Exit(WillNotFitError.exit_code)


def _strategy(name: str | None) -> list[str]:
    return [] if name is None else [f"strategy={name}"]


def _device(word: str) -> str:
    if word not in ("auto", "cpu", "cuda"):
        raise RecipeError("There is no such device.", where="--device", found=word,
                          fix="auto, cpu or cuda")  # fmt: skip
    return word


def _size(text: str | None) -> int | None:
    from qft.recipe import as_bytes

    try:
        return None if text is None else as_bytes(text)
    except ValueError as error:
        raise RecipeError("This is no amount of memory.", where="--memory", found=text,
                          fix=str(error)) from None  # fmt: skip


def _draw(result: dict[str, Any], path: Path) -> None:
    from qft.files import write_text
    from qft.report.bars import plan_bars

    write_text(path, plan_bars(result["phases"], result["budget_bytes"]))


def _show(result: dict[str, Any], quiet: bool) -> None:
    from qft.planning.table import conclusions, lines, phase_rows, verdict

    if quiet:
        print(printable(verdict(result)))
        return
    print_lines(lines(result))
    print_rows(phase_rows(result["phases"]))
    print_lines(conclusions(result))
