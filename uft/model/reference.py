"""The reference: the initial policy, or another model, whose log-probs of the same targets objectives compare with.

Three ways that agree to 1e-5: a frozen copy beside the policy, the policy with its adapter switched off, and log-probs
computed once and kept on disk. All start from the files of `model.path` (or `reference.path`), never from a checkpoint,
so that a resumed run has the same reference.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from uft.config.schema import Model, ReferenceModel
from uft.data.batch import Batch, Layout, TokenSequence, batches_of, packs_of, prompt_of, sequence_batch
from uft.distributed import ranks
from uft.errors import Problem, UftError
from uft.heartbeat import activity
from uft.model.head import Predictions
from uft.model.layout import follow_layout
from uft.model.load import Location, check_vocabulary, load_base, load_frozen, pad_id, storage_dtype, whereabouts
from uft.model.policy import Policy
from uft.objectives.base import PLAIN, Forward, ForwardOutput, ForwardRequest
from uft.runs import clear_left, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tensor = torch.Tensor

VISITS_WORTH_A_CACHE = 1.5
"""Visits per row from which one pass over all rows beats a forward of the copy at every visit."""


@dataclass(frozen=True)
class Reference:
    """`forward` is what objectives get. In mode `cached`, `column` must be filled first and its values put into the
    batches: `column.fill(encoded)`, `sampler.reference = column`."""

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
    longest_row: int = 0,
) -> Reference:
    """The reference of a run, in the mode asked for or the cheapest one. May be called on a trained policy.

    `visits_per_row`: how often the run visits a row on average; `cache`: root of the caches on disk; `distributions`:
    whether the objective compares with whole distributions; `longest_row`: tokens of the longest sequence.
    """
    mode, why = choose_mode(model, reference, visits_per_row, distributions)
    without_adapter = model.adapter == "lora" and reference.path is None

    def frozen() -> Frozen:
        if without_adapter:
            return Frozen(policy)
        other = _copy(model, reference, device, tokenizer)
        follow_layout(other, policy, longest_row)
        return Frozen(other)

    def adapter_off() -> Reference:
        return Reference(mode, why, Frozen(policy))

    def copy() -> Reference:
        return Reference(mode, why, frozen())

    def cached() -> Reference:
        digest = weights_digest(whereabouts(model, reference.path), lambda: load_base(model, device, reference.path))
        identity = {
            "weights": digest,
            "dtype": f"{model.dtype} of {storage_dtype(model)}",
            "attention": f"{model.attention} {policy.attention}",
            "device": device.type,
            **({} if policy.layout is Layout.PADDED else {"layout": policy.layout.value}),
        }
        store = LogProbStore.of(cache / "reference", identity)
        column = ReferenceColumn(store, frozen, pad_id(tokenizer), device, policy.layout)
        return Reference(mode, why, FromColumn(), column)

    ways: dict[str, Callable[[], Reference]] = {"adapter_off": adapter_off, "copy": copy, "cached": cached}
    return ways[mode]()


def choose_mode(
    model: Model, reference: ReferenceModel, visits_per_row: float, distributions: bool = False
) -> tuple[str, str]:
    """(mode, one line why). Raises UftError for a mode that cannot be."""
    adapter_possible = model.adapter == "lora" and reference.path is None
    if reference.mode == "adapter_off" and not adapter_possible:
        why = "there is no adapter" if model.adapter != "lora" else "reference.path names another model"
        problem = Problem("reference.mode=adapter_off", why, advice=("possible: auto, copy, cached",))
        raise UftError(problem)
    if reference.mode == "cached" and distributions:
        why = "the objective compares whole distributions, and a cache keeps log-probs of the targets alone"
        raise UftError(Problem("reference.mode=cached", why, advice=("possible: auto, copy, adapter_off",)))
    if reference.mode != "auto":
        return reference.mode, "asked for"
    if adapter_possible:
        return "adapter_off", "the frozen weights under the adapter are the reference"
    if distributions:
        return "copy", "whole distributions are compared, which no cache keeps"
    if visits_per_row > VISITS_WORTH_A_CACHE:
        return "cached", f"each row is visited {visits_per_row:.1f} times on average: computed once"
    return "copy", f"each row is visited {visits_per_row:.1f} times on average: nothing to save by keeping"


class Frozen:
    """A policy as a reference: its adapter, if any, off; no dropout, no gradient."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __call__(self, batch: Batch, request: ForwardRequest = PLAIN) -> ForwardOutput:
        with self._as_it_began() as policy:
            return policy(batch, request)

    def predictions(self, batch: Batch) -> Predictions:
        with self._as_it_began() as policy:
            return policy.predictions(batch)

    @contextmanager
    def _as_it_began(self) -> Iterator[Policy]:
        policy = self.policy
        training = policy.module.training
        try:
            policy.eval()
            with torch.no_grad(), policy.adapter_disabled() if policy.has_adapter else nullcontext():
                yield policy
        finally:
            if training:
                policy.train()


