"""Adapters combined on the weights equal a plain reference, whatever the kind and the blocks."""

import json
from pathlib import Path

import pytest
import torch
from small_models import make_model
from test_several_factors import OTHER, PLAIN, save
from transformers import AutoModelForCausalLM

from qft.adapter_folder import locate_adapter
from qft.errors import AdapterError, Interrupted, RecipeError
from qft.lean.combining import Combination, kept_at_random
from qft.lean.magnitudes import smallest_kept
from qft.merging import several
from qft.merging.several import SeveralMerge

torch.set_num_threads(1)
NAME = "model.layers.0.self_attn.q_proj.weight"


class Base:
    """Tensors in memory, as a base."""

    def __init__(self, tensors):
        self.tensors = tensors

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def read(self, name):
        return self.tensors[name]

    def read_rows(self, name, rows):
        return self.tensors[name][list(rows)]

    def read_columns(self, name, columns):
        return self.tensors[name][:, columns.start : columns.stop]


class Sum:
    """A merge that adds given updates to some tensors, and brings others."""

    def __init__(self, base, updates, added=None, changes=None):
        self.base, self.updates, self.new = base, updates, added or {}
        self.changes = changes or {}

    def shape(self, name):
        return tuple(self.new[name].shape) if name in self.new else self.base.shape(name)

    def edit(self, name, rows, start=0):
        if name not in self.updates:
            return rows
        return rows.float() + self.updates[name][start : start + len(rows)]

    def added(self):
        return self.new

    def config_changes(self):
        return self.changes


