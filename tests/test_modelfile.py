"""Ollama's Modelfile: its template says what the tokenizer's does, and no text breaks out of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers as templates
import small_vocabularies as small
from small_tokenizers import with_template

from qft.data.conversations import CONVERSATIONS
from qft.data.template import render
from qft.errors import ModelError
from qft.gguf.modelfile import go_template, literal, modelfile
from qft.gguf.turns import Turns, turns_of

TURNS = [messages for _, messages, prompt in CONVERSATIONS if prompt]
SPECIALS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>")


# --- as much of Go's templates as Ollama's need

_ACTION = re.compile(r'\{\{((?:"(?:[^"\\]|\\.)*"|[^"}]|\}(?!\}))*)\}\}')


def go(template: str, messages: list[dict[str, str]]) -> str:
    """Runs a template on a conversation, as Ollama hands it over."""
    parts: list[tuple[bool, str]] = []
    at = 0
    for found in _ACTION.finditer(template):
        parts += [(False, template[at : found.start()]), (True, found.group(1).strip())]
        at = found.end()
    parts.append((False, template[at:]))
    assert not any("{{" in text for action, text in parts if not action)
    system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
    out, rest = _block(parts, {"System": system, "Messages": messages}, run=True)
    assert rest == []
    return out


def _block(parts: Any, scope: dict[str, Any], *, run: bool) -> tuple[str, Any]:
    """Up to the `else` or `end` that closes this block; what follows begins with it."""
    out = ""
    while parts:
        action, text = parts[0]
        if not action:
            out, parts = out + (text if run else ""), parts[1:]
        elif text == "end" or text.startswith("else"):
            return out, parts
        elif text.startswith("if "):
            made, parts = _if(text[3:], parts[1:], scope, run)
            out += made
        elif text.startswith("range "):
            made, after = "", parts
            for number, message in enumerate(scope["Messages"]):
                inner = {**scope, "i": number, "m": message}
                one, after = _block(parts[1:], inner, run=run)
                made += one
            out, parts = out + made, after[1:]
        else:
            out, parts = out + (_value(text, scope) if run else ""), parts[1:]
    return out, parts


def _if(test: str, parts: Any, scope: dict[str, Any], run: bool) -> tuple[str, Any]:
    holds = run and bool(_value(test, scope))
    out, parts = _block(parts, scope, run=holds)
    text = parts[0][1]
    if text.startswith("else if "):
        other, parts = _if(text[8:], parts[1:], scope, run and not holds)
        return out + other, parts
    if text == "else":
        other, parts = _block(parts[1:], scope, run=run and not holds)
        out += other
    assert parts[0][1] == "end"
    return out, parts[1:]


def _value(text: str, scope: dict[str, Any]) -> Any:
    if text == "eq (len (slice $.Messages $i)) 1":
        return scope["i"] == len(scope["Messages"]) - 1
    if found := re.fullmatch(r'eq \$m\.Role ("\w+")', text):
        return scope["m"]["role"] == json.loads(found.group(1))
    if text.startswith('"'):
        return json.loads(text)
    return {"$m.Content": lambda: scope["m"]["content"], ".System": lambda: scope["System"]}[text]()


# --- templates


def chat(template: str) -> Any:
    return with_template(small.byte_level(specials=SPECIALS, bos="<s>", eos="</s>"), template)


@pytest.mark.parametrize("name", ["CHATML", "ZEPHYR", "MISTRAL", "VICUNA", "DEEPSEEK", "GRANITE",
                                  "PHI3", "LLAMA3", "LLAMA2", "GEMMA", "COMMAND_R"])  # fmt: skip
def test_the_template_says_the_same(name: str) -> None:
    tokenizer = chat(getattr(templates, name))
    turns = turns_of(tokenizer, "<s>")
    assert turns is not None
    written = go_template(turns)
    for messages in TURNS:
        if messages[0]["role"] == "system" and turns.system is None:
            continue
        shown = [{**m, "content": m["content"].strip()} if m["role"] in turns.trims else m
                 for m in messages]  # fmt: skip
        wanted = render(tokenizer, messages, add_generation_prompt=True).removeprefix("<s>")
        assert go(written, shown) == turns.render(shown) == wanted
    assert (turns.system is None) == (name == "GEMMA")
    assert bool(turns.trims) == (name in ("LLAMA3", "LLAMA2", "GEMMA", "COMMAND_R"))


def test_a_conversation_that_ends_in_an_answer_is_left_open() -> None:
    turns = turns_of(chat(templates.CHATML))
    assert turns is not None
    messages = CONVERSATIONS[0][1]
    whole = render(chat(templates.CHATML), messages)
    assert whole.startswith(go(go_template(turns), messages))
    assert whole.removeprefix(go(go_template(turns), messages)) == "<|im_end|>\n"


@pytest.mark.parametrize("template", [
    templates.FORGETS_THOUGHTS.replace("loop.last", "loop.index > 2"),
    templates.CHATML.replace("message['content']", "message['content'] | upper"),
    templates.CHATML.replace("message['content']", "message['content'] + message['content']"),
    "{{ raise_exception('no') }}", "{% for", "{{ messages | length }}",
    templates.CHATML.replace("'<|im_end|>'", "(loop.index | string)"),
])  # fmt: skip
def test_a_template_that_does_more_is_left_out(template: str) -> None:
    notes: list[str] = []
    text = modelfile("./m.gguf", chat(template), notes=notes)
    assert turns_of(chat(template)) is None
    assert 'TEMPLATE "' not in text
    assert "more than to put text around messages" in notes[0]


NASTY = 'a """ b {{ .System }} }} {{- "x" -}} {{{ "" \r \x07 \\ {% x %} \u2028 🙂"'


def test_no_text_of_a_template_means_anything_to_go() -> None:
    for text in (NASTY, NASTY[::-1], '"', '""', "{", "{{", '"""', "}", "-", "{ \\"):
        turns = Turns(text, (text, text), text, text, text)
        written = go_template(turns)
        for messages in TURNS:
            assert go(written, messages) == turns.render(messages)
        inside = f'TEMPLATE """{written}"""'
        assert inside.count('"""') == 2
        assert "\r" not in literal(text)


def test_a_nasty_template_of_a_tokenizer() -> None:
    around = json.dumps('""" \nPARAMETER temperature 9\nFROM /etc/passwd {{ .System }} "')
    tokenizer = chat(templates.CHATML.replace("'<|im_start|>'", around))
    text = modelfile("./m.gguf", tokenizer)
    assert text.count('"""') == 2
    body = text.partition('TEMPLATE """')[2].partition('"""')
    assert body[2].strip() == ""  # nothing of the template's stands outside its quotes
    for messages in TURNS:
        assert go(body[0], messages) == render(tokenizer, messages, add_generation_prompt=True
                                               ).removeprefix("<s>")  # fmt: skip


# --- the rest of the file


def test_the_whole_file() -> None:
    tokenizer = chat(templates.CHATML)
    settings = {"temperature": 0.7, "top_k": 20.0, "top_p": 0.8, "repetition_penalty": 1.1,
                "min_p": float("nan"), "max_length": 3}  # fmt: skip
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>", "<|im_end|>"])
    text = modelfile("./m.gguf", tokenizer, settings, stops=stops, context=131072)
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """')
    assert text.partition('"""\n')[2].splitlines() == [
        'PARAMETER stop "<|im_end|>"', 'PARAMETER stop "</s>"', "PARAMETER num_ctx 8192",
        "PARAMETER temperature 0.7", "PARAMETER top_p 0.8", "PARAMETER top_k 20",
        "PARAMETER repeat_penalty 1.1",
    ]  # fmt: skip
    greedy = modelfile("./m.gguf", small.byte_level(), {"do_sample": False, "temperature": 0.7},
                       context=512, adapter="./lora.gguf")  # fmt: skip
    assert greedy.splitlines() == ["FROM ./m.gguf", "ADAPTER ./lora.gguf",
                                   "PARAMETER num_ctx 512", "PARAMETER temperature 0"]  # fmt: skip


def test_a_stop_token_that_cannot_be_quoted_is_left_out() -> None:
    names = ('<a"b>', '<x"""\nFROM /y>', '"<q>', "<line\nbreak>", "<|ok|>")
    tokenizer = small.byte_level(specials=("<|endoftext|>", *names))
    notes: list[str] = []
    text = modelfile("./m.gguf", tokenizer, notes=notes,
                     stops=tokenizer.convert_tokens_to_ids(list(names)))  # fmt: skip
    kept = [line for line in text.splitlines() if not line.startswith("#")]
    assert kept == ["FROM ./m.gguf", 'PARAMETER stop """<a"b>"""', 'PARAMETER stop "<|ok|>"']
    assert len(notes) == 3
    assert all("cannot be quoted" in note for note in notes)


@pytest.mark.parametrize("path", ["/etc/x.gguf", "./a b.gguf", "./a\nFROM b", "m.gguf", "./../m"])
def test_only_plain_names_beside_it(path: str) -> None:
    with pytest.raises(ModelError, match="plain names"):
        modelfile(path, small.byte_level())


def test_it_lies_beside_an_export(assets: Path, tmp_path: Path) -> None:
    from qft import models
    from qft.export.formats import write_format
    from qft.merging.merge import open_source

    folder = assets / "models" / "mini-6m"
    source = open_source(folder, models.open_skeleton(folder, models.ModelSpec("")))
    write_format(source, "gguf:q8_0", tmp_path / "out")
    text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./model-q8_0.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "<|im_start|>assistant" in text
