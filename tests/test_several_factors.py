"""Adapters combined on their factors equal PEFT's own `add_weighted_adapter`."""

import json
from pathlib import Path

import pytest
import torch
from small_models import make_model
from transformers import AutoModelForCausalLM

from qft.errors import AdapterError, RecipeError
from qft.lean.combining import METHODS, Combination, kept_at_random
from qft.registry import strategy_from_folder
from qft.shards import open_tensors

torch.set_num_threads(1)
WEIGHTS = "adapter_model.safetensors"
PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
OTHER = {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]}
WIDE = {"r": 6, "lora_alpha": 3, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 9.0},
        "target_modules": ["q_proj", "v_proj", "embed_tokens"]}  # fmt: skip
DENSITY = {name: 0.6 for name in METHODS if name not in ("linear", "cat", "svd")}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("base") / "model", num_hidden_layers=2)


def save(base: Path, folder: Path, seed: int, kind: str = "lora", **settings: object) -> Path:
    """A PEFT adapter with random values throughout."""
    import peft

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = {"lora": peft.LoraConfig, "ia3": peft.IA3Config}[kind]
    wrapped = peft.get_peft_model(model, config(task_type="CAUSAL_LM", **settings))
    for name, tensor in wrapped.named_parameters():
        if tensor.requires_grad:
            tensor.data = torch.randn_like(tensor) * 0.1 + (0.2 if "ia3" in name else 0)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


def pefts(base: Path, folders: list[Path], weights: list[float], out: Path, **options: object):
    """What PEFT makes of them: the model with the combined adapter on, and its saved tensors."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[0],
                                      adapter_name="a0")  # fmt: skip
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{number}")
    names = [f"a{number}" for number in range(len(folders))]
    model.add_weighted_adapter(names, weights, "both", **options)
    model.save_pretrained(out, selected_adapters=["both"], save_embedding_layers=False)
    return {n: t.read() for n, t in open_tensors(out / "both" / WEIGHTS).items()}


def ours(folders: list[Path], out: Path, how: Combination):
    out.mkdir()
    strategy_from_folder(folders[0]).combine(folders, how, out)
    return {n: t.read() for n, t in open_tensors(out / WEIGHTS).items()}


def products(tensors):
    """up @ down of each layer."""
    ends = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
    return {
        name: tensors[name.replace(a, b)] @ tensors[name]
        for name in tensors for a, b in ends if name.endswith(a)
    }  # fmt: skip


def our_draws(monkeypatch, how: Combination, folders: list[Path], *, dense: bool) -> None:
    """PEFT gets qft's masks, in the order in which it asks: layer by layer, factor by factor."""
    from peft.utils import merge_utils

    held = [open_tensors(folder / WEIGHTS) for folder in folders]

    def draw(tensor, density, rescale):
        assert rescale
        return kept_at_random(tensor, density, how.key(*key_of(tensor)))

    def key_of(tensor):
        """By its values: which adapter's, and which layer's or factor's."""
        for number, tensors in enumerate(held):
            found = deltas(folders[number]) if dense else {n: t.read() for n, t in tensors.items()}
            for name, value in found.items():
                if value.shape == tensor.shape and torch.allclose(value, tensor, rtol=1e-5):
                    return number, name
        raise AssertionError("PEFT prunes a tensor of no adapter")

    monkeypatch.setattr(merge_utils, "random_pruning", draw)


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    values = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    tensors = {n: t.read() for n, t in open_tensors(folder / WEIGHTS).items()}
    root = values["r"] ** 0.5 if values["use_rslora"] else values["r"]
    return {n: p * (values["lora_alpha"] / root) for n, p in products(tensors).items()}


@pytest.mark.parametrize("weights", [(0.7, 0.4), (1.0, -0.5)])
@pytest.mark.parametrize(
    ("method", "sign"),
    [("linear", "total"), ("cat", "total"), ("ties", "total"), ("ties", "frequency"),
     ("magnitude_prune", "total"), ("dare_linear", "total"), ("dare_ties", "total"),
     ("dare_ties", "frequency")],
)  # fmt: skip
def test_equals_peft_bit_for_bit(base, tmp_path, monkeypatch, method, sign, weights):
    folders = [save(base, tmp_path / "a", 1, **PLAIN), save(base, tmp_path / "b", 2, **OTHER)]
    how = Combination(weights, method, DENSITY.get(method), majority_sign=sign)
    if how.at_random:
        our_draws(monkeypatch, how, folders, dense=False)
    options = {"combination_type": method, "density": how.density, "majority_sign_method": sign}
    expected = pefts(base, folders, list(weights), tmp_path / "peft", **options)
    found = ours(folders, tmp_path / "out", how)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("weights", [(0.7, 0.4), (1.0, -0.5)])
