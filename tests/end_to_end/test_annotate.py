"""`uft annotate` as a person types it: against plain transformers under two tongues, killed, and trained on."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lifecycle import kill_worker, rows_of, wait_for
from plain_model import Model, between, chatml, read

Uft = Callable[..., "subprocess.CompletedProcess[str]"]
PLAYGROUND = "builtin:playground"


def said_in_the_playground(tokenizer: Any, prompt: list[dict[str, str]], turns: list[dict[str, str]]) -> Any:
    """<user> text <end> <assistant> text <end>, a word to a token, so that spaces belong to no turn."""
    names = {"user": "<user> ", "system": "<user> ", "assistant": "<assistant> "}
    return between(names.__getitem__, lambda role: "<end> ")(tokenizer, spaced(prompt), spaced(turns))


def spaced(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**turn, "content": turn["content"] + " "} for turn in turns]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def playground() -> Model:
    from uft.playground.world import model_dir

    return Model(model_dir(), said_in_the_playground)


def expected(file: Path, models: list[Model]) -> list[Any]:
    """Per row the mean over models of its replies' mean log-probs: a number, or one per reply."""
    found = []
    for row in read(file):
        means = [sum(float(m.mean(row, answer).detach()) for m in models) / len(models) for answer in row.answers]
        found.append(means if len(means) > 1 else means[0])
    return found


def job_here(*overrides: str) -> None:
    """The worker's own job within this process, which is spared seconds of imports."""
    from uft.config.compose import compose
    from uft.config.frozen import to_config
    from uft.training.making import annotate

    assert annotate(to_config(compose(list(overrides)))) == 0


def quiet(*sources: tuple[str, Path]) -> list[str]:
    return ["data=files", *(f"+data.sources.{name}.path={path}" for name, path in sources)]


@pytest.mark.slow
def test_two_models_of_different_tongues_agree_with_plain_transformers(
    uft: Uft,
    tmp_path: Path,
    write: Callable[..., Path],
    other_model: Path,
    playground: Model,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then in the other order; then the command it ends with trains at once, with a first loss of what was written."""
    kinds, other = ("demonstrations", "pairs"), f"annotate.out={tmp_path / 'other'}"
    files = {kind: write(tmp_path / "given" / f"{kind}.jsonl", rows_of(kind, 24)) for kind in kinds}
    models = [playground, Model(other_model, chatml)]
    request = ["baseline_logp", *quiet(*files.items()), "hardware=cpu"]
    done = uft("annotate", *request, f"annotate.models=[{PLAYGROUND},{other_model}]", "annotate.batch_tokens=150")
    for kind, file in files.items():
        written = lines(tmp_path / "annotated" / f"{kind}.jsonl")
        for line, numbers in zip(written, expected(file, models), strict=True):
            assert line["baseline_logp"] == pytest.approx(numbers, abs=1e-5)
    assert "demonstrations: 24 of 24 completions have baseline_logp" in done.stdout

    monkeypatch.setenv("UFT_CACHE", str(tmp_path / "another"))
    job_here("annotate.column=" + request[0], *request[1:], f"annotate.models=[{other_model},{PLAYGROUND}]", other)
    for kind in kinds:
        once, again = (lines(tmp_path / folder / f"{kind}.jsonl") for folder in ("annotated", "other"))
        for line, twin in zip(once, again, strict=True):
            assert line.pop("baseline_logp") == pytest.approx(twin.pop("baseline_logp"), abs=1e-5)
        assert once == again

    (command,) = (line for line in done.stdout.splitlines() if line.startswith("train on them:"))
    words = shlex.split(command.partition(":")[2])
    assert words[:3] == ["uft", "train", "objective=poft"]
    words += [f"model.path={other_model}", "train.steps=2", "train.batch_size=48"]  # one that knows the words
    uft(*words[1:], "eval=none", "tracking=none", "hardware=cpu", "run.dir=run")
    steps = lines(tmp_path / "run" / "metrics.jsonl")
    assert steps[0]["objective/poft"] > 0


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_was(
    start: Callable[..., subprocess.Popen[str]], uft: Uft, tmp_path: Path, write: Callable[..., Path], playground: Model
) -> None:
    """The file appears whole or not at all, and nothing that is known is asked again."""
    given = rows_of("demonstrations", 800)
    file = write(tmp_path / "rows" / "demonstrations.jsonl", given)
    request = ["baseline_logp", *quiet(("mine", file)), f"annotate.models=[{PLAYGROUND}]", "hardware=cpu"]
    request += ["annotate.out=out.jsonl", "annotate.batch_tokens=60"]
    process = start("annotate", *request)
    kept = tmp_path / "cache" / "annotations"
    wait_for(lambda: list(kept.glob("*/*.safetensors")), process)
    assert kill_worker(process)[0] == 1
    assert not (tmp_path / "out.jsonl").exists()
    before = {path: path.stat().st_mtime_ns for path in kept.glob("*/*.safetensors")}

    again = uft("annotate", *request)
    known = int(again.stdout.partition(" of ")[0].rpartition(" ")[2].replace(",", ""))
    assert known == 256 * len(before)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found = [line["baseline_logp"] for line in lines(tmp_path / "out.jsonl")]
    assert len(found) == 800
    sample = write(tmp_path / "sample" / "demonstrations.jsonl", given[::50])
    assert found[::50] == pytest.approx(expected(sample, [playground]), abs=1e-5)


@pytest.mark.slow
def test_a_run_without_the_column_names_the_command(uft: Uft, tmp_path: Path, rows: Callable[[str], Path]) -> None:
    request = quiet(("mine", rows("demonstrations")))
    refused = uft("train", "objective=poft", *request, "data.holdout=0", "tracking=none", "eval=none", code=2)
    assert "objective=poft needs baseline_logp, which 5 of 5 rows lack" in refused.stderr
    assert f"uft annotate baseline_logp data=files +data.sources.mine.path={rows('demonstrations')}" in refused.stderr
    assert not list(tmp_path.glob("outputs/*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "columns: baseline_logp, soft_label"),
        (["baselin", "data=instruct"], "did you mean  annotate.column=baseline_logp ?"),
        (["baseline_logp", "data=instruct", "annotate.model=x"], "did you mean  annotate.models ?"),
    ],
)
def test_mistakes_are_told(uft: Uft, words: list[str], said: str) -> None:
    assert said in uft("annotate", *words, code=2).stderr
