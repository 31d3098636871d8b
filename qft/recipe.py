"""The recipe: every knob once, with its default and its sentence.

`--help`, the JSON schema and the reference page (`qft recipe`) come from these definitions. A
recipe is read from YAML; all of its problems are reported at once, each with its line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from qft.errors import RecipeError
from qft.registry import brief, build_strategy, check_strategy, settings_of
from qft.strategy import Strategy

TaskName = Literal["text", "instruct", "chat", "seq2seq", "classify", "extract", "token"]
Quantize = Literal["none", "int8", "nf4", "fp4"]
ColumnName = str | int


def _number_as_name(value: Any) -> Any:
    """YAML reads the class 0 as a number; its name is "0"."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Settings(BaseModel):
    """A group of knobs; an unknown key is an error, never ignored."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False
    )


class Columns(Settings):
    """Which columns hold what, where the usual names do not fit (a number: no header line)."""

    text: ColumnName | None = Field(None, description="the text (text, classify, embed)")
    text_pair: ColumnName | None = Field(None, description="a second text (classify)")
    label: ColumnName | None = Field(None, description="the class or classes (classify)")
    prompt: ColumnName | None = Field(None, description="the instruction (instruct)")
    input: ColumnName | None = Field(None, description="what the instruction is about (instruct)")
    completion: ColumnName | None = Field(None, description="the answer (instruct)")
    source: ColumnName | None = Field(None, description="the text to turn into another (seq2seq)")
    target: ColumnName | None = Field(None, description="what it becomes (seq2seq)")
    question: ColumnName | None = Field(None, description="what is asked (extract)")
    context: ColumnName | None = Field(None, description="where the answer lies (extract)")
    answers: ColumnName | None = Field(None, description="texts and their places (extract)")
    tokens: ColumnName | None = Field(None, description="the words, a list (token)")
    tags: ColumnName | None = Field(None, description="a tag a word, a list (token)")
    messages: ColumnName | None = Field(None, description="the conversation (chat)")
    tools: ColumnName | None = Field(None, description="functions the model may call (chat)")


class Augment(Settings):
    """Copies of the training rows with words changed at random; never of held-out rows."""

    copies: int = Field(0, ge=0, description="changed copies of each row; 0 switches it off")
    mask: float = Field(0.1, ge=0, le=1, description="share of words masked")
    insert: float = Field(0.05, ge=0, le=1, description="share of words after which one is put in")
    replace: float = Field(0.05, ge=0, le=1, description="share of words replaced by another")
    delete: float = Field(0.05, ge=0, le=1, description="share of words left out")
    swap: float = Field(0.05, ge=0, le=1, description="share of words swapped with the next")


class Data(Settings):
    """Where the rows come from."""

    train: str = Field(description="file (jsonl, json, csv, tsv, parquet, txt), folder or hub id")
    eval: str | None = Field(None, description="held-out rows, the same kinds")
    eval_share: float = Field(
        0.0, ge=0, lt=1, description="without `eval`: the share of `train` to hold out"
    )
    columns: Columns = Field(default_factory=Columns, description="column names to override")
    limit: int | str | None = Field(
        None, description="use only this many training rows, or `64 per class`, drawn by the seed"
    )
    fold: str | None = Field(
        None,
        pattern=r"^[1-9]\d*/[1-9]\d*$",
        description="`2/5`: hold out the second of five folds (`qft train --folds 5` runs all)",
    )
    augment: Augment = Field(
        default_factory=lambda: Augment(), description="changed copies of training rows (classify)"
    )
    eval_limit: int | None = Field(None, ge=1, description="use only this many held-out rows")
    labels: tuple[Annotated[str, BeforeValidator(_number_as_name)], ...] | None = Field(
        None, description="the classes or tags in order; else those of the training rows, sorted"
    )
    labels_are: Literal["auto", "one", "many", "number"] = Field(
        "auto", description="classify: one class a row, several (a list), or a number to predict"
    )
    stride: int = Field(
        128, ge=0, description="extract: tokens that two windows of a long context share"
    )
    too_long: Literal["error", "truncate", "drop"] = Field(
        "error",
        description="a row longer than max_length (text is cut into blocks instead, which run "
        "on from one document to the next; see train.packing)",
    )
    supervise: Literal["all", "last"] = Field(
        "all", description="chat: the assistant's turns that are trained on"
    )
    max_cut_share: float = Field(
        0.1, ge=0, le=1, description="refuse if truncation cuts off more of the rows' completions"
    )
    max_duplicate_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="refuse if more of the held-out rows are training rows too, whatever the label",
    )

    @property
    def has_held_out(self) -> bool:
        """Whether any rows are kept to judge by."""
        return self.eval is not None or self.eval_share > 0 or self.fold is not None

    @field_validator("limit")
    @classmethod
    def _a_number(cls, limit: int | str | None) -> int | str | None:
        per_class = isinstance(limit, str) and re.fullmatch(r"[1-9]\d* per class", limit)
        if limit is not None and not per_class and (isinstance(limit, str) or limit < 1):
            raise ValueError("a number of rows from 1, or `64 per class`")
        return limit

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = {name.strip() for name in labels or ()}
        if labels is not None and (len(labels) < 2 or len(names) < len(labels)):
            raise ValueError("classes must be two or more, and distinct")
        return labels


UNITS = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def as_bytes(value: Any) -> Any:
    """``8GiB``, or a number of bytes, to bytes; what is no size is an error's matter."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", str(value), re.IGNORECASE)
    if found and not isinstance(value, bool) and (found[2] or "." not in found[1]):
        size = int(float(found[1]) * UNITS[found[2].upper()]) if found[2] else int(found[1])
        if size > 0:
            return size
    raise ValueError("not a size: 8GiB, 512MiB or a number of bytes")


