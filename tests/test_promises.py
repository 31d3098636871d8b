"""Promises of the design: imports run one way, help is cheap, the README and the examples work."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"

# A file may import only what stands above it; late imports count, TYPE_CHECKING ones do not.
_PLACES = """
    errors scripts files progress quiet_libraries hardware lean.heap
    report.escaping report.numbers report.drawing report.bars report.lines report.story
    report.figures report.markup report.heading report.outcome report.particulars report.style
    report.page report.command
    random_state out_of_memory micro_batch phase_peaks
    strategy distillation.objective registry recipe recipe_reference card
    lean.alike lean.model_parts lean.host_embeddings lean.dropout lean.noise lean.prefix_attention
    lean.patching lean.taps lean.feature_cache lean.cut_finding lean.trunk lean.offload
    lean.checkpointing lean.products lean.timeline lean.meter lean.standins lean.label_loss
    lean.divergence
    lean.sorted_gap lean.magnitudes lean.combining
    lean.int8_head lean.token_scores lean.model_loss lean.lora_linear lean.kept_zeros
    lean.shared_input lean.tiled_mlp lean.gated_mlp lean.norms lean.attention lean.engine
    four_bit quantization pooling model_dropout shards onnx_files write_journal shard_writer models
    adapter_folder strategy_table
    data.encoding data.columns data.messages data.readers data.sources data.template data.chat
    data.conversations data.examples data.language data.seq2seq data.classify data.extract
    data.tagging data.embed data.packing
    data.augment data.splits data.tasks data.preflight inputs report.samples shard_store
    distillation.bit_packing distillation.likeliest distillation.drawing
    attention_interface preparation bench.shapes bench.fake_model bench.step bench.step_words
    task_loss distillation.lessons distillation.teachers distillation.matching
    distillation.heads distillation.live distillation.supply
    budget enforcement step rehearsal token_batches checkpoints run_folder first_step schedule
    trainer run_watch
    metrics.answers metrics.entities metrics.texts code_runner code_execution
    judging.judge judging.tokens judging.classes judging.spans judging.tags evaluation
    generation distillation.own_texts distillation.distilled_loss
    packing_check held_out feature_store feature_identity feature_rows features
    distillation.lesson_coding distillation.lesson_store distillation.kept
    distillation.lesson_identity distillation.lesson_making distillation.lesson_report
    distillation.cached distillation.teacher_texts distillation.teach
    merging.side_files merging.bnb_rounding merging.rounded_base merging.stored_base
    merging.tensors merging.tied merging.merge merging.several merging.together
    quantized_linears layer_weights layer_stream layer_inputs source_stream calibration
    input_hessian input_groups column_sweep
    pruning.sparsity pruning.smallest pruning.sparsegpt
    pruning.layer_stream pruning.anatomy pruning.cut pruning.pruned_tensors pruning.calibration
    pruning.depth_scores pruning.width_scores pruning.targets pruning.score_store pruning.plan
    pruning.sparse_targets pruning.sparse_layers pruning.sparse_tensors pruning.zeros
    pruning.depth pruning.width pruning.methods pruning.comparison pruning.prune
    pruning.tables
    readiness planning.amounts planning.flat_rows planning.job planning.skeletons
    planning.known_values planning.fake_optimizer planning.fake_lessons planning.fake_loss
    planning.fake_training planning.likeness planning.repetition planning.short_training
    planning.depth
    planning.opening planning.stored_weights planning.loading
    planning.evaluating planning.key_values planning.generating planning.caches planning.saving
    planning.phases planning.shape_source planning.changes planning.crossing planning.solver
    planning.maximize
    planning.calibration planning.cuda_allocator planning.resident planning.row_shapes
    planning.unseen planning.speed
    planning.forecast planning.run checking fitting training
    planning.measured_step planning.probe planning.table folds
    gguf.types gguf.scale_search gguf.plain_blocks gguf.super_blocks gguf.super_layouts
    gguf.rounding gguf.file gguf.mixes gguf.naming gguf.contract gguf.turned gguf.rotary
    gguf.decoders gguf.gemma gguf.gpt2 gguf.bert gguf.architectures
    gguf.checked gguf.token_table gguf.pre_tokenizers gguf.byte_level_vocabulary
    gguf.sentencepiece_vocabulary gguf.wordpiece_vocabulary gguf.special_tokens gguf.vocabulary
    gguf.turns gguf.modelfile gguf.importance
    export.safetensors_format export.gguf_format export.gguf_adapter_format
    export.onnx_graph export.onnx_format
    export.delta_rounding export.layer_rows export.bnb_format
    export.integer_rounding export.error_compensation export.integer_plan
    export.compressed_schemes export.torchao_format
    export.writers export.formats planning.afterwards planning.plan
    verification.thresholds verification.gguf_config verification.gguf_encoder
    verification.onnx_model verification.read_back verification.diagnosis verification.tally
    verification.subject verification.adapter_file
    verification.tensors_check verification.tokens_check
    verification.llama_tokens verification.cut_check verification.gguf_numbers
    verification.gguf_tokens verification.stops verification.words_check
    verification.answers verification.listening verification.verify verification.layerwise
    verification.streams verification.summary gguf_model opening written scoring verification.proof
    export.format_table export.right_base export.calibration export.beside export.place
    export.proven export.delivery export healing
    demo.docstrings demo.job
    bench.scrubbing bench.facts bench.flags bench.ledger_file bench.ledger bench.recorded
    terminal
    bench.figures bench.sides bench.compare bench.gate bench.table bench.listing bench.plots
    bench.repeat bench.commands
    planning.command
    cli
