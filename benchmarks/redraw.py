"""Draws the README's speed table, docs/speed.md and the plot from the committed results alone.

    python benchmarks/redraw.py [--check]

No benchmark is run. A ratio is quoted only between rows of one run whose final losses agree within
1 %. What was not measured stays in the table as an empty row with its reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
BEGIN, END = "<!-- speed: begin -->", "<!-- speed: end -->"
AGREE = 0.01
NOTHING = "–"
Row = Mapping[str, Any]

CASES = ("alpaca-135m", "qwen-0.5b-512", "alpaca-135m-nf4", "qwen-0.5b-512-nf4")
TOOLKITS = ("plain", "trl", "unsloth", "qft")  # each also as `…-best`


@dataclass(frozen=True)
class Words:
    """What is said around the numbers, in one language."""

    cases: tuple[str, ...]
    toolkits: tuple[str, ...]
    speed: str
    memory: str
    job: str
    ratio: str
    claim_heads: tuple[str, ...]
    no_gpu: str
    not_measured: str
    cached: Mapping[str, str]
    below: str


ENGLISH = Words(
    cases=(
        "135M shape, Alpaca, batch 4, bf16 base",
        "Qwen2.5-0.5B shape, 512 tokens, bf16 base",
        "135M shape, Alpaca, batch 4, nf4 base",
        "Qwen2.5-0.5B shape, 512 tokens, nf4 base",
    ),
    toolkits=("Trainer + PEFT", "TRL", "Unsloth", "qft"),
    speed="tokens a CPU-second",
    memory="MiB",
    job="job",
    ratio="qft over Trainer + PEFT / Unsloth (defaults) / the best of all settings",
    claim_heads=("further claims", "baseline", "qft", "ratio"),
    no_gpu="On a GPU",
    not_measured="not measured: no GPU was at hand",
    cached={
        "head": "an epoch of a new head on MiniLM, features cached",
        "layers": "an epoch of the last 8 of 30 layers of a 135M decoder, features cached",
        "encoder": "an epoch of the last 3 of 12 layers of BERT-base's shape, features cached",
    },
    below=(
        "Cells are defaults / best settings, medians of {blocks} blocks in turns; memory is the "
        "peak resident set above the same process after its imports. {threads} threads, {cpu}, "
        "{date}. Every number with its spread: [docs/speed.md](docs/speed.md)."
    ),
)

CHINESE = Words(
    cases=(
        "135M 形状，Alpaca，批 4，bf16 基座",
        "Qwen2.5-0.5B 形状，512 词元，bf16 基座",
        "135M 形状，Alpaca，批 4，nf4 基座",
        "Qwen2.5-0.5B 形状，512 词元，nf4 基座",
    ),
    toolkits=("Trainer + PEFT", "TRL", "Unsloth", "qft"),
    speed="词元每 CPU 秒",
    memory="MiB",
    job="任务",
    ratio="qft 与 Trainer + PEFT / Unsloth（默认）/ 其余所有设置中最好者之比",
    claim_heads=("其他", "基线", "qft", "倍数"),
    no_gpu="在 GPU 上",
    not_measured="未测量：手头没有 GPU",
    cached={
        "head": "MiniLM 上的新头训练一轮，特征已缓存",
        "layers": "135M 解码器 30 层中最后 8 层训练一轮，特征已缓存",
        "encoder": "BERT-base 形状 12 层中最后 3 层训练一轮，特征已缓存",
    },
    below=(
        "每格为默认设置 / 最佳设置，取 {blocks} 个轮流测量的块的中位数；"
        "内存是峰值常驻集减去同一进程导入之后的常驻集。"
        "{threads} 个线程，{cpu}，{date}。全部数字及其分布见 "
        "[docs/speed.md](docs/speed.md)。"
    ),
)

READMES = {"README.md": ENGLISH, "README.zh.md": CHINESE}


@dataclass(frozen=True)
class Claim:
    """A line of the second table: what was claimed, both sides, and how many times better."""

    claim: str
    baseline: str
    ours: str
    ratio: str


def read(name: str, folder: Path = RESULTS) -> list[Row]:
    """The rows of a results file; none if there is no such file."""
    path = folder / name
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def latest(rows: Sequence[Row], case: str) -> dict[str, Row]:
    """The rows of the last run of a case, by side."""
    runs = [row["run"] for row in rows if row["case"] == case]
    return {row["side"]: row for row in rows if runs and row["run"] == runs[-1]}


def agree(rows: Sequence[Row]) -> bool:
    """Whether they ended at the same loss, within 1 %."""
    finals = [float(row["final_loss"]) for row in rows]
    return max(finals) <= min(finals) * (1 + AGREE)


def require_comparable(rows: Sequence[Row]) -> None:
    """Refuses to compare what does not compare.

    Raises:
        ValueError: not one run, or other final losses.
    """
    if len({row["run"] for row in rows}) != 1:
        raise ValueError(f"rows of several runs: {sorted({row['run'] for row in rows})}")
    if not agree(rows):
        finals = ", ".join(f"{row['side']} {row['final_loss']:.4f}" for row in rows)
        raise ValueError(f"{rows[0]['case']}: final losses differ by more than 1 %: {finals}")


def measured(rows: Mapping[str, Row]) -> dict[str, Row]:
    """Without the sides that could not run."""
    return {side: row for side, row in rows.items() if "unavailable" not in row}


def median(row: Row) -> float:
    """Tokens a CPU-second."""
    return float(row["tokens_per_cpu_second"]["p50"])


def mebibytes(row: Row) -> float:
    """Peak above the imports."""
    return float(row["peak_bytes_above_imports"]) / 2**20


def ratio(rows: Mapping[str, Row], sides: Sequence[str] = ()) -> float | None:
    """The best of qft's rows over the best of these sides, or of all others; None without both."""
    known = measured(rows)
    ours = [row for side, row in known.items() if side.split("-")[0] == "qft"]
    others = [row for side, row in known.items()
              if side.split("-")[0] != "qft" and (not sides or side in sides)]  # fmt: skip
    if not ours or not others:
        return None
    require_comparable([*ours, *others])
    return max(map(median, ours)) / max(map(median, others))


