"""The verbs over a configuration: train, check, data, generate, chat, eval, annotate, select, config.

A request for one run is composed and checked here and carried out at once. A request that sets anything of Hydra's own
(-m, a sweep, a launcher, --cfg, --info) runs as a native Hydra application over conf/config.yaml.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from uft.cli.help import help_text
from uft.config.checks import Draft, elsewhere
from uft.config.compose import Examined, change, examine, footer, needs_hydra, quoted, refuse_named_code, require
from uft.config.files import BROKEN, VERSION_BASE, Request, make_loader, overruled, register, request_of_job, translate
from uft.config.frozen import may_change, with_origins
from uft.config.messages import (
    FREE_KEY,
    PLAIN_PATH,
    conf_dir,
    config_dirs,
    groups,
    names_rows,
    nearest,
    source_name,
    written,
)
from uft.config.schema import COLUMNS, Config, fields_of
from uft.config.stages import differences, is_made, rows_of, unready, without_stages
from uft.errors import CLOSED_PIPE, GOOD, Problem, UftError, tame, tell, tracing
from uft.launch.launcher import (
    JOB_KEYS,
    JobFailed,
    changed_keys,
    failure_reason,
    is_sweep_job,
    launch_job,
    launch_train,
    refuse_untrusted,
    row_problems,
)
from uft.launch.sweep import examine_jobs, quote
from uft.runs import Damaged, Run, WeightsSource, find_weights, newest_weights, open_run

Work = Callable[[Examined, Sequence[str]], int]
"""What a verb does with a checked request and its overrides; the exit code. Parallel launchers pickle it."""

FLAGS = ("-h", "--help")
OPTIONS = "Options are Hydra's:  -m  --cfg job  --info  --config-dir DIR  -cn NAME.  Settings:  uft VERB --help"
FILES = {"path", "eval_path", "template"}  # keys of the data that may name files


def train(arguments: list[str]) -> int:
    return run_verb("train", arguments, train_run)


def annotate(arguments: list[str]) -> int:
    """The column, if there is one, is the first word; to Hydra it is one of our keys."""
    named = first_word(arguments)
    words = [f"annotate.column={named}", *arguments[1:]] if named and not names_rows(named) else arguments
    return run_verb("annotate", words)


def generate(arguments: list[str]) -> int:
    """Completions of any model; with RUN or a model as the first word, answers to the questions after it.

    Without questions a run samples completions of its training prompts, with its configuration: of a handful, unless a
    key of the job says otherwise.
    """
    named = first_word(arguments)
    if named is None or names_rows(named):
        return run_verb("generate", arguments)
    if re.search(r"\s", named) and not os.path.exists(named):
        advice = f"uft generate last {shlex.quote(named)}"
        raise UftError(Problem(named, "which model answers is not said", "command line", (advice,)))
    source = model_named(named)
    asked, words = questions(arguments[1:])
    with tempfile.TemporaryDirectory(prefix="uft-") as folder:
        prompts = gathered(asked, Path(folder)) if asked else None
        handful = [] if asked or any(JOB_WORD.match(word) for word in words) else [f"generate.limit={HANDFUL}"]
        code = launch_job("generate", settings_of(source, [*handful, *words], prompts))
    if handful and code == GOOD:
        everything = f"uft generate {quoted(named)} generate.limit=null"
        print(f"these are the first {HANDFUL} prompts of every source; all:  {everything}")
    return code


HANDFUL = 4  # training prompts that a run answers where no questions are asked
JOB_WORD = re.compile(r"[+~]*(generate\.|data[.=])")


def eval(arguments: list[str]) -> int:
    """Figures of a model, or of the weights that the first word names, compared with the model their run began with."""
    named = first_word(arguments)
    if any(names_rows(word) for word in arguments) and not any(word.startswith("data.holdout=") for word in arguments):
        arguments = [*arguments, "data.holdout=0"]  # all rows of a file are measured
    measured = with_sources(arguments if named is None or names_rows(named) else arguments[1:])
    rows, tasks = ([w for w in measured if w.lstrip("+").startswith(f"{key}=")] for key in ("data", "eval.tasks"))
    if rows and tasks:
        why, advice = "rows and tasks are measured one after the other", ("a command for each",)
        raise UftError(Problem(f"{rows[0]} {tasks[0]}", why, "command line", advice))
    if named is None or names_rows(named):
        return run_verb("eval", arguments)
    others = [word for word in arguments[1:] if not word.startswith("-") and "=" not in word and not names_rows(word)]
    if others:
        each = tuple(f"uft eval {word}" for word in (named, *others))
        raise UftError(Problem(" ".join((named, *others)), "one model is measured at a time", "command line", each))
    source = model_named(named)
    if source.run is None:
        return run_verb("eval", [choice_of(source), *arguments[1:]])
    settings, begun = as_found(source, arguments), source.config
    settings["reference"]["path"] = source.run.found(begun["reference"]["path"] or begun["model"]["path"])
    settings = change(settings, measured)
    settings["eval"]["out"] = settings["eval"]["out"] or str(source.run.path / "evals")
    if rows:  # tasks that the run was trained beside are not meant
        settings["eval"]["tasks"] = []
    return launch_job("eval", settings)


def chat(arguments: list[str]) -> int:
    """`uft chat [RUN | MODEL] [another]`: a conversation with the newest run, or with what is named."""
    if set(FLAGS) & set(arguments):
        return run_verb("chat", arguments)
    named, words = questions(arguments)
    if len(named) > 2:
        raise UftError(Problem(" ".join(named), "one model, or two side by side", "command line"))
    from uft.cli.chat import talk

    sources = [model_named(name) for name in named] or [newest_weights()]
    talk([(source.name, settings_of(source, words)) for source in sources])
    return GOOD


OVERRIDE = re.compile(r"[+~]*[\w./@-]+=.*|~[\w./@-]+", re.DOTALL)


def questions(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(questions, files of prompts and `-`; settings)."""
    asked = [word for word in words if word == "-" or not (OVERRIDE.fullmatch(word) or word.startswith("-"))]
    return asked, [word for word in words if word not in asked]


