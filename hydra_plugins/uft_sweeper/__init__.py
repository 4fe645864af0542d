"""The sweepers: a grid (`hydra/sweeper=uft`, the default) and a search with Optuna (`hydra/sweeper=uft_optuna`).

Every job is composed and checked before the first one starts; one failure does not stop the others, whatever the
launcher; all failures are listed at the end; finished jobs are skipped on a rerun. The work is done in
:mod:`uft.launch.sweep` and :mod:`uft.launch.optuna`; these are the plugins that Hydra finds.
"""

# No `from __future__ import annotations` here: Hydra executes this file before it is in sys.modules, where a dataclass
# would look up the names in its annotations.
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, read_write


@dataclass
class UftSweeperConf:
    _target_: str = "hydra_plugins.uft_sweeper.UftSweeper"
    max_batch_size: int | None = None  # jobs handed to a parallel launcher at once; null: all of them
    params: dict[str, str] | None = field(default=None)  # axes that a file brings: {objective.beta: "0.05,0.1"}
    arms: dict[str, str] | None = field(default=None)  # a table of settings: {ift: "objective=ift optim.lr=1e-3"}


@dataclass
class UftOptunaConf:
    _target_: str = "hydra_plugins.uft_sweeper.UftOptunaSweeper"
    n_trials: int = 20  # trials in all, those of earlier sessions and failed ones among them
    batch: int = 1  # trials handed to a parallel launcher at once
    sampler: str = "tpe"  # tpe, random or qmc
    seed: int | None = 0  # of the sampler
    metric: str | None = None  # what is optimised; null: eval.best
    direction: str | None = None  # min or max; null: eval.best_mode
    storage: str | None = None  # URL of Optuna's database; null: a file in the sweep's folder
    study: str | None = None  # name in the database; null: the sweep's
    params: dict[str, str] | None = field(default=None)  # the space, from a file: {objective.beta: "interval(0.01,1)"}


class UftSweeper(Sweeper):
    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.composed, self.loader = config, hydra_context.config_loader
        launcher = config.hydra.launcher
        if "submitit_folder" in launcher:  # a pickle that lies there already is no answer of a job
            with read_write(launcher):
                launcher.submitit_folder = launcher.submitit_folder.replace("%j", f"{uuid4().hex}/%j")
        self.job_launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def lines(self, arguments: list[str]) -> list[str]:
        """What a file sweeps, then what the command line does."""
        return [*(f"{key}={values}" for key, values in (self.settings["params"] or {}).items()), *arguments]

    def sweep(self, arguments: list[str]) -> Any:
        from uft.launch.sweep import Sweep, expand, run_grid

        lines, axes = expand(self.lines(arguments), self.loader, self.settings["arms"] or {})
        one_by_one = self.composed.hydra.runtime.choices["hydra/launcher"] == "basic"
        sweep = Sweep(self.composed, tuple(arguments), axes, self.job_launcher)
        return run_grid(sweep, lines, 1 if one_by_one else self.settings["max_batch_size"])


class UftOptunaSweeper(UftSweeper):
    def sweep(self, arguments: list[str]) -> Any:
        from uft.launch.optuna import search
        from uft.launch.sweep import Sweep

        sweep = Sweep(self.composed, tuple(arguments), {}, self.job_launcher)
        return search(self.settings, sweep, self.lines(arguments), self.loader)


for name, node in (("uft", UftSweeperConf), ("uft_optuna", UftOptunaConf)):
    ConfigStore.instance().store(group="hydra/sweeper", name=name, node=node, provider="uft")
