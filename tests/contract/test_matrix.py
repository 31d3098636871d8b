"""Every strategy × precision × family: what the contract promises, in one place.

Attaching changes no output where the method says so; only what is declared trains; gradients with
checkpointing equal those without; a saved adapter answers the same in a fresh process; a mergeable
one merges. What cannot exist is refused with a reason, and `docs/combinations.md` lists it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matrix import (
    CASES,
    PRECISIONS,
    TASKS,
    Case,
    attached,
    base_of,
    gradients,
    outputs,
    spec_of,
    train_a_little,
    wrongly_trained,
)
from safetensors.torch import load_file
from torch import Tensor

from qft import models
from qft.errors import RecipeError
from qft.merging.tensors import ModuleTensors
from qft.registry import BUILT_IN
from qft.shards import ShardedCheckpoint

DOCUMENT = Path(__file__).parents[2] / "docs" / "combinations.md"


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))


class Trial:
    """All cases on one family; problems are collected, so that one failure hides no other."""

    def __init__(self, base: Path, architecture: str, folder: Path) -> None:
        self.base, self.architecture, self.folder = base, architecture, folder
        self.problems: list[str] = []
        self.refused: dict[tuple[str, str], str] = {}
        self.orders: list[dict[str, str]] = []
        self.expected: dict[str, Tensor] = {}

    def expect(self, right: bool, key: str, what: str) -> None:
        if not right:
            self.problems.append(f"{key}: {what}")

    def run(self, case: Case, precision: str) -> None:
        key = f"{case.name}/{precision}"
        if TASKS[self.architecture] not in case.strategy().tasks:
            self.refused[case.name, precision] = f"not for the task {TASKS[self.architecture]}"
            return
        try:
            base, plain = attached(case, self.base, self.architecture, precision, "none")
        except RecipeError as error:
            self.refused[case.name, precision] = error.what
            self.expect(bool(error.what), key, "refused without a reason")
            return
        before = outputs(base, self.architecture)
        if case.neutral:
            change = difference(outputs(plain, self.architecture), before)
            self.expect(change < 1e-5, key, f"attaching changed the output by {change:.1e}")
        wrong = wrongly_trained(plain, case.trains)
        self.expect(not wrong, key, f"trains or does not, against what it declares: {wrong[:3]}")
        self.checkpointing(case, precision, key, gradients(plain, self.architecture))
        strategy = case.strategy()
        train_a_little(plain, strategy, self.architecture)
        saved = self.folder / key
        saved.mkdir(parents=True)
        strategy.save(plain, saved)
        answer = outputs(plain, self.architecture)
        self.expect(difference(answer, before) > 1e-3, key, "training changed nothing")
        self.orders.append({"key": key, "adapter": str(saved), "base": str(self.base),
                            "architecture": self.architecture, "precision": precision})  # fmt: skip
        self.expected[key] = answer
        if strategy.mergeable and precision == "none":
            self.merge(case, saved, key, answer)

    def checkpointing(self, case: Case, precision: str, key: str, plain: dict[str, Tensor]) -> None:
        _, model = attached(case, self.base, self.architecture, precision, "full")
        recomputed = gradients(model, self.architecture)
        self.expect(set(plain) == set(recomputed), key, "checkpointing: other gradients exist")
        for name, gradient in plain.items():
            if name in recomputed and gradient.abs().max() > 1e-7:
                wrong = difference(recomputed[name], gradient)
                self.expect(wrong < 1e-4, key, f"checkpointing: {name} differs by {wrong:.1e}")
        self.expect(any(g.abs().max() > 0 for g in plain.values()), key, "all gradients are zero")

    def merge(self, case: Case, saved: Path, key: str, answer: Tensor) -> None:
        model = base_of(self.base, self.architecture, "none", ())
        skeleton = models.open_skeleton(self.base, spec_of(self.base, self.architecture, "none"))
        names = models.module_names(self.base, skeleton)
        tensors = ModuleTensors(ShardedCheckpoint(self.base), names)
        merge = case.strategy().open_merge(saved, tensors)
        state = dict(model.state_dict())
        added = merge.added()
        with torch.no_grad():
            for name, value in state.items():
                if name in tensors.names():
                    value.copy_(merge.edit(name, value.clone()))
                elif name in added:
                    value.copy_(added[name][:])
        change = difference(outputs(model, self.architecture), answer)
        self.expect(change < 1e-4, key, f"merging changed the function by {change:.1e}")

    def reload(self) -> None:
        """One fresh process opens every saved folder."""
        orders, answers = self.folder / "orders.json", self.folder / "answers.safetensors"
        orders.write_text(json.dumps(self.orders), encoding="utf-8")
        program = str(Path(__file__).parent / "reload.py")
        done = subprocess.run(
            [sys.executable, program, str(orders), str(answers)],
            capture_output=True, text=True, cwd=Path(__file__).parents[2],
            env={**__import__("os").environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        for key, answer in load_file(answers).items():
            change = difference(answer, self.expected[key])
            self.expect(change < 1e-5, key, f"reloaded, it answers otherwise by {change:.1e}")


@pytest.mark.parametrize("architecture", TASKS)
def test_every_strategy_in_every_precision(
    architecture: str,
    tmp_path: Path,
    tiny_llama: Path,
    tiny_bert: Path,
    tiny_t5: Path,
) -> None:
    base = {"decoder": tiny_llama, "encoder": tiny_bert, "encoder-decoder": tiny_t5}[architecture]
    trial = Trial(base, architecture, tmp_path)
    for case in CASES:
        for precision in PRECISIONS:
            try:
                trial.run(case, precision)
            except Exception as error:
                trial.problems.append(f"{case.name}/{precision}: {type(error).__name__}: {error}")
    trial.reload()
    assert not trial.problems, "\n".join(trial.problems)
    documented = {k[1:]: v for k, v in documented_refusals().items() if k[0] == architecture}
    assert trial.refused == documented


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "roberta", "bart"])
def test_wider_families(family: str, tmp_path: Path) -> None:
    """The same checks on other families; what they refuse is not in the table."""
    base = tmp_path / "base"
    architecture = make_family(family, base)
    trial = Trial(base, architecture, tmp_path)
    for case in CASES:
        for precision in PRECISIONS:
            try:
                trial.run(case, precision)
            except Exception as error:
                trial.problems.append(f"{case.name}/{precision}: {type(error).__name__}: {error}")
    trial.reload()
    assert not trial.problems, "\n".join(trial.problems)
    assert {name for name, _ in trial.refused} <= {"head", "full"}


def make_family(family: str, folder: Path) -> str:
    """A random two-layer model with a byte tokenizer; which kind it is."""
    import transformers
    from conftest import make_tokenizer

    torch.manual_seed(0)
    sizes = {"vocab_size": 260, "hidden_size": 64, "num_attention_heads": 4, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 128}  # fmt: skip
    layers = {"num_hidden_layers": 2, "intermediate_size": 128}
    made: Any
    match family:
        case "qwen2":
            config = transformers.Qwen2Config(**sizes, **layers, num_key_value_heads=2)
            made = transformers.Qwen2ForCausalLM(config)
        case "roberta":
            made = transformers.RobertaModel(transformers.RobertaConfig(**sizes, **layers))
        case _:
            sizes["d_model"] = sizes.pop("hidden_size")
            del sizes["num_attention_heads"]
            config = transformers.BartConfig(
                **sizes, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, dropout=0.0,
                decoder_start_token_id=2,
            )  # fmt: skip
            made = transformers.BartForConditionalGeneration(config)
    made.save_pretrained(folder)
    make_tokenizer(folder)
    return {"qwen2": "decoder", "roberta": "encoder", "bart": "encoder-decoder"}[family]


def documented_refusals() -> dict[tuple[str, str, str], str]:
    """(family, strategy, precision) → the reason, from the table in the documentation."""
    rows = re.findall(
        r"^\| `([\w-]+)` \| ([\w-]+) \| ([\w, ]+) \| (.+) \|$",
        DOCUMENT.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return {
        (architecture, name, precision): reason
        for name, architecture, precisions, reason in rows
        for precision in precisions.split(", ")
    }


def test_every_built_in_strategy_is_in_the_matrix() -> None:
    assert {case.name for case in CASES} == set(BUILT_IN)
