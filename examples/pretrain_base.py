"""Trains the demo's base model from scratch, from text every Python installation has.

The text is the standard library's sources, less the modules of the demo's own task, their tests
and their copies (`qft.demo.docstrings.LEFT_OUT`): what the demo later teaches by fine-tuning, this
model has not read. About a tenth of the tokens are chats about something else (a function's first
lines, answered by its next lines), so that the chat tokens mean something before fine-tuning.

    python examples/pretrain_base.py --out base --minutes 50

The learning rate follows the share of `--minutes` that has passed, so the run ends on time on any
machine, having seen as many tokens as the machine could read. `training.json` in the folder says
what came out, beside what `gzip -9` and plain byte frequencies make of the same held-out files.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import math
import os
import platform
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qft.demo.docstrings import LEFT_OUT, pretraining_documents

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
END_OF_TEXT, CHAT_START, CHAT_END, PADDING = SPECIAL_TOKENS
VOCABULARY = 3072
CONTEXT = 512
CHAT_SHARE = 0.1
HELD_OUT_PERCENT = 3
# Qwen2's pre-tokenizer to the letter: llama.cpp then knows this tokenizer by the name `qwen2`.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# ChatML, without generation marks: other runtimes' template engines do not know them.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- endif -%}"
)


@dataclass
class Settings:
    """What the measurements on two CPU cores came out for."""

    batch_tokens: int = 8192
    short_sequence: int = 256
    short_until: float = 0.75  # share of the time in short sequences: attention is cheaper there
    matrix_learning_rate: float = 0.02
    other_learning_rate: float = 3e-3
    warmup: float = 0.02


@dataclass
class Text:
    """Documents by path, split by a hash of the path."""

    train: dict[str, str] = field(default_factory=dict)
    held_out: dict[str, str] = field(default_factory=dict)
    cut_passages: int = 0


def read_text() -> Text:
    """Reads the pretraining documents and sets about 3 % of the files aside."""
    documents, cuts = pretraining_documents()
    text = Text(cut_passages=cuts)
    for name, content in documents.items():
        bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100
        (text.held_out if bucket < HELD_OUT_PERCENT else text.train)[name] = content
    return text


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Trains byte-level BPE behind Qwen2's pre-tokenizer."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=CHAT_END,
        pad_token=PADDING,
        additional_special_tokens=[END_OF_TEXT, CHAT_START],
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def continuation_chats(documents: dict[str, str], seed: int) -> list[list[dict[str, str]]]:
    """Chats for the chat tokens' sake: a function's first lines, answered by the few that follow.

    This is not the demo's task: nothing asks for a description, and the answers are code as it
    stands in the file.
    """
    dice = random.Random(seed)
    chats = []
    for content in documents.values():
        lines = content.splitlines()
        for start, end in _function_spans(content):
            middle = start + dice.randint(2, 6)
            answer = lines[middle : min(middle + dice.randint(1, 4), end)]
            if any(line.strip() for line in answer):
                turns = (("user", lines[start:middle]), ("assistant", answer))
                chats.append(
                    [{"role": role, "content": "\n".join(part).strip("\n")} for role, part in turns]
                )
    dice.shuffle(chats)
    return chats


def _function_spans(content: str) -> list[tuple[int, int]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return []
    return [
        (node.lineno - 1, node.end_lineno or node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def tokenize(tokenizer: PreTrainedTokenizerFast, text: Text, seed: int) -> list[torch.Tensor]:
    """Tokenizes the documents, and chats up to their share of all tokens; all end with the end."""
    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    encode = tokenizer.backend_tokenizer.encode_batch
    encodings = encode(list(text.train.values()))
    pieces = [torch.tensor([*encoding.ids, end], dtype=torch.int16) for encoding in encodings]
    wanted = sum(map(len, pieces)) * CHAT_SHARE / (1 - CHAT_SHARE)
    chats = continuation_chats(text.train, seed)
    rendered = [str(tokenizer.apply_chat_template(chat, tokenize=False)) for chat in chats]
    for encoding in encode(rendered):
        if wanted <= 0:
            break
        pieces.append(torch.tensor([*encoding.ids, end], dtype=torch.int16))
        wanted -= len(encoding.ids) + 1
    return pieces


class Batches:
    """Endless batches of packed sequences, in a new order every epoch.

    Pieces are shuffled and packed, and then the sequences are shuffled once more: a long file fills
    dozens of sequences, and a batch made of one file teaches that file, not the language.
    """

    def __init__(self, pieces: list[torch.Tensor], batch_tokens: int, seed: int) -> None:
        self.pieces, self.batch_tokens, self.dice = pieces, batch_tokens, random.Random(seed)
        self.sequences = torch.empty(0, 0, dtype=torch.int16)

    def next(self, length: int) -> torch.Tensor:
        """Returns token ids of shape (batch, length + 1)."""
        count = self.batch_tokens // length
        if self.sequences.shape[1] != length + 1 or len(self.sequences) < count:
            stream = torch.cat(self.dice.sample(self.pieces, len(self.pieces)))
            whole = len(stream) // (length + 1)
            if whole < count:
                raise ValueError(f"{len(stream)} tokens do not fill one batch of {count} sequences")
            order = torch.tensor(self.dice.sample(range(whole), whole))
            self.sequences = stream[: whole * (length + 1)].view(whole, length + 1)[order]
        batch, self.sequences = self.sequences[:count], self.sequences[count:]
        return batch.long()


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 3.7 million parameters, in fp32 with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the embedding (tied with the head) and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    muon = torch.optim.Muon(matrices, lr=settings.matrix_learning_rate, weight_decay=0.05)
    adamw = torch.optim.AdamW(
        others, lr=settings.other_learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    for optimizer in (muon, adamw):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adamw]


def schedule(share: float, warmup: float) -> float:
    """Linear warm-up, then linear decay to zero, over the share of the time that has passed."""
    return min(1.0, share / warmup) * max(0.0, min(1.0, (1 - share) / (1 - warmup)))


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy in nats."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@dataclass
class Progress:
    """What the run has come to so far."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    resumed_at_minutes: list[float] = field(default_factory=list)