def whole(updates, weights, method, density, sign, seed, name):
    """The reference: everything in memory, as the papers (and PEFT) say it."""
    kept = []
    for number, update in enumerate(updates):
        if method in ("ties", "magnitude_prune"):
            limit = update.abs().flatten().sort(descending=True).values[
                int(density * update.numel()) - 1]  # fmt: skip
            update = torch.where(update.abs() >= limit, update, 0)
        if method.startswith("dare"):
            update = kept_at_random(update, density, f"{seed} {number} {name}")
        kept.append(update)
    parts = torch.stack(kept)
    weighted = parts * torch.tensor(weights)[:, None, None]
    if not method.endswith("ties"):
        return weighted.sum(0)
    votes = parts.sum(0) if sign == "total" else parts.sign().sum(0)
    agree = parts.sign() == torch.where(votes >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def random_updates(count=3, shape=(37, 19)):
    """On a grid that float32 holds exactly beside the base's ones, so that nothing is rounded."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(-4000, 4000, shape, generator=generator) / 8192 for _ in range(count)]


@pytest.mark.parametrize("rows_a_block", [1, 5, 64])
@pytest.mark.parametrize(
    ("method", "density", "sign"),
    [("linear", None, "total"), ("cat", None, "total"), ("ties", 0.3, "total"),
     ("ties", 0.3, "frequency"), ("dare_linear", 0.5, "total"), ("dare_ties", 0.5, "total"),
     ("dare_ties", 0.5, "frequency"), ("magnitude_prune", 0.2, "total"), ("ties", 1.0, "total"),
     ("dare_linear", 1.0, "total")],
)  # fmt: skip
def test_equals_the_plain_reference_in_blocks_of_any_size(
    monkeypatch, method, density, sign, rows_a_block
):
    updates, weights = random_updates(), (0.75, -0.5, 1.0)
    base = Base({NAME: torch.ones(37, 19), "other": torch.ones(4)})
    how = Combination(weights, method, density, majority_sign=sign, seed=7)
    monkeypatch.setattr(several, "BLOCK_NUMBERS", rows_a_block * 6 * 19)
    merge = SeveralMerge([Sum(base, {NAME: u}) for u in updates], how, base)
    asked = 2 * rows_a_block + 1  # the caller's blocks are others
    found = torch.cat([
        merge.edit(NAME, base.tensors[NAME][start : start + asked], start)
        for start in range(0, 37, asked)
    ])  # fmt: skip
    wanted = 1 + whole(updates, weights, method, density, sign, 7, NAME)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    untouched = base.tensors["other"]
    assert merge.edit("other", untouched) is untouched


def test_drawn_masks_keep_what_they_say_and_differ_by_adapter_tensor_and_row():
    ones = torch.ones(400, 300)
    kept = kept_at_random(ones, 0.25, "0 0 a")
    assert kept.unique().tolist() == [0.0, 4.0]
    assert abs(kept.mean().item() - 1) < 0.02
    others = [kept_at_random(ones, 0.25, key) for key in ("1 0 a", "0 1 a", "0 0 b")]
    shifted = kept_at_random(ones[1:], 0.25, "0 0 a", 1)
    assert torch.equal(shifted, kept[1:])
    same = [(kept == other).float().mean().item() for other in others]
    same.append((kept[1:] == kept[:-1]).float().mean().item())
    assert all(abs(share - 0.625) < 0.01 for share in same)  # 0.25² + 0.75²: independent


@pytest.mark.parametrize("kept", [0, 1, 7, 500, 998, 999, 1000])
def test_the_kth_magnitude_is_exact(kept):
    torch.manual_seed(0)
    one = torch.randn(1000) * torch.logspace(-30, 3, 1000)
    two = torch.zeros(1000)
    two[:600] = torch.randn(600).bfloat16().float()  # many of a kind, and many zeros

    def blocks():
        for start in range(0, 1000, 130):
            part = {0: one[start : start + 130]}
            yield part if start >= 600 else {**part, 1: two[start : start + 130]}

    found = smallest_kept(blocks, 2, kept)
    for tensor, limit in zip((one, two), found, strict=True):
        ordered = tensor.abs().sort(descending=True).values
        assert limit == (ordered[kept - 1].item() if kept else float("inf"))
        assert int((tensor.abs() >= limit).sum()) >= kept


def test_a_threshold_is_of_the_whole_tensor_and_found_once(monkeypatch):
    base, calls = Base({NAME: torch.ones(37, 19)}), []
    monkeypatch.setattr(several, "smallest_kept",
                        lambda *a: calls.append(1) or smallest_kept(*a))  # fmt: skip
    merge = SeveralMerge([Sum(base, {NAME: u}) for u in random_updates(2)],
                         Combination((1, 1), "magnitude_prune", 0.1), base)  # fmt: skip
    rows = base.tensors[NAME]
    edited = torch.cat([merge.edit(NAME, rows[a : a + 9], a) for a in range(0, 37, 9)])
    assert int((edited != 1).sum()) <= 2 * 71
    assert len(calls) == 1


def test_new_heads_are_averaged_and_must_fit_together():
    base = Base({"model.weight": torch.ones(4, 4)})
    one, two, wide = torch.full((3, 4), 2.0), torch.full((3, 4), 5.0), torch.zeros(5, 4)

    def opened(weights, *heads):
        merges = [Sum(base, {}, {"score.weight": h} if h is not None else {}) for h in heads]
        return SeveralMerge(merges, Combination(weights), base)

    assert opened((1, 1), one, None).added()["score.weight"] is one
    mean = opened((2, 1), one, two)
    assert mean.shape("score.weight") == (3, 4)
    assert mean.added()["score.weight"][1:].tolist() == [[3.0] * 4] * 2
    for weights, heads, found in (((1, 1), (one, wide), "5, 4"), ((1, -1), (one, two), "no mean")):
        with pytest.raises(AdapterError, match=found) as error:
            opened(weights, *heads)
        assert "score.weight" in str(error.value)


def test_a_head_that_the_base_has_is_an_update_like_others():
    base = Base({"score.weight": torch.ones(3, 4)})
    merges = [Sum(base, {}, {"score.weight": torch.full((3, 4), 2.0)}),
              Sum(base, {"score.weight": torch.full((3, 4), 0.5)})]  # fmt: skip
    merge = SeveralMerge(merges, Combination((1, -1)), base)
    assert merge.added() == {}
    rows = merge.edit("score.weight", base.tensors["score.weight"][1:], 1)
    assert rows.tolist() == [[1.5] * 4] * 2


def test_config_changes_must_agree():
    base = Base({})
    same = SeveralMerge([Sum(base, {}, changes={"a": 1}), Sum(base, {}, changes={"b": 2})],
                        Combination((1, 1)), base)  # fmt: skip
    assert same.config_changes() == {"a": 1, "b": 2}
    with pytest.raises(AdapterError, match="1 and 2"):
        SeveralMerge([Sum(base, {}, changes={"a": 1}), Sum(base, {}, changes={"a": 2})],
                     Combination((1, 1)), base)  # fmt: skip


# --- real adapters, from the command line to the folder


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("base") / "model", num_hidden_layers=2)


@pytest.fixture
def folders(base_folder, tmp_path):
    dora = {**OTHER, "use_dora": True, "use_rslora": False}
    return [save(base_folder, tmp_path / "a", 1, **PLAIN),
            save(base_folder, tmp_path / "b", 2, **dora),
            save(base_folder, tmp_path / "c", 3, "ia3", target_modules=["k_proj", "down_proj"],
                 feedforward_modules=["down_proj"])]  # fmt: skip


def merged_alone(base: Path, folder: Path) -> dict[str, torch.Tensor]:
    """By PEFT."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    return model.merge_and_unload().state_dict()


def test_adapters_of_every_kind_are_combined_with_each_other(base_folder, folders, tmp_path):
    import qft

    plain = AutoModelForCausalLM.from_pretrained(base_folder).state_dict()
    alone = [merged_alone(base_folder, folder) for folder in folders]
    settings = {"method": "ties", "density": 0.5, "weights": [1, 0.5, -1]}
    report = qft.merge(folders, tmp_path / "out", combine=settings)
    assert report["changed"] == 10  # q, k, v, up and down in two layers
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in plain.items():
        updates = [one[name] - tensor for one in alone]
        changed = [(n, u) for n, u in enumerate(updates) if u.any()]
        if not changed:
            assert torch.equal(found[name], tensor)
            continue
        delta = whole([u for _, u in changed], [settings["weights"][n] for n, _ in changed],
                      "ties", 0.5, "total", 0, name)  # fmt: skip
        wrong = ((found[name] - tensor - delta).abs() > 1e-5).float().mean()
        assert wrong < 0.003  # of values that lie on the threshold but for rounding


def test_the_sum_of_updates_is_what_cat_makes(base_folder, tmp_path):
    import qft

    folders = [save(base_folder, tmp_path / "a", 1, **PLAIN),
               save(base_folder, tmp_path / "b", 2, **OTHER)]  # fmt: skip
    weights = {"weights": [1, -0.5]}
    qft.merge(folders, tmp_path / "sum", combine=weights)
    qft.merge(folders, tmp_path / "cat", combine={**weights, "method": "cat", "space": "factors"})
    qft.merge(folders, tmp_path / "svd", combine={**weights, "method": "svd", "svd_rank": 8})
    qft.merge(folders, tmp_path / "both", combine={**weights, "adapter_only": True})
    qft.merge(tmp_path / "both", tmp_path / "later")
    found = {name: AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
             for name in ("sum", "cat", "svd", "later")}  # fmt: skip
    for name, tensor in found["sum"].items():
        assert torch.equal(found["later"][name], found["cat"][name])
        for other in ("cat", "svd"):
            torch.testing.assert_close(found[other][name], tensor, rtol=1e-5, atol=1e-5)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_adapters_that_do_not_belong_together_are_refused(base_folder, folders, tmp_path):
    import qft

    other = make_model("llama", tmp_path / "other", num_hidden_layers=3)
    stranger = save(other, tmp_path / "d", 4, **PLAIN)
    out = tmp_path / "out"
    cases = [
        ([folders[0], stranger], {}, AdapterError, "another base"),
        (folders, {"weights": [1, 2]}, RecipeError, "2 for 3 adapters"),
        (folders, {"loudness": 1}, RecipeError, "loudness"),
        (folders, {"space": "time"}, RecipeError, "time"),
        (folders, {"method": "ties_svd", "density": 0.5}, RecipeError, "space factors"),
        (folders, {"method": "cat", "space": "factors"}, AdapterError, "different kinds"),
        (folders, {"adapter_only": True}, AdapterError, "different kinds"),
        (folders[:2], {"method": "cat", "space": "factors"}, AdapterError, "use_dora"),
    ]
    for sources, settings, kind, found in cases:
        with pytest.raises(kind, match=found):
            qft.merge(sources, out, combine=settings)
        assert not out.exists()
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_command_line_combines(base_folder, tmp_path):
    from typer.testing import CliRunner

    from qft.cli import app

    a = save(base_folder, tmp_path / "a", 1, **PLAIN)
    b = save(base_folder, tmp_path / "b", 2, **OTHER)
    common = [str(a), str(b), "--weights", "1,-0.5", "--density", "0.5", "--quiet"]
    runs = {
        "model": ["--method", "ties", "--majority-sign", "frequency"],
        "adapter": ["--method", "dare_ties", "--adapter-only", "--seed", "3"],
    }
    for name, options in runs.items():
        out = ["--out", str(tmp_path / name)]
        done = CliRunner().invoke(app, ["merge", *common, *options, *out])
        assert done.exit_code == 0, done.output
    assert (tmp_path / "model/model.safetensors").is_file()
    found = locate_adapter(tmp_path / "adapter")
    assert found.strategy.name == "lora"
    values = json.loads((tmp_path / "adapter/adapter_config.json").read_text("utf-8"))
    assert values["target_modules"] == ["down_proj", "q_proj", "up_proj", "v_proj"]
    done = CliRunner().invoke(
        app, ["merge", str(a), "--density", "0.5", "--out", str(tmp_path / "x")]
    )
    assert isinstance(done.exception, RecipeError)


@pytest.mark.parametrize("settings", [{"method": "ties", "density": 0.5}, {"method": "svd"}])
def test_what_several_make_is_verified_like_one_adapter(base_folder, tmp_path, settings):
    """The reference is made in memory; a file that says something else is found out."""
    import qft
    from qft.errors import VerificationError
    from qft.export import delivery

    folders = [save(base_folder, tmp_path / "a", 1, **PLAIN),
               save(base_folder, tmp_path / "b", 2, **PLAIN)]  # fmt: skip
    rows = tmp_path / "rows.txt"
    rows.write_text("the cat sat on the mat\nit was a good time\n" * 4, encoding="utf-8")
    options = {"verify": True, "data": str(rows), "combine": settings}
    report = qft.merge(folders, tmp_path / "out", **options)
    assert report["verification"]["top1"] == 1
    assert report["verification"]["mean_kl"] < 1e-6
    written = delivery.write_model

    def twice(tensors, out, **told):
        """As if one adapter had been merged twice."""
        edit = tensors._merge.edit
        tensors._merge.edit = lambda name, part, start=0: edit(
            name, edit(name, part, start), start
        )  # fmt: skip
        return written(tensors, out, **told)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delivery, "write_model", twice)
        with pytest.raises(VerificationError):
            qft.merge(folders, tmp_path / "wrong", **options)


