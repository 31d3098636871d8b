"""Open a checkpoint for a task; translate between checkpoint names and module names.

A checkpoint from elsewhere is untrusted: its files are checked before transformers sees them, and
neither pickles nor Python code that comes with it run unless the user asked by name. Checkpoint
names and module names differ (a bare encoder has no ``bert.`` prefix, old ones say ``gamma``); this
file alone knows how, and `module_names` is the only way to ask.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qft import hardware, quantization
from qft.errors import ModelError, RecipeError, first_line
from qft.files import file_hash
from qft.lean.heap import large_blocks_mapped
from qft.lean.model_parts import head_names
from qft.model_dropout import set_dropout
from qft.pooling import install_pooling, resolve_pooling
from qft.quiet_libraries import quiet_bars
from qft.shards import ShardedCheckpoint

AUTO_CLASSES = {
    "text": "AutoModelForCausalLM",
    "instruct": "AutoModelForCausalLM",
    "chat": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classify": "AutoModelForSequenceClassification",
    "extract": "AutoModelForQuestionAnswering",
    "token": "AutoModelForTokenClassification",
    "embed": "AutoModel",  # an encoder without a head; nothing trains it as such
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ORIGINAL_KEY = "qft_original_fingerprint"  # in config.json of a folder that qft quantized
COMPRESSED = "compressed-tensors"  # vLLM's format, as a quantization config calls itself
_KEPT_BY = {COMPRESSED: "ignore", "torchao": "modules_to_not_convert"}
TASK_KEY = "qft_task"  # in a delivered model's config.json: what it was trained for
_HEAD_CLASSES = {
    "classify": "ForSequenceClassification",
    "extract": "ForQuestionAnswering",
    "token": "ForTokenClassification",
}
_PROBLEMS = {
    "one": "single_label_classification",
    "many": "multi_label_classification",
    "number": "regression",
}
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@dataclass(frozen=True)
class Trust:
    """What the user allowed by name; nothing by default."""

    pickle: bool = False
    remote_code: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """What to open, and how.

    Attributes:
        source: folder or hub id.
        task: decides the model class.
        labels: class names (classify) or tags (token).
        labels_are: one class a row, ``many``, or a ``number`` (classify).
        pooling: see :mod:`qft.pooling` (classify).
        quantize: ``none``, ``int8``, ``nf4`` or ``fp4``.
        dtype: of weights and arithmetic; None is what the machine does best.
        device: ``cpu`` or ``cuda``; None likewise.
        dropout: rate of the model's own dropout layers; None is what its config says.
        trust: what the user allowed.
    """

    source: str
    task: str = "text"
    labels: tuple[str, ...] | None = None
    labels_are: str = "one"
    pooling: str = "auto"
    quantize: str = "none"
    dtype: torch.dtype | None = None
    device: str | None = None
    dropout: float | None = None
    trust: Trust = field(default_factory=Trust)


def resolve_folder(source: str, trust: Trust | None = None) -> Path:
    """The local folder of a model; a hub id is fetched (safetensors, tokenizer and config only).

    Raises:
        ModelError: no such folder, or the hub cannot be reached or does not have it.
    """
    trust = trust or Trust()
    path = Path(source).expanduser()
    if path.exists():
        if not path.is_dir():
            raise ModelError("A model is a folder or a .gguf file.", where=source,
                             fix="name the folder it lies in")  # fmt: skip
        return path
    if not is_hub_id(source):
        near = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
        raise ModelError(
            "The model folder does not exist.",
            where=source,
            found=f"its parent holds {', '.join(near)}" if near else "its parent does not exist",
            fix="name an existing folder or a hub id such as Qwen/Qwen2.5-0.5B",
        )
    return _fetch(source, trust)


def is_hub_id(source: str) -> bool:
    """Whether it could be the name of a model on the hub."""
    return bool(_HUB_ID.match(source))


def is_here(source: str) -> bool:
    """Whether a model's weights are on this machine, so that nothing need be fetched."""
    path = Path(source).expanduser()
    if path.exists() or not is_hub_id(source):
        return path.is_dir()
    import huggingface_hub

    try:
        held = Path(huggingface_hub.snapshot_download(source, local_files_only=True))
    except Exception:  # of many kinds, all meaning: not all of it is here
        return False
    return any(held.glob("*.safetensors")) or any(held.glob("*.bin"))


