"""Every command that is printed as a next step runs as printed, and does what its description says."""

import re
import shlex

import pytest

from uft.cli import main
from uft.config.frozen import load_config
from uft.runs import Run, find_runs
from uft.tracking.wandb import Wandb
from uft.training.card import next_commands

EXPERIMENT = "# @package _global_\n# mine\ndefaults:\n  - override /objective: {}\n  - override /data: pairs\n{}"
REQUESTS = {
    "plain": "objective=dpo objective.beta=0.3 data=pairs data.sources.pairs.limit=50 tracking=none",
    "a file": "objective=sft more/rows.jsonl data.holdout=0 tracking=none",
    "an experiment": "experiment=tone --config-dir 'my conf' tracking=none optim.lr=0.01",
    "an experiment with keys of its objective": "--config-dir 'my conf' experiment=bound tracking=none",
    "a removed source": "objective=sft data=mix ~data.sources.pairs tracking=none",
    "stages": "experiment=sft_then_dpo tracking=none",
    "a quoted value": "objective=ift 'generate.system=ok' 'tracking.tags=[a b,\"c,d\"]' tracking.mode=disabled",
}


@pytest.fixture
def here(worker):
    folder = worker / "my conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "tone.yaml").write_text(EXPERIMENT.format("dpo", "train:\n  steps: 7\n"))
    (folder / "bound.yaml").write_text(EXPERIMENT.format("dpo", "objective:\n  beta: 0.2\n"))
    (worker / "more").mkdir()
    (worker / "more" / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n' * 2)
    return worker


def commands(lines):
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_the_next_lines_of_a_run(here, capfd, request_):
    assert main(["train", *shlex.split(request_), "run.dir=my runs/first"]) == 0
    run = Run(here / "my runs" / "first")
    run.model_dir.mkdir()
    config = load_config(run.config_file)
    *trains, chat, export = commands(next_commands(run, config, "finished"))
    assert bool(trains) is ("bound" not in request_ and not config.stages)
    assert "more/rows.jsonl" not in request_ or "data=more/rows.jsonl" in trains[0], "as short as it was typed"
    assert [chat, export] == [["chat", "my runs/first"], ["export", "my runs/first", "--to", "first-model"]]
    assert commands(next_commands(run, config, "failed")) == [["resume", "my runs/first"]]
    for words in (["resume", "my runs/first"], *trains):  # with a real model, the first two: end_to_end/test_after.py
        assert main(words) == 0, words
    for found in find_runs(here / "outputs"):
        first, other = run.config(), found.config()
        assert first.pop("objective") != other.pop("objective")
        assert {**first, "run": None} == {**other, "run": None}, "the same but for the objective"
    assert len(find_runs(here / "outputs")) == len(trains)


@pytest.mark.slow
def test_a_job_of_a_sweep_that_is_written_down_offers_no_sweep(here):
    assert main(["train", "sweep=seeds", "tracking=none"]) == 0
    run = find_runs(here / "outputs")[0]
    run.model_dir.mkdir()
    lines = next_commands(run, load_config(run.config_file), "finished")
    assert [words[0] for words in commands(lines)] == ["chat", "export"]


@pytest.mark.slow
def test_lines_of_refusals(here, capfd):
    refused = {
        "experiment=tone --config-dir 'my conf' train.stps=3": r"See what would run:  uft (.*)",
        "data=pairs objective=dpoo": r"See what would run:  uft (.*)",
        "experiment=tone -cd 'my conf' -m objective=sft,dpo objective.beta=1,2": r"^  uft (train .*)",
    }
    for words, line in refused.items():
        assert main(["train", *shlex.split(words)]) == 2
        found = re.findall(line, capfd.readouterr().err, re.MULTILINE)
        assert found, words
        assert [main(shlex.split(command)) for command in found] == [0] * len(found), found


def test_lines_of_runs_that_did_not_finish(here, capfd):
    words = ["objective=sft", "tracking=none", "run.dir=my runs/a"]
    assert main(["train", *words, "generate.system=die"]) != 0
    (continued,) = re.findall(r"continue it:  uft (.*)", capfd.readouterr().err)
    assert main(["train", *words, "train.batch_size=3"]) == 2
    (as_it_is,) = re.findall(r"Continue it as it is:  uft (.*)", capfd.readouterr().err)
    assert main(["generate", "my runs/a"]) == 2
    (finish,) = re.findall(r"finish it:  uft (.*)", capfd.readouterr().err)
    assert main(["resume", "my runs/a", "train.steps=9999"]) == 2
    again = r"start another run from its weights:  uft (train init_from='my runs/a' .*objective=sft.* train.steps=9999)"
    assert re.search(again, capfd.readouterr().err)
    for command in (continued, as_it_is, finish):
        assert main([*shlex.split(command), "generate.system=ok"]) == 0
    run = Run(here / "my runs" / "a")
    assert Wandb(run, {}).sync_command == "uft sync 'my runs/a'"


@pytest.mark.slow
def test_the_lines_that_say_what_a_grade_is(program, tmp_path):
    """Each of them, typed behind the command that was refused, makes it run: with a file or with the long form."""
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "moon fox", "response": "fox", "rating": 1}\n{"prompt": "lamp", "response": "hat", "rating": 0}\n'
    )
    request = ["data", "rows.jsonl", "data.holdout=0", "objective=sft"]
    refused = program(*request)
    assert refused.returncode == 2
    lines = re.findall(r"(?m)^ +\w[\w ]+: +(data\.sources\.\S.*)$", refused.stderr)
    kinds = ["scored", "binary", "demonstration"]
    assert len(lines) == len(kinds), refused.stderr
    for line, kind in zip(lines, kinds, strict=True):
        done = program(*request, *line.replace("[LOWEST,HIGHEST]", "[0,1]").split())
        assert (done.returncode, f" {kind} " in done.stdout) == (0, True), (line, done.stderr)
