"""A merge by blocks of rows: the same bits as in one piece, few bytes at a time, resumable."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from qft import models, shards, write_journal
from qft.errors import SaveError
from qft.files import unfinished
from qft.merging.merge import open_source, write_model
from qft.merging.tensors import ModuleTensors
from qft.registry import strategy_from_folder
from qft.shards import ShardedCheckpoint, row_blocks

torch.set_num_threads(1)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few rows, so that small models have many."""
    plain = shards.row_blocks

    def small(shape, numbers=700):
        return plain(shape, numbers)

    for module in ("qft.shards", "qft.merging.tensors"):
        monkeypatch.setattr(f"{module}.row_blocks", small)


def llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def adapted(base: Path, folder: Path, **settings: object) -> dict[str, torch.Tensor]:
    """Saves a random LoRA, DoRA's lengths disturbed too; returns PEFT's own merge."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    settings = {"target_modules": "all-linear", **settings}
    config = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **settings
    )
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload().state_dict()


def opened(base: Path, adapter: Path):
    skeleton = models.open_skeleton(base, models.ModelSpec(source=str(base)))
    return open_source(base, skeleton, adapter=adapter, strategy=strategy_from_folder(adapter))


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("dora", [False, True])
def test_blocks_are_the_bits_of_pefts_merge(tmp_path, small_blocks, make, dora):
    base = make(tmp_path / "base")
    expected = adapted(base, tmp_path / "adapter", use_dora=dora)
    source = opened(base, tmp_path / "adapter")
    several = 0
    for name in source.names():
        blocks = list(source.blocks(name))
        several += len(blocks) > 1
        found = torch.cat(blocks) if blocks[0].dim() else blocks[0]
        assert torch.equal(found, expected[source.module(name)]), name
        assert torch.equal(found, source.read(name))
    assert several > 8


@pytest.mark.parametrize("numbers", [68, 68 * 7, 68 * 100])
def test_a_last_block_of_few_outputs_adds_up_as_the_whole(tmp_path, monkeypatch, numbers):
    """DoRA on transposed weights: of GPT-2's layers, and of embeddings."""
    plain = shards.row_blocks
    for module in ("qft.shards", "qft.merging.tensors"):
        monkeypatch.setattr(f"{module}.row_blocks", lambda shape: plain(shape, numbers))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=301, n_embd=68, n_layer=1, n_head=4, n_positions=32,
                        tie_word_embeddings=False)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    targets = ["c_attn", "c_proj", "c_fc", "wte"]
    expected = adapted(
        tmp_path / "base", tmp_path / "adapter", use_dora=True, target_modules=targets
    )
    source = opened(tmp_path / "base", tmp_path / "adapter")
    for name in source.names():
        assert torch.equal(source.read(name), expected[source.module(name)]), name


def test_blocks_cover_a_tensor_and_keep_groups_of_64_whole():
    for shape in ((1000, 33), (5, 10_000), (128, 7, 3), (64,), (), (0, 4)):
        parts = list(row_blocks(shape, 2000))
        whole = list(range(shape[0])) if shape else [0]
        assert [row for part in parts for row in range(part.start, part.stop)] == whole
    lengths = {part.stop - part.start for part in row_blocks((1000, 10), 2000)}
    assert lengths == {192, 40}


def test_stored_rows_and_columns_are_those_of_the_tensor(tmp_path):
    tensor = torch.randn(40, 30).bfloat16()
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    stored = shards.open_tensors(tmp_path / "a.safetensors")["a"]
    assert torch.equal(stored[3:9], tensor[3:9])
    assert torch.equal(stored[:], tensor)
    assert stored[40:].shape == (0, 30)
    assert torch.equal(stored.columns(range(5, 12)), tensor[:, 5:12])
    with pytest.raises(IndexError, match="no columns"):
        stored.columns(range(25, 31))
    with pytest.raises(IndexError, match="without a step"):
        stored[::2]


def test_no_more_than_a_block_is_read_of_a_large_tensor(tmp_path, small_blocks, monkeypatch):
    """What bounds the memory: the base and the adapter are never read whole."""
    base = llama(tmp_path / "base")
    adapted(base, tmp_path / "adapter", modules_to_save=["embed_tokens"])
    # as a folder whose head is replaced would be: read by rows too
    checkpoint = ShardedCheckpoint(base)
    names = {name: name for name in checkpoint.names()}
    replaced = {"model.embed_tokens.weight": torch.randn(300, 64)}
    save_file(replaced, tmp_path / "head.safetensors")
    largest = 0
    plain = shards._File.fill

    def fill(file, offset, buffer):
        nonlocal largest
        largest = max(largest, len(buffer))
        plain(file, offset, buffer)

    monkeypatch.setattr(shards._File, "fill", fill)
    from adapters.freed_tensors import TensorsMerge
    from qft.merging.tensors import MergedTensors

    held = shards.open_tensors(tmp_path / "head.safetensors")
    merge = TensorsMerge(held, ModuleTensors(checkpoint, names), set(), tmp_path)
    source = MergedTensors(checkpoint, names, merge)
    for name in source.names():
        for _ in source.blocks(name):
            pass
    assert largest <= 700 * 4


