"""Which type each tensor of a file gets, by the mix that was asked for.

The mixes, their numbers and their rules are llama.cpp's (``src/llama-quant.cpp`` and ``llama.h`` of
llama-cpp-python 0.3.36), tensor by tensor: people compare files by these names, and a mix of qft's
has the size that its name has elsewhere. Rules of mixtures of experts are left out, as qft writes
none as GGUF.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qft.gguf.file import Value
from qft.gguf.types import TYPES, holds

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """The type of one tensor.

    Attributes:
        kind: what it is stored in.
        wanted: what the mix says; another where its rows do not fill that type's blocks.
    """

    kind: str
    wanted: str


@dataclass(frozen=True)
class FallBack:
    """Tensors that are stored in another type than their mix says.

    Attributes:
        wanted: the mix's type.
        kind: the one they have.
        width: numbers a row, which do not fill whole blocks of ``wanted``.
        names: of the tensors.
    """

    wanted: str
    kind: str
    width: int
    names: tuple[str, ...]

    def text(self) -> str:
        """A sentence for the user."""
        more = f" … ({len(self.names)} in all)" if len(self.names) > 3 else ""
        return (
            f"{len(self.names)} tensor(s) are stored in {self.kind}, not {self.wanted}, whose "
            f"blocks of {TYPES[self.wanted].block} do not divide rows of {self.width}: "
            f"{', '.join(self.names[:3])}{more}"
        )


# A mix → what ``general.file_type`` says of it (``llama_ftype`` in llama.h).
MIXES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10,
    "q3_k_s": 11, "q3_k_m": 12, "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16,
    "q5_k_m": 17, "q6_k": 18, "iq4_nl": 25, "bf16": 32,
}  # fmt: skip
# Where rows do not fill blocks of 256; what does not fill blocks of 32 either becomes F16.
_NARROWER = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_NEVER_QUANTIZED = ("_norm.weight", "ffn_gate_inp.weight", "attn_rel_b.weight")
_EMBEDDINGS_KEPT = ("position_embd.weight", "token_types.weight")
_SEVENTY_BILLION_LAYERS = {"llama": 80, "qwen2": 80}


def choose_types(
    mix: str,
    architecture: str,
    tensors: Sequence[tuple[str, Shape]],
    settings: Mapping[str, Value] | None = None,
    *,
    importance: bool = False,
) -> dict[str, Choice]:
    """The type of every tensor.

    Args:
        mix: a key of MIXES.
        architecture: llama.cpp's name for it.
        tensors: name in the file and shape (the last axis is a row) of each.
        settings: what the file says of the architecture, with its prefix: layers and heads count.
        importance: whether the columns' importance is known.
    """
    names = [name for name, _ in tensors]
    model = _Model.of(mix, architecture, names, settings or {}, importance)
    seen = {"values": 0, "down": 0}
    chosen = {}
    for name, shape in sorted(tensors, key=lambda tensor: _in_layers(tensor[0])):
        if not _quantizable(name, shape):
            chosen[name] = Choice("f32", "f32")
        elif mix in ("f32", "f16", "bf16"):
            chosen[name] = Choice(mix, mix)
        else:
            place = _place(name)
            wanted = model.wanted(place, seen.get(place, 0))
            if place in seen:
                seen[place] += 1
            chosen[name] = Choice(_that_fits(wanted, shape[-1]), wanted)
    return {name: chosen[name] for name in names}


def fall_backs(
    choices: Mapping[str, Choice], shapes: Iterable[tuple[str, Shape]]
) -> list[FallBack]:
    """The table of what is stored in another type than the mix says, and why; grouped."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for name, shape in shapes:
        choice = choices[name]
        if choice.kind != choice.wanted:
            groups.setdefault((choice.wanted, choice.kind, shape[-1]), []).append(name)
    return [FallBack(*group, tuple(names)) for group, names in groups.items()]


