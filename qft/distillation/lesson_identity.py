"""What decides the numbers in a teacher cache: the cache of a data set is named by it.

Half of it is what the recipe asks for, which is known without the teacher; the other half is the
teacher itself and how it was run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qft import hardware, models
from qft.adapter_folder import AdapterFolder
from qft.data.examples import Example, fingerprint, inputs_fingerprint
from qft.distillation.kept import Kept
from qft.distillation.objective import DistillSettings
from qft.distillation.supply import paired_examples
from qft.distillation.teachers import teacher_folder
from qft.feature_identity import OF_NO_ACCOUNT, tokenizer_hash, value_hash
from qft.files import file_hash
from qft.inputs import Inputs
from qft.recipe import Recipe

_FORMAT = "1"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def asked_parts(
    recipe: Recipe,
    settings: DistillSettings,
    inputs: Inputs,
    kept: Kept,
    ordered: Sequence[Example],
) -> dict[str, str]:
    """What the recipe decides.

    Args:
        ordered: the examples in the order in which their lessons are stored.
    """
    student = models.read_config(inputs.base)
    return {
        "format": _FORMAT,
        **kept.parts(),
        "task": recipe.task,
        "quantization": settings.teacher_quantize,
        "data": _data_hash(ordered, by_labels=kept.predicts != "class"),
        "classes": json.dumps(inputs.train.labels or ()),
        "student's tokens": value_hash([tokenizer_hash(inputs.tokenizer), _rows(student)]),
    }


def teacher_parts(recipe: Recipe, settings: DistillSettings, inputs: Inputs) -> dict[str, str]:
    """What the teacher decides, and what it runs on.

    Every byte of its weights counts: a checkpoint that went on training is another teacher.

    Raises:
        ModelError: the teacher is not there.
    """
    trust = models.Trust(recipe.allow_pickle, recipe.trust_remote_code)
    found = teacher_folder(settings.teacher, trust)
    chosen = hardware.choose(recipe.device, recipe.dtype)
    dtype, weights = chosen.dtype, []
    if isinstance(found, AdapterFolder):
        folder, dtype = found.base, found.spec().dtype or dtype
        files = sorted(found.folder.rglob("*"))
        weights = [path for path in files if path.suffix in (".json", ".safetensors")]
    else:
        folder = found
    weights += sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
    config = {k: v for k, v in models.read_config(folder).items() if k not in OF_NO_ACCOUNT}
    versions = hardware.versions()
    software = {name: versions.get(name) for name in ("torch", "transformers", "bitsandbytes")}
    tokenizer = models.open_tokenizer(folder, trust)
    paired: list[Example] = []
    if settings.loss == "uld":
        paired = sorted(paired_examples(recipe, inputs, tokenizer).values(), key=lambda e: e.index)
    return {
        "teacher": value_hash([[path.name, file_hash(path)] for path in weights]),
        "teacher's config": value_hash(config),
        "teacher's tokens": tokenizer_hash(tokenizer),
        "teacher's rows": _data_hash(paired, by_labels=True) if paired else "",
        "dtype": str(dtype).removeprefix("torch."),
        "device": chosen.device,
        "software": ", ".join(f"{name} {version}" for name, version in software.items()),
    }


def teacher_name(settings: DistillSettings) -> str:
    """What a teacher is called wherever it lies."""
    return Path(settings.teacher).name


def _data_hash(examples: Sequence[Example], *, by_labels: bool) -> str:
    digest = hashlib.sha256()
    for example in examples:
        own = fingerprint([example]) if by_labels else inputs_fingerprint(example)
        digest.update(f"{example.index}:{own};".encode())
    return digest.hexdigest()


def _rows(config: dict[str, Any]) -> Any:
    """Tokens that a model has an output for."""
    text = config.get("text_config")
    return (text if isinstance(text, dict) else config).get("vocab_size")