Loss = Callable[[LlamaForCausalLM, torch.Tensor], torch.Tensor]


def compiled_loss(model: LlamaForCausalLM, settings: Settings) -> Loss:
    """`loss_of`, compiled for both lengths ahead of the clock: on a CPU, 1.5 times as fast."""
    compiled: Loss = torch.compile(loss_of, dynamic=False)
    for length in (settings.short_sequence, CONTEXT):
        count = settings.batch_tokens // length
        batch = torch.zeros(count, length + 1, dtype=torch.long, device=model.device)
        compiled(model, batch).backward()
        print(f"compiled for sequences of {length}", flush=True)
    model.zero_grad(set_to_none=True)
    return compiled


def train(
    model: LlamaForCausalLM,
    batches: Batches,
    settings: Settings,
    minutes: float,
    checkpoint: Path,
    compute_loss: Loss = loss_of,
    progress: Progress | None = None,
) -> Progress:
    """Trains until the time is over; notes about 30 losses, saves weights every ten minutes.

    With the `progress` of an earlier run it goes on from there. The optimizers start anew then, and
    so their first steps are small again.
    """
    device = model.device
    optimizers = make_optimizers(model, settings)
    progress = progress or Progress()
    recent: list[float] = []
    start = time.monotonic() - progress.seconds
    first_step, next_save = progress.steps, progress.seconds + 600.0
    next_point = progress.seconds / (60 * minutes)
    model.train()
    while (share := progress.seconds / (60 * minutes)) < 1:
        length = settings.short_sequence if share < settings.short_until else CONTEXT
        batch = batches.next(length).to(device)
        factor = schedule(max(share, 1e-3), settings.warmup)
        factor *= min(1.0, (progress.steps - first_step + 1) / 20)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
        loss = compute_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        recent.append(loss.item())
        progress.steps, progress.tokens = progress.steps + 1, progress.tokens + batch[:, 1:].numel()
        progress.seconds = time.monotonic() - start
        if progress.seconds / (60 * minutes) >= next_point:
            _log(progress, recent)
            recent, next_point = [], next_point + 1 / 30
        if progress.seconds >= next_save:
            next_save += 600.0
            save_checkpoint(checkpoint, model, progress)
    if recent:
        _log(progress, recent)
    return progress


def _log(progress: Progress, recent: list[float]) -> None:
    loss = sum(recent) / len(recent)
    point = {"minutes": progress.seconds / 60, "tokens": progress.tokens, "loss": loss}
    progress.curve.append({key: round(value, 4) for key, value in point.items()})
    rate = progress.tokens / max(progress.seconds, 1e-9)
    minutes = progress.seconds / 60
    print(
        f"{minutes:6.1f} min  step {progress.steps:5d}  {progress.tokens / 1e6:6.2f} M tokens  "
        f"{rate:6.0f} tokens/s  loss {loss:.4f}",
        flush=True,
    )