def _fetch(source: str, trust: Trust) -> Path:
    import huggingface_hub

    wanted = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]
    wanted += ["*.bin", "*.bin.index.json"] if trust.pickle else []
    wanted += ["*.py"] if trust.remote_code else []
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises many kinds, all meaning: not to be had
        raise ModelError(
            "The model is no local folder, and the hub did not give it.",
            where=source,
            found=f"{type(error).__name__}: {first_line(error)}",
            fix="check the name, the network and, for gated models, `hf auth login`; or name a "
            "local folder",
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The model's config.json as plain values.

    Raises:
        ModelError: it is missing or broken.
    """
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ModelError("This is no model folder: config.json is missing.", where=folder,
                         found=held) from None  # fmt: skip
    except (ValueError, OSError) as error:
        raise ModelError("The model's config.json cannot be read.", where=path,
                         found=error) from None  # fmt: skip
    if not isinstance(values, dict):
        raise ModelError("The model's config.json is no JSON object.", where=path)
    return values


def check_folder(folder: Path, trust: Trust | None = None) -> None:
    """Refuses what must not be opened: broken shards, pickles, code of the model's own.

    Raises:
        ModelError: with what, where and what would work.
    """
    trust = trust or Trust()
    for name in ("config.json", "tokenizer_config.json"):
        values = read_config(folder) if name == "config.json" else _optional_json(folder / name)
        if values.get("auto_map") and not trust.remote_code:
            raise ModelError(
                "This model brings Python code of its own, which would run on this machine.",
                where=folder / name,
                found=f"auto_map: {json.dumps(values['auto_map'])[:120]}",
                fix="read that code first; then set trust_remote_code: true in the recipe",
            )
    _refuse_other_weights(folder)
    if not any(folder.glob("*.safetensors")):
        pickles = [name for name in _PICKLES if (folder / name).exists()]
        if not pickles:
            raise ModelError("The model folder holds no weights.", where=folder,
                             fix="it needs model.safetensors")  # fmt: skip
        if not trust.pickle:
            raise ModelError(
                "The weights are a pickle, which can run any code when it is loaded.",
                where=folder / pickles[0],
                fix="get the model as safetensors, or, if you trust its source, set "
                "allow_pickle: true",
            )
        return
    ShardedCheckpoint(folder).close()


def _refuse_other_weights(folder: Path) -> None:
    """Refuses a folder from which transformers would load other weights than those checked here."""
    both = ("model.safetensors", "model.safetensors.index.json")
    if all((folder / name).exists() for name in both):
        raise ModelError("The folder holds two sets of weights.", where=folder,
                         found=" and ".join(both), fix="remove one of them")  # fmt: skip
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            "This base model is an adapter folder too, and would be loaded with the adapter in it.",
            where=folder / "adapter_config.json",
            fix="merge the adapter first, or move it into a folder of its own",
        )
    if read_config(folder).get("transformers_weights"):
        raise ModelError("The model's config.json names weights of its own choice.",
                         where=folder / "config.json",
                         fix="remove the key transformers_weights")  # fmt: skip


def _optional_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise ModelError("A file of the model cannot be read.", where=path, found=error) from None
    return values if isinstance(values, dict) else {}


def task_of(config: Mapping[str, Any]) -> str:
    """The task a config.json says or implies; ``text`` for a base model that does not say."""
    named = str((config.get("architectures") or [""])[0])
    for task, ending in _HEAD_CLASSES.items():
        if named.endswith(ending):
            return task
    stored = config.get(TASK_KEY)
    if isinstance(stored, str) and stored in AUTO_CLASSES:
        return stored
    return "seq2seq" if config.get("is_encoder_decoder") else "text"


def task_to_train(config: Mapping[str, Any]) -> str:
    """What a model is most likely trained for: an encoder that does not say so, to classify."""
    task = task_of(config)
    said = config.get(TASK_KEY) == task
    return "classify" if task == "text" and is_encoder(config) and not said else task


def task_to_run(config: Mapping[str, Any]) -> str:
    """What a finished model does: an encoder without a head gives vectors."""
    task = task_of(config)
    return "embed" if task == "text" and is_encoder(config) else task


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether a config.json's model reads a text from both sides, as BERT does."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    named = str((config.get("architectures") or [""])[0])
    writes = config.get("is_decoder") or named.endswith(("ForCausalLM", "LMHeadModel"))
    return config.get("model_type") in MASKED and not writes


def labels_in(config: Mapping[str, Any]) -> tuple[tuple[str, ...] | None, str]:
    """The classes or tags a config.json names, in order, and what a label is."""
    kinds = {problem: kind for kind, problem in _PROBLEMS.items()}
    kind = kinds.get(str(config.get("problem_type")), "one")
    names = config.get("id2label")
    if kind == "number" or not isinstance(names, dict):
        return None, kind
    return tuple(str(names[key]) for key in sorted(names, key=int)), kind


def longest_input(folder: Path, spec: ModelSpec) -> int | None:
    """The most tokens a model folder has positions for; None where it sets no limit."""
    return longest_of(open_config(folder, spec))


def longest_of(config: Any) -> int | None:
    """The most tokens a transformers config has positions for; None where it sets no limit."""
    if hasattr(config, "encoder") and hasattr(config, "decoder"):  # two models in one
        config = min(config.encoder, config.decoder, key=lambda c: c.max_position_embeddings)
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if config.model_type in _OFFSET_POSITIONS:  # positions begin after the padding's
        return limit - (config.pad_token_id or 0) - 1
    return limit


_OFFSET_POSITIONS = {
    "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "roberta-prelayernorm",
}  # fmt: skip


def open_config(folder: Path, spec: ModelSpec) -> Any:
    """The transformers config for a task, with labels and pooling set."""
    from transformers import AutoConfig

    changes: dict[str, Any] = {}
    if spec.task in ("classify", "token") and spec.labels:
        changes["id2label"] = dict(enumerate(spec.labels))
        changes["label2id"] = {name: number for number, name in enumerate(spec.labels)}
    if spec.task == "classify" and spec.labels_are == "number":
        changes["num_labels"] = 1
    if spec.task == "classify" and (spec.labels or spec.labels_are == "number"):
        changes["problem_type"] = _PROBLEMS[spec.labels_are]
    try:
        config: Any = AutoConfig.from_pretrained(
            folder, trust_remote_code=spec.trust.remote_code, **changes
        )
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(
            "transformers does not know this model.", where=folder,
            found=first_line(error),
        ) from error  # fmt: skip
    if spec.dropout is not None:
        set_dropout(config, spec.dropout)
    return config


def open_skeleton(folder: Path, spec: ModelSpec) -> nn.Module:
    """The model on the meta device: every module and shape, no weight."""
    config = open_config(folder, spec)
    auto = _auto_class(spec.task)
    try:
        with torch.device("meta"):
            model: nn.Module = auto.from_config(
                config,
                dtype=spec.dtype or torch.float32,
                trust_remote_code=spec.trust.remote_code,
            )
    except ValueError as error:
        raise _no_such_class(folder, spec, error) from error
    model.tie_weights()  # type: ignore[operator]
    if spec.task == "seq2seq":
        _drop_unused_pooler(model)
    if spec.task == "classify":
        install_pooling(model, _pooling(model, spec, folder))
    return model


def build_skeleton(config: Mapping[str, Any]) -> nn.Module:
    """The architecture that a config.json names, on the meta device.

    Raises:
        ModelError: transformers does not know it.
    """
    import transformers

    named = str((config.get("architectures") or ["unknown"])[0])
    cls = getattr(transformers, named, None)
    if cls is None or not hasattr(cls, "config_class"):
        raise ModelError("transformers does not know this architecture.", where="config.json",
                         found=named)  # fmt: skip
    with torch.device("meta"):
        model: nn.Module = cls(cls.config_class.from_dict(dict(config)))
    return model


def _pooling(model: nn.Module, spec: ModelSpec, folder: Path) -> str:
    """A decoder's own head finds the last token by the config's pad id; ours by the mask.

    Where the two pad ids differ, or the config has none, its own would depend on the padding.
    """
    kind = resolve_pooling(spec.pooling, folder, model.config)
    decoder = isinstance(getattr(model, "score", None), nn.Linear)
    return "last" if decoder and kind == "model" else kind


def _auto_class(task: str) -> Any:
    import transformers

    return getattr(transformers, AUTO_CLASSES[task])


def _no_such_class(folder: Path, spec: ModelSpec, error: Exception) -> ModelError:
    return ModelError(
        f"This model cannot do the task {spec.task!r}.",
        where=folder,
        found=read_config(folder).get("architectures"),
        fix="text, instruct and chat need a decoder, seq2seq an encoder-decoder; classify, extract "
        "and token take what transformers has a head for",
    )


def open_model(folder: Path, spec: ModelSpec, keep: Sequence[str] = ()) -> nn.Module:
    """Loads the model for a task, in eval mode, quantized as asked, its parameters frozen or not.

    Args:
        folder: from :func:`resolve_folder`.
        keep: names of modules that must stay unquantized, beside heads and embeddings.

    Raises:
        ModelError: the folder is broken, untrusted, or not fit for the task.
    """
    check_folder(folder, spec.trust)
    chosen = hardware.choose(spec.device or "auto")
    dtype = spec.dtype or chosen.dtype
    config = open_config(folder, spec)
    stored = getattr(config, "quantization_config", None)
    compressed = stored is not None and stored_kind(stored) == COMPRESSED
    if stored is not None:
        quantization.require_library(stored_kind(stored), folder)
    kept = unquantized_in(folder, spec, keep)
    settings = None
    if stored is None:
        settings = quantization.loading_config(spec.quantize, dtype, kept)
    else:
        _keep_new_heads(folder, spec, stored)
    model: nn.Module
    try:
        on_cpu = settings is not None and chosen.device == "cpu"
        with quiet_bars(), large_blocks_mapped() if on_cpu else contextlib.nullcontext():
            model, report = _auto_class(spec.task).from_pretrained(
                folder,
                output_loading_info=True,
                config=config,
                dtype=dtype,
                quantization_config=settings,
                device_map={"": chosen.device} if settings or stored else None,
                trust_remote_code=spec.trust.remote_code,
                use_safetensors=None if spec.trust.pickle else True,
            )
            if compressed:
                quantization.decompress_(model)
    except ValueError as error:
        if "Unrecognized configuration class" in str(error):
            raise _no_such_class(folder, spec, error) from error
        raise
    _require_loaded(model, report["missing_keys"], folder)
    if not (settings or stored):
        model.to(chosen.device)
    elif on_cpu:
        quantization.leave_files(model)
    quantization.guard_cpu_kernels(model)
    if spec.task == "classify":
        install_pooling(model, _pooling(model, spec, folder))
    if spec.task == "seq2seq":
        _drop_unused_pooler(model)
        _require_decoder_start(model, folder)
    model.config._name_or_path = spec.source  # type: ignore[union-attr]
    model.name_or_path = spec.source  # type: ignore[assignment]
    model.eval()
    return model


def unquantized_in(folder: Path, spec: ModelSpec, keep: Sequence[str] = ()) -> list[str]:
    """Names of the modules that stay in full precision where loading quantizes; else none.

    Args:
        keep: as for :func:`open_model`.

    Raises:
        RecipeError: the model cannot be held as asked.
    """
    stored = read_config(folder).get("quantization_config")
    if stored and spec.quantize not in ("none", stored_kind(stored)):
        raise RecipeError(
            "The model is stored quantized in another way than the recipe asks for.",
            where="quantize",
            found=f"stored {stored_kind(stored)}, asked {spec.quantize}",
            fix=f"quantize: {stored_kind(stored)}, or name the original model",
        )
    if stored or spec.quantize == "none":
        return []
    quantization.require_bitsandbytes()
    skeleton = open_skeleton(folder, spec)
    if any(type(module).__name__ == "Conv1D" for module in skeleton.modules()):
        raise RecipeError(
            "This family stores its weights transposed and cannot be quantized yet.",
            where="quantize",
            found=type(skeleton).__name__,
            fix="quantize: none",
        )
    kept = quantization.unquantized_modules(skeleton, keep)
    quantization.require_something_left(skeleton, kept)
    return kept


def _require_loaded(model: nn.Module, missing: Sequence[str], folder: Path) -> None:
    """Only a task's own head may be new; anything else would train on random weights."""
    new = {*head_names(model), "pooler"}
    lost = sorted(name for name in missing if new.isdisjoint(name.split(".")))
    if lost:
        raise ModelError(
            "The folder does not hold all of the model's weights.",
            where=folder,
            found=f"{len(lost)} missing for {type(model).__name__}, first {lost[0]}",
            fix="another task, or a model that was saved whole",
        )


def _drop_unused_pooler(model: Any) -> None:
    """A BERT that is half of an encoder-decoder keeps a pooler that nothing reads.

    A strategy would hang an adapter on it that no loss reaches.
    """
    encoder: Any = getattr(model, "encoder", None)
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None


def _require_decoder_start(model: Any, folder: Path) -> None:
    """Without these two the decoder's inputs cannot be made of the labels."""
    missing = [
        name
        for name in ("decoder_start_token_id", "pad_token_id")
        if getattr(model.config, name, None) is None
    ]
    if missing:
        raise ModelError(
            "The model does not say how its decoder begins.",
            where=folder / "config.json",
            found=f"no {' and no '.join(missing)}",
            fix="set them: BERT-type decoders begin with cls_token_id, T5's with pad_token_id",
        )


def _keep_new_heads(folder: Path, spec: ModelSpec, stored: Any) -> None:
    """A head that a quantized folder does not hold is new, and must not be quantized."""
    if not isinstance(stored, dict) or not any(folder.glob("*.safetensors")):
        return
    checkpoint = ShardedCheckpoint(folder)
    names = checkpoint.names()
    checkpoint.close()
    kept = quantization.unquantized_modules(open_skeleton(folder, spec))
    new = [head for head in kept if not any(name.startswith(f"{head}.") for name in names)]
    kept_by = _KEPT_BY.get(stored_kind(stored), "llm_int8_skip_modules")
    stored[kept_by] = sorted({*(stored.get(kept_by) or []), *new})


def stored_kind(stored: Any) -> str:
    """``int8``, ``nf4``, ``fp4`` or another method's name, of a stored quantization config."""
    values = stored if isinstance(stored, dict) else stored.to_dict()
    if values.get("load_in_8bit"):
        return "int8"
    if values.get("load_in_4bit"):
        return str(values.get("bnb_4bit_quant_type", "fp4"))
    return str(values.get("quant_method", "unknown"))


def held_as(config: Mapping[str, Any], asked: str) -> str:
    """How the base's weights are held: as the folder stores them, else as the recipe asks."""
    stored = config.get("quantization_config")
    return stored_kind(stored) if stored else asked


def open_tokenizer(folder: Path, trust: Trust | None = None) -> Any:
    """The model's tokenizer.

    Raises:
        ModelError: it is missing or broken.
    """
    from transformers import AutoTokenizer

    trust = trust or Trust()
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust.remote_code)
    except Exception as error:  # tokenizers raises bare Exceptions on broken files
        raise ModelError(
            "The model's tokenizer cannot be opened.", where=folder,
            found=f"{type(error).__name__}: {first_line(error)}",
            fix="the folder needs tokenizer.json and tokenizer_config.json",
        ) from error  # fmt: skip


