"""Fused output head on selected positions, in chunks: log-probs of the targets without ever holding all logits.

:meth:`Head.__call__` is two-stage: the forward pass walks over chunks of rows and keeps one logsumexp per row; the
backward pass recomputes each chunk's logits and turns them into `softmax - onehot`. The memory is that of one chunk,
whatever the batch. A single chunk is kept for the backward pass, because recomputing it would save nothing.

:meth:`Head.chunked_backward` is one-stage: where the loss gradient of a part of the log-probs is known as soon as
these are, it is turned into that of the hidden states and the weight while the chunk's logits are in memory, and
nothing is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Tensor = torch.Tensor

LossGrad = Callable[[slice, Tensor, Tensor | None], Tensor]
"""(targets, their log-probs (n,), their argmax tokens if asked for) -> (n,) gradient of the loss."""

CHUNK_ELEMENTS = 2**24
"""Logits in one chunk on a CPU, at most: 64 MiB in float32, about 340 rows of a vocabulary of 49,152."""

GPU_ROWS, GPU_STEP, GPU_SHARE = (1024, 4096), 64, 32
"""Rows of a chunk on a GPU, which wants more of them at a time: least and most, a multiple of 64, so many that logits
in float32 and their gradient take a 32nd of its memory."""

BLOCK_ROWS = 2048
"""Rows of the weight's gradient that are made at a time where their product is narrower than it."""

STRETCH = 2
"""A part of up to so many chunks is taken as one: the memory costs less than computing its logits twice would."""


