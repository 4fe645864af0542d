"""Export: the model folder that a run leaves behind, in plain Hugging Face format, loaded by transformers alone."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from uft.distributed import ranks
from uft.environment import PeerLost
from uft.errors import FAILED, Problem, UftError, first_line
from uft.heartbeat import activity
from uft.model.policy import Policy, own_dropout, set_dropout
from uft.model.precision import plain_state
from uft.runs import as_umask_leaves, flush, shown, writing

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Tensor = torch.Tensor


@activity("the model was exported", moving=True)
def export(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    stop_ids: Collection[int] = (),
    problem: Callable[[Path], str] = lambda folder: "",
    card: Callable[[bool], str] | None = None,
) -> Path:
    """Write weights, configuration, generation settings, tokenizer and chat template to `folder`; returns it.

    All processes call it; rank 0 writes. A sharded model is gathered in the memory of rank 0's CPU. An adapter is
    merged into the weights, and is saved besides in `folder/adapter` for PEFT. The folder appears by rename: it is the
    old one or the complete new one. The policy itself is not changed. `stop_ids`: tokens that end a reply, which are
    added to the ends in the generation settings. `card`: the text of README.md; given True, the adapter's.

    `problem` looks at the folder before it has its name, on all ranks, and says what is wrong with it. Raises UftError
    where something is, where the adapter cannot be merged (it is then in `folder-adapter`), or where there is no room.
    """
    folder = Path(folder)
    beside = folder.with_name(f".{folder.name}.tmp")
    bytes_needed = policy.size * dtype.itemsize
    state: Mapping[str, Any] = {}
    if ranks().sharded:
        policy.reshard()
        state = get_model_state_dict(policy.base, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def write() -> None:
        shutil.rmtree(beside, ignore_errors=True)
        with writing(folder, bytes_needed):
            folder.parent.mkdir(parents=True, exist_ok=True)
            weights = state or plain_state(policy.base)
            if policy.has_adapter:  # first: it is kept whatever becomes of the rest
                own = (".lora_", ".modules_to_save.")
                adapter = {f"base_model.model.{n}": t for n, t in weights.items() if any(part in n for part in own)}
                peft_model: Any = policy.module
                # False: the embeddings are not part of it, and to find that out PEFT would ask the hub
                peft_model.save_pretrained(beside / "adapter", state_dict=adapter, save_embedding_layers=False)
            model = plain_model(policy, dtype, weights)
            settings = model.generation_config = valid(model.generation_config)
            ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
            if missing := sorted(set(stop_ids) - set(ends)):
                settings.eos_token_id = [token for token in ends if token is not None] + missing
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
            for_older_readers(beside)
            for place in (beside, beside / "adapter"):
                if card and place.is_dir():
                    (place / "README.md").write_text(card(place != beside), encoding="utf-8")

    def publish() -> None:
        with writing(folder):
            as_umask_leaves(beside)
            for path in [*beside.rglob("*"), beside]:  # before it gets its name
                flush(path)
            _replace(beside, folder)
            shutil.rmtree(folder.with_name(f"{folder.name}-adapter"), ignore_errors=True)  # of an earlier attempt

    try:
        ranks().on_rank0(write)
        if why := problem(beside):
            raise UftError(Problem(shown(folder), f"is not the policy that was trained: {why}"), code=FAILED)
        ranks().on_rank0(publish)
    except PeerLost:
        raise
    except KeyboardInterrupt:
        shutil.rmtree(beside, ignore_errors=True)  # as large as the model, under a name that is not listed
        raise
    except Exception as error:
        kept = ranks().on_rank0(lambda: _keep_adapter(beside, folder))
        if kept is None or isinstance(error, OSError):
            raise
        unforeseen = Problem(shown(folder), f"cannot be written: {error or type(error).__name__}")
        first, *others = error.problems if isinstance(error, UftError) else (unforeseen,)
        advice = (*first.advice, f"the adapter alone is in {shown(kept)}")
        raise UftError(replace(first, advice=advice), *others, code=FAILED) from error
    return folder


def _keep_adapter(beside: Path, folder: Path) -> Path | None:
    """Remove what was written of a folder that failed, which leaves room; but its adapter gets a name of its own."""
    kept = None
    if (beside / "adapter" / "adapter_model.safetensors").is_file():
        kept = folder.with_name(f"{folder.name}-adapter")
        _replace(beside / "adapter", kept)
    shutil.rmtree(beside, ignore_errors=True)
    return kept


def plain_model(policy: Policy, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> Any:
    """A model of the policy's own class on the CPU with `weights`, the adapter merged in; ties stay ties."""
    base = policy.base
    config = copy.deepcopy(base.config)
    set_dropout(config, own_dropout(config))
    config.dtype = dtype
    if policy.has_adapter:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        ends = (base.get_output_embeddings(), base.get_input_embeddings())
        if isinstance(ends[0], BaseTunerLayer) or any(isinstance(end, ModulesToSaveWrapper) for end in ends):
            # merged, the head is not the embedding any more
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    with torch.device("meta"):  # no memory for weights that are replaced at once
        model = type(base)(config)
    missing, unexpected = model.load_state_dict(merged_state(base, dtype, weights), strict=False, assign=True)
    model.tie_weights()
    assert not unexpected, f"weights that the plain model does not have: {unexpected[:5]}"
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"weights that the policy does not have: {left[:5]} {missing[:5]}"
    for name, buffer in base.named_buffers():  # those that no state holds: rotary frequencies
        if ".original_module." in name:
            continue
        owner, _, last = _plain_name(name).rpartition(".")
        setattr(model.get_submodule(owner), last, buffer.detach().cpu().clone())
    model.generation_config = copy.deepcopy(base.generation_config)
    return model