def gathered(asked: Sequence[str], folder: Path) -> Path:
    """One file in `folder` with the prompts of questions, files and standard input. UftError about what is none."""
    from uft.data.records import turns_column
    from uft.sampling.answers import read_prompts

    columns = list[Any]()
    for word in asked:
        file = Path(word)
        if word == "-":
            text = sys.stdin.read()
            file = folder / ("stdin.jsonl" if text.lstrip().startswith("{") else "stdin.txt")
            file.write_text(text, encoding="utf-8")
        if word == "-" or os.path.isfile(file):
            columns += [turns_column(prompt, "user") for prompt in read_prompts(file)]
        else:
            columns.append(word)
    out = folder / "prompts.jsonl"
    out.write_text("".join(json.dumps({"prompt": column}) + "\n" for column in columns), encoding="utf-8")
    return out


def model_named(word: str) -> WeightsSource:
    """Weights by a word as `find_weights` reads it, or else by the name of a model of the configuration."""
    try:
        return find_weights(word)
    except UftError:
        if word not in groups(config_dirs()).get("model", {}):
            raise
        path = checked(Request((f"model={word}",))).settings["model"]["path"]
        return WeightsSource(path, option=word)


def choice_of(source: WeightsSource) -> str:
    """The override that loads a model that is no run; an option brings its other keys along."""
    return f"model={source.option}" if source.option else f"model.path={quote(source.path)}"


def settings_of(source: WeightsSource, words: Sequence[str], prompts: Path | None = None) -> dict[str, Any]:
    """The configuration under which these weights answer: that of their run, else the default one, with `words`."""
    if source.run is None:
        asked = {} if prompts is None else {"prompts": str(prompts)}
        whole = checked(Request(tuple(with_sources([choice_of(source), *words])))).settings
        return whole | {"generate": {**whole["generate"], **asked}}
    settings = as_found(source, words)
    if prompts is not None:
        settings["generate"] |= {"prompts": str(prompts), "out": str(Path(source.run.path, "answers.jsonl"))}
        settings["hardware"] |= {"processes": 1, "nodes": 1, "sharding": "none"}
    return change(settings, with_sources(words))