def _as_bound(value: Any) -> Any:
    """``auto``, ``off`` or a size; YAML reads a bare ``off`` as false."""
    if value in ("auto", "off"):
        return value
    if value is False:
        return "off"
    try:
        return as_bytes("no size" if value is True else value)
    except ValueError:
        raise ValueError("auto, off or a size: 8GiB, 512MiB or a number of bytes") from None


def _as_budget(value: Any) -> Any:
    if value in ("auto", None):
        return value
    try:
        return as_bytes(value)
    except ValueError:
        raise ValueError("auto or not a size: 8GiB, 512MiB or a number of bytes") from None


class SaverSwitches(Settings):
    """The parts of the lean engine, each of which can be switched off."""

    label_loss: bool = Field(True, description="the loss over label positions only, in chunks")
    lora: bool = Field(True, description="LoRA layers that keep their input alone")
    gated_mlp: bool = Field(True, description="gated MLPs that keep gate and up alone")
    norms: bool = Field(True, description="normalisations that keep their input alone")
    attention: bool = Field(
        True, description="on a CPU, attention by batched products, and no padding in texts"
    )
    tiled_mlp: bool = Field(
        False, description="gated MLPs run over a few tokens at a time, for one more run of them"
    )
    host_embeddings: bool = Field(False, description="token embeddings stay on the host")
    int8_head: bool = Field(
        False, description="the frozen output layer in 8 bits; this one rounds the logits"
    )


class Memory(Settings):
    """What is traded for memory."""

    checkpointing: Literal["auto", "none", "full"] | Annotated[int, Field(ge=0)] = Field(
        "auto",
        description="layers whose activations are recomputed in the backward pass; auto is none "
        "where half of the free memory surely suffices for that, else full, or what budget allows",
    )
    budget: Annotated[Literal["auto"] | int, BeforeValidator(_as_budget)] | None = Field(
        None,
        description="8GiB, 512MiB: what the training may take beyond the libraries (on a GPU with "
        "its context), enforced; auto is what is free when it begins; null enforces nothing",
    )
    offload: Literal["none", "host", "disk"] = Field(
        "none", description="where the inputs of recomputed layers wait for the backward pass"
    )
    savers: SaverSwitches = Field(default_factory=SaverSwitches, description="the engine's parts")
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="examples a forward pass; else min(batch_size, 4), or all with a cached row "
        "a sample",
    )
    feature_cache: Annotated[Literal["auto", "off"] | int, BeforeValidator(_as_bound)] = Field(
        "auto",
        description="what lies below all that trains is run once, and its output kept on disk for "
        "the later passes, at most so much: 8GiB; auto is 4GiB, with more than one pass to come",
    )
    feature_folder: str | None = Field(
        None,
        description="where that output is kept for other runs too; else feature-cache beside "
        "the run folder",
    )