"""
ORDER = _PLACES.split()
FRONTS = (
    "bench",
    "data",
    "demo",
    "distillation",
    "gguf",
    "judging",
    "lean",
    "merging",
    "metrics",
    "planning",
    "pruning",
    "report",
    "verification",
)  # packages that only describe


@dataclass(frozen=True)
class Import:
    module: str  # the importing one
    imported: str
    line: int


def module_of(path: Path, root: Path = REPOSITORY) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(package: str) -> dict[str, Path]:
    return {module_of(path): path for path in sorted((REPOSITORY / package).rglob("*.py"))}


MODULES = sources("qft")
STRATEGIES = sources("adapters")


def imports_of(module: str, path: Path) -> list[Import]:
    return imports_in(module, path.read_text(encoding="utf-8"), is_package=path.stem == "__init__")


def imports_in(module: str, text: str, *, is_package: bool = False) -> list[Import]:
    found: list[Import] = []

    def visit(nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                visit(node.orelse)
                continue
            if isinstance(node, ast.Import):
                found.extend(Import(module, name.name, node.lineno) for name in node.names)
            if isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parts = module.split(".")
                    above = parts[: len(parts) - node.level + is_package]
                    base = ".".join([*above, *filter(None, [node.module])])
                for name in node.names:
                    full = f"{base}.{name.name}"
                    known = full in MODULES or full in STRATEGIES
                    found.append(Import(module, full if known else base, node.lineno))
            visit(ast.iter_child_nodes(node))

    visit(ast.parse(text).body)
    return found


def inside(imports: list[Import], *packages: str) -> list[Import]:
    return [i for i in imports if i.imported.split(".")[0] in packages]


# --- rooms and directions


def test_every_file_has_its_place_in_the_order():
    packages = {"qft", *(f"qft.{name}" for name in FRONTS)}
    placed = {f"qft.{name}" for name in ORDER}
    assert len(placed) == len(ORDER)
    assert set(MODULES) - packages == placed


def test_imports_run_one_way():
    place = {f"qft.{name}": number for number, name in enumerate(ORDER)}
    wrong = [
        f"{module}:{i.line} imports {i.imported}"
        for module, path in MODULES.items()
        for i in inside(imports_of(module, path), "qft")
        if i.imported != module and place.get(i.imported, len(ORDER)) >= place.get(module, 0)
    ]
    assert not wrong


def test_package_fronts_that_only_describe_import_nothing():
    for module in ("qft", *(f"qft.{name}" for name in FRONTS)):
        found = inside(imports_of(module, MODULES[module]), "qft", "adapters")
        assert not found, module


def test_the_engine_in_lean_knows_only_tensors_and_errors():
    wrong = [
        f"{module}:{i.line} imports {i.imported}"
        for module, path in MODULES.items()
        if module.startswith("qft.lean")
        for i in inside(imports_of(module, path), "qft", "adapters", "transformers", "peft")
        if i.imported != "qft.errors" and not i.imported.startswith("qft.lean")
    ]
    assert not wrong


def test_strategies_see_only_the_contract():
    allowed = (
        "qft.errors",
        "qft.strategy",
        "qft.lean",
        "qft.distillation",
        "qft.shards",
        "qft.shard_writer",
        "adapters",
    )
    wrong = [
        f"{module}:{i.line} imports {i.imported}"
        for module, path in STRATEGIES.items()
        for i in inside(imports_of(module, path), "qft", "adapters")
        if not any(i.imported == a or i.imported.startswith(f"{a}.") for a in allowed)
    ]
    assert not wrong


def test_the_engine_imports_no_strategy():
    wrong = [
        f"{module}:{i.line}"
        for module, path in MODULES.items()
        for i in inside(imports_of(module, path), "adapters")
    ]
    assert not wrong


def test_the_engine_names_no_strategy_but_in_the_table():
    """No `if strategy.name == "lora"`, and no import by a written-out name."""
    from qft.registry import BUILT_IN

    wrong = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Compare, ast.match_case)):
                constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                words = ast.unparse(node)  # "full" and "layers" are other knobs' words as well
                if constants & set(BUILT_IN) and ("strategy" in words or ".name" in words):
                    wrong.append(f"{module}:{getattr(node, 'lineno', '?')} asks for a strategy")
            if (
                isinstance(node, ast.Constant)
                and str(node.value).startswith("adapters.")
                and module != "qft.registry"
            ):
                wrong.append(f"{module}:{node.lineno} names {node.value}")
    assert not wrong


def test_the_import_reader_sees_what_it_should():
    text = (
        "import qft.cli\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from qft import training\n"
        "else:\n    from qft import recipe\n"
        "def late():\n    from qft.models import open_model\n"
        "from . import errors\nfrom .files import read_json\nfrom qft import __version__\n"
    )
    found = [i.imported for i in inside(imports_in("qft.x", text), "qft")]
    assert found == ["qft.cli", "qft.recipe", "qft.models", "qft.errors", "qft.files", "qft"]
    relative = imports_in("qft.data", "from .tasks import TASKS\n", is_package=True)
    assert [i.imported for i in relative] == ["qft.data.tasks"]


def test_no_room_is_a_lumber_room():
    banned = {"utils", "util", "common", "helpers", "helper", "misc"}
    folders = [REPOSITORY / name for name in ("qft", "adapters", "tests", "examples", "benchmarks")]
    named = [p for folder in folders for p in folder.rglob("*") if p.stem in banned]
    assert not named


def test_the_tree_of_errors_is_what_the_errors_are():
    from qft import errors

    told = re.findall(r"(?:├──|└──) (\w+) +(\d+) ", errors.__doc__ or "")
    real = {
        name: cls.exit_code
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and issubclass(cls, errors.QftError) and cls is not errors.QftError
    }
    assert {name: int(code) for name, code in told} == real


# --- help is cheap

HEAVY = ("torch", "transformers", "pydantic", "numpy", "peft", "bitsandbytes", "datasets", "yaml")


def loaded_by(code: str, *arguments: str) -> set[str]:
    """Which of the heavy packages a fresh Python holds after ``code``."""
    script = (
        "import sys\n"
        f"try:\n    {code}\nexcept SystemExit as end:\n    assert end.code in (0, None), end.code\n"
        "print('LOADED', *{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:]) & set(HEAVY)


def test_importing_qft_imports_nothing_heavy():
    assert loaded_by("import qft") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["export", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    loaded = loaded_by("from qft.cli import main; main()", *arguments)
    # typer takes pydantic for itself as soon as it parses a verb
    assert loaded <= ({"pydantic"} if len(arguments) > 1 else set())


@pytest.mark.parametrize("arguments", [["recipe"], ["recipe", "--schema"], ["strategies"]])
def test_what_only_describes_imports_no_torch(arguments):
    loaded = loaded_by("from qft.cli import main; main()", *arguments)
    assert not loaded & {"torch", "transformers", "peft"}


def test_a_heavy_import_would_be_seen():
    assert "numpy" in loaded_by("import numpy")


def test_every_name_of_the_package_is_there():
    import qft

    for name in qft.__all__:
        assert getattr(qft, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qft.nothing  # noqa: B018


def test_the_version_is_written_once_in_two_places():
    import tomllib

    import qft

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == qft.__version__


# --- the command line, as a reader types it


def check_command(words: list[str]) -> None:
    """Raises where ``qft …`` names a verb, an option or an argument that does not exist."""
    import typer

    from qft.cli import app

    group = typer.main.get_command(app)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            context = group.make_context("qft", list(words[1:]))
            rest = [*context._protected_args, *context.args]
            _, command, rest = group.resolve_command(context, rest)
            command.make_context(words[1], rest, parent=context)
        except Exception as error:
            if type(error).__name__ == "Exit":  # --help
                return
            message = getattr(error, "message", None) or error
            raise AssertionError(f"{shlex.join(words)}: {message}") from error


def commands_in(block: str) -> list[list[str]]:
    """The simple commands of a shell or console block, without its output lines."""
    lines = block.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    found = []
    for line in lines:
        reader = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        reader.whitespace_split = True
        words: list[str] = []
        for token in [*reader, ";"]:
            if set(token) <= set("();<>|&"):
                found.append(words)
                # what follows < or > is a file, not a command
                words = ["<file>"] if set(token) & set("<>") else []
            else:
                words.append(token)
    commands = []
    for words in found:
        while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
            words = words[1:]
        if words and words[0] != "<file>":
            commands.append(words)
    return commands


def make_targets() -> set[str]:
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):", text, flags=re.MULTILINE))


def check_commands(block: str) -> None:
    for words in commands_in(block):
        if words[0] == "qft" and len(words) > 1:
            check_command(words)
        if words[0] == "make":
            named = [w for w in words[1:] if "=" not in w and not w.startswith("-")]
            assert set(named) <= make_targets(), named


@pytest.mark.parametrize(
    "line",
    ["qft --help", "qft env --json", "qft train recipe.yaml train.epochs=1 --resume",
     "qft generate runs/x -p 'a prompt' --prompt b --max-new-tokens 5",
     "qft export runs/x --format gguf:q8_0 --out small", "FOO=1 qft eval runs/x --data dev.jsonl",
     "$ qft merge runs/x --out m | head\nwhatever: it printed", "make demo && qft env > env.txt",
     "qft strategies  # what there is", "qft merge a \\\n  --out b"],
)  # fmt: skip
def test_commands_that_exist_pass(line):
    assert commands_in(line)
    check_commands(line)


@pytest.mark.parametrize(
    "line",
    ["qft trian recipe.yaml", "qft train", "qft train recipe.yaml --epochs 3", "qft --fast",
     "qft export runs/x --out small", "make world", "true && qft envv", "$ qft envv",
     "qft generate runs/x -p a --max-new-tokens many"],
)  # fmt: skip
def test_commands_that_do_not_exist_fail(line):
    with pytest.raises(AssertionError):
        check_commands(line)


# --- the README's blocks


@dataclass(frozen=True)
class Block:
    """A fenced block. Above it may stand `<!-- not run: why -->` or `<!-- file: name -->`."""

    language: str
    text: str
    line: int
    not_run: str | None
    file: str | None


FENCE = re.compile(
    r"(?:^<!-- (?P<mark>not run|file): (?P<value>[^\n]+?) -->\n+)?"
    r"^```(?P<language>[\w+-]*)[^\n]*\n(?P<text>.*?)^```$",
    flags=re.MULTILINE | re.DOTALL,
)


def blocks_of(text: str) -> list[Block]:
    return [
        Block(
            match["language"],
            match["text"],
            text.count("\n", 0, match.start("text")),
            match["value"] if match["mark"] == "not run" else None,
            match["value"] if match["mark"] == "file" else None,
        )
        for match in FENCE.finditer(text)
    ]


def run_block(block: Block, folder: Path) -> None:
    """Checks one block, and runs it in ``folder`` unless it says why not."""
    if block.file is not None:
        path = folder / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding="utf-8")
    if block.language in ("bash", "sh", "console"):
        check_commands(block.text)
    if block.language == "python":
        compile(block.text, f"README.md:{block.line}", "exec")
    if block.language == "yaml" and block.text.startswith("model:"):
        check_recipe(block.text, folder)
    if block.not_run is not None or block.language not in ("python", "bash", "sh"):
        return
    if block.language == "python":
        command = [sys.executable, "-c", block.text]
    else:
        command = ["bash", "-euo", "pipefail", "-c", block.text]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=reader_environment(folder)
    )
    shown = f"README.md:{block.line}\n{block.text}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, shown


def reader_environment(folder: Path) -> dict[str, str]:
    """As after the installation: `qft` and `python` are commands, and qft can be imported."""
    commands = folder / ".commands"
    if not commands.is_dir():
        commands.mkdir(parents=True)
        for name, arguments in (("qft", " -m qft.cli"), ("python", "")):
            script = commands / name
            script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{arguments} "$@"\n')
            script.chmod(0o755)
    path = os.pathsep.join([str(commands), os.environ.get("PATH", "")])
    python_path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PATH": path, "PYTHONPATH": python_path.rstrip(os.pathsep),
            "HF_HUB_OFFLINE": "1"}  # fmt: skip


def check_recipe(text: str, folder: Path) -> None:
    """Validates a recipe; another package's strategy is only looked at for its name."""
    import yaml

    from qft.recipe import load_recipe
    from qft.registry import BUILT_IN

    strategy = yaml.safe_load(text).get("strategy")
    name = strategy.get("name") if isinstance(strategy, dict) else strategy
    path = folder / "recipe-in-a-document.yaml"
    path.write_text(text, encoding="utf-8")
    foreign = REPOSITORY / "examples" / "third_party" / "pyproject.toml"
    if name not in BUILT_IN and f"\n{name} = " in foreign.read_text(encoding="utf-8"):
        load_recipe(path, ["strategy=lora"])
        return
    load_recipe(path)


