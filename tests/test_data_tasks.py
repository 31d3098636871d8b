from __future__ import annotations

import json
from itertools import chain

import pytest
import torch
from small_tokenizers import CHATML, bpe, with_template

from qft.data.encoding import (
    UNSUPERVISED,
    Encoded,
    encode_prompt,
    pad_id,
    supervise,
    token_bytes,
    tokenize,
)
from qft.data.language import plain_prompt
from qft.data.tasks import TASKS, Example, load_examples, load_train_eval, split_rows
from qft.errors import DataError
from qft.recipe import Data, build_recipe

UNICODE = "Hello there 漢字🙂  \n\n\tand  wörld   "
SPECIALS = ("<s>", "</s>")


@pytest.fixture
def plain():
    return bpe(SPECIALS)


@pytest.fixture
def with_bos():
    return bpe(SPECIALS, bos="<s>", adds_bos=True)


@pytest.fixture
def chatml():
    return with_template(bpe(("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"), CHATML)


@pytest.fixture
def load(write_rows):
    def run(task, tokenizer, rows, *, max_length=64, of_model=None, limit=None, **data):
        settings = Data(train="unused", **data)
        return load_examples(
            task, str(write_rows(rows)), tokenizer,
            data=settings, max_length=max_length, labels=of_model, limit=limit,
        )  # fmt: skip

    return run


def supervised(tokenizer, example):
    kept = [label for label in example.inputs["labels"] if label != UNSUPERVISED]
    return tokenizer.decode(kept, skip_special_tokens=False)


# --- bytes


@pytest.mark.parametrize("trim", [False, True])
def test_every_byte_of_a_text_belongs_to_one_token(trim):
    tokenizer = bpe(SPECIALS, trim_offsets=trim)
    ids, offsets = tokenize(tokenizer, UNICODE)
    sizes = token_bytes(tokenizer, UNICODE, ids, offsets)
    # a byte-level token is spelled with one character a byte
    assert sizes == [len(name) for name in tokenizer.convert_ids_to_tokens(ids)]
    assert sum(sizes) == len(UNICODE.encode())


def test_special_tokens_in_a_text_stand_for_no_bytes(plain):
    text = "Hello</s>there"
    ids, offsets = tokenize(plain, text)
    sizes = token_bytes(plain, text, ids, offsets)
    assert sizes[ids.index(plain.eos_token_id)] == 0
    assert sum(sizes) == len("Hellothere")


def test_byte_fallback(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260K")
    ids, offsets = tokenize(tokenizer, UNICODE)
    sizes = token_bytes(tokenizer, UNICODE, ids, offsets)
    assert sum(sizes) == len(UNICODE.encode())
    names = tokenizer.convert_ids_to_tokens(ids)
    assert {s for s, name in zip(sizes, names, strict=True) if name.startswith("<0x")} == {1}


# --- text


def test_text_is_cut_into_blocks_without_loss(load, plain):
    rows = [{"text": UNICODE * 3}, {"text": "The second one."}]
    found = load("text", plain, rows, max_length=16)
    blocks = [example.inputs["input_ids"] for example in found.examples]
    eos = plain.eos_token_id
    first, second = (plain(row["text"], add_special_tokens=False)["input_ids"] for row in rows)
    assert list(chain.from_iterable(blocks)) == [*first, eos, *second]
    assert {len(block) for block in blocks[:-1]} == {16}
    assert all(
        example.inputs["labels"] == example.inputs["input_ids"] for example in found.examples
    )
    assert [example.index for example in found.examples] == list(range(len(blocks)))
    # the first token of each block has no prediction
    unpredicted = sum(len(plain.convert_ids_to_tokens(b[0])) for b in blocks if b[0] != eos)
    total = sum(len(row["text"].encode()) for row in rows)
    assert sum(e.label_bytes for e in found.examples) == total - unpredicted


def test_a_single_token_is_no_block(load, plain):
    text = "Hello there, and what is it"
    count = len(plain(text)["input_ids"])
    assert count > 5
    found = load("text", plain, [{"text": text}], max_length=count - 1)
    assert [len(e.inputs["input_ids"]) for e in found.examples] == [count - 1]
    two_left = load("text", plain, [{"text": text}], max_length=count - 2)
    assert [len(e.inputs["input_ids"]) for e in two_left.examples][:1] == [count - 2]


def test_bos_begins_each_document_once(load, with_bos):
    rows = [
        {"text": "One"},
        {"text": "<s>Two"},
        {"text": "Three</s>"},
        {"text": "Four"},
        {"text": ""},
    ]
    ids = load("text", with_bos, rows, max_length=512).examples[0].inputs["input_ids"]
    decoded = with_bos.decode(ids, skip_special_tokens=False)
    assert decoded == "<s>One</s><s>Two</s><s>Three</s><s>Four"


def test_packed_documents_are_examples_of_their_own(write_rows, with_bos):
    rows = [{"text": "One"}, {"text": UNICODE}, {"text": "Three</s>"}, {"text": ""}]
    data = {"train": str(write_rows(rows)), "eval": str(write_rows(rows[:1], "dev.jsonl"))}
    training, held = load_train_eval(recipe("text", data, packing=True, max_length=16), with_bos)
    pieces = [example.inputs["input_ids"] for example in training.examples]
    assert len(pieces) > 3
    assert max(map(len, pieces)) == 16
    decoded = with_bos.decode(list(chain.from_iterable(pieces)), skip_special_tokens=False)
    assert decoded == f"<s>One</s><s>{UNICODE}</s><s>Three</s>"
    begun = [p for p in pieces if with_bos.bos_token_id in p]
    assert [p[0] for p in begun] == [with_bos.bos_token_id] * 3, "no piece crosses a border"
    assert [e.index for e in training.examples] == list(range(len(pieces)))
    one = held.examples[0].inputs["input_ids"]
    assert with_bos.decode(one, skip_special_tokens=False) == "<s>One"
    plain, _ = load_train_eval(recipe("text", data, max_length=512), with_bos)
    assert len(plain.examples) == 1
    assert any("run on" in note for note in plain.notes)
    assert not any("run on" in note for note in training.notes)


# --- instruct


def test_instruct_plain_format(load, with_bos):
    rows = [{"instruction": "Say it", "input": "loudly", "output": "Hello 漢字"}]
    found = load("instruct", with_bos, rows)
    example = found.examples[0]
    whole = with_bos.decode(example.inputs["input_ids"], skip_special_tokens=False)
    assert whole == "<s>Say it\nloudly\nHello 漢字</s>"
    assert supervised(with_bos, example) == "Hello 漢字</s>"
    assert example.label_bytes == len("Hello 漢字".encode())
    assert any("no chat template" in note for note in found.notes)
    # what generation gives the model is how the training sequence begins
    prompt = encode_prompt(with_bos, plain_prompt("Say it\nloudly"))
    assert example.inputs["input_ids"][: len(prompt)] == prompt


def test_instruct_uses_the_chat_template(load, chatml):
    rows = [{"prompt": "Say it", "completion": "Hello"}]
    example = load("instruct", chatml, rows).examples[0]
    whole = chatml.decode(example.inputs["input_ids"], skip_special_tokens=False)
    assert whole == "<|im_start|>user\nSay it<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert supervised(chatml, example) == "Hello<|im_end|>"


def test_an_empty_answer_still_teaches_to_stop(load, plain):
    example = load("instruct", plain, [{"prompt": "Say nothing", "output": ""}]).examples[0]
    assert supervised(plain, example) == "</s>"


def test_an_answer_that_brings_its_own_eos(load, plain):
    example = load("instruct", plain, [{"prompt": "Say", "output": "Hello</s>"}]).examples[0]
    assert supervised(plain, example) == "Hello</s>"


def test_no_eos_token(load):
    with pytest.raises(DataError, match="no eos token"):
        load("instruct", bpe(SPECIALS, eos=None), [{"prompt": "x", "output": "y"}])


@pytest.mark.parametrize("value", [3, ["x"], "\ud800"])
def test_a_cell_that_is_no_text_is_named(load, plain, value):
    rows = [{"prompt": "x", "output": "y"}, {"prompt": "x", "output": value}]
    with pytest.raises(DataError) as caught:
        load("instruct", plain, rows)
    assert "row 2, column 'output'" in caught.value.where


# --- chat


def test_chat(load, chatml):
    rows = [{"conversations": [
        {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"},
        {"from": "human", "value": "Bye"}, {"from": "gpt", "value": "So long"},
    ]}]  # fmt: skip
    example = load("chat", chatml, rows).examples[0]
    assert supervised(chatml, example) == "Hello<|im_end|>So long<|im_end|>"
    assert example.label_bytes == len("HelloSo long")


def test_a_conversation_without_the_assistant_is_named(load, chatml):
    turn = {"role": "user", "content": "Hi"}
    rows = [{"messages": [turn, {"role": "assistant", "content": "x"}]}, {"messages": [turn]}]
    with pytest.raises(DataError, match="nothing to learn") as caught:
        load("chat", chatml, rows)
    assert "row 2" in caught.value.where
    assert caught.value.exit_code == 4


REASONED = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "yes", "reasoning_content": "because"},
    ]
}


