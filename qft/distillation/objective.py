"""What a student learns from its teacher: every knob of distillation, once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from qft.strategy import Objective

WRITING_TASKS = ("instruct", "chat", "seq2seq")  # whose rows ask for an answer
LossKind = Literal["forward-kl", "reverse-kl", "jsd", "uld", "none"]
LayerMap = Literal["auto", "last"] | dict[int, int]


class HiddenStates(BaseModel):
    """What layers of the student learn from layers of the teacher."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    layers: LayerMap = Field(
        "auto",
        description="the student's layer: the teacher's, counted from 0: {0: 3, 1: 7}; auto "
        "spreads the student's over the teacher's, last is the last of each",
    )
    distance: Literal["cosine", "mse"] = Field("cosine", description="between two hidden states")
    projection: Literal["learned", "fixed"] = Field(
        "learned",
        description="from the student's width to the teacher's: a matrix that trains too, or a "
        "fixed orthogonal one (none at all where the widths are equal)",
    )
    weight: float = Field(1.0, gt=0, description="of this term, added to the loss")
    tokens: Literal["auto", "supervised", "all"] = Field(
        "auto", description="whose hidden states; auto is supervised for texts, all for classes"
    )

    @field_validator("layers")
    @classmethod
    def _from_zero(cls, layers: LayerMap) -> LayerMap:
        numbers = [n for pair in layers.items() for n in pair] if isinstance(layers, dict) else [0]
        if not numbers or min(numbers) < 0:
            raise ValueError("layers count from 0")
        return layers


class DistillSettings(BaseModel):
    """Towards what a student trains; `adapters/distill.py` adds what of it trains."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    teacher: str = Field(description="hub id or folder of the teacher: a model, a run, an adapter")
    teacher_quantize: Literal["none", "int8", "nf4", "fp4"] = Field(
        "none", description="how the teacher's weights are held"
    )
    loss: LossKind = Field(
        "forward-kl",
        description="between the two distributions: forward-kl, reverse-kl, jsd, uld (teachers "
        "with another tokenizer), or none (hidden states or the teacher's texts alone)",
    )
    weight: float = Field(
        0.5, gt=0, le=1, description="share of that loss; the rest is the task's own"
    )
    temperature: float = Field(1.0, gt=0, description="of both distributions")
    beta: float = Field(
        0.5, gt=0, lt=1, description="jsd: the teacher's share of the mixture both are compared to"
    )
    hidden: HiddenStates | None = Field(
        None, description="also learn from the teacher's hidden states"
    )
    cache: Literal["auto", "top-k", "samples", "off"] = Field(
        "auto",
        description="what is kept on disk of the teacher's word on each token, so that it need "
        "not be there while the student trains: its likeliest tokens, or tokens drawn from its "
        "distribution; off keeps the teacher in memory; auto is samples for forward-kl, off with "
        "on_policy, else top-k",
    )
    top_k: int = Field(64, ge=1, description="tokens kept of each position (top-k)")
    draws: int = Field(64, ge=1, description="tokens drawn at each position (samples)")
    cache_precision: Literal["float16", "float32"] = Field(
        "float16", description="of the cached log-probabilities and hidden states"
    )
    cache_folder: str | None = Field(
        None, description="where the cache is; else teacher-cache beside the run folder"
    )
    texts: Literal["data", "teacher"] = Field(
        "data", description="train on the data's completions, or on the teacher's own for them"
    )
    on_policy: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the steps in which the student writes the completions itself and "
        "the teacher, in memory, judges them",
    )
    max_new_tokens: int = Field(
        256, ge=1, description="of completions that the teacher or the student writes"
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if self.loss == "none" and self.hidden is None and self.texts == "data":
            raise ValueError("loss: none leaves nothing to learn from the teacher; hidden: {} or "
                             "texts: teacher")  # fmt: skip
        if self.loss == "uld" and self.temperature != 1:
            raise ValueError("uld compares sorted probabilities as they are; temperature: 1")
        if self.cache == "samples" and self.loss not in ("forward-kl", "none"):
            raise ValueError(f"samples are without bias for forward-kl alone, not for {self.loss}; "
                             "cache: top-k")  # fmt: skip
        if self.on_policy and self.caches:
            raise ValueError("what the student writes is new in every step; cache: off")
        if self.on_policy and self.loss in ("none", "uld"):
            raise ValueError("the teacher judges each token of what the student writes; loss: "
                             "reverse-kl, jsd or forward-kl")  # fmt: skip
        return self

    @property
    def caches(self) -> bool:
        """Whether the teacher's word is kept on disk."""
        return self.keeps != "off"

    @property
    def keeps(self) -> Literal["top-k", "samples", "off"]:
        """What is kept of a text's tokens."""
        if self.cache != "auto":
            return self.cache
        if self.on_policy:
            return "off"
        return "samples" if self.loss == "forward-kl" else "top-k"

    def described(self) -> dict[str, Any]:
        """For records that others may read: no folder of this machine is in it."""
        values = self.model_dump(mode="json", include=set(DistillSettings.model_fields))
        return {**values, "teacher": Path(self.teacher).name, "cache_folder": None}

    @property
    def writes(self) -> bool:
        """Whether teacher or student writes answers of its own."""
        return self.texts == "teacher" or self.on_policy > 0

    @property
    def has_lessons(self) -> bool:
        """Whether the teacher says more of an example than a text."""
        return self.loss != "none" or self.hidden is not None


@dataclass(frozen=True)
class Distillation(Objective):
    """The task's loss, mixed with what a teacher says."""

    kind: str = "distill"
    settings: Any = None  # DistillSettings; never None

    @property
    def of(self) -> DistillSettings:
        """The knobs."""
        settings: DistillSettings = self.settings
        return settings
