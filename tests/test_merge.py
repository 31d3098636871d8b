"""A streamed merge equals PEFT's, keeps ties, and leaves nothing behind when it fails."""

import errno
import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from qft import models
from qft.errors import AdapterError, ModelError, OutputExistsError, SaveError
from qft.merging.merge import open_source, write_model
from qft.merging.tensors import MergedTensors, ModuleTensors
from qft.registry import strategy_from_folder
from qft.shards import ShardedCheckpoint
from qft.strategy import Strategy

torch.set_num_threads(1)
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Usage = namedtuple("Usage", "total used free")


def make_base(folder: Path, *, tie: bool = True, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tie,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, **settings: object) -> dict[str, torch.Tensor]:
    """Saves a random LoRA and returns PEFT's own merge."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **settings}
    config = LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings)
    wrapped = get_peft_model(model, config)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload().state_dict()


def skeleton(base: Path, **spec: object) -> torch.nn.Module:
    return models.open_skeleton(base, models.ModelSpec(source=str(base), **spec))


def merge(adapter: Path, base: Path, out: Path, *, strategy, skeleton, dtype=None, **options):
    """Opens and writes, as `qft.merge` does; returns what was read and written."""
    source = open_source(base, skeleton, adapter=adapter, strategy=strategy, dtype=dtype)
    try:
        written = write_model(source, out, **options)
    finally:
        source.close()
    return SimpleNamespace(bytes=written, tensors=len(source.names()), changed=len(source.changed))


def merged(base: Path, adapter: Path, out: Path, **options: object):
    strategy = strategy_from_folder(adapter)
    return merge(adapter, base, out, strategy=strategy, skeleton=skeleton(base), **options)


class Delta:
    """A merge that adds one to some tensors, adds others, and sets a config key."""

    def __init__(self, base, target=None, added=None):
        self.base, self.target, self.new = base, target, dict(added or {})

    def shape(self, name):
        return tuple(self.new[name].shape) if name in self.new else self.base.shape(name)

    def edit(self, name, rows, start=0):
        return rows.float() + 1 if self.target and name in self.target.split("+") else rows

    def added(self):
        return self.new

    def config_changes(self):
        return {"marked": True}


class Fixed(Strategy):
    """Brings a given merge through the contract; the merger must not need more."""

    name: ClassVar[str] = "fixed"
    foldable: bool = True
    target: str | None = None
    added: tuple[str, ...] = ()

    @property
    def mergeable(self) -> bool:
        return self.foldable

    def open_merge(self, folder, base):
        return Delta(base, self.target, {name: torch.ones(3, 4) for name in self.added})


@pytest.mark.parametrize("tie", [True, False])
def test_equals_pefts_merge_bit_for_bit(tmp_path, tie):
    base = make_base(tmp_path / "base", tie=tie)
    expected = make_adapter(base, tmp_path / "adapter")
    report = merged(base, tmp_path / "adapter", tmp_path / "out", max_shard_bytes=60_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert report.changed == 14
    names = ShardedCheckpoint(tmp_path / "out").names()
    assert (HEAD in names) == (not tie)  # tied stays tied
    assert report.tensors == len(names)
    assert report.bytes == ShardedCheckpoint(tmp_path / "out").total_bytes()


def test_rounds_once_to_the_bases_dtype_or_the_one_asked_for(tmp_path):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    make_adapter(base, tmp_path / "adapter")
    merged(base, tmp_path / "adapter", tmp_path / "own")
    merged(base, tmp_path / "adapter", tmp_path / "full", dtype=torch.float32)
    own, full = ShardedCheckpoint(tmp_path / "own"), ShardedCheckpoint(tmp_path / "full")
    name = "model.layers.0.mlp.down_proj.weight"
    assert own.dtype(name) == torch.bfloat16
    assert full.dtype(name) == torch.float32
    assert torch.equal(own.read(name), full.read(name).bfloat16())
    assert json.loads((tmp_path / "full" / "config.json").read_text())["dtype"] == "float32"


def test_a_value_too_large_for_float16_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    checkpoint = ShardedCheckpoint(base)
    identity = {name: name for name in checkpoint.names()}
    change = Delta(ModuleTensors(checkpoint, identity), "model.norm.weight")
    change.edit = lambda name, rows, start: rows * 1e6
    source = MergedTensors(checkpoint, identity, change, dtype=torch.float16)
    with pytest.raises(ModelError, match="too large for float16"):
        source.read("model.norm.weight")


def test_what_the_strategy_says_is_written(tmp_path):
    base = make_base(tmp_path / "base")
    (base / "tokenizer_config.json").write_text("{}")
    (base / "evil.py").write_text("")
    strategy = Fixed(target="model.norm.weight", added=("extra.weight",))
    out = tmp_path / "out"
    report = merge(tmp_path, base, out, strategy=strategy, skeleton=skeleton(base))
    config = json.loads((out / "config.json").read_text())
    assert config["marked"] is True
    assert config["architectures"] == ["LlamaForCausalLM"]
    result, before = ShardedCheckpoint(out), ShardedCheckpoint(base)
    assert torch.equal(result.read("model.norm.weight"), before.read("model.norm.weight") + 1)
    assert torch.equal(result.read("extra.weight"), torch.ones(3, 4))
    assert report.changed == 2
    names = {path.name for path in out.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors",
                     "tokenizer_config.json"}  # fmt: skip


def test_an_adapters_own_tokenizer_wins(tmp_path):
    base = make_base(tmp_path / "base")
    (base / "tokenizer_config.json").write_text('{"from": "base"}')
    (base / "merges.txt").write_text("base only")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "tokenizer_config.json").write_text('{"from": "adapter"}')
    merge(adapter, base, tmp_path / "out", strategy=Fixed(), skeleton=skeleton(base))
    assert "adapter" in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert not (tmp_path / "out" / "merges.txt").exists()


@pytest.mark.parametrize("target", [HEAD, EMBEDDING])
def test_one_of_two_tied_tensors_alone_unties_them(tmp_path, target):
    base = make_base(tmp_path / "base")
    report = merge(tmp_path, base, tmp_path / "out", strategy=Fixed(target=target),
                   skeleton=skeleton(base))  # fmt: skip
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    before = ShardedCheckpoint(base).read(EMBEDDING)
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, before + (target == HEAD))
    assert torch.equal(model.model.embed_tokens.weight, before + (target == EMBEDDING))
    assert report.changed == 1


def test_tied_tensors_that_change_alike_stay_tied(tmp_path):
    base = make_base(tmp_path / "base")
    strategy = Fixed(target=f"{HEAD}+{EMBEDDING}")
    merge(tmp_path, base, tmp_path / "out", strategy=strategy, skeleton=skeleton(base))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    before = ShardedCheckpoint(base).read(EMBEDDING)
    assert torch.equal(model.lm_head.weight, before + 1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert HEAD not in ShardedCheckpoint(tmp_path / "out").names()


def test_a_head_of_another_shape_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    with pytest.raises(AdapterError, match="no config of this model"):
        merge(tmp_path, base, tmp_path / "out", strategy=Fixed(added=(HEAD,)),
              skeleton=skeleton(base))  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    with pytest.raises(AdapterError, match="cannot be folded"):
        open_source(base, skeleton(base), adapter=tmp_path, strategy=Fixed(foldable=False))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    whole = skeleton(base)
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="--base ORIGINAL"):
        merge(tmp_path, base, tmp_path / "out", strategy=Fixed(), skeleton=whole)


def test_a_classifiers_head_joins_a_bare_encoder(tmp_path):
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=64)
    ).save_pretrained(tmp_path / "base")  # fmt: skip
    base, labels = tmp_path / "base", ("no", "yes", "unsure")
    bare = skeleton(base, task="classify", labels=labels, pooling="mean")
    head = {"classifier.weight": torch.randn(3, 32), "classifier.bias": torch.randn(3)}

    class Headed(Fixed):
        def open_merge(self, folder, tensors):
            return Delta(tensors, "bert.encoder.layer.0.output.dense.weight", head)

    merge(tmp_path, base, tmp_path / "out", strategy=Headed(), skeleton=bare)
    spec = models.ModelSpec(source="", task="classify", dtype=torch.float32)
    model = models.open_model(tmp_path / "out", spec)
    assert model.config.id2label == dict(enumerate(labels))
    assert model.config.qft_pooling == "mean"
    assert torch.equal(model.classifier.weight, head["classifier.weight"])
    before = ShardedCheckpoint(base).read("encoder.layer.0.output.dense.weight")
    assert torch.equal(model.bert.encoder.layer[0].output.dense.weight, before + 1)


def test_existing_output_stays_as_it_was(tmp_path):
    base = make_base(tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("1")
    options = {"strategy": Fixed(), "skeleton": skeleton(base)}
    with pytest.raises(OutputExistsError):
        merge(tmp_path, base, out, **options)
    assert [path.name for path in out.iterdir()] == ["precious"]
    merge(tmp_path, base, out, overwrite=True, **options)
    assert not (out / "precious").exists()


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 10, 1000))
    with pytest.raises(SaveError, match="not enough room"):
        merge(tmp_path, base, tmp_path / "out", strategy=Fixed(), skeleton=skeleton(base))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_disk_that_fills_half_way_leaves_what_was_there(tmp_path, monkeypatch):
    base = make_base(tmp_path / "base")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("1")
    source = open_source(base, skeleton(base))
    blocks = source.blocks

    def fail(name):
        if name == source.names()[5]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return blocks(name)

    monkeypatch.setattr(source, "blocks", fail)
    with pytest.raises(SaveError, match="disk is full"):
        write_model(source, out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_a_link_among_the_tokenizer_files_is_refused(tmp_path):
    base = make_base(tmp_path / "base")
    (tmp_path / "secret").write_text("{}")
    (base / "tokenizer_config.json").symlink_to("../secret")
    with pytest.raises(ModelError, match="link that leads out"):
        open_source(base, skeleton(base))
