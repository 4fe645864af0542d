"""Broken files of every kind, hundreds of them: read, or refused by name. Never a traceback, a hang or a flood.

`pytest -m slow tests/inputs` tries tens of thousands.
"""

from __future__ import annotations

import faulthandler
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from mutations import FILES, SETTINGS, case, configuration

from uft.config.compose import examine
from uft.config.files import Request
from uft.config.schema import Data, Source
from uft.data.sources import load_sources
from uft.errors import UftError, render

SECONDS = 60  # for one file of a few kilobytes, on a machine that does something else too
MEMORY = 1.5e6  # kilobytes more than before, over all files


@pytest.fixture
def watched():
    """A case that hangs ends the process with its stack."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield lambda: faulthandler.dump_traceback_later(SECONDS, exit=True)
    faulthandler.cancel_dump_traceback_later()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


def try_rows(file: Path, bad_rows: str = "error") -> str:
    """What became of a file of rows: read, or refused; anything else is raised."""
    try:
        (source,) = load_sources(Data(name="d", sources={"mine": Source(path=str(file))}, bad_rows=bad_rows))
    except UftError as error:
        said = render(error)
        assert str(file) in said or "data.sources.mine" in said, said
        assert "Traceback" not in said
        assert len(said) < 200_000
        said.encode("utf-8")
        return "refused"
    assert source.rows
    return "read"


def try_many(tmp_path: Path, suffix: str, numbers: range, watch) -> Counter[str]:
    found: Counter[str] = Counter()
    file = tmp_path / f"rows.{suffix}"
    for number in numbers:
        file.write_bytes(case(number, suffix))
        watch()
        try:
            found[try_rows(file, "drop" if number % 3 == 0 else "error")] += 1
        except Exception as error:
            raise AssertionError(f"case({number}, {suffix!r}): {type(error).__name__}: {error}") from error
    return found


@pytest.mark.parametrize(("suffix", "count"), [("jsonl", 400), ("json", 150), ("csv", 150), ("parquet", 150)])
def test_files_of_rows(tmp_path, watched, suffix, count):
    found = try_many(tmp_path, suffix, range(count), watched)
    assert min(found["read"], found["refused"]) > count / 20, "both happen, or nothing is tried"


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FILES)
@pytest.mark.parametrize("part", range(4))
def test_many_more_files_of_rows(tmp_path, watched, suffix, part):
    try_many(tmp_path, suffix, range(10_000 * (part + 1), 10_000 * (part + 1) + 5_000), watched)


def try_configurations(tmp_path: Path, numbers: Iterable[int], watch) -> Counter[str]:
    found: Counter[str] = Counter()
    folder = tmp_path / "conf-user" / "experiment"
    folder.mkdir(parents=True)
    for number in numbers:
        name = f"case{number}"  # a name of its own: nothing is remembered of the one before
        file = folder / f"{name}.yaml"
        file.write_bytes(configuration(number))
        watch()
        try:
            problems = examine(Request((f"experiment={name}",))).problems
            said = render(UftError(*problems)) if problems else ""
        except Exception as error:
            raise AssertionError(f"configuration({number}): {type(error).__name__}: {error}") from error
        assert "Traceback" not in said
        assert len(said) < 200_000
        found["refused" if problems else "read"] += 1
        file.unlink()
    return found


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UFT_CONF", raising=False)
    return tmp_path


def test_configurations(here, watched):
    assert not examine_alone(here, SETTINGS), "what the cases are made from is right"
    found = try_configurations(here, range(15), watched)
    assert found["refused"] > 5


def examine_alone(folder: Path, text: str):
    place = folder / "conf-user" / "debug"
    place.mkdir(parents=True)
    (place / "whole.yaml").write_text(text)
    return examine(Request(("debug=whole",))).problems


def test_configurations_that_once_were_a_traceback(here, watched):
    """Half a header in its first line; a file that is no mapping; a number or nothing for a name in a defaults list."""
    assert try_configurations(here, (2431, 3211, 4040, 4337), watched) == {"refused": 4}


def test_a_configuration_that_grows_without_end_is_refused_at_once(here):
    lines = [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefgh")]
    (here / "conf-user" / "debug").mkdir(parents=True)
    for text, why in {
        "\n".join(["a: &a [1, 1]", *lines]): "stands for more than",
        "a: [" + "0, " * 1_000_000 + "]": "is larger than",
        "a: " + "[" * 1_000_000: "is larger than",
    }.items():
        (here / "conf-user" / "debug" / "whole.yaml").write_text(f"# @package _global_\n{text}")
        (problem,) = examine(Request(("debug=whole",))).problems
        assert problem.what.endswith("conf-user/debug/whole.yaml")
        assert why in problem.why


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_more_configurations(here, watched, part):
    try_configurations(here, range(1_000 * (part + 1), 1_000 * (part + 1) + 500), watched)


ODD_FILES = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n \n\t\n",
    "bom.jsonl": b"\xef\xbb\xbf",
    "nothing.json": b"[]",
    "empty.json": b"",
    "empty.csv": b"",
    "header.csv": b"prompt,completion\n",
    "twice.csv": b"prompt,completion,prompt\na,b,c\n",
    "empty.parquet": b"",
    "magic.parquet": b"PAR1PAR1",
    "deep.jsonl": b"[" * 100_000,
    "deep.json": b'[{"a":' * 50_000,
    "number.json": b'[{"prompt": ' + b"1" * 5_000 + b"}]",
    "utf16.jsonl": '{"prompt": "q", "completion": "a"}\n'.encode("utf-16"),
    "mac.jsonl": b'{"prompt": "q", "completion": "a"}\r{"prompt": "q", "completion": "a"}\r',
}


SAID_ONCE = {
    "utf16.jsonl": "UTF-16",
    "mac.jsonl": "carriage return",
    "twice.csv": "a column twice",
    "deep.jsonl": "too deeply",
}


def test_files_that_hold_no_rows_are_refused_by_name_and_told_once_why(tmp_path):
    for name, content in ODD_FILES.items():
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(UftError) as error:
            load_sources(Data(name="d", sources={"mine": Source(path=str(file))}))
        said = render(error.value)
        assert str(file) in said
        assert name not in SAID_ONCE or said.count(SAID_ONCE[name]) == 1, said


PLACES = ["a\0b.jsonl", "x" * 5000 + ".jsonl", "/dev/null", "/dev/zero", "~nobody-here/x.jsonl", "\udcff.jsonl", ""]


@pytest.mark.parametrize("path", PLACES, ids=[repr(path[:20]) for path in PLACES])
def test_paths_that_name_no_file(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UftError):
        load_sources(Data(name="d", sources={"mine": Source(path=path)}))


def test_a_handful_through_the_program(tmp_path, program):
    """Of the same cases, some by the command line: exit code 2, a few lines, nothing left behind."""
    for suffix, number in (("jsonl", 3), ("parquet", 5)):
        file = tmp_path / f"rows.{suffix}"
        refused = next(n for n in range(number, 500) if _refused(file, suffix, n))
        file.write_bytes(case(refused, suffix))
        done = program("train", "data=files", f"+data.sources.mine.path={file}")
        assert done.returncode == 2, done.stderr
        assert "uft: " in done.stderr
        assert "Traceback" not in done.stderr
        assert not (tmp_path / "outputs").exists()


def _refused(file: Path, suffix: str, number: int) -> bool:
    file.write_bytes(case(number, suffix))
    return try_rows(file) == "refused"


def test_a_crash_of_a_reader_would_be_seen(tmp_path):
    """The watch of these tests works: a hang ends the process with a stack."""
    code = "import faulthandler, time; faulthandler.dump_traceback_later(0.2, exit=True); time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "most recent call first" in done.stderr
