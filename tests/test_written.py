"""What models write: the measures against worked-out values, code run under limits, qft eval."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qft
from qft.code_execution import pass_rate, passes, program
from qft.errors import DataError, RecipeError
from qft.metrics.texts import text_scores

Writer = Callable[..., Path]


def test_the_same_text_is_perfect_and_another_is_not():
    same = text_scores(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert same["bleu"] == pytest.approx(100)
    assert same["chrf"] == pytest.approx(100)
    assert same["rouge_l"] == same["exact_match"] == 1.0
    other = text_scores(["nothing like it"], ["the cat sat on the mat"])
    assert other["bleu"] == other["rouge_1"] == other["f1"] == 0.0


def test_rouge_by_hand():
    found = text_scores(["cat sat mat"], ["cat on mat sat here"])
    assert found["rouge_1"] == pytest.approx(2 * 3 / 8)
    assert found["rouge_2"] == 0.0
    assert found["rouge_l"] == pytest.approx(2 * 2 / 8)


def test_rouge_splits_words_as_its_usual_implementations_do():
    # the, cat / the, dog: articles are words; SQuAD's measure drops them
    found = text_scores(["The cat"], ["the dog"])
    assert found["rouge_1"] == pytest.approx(2 * 1 / 4)
    assert found["rouge_l"] == pytest.approx(2 * 1 / 4)
    # don, t, stop, well, known / well, known, don, t: marks part words
    found = text_scores(["Don't stop well-known"], ["well_known, don't"])
    assert found["rouge_1"] == pytest.approx(2 * 4 / 9)
    assert found["rouge_2"] == pytest.approx(2 * 2 / (4 + 3))
    assert found["rouge_l"] == pytest.approx(2 * 2 / 9)


def test_rouge_of_other_scripts():
    found = text_scores(["我用iPhone 15,很好"], ["我用iPhone,好"])  # 6 and 4 words, 4 shared
    assert found["rouge_1"] == pytest.approx(2 * 4 / 10)
    assert found["rouge_2"] == pytest.approx(2 * 2 / 8)
    assert text_scores(["Grüße an हिन्दी"], ["grüße हिन्दी"])["rouge_1"] == pytest.approx(2 * 2 / 5)


def test_bleu_is_sacrebleus_in_the_references_own_script():
    import sacrebleu

    pair = ["今天 天气很好我们去公园散步吧"], ["今天天气很好我们去公园玩吧"]
    wanted = sacrebleu.corpus_bleu(pair[0], [pair[1]], tokenize="zh").score
    assert 0 < wanted < 100
    assert text_scores(*pair)["bleu"] == pytest.approx(wanted)
    pair = ["Ein Hund rennt auf dem Gras ."], ["Ein Hund läuft auf dem Gras ."]
    wanted = sacrebleu.corpus_bleu(pair[0], [pair[1]]).score
    assert text_scores(*pair)["bleu"] == pytest.approx(wanted)


# --- code


MBPP = {"test_list": ["assert double(2) == 4", "assert double(0) == 0"], "test_setup_code": ""}
HUMAN = {"prompt": "def double(x):\n", "test": "def check(f):\n    assert f(3) == 6\n",
         "entry_point": "double"}  # fmt: skip


def test_code_passes_its_own_tests_or_not():
    good, bad = "def double(x):\n    return 2 * x\n", "def double(x):\n    return x\n"
    assert pass_rate([MBPP, MBPP], [good, bad]) == 0.5
    assert pass_rate([MBPP], [f"Here it is:\n```python\n{good}```\nDone."]) == 1.0
    assert pass_rate([HUMAN, HUMAN], ["    return 2 * x\n", "    return x\n"]) == 0.5
    assert pass_rate([HUMAN], ["return 2 * x\n"]) == 0.0
    assert pass_rate([MBPP], ["this is no code ("]) == 0.0
    with pytest.raises(DataError, match="no tests"):
        program({"text": "x"}, "pass", 1)


@pytest.mark.parametrize(
    "text",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "x = bytearray(2 * 1024**3)",
        "open('large', 'wb').write(b'0' * (4 * 2**20))",
        # one parent, so that a limit that fails to bind costs 400 sleepers and no more
        "import os, time\nfor _ in range(400):\n    os.fork() or time.sleep(60)",
        "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=2)",
        "import os; os.kill(OTHER, 9)",
    ],
)
def test_code_that_does_harm_fails_within_its_limits(text: str, monkeypatch: pytest.MonkeyPatch):
    import socket

    monkeypatch.setattr("qft.code_execution.SECONDS", 2)

    other = subprocess.Popen(["sleep", "60"])
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
            assert not passes(text.replace("PORT", port).replace("OTHER", str(other.pid)))
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import builtins; builtins.exec = builtins.compile = lambda *a, **k: None",
        'x = """',  # the tests' own quotes must not close it
        "import os\nos.read = os.write = None\nos._exit(0)",
    ],
)
def test_a_program_that_leaves_before_its_tests_has_not_passed(code: str):
    assert not passes(code, 'text = """"""\nassert False')