@dataclass(frozen=True)
class Head:
    """The output projection of a model. `dtype`: precision of its matrix products; sums and softmax are float32."""

    projection: nn.Linear
    transform: Transform
    dtype: torch.dtype

    @property
    def vocabulary(self) -> int:
        return self.projection.out_features

    @property
    def rows(self) -> int:
        """Rows in one chunk."""
        return chunk_rows(self.vocabulary, self.projection.weight.device)

    def matrix(self) -> Tensor:
        """(V, H) the weight in `dtype`, without a graph."""
        copy = getattr(self.projection, "narrow", None) if self.dtype == torch.bfloat16 else None  # `passes.NarrowCopy`
        return self.projection.weight.detach().to(self.dtype) if copy is None else copy.refresh()

    def __call__(self, hidden: Tensor, target_ids: Tensor, with_argmax: bool = False) -> tuple[Tensor, Tensor | None]:
        """(N, H) and (N,) -> log-probs of the targets, (N,) float32, and the argmax tokens (N,) if asked for."""
        weight, bias = self.projection.weight, self.projection.bias
        log_probs, argmax = _SelectedLogProbs.apply(hidden, weight, bias, self, target_ids, with_argmax)
        return log_probs, argmax if with_argmax else None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, room: Room | None = None) -> Tensor:
        """(n, V) transformed logits in at least float32, newly allocated, or in the first n rows of `room`.

        `hidden` (n, H) and `weight` (V, H) are in `dtype`.
        """
        logits = _at_least_float32(torch.mm(hidden, weight.T)) if room is None else room.product(hidden, weight)
        if bias is not None:
            logits += bias
        return self.transform.apply_(logits)

    def chunked_backward(
        self, states: Tensor, target_ids: Tensor, parts: Iterable[slice], loss_grad: LossGrad, with_argmax: bool = False
    ) -> None:
        """Fused backward: loss and gradient part by part while each part's logits are in memory.

        `states`: (N, H) with their graph; `parts` cover all N targets. Gradients of weight and bias are accumulated,
        those of the states are sent on into the body.
        """
        projection, hidden = self.projection, states.detach()
        wants = [t is not None and t.requires_grad for t in (states, projection.weight, projection.bias)]
        sums = _Gradients(hidden, projection.weight, projection.bias, wants, in_place=True)
        # a function of its own, so that its chunk is free before the body's turn
        self._add_parts(sums, hidden, target_ids, parts, loss_grad, with_argmax)
        sums.backward(states, projection.weight, projection.bias)

    def room(self, hidden: Tensor, rows: int) -> Room:
        """Room for the logits of so many rows."""
        wide = torch.promote_types(self.dtype, torch.float32)
        shape, apart = (rows, self.vocabulary), self.dtype != wide and not widens(hidden.device)
        return Room(hidden.new_empty(shape, dtype=wide), hidden.new_empty(shape, dtype=self.dtype) if apart else None)

    def _add_parts(
        self,
        sums: _Gradients,
        hidden: Tensor,
        target_ids: Tensor,
        parts: Iterable[slice],
        loss_grad: LossGrad,
        with_argmax: bool,
    ) -> None:
        """Add the gradients of every part to `sums`; a part of more than STRETCH chunks goes the two-stage way."""
        projection, room = self.projection, self.room(hidden, 0)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            inputs, matrix = hidden.to(self.dtype), self.matrix()
            for part in parts:
                count, wanted = part.stop - part.start, target_ids[part]
                if count > STRETCH * self.rows:
                    with torch.enable_grad():
                        leaf = hidden[part].requires_grad_()
                        log_probs, argmax = self(leaf, wanted, with_argmax)
                    torch.autograd.backward(log_probs, loss_grad(part, log_probs.detach(), argmax))
                    if sums.hidden is not None and leaf.grad is not None:
                        sums.hidden[part] = leaf.grad
                    continue
                if len(room.wide) < count:
                    room = self.room(hidden, 0)  # free it before another is allocated
                    room = self.room(hidden, max(count, self.rows))
                logits = self.logits(inputs[part], matrix, projection.bias, room)
                gradient = self._logits_grad(logits, wanted, part, loss_grad, with_argmax)
                sums.add(part, room.narrowed(gradient), inputs, matrix)

    def _logits_grad(
        self, logits: Tensor, target_ids: Tensor, part: slice, loss_grad: LossGrad, with_argmax: bool
    ) -> Tensor:
        """(n, V) gradient of the raw logits; overwrites the logits themselves."""
        picked, argmax = logits.gather(1, target_ids[:, None]), logits.argmax(1) if with_argmax else None
        peak = logits.amax(1, keepdim=True)
        mass = (logits - peak if self.transform.softcap is not None else logits.sub_(peak)).exp_()
        total = mass.sum(1, keepdim=True)
        incoming = loss_grad(part, (picked - peak - total.log()).squeeze(1), argmax)[:, None].to(mass.dtype)
        gradient = mass.mul_(-incoming / total).scatter_add_(1, target_ids[:, None], incoming)
        return self.transform.backward_(gradient, logits)


@dataclass(frozen=True)
class Room:
    """Memory for a chunk of logits and then their gradient, used again by every chunk: to get that much from the
    operating system takes a CPU longer than to fill it."""

    wide: Tensor  # (rows, V) at least float32
    narrow: Tensor | None  # (rows, V) as the products give and take them, where that is not `wide`

    def product(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """(n, H), (V, H) -> (n, V) their product, in `wide`."""
        out = self.wide[: len(hidden)]
        if self.narrow is not None:
            return out.copy_(torch.mm(hidden, weight.T, out=self.narrow[: len(hidden)]))
        if out.dtype != hidden.dtype:
            return torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
        return torch.mm(hidden, weight.T, out=out)

    def narrowed(self, gradient: Tensor) -> Tensor:
        """(n, V) as products take it."""
        return gradient if self.narrow is None else self.narrow[: len(gradient)].copy_(gradient)


class _Gradients:
    """Gradients of the hidden states, the weight and the bias, as far as they are wanted, summed over chunks.

    `in_place`: add that of the weight to `weight.grad` directly, where autograd need not know.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: Sequence[bool], in_place: bool = False
    ) -> None:
        self.hidden = torch.empty_like(hidden) if wants[0] else None
        own = own_gradient(weight) if in_place and wants[1] else None
        self.added = own is not None
        self.weight = torch.zeros_like(weight) if own is None and wants[1] else own
        self.bias = torch.zeros_like(bias) if bias is not None and wants[2] else None

    def add(self, part: slice, gradient: Tensor, inputs: Tensor, matrix: Tensor) -> None:
        """`gradient`: (n, V) of the raw logits of a chunk; `inputs` (N, H), `matrix` (V, H) in the products' dtype."""
        if self.bias is not None:
            self.bias += gradient.sum(0)
        gradient = gradient.to(matrix.dtype)
        if self.hidden is not None:
            self.hidden[part] = gradient @ matrix
        if self.weight is None:
            return
        if self.weight.dtype == gradient.dtype:
            self.weight.addmm_(gradient.T, inputs[part])
        elif widens(self.weight.device):
            torch.addmm(self.weight, gradient.T, inputs[part], out_dtype=self.weight.dtype, out=self.weight)
        else:
            for some in _chunks(len(self.weight), BLOCK_ROWS):  # a block is added while the cache holds it
                self.weight[some] += gradient[:, some].T @ inputs[part]

    def backward(self, *tensors: Tensor | None) -> None:
        """Send them on to the three tensors and into their graphs."""
        gradients = (self.hidden, None if self.added else self.weight, self.bias)
        pairs = [(t, g) for t, g in zip(tensors, gradients, strict=True) if g is not None]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs if t is not None], [g for _, g in pairs])


