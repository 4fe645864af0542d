"""A search with Optuna: `hydra/sweeper=uft_optuna`, extra `[optuna]`.

It asks Optuna for trials, hands them to whatever launcher is chosen, and tells it what their `result.json` says. The
search itself stands in :mod:`uft.launch.sweep_optuna`; this is the plugin that Hydra finds.
"""

# No `from __future__ import annotations` here: see hydra_plugins/uft_sweeper.
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


@dataclass
class UftOptunaConf:
    _target_: str = "hydra_plugins.uft_optuna.UftOptunaSweeper"
    n_trials: int = 20  # trials in all, those of earlier sittings and failed ones among them
    batch: int = 1  # trials handed to a parallel launcher at once
    sampler: str = "tpe"  # tpe, random or qmc
    seed: int | None = 0  # of the sampler
    metric: str | None = None  # what is optimised; null: eval.best
    direction: str | None = None  # min or max; null: eval.best_mode
    storage: str | None = None  # URL of Optuna's database; null: a file in the sweep's folder
    study: str | None = None  # name in the database; null: the sweep's
    params: dict[str, str] | None = field(default=None)  # the space, from a file: {objective.beta: "interval(0.01,1)"}


class UftOptunaSweeper(Sweeper):
    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        from uft.launch.sweep_optuna import Settings, search

        assert self.config is not None
        assert self.launcher is not None
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        return search(Settings(**self.settings), self.config, loader, self.launcher, arguments)


ConfigStore.instance().store(group="hydra/sweeper", name="uft_optuna", node=UftOptunaConf, provider="uft")
