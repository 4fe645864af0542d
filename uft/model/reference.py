"""The reference: the initial policy, or another model, whose log-probs of the same targets objectives compare with.

Three modes that agree to 1e-5: a frozen copy beside the policy, the policy with its adapter switched off, and log-probs
computed once and cached on disk. All start from the files of `model.path` (or `reference.path`), never from a
checkpoint, so that a resumed run has the same reference; one that moves (`reference.sync_every`) is in the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from uft.config.schema import Model, ReferenceModel
from uft.data.batch import Batch, Layout, TokenSequence, batches_of, packs_of, prompt_of, sequence_batch
from uft.data.chat import Tokens
from uft.distributed import ranks
from uft.errors import Problem, UftError
from uft.heartbeat import activity, report_progress
from uft.model.layout import follow_layout
from uft.model.load import (
    MODEL_PATH,
    Location,
    at_path,
    check_vocabulary,
    checkpoint_config,
    folder_of,
    load_base,
    load_frozen,
    load_tokenizer,
    locate,
    pad_id,
)
from uft.model.policy import Frozen, Policy
from uft.model.precision import resolve_dtype, storage_dtype
from uft.objectives.base import PLAIN, Forward, ForwardOutput, ForwardRequest
from uft.runs import clear_left, file_digest, write_atomically, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tensor = torch.Tensor

log = logging.getLogger(__name__)

VISITS_WORTH_A_CACHE = 1.5
"""Visits per row from which one pass over all rows is cheaper than a forward of the copy at every visit."""


@dataclass(frozen=True)
class Reference:
    """The reference in its mode; objectives get `forward`. In mode `cached`, `column` must be filled first and its
    values put into the batches: `column.fill(encoded)`, `sampler.reference = column`."""

    mode: str
    why: str
    forward: Forward
    column: ReferenceColumn | None = None


def make_reference(
    policy: Policy,
    model: Model,
    reference: ReferenceModel,
    *,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    visits_per_row: float,
    cache: Path,
    distributions: bool = False,
    rollouts: bool = False,
    longest_row: int = 0,
    key: str = "reference.path",
) -> Reference:
    """The reference of a run, in the mode asked for or the cheapest one. May be called on a trained policy.

    `visits_per_row`: how often the run visits a row on average; `cache`: root of the caches on disk; `distributions`:
    whether the objective compares with whole distributions; `rollouts`: whether completions are sampled while it
    trains; `longest_row`: tokens of the longest sequence; `key`: the setting that names another model. Raises UftError
    for a mode that is impossible and a model that cannot be loaded.
    """
    mode, why = choose_mode(model, reference, visits_per_row, distributions, rollouts)
    path = reference.path
    named, key = (model, MODEL_PATH) if path is None else (at_path(model, path), key)
    what = f"{key}={named.path}"

    def frozen() -> Frozen:
        if model.adapter == "lora" and path is None:
            return Frozen(policy)
        other = load_frozen(named, device, key)
        check_vocabulary(other.base, tokenizer, key)
        if path is not None:
            check_alike(other, policy, what, min(longest_row, policy.positions or longest_row), distributions)
            if distributions:
                check_tokens(named, tokenizer, what)
        if reference.sync_every is not None and _shapes(other) != _shapes(policy):
            unlike = "has not the weights of the policy, and cannot be drawn to it"
            raise UftError(Problem(what, unlike, advice=("reference.sync_every=null",)))
        follow_layout(other, policy, longest_row, key)
        return Frozen(other)

    if mode != "cached":
        return Reference(mode, why, frozen())
    identity = model_identity(named, device, key) | {
        "dtype": f"{policy.dtype} of {storage_dtype(resolve_dtype(model, device))}",
        "attention": f"{model.attention} {policy.attention}",
        **({} if policy.layout is Layout.PADDED else {"layout": policy.layout.value}),
    }
    store = LogProbStore.of(cache / "reference", identity)
    return Reference(mode, why, FromColumn(), ReferenceColumn(store, frozen, pad_id(tokenizer), device, policy.layout))


def _shapes(policy: Policy) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in policy.module.named_parameters()}


def check_alike(other: Policy, policy: Policy, what: str, longest_row: int, distributions: bool) -> None:
    """Raise UftError where another model, which `what` sets, cannot stand as the reference: too few positions for the
    longest row, or, for an objective that compares whole distributions, a vocabulary of another size."""
    if other.positions and longest_row > other.positions:
        why = f"has {other.positions} positions, and sequences of this run have up to {longest_row} tokens"
        advice = (f"train.max_length={other.positions} data.too_long=drop|truncate",)
        raise UftError(Problem(what, why, advice=advice))
    theirs, ours = (side.base.get_output_embeddings().weight.shape[0] for side in (other, policy))
    if distributions and ours != theirs:
        why = f"has a vocabulary of {theirs} tokens, the policy of {ours}"
        advice = ("this objective compares whole distributions: padded tokens count too",)
        raise UftError(Problem(what, why, advice=advice))


def check_tokens(other: Model, tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Raise UftError where the tokenizer of another model, which `what` sets, numbers tokens otherwise than ours: a
    distribution over its vocabulary is then none over ours. A model that comes without one is taken at its size."""
    try:
        theirs = load_tokenizer(other).get_vocab()
    except UftError:
        return
    found = [(token, number) for token, number in tokenizer.get_vocab().items() if theirs.get(token, number) != number]
    if found:
        token, number = min(found, key=lambda one: one[1])
        why = f"numbers {len(found):,} tokens otherwise: {token!r} is {theirs[token]}, in the policy's {number}"
        raise UftError(Problem(what, why, advice=("this objective compares whole distributions, token by token",)))


