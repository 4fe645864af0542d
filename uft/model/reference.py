"""The reference: the initial policy, or another model, whose log-probs of the same targets objectives compare with.

Three modes that agree to 1e-5: a frozen copy beside the policy, the policy with its adapter switched off, and log-probs
computed once and cached on disk. All start from the files of `model.path` (or `reference.path`), never from a
checkpoint, so that a resumed run has the same reference.
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

log = logging.getLogger(__name__)

VISITS_WORTH_A_CACHE = 1.5
"""Visits per row from which one pass over all rows is cheaper than a forward of the copy at every visit."""


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
    whether the objective compares with whole distributions; `longest_row`: tokens of the longest sequence. Raises
    UftError for a mode that is impossible and a model that cannot be loaded.
    """
    mode, why = choose_mode(model, reference, visits_per_row, distributions)

    def frozen() -> Frozen:
        if model.adapter == "lora" and reference.path is None:
            return Frozen(policy)
        other = load_frozen(model, device, reference.path)
        check_vocabulary(other.base, tokenizer, "reference.path" if reference.path else "model.path")
        if reference.path:
            check_alike(other, policy, reference.path, longest_row, distributions)
        follow_layout(other, policy, longest_row)
        return Frozen(other)

    if mode != "cached":
        return Reference(mode, why, frozen())
    identity = {
        "weights": weights_digest(whereabouts(model, reference.path), lambda: load_base(model, device, reference.path)),
        "dtype": f"{model.dtype} of {storage_dtype(model)}",
        "attention": f"{model.attention} {policy.attention}",
        "device": device.type,
        **({} if policy.layout is Layout.PADDED else {"layout": policy.layout.value}),
    }
    store = LogProbStore.of(cache / "reference", identity)
    column = ReferenceColumn(store, frozen, pad_id(tokenizer), device, policy.layout)
    return Reference(mode, why, FromColumn(), column)


def check_alike(other: Policy, policy: Policy, path: str, longest_row: int, distributions: bool) -> None:
    """Raise UftError where another model cannot stand as the reference: too few positions for the longest row, or, for
    an objective that compares whole distributions, a vocabulary of another size."""
    configs = [side.base.config.get_text_config() for side in (policy, other)]
    positions = getattr(configs[1], "max_position_embeddings", None)
    if positions and longest_row > positions:
        why = f"has {positions} positions, and sequences of this run have up to {longest_row} tokens"
        advice = (f"train.max_length={positions} data.too_long=drop|truncate",)
        raise UftError(Problem(f"reference.path={path}", why, advice=advice))
    ours, theirs = (getattr(config, "vocab_size", None) for config in configs)
    if distributions and ours != theirs:
        why = f"has a vocabulary of {theirs} tokens, the policy of {ours}"
        advice = ("this objective compares whole distributions: padded tokens count too",)
        raise UftError(Problem(f"reference.path={path}", why, advice=advice))


def choose_mode(
    model: Model, reference: ReferenceModel, visits_per_row: float, distributions: bool = False
) -> tuple[str, str]:
    """(mode, one line why). Raises UftError for a mode that is impossible."""
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
        with self._initial() as policy:
            return policy(batch, request)

    def predictions(self, batch: Batch) -> Predictions:
        with self._initial() as policy:
            return policy.predictions(batch)

    @contextmanager
    def _initial(self) -> Iterator[Policy]:
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


class Encoded(Protocol):
    """A completion as token ids with its supervised mask."""

    @property
    def ids(self) -> np.ndarray: ...

    @property
    def supervised(self) -> np.ndarray: ...


def sequence_key(ids: np.ndarray, supervised: np.ndarray) -> bytes:
    """16 bytes that identify a sequence."""
    hashed = hashlib.blake2b(np.asarray(ids, dtype="<i4").tobytes(), digest_size=16)
    hashed.update(np.packbits(np.asarray(supervised, dtype=bool)).tobytes())
    return hashed.digest()