def peers_lines(rows: Sequence[Row], words: Words) -> list[str]:
    """The first table: two lines a case."""
    heads = [words.job, "", *words.toolkits, words.ratio]
    lines = [table_line(heads), table_line(["---"] * len(heads))]
    for case, title in zip(CASES, words.cases, strict=True):
        found = latest(rows, case)
        known = measured(found)
        speeds = [pair(known, toolkit, lambda row: f"{median(row):.0f}") for toolkit in TOOLKITS]
        sizes = [pair(known, toolkit, lambda row: f"{mebibytes(row):,.0f}") for toolkit in TOOLKITS]
        ratios = [ratio(found, sides) for sides in (("plain",), ("unsloth",), ())]
        times = " / ".join(NOTHING if one is None else f"{one:.2f}" for one in ratios)
        lines += [table_line([title, words.speed, *speeds, times]),
                  table_line(["", words.memory, *sizes, ""])]  # fmt: skip
    return lines


def pair(rows: Mapping[str, Row], toolkit: str, shown: Any) -> str:
    """``defaults / best``."""
    cells = [
        shown(rows[side]) if side in rows else NOTHING for side in (toolkit, f"{toolkit}-best")
    ]
    return NOTHING if set(cells) == {NOTHING} else " / ".join(cells)


def claims(words: Words, folder: Path = RESULTS) -> list[Claim]:
    """The second table's lines. Another measurement is another few lines here."""
    return [*cache_claims(words, folder), *gpu_claims(words, folder)]


