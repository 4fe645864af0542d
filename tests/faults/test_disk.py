"""Disks that are full or read-only: the file and the need are named, what was saved stays whole, the run can go on."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evidence import kinds, same, written
from planting import Fault
from sessions import LOOP, SINGLE

from uft.errors import UftError
from uft.model import checkpoint
from uft.runs import Run, size, unwritable, writing

FULL = (
    ("before write", "/.data.json", "data.json"),
    ("before write", "/metrics.jsonl", "metrics.jsonl"),
    ("before torch.save_file", "", "checkpoints/step-"),
    ("before os.mkdir", "/.step-000006.tmp", "checkpoints/step-000006"),
    ("before open", "/.model.tmp/", "full/model"),
    ("before write", "/.result.json", "result.json"),
)
"""(moment, file) at which there is no room, in the order in which a run meets them, and what must be named. Every
other kind of write is in the long part."""
NO_MATTER = (
    ("before write", "/console.log"),
    ("before write", "/cache/tokens/"),
    ("before write", "/cache/reference/"),
)
"""What is not needed to go on: said, and done without."""


def whole_ones(run: Run) -> list[int]:
    """Steps of the checkpoints, each of which is what was written."""
    for _, folder in run.checkpoints():
        checkpoint.load(folder)
    return [step for step, _ in run.checkpoints()]


@pytest.mark.slow
def test_full_at_one_kind_of_write_after_the_other(bench, new_run, undisturbed, tmp_path):
    run, before = new_run("full", *SINGLE), list[int]()
    for name, path, named in FULL:
        fault = Fault(do="full", name=name, path=path, stays=True, roots=(str(tmp_path),))
        said = bench.sit(run.path, fault=fault, code=1).said
        assert "Traceback" not in said, said
        assert "no space is left for it" in said, f"{name} {path}\n{said}"
        assert re.search(r"[\d.]+ \w?B are free on its disk", said)
        assert named in said
        after = whole_ones(run)
        assert max(after, default=0) >= max(before, default=0)
        assert not list(run.path.rglob("*.tmp"))  # half of a file would only take the room
        before = after
    bench.sit(run.path, code=0)
    same(run.path, undisturbed(*SINGLE))


@pytest.mark.slow
def test_full_where_it_is_no_matter(bench, new_run, tmp_path):
    whole = new_run("whole", *SINGLE)
    bench.sit(whole.path, code=0)
    for number, (name, path) in enumerate(NO_MATTER):
        shutil.rmtree(tmp_path / "cache")
        run = new_run(f"full-{number}", *SINGLE)
        fault = Fault(do="full", name=name, path=path, stays=True, roots=(str(tmp_path),))
        assert "No space left on device" in bench.sit(run.path, fault=fault, code=0).said
        same(run.path, written(whole.path))


def mounts(tmp_path: Path) -> bool:
    """Whether this process may mount a file system of its own."""
    probe = tmp_path / "probe"
    probe.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "none", str(probe)], capture_output=True, check=False)
    return done.returncode == 0 and subprocess.run(["umount", str(probe)], check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(options, bytes): a file system of its own in memory."""
    if not (sys.platform == "linux" and os.geteuid() == 0 and mounts(tmp_path)):
        pytest.skip("a file system can only be mounted by root")
    mounted: list[Path] = []

    def mount(options: str, room: int) -> Path:
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={room},{options}", "none", str(folder)]
        subprocess.run(command, check=True)
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


ROOMS = (60_000, 1_200_000, 2_000_000, 2_500_000)


@pytest.mark.parametrize("room", [150_000, *(pytest.param(room, marks=pytest.mark.slow) for room in ROOMS)])
def test_a_disk_that_is_really_full(small_disk, bench, new_run, undisturbed, room):
    """It is too small for this or for that; grown, it takes all."""
    disk = small_disk("mode=700", room)
    run = new_run(f"{disk.name}/run", *SINGLE)
    said = bench.sit(run.path, code=1).said
    assert "Traceback" not in said
    assert "no space is left for it (No space left on device)" in said
    named = re.findall(r"(?m)^  checkpoint +(\S+)$", said)
    assert all(Path(folder).is_dir() for folder in named), "one that could not be written is not shown"
    whole_ones(run)
    subprocess.run(["mount", "-o", "remount,size=50000000", str(disk)], check=True)
    bench.sit(run.path, code=0)
    same(run.path, undisturbed(*SINGLE))


