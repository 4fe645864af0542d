"""The package of docs/rewards.md, installed by pip: its reward and its objective are found by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "rewards.md"
FILE = re.compile(r"^`(\S+)`\n\n```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="a source distribution has no docs")


def write_package(folder: Path) -> None:
    for name, content in FILE.findall(DOCS.read_text(encoding="utf-8")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    package, target = tmp_path_factory.mktemp("package"), tmp_path_factory.mktemp("site")
    write_package(package)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(target)]
    for pip in ([sys.executable, "-m", "pip"], ["pip", "--python", sys.executable]):
        done = subprocess.run([*pip, "install", *options, str(package)], capture_output=True, text=True, timeout=120)
        if done.returncode == 0:
            return target
    raise AssertionError(done.stderr)


def uft(site: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}", "HOME": str(folder)}
    command = [sys.executable, "-P", "-m", "uft", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_run_has_the_objective_and_the_reward_of_an_installed_package(site, tmp_path):
    rows = [{"prompt": f"copy : {word}", "response": word} for word in ("fox", "owl", "cat", "fox owl", "bird", "boat")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("objective=focal", "reward=overlap", "data=rows.jsonl", "data.holdout=2", "debug=fast", "train.steps=1")
    done = uft(site, tmp_path, "train", *words, "reward.least=2", "objective.gamma=1.5", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any(0 <= line.get("eval/rows/overlap", -1) <= 1 for line in lines)
    assert any(line.get("objective/focal", 0) > 0 for line in lines)


def test_keys_of_an_installed_package_are_checked(site, tmp_path):
    wrong = uft(site, tmp_path, "train", "objective=focal", "reward=overlap", "reward.leest=2", "objective.gamma=-1")
    assert wrong.returncode == 2
    assert "did you mean  reward.least ?" in wrong.stderr
    assert "must be at least 0" in wrong.stderr


def test_a_package_that_cannot_be_loaded_is_named(tmp_path):
    write_package(tmp_path)
    meta = tmp_path / "uft_mine-1.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: uft-mine\nVersion: 1\n")
    (meta / "entry_points.txt").write_text("[uft.rewards]\noverlap = uft_mine:Absent\n")
    done = uft(tmp_path, tmp_path, "config", "reward=exact")
    assert done.returncode == 2
    assert "uft-mine" in done.stderr
    assert "Traceback" not in done.stderr