def test_a_program_may_replace_what_it_likes():
    assert passes("import os\nos.read = os.write = os._exit = None", "assert os.read is None")
    typed = "import dataclasses\n@dataclasses.dataclass\nclass Point:\n    x: 'int' = 1\n"
    assert passes(typed, "assert Point().x == 1 and __name__ == '__main__'")


def commands() -> str:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(file.read_text(errors="replace"))
    return "\n".join(found)


def test_what_flees_into_a_session_of_its_own_dies_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("qft.code_execution.SECONDS", 1)
    mark = f"61.{os.getpid()}"
    code = f"""
import os, time
if os.fork() == 0:
    os.setsid()
    os.fork() or os.execv('/bin/sleep', ['sleep', '{mark}'])
"""
    assert "sleep" in os.listdir("/bin")
    assert not passes(f"{code}\ntime.sleep(60)")
    assert mark not in commands()
    assert passes(code)  # and where the program itself ends in time
    assert mark not in commands()


def test_what_is_started_is_counted(monkeypatch: pytest.MonkeyPatch):
    if not Path("/proc/sys/kernel/ns_last_pid").exists():
        pytest.skip("this kernel does not tell the last process's number")
    # one after the other: the limit on those at once cannot be what stops them
    code = "import os\nfor _ in range({}):\n    os.fork() or os._exit(0)\n    os.wait()"
    monkeypatch.setattr("qft.code_execution._STARTED", 50)
    assert passes(code.format(20))
    assert not passes(code.format(2000))


def test_nothing_is_left_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert passes("open('mine', 'w').write('x')\nassert open('mine').read() == 'x'")
    assert list(tmp_path.iterdir()) == []


def test_the_environment_and_its_secrets_are_not_handed_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    assert passes("import os; assert 'SECRET_TOKEN' not in os.environ")


# --- qft eval --generate


@pytest.fixture
def run(tiny_llama: Path, tmp_path: Path, write_rows: Writer) -> Path:
    rows = write_rows([
        {"instruction": f"say {word}", "output": word, "test_list": [f"assert '{word}'"]}
        for word in ("aa", "bb") * 8
    ])  # fmt: skip
    result = qft.train(qft.build_recipe({
        "model": str(tiny_llama), "task": "instruct", "strategy": "full",
        "data": {"train": str(rows), "eval": str(rows), "max_duplicate_share": 1},
        "train": {"epochs": 40, "batch_size": 8, "learning_rate": 3e-3, "max_length": 64},
        "device": "cpu", "dtype": "float32", "output": str(tmp_path / "run"),
    }))  # fmt: skip
    return result.folder


def test_a_model_that_learned_its_answers_writes_them(run: Path, tmp_path: Path):
    kept = tmp_path / "texts.jsonl"
    found = qft.evaluate(str(run), generate=True, max_new_tokens=8, micro_batch=3, predictions=kept)
    assert found["loss"] < 0.5
    assert found["exact_match"] > 0.9
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 16
    right = [row["prediction"] == row["reference"] for row in rows]
    assert sum(right) / 16 == pytest.approx(found["exact_match"], abs=0.1)
    assert rows[0]["prompt"][0]["content"] == "say aa"
    again = qft.evaluate(str(run), generate=True, max_new_tokens=8, micro_batch=16)
    assert again == found


def test_code_is_run_only_when_asked(run: Path):
    plain = qft.evaluate(str(run), generate=True, max_new_tokens=8, limit=4)
    assert "pass_at_1" not in plain
    asked = qft.evaluate(str(run), generate=True, max_new_tokens=8, limit=4, execute_code=True)
    assert asked["pass_at_1"] == 0.0  # "aa" is no defined name
    with pytest.raises(RecipeError, match="are written"):
        qft.evaluate(str(run), execute_code=True)


def test_code_is_run_as_it_was_written(monkeypatch: pytest.MonkeyPatch):
    from torch import nn

    from qft import written
    from qft.data.examples import Example, Written

    texts = ["    return 2 * x\n", "return 2 * x\n"]
    monkeypatch.setattr(written, "generate", lambda *_, **__: texts)
    asked = [Example(i, {}, truth=Written("p", "    return 2 * x", HUMAN)) for i in range(2)]
    scores, rows = written.write_and_score(nn.Identity(), None, asked, execute_code=True)
    assert scores["pass_at_1"] == 0.5
    assert scores["exact_match"] == 1.0
    assert rows[0]["prediction"] == "return 2 * x"


def test_a_task_without_answers_has_nothing_to_write(
    tiny_llama: Path, tmp_path: Path, write_rows: Writer
):
    rows = write_rows([{"text": "some words"}] * 3)
    with pytest.raises(RecipeError, match="no answers"):
        qft.evaluate(str(tiny_llama), data=str(rows), task="text", generate=True)


def test_an_encoder_decoder_writes_too(tiny_t5: Path, write_rows: Writer):
    rows: list[dict[str, Any]] = [{"source": f"a {i}", "target": f"b {i}"} for i in range(3)]
    found = qft.evaluate(str(tiny_t5), data=str(write_rows(rows)), generate=True, max_new_tokens=4)
    assert {"bleu", "chrf", "rouge_l", "loss"} <= set(found)