def test_thoughts_are_written_by_the_template_or_named_in_a_note(load, chatml):
    found = load("chat", chatml, [REASONED])
    assert supervised(chatml, found.examples[0]) == "yes<|im_end|>"
    assert any("1 messages have reasoning_content" in note for note in found.notes)
    writes = CHATML.replace("+ message['content']", "+ (message['reasoning_content'] or '') "
                            "+ message['content']")  # fmt: skip
    found = load("chat", with_template(chatml, writes), [REASONED])
    assert supervised(chatml, found.examples[0]) == "becauseyes<|im_end|>"
    assert not any("reasoning_content" in note for note in found.notes)


def test_a_prompt_beyond_the_finished_turns_is_named_in_a_note(load, chatml):
    opens = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>' }}{% endif")
    assert opens != CHATML
    found = load("chat", with_template(chatml, opens), [REASONED])
    assert supervised(chatml, found.examples[0]) == "yes<|im_end|>"
    assert any("ends in '<think>'" in note for note in found.notes)


# --- too long


LONG = [
    {"prompt": "x", "output": "short"},
    {"prompt": "x", "output": "the answer " * 30},
    {"prompt": "the question " * 30, "output": "short"},
]


def test_too_long_is_an_error_with_three_ways_out(load, plain):
    with pytest.raises(DataError, match="2 of 3 rows are longer than 20 tokens") as caught:
        load("instruct", plain, LONG, max_length=20)
    assert "row 2 is the first" in caught.value.where
    longest = int(caught.value.found.split()[3])
    for way in (f"train.max_length={longest}", "data.too_long=truncate", "data.too_long=drop"):
        assert way in caught.value.fix
    assert len(load("instruct", plain, LONG, max_length=longest).examples) == 3