class ReferenceColumn:
    """The cached reference of a run: filled once, then read for every completion that goes into a batch."""

    def __init__(
        self,
        store: LogProbStore,
        forward: Callable[[], Forward],
        pad_id: int,
        device: torch.device,
        layout: Layout = Layout.PADDED,
    ) -> None:
        self.store = store
        self.forward = forward  # loads the model, only when something is missing
        self.pad_id = pad_id
        self.device = device
        self.layout = layout  # part of the store's identity

    def __call__(self, encoded: Encoded) -> np.ndarray:
        """(supervised tokens,) float32, in reading order. KeyError: `fill` has not seen this sequence."""
        return self.store.values[sequence_key(encoded.ids, encoded.supervised)]

    def missing(self, encoded: Iterable[Encoded]) -> dict[bytes, TokenSequence]:
        """The sequences that are not on disk yet, each once."""
        keyed = ((sequence_key(one.ids, one.supervised), (one.ids, one.supervised)) for one in encoded)
        return {key: sequence for key, sequence in keyed if key not in self.store.values}

    @activity("reference log-probs were computed")
    def fill(
        self,
        encoded: Iterable[Encoded],
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
        group, encoded = ranks(), list(encoded)
        mine = self.missing(encoded)
        # of all processes: each machine may have a cache of its own
        absent = frozenset[bytes]().union(*group.gather_objects(frozenset(mine)))
        if not absent:
            return True
        keyed = ((sequence_key(one.ids, one.supervised), (one.ids, one.supervised)) for one in encoded)
        sequences = {key: sequence for key, sequence in keyed if key in absent}
        forward = self.forward()
        # similar lengths (packed: equal prompts) together, and files in that order, so that batches stay full
        padded = self.layout is Layout.PADDED

        def order(key: bytes) -> tuple[int, bytes]:
            prompt = b"" if padded else prompt_of(sequences[key])
            return len(sequences[key][0]) if padded else len(prompt), prompt

        keys = sorted(sequences, key=order)
        files = [keys[start : start + SEQUENCES_PER_FILE] for start in range(0, len(keys), SEQUENCES_PER_FILE)]

        def compute(share: Sequence[Sequence[bytes]]) -> list[dict[bytes, np.ndarray] | None]:
            parts = ({key: sequences[key] for key in file} for file in share)
            return [self._compute(forward, part, batch_tokens, should_stop) for part in parts]

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
        part: Mapping[bytes, TokenSequence],
        batch_tokens: int,
        should_stop: Callable[[], bool],
    ) -> dict[bytes, np.ndarray] | None:
        """Log-probs of each sequence of a file; None when asked to stop."""
        found: dict[bytes, np.ndarray] = {}
        for pieces in sequence_log_probs(
            forward, part, self.pad_id, self.device, batch_tokens, should_stop, self.layout
        ):
            found.update({key: piece.numpy().copy() for key, piece in pieces.items()})
        return found if len(found) == len(part) else None


def sequence_log_probs(
    forward: Forward,
    sequences: Mapping[bytes, TokenSequence],
    pad_id: int,
    device: torch.device,
    batch_tokens: int,
    should_stop: Callable[[], bool],
    layout: Layout = Layout.PADDED,
) -> Iterator[dict[bytes, Tensor]]:
    """Log-probs of each sequence's targets, (n,) float32 on the CPU, batch by batch; ends early when asked to stop."""
    keys, values = list(sequences), list(sequences.values())
    lengths = [len(ids) for ids, _ in values]
    for group in batches_of(lengths, batch_tokens) if layout is Layout.PADDED else packs_of(values, batch_tokens):
        if should_stop():
            return
        batch = sequence_batch([values[at] for at in group], pad_id, layout).to(device)
        pieces = forward(batch).log_probs.float().cpu().split(batch.lengths.tolist())
        yield {keys[at]: piece for at, piece in zip(group, pieces, strict=True)}


class LogProbStore:
    """The files of one model: sequence key -> (n,) float32, the log-probs of its targets or a number made of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.on_disk = True  # False after a failed write: values are kept in memory alone
        self.values: dict[bytes, np.ndarray] = {}
        for file in sorted(folder.glob("*.safetensors")):
            found = _read(file)
            if found is None:
                log.warning("reference cache %s is damaged (checksum): computing its log-probs again", file)
                file.unlink(missing_ok=True)
            else:
                self.values.update(found)

    @classmethod
    def of(cls, root: Path, identity: Mapping[str, str]) -> LogProbStore:
        """The store below `root` of the model that `identity` describes."""
        text = json.dumps({**identity, "format": FORMAT}, sort_keys=True)
        folder = root / hashlib.sha256(text.encode()).hexdigest()[:24]
        clear_left(folder, ".*.tmp")
        store, about = cls(folder), folder / "reference.json"
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
        final = self.folder / f"{checksum[:24]}.safetensors"
        beside = self.folder / f".{final.name}.{os.getpid()}.tmp"
        with self._writing():
            try:
                with open(beside, "wb") as handle:
                    handle.write(save(arrays, metadata={"checksum": checksum}))
                    handle.flush()
                    os.fsync(handle.fileno())
                os.replace(beside, final)
            finally:
                beside.unlink(missing_ok=True)

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


# --- Identity of a model's weights

BLOB = re.compile(r"[0-9a-f]{64}")


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
        if not BLOB.fullmatch(digest):
            with open(real, "rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        hashed.update(f"{file.name} {digest}\n".encode())
    return hashed.hexdigest()


def _weight_files(place: Location) -> list[Path]:
    """config.json and the weights of a local folder, or of a hub model's snapshot in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(place.path)
    if not folder.is_dir():
        config = try_to_load_from_cache(place.path, "config.json", revision=place.revision)
        if not isinstance(config, str):
            return []
        folder = Path(config).parent
    weights = sorted(folder.glob("*.safetensors"))
    return [folder / "config.json", *weights] if weights else []