class Train(Settings):
    """How the training runs."""

    epochs: float = Field(3.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    batch_size: int = Field(16, ge=1, description="examples an optimizer step (effective batch)")
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    optimizer: Literal[
        "adamw", "sgd", "adafactor", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"
    ] = Field("adamw", description="8-bit and paged ones are bitsandbytes', and meant for a GPU")
    schedule: Literal[
        "cosine", "cosine-restarts", "linear", "polynomial", "exponential", "constant"
    ] = Field("cosine", description="how the learning rate falls after the warm-up")
    cycles: int = Field(4, ge=1, description="cosine-restarts: how often it falls")
    warmup: float = Field(0.03, ge=0, description="share of the steps (< 1), or steps, to warm up")
    weight_decay: float = Field(0.0, ge=0, description="not applied to biases and norms")
    max_grad_norm: float = Field(1.0, ge=0, description="gradient clipping; 0 switches it off")
    max_length: int = Field(512, ge=2, description="longest sequence in tokens")
    packing: bool = Field(
        False,
        description="short examples share a row of max_length, each as if it were alone; in text "
        "each document is by itself then (text, instruct, chat)",
    )
    group_by_length: bool = Field(
        True, description="within a step, examples of like length share a micro-batch"
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each label spread over all choices"
    )
    dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="of the model's own layers (hidden, attention, classifier) while training; "
        "else what its config says",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: rare classes count as much as common ones (classify, token)"
    )
    embedding_noise: float = Field(
        0.0, ge=0, description="NEFTune's alpha: noise on the input embeddings; 5 is usual"
    )
    eval_every: int | None = Field(
        None, ge=1, description="steps between evaluations; else once an epoch"
    )
    save_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; else once an epoch"
    )
    keep_checkpoints: int = Field(2, ge=1, description="how many checkpoints are kept")
    early_stopping: int | None = Field(
        None, ge=1, description="stop after this many evaluations without gain; keeps the best"
    )
    log_every: int = Field(10, ge=1, description="steps between lines in metrics.jsonl")
    seed: int = Field(0, ge=0, lt=2**32, description="decides initial adapters, order and dropout")


class Prune(Settings):
    """What is cut out of the model before it trains (`qft heal`); as `qft prune` takes it."""

    method: str = Field("depth", description="depth, width, magnitude, wanda or sparsegpt")
    ratio: float | None = Field(None, gt=0, lt=1, description="share of all parameters that goes")
    params: str | int | None = Field(None, description="or parameters that stay at most: 1.0B")
    size: str | int | None = Field(None, description="or bytes of weights that stay: 500MiB")
    layers: str | None = Field(None, description="depth: the layers that go: 10-15")
    width: str | None = Field(None, description="width: what shrinks: mlp, heads, hidden=512")
    pattern: str | None = Field(None, description="magnitude, wanda, sparsegpt: 2:4")
    importance: str | None = Field(None, description="how parts are scored; else the usual way")
    multiple_of: int = Field(8, ge=1, description="MLP and hidden sizes are; GGUF: 32 or 256")
    calibration_rows: int = Field(128, ge=1, description="training rows that are scored")


def _strategy(value: Any) -> Any:
    if isinstance(value, str):
        value = {"name": value}
    return build_strategy(value) if isinstance(value, Mapping) else value


class Recipe(Settings):
    """One fine-tuning job."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    model: str = Field(description="hub id or folder of the base model")
    task: TaskName = Field(description="text, instruct, chat, seq2seq, classify, extract or token")
    data: Data = Field(description="where the rows come from")
    strategy: Annotated[Strategy, BeforeValidator(_strategy)] = Field(
        description="what trains: {name: lora, rank: 16, …}; `qft strategies` lists them"
    )
    quantize: Quantize = Field("none", description="how the frozen base is held: 8 or 4 bits")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="of weights and arithmetic; auto is what `qft env` says"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train")
    pooling: Literal["auto", "mean", "cls", "last", "model"] = Field(
        "auto", description="classify: which hidden states the head sees; model is its family's own"
    )
    memory: Memory = Field(default_factory=Memory, description="what is traded for memory")
    train: Train = Field(default_factory=Train, description="how the training runs")
    prune: Prune | None = Field(
        None, description="`qft heal` first cuts this out of the model, then trains what is left"
    )
    export: tuple[str, ...] = Field(
        (), description="`qft heal` then also writes these formats: [gguf:q8_0]"
    )
    output: str = Field(description="the run folder to write")
    allow_pickle: bool = Field(False, description="load .bin weights, which can run code")
    trust_remote_code: bool = Field(False, description="run Python files that come with the model")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; reading them back gives an equal recipe."""
        values = self.model_dump(mode="json", exclude={"strategy"})
        values["strategy"] = settings_of(self.strategy)
        return values

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from YAML and applies ``key.sub=value`` overrides.

    Raises:
        RecipeError: no such file, no YAML, or every problem of its values at once.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError("The recipe cannot be read.", where=path, found=error.strerror) from None
    except UnicodeDecodeError as error:
        raise RecipeError("The recipe is not UTF-8 text.", where=path, found=error) from None
    try:
        values = yaml.load(text, Loader=_YamlLoader)
        lines = _key_lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except _YAML_ERRORS as error:
        raise RecipeError("The recipe is not valid YAML.", where=path, found=error) from None
    if not isinstance(values, dict):
        raise RecipeError(
            "The recipe is not a mapping of keys to values.",
            where=path,
            found=type(values).__name__,
            fix="begin with the lines `model: …`, `task: …`, `data: …`",
        )
    apply_overrides(values, overrides)
    return build_recipe(values, where=str(path), lines=lines)


