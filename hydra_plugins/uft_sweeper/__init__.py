"""Hydra's grid sweep, with uft's manners: `hydra/sweeper=uft`, the default.

Every job is composed and checked before the first one starts; one failure does not stop the others, whatever the
launcher; all failures are listed at the end; finished jobs are skipped on a rerun. What a sweep is stands in
:mod:`uft.launch.sweep`; this is the plugin that Hydra finds.
"""

# No `from __future__ import annotations` here: Hydra executes this file before it is in sys.modules, where a dataclass
# would look up the names in its annotations.
from dataclasses import dataclass, field
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore


@dataclass
class UftSweeperConf:
    _target_: str = "hydra_plugins.uft_sweeper.UftSweeper"
    max_batch_size: int | None = None  # jobs handed to a parallel launcher at once; null: all of them
    params: dict[str, str] | None = field(default=None)  # axes that a file brings: {objective.beta: "0.05,0.1"}


class UftSweeper(BasicSweeper):
    def sweep(self, arguments: list[str]) -> Any:
        from uft.launch.sweep import Plan, expand, run_grid

        assert self.config is not None
        assert self.launcher is not None
        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        lines, axes = expand([*self._parse_config(), *arguments], loader)
        one_by_one = isinstance(self.launcher, BasicLauncher)
        plan = Plan(self.config, tuple(arguments), axes)
        return run_grid(plan, lines, self.launcher, 1 if one_by_one else self.max_batch_size)


ConfigStore.instance().store(group="hydra/sweeper", name="uft", node=UftSweeperConf, provider="uft")