def test_too_long_dropped(load, plain):
    found = load("instruct", plain, LONG, max_length=20, too_long="drop")
    assert [example.index for example in found.examples] == [0]
    assert any(note.startswith("2 of 3 rows dropped: longer than 20") for note in found.notes)


def test_too_long_truncated(load, plain):
    found = load("instruct", plain, LONG, max_length=20, too_long="truncate")
    assert [example.index for example in found.examples] == [0, 1]
    assert [len(e.inputs["input_ids"]) for e in found.examples][1] == 20
    assert found.examples[1].label_bytes == len(supervised(plain, found.examples[1]))
    assert any("2 of 3 rows cut to 20" in note for note in found.notes)
    assert any("1 of 3 rows dropped: the cut left nothing" in note for note in found.notes)


def test_nothing_left(load, plain):
    with pytest.raises(DataError, match="No usable example"):
        load("instruct", plain, LONG[1:], max_length=8, too_long="drop")


# --- classify


@pytest.mark.parametrize(
    "values, expected",
    [
        (["10", "9", "1"], ("1", "9", "10")),
        ([1, 0], ("0", "1")),
        ([1.0, 0.0, 1], ("0", "1")),
        (["pos", "neg", "pos"], ("neg", "pos")),
        ([True, False], ("false", "true")),
        (["10", "x"], ("10", "x")),
    ],
)
def test_classes_are_sorted(load, plain, values, expected):
    found = load("classify", plain, [{"text": "x", "label": value} for value in values])
    assert found.labels == expected
    names = [str(int(v)) if isinstance(v, float) else str(v).lower() for v in values]
    assert [expected[e.inputs["labels"]] for e in found.examples] == names


def test_the_users_and_the_models_classes_win(load, plain):
    rows = [{"text": "x", "label": "neg"}]
    named = load("classify", plain, rows, labels=("pos", "neg"))
    assert named.labels == ("pos", "neg")
    assert named.examples[0].inputs["labels"] == 1
    trained = load("classify", plain, rows, of_model=("a", "b", "neg"), labels=("pos", "neg"))
    assert trained.labels == ("a", "b", "neg")
    assert trained.examples[0].inputs["labels"] == 2


