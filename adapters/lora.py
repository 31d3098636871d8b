"""LoRA: a low-rank update beside each frozen linear layer."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from adapters.from_elsewhere import FromElsewhere
from adapters.lora_folder import plain_settings, refuse_unmergeable, says_more
from adapters.lora_parts import less_first, lora_parts
from adapters.lora_start import (
    CALIBRATION_BATCHES,
    CHANGES_BASE,
    FIRST_FILE,
    FIRST_MARK,
    Start,
    against_original,
    begin_where_saved,
    finish_start,
    first_update,
    open_first,
    peft_start,
    read_first,
    trained_half,
)
from adapters.low_rank_merge import LowRankMerge
from adapters.low_rank_targets import resolve
from adapters.peft_backed import (
    WEIGHTS_FILE,
    PeftStrategy,
    change_config,
    peft_task_type,
    read_config,
    read_tensors,
    stored_tensors,
)
from adapters.zero_keeping import MARK, keep_zeros
from qft.lean.model_parts import head_names
from qft.strategy import BaseTensors, Context, Merge, Needs

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from qft.lean.combining import Combination


class LoRA(PeftStrategy):
    """A low-rank update beside each frozen linear layer: W x + scale · B A x."""

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Hu et al. 2021, https://arxiv.org/abs/2106.09685"

    rank: int = Field(16, ge=1, description="width of the update")
    alpha: float | None = Field(None, gt=0, description="scale is alpha / rank; None is 2 · rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    targets: str | tuple[str, ...] = Field(
        "all-linear",
        description="all-linear, attention, mlp, names (may hold *), or one regular expression",
    )
    layers: tuple[int, ...] | None = Field(
        None, description="only these layers, counted from 0, or from the top if negative"
    )
    rank_pattern: dict[str, int] = Field(
        default_factory=dict, description="ranks that differ: {regular expression: rank}"
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="alphas that differ: {regular expression: alpha}"
    )
    token_rows: tuple[int, ...] | None = Field(
        None, description="ids of tokens whose embeddings train too"
    )
    rank_stabilised: bool = Field(False, description="scale is alpha / sqrt(rank) (rsLoRA)")
    dora: bool = Field(False, description="train the rows' lengths apart from their directions")
    initialisation: Start = Field(
        "default", description="gaussian, pissa, olora, orthogonal; eva (data), loftq (4 bits)"
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="biases that train too")
    keep_zeros: bool = Field(
        False, description="of a pruned base: weights that are zero stay zero, merged too"
    )

    @field_validator("targets")
    @classmethod
    def _is_a_pattern(cls, targets: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(targets, str):
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return targets

    @model_validator(mode="after")
    def _can_begin(self) -> Self:
        ranks = [self.rank, *self.rank_pattern.values()]
        if self.initialisation == "orthogonal" and any(rank % 2 for rank in ranks):
            raise ValueError("orthogonal halves the rank between A and B: it must be even")
        return self

    @model_validator(mode="after")
    def _can_keep_zeros(self) -> Self:
        if self.keep_zeros and self.dora:
            raise ValueError("keep_zeros cannot be combined with dora")
        if self.keep_zeros and self.initialisation in (*CHANGES_BASE, "loftq", "orthogonal"):
            raise ValueError(
                f"keep_zeros needs an update that begins at zero; {self.initialisation} begins "
                "with one that is not masked"
            )
        return self

    @property
    def mergeable(self) -> bool:
        """Always: the update is a matrix of the weight's own shape."""
        return True

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(self.rank) if self.rank_stabilised else alpha / self.rank

    def needs(self, skeleton: nn.Module) -> Needs:
        """A new head trains beside the adapters, so it must not be quantized."""
        return Needs(
            full_precision=tuple(head_names(skeleton)),
            original_weights=self.initialisation == "loftq",
            calibration_batches=CALIBRATION_BATCHES if self.initialisation == "eva" else 0,
            decomposes=self.initialisation in ("pissa", "loftq"),
            keeps_start=self.initialisation in (*CHANGES_BASE, "loftq"),
        )

    def peft_config(self, model: nn.Module, context: Context) -> PeftConfig:
        """PEFT's LoraConfig for this model."""
        from peft import EvaConfig, LoraConfig

        alpha: Any = 2 * self.rank if self.alpha is None else self.alpha
        start = peft_start(self.initialisation, model, context.quantized)
        return LoraConfig(
            r=self.rank,
            lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
            lora_dropout=self.dropout,
            target_modules=resolve(model, self.targets, self.layers),
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            trainable_token_indices=list(self.token_rows) if self.token_rows else None,
            use_rslora=self.rank_stabilised,
            use_dora=self.dora,
            init_lora_weights=start,
            eva_config=EvaConfig(rho=1.0) if start == "eva" else None,
            bias=self.bias,
            modules_to_save=head_names(model) or None,
            task_type=peft_task_type(model),
        )

    def attach(self, model: nn.Module, context: Context) -> nn.Module:
        """Freezes the model and adds the adapter."""
        wrapped = super().attach(model, context)
        if self.keep_zeros:
            keep_zeros(wrapped)
        finish_start(self.initialisation, wrapped, context)
        return wrapped

    def save(self, model: nn.Module, folder: Path) -> None:
        """Writes PEFT's folder; whatever it began with, it belongs to the original base.

        LoftQ's belongs to the quantized one; what makes it fit the original lies beside it.
        """
        from safetensors.torch import save_file

        super().save(model, folder)
        changes: dict[str, Any] = {}
        if self.initialisation != "default":
            changes = {"init_lora_weights": True, "eva_config": None}
        if self.initialisation in CHANGES_BASE:
            tensors = against_original(read_tensors(folder), model)
            save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
            # twice the rank at the same scale
            factor = math.sqrt(2) if self.rank_stabilised else 2
            alpha = self.scale * (math.sqrt(self.rank) if self.rank_stabilised else self.rank)
            changes |= {
                "r": 2 * self.rank,
                "lora_alpha": alpha * factor,
                "rank_pattern": {k: 2 * v for k, v in self.rank_pattern.items()},
                "alpha_pattern": {k: factor * v for k, v in self.alpha_pattern.items()},
            }
        elif first := first_update(model):
            save_file(first, folder / FIRST_FILE, metadata={"format": "pt"})
            changes["loftq_config"] = FIRST_MARK
        if self.keep_zeros:
            changes[MARK] = True
        if changes:
            change_config(folder, changes)

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads the matrices, exactly; a base that is not quantized is made to fit LoftQ's."""
        super().load(model, folder)
        begin_where_saved(model, read_first(folder, read_config(folder, "LORA") or {}))

    def saved_tensors(self, model: nn.Module, folder: Path) -> dict[str, Tensor]:
        """The folder's tensors as this model holds them."""
        tensors = read_tensors(folder)
        return trained_half(tensors, model) if self.initialisation in CHANGES_BASE else tensors

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """Rebuilds the settings from a LoRA folder of qft's or PEFT's."""
        values = read_config(folder, "LORA")
        if values is None:
            return None
        refuse_unmergeable(values, folder)
        if says_more(values, folder):
            return LoRAFromElsewhere(saved=values, **plain_settings(values))  # type: ignore[return-value]
        targets = values.get("target_modules") or ()
        layers = values.get("layers_to_transform")
        return cls(
            rank=values["r"],
            alpha=values["lora_alpha"],
            dropout=values.get("lora_dropout", 0.0),
            targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
            layers=(layers,) if isinstance(layers, int) else layers,
            rank_pattern=values.get("rank_pattern") or {},
            alpha_pattern=values.get("alpha_pattern") or {},
            token_rows=values.get("trainable_token_indices"),
            rank_stabilised=values.get("use_rslora", False),
            dora=values.get("use_dora", False),
            bias=values.get("bias", "none"),
            keep_zeros=bool(values.get(MARK)),
        )

    def open_merge(self, folder: Path, base: BaseTensors) -> Merge:
        """Opens the folder for the streamed merge."""
        values = read_config(folder, "LORA") or {}
        refuse_unmergeable(values, folder)
        parts = lora_parts(stored_tensors(folder), values, folder)
        if not base.rounded:  # upon the rounded base, LoftQ's whole update belongs
            parts = less_first(parts, open_first(folder, values), folder)
        return LowRankMerge(parts, base, folder, keep_zeros=bool(values.get(MARK)))

    def combine(self, folders: Sequence[Path], how: Combination, out: Path) -> None:
        """Writes one LoRA folder for several, as PEFT's ``add_weighted_adapter`` makes it."""
        from adapters.low_rank_combine import combine_lora

        for folder in folders:
            refuse_unmergeable(read_config(folder, "LORA") or {}, folder)
        combine_lora(folders, how, out)


class LoRAFromElsewhere(FromElsewhere, LoRA):
    """A LoRA folder with settings that `LoRA` has not."""
