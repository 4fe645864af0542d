"""The output head on selected positions, in chunks: log-probs of the targets without ever holding all logits.

Two-stage: the forward pass walks over chunks of rows and keeps one logsumexp per row; the backward pass makes each
chunk's logits again and turns them into `softmax - onehot`. What is held is one chunk, whatever the batch. A single
chunk is kept for the backward pass instead, because then making it again would save nothing.

In one visit: where somebody can tell the gradient of a part of the log-probs as soon as these are known, it is turned
into that of the hidden states and the weight while the logits are still there, and nothing is made twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Tensor = torch.Tensor

LossGrad = Callable[[slice, Tensor, Tensor | None], Tensor]
"""(which targets, their log-probs (n,), their argmax tokens if asked for) -> (n,) gradient of the loss."""

CHUNK_ELEMENTS = 2**24
"""Logits in one chunk, at most: 64 MiB in float32, about 340 rows of a vocabulary of 49,152."""

STRETCH = 2
"""A part of up to so many chunks is visited as one: the memory costs less than making its logits twice would."""


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
        return max(1, CHUNK_ELEMENTS // self.vocabulary)

    def __call__(self, hidden: Tensor, target_ids: Tensor, with_argmax: bool = False) -> tuple[Tensor, Tensor | None]:
        """(N, H) and (N,) -> log-probs of the targets, (N,) float32, and the argmax tokens (N,) if asked for."""
        log_probs, argmax = _SelectedLogProbs.apply(
            hidden,
            self.projection.weight,
            self.projection.bias,
            target_ids,
            self.transform,
            self.dtype,
            self.rows,
            with_argmax,
        )
        return log_probs, argmax if with_argmax else None

    def chunked_backward(
        self, states: Tensor, target_ids: Tensor, parts: Iterable[slice], loss_grad: LossGrad, with_argmax: bool = False
    ) -> None:
        """Backward pass of a loss that `judge` tells the gradient of, part by part; `parts` cover all N targets."""
        projection, hidden = self.projection, states.detach()
        wants = [t is not None and t.requires_grad for t in (states, projection.weight, projection.bias)]
        sums = _Gradients(hidden, projection.weight, projection.bias, wants, in_place=True)
        self._backward_parts(
            hidden, target_ids, parts, loss_grad, with_argmax, sums
        )  # its chunk is gone when the body's turn comes
        sums.backward(states, projection.weight, projection.bias)

    def _backward_parts(
        self,
        hidden: Tensor,
        target_ids: Tensor,
        parts: Iterable[slice],
        loss_grad: LossGrad,
        with_argmax: bool,
        sums: _Gradients,
    ) -> None:
        """Add the gradients of every part to `sums`."""
        projection, buffer = self.projection, hidden.new_empty(0, dtype=self.dtype)
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            inputs, matrix = hidden.to(self.dtype), projection.weight.to(self.dtype)
            for part in parts:
                count = part.stop - part.start
                if count > STRETCH * self.rows:
                    self._backward_in_two_stages(hidden[part], target_ids, part, loss_grad, with_argmax, sums)
                    continue
                if len(buffer) < count:
                    buffer = hidden.new_empty(0, dtype=self.dtype)  # let go of before another is made
                    buffer = inputs.new_empty(max(count, self.rows), self.vocabulary)
                logits = _logits(inputs[part], matrix, projection.bias, self.transform, out=buffer[:count])
                sums.add(
                    part, self._logits_grad(logits, target_ids[part], part, loss_grad, with_argmax), inputs, matrix
                )

    def _logits_grad(
        self, logits: Tensor, target_ids: Tensor, part: slice, loss_grad: LossGrad, with_argmax: bool
    ) -> Tensor:
        """(n, V) gradient of the raw logits; the logits themselves are gone after it."""
        picked, argmax = logits.gather(1, target_ids[:, None]), logits.argmax(1) if with_argmax else None
        peak = logits.amax(1, keepdim=True)
        mass = (logits - peak if self.transform.softcap is not None else logits.sub_(peak)).exp_()
        total = mass.sum(1, keepdim=True)
        incoming = loss_grad(part, (picked - peak - total.log()).squeeze(1), argmax)[:, None].to(mass.dtype)
        gradient = mass.mul_(-incoming / total).scatter_add_(1, target_ids[:, None], incoming)
        return self.transform.backward_(gradient, logits)

    def _backward_in_two_stages(
        self, hidden: Tensor, target_ids: Tensor, part: slice, loss_grad: LossGrad, with_argmax: bool, sums: _Gradients
    ) -> None:
        """A part of more than STRETCH chunks: its logits are made once to judge it and once more for the gradients."""
        with torch.enable_grad():
            leaf = hidden.requires_grad_()
            log_probs, argmax = self(leaf, target_ids[part], with_argmax)
        torch.autograd.backward(log_probs, loss_grad(part, log_probs.detach(), argmax))
        if sums.hidden is not None and leaf.grad is not None:
            sums.hidden[part] = leaf.grad


class _Gradients:
    """Of the hidden states, the weight and the bias, as far as they are wanted, summed over chunks.

    `in_place`: that of the weight is its own, where it keeps one, and nothing is left to hand on.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: Sequence[bool], in_place: bool = False
    ) -> None:
        self.hidden = torch.empty_like(hidden) if wants[0] else None
        own = own_gradient(weight) if in_place and wants[1] else None
        self.added = own is not None
        self.weight = own if own is not None else torch.zeros_like(weight) if wants[1] else None
        self.bias = torch.zeros_like(bias) if bias is not None and wants[2] else None

    def add(self, part: slice, gradient: Tensor, inputs: Tensor, matrix: Tensor) -> None:
        """`gradient`: (n, V) of the raw logits of a chunk; `inputs` (N, H), `matrix` (V, H) in the products' dtype."""
        if self.bias is not None:
            self.bias += gradient.sum(0)
        gradient = gradient.to(matrix.dtype)
        if self.hidden is not None:
            self.hidden[part] = gradient @ matrix
        if self.weight is not None:
            _add_product_(self.weight, gradient.T, inputs[part])

    def backward(self, *tensors: Tensor | None) -> None:
        """Hand them on to the three tensors and to whatever these were made of."""
        gradients = (self.hidden, None if self.added else self.weight, self.bias)
        pairs = [(t, g) for t, g in zip(tensors, gradients, strict=True) if g is not None]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs if t is not None], [g for _, g in pairs])


