"""Whether a training's frozen trunk runs once only, and the training that goes on without it.

`cache_features` decides, fills what is missing of the cache (`qft.feature_store`), proves on a few
samples that the model says the same from it, and lets the trunk's weights leave memory. What speaks
against it is said, and the training goes on as without.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qft.data.tasks import Example
from qft.errors import Interrupted, QftError, SaveError
from qft.feature_identity import identity_of, store_of, stored_order
from qft.feature_rows import Runner
from qft.feature_store import FeatureStore
from qft.files import explain_write_errors, free_disk_bytes
from qft.inputs import Inputs
from qft.lean.cut_finding import NoCutError, find_cut
from qft.lean.feature_cache import Cut, Read, Recall
from qft.lean.trunk import Unloaded
from qft.preparation import inner_model, prepared
from qft.progress import Reporter, human_bytes
from qft.recipe import Recipe
from qft.shard_store import differences, make_room
from qft.strategy import Needs, Strategy

AUTO_BYTES = 4 * 2**30


@dataclass
class Features:
    """A model whose trunk is out of memory; it answers for the samples that were cached.

    Attributes:
        place: where the model is cut.
        pooled: a sample is one row: a forward pass may hold many.
    """

    place: str
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

    Raises:
        Interrupted: Ctrl-C; the shards that are done are kept.
        QftError: a cache is whole and yet not this model's.
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
    except KeyboardInterrupt:
        raise Interrupted(
            "Stopped while features were computed; what is done is kept.",
            where=job.root,
            fix="the same command goes on",
        ) from None
    except SaveError as error:
        reason = f"{error.what} {error.found or ''}".strip()
    reporter.say(f"feature cache: off: {reason}")
    return None


class _Job:
    """One training's way to its features."""

    def __init__(self, recipe: Recipe, model: nn.Module, inputs: Inputs, say: Reporter) -> None:
        state = prepared(model)
        assert state is not None
        self.recipe, self.model, self.inputs, self.reporter = recipe, model, inputs, say
        self.inner: Any = inner_model(model)
        self.clock = state.clock
        self.runner = Runner(model, inputs)
        chosen = recipe.memory.feature_folder
        beside = Path(recipe.output).parent / "feature-cache"
        self.root = Path(chosen).expanduser() if chosen else beside

    def cut(self, needs: Needs) -> Cut:
        """The place to cut at.

        Raises:
            NoCutError: there is none, or the recipe forbids it.
        """
        inside = {id(parameter) for parameter in self.inner.parameters()}
        outside = [p for p in self.model.parameters() if p.requires_grad and id(p) not in inside]
        if outside or needs.extends_sequence:
            raise NoCutError("what trains enters below the lowest layer", everything=True)
        # one that changes while it trains may free lower layers later; what it declares holds
        changing = type(self.recipe.strategy).after_step is not Strategy.after_step
        highest = needs.lowest_trainable_layer if changing else None
        probe = self.runner.probe
        found = find_cut(self.inner, lambda: self.runner.run(probe), len(probe), highest=highest)
        if self.recipe.strategy.objective.whole_model:
            raise NoCutError("the layers below are compared with the teacher's, or run on texts "
                             "that are new in every step")  # fmt: skip
        if self.recipe.train.embedding_noise:
            raise NoCutError("train.embedding_noise changes what the layers below see")
        return found

    def start(self, cut: Cut, bound: int) -> Features:
        """Fills, compares, and takes the trunk out.

        Raises:
            _OffError: something speaks against it.
        """
        self._require_agreement(cut)
        held_out = self.inputs.held_out
        sets = [self.inputs.train.examples, *([held_out.examples] if held_out else [])]
        identity = identity_of(self.inner, cut, self.inputs.tokenizer, self.recipe.quantize)
        by_key: dict[str, FeatureStore] = {}  # the same rows may be both training and held out
        stores = []
        for examples in sets:
            store = store_of(self.root, cut, identity, examples)
            if store is None:
                raise _OffError("two samples of the data have the same number")
            stores.append(by_key.setdefault(store.key, store))
        try:
            self._require_room(cut, list(by_key.values()), bound)
            for examples, store in zip(sets, stores, strict=True):
                self._fill(cut, store, examples)
            readers = [store.open() for store in stores]
            self._require_same_rows(cut, readers[0])
        except BaseException:
            for store in by_key.values():
                store.release()
            raise
        recall = Recall(cut, self.clock, self.runner.device, readers[0])
        unloaded = self._unload(cut)
        recall.install()
        freed = f"; {human_bytes(unloaded.bytes)} of weights left memory" if unloaded else ""
        self.reporter.say(f"feature cache: in {self.root}{freed}")
        held = readers[1] if held_out else None
        return Features(
            cut.name, cut.pooled, recall, unloaded, readers[0], held, list(by_key.values())
        )

    def _require_room(self, cut: Cut, stores: Sequence[FeatureStore], bound: int) -> None:
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
        missing = sum(store.bytes_missing() for store in stores)
        if missing and self._passes() <= 1:
            raise _OffError("the data is passed over only once")
        new = [store for store in stores if not store.folder.is_dir()]
        changed = differences(self.root, new[0].identity) if new else []
        if changed and not {"model", "data"} <= set(changed):  # else it is simply another job's
            self.reporter.say(f"feature cache: made anew, another {' and '.join(changed)} than "
                              "what is there was made with")  # fmt: skip
        others = make_room(self.root, size, bound, [store.key for store in stores])
        if size + others > bound:
            raise _OffError(f"caches that other runs use fill {self.root}")
        free = free_disk_bytes(self.root)
        if missing > free:
            raise _OffError(f"{human_bytes(missing)} are to be written, and {human_bytes(free)} "
                            f"are free in {self.root}")  # fmt: skip
        for store in stores:
            allowed = store.lock()
            if allowed == "no" or (allowed == "read" and store.bytes_missing()):
                raise _OffError(f"another run is writing {store.folder}")

    def _passes(self) -> float:
        train = self.recipe.train
        steps = math.ceil(len(self.inputs.train.examples) / train.batch_size)
        return train.max_steps / steps if train.max_steps else train.epochs

    def _fill(self, cut: Cut, store: FeatureStore, examples: Sequence[Example]) -> None:
        missing, shards = store.missing(), store.shards
        if missing and len(missing) < len(shards):
            self.reporter.say(f"feature cache: {len(shards) - len(missing)} of {len(shards)} "
                              "parts are there already")  # fmt: skip
        if missing:
            ordered = stored_order(examples)
            total = sum(len(shards[number]) for number in missing)
            with self.reporter.bar("features", total) as bar:
                for number in missing:
                    part = ordered[shards[number].start : shards[number].stop]
                    store.write(number, self.runner.rows(cut, part, bar.advance))
        store.share()

    def _require_agreement(self, cut: Cut) -> None:
        """The loss of a few samples must be the same both ways.

        Raises:
            _OffError: what lies above the cut needs more than the rows at it.
        """
        probe = self.runner.probe
        wanted = self.runner.run(probe).loss
        hidden = {example.index: self.runner.rows(cut, [example]) for example in probe}

        def read(samples: Sequence[int]) -> torch.Tensor:
            return torch.cat([hidden[sample] for sample in samples])

        recall = Recall(cut, self.clock, self.runner.device, read)
        recall.install()
        try:
            found = self.runner.run(probe).loss
        except Exception as error:  # whatever a family's code does not take
            raise _OffError(
                f"this model cannot go on from there ({type(error).__name__})"
            ) from None
        finally:
            recall.remove()
        if not torch.isclose(found.float(), wanted.float(), rtol=_tolerance(cut.dtype)):
            raise _OffError("what lies above needs more than the hidden states there, such as "
                            "those of padding")  # fmt: skip

    def _require_same_rows(self, cut: Cut, read: Read) -> None:
        """What was stored must be what the model computes now.

        Raises:
            QftError: it is not.
        """
        for example in self.runner.probe[:2]:
            now = self.runner.rows(cut, [example]).float()
            then = read([example.index]).float()
            apart = float((now - then).abs().max() / now.abs().max().clamp(min=1e-6))
            if not apart <= 10 * _tolerance(cut.dtype):
                raise QftError(
                    "The feature cache does not hold what the model computes.",
                    where=self.root,
                    found=f"sample {example.index} differs by {apart:.1%}",
                    fix="remove that folder, or memory.feature_cache: off",
                )

    def _unload(self, cut: Cut) -> Unloaded | None:
        try:
            return Unloaded(self.inner, cut.trunk, self.root)
        except OSError as error:
            self.reporter.say(f"note: the trunk's weights stay in memory: {error.strerror}")
            return None


def _tolerance(dtype: torch.dtype) -> float:
    return 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4