def save_checkpoint(folder: Path, model: LlamaForCausalLM, progress: Progress) -> None:
    """Writes weights and progress for `--resume`, in place of the last ones."""
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    (temporary / "progress.json").write_text(json.dumps(asdict(progress)), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    print(f"checkpoint: {folder.name}", flush=True)


def resume(folder: Path, model: LlamaForCausalLM) -> Progress:
    """Loads a checkpoint's weights into `model` and returns how far it had come."""
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.load_state_dict(saved.state_dict())
    progress = Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
    progress.resumed_at_minutes.append(round(progress.seconds / 60, 2))
    return progress


@torch.no_grad()
def model_bits(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[str]
) -> float:
    """Bits the model needs for whole documents and their ends, in windows that overlap by half.

    A document is predicted from the end-of-text token on; each token counts once, in the first
    window that holds it, and so has at least half a window before it where the document does.
    """
    model.eval()
    encode = tokenizer.backend_tokenizer.encode
    end, stride, nats = tokenizer.convert_tokens_to_ids(END_OF_TEXT), CONTEXT // 2, 0.0
    for document in documents:
        ids = torch.tensor([end, *encode(document).ids, end], device=model.device)
        for first in range(0, max(1, len(ids) - 1 - stride), stride):
            window = ids[first : first + CONTEXT + 1]
            logits = model(input_ids=window[None, :-1], use_cache=False).logits[0].float()
            new = 0 if first == 0 else CONTEXT - stride
            target = window[1 + new :]
            nats += functional.cross_entropy(logits[new:], target, reduction="sum").item()
    return nats / math.log(2)


def unigram_bits(train_texts: list[str], documents: list[str]) -> float:
    """Bits of the documents under byte frequencies of the training text (one added to each)."""
    counts: Counter[int] = Counter()
    for text in train_texts:
        counts.update(text.encode())
    total = sum(counts.values()) + 256
    held_out: Counter[int] = Counter()
    for text in documents:
        held_out.update(text.encode())
    return -sum(count * math.log2((counts[byte] + 1) / total) for byte, count in held_out.items())


def measure(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: Text
) -> dict[str, Any]:
    """Held-out bits per byte of the model as saved (bf16), of byte frequencies and of gzip."""
    held_out = list(text.held_out.values())
    joined = "".join(held_out).encode()
    bits = {
        "model": model_bits(model, tokenizer, held_out),
        "unigram": unigram_bits(list(text.train.values()), held_out),
        "gzip": 8 * len(gzip.compress(joined, compresslevel=9)),
    }
    return {
        "bits_per_byte": {name: round(value / len(joined), 4) for name, value in bits.items()},
        "held_out_bytes": len(joined),
        "held_out_files": len(held_out),
    }


def save(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict[str, Any]
) -> None:
    """Writes the folder under a temporary name and renames it: it is there whole or not at all."""
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_TEXT)],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "training.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for path in temporary.iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone; a package's files are for all
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the base model to")
    parser.add_argument("--minutes", type=float, default=50, help="training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="faster; needs a C++ compiler")
    parser.add_argument("--resume", action="store_true", help="go on from this --out's checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


def main() -> None:
    """Reads, trains, measures, saves."""
    arguments, settings = parse_arguments(), Settings()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    wanted = arguments.device
    device = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    text = read_text()
    tokenizer = train_tokenizer(list(text.train.values()))
    pieces = tokenize(tokenizer, text, arguments.seed)
    print(
        f"{len(text.train)} files to train on, {len(text.held_out)} held out, "
        f"{text.cut_passages} passages cut, {sum(map(len, pieces)) / 1e6:.2f} M tokens",
        flush=True,
    )
    model = build_model(tokenizer).to(device)  # type: ignore[arg-type]
    print(f"{model.num_parameters()} parameters on {device}", flush=True)
    batches = Batches(pieces, settings.batch_tokens, arguments.seed)
    checkpoint = Path(tempfile.gettempdir()) / f"{arguments.out.name}-checkpoint"
    model.train()
    compute_loss = compiled_loss(model, settings) if arguments.compile else loss_of
    progress = resume(checkpoint, model) if arguments.resume else None
    progress = train(
        model, batches, settings, arguments.minutes, checkpoint, compute_loss, progress
    )
    model = model.to(torch.bfloat16)
    facts = {
        **measure(model, tokenizer, text),
        "parameters": model.num_parameters(),
        "tokens_seen": progress.tokens,
        "tokens_in_text": sum(map(len, pieces)),
        "chat_share": CHAT_SHARE,
        "steps": progress.steps,
        "minutes": round(progress.seconds / 60, 2),
        "resumed_at_minutes": progress.resumed_at_minutes,
        "train_files": len(text.train),
        "train_bytes": sum(len(content.encode()) for content in text.train.values()),
        "cut_passages": text.cut_passages,
        "left_out_patterns": len(LEFT_OUT),
        "seed": arguments.seed,
        "threads": arguments.threads,
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "loss_curve": progress.curve,
    }
    save(arguments.out, model, tokenizer, facts)
    shutil.rmtree(checkpoint, ignore_errors=True)
    print(json.dumps({key: value for key, value in facts.items() if key != "loss_curve"}, indent=1))


if __name__ == "__main__":
    main()