def module_names(folder: Path, skeleton: nn.Module) -> dict[str, str]:
    """Checkpoint name → module name (as in ``state_dict``) for every tensor of ``folder``.

    What the skeleton does not have (an unused pooler) keeps its own name.

    Raises:
        ModelError: the checkpoint stores tensors in another form than the modules hold them
            (experts that are fused on loading), which a tensor-by-tensor merge cannot follow.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(skeleton)  # type: ignore[arg-type]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters: list[Any] = [t for t in transforms if not isinstance(t, WeightRenaming)]
    state = skeleton.state_dict()
    prefix = str(getattr(skeleton, "base_model_prefix", "")) or None
    checkpoint = ShardedCheckpoint(folder)
    names: dict[str, str] = {}
    for name in checkpoint.names():
        renamed, converted = rename_source_key(name, renamings, converters, prefix, state)
        if converted is not None and renamed != name:
            raise ModelError(
                "This checkpoint's tensors are rearranged on loading, which the streamed merge "
                "cannot follow yet.", where=folder, found=name,
            )  # fmt: skip
        names[name] = renamed
    checkpoint.close()
    return names


def fingerprint(folder: Path) -> str:
    """Tells one base model from another: a hash of its shapes and of a part of its values.

    It reads headers and the first 4 KiB of every tensor's data, so it takes no longer for a 70B.
    """
    pickles = sorted(folder.glob("*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        return _pickles_fingerprint(pickles)
    checkpoint = ShardedCheckpoint(folder)
    found = checkpoint.fingerprint()
    checkpoint.close()
    return found


def _pickles_fingerprint(files: Sequence[Path]) -> str:
    """Of the files as they lie there: what is in a pickle is not to be had without loading it."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {file_hash(path)}".encode())
    return digest.hexdigest()[:32]


def original_fingerprint(config: Mapping[str, Any]) -> str | None:
    """The fingerprint of the model that a folder of qft's was quantized from, if it says so."""
    value = config.get(ORIGINAL_KEY)
    return value if isinstance(value, str) else None
