"""Width pruning: what is left computes what it did, and the parts that say least go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import make_model, texts
from test_pruning_depth import answer, opened
from torch import Tensor

import qft
from qft.errors import QftError
from qft.models import ModelSpec
from qft.pruning.anatomy import open_anatomy
from qft.pruning.calibration import CalibrationRows, open_rows
from qft.pruning.width_scores import groups_of, score_width, strongest

DEAD = [n for n in range(64) if n % 4 == 1]  # 16 of 64 MLP neurons


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[Any, ...], Path] = {}

    def make(kind: str, **changes: Any) -> Path:
        key = (kind, *changes.items())
        if key not in made:
            made[key] = make_model(kind, tmp_path_factory.mktemp(kind), **changes)
        return made[key]

    return make


def with_tokenizer(model: Any, folder: Path, source: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


def layers_of(model: Any) -> Any:
    inner = getattr(model, model.base_model_prefix, model)
    return inner.encoder.layer if hasattr(inner, "encoder") else inner.layers


def rows_for(kind: str) -> list[dict[str, str]]:
    if kind != "classifier":
        return texts(24)
    names = ("bad", "good", "so-so")
    return [{**row, "label": names[n % 3]} for n, row in enumerate(texts(24))]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "classifier"])
def test_neurons_that_say_nothing_go_and_nothing_changes(
    family: Any, tmp_path: Path, write_rows: Any, kind: str
) -> None:
    model = opened(family(kind), kind)
    for layer in layers_of(model):
        if kind == "classifier":  # gelu(0) is 0, so the output is silent, and its column not
            layer.intermediate.dense.weight.data[DEAD] = 0
            layer.intermediate.dense.bias.data[DEAD] = 0
        else:
            layer.mlp.up_proj.weight.data[DEAD] = 0
    source = with_tokenizer(model, tmp_path / "source", family(kind))
    result = qft.prune(str(source), tmp_path / "out", method="width", width="mlp=48",
                       data=str(write_rows(rows_for(kind))), max_length=32,
                       dtype="float32")  # fmt: skip
    kept = tuple(n for n in range(64) if n not in DEAD)
    assert all(result["kept_neurons"][layer] == kept for layer in range(4))
    pruned = opened(tmp_path / "out", kind)
    assert pruned.config.intermediate_size == 48
    assert torch.allclose(answer(pruned), answer(model), atol=1e-5)
    assert result["after"]["parameters"] == sum(p.numel() for p in pruned.parameters())
    assert result["quality"]["mean_kl"] == pytest.approx(0, abs=1e-6)
    assert result["kept_importance"]["neurons"] == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
def test_heads_go_in_whole_groups(family: Any, tmp_path: Path, write_rows: Any, kind: str) -> None:
    model = opened(family(kind), kind)
    size = model.config.head_dim if kind == "qwen3" else 8
    for number, layer in enumerate(layers_of(model)):
        silent = number % 2  # another group in every second layer
        part = layer.self_attn.v_proj
        part.weight.data[silent * size : (silent + 1) * size] = 0
        if part.bias is not None:
            part.bias.data[silent * size : (silent + 1) * size] = 0
    source = with_tokenizer(model, tmp_path / "source", family(kind))
    result = qft.prune(str(source), tmp_path / "out", method="width", width="heads=2",
                       data=str(write_rows(texts(24))), max_length=32)  # fmt: skip
    assert [result["kept_groups"][n] for n in range(4)] == [(1,), (0,), (1,), (0,)]
    pruned = opened(tmp_path / "out", kind)
    config = pruned.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
    assert config.head_dim == size
    assert torch.allclose(answer(pruned), answer(model), atol=1e-5)


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("qwen3", True)])
def test_hidden_channels_go_from_every_tensor(
    family: Any, tmp_path: Path, write_rows: Any, kind: str, tied: bool
) -> None:
    folder = family(kind, tie_word_embeddings=tied)
    model = opened(folder, kind)
    gone = [1, 6, 7, 12, 17, 22, 30, 31]
    kept = [n for n in range(32) if n not in gone]
    model.model.embed_tokens.weight.data[:, gone] = 0
    for layer in layers_of(model):
        layer.self_attn.o_proj.weight.data[gone] = 0
        layer.mlp.down_proj.weight.data[gone] = 0
    source = with_tokenizer(model, tmp_path / "source", folder)
    result = qft.prune(str(source), tmp_path / "out", method="width", width="hidden=24",
                       data=str(write_rows(texts(24))), max_length=32)  # fmt: skip
    assert result["kept_hidden"] == tuple(kept)
    pruned = opened(tmp_path / "out", kind)
    assert pruned.config.hidden_size == 24
    assert pruned.config.head_dim == (16 if kind == "qwen3" else 8)
    assert result["after"]["parameters"] == sum(p.numel() for p in pruned.parameters())
    # a mean square over fewer channels is the larger, and what it divides the smaller
    for name, parameter in pruned.named_parameters():
        if name.endswith(("layernorm.weight", "model.norm.weight")):
            parameter.data.mul_((32 / 24) ** 0.5)
        assert torch.isfinite(parameter).all()
    assert torch.allclose(answer(pruned), answer(model), atol=2e-3)


def test_all_dimensions_together_reach_the_target(
    family: Any, tmp_path: Path, write_rows: Any
) -> None:
    result = qft.prune(str(family("mistral")), tmp_path / "out", method="width",
                       width="mlp,heads,hidden", ratio=0.4, multiple_of=4,
                       data=str(write_rows(texts(24))), max_length=32)  # fmt: skip
    pruned = opened(tmp_path / "out", "mistral")
    count = sum(p.numel() for p in pruned.parameters())
    assert count == result["after"]["parameters"] <= 0.6 * result["before"]["parameters"]
    assert all(result["sizes"][n] % 4 == 0 for n in ("neurons", "hidden"))
    assert torch.isfinite(answer(pruned)).all()


def rows_of(folder: Path, path: Path) -> CalibrationRows:
    return open_rows(folder, "text", str(path), rows=6, max_length=32)


def test_activation_scores_are_those_of_the_plain_model(family: Any, write_rows: Any) -> None:
    folder = family("llama")
    rows = rows_of(folder, write_rows(texts(24)))
    spec = ModelSpec(str(folder), "text", dtype=torch.float32, device="cpu")
    anatomy = open_anatomy(folder, spec)
    plain = opened(folder, "llama")
    caught: dict[str, list[Tensor]] = {}
    for name, part in plain.named_modules():
        if name.endswith(("down_proj", "o_proj")):
            part.register_forward_pre_hook(
                lambda m, a, n=name: caught.setdefault(n, []).append(a[0][0])
            )
        if name.endswith("layernorm"):
            part.register_forward_hook(
                lambda m, a, made, n=name: caught.setdefault(n, []).append(made[0])
            )
    with torch.no_grad():
        for example in rows.scored:
            plain(input_ids=torch.tensor([example.inputs["input_ids"]]))
    values = {name: torch.cat(parts) for name, parts in caught.items()}
    means = score_width(anatomy, rows, "activation-mean")
    roots = score_width(anatomy, rows, "activation")
    for n in range(4):
        inside = values[f"model.layers.{n}.mlp.down_proj"].double()
        assert torch.allclose(means.neurons[n], inside.abs().mean(0), atol=1e-5)
        assert torch.allclose(roots.neurons[n], inside.square().mean(0).sqrt(), atol=1e-5)
        heads = values[f"model.layers.{n}.self_attn.o_proj"].double().unflatten(1, (4, 8))
        assert torch.allclose(means.heads[n], heads.abs().mean(0).sum(-1), atol=1e-5)
    normed = [v.double().abs().mean(0) for name, v in values.items() if "layernorm" in name]
    assert torch.allclose(means.hidden, torch.stack(normed).sum(0), atol=1e-4)
    assert torch.equal(groups_of(means, 2)[:, 0], means.heads[:, 0] + means.heads[:, 1])


def test_taylor_scores_are_the_loss_that_taking_a_neuron_costs(
    family: Any, write_rows: Any
) -> None:
    """To first order: compared with really silencing each of a few, a little at a time."""
    folder = family("llama")
    rows = rows_of(folder, write_rows(texts(24)))
    spec = ModelSpec(str(folder), "text", dtype=torch.float32, device="cpu")
    scores = score_width(open_anatomy(folder, spec), rows, "taylor")
    plain = opened(folder, "llama").double()  # for slopes that rounding spares
    column = plain.model.layers[1].mlp.down_proj.weight.data

    def losses() -> Tensor:
        found = []
        for example in rows.scored:
            batch = rows.task.collate([example], rows.pad_token_id)
            with torch.no_grad():
                found.append(plain(**batch).loss)
        return torch.stack(found)

    step = 0.1  # the loss itself is computed in float32
    for neuron in strongest(scores.neurons[1], 3):
        kept = column[:, neuron].clone()
        found = []
        for factor in (1 - step, 1 + step):
            column[:, neuron] = kept * factor
            found.append(losses())
        column[:, neuron] = kept
        slope = ((found[1] - found[0]) / (2 * step)).abs().mean().double()
        assert torch.allclose(scores.neurons[1, neuron], slope, rtol=0.02, atol=1e-6)


def test_ties_are_broken_the_same_way_always() -> None:
    assert strongest(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2) == (0, 1)
    assert strongest(torch.zeros(5), 3) == (0, 1, 2)


@pytest.mark.parametrize(
    ("kind", "width", "says"),
    [
        ("classifier", "heads=2", "config cannot describe"),
        ("classifier", "hidden=16", "config cannot describe"),
        ("llama", "mlp=65", "does not fit the model"),
        ("llama", "heads=3", r"(?s)does not fit.*in groups of 2"),
        ("llama", "mlp=0", "does not fit the model"),
        ("llama", "depth", "which dimensions shrink"),
        ("llama", "mlp,mlp", "which dimensions shrink"),
        ("llama", "mlp=few", "which dimensions shrink"),
    ],
)
def test_widths_that_cannot_be_are_refused(
    family: Any, tmp_path: Path, write_rows: Any, kind: str, width: str, says: str
) -> None:
    with pytest.raises(QftError, match=says):
        qft.prune(str(family(kind)), tmp_path / "out", method="width", width=width,
                  data=str(write_rows(rows_for(kind))))  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_head_counts_that_a_family_refuses_are_passed_over(
    family: Any, tmp_path: Path, write_rows: Any
) -> None:
    """Llama's config wants a hidden size that its heads divide: of 4 groups 2 stay, never 3."""
    folder = family("llama", num_key_value_heads=4)
    data = str(write_rows(texts(24)))
    result = qft.prune(str(folder), tmp_path / "out", method="width", width="heads", ratio=0.05,
                       data=data, max_length=32)  # fmt: skip
    assert result["sizes"]["heads"] == 2
    opened(tmp_path / "out", "llama")
    with pytest.raises(QftError, match=r"(?s)config cannot describe.*not a multiple"):
        qft.prune(str(folder), tmp_path / "b", method="width", width="heads=3", data=data)


def test_a_family_with_other_tensors_is_refused(tmp_path: Path, write_rows: Any) -> None:
    import transformers as hub
    from conftest import make_tokenizer

    hub.GPT2LMHeadModel(hub.GPT2Config(
        vocab_size=260, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1,
        eos_token_id=2)).save_pretrained(tmp_path / "gpt2")  # fmt: skip
    make_tokenizer(tmp_path / "gpt2")
    with pytest.raises(QftError, match=r"does not know this family|no such size"):
        qft.prune(str(tmp_path / "gpt2"), tmp_path / "out", method="width", ratio=0.1,
                  data=str(write_rows(texts(24))), max_length=32)  # fmt: skip
    result = qft.prune(str(tmp_path / "gpt2"), tmp_path / "out", ratio=0.1, keep_last=0,
                       data=str(write_rows(texts(24))), max_length=32)  # fmt: skip
    assert len(result["kept_layers"]) == 2  # but whole layers it can lose
    opened(tmp_path / "out", "llama")
