"""The sides of a comparison: the same case, each in its own way; and the processes they run in.

A side may patch whatever it imports, so each has a long-lived process of its own, which is told
over a pipe what to open and when to run a block; only one of them computes at a time.
"""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from gpu_models import Case, batch_of, is_installed, optimizer_of, random_model, with_lora
from gpu_rows import peaks, reason_of, reset_peaks

from qft.lean.engine import Savers
from qft.preparation import Offload, prepare

Loss = Callable[[dict[str, torch.Tensor]], torch.Tensor]
Opened = tuple[Any, Loss]  # a model, and what computes its loss


def qft_side(case: Case) -> Opened:
    """The engine, on the model that PEFT has wrapped."""
    offload: Offload = case.offload  # type: ignore[assignment]
    savers = Savers(**dict.fromkeys(case.savers, True))
    model = prepare(with_lora(random_model(case), case), offload=offload, savers=savers)
    return model, lambda batch: model(**batch).loss


def qft_offload_side(case: Case) -> Opened:
    """The engine, with the inputs of recomputed layers in the host's memory."""
    return qft_side(replace(case, offload="host"))


def peft_side(case: Case) -> Opened:
    """PEFT as its quick start has it, with transformers' gradient checkpointing and loss."""
    model = with_lora(random_model(case), case)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model, lambda batch: model(**batch).loss


def peft_autocast_side(case: Case) -> Opened:
    """The same under autocast, which is what a Trainer with ``bf16=True`` does."""
    model, plain = peft_side(case)

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(case.device, dtype=torch.bfloat16):
            return plain(batch)

    return model, loss


