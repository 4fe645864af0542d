"""Run folders in every state: what is said of them, and that none keeps the others from being read."""

from __future__ import annotations

import json
import math
import os
import shutil
from itertools import product
from pathlib import Path

import pytest
from synthetic import held, make_run, tear

from uft.report import runs as module
from uft.report.runs import load
from uft.runs import Run
from uft.tracking import metrics
from uft.tracking.metrics import read_metrics


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", "uft", 3, points=20)


def test_a_finished_run(run):
    found = load(run)
    assert (found.name, found.status, found.error, found.finished) == ("run", "finished", None, True)
    assert found.config["objective.beta"] == 0.1
    assert "objective.kind_weights" not in found.config, "an empty group has no keys"
    assert found.overrides == ("objective=uft", "seed=3")
    assert found.final == json.loads((run / "result.json").read_text())["final"]
    assert list(found.lines) == list(read_metrics(Run(run))), "one line for a step, as uft itself reads it"
    assert {sample["step"] for sample in found.samples} == {200}, "the last step's alone"
    assert found.total("tokens") == 120_000


def test_a_run_that_did_not_finish(tmp_path):
    for status in ("failed", "stopped", "paused"):
        error = "ValueError: no\nmore of it"
        found = load(make_run(tmp_path / status, status="failed", error=error, result={"status": status}))
        assert (found.status, found.finished, found.error) == (status, False, error)


def test_a_run_without_a_result_has_the_figures_so_far(tmp_path):
    whole = load(make_run(tmp_path / "whole"))
    path = make_run(tmp_path / "interrupted", status="interrupted")
    found = load(path)
    assert (found.status, found.error) == ("interrupted", None)
    assert 0 < found.total("step") < 200
    assert found.final.keys() == whole.final.keys(), "the last evaluation and the last training line"
    assert found.final["eval/nll"] == [line for line in found.lines if "eval/nll" in line][-1]["eval/nll"]
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 110, "lo')
    with held(path):
        found = load(path)
    assert (found.status, found.error) == ("running", None), "a line that is just being written is no fault"


def test_metrics_cut_within_a_line(run):
    before = load(run)
    tear(run / "metrics.jsonl")
    found = load(run)
    assert found.status == "finished"
    count = (run / "metrics.jsonl").read_text().count("\n") + 1
    assert found.error == f"metrics.jsonl breaks off at line {count}"
    assert 0 < len(found.lines) < len(before.lines)
    assert found.lines[:-1] == before.lines[: len(found.lines) - 1]
    assert found.final == before.final, "result.json was written whole"


DAMAGE = {
    "metrics.jsonl": [b"", b"\x00\xff\xfe", b"[]\n", b"3\n", b'{"loss": 1}\n', b'{"step": "x"}\n', b"[" * 100_000],
    "samples.jsonl": [b"", b"\x00", b"{}\n", b'{"step": null}\n', b'{"step": 1}\n{"st', b"[" * 100_000],
    "overrides.yaml": [b"", b"- [", b"a: b: c", b"\xff", b"3"],
    "data.json": [b"", b"[]", b"{", b"\xff"],
}


def test_a_damaged_file_leaves_the_rest(run):
    before = load(run)
    for name, contents in DAMAGE.items():
        whole = (run / name).read_bytes()
        for content in contents:
            (run / name).write_bytes(content)
            found = load(run)
            assert (found.status, found.final) == ("finished", before.final), (name, content)
        (run / name).write_bytes(whole)


FATAL = {
    "config.yaml": {None: "is not there", b"a: [": "YAML", b"- 1": "not a configuration", b"": "not a configuration"}
    | {b"\xff\xfe\x00": "utf-8", b"a: \x00": "YAML", b"{" * 5000: ""},
    "run.json": {None: "is not there", b"{": "JSON, line 1", b"[1]": "is not an object", b"": "JSON", b"\xff": "utf-8"},
    "result.json": {b"{": "JSON, line 1", b'"x"': "is not an object"},
}