def config(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--diff")
    ours, rest = parser.parse_known_args(arguments)
    return run_verb("config", rest, partial(print_config, open_run(ours.diff) if ours.diff else None))


def first_word(arguments: list[str]) -> str | None:
    """The first argument where it is neither an option nor an override."""
    first = arguments[0] if arguments else "-"
    return None if "=" in first or first.startswith(("-", "~")) or set(FLAGS) & set(arguments) else first


def several_rows(word: str, config_dir: str | None, sweeps: bool) -> list[str]:
    """`data=a.jsonl,b.jsonl` as a source with two paths to run, `data=[a.jsonl,b.jsonl]` as two words; [] for anything
    else. `sweeps`: whether there may be several values."""
    if listed := re.fullmatch(r"data=\[(.+)\]", word):
        both = [f"data={path.strip()}" for path in listed[1].split(",")]
        return both if all(names_rows(path, config_dir) for path in both) else []
    key, _, value = word.partition("=")
    paths = value.split(",")
    if key != "data" or len(paths) < 2 or os.path.exists(value):
        return []
    rows = [names_rows(f"data={path}", config_dir) and bool(PLAIN_PATH.fullmatch(path)) for path in paths]
    if any(rows) and not all(rows):
        name = paths[rows.index(False)] or "data"
        why, advice = f"{name} is not a file of rows, and a sweep takes mixtures or files", "one command for each"
        raise UftError(Problem(word, why, "command line", (advice,)))
    if all(rows) and not sweeps:
        ways = (f"their rows together:  data=[{value}]", f"a run for each:  -m {word}")
        raise UftError(Problem(word, "several values need -m", "command line", ways))
    return ["data=files", f"+data.sources.rows.path={value}"] if all(rows) else []


def with_sources(words: Sequence[str], config_dir: str | None = None, sweeps: bool = False) -> list[str]:
    """The words with files of rows written out: data=files, and for each a source that is named after it.

    Free keys of the data are added where they are new.

    Beside a mixture that is chosen (data=mix rows.jsonl) a file is one more source of it. Several at once
    (-m data=a.jsonl,b.jsonl) are values of one source, for a run each.
    """
    words = [word for line in words for word in (several_rows(line, config_dir, sweeps) or [line])]
    words = [f"++{word}" if FREE_KEY.match(word) else word for word in words]
    files = [word for word in words if names_rows(word, config_dir)]
    if not files:
        return list(words)
    sources: dict[str, str] = {}
    for path in (word.removeprefix("data=").strip("'\"") for word in files):
        name = source_name(path)
        while name in sources:
            name += "_"
        sources[name] = path if PLAIN_PATH.fullmatch(path) else quote(path)
    kept = [word for word in words if word not in files]
    chosen = [] if any(word.startswith("data=") for word in kept) else ["data=files"]
    added = [f"+data.sources.{name}.path={path}" for name, path in sources.items()]
    return [*chosen, *added, *kept]  # in this order: settings of a source come after it


def train_run(examined: Examined, words: Sequence[str]) -> int:
    if not is_sweep_job(words) and any(word.startswith("sweep.name=") for word in words):
        print("uft: sweep.name does nothing without -m; run.name names a run")
    typed = [word for word in words if not word.startswith(JOB_KEYS)]
    return launch_train(examined.settings, typed, quiet=is_sweep_job(words))


def run_job(job: str, examined: Examined, words: Sequence[str]) -> int:
    if job == "annotate" and examined.settings["annotate"]["column"] is None:
        raise UftError(Problem("uft annotate", "needs a column", "command line", (f"columns: {', '.join(COLUMNS)}",)))
    if lacking := list(unready(job, examined.settings)):
        problems = (Problem(f"uft {job}", why, "command line", (fix.replace(": ", "="),)) for why, fix in lacking)
        raise UftError(*problems)
    return launch_job(job, examined.settings)


def print_config(compared: Run | None, examined: Examined, words: Sequence[str]) -> int:
    """Print every value with its origin, or the differences from the run that it is compared with."""
    if compared is None:
        print(with_origins(examined.settings, examined.origins, examined.references))
        return GOOD
    try:
        changes = changed_keys(compared, examined.settings)
    except Damaged:
        raise
    except UftError:  # another version wrote it, with keys that are none here: as it stands
        changes = differences(compared.config(), examined.settings)
    width = max((len(key) for key, _, _ in changes), default=0)
    for key, old, new in changes:
        note = "   (may change within a run)" if may_change(key) else ""
        print(f"{key:<{width}}  {written(old)} -> {written(new)}{note}")
    if not changes:
        print(f"the same as {compared.path}")
    return GOOD


def as_found(source: WeightsSource, words: Sequence[str]) -> dict[str, Any]:
    """The configuration of a run with these weights of it as its model, its files found from here. UftError where it
    runs a model's code and was not begun here, unless the command's `words` allow it."""
    from uft.data.template import NAMES

    run = source.run
    assert run is not None
    refuse_untrusted(run.path, run.runs_code, words)
    settings: dict[str, Any] = copy.deepcopy(without_stages(source.config))
    for node in (settings["data"], *settings["data"]["sources"].values()):
        # template names are no files, even where a file is called so
        named = {key: node[key] for key in FILES & node.keys() if node[key] not in (None, *NAMES)}
        node |= {key: run.found(path) for key, path in named.items()}
    for name, one in settings["data"]["sources"].items():
        one["path"] = str(rows_of(run.path, one["path"], name)) if is_made(one["path"]) else one["path"]
    settings["model"] |= source.model | {"path": str(Path(source.path).resolve())}
    settings["generate"]["out"] = settings["generate"]["out"] or str(Path(run.path, "generated.jsonl"))
    return settings


# --- One request, by ourselves or as a Hydra application


def run_verb(verb: str, arguments: list[str], work: Work | None = None) -> int:
    """Carry out a verb with these arguments, or print its help; the exit code. Every mistake is told by us.

    `work`: by default the job of that name.
    """
    if set(FLAGS) & set(arguments):
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--config-dir", "-cd", nargs="?")
        parser.add_argument(*FLAGS, nargs="*", dest="groups")
        asked = parser.parse_known_args(arguments)[0]
        print(help_text(verb, asked.config_dir, [word for word in asked.groups if "=" not in word]))
        return GOOD
    parsed = parse(arguments)
    name, overrides = parsed.config_name or "config", with_sources(parsed.overrides, parsed.config_dir, parsed.multirun)
    request = Request(tuple(overrides), name, parsed.config_dir, parsed.config_path)
    others = list(reversed(arguments))  # the options alone: Hydra's own parser takes none between two overrides
    for word in reversed(parsed.overrides):
        others.remove(word)
    for word, later in overruled(overrides).items():
        print(tame(f"uft: {word} is overruled by {later}"), file=sys.stderr)
    try:
        return carry_out(verb, work or partial(run_job, verb), others[::-1], parsed, request)
    except UftError as error:  # commands that are advised draw in the same files
        files = [quoted(word) for word in options_of(request)]
        error.footer = re.sub(r"\buft (config|train)\b", lambda found: " ".join([found[0], *files]), error.footer)
        raise


def carry_out(verb: str, work: Work, options: list[str], parsed: argparse.Namespace, request: Request) -> int:
    """Compose one run and do the work, or leave the request to Hydra where it needs it; the exit code."""
    ours = ("overrides", "run", "config_name", "config_dir", "config_path")
    native = any(value for name, value in vars(parsed).items() if name not in ours)
    if not native and not needs_hydra(request):
        return work(checked(request), [*options_of(request), *request.overrides])
    refuse_named_code(request)
    if parsed.cfg:  # Hydra prints it without a word about keys of objectives that are not there
        checked(request)
    try:
        with hydra_application(verb, [*options, *request.overrides]):
            return run_hydra(work)
    except BROKEN as error:
        raise explained(error, request, parsed.multirun) from error
    except JobFailed as failure:  # under a sweeper that is not ours
        print(f"uft: {failure.message}", file=sys.stderr)
        return failure.code


def options_of(request: Request) -> list[str]:
    """The options that say where files are looked for, as words of a command line."""
    path = request.config_path if request.config_path != str(conf_dir()) else None
    name = request.config_name if request.config_name != "config" else None
    options = {"--config-path": path, "--config-name": name, "--config-dir": request.config_dir}
    return [f"{option}={value}" for option, value in options.items() if value]


def checked(request: Request) -> Examined:
    """The request, composed and valid. UftError with every problem; bad rows are told with wrong settings."""
    examined = examine(request)
    if examined.problems:
        raise UftError(*examined.problems, *row_problems([examined])[0], footer=footer(examined))
    return examined


def hydra_task(work: Work, cfg: DictConfig) -> None:
    """Hydra's task function: checks first, and an exit code that means the same in every run mode.

    A job of a multirun may be in another process, which must not exit: it raises what a single run exits with.
    """
    composed = HydraConfig.get()
    request = request_of_job(composed, list(composed.overrides.task))
    words = [*options_of(request), *composed.overrides.task]
    if composed.mode == RunMode.MULTIRUN:
        examined = require(request)
        code = work(examined, words)
        if code != GOOD:
            folder = Path(examined.settings["run"]["dir"] or "")
            raise JobFailed(code, failure_reason(code, folder))
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


def run_hydra(work: Work) -> int:
    """Run Hydra's application over conf/config.yaml with `sys.argv`; the exit code."""
    application = hydra.main(config_path=str(conf_dir()), config_name="config", version_base=VERSION_BASE)
    try:
        application(partial(hydra_task, work))()
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else GOOD
    return GOOD


@contextmanager
def hydra_application(verb: str, arguments: Sequence[str]) -> Iterator[None]:
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
    try:
        if multirun or any(word.startswith("sweep=") for word in request.overrides):
            problems, last = examine_jobs(request, make_loader(request))
        else:
            examined = examine(request)
            problems, last = examined.problems, footer(examined)
    except BROKEN:  # not a grid, so not ours to expand
        problems = []
    return UftError(*problems, footer=last) if problems else UftError(translate(error))


SWITCHES = ("--run -r", "--multirun -m", "--shell-completion -sc", "--hydra-help", "--version", "--resolve")
VALUES = ("--package -p", "--config-path -cp", "--config-name -cn", "--config-dir -cd")  # a rerun would load a pickle
CHOICES = {
    "--cfg -c": ("job", "hydra", "all"),
    "--info -i": ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
}


def parse(arguments: list[str]) -> argparse.Namespace:
    """Hydra's own options, before, between or behind the settings, with words for people who write --steps 5."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for names in SWITCHES:
        parser.add_argument(*names.split(), action="store_true")
    for names in VALUES:
        parser.add_argument(*names.split())
    for names, choices in CHOICES.items():
        alone: dict[str, Any] = {"nargs": "?", "const": "all"} if names.startswith("--info") else {}
        parser.add_argument(*names.split(), choices=choices, **alone)
    known = {name for names in (*SWITCHES, *VALUES, *CHOICES) for name in names.split()}

    def fail(message: str) -> NoReturn:
        words = [word for word in arguments if word.startswith("-") and word.partition("=")[0] not in known]
        wrong = [not_an_option(word) for word in words] or [Problem(message, "", "command line")]
        raise UftError(*wrong, footer=OPTIONS)

    parser.error = fail  # type: ignore[method-assign]
    parsed = parser.parse_intermixed_args(arguments)
    modes = [f"--{name}" for name in ("run", "multirun", "cfg", "info") if getattr(parsed, name)]
    if len(modes) > 1:
        raise UftError(Problem(" and ".join(modes), "one of them at a time", "command line"))
    if parsed.config_dir is not None and not Path(parsed.config_dir).is_dir():
        raise UftError(Problem(f"--config-dir {parsed.config_dir}", "no such folder", "command line"))
    return parsed


OTHER_OPTIONS = {
    "resume": "go on with a run:  uft resume RUN",
    "dry-run": "everything but training:  uft check ...   print the configuration:  uft config ...",
    "config": "a file in conf-user/experiment/NAME.yaml:  experiment=NAME   a folder of files:  --config-dir DIR",
    "data": "your rows:  data=FILE",
    "model": "a model of the hub, or a folder:  model.path=NAME",
    "output-dir": "the folder of a run:  run.dir=FOLDER",
    "resume-from-checkpoint": "go on with a run:  uft resume RUN",
}
"""Options of other programs that are no keys here, and what does the same."""


def not_an_option(word: str) -> Problem:
    key, _, value = word.lstrip("-").partition("=")
    path = elsewhere(key.replace("-", "_"), Draft({})) if "." not in key else key
    meant = path or nearest(key, fields_of(Config)) or "KEY"
    advice = f"settings are written key=value, without dashes:  {meant}={value or '...'}"
    return Problem(word, "no such option", "command line", (OTHER_OPTIONS.get(key.replace("_", "-"), advice),))