@pytest.mark.parametrize("method", [name for name in METHODS if name.endswith("svd")])
def test_equals_pefts_decomposition(base, tmp_path, monkeypatch, method, weights):
    folders = [save(base, tmp_path / "a", 1, **PLAIN), save(base, tmp_path / "b", 2, **OTHER)]
    how = Combination(weights, method, DENSITY.get(method), svd_rank=5)
    if how.at_random:
        our_draws(monkeypatch, how, folders, dense=True)
    expected = pefts(base, folders, list(weights), tmp_path / "peft", svd_rank=5,
                     combination_type=method, density=how.density)  # fmt: skip
    found = ours(folders, tmp_path / "out", how)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in expected.items()}
    wanted, made = products(expected), products(found)
    assert len(wanted) == 8  # q, v, up and down in two layers
    for name in wanted:
        torch.testing.assert_close(made[name], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "options"),
    [("cat", {}), ("svd", {}), ("svd", {"svd_rank": 12}), ("svd", {"svd_clamp": 0.97}),
     ("ties_svd", {"density": 0.4}), ("magnitude_prune_svd", {"density": 0.4})],
)  # fmt: skip
def test_ranks_and_alphas_may_differ_where_peft_lets_them(base, tmp_path, method, options):
    """Three adapters, an embedding's among them; ranks by pattern; more rank than there is."""
    folders = [save(base, tmp_path / "a", 1, **PLAIN), save(base, tmp_path / "b", 2, **WIDE),
               save(base, tmp_path / "c", 3, **OTHER)]  # fmt: skip
    weights = (0.5, 1.5, -0.25)
    expected = pefts(base, folders, list(weights), tmp_path / "peft",
                     combination_type=method, **options)  # fmt: skip
    found = ours(folders, tmp_path / "out", Combination(weights, method, **options))
    wanted, made = products(expected), products(found)
    assert any("embed_tokens" in name for name in wanted)
    assert wanted.keys() == made.keys()
    for name in wanted:
        torch.testing.assert_close(made[name], wanted[name], rtol=1e-4, atol=1e-5)
    if method == "cat":
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    opens_in_plain_peft(base, tmp_path / "out", made)


def opens_in_plain_peft(base: Path, folder: Path, made: dict[str, torch.Tensor]) -> None:
    """With every tensor in its place, and with a scale of one."""
    import warnings

    from peft import PeftModel

    plain = AutoModelForCausalLM.from_pretrained(base)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(plain, folder)
    assert not [w for w in caught if "missing" in str(w.message)]
    after = model.merge_and_unload(safe_merge=True).state_dict()
    for name, delta in made.items():
        target = name.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight"
        delta = delta.T if "embedding" in name else delta
        torch.testing.assert_close(after[target], before[target] + delta, rtol=1e-4, atol=1e-5)