def test_a_limit_on_the_size_of_files(tmp_path):
    """What the kernel says of it comes through safetensors, too."""
    run, limits = Run(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint.publish(run, checkpoint.begin(run, 1, {"w": torch.zeros(10)}, {"progress": {}}))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UftError) as told:
            checkpoint.begin(run, 2, {"w": torch.zeros(100_000)}, {"progress": {}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-000002" in str(told.value)
    assert "no space is left for it (File too large); this needs 400 kB" in str(told.value)
    assert whole_ones(run) == [1]
    assert [path.name for path in run.checkpoints_dir.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("verb", ["train", pytest.param("resume", marks=pytest.mark.slow)])
def test_a_read_only_folder_is_refused_at_once(small_disk, new_run, uft, verb):
    disk = small_disk("mode=700", 10_000_000)
    run = new_run(f"{disk.name}/run", *SINGLE)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    words = ["resume", str(run.path)] if verb == "resume" else ["train", "debug=fast", f"run.dir={disk}/other"]
    err = uft(*words, code=2).stderr
    assert str(disk) in err
    assert "is on a read-only file system" in err
    assert "Traceback" not in err


def test_what_is_said_of_folders_files_and_sizes(tmp_path):
    assert unwritable(tmp_path / "a" / "b") is None
    (tmp_path / "file").write_text("")
    assert unwritable(tmp_path / "file" / "run") == f"{tmp_path / 'file'} is a file"
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.geteuid() != 0:  # root may write everywhere
        assert unwritable(closed / "run") == f"no permission to write in {closed}"
    with (
        pytest.raises(UftError, match=r"there: .*|cannot be written: No such file") as told,
        writing(tmp_path / "there"),
    ):
        (tmp_path / "not" / "there").write_text("")
    assert told.value.code == 1
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        _ = 1 / 0
    sizes = [size(number) for number in (0, 999, 1000, 123_456, 2_500_000, 84e9)]
    assert sizes == ["0 B", "999 B", "1.0 kB", "123 kB", "2.5 MB", "84.0 GB"]


@pytest.mark.slow
@pytest.mark.parametrize("words", [SINGLE, LOOP], ids=["one training", "stages"])
def test_full_at_every_kind_of_write(bench, new_run, tmp_path, words):
    whole, log, roots = new_run("whole", *words), tmp_path / "moments", (str(tmp_path),)
    bench.sit(whole.path, fault=Fault(log=str(log), roots=roots), code=0)
    expected = written(whole.path)
    writes = {
        name: places
        for name, places in kinds(log).items()
        if name.startswith(("before open", "before write", "before os.mkdir"))
        and name != "before os.mkdir whole"  # the run's own folder, which is there already
    }
    assert len(writes) > 30
    for number, (name, places) in enumerate(writes.items()):
        run, own = new_run(f"full-{number}", *words), {"UFT_CACHE": str(tmp_path / f"cache-{number}")}
        at = places[0 if "mkdir" in name else len(places) // 2]  # later the folder is there already
        ended = bench.sit(run.path, fault=Fault(do="full", at=at, roots=roots), **own)
        assert ended.code in (0, 1), f"{name}\n{ended.said}"
        assert "Traceback" not in ended.said, f"{name}\n{ended.said}"
        assert "o space" in ended.said, f"{name}\n{ended.said}"
        for stage in (run, *run.stages):
            whole_ones(stage)
        bench.sit(run.path, code=0, **own)
        same(run.path, expected)
        shutil.rmtree(run.path)
        shutil.rmtree(own["UFT_CACHE"], ignore_errors=True)
