"""The shim: verbs, help, version, exit codes, and that it answers at once."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from uft import __version__
from uft.cli import VERBS, main, manage
from uft.launch import process

HEAVY = ("torch", "transformers", "datasets", "wandb", "hydra", "omegaconf", "numpy", "rich")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def test_usage_and_version(capsys):
    for words in ([], ["--help"], ["-h"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(f"  {verb} " in out for verb in VERBS)
        assert "uft train objective=ift data=mix" in out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"uft {__version__}\n"


def test_unknown_verbs(capsys):
    hints = {
        "trian": "did you mean  uft train ?",
        "objective=ift": "settings come after a verb:  uft train objective=ift",
        "xyzzy": "verbs: train, check",
    }
    for word, hint in hints.items():
        assert main([word]) == 2
        out, err = capsys.readouterr()
        assert hint in err
        assert out == ""


def imported(after: str, modules: tuple[str, ...], **options) -> str:
    """Which of `modules` a fresh process has imported after these lines."""
    code = f"import sys\nfrom uft.cli import main\n{after}\nprint([m for m in {modules} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_help_imports_nothing_heavy_and_verbs_no_torch_in_the_parent(worker):
    assert imported("main(['--help'])", HEAVY) == "[]"
    verbs = (
        f"from uft.launch import process\nprocess.COMMAND = {process.COMMAND!r}\n"
        "for words in (['ls'], ['config'], ['train', 'debug=fast']):\n    assert main(words) == 0"
    )
    assert imported(verbs, ("torch", "transformers", "datasets", "wandb")) == "[]"


def test_help_answers_in_a_third_of_a_second(program, tmp_path):
    def once():
        started = time.perf_counter()
        assert program("--help", cwd=tmp_path, fork=False).returncode == 0
        return time.perf_counter() - started

    assert min(once() for _ in range(5)) < 0.3


def test_a_reader_that_leaves_is_no_error(tmp_path):
    command = f"{sys.executable} -m uft train --help | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
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
    monkeypatch.setattr(manage, "ls", lambda arguments: 1 / 0)
    assert main(["ls"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "--trace" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--steps 5", ("without dashes:  train.steps=...",)),
        ("--lr=3", ("without dashes:  optim.lr=3",)),
        ("-m --cfg job", ("one of them at a time",)),
        ("--resume RUN", ("go on with a run:  uft resume RUN",)),
        ("--resume_from_checkpoint last", ("go on with a run:  uft resume RUN",)),
        ("--dry-run", ("uft check",)),
        ("experiment=nowhere --config-dir nowhere", ("--config-dir nowhere  no such folder",)),
        ("--per_device_train_batch_size=4", ("without dashes:  train.batch_size=4",)),
        ("--no-such-thing", ("without dashes:  KEY=...",)),
        ("model.name=org/name", ("model.path=org/name",)),
        ("data.path=rows.jsonl", ("as data=PATH",)),
        ("rows.jsonl data.sources.mine.columns.prompt=q", ("did you mean  data.sources.rows.columns.prompt ?",)),
        ("path=rows.jsonl", ("did you mean  data=rows.jsonl ?",)),
        ("train_data=a.csv test_file=b.csv", ("  data=a.csv ?", "  data.sources.NAME.eval_path=b.csv ?")),
        ("uft chat", ("outputs/  no run here has a model or a checkpoint", "uft chat builtin:playground")),
        ("uft export --to x", ("required: RUN      (command line)",)),
        ("uft export x", ("uft export  the following arguments are required: --to", "uft export --help")),
        ("data=[a,b]", ("rows of several files:  data=[a.jsonl,b.jsonl]",)),
        ("data=[a,b]", ("a run for each of them:  -m data=a,b",)),
        ("objective=[sft,dpo]", ("a run for each of them:  -m objective=sft,dpo",)),
        ("data=a.jsonl,b.jsonl", ("their rows together:  data=[a.jsonl,b.jsonl]",)),
        ("data=a.jsonl,b.jsonl", ("a run for each:  -m data=a.jsonl,b.jsonl",)),
        ("model=Qwen/Qwen2.5-0.5B", (":  model.path=Qwen/Qwen2.5-0.5B\n      choices: custom, ",)),
        (
            "steps=10 lr= num_generations=8 sft eval.every=50 train.save_every=5 train.seed=1 batch=8 "
            "model.lora.r=8 lora=true wandb=false val=0.1",
            (
                "did you mean  train.steps ?",
                "did you mean  optim.lr ?",
                "did you mean  rollout.completions ?",
                "did you mean  objective=sft ?",
                "did you mean  train.eval_every ?",
                "did you mean  train.checkpoint_every ?",
                "did you mean  seed ?",
                "did you mean  train.batch_size ?",
                "did you mean  model.lora.rank ?",
                "model.adapter: lora",
                "tracking: none",
                "data.holdout: a share of the rows",
            ),
        ),
        (
            "objective=dop tracking=off eval=false debug=true hardware=cuda model=gpt2 data=alpaca",
            (
                "did you mean  objective=dpo ?",
                "did you mean  tracking=none ?",
                "did you mean  eval=none ?",
                "did you mean  debug=fast ?",
                "did you mean  hardware=gpu ?",
                "a model of the hub, or a folder:  model.path=gpt2",
                "rows of yours:  data=FILE, data=FOLDER or data=ORG/NAME",
            ),
        ),
    ],
)
def test_what_people_type_first(worker, capsys, words, says):
    verb, *rest = words.removeprefix("uft ").split() if words.startswith("uft ") else ("train", *words.split())
    assert main([verb, *rest]) == 2
    printed = capsys.readouterr().err
    for advice in says:
        assert advice in printed
    assert list(worker.iterdir()) == []


def test_the_list_of_runs_leaves_metrics_out_before_it_breaks_names(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "dumb")  # no escapes
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    figures = {f"eval/{name}": 0.123456 for name in ("nll", "exact_match", "pair_accuracy", "log_ratio")}
    name = "grpo-files-playground-seed0-071756"
    row = {"name": name, "path": f"outputs/a/{name}", "status": "finished", "steps": 2, **figures}
    manage.print_tables([row, {**row, "path": "outputs/b/short", "name": "short"}])
    long, short = (part.splitlines() for part in capsys.readouterr().out.split("outputs/b/"))
    assert any(name in line for line in long)
    assert "exact_match" in "".join(long)
    assert "log_ratio" not in "".join(long)
    assert "log_ratio" in "".join(short)
    assert max(map(len, (*long, *short))) <= 80
    figured = {**row, **dict(zip(manage.LONG, ("2026-11-30 18:09", "00:12", "dpo", "0.001"), strict=True))}
    monkeypatch.setenv("COLUMNS", "160")
    manage.print_tables([figured])
    assert "dpo" not in capsys.readouterr().out
    manage.print_tables([figured], manage.LONG)
    assert re.search(r"2 +2026-11-30 18:09 +00:12 +dpo +0.001", capsys.readouterr().out)
