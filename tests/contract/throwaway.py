"""A strategy made to ask for everything the contract offers; it is good for nothing else.

Each targeted layer's output is scaled by ``1 + gain * strength``: ``gain`` trains, ``strength``
comes from the layer's original weight and from calibration data. After every step a running mean of
the gradients is kept, and from the third step on half of the gains stop training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qft.errors import AdapterError, RecipeError
from qft.strategy import BaseTensors, Context, Merge, Needs, Strategy


class Gain(nn.Module):
    """What hangs on a targeted layer."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(width, device=device))
        self.register_buffer("strength", torch.ones(width, device=device))
        self.register_buffer("mean_gradient", torch.zeros(width, device=device))

    def scale(self) -> Tensor:
        return 1 + self.gain * self.strength

    def forward(self, output: Tensor) -> Tensor:
        return (output.float() * self.scale()).to(output.dtype)


class Throwaway(Strategy):
    name: ClassVar[str] = "throwaway"
    target: str = Field("o_proj", description="the layers it scales")
    weight: float = Field(1e-3, description="of the penalty")

    @property
    def mergeable(self) -> bool:
        return True

    def needs(self, skeleton: nn.Module) -> Needs:
        first = self._targets(skeleton)[0][0]
        return Needs(
            full_precision=(first,), original_weights=True, calibration_batches=2,
            lowest_trainable_layer=0,
        )  # fmt: skip

    def _targets(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(n, m) for n, m in model.named_modules() if n.endswith(self.target)]

    def attach(self, model: nn.Module, context: Context) -> nn.Module:
        model.requires_grad_(False)
        targets = self._targets(model)
        if not targets:
            raise RecipeError("nothing to scale", where="strategy.target", found=self.target)
        for name, module in targets:
            device = next(module.parameters()).device
            module.scaler = Gain(module.out_features, device)
            module.register_forward_hook(lambda m, inputs, output: m.scaler(output))
            if context.original_weight is not None:
                original = context.original_weight(f"{name}.weight").float()
                module.scaler.strength.copy_(original.norm(dim=1))
        if context.calibration:
            self._calibrate(model, context)
        model.throwaway_steps = 0
        return model

    def _calibrate(self, model: nn.Module, context: Context) -> None:
        tokens = sum(int(batch["attention_mask"].sum()) for batch in context.calibration)
        for _, module in self._targets(model):
            module.scaler.strength.mul_(1 + tokens / 1000)

    def penalty(self, model: nn.Module) -> Tensor | None:
        return self.weight * sum(m.scaler.gain.square().sum() for _, m in self._targets(model))

    def after_step(self, model: nn.Module, step: int) -> None:
        model.throwaway_steps = step
        for _, module in self._targets(model):
            scaler = module.scaler
            gradient = scaler.gain.grad
            assert gradient is not None, "gradients must still be there"
            scaler.mean_gradient.mul_(0.9).add_(gradient, alpha=0.1)
            if step >= 3:  # changes what trains while it trains
                with torch.no_grad():
                    scaler.gain[::2] = scaler.gain[::2].clamp(-0.001, 0.001)

    def state(self, model: nn.Module) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        tensors = {n: m.scaler.mean_gradient for n, m in self._targets(model)}
        return tensors, {"steps": model.throwaway_steps}

    def load_state(
        self, model: nn.Module, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
    ) -> None:
        model.throwaway_steps = values["steps"]
        for name, module in self._targets(model):
            module.scaler.mean_gradient.copy_(tensors[name])

    def save(self, model: nn.Module, folder: Path) -> None:
        tensors = {}
        for name, module in self._targets(model):
            tensors[f"{name}.gain"] = module.scaler.gain.detach().cpu()
            tensors[f"{name}.strength"] = module.scaler.strength.cpu()
        save_file(tensors, folder / "throwaway.safetensors")
        (folder / "throwaway.json").write_text(json.dumps(self.model_dump()), encoding="utf-8")

    def load(self, model: nn.Module, folder: Path) -> None:
        tensors = load_file(folder / "throwaway.safetensors")
        with torch.no_grad():
            for name, module in self._targets(model):
                module.scaler.gain.copy_(tensors[f"{name}.gain"])
                module.scaler.strength.copy_(tensors[f"{name}.strength"])

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        path = folder / "throwaway.json"
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def open_merge(self, folder: Path, base: BaseTensors) -> Merge:
        return ThrowawayMerge(load_file(folder / "throwaway.safetensors"), base)


class ThrowawayMerge:
    def __init__(self, tensors: Mapping[str, Tensor], base: BaseTensors) -> None:
        self._base = base
        self._scales = {}
        for name in {n.rpartition(".")[0] for n in tensors}:
            if f"{name}.weight" not in base.names():
                raise AdapterError("made for another base", found=name)
            scale = 1 + tensors[f"{name}.gain"] * tensors[f"{name}.strength"]
            self._scales[f"{name}.weight"] = scale

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def edit(self, name: str, rows: Tensor, start: int = 0) -> Tensor:
        scale = self._scales.get(name)
        if scale is None:
            return rows
        return rows.float() * scale[start : start + len(rows), None]

    def added(self) -> Mapping[str, Tensor]:
        return {}

    def config_changes(self) -> Mapping[str, Any]:
        return {"throwaway": True}
