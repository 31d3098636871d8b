"""A student's loss and gradients against those written out in float64, for every kind of task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qft.data.examples import Example
from qft.data.tasks import TASKS, Task
from qft.distillation.distilled_loss import DistilledLoss
from qft.distillation.live import LiveTeacher
from qft.distillation.matching import add_projections, layer_pairs, projections_of
from qft.distillation.objective import DistillSettings
from qft.distillation.teachers import OpenTeacher, class_order, shared_tokens
from qft.errors import RecipeError
from qft.lean.model_loss import install_model_loss
from qft.preparation import prepare
from qft.registry import build_strategy
from qft.step import LOOSE, Layout, accumulate_gradients
from qft.strategy import Context
from qft.task_loss import TaskLoss

LENGTHS = (17, 5, 12, 9)


def text_examples(shifted: bool = True) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(4, 100, (length,), generator=generator).tolist()
        labels = [-100] * (length // 3) + ids[length // 3 :]
        if not shifted:  # a translation: another length than what is read
            labels = torch.randint(4, 100, (length // 2 + 2,), generator=generator).tolist()
        made.append(Example(index, {"input_ids": ids, "labels": labels}))
    return made


def decoder(seed: int, layers: int = 2, width: int = 32, vocabulary: int = 100) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).double().eval()


def translator(seed: int, layers: int = 2, width: int = 32) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=100, d_model=width, d_kv=8, d_ff=64, num_layers=layers, num_heads=4,
        num_decoder_layers=layers, dropout_rate=0.0, pad_token_id=0, decoder_start_token_id=0,
        initializer_factor=3.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).double().eval()


def encoder(kind: str, seed: int, layers: int = 2, width: int = 32, **changes: Any) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=width, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, initializer_range=0.3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, **changes,
    )  # fmt: skip
    model: nn.Module = getattr(transformers, f"BertFor{kind}")(config)
    return model.double().eval()


def live(
    teacher: nn.Module, task: Task, settings: DistillSettings, layers: Any = (), shared: Any = None
) -> LiveTeacher:
    loss = install_model_loss(teacher) if task.predicts == "tokens" else None
    opened = OpenTeacher(teacher.requires_grad_(False), None, loss, shared, None)
    return LiveTeacher(opened, task, 0, settings, layers)


def settings(**changes: Any) -> DistillSettings:
    return DistillSettings(teacher="none", cache="off", **changes)


def gradients_of(
    student: nn.Module,
    teacher: nn.Module,
    task: Task,
    examples: list[Example],
    chosen: DistillSettings,
    *,
    micro_batch: int = 2,
    layout: Layout = LOOSE,
    strategy: dict[str, Any] | None = None,
    pairs: dict[int, int] | None = None,
    shared: int | None = None,
    labels_are: str = "one",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Through the very step that training takes."""
    model = student
    if strategy is not None or task.predicts == "tokens":
        model = prepare(student, build_strategy(strategy or {"name": "full"}))
    else:
        student.train()
    loss = DistilledLoss(
        TaskLoss(), chosen, live(teacher, task, chosen, (pairs or {}).values(), shared), task,
        model, pairs or {}, labels_are,
    )  # fmt: skip
    model.zero_grad(set_to_none=True)
    result = accumulate_gradients(
        model, examples, task, step=1, micro_batch=micro_batch, pad_token_id=0, loss=loss,
        layout=layout,
    )  # fmt: skip
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return result.loss, found