@torch.no_grad()
def merged_state(base: nn.Module, dtype: torch.dtype, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights`, the state of `base`, without the adapter: `weight + scale * B A` in float32, then cast to `dtype`;
    with DoRA every row of that at the length that was learned (arXiv 2402.09353, eq. 5)."""
    adapters = adapted_weights(base)
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".lora_" in name or ".original_module." in name:  # of modules that were trained whole
            continue
        for owner, layer in adapters.get(name, ()):
            for active in layer.active_adapters:
                tensor = tensor.float() + _delta(owner, layer, active, weights)
                length = weights.get(f"{owner}.lora_magnitude_vector.{active}.weight")
                if length is not None:
                    rows = 0 if layer.fan_in_fan_out else 1
                    tensor = tensor * (length.float().flatten() / tensor.norm(dim=rows)).unsqueeze(rows)
        plain = _plain_name(name)
        state[plain] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu()
    return state


def valid(settings: GenerationConfig) -> GenerationConfig:
    """Settings of generation that transformers can write: of others, the tokens alone."""
    try:
        settings.validate()
        return settings
    except ValueError as error:
        log.warning("generation_config.json: its token ids alone are exported, for it is not valid: %s", error)
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        return type(settings)(**{name: getattr(settings, name) for name in ids})


def generation_fault(folder: Path) -> str:
    """A sentence about the generation_config.json of a model's folder that transformers passes over; "" about none."""
    from transformers import GenerationConfig

    try:
        if (folder / "generation_config.json").is_file():
            GenerationConfig.from_pretrained(folder).validate()
    except Exception as error:  # of a file that may hold anything
        return f"generation_config.json is not used, for it is not valid: {first_line(error)}"
    return ""


def _plain_name(name: str) -> str:
    """The name in a plain model of a weight or buffer of one with an adapter."""
    name = re.sub(r"\.modules_to_save\.[^.]+", "", name)
    return re.sub(r"\.base_layer(?=\.|$)", "", name)


def adapted_weights(base: nn.Module) -> dict[str, list[tuple[str, Any]]]:
    """Name of an adapted weight in the state of `base` -> the adapters on it: (name of the layer, layer)."""
    if "peft" not in sys.modules:  # no adapter is on anything, and the import takes a second
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters: dict[str, list[tuple[str, Any]]] = {}
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            place, inner = name, module
            while isinstance(inner, BaseTunerLayer):  # experts whose weights are parameters have one around the other
                place, inner = f"{place}.base_layer", cast(Any, inner).base_layer
            adapters.setdefault(f"{place}.{getattr(module, 'parameter_name', 'weight')}", []).append((name, module))
    return adapters


def _delta(owner: str, layer: Any, active: str, weights: Mapping[str, Tensor]) -> Tensor:
    """The delta of an adapter, scale * B A: of a layer by `weights`, of a parameter (experts) by PEFT."""
    if hasattr(layer, "parameter_name"):
        if ranks().sharded:
            advice = ("hardware.sharding=none, or model.lora.targets without its experts",)
            raise UftError(Problem(owner, "its adapter cannot be merged while the model is sharded", advice=advice))
        return layer.get_delta_weight(active).float()
    a, b = (weights[f"{owner}.lora_{side}.{active}.weight"].float() for side in "AB")
    delta = (b @ a) * layer.scaling[active]
    return delta.T if layer.fan_in_fan_out else delta


# --- transformers 4, which serves many models still, reads other keys of the same meaning

FAST = "PreTrainedTokenizerFast"  # the name in version 4 of version 5's TokenizersBackend


def for_older_readers(folder: Path) -> None:
    """Add what transformers 4.57 reads to the configurations of an exported folder: rotary embeddings under their
    former keys, and the former names of the tokenizer's class and of its special tokens."""
    with _rewriting(folder / "config.json") as config:
        rope = config.get("rope_parameters") or {}
        if "rope_theta" in rope:
            config["rope_theta"] = rope["rope_theta"]
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            config["rope_scaling"] = scaling if rope.get("rope_type", "default") != "default" else None
    with _rewriting(folder / "tokenizer_config.json") as tokenizer:
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            tokenizer["tokenizer_class"] = FAST
            # version 4 adds token_type_ids of its own, which generate() refuses
            tokenizer.setdefault("model_input_names", ["input_ids", "attention_mask"])
        if isinstance(tokenizer.get("extra_special_tokens"), list):
            tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")


@contextmanager
def _rewriting(file: Path) -> Iterator[dict[str, Any]]:
    """The object of a JSON file, to be changed; {} where there is no file."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    yield content
    if content:
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def older_reader(folder: Path) -> str:
    """Why transformers 4.57 does not read an exported folder as this model; "" where nothing is known against it."""
    rope = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("rope_parameters") or {}
    nested = any(isinstance(value, dict) for value in rope.values())
    return "its layers have rotary embeddings of several kinds, which it reads from other keys" if nested else ""


def _replace(beside: Path, folder: Path) -> None:
    """Rename, moving an older folder of that name out of the way first."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(beside, folder)
    shutil.rmtree(old, ignore_errors=True)