def test_a_merge_of_several_goes_on_where_it_was_killed_only_with_the_same_settings(
    base_folder, tmp_path, monkeypatch
):
    import qft
    from qft import write_journal
    from qft.files import unfinished
    from qft.merging.tensors import MergedTensors

    folders = [save(base_folder, tmp_path / "a", 1, **PLAIN),
               save(base_folder, tmp_path / "b", 2, **OTHER)]  # fmt: skip
    ties = {"method": "ties", "density": 0.5, "weights": [1, 1]}
    qft.merge(folders, tmp_path / "whole", combine=ties)
    wanted = (tmp_path / "whole/model.safetensors").read_bytes()
    blocks = MergedTensors.blocks
    monkeypatch.setattr(write_journal, "_EVERY_BYTES", 1)
    for later, goes_on in ((ties, True), ({**ties, "weights": [1, -1]}, False)):
        made: list[str] = []

        def counted(self, name, stop=None, made=made):
            if stop is not None and len(made) == stop:
                raise KeyboardInterrupt
            made.append(name)
            return blocks(self, name)

        monkeypatch.setattr(MergedTensors, "blocks", lambda s, n, c=counted: c(s, n, 9))
        with pytest.raises(Interrupted):
            qft.merge(folders, tmp_path / "out", combine=ties, overwrite=True)
        assert unfinished(tmp_path / "out").is_dir()
        made.clear()
        monkeypatch.setattr(MergedTensors, "blocks", lambda s, n, c=counted: c(s, n))
        qft.merge(folders, tmp_path / "out", combine=later, overwrite=True)
        found = (tmp_path / "out/model.safetensors").read_bytes()
        assert (found == wanted) == goes_on
        assert (len(made) < 20) == goes_on


