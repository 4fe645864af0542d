"""Checksums of lines: a changed and a lost line is known, whatever died in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from uft.tracking import metrics

LINES = [f'{{"step": {step}, "loss": 0.{step}5}}' for step in (1, 2, 2, 4, 7)]
STEPS = [1, 2, 2, 4, 7]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in LINES))
    checksums = map(metrics.checksum_line, STEPS, LINES)
    metrics.checksum_file(path).write_text("".join(checksums))
    return path


def found(path: Path) -> tuple[list[str], list[int]]:
    checked = metrics.check(path)
    return checked.lines, checked.damaged


def test_a_changed_a_lost_and_a_torn_line(file: Path) -> None:
    assert found(file) == (LINES, [])
    for line, step in enumerate(STEPS):
        rest = LINES[:line] + LINES[line + 1 :]
        changed = [*LINES[:line], LINES[line].replace("loss", "lost"), *LINES[line + 1 :]]
        file.write_text("".join(text + "\n" for text in changed))
        assert found(file) == (rest, [step])
        file.write_text("".join(text + "\n" for text in rest))
        last = line == len(LINES) - 1  # between a checksum and its line a process may die
        assert found(file) == (rest, [] if last else [step])
    for kept in range(1, len(LINES[-1]) + 1):  # a kill in the middle of the last line is no damage
        file.write_text("".join(line + "\n" for line in LINES[:-1]) + LINES[-1][:kept])
        assert found(file) == (LINES[:-1], [])


def test_lines_without_a_checksum_are_left_out(file: Path) -> None:
    file.write_text(file.read_text() + '{"step": 9, "loss": 0.0}\n')
    assert found(file) == (LINES, [])
    assert metrics.check(file).unlisted == [9]


def test_without_checksums_all_whole_lines_are_taken(file: Path) -> None:
    metrics.checksum_file(file).unlink()
    file.write_bytes(file.read_bytes() + b'{"step": 9, "lo\xff')
    assert found(file) == (LINES, [])
    assert found(file.with_name("absent.jsonl")) == ([], [])


def test_the_checksum_is_of_the_text_as_it_lies_on_the_disk(tmp_path: Path) -> None:
    path, odd = tmp_path / "samples.jsonl", '{"step": 3, "reply": "snow ☃ half \ud83d \u2028"}'
    metrics.checksum_file(path).write_text(metrics.checksum_line(3, odd))
    path.write_text(odd + "\n", encoding="utf-8", errors="backslashreplace")
    checked = metrics.check(path)
    assert (len(checked.lines), checked.damaged) == (1, [])


def test_damaged_checksums_make_no_line_true(file: Path) -> None:
    for content in (b"", b"\0" * 50, b"1 zz\n2\n\xff", b"1 00000000\n"):
        metrics.checksum_file(file).write_bytes(content)
        assert metrics.check(file).lines == []


def test_checksums_that_are_cut_or_changed_are_told_by_the_lines_they_leave(file: Path) -> None:
    """Those before the last checksum at once; those after it where the run is known to have come past them."""
    whole = metrics.checksum_file(file).read_text().splitlines(keepends=True)
    for kept in range(5):
        metrics.checksum_file(file).write_text("".join(whole[:kept]))
        checked = metrics.check(file)
        lost, last = set(STEPS[kept:]), STEPS[kept - 1] if kept else -1
        assert checked.lines == LINES[:kept]
        assert checked.damaged == sorted(step for step in lost if step <= last)
        assert checked.unlisted == sorted(step for step in lost if step > last)
        metrics.checksum_file(file).write_text("".join([*whole[:kept], "x" + whole[kept], *whole[kept + 1 :]]))
        checked = metrics.check(file)
        assert checked.lines == LINES[:kept] + LINES[kept + 1 :]
        assert {*checked.damaged, *checked.unlisted} == {STEPS[kept]}