def kl(s: Tensor, t: Tensor) -> Tensor:
    """Teacher's and student's logits, the last dimension over the choices."""
    return (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1)


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert any(bool(gradient.any()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        # transformers' own norms compute in float32, whatever the model's type
        share = (found[name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
        assert float(share) < 1e-6, name


def plain_texts(
    student: nn.Module,
    teacher: nn.Module,
    examples: list[Example],
    term: Callable[[Tensor, Tensor, Tensor], Tensor],
    shifted: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One example after another, with all logits of both models."""
    student.zero_grad(set_to_none=True)
    sums: Any = 0.0
    count = 0
    for example in examples:
        ids = torch.tensor([example.inputs["input_ids"]])
        labels = torch.tensor([example.inputs["labels"]])
        extra = {} if shifted else {"labels": labels}
        s, t = (model(input_ids=ids, **extra).logits[0] for model in (student, teacher))
        targets = labels[0]
        if shifted:
            s, t, targets = s[:-1], t[:-1].detach(), targets[1:]
        kept = targets != -100
        sums = sums + term(s[kept], t[kept].detach(), targets[kept]).sum()
        count += int(kept.sum())
    (sums / count).backward()
    return (sums / count).detach(), {
        n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None
    }


def half_and_half(s: Tensor, t: Tensor, targets: Tensor) -> Tensor:
    cross = functional.cross_entropy(s, targets, reduction="none")
    return 0.3 * cross + 0.7 * 4 * kl(s / 2, t / 2)


@pytest.mark.parametrize("layout", ["loose", "flat", "packed", "grouped"])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_texts_however_they_are_put_into_rows(layout: str, micro_batch: int):
    rows = {"loose": LOOSE, "flat": Layout(flat=True), "packed": Layout(pack_to=24),
            "grouped": Layout(grouped=True)}[layout]  # fmt: skip
    teacher = decoder(1, layers=3, width=48)
    loss, wanted = plain_texts(decoder(0), teacher, text_examples(), half_and_half)
    found = gradients_of(
        decoder(0), teacher, TASKS["instruct"], text_examples(),
        settings(weight=0.7, temperature=2.0), micro_batch=micro_batch, layout=rows, shared=100,
    )  # fmt: skip
    assert float(found[0]) == pytest.approx(float(loss), rel=1e-6)
    close(found[1], wanted)


def test_the_teacher_alone_without_the_labels():
    teacher = decoder(1)
    _, wanted = plain_texts(decoder(0), teacher, text_examples(), lambda s, t, targets: kl(s, t))
    found = gradients_of(
        decoder(0), teacher, TASKS["text"], text_examples(), settings(weight=1.0), shared=100
    )
    close(found[1], wanted)


def test_a_teacher_whose_vocabulary_is_padded():
    teacher = decoder(1, vocabulary=128)
    _, wanted = plain_texts(
        decoder(0), teacher, text_examples(), lambda s, t, targets: kl(s[:, :90], t[:, :90])
    )
    found = gradients_of(
        decoder(0), teacher, TASKS["text"], text_examples(), settings(weight=1.0), shared=90
    )
    close(found[1], wanted)


def test_two_halves():
    teacher = translator(1, layers=3)
    examples = text_examples(shifted=False)
    loss, wanted = plain_texts(translator(0), teacher, examples, half_and_half, shifted=False)
    found = gradients_of(
        translator(0), teacher, TASKS["seq2seq"], examples,
        settings(weight=0.7, temperature=2.0), shared=100,
    )  # fmt: skip
    assert float(found[0]) == pytest.approx(float(loss), rel=1e-6)
    close(found[1], wanted)


@pytest.mark.parametrize("strategy", ["lora", "prefix", "prompt", "full"])
def test_every_strategy_sees_its_teacher(strategy: str):
    """Checkpointing, prefixes before each row and adapters change nothing about the positions."""
    entry: dict[str, Any] = {"name": strategy}
    if strategy == "lora":
        entry |= {"rank": 4}
    results = []
    for micro_batch in (1, 4):
        torch.manual_seed(0)
        student = decoder(0).float()
        results.append(
            gradients_of(
                student, decoder(1, layers=3).float(), TASKS["instruct"], text_examples(),
                settings(hidden={"projection": "fixed"}), micro_batch=micro_batch,
                strategy=entry, shared=100, pairs={0: 0, 1: 2},
            )
        )  # fmt: skip
    assert float(results[0][0]) == pytest.approx(float(results[1][0]), rel=1e-5)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-3, atol=2e-6, msg=name)


# --- heads


def head_examples(kind: str) -> list[Example]:
    made = []
    for example in text_examples():
        length = len(example.inputs["input_ids"])
        labels: Any = {
            "one": example.index % 3,
            "many": [float(example.index % 2), 1.0, 0.0],
            "number": 0.5 * example.index,
            "tags": [-100 if n % 3 == 0 else n % 3 for n in range(length)],
            "span": [1, length - 2],
        }[kind]
        made.append(replace(example, inputs={**example.inputs, "labels": labels}))
    return made


HEADS = {
    "one": ("classify", "SequenceClassification", {"num_labels": 3}),
    "many": ("classify", "SequenceClassification",
             {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "number": ("classify", "SequenceClassification",
               {"num_labels": 1, "problem_type": "regression"}),
    "tags": ("token", "TokenClassification", {"num_labels": 3}),
    "span": ("extract", "QuestionAnswering", {}),
}  # fmt: skip


def plain_head(kind: str, student: nn.Module, teacher: nn.Module) -> tuple[Tensor, Any]:
    student.zero_grad(set_to_none=True)
    sums: Any = 0.0
    count = 0
    for example in head_examples(kind):
        ids, labels = torch.tensor([example.inputs["input_ids"]]), example.inputs["labels"]
        s, t = student(input_ids=ids), teacher(input_ids=ids)
        if kind == "span":
            ends = [(o.start_logits[0], o.end_logits[0]) for o in (s, t)]
            own = sum(
                functional.cross_entropy(end[None], torch.tensor([place])) / 2
                for end, place in zip(ends[0], labels, strict=True)
            )
            soft = sum(kl(a / 2, b.detach() / 2) * 4 / 2 for a, b in zip(*ends, strict=True))
        else:
            a, b = s.logits[0], t.logits[0].detach()
            targets = torch.tensor(labels)
            if kind == "tags":
                kept = targets != -100
                a, b, targets = a[kept], b[kept], targets[kept]
            if kind in ("one", "tags"):
                own = functional.cross_entropy(a, targets, reduction="sum")
                soft = (kl(a / 2, b / 2) * 4).sum()
            elif kind == "many":
                own = functional.binary_cross_entropy_with_logits(a, targets.double())
                p, q = (a / 2).sigmoid(), (b / 2).sigmoid()
                coins = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
                soft = coins.mean() * 4
            else:
                own, soft = (a - targets.double()).square().sum(), (a - b).square().sum()
        items = int((torch.tensor(labels) != -100).sum()) if kind == "tags" else 1
        sums, count = sums + 0.4 * own + 0.6 * soft, count + items
    (sums / count).backward()
    return sums / count, {
        n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("kind", list(HEADS))
def test_soft_labels(kind: str):
    task, head, changes = HEADS[kind]
    teacher = encoder(head, 1, layers=3, width=48, **changes)
    loss, wanted = plain_head(kind, encoder(head, 0, **changes), teacher)
    found = gradients_of(
        encoder(head, 0, **changes), teacher, TASKS[task], head_examples(kind),
        settings(weight=0.6, temperature=2.0),
        micro_batch=1 if kind == "span" else 2,  # transformers' own loss of a span sees padding
        labels_are=kind if kind in ("many", "number") else "one",
    )  # fmt: skip
    assert float(found[0]) == pytest.approx(float(loss), rel=1e-6)
    close(found[1], wanted)


@pytest.mark.parametrize("loss", ["reverse-kl", "jsd"])
def test_other_divergences_of_heads(loss: Any):
    from qft.distillation.heads import soft_label_losses

    torch.manual_seed(0)
    s, t = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    found = soft_label_losses(s, t, settings(loss=loss, beta=0.3))
    p, q = s.softmax(1), t.softmax(1)
    m = 0.3 * q + 0.7 * p
    wanted = (p * (p / q).log()).sum(1)
    if loss == "jsd":
        wanted = 0.3 * (q * (q / m).log()).sum(1) + 0.7 * (p * (p / m).log()).sum(1)
    torch.testing.assert_close(found, wanted)


# --- hidden states


@pytest.mark.parametrize("distance", ["cosine", "mse"])
@pytest.mark.parametrize("projection", ["learned", "fixed"])
@pytest.mark.parametrize("tokens", ["supervised", "all"])
def test_hidden_states(distance: Any, projection: Any, tokens: Any, monkeypatch: Any):
    teacher, pairs = decoder(1, layers=3, width=48), {0: 1, 1: 2}
    chosen = settings(
        loss="none",
        hidden={"distance": distance, "projection": projection, "tokens": tokens, "weight": 2.0},
    )

    def student() -> nn.Module:
        from qft.distillation import matching
        from qft.distillation.teachers import TeacherShape

        model = decoder(0)
        monkeypatch.setattr(matching, "teacher_shape", lambda *_: TeacherShape(3, 48, 1))
        add_projections(
            model, chosen.model_copy(update={"hidden": chosen.hidden.model_copy(
                update={"layers": pairs})}), Context(),
        )  # fmt: skip
        return model.double()

    plain = student()
    learned = projections_of(plain)
    assert learned is not None
    total: Any = 0.0
    count = 0
    for example in text_examples():
        ids = torch.tensor([example.inputs["input_ids"]])
        labels = torch.tensor(example.inputs["labels"])[1:]
        kept = labels != -100
        states = [m(input_ids=ids, output_hidden_states=True) for m in (plain, teacher)]
        cross = functional.cross_entropy(states[0].logits[0, :-1][kept], labels[kept],
                                         reduction="sum")  # fmt: skip
        terms = []
        for mine, theirs in pairs.items():
            # transformers norms the last one; the layer's own output is wanted
            s, t = (caught(m, ids, n) for m, n in ((plain, mine), (teacher, theirs)))
            if tokens == "supervised":
                s, t = s[:-1][kept], t[:-1][kept]
            s = learned[str(mine)](s)
            far = (s - t).square().mean(1) if distance == "mse" else (
                1 - (s * t).sum(1) / s.norm(dim=1) / t.norm(dim=1)
            )  # fmt: skip
            terms.append(far.mean() * int(kept.sum()))
        total = total + cross + 2.0 * sum(terms) / len(pairs)
        count += int(kept.sum())
    (total / count).backward()
    wanted = {n: p.grad.clone() for n, p in plain.named_parameters() if p.grad is not None}
    found = gradients_of(
        student(), teacher, TASKS["instruct"], text_examples(), chosen, micro_batch=3, pairs=pairs,
        shared=100,
    )  # fmt: skip
    assert float(found[0]) == pytest.approx(float(total / count), rel=1e-6)
    close(found[1], wanted)
    trained = [name for name in wanted if "projections" in name]
    assert len(trained) == (2 if projection == "learned" else 0)


def caught(model: nn.Module, ids: Tensor, number: int) -> Tensor:
    """A layer's own output for one text, ``[tokens, width]``."""
    held: list[Tensor] = []
    layer = model.model.layers[number]  # type: ignore[union-attr, index]
    hook = layer.register_forward_hook(
        lambda module, args, out: held.append(out[0] if isinstance(out, tuple) else out)
    )
    model(input_ids=ids)
    hook.remove()
    return held[0][0]


def test_hidden_states_of_both_halves_and_of_classifiers():
    """The loss is the same however the examples are split: only the right positions count."""
    cases = [
        (translator, TASKS["seq2seq"], text_examples(shifted=False), {0: 0, 3: 3}),
        (lambda seed: encoder("SequenceClassification", seed, num_labels=3), TASKS["classify"],
         head_examples("one"), {1: 1}),
    ]  # fmt: skip
    for make, task, examples, pairs in cases:
        losses = [
            gradients_of(
                make(0), make(1), task, examples, settings(hidden={"projection": "fixed"}),
                micro_batch=count, pairs=pairs, shared=100,
            )[0]
            for count in (1, 4)
        ]  # fmt: skip
        assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)


def test_which_layer_learns_from_which():
    assert layer_pairs("auto", 3, 6) == {0: 1, 1: 3, 2: 5}
    assert layer_pairs("auto", 4, 4) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert layer_pairs("last", 3, 12) == {2: 11}
    with pytest.raises(RecipeError, match="no such layer"):
        layer_pairs({3: 1}, 3, 12)


# --- what does not belong together


class Vocabulary:
    def __init__(self, *tokens: str) -> None:
        self._tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self._tokens)}


def test_vocabularies_that_differ_by_padding_or_additions_are_matched():
    assert shared_tokens(Vocabulary(*"abc"), Vocabulary(*"abc"), (128, 160)) == 3
    assert shared_tokens(Vocabulary(*"abcde"), Vocabulary(*"abc"), (8, 8)) == 3
    for other in ("abd", "acb", "xbc"):
        with pytest.raises(RecipeError, match="same tokens"):
            shared_tokens(Vocabulary(*"abc"), Vocabulary(*other), (8, 8))


def test_classes_are_matched_by_name():
    assert class_order(("no", "yes"), ("no", "yes")) is None
    assert class_order(("no", "yes"), ("LABEL_0", "LABEL_1")) is None
    assert class_order(("no", "yes"), ("yes", "no")) == (1, 0)
    with pytest.raises(RecipeError, match="different classes"):
        class_order(("no", "yes"), ("no", "yes", "maybe"))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"loss": "none"}, "nothing to learn"),
        ({"loss": "uld", "temperature": 2.0}, "uld"),
        ({"loss": "jsd", "cache": "samples"}, "without bias"),
        ({"on_policy": 0.5, "cache": "top-k"}, "cache: off"),
        ({"hidden": {"layers": {-1: 1}}}, "count from 0"),
        ({"student": "distill"}, "student"),
    ],
)
def test_settings_that_make_no_sense(entry: dict[str, Any], says: str):
    with pytest.raises(RecipeError, match=says):
        build_strategy({"name": "distill", "teacher": "x", "student": "lora", **entry})


def test_a_stack_has_one_teacher_around_it():
    with pytest.raises(RecipeError, match="whole stack"):
        build_strategy({"name": "stack", "of": ["bitfit", {
            "name": "distill", "teacher": "x", "student": "lora"}]})  # fmt: skip


def test_what_is_handed_over_is_the_students(tiny_llama: Path):
    strategy = build_strategy(
        {"name": "distill", "teacher": str(tiny_llama), "student": {"name": "lora", "rank": 2}}
    )
    assert strategy.handed_over.name == "lora"
    assert strategy.mergeable
    assert strategy.objective.kind == "distill"
