"""Every command that the documentation or the help shows can be given as it is written."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from uft.cli import VERBS, main
from uft.cli.help import PAGES
from uft.cli.verbs import with_sources
from uft.config.compose import examine
from uft.config.files import Request, make_loader
from uft.launch.sweep import expand

ROOT = Path(__file__).resolve().parents[2]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMPOSED = ("train", "check", "data", "generate", "chat", "eval", "annotate", "select", "config")
PLUGINS = {"joblib": "hydra_plugins.hydra_joblib_launcher", "submitit": "hydra_plugins.hydra_submitit_launcher"}


def commands_in(text: str) -> list[str]:
    """Lines of code blocks that begin with `uft`, or a `cd` or an assignment before it, without what explains them."""
    lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    found = [
        line[line.index("uft ") :] for line in lines if re.match(r"\s*(\S+=\S+ |.*&& (\S*/)?)?(\S*/)?uft [a-z]", line)
    ]
    return [re.split(r"\s{2,}|\s+#\s|\s+2?>", line)[0].strip() for line in found]


def documented() -> list[tuple[str, str]]:
    shown = [(page.name, line) for page in FILES for line in commands_in(page.read_text(encoding="utf-8"))]
    for verb, page in PAGES.items():
        shown += [(f"uft {verb} --help", line.strip()) for line in commands_in(f"```\n{page.examples}\n```")]
    return list(dict.fromkeys(shown))


DOCUMENTED = documented()


def test_there_are_commands():
    assert sum(where == "README.md" for where, _ in DOCUMENTED) > 10
    if (ROOT / "docs").is_dir():  # a source distribution has the README alone
        assert sum(where.endswith(".md") for where, _ in DOCUMENTED) > 40


def settings(words: list[str]) -> list[str]:
    """The words that Hydra composes, but for launchers that are not installed here, and runs that are not there."""
    kept = [word for word in words if ("=" in word or word.startswith("~")) and not word.startswith("init_from=")]
    launcher = next((word.partition("=")[2] for word in kept if word.startswith("hydra/launcher=")), "basic")
    module = next((module for name, module in PLUGINS.items() if launcher.startswith(name)), None)
    if module and find_spec(module) is None:
        kept = [word for word in kept if not word.startswith(("hydra/launcher", "hydra.launcher"))]
    return kept


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UFT_CONF", raising=False)


@pytest.mark.parametrize(
    ("where", "line"),
    [
        pytest.param(where, line, id=f"{where}: {line[:60]}", marks=() if where == "README.md" else pytest.mark.slow)
        for where, line in DOCUMENTED
    ],
)
def test_a_command_of_the_documentation(here, capsys, where, line):
    verb, *words = shlex.split(line)[1:]
    assert verb in VERBS or verb.startswith("-")
    options = [word for word in words if word.startswith("-")]
    if verb in COMPOSED:
        several = "-m" in options or any(
            word.startswith(("sweep=", "hardware=slurm", "hardware=ray", "hardware=local_pool")) for word in words
        )
        request = Request(tuple(with_sources(settings(words))))
        jobs = expand(request.overrides, make_loader(request))[0] if several else [request.overrides]
        ends = dict.fromkeys([tuple(jobs[0]), tuple(jobs[-1])])  # of a sweep, the first and the last
        problems = [problem for job in ends for problem in examine(Request(job)).problems]
        assert [f"{problem.what}: {problem.why}" for problem in problems] == []
    elif verb in VERBS:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        known = capsys.readouterr().out
        assert [option for option in options if option.partition("=")[0] not in known] == []


def test_a_command_that_is_wrong_would_be_seen(here):
    assert commands_in(
        "```\nuft train objective=sft   # words\nuft ls      words\n$ other uft\n```\nuft not in a block"
    ) == [
        "uft train objective=sft",
        "uft ls",
    ]
    assert examine(Request(("objective=nosuch",))).problems