def cache_claims(words: Words, folder: Path) -> list[Claim]:
    """The last line of each comparison in feature_cache.jsonl."""
    last = {(row["what"], row["plain"]): row for row in read("feature_cache.jsonl", folder)}
    found = []
    for (what, plain), row in last.items():
        if not cached_losses_agree(row):
            raise ValueError(f"feature_cache {what} {plain}: final losses differ")
        sides = sorted(
            row["cpu_seconds_a_block"].items(), key=lambda side: not side[0].startswith("qft")
        )
        (_, ours), (name, theirs) = sides
        found.append(
            Claim(
                claim=words.cached.get(what, what),
                baseline=f"{name}: {theirs['p50']:.2f} CPU s",
                ours=f"{ours['p50']:.2f} CPU s",
                ratio=f"{row['cpu_ratio']['p50']:.1f}",
            )
        )
    return found


def cached_losses_agree(row: Row) -> bool:
    """Both sides are in one row, and end within 1 %."""
    finals = [losses[-1] for losses in row["losses"].values()]
    return bool(max(finals) <= min(finals) * (1 + AGREE))


def gpu_claims(words: Words, folder: Path) -> list[Claim]:
    """Throughput rows of gpu*.jsonl, a line a case; one empty line without any."""
    rows = [row for path in sorted(folder.glob("gpu*.jsonl")) for row in read(path.name, folder)]
    timed = [row for row in rows if row.get("p50") and not row.get("predicted")]
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in timed:
        run = (row["benchmark"], row["case"], row["device"], row["commit"])
        groups.setdefault(run, {})[row["side"]] = row
    found = []
    for (_, case, device, _), sides in groups.items():
        others = [row for side, row in sides.items() if side.split("-")[0] != "qft"]
        ours = [row for side, row in sides.items() if side.split("-")[0] == "qft"]
        if not ours or not others:
            continue
        if not agree([*ours, *others]):
            raise ValueError(f"{case} on {device}: final losses differ by more than 1 %")
        best, own = (max(group, key=lambda row: float(row["p50"])) for group in (others, ours))
        found.append(Claim(f"{case}, {device}, tokens/s", f"{best['side']}: {best['p50']:.0f}",
                           f"{own['p50']:.0f}", f"{own['p50'] / best['p50']:.2f}"))  # fmt: skip
    return found or [Claim(words.no_gpu, NOTHING, words.not_measured, NOTHING)]


def table_line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def readme_block(words: Words, folder: Path = RESULTS) -> str:
    """What stands between the markers."""
    rows = read("peers.jsonl", folder)
    heads = words.claim_heads
    lines = [*peers_lines(rows, words), ""]
    known = [row for row in rows if "unavailable" not in row]
    if known:
        last = known[-1]
        facts = {name: last[name] for name in ("blocks", "threads", "date")}
        lines += [words.below.format(cpu=last["environment"]["cpu"], **facts), ""]
    lines += [table_line(heads), table_line(["---"] * len(heads))]
    lines += [table_line([c.claim, c.baseline, c.ours, c.ratio]) for c in claims(words, folder)]
    return "\n".join([BEGIN, *lines, END])


