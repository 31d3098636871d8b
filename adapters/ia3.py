"""(IA)³: keys, values and the inside of each MLP are scaled by trained vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field

from adapters.from_elsewhere import FromElsewhere
from adapters.low_rank_targets import linear_names
from adapters.peft_backed import (
    PeftStrategy,
    module_name,
    peft_task_type,
    read_config,
    stored_tensors,
)
from qft.errors import AdapterError, RecipeError
from qft.lean.model_parts import head_names
from qft.strategy import BaseTensors, Context, Merge, Needs, Rows

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from qft.lean.combining import Combination
    from qft.shards import StoredTensor

# By the names that families give them: keys and values (or both fused), and what ends an MLP.
_SCALED = ("k_proj", "v_proj", "key", "value", "k", "v", "c_attn", "query_key_value", "qkv_proj",
           "key_proj", "value_proj", "k_lin", "v_lin")  # fmt: skip
_ENDS = ("down_proj", "fc2", "wo", "fc_out", "dense_4h_to_h", "w2", "lin2", "c_proj")


class IA3(PeftStrategy):
    """Scales keys, values and the MLPs' inside by vectors: a ten-thousandth of a model."""

    name: ClassVar[str] = "ia3"
    paper: ClassVar[str] = "Liu et al. 2022, https://arxiv.org/abs/2205.05638"

    targets: tuple[str, ...] | None = Field(
        None, description="names of linear layers; None is keys, values and the MLPs' last"
    )
    feedforward: tuple[str, ...] | None = Field(
        None, description="those of the targets whose input is scaled instead of their output"
    )

    @property
    def mergeable(self) -> bool:
        """Always: a scaled weight is a weight."""
        return True

    def needs(self, skeleton: nn.Module) -> Needs:
        """A new head trains beside the vectors."""
        return Needs(full_precision=tuple(head_names(skeleton)))

    def peft_config(self, model: nn.Module, context: Context) -> PeftConfig:
        """PEFT's IA3Config for this model."""
        from peft import IA3Config

        if self.targets is None:
            scaled, ends = usual_targets(model)
        else:
            scaled, ends = list(self.targets), list(self.feedforward or ())
        return IA3Config(
            target_modules=sorted({*scaled, *ends}),
            feedforward_modules=ends,
            modules_to_save=head_names(model) or None,
            task_type=peft_task_type(model),
        )

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """Rebuilds the settings from an (IA)³ folder of qft's or PEFT's."""
        values = read_config(folder, "IA3")
        if values is None:
            return None
        named = values.get("target_modules"), values.get("feedforward_modules")
        if any(isinstance(names, str) for names in named):  # a regular expression
            return IA3FromElsewhere(saved=values)  # type: ignore[return-value]
        targets, feedforward = (tuple(sorted(names or ())) for names in named)
        return cls(targets=targets, feedforward=feedforward)

    def open_merge(self, folder: Path, base: BaseTensors) -> Merge:
        """Opens the folder for the streamed merge."""
        values = read_config(folder, "IA3") or {}
        return IA3Merge(stored_tensors(folder), base, values, folder)

    def combine(self, folders: Sequence[Path], how: Combination, out: Path) -> None:
        """Writes one (IA)³ folder for several: PEFT's weighted sum of the vectors."""
        from adapters.ia3_combine import combine_ia3

        combine_ia3(folders, how, out)


class IA3FromElsewhere(FromElsewhere, IA3):
    """An (IA)³ folder with settings that `IA3` has not."""


def usual_targets(model: nn.Module) -> tuple[list[str], list[str]]:
    """Keys and values, and the last layer of each MLP, as whole module names.

    Raises:
        RecipeError: the family's names are not known.
    """
    names = linear_names(model)
    last = {name: name.split(".")[-1] for name in names}
    attention = {name for name in names if any("att" in part.lower() for part in name.split("."))}
    scaled = [name for name in names if last[name] in _SCALED and name in attention]
    # BERT's attention ends in an output.dense too, which PEFT's usual choice scales as well
    ends = [
        name
        for name in names
        if name.endswith("output.dense") or (name not in attention and last[name] in _ENDS)
    ]
    if not scaled or not ends:
        raise RecipeError(
            "Keys, values and MLPs cannot be told by this family's names.",
            where="strategy.targets",
            found=", ".join(sorted(set(last.values()))),
            fix="name them: targets: [...], feedforward: [...]",
        )
    return scaled, ends


class IA3Merge:
    """Scales rows of weights and their biases, or columns."""

    def __init__(
        self,
        tensors: Mapping[str, StoredTensor],
        base: BaseTensors,
        values: Mapping[str, Any],
        folder: Path,
    ) -> None:
        self._scales: dict[str, Tensor] = {}
        self._replaced: dict[str, Rows] = {}
        self._shapes = {name: base.shape(name) for name in base.names()}
        for name, tensor in ((module_name(n), t) for n, t in tensors.items()):
            target = name.removesuffix(".ia3_l")
            if target == name:
                self._replaced[name] = tensor
                continue
            rows = tensor.shape[1] == 1 and tensor.shape[0] != 1
            weight = self._shapes.get(f"{target}.weight", ())
            wanted = max(tensor.shape)
            transposed = base.transposed(f"{target}.weight")
            along = int(rows) if transposed else int(not rows)
            if len(weight) != 2 or weight[along] != wanted:
                raise AdapterError(
                    "The adapter was made for another base model.",
                    where=f"{folder}: {target}",
                    found=f"adapter {wanted}, base {weight or 'has no such tensor'}",
                    fix="name the base model it was trained on",
                )
            scale = tensor.read()
            self._scales[f"{target}.weight"] = scale.T if transposed else scale
            if rows:  # the whole output is scaled, the bias too
                self._scales[f"{target}.bias"] = scale.flatten()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a merged tensor."""
        if name in self._replaced:
            return tuple(self._replaced[name].shape)
        return self._shapes[name]

    def edit(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        """``rows`` themselves, or the scaled ones in float32."""
        scale = self._scales.get(name)
        if scale is None and name not in self._replaced:
            return rows
        part = slice(start, start + len(rows))
        if scale is None:
            return self._replaced[name][part]
        columns = scale.dim() == 2 and scale.shape[0] == 1
        return rows.float() * (scale if columns else scale[part]).float()

    def added(self) -> Mapping[str, Rows]:
        """A trained head."""
        return self._replaced

    def config_changes(self) -> Mapping[str, Any]:
        """None."""
        return {}
