from __future__ import annotations

import copy
import threading

import pytest
import torch

from qft import generation
from qft.errors import DataError, RecipeError
from qft.generation import generate, stream_chat

PROMPTS = ["Hello", "A much longer prompt than the first", "x", "Once upon a time"]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def model(tiny_llama):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # varied words
    return model


def greedy(model, ids, count):
    """The likeliest tokens, without a cache."""
    ids = list(ids)
    start = len(ids)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 2:
                break
    return ids[start:]


def test_batches_equal_single_prompts_and_leave_the_prompt_out(model, tokenizer):
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=12, micro_batch=3)
    model.eval()
    expected = [greedy(model, tokenizer(prompt)["input_ids"], 12) for prompt in PROMPTS]
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert len(set(texts)) > 1


def test_chat_goes_through_the_template(model, tokenizer):
    prompt = "<|turn|>user: Hello</s>\n<|turn|>assistant: "
    expected = greedy(model.eval(), tokenizer(prompt, add_special_tokens=False)["input_ids"], 8)
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert generate(model, tokenizer, ["Hello"], chat=True, max_new_tokens=8) == [text]
    messages = [{"role": "user", "content": "Hello"}]
    assert generate(model, tokenizer, [messages], max_new_tokens=8) == [text]
    pieces = list(stream_chat(model, tokenizer, messages, max_new_tokens=8, temperature=0))
    assert "".join(pieces) == text


def test_each_prompt_shows_its_own_tools(model, tokenizer):
    from qft.data.examples import Example, Written
    from qft.written import write_and_score

    shows = copy.deepcopy(tokenizer)
    shows.chat_template = "{{ tools | tojson if tools else 'none' }}" + tokenizer.chat_template
    messages = [{"role": "user", "content": "Hello"}]
    tools = [{"type": "function", "function": {"name": "add"}}]
    seen = []

    def spy(*args, **settings):
        seen.append(settings["input_ids"])
        return type(model).generate(model, *args, **settings)

    model.generate = spy
    try:
        asked = [Example(i, {}, truth=Written(messages, "x", {}, t))
                 for i, t in enumerate((tools, None))]  # fmt: skip
        write_and_score(model, shows, asked, max_new_tokens=2, micro_batch=1)
    finally:
        del model.generate
    shorter, longer = (tokenizer.decode(ids[0]) for ids in seen)
    assert shorter.startswith("none<|turn|>")
    assert '"add"' in longer


def test_no_template(model, tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        generate(model, bare, ["Hello"], chat=True)
    plain = generate(model, bare, ["Hello"], max_new_tokens=6)[0]
    messages = [{"role": "user", "content": "Hello"}]
    pieces = stream_chat(model, bare, messages, max_new_tokens=6, temperature=0)
    assert "".join(pieces) == plain


def test_it_stops_at_the_models_and_the_tokenizers_and_the_templates_end(model, tokenizer):
    ids = greedy(model.eval(), tokenizer("Hello")["input_ids"], 12)
    stop = ids[4]
    until = tokenizer.decode(ids[: ids.index(stop) + 1], skip_special_tokens=True)
    whole = generate(model, tokenizer, ["Hello"], max_new_tokens=12)[0]
    assert whole != until
    model.generation_config.eos_token_id = [stop, 259]
    assert generate(model, tokenizer, ["Hello"], max_new_tokens=12) == [until]
    stops = generation._stop_tokens(model, tokenizer, chat=True)
    assert {stop, 259, tokenizer.eos_token_id} <= set(stops)


def test_the_templates_terminator_stops_a_chat(model, tokenizer):
    import copy

    changed = copy.deepcopy(tokenizer)
    changed.chat_template = changed.chat_template.replace("</s>", "<|turn|>")
    turn = changed.convert_tokens_to_ids("<|turn|>")
    assert turn in generation._stop_tokens(model, changed, chat=True)
    assert turn not in generation._stop_tokens(model, changed, chat=False)


def test_sampling_is_seeded_and_leaves_the_generator_alone(model, tokenizer):
    state = torch.get_rng_state()
    settings = {"max_new_tokens": 16, "temperature": 1.5}
    first = generate(model, tokenizer, PROMPTS, seed=1, **settings)
    assert generate(model, tokenizer, PROMPTS, seed=1, **settings) == first
    assert generate(model, tokenizer, PROMPTS, seed=2, **settings) != first
    narrow = generate(model, tokenizer, PROMPTS, seed=1, top_p=1e-6, **settings)
    assert narrow == generate(model, tokenizer, PROMPTS, max_new_tokens=16)
    messages = [{"role": "user", "content": "Hello"}]
    texts = [
        "".join(stream_chat(model, tokenizer, messages, seed=s, **settings)) for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_modes_are_given_back(model, tokenizer):
    model.train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    generate(model, tokenizer, ["x"], max_new_tokens=2)
    list(stream_chat(model, tokenizer, [{"role": "user", "content": "x"}], max_new_tokens=2))
    assert [module.training for module in model.modules()] == before


def test_a_reader_who_leaves_stops_the_model(model, tokenizer):
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    messages = [{"role": "user", "content": "Hello"}]
    threads = set(threading.enumerate())  # another test's may end meanwhile
    model.generation_config.eos_token_id = None
    stream = stream_chat(model, tokenizer, messages, max_new_tokens=5000, temperature=0)
    next(stream)
    stream.close()
    assert len(calls) < 2000
    assert not set(threading.enumerate()) - threads


def test_an_error_while_streaming_reaches_the_reader(model, tokenizer):
    def fail(*_):
        raise ArithmeticError("broken")

    model.lm_head.register_forward_hook(fail)
    stream = stream_chat(model, tokenizer, [{"role": "user", "content": "Hello"}])
    with pytest.raises(ArithmeticError, match="broken"):
        list(stream)


@pytest.mark.parametrize(
    "prompt, settings",
    [
        ("", {}),
        ("x", {"max_new_tokens": 0}),
        ("x", {"temperature": -1.0}),
        ("x", {"top_p": 0.0}),
    ],
)
def test_bad_settings(model, tokenizer, prompt, settings):
    with pytest.raises(RecipeError) as caught:
        generate(model, tokenizer, [prompt], **settings)
    assert caught.value.exit_code == 2


def test_mini_6m_has_learned_to_stop(assets):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = assets / "models" / "mini-6m"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompts = ["Translate to German: A dog runs on the grass.", "Hello"]
    texts = generate(model, tokenizer, prompts, chat=True, max_new_tokens=64)
    assert all(0 < len(text) < 200 and "<|" not in text for text in texts)
