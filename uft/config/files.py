"""The configuration files of a request: Hydra finds, orders and composes them; here is where each value was set.

Hydra's `compose` makes the values; its loader tells which files they are from, in which order.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from itertools import accumulate, takewhile
from pathlib import Path
from typing import Any, TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from uft.config.checks import Draft, Setting
from uft.config.messages import (
    COMMAND_LINE,
    conf_dir,
    conf_name,
    config_dirs,
    groups,
    hint,
    nearest,
    no_such_option,
    not_installed,
)
from uft.config.schema import Config, KeyPath, leaves
from uft.errors import Problem, UftError, raise_problems
from uft.runs import bounded, yaml_text

T = TypeVar("T")
VERSION_BASE = "1.3"
HEADER = 512  # characters that Hydra looks through for a header
OPEN = ("objective", "reward", "data.sources", "stages")
"""Where Hydra takes any key of a command line: which keys there are depends on choices, and is checked by us."""
SINGLE = ("objective", "reward", "data", "model", "optim")  # of these a run has one, named by `name`


@dataclass(frozen=True)
class Request:
    """A request: the overrides, and the rare options that decide where files are looked for."""

    overrides: tuple[str, ...] = ()
    config_name: str = "config"
    config_dir: str | None = None  # --config-dir: options that are added, not shadowed
    config_path: str | None = None  # --config-path: another conf/ altogether


def request_of_job(hydra: Any, words: Iterable[str]) -> Request:
    """The request of a job with these overrides in the Hydra application whose `hydra` node this is."""
    sources = (hydra.get("runtime") or {}).get("config_sources") or ()
    folders = {source["provider"]: source["path"] for source in sources}
    overrides = (*hydra["overrides"]["hydra"], *words)
    return Request(overrides, str(hydra["job"]["config_name"]), folders.get("command-line"), folders.get("main"))


@dataclass(frozen=True)
class Composed:
    """A choice of options, composed by Hydra."""

    values: Mapping[str, Any]  # references unresolved
    files: tuple[tuple[Setting, ...], ...]  # the settings of each file, in the order of the files
    options: Mapping[str, str | None]  # by group
    problems: tuple[Problem, ...]  # why it could not be composed, or may not be: a file names code to run
    needs_hydra: bool  # a file sets something of Hydra's own: a launcher, a sweep

    @property
    def settings(self) -> list[Setting]:
        return [setting for file in self.files for setting in file]


@cache
def register() -> None:
    """Put the defaults of every key into Hydra's ConfigStore, which conf/config.yaml builds on."""
    node = OmegaConf.create(asdict(Config()))
    for place in OPEN:
        OmegaConf.set_struct(OmegaConf.select(node, place), False)
    ConfigStore.instance().store(group="schema", name="config", node=node, provider="uft")


@contextmanager
def application(request: Request) -> Iterator[ConfigLoader]:
    """Within, `compose` works as `hydra.main` would for this request, search path plugins included; yields its loader.

    A Hydra application that is running is set aside meanwhile: `initialize_config_dir` refuses to work within one.
    """
    register()
    running, name = GlobalHydra.instance().hydra, JobRuntime.instance().get("name")
    GlobalHydra.instance().clear()
    try:
        folder = str(Path(request.config_path or conf_dir()).resolve())
        with initialize_config_dir(folder, job_name=name, version_base=VERSION_BASE):
            yield GlobalHydra.instance().config_loader()
    finally:
        GlobalHydra.instance().hydra = running


def make_loader(request: Request) -> ConfigLoader:
    with application(request) as loader:
        return loader


def files_of(request: Request) -> Files:
    """The files that this request can draw in. They are read once in a process, unless one changes.

    Raises UftError where the request, or the primary file, wants to look for them in a package, which would import it.
    """
    options = {"--config-path": request.config_path, "--config-dir": request.config_dir, "-cn": request.config_name}
    if code := [f"{option} {place}" for option, place in options.items() if PACKAGE in str(place)]:
        raise UftError(*(Problem(word, NAMES_CODE, COMMAND_LINE) for word in code))
    folders = [*config_dirs(request.config_dir), *([Path(request.config_path)] if request.config_path else ())]
    stats = ((file, file.stat()) for folder in folders for file in sorted(folder.rglob("*.yaml")) if file.is_file())
    stamp = tuple((str(file), stat.st_mtime_ns, stat.st_size) for file, stat in stats)
    searched = tuple(
        word for word in request.overrides if word.lstrip("+").startswith(f"{SEARCHPATH}=") and not names_code(word)
    )
    return _files(dataclasses.replace(request, overrides=searched), Path.cwd(), stamp)