def test_trained_heads_are_combined_on_the_weights_and_refused_as_factors(tmp_path):
    import peft
    from transformers import AutoModelForSequenceClassification

    import qft

    base = make_model("classifier", tmp_path / "base", num_hidden_layers=1)
    plain = AutoModelForSequenceClassification.from_pretrained(base).state_dict()
    folders, alone = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(base)
        config = peft.LoraConfig(
            r=2, task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False
        )
        wrapped = peft.get_peft_model(model, config)
        for name, tensor in wrapped.named_parameters():
            if "modules_to_save" in name:
                tensor.data += torch.randn_like(tensor) * 0.1
        wrapped.save_pretrained(tmp_path / f"{seed}")
        folders.append(tmp_path / f"{seed}")
        alone.append(wrapped.merge_and_unload().state_dict())
    qft.merge(folders, tmp_path / "out", combine={"weights": [1, -0.5]})
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    changed = 0
    for name, tensor in plain.items():
        wanted = tensor + (alone[0][name] - tensor) - 0.5 * (alone[1][name] - tensor)
        torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-5)
        changed += not torch.equal(found[name], tensor)
    assert changed == 3  # the query, and the head's weight and bias
    with pytest.raises(AdapterError, match="as a whole"):
        qft.merge(folders, tmp_path / "both", combine={"adapter_only": True})


def test_what_cannot_be_merged_cannot_be_combined(base_folder, tmp_path):
    import peft

    import qft

    model = AutoModelForCausalLM.from_pretrained(base_folder)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "prompt")
    lora = save(base_folder, tmp_path / "a", 1, **PLAIN)
    with pytest.raises(AdapterError, match="'prompt' trains cannot be folded"):
        qft.merge([lora, tmp_path / "prompt"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
