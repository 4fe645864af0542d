"""Policy: a language model as objectives see it, a callable from a batch to log-probs of its supervised targets."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from uft.config.schema import Lora
from uft.data.batch import NOT_AN_INPUT, Batch, Layout, TokenSequence, sequence_batch
from uft.distributed import shard_like
from uft.errors import Problem, UftError, did_you_mean, raise_problems
from uft.model.attention import PACKED, no_mask
from uft.model.head import Head, LossGrad, Predictions, embedding_in_place, transform_of
from uft.model.passes import EmbeddingNoise, NarrowCopy, narrow_linears, offloading
from uft.model.precision import is_quantised, weights_in
from uft.objectives.base import PLAIN, ForwardOutput, ForwardRequest

Tensor = torch.Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LEAK = 0.1
"""Share of the tolerance by which a row may move when others change: the same kernels on the same shapes."""

HEAD_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference between our head's log-probs and the model's own, per unit of the largest log-prob."""


class Policy:
    """A transformers causal language model, or a PEFT model around one, as a `Forward`.

    The body runs once; only hidden states whose output predicts a supervised target meet the output head, in chunks.
    The caller decides about gradients (`torch.no_grad()`) and about dropout (`train()`, `eval()`).
    """

    def __init__(self, module: nn.Module, dtype: str = "float32") -> None:
        self.module = module
        self.dtype = dtype
        self.has_adapter = hasattr(module, "peft_config")
        # the transformers model itself; inside a PEFT model its layers carry the adapter
        untyped: Any = module
        self.base: Any = untyped.get_base_model() if self.has_adapter else untyped
        self.body: nn.Module = self.base.get_decoder()
        self.embeddings: nn.Module = self.base.get_input_embeddings()
        self.head: Head | None = None  # where the head is not one plain matrix (an adapter on it): the model's own path
        projection = self.base.get_output_embeddings()
        # beside one that is trained whole there is the original: attributes are those of the one in effect
        if type(getattr(projection, "original_module", projection)) is nn.Linear:
            self.head = Head(projection, transform_of(self.base.config.get_text_config()), DTYPES[dtype])
        self.notes: list[str] = list(getattr(self.base, "uft_notes", ()))  # of `load.load_base`
        self.sharded_states = self.states  # a sharded model wraps it: the root's weights are gathered around it
        self.reshard: Callable[[], None] = lambda: None  # sharded: free the weights gathered by a forward pass
        self.layout = Layout.PADDED  # of the batches it is given: `layout.settle_layout`
        self.takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters
        self.takes_embeddings = True  # in place of tokens; not where layers look tokens up by themselves (Gemma 3n)
        self.keeps_logits = "logits_to_keep" in inspect.signature(self.base.forward).parameters
        self.first_position = 0  # RoBERTa and its kin begin behind the padding token's number: see `check_rows`
        self.noise: EmbeddingNoise | None = None  # in training, of the current step
        self.narrow: list[NarrowCopy] = []  # of weights that are multiplied in bfloat16: see `cast_once`
        self.compiled = False  # its blocks: `layout.compile_blocks`
        self.offloads = False  # activations wait for the backward pass in the CPU's memory
        self.caches: bool | None = None  # whether it generates right with its cache: `sampling.generate` tries it

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def size(self) -> int:
        """Weights in all."""
        return sum(map(weights_in, self.module.parameters()))

    @property
    def attention_kernel(self) -> str:
        """The attention implementation in use; transformers has no public name for it."""
        return str(self.base.config.get_text_config()._attn_implementation)

    @property
    def attention(self) -> str:
        """The attention implementation asked for; packed, the one that ours replaces."""
        return next((base for base, packed in PACKED.items() if packed == self.attention_kernel), self.attention_kernel)

    @property
    def embedding_rows(self) -> int:
        """Tokens the model has an embedding for."""
        return int(self.base.get_input_embeddings().weight.shape[0])

    @property
    def vocabulary(self) -> int:
        """Tokens that it both reads and predicts; embeddings may have rows for more."""
        return int(min(self.embedding_rows, getattr(self.base.config.get_text_config(), "vocab_size", math.inf)))

    @property
    def positions(self) -> int | None:
        """Tokens of the longest sequence that it has positions for; None: no limit."""
        most = position_limit(self.base.config)
        return most and most - self.first_position

    @property
    def recomputes(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules())

    def train(self, mode: bool = True) -> Policy:
        self.module.train(mode)
        return self

    def eval(self) -> Policy:
        return self.train(False)

    def cast_once(self) -> None:
        """From here on cast trained weights of linear layers to bfloat16 when they have changed, not in every pass."""
        self.narrow = narrow_linears(self.module) if self.dtype == "bfloat16" else []

    def weights_changed(self) -> None:
        """To be called after every update."""
        for copy in self.narrow:
            copy.version = -1

    # --- forward and backward

    def __call__(self, batch: Batch, request: ForwardRequest = PLAIN) -> ForwardOutput:
        """See `objectives.base.Forward`. An argmax asked for without gradients is made without dropout: it is the
        model's most likely token, not a sample of it."""
        if request.argmax and not torch.is_grad_enabled() and self.module.training:
            with evaluating(self.module):
                return self(batch, request)
        ours = self.predictions(batch, request)
        log_probs, argmax = ours.selected(batch.target_ids, request.argmax)
        entropy = ours.entropy() if request.entropy else None
        collision = ours.collision() if request.collision else None
        if request.anchor is None:
            return ForwardOutput(log_probs, argmax, None, collision, entropy)
        assert isinstance(request.anchor, Frozen), "this reference keeps log-probs of the targets alone"
        divergence = ours.divergence_from(request.anchor.predictions(batch), request.beta)
        return ForwardOutput(log_probs, argmax, divergence, collision, entropy)

    def predictions(self, batch: Batch, request: ForwardRequest = PLAIN) -> Predictions:
        """The distributions that the targets are drawn from."""
        states = self.sharded_states(batch, request)
        return Predictions(states.flatten(0, 1).index_select(0, batch.predictor), self.head)

    def chunked_backward(
        self, batch: Batch, request: ForwardRequest, parts: Iterable[slice], loss_grad: LossGrad
    ) -> None:
        """Forward and fused backward: `loss_grad` maps the log-probs of each part to their gradient.

        `parts` cover the batch's targets; each part's logits are computed once, and the gradients of head and embedding
        are accumulated in place. Only where there is a `head`.
        """
        with embedding_in_place(self.embeddings):
            predictions = self.predictions(batch, request)
        assert predictions.head is not None
        predictions.head.chunked_backward(predictions.states, batch.target_ids, parts, loss_grad, request.argmax)

    def states(self, batch: Batch, request: ForwardRequest) -> Tensor:
        """(B, L, H) hidden states; (B, L, V) logits where the model keeps its own head."""
        inputs: dict[str, Any] = {"attention_mask": batch.attention_mask}
        if batch.segments is not None:
            inputs = {"attention_mask": no_mask(batch.input_ids.device), "segments": batch.segments}
        if self.takes_positions:
            inputs["position_ids"] = batch.position_ids + self.first_position
        mixing = request.replace is not None and request.mix != 0
        learning = torch.is_grad_enabled()
        noise = self.noise if learning and self.module.training else None
        if request.embed_grad and not mixing and noise is None:
            inputs["input_ids"] = batch.input_ids
        else:  # always through the model's own module: Gemma scales there
            self.require_embeddings("objective")
            with nullcontext() if request.embed_grad else torch.no_grad():
                embedded = self.embeddings(batch.input_ids)
                if mixing and request.replace is not None:  # those of the targets that are among the inputs
                    among, flat = batch.place != NOT_AN_INPUT, embedded.flatten(0, 1)
                    place, others = batch.place[among], self.embeddings(request.replace[among])
                    mixed = (1 - request.mix) * flat[place] + request.mix * others
                    embedded = flat.index_copy(0, place, mixed.to(flat.dtype)).view_as(embedded)
                inputs["inputs_embeds"] = embedded if noise is None else embedded + noise.like(embedded, batch)
        for copy in self.narrow:
            copy.refresh()
        offload = offloading(self.module) if self.offloads and learning else nullcontext()
        with offload, torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            if self.head:
                return self.body(**inputs, use_cache=False)[0]
            # `forward`, not the module's call: hooks of `base` stand around `sharded_states`
            return self.base.forward(**inputs, use_cache=False).logits

    def require_embeddings(self, what: str) -> None:
        """Raise UftError about `what`, which wants embeddings in place of tokens, where the model takes none."""
        if not self.takes_embeddings:
            why = "takes no embeddings in place of tokens, so they can be neither mixed nor kept from learning"
            raise UftError(Problem(what, f"{type(self.base).__name__} {why}", advice=("objective=sft",)))

    # --- trials before the first step

    def trial_batch(self, layout: Layout = Layout.PADDED, sequences: list[TokenSequence] | None = None) -> Batch:
        """A few small sequences, by default those of :func:`trial_sequences`, as the model takes them."""
        return sequence_batch(sequences or trial_sequences(self.vocabulary), 0, layout).to(self.device)

    def tolerance(self, log_probs: Tensor) -> float:
        """The largest difference from `log_probs` that rounding explains."""
        return HEAD_TOLERANCE[self.dtype] * max(1.0, float(log_probs.abs().max()))

    def difference(self, ours: Tensor, theirs: Tensor) -> float:
        """The largest difference; in half precision the median, since rounding may choose other experts for a token."""
        found = (ours - theirs).abs()
        return float(found.max() if self.dtype == "float32" else found.median())

    @torch.no_grad()
    def check_head(self, batch: Batch | None = None) -> float:
        """Compare with the model's own logits on a small batch; fall back to those, with a note, where they disagree.

        Returns the largest difference between the log-probs of the targets.
        """
        if self.head is None:
            self.notes.append("output head: the model's own, for every position (it is not one plain matrix)")
            return 0.0
        batch, head = batch or self.trial_batch(), self.head
        with evaluating(self.module):
            try:
                ours = self(batch).log_probs
            except Exception as error:  # a head that is more than one matrix may want other shapes
                ours, why = None, f"ours fails: {type(error).__name__}"
            self.head = None
            own = self(batch).log_probs
        difference = math.inf
        if ours is not None:
            difference = float((ours - own).abs().max())
            why = f"log-probs of ours differ by {difference:.1e}"
        if difference <= self.tolerance(own):
            self.head = head
        else:
            self.notes.append(f"output head: the model's own, for every position ({why})")
        return difference

    @torch.no_grad()
    def check_rows(self, what: str) -> None:
        """Check on a few small rows that log-probs depend neither on later tokens nor on other rows of the batch.

        Finds out besides whether the model's positions are those of a batch. Raises UftError about `what`.
        """
        pad = getattr(self.base.config.get_text_config(), "pad_token_id", None)
        rows = [ids for ids, _ in trial_sequences(self.vocabulary)]
        rows = [np.where(ids == pad, (ids + 1) % self.vocabulary, ids) for ids in rows]  # some models look for it

        def log_probs(rows: list[np.ndarray], request: ForwardRequest = PLAIN) -> Tensor:
            sequences = [(ids, np.ones(len(ids), bool)) for ids in rows]
            return self(self.trial_batch(sequences=sequences), request).log_probs

        with evaluating(self.module), exact_products():
            whole = log_probs(rows)
            if not whole.isfinite().all():
                return  # told where the first numbers are needed
            if self.takes_positions:
                whole = self._find_positions(partial(log_probs, rows), whole, pad)
            tolerance, middle = self.tolerance(whole), [len(ids) // 2 for ids in rows]
            others = [(ids + self.vocabulary // 2 + 1) % self.vocabulary for ids in rows]
            changed = log_probs([np.append(a[:n], b[n:]) for a, b, n in zip(rows, others, middle, strict=True)])
            try:
                embedded = log_probs(rows, ForwardRequest(embed_grad=False))
                self.takes_embeddings = self.difference(embedded, whole) <= tolerance
                if self.takes_embeddings:
                    log_probs(rows, ForwardRequest(replace=torch.zeros_like(whole, dtype=torch.int64), mix=0.5))
            except torch.OutOfMemoryError:
                raise
            except (TypeError, ValueError, RuntimeError):  # it wants tokens, or looks for those of the embeddings
                self.takes_embeddings = False
            alone = [log_probs([ids]) for ids in (rows[0], rows[-1])]
        lengths = [len(ids) - 1 for ids in rows]  # targets of a row are its tokens but for the first
        pieces = whole.split(lengths)
        company = self.difference(torch.cat(alone), torch.cat([pieces[0], pieces[-1]]))
        if not company <= tolerance:
            why = f"the log-probs of a row change by {company:.1e} when other rows are in its batch"
            raise UftError(Problem(what, why, advice=("no objective is right for a model of this kind",)))
        before, after = (
            torch.cat([piece[: n - 1] for piece, n in zip(one, middle, strict=True)])
            for one in (pieces, changed.split(lengths))
        )
        moved = self.difference(before, after)
        if not moved <= LEAK * tolerance:
            why = f"a later token changes the log-probs of earlier ones by {moved:.1e}"
            advice = ("give a causal language model, which reads from left to right",)
            raise UftError(Problem(what, why, advice=advice))

    def _find_positions(self, log_probs: Callable[[], Tensor], given: Tensor, pad: int | None) -> Tensor:
        """Compare with the positions that the model takes by itself; where they differ, use those. The log-probs."""
        self.takes_positions = False
        try:
            own = log_probs()
        except (TypeError, ValueError):  # code of a model's own that wants to be told
            self.takes_positions = True
            return given
        for first in (0, None if pad is None else pad + 1):
            if first is not None:
                self.takes_positions, self.first_position = True, first
                found = log_probs() if first else given
                if self.difference(found, own) <= self.tolerance(own):
                    return found
        self.takes_positions, self.first_position = False, 0
        return own

    # --- trained parameters

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name; tied weights appear once. The names are those of the module and never change."""
        self.reshard()
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_trainable(self, tensors: Mapping[str, Tensor]) -> None:
        """Set every trained parameter. Raises UftError when names or shapes are not exactly those of this policy."""
        parameters = self.trainable()
        problems = [Problem(name, "is in the model but not in the checkpoint") for name in parameters.keys() - tensors]
        problems += [Problem(name, "is in the checkpoint but not in the model") for name in tensors.keys() - parameters]
        problems += [
            Problem(name, f"has shape {tuple(tensors[name].shape)}, the model wants {tuple(parameter.shape)}")
            for name, parameter in parameters.items()
            if name in tensors and tensors[name].shape != parameter.shape
        ]
        raise_problems(problems, footer="The checkpoint was written by another model or adapter.")
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(tensors[name], parameter))

    def describe(self) -> list[str]:
        """Lines for the start card."""
        count, trained = self.size, sum(p.numel() for p in self.trainable().values())
        kinds = (str(getattr(p, "quant_type", p.dtype)) for p in self.module.parameters())
        stored = sorted({kind.removeprefix("torch.") for kind in kinds})
        share = "all trained" if trained == count else f"{trained:,} trained ({trained / count:.2%})"
        checkpointing = ", gradient checkpointing" if self.recomputes else ""
        checkpointing += ", activations kept in the CPU's memory" if self.offloads else ""
        lines = [
            f"{type(self.base).__name__}, {count:,} parameters, {share}",
            f"weights in {' and '.join(stored)}, forward in {self.dtype}, attention {self.attention}{checkpointing}",
        ]
        if self.head is not None:
            lines.append(f"output head on supervised positions only, {self.head.rows:,} at a time, softmax in float32")
        if getattr(self.base.config.get_text_config(), "router_aux_loss_coef", None):
            lines.append("experts: the router's load-balancing loss is no part of the objective")
        return lines + self.notes


@dataclass(frozen=True)
class Frozen:
    """A policy as a reference: its adapter, if any, off; no dropout, no gradient."""

    policy: Policy

    def __call__(self, batch: Batch, request: ForwardRequest = PLAIN) -> ForwardOutput:
        with self._initial():
            return self.policy(batch, request)

    def predictions(self, batch: Batch) -> Predictions:
        with self._initial():
            return self.policy.predictions(batch)

    @contextmanager
    def _initial(self) -> Iterator[None]:
        module: Any = self.policy.module
        without_adapter = module.disable_adapter() if self.policy.has_adapter else nullcontext()
        with evaluating(module), torch.no_grad(), without_adapter:
            yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) within; the previous mode is restored."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def preserved_rng(device: torch.device) -> AbstractContextManager[None]:
    """Restore torch's random generators of the CPU and of `device` at the end of the block."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextmanager
def exact_products() -> Iterator[None]:
    """Products of float32 matrices in float32 within, also where a GPU may take TF32, which rounds by shape."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def trial_sequences(vocabulary: int) -> list[TokenSequence]:
    """A row with three completions, the second of one token, between two rows with one; tokens all over the vocabulary.

    Lengths are all different, so that a mask that is off by one is off for some of them.
    """
    made = []
    for number, (prompt, completion) in enumerate(((3, 9), (7, 5), (7, 1), (7, 8), (11, 4))):
        start = (0, 1, 1, 1, 2)[number] * 7919  # the same prompt for the three in the middle
        ids = np.concatenate([start + 31 * np.arange(prompt), 104_729 * (number + 1) + 17 * np.arange(completion)])
        made.append(((ids % vocabulary).astype(np.int64), np.arange(prompt + completion) >= prompt))
    return made


def position_limit(config: Any) -> int | None:
    """Positions of a model by its transformers configuration, scaled rotary ones counted as scaled; None: no limit."""
    config = config.get_text_config()
    most, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    if most and rope.get("rope_type") in ("linear", "dynamic", "yarn"):
        before = rope.get("original_max_position_embeddings") or most
        return int(max(most, before * rope.get("factor", 1)))
    return most


def common_length(config: Any) -> int | None:
    """Tokens up to which the rotary embeddings of a row are the same, whatever the longest row of its batch is; beyond
    it a row is right when it is alone. None: there is no such limit."""
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("longrope", "dynamic"):
        return None
    known = (rope.get("original_max_position_embeddings"), getattr(config, "original_max_position_embeddings", None))
    return next((int(length) for length in known if length), config.max_position_embeddings)


def blocks(base: Any) -> list[nn.Module]:
    """The blocks of a model's body in order, as transformers marks them; else the members of its module lists.

    They are the unit of compilation, of sharding and of activation recomputing.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    body = base.get_decoder()
    marked: list[nn.Module] = [module for module in body.modules() if isinstance(module, GradientCheckpointingLayer)]
    return marked or [block for child in body.children() if isinstance(child, nn.ModuleList) for block in child]


def own_dropout(config: Any) -> dict[str, float]:
    """Every dropout of a configuration that is not 0, also after it was switched off: KEY or PART.KEY -> rate."""
    if off := vars(config).get("own_dropout"):
        return off
    parts = {"": config, **{f"{name}.": value for name, value in vars(config).items() if hasattr(value, "to_dict")}}
    return {
        f"{part}{key}": float(value)
        for part, settings in parts.items()
        for key, value in vars(settings).items()
        if "drop" in key and type(value) in (float, int) and value > 0
    }


def switch_off_dropout(base: Any) -> None:
    """Set the dropout of a model's layers and configuration to 0; the configuration keeps what it said beside that."""
    rates = own_dropout(base.config)
    set_dropout(base.config, dict.fromkeys(rates, 0.0))
    if rates:
        base.config.own_dropout = rates
    for module in base.modules():
        names = [name for name in vars(module) if "drop" in name]  # rates that the layer applies itself
        for name in [*names, "p"] if "Dropout" in type(module).__name__ else names:
            if type(getattr(module, name, None)) is float:
                setattr(module, name, 0.0)


def set_dropout(config: Any, rates: Mapping[str, float]) -> None:
    """Give a configuration these rates of dropout again."""
    vars(config).pop("own_dropout", None)
    for place, rate in rates.items():
        part, _, key = place.rpartition(".")
        setattr(getattr(config, part) if part else config, key, rate)


def auto_model() -> Any:
    """transformers' AutoModelForCausalLM, imported without scipy.

    The losses of object detectors come with every model. Where scipy is installed they import its optimisers, which
    cost every start of a run half a second and 35 MB: scipy is hidden during the import.
    """
    from transformers import AutoModelForCausalLM, utils

    real = utils.is_scipy_available
    utils.is_scipy_available = lambda: False
    try:
        import transformers.modeling_utils  # noqa: F401
    finally:
        utils.is_scipy_available = real
    return AutoModelForCausalLM


@torch.no_grad()
def idle_adapters(policy: Policy, batch: Batch) -> list[str]:
    """Adapted layers that a forward pass does not go through, since the model uses their weight by itself: they are
    never trained, and merging them changes the model."""
    called: set[str] = set()
    layers = {name: module for name, module in policy.base.named_modules() if hasattr(module, "lora_A")}
    hooks = [m.register_forward_hook(lambda *_, name=name: called.add(name)) for name, m in layers.items()]
    try:
        policy(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [name for name in layers if name not in called]


ALL_LINEAR = "all-linear"
MAMBA_LIKE = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Models whose `out_proj` PEFT refuses to adapt, since their kernels read its weight."""


def add_lora(model: Any, lora: Lora, init_seed: int, float32: bool) -> nn.Module:
    """The model with frozen weights and a trainable LoRA adapter that starts as no change (B = 0).

    `init_seed` draws A and touches no other generator. `float32`: keep the adapter in float32 over a bfloat16 base.
    Raises UftError for every target that names no linear layer, and every module to save that there is not.
    """
    from peft import LoraConfig, get_peft_model

    targets, names = list(lora.targets), {name.rpartition(".")[2] for name, _ in model.named_modules()} - {""}
    check_targets(model, targets)
    unknown, why = [name for name in lora.modules_to_save if name not in names], "no module of this name"
    key = "model.lora.modules_to_save"
    raise_problems([Problem(f"{key}={name}", why, "", did_you_mean(name, names)) for name in unknown])
    # all-linear leaves out what PEFT refuses, and routers of experts, which return more than one tensor
    refused = {"out_proj"} if model.config.model_type in MAMBA_LIKE else set()
    linear = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not is_quantised(m.weight))
    refused |= {name.rpartition(".")[2] for name, m in linear if type(m).forward is not nn.Linear.forward}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if ALL_LINEAR in targets else targets,
        exclude_modules=sorted(refused) or None if ALL_LINEAR in targets else None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        modules_to_save=list(lora.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers under a name that is going away
        warnings.simplefilter("ignore", UserWarning)  # about a tied head, which the export unties
        # PEFT looks for them among modules alone: it does give fused experts their rank and scale
        warnings.filterwarnings("ignore", ".*_pattern keys did not match any targeted module", RuntimeWarning)
        torch.manual_seed(init_seed)
        try:
            module = get_peft_model(model, config, autocast_adapter_dtype=float32)
        except ValueError as error:
            raise UftError(Problem(f"model.lora.targets={targets}", f"PEFT cannot adapt them: {error}")) from error
    for parameter in module.parameters():
        if float32 and parameter.requires_grad:  # PEFT leaves modules to save and lengths of rows as they are
            parameter.data = parameter.data.float()
    return module


def check_targets(model: Any, targets: list[str]) -> None:
    """Raises UftError for every target that matches no linear layer of the model."""
    from transformers.pytorch_utils import Conv1D

    if not targets:
        raise UftError(Problem("model.lora.targets=[]", f"name a layer, or {ALL_LINEAR}"))
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    head = model.get_output_embeddings()
    short = dict.fromkeys(name.rpartition(".")[2] for name, module in linear.items() if module is not head)
    choices = [*short, ALL_LINEAR]
    problems = []
    for target in targets:
        if target == ALL_LINEAR or any(name == target or name.endswith(f".{target}") for name in linear):
            continue
        advice = (*did_you_mean(target, choices), "linear layers: " + ", ".join(choices))
        problems.append(Problem(f"model.lora.targets={target}", "no linear layer of this name", "", advice))
    raise_problems(problems)
