"""The demo's rows come from the standard library, and its base model has read none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import qft.demo
from qft.demo.docstrings import (
    LEFT_OUT,
    TEST_MODULES,
    TRAIN_MODULES,
    contained_sentences,
    cut_sentences,
    demo_sentences,
    first_sentence,
    pretraining_documents,
    rows,
    stdlib_root,
    stdlib_sources,
)
from qft.errors import DataError

BASE = Path(qft.demo.__file__).parent / "base"

HEAPQ = '''
"""Stands in for the real module."""
raise SystemExit("the demo must not import what it reads")

def push(heap, item):
    """Push item onto the heap, keeping
    it a heap.  Second sentence."""

def _hidden(heap):
    """Nobody outside should see this one."""

def signature(x):
    """signature(x) -> the same x"""

def empty(x):
    pass

class Queue:
    def __len__(self):
        """Return how many items there are."""

    async def pop(self, *, wait: bool = True) -> int:
        """Wait for the smallest item, e.g. a task, and return it"""

    def push_again(self):
        """PUSH item onto the heap, keeping it a heap!"""
'''


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def train() -> list[dict[str, str]]:
    return rows(TRAIN_MODULES)[0]


@pytest.fixture(scope="module")
def test() -> list[dict[str, str]]:
    return rows(TEST_MODULES)[0]


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    return pretraining_documents()[0]


def test_there_are_enough_rows(train: list[dict[str, str]], test: list[dict[str, str]]) -> None:
    # Other versions and slim distributions may have somewhat fewer.
    least = (900, 200) if sys.version_info[:2] == (3, 11) else (700, 120)
    assert len(train) >= least[0]
    assert len(test) >= least[1]


def test_train_and_test_share_nothing(
    train: list[dict[str, str]], test: list[dict[str, str]]
) -> None:
    assert not set(TRAIN_MODULES) & set(TEST_MODULES)
    for column in ("prompt", "completion"):
        seen = [" ".join(row[column].casefold().split()).rstrip(".") for row in train + test]
        assert len(seen) == len(set(seen)), column


def test_a_test_modules_row_is_dropped_from_train(tmp_path: Path) -> None:
    shared = 'def f(x):\n    """The very same sentence."""\n'
    own = 'def g(x):\n    """A sentence of its own."""\n'
    root = write(tmp_path, {"ast.py": shared + own, "heapq.py": shared})
    assert [row["prompt"] for row in rows(["ast"], root=root)[0]] == ["def g(x):"]
    assert [row["prompt"] for row in rows(["heapq"], root=root)[0]] == ["def f(x):"]


def test_rows_do_not_depend_on_hashing_and_need_no_torch(test: list[dict[str, str]]) -> None:
    program = (
        "import json, sys; from qft.demo.docstrings import *; "
        "print(json.dumps([rows(TEST_MODULES)[0], 'torch' in sys.modules]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    root = Path(qft.demo.__file__).parents[2]
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=root, capture_output=True, check=True
    ).stdout
    again, torch_came_along = json.loads(output)
    assert again == test
    assert not torch_came_along


def test_what_becomes_a_row(tmp_path: Path) -> None:
    found, missing = rows(["heapq"], root=write(tmp_path, {"heapq.py": HEAPQ}))
    assert found == [
        {
            "prompt": "def push(heap, item):",
            "completion": "Push item onto the heap, keeping it a heap.",
        },
        {
            "prompt": "class Queue: async def pop(self, *, wait: bool=True) -> int:",
            "completion": "Wait for the smallest item, e.g. a task, and return it",
        },
    ]
    assert missing == []


@pytest.mark.parametrize(
    "docstring, sentence",
    [
        ("Add i.e. sum up. Then rest.", "Add i.e. sum up."),
        ("Is the value 1.5 or more? Yes.", "Is the value 1.5 or more?"),
        ("No final mark here\n\nSecond paragraph.", "No final mark here"),
        ("Two words.", None),
        ("word " * 41, None),
        ("w(x) gives the value", None),
        (">>> w(1) is what", None),
        ("", None),
    ],
)
def test_first_sentence(docstring: str, sentence: str | None) -> None:
    assert first_sentence(docstring, "w") == sentence


def test_missing_modules_are_named(tmp_path: Path) -> None:
    root = write(tmp_path, {"heapq.py": HEAPQ})
    found, missing = rows(["asyncore", "heapq", "imp"], root=root)
    assert found
    assert missing == ["asyncore", "imp"]
    with pytest.raises(DataError, match="2 of 2 modules missing"):
        rows(["asyncore", "imp"], root=root)


def test_pretraining_leaves_out_modules_tests_and_copies(tmp_path: Path) -> None:
    out = [
        "heapq.py",
        "json/decoder.py",
        "_pydecimal.py",
        "pathlib/_local.py",
        "_pydatetime.py",
        "_strptime.py",
        "test/test_heapq.py",
        "test/test_json/test_decode.py",
        "test/datetimetester.py",
        "test/lock_tests.py",
        "asyncio/queues.py",
        "distutils/file_util.py",
        "site-packages/anything.py",
        "__pycache__/broken.py",
    ]
    kept = ["asyncio/events.py", "this.py", "test/test_float.py", "email/json.py"]
    root = write(tmp_path, dict.fromkeys(out + kept, "x = 1\n"))
    (root / "latin.py").write_bytes(b"# caf\xe9\n")
    names = [path.relative_to(root).as_posix() for path in stdlib_sources(root)]
    assert names == sorted(kept)


def test_no_demo_module_is_in_the_real_sources() -> None:
    root = stdlib_root()
    paths = [path.relative_to(root) for path in stdlib_sources()]
    assert len(paths) > 300
    demo = {*TRAIN_MODULES, *TEST_MODULES, "_pydecimal", "_pydatetime"}
    tests = {f"test_{module}" for module in demo}
    for path in paths:
        first = path.parts[0].removesuffix(".py")
        assert first not in demo, path
        if first == "test":
            assert path.parts[1].removesuffix(".py") not in tests, path
    assert len(LEFT_OUT) == len(set(LEFT_OUT))


def test_no_demo_sentence_is_in_the_pretraining_text(
    documents: dict[str, str], train: list[dict[str, str]], test: list[dict[str, str]]
) -> None:
    sentences = demo_sentences()
    assert sum(map(len, sentences.values())) > 500
    for name, text in documents.items():
        assert not contained_sentences(text, sentences), name
    # The same once more without the index, for every fortieth sentence.
    flat = " ".join(" ".join(documents.values()).split())
    for sentence in [row["completion"] for row in train + test][::40]:
        assert len(sentence.split()) < 5 or sentence not in flat


def test_copied_sentences_are_cut(tmp_path: Path) -> None:
    copy = (
        'def other():\n    """Note: push item onto it.\n\n'
        '    Push item onto the\n      heap, keeping it a heap.\n    """\n    return 1\n'
        "# See also: Push item onto the heap,\n# keeping it a heap.\nkept = 2\n"
    )
    root = write(tmp_path, {"heapq.py": HEAPQ, "other.py": copy, "only.py": '"""Clean."""\n'})
    sentences = demo_sentences(root)
    assert contained_sentences(copy, sentences) == ["Push item onto the heap, keeping it a heap."]
    documents, cuts = pretraining_documents(root)
    assert documents == {
        "only.py": '"""Clean."""\n',
        "other.py": "def other():\n    return 1\nkept = 2\n",
    }
    assert cuts == 2
    assert cut_sentences("nothing to cut\n", sentences) == ("nothing to cut\n", 0)


def test_the_base_has_learned_and_is_small() -> None:
    facts = json.loads((BASE / "training.json").read_text(encoding="utf-8"))
    bits = facts["bits_per_byte"]
    assert bits["model"] < 0.85 * bits["gzip"] < bits["unigram"]
    assert facts["left_out_patterns"] == len(LEFT_OUT)
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 8_000_000


def test_the_bases_tokenizer_and_chat_template() -> None:
    from transformers import AutoTokenizer

    from qft.data.chat import mask_assistant

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = "def f(x=1234):\n\treturn 'é 漢字 🙂'  # two  spaces\n\n\n    pass"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    chat = [{"role": "user", "content": "def f():"}, {"role": "assistant", "content": "Return 1."}]
    start = "<|im_start|>user\ndef f():<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == f"{start}Return 1.<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == start
    input_ids, labels = mask_assistant(tokenizer, chat)
    answer = [token for token, label in zip(input_ids, labels, strict=True) if label != -100]
    assert tokenizer.decode(answer) == "Return 1.<|im_end|>"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|pad|>")
    assert tokenizer.bos_token is None