def interrupted(source, out: Path, after: int, **options: object) -> Path:
    """Writes, and is stopped within the tensor that comes after so many; returns what is left."""
    plain, names = source.blocks, source.names()

    def blocks(name):
        for number, block in enumerate(plain(name)):
            if names.index(name) >= after and number == 1:  # half a tensor is on the disk
                raise KeyboardInterrupt
            yield block

    source.blocks = blocks
    with pytest.raises(KeyboardInterrupt):
        write_model(source, out, **options)
    assert not out.exists()
    return unfinished(out)


@pytest.mark.parametrize("after", [0, 1, 7, 15])
@pytest.mark.parametrize("limit", [30_000, 10**9])
def test_a_merge_that_was_cut_off_anywhere_goes_on_to_the_same_bytes(
    tmp_path, monkeypatch, small_blocks, limit, after
):
    base = llama(tmp_path / "base")
    adapted(base, tmp_path / "adapter")
    monkeypatch.setattr(write_journal, "_EVERY_BYTES", 1)
    write_model(opened(base, tmp_path / "adapter"), tmp_path / "whole", max_shard_bytes=limit)
    wanted = {p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()}
    assert "journal.jsonl" not in wanted
    out = tmp_path / "out"
    left = interrupted(opened(base, tmp_path / "adapter"), out, after, max_shard_bytes=limit)
    assert left.is_dir()
    source, read, seen = opened(base, tmp_path / "adapter"), [], []
    plain = source.blocks
    monkeypatch.setattr(source, "blocks", lambda name: read.append(name) or plain(name))
    total = write_model(source, out, max_shard_bytes=limit, progress=seen.append)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == wanted
    assert sum(seen) == total
    assert read == source.names()[-len(read) :]
    assert len(read) <= len(source.names()) - after
    assert not left.exists()


def test_what_lies_there_is_checked_and_anothers_is_thrown_away(
    tmp_path, monkeypatch, small_blocks
):
    base = llama(tmp_path / "base")
    adapted(base, tmp_path / "adapter")
    monkeypatch.setattr(write_journal, "_EVERY_BYTES", 1)
    write_model(opened(base, tmp_path / "adapter"), tmp_path / "whole")
    wanted = (tmp_path / "whole" / "model.safetensors").read_bytes()

    for number, spoil in enumerate(("flip", "shorten", "journal", "identity")):
        out = tmp_path / f"out-{number}"
        folder = interrupted(opened(base, tmp_path / "adapter"), out, 9)
        file, journal = folder / "model.safetensors", folder / "journal.jsonl"
        data, lines = file.read_bytes(), journal.read_text().splitlines()
        if spoil == "flip":
            file.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
        elif spoil == "shorten":
            file.write_bytes(data[: len(data) // 2])
        elif spoil == "journal":
            journal.write_text("\n".join([*lines, lines[-1][:20]]))
        else:
            journal.write_text("\n".join([json.dumps({"identity": "another"}), *lines[1:]]))
            (folder / "stray").write_text("of another merge")
        write_model(opened(base, tmp_path / "adapter"), out)
        assert (out / "model.safetensors").read_bytes() == wanted, spoil
        assert not (out / "stray").exists()


def test_an_error_that_is_no_interruption_leaves_nothing(tmp_path, monkeypatch):
    base = llama(tmp_path / "base")
    adapted(base, tmp_path / "adapter")
    source = opened(base, tmp_path / "adapter")

    def short(name):
        yield torch.zeros(1)

    monkeypatch.setattr(source, "blocks", short)
    with pytest.raises(SaveError, match="not what was announced"):
        write_model(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_module_has_the_head_of_a_scalar_too(tmp_path):
    """A tensor without rows is one block of its own."""

    class Scalar(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

    save_file(Scalar().state_dict(), tmp_path / "model.safetensors")
    from qft.merging.tensors import MergedTensors

    source = MergedTensors(ShardedCheckpoint(tmp_path), {"scale": "scale"})
    assert [block.item() for block in source.blocks("scale")] == [2.0]
    assert source.read("scale").item() == 2.0
