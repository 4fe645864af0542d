"""The user's own configuration folder, looked at before the shipped one: $UFT_CONF, else ./conf-user.

A file there wins over a shipped file of the same name. The conf folders of packages that bring rewards or objectives,
Hydra's `--config-dir` and `hydra.searchpath` come after the shipped folder: they add options and never replace one.
"""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.plugins.search_path_plugin import SearchPathPlugin

from uft.config.messages import installed_dirs, user_dir


class UftSearchPath(SearchPathPlugin):
    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        folder = user_dir()
        if folder is not None:
            search_path.prepend("uft-user", f"file://{folder}", SearchPathQuery(provider="main"))
        for installed in installed_dirs():
            search_path.append("uft-installed", f"file://{installed}")