def build_recipe(
    values: Mapping[str, Any],
    *,
    where: str = "recipe",
    lines: Mapping[tuple[str, ...], int] | None = None,
) -> Recipe:
    """A validated recipe from plain values; raises one RecipeError with all problems."""
    problems: list[str] = []
    checked = {str(key): value for key, value in values.items()}
    entry = checked.get("strategy")
    if isinstance(entry, (str, Mapping)):  # a bad one must not hide the other problems, nor they it
        strategy, found = check_strategy({"name": entry} if isinstance(entry, str) else entry)
        for place, text in found:
            place = ("strategy", *place)
            problems.append(f"  {_line(lines, place)}{'.'.join(place)}: {text}")
        checked["strategy"] = strategy or Strategy.model_construct()
    recipe = None
    try:
        recipe = Recipe(**checked)
    except ValidationError as error:
        problems += [_explain(problem, lines) for problem in error.errors()]
    if problems or recipe is None:
        count = len(problems)
        raise RecipeError(
            "\n".join([f"The recipe has {count} problem{'s' * (count != 1)}.", *problems]),
            where=where,
        )
    return recipe


def _explain(problem: Any, lines: Mapping[tuple[str, ...], int] | None) -> str:
    place = tuple(str(part) for part in problem["loc"])
    key = ".".join(place)
    prefix = f"  {_line(lines, place)}{key}: "
    if problem["type"] == "missing":
        return f"{prefix}is missing ({_description(place)})"
    if problem["type"] == "extra_forbidden":
        known = list(_group(place[:-1]).model_fields)
        near = difflib.get_close_matches(place[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}"
        return f"{prefix}no such key; {hint}"
    return (
        f"{prefix}{problem['msg'][0].lower()}{problem['msg'][1:]}, found {brief(problem['input'])}"
    )


def _line(lines: Mapping[tuple[str, ...], int] | None, place: tuple[str, ...]) -> str:
    while lines and place:
        if place in lines:
            return f"line {lines[place]}: "
        place = place[:-1]
    return ""


def _group(place: Sequence[str]) -> type[BaseModel]:
    cls: type[BaseModel] = Recipe
    for part in place:
        annotation = cls.model_fields[part].annotation if part in cls.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        cls = annotation
    return cls


def _description(place: Sequence[str]) -> str:
    field = _group(place[:-1]).model_fields.get(place[-1])
    return (field.description or "") if field else ""


class _YamlLoader(yaml.SafeLoader):
    """YAML 1.1 reads `2e-4` as a string; every writer of recipes means a number."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


# beside its own: a date with a thirteenth month, brackets nested without end
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


def _key_lines(root: yaml.Node | None) -> dict[tuple[str, ...], int]:
    """The line of every key, by its path; a key written twice is an error."""
    found: dict[tuple[str, ...], int] = {}
    seen: set[int] = set()  # an alias may point at what is above it
    waiting: list[tuple[yaml.Node | None, tuple[str, ...]]] = [(root, ())]
    while waiting:
        node, prefix = waiting.pop()
        if not isinstance(node, yaml.MappingNode) or id(node) in seen:
            continue
        seen.add(id(node))
        for key, value in node.value:
            place = (*prefix, str(key.value))
            if place in found:
                raise yaml.YAMLError(
                    f"{'.'.join(place)} is written twice, in line {found[place]} and in line "
                    f"{key.start_mark.line + 1}"
                )
            found[place] = key.start_mark.line + 1
            waiting.append((value, place))
    return found


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Sets ``key.sub=value`` words in a recipe's plain values.

    Raises:
        RecipeError: a word is not of that form.
    """
    for override in overrides:
        _apply_override(values, override)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            "An override is not of the form key.sub=value.",
            found=override,
            fix="write for example train.epochs=1",
        )
    *groups, last = key.split(".")
    target = values
    for group in groups:
        inner = target.get(group)
        if isinstance(inner, str) and group == "strategy":
            inner = {"name": inner}
        inner = dict(inner) if isinstance(inner, Mapping) else {}
        target[group] = inner
        target = inner
    try:
        target[last] = yaml.load(text, Loader=_YamlLoader)
    except _YAML_ERRORS as error:
        raise RecipeError(
            "The value of an override is not valid YAML.", where=key, found=text, fix=str(error)
        ) from None
