"""Where configuration files lie, and what they say of themselves."""

from __future__ import annotations

import os
from functools import cache
from itertools import takewhile
from pathlib import Path
from textwrap import shorten

from uft.errors import Problem, UftError

HIDDEN_GROUPS = ("hydra", "schema")


@cache
def conf_dir() -> Path:
    """The folder of the shipped YAML files: inside the package when installed, beside it in a checkout.

    Found by path, not as a package resource: an editable install has no `uft.conf` to import.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise UftError(
        Problem("conf/", "the configuration files are missing from this installation", str(package)),
        footer="Install again:  pip install --force-reinstall uft",
    )


def user_dir() -> Path | None:
    """The user's own configuration folder: $UFT_CONF, else ./conf-user. Its files win over the shipped ones."""
    named = os.environ.get("UFT_CONF")
    folder = Path(named).expanduser() if named else Path("conf-user")
    return folder.resolve() if folder.is_dir() else None


def config_dirs(extra: str | None = None) -> list[Path]:
    """Every folder with configuration files, the first one that has a file wins. `extra` is Hydra's --config-dir."""
    dirs = [user_dir(), conf_dir(), Path(extra).resolve() if extra else None]
    return [folder for folder in dirs if folder is not None and folder.is_dir()]


def groups(dirs: list[Path]) -> dict[str, dict[str, Path]]:
    """Group -> option -> file, over all `dirs`, sorted by name."""
    found: dict[str, dict[str, Path]] = {}
    for folder in dirs:
        for file in sorted(folder.rglob("*.yaml")):
            group = file.parent.relative_to(folder).as_posix()
            if group != "." and group.split("/")[0] not in HIDDEN_GROUPS:
                found.setdefault(group, {}).setdefault(file.stem, file)
    return {group: dict(sorted(options.items())) for group, options in sorted(found.items())}


def headline(file: Path, longest: int = 104) -> str:
    """The first sentence of a file's opening comment: what this option is. `# @package` lines do not count."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    comment = takewhile(lambda line: line.startswith("#"), lines)
    text = " ".join(line.strip("# ") for line in comment if "@package" not in line)
    return shorten(text.partition(". ")[0], longest, placeholder=" ...")


def shown(path: Path) -> str:
    """A file as people know it: `conf/data/mix.yaml` for the shipped ones, else relative to here if it is below."""
    path = path.resolve()
    for base, prefix in ((conf_dir(), "conf"), (Path.cwd(), ".")):
        if path.is_relative_to(base):
            return (Path(prefix) / path.relative_to(base)).as_posix()
    return str(path)