class FromColumn:
    """The reference that was computed before: the batch brings its log-probs along."""

    def __call__(self, batch: Batch, request: ForwardRequest = PLAIN) -> ForwardOutput:
        assert request == PLAIN, "cached log-probs are of the plain inputs, and all there is"
        return ForwardOutput(batch.columns["reference"])


def _copy(model: Model, reference: ReferenceModel, device: torch.device, tokenizer: PreTrainedTokenizerBase) -> Policy:
    policy = load_frozen(model, device, reference.path)
    check_vocabulary(policy.base, tokenizer, "reference.path" if reference.path else "model.path")
    return policy


# --- Reference log-probs on disk: one folder per model and precision, one float32 vector per token sequence.
#
# A sequence is known by its token ids and its supervised mask, so that any run with the same rows, template and model
# finds its values. Files appear by rename and carry a checksum; one that does not read back is made again.


log = logging.getLogger(__name__)

FORMAT = 1  # count up when keys or values change their meaning
SEQUENCES_PER_FILE = 1024  # also what a process that is stopped or killed loses, at most
BLOB = re.compile(r"[0-9a-f]{64}")


class Encoded(Protocol):
    """What the cache needs of an encoded completion."""

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def supervised(self) -> np.ndarray: ...


def sequence_key(ids: np.ndarray, supervised: np.ndarray) -> bytes:
    """16 bytes that name a sequence."""
    hashed = hashlib.blake2b(np.asarray(ids, dtype="<i4").tobytes(), digest_size=16)
    hashed.update(np.packbits(np.asarray(supervised, dtype=bool)).tobytes())
    return hashed.digest()


class LogProbStore:
    """The files of one reference: sequence key -> (supervised tokens,) float32."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kept = True  # on disk; else for this sitting alone
        self.values: dict[bytes, np.ndarray] = {}
        for file in sorted(folder.glob("*.safetensors")):
            found = _read(file)
            if found is None:  # torn or changed: its sequences are computed again
                log.warning("reference cache %s is damaged (checksum): computing its log-probs again", file)
                file.unlink(missing_ok=True)
            else:
                self.values.update(found)

    @classmethod
    def of(cls, root: Path, identity: Mapping[str, str]) -> LogProbStore:
        """The store below `root` of the reference that `identity` describes."""
        text = json.dumps({**identity, "format": FORMAT}, sort_keys=True)
        folder = root / hashlib.sha256(text.encode()).hexdigest()[:24]
        clear_left(folder, ".*.tmp")
        store, about = cls(folder), folder / "reference.json"
        if not about.is_file():
            with store.losing():
                folder.mkdir(parents=True, exist_ok=True)
                write_json(about, dict(identity))
        return store

    @contextmanager
    def losing(self) -> Iterator[None]:
        """Within, something is written. What fails costs the next sitting time, and nothing else.

        Nothing is written after that: files have to follow each other, see `ReferenceColumn.fill`.
        """
        try:
            yield
        except (OSError, UftError) as error:
            self.kept = False
            why = error.problems[0].why if isinstance(error, UftError) else error
            log.warning("reference log-probs are not kept for the next sitting: %s", why)

    def add(self, values: Mapping[bytes, np.ndarray], write: bool = True) -> None:
        """Keep new sequences, and publish a file of them where that is possible, unless another process does."""
        self.values.update(values)
        if write and self.kept:
            with self.losing():
                self._publish(values)

    def _publish(self, values: Mapping[bytes, np.ndarray]) -> None:
        from safetensors.numpy import save

        arrays: dict[str, np.ndarray] = {
            "keys": np.frombuffer(b"".join(values), dtype=np.uint8).reshape(-1, 16),
            "lengths": np.array([len(v) for v in values.values()], dtype=np.int64),
            "values": np.concatenate(list(values.values())).astype(np.float32),
        }
        checksum = _checksum(arrays)
        final = self.folder / f"{checksum[:24]}.safetensors"
        beside = self.folder / f".{final.name}.{os.getpid()}.tmp"
        try:
            with open(beside, "wb") as handle:
                handle.write(save(arrays, metadata={"checksum": checksum}))
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(beside, final)
        finally:
            beside.unlink(missing_ok=True)


def _checksum(arrays: Mapping[str, np.ndarray]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(arrays):
        hashed.update(np.ascontiguousarray(arrays[name]).tobytes())
    return hashed.hexdigest()


def _read(file: Path) -> dict[bytes, np.ndarray] | None:
    """The sequences of a file, or None when it is not what was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as handle:
            arrays = {name: handle.get_tensor(name) for name in ("keys", "lengths", "values")}
            intact = _checksum(arrays) == (handle.metadata() or {}).get("checksum")
    except (SafetensorError, OSError):
        return None
    if not intact:
        return None
    ends = np.cumsum(arrays["lengths"])
    pieces = np.split(arrays["values"], ends[:-1]) if len(ends) else []
    return {key.tobytes(): piece for key, piece in zip(arrays["keys"], pieces, strict=True)}


