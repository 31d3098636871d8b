"""Rows that an export's rounding is fitted to: which they are, and what they meet in the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from merge_bases import make_base, stir, wrapped
from torch import Tensor, nn

from qft.adapter_folder import locate_adapter
from qft.calibration import drawn
from qft.errors import RecipeError
from qft.export.calibration import calibrate_on, calibration_for
from qft.layer_inputs import observe_inputs
from qft.merging.merge import open_source
from qft.models import open_skeleton
from qft.progress import QUIET
from qft.source_stream import open_stream
from qft.verification.subject import locate


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import LoraConfig

    room = tmp_path_factory.mktemp("room")
    base = make_base("llama", room / "base")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = wrapped(base, config)
    stir(model)
    model.save_pretrained(room / "adapter")
    return room / "adapter"


def batches() -> list[dict[str, Tensor]]:
    torch.manual_seed(2)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[0, 7:] = 0
    ids = torch.randint(1, 60, (3, 12)) * mask
    return [{"input_ids": ids, "attention_mask": mask, "labels": ids}]


def squares(linears: dict[str, nn.Module], run: Any, mask: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def before(module: Any, arguments: tuple[Tensor, ...]) -> None:
            found[name] = arguments[0][mask.bool()].square().sum(0)

        return before

    hooks = [m.register_forward_pre_hook(watch(name)) for name, m in linears.items()]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return found


def test_the_stream_meets_what_the_merged_model_meets(adapter: Path) -> None:
    found = locate_adapter(adapter)
    skeleton = open_skeleton(found.base, found.spec())
    source = open_source(
        found.base, skeleton, adapter=adapter, strategy=found.strategy, dtype=torch.float32
    )
    from peft import AutoPeftModelForCausalLM

    merged = AutoPeftModelForCausalLM.from_pretrained(adapter).merge_and_unload().eval()
    rows = batches()
    linears = {n: m for n, m in merged.named_modules() if n and n.endswith("_proj")}
    given = {key: value for key, value in rows[0].items() if key != "labels"}
    expected = squares(linears, lambda: merged(**given), rows[0]["attention_mask"])
    met: dict[str, Tensor] = {}

    def observe(name: str, text: Tensor) -> None:
        met[name] = met.get(name, torch.zeros(text.shape[-1])) + text.square().sum(0)

    for layer in open_stream(source, rows).layers():
        parts = {f"{layer.name}.{n}": m for n, m in layer.module.named_modules()
                 if isinstance(m, nn.Linear)}  # fmt: skip
        observe_inputs(layer, parts, observe)
    assert set(met) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(met[name], value, rtol=1e-4, atol=1e-6), name


def test_reading_for_it_leaves_the_fingerprint_alone(adapter: Path) -> None:
    found = locate_adapter(adapter)

    def opened() -> Any:
        skeleton = open_skeleton(found.base, found.spec())
        return open_source(found.base, skeleton, adapter=adapter, strategy=found.strategy)

    def read_all(source: Any) -> str:
        for name in source.names():
            list(source.blocks(name))
        return str(source.fingerprint())

    plain, streamed = opened(), opened()
    expected = read_all(plain)
    before = read_all(streamed)
    for _ in open_stream(streamed, batches()).layers():
        pass
    assert before == streamed.fingerprint() == expected


def test_a_file_of_rows_is_drawn_by_the_seed(tiny_llama: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"row {n} of a few. " * 60}) for n in range(40)]
    data.write_text("\n".join(lines), encoding="utf-8")
    reference = locate(tiny_llama, task="text")
    first = calibrate_on(reference, str(data), rows=8)
    again = calibrate_on(reference, str(data), rows=8)
    other = calibrate_on(reference, str(data), rows=8, seed=1)
    assert first.rows == 8
    assert first.name == "rows.jsonl"
    assert all(batch["input_ids"].shape[1] <= 256 for batch in first.batches)
    assert sum(len(batch["input_ids"]) for batch in first.batches) == 8
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_few_rows_are_all_taken() -> None:
    assert drawn([1, 2, 3], 5, seed=0) == [1, 2, 3]  # type: ignore[list-item, comparison-overlap]


def test_rows_where_they_are_no_use_or_there_are_none(tiny_llama: Path) -> None:
    reference = locate(tiny_llama, task="text")
    assert calibration_for(reference, "bnb:nf4", None, None, 8, QUIET) is None
    with pytest.raises(RecipeError, match="rounds each number by itself"):
        calibration_for(reference, "bnb:nf4", True, None, 8, QUIET)
    with pytest.raises(RecipeError, match="no rows to fit") as caught:
        calibrate_on(reference)
    assert "--calibration-data" in caught.value.text()


def test_the_table_of_formats_says_whose_rounding_fits_to_rows() -> None:
    from qft.export import format_table
    from qft.export.formats import FORMATS

    rows = {row["name"]: row for row in format_table.format_table()}
    assert list(rows) == list(FORMATS)
    expected = {
        "gguf:f16": "never", "gguf:q4_k_m": "asked", "compressed-tensors:w4a16": "always",
        "bnb:nf4": "never",
    }  # fmt: skip
    assert {name: rows[name]["fitted"] for name in expected} == expected