@pytest.mark.skipif(not README.is_file(), reason="there is no README.md yet")
def test_the_readme_works_from_top_to_bottom(tmp_path):
    """One test in one folder, as a reader goes through it."""
    blocks = blocks_of(README.read_text(encoding="utf-8"))
    assert any(block.language == "python" and block.not_run is None for block in blocks)
    for block in blocks:
        run_block(block, tmp_path)


def test_the_chinese_readme_has_the_very_same_commands():
    english, chinese = (
        [(block.language, block.text) for block in blocks_of(path.read_text(encoding="utf-8"))]
        for path in (README, README.with_name("README.zh.md"))
    )
    assert chinese == english


@pytest.mark.skipif(not README.is_file(), reason="there is no README.md yet")
def test_every_fence_of_the_readme_is_read():
    text = README.read_text(encoding="utf-8")
    fences = [line for line in text.splitlines() if line.lstrip().startswith("```")]
    assert len(fences) == 2 * len(blocks_of(text))
    assert text.count("<!-- not run:") + text.count("<!-- file:") == sum(
        block.not_run is not None or block.file is not None for block in blocks_of(text)
    )


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("examples/**/README.md")), ids=str)
def test_the_commands_and_recipes_in_the_examples_exist(path, tmp_path):
    blocks = blocks_of(path.read_text(encoding="utf-8"))
    assert blocks
    for block in blocks:
        if block.language in ("bash", "sh", "console"):
            check_commands(block.text)
        if block.language == "yaml":
            check_recipe(block.text, tmp_path)


