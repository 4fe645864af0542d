"""TRL on the same rows: its own trainers, its own tokenisation and batches, in float32 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.figures import Figures, Stopwatch
from bench.setting import Place

LEARNING_RATE = 1e-4
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "sft": {
        "trl": {},
        "trl-checkpointing": {"gradient_checkpointing": True},  # as it is shipped
        "trl-padding-free": {"padding_free": True},
        "trl-padding-free-bf16": {"padding_free": True, "bf16": True},
        "trl-bf16": {"bf16": True},
    },
    "dpo": {
        "trl": {},
        "trl-checkpointing": {"gradient_checkpointing": True},  # as it is shipped
        "trl-precomputed": {"precompute_ref_log_probs": True},
        "trl-precomputed-bf16": {"precompute_ref_log_probs": True, "bf16": True},
        "trl-bf16": {"bf16": True},
    },
}
"""Objective -> way -> TRL's arguments. Without `trl-checkpointing` activations are kept, which is faster."""

BEST = {"sft": "trl-padding-free", "dpo": "trl-precomputed"}
"""The fastest of them."""


def measure(objective: str, way: str, place: Place, own: Path, warm_up: int) -> Figures:
    """Train through all rows of `place`; `own` is a folder for what the trainer writes."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    trainer_class, arguments = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig)}[objective]
    stopwatch, losses = Stopwatch(), []

    class Marks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stopwatch.mark()

    class Noted(trainer_class):  # type: ignore[misc, valid-type]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    options = {
        "output_dir": str(own),
        "per_device_train_batch_size": place.rows,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "max_length": None,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **WAYS[objective][way],
    }
    trainer = Noted(
        model=AutoModelForCausalLM.from_pretrained(place.model, dtype="float32"),
        args=arguments(**options),
        train_dataset=Dataset.from_list(place.in_order()),
        processing_class=AutoTokenizer.from_pretrained(place.model),
        callbacks=[Marks()],
    )
    trainer.train()
    return stopwatch.figures([float(loss) for loss in losses], place.tokens, warm_up)