def choose_mode(
    model: Model, reference: ReferenceModel, visits_per_row: float, distributions: bool = False, rollouts: bool = False
) -> tuple[str, str]:
    """(mode, one line why). Raises UftError for a mode that is impossible."""
    adapter_possible = model.adapter == "lora" and reference.path is None
    impossible = {}
    if not adapter_possible:
        none = "there is no adapter" if model.adapter != "lora" else "reference.path names another model"
        impossible["adapter_off"] = (none, "auto, copy, cached")
    if distributions:
        why = "the objective compares whole distributions, and a cache keeps log-probs of the targets alone"
        impossible["cached"] = (why, "auto, copy, adapter_off")
    if rollouts:
        impossible["cached"] = ("completions that are sampled in training are in no cache", "auto, copy, adapter_off")
    if reference.sync_every is not None:
        impossible |= dict.fromkeys(("cached", "adapter_off"), ("the reference moves with the policy", "auto, copy"))
    if reference.mode in impossible:
        why, modes = impossible[reference.mode]
        raise UftError(Problem(f"reference.mode={reference.mode}", why, advice=(f"possible: {modes}",)))
    if reference.mode != "auto":
        return reference.mode, "asked for"
    if reference.sync_every is not None:
        return "copy", f"it moves every {reference.sync_every} steps"
    if adapter_possible:
        return "adapter_off", "the frozen weights under the adapter are the reference"
    if distributions:
        return "copy", "whole distributions are compared, which no cache keeps"
    if rollouts:
        return "copy", "completions that are sampled in training are in no cache"
    often = f"{visits_per_row:.1f} times on average" if visits_per_row >= 1 else "less than once on average"
    visited = f"each row is visited {often}"
    if visits_per_row > VISITS_WORTH_A_CACHE:
        return "cached", f"{visited}: computed once"
    return "copy", f"{visited}: nothing to save by keeping"


class FromColumn:
    """A reference that was computed before: the batch carries its log-probs."""

    def __call__(self, batch: Batch, request: ForwardRequest = PLAIN) -> ForwardOutput:
        assert request == PLAIN, "cached log-probs are of the plain inputs, and all there is"
        return ForwardOutput(batch.columns["reference"])


# --- The cache: one folder per model and precision, one float32 vector per token sequence
#
# A sequence is identified by its token ids and its supervised mask, so that any run with the same rows, template and
# model finds its values. Files appear by rename and carry a checksum; a damaged one is computed again.

FORMAT = 1  # count up when keys or values change their meaning
SEQUENCES_PER_FILE = 1024  # also the most that a stopped or killed process loses


def sequence_key(ids: np.ndarray, supervised: np.ndarray) -> bytes:
    """16 bytes that identify a sequence."""
    hashed = hashlib.blake2b(np.asarray(ids, dtype="<i4").tobytes(), digest_size=16)
    hashed.update(np.packbits(np.asarray(supervised, dtype=bool)).tobytes())
    return hashed.digest()