def test_a_label_outside_the_classes(load, plain):
    rows = [{"text": "x", "label": "a"}, {"text": "x", "label": "c"}]
    with pytest.raises(DataError, match="none of the classes") as caught:
        load("classify", plain, rows, labels=("a", "b"))
    assert "row 2" in caught.value.where
    assert "'c'; the classes are a, b" in caught.value.found


@pytest.mark.parametrize("value", [0.5, ["a"]])
def test_a_label_that_is_no_single_class(load, plain, value):
    rows = [{"text": "x", "label": value}]
    with pytest.raises(DataError, match="a text or a whole number"):
        load("classify", plain, rows, labels_are="one", labels=("a", "b"))


def test_one_class_is_nothing_to_tell_apart(load, plain):
    with pytest.raises(DataError, match="fewer than two classes"):
        load("classify", plain, [{"text": "x", "label": 1}] * 3)


def test_classify_truncates_the_text_and_keeps_the_special_tokens(load, with_bos):
    rows = [{"text": "the answer " * 30, "label": "a"}]
    ids = load("classify", with_bos, rows, labels=("a", "b"), max_length=6, too_long="truncate")
    ids = ids.examples[0].inputs["input_ids"]
    assert len(ids) == 6
    assert ids[0] == with_bos.bos_token_id


def test_classify_with_a_real_encoder(minilm, load):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    rows = [{"text": "word " * 50, "label": "a"}, {"text": "word", "label": "b"}]
    found = load("classify", tokenizer, rows, max_length=8, too_long="truncate")
    long, short = (tokenizer.convert_ids_to_tokens(e.inputs["input_ids"]) for e in found.examples)
    assert long == ["[CLS]", *["word"] * 6, "[SEP]"]
    assert short == ["[CLS]", "word", "[SEP]"]


# --- batches


def test_collate_pads_on_the_right_and_masks_by_position():
    examples = [
        Example(0, {"input_ids": [5, 2, 2], "labels": [-100, 2, 2]}),
        Example(1, {"input_ids": [7], "labels": [7]}),
    ]
    batch = TASKS["chat"].collate(examples, pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 2, 2], [7, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 2], [7, -100, -100]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert TASKS["chat"].label_count(batch) == 2  # a sequence's first token is not predicted


def test_collate_classes():
    examples = [Example(i, {"input_ids": [5] * (i + 1), "labels": i}) for i in range(3)]
    batch = TASKS["classify"].collate(examples, pad_token_id=0)
    assert batch["labels"].tolist() == [0, 1, 2]
    assert TASKS["classify"].label_count(batch) == 3


def test_pad_id():
    assert pad_id(bpe(("<p>", "</s>"), pad="<p>")) == 0
    plain = bpe(SPECIALS)
    assert pad_id(plain) == plain.eos_token_id == 1
    assert pad_id(bpe(SPECIALS, eos=None)) == 0


def test_fingerprint_tells_data_apart(load, plain):
    rows = [{"text": "Hello"}, {"text": "there"}]
    first = load("text", plain, rows)
    assert len(first.fingerprint) == 64
    assert load("text", plain, rows).fingerprint == first.fingerprint
    assert load("text", plain, rows[::-1]).fingerprint != first.fingerprint
    labels = {"labels": ("a", "b")}
    one = load("classify", plain, [{"text": "x", "label": "a"}], **labels)
    other = load("classify", plain, [{"text": "x", "label": "b"}], **labels)
    assert one.fingerprint != other.fingerprint


# --- the recipe's data


def recipe(task, data, **train):
    values = {"model": "m", "task": task, "strategy": "lora", "output": "o", "data": data}
    return build_recipe({**values, "train": {"max_length": 64, **train}})


def test_split_rows():
    rows = list(range(100))
    kept, held = split_rows(rows, 0.2, seed=3)
    assert sorted(kept + held) == rows
    assert len(held) == 20
    assert kept == sorted(kept)
    assert split_rows(rows, 0.2, seed=3) == (kept, held)
    assert split_rows(rows, 0.2, seed=4)[1] != held
    assert [len(part) for part in split_rows(rows[:3], 0.01, seed=0)] == [2, 1]
    assert [len(part) for part in split_rows(rows[:2], 0.99, seed=0)] == [1, 1]
    with pytest.raises(DataError, match="One row"):
        split_rows([1], 0.5, seed=0)


