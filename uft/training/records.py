"""What a run writes down about its data and its checks."""

from __future__ import annotations

from typing import Any

from uft.config.schema import Config
from uft.data.mixture import Mixture
from uft.data.report import data_report
from uft.model.memory import Shape, Spread, estimate, shape_of
from uft.training.corpus import Corpus, Plan
from uft.training.device import tokens_per_pass
from uft.training.feed import Feed
from uft.training.needs import counted_as_certain
from uft.training.prepare import Prepared


def data_record(corpus: Corpus, feed: Feed, plan: Plan) -> dict[str, Any]:
    """`data.json`: what was asked of the data and what the whole run draws of it, under the objective's own views."""
    mixture = Mixture(feed.mixture.names, feed.mixture.sizes, feed.mixture.weights, feed.mixture.seed)
    unusable = {name: sum(found.rows for found in kinds.values()) for name, kinds in feed.unusable().items()}
    report = data_report(corpus.loaded, corpus.train, mixture, plan.total_rows, feed.views, unusable)
    return {"run_digest": corpus.digest, "epoch_rows": plan.epoch_rows, **report}


def memory_record(prepared: Prepared) -> dict[str, int]:
    """Bytes by part that each process of the run is expected to need."""
    reference = prepared.reference.mode if prepared.reference else None
    return planned(prepared.trainer.config, shape_of(prepared.trainer.policy), reference)


def planned(config: Config, shape: Shape, reference_mode: str | None, tokens: int | None = None) -> dict[str, int]:
    """Bytes by part on each device, at the budget of a micro-batch unless it is known to be smaller (`tokens`)."""
    hardware = config.hardware
    return estimate(
        shape,
        optimiser=config.optim.name,
        momentum=config.optim.momentum > 0,
        micro_batch_tokens=tokens_per_pass(config) if tokens is None else tokens,
        reference_mode=reference_mode,
        spread=Spread(hardware.processes * hardware.nodes, hardware.sharding == "full", hardware.offload),
    )


REMOTE_CODE = "model.trust_remote_code is on: code that came with the model runs with all rights of this user"


def cautions(prepared: Prepared) -> list[str]:
    """What a reader of this run should know."""
    remote = [REMOTE_CODE] if prepared.trainer.config.model.trust_remote_code else []
    objective = prepared.trainer.objective
    return [*remote, *objective.cautions(), *counted_as_certain(prepared.trainer.feed, objective)]


def check_record(prepared: Prepared, step_zero: dict[str, float]) -> dict[str, Any]:
    """`check.json`: what was measured before the first step."""
    reference = prepared.reference
    return {
        "template": prepared.corpus.renderer.name,
        "model": prepared.trainer.policy.describe(),
        "cautions": cautions(prepared),
        "reference": {"mode": reference.mode, "why": reference.why} if reference else None,
        "policy_against_reference": step_zero,
        "memory_bytes": memory_record(prepared),
    }
