"""Completion, as the shells ask for it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from uft.cli import VERBS, main
from uft.runs import create_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def answer(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def ask(line, shell="bash"):
        monkeypatch.setenv("COMP_LINE", line)
        monkeypatch.setenv("COMP_POINT", str(len(line)))
        assert main(["-sc", f"query={shell}"]) == 0
        return capsys.readouterr().out.split()

    return ask


def test_verbs_groups_and_keys(answer):
    assert answer("uft ") == list(VERBS)
    assert answer("uft r") == ["resume"]
    assert answer("uft config obj") == ["objective.", "objective="]
    assert answer("uft train data=p", "fish") == answer("uft train data=p", "zsh") == ["data=pairs"]
    assert "objective.beta=" in answer("uft train objective=dpo objective.")
    assert "objective.beta=" not in answer("uft train objective=sft objective.")
    assert answer("uft train --trace -m train.st") == ["train.steps="]
    assert answer("uft train -m objective=sft,dp") == ["objective=sft,dpo", "objective=sft,dpop"]
    assert answer("uft train --config-") == ["--config-dir", "--config-name", "--config-path"]
    for name in ("pears.jsonl", "pears.txt"):
        Path(name).write_text("")
    assert answer("uft train data=p") == ["data=pears.jsonl", "data=pairs"]
    assert "seed=" in (found := answer("uft train s"))
    assert not any(word.startswith("schema") for word in found)


@pytest.mark.slow
def test_a_run_folder_or_a_column_before_the_keys(answer):
    assert answer("uft generate outputs/run generate.te") == ["generate.temperature="]
    assert answer("uft annotate soft") == ["soft_label"]
    assert {"baseline_logp", "soft_label", "objective="} <= {*answer("uft annotate ")}
    assert answer("uft annotate soft_label annotate.te") == ["annotate.temperature="]
    assert answer("uft annotate annotate.te") == ["annotate.temperature="]


def test_names_of_runs(answer, tmp_path):
    for name in ("d/tone", "d/sweep/seed1"):
        create_run(tmp_path / "outputs" / name, "{}\n", [])
    (tmp_path / "outputs/d/sweep/sweep.json").write_text("{}")
    assert answer("uft resume ") == ["seed1", "sweep", "tone", "last"]
    assert answer("uft compare tone s") == ["seed1", "sweep"]
    assert answer("uft generate to") == ["tone"]
    assert answer("uft resume outputs/d") == [], "folders are for the shell"


def test_what_has_no_completions(answer, capsys):
    assert answer("uft train foo bar") == [], "a line that cannot be read"
    assert answer("uft resume ") == []
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_through_the_real_bash_function(tmp_path):
    """What `eval "$(uft -sc install=bash)"` puts into a shell, called the way bash calls it."""
    script = tmp_path / "uft"
    program = "import sys; sys.argv[0] = 'uft'; from uft.cli import main; sys.exit(main())"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}" "$@"\n')
    script.chmod(0o755)
    ask = """
eval "$(uft -sc install=bash)"
complete -p uft
for line in "uft tr" "uft train objective=dpo objective.be"; do
  COMP_LINE="$line"; COMP_POINT=${#line}; COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
  COMPREPLY=(); hydra_bash_completion; echo "${COMPREPLY[@]}"
done
"""
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", ask], env=environment, cwd=tmp_path, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert "hydra_bash_completion uft" in lines[0], done.stderr
    assert lines[1:] == ["train", "objective.beta="]
