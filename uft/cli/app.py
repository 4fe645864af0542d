"""A verb over a configuration: its help page, Hydra's options, one composition, and Hydra itself for several runs.

A request for one run is composed and checked here and carried out at once. What sets anything of Hydra's own (-m, a
sweep, a launcher, --cfg, --info) runs as a native Hydra application over conf/config.yaml.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from uft.cli import VERBS
from uft.config.checks import Draft, elsewhere
from uft.config.compose import Examined, examine, footer, needs_hydra, refuse_named_code, require
from uft.config.files import (
    BROKEN,
    VERSION_BASE,
    Request,
    make_loader,
    register,
    request_of_job,
    translate,
)
from uft.config.messages import choices, conf_dir, config_dirs, groups, headline, listing, nearest, written
from uft.config.schema import MISSING, Config, default_of, fields_of, kind_at
from uft.errors import CLOSED_PIPE, GOOD, Problem, UftError, tell, tracing
from uft.launch.launcher import row_problems
from uft.launch.sweep import JobFailed, failure_reason

Work = Callable[[Examined, Sequence[str]], int]
"""What a verb does with a checked request and its overrides; the exit code."""

FLAGS = ("-h", "--help")
OPTIONS = "Options are Hydra's:  -m  --cfg job  --info  --config-dir DIR  -cn NAME.  Settings:  uft VERB --help"


def task(work: Work) -> Callable[[DictConfig], None]:
    """`work` as Hydra's task function: checks first, and an exit code that means the same in every run mode.

    It must be reachable as a module's attribute: parallel launchers send it by name to other processes. Those must
    not exit, so a job of a multirun raises what a single run exits with.
    """

    @functools.wraps(work)
    def run(cfg: DictConfig) -> None:
        composed = HydraConfig.get()
        words = list(composed.overrides.task)
        request = request_of_job(composed, words)
        if composed.mode == RunMode.MULTIRUN:
            examined = require(request)
            code = work(examined, words)
            if code != GOOD:
                folder = str(examined.settings["run"]["dir"] or "")
                raise JobFailed(code, folder, failure_reason(code, Path(folder)))
            return
        try:
            code = work(checked(request), words)
        except UftError as error:
            if tracing():
                raise
            code = tell(error)
        except BrokenPipeError:  # Hydra would call it an error of the job
            code = CLOSED_PIPE
        raise SystemExit(code)

    return run


def run_app(page: Page, job: Callable[[DictConfig], None], arguments: list[str]) -> int:
    """Carry out a verb with these arguments, or show its help; the exit code.

    What goes wrong in Hydra's composition is told by us.
    """
    if any(word in FLAGS for word in arguments):
        print(page.text(option(arguments, "--config-dir", "-cd")))
        return GOOD
    parsed = parse(arguments)
    request = Request(tuple(parsed.overrides), parsed.config_name or "config", parsed.config_dir, parsed.config_path)
    ours = ("overrides", "run", "config_name", "config_dir", "config_path")
    asked = [value for name, value in vars(parsed).items() if name not in ours]
    if parsed.config_dir is None or Path(parsed.config_dir).is_dir():
        if not any(asked) and not needs_hydra(request):
            return work_of(job)(checked(request), request.overrides)
        refuse_named_code(request)
    if parsed.cfg:  # Hydra prints it without a word about keys of objectives that are not there
        require(request)
    try:
        with native(page.verb, arguments):
            hydra.main(config_path=str(conf_dir()), config_name="config", version_base=VERSION_BASE)(job)()
    except BROKEN as error:
        raise explained(error, request, parsed.multirun) from error
    except JobFailed as failure:  # under a sweeper that is not ours
        print(f"uft: {failure.message}", file=sys.stderr)
        return failure.code
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else GOOD
    return GOOD


def work_of(job: Callable[[DictConfig], None]) -> Work:
    work: Work = job.__wrapped__  # type: ignore[attr-defined]
    return work


def checked(request: Request) -> Examined:
    """The request, composed and valid. UftError with every problem; bad rows are told with wrong settings."""
    examined = examine(request)
    if examined.problems:
        raise UftError(*examined.problems, *row_problems(examined), footer=footer(examined))
    return examined


@contextmanager
def native(verb: str, arguments: Sequence[str]) -> Iterator[None]:
    """Within, `hydra.main` reads these arguments, raises instead of printing, and calls its job by the verb's name."""
    wanted = {"HYDRA_FULL_ERROR": "1", "HYDRA_MAIN_MODULE": f"uft.cli.{verb}"}
    before = {name: os.environ.get(name) for name in wanted}
    register()
    sys.argv = [f"uft {verb}", *arguments]
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value is not None else {})