@lru_cache(maxsize=4)
def _files(request: Request, cwd: Path, stamp: object) -> Files:
    return Files(request)


class Files:
    """The configuration files of one search path."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.loader = make_loader(request)
        primary = self._file(request.config_name)
        content = OmegaConf.select(OmegaConf.load(primary), SEARCHPATH) if primary else None
        searched = [str(place) for place in content or ()]
        if code := [place for place in searched if place.startswith(PACKAGE)]:
            where = f"{request.config_name}.yaml"
            raise UftError(*(Problem(f"{SEARCHPATH}={place}", NAMES_CODE, where, PLUGINS) for place in code))
        for word in request.overrides:
            value = parser().parse_override(word).value()
            searched = list(map(str, value)) if isinstance(value, list) else []
        self.folders = [Path(place.removeprefix("file://")) for place in searched]
        if request.config_dir and Path(request.config_dir).is_dir():
            self.folders.insert(0, Path(request.config_dir).resolve())
        listed = json.dumps(list(map(str, self.folders)), ensure_ascii=False)
        self.words = [f"{SEARCHPATH}={listed}"] if self.folders else []
        self.groups = groups([*map(Path, filter(None, [request.config_path])), *config_dirs(), *self.folders])
        self._composed: dict[tuple[str, ...], Composed] = {}

    def has(self, group: str, option: str) -> bool:
        folder, _, name = f"{group}/{option}".rpartition("/")
        return name in self.groups.get(folder, {})

    def composed(self, choices: tuple[str, ...]) -> Composed:
        """The files that these overrides of groups draw in, once for each choice.

        Raises an exception of BROKEN, or UftError, where a file cannot be read or a choice is none.
        """
        if choices not in self._composed:
            self._composed[choices] = readable(self.request.config_dir, lambda: self._compose(choices))
        return self._composed[choices]

    def _compose(self, choices: tuple[str, ...]) -> Composed:
        # values of Hydra's own draw no file in
        words = [*self.words, *(word for word in choices if not word.lstrip("+~").startswith("hydra."))]
        plan = self.loader.compute_defaults_list(self.request.config_name, words, RunMode.RUN)
        files, code = list[tuple[Setting, ...]](), list[Problem]()
        needs_hydra = any(choice.lstrip("+~").startswith(("hydra.", "hydra/")) for choice in choices)
        for default in plan.defaults:
            file = self._file(default.config_path) if default.config_path else None
            if file is None:
                continue
            settings = []
            for inner, value, line in leaves_in(file, file.stat().st_mtime_ns):
                path = (*filter(None, (default.package or "").split(".")), *inner)
                where = f"{conf_name(file)}:{line}" if line else conf_name(file)
                settings.append(Setting(path, value, where, ".".join(path)))
            own = [setting for setting in settings if setting.path[0] != "hydra"]
            needs_hydra |= len(own) < len(settings) and file != conf_dir() / "config.yaml"
            files.append(tuple(own))
            if not file.is_relative_to(conf_dir()):
                named = [s for s in settings if FORBIDDEN.search(f"{s.key}.") or CODE.search(str(s.value))]
                code += [Problem(s.key, NAMES_CODE, s.file, PLUGINS) for s in named]
        values, problems = dict[str, Any](), code
        if not code:
            try:
                with application(self.request):
                    values = text_keys(OmegaConf.to_container(compose(self.request.config_name, words)))
            except BROKEN as error:  # a list where a group of keys has to stand, for one
                draft = Draft.laid([setting for file in files for setting in file])
                values, problems = draft.values, [] if draft.problems else [translate(error)]
        return Composed(values, tuple(files), dict(plan.overrides.known_choices), tuple(problems), needs_hydra)

    def _file(self, path: str) -> Path | None:
        """The YAML file of an entry of the defaults list; None for what came with Hydra and with plugins."""
        for source in self.loader.get_sources():
            if source.is_config(path):
                return Path(source.path) / f"{path}.yaml" if source.scheme() == "file" else None
        files = (folder / f"{path}.yaml" for folder in self.folders)
        return next((file for file in files if file.is_file()), None)


@lru_cache(maxsize=256)
def leaves_in(file: Path, modified: int) -> list[tuple[KeyPath, Any, int | None]]:
    """(path, value, line) of every leaf of a YAML file that was written at that time."""
    content = text_keys(OmegaConf.to_container(OmegaConf.load(file)))
    assert isinstance(content, dict)
    lines = line_numbers(file.read_text(encoding="utf-8"))
    return [(path, value, lines.get(path)) for path, value in leaves(content) if path[:1] not in ((), ("defaults",))]


def text_keys(values: Any) -> Any:
    """The same with text for every key, as paths have it: in YAML `1` and `true` are keys that are none."""
    if isinstance(values, list):
        return [text_keys(value) for value in values]
    return {str(key): text_keys(value) for key, value in values.items()} if isinstance(values, dict) else values


def line_numbers(text: str) -> dict[tuple[str, ...], int]:
    """Path -> 1-based line of every key in a YAML text."""
    line_of: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node | None, prefix: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line_of[(*prefix, str(key.value))] = key.start_mark.line + 1
                walk(value, (*prefix, str(key.value)))

    walk(yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), ())
    return line_of


# Configurations name no code: what Hydra would import and call because a file or a command line says so is refused.
# An installed plugin (hydra/launcher=joblib) is chosen by its name and brings its own `_target_`.

FORBIDDEN = re.compile(
    r"(^|\.)_(target|partial|args|recursive|convert)_\."  # what is imported and called, and how
    r"|^hydra\.(callbacks|job_logging|hydra_logging)\."  # objects of Hydra's, and of Python's logging
    r"|^hydra\.job\.env_set\."  # PYTHONPATH, LD_PRELOAD
)
"""Matched against a dotted key and a dot."""

PACKAGE = "pkg://"  # to look into a package is to import it
CODE = re.compile(rf"_(target|partial|args)_|{PACKAGE}|\$\{{\s*(oc\.(create|decode)\b|\$\{{)")
"""No value may hold one: those names (in a list), a package, a resolver that makes a tree of text."""
SEARCHPATH = "hydra.searchpath"
NAMES_CODE = "names code to run, and configurations cannot"
PLUGINS = ("an installed plugin is chosen by its name:  hydra/launcher=NAME",)


def names_code(word: str) -> bool:
    """Whether a word of a command line names code, whatever its grammar."""
    key, _, value = word.lstrip("+~").partition("=")
    return bool(FORBIDDEN.search(f"{key.partition('@')[0]}.") or CODE.search(value))


@cache
def parser() -> OverridesParser:
    """Hydra's parser of overrides."""
    return OverridesParser.create()


