"""Depth pruning: what is left is the model without those layers, and the right layers go."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import FAMILIES, make_model, texts
from torch import Tensor, nn
from torch.nn import functional

import qft
from qft.errors import QftError
from qft.models import ModelSpec
from qft.pruning.depth import parse_layers
from qft.pruning.depth_scores import (
    DepthScores,
    least_influential,
    least_turning,
    score_layers,
)
from qft.pruning.pruned_tensors import renumbered


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return make


def opened(folder: Path, kind: str, **how: Any) -> Any:
    """As a stranger opens it: transformers alone, and nothing missing or left over."""
    import transformers as hub

    autos = {"bert": hub.AutoModel, "classifier": hub.AutoModelForSequenceClassification}
    auto: Any = autos.get(kind, hub.AutoModelForCausalLM)
    model, report = auto.from_pretrained(folder, output_loading_info=True, **how)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    model.config.use_cache = False  # tests take layers out, which caches are made by
    return model.eval()


def answer(model: nn.Module) -> Tensor:
    ids = torch.arange(3, 27).reshape(2, 12) * 7 % 250 + 3
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    with torch.no_grad():
        made: Any = model(input_ids=ids, attention_mask=mask)
    found: Tensor = made.logits if hasattr(made, "logits") else made.last_hidden_state
    return found if found.dim() == 2 else found[mask.bool()]


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_result_is_the_model_without_those_layers(
    family: Any, tmp_path: Path, kind: str
) -> None:
    source, out = family(kind), tmp_path / "out"
    result = qft.prune(str(source), out, layers="1-2")
    whole, pruned = opened(source, kind), opened(out, kind)
    inner = getattr(whole, whole.base_model_prefix, whole)
    layers = inner.encoder.layer if hasattr(inner, "encoder") else inner.layers
    del layers[1:3]
    inner.config.num_hidden_layers = 2
    if getattr(inner.config, "layer_types", None):
        inner.config.layer_types = [inner.config.layer_types[n] for n in (0, 3)]
    assert torch.equal(answer(pruned), answer(whole))
    assert pruned.config.num_hidden_layers == 2
    assert result["after"]["parameters"] == sum(p.numel() for p in pruned.parameters())
    assert result["removed_layers"] == (1, 2)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_what_the_config_says_of_every_layer_goes_with_the_layer(
    family: Any, tmp_path: Path
) -> None:
    qft.prune(str(family("qwen2")), tmp_path / "a", layers="0,3")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["layer_types"] == ["full_attention", "sliding_attention"]
    assert config["max_window_layers"] == 1
    before = json.loads((family("qwen2") / "config.json").read_text())
    same = set(before) - {"layer_types", "max_window_layers", "num_hidden_layers"}
    assert {key: config[key] for key in same} == {key: before[key] for key in same}
    qft.prune(str(family("classifier")), tmp_path / "b", layers="1")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good", "2": "so-so"}
    assert config["architectures"] == ["BertForSequenceClassification"]


def test_a_pattern_that_only_the_layers_numbers_tell_is_written_out(
    family: Any, tmp_path: Path
) -> None:
    import shutil

    source = tmp_path / "source"
    shutil.copytree(family("qwen2"), source)
    config = json.loads((source / "config.json").read_text())
    del config["layer_types"]
    (source / "config.json").write_text(json.dumps(config))
    qft.prune(str(source), tmp_path / "out", layers="0")
    types = opened(tmp_path / "out", "qwen2").config.layer_types
    assert types == ["full_attention", "sliding_attention", "sliding_attention"]


def test_dtypes_stay_as_they_are(family: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = opened(family("llama"), "llama").to(torch.bfloat16)
    model.model.norm.float()
    model.save_pretrained(tmp_path / "mixed")
    qft.prune(str(tmp_path / "mixed"), tmp_path / "out", layers="0")
    before = load_file(tmp_path / "mixed" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in after.items():
        number = int(name.split(".")[2]) if ".layers." in name else None
        old = name if number is None else name.replace(f".{number}.", f".{number + 1}.")
        assert tensor.dtype == before[old].dtype
        assert torch.equal(tensor, before[old])
    assert len(after) == len(before) - 9


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_scores_are_those_of_the_whole_models_hidden_states(family: Any, kind: str) -> None:
    folder = family(kind)
    torch.manual_seed(3)
    ids = torch.randint(3, 250, (4, 10))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batches = [{"input_ids": ids[:2], "attention_mask": mask[:2]},
               {"input_ids": ids[2:], "attention_mask": mask[2:]}]  # fmt: skip
    spec = ModelSpec(str(folder), "classify" if kind == "bert" else "text",
                     dtype=torch.float32, device="cpu")  # fmt: skip
    scores = score_layers(folder, spec, batches, layers=4)
    from transformers import AutoModel

    plain = AutoModel.from_pretrained(folder).eval()
    states: list[list[Tensor]] = []
    layers = plain.encoder.layer if kind == "bert" else plain.layers
    layers[0].register_forward_pre_hook(lambda m, a: states.append([a[0]]))
    for layer in layers:
        layer.register_forward_hook(
            lambda m, a, made: states[-1].append(made[0] if isinstance(made, tuple) else made)
        )
    with torch.no_grad():
        for batch in batches:
            plain(**batch)
    text = [torch.cat([s[n][b["attention_mask"].bool()] for s, b in
                       zip(states, batches, strict=True)]) for n in range(5)]  # fmt: skip
    for n in range(4):
        mean = functional.cosine_similarity(text[n], text[n + 1], dim=-1).mean().item()
        assert abs(scores.influence[n] - (1 - mean)) < 1e-5
    last = [torch.stack([s[n][r, int(b["attention_mask"][r].sum()) - 1] for s, b in
                         zip(states, batches, strict=True) for r in range(2)])
            for n in range(5)]  # fmt: skip
    for first, end in ((0, 1), (1, 3), (0, 4)):
        cosine = functional.cosine_similarity(last[first], last[end], dim=-1)
        expected = (cosine.clamp(-1, 1).arccos() / math.pi).mean().item()
        assert abs(scores.distance[first][end] - expected) < 1e-4


def test_the_right_layers_are_chosen() -> None:
    influence = [0.01, 0.5, 0.1, 0.3, 0.2, 0.02]
    distance = [[0.5] * 7 for _ in range(7)]
    distance[2][4], distance[3][5], distance[0][2], distance[4][6] = 0.2, 0.3, 0.1, 0.05
    scores = DepthScores(influence, distance)
    assert least_influential(scores, 2, keep_first=1, keep_last=1) == (2, 4)
    assert least_influential(scores, 2, keep_first=0, keep_last=0) == (0, 5)
    assert least_turning(scores, 2, keep_first=1, keep_last=1) == (2, 3)
    assert least_turning(scores, 2, keep_first=0, keep_last=1) == (0, 1)
    assert least_turning(scores, 2, keep_first=0, keep_last=0) == (4, 5)
    for choose in (least_influential, least_turning):
        with pytest.raises(QftError, match="So many layers cannot go"):
            choose(scores, 5, keep_first=1, keep_last=1)


def test_a_layer_that_does_nothing_goes_first(family: Any, tmp_path: Path, write_rows: Any) -> None:
    model = opened(family("mistral"), "mistral")
    for part in (model.model.layers[2].self_attn.o_proj, model.model.layers[2].mlp.down_proj):
        part.weight.data.zero_()
    model.save_pretrained(tmp_path / "idle")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "idle" / name).write_bytes((family("mistral") / name).read_bytes())
    data = write_rows(texts(24))
    for importance in ("influence", "angular"):
        result = qft.prune(str(tmp_path / "idle"), tmp_path / importance, ratio=0.01,
                           importance=importance, data=str(data), max_length=32)  # fmt: skip
        assert result["removed_layers"] == (2,)
        assert result["scores"]["influence"][2] == pytest.approx(0, abs=1e-6)
        assert result["quality"]["mean_kl"] == pytest.approx(0, abs=1e-6)
        assert result["quality"]["after"] == pytest.approx(result["quality"]["before"])
    assert torch.equal(answer(opened(tmp_path / "angular", "mistral")), answer(model.eval()))


@pytest.mark.parametrize(
    ("text", "found"),
    [("1-2", (1, 2)), ("3", (3,)), ("0, 2-3", (0, 2, 3)), ("1-2,2-3", (1, 2, 3))],
)
def test_layers_are_read(text: str, found: tuple[int, ...]) -> None:
    assert parse_layers(text, 5) == found


@pytest.mark.parametrize("text", ["5", "2-5", "3-2", "a", "", "-1", "1--2", "0-4"])
def test_layers_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(QftError, match=r"no such layers|at least one layer"):
        parse_layers(text, 5)


def test_names_count_from_zero_again() -> None:
    assert renumbered("model.layers.10.mlp.w", "layers", 10, 9) == "model.layers.9.mlp.w"
    assert renumbered("h.3.ln.weight", "h", 3, 1) == "h.1.ln.weight"
    with pytest.raises(ValueError, match="no layer number"):
        renumbered("model.layers.1.w", "layers", 11, 2)
