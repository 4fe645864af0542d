"""Disks that are full or read-only: the file and the need are named, what was saved stays whole, the run can go on."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import program
import pytest
from evidence import kinds, same, written
from planting import Fault
from requests_of import LOOP, SINGLE
from sessions import Bench

from uft.errors import UftError
from uft.runs import Run, size, unwritable, writing
from uft.training import checkpoint

NewRun = Callable[..., Run]
Undisturbed = Callable[..., dict[str, Any]]
FULL = (
    ("before write", "/.data.json", "data.json"),
    ("before write", "/metrics.jsonl", "metrics.jsonl"),
    ("before write", "/.samples.jsonl.seals", "samples.jsonl"),
    ("before torch.save_file", "", "checkpoints/step-"),
    ("before write", "/state.json", "checkpoints/step-"),
    ("before os.mkdir", "/.step-000006.tmp", "checkpoints/step-000006"),
    ("before open", "/.model.tmp/", "full/model"),
    ("before write", "/.result.json", "result.json"),
)
"""(moment, file) at which there is no room, in the order in which a run meets them, and what must be named."""
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


def test_full_at_one_kind_of_write_after_the_other(
    bench: Bench, new_run: NewRun, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    run, before = new_run("full", *SINGLE), list[int]()
    for name, path, named in FULL:
        ended = bench.sit(run.path, fault=Fault(do="full", name=name, path=path, stays=True, roots=(str(tmp_path),)))
        assert ended.code == 1, f"{name} {path}\n{ended.said}"
        assert "Traceback" not in ended.said, ended.said
        assert "no space is left for it" in ended.said, f"{name} {path}\n{ended.said}"
        assert re.search(r"[\d.]+ \w?B are free on its disk", ended.said)
        assert named in ended.said
        after = whole_ones(run)
        assert max(after, default=0) >= max(before, default=0)
        assert not list(run.path.rglob("*.tmp"))  # half of a file would only take the room
        before = after
    ended = bench.sit(run.path)
    assert ended.code == 0, ended.said
    same(run.path, undisturbed(*SINGLE))


@pytest.mark.slow
def test_full_where_it_is_no_matter(bench: Bench, new_run: NewRun, tmp_path: Path) -> None:
    whole = new_run("whole", *SINGLE)
    assert bench.sit(whole.path).code == 0
    for number, (name, path) in enumerate(NO_MATTER):
        shutil.rmtree(tmp_path / "cache")
        run = new_run(f"full-{number}", *SINGLE)
        ended = bench.sit(run.path, fault=Fault(do="full", name=name, path=path, stays=True, roots=(str(tmp_path),)))
        assert ended.code == 0, f"{name} {path}\n{ended.said}"
        assert "No space left on device" in ended.said
        same(run.path, written(whole.path))


def mounts(tmp_path: Path) -> bool:
    """Whether this process may mount a file system of its own."""
    probe = tmp_path / "probe"
    probe.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "none", str(probe)], capture_output=True, check=False)
    return done.returncode == 0 and subprocess.run(["umount", str(probe)], check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str, int], Path]]:
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


ROOMS = [150_000, pytest.param(60_000, marks=pytest.mark.slow), pytest.param(1_200_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("room", [*ROOMS, *(pytest.param(n, marks=pytest.mark.slow) for n in (2_000_000, 2_500_000))])
def test_a_disk_that_is_really_full(
    small_disk: Callable[[str, int], Path], bench: Bench, new_run: NewRun, undisturbed: Undisturbed, room: int
) -> None:
    """It is too small for this or for that; grown, it takes all."""
    disk = small_disk("mode=700", room)
    run = new_run(f"{disk.name}/run", *SINGLE)
    ended = bench.sit(run.path)
    assert ended.code == 1, ended.said
    assert "Traceback" not in ended.said
    assert "no space is left for it (No space left on device)" in ended.said
    whole_ones(run)
    subprocess.run(["mount", "-o", "remount,size=50000000", str(disk)], check=True)
    ended = bench.sit(run.path)
    assert ended.code == 0, ended.said
    same(run.path, undisturbed(*SINGLE))


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """What the kernel says of it comes through safetensors, too."""
    code = """