def explained(error: Exception, request: Request, multirun: bool) -> UftError:
    """Everything that is wrong with the whole request, since Hydra stopped at the first thing."""
    from uft.launch.sweep import examine_jobs

    swept = multirun or any(word.startswith("sweep=") for word in request.overrides)
    try:
        if swept:
            problems, last = examine_jobs(request, make_loader(request))
        else:
            examined = examine(request)
            problems, last = examined.problems, footer(examined)
    except BROKEN:  # not a grid, so not ours to expand
        problems = []
    return UftError(*problems, footer=last) if problems else UftError(translate(error))


# Hydra's options


def parse(arguments: list[str]) -> argparse.Namespace:
    """Hydra's own options, with words for people who write --steps 5."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    switches = [["--run", "-r"], ["--multirun", "-m"], ["--shell-completion", "-sc"]]
    switches += [["--hydra-help"], ["--version"], ["--resolve"]]
    values = (["--package", "-p"], ["--config-path", "-cp"], ["--config-name", "-cn"], ["--config-dir", "-cd"])
    options = [parser.add_argument(*names, action="store_true") for names in switches]
    options += [parser.add_argument(*names) for names in values]  # --experimental-rerun would load a pickle
    options.append(parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"]))
    info = ["all", "config", "defaults", "defaults-tree", "plugins", "searchpath"]
    options.append(parser.add_argument("--info", "-i", nargs="?", const="all", choices=info))
    known = {name for each in options for name in each.option_strings}

    def fail(message: str) -> NoReturn:
        words = [word for word in arguments if word.startswith("-") and word.partition("=")[0] not in known]
        raise UftError(*map(not_an_option, words or [" ".join(arguments)]), footer=OPTIONS)

    parser.error = fail  # type: ignore[method-assign]
    parsed = parser.parse_args(arguments)
    modes = [f"--{name}" for name in ("run", "multirun", "cfg", "info") if getattr(parsed, name)]
    if len(modes) > 1:
        raise UftError(Problem(" and ".join(modes), "one of them at a time", "command line"))
    return parsed


def not_an_option(word: str) -> Problem:
    key, _, value = word.lstrip("-").partition("=")
    path = elsewhere(key.replace("-", "_"), Draft({})) if "." not in key else key
    meant = path or nearest(key, fields_of(Config)) or key
    advice = f"settings are written key=value, without dashes:  {meant}={value or '...'}"
    return Problem(word, "no such option", "command line", (advice,))


def option(arguments: list[str], *names: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`."""
    for word, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, value = word.partition("=")
        if name in names:
            return value if equals else following
    return None


# help: the choices found on disk with a line each, the keys one needs most, examples

HYDRA = """\
Options are Hydra's: -m (several values), --cfg job (print, do nothing), --info, --config-dir DIR, -cn NAME;
--hydra-help tells of them. Your own files: ./conf-user or $UFT_CONF (they win over the shipped ones)."""
FIRST = ("objective", "data", "model", "optim", "hardware", "eval", "tracking", "experiment", "sweep", "debug")


@dataclass(frozen=True)
class Page:
    """`uft VERB --help`."""

    verb: str
    keys: tuple[str, ...]
    examples: Mapping[str, str]
    usage: str = ""
    notes: tuple[str, ...] = ()

    def text(self, config_dir: str | None = None) -> str:
        found = groups(config_dirs(config_dir))
        lines = [
            f"uft {self.verb}: {VERBS[self.verb]}",
            "",
            f"usage: {self.usage or f'uft {self.verb} [options] [key=value ...]'}",
        ]
        for group in (*(group for group in FIRST if group in found), *(group for group in found if group not in FIRST)):
            lines += ["", f"{group}=", *columns({name: headline(file) for name, file in found[group].items()})]
        return "\n".join(
            [
                *lines,
                "",
                "Keys one needs most  (all of them:  uft config)",
                *columns({key: describe(key) for key in self.keys}),
                "",
                "Examples",
                *columns(self.examples),
                "",
                *(f"  {note}" for note in self.notes),
                HYDRA,
            ]
        )


def columns(table: Mapping[str, str]) -> list[str]:
    width = min(max((len(name) for name in table), default=0), 48)
    return [f"  {name:<{width}}  {says}".rstrip() for name, says in table.items()]


def describe(name: str) -> str:
    """A key's line of help and its default in the schema."""
    above, _, last = name.rpartition(".")
    field = fields_of(kind_at(tuple(above.split(".")) if above else (), Config))[last]
    listed, default = choices(field.annotation), default_of(field)
    said = "" if default in (MISSING, None, {}, []) else f"  [{written(default)}]"
    return f"{field.description}{f' ({listing(listed)})' if listed else ''}{said}"