@dataclass(frozen=True)
class _Model:
    """What the rules ask of a model.

    Attributes:
        layers: how many.
        values: how many tensors make attention's values.
        sharing: how many heads of queries share one of keys and values.
        tied: the output matrix is the embedding.
        largest: one of the 70-billion-parameter models, whose values are small beside the rest.
    """

    mix: str
    layers: int
    values: int
    sharing: int
    tied: bool
    largest: bool
    importance: bool

    @classmethod
    def of(
        cls,
        mix: str,
        architecture: str,
        names: Sequence[str],
        settings: Mapping[str, Value],
        importance: bool,
    ) -> _Model:
        layers = _number(settings.get(f"{architecture}.block_count"), 0)
        heads = _number(settings.get(f"{architecture}.attention.head_count"), 1)
        shared = _number(settings.get(f"{architecture}.attention.head_count_kv"), heads)
        largest = layers == _SEVENTY_BILLION_LAYERS.get(architecture)
        return cls(
            mix=mix,
            layers=layers,
            values=sum(_place(name) == "values" for name in names),
            sharing=heads // max(1, shared),
            tied="output.weight" not in names,
            largest=largest and (architecture != "llama" or heads != shared),
            importance=importance,
        )

    def wanted(self, place: str, index: int) -> str:
        """The type of the tensor at a place, the ``index``-th of its kind."""
        usual = self.mix if self.mix in TYPES else self.mix.rpartition("_")[0]
        if place == "output" or (place == "embedding" and self.tied):
            return usual if usual == "q8_0" else "q6_k"
        if place == "values":
            found = self._values(index) or usual
            return "q5_k" if self.largest and found in ("q3_k", "q4_k") else found
        if place == "down":
            return self._down(index) or usual
        if place == "attention output":
            return {"q2_k": "q3_k", "q3_k_m": "q4_k", "q3_k_l": "q5_k"}.get(self.mix, usual)
        return usual

    def _values(self, index: int) -> str | None:
        if self.mix == "q2_k":
            return "q4_k" if self.sharing >= 4 else "q3_k"
        if self.mix == "q3_k_m":
            return "q5_k" if index < 2 else "q4_k"
        raised = {
            "q3_k_l": ("q5_k", True),
            "q4_k_s": ("q5_k", index < 4),
            "q4_k_m": ("q6_k", _needs_more_bits(index, self.values)),
            "q5_k_m": ("q6_k", _needs_more_bits(index, self.values)),
            "iq4_nl": ("q5_k", self.sharing >= 4),
        }
        kind, applies = raised.get(self.mix, ("", False))
        return kind if applies else None

    def _down(self, index: int) -> str | None:
        if self.mix == "q3_k_m":
            return "q5_k" if index < self.layers // 16 else "q4_k"
        early = index < self.layers // 8
        raised = {
            "q2_k": ("q3_k", True),
            "q3_k_l": ("q5_k", True),
            "q4_k_s": ("q5_k", early),
            "q4_k_m": ("q6_k", _needs_more_bits(index, self.layers)),
            "q5_k_m": ("q6_k", _needs_more_bits(index, self.layers)),
            "q4_0": ("q4_1", early and self.importance),
            "q5_0": ("q5_1", early and self.importance),
            "iq4_nl": ("q5_k", early and not self.importance),
        }
        kind, applies = raised.get(self.mix, ("", False))
        return kind if applies else None


def _needs_more_bits(index: int, count: int) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = count // 8
    return index < eighth or index >= 7 * count // 8 or (index - eighth) % 3 == 2


def _that_fits(wanted: str, width: int) -> str:
    for kind in (wanted, _NARROWER.get(wanted, wanted)):
        if holds(kind, width):
            return kind
    return "f16"


def _quantizable(name: str, shape: Shape) -> bool:
    """Whether llama.cpp stores it in anything but float32: matrices, but for a few small ones."""
    matrix = any(size > 1 for size in shape[:-1])
    kept = name in _EMBEDDINGS_KEPT or any(part in name for part in _NEVER_QUANTIZED)
    return matrix and name.endswith("weight") and not kept


def _place(name: str) -> str:
    """What a tensor does, as far as the rules tell tensors apart."""
    if name == "output.weight":
        return "output"
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    if "attn_qkv.weight" in name or "attn_v.weight" in name:
        return "values"
    if "attn_output.weight" in name:
        return "attention output"
    return "down" if "ffn_down" in name else "other"


def _in_layers(name: str) -> tuple[int, str]:
    """llama.cpp goes through a file layer by layer, whatever the order in it."""
    parts = name.split(".")
    layer = int(parts[1]) if parts[0] == "blk" and parts[1].isdigit() else -1
    return layer, name


def _number(value: Value | None, absent: int) -> int:
    """A setting that may be told layer by layer: the first layer's."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = value[0] if value else None
    return absent if value is None or isinstance(value, str) else int(value)