import sys, torch
from pathlib import Path
from uft.runs import Run
from uft.training import checkpoint
run = Run(Path(sys.argv[1]))
checkpoint.save(run, 1, {"w": torch.zeros(10)}, {"progress": {}})
try:
    checkpoint.save(run, 2, {"w": torch.zeros(100_000)}, {"progress": {}})
except Exception as error:
    print(type(error).__name__, error)
print([step for step, _ in run.checkpoints()], sorted(path.name for path in run.checkpoints_dir.iterdir()))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited, timeout=300, check=True)
    assert done.stdout.startswith("UftError")
    assert "step-000002" in done.stdout
    assert "no space is left for it (File too large); this needs 400 kB" in done.stdout
    assert done.stdout.endswith("[1] ['step-000001']\n")


@pytest.mark.parametrize("verb", ["train", pytest.param("resume", marks=pytest.mark.slow)])
def test_a_read_only_folder_is_refused_at_once(
    small_disk: Callable[[str, int], Path], new_run: NewRun, tmp_path: Path, verb: str, environment: dict[str, str]
) -> None:
    disk = small_disk("mode=700", 10_000_000)
    run = new_run(f"{disk.name}/run", *SINGLE)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    words = ["resume", str(run.path)] if verb == "resume" else ["train", "debug=fast", f"run.dir={disk}/other"]
    command = [sys.executable, "-m", "uft", *words]
    done = program.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert f"{disk}" in done.stderr
    assert "is on a read-only file system" in done.stderr
    assert "Traceback" not in done.stderr


def test_folders_that_cannot_be_written(tmp_path: Path) -> None:
    assert unwritable(tmp_path / "a" / "b") is None
    (tmp_path / "file").write_text("")
    assert unwritable(tmp_path / "file" / "run") == f"{tmp_path / 'file'} is a file"
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.geteuid() != 0:  # root may write everywhere
        assert unwritable(closed / "run") == f"no permission to write in {closed}"


def test_what_is_said_of_a_file(tmp_path: Path) -> None:
    with (
        pytest.raises(UftError, match=r"there: .*|cannot be written: No such file") as told,
        writing(tmp_path / "there"),
    ):
        (tmp_path / "not" / "there").write_text("")
    assert told.value.code == 1
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        _ = 1 / 0
    assert [size(n) for n in (0, 999, 1000, 123_456, 2_500_000, 84e9)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "123 kB",
        "2.5 MB",
        "84.0 GB",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("words", [SINGLE, LOOP], ids=["one training", "stages"])
def test_full_at_every_kind_of_write(bench: Bench, new_run: NewRun, tmp_path: Path, words: tuple[str, ...]) -> None:
    whole, log = new_run("whole", *words), tmp_path / "moments"
    assert bench.sit(whole.path, fault=Fault(log=str(log), roots=(str(tmp_path),))).code == 0
    expected = written(whole.path)
    writes = {
        name: places
        for name, places in kinds(log)
        if name.startswith(("before open", "before write", "before os.mkdir"))
        and name != "before os.mkdir whole"  # the run's own folder, which is there already
    }
    assert len(writes) > 30
    for number, (name, places) in enumerate(writes.items()):
        run, own = new_run(f"full-{number}", *words), {"UFT_CACHE": str(tmp_path / f"cache-{number}")}
        at = places[0 if "mkdir" in name else len(places) // 2]  # later the folder is there, and nobody minds
        fault = Fault(do="full", at=at, roots=(str(tmp_path),))
        ended = bench.start(run.path, fault=fault, **own).wait()
        assert ended.code in (0, 1), f"{name}\n{ended.said}"
        assert "Traceback" not in ended.said, f"{name}\n{ended.said}"
        assert "o space" in ended.said, f"{name}\n{ended.said}"
        for stage in (run, *run.stages):
            whole_ones(stage)
        ended = bench.start(run.path, **own).wait()
        assert ended.code == 0, f"{name}\n{ended.said}"
        same(run.path, expected)
        shutil.rmtree(run.path)
        shutil.rmtree(own["UFT_CACHE"], ignore_errors=True)