@dataclass(frozen=True)
class ReferenceColumn:
    """Cached log-probs of completions under a model: filled once, then read for every completion of a batch."""

    store: LogProbStore
    forward: Callable[[], Forward]  # loads the model, only when something is missing
    pad_id: int
    device: torch.device
    layout: Layout = Layout.PADDED  # part of the store's identity
    value: Callable[[Tensor], np.ndarray] = lambda log_probs: log_probs.numpy().copy()
    """(n,) float32 log-probs of a sequence's targets, on the CPU -> the numbers that are kept of it."""
    per_file: int | None = None  # sequences; None: SEQUENCES_PER_FILE
    phase: str = "reference log-probs were computed"  # for the watchdog

    def __call__(self, encoded: Tokens) -> np.ndarray:
        """(supervised tokens,) float32, in reading order. KeyError: `fill` has not seen this sequence."""
        return self.store.values[sequence_key(encoded.ids, encoded.supervised)]

    def missing(self, encoded: Iterable[Tokens]) -> dict[bytes, TokenSequence]:
        """The sequences that are not on disk yet, each once."""
        return {key: sequence for key, sequence in _keyed(encoded).items() if key not in self.store.values}

    def fill(
        self,
        encoded: Iterable[Tokens],
        *,
        batch_tokens: int = 8192,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> bool:
        """Compute and store the missing log-probs. False: asked to stop; finished files are kept.

        `batch_tokens`: tokens per forward pass, padding counted. `progress(done, of)` is called after each file.
        Only complete files are kept, so that the rest is batched after an interruption as it would have been: kernels
        round differently in batches of another shape, and a resumed run must repeat every bit.
        """
        group, sequences = ranks(), _keyed(encoded)
        # of all processes: each machine may have a cache of its own
        absent = frozenset[bytes]().union(*group.gather_objects(sequences.keys() - self.store.values.keys()))
        if not absent:
            return True

        def order(key: bytes) -> tuple[int, bytes]:
            """Similar lengths (packed: equal prompts) together, and files in that order: batches stay full."""
            prompt = prompt_of(sequences[key])
            return (len(sequences[key][0]), b"") if self.layout is Layout.PADDED else (len(prompt), prompt)

        keys, most = sorted((key for key in sequences if key in absent), key=order), self.per_file or SEQUENCES_PER_FILE
        files = [{key: sequences[key] for key in keys[start : start + most]} for start in range(0, len(keys), most)]

        with activity(self.phase):
            forward = self.forward()
            for start in range(0, len(files), group.size):  # a file each
                made = group.map_shards(
                    files[start : start + group.size],
                    lambda share: [self._compute(forward, part, batch_tokens, should_stop) for part in share],
                )
                for number, values in enumerate(made):
                    if values is not None:
                        self.store.add(values, write=group.is_rank0 if group.sharded else number == group.rank)
                if None in made:
                    return False
                progress(min((start + group.size) * most, len(keys)), len(keys))
        return True

    def _compute(
        self, forward: Forward, part: Mapping[bytes, TokenSequence], batch_tokens: int, should_stop: Callable[[], bool]
    ) -> dict[bytes, np.ndarray] | None:
        """The values of each sequence of a file; None when asked to stop."""
        keys, sequences = list(part), list(part.values())
        padded = self.layout is Layout.PADDED
        lengths = [len(ids) for ids, _ in sequences]
        values: dict[bytes, np.ndarray] = {}
        for group in batches_of(lengths, batch_tokens) if padded else packs_of(sequences, batch_tokens):
            if should_stop():
                return None
            report_progress(len(values), len(keys), "completions")
            batch = sequence_batch([sequences[at] for at in group], self.pad_id, self.layout).to(self.device)
            pieces = forward(batch).log_probs.float().cpu().split(batch.lengths.tolist())
            values |= {keys[at]: self.value(piece) for at, piece in zip(group, pieces, strict=True)}
        return values


def _keyed(encoded: Iterable[Tokens]) -> dict[bytes, TokenSequence]:
    return {sequence_key(one.ids, one.supervised): (one.ids, one.supervised) for one in encoded}


@dataclass
class LogProbStore:
    """The files of one model: sequence key -> (n,) float32, the log-probs of its targets or a number made of them."""

    folder: Path
    on_disk: bool = True  # False after a failed write: values are kept in memory alone
    values: dict[bytes, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, root: Path, identity: Mapping[str, str]) -> LogProbStore:
        """The store below `root` of the model that `identity` describes, with the values that are there."""
        text = json.dumps({**identity, "format": FORMAT}, sort_keys=True)
        folder = root / hashlib.sha256(text.encode()).hexdigest()[:24]
        clear_left(folder, ".*.tmp")
        store, about = cls(folder), folder / "reference.json"
        for file in sorted(folder.glob("*.safetensors")):
            found = _read(file)
            if found is None:
                log.warning("reference cache %s is damaged (checksum): computing its log-probs again", file)
                file.unlink(missing_ok=True)
            else:
                store.values.update(found)
        if not about.is_file():
            with store._writing():
                folder.mkdir(parents=True, exist_ok=True)
                write_json(about, dict(identity))
        return store

    def add(self, values: Mapping[bytes, np.ndarray], write: bool = True) -> None:
        """Add sequences, and publish a file of them unless another process does (`write`)."""
        from safetensors.numpy import save

        self.values.update(values)
        if not write or not self.on_disk:
            return
        arrays: dict[str, np.ndarray] = {
            "keys": np.frombuffer(b"".join(values), dtype=np.uint8).reshape(-1, 16),
            "lengths": np.array([len(v) for v in values.values()], dtype=np.int64),
            "values": np.concatenate(list(values.values())).astype(np.float32),
        }
        checksum = _checksum(arrays)
        with self._writing():
            content = save(arrays, metadata={"checksum": checksum})
            write_atomically(self.folder / f"{checksum[:24]}.safetensors", content)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A failed write costs the next session time, and nothing else.

        Nothing is written after it: files have to follow each other, see `ReferenceColumn.fill`.
        """
        try:
            yield
        except (OSError, UftError) as error:
            self.on_disk = False
            why = error.problems[0].why if isinstance(error, UftError) else error
            log.warning("reference log-probs are not kept for the next session: %s", why)


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        hashed.update(np.ascontiguousarray(arrays[name]).tobytes())
    return hashed.hexdigest()


def _read(file: Path) -> dict[bytes, np.ndarray] | None:
    """The sequences of a file; None when its checksum or format is wrong."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as handle:
            arrays = {name: handle.get_tensor(name) for name in ("keys", "lengths", "values")}
            if _checksum(arrays) != (handle.metadata() or {}).get("checksum"):
                return None
    except (SafetensorError, OSError):
        return None
    ends = np.cumsum(arrays["lengths"])
    pieces = np.split(arrays["values"], ends[:-1]) if len(ends) else []
    return {key.tobytes(): piece for key, piece in zip(arrays["keys"], pieces, strict=True)}


# --- Identity of a model

BLOB = re.compile(r"[0-9a-f]{64}")


def model_identity(model: Model, device: torch.device, key: str = MODEL_PATH) -> dict[str, str]:
    """Key of the log-prob cache: weights, precision, attention and device of a model, which the setting `key` names."""
    model = resolve_dtype(model, device)
    digest = weights_digest(locate(model, key), lambda: load_base(model, key))
    stored = {} if model.quantize == "none" else {"quantize": model.quantize}
    return {"weights": digest, "dtype": model.dtype, "attention": model.attention, "device": device.type, **stored}


@activity("the weights of a model were read", moving=True)
def weights_digest(place: Location, fetch: Callable[[], Any]) -> str:
    """Hash of the configuration and weight files of the model at `place`; `fetch` downloads it if it is not cached."""
    files = _weight_files(place)
    if not files:
        fetch()
        files = _weight_files(place)
    hashed = hashlib.sha256()
    for file in files:
        real = file.resolve()
        digest = real.name  # the hub's cache names large files by their sha256
        digest = digest if BLOB.fullmatch(digest) else file_digest(real)
        hashed.update(f"{file.name} {digest}\n".encode())
    return hashed.hexdigest()


def _weight_files(place: Location) -> list[Path]:
    """config.json and the weights of a local folder, or of a hub model's snapshot in the local cache; the checksums of
    a checkpoint, and the files of the model that it is laid over."""
    if place.is_checkpoint:
        own = checkpoint_config(place, Model())
        return [Path(place.path, "SHA256SUMS"), *_weight_files(locate(own.model))]
    folder = folder_of(place)
    weights = sorted(folder.glob("*.safetensors")) if folder else []
    return [folder / "config.json", *weights] if folder and weights else []
