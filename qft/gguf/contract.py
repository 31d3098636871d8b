"""What the writer asks of one of llama.cpp's architectures; a family a file says the rest.

Facts of llama.cpp's model files (``src/models``) and of the ``gguf`` package's tensor names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import gguf
from torch import Tensor

from qft.errors import ModelError, first_line
from qft.gguf.file import Value
from qft.merging.tensors import RowSource

Config = Mapping[str, Any]
WAY_OUT = "export to bnb:nf4, bnb:int8 or safetensors:bf16"


@dataclass(frozen=True)
class Mapped:
    """One tensor of the file.

    Attributes:
        name: in the file.
        shape: as torch says it; the last axis is a row.
        blocks: its numbers in blocks of rows, floating, in order.
        source: the tensor of the checkpoint it is made from; None for a computed one.
    """

    name: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]
    source: str | None = None


class Architecture:
    """One of llama.cpp's architectures, as a checkpoint of transformers is written in it.

    What a family overrides gets a config in which nothing is left unsaid (:func:`whole_config`).

    Attributes:
        name: llama.cpp's.
        interleaved: whether the rows of q and k are reordered for its rotary embedding.
    """

    name = ""
    interleaved = False

    def settings(self, config: Config) -> dict[str, Value]:
        """What llama.cpp reads, keys without the architecture's prefix."""
        raise NotImplementedError

    def problems(self, config: Config) -> list[str]:
        """Settings that llama.cpp would silently run differently, as ``name: value``."""
        return []

    def remarks(self, config: Config) -> list[str]:
        """What a user of the file should know, a sentence each."""
        return []

    def layers(self, config: Config) -> int:
        """How many layers there are."""
        return int(config["num_hidden_layers"])

    def written(self, module: str, config: Config) -> str | None:
        """A tensor's name in the file, by its module name; empty for one the file has no use for.

        None where GGUF has no name for it.
        """
        names = _names(self.name, self.layers(config))
        found: str | None = names.get_name(module, try_suffixes=(".weight", ".bias"))
        return found

    def tensor(self, source: RowSource, name: str, written: str, config: Config) -> Mapped:
        """A tensor of the checkpoint as it stands in the file."""
        return Mapped(written, source.shape(name), lambda: source.blocks(name), name)

    def computed(self, config: Config) -> list[Mapped]:
        """Tensors of the file that no checkpoint holds."""
        return []

    def require(self, config: Config) -> None:
        """Raises ModelError where llama.cpp would silently run the model with other arithmetic."""
        found = self.problems(whole_config(config))
        if found:
            raise ModelError(
                "GGUF readers would run this model with other arithmetic than it was trained with.",
                where="config.json",
                found=", ".join(found),
                fix=WAY_OUT,
            )

    def metadata(self, config: Config) -> dict[str, Value]:
        """What the file says of the architecture."""
        return {f"{self.name}.{key}": v for key, v in self.settings(whole_config(config)).items()}

    def notes(self, config: Config) -> list[str]:
        """What a user of the file should know, a sentence each."""
        return self.remarks(whole_config(config))

    def tensors(self, source: RowSource) -> list[Mapped]:
        """Every tensor of the file, in its order.

        Raises:
            ModelError: GGUF has no name for one of the model's.
        """
        config = whole_config(source.config)
        found = self.computed(config)
        for name in source.names():
            module = source.module(name)
            written = self.written(module, config)
            if written is None:
                raise ModelError("GGUF has no name for a tensor of this model.", where=module)
            if written:
                found.append(self.tensor(source, name, written, config))
        return found


@cache
def _names(architecture: str, layers: int) -> gguf.TensorNameMap:
    numbers = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    return gguf.get_tensor_name_map(numbers[architecture], layers)


def whole_config(config: Config) -> dict[str, Any]:
    """A config.json with every setting of its family, in transformers' present spelling.

    Raises:
        ModelError: transformers does not understand it.
    """
    return dict(_whole(json.dumps(dict(config), sort_keys=True, default=str)))


@lru_cache(maxsize=8)  # it is asked for several times, and warns each time
def _whole(text: str) -> dict[str, Any]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = json.loads(text)
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ModelError("transformers does not know this model.", where="config.json",
                         found=f"model_type: {kind}")  # fmt: skip
    try:
        described: Any = CONFIG_MAPPING[kind].from_dict(config)
    except Exception as error:  # its validators raise many kinds
        raise ModelError("transformers does not understand the model's settings.",
                         where="config.json", found=first_line(error)) from error  # fmt: skip
    return dict(described.to_dict())


def unlike(config: Config, **wanted: Any) -> list[str]:
    """The settings that are not as they have to be, as ``name: value``."""
    return [f"{key}: {config[key]}" for key, value in wanted.items()
            if key in config and config[key] != value]  # fmt: skip
