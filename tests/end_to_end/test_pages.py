"""Pages of the documentation: those made from the code are current, and those for beginners can be followed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from uft import compose
from uft.cli import main
from uft.config.schema import Config, flat

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SAMPLE = ("llama", "qwen2", "gpt2", "mamba", "bert")


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def blocks(page: str, language: str = "") -> list[str]:
    found = BLOCK.findall((DOCS / f"{page}.md").read_text(encoding="utf-8"))
    return [text.replace("\\\n", " ") for kind, text in found if kind == language]


def test_the_page_of_all_keys_is_current():
    page = (DOCS / "keys.md").read_text(encoding="utf-8")
    assert script("keys_table").page() == page, "run: python scripts/keys_table.py"
    there = set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE))
    assert {key for key, _ in flat(asdict(Config()))} - {"objective", "reward", "data.sources", "stages"} <= there


def test_the_page_of_what_is_supported_is_current():
    page, table = (DOCS / "support.md").read_text(encoding="utf-8"), script("support_table")
    known = table.known(page)
    assert table.page(known) == page, "run: python scripts/support_table.py"
    assert len(known) > 100


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [SAMPLE, None], ids=["some", "all"])
def test_models_get_what_the_page_says(kinds):
    table = script("support_table")
    known, architectures = (
        table.known((DOCS / "support.md").read_text("utf-8")),
        table.tests("model/test_architectures.py"),
    )
    tried = table.attempts(kinds or table.kinds(architectures), architectures)
    assert tried == {kind: known[kind] for kind in kinds or known}, "run: python scripts/support_table.py"


def test_pages_are_found_by_their_name_and_messages_name_pages_that_are_there(capsys):
    pages = {file.stem for file in DOCS.glob("*.md")}
    assert main(["docs"]) == 0
    assert set(re.findall(r"uft docs (\w+)", capsys.readouterr().out)) == pages
    for word in ("runs", "docs/runs.md"):
        assert main(["docs", word]) == 0
        assert capsys.readouterr().out == (DOCS / "runs.md").read_text(encoding="utf-8")
    assert main(["docs", "run"]) == 2
    assert "did you mean  uft docs runs ?" in capsys.readouterr().err
    sources = [*(ROOT / "uft").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml"), ROOT / "README.md", *DOCS.glob("*.md")]
    texts = [file.read_text(encoding="utf-8") for file in sources]
    named = {
        name for text in texts for name in re.findall(r"docs/(\w+)\.md|uft docs (\w+)", text) for name in name if name
    }
    links = {name for text in texts[-len(pages) :] for name in re.findall(r"\]\((\w+)\.md[)#]", text)}
    assert (named | links) - pages == set()


def test_a_mixture_of_ones_own_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf-user" / "data").mkdir(parents=True)
    (recipe,) = blocks("data", "yaml")
    (tmp_path / "conf-user/data/mine.yaml").write_text(recipe)
    sources = compose(["objective=uft", "data=mine"])["data"]["sources"]
    assert (sources["chats"]["limit"], sources["pairs"]["columns"]) == (5000, {"prompt": "query"})


PAIRS = [
    {"prompt": f"repeat {n} {word}", "chosen": f"{n} {word}", "rejected": f"{word} and {word}"}
    for n in range(30)
    for word in ("moon", "lamp")
]
REAL = re.compile(r"model=smollm2_135m|model\.path=Qwen/Qwen2.5-0.5B-Instruct")


@pytest.mark.slow
def test_the_first_ten_minutes_can_be_followed(uft, tmp_path, tiny_model):
    """Every command of docs/start.md as it stands there, but for the model, its steps and the length of answers."""
    own_model = f"model.path={tiny_model}"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (kinds,) = blocks("start", "json")
    files = [tmp_path / f"kind{number}.jsonl" for number in range(4)]
    for file, line in zip(files, kinds.splitlines(), strict=True):
        file.write_text(line)
    told = uft("data", *files, "objective=uft", own_model, "data.holdout=0").stdout
    assert all(kind in told for kind in ("demonstration", "preference", "binary", "scored"))
    lines = [line for block in blocks("start") for line in block.splitlines() if line.startswith("uft ")]
    assert len(lines) == 10
    for line in lines:
        words = shlex.split(REAL.sub(own_model, line).replace("steps=60", "steps=2"))[1:]
        quick = ["eval.max_new_tokens=4", "optim.warmup=0"] if words[0] in ("train", "check") else []
        said = uft(*words, *quick).stdout
        if words[0] == "compare":
            assert all(name in said for name in ("sft", "dpo", "uft", "seed noise"))
    assert (tmp_path / "my-model" / "model.safetensors").is_file()
    (own,) = blocks("start", "yaml")
    folder = tmp_path / "conf-user" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(own.replace("smollm2_135m", "custom"))
    told = uft("config", "experiment=mine", own_model).stdout
    assert re.search(r"name: dpo .*\n(.*\n)*.*steps: 60 ", told)


@pytest.mark.slow
def test_the_page_about_python_runs_from_an_unpacked_wheel_in_an_empty_folder(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("uft_lm-*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    here = tmp_path / "here"
    here.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "UFT_CACHE": str(tmp_path / "cache")}

    def python(*words: str) -> str:
        command = [sys.executable, "-P", *words]
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    request = ["objective=sft,dpo", "data=pairs", "seed=1,2", "eval=quick", "train.steps=4", "tracking=none"]
    python("-m", "uft", "train", "-m", *request, "sweep.name=first")
    code = "\n".join(blocks("python", "python"))
    shown = (
        "print(uft.__file__, model.config.model_type, len(metrics) > 1, sorted(table.index), found.differences.n.max())"
    )
    out = python("-c", f"{code}\n{shown}").split(maxsplit=3)
    assert out[0].startswith(str(tmp_path / "site"))
    assert out[1:] == ["llama", "True", "['dpo', 'sft'] 2\n"]
    assert (tmp_path / "site/uft/py.typed").is_file()
    assert f"{tmp_path}/site/uft/docs" in python("-m", "uft", "docs")
