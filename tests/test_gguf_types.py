"""GGUF's block types and mixes, judged by `gguf`'s dequantizers and by plain roundings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from qft import models
from qft.errors import ModelError
from qft.export.gguf_format import GGUFPlan
from qft.gguf.file import StoredAs, header, write_file
from qft.gguf.importance import Importance
from qft.gguf.mixes import MIXES, Choice, choose_types, fall_backs
from qft.gguf.rounding import encode
from qft.gguf.types import TYPES
from qft.merging.merge import open_source
from qft.verification.thresholds import stored_format
from qft.write_journal import WriteJournal

torch.set_num_threads(1)
BLOCKED = [kind for kind, stored in TYPES.items() if stored.block > 1]
# Codes a number, numbers that share a scale, and whether an offset is stored.
GRIDS = {
    "q4_0": (16, 32, False), "q4_1": (16, 32, True), "q5_0": (32, 32, False),
    "q5_1": (32, 32, True), "q8_0": (255, 32, False), "q2_k": (4, 16, True),
    "q3_k": (8, 16, False), "q4_k": (16, 32, True), "q5_k": (32, 32, True),
    "q6_k": (64, 16, False),
}  # fmt: skip


def decoded(encoded: Tensor, kind: str) -> Tensor:
    """By another's code."""
    number = gguf.GGMLQuantizationType(TYPES[kind].number)
    return torch.from_numpy(gguf.quants.dequantize(encoded.numpy(), number).copy())


def error(rows: Tensor, kind: str, importance: Tensor | None = None) -> Tensor:
    """Squared differences after a round trip."""
    return (decoded(encode(rows, kind, importance), kind) - rows).double() ** 2


