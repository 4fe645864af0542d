"""Policy: a language model as objectives see it, a callable from a batch to log-probs of its supervised targets."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from uft.config.schema import Lora
from uft.data.batch import NOT_AN_INPUT, Batch, Layout, sequence_batch
from uft.distributed import shard_like
from uft.errors import Problem, UftError
from uft.model.attention import PACKED, no_mask
from uft.model.head import Head, LossGrad, Predictions, embedding_in_place, transform_of
from uft.objectives.base import PLAIN, ForwardOutput, ForwardRequest

Tensor = torch.Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference between our head's log-probs and the model's own, per unit of the largest log-prob."""


@runtime_checkable
class Distributed(Protocol):
    """A forward that returns whole distributions, not only log-probs of the targets."""

    def predictions(self, batch: Batch) -> Predictions: ...


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
        if type(projection) is nn.Linear:
            self.head = Head(projection, transform_of(self.base.config.get_text_config()), DTYPES[dtype])
        self.notes: list[str] = []
        self.sharded_states = self.states  # a sharded model wraps it: the root's weights are gathered around it
        self.reshard: Callable[[], None] = lambda: None  # sharded: free the weights gathered by a forward pass
        self.layout = Layout.PADDED  # of the batches it is given: `layout.settle_layout`
        self.takes_positions = "position_ids" in inspect.signature(self.body.forward).parameters

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def attention(self) -> str:
        """The attention implementation in use; packed, the one that ours replaces."""
        name = str(self.base.config.get_text_config()._attn_implementation)
        return next((base for base, packed in PACKED.items() if packed == name), name)

    @property
    def embedding_rows(self) -> int:
        """Tokens the model has an embedding for."""
        return int(self.base.get_input_embeddings().weight.shape[0])

    @property
    def recomputes(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.base.modules())

    def train(self, mode: bool = True) -> Policy:
        self.module.train(mode)
        return self

    def eval(self) -> Policy:
        return self.train(False)

    # --- forward and backward

    def __call__(self, batch: Batch, request: ForwardRequest = PLAIN) -> ForwardOutput:
        """See `objectives.base.Forward`. An argmax asked for without gradients is made without dropout: it is the
        model's most likely token, not a sample of it."""
        if request.argmax and not torch.is_grad_enabled() and self.module.training:
            self.eval()
            try:
                return self(batch, request)
            finally:
                self.train()
        ours = self.predictions(batch, request)
        log_probs, argmax = ours.selected(batch.target_ids, request.argmax)
        if request.anchor is None:
            return ForwardOutput(log_probs, argmax)
        assert isinstance(request.anchor, Distributed), "this reference keeps log-probs of the targets alone"
        return ForwardOutput(log_probs, argmax, ours.divergence_from(request.anchor.predictions(batch)))

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
            inputs["position_ids"] = batch.position_ids
        mixing = request.replace is not None and request.mix != 0
        if request.embed_grad and not mixing:
            inputs["input_ids"] = batch.input_ids
        else:  # always through the model's own module: Gemma scales there
            with nullcontext() if request.embed_grad else torch.no_grad():
                embedded = self.embeddings(batch.input_ids)
                inputs["inputs_embeds"] = self._mixed(embedded, batch.place, request) if mixing else embedded
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16"):
            if self.head:
                return self.body(**inputs, use_cache=False)[0]
            # `forward`, not the module's call: hooks of `base` stand around `sharded_states`
            return self.base.forward(**inputs, use_cache=False).logits

    def _mixed(self, embedded: Tensor, place: Tensor, request: ForwardRequest) -> Tensor:
        """(B, L, H) with the replacements of the targets that are among the inputs mixed in."""
        assert request.replace is not None
        among = place != NOT_AN_INPUT
        place, flat = place[among], embedded.flatten(0, 1)
        mixed = (1 - request.mix) * flat[place] + request.mix * self.embeddings(request.replace[among])
        return flat.index_copy(0, place, mixed.to(flat.dtype)).view_as(embedded)

    @contextmanager
    def adapter_disabled(self) -> Iterator[Policy]:
        """The initial policy: the base weights without the adapter."""
        assert self.has_adapter, "this policy has no adapter to switch off"
        peft_model: Any = self.module
        with peft_model.disable_adapter():
            yield self

    @torch.no_grad()
    def check_head(self, batch: Batch | None = None) -> float:
        """Compare with the model's own logits on a small batch; fall back to those, with a note, where they disagree.

        Returns the largest difference between the log-probs of the targets. Without a batch it makes one.
        """
        if self.head is None:
            self.notes.append("output head: the model's own, for every position (it is not one plain matrix)")
            return 0.0
        if batch is None:  # sequences of unequal length whose tokens are spread over the vocabulary
            ids = torch.linspace(0, self.embedding_rows - 1, 16).long().numpy()
            supervised = torch.arange(10).numpy() >= 2
            sequences = [(ids[:10], supervised), (ids[6:], supervised), (ids[:4], supervised[:4])]
            batch = sequence_batch(sequences, pad_id=0).to(self.device)
        training, head = self.module.training, self.head
        self.eval()
        ours = self(batch).log_probs
        self.head = None
        own = self(batch).log_probs
        self.train(training)
        difference = float((ours - own).abs().max())
        if difference <= HEAD_TOLERANCE[self.dtype] * max(1.0, float(own.abs().max())):
            self.head = head
        else:
            self.notes.append(
                f"output head: the model's own, for every position (log-probs of ours differ by {difference:.1e})"
            )
        return difference

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
        if problems:
            raise UftError(*problems, footer="The checkpoint was written by another model or adapter.")
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(tensors[name], parameter))

    def describe(self) -> list[str]:
        """Lines for the start card."""
        count = sum(p.numel() for p in self.module.parameters())
        trained = sum(p.numel() for p in self.trainable().values())
        stored = sorted({str(p.dtype).removeprefix("torch.") for p in self.module.parameters()})
        share = "all trained" if trained == count else f"{trained:,} trained ({trained / count:.2%})"
        checkpointing = ", gradient checkpointing" if self.recomputes else ""
        lines = [
            f"{type(self.base).__name__}, {count:,} parameters, {share}",
            f"weights in {' and '.join(stored)}, forward in {self.dtype}, attention {self.attention}{checkpointing}",
        ]
        if self.head is not None:
            lines.append(f"output head on supervised positions only, {self.head.rows:,} at a time, softmax in float32")
        return lines + self.notes


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
    Raises UftError for every target that names no linear layer.
    """
    from peft import LoraConfig, get_peft_model

    targets = list(lora.targets)
    check_targets(model, targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, any number does
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if ALL_LINEAR in targets else targets,
        exclude_modules=not_adaptable(model) if ALL_LINEAR in targets else None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers under a name that is going away
        warnings.simplefilter("ignore", UserWarning)  # about a tied head, which the export unties
        torch.manual_seed(init_seed)
        try:
            return get_peft_model(model, config, autocast_adapter_dtype=float32)
        except ValueError as error:
            raise UftError(Problem(f"model.lora.targets={targets}", f"PEFT cannot adapt them: {error}")) from error


def not_adaptable(model: Any) -> list[str] | None:
    """Names of the linear layers that all-linear leaves out: those that PEFT refuses, and routers of experts, which are
    linear layers by their class alone: they return more than one tensor."""
    refused = {"out_proj"} if model.config.model_type in MAMBA_LIKE else set()
    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    refused |= {name.rpartition(".")[2] for name, m in linear if type(m).forward is not nn.Linear.forward}
    return sorted(refused) or None


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
        near = [f"did you mean  {name} ?" for name in difflib.get_close_matches(target, choices, n=1)]
        advice = (*near, "linear layers: " + ", ".join(choices))
        problems.append(Problem(f"model.lora.targets={target}", "no linear layer of this name", "", advice))
    if problems:
        raise UftError(*problems)
