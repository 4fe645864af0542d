"""A verb as a Hydra application: what all of them share."""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from uft.cli import CLOSED_PIPE, tell, tracing
from uft.cli.help import Help, shown
from uft.config.compose import settled
from uft.config.examine import Examined, examine, footer, require
from uft.config.loader import VERSION_BASE, Request, make_loader
from uft.config.named_code import refuse_named_code
from uft.config.places import conf_dir
from uft.config.register import register
from uft.config.suggest import nearest
from uft.config.translate import BROKEN, translate
from uft.errors import GOOD, Problem, UftError
from uft.launch.sweep import JobFailed, examine_jobs, failure_reason

Work = Callable[[DictConfig, Examined], int]
"""What a verb does with a checked configuration; the exit code."""


def task(work: Work) -> Callable[[DictConfig], None]:
    """`work` as Hydra's task function: checks first, and an exit code that means the same in every run mode.

    It must be reachable as a module's attribute: parallel launchers send it by name to other processes. Those must
    not exit, so a job of a multirun raises what a single run exits with.
    """

    @functools.wraps(work)
    def run(cfg: DictConfig) -> None:
        composed = HydraConfig.get()
        request = Request((*composed.overrides.hydra, *composed.overrides.task), str(composed.job.config_name))
        if composed.mode == RunMode.MULTIRUN:
            in_a_sweep(work, cfg, request)
            return
        try:
            examined = require(with_folders(request))
            code = work(settled(cfg, examined), examined)
        except UftError as error:
            if tracing():
                raise
            code = tell(error)
        except BrokenPipeError:  # Hydra would call it an error of the job
            code = CLOSED_PIPE
        raise SystemExit(code)

    return run


def in_a_sweep(work: Work, cfg: DictConfig, request: Request) -> None:
    examined = require(with_folders(request))
    code = work(settled(cfg, examined), examined)
    if code != GOOD:
        folder = str(cfg.run.dir or "")
        raise JobFailed(code, folder, failure_reason(code, Path(folder)))


def with_folders(request: Request) -> Request:
    """The request with the folders that Hydra composed this job from."""
    sources = {source.provider: source.path for source in HydraConfig.get().runtime.config_sources}
    return replace(request, config_path=sources.get("main"), config_dir=sources.get("command-line"))


def run_app(page: Help, run: Callable[[DictConfig], None], arguments: list[str]) -> int:
    """`hydra.main` over conf/config.yaml with these arguments, or the verb's help.

    What goes wrong in composition is told by us.
    """
    if shown(page, arguments):
        return GOOD
    parsed = parse(arguments)
    register()
    refuse_named_code(request_of(parsed))
    if parsed.cfg and not parsed.multirun:  # Hydra prints it without a word about keys of objectives that are not there
        require(request_of(parsed))
    sys.argv = [f"uft {page.verb}", *arguments]
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing
    try:
        hydra.main(config_path=str(conf_dir()), config_name="config", version_base=VERSION_BASE)(run)()
    except BROKEN as error:
        raise explained(error, request_of(parsed), parsed.multirun) from error
    except JobFailed as failure:  # under a sweeper that is not ours
        print(f"uft: {failure.message}", file=sys.stderr)
        return failure.code
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else GOOD
    finally:
        restore("HYDRA_FULL_ERROR", full_error)
    return GOOD


def restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def explained(error: Exception, request: Request, multirun: bool) -> UftError:
    """What is wrong with the whole request, since Hydra stopped at the first thing."""
    loader = make_loader(request)
    swept = multirun or any(word.startswith("sweep=") for word in request.overrides)
    try:
        examined = examine(request, loader) if not swept else None
        problems, last = (examined.problems, footer(examined)) if examined else examine_jobs(request, loader)
    except BROKEN:  # not a grid, so not ours to expand
        problems = []
    return UftError(*problems, footer=last) if problems else UftError(translate(error))


def parse(arguments: list[str]) -> argparse.Namespace:
    """Hydra's own options, with words for people who write --steps 5."""
    parser = get_args_parser()

    def fail(message: str) -> NoReturn:
        raise UftError(*(not_an_option(word) for word in unknown_options(parser, arguments)), footer=OPTIONS)

    parser.error = fail  # type: ignore[method-assign]
    parsed = parser.parse_args(arguments)
    modes = [f"--{name}" for name in ("run", "multirun", "cfg", "info") if getattr(parsed, name)]
    if len(modes) > 1:
        raise UftError(Problem(" and ".join(modes), "one of them at a time", "command line"))
    return parsed


OPTIONS = "Options are Hydra's:  -m  --cfg job  --info  --config-dir DIR  -cn NAME.  Settings:  uft VERB --help"


def unknown_options(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    known = {option for action in parser._actions for option in action.option_strings}
    words = [word for word in arguments if word.startswith("-") and word.partition("=")[0] not in known]
    return words or [" ".join(arguments)]


def not_an_option(word: str) -> Problem:
    bare = word.lstrip("-")
    key, _, value = bare.partition("=")
    from uft.config.tree import Tree

    tree = Tree()
    path = tree.elsewhere((key.replace("-", "_"),)) if "." not in key else key
    meant = path or nearest(key, list(tree.root)) or key
    advice = f"settings are written key=value, without dashes:  {meant}={value or '...'}"
    return Problem(word, "no such option", "command line", (advice,))


def request_of(parsed: argparse.Namespace) -> Request:
    """The parsed options as a request. Swept values are looked at one by one, each for itself."""
    return Request(
        overrides=tuple(parsed.overrides),
        config_name=parsed.config_name or "config",
        config_dir=parsed.config_dir,
        config_path=parsed.config_path,
    )
