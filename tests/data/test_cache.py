"""Arrow tables on disk: published whole, checked when they are opened."""

import os
import time

import pyarrow as pa
import pytest

from uft.data.table import TableWriter, open_table

SCHEMA = pa.schema([("n", pa.int64())])


def save(folder, notes=None):
    with TableWriter(folder, SCHEMA) as writer:
        for part in ([1, 2], [3]):
            writer.write(pa.record_batch([pa.array(part)], schema=SCHEMA))
        return writer.publish(notes or {})


def test_a_table_comes_back_as_it_went(tmp_path):
    written = save(tmp_path / "deep" / "key", {"note": 1})
    table, notes = open_table(tmp_path / "deep" / "key", SCHEMA)
    assert notes == {"note": 1}
    assert table.memory is not None
    assert table.column("n").tolist() == written.column("n").tolist() == [1, 2, 3]
    assert [table.find(number) for number in range(3)] == [(0, 0), (0, 1), (1, 0)]
    table.release()
    assert table.column("n").tolist() == [1, 2, 3]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["key"]  # nothing half-written is left beside


def test_two_writers_of_one_key_agree(tmp_path):
    with TableWriter(tmp_path / "key", SCHEMA) as slow:
        slow.write(pa.record_batch([pa.array([1, 2, 3])], schema=SCHEMA))
        save(tmp_path / "key")
        assert slow.publish({}).column("n").tolist() == [1, 2, 3]
    assert open_table(tmp_path / "key", SCHEMA)[0].column("n").tolist() == [1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_missing_table_is_not_a_corrupt_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_table(tmp_path / "none", SCHEMA)


def test_files_of_a_killed_process_are_removed_after_a_day(tmp_path):
    """Not those that are still written to, though their folder was made long ago."""
    old, active, young = (tmp_path / f".key.{name}" for name in ("old", "active", "young"))
    for folder in (old, active, young):
        folder.mkdir()
        (folder / "table.arrow").write_bytes(b"half")
    two_days_ago = time.time() - 48 * 3600
    for path in (old, old / "table.arrow", active):
        os.utime(path, (two_days_ago, two_days_ago))
    save(tmp_path / "key")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".key.active", ".key.young", "key"]
