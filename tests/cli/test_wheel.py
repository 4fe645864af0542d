"""What is installed: every YAML file is in the wheel, and the command works from there."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_every_yaml_file_is_in_the_wheel(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name.removeprefix("uft/conf/") for name in names if name.startswith("uft/conf/")}
    assert shipped == {file.relative_to(ROOT / "conf").as_posix() for file in (ROOT / "conf").rglob("*.yaml")}
    assert any(name.startswith("hydra_plugins/uft_sweeper/") for name in names)
    assert "hydra_plugins/__init__.py" not in names, "a namespace that plugins share"
    assert not any("test" in name for name in names)
    parts = {f"uft/report/page/{file.name}" for file in (ROOT / "uft" / "report" / "page").iterdir()}
    assert parts <= set(names), "the comparison page's template, style and scripts"
    pages = {f"uft/docs/{file.name}" for file in (ROOT / "docs").glob("*.md")}
    assert {"uft/py.typed", *pages} <= set(names), "what `uft docs` shows"


def test_messages_and_pages_name_the_distribution_that_is_ours():
    """`uft` on PyPI is somebody else's program: `pip install 'uft[ray]'` would install that one."""
    folders = [ROOT / name for name in ("uft", "conf", "docs", "scripts", "hydra_plugins")]
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in (".py", ".yaml", ".md", ".sh")]
    theirs = re.compile(r"(?<![\w-])uft\[[a-z{]|pip install (-\S+ )*'?uft\b(?!-lm)")
    named = [file for file in [*files, ROOT / "README.md"] if theirs.search(file.read_text(encoding="utf-8"))]
    assert (named, len(files) > 200) == ([], True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    told = {extra for file in files for extra in re.findall(r"uft-lm\[([a-z,-]+)\]", file.read_text(encoding="utf-8"))}
    extras = {one for listed in told for one in listed.split(",")}
    assert (project["name"], extras - set(project["optional-dependencies"])) == ("uft-lm", set())
    assert len(extras) > 5


@pytest.mark.slow
def test_it_works_from_an_unpacked_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    for words, says in ((["train", "--cfg", "job"], "name: ift"), (["train", "--info", "plugins"], "UftSweeper")):
        command = [sys.executable, "-P", "-m", "uft", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert says in done.stdout
    where = "import uft.config.messages as p; print(p.conf_dir())"
    done = subprocess.run(
        [sys.executable, "-P", "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(site / "uft" / "conf")
