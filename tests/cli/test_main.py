"""The shim: verbs, help, version, exit codes, and that it answers at once."""

import subprocess
import sys
import time

import pytest

from uft import __version__
from uft.cli import VERBS, main

HEAVY = ("torch", "transformers", "datasets", "wandb", "hydra", "omegaconf", "numpy", "rich")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_usage(capsys, words):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in VERBS)
    assert "uft train objective=ift data=mix" in out


def test_only_verbs_that_exist_are_advertised():
    from uft.cli import manage, verbs

    assert all(any(callable(getattr(module, verb, None)) for module in (manage, manage, verbs)) for verb in VERBS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"uft {__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("trian", "did you mean  uft train ?"),
        ("objective=ift", "settings come after a verb:  uft train objective=ift"),
        ("xyzzy", "verbs: train, check"),
    ],
)
def test_unknown_verbs(capsys, word, hint):
    assert main([word]) == 2
    out, err = capsys.readouterr()
    assert hint in err
    assert out == ""


def test_help_imports_nothing_heavy():
    code = f"import sys, uft.cli; uft.cli.main(['--help']); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_answers_in_a_third_of_a_second(program, tmp_path):
    def once():
        started = time.perf_counter()
        assert program("--help", cwd=tmp_path, fork=False).returncode == 0
        return time.perf_counter() - started

    assert min(once() for _ in range(5)) < 0.3


@pytest.mark.parametrize("verb", ["train", "config", "ls"])
def test_verbs_do_not_import_torch_in_the_parent(worker, verb):
    words = {"train": ["train", "debug=fast"], "config": ["config"], "ls": ["ls"]}[verb]
    code = (
        "import sys\nfrom uft.launch import process\nfrom uft.cli import main\n"
        f"process.COMMAND = {__import__('uft.launch.process').launch.process.COMMAND!r}\n"
        f"assert main({words!r}) == 0\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def env():
    import os
    from pathlib import Path

    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def test_a_reader_that_leaves_is_no_error(tmp_path):
    command = f"{sys.executable} -m uft train --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env(), capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert done.stdout.splitlines()[-1] in ("0", "141")


def test_mistakes_exit_2_without_a_traceback(worker, capsys):
    assert main(["train", "objective=dpo", "objective.bta=0.2", "data=mixx"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("uft: 2 problems in this request\n")
    assert "Traceback" not in err
    assert "Error executing" not in err
    assert out == ""
    assert list(worker.iterdir()) == []


def test_trace_shows_where(program, tmp_path):
    for words, env in ((["--trace"], {}), ([], {"HYDRA_FULL_ERROR": "1"})):
        done = program("train", "train.stps=1", *words, cwd=tmp_path, env=env)
        assert done.returncode != 0
        assert "Traceback" in done.stderr
        assert "did you mean  train.steps ?" in done.stderr


def test_a_fault_of_ours_is_one_line(monkeypatch, capsys):
    from uft.cli import manage

    monkeypatch.setattr(manage, "ls", lambda arguments: 1 / 0)
    assert main(["ls"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "--trace" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--steps", "5"], "without dashes:  train.steps=..."),
        (["--lr=3"], "without dashes:  optim.lr=3"),
        (["-m", "--cfg", "job"], "one of them at a time"),
    ],
)
def test_options_of_other_programs(worker, capsys, words, says):
    assert main(["train", *words]) == 2
    assert says in capsys.readouterr().err