SAMPLE = """\
# Title

<!-- file: data/rows.txt -->
```text
one
```

```bash
qft --help > help.txt
test -s help.txt
```

```python
from pathlib import Path
assert Path("data/rows.txt").read_text() == "one\\n"
import qft
```

<!-- not run: it takes two minutes -->
```bash
qft demo; exit 9
```

```yaml
model: m
task: text
data: {train: data/rows.txt}
strategy: {name: output-scale}
output: o
```
"""


def test_the_readme_reader_reads_and_runs(tmp_path):
    blocks = blocks_of(SAMPLE)
    assert [block.language for block in blocks] == ["text", "bash", "python", "bash", "yaml"]
    assert blocks[3].not_run == "it takes two minutes"
    assert blocks[0].file == "data/rows.txt"
    assert SAMPLE.splitlines()[blocks[1].line] == "qft --help > help.txt"
    for block in blocks:
        run_block(block, tmp_path)
    assert (tmp_path / "help.txt").read_text().count("train")


@pytest.mark.parametrize(
    "old, new",
    [("qft --help >", "qft --hlep >"), ("test -s help.txt", "test -s other.txt"),
     ("import qft", "import qft_nowhere"), ("qft demo;", "qft dmeo;"), ("task: text", "task: txt"),
     ('"one', '"two'), ("import qft", "import (")],
)  # fmt: skip
def test_the_readme_reader_finds_what_is_broken(tmp_path, old, new):
    assert old in SAMPLE
    with pytest.raises(Exception):  # noqa: B017, PT012
        for block in blocks_of(SAMPLE.replace(old, new)):
            run_block(block, tmp_path)


# --- examples


def example_recipes() -> list[Path]:
    folders = [REPOSITORY / "examples", REPOSITORY / "benchmarks"]
    return sorted(p for folder in folders for p in folder.rglob("*.y*ml"))


@pytest.mark.parametrize("path", example_recipes(), ids=lambda p: p.name)
def test_every_example_recipe_validates(path):
    from qft.recipe import load_recipe

    recipe = load_recipe(path)
    assert recipe.task in recipe.strategy.tasks


@pytest.mark.skipif(not README.is_file(), reason="the first release brings them")
def test_there_are_example_recipes():
    assert example_recipes()


def test_the_makefile_needs_nothing_that_is_not_there():
    text = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for command in re.findall(r"\$\(BIN\)/qft (\w+)", text):
        check_command(["qft", command])
    assert shutil.which("bash")