def redrawn(text: str, block: str) -> str:
    """A README with the block between its markers replaced.

    Raises:
        ValueError: the markers are not there, once each.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the text must hold {BEGIN} and {END} once each")
    return text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :]


def details(folder: Path = RESULTS) -> str:
    """docs/speed.md: every row of the quoted runs."""
    lines = [
        "# Speed, every number",
        "",
        "Made by `python benchmarks/redraw.py` from `benchmarks/results/peers.jsonl`;",
        "`benchmarks/peers/TRIED.md` lists the settings that were tried. `make bench` measures.",
    ]
    rows = read("peers.jsonl", folder)
    if rows:
        lines += ["", "![tokens a CPU-second of each side](speed.png)"]
    for case, title in zip(CASES, ENGLISH.cases, strict=True):
        found = latest(rows, case)
        if not found:
            continue
        first = next(iter(found.values()))
        lines += [
            "", f"## {title}", "",
            f"Run `{first['run']}`, {first['date']}, commit `{first['commit']}`, "
            f"{first['environment']['cpu']}, {first['environment']['cores']} cores. "
            f"{first['blocks']} blocks of {first['steps']} steps, batch {first['batch']}, "
            f"learning rate {first['learning_rate']:g}.", "",
            "| side | tokens a CPU-second: p20, **p50**, p80 | tokens a second: p20, **p50**, p80 "
            "| peak MiB above imports | padding | first loss | final loss | threads | settings |",
            table_line(["---"] * 9),
            *(detail_line(row) for row in found.values()),
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def detail_line(row: Row) -> str:
    """One side of one run."""
    if "unavailable" in row:
        return table_line([f"`{row['side']}`", f"cannot run here: {row['unavailable']}", *[""] * 7])
    settings = {**row["settings"]["options"], **row["settings"]["environment"]}
    return table_line([
        f"`{row['side']}`", three(row["tokens_per_cpu_second"]), three(row["tokens_per_second"]),
        f"{mebibytes(row):,.0f}", f"{row['padding_share']:.0%}", f"{row['first_loss']:.3f}",
        f"{row['final_loss']:.4f}", str(row["threads"]),
        f"`{json.dumps(settings)}`" if settings else "defaults",
    ])  # fmt: skip


def three(spread: Mapping[str, float]) -> str:
    """The three percentiles."""
    return f"{spread['p20']:.1f}, **{spread['p50']:.1f}**, {spread['p80']:.1f}"


def draw(path: Path, folder: Path = RESULTS) -> None:
    """The plot: a panel a case, a bar a side, whiskers from p20 to p80."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read("peers.jsonl", folder)
    found = {case: measured(latest(rows, case)) for case in CASES}
    panels = [(case, sides) for case, sides in found.items() if sides]
    if not panels:
        return
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(3.2 * len(panels), 2.9), squeeze=False, layout="constrained"
    )
    titles = dict(zip(CASES, ENGLISH.cases, strict=True))
    for axis, (case, sides) in zip(axes[0], panels, strict=True):
        names = list(sides)[::-1]
        spreads = [sides[name]["tokens_per_cpu_second"] for name in names]
        middle = [spread["p50"] for spread in spreads]
        whiskers = [[m - s["p20"] for m, s in zip(middle, spreads, strict=True)],
                    [s["p80"] - m for m, s in zip(middle, spreads, strict=True)]]  # fmt: skip
        colours = ["#1f6f8b" if name.startswith("qft") else "#b8c4cc" for name in names]
        axis.barh(names, middle, color=colours, xerr=whiskers, ecolor="#444444",
                  error_kw={"linewidth": 0.8})  # fmt: skip
        for name, value in zip(names, middle, strict=True):
            ink = "white" if name.startswith("qft") else "black"
            axis.text(value * 0.02, name, f"{value:.0f}", va="center", fontsize=8, color=ink)
        axis.set_title(titles[case].replace(", ", ",\n", 1), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("tokens a CPU-second (higher is better)", fontsize=9)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    """Writes them, or says what is stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if one is stale")
    check = parser.parse_args().check
    texts = {
        REPOSITORY / name: redrawn((REPOSITORY / name).read_text(encoding="utf-8"),
                                   readme_block(words))
        for name, words in READMES.items()
    }  # fmt: skip
    texts[REPOSITORY / "docs" / "speed.md"] = details()
    stale = [path for path, text in texts.items()
             if not path.is_file() or path.read_text(encoding="utf-8") != text]  # fmt: skip
    if check:
        for path in stale:
            print(f"stale: {path.relative_to(REPOSITORY)}")
        sys.exit(1 if stale else 0)
    for path in stale:
        path.write_text(texts[path], encoding="utf-8")
        print(f"wrote {path.relative_to(REPOSITORY)}")
    draw(REPOSITORY / "docs" / "speed.png")


if __name__ == "__main__":
    main()
