"""Loading tokenizers and models; what cannot be loaded is said in one line."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from uft.alive import doing
from uft.config.schema import Model
from uft.errors import Problem, UftError
from uft.model.adapters import add_lora
from uft.model.blocks import blocks
from uft.model.classes import auto_model
from uft.model.forward import DTYPES, Policy
from uft.model.paths import Location, locate
from uft.model.sharded import in_pieces
from uft.parallel.ranks import ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU = torch.device("cpu")


@doing("a tokenizer was loaded", moving=True)
def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right. It may have no pad token: see :func:`pad_id`."""
    from transformers import AutoTokenizer

    place = whereabouts(model)
    with _humane(f"model.path={model.path}", "its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(place.path, **_access(place, model))
    tokenizer.padding_side = "right"
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to fill with. It may be the stop token: padding is masked by length, never by its id."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in found if token is not None))


def positions(model: Model) -> int | None:
    """Tokens in the longest sequence the model has positions for, by its configuration alone; None: it names no end."""
    from transformers import AutoConfig

    place = whereabouts(model)
    with _humane(f"model.path={model.path}", "its configuration cannot be loaded"):
        config = AutoConfig.from_pretrained(place.path, **_access(place, model))
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_vocabulary(module: nn.Module, tokenizer: PreTrainedTokenizerBase, key: str = "model.path") -> None:
    """Raises UftError when the tokenizer makes ids that the embedding does not have."""
    rows = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        why = f"the tokenizer makes token ids up to {highest}, the model's embedding has {rows} rows"
        raise UftError(Problem(key, why, advice=("this tokenizer belongs to another model",)))


@doing("a model was loaded", moving=True)
def load_policy(model: Model, device: torch.device, init_seed: int) -> Policy:
    """The initial policy, its head checked against the model's own logits."""
    if ranks().in_step:
        dress = partial(dressed, model=model, init_seed=init_seed)
        policy = in_pieces(lambda: load_model(model, CPU, init_seed), dress, model, device)
    else:
        policy = Policy(load_model(model, device, init_seed), model.dtype)
    policy.check_head()
    return policy


def empty_policy(model: Model) -> Policy:
    """The policy without its weights, by its configuration alone: what there is to count."""
    from transformers import AutoConfig

    place = whereabouts(model)
    with _humane(f"model.path={model.path}", "its configuration cannot be loaded"):
        config = AutoConfig.from_pretrained(place.path, **_access(place, model))
    with torch.device("meta"):
        base = auto_model().from_config(
            config, dtype=DTYPES[storage_dtype(model)], trust_remote_code=model.trust_remote_code
        )
        return Policy(dressed(base, model, init_seed=0), model.dtype)


@doing("a model was loaded", moving=True)
def load_frozen(model: Model, device: torch.device, path: str | None) -> Policy:
    """The model of `model` or of `path`, not to be trained: a reference."""

    def frozen(module: nn.Module) -> nn.Module:
        return module.requires_grad_(False).eval()

    if ranks().in_step:
        policy = in_pieces(lambda: frozen(load_base(model, device, path)), frozen, model, device)
    else:
        policy = Policy(frozen(load_base(model, device, path)).to(device), model.dtype)
    policy.check_head()
    return policy


def load_model(model: Model, device: torch.device, init_seed: int) -> nn.Module:
    """The model on `device` with its adapter, in training mode as far as dropout goes, or a UftError.

    Weights that are trained are float32 under `master_weights`; frozen ones under an adapter are stored in `dtype`.
    Everything random happens on the CPU from `init_seed`, so that the start is the same on every device.
    """
    return dressed(load_base(model, device), model, init_seed).to(device).train()


def dressed(base: Any, model: Model, init_seed: int) -> nn.Module:
    """`base` with its adapter and its way of keeping activations."""
    lora = model.adapter == "lora"
    module = add_lora(base, model.lora, init_seed, float32=model.master_weights) if lora else base
    if model.gradient_checkpointing:
        with _humane(f"model.path={model.path}", "model.gradient_checkpointing=true"):
            # transformers 5 renamed it on the way; not re-entrant: works with frozen embeddings and with mixed ones
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        kept = (block for number, block in enumerate(blocks(base)) if number % model.recompute_every)
        for block in kept:
            setattr(block, "gradient_checkpointing", False)  # noqa: B010  # an attribute of transformers' blocks
    return module


def load_base(model: Model, device: torch.device, reference: str | None = None) -> Any:
    """The transformers model of `model` (or of the path `reference`, stored alike) without an adapter, on the CPU."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading files; a download still shows its own
    place = whereabouts(model, reference)
    what = f"model.path={model.path}" if reference is None else f"reference.path={reference}"
    attention = choose_attention(model, device)
    with _humane(what, "the model cannot be loaded"):
        loaded: Any = auto_model().from_pretrained(
            place.path,
            dtype=DTYPES[storage_dtype(model)],
            **({"attn_implementation": attention} if attention else {}),
            **_access(place, model),
            use_safetensors=True,  # a pickle can run code, whatever is unpickled
            output_loading_info=True,
        )
    module, info = loaded
    absent = sorted(info["missing_keys"])
    if absent:
        why = f"{len(absent)} of its weights are not in its files (they would be random)"
        raise UftError(Problem(what, why, advice=tuple(absent[:5])))
    return module


def whereabouts(model: Model, reference: str | None = None) -> Location:
    """Where the weights of `model` are, or those of a reference with a path of its own."""
    if reference is None or reference == model.path:
        return locate(model.path, model.revision)
    return locate(reference, key="reference.path")


def storage_dtype(model: Model) -> str:
    """How the weights from the files are kept: in the forward's precision where they are frozen or nobody minds."""
    return model.dtype if model.adapter == "lora" or not model.master_weights else "float32"


def choose_attention(model: Model, device: torch.device) -> str | None:
    """The kernel asked for; under `auto` FlashAttention where it can run, else None: transformers takes its best."""
    if model.attention != "auto":
        return model.attention
    flash = device.type == "cuda" and model.dtype == "bfloat16" and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if flash else None


def _access(place: Location, model: Model) -> dict[str, Any]:
    return {
        "revision": place.revision or "main",
        "local_files_only": place.offline,
        "trust_remote_code": model.trust_remote_code,
    }


ADVICE = {
    "trust_remote_code": "this model brings its own code: read it, then  model.trust_remote_code=true",
    "safetensors": "weights are read from safetensors alone: loading a pickle (.bin, .pt) can run code",
}
"""By a word of what transformers says."""


@contextmanager
def _humane(what: str, why: str) -> Iterator[None]:
    """Turn what transformers raises about a model into one line for the person who named it."""
    try:
        yield
    except (OSError, ValueError, ImportError, KeyError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        advice = tuple(said for word, said in ADVICE.items() if word in str(error))
        first = lines[0] if lines else type(error).__name__
        raise UftError(Problem(what, f"{why}: {first}", advice=advice)) from error