def random(rows: int = 48, width: int = 512, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    normal = torch.randn(rows, width)
    return {
        "normal": normal,
        "laplace": torch.distributions.Laplace(0.0, 1.0).sample((rows, width)),
        "heavy": torch.distributions.StudentT(2.0).sample((rows, width)),
        "sparse": normal * (torch.rand(rows, width) > 0.7),
        "columns": normal * torch.randn(width).exp(),
        "shifted": normal + 3,
    }


def plainly_rounded(rows: Tensor, kind: str) -> Tensor:
    """From the smallest to the largest of a group, or by the largest magnitude; float32 scales."""
    codes, size, offset = GRIDS[kind]
    groups = rows.unflatten(-1, (-1, size))
    if offset:
        start = groups.amin(-1, keepdim=True)
        step = (groups.amax(-1, keepdim=True) - start).clamp_min(1e-30) / (codes - 1)
        return (((groups - start) / step).round() * step + start).flatten(-2)
    step = groups.abs().amax(-1, keepdim=True).clamp_min(1e-30) / (codes // 2)
    return ((groups / step).round().clamp(-codes // 2, (codes - 1) // 2) * step).flatten(-2)


@pytest.mark.parametrize("kind", sorted(GRIDS))
def test_squared_error_is_below_a_plain_rounding_with_exact_scales(kind: str) -> None:
    for name, rows in random().items():
        ours = float(error(rows, kind).mean())
        plain = float(((plainly_rounded(rows, kind) - rows) ** 2).mean())
        assert ours < (1.0 if kind == "q8_0" else 0.98) * plain, (name, ours / plain)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_squared_error_is_below_that_of_the_gguf_package(kind: str) -> None:
    number = gguf.GGMLQuantizationType(TYPES[kind].number)
    for name, rows in random().items():
        theirs = decoded(torch.from_numpy(gguf.quants.quantize(rows.numpy(), number)), kind)
        assert error(rows, kind).mean() < ((theirs - rows).double() ** 2).mean(), name


def on_the_grid(kind: str) -> Tensor:
    """Rows that a type can hold exactly, each group with a scale and an offset of its own."""
    torch.manual_seed(3)
    groups, largest = {"q2_k": (16, 15), "q3_k": (16, 31), "q4_k": (8, 63), "q5_k": (8, 63),
                       "q6_k": (16, 127)}[kind]  # fmt: skip
    count, size, offset = GRIDS[kind]
    low = 0 if offset else -count // 2
    codes = torch.randint(low, low + count, (20, groups, size)).float()
    codes[..., 0], codes[..., 1] = low, low + count - 1
    scales = torch.randint(largest // 2, largest + 1, (20, groups, 1)).float()
    scales[:, 0] = largest
    if not offset:
        return (codes * scales / 512).flatten(1)
    offsets = torch.randint(0, largest + 1, (20, groups, 1)).float()
    offsets[:, 1] = largest
    return (codes * scales / 512 - offsets / 128).flatten(1)


@pytest.mark.parametrize("kind", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_numbers_on_the_grid_come_back_and_swapped_scales_do_not(kind: str) -> None:
    rows = on_the_grid(kind)
    encoded = encode(rows, kind)
    difference = (decoded(encoded, kind) - rows).norm() / rows.norm()
    assert difference < 0.02 if kind == "q3_k" else difference < 0.01
    start = {"q2_k": 0, "q3_k": 96, "q4_k": 4, "q5_k": 4, "q6_k": 192}[kind]  # of the scales
    swapped = encoded.clone()
    swapped[:, [start, start + 1]] = encoded[:, [start + 1, start]]
    wrong = (decoded(swapped, kind) - rows).norm() / rows.norm()
    assert wrong > 3 * difference.clamp_min(0.005)


@pytest.mark.parametrize("kind", BLOCKED)
def test_importance_moves_the_error_to_where_it_matters_less(kind: str) -> None:
    rows = random(rows=24)["normal"]
    torch.manual_seed(1)
    importance = torch.randn(rows.shape[1]).mul(1.5).exp()
    importance[::7] = 0
    with_it, without = ((error(rows, kind, known) * importance).mean()
                        for known in (importance, None))  # fmt: skip
    assert with_it < 0.97 * without
    assert error(rows, kind, importance).mean() < 4 * error(rows, kind).mean()
    assert torch.equal(encode(rows, kind, torch.full_like(importance, 3.0)), encode(rows, kind))
    assert torch.equal(encode(rows, kind, torch.zeros_like(importance)), encode(rows, kind))


@pytest.mark.parametrize("kind", BLOCKED)
def test_rows_are_rounded_one_by_one_however_many_come(kind: str) -> None:
    rows = random(rows=70, width=1024)["laplace"]  # more than one chunk
    importance = torch.arange(1.0, 1025)
    for known in (None, importance):
        whole = encode(rows, kind, known)
        assert whole.shape == (70, TYPES[kind].row_bytes(1024))
        some = [0, 31, 63, 64, 69]
        apart = decoded(torch.cat([encode(rows[[row]], kind, known) for row in some]), kind)
        # Sums may round otherwise, and then another of two equally good scales is taken.
        lost = (apart - rows[some]).norm()
        assert (decoded(whole[some], kind) - apart).norm() < 0.2 * lost
    assert torch.equal(encode(rows.bfloat16(), kind), encode(rows.bfloat16().float(), kind))
    assert encode(rows[:0], kind).shape == (0, TYPES[kind].row_bytes(1024))


@pytest.mark.parametrize("kind", BLOCKED)
def test_degenerate_rows(kind: str) -> None:
    rows = torch.zeros(8, 512)
    rows[1] = 0.7  # all alike
    rows[2] = -1.3
    rows[3, 5] = 2.0  # alone
    rows[4] = 1e-39
    rows[5] = torch.randn(512, generator=torch.Generator().manual_seed(0)) * 1e3
    rows[6, :256] = 1.0
    rows[7, 256:] = torch.linspace(-1e-4, 1e-4, 256)
    found = decoded(encode(rows, kind), kind)
    assert torch.isfinite(found).all()
    assert torch.equal(found[0], rows[0])
    assert torch.equal(found[4], torch.zeros(512))
    within = 2.0**-10  # of float16 scales
    assert torch.allclose(found[1:3], rows[1:3], rtol=within, atol=0)
    absolute = 0.02 if kind == "iq4_nl" else 1e-6  # its table has no 0
    assert torch.allclose(found[[3, 6]], rows[[3, 6]], rtol=within, atol=absolute)
    for row in (5, 7):
        assert (found[row] - rows[row]).norm() < 0.35 * rows[row].norm()


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "q8_0", "q3_k", "q4_k", "q6_k"])
def test_very_small_numbers_are_not_rounded_to_nothing(kind: str) -> None:
    """A scale that float16 would round to 0 becomes its smallest number."""
    rows = random(rows=16)["normal"] * 2e-6
    assert error(rows, kind).mean() < 0.2 * (rows.double() ** 2).mean()


@pytest.mark.parametrize("kind", [*BLOCKED, "f16"])
def test_what_cannot_be_held_is_one_clear_error(kind: str) -> None:
    rows = torch.ones(4, 512)
    for value in (float("nan"), float("inf"), -float("inf")):
        rows[2, 7] = value
        with pytest.raises(ModelError, match="not a finite number"):
            encode(rows, kind)
    rows[2, 7] = 3e38
    with pytest.raises(ModelError, match="too large for"):
        encode(rows, kind)


@pytest.mark.parametrize("importance", [torch.ones(100), -torch.ones(512), torch.ones(512) / 0])
def test_an_importance_of_another_shape_or_sign_is_refused(importance: Tensor) -> None:
    with pytest.raises(ModelError, match="importance"):
        encode(torch.ones(2, 512), "q4_k", importance)


# --- mixes


def llama(layers: int, heads: int = 32, shared: int = 8, width: int = 4096, tied: bool = False):
    """Names, shapes and settings of a Llama of that size, in no particular order."""
    tensors = [("output_norm.weight", (width,)), ("token_embd.weight", (1000, width))]
    tensors += [] if tied else [("output.weight", (1000, width))]
    for layer in reversed(range(layers)):
        shapes = {
            "attn_q": (width, width), "attn_k": (width // 4, width), "attn_v": (width // 4, width),
            "attn_output": (width, width), "ffn_gate": (3 * width, width),
            "ffn_up": (3 * width, width), "ffn_down": (width, 3 * width), "attn_norm": (width,),
            "ffn_norm": (width,),
        }  # fmt: skip
        tensors += [(f"blk.{layer}.{name}.weight", shape) for name, shape in shapes.items()]
    settings = {"llama.block_count": layers, "llama.attention.head_count": heads,
                "llama.attention.head_count_kv": shared}  # fmt: skip
    return tensors, settings


def test_q4_k_m_of_a_usual_llama_is_the_one_people_know() -> None:
    tensors, settings = llama(32)
    chosen = choose_types("q4_k_m", "llama", tensors, settings)
    assert list(chosen) == [name for name, _ in tensors]
    assert Counter(choice.kind for choice in chosen.values()) == {
        "q4_k": 193, "q6_k": 33, "f32": 65,
    }  # fmt: skip
    raised = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    for name in ("attn_v", "ffn_down"):
        kinds = [chosen[f"blk.{layer}.{name}.weight"].kind for layer in range(32)]
        assert [layer for layer, kind in enumerate(kinds) if kind == "q6_k"] == raised


def test_rules_that_look_at_the_model() -> None:
    tensors, settings = llama(32, shared=32)
    assert choose_types("q2_k", "llama", tensors, settings)["blk.5.attn_v.weight"].kind == "q3_k"
    tensors, settings = llama(80, heads=64)
    chosen = choose_types("q4_k_s", "llama", tensors, settings)
    assert {chosen[f"blk.{layer}.attn_v.weight"].kind for layer in range(80)} == {"q5_k"}
    tensors, settings = llama(16, tied=True)
    assert choose_types("q4_0", "llama", tensors, settings)["token_embd.weight"].kind == "q6_k"
    known = choose_types("q4_0", "llama", tensors, settings, importance=True)
    assert [known[f"blk.{layer}.ffn_down.weight"].kind for layer in (0, 1, 2)] == [
        "q4_1", "q4_1", "q4_0",
    ]  # fmt: skip
    small = [("token_types.weight", (2, 384)), ("position_embd.weight", (512, 384)),
             ("token_embd_norm.weight", (384,)), ("blk.0.attn_qkv.weight", (1152, 384)),
             ("one.weight", (1, 512)), ("cls.output.weight", (2, 384))]  # fmt: skip
    kinds = {name: c.kind for name, c in choose_types("q5_k_m", "bert", small).items()}
    assert kinds == {
        "token_types.weight": "f32", "position_embd.weight": "f32", "token_embd_norm.weight": "f32",
        "blk.0.attn_qkv.weight": "q8_0", "one.weight": "f32", "cls.output.weight": "q5_1",
    }  # fmt: skip


# stories260K: 64 numbers a row, 172 in what ffn_down takes in; tied. As llama_model_quantize of
# llama-cpp-python 0.3.36 stores it (tests/test_gguf_llama_cpp.py compares the two).
STORIES = {
    "q2_k": {"q4_0": 30, "q8_0": 1, "f16": 5}, "q3_k_s": {"q4_0": 30, "q8_0": 1, "f16": 5},
    "q3_k_m": {"q5_0": 8, "q5_1": 2, "q4_0": 20, "q8_0": 1, "f16": 5},
    "q3_k_l": {"q5_1": 10, "q4_0": 20, "q8_0": 1, "f16": 5},
    "q4_0": {"q4_0": 30, "q8_0": 1, "f16": 5}, "q4_1": {"q4_1": 30, "q8_0": 1, "f16": 5},
    "q4_k_s": {"q5_0": 26, "q5_1": 4, "q8_0": 1, "f16": 5},
    "q4_k_m": {"q5_0": 28, "q8_0": 3, "f16": 5}, "q5_0": {"q5_0": 30, "q8_0": 1, "f16": 5},
    "q5_1": {"q5_1": 30, "q8_0": 1, "f16": 5}, "q5_k_s": {"q5_1": 30, "q8_0": 1, "f16": 5},
    "q5_k_m": {"q5_1": 28, "q8_0": 3, "f16": 5}, "q6_k": {"q8_0": 31, "f16": 5},
    "q8_0": {"q8_0": 31, "f16": 5}, "iq4_nl": {"iq4_nl": 30, "q8_0": 1, "f16": 5},
    "f16": {"f16": 36}, "bf16": {"bf16": 36}, "f32": {"f32": 36},
}  # fmt: skip


def test_stories260k_falls_back_tensor_by_tensor_and_says_so(assets: Path) -> None:
    folder = assets / "models" / "stories260K"
    spec = models.ModelSpec(source=str(folder))
    source = open_source(folder, models.open_skeleton(folder, spec))
    assert STORIES.keys() == MIXES.keys()
    for mix, expected in STORIES.items():
        plan = GGUFPlan(source, mix)
        found = Counter(tensor.kind for tensor in plan.tensors if len(tensor.shape) > 1)
        assert found == expected, mix
    table = {
        (fell.wanted, fell.kind, fell.width): len(fell.names)
        for fell in GGUFPlan(source, "q4_k_m").fall_backs
    }
    assert table == {
        ("q6_k", "q8_0", 64): 3, ("q4_k", "q5_0", 64): 28, ("q4_k", "f16", 172): 3,
        ("q6_k", "f16", 172): 2,
    }  # fmt: skip
    notes = GGUFPlan(source, "q8_0").notes
    assert len(notes) == 1
    assert notes[0].startswith("5 tensor(s) are stored in f16, not q8_0, whose blocks of 32 do not")
    assert "rows of 172: blk.0.ffn_down.weight, " in notes[0]
    assert not GGUFPlan(source, "bf16").notes


def test_nothing_falls_back_where_rows_fill_their_blocks() -> None:
    tensors, settings = llama(3)
    for mix in MIXES:
        assert not fall_backs(choose_types(mix, "llama", tensors, settings), tensors)
    chosen = {"a": Choice("q5_0", "q4_k"), "b": Choice("q4_k", "q4_k"), "c": Choice("q5_0", "q4_k")}
    shapes = [("a", (8, 96)), ("b", (8, 256)), ("c", (9, 96))]
    assert [fell.names for fell in fall_backs(chosen, shapes)] == [("a", "c")]


def test_importance_reaches_the_tensor_it_is_of(assets: Path) -> None:
    folder = assets / "models" / "mini-6m"
    spec = models.ModelSpec(source=str(folder))
    source = open_source(folder, models.open_skeleton(folder, spec))
    name = next(name for name in source.names() if "layers.0.self_attn.q_proj" in name)
    torch.manual_seed(0)
    importance = torch.randn(256).mul(2).exp()
    known = Importance({name: importance}, "rows.jsonl", 1)
    plain, weighted = (GGUFPlan(source, "q3_k_s", given) for given in (None, known))
    exact = torch.cat(list(GGUFPlan(source, "f32").produce("blk.0.attn_q.weight")))
    exact = exact.view(torch.float32).reshape(-1, 256)
    errors = []
    for plan in (plain, weighted):
        found = decoded(torch.cat(list(plan.produce("blk.0.attn_q.weight"))), "q3_k")
        errors.append(float(((found.reshape(-1, 256) - exact) ** 2 * importance).mean()))
    assert errors[1] < 0.9 * errors[0]
    other = "blk.1.attn_q.weight"
    assert torch.equal(*(torch.cat(list(plan.produce(other))) for plan in (plain, weighted)))


def test_a_file_says_its_mix_and_without_it_what_most_bytes_are(tmp_path: Path) -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 256)).astype(np.float32))
    stored = [StoredAs("a.weight", (4, 256), "q4_k"), StoredAs("b.weight", (1, 256), "q6_k")]
    blocks = {tensor.name: encode(values[: tensor.shape[0]], tensor.kind) for tensor in stored}
    for said, expected in ((15, "q4_k_m"), (14, "q4_k_s"), (18, "q6_k"), (99, "q4_k_m"),
                           (None, "q4_k_m")):  # fmt: skip
        metadata = {} if said is None else {"general.file_type": said}
        file = tmp_path / f"{said}.gguf"
        head = header({"general.architecture": "llama", **metadata}, stored)
        journal = WriteJournal(tmp_path, str(said))  # which empties the folder
        write_file(file, head, stored, lambda name, start: iter([blocks[name].flatten()]), journal)
        assert stored_format(tmp_path, file) == f"gguf:{expected}"