def test_held_out_rows_share_the_classes_and_never_the_rows(write_rows, plain):
    rows = [{"text": f"number {i}", "label": i % 2} for i in range(20)]
    data = {"train": str(write_rows(rows)), "eval_share": 0.25}
    training, held = load_train_eval(recipe("classify", data), plain)
    assert (len(training.examples), len(held.examples)) == (15, 5)
    assert held.labels == training.labels == ("0", "1")
    texts = [tuple(e.inputs["input_ids"]) for e in training.examples + held.examples]
    assert len(set(texts)) == 20
    limited, same = load_train_eval(recipe("classify", {**data, "limit": 6}), plain)
    assert len(limited.examples) == 6
    assert same.fingerprint == held.fingerprint  # a limit moves no row to the other side
    _, fewer = load_train_eval(recipe("classify", {**data, "eval_limit": 2}), plain)
    assert len(fewer.examples) == 2


def test_an_eval_file_of_its_own(write_rows, plain, tmp_path):
    train = write_rows([{"text": "x", "label": "a"}, {"text": "y", "label": "b"}], "train.jsonl")
    dev = write_rows([{"text": "z", "label": "b"}, {"text": "z", "label": "c"}], "dev.jsonl")
    data = {"train": str(train), "eval": str(dev)}
    with pytest.raises(DataError, match="none of the classes") as caught:
        load_train_eval(recipe("classify", data), plain)
    assert "dev.jsonl" in caught.value.where
    training, held = load_train_eval(recipe("classify", {**data, "eval_limit": 1}), plain)
    assert held.examples[0].inputs["labels"] == 1
    assert load_train_eval(recipe("classify", {"train": str(train)}), plain)[1] is None
    assert len(training.examples) == 2


def test_one_text_is_parted_at_a_line(tmp_path, plain):
    text = "".join(f"line {i} of it\n" for i in range(100))
    path = tmp_path / "a.txt"
    path.write_text(text)
    data = {"train": str(path), "eval_share": 0.1}
    parts = load_train_eval(recipe("text", data), plain)
    tokens = [[i for e in part.examples for i in e.inputs["input_ids"]] for part in parts]
    texts = [plain.decode(ids) for ids in tokens]
    assert text == "".join(texts)
    assert texts[0].endswith("\n")
    assert 0.08 < len(texts[1]) / len(text) < 0.13


def test_a_row_keeps_its_number_when_others_are_held_out(write_rows, plain):
    rows = [{"text": "x", "label": str(i % 2)} for i in range(9)] + [{"text": 3, "label": "0"}]
    data = {"train": str(write_rows(rows)), "eval_share": 0.3}
    with pytest.raises(DataError) as caught:
        load_train_eval(recipe("classify", data), plain)
    assert "row 10" in caught.value.where


def test_first(load, plain):
    found = load("classify", plain, [{"text": "x", "label": i} for i in range(4)])
    assert len(found.first(2).examples) == 2
    assert found.first(None) is found
    assert found.first(2).fingerprint != found.fingerprint
    assert found.first(2).labels == found.labels


def test_limit(load, plain):
    rows = [{"text": "x", "label": i % 2} for i in range(10)]
    assert len(load("classify", plain, rows, limit=4).examples) == 4


def test_real_rows(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "mini-6m")
    source = assets / "data" / "instruct" / "alpaca_demo" / "alpaca_zh_demo.json"
    rows = json.loads(source.read_text(encoding="utf-8"))[:100]
    data = Data(train="unused")
    found = load_examples("instruct", str(source), tokenizer, data=data, max_length=2048, limit=100)
    for row, example in zip(rows, found.examples, strict=True):
        assert supervised(tokenizer, example) == row["output"] + "<|im_end|>"
        assert example.label_bytes == len(row["output"].encode())


# --- labels by place


def test_supervise_takes_whole_tokens():
    offsets = [(0, 3), (3, 5), (5, 5), (5, 8), (8, 9), (9, 9)]
    found = supervise(
        bpe(SPECIALS), "abcdefghi", [11, 12, 13, 14, 15, 16], offsets, [(2, 4), (5, 8)]
    )
    # a token across the border counts, one of no width counts by its place
    assert found.labels == [11, 12, 13, 14, -100, -100]
    assert supervise(bpe(SPECIALS), "abc", [11], [(0, 3)], []).labels == [-100]


def test_the_first_token_of_a_sequence_is_never_predicted():
    sequence = Encoded([5, 6], [5, -100], [3, 4])
    assert (sequence.supervised, sequence.label_bytes) == (0, 0)
    assert Encoded([5, 6], [5, 6], [3, 4]).label_bytes == 4
