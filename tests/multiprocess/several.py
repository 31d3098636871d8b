"""Run as a program, alone or by ``accelerate launch``: one trained step after another, and what
came of it as a file.

    accelerate launch --multi_gpu --num_processes 2 several.py JOB.json
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from adapters.head import Head
from adapters.lora import LoRA
from qft.data.examples import Example
from qft.data.tasks import TASKS
from qft.models import ModelSpec, open_model
from qft.preparation import prepare
from qft.step import Share, accumulate_gradients
from qft.strategy import Context

LENGTHS = (17, 5, 30, 9, 22, 3, 12)


def examples(task: str) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(4, 260, (length,), generator=generator).tolist()
        labels: Any = [-100] * (length // 3) + ids[length // 3 :]
        if index == 5:
            labels = [-100] * length  # one that has nothing to say
        if task == "classify":
            labels = index % 2
        made.append(Example(index, {"input_ids": ids, "labels": labels}))
    return made


def opened(job: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    names = ("no", "yes") if job["task"] == "classify" else None
    spec = ModelSpec(job["base"], job["task"], names, dtype=getattr(torch, job["dtype"]),
                     device="cpu")  # fmt: skip
    strategy = Head() if job["strategy"] == "head" else LoRA(rank=4, dropout=0.2)
    base = open_model(Path(job["base"]), spec)
    for module in base.modules():  # attention weights are dropped by the ordinary generator
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model = prepare(base, strategy, checkpointing=job["checkpointing"], context=Context(seed=3))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
        if parameter.requires_grad:  # one type a group of FSDP's
            parameter.data = parameter.data.to(spec.dtype)
    return model


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may lie in several processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def wrapped(model: Any, way: str, accelerator: Accelerator) -> Any:
    if way == "ddp":
        return accelerator.prepare(model)
    if way == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        from qft.lean.model_parts import layer_stacks
        from qft.preparation import inner_model

        mesh = init_device_mesh("cpu", (accelerator.num_processes,))
        for stack in layer_stacks(inner_model(model)).values():
            for layer in stack:
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def main(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = wrapped(opened(job), job["way"], accelerator)
    if job.get("broken"):  # what a mistake would look like: nobody exchanges anything
        model = getattr(model, "module", model)
    trained = {n.removeprefix("module."): p for n, p in model.named_parameters()
               if p.requires_grad}  # fmt: skip
    optimizer = torch.optim.SGD(list(trained.values()), lr=0.05)
    kept: dict[str, Tensor] = {}
    losses = []
    for step in range(1, job["steps"] + 1):
        optimizer.zero_grad(set_to_none=True)
        result = accumulate_gradients(
            model, examples(job["task"]), TASKS[job["task"]], step=step, micro_batch=2,
            pad_token_id=0, share=Share.of_this_process(),
        )  # fmt: skip
        losses.append(float(result.loss))
        if step == 1:
            for name, parameter in trained.items():
                assert parameter.grad is not None, name
                kept[f"gradient.{name}"] = full(parameter.grad).clone()
        optimizer.step()
    for name, parameter in trained.items():
        kept[f"weight.{name}"] = full(parameter.detach()).clone()
    if accelerator.is_main_process:
        save_file({n: t.contiguous() for n, t in kept.items()}, job["out"],
                  metadata={"losses": json.dumps(losses)})  # fmt: skip
    with contextlib.suppress(ValueError):
        if distributed.is_initialized():
            distributed.barrier()
            distributed.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