def test_a_rank_stabilised_first_adapter_keeps_its_scale(base, tmp_path):
    """PEFT leaves use_rslora on, and its sum is the root of the rank too large."""
    folders = [save(base, tmp_path / "b", 2, **OTHER), save(base, tmp_path / "a", 1, **PLAIN)]
    expected = pefts(base, folders, [1.0, 1.0], tmp_path / "peft", combination_type="cat")
    found = ours(folders, tmp_path / "out", Combination((1.0, 1.0), "cat"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    values = json.loads((tmp_path / "out/adapter_config.json").read_text("utf-8"))
    assert (values["r"], values["lora_alpha"], values["use_rslora"]) == (8, 8, False)
    total = {n: t.clone() for n, t in deltas(folders[0]).items()}
    for name, delta in deltas(folders[1]).items():
        total[name] = total[name] + delta if name in total else delta
    opens_in_plain_peft(base, tmp_path / "out", total)


def test_layers_that_differ_are_named_one_by_one(base, tmp_path):
    low = {**PLAIN, "layers_to_transform": [0]}
    folders = [save(base, tmp_path / "a", 1, **low), save(base, tmp_path / "b", 2, **OTHER)]
    found = ours(folders, tmp_path / "out", Combination((1.0, 1.0), "cat"))
    made = products(found)
    assert len(made) == 6  # q, v and down below; q and up in both
    opens_in_plain_peft(base, tmp_path / "out", made)


def test_one_adapter_is_weighted_whatever_the_method(base, tmp_path):
    folders = [save(base, tmp_path / "a", 1, **PLAIN)]
    expected = pefts(base, folders, [0.5], tmp_path / "peft", combination_type="ties", density=0.3)
    found = ours(folders, tmp_path / "out", Combination((0.5,), "ties", 0.3))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_scaling_vectors_are_added_as_peft_adds_them(base, tmp_path):
    first = {"kind": "ia3", "target_modules": ["k_proj", "down_proj"],
             "feedforward_modules": ["down_proj"]}  # fmt: skip
    second = {"kind": "ia3", "target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}
    folders = [save(base, tmp_path / "a", 1, **first), save(base, tmp_path / "b", 2, **second)]
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[0],
                                      adapter_name="a0")  # fmt: skip
    model.load_adapter(folders[1], adapter_name="a1")
    model.add_weighted_adapter(["a0", "a1"], [0.5, -0.25], "both")
    model.save_pretrained(tmp_path / "peft", selected_adapters=["both"])
    expected = {n: t.read() for n, t in open_tensors(tmp_path / "peft/both" / WEIGHTS).items()}
    found = ours(folders, tmp_path / "out", Combination((0.5, -0.25)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    told = json.loads((tmp_path / "out/adapter_config.json").read_text("utf-8"))
    wanted = json.loads((tmp_path / "peft/both/adapter_config.json").read_text("utf-8"))
    for key in ("target_modules", "feedforward_modules"):
        assert sorted(told[key]) == sorted(wanted[key])
    with pytest.raises(AdapterError, match="only be added"):
        ours(folders, tmp_path / "no", Combination((0.5, 0.5), "cat"))


def test_draws_depend_on_the_seed_alone(base, tmp_path):
    folders = [save(base, tmp_path / "a", 1, **PLAIN), save(base, tmp_path / "b", 2, **OTHER)]

    def drawn(name: str, seed: int) -> dict[str, torch.Tensor]:
        return ours(folders, tmp_path / name, Combination((1, 1), "dare_linear", 0.5, seed=seed))

    one, again, other = drawn("one", 1), drawn("again", 1), drawn("other", 2)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("change", "method", "found"),
    [({"r": 8}, "linear", "ranks differ"),
     ({"rank_pattern": {"q_proj": 2}}, "ties", "ranks differ"),
     ({"use_dora": True}, "cat", "use_dora"), ({"bias": "all"}, "cat", "bias"),
     ({"trainable_token_indices": [1, 2]}, "cat", "trainable_token_indices"),
     ({"target_modules": ".*q_proj"}, "cat", "expression"),
     ({"task_type": None}, "cat", "task_type")],
)  # fmt: skip
def test_what_has_no_sum_of_factors_is_refused(base, tmp_path, change, method, found):
    first = save(base, tmp_path / "a", 1, **PLAIN)
    if change.get("task_type", "") is None:
        other = save(base, tmp_path / "b", 2, **PLAIN)
        values = json.loads((other / "adapter_config.json").read_text("utf-8"))
        (other / "adapter_config.json").write_text(json.dumps({**values, **change}), "utf-8")
    else:
        other = save(base, tmp_path / "b", 2, **{**PLAIN, **change})
    with pytest.raises(AdapterError, match=found):
        ours([first, other], tmp_path / "out", Combination((1, 1), method, DENSITY.get(method)))
    assert not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "settings",
    [{"method": "mean"}, {"weights": ()}, {"weights": (float("nan"), 1)}, {"method": "ties"},
     {"method": "ties", "density": 0}, {"method": "ties", "density": 1.5}, {"density": 0.5},
     {"majority_sign": "loudest"}, {"svd_rank": 4}, {"method": "svd", "svd_rank": 0},
     {"method": "svd", "svd_clamp": 2}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(RecipeError):
        Combination(**{"weights": (1, 1), **settings})
