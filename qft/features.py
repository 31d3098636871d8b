"""Whether a training's frozen trunk runs once only, and the training that goes on without it.

`cache_features` decides, fills what is missing of the cache (`qft.feature_store`), proves on a few
samples that the model says the same from it, and lets the trunk's weights leave memory. What speaks
against it is said, and the training goes on as without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qft import hardware
from qft.data.tasks import Example, ExampleSet, fingerprint, pad_id
from qft.errors import QftError, SaveError
from qft.evaluation import evaluating
from qft.feature_store import FeatureStore, Rows, differences, make_room
from qft.files import explain_write_errors, free_disk_bytes
from qft.inputs import Inputs
from qft.lean.cut_finding import NoCutError, find_cut
from qft.lean.feature_cache import Cut, Read, Recall
from qft.lean.model_parts import device_of
from qft.lean.trunk import Unloaded, own_bytes, tensors_hash
from qft.preparation import Prepared, inner_model, prepared
from qft.progress import Bar, Reporter, human_bytes
from qft.recipe import Recipe
from qft.step import announced, is_out_of_memory
from qft.strategy import Needs, Strategy

AUTO_BYTES = 4 * 2**30
_FORMAT = "1"
_PROBED = 3  # samples the two ways are compared on
_FILL_TOKENS = 2048  # a forward pass


@dataclass
class Features:
    """A model whose trunk is out of memory; it answers for the samples that were cached.

    Attributes:
        pooled: a sample is one row: a forward pass may hold many.
    """

    pooled: bool
    _recall: Recall
    _unloaded: Unloaded | None
    _train: Read
    _held_out: Read | None
    _stores: Sequence[FeatureStore]

    @contextlib.contextmanager
    def of_held_out(self) -> Iterator[None]:
        """Within it, announced samples are the held-out ones."""
        assert self._held_out is not None
        self._recall.read = self._held_out
        try:
            yield
        finally:
            self._recall.read = self._train

    def close(self) -> None:
        """The model is whole again, its trunk in memory."""
        if self._unloaded is not None:
            self._unloaded.restore()
        self._recall.remove()
        for store in self._stores:
            store.release()


class _OffError(Exception):
    """The cache stays off; the text says why."""


def cache_features(
    recipe: Recipe, model: nn.Module, inputs: Inputs, needs: Needs, reporter: Reporter
) -> Features | None:
    """Computes the trunk's output for all samples, and takes the trunk out of the model.

    Args:
        model: prepared, with all of its weights.
        needs: what the strategy said before it attached.

    Returns:
        None where the cache stays off.
    """
    bound = recipe.memory.feature_cache
    if bound == "off":
        return None
    job = _Job(recipe, model, inputs, reporter)
    try:
        cut = job.cut(needs)
        with explain_write_errors(job.root):
            return job.start(cut, AUTO_BYTES if bound == "auto" else int(bound))
    except NoCutError as error:
        # with most strategies everything trains, which is no news
        if error.everything and bound == "auto":
            return None
        hint = "; train.dropout: 0 makes it possible" if error.drops else ""
        reason = f"{error.reason}{hint}"
    except _OffError as error:
        reason = str(error)
    except SaveError as error:
        reason = f"{error.what} {error.found or ''}".strip()
    reporter.say(f"feature cache: off: {reason}")
    return None


class _Job:
    """One training's way to its features."""

    def __init__(self, recipe: Recipe, model: nn.Module, inputs: Inputs, say: Reporter) -> None:
        self.recipe, self.model, self.inputs, self.reporter = recipe, model, inputs, say
        self.inner: Any = inner_model(model)
        state = prepared(model)
        assert state is not None
        self.state: Prepared = state
        self.pad = pad_id(inputs.tokenizer)
        self.device = device_of(model)
        chosen = recipe.memory.feature_folder
        beside = Path(recipe.output).absolute().parent / "feature-cache"
        self.root = Path(chosen).expanduser() if chosen else beside

    # --- where

    def cut(self, needs: Needs) -> Cut:
        """The place to cut at.

        Raises:
            NoCutError: there is none, or the recipe forbids it.
        """
        inside = {id(parameter) for parameter in self.inner.parameters()}
        outside = [p for p in self.model.parameters() if p.requires_grad and id(p) not in inside]
        if outside or needs.extends_sequence:
            raise NoCutError("what trains enters below the lowest layer", everything=True)
        changing = type(self.recipe.strategy).after_step is not Strategy.after_step
        highest = needs.lowest_trainable_layer if changing else None
        probe = self._probe()
        found = find_cut(
            self.inner, lambda: self._run(probe), len(probe), highest=highest
        )
        if self.recipe.train.embedding_noise:
            raise NoCutError("train.embedding_noise changes what the layers below see")
        return found

    def _probe(self) -> list[Example]:
        """A few short samples, not all of the same length if there are such."""
        ordered = sorted(self.inputs.train.examples, key=lambda e: len(e.inputs["input_ids"]))
        chosen = [ordered[0], *ordered[len(ordered) // 2 :]][:_PROBED]
        return chosen if len(chosen) > 1 else chosen * 2

    def _run(self, examples: Sequence[Example]) -> Any:
        """A forward pass as a training step does it, without gradients."""
        batch = self.inputs.task.collate(examples, self.pad)
        inputs = {name: value.to(self.device) for name, value in batch.items()}
        devices = [self.device] if self.device.type == "cuda" else []
        with (
            announced(self.model, examples, batch),
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
        ):
            torch.manual_seed(0)  # what is drawn above the cut is the same both ways
            return self.model(**inputs)

    # --- whether

    def start(self, cut: Cut, bound: int) -> Features:
        """Fills, compares, and takes the trunk out.

        Raises:
            _OffError: something speaks against it.
        """
        self._require_agreement(cut)
        identity = self._identity(cut)
        sets = [self.inputs.train, *([self.inputs.held_out] if self.inputs.held_out else [])]
        by_key: dict[str, FeatureStore] = {}
        stores = []
        for examples in sets:
            store = self._store(cut, identity, examples)
            stores.append(by_key.setdefault(store.key, store))  # the same rows may be both
        try:
            self._prepare(cut, list(by_key.values()), bound)
            for examples, store in zip(sets, stores, strict=True):
                self._fill(cut, store, examples)
            train, *held_out = [store.open() for store in stores]
            self._require_same_rows(cut, train)
        except BaseException:
            for store in by_key.values():
                store.release()
            raise
        recall = Recall(cut, self.state.clock, self.device, train)
        unloaded = self._unload(cut)
        recall.install()
        self._say_done(cut, by_key.values(), unloaded)
        held = held_out[0] if held_out else None
        return Features(cut.pooled, recall, unloaded, train, held, list(by_key.values()))

    def _store(self, cut: Cut, identity: Mapping[str, str], examples: ExampleSet) -> FeatureStore:
        ordered = _stored_order(examples.examples)
        samples = tuple(example.index for example in ordered)
        if len(set(samples)) < len(samples):
            raise _OffError("two samples of the data have the same number")
        lengths = tuple(1 if cut.pooled else len(e.inputs["input_ids"]) for e in ordered)
        whole = {**identity, "data": _inputs_fingerprint(ordered)}
        return FeatureStore(self.root, whole, Rows(samples, lengths, cut.width, cut.dtype))

    def _prepare(self, cut: Cut, stores: Sequence[FeatureStore], bound: int) -> None:
        """Takes the folders, and makes sure of the room before anything is computed.

        Raises:
            _OffError: too large, no room, no second pass, or another run is at it.
        """
        rows = sum(sum(store.rows.lengths) for store in stores)
        size = sum(store.rows.bytes for store in stores)
        what = f"{rows:,} rows x {cut.width} x {cut.dtype.itemsize} bytes = {human_bytes(size)}"
        self.reporter.say(f"feature cache: {cut.name}: {what}")
        if size > bound:
            raise _OffError(f"it would be {human_bytes(size)}, and {human_bytes(bound)} are "
                            "allowed (memory.feature_cache)")  # fmt: skip
        complete = all(store.folder.is_dir() and not store.missing() for store in stores)
        if not complete and self._passes() <= 1:
            raise _OffError("the data is passed over only once")
        new = [store for store in stores if not store.folder.is_dir()]
        changed = differences(self.root, new[0].identity) if new else []
        if changed:
            self.reporter.say(f"feature cache: made anew, another {' and '.join(changed)} than "
                              "what is there was made with")  # fmt: skip
        others = make_room(self.root, size, bound, [store.key for store in stores])
        if size + others > bound:
            raise _OffError(f"other runs in use fill {self.root}")
        missing = sum(_bytes_missing(store) for store in stores)
        free = free_disk_bytes(self.root)
        if missing > free:
            raise _OffError(f"{human_bytes(missing)} are to be written, and {human_bytes(free)} "
                            f"are free in {self.root}")  # fmt: skip
        for store in stores:
            allowed = store.lock()
            if allowed == "no" or (allowed == "read" and store.missing()):
                raise _OffError(f"another run is writing {store.folder}")

    def _passes(self) -> float:
        train = self.recipe.train
        steps = math.ceil(len(self.inputs.train.examples) / train.batch_size)
        return train.max_steps / steps if train.max_steps else train.epochs

    def _identity(self, cut: Cut) -> dict[str, str]:
        """Everything that decides the numbers, but for the data."""
        config = {k: v for k, v in self.inner.config.to_dict().items() if k != "_name_or_path"}
        config.pop("transformers_version", None)
        versions = hardware.versions()
        code = {name: versions.get(name) for name in ("torch", "transformers", "bitsandbytes")}
        return {
            "format": _FORMAT,
            "model": tensors_hash(cut.trunk),
            "config": _hash([type(self.inner).__name__, config]),
            "attention": str(getattr(self.inner.config, "_attn_implementation", None)),
            "tokenizer": _tokenizer_hash(self.inputs.tokenizer),
            "padding": str(self.pad),
            "place": cut.name,
            "dtype": str(cut.dtype),
            "quantization": self.recipe.quantize,
            "device": self.device.type,
            "software": _hash(code),
        }

    # --- filling

    def _fill(self, cut: Cut, store: FeatureStore, examples: ExampleSet) -> None:
        missing = store.missing()
        if not missing:
            store.share()
            return
        shards = store.rows.shards()
        if len(missing) < len(shards):
            self.reporter.say(f"feature cache: {len(shards) - len(missing)} of {len(shards)} "
                              "parts are there already")  # fmt: skip
        ordered = _stored_order(examples.examples)
        total = sum(len(shards[number]) for number in missing)
        with self.reporter.bar("features", total) as bar, evaluating(self.model):
            for number in missing:
                part = shards[number]
                rows = self._compute(cut, ordered[part.start : part.stop], bar)
                store.write(number, rows)
        store.share()

    def _compute(self, cut: Cut, examples: Sequence[Example], bar: Bar | None) -> Tensor:
        """The rows of examples of falling length, one after another, on the CPU."""
        found: list[Tensor] = []
        start, tokens = 0, _FILL_TOKENS
        while start < len(examples):
            longest = len(examples[start].inputs["input_ids"])
            part = examples[start : start + max(1, tokens // longest)]
            try:
                hidden = cut.observe(lambda part=part: self._run(part))  # type: ignore[misc]
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                hidden = None
            if hidden is None:  # outside the handler, whose traceback holds the activations
                tokens = longest * (len(part) // 2)
                continue
            lengths = [len(example.inputs["input_ids"]) for example in part]
            rows = hidden if cut.pooled else torch.cat(
                [row[:length] for row, length in zip(hidden, lengths, strict=True)]
            )  # fmt: skip
            found.append(rows.cpu())
            start += len(part)
            if bar is not None:
                bar.advance(len(part))
        return torch.cat(found)

    # --- proof

    def _require_agreement(self, cut: Cut) -> None:
        """The loss of a few samples must be the same both ways.

        Raises:
            _OffError: what lies above the cut needs more than the rows at it.
        """
        probe = sorted(self._probe(), key=lambda e: -len(e.inputs["input_ids"]))
        wanted = self._run(probe).loss
        with evaluating(self.model):
            hidden = {e.index: self._compute(cut, [e], None) for e in probe}
        read = lambda samples: torch.cat([hidden[sample] for sample in samples])  # noqa: E731
        recall = Recall(cut, self.state.clock, self.device, read)
        recall.install()
        try:
            found = self._run(probe).loss
        except Exception as error:  # whatever a family's code does not take
            raise _OffError(f"this model cannot go on from there ({type(error).__name__})") from None
        finally:
            recall.remove()
        if not torch.isclose(found.float(), wanted.float(), rtol=_tolerance(cut.dtype)):
            raise _OffError("what lies above needs more than the hidden states there")

    def _require_same_rows(self, cut: Cut, read: Read) -> None:
        """What was stored must be what the model computes now.

        Raises:
            QftError: it is not.
        """
        for example in self._probe()[:2]:
            with evaluating(self.model):
                now = self._compute(cut, [example], None).float()
            then = read([example.index]).float()
            apart = float((now - then).abs().max() / now.abs().max().clamp(min=1e-6))
            if not apart <= 10 * _tolerance(cut.dtype):
                raise QftError(
                    "The feature cache does not hold what the model computes.",
                    where=self.root,
                    found=f"sample {example.index} differs by {apart:.1%}",
                    fix="remove that folder, or memory.feature_cache: off",
                )

    # --- without the trunk

    def _unload(self, cut: Cut) -> Unloaded | None:
        try:
            return Unloaded(self.inner, cut.trunk, self.root)
        except OSError as error:
            self.reporter.say(f"note: the trunk's weights stay in memory: {error.strerror}")
            return None

    def _say_done(
        self, cut: Cut, stores: Any, unloaded: Unloaded | None
    ) -> None:
        freed = f"; {human_bytes(unloaded.bytes)} of weights left memory" if unloaded else ""
        self.reporter.say(f"feature cache: in {self.root}{freed}")


def _stored_order(examples: Sequence[Example]) -> list[Example]:
    """Like lengths together, for little padding; the longest first, where memory would run out."""
    return sorted(examples, key=lambda e: (-len(e.inputs["input_ids"]), e.index))


def _bytes_missing(store: FeatureStore) -> int:
    lengths, row = store.rows.lengths, store.rows.width * store.rows.dtype.itemsize
    shards = store.rows.shards()
    parts = store.missing() if store.folder.is_dir() else range(len(shards))
    return sum(sum(lengths[shards[n].start : shards[n].stop]) * row for n in parts)


def _inputs_fingerprint(examples: Sequence[Example]) -> str:
    """What the model is given, sample by sample; what it should answer is of no account."""
    digest = hashlib.sha256()
    for example in examples:
        inputs = {name: value for name, value in example.inputs.items() if name != "labels"}
        digest.update(f"{example.index}:{fingerprint([Example(0, inputs)])}".encode())
    return digest.hexdigest()


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    return _hash([text, str(tokenizer.special_tokens_map)])


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _tolerance(dtype: torch.dtype) -> float:
    return 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4
