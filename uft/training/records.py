"""What a run writes down about its data."""

from __future__ import annotations

from typing import Any

from uft.data.mixture import Mixture
from uft.data.report import data_report
from uft.training.corpus import Corpus, Plan
from uft.training.feed import Feed


def data_record(corpus: Corpus, feed: Feed, plan: Plan) -> dict[str, Any]:
    """`data.json`: what was asked of the data and what the whole run draws of it, under the objective's own views."""
    mixture = Mixture(feed.mixture.names, feed.mixture.sizes, feed.mixture.weights, feed.mixture.seed)
    unusable = {name: sum(map(len, kinds.values())) for name, kinds in feed.unusable().items()}
    report = data_report(corpus.loaded, corpus.train, mixture, plan.total_rows, feed.views, unusable)
    return {"run_digest": corpus.digest, "epoch_rows": plan.epoch_rows, **report}