class ReferenceColumn:
    """The cached reference of a run: filled once, then asked for every completion that goes into a batch."""

    def __init__(
        self,
        store: LogProbStore,
        forward: Callable[[], Forward],
        pad_id: int,
        device: torch.device,
        layout: Layout = Layout.PADDED,
    ) -> None:
        self.store = store
        self.forward = forward  # makes the model, only when something is missing
        self.pad_id = pad_id
        self.device = device
        self.layout = layout  # part of what the store is known by

    def __call__(self, encoded: Encoded) -> np.ndarray:
        """(supervised tokens,) float32, in reading order. KeyError: `fill` has not seen this sequence."""
        return self.store.values[sequence_key(encoded.ids, encoded.supervised)]

    def missing(self, encoded: Iterable[Encoded]) -> dict[bytes, TokenSequence]:
        """The sequences that are not on disk yet, each once."""
        return {key: sequence for key, sequence in map(_keyed, encoded) if key not in self.store.values}

    @activity("reference log-probs were computed")
    def fill(
        self,
        encoded: Iterable[Encoded],
        *,
        batch_tokens: int = 8192,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> bool:
        """Compute and keep what is missing. False: it was asked to stop; finished files are kept.

        `batch_tokens`: tokens per forward pass, padding counted. `progress(done, of)` is called after each file.
        Only whole files are kept, so that what is computed after an interruption is batched as it would have been:
        kernels round differently in batches of another shape, and a resumed run must repeat every bit.
        """
        group, encoded = ranks(), list(encoded)
        # of all processes: each machine may have a cache of its own
        absent = frozenset[bytes]().union(*group.gather_objects(frozenset(self.missing(encoded))))
        sequences = {key: sequence for key, sequence in map(_keyed, encoded) if key in absent}
        if not sequences:
            return True
        forward = self.forward()
        # like lengths (packed: like prompts) together, and files in that order, so that batches stay full
        order = _length if self.layout is Layout.PADDED else _prompt
        keys = sorted(sequences, key=lambda key: order(sequences[key]))
        files = [keys[start : start + SEQUENCES_PER_FILE] for start in range(0, len(keys), SEQUENCES_PER_FILE)]

        def compute(share: Sequence[Sequence[bytes]]) -> list[dict[bytes, np.ndarray] | None]:
            return [
                self._compute(forward, {key: sequences[key] for key in file}, batch_tokens, should_stop)
                for file in share
            ]

        for start in range(0, len(files), group.size):  # a file each
            found = group.map_shards(files[start : start + group.size], compute)
            for number, values in enumerate(found):
                if values is not None:
                    self.store.add(values, write=group.is_rank0 if group.sharded else number == group.rank)
            if None in found:
                return False
            progress(min((start + group.size) * SEQUENCES_PER_FILE, len(keys)), len(keys))
        return True

    def _compute(
        self,
        forward: Forward,
        named: Mapping[bytes, TokenSequence],
        batch_tokens: int,
        should_stop: Callable[[], bool],
    ) -> dict[bytes, np.ndarray] | None:
        """Log-probs of each; None when somebody asked to stop."""
        keys, sequences = list(named), list(named.values())
        found: dict[bytes, np.ndarray] = {}
        padded = self.layout is Layout.PADDED
        lengths = [len(ids) for ids, _ in sequences]
        for group in batches_of(lengths, batch_tokens) if padded else packs_of(sequences, batch_tokens):
            if should_stop():
                return None
            taken = [sequences[position] for position in group]
            batch = sequence_batch(taken, self.pad_id, self.layout).to(self.device)
            log_probs = forward(batch).log_probs.float()
            pieces = log_probs.cpu().split(batch.lengths.tolist())
            found.update({keys[at]: piece.numpy().copy() for at, piece in zip(group, pieces, strict=True)})
        return found


def _keyed(encoded: Encoded) -> tuple[bytes, TokenSequence]:
    return sequence_key(encoded.ids, encoded.supervised), (encoded.ids, encoded.supervised)


def _length(sequence: TokenSequence) -> tuple[int, bytes]:
    return len(sequence[0]), b""


def _prompt(sequence: TokenSequence) -> tuple[int, bytes]:
    prompt = prompt_of(sequence)
    return len(prompt), prompt


@activity("the weights of a model were read", moving=True)
def weights_digest(place: Location, fetch: Callable[[], Any]) -> str:
    """Hash of the configuration and weight files of the model at `place`.

    A hub model that is not in the local cache yet is brought there by `fetch`.
    """
    files = _weight_files(place.path, place.revision)
    if not files:
        fetch()
        files = _weight_files(place.path, place.revision)
    hashed = hashlib.sha256()
    for file in files:
        hashed.update(f"{file.name} {_file_digest(file)}\n".encode())
    return hashed.hexdigest()


def _weight_files(path: str, revision: str | None) -> list[Path]:
    """config.json and the weights of a local folder, or of a hub model's snapshot in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    if Path(path).is_dir():
        folder = Path(path)
    else:
        config = try_to_load_from_cache(path, "config.json", revision=revision)
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    weights = sorted(folder.glob("*.safetensors"))
    return [folder / "config.json", *weights] if weights else []


def _file_digest(file: Path) -> str:
    """sha256 of the content; the hub's cache already names large files by it."""
    real = file.resolve()
    if BLOB.fullmatch(real.name):
        return real.name
    with open(real, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
