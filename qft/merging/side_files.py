"""What a model folder holds beside its weights: tokenizer, chat template, generation settings."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from qft.errors import ModelError
from qft.shards import inside

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_SENTENCEPIECE = "*.model"
_GENERATION = "generation_config.json"
_MODE = 0o644


def side_files(base: Path, adapter: Path | None = None) -> dict[str, Path]:
    """File name → where it is, for every known plain file; nothing else is ever copied.

    A tokenizer that training changed lies beside the adapter and replaces the base's as a whole: a
    mixture of two tokenizers would be neither.

    Raises:
        ModelError: one of them is a link that leads out of its folder.
    """
    found = tokenizer_files(adapter) if adapter is not None else {}
    found = found or tokenizer_files(base)
    for folder in (base, adapter):
        if folder is not None and (folder / _GENERATION).is_file():
            found[_GENERATION] = inside(folder, _GENERATION)
    return found


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The tokenizer's files in a folder, or none where it holds no whole tokenizer."""
    names = [name for name in _TOKENIZER if (folder / name).is_file()]
    if not {"tokenizer.json", "tokenizer_config.json"} & set(names):
        return {}
    names += sorted(path.name for path in folder.glob(_SENTENCEPIECE) if path.is_file())
    return {name: inside(folder, name) for name in names}


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copies contents, not links or modes, into ``folder``.

    Raises:
        ModelError: one cannot be read.
    """
    for name, path in files.items():
        try:
            path.open("rb").close()
        except OSError as error:
            raise ModelError("A file of the model cannot be read.", where=path,
                             found=error.strerror) from None  # fmt: skip
        shutil.copyfile(path, folder / name)
        (folder / name).chmod(_MODE)


def files_bytes(files: Mapping[str, Path]) -> int:
    """Bytes the files take together."""
    return sum(path.stat().st_size for path in files.values())