@dataclass(frozen=True)
class Predictions:
    """N distributions over the vocabulary that are never all there: hidden states and the head that reads them."""

    states: Tensor  # (N, H) hidden states; (N, V) logits where `head` is None
    head: Head | None

    def selected(self, target_ids: Tensor, with_argmax: bool = False) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the targets (N,) float32, and the argmax tokens (N,) if asked for."""
        read = self.head or log_probs_of
        return read(self.states, target_ids, with_argmax)

    def divergence_from(self, other: Predictions) -> Tensor:
        """(N,) KL(other || self), summed over the vocabulary; gradient into self alone. A chunk at a time, made again
        in the backward pass."""
        rows = max(1, CHUNK_ELEMENTS // self.vocabulary)

        def chunk(states: Tensor, theirs: Tensor) -> Tensor:
            with torch.no_grad():
                expected = other.log_softmax(theirs)
            return (expected.exp() * (expected - self.log_softmax(states))).sum(1)

        parts = [
            checkpoint(chunk, self.states[part], other.states[part].detach(), use_reentrant=False)
            for part in _chunks(len(self.states), rows)
        ]
        return torch.cat(parts) if parts else _at_least_float32(self.states.sum(1))

    def log_softmax(self, states: Tensor) -> Tensor:
        """(n, H or V) -> (n, V) in at least float32."""
        if self.head is None:
            return _at_least_float32(states).log_softmax(1)
        projection, dtype = self.head.projection, self.head.dtype
        with torch.autocast(states.device.type, enabled=False):
            logits = _logits(states.to(dtype), projection.weight.to(dtype), projection.bias, self.head.transform)
            return logits.log_softmax(1)

    @property
    def vocabulary(self) -> int:
        return self.head.vocabulary if self.head else self.states.shape[1]


def log_probs_of(logits: Tensor, target_ids: Tensor, with_argmax: bool = False) -> tuple[Tensor, Tensor | None]:
    """(N, V) and (N,) -> what `Head` returns, of logits that are all there."""
    logits = _at_least_float32(logits)
    picked = logits.gather(1, target_ids[:, None]).squeeze(1)
    return picked - logits.logsumexp(1), logits.argmax(1) if with_argmax else None


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _chunks(count: int, rows: int) -> Iterator[slice]:
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: Transform, out: Tensor | None = None
) -> Tensor:
    """One chunk of transformed logits in at least float32, freshly made, or in `out` if that has their dtype."""
    logits = _at_least_float32(torch.mm(hidden, weight.T, out=out))
    if bias is not None:
        logits += bias
    return transform.apply_(logits)


class _SelectedLogProbs(torch.autograd.Function):
    """log softmax(transform(hidden @ weight.T + bias))[target], first derivatives only."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        transform: Transform,
        dtype: torch.dtype,
        rows: int,
        with_argmax: bool,
    ) -> tuple[Tensor, Tensor]:
        count = hidden.shape[0]
        log_probs = _at_least_float32(hidden.new_empty(count, dtype=dtype))
        normaliser = torch.empty_like(log_probs)
        argmax = torch.empty_like(target_ids if with_argmax else target_ids[:0])
        keep = count <= rows and any(ctx.needs_input_grad)
        logits = buffer = hidden.new_empty(min(count, rows), weight.shape[0], dtype=dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            inputs, matrix = hidden.to(dtype), weight.to(dtype)
            for part in _chunks(count, rows):
                logits = _logits(inputs[part], matrix, bias, transform, out=buffer[: part.stop - part.start])
                picked = logits.gather(1, target_ids[part, None]).squeeze(1)
                if with_argmax:
                    argmax[part] = logits.argmax(1)
                normaliser[part] = logits.logsumexp(1) if keep else _logsumexp_(logits)
                log_probs[part] = picked - normaliser[part]
        kept = logits if keep else None
        ctx.save_for_backward(hidden, weight, bias, target_ids, normaliser, kept)
        ctx.transform, ctx.dtype, ctx.rows = transform, dtype, rows
        ctx.mark_non_differentiable(argmax)
        return log_probs, argmax

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target_ids, normaliser, kept = ctx.saved_tensors
        sums = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            inputs, matrix = hidden.to(ctx.dtype), weight.to(ctx.dtype)
            for part in _chunks(hidden.shape[0], ctx.rows):
                logits = kept if kept is not None else _logits(inputs[part], matrix, bias, ctx.transform)
                apart = kept is not None or ctx.transform.softcap is not None  # somebody needs the logits themselves
                shifted = logits - normaliser[part, None] if apart else logits.sub_(normaliser[part, None])
                gradient = shifted.exp_().neg_()  # onehot - softmax, times what comes in
                gradient.scatter_add_(1, target_ids[part, None], gradient.new_ones(gradient.shape[0], 1))
                ctx.transform.backward_(gradient.mul_(incoming[part, None]), logits)
                sums.add(part, gradient, inputs, matrix)
        return sums.hidden, sums.weight, sums.bias, None, None, None, None, None


def _logsumexp_(logits: Tensor) -> Tensor:
    """(n, V) -> (n,), and the logits are gone."""
    peak = logits.amax(1, keepdim=True)
    return logits.sub_(peak).exp_().sum(1).log_() + peak.squeeze(1)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; in one call where the precisions agree."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


# --- What architectures do to logits before the softmax.


@dataclass(frozen=True)
class Transform:
    """What an architecture does to `hidden @ weight.T + bias` before the softmax."""

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


# --- Gradients of vocabulary-sized weights, added where they are kept.
#
# Autograd makes a matrix of the weight's size for every micro-batch and adds it to what is there. For the embedding
# and
# the output head that is a vocabulary times the hidden size, written and read several times for the sake of a few
# rows.


def own_gradient(weight: Tensor) -> Tensor | None:
    """`weight.grad` to add to, made if there is none; None where somebody else must be told of a gradient."""
    if not keeps_its_own(weight):
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def keeps_its_own(weight: Tensor) -> bool:
    """Whether nobody waits for autograd to bring the gradient of `weight`."""
    plain = type(weight) in (Tensor, nn.Parameter) and weight.is_leaf
    return plain and not weight._backward_hooks and not weight._post_accumulate_grad_hooks


@contextmanager
def embedding_in_place(module: nn.Module) -> Iterator[None]:
    """While inside, the backward pass of an embedding adds to the rows that were looked up and touches no other.

    Nobody may ask autograd for its gradient then. An embedding that is more than a table stays as it is.
    """
    if not isinstance(module, nn.Embedding) or not _plain(module) or not keeps_its_own(module.weight):
        yield
        return
    module.forward = partial(_Embedded.apply, module.weight, module.padding_idx)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


def _plain(module: nn.Embedding) -> bool:
    unusual = module.max_norm is not None or module.scale_grad_by_freq or module.sparse or "forward" in vars(module)
    return type(module) is nn.Embedding and module.weight.requires_grad and not unusual


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
        if ctx.padding is not None:  # a padding token learns nothing
            incoming = incoming.masked_fill((ids == ctx.padding)[..., None], 0.0)
        total = own_gradient(ctx.weight)
        assert total is not None
        total.index_add_(0, ids.flatten(), incoming.flatten(0, -2).to(total.dtype))
        return None, None, None
