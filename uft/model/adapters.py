"""LoRA adapters through PEFT."""

from __future__ import annotations

import difflib
import warnings
from typing import Any

import torch
from torch import nn

from uft.config.schema import Lora
from uft.errors import Problem, UftError

ALL_LINEAR = "all-linear"


def linear_layers(model: Any) -> dict[str, int]:
    """Short name -> how many layers have it, of all linear layers but the output head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    found: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            short = name.rpartition(".")[2]
            found[short] = found.get(short, 0) + 1
    return found


def check_targets(model: Any, targets: list[str]) -> None:
    """Raises UftError for every target that no linear layer of the model answers to."""
    from transformers.pytorch_utils import Conv1D

    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    layers = linear_layers(model)
    problems = []
    for target in targets:
        if target == ALL_LINEAR or any(name == target or name.endswith(f".{target}") for name in names):
            continue
        near = [f"did you mean  {name} ?" for name in difflib.get_close_matches(target, [*layers, ALL_LINEAR], n=1)]
        known = "linear layers: " + ", ".join([*layers, ALL_LINEAR])
        problems.append(Problem(f"model.lora.targets={target}", "no linear layer of this name", "", (*near, known)))
    if not targets:
        problems.append(Problem("model.lora.targets=[]", f"name a layer, or {ALL_LINEAR}"))
    if problems:
        raise UftError(*problems)


def add_lora(model: Any, lora: Lora, init_seed: int, float32: bool) -> nn.Module:
    """The model with frozen weights and a trainable adapter that starts as no change (B = 0).

    `init_seed` draws A and touches no other generator. `float32`: keep the adapter in float32 over a bfloat16 base.
    """
    from peft import LoraConfig, get_peft_model

    targets = list(lora.targets)
    check_targets(model, targets)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated int, any number does
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if ALL_LINEAR in targets else targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers under a name that is going away
        torch.manual_seed(init_seed)
        return get_peft_model(model, config, autocast_adapter_dtype=float32)