def liger_side(case: Case) -> Opened:
    """Liger's kernels below PEFT."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama  # type: ignore

    base = random_model(case)
    apply_liger_kernel_to_llama(model=base)
    model = with_lora(base, case)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return model, lambda batch: model(**batch).loss


def unsloth_side(case: Case) -> Opened:
    """Unsloth with its own checkpointing; it opens folders only, so the random model is saved."""
    from unsloth import FastLanguageModel  # type: ignore

    with tempfile.TemporaryDirectory(prefix="random-model-") as folder:
        random_model(replace(case, quantize="none")).save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        gc.collect()
        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=case.length, dtype=getattr(torch, case.dtype),
            load_in_4bit=case.quantize == "nf4",
        )  # fmt: skip
    torch.manual_seed(1)
    model = FastLanguageModel.get_peft_model(
        model, r=case.rank, lora_alpha=2 * case.rank, lora_dropout=0, bias="none",
        target_modules=list(case.targets), use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    model.train()
    return model, lambda batch: model(**batch).loss


def torchtune_side(case: Case) -> Opened:
    """torchtune's own Llama with its LoRA; 4 bits are torchao's NF4."""
    from torchtune.models.llama3_1 import lora_llama3_1  # type: ignore
    from torchtune.modules.loss import LinearCrossEntropyLoss  # type: ignore
    from torchtune.training import set_activation_checkpointing  # type: ignore

    from qft.bench.shapes import SHAPES

    size = SHAPES[case.shape]
    with torch.device(case.device):
        model = lora_llama3_1(
            ["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True,
            vocab_size=size["vocab_size"], num_layers=size["num_hidden_layers"],
            num_heads=size["num_attention_heads"], num_kv_heads=size["num_key_value_heads"],
            embed_dim=size["hidden_size"], intermediate_dim=size["intermediate_size"],
            max_seq_len=case.length, lora_rank=case.rank, lora_alpha=2 * case.rank,
            quantize_base=case.quantize == "nf4",
        ).to(getattr(torch, case.dtype))  # fmt: skip
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    set_activation_checkpointing(model, {type(model.layers[0])})
    compute = LinearCrossEntropyLoss()
    compute.set_model_output(model)
    model.set_skip_output_layer(True)

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        result: torch.Tensor = compute(model(batch["input_ids"]), labels)
        return result

    return model, loss


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip


SIDES: dict[str, tuple[Callable[[Case], Opened], str | None]] = {  # and the package it needs
    "qft": (qft_side, None),
    "qft-offload": (qft_offload_side, None),
    "peft": (peft_side, None),
    "peft-autocast": (peft_autocast_side, None),
    "liger": (liger_side, "liger_kernel"),
    "unsloth": (unsloth_side, "unsloth"),
    "torchtune": (torchtune_side, "torchtune"),
}


def missing(side: str) -> str | None:
    """Why a side cannot run here at all."""
    package = SIDES[side][1]
    if package is None or is_installed(package):
        return None
    return f"{package} is not installed"


class Runs(Protocol):
    """A side at work, in this process or in another."""

    def open(self, case: Case) -> dict[str, Any]:
        """Makes its model and takes two steps: ``seconds`` of the second, or a ``reason``."""

    def block(self, steps: int) -> dict[str, Any]:
        """Takes a step, then those that are timed: ``tokens``, ``seconds``, ``loss``, peaks.

        Or a ``reason``. The first step asks the device for the memory that the others use again.
        """

    def close(self) -> None:
        """Frees the model."""


class Side:
    """In this process."""

    def __init__(self, name: str) -> None:
        self._make = SIDES[name][0]
        self._state: tuple[Any, Loss, torch.optim.Optimizer, Case] | None = None
        self._count = 0

    def open(self, case: Case) -> dict[str, Any]:
        """See `Runs`."""
        reset_peaks(case.device)
        self._count = 0
        try:
            model, loss = self._make(case)
            self._state = model, loss, optimizer_of(model, case), case
            self._steps(1)
            return self._timed(1)
        except Exception as error:  # a peer may fail in any way; the row says how
            reason = reason_of(error)
        # outside the handler: the traceback holds what did not fit
        self.close()
        return {"reason": reason}

    def block(self, steps: int) -> dict[str, Any]:
        """See `Runs`."""
        assert self._state is not None
        device = self._state[3].device
        try:
            self._steps(1)
            reset_peaks(device, empty=False)
            found = {**self._timed(steps), **peaks(device)}
            reset_peaks(device)  # the other sides need the memory
            return found
        except Exception as error:
            reason = reason_of(error)
        self.close()
        return {"reason": reason}

    def close(self) -> None:
        """See `Runs`."""
        device = self._state[3].device if self._state else "cpu"
        self._state = None
        gc.collect()
        reset_peaks(device)

    def _timed(self, count: int) -> dict[str, Any]:
        assert self._state is not None
        case = self._state[3]
        start = time.perf_counter()
        loss = self._steps(count)  # fetched from the device, so that all of it is done
        seconds = time.perf_counter() - start
        return {"tokens": count * case.batch * case.length, "seconds": seconds, "loss": loss,
                "steps": self._count}  # fmt: skip

    def _steps(self, count: int) -> float:
        assert self._state is not None
        model, loss_of, optimizer, case = self._state
        vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 128256))
        loss = torch.zeros(())
        for _ in range(count):
            # four batches, over and over: they are learned, so that the loss must fall
            loss = loss_of(batch_of(case, vocabulary, self._count % 4))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self._count += 1
        if case.device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())


class FarSide:
    """In a process of its own."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def open(self, case: Case) -> dict[str, Any]:
        """See `Runs`."""
        return self._ask({"open": asdict(case)})

    def block(self, steps: int) -> dict[str, Any]:
        """See `Runs`."""
        return self._ask({"block": steps})

    def close(self) -> None:
        """See `Runs`."""
        self._ask({"close": True})

    def end(self) -> None:
        """The process ends."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            for line in self._process.stdout:
                if line.startswith(_ANSWER):  # a peer may print what it likes
                    found: dict[str, Any] = json.loads(line.removeprefix(_ANSWER))
                    return found
        except (OSError, ValueError):  # a pipe that is closed at one end or the other
            pass
        return {"reason": f"its process ended with {self._process.wait()}"}


_ANSWER = "answer: "


def serve(name: str) -> None:
    """The other end of `FarSide`."""
    side = Side(name)
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any] = {}
        if "open" in order:
            lists = ("targets", "savers")
            values: dict[str, Any] = {
                name: tuple(value) if name in lists else value
                for name, value in order["open"].items()
            }
            answer = side.open(Case(**values))
        elif "block" in order:
            answer = side.block(order["block"])
        else:
            side.close()
        print(_ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1])
