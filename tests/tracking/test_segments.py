"""Segments cut anywhere: what is whole stays, what is torn goes."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from uft.tracking.wandb import BLOCK, HEADER, files, records, repair

START = b":W&B\0\0\0"


def frame(contents: list[bytes]) -> bytes:
    """LevelDB's log framing, written as its documentation says."""
    data = START
    for content in contents:
        first = True
        while first or content:
            left = BLOCK - len(data) % BLOCK
            if left < HEADER:
                data += b"\0" * left
                continue
            piece, content = content[: left - HEADER], content[left - HEADER :]
            kind = {(True, True): 1, (True, False): 2, (False, False): 3, (False, True): 4}[first, not content]
            data += struct.pack("<IHB", zlib.crc32(bytes([kind]) + piece), len(piece), kind) + piece
            first = False
    return data


CONTENTS = [bytes([number]) * size for number, size in enumerate((10, 1, 30_000, 70_000, 2_722, 0, 5, 40_000))]


def test_records_are_those_that_were_framed():
    data = frame(CONTENTS)
    assert [content for _, content in records(data)] == CONTENTS
    assert list(records(data))[-1][0] == len(data)


@pytest.mark.parametrize("lost", [1, 6, 7, 8, 20_000, 39_999, 40_007, 40_100, 100_000, 142_700])
def test_a_cut_segment_keeps_its_whole_records(tmp_path: Path, lost: int):
    file = tmp_path / "run-1.wandb"
    data = frame(CONTENTS)
    file.write_bytes(data[:-lost])
    whole = [content for _, content in records(file.read_bytes())]
    assert whole == CONTENTS[: len(whole)]
    repair(file)
    assert file.read_bytes() == frame(whole) or file.read_bytes() == data[: len(frame(whole))]
    assert not repair(file)


def test_a_damaged_record_ends_the_reading(tmp_path: Path):
    file, beside = tmp_path / "run-1.wandb", tmp_path / "kept"
    data = bytearray(frame(CONTENTS))
    data[60_000] ^= 1  # within the fourth
    file.write_bytes(data)
    assert repair(file, beside) == len(data) - len(frame(CONTENTS[:3]))
    assert [content for _, content in records(file.read_bytes())] == CONTENTS[:3]
    assert beside.read_bytes() == bytes(data)
    file.write_bytes(data[:100])
    repair(file, beside)
    assert beside.read_bytes() == bytes(data), "the first copy is the original"


def test_a_whole_segment_is_left_alone(tmp_path: Path):
    file = tmp_path / "run-1.wandb"
    file.write_bytes(frame(CONTENTS))
    assert not repair(file)
    assert file.read_bytes() == frame(CONTENTS)


@pytest.mark.parametrize("data", [b"", START[:3], START])
def test_a_segment_that_hardly_began(tmp_path: Path, data: bytes):
    file = tmp_path / "run-1.wandb"
    file.write_bytes(data)
    assert not repair(file)
    assert file.read_bytes() == data


def test_the_files_of_segments(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run-1.wandb").touch()
    assert files([tmp_path / "a", tmp_path / "moved away"]) == [tmp_path / "a" / "run-1.wandb"]