@dataclass(frozen=True)
class Predictions:
    """N distributions over the vocabulary, never materialised: hidden states and the head that reads them."""

    states: Tensor  # (N, H) hidden states; (N, V) logits where `head` is None
    head: Head | None

    def selected(self, target_ids: Tensor, with_argmax: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the targets (N,) float32, and the argmax tokens (N,) if asked for."""
        read = self.head or log_probs_of
        return read(self.states, target_ids, with_argmax)

    def divergence_from(self, other: Predictions, beta: float = 0.0) -> Tensor:
        """(N,) generalised Jensen-Shannon divergence (:func:`divergence`) from `other`, summed over the vocabulary;
        gradient into self alone. A chunk at a time, recomputed in the backward pass."""

        def chunk(states: Tensor, theirs: Tensor) -> Tensor:
            with torch.no_grad():
                expected = other.log_softmax(theirs)
            return divergence(expected, self.log_softmax(states), beta)

        return self._by_chunks(chunk, self.states, other.states.detach())

    def entropy(self) -> Tensor:
        """(N,) nats; a chunk at a time, recomputed in the backward pass."""

        def chunk(states: Tensor) -> Tensor:
            log_probs = self.log_softmax(states)
            return -(log_probs.exp() * log_probs).sum(1)

        return self._by_chunks(chunk, self.states)

    def _by_chunks(self, work: Callable[..., Tensor], *states: Tensor) -> Tensor:
        """(N,) of `work` on chunks of these states, whose logits are never kept."""
        vocabulary = self.head.vocabulary if self.head else self.states.shape[1]
        chunks = _chunks(len(self.states), chunk_rows(vocabulary, self.states.device))
        parts = [checkpoint(work, *(side[part] for side in states), use_reentrant=False) for part in chunks]
        return torch.cat(parts) if parts else _at_least_float32(self.states.sum(1))

    @torch.no_grad()
    def collision(self) -> Tensor:
        """(N,) log sum over the vocabulary of p^2, a chunk at a time."""
        return self._by_chunks(lambda states: self.log_softmax(states).mul_(2).logsumexp(1), self.states)

    def log_softmax(self, states: Tensor) -> Tensor:
        """(n, H or V) -> (n, V) in at least float32."""
        if self.head is None:
            return _at_least_float32(states).log_softmax(1)
        projection, dtype = self.head.projection, self.head.dtype
        with torch.autocast(states.device.type, enabled=False):
            logits = self.head.logits(states.to(dtype), projection.weight.to(dtype), projection.bias)
            return logits.log_softmax(1)


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows of a chunk of logits on a device."""
    if device.type != "cuda":
        return max(1, CHUNK_ELEMENTS // vocabulary)
    return gpu_rows(vocabulary, torch.cuda.get_device_properties(device).total_memory)


def gpu_rows(vocabulary: int, memory: int) -> int:
    """Rows of a chunk of logits on a GPU with so many bytes of memory."""
    rows = memory // GPU_SHARE // (8 * vocabulary)
    return min(max(rows - rows % GPU_STEP, GPU_ROWS[0]), GPU_ROWS[1])


@cache
def widens(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices can be had in float32 on this device, by this torch: they are tried."""
    try:
        ones, total = torch.ones(16, 16, device=device, dtype=torch.bfloat16), torch.ones(16, 16, device=device)
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
        product = torch.mm(ones, ones, out_dtype=torch.float32, out=torch.empty_like(total))
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all() and (product == 16).all())


def divergence(theirs: Tensor, ours: Tensor, beta: float) -> Tensor:
    """(n,) generalised Jensen-Shannon divergence (arXiv 2306.13649, eq. 1) of distributions by their log-probs, (n, V)
    each: beta KL(theirs || m) + (1 - beta) KL(ours || m), m = beta theirs + (1 - beta) ours.

    Its ends are KL(theirs || ours) at beta = 0 and KL(ours || theirs) at 1, as in TRL; the formula itself is 0 there,
    and near them beta, or 1 - beta, times that divergence.
    """

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p.exp() * (p - q)).sum(1)

    if beta in (0, 1):
        return kl(theirs, ours) if beta == 0 else kl(ours, theirs)
    mixed = torch.logaddexp(theirs + math.log(beta), ours + math.log1p(-beta))
    return beta * kl(theirs, mixed) + (1 - beta) * kl(ours, mixed)


def log_probs_of(logits: Tensor, target_ids: Tensor, with_argmax: bool = False) -> tuple[Tensor, Tensor | None]:
    """(N, V) and (N,) -> what `Head` returns, from full logits."""
    logits = _at_least_float32(logits)
    picked = logits.gather(1, target_ids[:, None]).squeeze(1)
    return picked - logits.logsumexp(1), logits.argmax(1) if with_argmax else None


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _chunks(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


class _SelectedLogProbs(torch.autograd.Function):
    """log softmax(transform(hidden @ weight.T + bias))[target], first derivatives only."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, target_ids: Tensor, with_argmax: bool
    ) -> tuple[Tensor, Tensor]:
        count, dtype, rows = hidden.shape[0], head.dtype, head.rows
        log_probs = _at_least_float32(hidden.new_empty(count, dtype=dtype))
        normaliser = torch.empty_like(log_probs)
        argmax = torch.empty_like(target_ids if with_argmax else target_ids[:0])
        keep = count <= rows and any(ctx.needs_input_grad)
        room = head.room(hidden, min(count, rows))
        logits = room.wide
        with torch.autocast(hidden.device.type, enabled=False):
            inputs, matrix = hidden.to(dtype), head.matrix()
            for part in _chunks(count, rows):
                logits = head.logits(inputs[part], matrix, bias, room)
                picked = logits.gather(1, target_ids[part, None]).squeeze(1)
                if with_argmax:
                    argmax[part] = logits.argmax(1)
                if keep:
                    normaliser[part] = logits.logsumexp(1)
                else:  # in place
                    peak = logits.amax(1, keepdim=True)
                    normaliser[part] = logits.sub_(peak).exp_().sum(1).log_() + peak.squeeze(1)
                log_probs[part] = picked - normaliser[part]
        ctx.save_for_backward(hidden, weight, bias, target_ids, normaliser, logits if keep else None)
        ctx.head, ctx.rows = head, rows
        ctx.mark_non_differentiable(argmax)
        return log_probs, argmax

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target_ids, normaliser, kept = ctx.saved_tensors
        head, sums = ctx.head, _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            inputs, matrix = hidden.to(head.dtype), head.matrix()
            room = head.room(hidden, min(len(hidden), ctx.rows) if kept is None else 0)
            for part in _chunks(hidden.shape[0], ctx.rows):
                logits = kept if kept is not None else head.logits(inputs[part], matrix, bias, room)
                apart = kept is not None or head.transform.softcap is not None  # the logits themselves are needed
                shifted = logits - normaliser[part, None] if apart else logits.sub_(normaliser[part, None])
                gradient = shifted.exp_().neg_()  # onehot - softmax, times the incoming gradient
                gradient.scatter_add_(1, target_ids[part, None], gradient.new_ones(gradient.shape[0], 1))
                head.transform.backward_(gradient.mul_(incoming[part, None]), logits)
                sums.add(part, gradient if kept is not None else room.narrowed(gradient), inputs, matrix)
        return sums.hidden, sums.weight, sums.bias, None, None, None


@dataclass(frozen=True)
class Transform:
    """The function that an architecture applies to `hidden @ weight.T + bias` before the softmax."""

    scale: float = 1.0  # Cohere multiplies by logit_scale, Granite divides by logits_scaling
    softcap: float | None = None  # Gemma 2 and 3: softcap * tanh(logits / softcap)

    def apply_(self, logits: Tensor) -> Tensor:
        """In place, and returns it; a copy where autograd needs the value of tanh."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is None:
            return logits
        capped = logits.div_(self.softcap).tanh_()
        return capped * self.softcap if capped.requires_grad else capped.mul_(self.softcap)

    def backward_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Gradient with respect to the raw logits, in place; `logits` are the transformed ones."""
        if self.softcap is not None:
            gradient.mul_(1 - (logits / self.softcap).square_())
        if self.scale != 1.0:
            gradient.mul_(self.scale)
        return gradient


SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_scaling": -1}
"""Configuration keys of known logit scales: 1 multiplies, -1 divides. `Policy.check_head` tells when this is wrong."""


def transform_of(config: Any) -> Transform:
    """The transform that a transformers configuration asks for."""
    scale = 1.0
    for key, power in SCALES.items():
        value = getattr(config, key, None)
        if isinstance(value, int | float):
            scale *= float(value) ** power
    softcap = getattr(config, "final_logit_softcapping", None)
    return Transform(scale, None if softcap is None else float(softcap))


# --- Gradients of vocabulary-sized weights, accumulated in place
#
# Autograd allocates a matrix of the weight's size for every micro-batch and adds it to `grad`. For the embedding and
# the output head that is vocabulary x hidden size, written and read several times for the sake of a few rows.


def own_gradient(weight: Tensor) -> Tensor | None:
    """`weight.grad` to add to, allocated if there is none; None where a hook or DTensor needs autograd's."""
    if not keeps_its_own(weight):
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def keeps_its_own(weight: Tensor) -> bool:
    """Whether no hook and no subclass depends on autograd accumulating the gradient of `weight`."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_leaf
    return plain and not weight._backward_hooks and not weight._post_accumulate_grad_hooks


@contextmanager
def embedding_in_place(module: nn.Module) -> Iterator[None]:
    """Within, the backward pass of an embedding adds to the rows that were looked up and touches no other.

    Autograd must not be asked for its gradient then. An embedding that is more than a table is left unchanged.
    """
    plain = (
        type(module) is nn.Embedding
        and module.weight.requires_grad
        and not (module.max_norm is not None or module.scale_grad_by_freq or module.sparse)
        and "forward" not in vars(module)
    )
    if not plain or not keeps_its_own(module.weight):  # type: ignore[arg-type]
        yield
        return
    module.forward = partial(_Embedded.apply, module.weight, module.padding_idx)
    try:
        yield
    finally:
        del module.forward


class _Embedded(torch.autograd.Function):
    """weight[ids], first derivatives only."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, padding: int | None, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return weight[ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[None, None, None]:
        (ids,) = ctx.saved_tensors
        if ctx.padding is not None:  # padding tokens have no gradient
            incoming = incoming.masked_fill((ids == ctx.padding)[..., None], 0.0)
        total = own_gradient(ctx.weight)
        assert total is not None
        total.index_add_(0, ids.flatten(), incoming.flatten(0, -2).to(total.dtype))
        return None, None, None
