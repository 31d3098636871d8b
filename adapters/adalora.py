"""AdaLoRA: low-rank updates whose ranks are handed out while they train, by what each is worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from adapters.low_rank_merge import LowRankMerge, Parts
from adapters.low_rank_targets import resolve
from adapters.low_rank_update import Update
from adapters.peft_backed import (
    PeftStrategy,
    module_name,
    peft_task_type,
    read_config,
    read_tensors,
    stored_tensors,
)
from qft.errors import RecipeError
from qft.lean.model_parts import head_names
from qft.strategy import BaseTensors, Context, Merge, Needs

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import Tensor, nn

    from qft.shards import StoredTensor

_UNTOLD_STEPS = 1_000_000  # for a model that is opened to be used, not to be trained
_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # what PEFT's allocator keeps of each tensor


class AdaLoRA(PeftStrategy):
    """Starts with more rank than it may keep, and takes the least useful away step by step."""

    name: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "Zhang et al. 2023, https://arxiv.org/abs/2303.10512"

    rank: int = Field(8, ge=1, description="mean rank at the end")
    initial_rank: int = Field(12, ge=1, description="rank of every update at the beginning")
    alpha: float = Field(32, gt=0, description="scale is alpha / initial_rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the adapter's input")
    targets: str | tuple[str, ...] = Field(
        "all-linear",
        description="all-linear, attention, mlp, names (may hold *), or one regular expression",
    )
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps before ranks are taken")
    settled: float = Field(0.3, ge=0, lt=1, description="share of the steps after that")
    every: int = Field(1, ge=1, description="steps between two decisions")
    orthogonality: float = Field(0.5, ge=0, description="weight of the penalty that keeps P, Q so")

    @model_validator(mode="after")
    def _can_shrink(self) -> Self:
        if self.rank >= self.initial_rank:
            raise ValueError("initial_rank must be larger than rank, or nothing is taken away")
        if self.warmup + self.settled >= 1:
            raise ValueError("warmup and settled leave no step between them")
        return self

    @property
    def mergeable(self) -> bool:
        """Always: what is left is a low-rank matrix."""
        return True

    def needs(self, skeleton: nn.Module) -> Needs:
        """A new head trains beside the adapters."""
        return Needs(full_precision=tuple(head_names(skeleton)))

    def peft_config(self, model: nn.Module, context: Context) -> PeftConfig:
        """PEFT's AdaLoraConfig for this model and length of training."""
        from peft import AdaLoraConfig

        steps = context.total_steps or _UNTOLD_STEPS
        first, last = round(self.warmup * steps), round(self.settled * steps)
        # the last decision goes by scores, which a step before it must have given
        if steps - last < max(first + 1, 2):
            raise RecipeError(
                "The training is too short to take ranks away.",
                where="strategy: adalora",
                found=f"{steps} step{'s' * (steps != 1)}, ranks are taken from step {first} to "
                f"step {steps - last}",
                fix="more epochs or a smaller batch_size, smaller warmup and settled, or "
                "{name: lora}",
            )
        return AdaLoraConfig(
            init_r=self.initial_rank,
            target_r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=resolve(model, self.targets),
            tinit=first,
            tfinal=last,
            deltaT=self.every,
            total_step=steps,
            orth_reg_weight=self.orthogonality,
            modules_to_save=head_names(model) or None,
            task_type=peft_task_type(model),
        )

    def after_step(self, model: nn.Module, step: int) -> None:
        """Scores every rank by its gradients, and empties those that fall below the budget."""
        tuner: Any = model.base_model
        tuner.update_and_allocate(step)

    def state(self, model: nn.Module) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """The allocator's scores, the ranks still in use, and the emptied ones' matrices."""
        allocator = _allocator(model)
        tensors = {
            f"{kind}/{name}": tensor
            for kind in _SCORES
            for name, tensor in getattr(allocator, kind).items()
        }
        tensors |= {f"whole/{name}": p.detach() for name, p in _low_rank(model).items()}
        return tensors, {"rank_pattern": _pattern(model)}

    def load_state(
        self, model: nn.Module, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        """Restores what `state` returned, exactly."""
        import torch

        allocator, parameters = _allocator(model), _low_rank(model)
        for kind in _SCORES:
            found = {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(f"{kind}/")}
            device = next(iter(parameters.values())).device
            setattr(allocator, kind, {name: tensor.to(device) for name, tensor in found.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"whole/{name}"])
        _config(model).rank_pattern = values["rank_pattern"]

    def load(self, model: nn.Module, folder: Path) -> None:
        """Loads the ranks that were kept; the others stay empty."""
        import torch
        from peft import set_peft_model_state_dict

        tensors = read_tensors(folder)
        pattern = (read_config(folder, "ADALORA") or {}).get("rank_pattern") or {}
        whole = {}
        for name, parameter in _low_rank(model).items():
            saved = "base_model.model." + name.removesuffix(".default")
            kept = pattern.get(name.replace("lora_A", "lora_E").replace("lora_B", "lora_E")
                               .removesuffix(".default"))  # fmt: skip
            if kept is None or saved not in tensors:
                continue
            filled = torch.zeros_like(parameter, device="cpu")
            places = torch.tensor(kept, dtype=torch.bool)
            if "lora_B" in name:
                filled[:, places] = tensors[saved].to(filled)
            else:
                filled[places] = tensors[saved].to(filled)
            whole[saved] = filled
        merged = {**tensors, **whole}
        self.require_same(model, merged, folder)
        set_peft_model_state_dict(model, merged)

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """Rebuilds the settings from an AdaLoRA folder of qft's or PEFT's."""
        values = read_config(folder, "ADALORA")
        if values is None:
            return None
        targets = values.get("target_modules") or ()
        return cls(
            rank=min(values["target_r"], values["init_r"] - 1),
            initial_rank=values["init_r"],
            alpha=values["lora_alpha"],
            dropout=values.get("lora_dropout", 0.0),
            targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
            orthogonality=values.get("orth_reg_weight", 0.5),
        )

    def open_merge(self, folder: Path, base: BaseTensors) -> Merge:
        """Opens the folder for the streamed merge: B (E · A) is a low-rank update."""
        named = {module_name(name): tensor for name, tensor in stored_tensors(folder).items()}
        values = read_config(folder, "ADALORA") or {}
        ranks = self.initial_rank + 1e-5  # PEFT divides by the initial rank and this little more
        updates: dict[str, Update] = {}
        replaced: dict[str, StoredTensor] = {}
        for name, tensor in named.items():
            target, found, part = name.partition(".lora_")
            if not found:
                replaced[name] = tensor
            elif part == "B":
                down, gain = named[f"{target}.lora_A"], named[f"{target}.lora_E"]
                updates[f"{target}.weight"] = Update(
                    tensor, down, self.alpha, gain=gain, ranks=ranks
                )
        heads = frozenset(values.get("modules_to_save") or ())
        return LowRankMerge(Parts(updates, replaced, heads=heads), base, folder)


def _allocator(model: Any) -> Any:
    return model.base_model.rankallocator


def _config(model: Any) -> Any:
    return model.peft_config["default"]


def _pattern(model: nn.Module) -> Any:
    return _config(model).rank_pattern


def _low_rank(model: nn.Module) -> dict[str, Any]:
    """The A, B and E of every update, by the names PEFT's rank pattern has for them."""
    inner: Any = model.base_model
    return {n: p for n, p in inner.model.named_parameters() if ".lora_" in n}
