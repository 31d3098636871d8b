"""Targets: exact counts, the least that reaches them, and clear words where nothing does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from small_models import FAMILIES, make_model

from qft.errors import QftError
from qft.models import ModelSpec
from qft.pruning.anatomy import open_anatomy
from qft.pruning.cut import all_layers
from qft.pruning.targets import (
    Cost,
    Scale,
    Target,
    layers_to_remove,
    parse_width,
    read_target,
    widths_for,
)


@pytest.fixture(scope="module")
def scale(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Scale]:
    made: dict[str, Scale] = {}

    def make(kind: str, **changes: Any) -> Scale:
        key = f"{kind}{changes}"
        if key not in made:
            folder = make_model(kind, tmp_path_factory.mktemp(kind), **changes)
            task = "classify" if kind in ("bert", "classifier") else "text"
            made[key] = Scale(open_anatomy(folder, ModelSpec(str(folder), task)))
        return made[key]

    return make


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_whole_model_is_counted_exactly(scale: Any, kind: str) -> None:
    import transformers as hub

    autos = {"bert": hub.AutoModel, "classifier": hub.AutoModelForSequenceClassification}
    auto: Any = autos.get(kind, hub.AutoModelForCausalLM)
    model = auto.from_pretrained(scale(kind).anatomy.folder)
    parameters = sum(p.numel() for p in model.parameters())  # tied ones come once
    assert scale(kind).whole() == Cost(parameters, 4 * parameters)


@pytest.mark.parametrize(
    ("ratio", "parameters", "size", "found"),
    [
        (0.25, None, None, Target("ratio 0.25", parameters=750_000)),
        (None, "0.5M", None, Target("500,000 parameters", parameters=500_000)),
        (None, "1e5", None, Target("100,000 parameters", parameters=100_000)),
        (None, 7, None, Target("7 parameters", parameters=7)),
        (None, None, "1MiB", Target("1,048,576 bytes", bytes=2**20)),
        (None, None, "1.5 MB", Target("1,500,000 bytes", bytes=1_500_000)),
        (None, None, None, None),
    ],
)
def test_a_target_is_read(ratio: Any, parameters: Any, size: Any, found: Any) -> None:
    assert read_target(Cost(1_000_000, 2_000_000), ratio, parameters, size) == found


@pytest.mark.parametrize(
    ("ratio", "parameters", "size", "says"),
    [
        (1.0, None, None, "share of all parameters"),
        (0.0, None, None, "share of all parameters"),
        (-0.5, None, None, "share of all parameters"),
        (25, None, None, "share of all parameters"),
        (0.5, "1K", None, "One target is enough"),
        (None, "1K", "1KiB", "One target is enough"),
        (None, "few", None, "no size"),
        (None, "1GiB", None, "no size"),
        (None, None, "1.0T", "no size"),
        (None, "1.0B", None, r"(?s)that small already.*1,000,000 parameters"),
        (None, None, "1GiB", "that small already"),
    ],
)
def test_a_target_that_is_none_is_refused(
    ratio: Any, parameters: Any, size: Any, says: str
) -> None:
    with pytest.raises(QftError, match=says):
        read_target(Cost(1_000_000, 2_000_000), ratio, parameters, size)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "classifier"])
def test_no_more_layers_go_than_must(scale: Any, kind: str) -> None:
    one = scale(kind)
    sizes = one.anatomy.sizes
    for left in (1, 2, 3):
        cost = one.weigh(all_layers(left), sizes)
        assert layers_to_remove(one, Target("", parameters=cost.parameters)) == 4 - left
        if left > 1:
            just_less = Target("", bytes=cost.bytes - 1)
            assert layers_to_remove(one, just_less) == 4 - left + 1
    with pytest.raises(QftError, match=r"(?s)cannot be reached.*one layer is left"):
        layers_to_remove(one, Target("", parameters=10))


@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize("width", ["mlp", "mlp,heads", "hidden", "mlp,heads,hidden"])
def test_the_target_is_reached_and_one_multiple_more_would_miss_it(
    scale: Any, width: str, multiple: int
) -> None:
    one = scale("mistral", intermediate_size=128)
    layers, whole = all_layers(4), one.whole()
    target = Target("", parameters=int(0.7 * whole.parameters))
    sizes = widths_for(one, parse_width(width), target, multiple)
    assert one.weigh(layers, sizes).parameters <= target.parameters
    if "mlp" in width:
        assert sizes.neurons % multiple == 0
        more = replace(sizes, neurons=sizes.neurons + multiple)
        assert one.weigh(layers, more).parameters > target.parameters
    else:
        more = replace(sizes, hidden=sizes.hidden + max(multiple, 4))
        assert one.weigh(layers, more).parameters > target.parameters


def test_sizes_that_are_given_stay_and_the_others_reach_the_target(scale: Any) -> None:
    one = scale("mistral")
    target = Target("", bytes=int(0.8 * one.whole().bytes))
    sizes = widths_for(one, parse_width("mlp,heads=2"), target, 8)
    assert (sizes.heads, sizes.groups) == (2, 1)
    assert one.weigh(all_layers(4), sizes).bytes <= target.bytes
    more = replace(sizes, neurons=sizes.neurons + 8)
    assert one.weigh(all_layers(4), more).bytes > target.bytes


def test_a_width_out_of_reach_is_refused(scale: Any) -> None:
    one = scale("llama")
    with pytest.raises(QftError, match=r"(?s)cannot be reached.*shrink no further"):
        widths_for(one, parse_width("mlp"), Target("", parameters=9_000), 8)
    with pytest.raises(QftError, match="How much is to go"):
        widths_for(one, parse_width("mlp"), None, 8)


def test_sizes_are_the_configs(scale: Any) -> None:
    assert scale("qwen3").anatomy.sizes.head_size == 16
    bert = scale("bert").anatomy.sizes
    assert (bert.neurons, bert.heads, bert.groups, bert.hidden) == (64, 4, 4, 32)