# errors of Hydra, OmegaConf and YAML

BROKEN = (HydraException, OmegaConfBaseException, yaml.YAMLError)
"""Exceptions of composition that mean a mistake of the user's."""

NO_FILE = re.compile(r"Could not find '([^']+)'")
OPTIONS = re.compile(r"Available options in '([^']+)':\n((?:\t.+\n?)+)")
PARENT = re.compile(r"In '([^']+)': ")
NO_CONFIG = re.compile(r"Cannot find primary config '([^']+)'")
NO_MATCH = re.compile(r"Could not override '([^']+)'")
YAML_AT = re.compile(r'in "([^"]+)", line (\d+)')


def translate(error: BaseException) -> Problem:
    """An exception of composition as a problem."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    text = "\n".join(map(str, causes))
    first = innermost_line(error)
    if broken := YAML_AT.search(text):
        return no_yaml(f"{conf_name(Path(broken[1]))}:{broken[2]}", first)
    if missing := NO_CONFIG.search(text):
        return Problem(missing[1], "no such primary config", COMMAND_LINE)
    parent = PARENT.search(text)
    where = f"conf/{parent[1]}.yaml" if parent else ""
    if lost := NO_FILE.search(text):
        if plugin := not_installed(lost[1]):
            return Problem(lost[1], "this plugin of Hydra is not installed", "", (plugin,))
        known = OPTIONS.search(text)
        group, options = (known[1], known[2].split()) if known else ("", [])
        near = nearest(lost[1].rpartition("/")[2], options)
        advice = hint(f"{group}={near}" if near else None, "choices", options)
        return Problem(lost[1], "no such file in conf/", where, (advice,) if advice else ())
    if unused := NO_MATCH.search(text):
        return Problem(unused[1], "is not in the defaults list, so there is nothing to override", where)
    return Problem(first, "", where)


def no_yaml(where: str, why: str) -> Problem:
    return Problem(where, f"cannot be read as YAML: {why}")


def innermost_line(error: BaseException | None) -> str:
    """The first line of the innermost message that says anything."""
    deepest, name = "", type(error).__name__
    while error is not None:
        text, name = str(error).strip(), type(error).__name__
        deepest, error = text or deepest, error.__cause__
    return deepest.splitlines()[0] if deepest else name


def readable(config_dir: str | None, read: Callable[[], T]) -> T:
    """The result of `read`, which reads configuration files.

    Raises UftError naming the file where something breaks that is no error of YAML's or Hydra's own (bytes that are not
    UTF-8, nesting without end, a number of thousands of digits), and before `read` where aliases in a file of the
    user's would grow without end, since Hydra writes out what each stands for.
    """
    own = [folder for folder in config_dirs(config_dir) if folder != conf_dir()]
    grown = [(file, overgrown(file)) for folder in own for file in sorted(folder.rglob("*.yaml"))]
    raise_problems([no_yaml(conf_name(file), why) for file, why in grown if why])
    try:
        return read()
    except (*BROKEN, UftError):
        raise
    except Exception as error:
        files = [file for folder in config_dirs(config_dir) for file in sorted(folder.rglob("*.yaml"))]
        found = [no_yaml(conf_name(file), why) for file in files if (why := stumbling(file))]
        if not found:
            raise
        raise UftError(*found) from error


def overgrown(file: Path) -> str | None:
    """Why reading a file would take minutes: its size, or aliases that expand without bound.

    None where it would not. Other faults are told elsewhere.
    """
    content = None
    try:
        text = yaml_text(file)
        with suppress(yaml.YAMLError, ValueError, RecursionError):
            content = yaml.safe_load(text) if "&" in text and "*" in text else None
        bounded(content)
    except UnicodeDecodeError:
        return None
    except ValueError as error:
        return innermost_line(error)
    return None


def stumbling(file: Path) -> str | None:
    """The fault that YAML, or Hydra reading the header and the defaults list, finds in a file; None: none."""
    try:
        text = file.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except RecursionError:
        return "nested too deeply"
    except (yaml.YAMLError, ValueError, OSError) as error:
        return innermost_line(error)
    lines = (line.strip() for line in text[:HEADER].splitlines() if line.strip())
    header = takewhile(lambda line: re.match(r"#+\s*@", line), lines)
    if any(len(line.lstrip("#").split()) != 2 for line in header):
        return "a header is written  # @package NAME"
    if not isinstance(content, dict | None):
        return "a file of configuration holds keys and values"
    defaults = content.get("defaults", []) if content else []
    if not isinstance(defaults, list):
        return "defaults must be a list"
    return next((f"{item!r} is no entry of a defaults list" for item in defaults if not _is_entry(item)), None)


def _is_entry(item: Any) -> bool:
    """`name`, or `group: name`, or `group: [name, name]`; null may stand for the one name of a group."""
    if not isinstance(item, dict):
        return isinstance(item, str)
    lists = [value if isinstance(value, list) else [value] for value in item.values() if value is not None]
    return all(isinstance(name, str) for names in lists for name in names)


# --- The words of a command line, each looked at by itself: can it be read, does the file that it chooses exist.


ENDLESS = "is nested too deeply, or has a number of more than 4,300 digits"
DEEPEST = 100  # brackets within brackets of a word


@dataclass
class Words:
    """Overrides by what they do, and what is wrong with some of them."""

    choices: list[str] = field(default_factory=list)  # of groups, and Hydra's own keys: right as they stand
    mended: list[str] = field(default_factory=list)  # what bad choices of a group probably meant
    values: list[Override] = field(default_factory=list)  # of keys; not looked at yet
    problems: list[Problem] = field(default_factory=list)
    unclear: set[str] = field(default_factory=set)  # groups whose choice could not even be guessed

    @property
    def chosen(self) -> tuple[str, ...]:
        return (*self.choices, *self.mended)


def read_words(lines: Iterable[str], files: Files) -> Words:
    """Parse every override and check the choices of groups."""
    words = Words()
    for line in lines:
        if names_code(line):
            words.problems.append(Problem(line, NAMES_CODE, COMMAND_LINE, PLUGINS))
            continue
        depth = accumulate((letter in "[{(") - (letter in ")}]") for letter in line)
        if max(depth, default=0) > DEEPEST or re.search(r"\d{4301}", line):  # the parser would take minutes, or fail
            words.problems.append(Problem(f"{line[:60]} ...", ENDLESS, COMMAND_LINE))
            continue
        try:
            override = parser().parse_override(line)
        except HydraException as error:
            words.problems.append(_unreadable(line, error))
            continue
        if override.is_sweep_override():
            key, value = override.get_key_element(), override.get_value_string()
            advice = [f"to run each of them:  uft train -m {key}={value}"]
            if override.value_type is ValueType.SIMPLE_CHOICE_SWEEP:
                advice.append(f"for a list:  {key}=[{value}]   for text with a comma:  '{key}=\"{value}\"'")
            words.problems.append(Problem(line, "several values need -m", COMMAND_LINE, tuple(advice)))
        elif override.is_hydra_override():
            words.choices.append(line)
        elif override.key_or_group not in files.groups or isinstance(override.value(), dict):
            words.values.append(override)
        else:
            _choose(override, files, words)
    return words


def overruled(lines: Iterable[str]) -> dict[str, str]:
    """Words of a command line that a later word about the same key says otherwise: that word."""
    last: dict[str, str] = {}
    overruled_by: dict[str, str] = {}
    for line in lines:
        key, equals, value = line.lstrip("+").partition("=")
        if not equals or key.startswith(("~", "hydra")) or line.startswith(OF_JOBS):
            continue
        if key in last and last[key].partition("=")[2] != value:
            overruled_by[last[key]] = line
        last[key] = line
    return overruled_by


OF_JOBS = ("++run.dir=", "++sweep.name=")
"""Words that a sweep adds to those of its jobs."""


def _unreadable(line: str, error: HydraException) -> Problem:
    key, equals, value = line.partition("=")
    advice = innermost_line(error)
    if key != key.strip() or value != value.strip():
        return Problem(line, "has a space beside =", COMMAND_LINE, (f"write  {key.strip()}={value.strip()}",))
    if not equals:  # sft is objective=sft
        options = [f"{group}={key}" for group, files in groups(config_dirs()).items() if key in files]
        if Path(key).is_dir():
            options += [f"model.path={key}" if Path(key, "config.json").is_file() else f"data={key}"]
        advice = f"did you mean  {' or '.join(options)} ?" if options else f"write  {key}=VALUE"
        if Path(key).suffix in (".yaml", ".yml"):
            advice = f"a file of settings is  conf-user/experiment/{Path(key).name}  and  experiment={Path(key).stem}"
    elif not set(value) & set("'\""):
        advice = f"quote a value with special characters:  '{key}=\"{value}\"'"
    return Problem(line, "cannot be read as key=value", COMMAND_LINE, (advice,))


def _choose(override: Override, files: Files, words: Words) -> None:
    """Note one choice of a group as right or wrong."""
    group, value, line = override.key_or_group, override.value(), str(override.input_line)
    added = (override.is_add() or override.is_force_add()) and not override.package
    if added and group in groups([conf_dir()]):  # the defaults list has a choice already: Hydra would see two
        meant = line.lstrip("+")
        plain = (f"without the +:  {meant}",)
        words.problems.append(Problem(line, f"{group} has a choice already", COMMAND_LINE, plain))
        words.mended += [meant] if isinstance(value, str) and files.has(group, value) else []
        return
    if value is None and not override.is_delete() and files.composed(()).options.get(group) is None:
        words.choices.append(f"~{group}")  # Hydra's word for no choice, where its own files say null
        return
    asked = [] if override.is_delete() else value if isinstance(value, list) else [value]
    options = ["null" if option is None else str(option) for option in asked]
    lost = next((option for option in options if not files.has(group, option)), None)
    each = f"a run for each of them:  -m {group}={','.join(options)}"
    if lost is None and len(options) > 1 and group in SINGLE:
        words.problems.append(Problem(line, "the second file would change keys of the first", COMMAND_LINE, (each,)))
        words.mended.append(f"{group}={options[0]}")
        return
    if lost is None:
        words.choices.append(line)
        return
    place = f"{group}@{override.package}" if override.package else group
    advice, near = no_such_option(group, lost, list(files.groups[group]), place)
    if isinstance(value, list):
        advice = (*(("rows of several files:  data=[a.jsonl,b.jsonl]",) if group == "data" else ()), each, *advice)
    words.problems.append(Problem(line, f"no such file in conf/{group}", COMMAND_LINE, advice))
    words.mended += [near] if near else []
    words.unclear |= set() if near else {group}