def test_a_folder_that_cannot_be_trusted_is_unreadable_and_says_why(run):
    for name, contents in FATAL.items():
        whole = (run / name).read_bytes()
        for content, why in contents.items():
            (run / name).unlink() if content is None else (run / name).write_bytes(content)
            found = load(run)
            assert (found.status, len(found.lines)) == ("unreadable", 21), "what can be read is kept"
            assert found.error.startswith(f"{name}: ")
            assert why in found.error
        (run / name).write_bytes(whole)


def test_a_file_that_may_not_be_read(run, monkeypatch):
    def refuse(self, *arguments, **more):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert "config.yaml: [Errno 13] Permission denied" in load(run).error


def test_a_run_deleted_while_it_is_read(run, monkeypatch):
    real = module.read_config

    def gone(path):
        found = real(path)
        shutil.rmtree(run)
        return found

    monkeypatch.setattr(module, "read_config", gone)
    found = load(run)
    assert (found.status, found.error) == ("unreadable", "run.json: is not there")
    assert load(run).error.startswith("config.yaml: is not there"), "and one that was gone before"


def test_figures_that_are_not_finite_come_back_and_text_is_none(tmp_path):
    path = make_run(tmp_path / "a", final={"eval/nll": "nan", "eval/kl": math.inf, "eval/plain": "odd", "eval/x": None})
    lines = [{"step": 1, "stage": "nan", "loss": "nan"}, {"step": 2, "stage": "dpo", "loss": "-inf", "ok": True}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = load(path)
    assert math.isnan(found.final["eval/nll"])
    assert found.final["eval/kl"] == math.inf
    assert not {"eval/plain", "eval/x"} & found.final.keys()
    (path / "result.json").unlink()
    assert load(path).final == {"loss": -math.inf}, "the stage of a pipeline is no figure, whatever it is called"
    assert module.number(10**400) == math.inf


def test_keys_of_another_version_do_no_harm(run):
    for name in ("run.json", "result.json", "data.json"):
        (run / name).write_text(json.dumps({**json.loads((run / name).read_text()), "new": {"deep": [1]}}))
    with open(run / "config.yaml", "a") as file:
        file.write("stages:\n- {name: sft, steps: 3}\nnew: {a: 1}\n")
    found = load(run)
    assert (found.status, found.error) == ("finished", None)
    assert (found.config["new.a"], found.config["stages"]) == (1, [{"name": "sft", "steps": 3}])


def test_a_folder_that_is_no_run_is_unreadable(tmp_path):
    (tmp_path / "x").mkdir()
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    assert [load(tmp_path / name).status for name in ("x", "nowhere", "loop")] == ["unreadable"] * 3


FILES = ("metrics.jsonl", "samples.jsonl")


@pytest.fixture
def sealed(run):
    """A finished run whose lines have their checksums."""
    for name in FILES:
        lines = (run / name).read_text().splitlines()
        text = "".join(metrics.checksum_line(json.loads(line)["step"], line) for line in lines)
        metrics.checksum_file(run / name).write_text(text)
    return run


def test_a_changed_line_is_left_out_and_said(sealed):
    assert load(sealed).error is None
    for name in FILES:
        *rest, line = (sealed / name).read_text().splitlines()
        (sealed / name).write_text("\n".join([*rest, line.replace("0", "1").replace("e", "a")]) + "\n")
        found = load(sealed)
        assert f"{name}: what was written at step {json.loads(line)['step']} is damaged or lost" in found.error
    assert all(dict(sample) in map(json.loads, rest) for sample in found.samples)


def test_a_finished_run_lacks_no_end_unsaid(sealed):
    """Neither of the lines nor of their checksums."""
    result = (sealed / "result.json").read_text()
    for name, which in product(FILES, (Path, metrics.checksum_file)):
        file, last = which(sealed / name), json.loads((sealed / name).read_text().splitlines()[-1])["step"]
        whole = file.read_bytes()
        file.write_bytes(whole[:-5])
        assert f"{name}: what was written at step {last} is damaged or lost" in load(sealed).error
        (sealed / "result.json").unlink()
        if which is Path:
            assert load(sealed).error is None, "a process that dies may leave it so"
        file.write_bytes(whole)
        (sealed / "result.json").write_text(result)
