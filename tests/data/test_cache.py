"""Flat arrays on disk."""

import os
import time

import numpy as np
import pytest

from uft.data import tokens
from uft.data.chat import Tokens
from uft.data.tokens import Packer


def encoded(*ids):
    return Tokens(np.array(ids, np.int32), np.array([n > 0 for n in range(len(ids))]), 1)


ROWS = [(encoded(1, 2), encoded(3, 4, 5)), (encoded(6, 7),)]


def save(folder, notes=None):
    with Packer(folder) as packer:
        packer.add(enumerate(ROWS))
        return tokens.save(packer, folder, notes or {})


def test_rows_come_back_as_they_went(tmp_path):
    save(tmp_path / "deep" / "key", {"note": 1})
    rows, notes = tokens.load(tmp_path / "deep" / "key")
    assert notes == {"note": 1}
    assert isinstance(rows.ids, np.memmap)
    assert [[e.ids.tolist() for e in row] for row in rows] == [[[1, 2], [3, 4, 5]], [[6, 7]]]
    assert [e.ids.tolist() for e in rows[-1]] == [[6, 7]]
    assert len(rows[0:2]) == 2
    with pytest.raises(IndexError):
        rows[2]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["key"]  # nothing half-written is left beside


def test_two_writers_of_one_key_agree(tmp_path):
    for _ in range(2):
        save(tmp_path / "key")
    assert len(tokens.load(tmp_path / "key")[0]) == 2


def test_a_missing_folder_is_not_a_corrupt_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        tokens.load(tmp_path / "none")


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path):
    """Not what somebody is still writing, though its folder was made long ago."""
    old, written, young = (tmp_path / f".key.{name}" for name in ("old", "written", "young"))
    for folder in (old, written, young):
        folder.mkdir()
        (folder / "ids.npy").write_bytes(b"half")
    two_days_ago = time.time() - 48 * 3600
    for path in (old, old / "ids.npy", written):
        os.utime(path, (two_days_ago, two_days_ago))
    save(tmp_path / "key")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".key.written", ".key.young", "key"]
